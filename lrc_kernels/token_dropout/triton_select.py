# SPDX-License-Identifier: Apache-2.0
"""Selection in Triton: droppable flags [T], scores or a seed in, kept rows out. No atomics, no sort, no host sync.

The k largest 32-bit keys of a sequence are found digit by digit from 8-bit histograms, one per block of tokens; the
same histograms tell every block how many kept tokens lie before it, so that it can write its rows without waiting.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

BINS = tl.constexpr(256)
BLOCKS_AT_ONCE = tl.constexpr(16)
_PLAIN = ["layer", "num_blocks", "num_segments", "capacity", "threshold"]


@triton.jit
def _random_word(seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i):
    """Word 0 of Philox-4x32-10 for tokens o_i of a sequence, uint32."""
    seed = tl.load(seed_ptr)
    identity = i_segment.to(tl.int64) if ids_ptr is None else tl.load(ids_ptr + i_segment)
    position = o_i if positions_ptr is None else tl.load(positions_ptr + start + o_i, mask=m_i, other=0)
    c0 = position.to(tl.uint32)
    zero = tl.zeros_like(c0)
    low, high = (identity & 0xFFFFFFFF).to(tl.uint32), ((identity >> 32) & 0xFFFFFFFF).to(tl.uint32)
    k0, k1 = (seed & 0xFFFFFFFF).to(tl.uint32), ((seed >> 32) & 0xFFFFFFFF).to(tl.uint32)
    word, _, _, _ = tl.philox_impl(c0, zero + layer.to(tl.uint32), zero + low, zero + high, k0, k1, 10)
    return word


@triton.jit
def _key(scores_ptr, seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i, MODE: tl.constexpr):
    """uint32 key of each token, the largest stay: the order of fp32 with NaN last and -0 = 0, or the inverted word."""
    if MODE == "topk":
        score = tl.load(scores_ptr + start + o_i, mask=m_i, other=0.0)
        bits = tl.where(score == 0.0, 0.0, score).to(tl.uint32, bitcast=True)
        key = tl.where((bits >> 31) != 0, bits ^ 0xFFFFFFFF, bits ^ 0x80000000).to(tl.uint32)
        key = tl.where(score != score, 0, key).to(tl.uint32)
    elif MODE == "random":
        word = _random_word(seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i)
        key = word ^ 0xFFFFFFFF
    else:
        key = tl.zeros_like(o_i).to(tl.uint32)
    return key


@triton.jit
def _histogram(hist_ptr, num_read):
    """int32 [256]: the sum of the histograms of the first num_read blocks of a sequence at one level."""
    o_bin = tl.arange(0, BINS)
    total = tl.zeros([BINS], tl.int32)
    for first in range(0, num_read, BLOCKS_AT_ONCE):
        o_b = first + tl.arange(0, BLOCKS_AT_ONCE)
        offset = o_b[:, None] * BINS + o_bin[None, :]
        total += tl.sum(tl.load(hist_ptr + offset, mask=(o_b < num_read)[:, None], other=0), 0)
    return total


@triton.jit
def _digit(total, need):
    """(the digit in which the need-th largest key lies, how many keys of that digit are needed), for counts [256]."""
    o_bin = tl.arange(0, BINS)
    above = tl.sum(total, 0) - tl.cumsum(total, 0)
    digit = tl.max(tl.where(above + total >= need, o_bin, 0), 0)
    return digit, need - tl.sum(tl.where(o_bin == digit, above, 0), 0)


@triton.jit
def _descend(hist_ptr, state_ptr, keep_ptr, i_segment, num_segments, num_blocks, num_read, LEVEL: tl.constexpr):
    """(digits chosen above LEVEL as a number, keys still needed) from what the launches before LEVEL wrote."""
    if LEVEL == 0:
        return tl.full([], 0, tl.int64), tl.load(keep_ptr + i_segment).to(tl.int64)
    if LEVEL == 1:
        prefix, need = tl.full([], 0, tl.int64), tl.load(keep_ptr + i_segment).to(tl.int64)
    else:
        earlier_ptr = state_ptr + ((LEVEL - 1) * num_segments + i_segment).to(tl.int64) * 2
        prefix, need = tl.load(earlier_ptr), tl.load(earlier_ptr + 1)
    level_ptr = hist_ptr + ((LEVEL - 1) * num_segments + i_segment).to(tl.int64) * num_blocks * BINS
    digit, need = _digit(_histogram(level_ptr, num_read), need)
    return prefix * BINS + digit, need


@triton.jit(do_not_specialize=_PLAIN)
def select_tokens_fwd_histogram_kernel(
    droppable_ptr, scores_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, keep_ptr, hist_ptr, state_ptr,
    layer, num_blocks, num_segments, MODE: tl.constexpr, LEVEL: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks). hist [4, S, blocks, 256]: how often each digit LEVEL (0 is the highest) occurs among
    the droppable tokens of a block whose higher digits are those of the threshold. state [4, S, 2] keeps these digits.
    """
    i_segment = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks
    start = tl.load(cu_ptr + i_segment).to(tl.int64)
    n = tl.load(cu_ptr + i_segment + 1) - start.to(tl.int32)
    if i_block * BLOCK >= n:
        return
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n
    key = _key(scores_ptr, seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i, MODE).to(tl.int64)
    counted = m_i & (tl.load(droppable_ptr + start + o_i, mask=m_i, other=0).to(tl.int32) != 0)
    prefix, need = _descend(
        hist_ptr, state_ptr, keep_ptr, i_segment, num_segments, num_blocks, tl.cdiv(n, BLOCK), LEVEL
    )
    if LEVEL > 0:
        counted = counted & ((key >> (32 - 8 * LEVEL)) == prefix)
        if i_block == 0:
            own_ptr = state_ptr + (LEVEL * num_segments + i_segment).to(tl.int64) * 2
            tl.store(own_ptr, prefix)
            tl.store(own_ptr + 1, need)
    digit = ((key >> (24 - 8 * LEVEL)) & 0xFF).to(tl.int32)
    counts = tl.histogram(digit, BINS, mask=counted)
    block = (LEVEL * num_segments + i_segment).to(tl.int64) * num_blocks + i_block
    tl.store(hist_ptr + block * BINS + tl.arange(0, BINS), counts)


