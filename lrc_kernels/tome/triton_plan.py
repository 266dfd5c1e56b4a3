# SPDX-License-Identifier: Apache-2.0
"""The kernels of ToMe's matching: metric [T, K] and the budget in, the merge plan out. No atomics, no host round trip.

An iteration is three launches: match (best partner), rank (the new row of every token) and step (the merged metric and
its unit vectors); in a pure halving all of A merges, the match knows the new rows, and nothing is ranked. A segment
keeps its place in every buffer, from its first input token on; within it "set positions" hold the tokens of set A and
then those of set B, so that the match reads contiguous rows.

Under `zero_policy="reference"` (ISOLATE False) a NaN similarity is kept as +inf, which no cosine reaches: the largest,
the first of its row, and the first to merge, as torch.max and a descending argsort have it.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl

HEALTHY = tl.constexpr(1)
PROTECTED = tl.constexpr(2)
FAR = tl.constexpr(2147483647)


@triton.jit
def segment_of(cu_ptr, num_blocks):
    """(segment, block, first token) of this program."""
    i_segment = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks
    return i_segment, i_block, tl.load(cu_ptr + i_segment).to(tl.int64)


@triton.jit
def tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration):
    """Tokens of a segment before an iteration; count_ptr [I, S] holds those after each."""
    if iteration == 0:
        n = tl.load(cu_ptr + i_segment + 1) - tl.load(cu_ptr + i_segment)
    else:
        n = tl.load(count_ptr + (iteration - 1) * num_segments + i_segment)
    return n


@triton.jit
def num_sources(n, i_segment, sources_ptr):
    return (n + 1) // 2 if sources_ptr is None else tl.load(sources_ptr + i_segment)


@triton.jit
def token_at(o_set, m_set, n_a, start, order_ptr):
    """Segment-local token at each set position."""
    if order_ptr is None:
        token = tl.where(o_set < n_a, 2 * o_set, 2 * (o_set - n_a) + 1)
    else:
        token = tl.load(order_ptr + start + o_set, mask=m_set, other=0)
    return token


@triton.jit
def load_or(ptr, offset, mask, default: tl.constexpr):
    """Values at ptr + offset, or `default` where there is no tensor."""
    return tl.where(mask, default, default) if ptr is None else tl.load(ptr + offset, mask=mask, other=default)


@triton.jit
def magnitude_of(b_x):
    """The bits of the largest magnitude in each row of fp32, as int32: NaN is larger than infinity."""
    return tl.max(b_x.to(tl.int32, bitcast=True) & 0x7FFFFFFF, 1)


@triton.jit
def power_near_one_over(magnitude):
    """`reference.power_near_one_over` of what has these bits."""
    exponent = magnitude >> 23
    power = (tl.maximum(254 - exponent, 1) << 23).to(tl.float32, bitcast=True)
    return tl.where(exponent == 255, 1.0, power)


@triton.jit
def norm_of(squares, BF16: tl.constexpr):
    norm = tl.sqrt_rn(squares)
    return norm.to(tl.bfloat16).to(tl.float32) if BF16 else norm


@triton.jit
def store_state(state_ptr, o_set, m_set, norm, shield, ISOLATE: tl.constexpr):
    healthy = (norm > 0) & (norm < float("inf"))
    state = tl.where(healthy, HEALTHY, 0 if ISOLATE else HEALTHY) | tl.where(shield != 0, PROTECTED, 0)
    tl.store(state_ptr + o_set, state.to(tl.int8), mask=m_set)


@triton.jit
def store_unit(
    unit_ptr, o_set, m_set, o_k, b_x, norm, total, PADDED_K: tl.constexpr, BF16: tl.constexpr, ISOLATE: tl.constexpr
):
    """Unit vectors [parts, T, PADDED_K]; under ISOLATE those of zero and non-finite tokens are 0.

    fp16 parts: 256 * unit = high + low keeps 22 bits, and the factor keeps the low part above fp16's subnormal steps.
    """
    healthy = (norm > 0) & (norm < float("inf"))
    divisor = tl.where(healthy, norm, 1.0) if ISOLATE else norm
    unit = tl.div_rn(b_x, tl.broadcast_to(divisor[:, None], b_x.shape))
    if ISOLATE:
        unit = tl.where(healthy[:, None], unit, 0.0)
    out_ptr = unit_ptr + o_set[:, None] * PADDED_K + o_k[None, :]
    if BF16:
        tl.store(out_ptr, unit.to(tl.bfloat16), mask=m_set[:, None])
    else:
        high = (unit * 256.0).to(tl.float16)
        low = (unit * 256.0 - high.to(tl.float32)).to(tl.float16)
        tl.store(out_ptr, high, mask=m_set[:, None])
        tl.store(out_ptr + total.to(tl.int64) * PADDED_K, low, mask=m_set[:, None])


PLAIN = ["total", "num_segments", "num_blocks", "iteration", "num_iterations"]


@triton.jit
def _load_rounded(row_ptr, o_k, m_row, K: tl.constexpr, BF16: tl.constexpr):
    b_x = tl.load(row_ptr[:, None] + o_k[None, :], mask=m_row[:, None] & (o_k[None, :] < K), other=0.0)
    b_x = b_x.to(tl.float32)
    return b_x.to(tl.bfloat16).to(tl.float32) if BF16 else b_x


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_prepare_kernel(
    payload_ptr, unit_ptr, state_ptr, protected_ptr, order_ptr, sources_ptr, cu_ptr, count_ptr,
    total, num_segments, num_blocks, iteration, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr, BF16: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of set positions). Unit vectors and state flags of the tokens before an iteration."""
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    n = tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration)
    if i_block * BLOCK_T >= n:
        return
    n_a = num_sources(n, i_segment, sources_ptr)
    o_set = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    m_set = o_set < n
    token = token_at(o_set, m_set, n_a, start, order_ptr)
    row_ptr = payload_ptr + (start + token) * K
    magnitude = tl.zeros([BLOCK_T], tl.int32)
    power = power_near_one_over(magnitude)
    squares = tl.zeros([BLOCK_T], tl.float32)
    for k in range(0, PADDED_K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = _load_rounded(row_ptr, o_k, m_set, K, BF16)
        magnitude = tl.maximum(magnitude, magnitude_of(b_x))
        next_power = power_near_one_over(magnitude)
        shrink = tl.div_rn(next_power, power)
        power = next_power
        b_x *= power[:, None]
        squares = squares * shrink * shrink + tl.sum(b_x * b_x, 1)
    norm = norm_of(squares, BF16)
    shield = load_or(protected_ptr, start + token, m_set, 0).to(tl.int32)
    store_state(state_ptr, start + o_set, m_set, norm, shield, ISOLATE)
    for k in range(0, PADDED_K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = _load_rounded(row_ptr, o_k, m_set, K, BF16) * power[:, None]
        store_unit(unit_ptr, start + o_set, m_set, o_k, b_x, norm, total, PADDED_K, BF16, ISOLATE)


@triton.jit
def _load_parts(row_ptr, o_k, m_row, low, BF16: tl.constexpr):
    """High and low part [rows, chunk of K] of unit vectors; the same twice where there is one part."""
    high = tl.load(row_ptr[:, None] + o_k[None, :], mask=m_row[:, None], other=0.0)
    rest = high if BF16 else tl.load(row_ptr[:, None] + low + o_k[None, :], mask=m_row[:, None], other=0.0)
    return high, rest


@triton.jit
def _similarity(a, a_low, b_ptr, o_k, m_b, low, acc, BF16: tl.constexpr):
    """acc + A B^T over one chunk of K, from 16-bit parts: the product of the two low parts is below 2^-22."""
    b, b_low = _load_parts(b_ptr, o_k, m_b, low, BF16)
    if not BF16:
        acc = tl.dot(a_low, tl.trans(b), acc)
        acc = tl.dot(a, tl.trans(b_low), acc)
    return tl.dot(a, tl.trans(b), acc)


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_match_kernel(
    unit_ptr, state_ptr, score_ptr, partner_ptr, new_row_ptr, order_ptr, sources_ptr, r_ptr, cu_ptr, count_ptr,
    total, num_segments, num_blocks, iteration,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr, BF16: tl.constexpr,
    ISOLATE: tl.constexpr, HALVING: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A). Best similarity and lowest best partner of BLOCK_A tokens over all of B; under
    HALVING, where all of A merges, what the rank kernel would write from them.

    The running maximum is kept per (row, column of the tile) and reduced once: ties go to the lowest index throughout.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    n = tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration)
    r = n // 2 if HALVING else tl.load(r_ptr + iteration * num_segments + i_segment)
    n_a = num_sources(n, i_segment, sources_ptr)
    if (r == 0) | (i_block * BLOCK_A >= n_a):
        return
    n_b = n - n_a
    o_a = i_block * BLOCK_A + tl.arange(0, BLOCK_A)
    m_a = o_a < n_a
    a_ptr = unit_ptr + (start + o_a) * PADDED_K
    low = total.to(tl.int64) * PADDED_K
    if PADDED_K == BLOCK_K:
        a, a_low = _load_parts(a_ptr, tl.arange(0, BLOCK_K), m_a, low, BF16)
    best = tl.full([BLOCK_A, BLOCK_B], -float("inf"), tl.float32)
    best_tile = tl.zeros([BLOCK_A, BLOCK_B], tl.int32)
    for j in range(0, n_b, BLOCK_B):
        o_b = j + tl.arange(0, BLOCK_B)
        m_b = o_b < n_b
        b_ptr = unit_ptr + (start + n_a + o_b) * PADDED_K
        score = tl.zeros([BLOCK_A, BLOCK_B], tl.float32)
        if PADDED_K == BLOCK_K:
            score = _similarity(a, a_low, b_ptr, tl.arange(0, BLOCK_K), m_b, low, score, BF16)
        else:
            for k in range(0, PADDED_K, BLOCK_K):
                o_k = k + tl.arange(0, BLOCK_K)
                a, a_low = _load_parts(a_ptr, o_k, m_a, low, BF16)
                score = _similarity(a, a_low, b_ptr, o_k, m_b, low, score, BF16)
        score = score.to(tl.bfloat16).to(tl.float32) if BF16 else score * (1.0 / 65536.0)
        if not ISOLATE:
            score = tl.where(score != score, float("inf"), score)
        state = tl.load(state_ptr + start + n_a + o_b, mask=m_b, other=0).to(tl.int32)
        score = tl.where((state == HEALTHY)[None, :], score, -float("inf"))
        better = score > best
        best = tl.where(better, score, best)
        best_tile = tl.where(better, j, best_tile)
    value = tl.max(best, 1)
    column = best_tile + tl.arange(0, BLOCK_B)[None, :]
    partner = tl.min(tl.where(best == value[:, None], column, FAR), 1)
    state_a = tl.load(state_ptr + start + o_a, mask=m_a, other=0).to(tl.int32)
    value = tl.where((state_a & HEALTHY) != 0, value, -float("inf"))
    lonely = m_a & (value == -float("inf"))
    if tl.max(lonely.to(tl.int32), 0) > 0:
        token_a = token_at(o_a, m_a, n_a, start, order_ptr)
        following = tl.full([BLOCK_A], FAR, tl.int32)
        last = tl.full([BLOCK_B], -1, tl.int32)
        for j in range(0, n_b, BLOCK_B):
            o_b = j + tl.arange(0, BLOCK_B)
            m_b = o_b < n_b
            state = tl.load(state_ptr + start + n_a + o_b, mask=m_b, other=PROTECTED).to(tl.int32)
            m_open = m_b & ((state & PROTECTED) == 0)
            token_b = token_at(n_a + o_b, m_b, n_a, start, order_ptr)
            after = m_open[None, :] & (token_b[None, :] >= token_a[:, None])
            following = tl.minimum(following, tl.min(tl.where(after, o_b[None, :], FAR), 1))
            last = tl.maximum(last, tl.where(m_open, o_b, -1))
        last_open = tl.max(last, 0)
        neighbour = tl.where(following < FAR, following, last_open)
        partner = tl.where(lonely & (last_open >= 0), neighbour, partner)
    if HALVING:
        out_ptr = new_row_ptr + iteration * total.to(tl.int64) + start
        row = tl.where((state_a & HEALTHY) != 0, partner, -1 - partner)
        tl.store(out_ptr + 2 * o_a, row, mask=m_a)
        tl.store(out_ptr + 2 * o_a + 1, o_a, mask=m_a)
        if i_block == 0:
            tl.store(count_ptr + iteration * num_segments + i_segment, n_b)
    else:
        tl.store(score_ptr + start + o_a, value, mask=m_a)
        tl.store(partner_ptr + start + o_a, partner, mask=m_a)


@triton.jit
def _rank_key(score, state):
    """int64 keys that order tokens as the rank does: protected tokens last, then by score."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return key + tl.where((state & PROTECTED) != 0, 0, 1).to(tl.int64) * 8589934592


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_key_kernel(
    score_ptr, state_ptr, key_ptr, sources_ptr, cu_ptr, count_ptr, num_segments, num_blocks, iteration,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of set positions). int64 keys [T] whose stable ascending sort ranks the A tokens of each
    segment at its start: segment * 2^34, plus what falls as the rank key rises; everything but A comes last.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    end = tl.load(cu_ptr + i_segment + 1)
    n = tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration)
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_i = start + o_i < end
    m_a = o_i < num_sources(n, i_segment, sources_ptr)
    score = tl.load(score_ptr + start + o_i, mask=m_i & m_a, other=0.0)
    state = tl.load(state_ptr + start + o_i, mask=m_i & m_a, other=0).to(tl.int32)
    falling = tl.where(m_a, 10737418240 - _rank_key(score, state), 17179869183)
    tl.store(key_ptr + start + o_i, i_segment.to(tl.int64) * 17179869184 + falling, mask=m_i)


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_rank_kernel(
    score_ptr, partner_ptr, state_ptr, rank_ptr, new_row_ptr, order_ptr, sources_ptr, r_ptr, cu_ptr, count_ptr,
    threshold, total, num_segments, num_blocks, iteration,
    BLOCK: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A and of B). new_row[iteration, T] of every token, and the next token count.

    Ranks by counting better tokens, which equals a stable descending sort, or takes those of rank_ptr [T], which count
    from the first token of the batch. A token that merges with weight 0 has -1 - new_row.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    n = tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration)
    r = tl.load(r_ptr + iteration * num_segments + i_segment)
    n_a = num_sources(n, i_segment, sources_ptr)
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_a = o_i < n_a
    m_b = o_i < n - n_a
    out_ptr = new_row_ptr + iteration * total.to(tl.int64) + start
    token_a = token_at(o_i, m_a, n_a, start, order_ptr)
    token_b = token_at(n_a + o_i, m_b, n_a, start, order_ptr)
    next_ptr = count_ptr + iteration * num_segments + i_segment
    if r == 0:
        tl.store(out_ptr + token_a, token_a, mask=m_a)
        tl.store(out_ptr + token_b, token_b, mask=m_b)
        if i_block == 0:
            tl.store(next_ptr, n)
        return
    score = tl.load(score_ptr + start + o_i, mask=m_a, other=0.0)
    state = tl.load(state_ptr + start + o_i, mask=m_a, other=0).to(tl.int32)
    rank = tl.zeros([BLOCK], tl.int32)
    if (r < n_a) | HAS_THRESHOLD:
        key = _rank_key(score, state)
        eligible = tl.zeros([BLOCK], tl.int32)
        if rank_ptr is not None:
            rank = (tl.load(rank_ptr + start + o_i, mask=m_a, other=0) - start).to(tl.int32)
        counted = n_a if rank_ptr is None or HAS_THRESHOLD else 0
        for k in range(0, counted, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            m_k = o_k < n_a
            score_k = tl.load(score_ptr + start + o_k, mask=m_k, other=0.0)
            state_k = tl.load(state_ptr + start + o_k, mask=m_k, other=0).to(tl.int32)
            if rank_ptr is None:
                key_k = _rank_key(score_k, state_k)
                tie = (key_k[None, :] == key[:, None]) & (o_k[None, :] < o_i[:, None])
                better = m_k[None, :] & ((key_k[None, :] > key[:, None]) | tie)
                rank += tl.sum(better.to(tl.int32), 1)
            if HAS_THRESHOLD:
                above = m_k & ((state_k & PROTECTED) == 0) & (score_k >= threshold)
                eligible += above.to(tl.int32)
        if HAS_THRESHOLD:
            r = tl.minimum(r, tl.sum(eligible, 0))
    partner = tl.load(partner_ptr + start + o_i, mask=m_a, other=0)
    num_unmerged = n_a - r
    merges = rank < r
    row_a = tl.where(merges, num_unmerged + partner, rank - r)
    row_a = tl.where(merges & ((state & HEALTHY) == 0), -1 - row_a, row_a)
    tl.store(out_ptr + token_a, row_a, mask=m_a)
    tl.store(out_ptr + token_b, num_unmerged + o_i, mask=m_b)
    if i_block == 0:
        tl.store(next_ptr, n - r)


# Of the kernels with matrix products, whose tiles four warps of sm_80 would not hold in registers. A wave of an AMD GPU
# has twice the lanes of a warp, and three stages would not fit its 64 KiB of local memory.
MATRIX_WARPS, MATRIX_STAGES = (4, 2) if torch.version.hip else (8, 3)


class PlanBlocks(NamedTuple):
    """Tiles: tokens of A and of B in the match, tokens elsewhere; rows and A tokens of the step; K, padded K."""

    match_a: int
    match_b: int
    tokens: int
    step_b: int
    step_a: int
    k: int
    padded_k: int


def plan_blocks(width: int) -> PlanBlocks:
    """Tile sizes for a metric of `width` channels; nothing else decides, so that a clip alone gives a batch's bits."""
    if width <= 128:
        k = padded = max(16, triton.next_power_of_2(width))
    else:
        k, padded = 64, triton.cdiv(width, 64) * 64
    return PlanBlocks(match_a=128, match_b=32, tokens=64, step_b=64, step_a=32, k=k, padded_k=padded)
