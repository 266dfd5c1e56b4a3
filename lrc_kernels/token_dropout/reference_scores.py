# SPDX-License-Identifier: Apache-2.0
"""What the scores of token dropout are, in plain PyTorch: one query row at a time against blocks of 128 keys.

In: q, k and which rows count. Out: one number per key. Memory is O(Tk * Hq), never [L, L].
"""

from __future__ import annotations

from itertools import pairwise

import torch
from torch import Tensor

BLOCK = 128
_TILE_ELEMENTS = 1 << 21


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def active_rows(query_sequence: Tensor, query_position: Tensor, num_sequences: int, query_reduce: str) -> Tensor:
    """int32 [R]: the sequence of each row that counts, -1 for the others. Computed on the device.

    Rows with position -1 (they see nothing) never count. "first" leaves the row with the smallest position of each
    sequence, the lowest index among equals; "mean" leaves all.
    """
    inside = (query_position >= 0) & (query_sequence >= 0) & (query_sequence < num_sequences)
    if query_reduce == "first":
        rows = query_sequence.shape[0]
        rank = query_position.long() * rows + torch.arange(rows, device=query_position.device)
        # One slot more than sequences takes the rows that count for none.
        slot = torch.where(inside, query_sequence.long(), num_sequences)
        smallest = rank.new_full((num_sequences + 1,), torch.iinfo(torch.int64).max)
        inside = inside & (rank == smallest.scatter_reduce(0, slot, rank, "amin")[slot])
    return torch.where(inside, query_sequence, -1).int()


def scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    row_sequence: Tensor,
    row_position: Tensor,
    block_table: Tensor | None,
    lse: Tensor | None,
    num_tokens: int,
    max_seqlen: int,
    head_reduce: str,
    one_row: bool,
    softmax_scale: float,
) -> Tensor:
    """[Tk]: per sequence the mean over its rows of reduce_h softmax_j(softmax_scale * <q_h, k_j>), j <= position."""
    starts, sequences = cu_seqlens_k.tolist(), row_sequence.tolist()
    result = torch.zeros(num_tokens, dtype=accumulation_dtype(k), device=k.device)
    for row, sequence in enumerate(sequences):
        if sequence < 0:
            continue
        start, end = starts[sequence], starts[sequence + 1]
        num_keys = min(end - start, int(row_position[row]) + 1)
        table = None if block_table is None else block_table[sequence].long()
        if num_keys > 0:
            row_lse = None if lse is None else lse[:, row]
            p = _row_scores(q[row], k, start, num_keys, table, row_lse, head_reduce, softmax_scale)
            result[start : start + num_keys] += p / sequences.count(sequence)
    return result


