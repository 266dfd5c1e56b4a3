# SPDX-License-Identifier: Apache-2.0
"""The kernels of ToMe's plan that move what was matched: to the next iteration's tokens, and at the end to the plan."""

from __future__ import annotations

import triton
import triton.language as tl

from lrc_kernels.tome.triton_plan import (
    PLAIN,
    load_or,
    magnitude_of,
    norm_of,
    num_sources,
    power_near_one_over,
    segment_of,
    store_state,
    store_unit,
    token_at,
    tokens_before,
)


@triton.jit
def split_bf16(value):
    """fp32 -> three bf16 parts whose sum holds all 24 bits: a product with 0 and 1 is then exact on tensor cores."""
    high = value.to(tl.bfloat16)
    rest = value - high.to(tl.float32)
    middle = rest.to(tl.bfloat16)
    low = (rest - middle.to(tl.float32)).to(tl.bfloat16)
    return high, middle, low


@triton.jit
def _store_next(
    unit_ptr, state_ptr, start, row, m_row, n_next, o_k, m_k, value, shield, total,
    PADDED_K: tl.constexpr, BF16: tl.constexpr, ISOLATE: tl.constexpr,
):  # fmt: skip
    """Unit vectors and states of new rows, at their set positions in the next iteration."""
    o_set = start + tl.where(row % 2 == 0, row // 2, (n_next + 1) // 2 + row // 2)
    b_x = tl.where(m_k[None, :], value, 0.0)
    if BF16:
        b_x = b_x.to(tl.bfloat16).to(tl.float32)
    b_x *= power_near_one_over(magnitude_of(b_x))[:, None]
    norm = norm_of(tl.sum(b_x * b_x, 1), BF16)
    store_state(state_ptr, o_set, m_row, norm, shield.to(tl.int32), ISOLATE)
    store_unit(unit_ptr, o_set, m_row, o_k, b_x, norm, total, PADDED_K, BF16, ISOLATE)


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_step_kernel(
    payload_ptr, size_ptr, anchor_ptr, protected_ptr, new_row_ptr,
    next_payload_ptr, next_size_ptr, next_anchor_ptr, next_protected_ptr, unit_ptr, state_ptr,
    survives_ptr, order_ptr, sources_ptr, r_ptr, cu_ptr, cu_next_ptr, count_ptr,
    total, num_segments, num_blocks, iteration, K: tl.constexpr,
    BLOCK_B: tl.constexpr, BLOCK_A: tl.constexpr, BLOCK_K: tl.constexpr, PADDED_K: tl.constexpr,
    BF16: tl.constexpr, ISOLATE: tl.constexpr, HALVING: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of A and of B, blocks of K). Moves sizes, anchors, flags and, but for the last iteration
    (next_payload_ptr None), the metric: a B row is the weighted mean of itself and the A tokens that join it, as a
    one-hot product in ascending order of A; the unmerged A rows are copied. Where a block holds all of K it writes the
    unit vectors and states of the next iteration too (unit_ptr not None). survives_ptr [T] gets a 1 at every anchor.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    n = tokens_before(count_ptr, cu_ptr, i_segment, num_segments, iteration)
    n_a = num_sources(n, i_segment, sources_ptr)
    n_b = n - n_a
    if i_block * BLOCK_B >= tl.maximum(n_a, n_b):
        return
    next_start = tl.load(cu_next_ptr + i_segment).to(tl.int64)
    rows_ptr = new_row_ptr + iteration * total.to(tl.int64) + start
    r = n // 2 if HALVING else tl.load(r_ptr + iteration * num_segments + i_segment)
    n_next = tl.load(count_ptr + iteration * num_segments + i_segment)
    num_unmerged = n_next - n_b
    o_i = i_block * BLOCK_B + tl.arange(0, BLOCK_B)
    m_b = o_i < n_b
    token = token_at(n_a + o_i, m_b, n_a, start, order_ptr)
    row = tl.load(rows_ptr + token, mask=m_b, other=-1)
    own_size = load_or(size_ptr, start + token, m_b, 1.0)
    size = own_size
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_k = o_k < K
    if next_payload_ptr is not None:
        acc = tl.zeros([BLOCK_B, BLOCK_K], tl.float32)
        broken = tl.zeros([BLOCK_B], tl.int32)
    num_tiles = tl.where((r > 0) & (i_block * BLOCK_B < n_b), n_a, 0)
    for a in range(0, num_tiles, BLOCK_A):
        o_a = a + tl.arange(0, BLOCK_A)
        m_a = o_a < n_a
        token_a = token_at(o_a, m_a, n_a, start, order_ptr)
        row_a = tl.load(rows_ptr + token_a, mask=m_a, other=-1)
        merges = row_a >= num_unmerged
        size_a = tl.where(merges, load_or(size_ptr, start + token_a, m_a, 1.0), 0.0)
        hit = merges[None, :] & (row_a[None, :] == row[:, None])
        size += tl.sum(tl.where(hit, size_a[None, :], 0.0), 1)
        if next_payload_ptr is not None:
            a_ptr = payload_ptr + (start + token_a)[:, None] * K + o_k[None, :]
            value = tl.load(a_ptr, mask=m_a[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            # A token that does not merge here may hold NaN, and 0 * NaN would reach every row.
            value = tl.where((size_a == 0.0)[:, None], 0.0, value * size_a[:, None])
            if not ISOLATE:
                # One that does makes its row NaN and no other: a row's similarities are NaN whichever entry is.
                bad = tl.max(tl.where(tl.abs(value) < float("inf"), 0, 1), 1)
                value = tl.where((bad != 0)[:, None], 0.0, value)
                broken = tl.maximum(broken, tl.max(tl.where(hit, bad[None, :], 0), 1))
            high, middle, low = split_bf16(value)
            b_hit = hit.to(tl.float32).to(tl.bfloat16)
            acc = tl.dot(b_hit, low, acc)
            acc = tl.dot(b_hit, middle, acc)
            acc = tl.dot(b_hit, high, acc)

    first_column = tl.program_id(1) == 0
    shield = load_or(protected_ptr, start + token, m_b, 0)
    if first_column:
        anchor = token if anchor_ptr is None else tl.load(anchor_ptr + start + token, mask=m_b, other=0)
        tl.store(next_size_ptr + next_start + row, size, mask=m_b)
        tl.store(next_anchor_ptr + next_start + row, anchor, mask=m_b)
        if survives_ptr is not None:
            tl.store(survives_ptr + start + anchor, 1, mask=m_b)
        if next_protected_ptr is not None:
            tl.store(next_protected_ptr + next_start + row, shield, mask=m_b)
    if next_payload_ptr is not None:
        own_ptr = payload_ptr + (start + token)[:, None] * K + o_k[None, :]
        own = tl.load(own_ptr, mask=m_b[:, None] & m_k[None, :], other=0.0).to(tl.float32)
        # Where nothing is asked to merge the rows stay what they are, those of size 0 too.
        own_size, size = tl.where(r == 0, 1.0, own_size), tl.where(r == 0, 1.0, size)
        total_b = tl.where((own_size == 0.0)[:, None], 0.0, own * own_size[:, None]) + acc
        # `/` is off by two ulps on a GPU, and a mean of equal tokens would no longer tie with them.
        mean = tl.where((size == 0.0)[:, None], 0.0, tl.div_rn(total_b, tl.broadcast_to(size[:, None], total_b.shape)))
        if not ISOLATE:
            mean = tl.where((broken != 0)[:, None], float("nan"), mean)
        out_ptr = next_payload_ptr + (next_start + row)[:, None] * K + o_k[None, :]
        tl.store(out_ptr, mean, mask=m_b[:, None] & m_k[None, :])
        if unit_ptr is not None:
            _store_next(
                unit_ptr, state_ptr, start, row, m_b, n_next, o_k, m_k, mean, shield, total, PADDED_K, BF16, ISOLATE
            )
    if not HALVING:
        m_a = o_i < n_a
        token_a = token_at(o_i, m_a, n_a, start, order_ptr)
        row_a = tl.load(rows_ptr + token_a, mask=m_a, other=-1)
        m_a = m_a & (row_a >= 0) & ((row_a < num_unmerged) | (r == 0))
        size_a = load_or(size_ptr, start + token_a, m_a, 1.0)
        shield_a = load_or(protected_ptr, start + token_a, m_a, 0)
        if first_column:
            anchor_a = token_a if anchor_ptr is None else tl.load(anchor_ptr + start + token_a, mask=m_a, other=0)
            tl.store(next_size_ptr + next_start + row_a, size_a, mask=m_a)
            tl.store(next_anchor_ptr + next_start + row_a, anchor_a, mask=m_a)
            if survives_ptr is not None:
                tl.store(survives_ptr + start + anchor_a, 1, mask=m_a)
            if next_protected_ptr is not None:
                tl.store(next_protected_ptr + next_start + row_a, shield_a, mask=m_a)
        if next_payload_ptr is not None:
            a_ptr = payload_ptr + (start + token_a)[:, None] * K + o_k[None, :]
            b_a = tl.load(a_ptr, mask=m_a[:, None] & m_k[None, :], other=0.0).to(tl.float32)
            size_a = tl.where(r == 0, 1.0, size_a)
            divisor = tl.broadcast_to(size_a[:, None], b_a.shape)
            b_a = tl.where((size_a == 0.0)[:, None], 0.0, tl.div_rn(b_a * divisor, divisor))
            out_ptr = next_payload_ptr + (next_start + row_a)[:, None] * K + o_k[None, :]
            tl.store(out_ptr, b_a, mask=m_a[:, None] & m_k[None, :])
            if unit_ptr is not None:
                _store_next(
                    unit_ptr, state_ptr, start, row_a, m_a, n_next, o_k, m_k, b_a, shield_a, total, PADDED_K, BF16,
                    ISOLATE,
                )  # fmt: skip


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_rows_kernel(
    size_ptr, anchor_ptr, survivors_ptr, size_out_ptr, anchor_out_ptr, valid_ptr, final_row_ptr, cu_ptr, cu_out_ptr,
    count_ptr, num_segments, num_blocks, num_iterations, BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of rows). Writes the packed rows, in order of their anchors where survivors_ptr [T] has
    counted the anchors up to each token of the batch, and pads the capacity that a threshold left unused with size 0.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    first = tl.load(cu_out_ptr + i_segment)
    capacity = tl.load(cu_out_ptr + i_segment + 1) - first
    n = tl.minimum(tokens_before(count_ptr, cu_ptr, i_segment, num_segments, num_iterations), capacity)
    if i_block * BLOCK >= capacity:
        return
    o_i = i_block * BLOCK + tl.arange(0, BLOCK)
    m_live = o_i < n
    size = tl.where(m_live, load_or(size_ptr, start + o_i, m_live, 1.0), 0.0)
    anchor = tl.where(m_live, o_i, 0) if anchor_ptr is None else tl.load(anchor_ptr + start + o_i, mask=m_live, other=0)
    position = o_i
    if survivors_ptr is not None:
        before = tl.load(survivors_ptr + start - 1, mask=start > 0, other=0)
        position = tl.where(m_live, tl.load(survivors_ptr + start + anchor, mask=m_live, other=0) - 1 - before, o_i)
    m_out = o_i < capacity
    out = first.to(tl.int64) + position
    tl.store(final_row_ptr + start + o_i, first + position, mask=m_live)
    tl.store(size_out_ptr + out, size, mask=m_out)
    tl.store(anchor_out_ptr + out, anchor, mask=m_out)
    tl.store(valid_ptr + out, m_live.to(tl.int8), mask=m_out)


@triton.jit(do_not_specialize=PLAIN)
def tome_plan_fwd_assign_kernel(
    new_row_ptr, final_row_ptr, size_ptr, assign_ptr, weight_ptr, size_out_ptr, anchor_out_ptr, valid_ptr,
    cu_ptr, cu_out_ptr, count_ptr, total, num_segments, num_blocks, num_iterations,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of tokens). Follows each token through the iterations to its packed output row. Without
    final_row_ptr the rows lie as the last step left them, and `valid` and the unused capacity are written here.
    """
    i_segment, i_block, start = segment_of(cu_ptr, num_blocks)
    first = tl.load(cu_out_ptr + i_segment)
    o_t = i_block * BLOCK + tl.arange(0, BLOCK)
    if final_row_ptr is None:
        m_out = o_t < tl.load(cu_out_ptr + i_segment + 1) - first
        live = o_t < tokens_before(count_ptr, cu_ptr, i_segment, num_segments, num_iterations)
        out = first.to(tl.int64) + o_t
        tl.store(valid_ptr + out, live.to(tl.int8), mask=m_out)
        tl.store(size_out_ptr + out, tl.zeros([BLOCK], tl.float32), mask=m_out & (live == 0))
        tl.store(anchor_out_ptr + out, tl.zeros([BLOCK], tl.int32), mask=m_out & (live == 0))
    m_t = o_t < tl.load(cu_ptr + i_segment + 1) - start
    weight = load_or(size_ptr, start + o_t, m_t, 1.0)
    row = o_t
    for i in range(num_iterations):
        row = tl.load(new_row_ptr + i * total.to(tl.int64) + start + row, mask=m_t, other=0)
        weight = tl.where(row < 0, 0.0, weight)
        row = tl.where(row < 0, -1 - row, row)
    final = first + row if final_row_ptr is None else tl.load(final_row_ptr + start + row, mask=m_t, other=0)
    tl.store(assign_ptr + start + o_t, final, mask=m_t)
    tl.store(weight_ptr + start + o_t, weight, mask=m_t)
