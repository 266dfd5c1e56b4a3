# SPDX-License-Identifier: Apache-2.0
"""The specification of selecting and moving rows: droppable flags [T] and a budget in, indices and gathered rows out.

Every decision is a function of one token's own values and, for the exact counts, of its rank among the droppable tokens
of its sequence; it never depends on where the sequence lies in the pack.
"""

from __future__ import annotations

import torch
from torch import Tensor

WORD = 0xFFFFFFFF
PHILOX_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
PHILOX_WEYL = (0x9E3779B9, 0xBB67AE85)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    """fp64 for fp64, else fp32."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def philox(counter: tuple[Tensor, Tensor, Tensor, Tensor], key: tuple[Tensor, Tensor]) -> tuple[Tensor, ...]:
    """Philox-4x32 with 10 rounds (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3"), four words.

    Words are int64 tensors in [0, 2^32). A product of two words wraps in int64, which leaves both of its halves right.
    """
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        product0, product1 = c0 * PHILOX_MULTIPLIERS[0], c2 * PHILOX_MULTIPLIERS[1]
        high0, high1 = (product0 >> 32) & WORD, (product1 >> 32) & WORD
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, product1 & WORD, high0 ^ c3 ^ k1, product0 & WORD
        k0, k1 = (k0 + PHILOX_WEYL[0]) & WORD, (k1 + PHILOX_WEYL[1]) & WORD
    return c0, c1, c2, c3


def sequence_of_row(cu_seqlens: Tensor, num_tokens: int) -> Tensor:
    """int64 [T]: the sequence of each packed row."""
    sequences = torch.arange(cu_seqlens.shape[0] - 1, device=cu_seqlens.device)
    return torch.repeat_interleave(sequences, cu_seqlens.diff(), output_size=num_tokens)


def random_words(
    cu_seqlens: Tensor, num_tokens: int, seed: Tensor, layer: int, sequence_ids: Tensor | None, positions: Tensor | None
) -> Tensor:
    """Word 0 of Philox for each row: key = the halves of seed, counter = (position, layer, halves of sequence id).

    Sequence ids default to 0 .. S - 1, positions to the row's index in its sequence; both count modulo their width.
    """
    sequence = sequence_of_row(cu_seqlens, num_tokens)
    position = torch.arange(num_tokens, device=seed.device) - cu_seqlens[sequence].long()
    position = position if positions is None else positions.long()
    identity = sequence if sequence_ids is None else sequence_ids[sequence]
    halves = identity & WORD, (identity >> 32) & WORD
    key = (seed & WORD).expand_as(position), ((seed >> 32) & WORD).expand_as(position)
    return philox((position & WORD, torch.full_like(position, layer), *halves), key)[0]


def sort_key(scores: Tensor) -> Tensor:
    """fp32 -> int64 in [0, 2^32) of the same order; NaN comes below -inf and -0 equals 0."""
    bits = torch.where(scores == 0, 0.0, scores).view(torch.int32).long() & WORD
    key = torch.where(bits >> 31 == 1, WORD - bits, bits + 2**31)
    return torch.where(scores.isnan(), 0, key)


def select(
    droppable: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    keep: Tensor,
    scores: Tensor | None,
    seed: Tensor,
    layer: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    num_kept: int,
    max_seqlen: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    """(indices [num_kept], inverse [T]) where sequence s keeps exactly keep[s] of its droppable tokens, and all others.

    "topk" keeps the largest scores, "random" the smallest Philox words, ties going to the lowest row; "linspace" keeps
    those of rank i * (n - 1) // (k - 1), i < k, among the n droppable tokens of the sequence (rank 0 for k = 1).
    """
    total, starts = droppable.shape[0], cu_seqlens_in[:-1].long()
    sequence = sequence_of_row(cu_seqlens_in, total)
    k = keep.long()[sequence]
    if mode == "linspace":
        before = torch.nn.functional.pad(droppable.long().cumsum(0), (1, 0))
        rank = before[:-1] - before[starts][sequence]
        n = before[cu_seqlens_in[1:].long()][sequence] - before[starts][sequence]
        k = torch.minimum(k, n)
        # Rank j is kept where the smallest i with i * (n - 1) // (k - 1) >= j gives j itself.
        gaps, steps = (n - 1).clamp(min=1), (k - 1).clamp(min=1)
        i = (rank * steps + gaps - 1) // gaps
        chosen = torch.where(k > 1, (i < k) & (i * (n - 1) // steps == rank), (k == 1) & (rank == 0))
    else:
        if mode == "topk":
            assert scores is not None
            key = WORD - sort_key(scores)
        else:
            key = random_words(cu_seqlens_in, total, seed, layer, sequence_ids, positions)
        # The droppable tokens of a sequence come first in its stretch of the order, so place and rank coincide.
        order = ((sequence << 33) | ((~droppable).long() << 32) | key).argsort(stable=True)
        place = torch.empty_like(order).scatter_(0, order, torch.arange(total, device=order.device))
        chosen = place - starts[sequence] < k
    return place_rows(chosen | ~droppable, sequence, starts, cu_seqlens_out.long(), num_kept)


def select_bernoulli(
    droppable: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    layer: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    capacity: int,
    max_seqlen: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(indices [capacity], inverse [T], cu_seqlens_out [S + 2], num_wanted [1]): a droppable token stays iff its Philox
    word is below `threshold` (paper eq. 2 for threshold = p * 2^32) and the tokens before it leave it a row.

    Rows past the kept ones are -1 and form sequence S; num_wanted is the number of rows without the limit of capacity.
    """
    total = droppable.shape[0]
    wanted = droppable & (random_words(cu_seqlens, total, seed, layer, sequence_ids, positions) < threshold)
    room = capacity - (~droppable).sum()
    kept = ~droppable | (wanted & (wanted.cumsum(0) <= room))
    before = torch.nn.functional.pad(kept.cumsum(0), (1, 0)).clamp(max=capacity)
    cu_out = torch.cat([before[cu_seqlens.long()], before.new_full((1,), capacity)])
    sequence = torch.zeros(total, dtype=torch.long, device=droppable.device)
    indices, inverse = place_rows(kept, sequence, sequence[:1], cu_out[[0, -1]], capacity)
    return indices, inverse, cu_out.int(), (wanted.sum() + (~droppable).sum()).int().reshape(1)


def place_rows(kept: Tensor, sequence: Tensor, starts: Tensor, cu_out: Tensor, num_kept: int) -> tuple[Tensor, Tensor]:
    """Kept rows of each sequence in order from its first output row on; what a sequence has no row for is dropped."""
    before = torch.nn.functional.pad(kept.long().cumsum(0), (1, 0))
    row = cu_out[sequence] + before[:-1] - before[starts][sequence]
    row = torch.where(kept & (row < cu_out[sequence + 1]), row, num_kept)
    indices = torch.full((num_kept + 1,), -1, dtype=torch.int32, device=kept.device)
    indices.scatter_(0, row, torch.arange(kept.shape[0], dtype=torch.int32, device=kept.device))
    return indices[:num_kept].clone(), torch.where(row == num_kept, -1, row).int()


def move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    """y[:, i] = x[:, index[i]] of each x [outer, rows, width], and `fill` where index[i] is -1."""
    absent = (index < 0)[:, None]
    moved = []
    for x, value in zip(tensors, fill, strict=True):
        # An empty x still has rows to give where every index is -1.
        source = x if x.shape[1] else x.new_zeros(x.shape[0], 1, x.shape[2])
        rows = source.index_select(1, index.clamp(min=0))
        moved.append(rows.masked_fill(absent, value if x.is_floating_point() or x.is_complex() else int(value)))
    return moved


def drop_tokens_rmsnorm(residual: Tensor, weight: Tensor, eps: float, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(h = residual[indices], weight * round(h * rstd), rstd), rstd = 1 / sqrt(mean(h^2) + eps) in fp32.

    As LlamaRMSNorm rounds: h * rstd to the residual's dtype first, then its product with the weight in that dtype.
    Padding rows (index -1) are 0 and have rstd 0.
    """
    dropped = move_rows([residual[None]], indices, [0.0])[0][0]
    wide = dropped.to(accumulation_dtype(residual))
    rstd = torch.where(indices < 0, 0.0, (wide.square().mean(-1) + eps).rsqrt())
    unit = (wide * rstd[:, None]).masked_fill((indices < 0)[:, None], 0.0).to(residual.dtype)
    return dropped, unit * weight.to(residual.dtype), rstd


def drop_tokens_rmsnorm_backward(
    d_dropped: Tensor, d_normed: Tensor, dropped: Tensor, weight: Tensor, rstd: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """(d_residual [T, D], d_weight [D]) with u = h * rstd, g = d_normed * weight, all in fp32:
    d_h = d_dropped + rstd * (g - u * mean(g * u)), scattered, 0 in dropped rows; d_weight = sum d_normed * round(u).
    """
    dtype = rstd.dtype
    unit = dropped.to(dtype) * rstd[:, None]
    upstream = d_normed.to(dtype)
    g = upstream * weight.to(dropped.dtype).to(dtype)
    d_rows = d_dropped.to(dtype) + rstd[:, None] * (g - unit * (g * unit).mean(-1, keepdim=True))
    d_residual = move_rows([d_rows.to(dropped.dtype)[None]], inverse, [0.0])[0][0]
    return d_residual, (upstream * unit.to(dropped.dtype).to(dtype)).sum(0).to(weight.dtype)