@triton.jit
def _store_rows(indices_ptr, inverse_ptr, start, o_i, m_i, kept, row):
    token = start + o_i
    tl.store(inverse_ptr + token, tl.where(kept, row, -1).to(tl.int32), mask=m_i)
    tl.store(indices_ptr + row, token.to(tl.int32), mask=kept)


@triton.jit(do_not_specialize=_PLAIN)
def select_tokens_fwd_write_kernel(
    droppable_ptr, scores_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, cu_out_ptr, keep_ptr, hist_ptr, state_ptr,
    indices_ptr, inverse_ptr, layer, num_blocks, num_segments, MODE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks). A block adds up the histograms before it, which say how many tokens stay before it."""
    i_segment = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks
    start = tl.load(cu_ptr + i_segment).to(tl.int64)
    n = tl.load(cu_ptr + i_segment + 1) - start.to(tl.int32)
    if i_block * BLOCK >= n:
        return
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < n
    droppable = m_i & (tl.load(droppable_ptr + start + o_i, mask=m_i, other=0).to(tl.int32) != 0)
    o_bin = tl.arange(0, BINS)
    num_read = tl.cdiv(n, BLOCK)
    top_ptr = hist_ptr + i_segment.to(tl.int64) * num_blocks * BINS
    before = _histogram(top_ptr, i_block)
    drop_before = tl.sum(before, 0).to(tl.int64)
    if MODE == "linspace":
        drops = tl.cumsum(droppable.to(tl.int32), 0) - droppable.to(tl.int32)
        rank = drop_before + drops
        total = tl.sum(_histogram(top_ptr, num_read), 0).to(tl.int64)
        k = tl.minimum(tl.load(keep_ptr + i_segment).to(tl.int64), total)
        gaps, steps = tl.maximum(total - 1, 1), tl.maximum(k - 1, 1)
        # The number of kept tokens of lower rank, which is also the only i that can give this rank.
        i = tl.minimum((rank * steps + gaps - 1) // gaps, k)
        hit = tl.where(k > 1, (i < k) & (i * (total - 1) // steps == rank), (k == 1) & (rank == 0))
        chosen_before, chosen = i, droppable & hit
        fixed_before = o_i - rank
    else:
        key = _key(scores_ptr, seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i, MODE).to(tl.int64)
        threshold, need = _descend(
            hist_ptr, state_ptr, keep_ptr, i_segment, num_segments, num_blocks, num_read, 4
        )  # fmt: skip
        greater_before = tl.sum(tl.where(o_bin > (threshold >> 24), before, 0), 0).to(tl.int64)
        for level in tl.static_range(1, 4):
            level_ptr = hist_ptr + (level * num_segments + i_segment).to(tl.int64) * num_blocks * BINS
            before = _histogram(level_ptr, i_block)
            digit = (threshold >> (24 - 8 * level)) & 0xFF
            greater_before += tl.sum(tl.where(o_bin > digit, before, 0), 0)
        equal_before = tl.sum(tl.where(o_bin == (threshold & 0xFF), before, 0), 0).to(tl.int64)
        greater, equal = droppable & (key > threshold), droppable & (key == threshold)
        # Three counts of a block in one scan: 20 bits hold the tokens of any block.
        packed = tl.where(m_i & ~droppable, 1, 0).to(tl.int64)
        packed += (equal.to(tl.int64) << 20) + (greater.to(tl.int64) << 40)
        counts = tl.cumsum(packed, 0) - packed
        fixed_before = i_block * BLOCK - drop_before + (counts & 0xFFFFF)
        equal_before += (counts >> 20) & 0xFFFFF
        chosen_before = greater_before + (counts >> 40) + tl.minimum(equal_before, need)
        chosen = greater | (equal & (equal_before < need))
    row = tl.load(cu_out_ptr + i_segment) + fixed_before + chosen_before
    kept = m_i & (chosen | ~droppable) & (row < tl.load(cu_out_ptr + i_segment + 1))
    _store_rows(indices_ptr, inverse_ptr, start, o_i, m_i, kept, row)


@triton.jit
def _flags(droppable_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, layer, num_blocks, threshold, BLOCK: tl.constexpr):
    """(first row, tokens of this block, which of them exist, never drop, and pass the Bernoulli draw)."""
    i_segment = tl.program_id(0) // num_blocks
    start = tl.load(cu_ptr + i_segment).to(tl.int64)
    o_i = tl.program_id(0) % num_blocks * BLOCK + tl.arange(0, BLOCK)
    m_i = o_i < tl.load(cu_ptr + i_segment + 1) - start.to(tl.int32)
    droppable = m_i & (tl.load(droppable_ptr + start + o_i, mask=m_i, other=0).to(tl.int32) != 0)
    word = _random_word(seed_ptr, layer, ids_ptr, positions_ptr, i_segment, start, o_i, m_i)
    return start, o_i, m_i, m_i & ~droppable, droppable & (word.to(tl.int64) < threshold)


@triton.jit(do_not_specialize=_PLAIN)
def select_tokens_bernoulli_fwd_count_kernel(
    droppable_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, counts_ptr, layer, num_blocks, num_segments, threshold,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks). counts [2, S * blocks]: tokens that never drop, and droppable ones that stay."""
    _, _, _, fixed, wanted = _flags(
        droppable_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, layer, num_blocks, threshold, BLOCK
    )
    tl.store(counts_ptr + tl.program_id(0), tl.sum(fixed.to(tl.int32), 0))
    tl.store(counts_ptr + num_segments.to(tl.int64) * num_blocks + tl.program_id(0), tl.sum(wanted.to(tl.int32), 0))