def _key_block(k: Tensor, start: int, first: int, count: int, table: Tensor | None) -> Tensor:
    """[Hkv, K, BLOCK] of one sequence's keys from `first` on, zeros past `count`: a matrix product of one shape adds
    in one order, wherever the sequence lies."""
    index = torch.arange(first, first + count, device=k.device)
    keys = k[start + index] if table is None else k[table[index // k.shape[1]], index % k.shape[1]]
    block = torch.zeros(BLOCK, *keys.shape[1:], dtype=accumulation_dtype(k), device=k.device)
    block[:count] = keys
    return block.permute(1, 2, 0)


def _block_logits(
    q: Tensor, k: Tensor, start: int, first: int, count: int, table: Tensor | None, softmax_scale: float
) -> Tensor:
    """[Hq, BLOCK] of one row q [Hq, K] over one block of keys, -inf past `count`."""
    heads, kv_heads = q.shape[0], k.shape[-2]
    grouped = q.to(accumulation_dtype(k)).view(kv_heads, heads // kv_heads, q.shape[1])
    logits = (grouped @ _key_block(k, start, first, count, table)).view(heads, BLOCK) * softmax_scale
    logits[:, count:] = -torch.inf
    return logits


def _exponentials(logits: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """exp(logits - their maximum), the maximum and the sum of each head of a block."""
    maximum = logits.amax(1, keepdim=True)
    p = (logits - maximum.masked_fill(maximum == -torch.inf, 0.0)).exp()
    return p, maximum, p.sum(1, keepdim=True)


def _factors(maxima: list[Tensor], sums: list[Tensor]) -> list[Tensor]:
    """What turns the exponentials of each block into probabilities; blocks in ascending order."""
    largest = torch.stack(maxima).amax(0)
    weights = [(maximum - largest).exp() for maximum in maxima]
    total = torch.zeros_like(largest)
    for sum_of_block, weight in zip(sums, weights, strict=True):
        total = total + sum_of_block * weight
    return [weight / total for weight in weights]


def _row_scores(
    q: Tensor, k: Tensor, start: int, num_keys: int, table: Tensor | None, lse: Tensor | None, head_reduce: str,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    """[num_keys] of one row q [Hq, K]: block statistics (m, l) in ascending order of blocks, then p / l."""
    blocks = [
        _block_logits(q, k, start, first, min(BLOCK, num_keys - first), table, softmax_scale)
        for first in range(0, num_keys, BLOCK)
    ]
    if lse is None:
        parts = [_exponentials(logits) for logits in blocks]
        factors = _factors([maximum for _, maximum, _ in parts], [total for *_, total in parts])
        probabilities = [p * factor for (p, *_), factor in zip(parts, factors, strict=True)]
    else:
        offset = lse[:, None].masked_fill(lse[:, None] == -torch.inf, torch.inf)
        probabilities = [(logits - offset).exp() for logits in blocks]
    return torch.cat([reduce_heads(p, head_reduce) for p in probabilities])[:num_keys]


def block_statistics(q: Tensor, k: Tensor, cu_blocks: Tensor, query_position: Tensor, softmax_scale: float) -> Tensor:
    """[2, B, Hq]: of row b over block b of at most BLOCK keys the maximum logit and the sum of exp(logit - maximum).

    Row b sees the keys 0..position of its block; where it sees none they are -inf and 0.
    """
    result = torch.zeros(2, *q.shape[:2], dtype=accumulation_dtype(k), device=k.device)
    result[0] = -torch.inf
    for b, (start, count) in enumerate(_seen(cu_blocks, query_position)):
        if count > 0:
            _, maximum, total = _exponentials(_block_logits(q[b], k, start, 0, count, None, softmax_scale))
            result[0, b], result[1, b] = maximum[:, 0], total[:, 0]
    return result


def block_factors(statistics: Tensor, cu_seqlens_k: Tensor, query_position: Tensor) -> Tensor:
    """[S, Hq, NB]: exp(block maximum - maximum) / sum of row s over its sequence, from statistics [2, S, Hq, NB]."""
    result = torch.zeros_like(statistics[0])
    for s, (_, count) in enumerate(_seen(cu_seqlens_k, query_position)):
        if count > 0:
            blocks = -(-count // BLOCK)
            maxima, sums = ([x.contiguous() for x in side[s, :, :blocks].split(1, 1)] for side in statistics)
            result[s, :, :blocks] = torch.cat(_factors(maxima, sums), 1)
    return result


def block_scores(
    q: Tensor, k: Tensor, cu_blocks: Tensor, query_position: Tensor, factor: Tensor, head_reduce: str,
    softmax_scale: float,
) -> Tensor:  # fmt: skip
    """[Tk]: reduce_h exp(logit - block maximum) * factor[b, h] of row b over block b."""
    result = torch.zeros(k.shape[0], dtype=accumulation_dtype(k), device=k.device)
    for b, (start, count) in enumerate(_seen(cu_blocks, query_position)):
        if count > 0:
            p, *_ = _exponentials(_block_logits(q[b], k, start, 0, count, None, softmax_scale))
            result[start : start + count] = reduce_heads(p * factor[b, :, None], head_reduce)[:count]
    return result


def _seen(cu_seqlens: Tensor, query_position: Tensor) -> list[tuple[int, int]]:
    """First key of each sequence, and how many of its keys its row sees."""
    starts = cu_seqlens.tolist()
    lengths = [end - start for start, end in pairwise(starts)]
    positions = query_position.tolist()
    return [(s, min(n, p + 1)) for s, n, p in zip(starts[:-1], lengths, positions, strict=True)]


def reduce_heads(x: Tensor, head_reduce: str) -> Tensor:
    """x [Hq, ...] over its heads."""
    if head_reduce == "max":
        return x.amax(0)
    return x.sum(0) if head_reduce == "sum" else x.mean(0)


def column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    query_mask: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    reduce: str,
    head_reduce: str,
    softmax_scale: float,
) -> Tensor:
    """[Tk]: column j is reduce over the rows i that see key j of exp(softmax_scale * <q_i, k_j> - lse_i).

    Row i of Lq sees key j of Lk where j <= i + Lk - Lq (causal, bottom-right aligned) and query_mask[i] holds.
    """
    result = torch.zeros(k.shape[0], dtype=accumulation_dtype(k), device=k.device)
    starts_q, starts_k = cu_seqlens_q.tolist(), cu_seqlens_k.tolist()
    mask = torch.ones(q.shape[0], dtype=torch.bool, device=q.device) if query_mask is None else query_mask
    for s in range(len(starts_k) - 1):
        rows, keys = slice(starts_q[s], starts_q[s + 1]), slice(starts_k[s], starts_k[s + 1])
        if rows.start < rows.stop and keys.start < keys.stop:
            inputs = (q[rows], k[keys], lse[:, rows], mask[rows])
            result[keys] = _sequence_column_sums(*inputs, causal, reduce, head_reduce, softmax_scale)
    return result


def _sequence_column_sums(
    q: Tensor, k: Tensor, lse: Tensor, mask: Tensor, causal: bool, reduce: str, head_reduce: str, softmax_scale: float
) -> Tensor:
    """[Lk] of one sequence, by tiles of query rows against all keys."""
    dtype, (num_rows, heads, _), (num_keys, kv_heads, _) = accumulation_dtype(k), q.shape, k.shape
    keys = k.to(dtype).permute(1, 2, 0)
    total = torch.zeros(heads, num_keys, dtype=dtype, device=k.device)
    count = torch.zeros(num_keys, dtype=dtype, device=k.device)
    o_k = torch.arange(num_keys, device=k.device)
    step = max(1, _TILE_ELEMENTS // (heads * num_keys))
    for first in range(0, num_rows, step):
        rows = torch.arange(first, min(first + step, num_rows), device=k.device)
        visible = mask[rows][:, None].expand(-1, num_keys)
        if causal:
            visible = visible & (o_k <= rows[:, None] + num_keys - num_rows)
        grouped = q[rows].to(dtype).transpose(0, 1).reshape(kv_heads, -1, q.shape[2])
        logits = (grouped @ keys).view(heads, len(rows), num_keys) * softmax_scale
        row_lse = lse[:, rows, None]
        p = (logits - row_lse).exp_().masked_fill_(~visible | (row_lse == -torch.inf), 0.0)
        total = torch.maximum(total, p.amax(1)) if reduce == "max" else total + p.sum(1)
        count += visible.sum(0)
    if reduce == "mean":
        total = total / count.clamp(min=1)
    return reduce_heads(total, head_reduce)
