# SPDX-License-Identifier: Apache-2.0
"""Attention on CPU by the flash kernel that torch ships, one sequence at a time: arguments of the ops' schemas in,
their results out. It kills the process on empty input, reads rows as if their channels were contiguous, aligns `causal`
to the top left, gives lse 0 for a row without keys, and takes a row of NaN for one: all of that stops here."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc_kernels.attention.reference import accumulation_dtype, merge_partials, visible
from lrc_kernels.attention.vendors import rows_contiguous

# Rows of queries that share one additive mask, and its elements, so that it stays small however long the keys are.
TILE_ROWS, TILE_ELEMENTS = 256, 2**18
# Rows that are computed anew together.
SETTLED_ROWS = 64


class _Tile(NamedTuple):
    """One call of the kernel: rows of q, rows of k, and either a mask [rows, keys] or top-left causality or neither;
    `joins` where an earlier tile has seen other keys of the same rows."""

    rows: slice
    keys: slice
    mask: Tensor | None
    causal: bool
    joins: bool = False


def supports_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
                      *pack: Any) -> str | None:  # fmt: skip
    return None if dlse is None else "the CPU flash kernel takes no gradient of the lse"


def _tiles(q: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None, max_q: int, max_k: int,
           causal: bool, softmax_scale: float, left: int, right: int) -> Iterator[_Tile]:  # fmt: skip
    right = 0 if causal else right
    for (q0, q1), (k0, k1) in zip(pairwise(cu_seqlens_q.tolist()), pairwise(cu_seqlens_k.tolist()), strict=True):
        num_queries, num_keys = q1 - q0, k1 - k0
        if num_queries == 0 or num_keys == 0:
            continue
        offset = num_keys - num_queries
        open_left = left < 0 or left >= num_keys - 1
        unbounded = (right < 0 or right >= num_queries - 1) and open_left
        if key_bias is None and open_left and (unbounded or (right == 0 and offset >= 0)):
            # The keys that all queries see, then the square on the diagonal: no mask, however many keys there are.
            start = 0 if unbounded else offset
            if start > 0:
                yield _Tile(slice(q0, q1), slice(k0, k0 + start), None, False)
            yield _Tile(slice(q0, q1), slice(k0 + start, k1), None, not unbounded, start > 0)
            continue
        step = min(TILE_ROWS, max(16, TILE_ELEMENTS // num_keys))
        for first in range(0, num_queries, step):
            last = min(first + step, num_queries)
            low = 0 if left < 0 else max(0, first + offset - left)
            high = num_keys if right < 0 else min(num_keys, last + offset + right)
            if low < high:
                distance = torch.arange(low, high) - torch.arange(first + offset, last + offset)[:, None]
                mask = torch.zeros(distance.shape, dtype=accumulation_dtype(q))
                if key_bias is not None:
                    mask += key_bias[k0 + low : k0 + high]
                mask.masked_fill_(~visible(distance, causal, left, right), -torch.inf)
                yield _Tile(slice(q0 + first, q0 + last), slice(k0 + low, k0 + high), mask, False)


def _bhsd(x: Tensor) -> Tensor:
    return rows_contiguous(x)[0].transpose(0, 1)[None]


def _settle(tile: _Tile, q: Tensor, k: Tensor, v: Tensor, scale: float, out: Tensor, lse: Tensor) -> None:
    """Compute the rows anew, in place, whose lse the kernel gives as 0 or NaN: that may be a logit of 0, but it is also
    what it makes of rows whose logits are all -inf or NaN. A few rows of a head at a time: no [rows, keys] is held."""
    suspect = (lse == 0) | lse.isnan()
    column, ratio = torch.arange(k.shape[0]), q.shape[1] // k.shape[1]
    for head in suspect.any(1).nonzero()[:, 0].tolist():
        keys, values = (x[:, head // ratio].to(lse.dtype) for x in (k, v))
        for rows in suspect[head].nonzero()[:, 0].split(SETTLED_ROWS):
            logits = q[rows, head].to(lse.dtype) @ keys.T * scale
            if tile.mask is not None:
                logits = torch.where(tile.mask[rows] == -torch.inf, -torch.inf, logits + tile.mask[rows])
            if tile.causal:
                logits = logits.masked_fill(column > rows[:, None], -torch.inf)
            largest = logits.amax(1)
            wrong = lse[head, rows].isnan() | largest.isnan() | (largest == -torch.inf)
            empty = (largest == -torch.inf)[:, None]
            weights = logits.masked_fill(empty, 0).softmax(1)
            anew = torch.where(empty, 0.0, weights @ values).to(out.dtype)
            out[rows, head] = torch.where(wrong[:, None], anew, out[rows, head])
            lse[head, rows] = torch.where(wrong, logits.logsumexp(1), lse[head, rows])


def forward(q: Tensor, k: Tensor, v: Tensor, *pack: Any) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulation_dtype(q))
    for tile in _tiles(q, *pack):
        q_tile, k_tile, v_tile = q[tile.rows], k[tile.keys], v[tile.keys]
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_bhsd(q_tile), _bhsd(k_tile), _bhsd(v_tile), 0.0, tile.causal), attn_mask=tile.mask, scale=pack[6]
        )
        out_tile, lse_tile = result[0][0].transpose(0, 1), result[1][0]
        _settle(tile, q_tile, k_tile, v_tile, pack[6], out_tile, lse_tile)
        if tile.joins:
            # `merge_partials` takes a NaN lse for a block without keys; here every block has some.
            spoiled = lse[:, tile.rows].isnan() | lse_tile.isnan()
            out_tile, lse_tile = merge_partials(out[tile.rows], lse[:, tile.rows], out_tile, lse_tile)
            out_tile, lse_tile = (
                out_tile.masked_fill(spoiled.T[..., None], torch.nan),
                lse_tile.masked_fill(spoiled, torch.nan),
            )
        out[tile.rows], lse[:, tile.rows] = out_tile.to(out.dtype), lse_tile
    return out, lse


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
             *pack: Any) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    # Tiles of one sequence share its keys, and what they add is summed in fp32.
    dq, dk, dv = (torch.zeros_like(x, dtype=accumulation_dtype(x), memory_format=torch.contiguous_format)
                  for x in (q, k, v))  # fmt: skip
    dout, out = dout.to(q.dtype), out.to(q.dtype)
    # exp(s - inf) = 0: a row without keys gives no gradient.
    lse = lse.masked_fill(lse == -torch.inf, torch.inf)
    for tile in _tiles(q, *pack):
        queries, keys = tile.rows, tile.keys
        dq_tile, dk_tile, dv_tile = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
            *(_bhsd(x) for x in (dout[queries], q[queries], k[keys], v[keys], out[queries])),
            *(lse[None, :, queries], 0.0, tile.causal),
            attn_mask=tile.mask,
            scale=pack[6],
        )
        for gradient, part, at in ((dq, dq_tile, queries), (dk, dk_tile, keys), (dv, dv_tile, keys)):
            gradient[at] += part[0].transpose(0, 1)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)