@triton.jit(do_not_specialize=_PLAIN)
def select_tokens_bernoulli_fwd_write_kernel(
    droppable_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, before_ptr, room_ptr, indices_ptr, inverse_ptr,
    layer, num_blocks, num_segments, threshold, capacity, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (sequences * blocks). before [2, S * blocks + 1]: the counts of all blocks before; room: rows they share."""
    start, o_i, m_i, fixed, wanted = _flags(
        droppable_ptr, seed_ptr, ids_ptr, positions_ptr, cu_ptr, layer, num_blocks, threshold, BLOCK
    )
    room = tl.load(room_ptr)
    stride = num_segments.to(tl.int64) * num_blocks + 1
    fixed_before = tl.load(before_ptr + tl.program_id(0)) + tl.cumsum(fixed.to(tl.int32), 0) - fixed.to(tl.int32)
    rank = tl.load(before_ptr + stride + tl.program_id(0)) + tl.cumsum(wanted.to(tl.int32), 0) - wanted.to(tl.int32)
    row = fixed_before + tl.minimum(rank, room)
    kept = (fixed | (wanted & (rank < room))) & (row < capacity)
    _store_rows(indices_ptr, inverse_ptr, start, o_i, m_i, kept, row)


def select_block() -> int:
    """Tokens of one program."""
    return 4096


def supports_select(*args: object) -> str | None:
    """Triton takes every call of `reference.select`."""
    return None


def launch_select(
    droppable: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, keep: Tensor, scores: Tensor | None, seed: Tensor,
    layer: int, sequence_ids: Tensor | None, positions: Tensor | None, num_kept: int, max_seqlen: int, mode: str,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.select` in five launches (two for "linspace")."""
    total, num_segments, block = droppable.shape[0], keep.shape[0], select_block()
    indices = torch.full((num_kept,), -1, dtype=torch.int32, device=droppable.device)
    inverse = torch.empty(total, dtype=torch.int32, device=droppable.device)
    num_blocks = triton.cdiv(max_seqlen, block)
    if total == 0:
        return indices, inverse
    levels = 1 if mode == "linspace" else 4
    hist = torch.empty(levels, num_segments, num_blocks, 256, dtype=torch.int32, device=droppable.device)
    state = torch.empty(levels, num_segments, 2, dtype=torch.int64, device=droppable.device)
    random = mode == "random"
    inputs = (
        droppable.view(torch.int8), scores, seed if random else None, _contiguous(sequence_ids) if random else None,
        _contiguous(positions) if random else None, cu_seqlens_in,
    )  # fmt: skip
    grid = (num_segments * num_blocks,)
    with torch.cuda.device_of(droppable):
        for level in range(levels):
            select_tokens_fwd_histogram_kernel[grid](
                *inputs, keep, hist, state, layer, num_blocks, num_segments, mode, level, block, num_warps=8
            )
        select_tokens_fwd_write_kernel[grid](
            *inputs, cu_seqlens_out, keep, hist, state, indices, inverse, layer, num_blocks, num_segments, mode, block,
            num_warps=8,
        )  # fmt: skip
    return indices, inverse


def supports_select_bernoulli(*args: object) -> str | None:
    """Triton takes every call of `reference.select_bernoulli`."""
    return None


def launch_select_bernoulli(
    droppable: Tensor, cu_seqlens: Tensor, seed: Tensor, layer: int, sequence_ids: Tensor | None,
    positions: Tensor | None, capacity: int, max_seqlen: int, threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.select_bernoulli`: two launches around the running sums of one count per block."""
    total, num_segments, block = droppable.shape[0], cu_seqlens.shape[0] - 1, select_block()
    indices = torch.full((capacity,), -1, dtype=torch.int32, device=droppable.device)
    inverse = torch.empty(total, dtype=torch.int32, device=droppable.device)
    num_blocks = triton.cdiv(max_seqlen, block)
    counts = torch.zeros(2, num_segments * num_blocks + 1, dtype=torch.int32, device=droppable.device)
    inputs = (droppable.view(torch.int8), seed, _contiguous(sequence_ids), _contiguous(positions), cu_seqlens)
    grid = (num_segments * num_blocks,)
    with torch.cuda.device_of(droppable):
        if total:
            own = counts[:, 1:].contiguous()
            select_tokens_bernoulli_fwd_count_kernel[grid](
                *inputs, own, layer, num_blocks, num_segments, threshold, block, num_warps=8
            )
            counts[:, 1:] = own.cumsum(1)
        room = (capacity - counts[0, -1]).clamp(min=0)
        if total:
            select_tokens_bernoulli_fwd_write_kernel[grid](
                *inputs, counts, room, indices, inverse, layer, num_blocks, num_segments, threshold, capacity, block,
                num_warps=8,
            )  # fmt: skip
    ends = torch.arange(num_segments + 1, device=droppable.device) * num_blocks
    cu_out = (counts[0, ends] + torch.minimum(counts[1, ends], room)).clamp(max=capacity)
    cu_out = torch.cat([cu_out, cu_out.new_full((1,), capacity)]).int()
    return indices, inverse, cu_out, counts[:, -1].sum().int().reshape(1)


def _contiguous(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.contiguous()
