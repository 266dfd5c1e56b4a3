# SPDX-License-Identifier: Apache-2.0
"""The kernels of ToMe's matching: metric [T, K] and the budget in, the merge plan out. No atomics, no host round trip.

An iteration is four launches: prepare (unit vectors), match (best partner), rank (the new row of every token) and step
(the merged metric). A segment of n tokens keeps its place in every buffer, from its first input token on; within it
"set positions" hold the tokens of set A and then those of set B, so that the match reads contiguous rows.
"""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl

HEALTHY = tl.constexpr(1)
PROTECTED = tl.constexpr(2)
FAR = tl.constexpr(2147483647)


@triton.jit
def split_bf16(value):
    """fp32 -> three bf16 parts whose sum holds all 24 bits: a product with 0 and 1 is then exact on tensor cores."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _segment(cu_ptr, num_blocks):
    """(segment, block, first token) of this program."""
    i_segment = tl.program_id(0) // num_blocks
    i_block = tl.program_id(0) % num_blocks
    return i_segment, i_block, tl.load(cu_ptr + i_segment).to(tl.int64)


@triton.jit
def _num_sources(n, i_segment, sources_ptr):
    return (n + 1) // 2 if sources_ptr is None else tl.load(sources_ptr + i_segment)


@triton.jit
def _token_at(o_set, m_set, n_a, start, order_ptr):
    """Segment-local token at each set position."""
    if order_ptr is None:
        token = tl.where(o_set < n_a, 2 * o_set, 2 * (o_set - n_a) + 1)
    else:
        token = tl.load(order_ptr + start + o_set, mask=m_set, other=0)
    return token


@triton.jit
def _load_or(ptr, offset, mask, default: tl.constexpr):
    """Values at ptr + offset, or `default` where there is no tensor."""
    return tl.where(mask, default, default) if ptr is None else tl.load(ptr + offset, mask=mask, other=default)


_PLAIN = ["num_segments", "num_blocks", "iteration", "num_iterations"]


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_prepare_kernel(
    payload_ptr, unit_ptr, state_ptr, protected_ptr, order_ptr, sources_ptr, cu_ptr, count_ptr,
    total, num_segments, num_blocks, iteration, K: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of set positions). Writes unit vectors [parts, T, PADDED_K] and state flags [T].

    fp16 parts: 256 * unit = high + low keeps 22 bits, and the factor keeps the low part above fp16's subnormal steps.
    """
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    n = tl.load(count_ptr + iteration * num_segments + i_segment)
    if i_block * BLOCK_T >= n:
        return
    n_a = _num_sources(n, i_segment, sources_ptr)
    o_set = i_block * BLOCK_T + tl.arange(0, BLOCK_T)
    m_set = o_set < n
    token = _token_at(o_set, m_set, n_a, start, order_ptr)
    row_ptr = payload_ptr + (start + token) * K
    squares = tl.zeros([BLOCK_T], tl.float32)
    for k in range(0, PADDED_K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(row_ptr[:, None] + o_k[None, :], mask=m_set[:, None] & (o_k[None, :] < K), other=0.0)
        b_x = b_x.to(tl.float32)
        if BF16:
            b_x = b_x.to(tl.bfloat16).to(tl.float32)
        squares += tl.sum(b_x * b_x, 1)
    norm = tl.sqrt_rn(squares)
    if BF16:
        norm = norm.to(tl.bfloat16).to(tl.float32)
    healthy = (norm > 0) & (norm < float("inf"))
    shield = _load_or(protected_ptr, start + token, m_set, 0).to(tl.int32)
    state = tl.where(healthy, HEALTHY, 0) | tl.where(shield != 0, PROTECTED, 0)
    tl.store(state_ptr + start + o_set, state.to(tl.int8), mask=m_set)
    divisor = tl.where(healthy, norm, 1.0)
    for k in range(0, PADDED_K, BLOCK_K):
        o_k = k + tl.arange(0, BLOCK_K)
        b_x = tl.load(row_ptr[:, None] + o_k[None, :], mask=m_set[:, None] & (o_k[None, :] < K), other=0.0)
        b_x = b_x.to(tl.float32)
        if BF16:
            b_x = b_x.to(tl.bfloat16).to(tl.float32)
        unit = tl.where(healthy[:, None], tl.div_rn(b_x, tl.broadcast_to(divisor[:, None], [BLOCK_T, BLOCK_K])), 0.0)
        out_ptr = unit_ptr + (start + o_set)[:, None] * PADDED_K + o_k[None, :]
        if BF16:
            tl.store(out_ptr, unit.to(tl.bfloat16), mask=m_set[:, None])
        else:
            high = (unit * 256.0).to(tl.float16)
            low = (unit * 256.0 - high.to(tl.float32)).to(tl.float16)
            tl.store(out_ptr, high, mask=m_set[:, None])
            tl.store(out_ptr + total.to(tl.int64) * PADDED_K, low, mask=m_set[:, None])


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


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_match_kernel(
    unit_ptr, state_ptr, score_ptr, partner_ptr, order_ptr, sources_ptr, r_ptr, cu_ptr, count_ptr,
    total, num_segments, num_blocks, iteration,
    BLOCK_A: tl.constexpr, BLOCK_B: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr, BF16: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A). Best similarity and lowest best partner of BLOCK_A tokens over all of B.

    The running maximum is kept per (row, column of the tile) and reduced once: ties go to the lowest index throughout.
    """
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    n = tl.load(count_ptr + iteration * num_segments + i_segment)
    r = tl.load(r_ptr + iteration * num_segments + i_segment)
    n_a = _num_sources(n, i_segment, sources_ptr)
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
        token_a = _token_at(o_a, m_a, n_a, start, order_ptr)
        following = tl.full([BLOCK_A], FAR, tl.int32)
        last = tl.full([BLOCK_B], -1, tl.int32)
        for j in range(0, n_b, BLOCK_B):
            o_b = j + tl.arange(0, BLOCK_B)
            m_b = o_b < n_b
            state = tl.load(state_ptr + start + n_a + o_b, mask=m_b, other=PROTECTED).to(tl.int32)
            m_open = m_b & ((state & PROTECTED) == 0)
            token_b = _token_at(n_a + o_b, m_b, n_a, start, order_ptr)
            after = m_open[None, :] & (token_b[None, :] >= token_a[:, None])
            following = tl.minimum(following, tl.min(tl.where(after, o_b[None, :], FAR), 1))
            last = tl.maximum(last, tl.where(m_open, o_b, -1))
        last_open = tl.max(last, 0)
        neighbour = tl.where(following < FAR, following, last_open)
        partner = tl.where(lonely & (last_open >= 0), neighbour, partner)
    tl.store(score_ptr + start + o_a, value, mask=m_a)
    tl.store(partner_ptr + start + o_a, partner, mask=m_a)


@triton.jit
def _rank_key(score, state):
    """int64 keys that order tokens as the rank does: protected tokens last, then by score."""
    bits = tl.where(score == 0.0, 0.0, score).to(tl.int32, bitcast=True)
    key = tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits).to(tl.int64)
    return key + tl.where((state & PROTECTED) != 0, 0, 1).to(tl.int64) * 8589934592


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_rank_kernel(
    score_ptr, partner_ptr, state_ptr, new_row_ptr, order_ptr, sources_ptr, r_ptr, cu_ptr, count_ptr,
    threshold, total, num_segments, num_blocks, iteration,
    BLOCK: tl.constexpr, HAS_THRESHOLD: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A and of B). new_row[iteration, T] of every token, and the next token count.

    Ranks by counting better tokens, which equals a stable descending sort. A token that merges with weight 0 has
    -1 - new_row.
    """
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    n = tl.load(count_ptr + iteration * num_segments + i_segment)
    r = tl.load(r_ptr + iteration * num_segments + i_segment)
    n_a = _num_sources(n, i_segment, sources_ptr)
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_a = o_i < n_a
    m_b = o_i < n - n_a
    out_ptr = new_row_ptr + iteration * total.to(tl.int64) + start
    token_a = _token_at(o_i, m_a, n_a, start, order_ptr)
    token_b = _token_at(n_a + o_i, m_b, n_a, start, order_ptr)
    next_ptr = count_ptr + (iteration + 1) * num_segments + i_segment
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
        for k in range(0, n_a, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            m_k = o_k < n_a
            score_k = tl.load(score_ptr + start + o_k, mask=m_k, other=0.0)
            state_k = tl.load(state_ptr + start + o_k, mask=m_k, other=0).to(tl.int32)
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


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_step_kernel(
    payload_ptr, size_ptr, anchor_ptr, protected_ptr, new_row_ptr,
    next_payload_ptr, next_size_ptr, next_anchor_ptr, next_protected_ptr,
    order_ptr, sources_ptr, r_ptr, cu_ptr, count_ptr,
    total, num_segments, num_blocks, iteration, K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A and of B, blocks of K). Moves sizes, anchors, flags and, but for the last iteration
    (next_payload_ptr None), the metric: a B row is the weighted mean of itself and the A tokens that join it, as a
    one-hot product in ascending order of A; the unmerged A rows are copied.
    """
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    n = tl.load(count_ptr + iteration * num_segments + i_segment)
    n_a = _num_sources(n, i_segment, sources_ptr)
    n_b = n - n_a
    if i_block * BLOCK_B >= tl.maximum(n_a, n_b):
        return
    rows_ptr = new_row_ptr + iteration * total.to(tl.int64) + start
    r = tl.load(r_ptr + iteration * num_segments + i_segment)
    num_unmerged = tl.load(count_ptr + (iteration + 1) * num_segments + i_segment) - n_b
    o_i = i_block * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_i < n_b
    token = _token_at(n_a + o_i, m_b, n_a, start, order_ptr)
    row = tl.load(rows_ptr + token, mask=m_b, other=-1)
    own_size = _load_or(size_ptr, start + token, m_b, 1.0)
    size = own_size
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    if next_payload_ptr is not None:
        acc = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
    num_tiles = tl.where((r > 0) & (i_block * BLOCK_B < n_b), n_a, 0)
    for a in range(0, num_tiles, BLOCK_A):
        o_a = a + tl.arange(0, BLOCK_A)
        m_a = o_a < n_a
        token_a = _token_at(o_a, m_a, n_a, start, order_ptr)
        row_a = tl.load(rows_ptr + token_a, mask=m_a, other=-1)
        merges = row_a >= num_unmerged
        size_a = tl.where(merges, _load_or(size_ptr, start + token_a, m_a, 1.0), 0.0)
        hit = merges[None, :] & (row_a[None, :] == row[:, None])
        size += tl.sum(tl.where(hit, size_a[None, :], 0.0), 1)
        if next_payload_ptr is not None:
            a_ptr = payload_ptr + (start + token_a)[:, None] * K + o_k[None, :]
            value = tl.load(a_ptr, mask=m_a[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            # A token that does not merge here may hold NaN, and 0 * NaN would reach every row.
            value = tl.where((size_a == 0.0)[:, None], 0.0, value * size_a[:, None])
            high, middle, low = split_bf16(value)
            b_hit = hit.to(tl.float32).to(tl.bfloat16)
            acc = tl.dot(b_hit, low, acc)
            acc = tl.dot(b_hit, middle, acc)
            acc = tl.dot(b_hit, high, acc)

    m_a = o_i < n_a
    token_a = _token_at(o_i, m_a, n_a, start, order_ptr)
    row_a = tl.load(rows_ptr + token_a, mask=m_a, other=-1)
    m_a = m_a & (row_a >= 0) & ((row_a < num_unmerged) | (r == 0))
    size_a = _load_or(size_ptr, start + token_a, m_a, 1.0)
    if tl.program_id(1) == 0:
        tl.store(next_size_ptr + start + row, size, mask=m_b)
        tl.store(next_size_ptr + start + row_a, size_a, mask=m_a)
        anchor_b = token if anchor_ptr is None else tl.load(anchor_ptr + start + token, mask=m_b, other=0)
        anchor_a = token_a if anchor_ptr is None else tl.load(anchor_ptr + start + token_a, mask=m_a, other=0)
        tl.store(next_anchor_ptr + start + row, anchor_b, mask=m_b)
        tl.store(next_anchor_ptr + start + row_a, anchor_a, mask=m_a)
        if protected_ptr is not None:
            shield_b = tl.load(protected_ptr + start + token, mask=m_b, other=0)
            shield_a = tl.load(protected_ptr + start + token_a, mask=m_a, other=0)
            tl.store(next_protected_ptr + start + row, shield_b, mask=m_b)
            tl.store(next_protected_ptr + start + row_a, shield_a, mask=m_a)
    if next_payload_ptr is not None:
        own_ptr = payload_ptr + (start + token)[:, None] * K + o_k[None, :]
        own = tl.load(own_ptr, mask=m_b[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        total_b = tl.where((own_size == 0.0)[:, None], 0.0, own * own_size[:, None]) + acc
        mean = tl.where((size == 0.0)[:, None], 0.0, total_b / size[:, None])
        out_ptr = next_payload_ptr + (start + row)[:, None] * K + o_k[None, :]
        tl.store(out_ptr, mean, mask=m_b[:, None] & m_k[None, :])
        a_ptr = payload_ptr + (start + token_a)[:, None] * K + o_k[None, :]
        b_a = tl.load(a_ptr, mask=m_a[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        b_a = tl.where((size_a == 0.0)[:, None], 0.0, b_a * size_a[:, None] / size_a[:, None])
        out_ptr = next_payload_ptr + (start + row_a)[:, None] * K + o_k[None, :]
        tl.store(out_ptr, b_a, mask=m_a[:, None] & m_k[None, :])


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_rows_kernel(
    size_ptr, anchor_ptr, size_out_ptr, anchor_out_ptr, valid_ptr, final_row_ptr, cu_ptr, cu_out_ptr, count_ptr,
    num_segments, num_blocks, num_iterations,
    BLOCK: tl.constexpr, BY_ANCHOR: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of rows). Writes the packed rows, in order of their anchors if asked to, and pads the
    capacity that a threshold left unused with size 0.
    """
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    first = tl.load(cu_out_ptr + i_segment)
    capacity = tl.load(cu_out_ptr + i_segment + 1) - first
    n = tl.minimum(tl.load(count_ptr + num_iterations * num_segments + i_segment), capacity)
    if i_block * BLOCK >= capacity:
        return
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_live = o_i < n
    size = tl.where(m_live, _load_or(size_ptr, start + o_i, m_live, 1.0), 0.0)
    anchor = tl.where(m_live, o_i, 0) if anchor_ptr is None else tl.load(anchor_ptr + start + o_i, mask=m_live, other=0)
    position = o_i
    if BY_ANCHOR and anchor_ptr is not None:
        before = tl.zeros([BLOCK], tl.int32)
        for k in range(0, n, BLOCK):
            o_k = k + tl.arange(0, BLOCK)
            anchor_k = tl.load(anchor_ptr + start + o_k, mask=o_k < n, other=FAR)
            before += tl.sum((anchor_k[None, :] < anchor[:, None]).to(tl.int32), 1)
        position = tl.where(m_live, before, o_i)
    m_out = o_i < capacity
    out = first.to(tl.int64) + position
    tl.store(final_row_ptr + start + o_i, first + position, mask=m_live)
    tl.store(size_out_ptr + out, size, mask=m_out)
    tl.store(anchor_out_ptr + out, anchor, mask=m_out)
    tl.store(valid_ptr + out, m_live.to(tl.int8), mask=m_out)


@triton.jit(do_not_specialize=_PLAIN)
def tome_plan_fwd_assign_kernel(
    new_row_ptr, final_row_ptr, size_ptr, assign_ptr, weight_ptr, cu_ptr,
    total, num_blocks, num_iterations,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of tokens). Follows each token through the iterations to its packed output row."""
    i_segment, i_block, start = _segment(cu_ptr, num_blocks)
    n = tl.load(cu_ptr + i_segment + 1) - start
    o_t = i_block * BLOCK + tl.arange(0, BLOCK)
    m_t = o_t < n
    weight = _load_or(size_ptr, start + o_t, m_t, 1.0)
    row = o_t
    for i in range(num_iterations):
        row = tl.load(new_row_ptr + i * total.to(tl.int64) + start + row, mask=m_t, other=0)
        weight = tl.where(row < 0, 0.0, weight)
        row = tl.where(row < 0, -1 - row, row)
    tl.store(assign_ptr + start + o_t, tl.load(final_row_ptr + start + row, mask=m_t, other=0), mask=m_t)
    tl.store(weight_ptr + start + o_t, weight, mask=m_t)


# Of the kernels with matrix products; four warps would not hold their tiles in registers on sm_80.
MATRIX_WARPS = 8


class PlanBlocks(NamedTuple):
    """Tiles: tokens of A and of B in the match, tokens elsewhere; rows, A tokens, K of the step; K, padded K."""

    match_a: int
    match_b: int
    tokens: int
    step_b: int
    step_a: int
    step_k: int
    k: int
    padded_k: int


def plan_blocks(width: int) -> PlanBlocks:
    """Tile sizes for a metric of `width` channels; nothing else decides, so that a clip alone gives a batch's bits."""
    if width <= 128:
        k = padded = max(16, triton.next_power_of_2(width))
    else:
        k, padded = 64, triton.cdiv(width, 64) * 64
    return PlanBlocks(match_a=128, match_b=32, tokens=64, step_b=64, step_a=32, step_k=min(64, k), k=k, padded_k=padded)
