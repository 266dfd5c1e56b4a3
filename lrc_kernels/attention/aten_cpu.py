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

from lrc_kernels.attention.reference import accumulation_dtype, visible
from lrc_kernels.attention.vendors import rows_contiguous

# Rows of queries that share one additive mask, so that it stays small beside the keys they see.
TILE_ROWS = 256


class _Tile(NamedTuple):
    """One call of the kernel: rows of q, rows of k, and either a mask [rows, keys] or top-left causality or neither."""

    rows: slice
    keys: slice
    mask: Tensor | None
    causal: bool


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
        unbounded = (right < 0 or right >= num_queries - 1) and (left < 0 or left >= num_keys - 1)
        if key_bias is None and (unbounded or (right == 0 and offset == 0 and (left < 0 or left >= num_keys - 1))):
            yield _Tile(slice(q0, q1), slice(k0, k1), None, not unbounded)
            continue
        for first in range(0, num_queries, TILE_ROWS):
            last = min(first + TILE_ROWS, num_queries)
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


def _sees_nonfinite(tile: _Tile, q: Tensor, k: Tensor) -> Tensor:
    """bool [Hq, rows]: a query that, or one of whose visible keys, is not finite."""
    rows, keys = q.shape[0], k.shape[0]
    seen = torch.ones(rows, keys, dtype=torch.bool).tril() if tile.causal else torch.ones(rows, keys, dtype=torch.bool)
    if tile.mask is not None:
        seen = tile.mask > -torch.inf
    bad_keys = (~k.isfinite()).any(-1).T.repeat_interleave(q.shape[1] // k.shape[1], 0)
    return (~q.isfinite()).any(-1).T | (seen & bad_keys[:, None]).any(-1)


def forward(q: Tensor, k: Tensor, v: Tensor, *pack: Any) -> tuple[Tensor, Tensor]:
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulation_dtype(q))
    for tile in _tiles(q, *pack):
        q_tile, k_tile, v_tile = q[tile.rows], k[tile.keys], v[tile.keys]
        result = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            *(_bhsd(q_tile), _bhsd(k_tile), _bhsd(v_tile), 0.0, tile.causal), attn_mask=tile.mask, scale=pack[6]
        )
        out_tile, lse_tile = result[0][0].transpose(0, 1), result[1][0]
        suspect = lse_tile == 0
        if tile.mask is not None:
            empty = (tile.mask == -torch.inf).all(-1)
            lse_tile, suspect = lse_tile.masked_fill(empty, -torch.inf), suspect & ~empty
        if bool(suspect.any()):
            spoiled = suspect & _sees_nonfinite(tile, q_tile, k_tile)
            lse_tile = lse_tile.masked_fill(spoiled, torch.nan)
            out_tile = out_tile.masked_fill(spoiled.T[..., None], torch.nan)
        out[tile.rows], lse[:, tile.rows] = out_tile, lse_tile
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
