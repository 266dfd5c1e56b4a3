# SPDX-License-Identifier: Apache-2.0
"""Backward kernels of varlen attention: dout, q, k, v and the final out and lse of all keys -> dq, dk, dv of this
block of keys. P is computed again from lse. A key tile's owner walks the queries of its whole group of heads, so dk and
dv are sums in one fixed order, without atomics.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc_kernels.attention.triton_tiles import (
    PRECISION,
    Blocks,
    compute_capability,
    load_tile,
    load_vector,
    locate_tile,
    num_slots,
    other_side,
    padded_head_dim,
    search_steps,
    unit_stride,
    visited_tiles,
    why_unsupported,
    window_of,
    within,
)


@triton.jit(do_not_specialize=["num_rows", "stride_lse", "stride_dlse_head"])
def attention_bwd_delta_kernel(
    dout_ptr, out_ptr, lse_ptr, dlse_ptr, safe_lse_ptr, delta_ptr, num_rows, stride_dout_row, stride_dout_head,
    stride_out_row, stride_out_head, stride_lse, stride_dlse_head, stride_dlse_row,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, Hq). delta [Hq, Tq] = rowsum(dout * out) - dlse, and safe_lse.

    A row without keys gets safe_lse +inf and delta 0: its P is then 0 wherever it is computed, and so is its dS.
    """
    i_head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_m = rows < num_rows
    m_mk = m_m[:, None] & (o_k < K)[None, :]
    dout_ptr += i_head * stride_dout_head + rows[:, None] * stride_dout_row + o_k[None, :]
    out_ptr += i_head * stride_out_head + rows[:, None] * stride_out_row + o_k[None, :]
    b_dout = tl.load(dout_ptr, mask=m_mk, other=0.0).to(tl.float32)
    b_out = tl.load(out_ptr, mask=m_mk, other=0.0).to(tl.float32)
    delta = tl.sum(b_dout * b_out, 1)
    if dlse_ptr is not None:
        delta -= tl.load(dlse_ptr + i_head * stride_dlse_head + rows * stride_dlse_row, mask=m_m, other=0.0).to(
            tl.float32
        )
    lse = tl.load(lse_ptr + i_head * stride_lse + rows, mask=m_m, other=0.0)
    empty = tl.abs(lse) == float("inf")
    tl.store(safe_lse_ptr + i_head * num_rows + rows, tl.where(empty, float("inf"), lse), mask=m_m)
    tl.store(delta_ptr + i_head * num_rows + rows, tl.where(empty, 0.0, delta), mask=m_m)


@triton.jit
def _add_queries(
    b_dk, b_dv, b_k, b_v, bias, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, end, lower, upper, length, group, scale,
    stride_q_row, stride_q_head, stride_dout_row, stride_dout_head, num_rows,
    HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr, MASKED: tl.constexpr, BIAS: tl.constexpr,
    K: tl.constexpr, BLOCK_M: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dk and dv of a key tile over query tiles begin..end of all heads, as products of transposed P and dS."""
    o_m = tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    offset_q = o_m.to(tl.int64)[:, None] * stride_q_row + o_k[None, :]
    offset_dout = o_m.to(tl.int64)[:, None] * stride_dout_row + o_k[None, :]
    # One loop over heads and tiles: loads of the next head are in flight while this one is multiplied.
    num_tiles = end - begin
    # The pipelined loads of the first rounds stand before the loop's bound: also where there is no tile they divide.
    divisor = num_tiles + (num_tiles == 0)
    for i in tl.range(0, group * num_tiles):
        i_member = i // divisor
        first = (begin + i - i_member * num_tiles) * BLOCK_M
        m_m = first + o_m < length
        head = i_member.to(tl.int64)
        row = first.to(tl.int64)
        b_q = load_tile(q_ptr + head * stride_q_head + row * stride_q_row, offset_q, m_m, o_k < K, MASKED, K != BLOCK_K)
        # Rows behind the sequence's end have P 0 by an infinite lse.
        lse = load_vector(lse_ptr + head * num_rows + row, o_m, m_m, float("inf"), MASKED)
        scores = tl.dot(b_k, tl.trans(b_q), input_precision=PRECISION) * scale
        if BIAS:
            scores += bias[:, None]
        p = tl.exp(scores - lse[None, :])
        if MASKED and (HAS_LOWER or HAS_UPPER):
            p = tl.where(within(first + o_m, lower, upper, HAS_LOWER, HAS_UPPER), p, 0.0)
        dout_tile = dout_ptr + head * stride_dout_head + row * stride_dout_row
        b_dout = load_tile(dout_tile, offset_dout, m_m, o_k < K, MASKED, K != BLOCK_K)
        b_dv = tl.dot(p.to(b_dout.dtype), b_dout, b_dv, input_precision=PRECISION)
        delta = load_vector(delta_ptr + head * num_rows + row, o_m, m_m, 0.0, MASKED)
        ds = p * (tl.dot(b_v, tl.trans(b_dout), input_precision=PRECISION) - delta[None, :])
        if MASKED and (HAS_LOWER or HAS_UPPER):
            ds = tl.where(within(first + o_m, lower, upper, HAS_LOWER, HAS_UPPER), ds, 0.0)
        b_dk = tl.dot(ds.to(b_q.dtype), b_q, b_dk, input_precision=PRECISION)
    return b_dk, b_dv


_VARYING = ["total", "num_sequences", "num_steps", "num_rows", "left", "right"]


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dkdv_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dk_ptr, dv_ptr, cu_q_ptr, cu_k_ptr,
    total, num_rows, num_sequences, num_steps, scale, left, right, stride_q_row, stride_q_head, stride_k_row,
    stride_k_head, stride_v_row, stride_v_head, stride_dout_row, stride_dout_head, num_kv_heads, group,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (slots of key tiles, Hkv). dk, dv [Tk, Hkv, K]; lse, delta [Hq, num_rows] of the delta kernel."""
    i_sequence, start, length_k, i_tile = locate_tile(cu_k_ptr, total, num_sequences, num_steps, BLOCK_N)
    if i_tile * BLOCK_N >= length_k:
        return
    start_q, length_q = other_side(cu_q_ptr, i_sequence, num_sequences)
    i_head = tl.program_id(1).to(tl.int64)
    first = i_tile * BLOCK_N
    o_n = first + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_n = o_n < length_k
    m_nk = m_n[:, None] & (o_k < K)[None, :]
    rows = (start + o_n).to(tl.int64)
    k_ptr += i_head * stride_k_head + rows[:, None] * stride_k_row + o_k[None, :]
    v_ptr += i_head * stride_v_head + rows[:, None] * stride_v_row + o_k[None, :]
    b_k = tl.load(k_ptr, mask=m_nk, other=0.0)
    b_v = tl.load(v_ptr, mask=m_nk, other=0.0)
    bias = tl.zeros([BLOCK_N], tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + rows, mask=m_n, other=0.0)
    b_dk = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    b_dv = tl.zeros([BLOCK_N, BLOCK_K], tl.float32)
    diagonal = length_k - length_q
    # Key j is met by the rows from j - diagonal - right to j - diagonal + left.
    lower, upper = o_n - diagonal - right, o_n - diagonal + left
    begin, full_begin, full_end, end = visited_tiles(
        first, tl.minimum(first + BLOCK_N, length_k) - 1, length_q, -diagonal, right, left, HAS_RIGHT, HAS_LEFT, BLOCK_M
    )
    q_ptr += i_head * group * stride_q_head + start_q.to(tl.int64) * stride_q_row
    dout_ptr += i_head * group * stride_dout_head + start_q.to(tl.int64) * stride_dout_row
    lse_ptr += i_head * group * num_rows + start_q
    delta_ptr += i_head * group * num_rows + start_q
    if HAS_RIGHT:
        b_dk, b_dv = _add_queries(
            b_dk, b_dv, b_k, b_v, bias, q_ptr, dout_ptr, lse_ptr, delta_ptr, begin, full_begin, lower, upper, length_q,
            group, scale, stride_q_row, stride_q_head, stride_dout_row, stride_dout_head, num_rows, HAS_RIGHT, HAS_LEFT,
            True, bias_ptr is not None, K, BLOCK_M, BLOCK_K,
        )  # fmt: skip
    b_dk, b_dv = _add_queries(
        b_dk, b_dv, b_k, b_v, bias, q_ptr, dout_ptr, lse_ptr, delta_ptr, full_begin, full_end, lower, upper, length_q,
        group, scale, stride_q_row, stride_q_head, stride_dout_row, stride_dout_head, num_rows, HAS_RIGHT, HAS_LEFT,
        False, bias_ptr is not None, K, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    b_dk, b_dv = _add_queries(
        b_dk, b_dv, b_k, b_v, bias, q_ptr, dout_ptr, lse_ptr, delta_ptr, full_end, end, lower, upper, length_q, group,
        scale, stride_q_row, stride_q_head, stride_dout_row, stride_dout_head, num_rows, HAS_RIGHT, HAS_LEFT, True,
        bias_ptr is not None, K, BLOCK_M, BLOCK_K,
    )  # fmt: skip
    offset = (rows[:, None] * num_kv_heads + i_head) * K + o_k[None, :]
    tl.store(dk_ptr + offset, (b_dk * scale).to(dk_ptr.dtype.element_ty), mask=m_nk)
    tl.store(dv_ptr + offset, b_dv.to(dv_ptr.dtype.element_ty), mask=m_nk)


@triton.jit
def _add_keys(
    b_dq, b_q, b_dout, lse, delta, k_ptr, v_ptr, bias_ptr, begin, end, lower, upper, length, scale,
    stride_k_row, stride_v_row, HAS_LOWER: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """dq of a query tile over key tiles begin..end."""
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    offset_k = o_n.to(tl.int64)[:, None] * stride_k_row + o_k[None, :]
    offset_v = o_n.to(tl.int64)[:, None] * stride_v_row + o_k[None, :]
    for i_tile in tl.range(begin, end):
        first = i_tile * BLOCK_N
        m_n = first + o_n < length
        b_k = load_tile(k_ptr + first.to(tl.int64) * stride_k_row, offset_k, m_n, o_k < K, MASKED, K != BLOCK_K)
        b_v = load_tile(v_ptr + first.to(tl.int64) * stride_v_row, offset_v, m_n, o_k < K, MASKED, K != BLOCK_K)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if bias_ptr is not None:
            scores += load_vector(bias_ptr + first, o_n, m_n, 0.0, MASKED)[None, :]
        p = tl.exp(scores - lse[:, None])
        dp = tl.dot(b_dout, tl.trans(b_v), input_precision=PRECISION)
        ds = p * (dp - delta[:, None])
        if MASKED:
            ds = tl.where(within(first + o_n, lower, upper, HAS_LOWER, True), ds, 0.0)
        b_dq = tl.dot(ds.to(b_k.dtype), b_k, b_dq, input_precision=PRECISION)
    return b_dq


@triton.jit(do_not_specialize=_VARYING)
def attention_bwd_dq_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, dout_ptr, lse_ptr, delta_ptr, dq_ptr, cu_q_ptr, cu_k_ptr,
    total, num_sequences, num_steps, scale, left, right, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_dout_row, stride_dout_head, num_heads, group,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (slots of query tiles, Hq). dq [Tq, Hq, K]; lse, delta [Hq, total] of the delta kernel."""
    i_sequence, start, length_q, i_tile = locate_tile(cu_q_ptr, total, num_sequences, num_steps, BLOCK_M)
    if i_tile * BLOCK_M >= length_q:
        return
    if HAS_RIGHT:
        i_tile = tl.cdiv(length_q, BLOCK_M) - 1 - i_tile
    start_k, length_k = other_side(cu_k_ptr, i_sequence, num_sequences)
    i_head = tl.program_id(1).to(tl.int64)
    first = i_tile * BLOCK_M
    o_m = first + tl.arange(0, BLOCK_M)
    o_k = tl.arange(0, BLOCK_K)
    m_m = o_m < length_q
    m_mk = m_m[:, None] & (o_k < K)[None, :]
    rows = (start + o_m).to(tl.int64)
    q_ptr += i_head * stride_q_head + rows[:, None] * stride_q_row + o_k[None, :]
    dout_ptr += i_head * stride_dout_head + rows[:, None] * stride_dout_row + o_k[None, :]
    b_q = tl.load(q_ptr, mask=m_mk, other=0.0)
    b_dout = tl.load(dout_ptr, mask=m_mk, other=0.0)
    lse = tl.load(lse_ptr + i_head * total + rows, mask=m_m, other=float("inf"))
    delta = tl.load(delta_ptr + i_head * total + rows, mask=m_m, other=0.0)
    diagonal = length_k - length_q
    begin, full_begin, full_end, end = visited_tiles(
        first, tl.minimum(first + BLOCK_M, length_q) - 1, length_k, diagonal, left, right, HAS_LEFT, HAS_RIGHT, BLOCK_N
    )
    lower = o_m + diagonal - left
    upper = tl.full([BLOCK_M], length_k - 1, tl.int32)
    if HAS_RIGHT:
        upper = tl.minimum(upper, o_m + diagonal + right)
    k_ptr += start_k.to(tl.int64) * stride_k_row + i_head // group * stride_k_head
    v_ptr += start_k.to(tl.int64) * stride_v_row + i_head // group * stride_v_head
    if bias_ptr is not None:
        bias_ptr += start_k
    b_dq = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
    if HAS_LEFT:
        b_dq = _add_keys(
            b_dq, b_q, b_dout, lse, delta, k_ptr, v_ptr, bias_ptr, begin, full_begin, lower, upper, length_k,
            scale, stride_k_row, stride_v_row, HAS_LEFT, True, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    b_dq = _add_keys(
        b_dq, b_q, b_dout, lse, delta, k_ptr, v_ptr, bias_ptr, full_begin, full_end, lower, upper, length_k,
        scale, stride_k_row, stride_v_row, HAS_LEFT, False, K, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    b_dq = _add_keys(
        b_dq, b_q, b_dout, lse, delta, k_ptr, v_ptr, bias_ptr, full_end, end, lower, upper, length_k,
        scale, stride_k_row, stride_v_row, HAS_LEFT, True, K, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    offset = (rows[:, None] * num_heads + i_head) * K + o_k[None, :]
    tl.store(dq_ptr + offset, (b_dq * scale).to(dq_ptr.dtype.element_ty), mask=m_mk)


def backward_blocks(K: int, dtype: torch.dtype, capability: tuple[int, int]) -> tuple[Blocks, Blocks]:
    """The tiles of the dk, dv kernel and of the dq kernel, as large as the registers allow without a spill."""
    if dtype == torch.float32:
        return Blocks(16, 16, 8, 1), Blocks(16, 16, 4, 1)
    if K > 128:
        return Blocks(32, 32, 8, 1), Blocks(32, 32, 8, 2)
    if capability[0] in (9, 10):
        return Blocks(64, 128, 8, 2) if K <= 64 else Blocks(32, 128, 8, 3), Blocks(128, 64, 8, 2)
    return Blocks(64, 64, 8, 2), Blocks(128, 64, 8, 2) if K <= 64 else Blocks(128, 32, 8, 3)


def supports_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, *rest: object
) -> str | None:
    """Why the Triton backward declines a call of `reference.backward`, or None."""
    for name, x in (("out", out), ("dout", dout), ("lse", lse), ("dlse", dlse)):
        if x is not None and x.dtype == torch.float64:
            return f"{name} is float64, it takes float32, bfloat16 and float16"
    return why_unsupported(q, k, v)


def launch_bwd(
    dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, key_bias: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: bool,
    softmax_scale: float, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.backward` with Triton kernels: fp32 sums, P and dS rounded to q's dtype for the tensor cores."""
    dq, dk, dv = (torch.empty(x.shape, dtype=x.dtype, device=x.device) for x in (q, k, v))
    (total_q, num_heads, K), (total_k, num_kv_heads, _) = q.shape, k.shape
    if num_heads == 0 or num_kv_heads == 0 or K == 0:
        return dq, dk, dv
    q, k, v, out, dout = (unit_stride(x) for x in (q, k, v, out, dout.to(q.dtype)))
    lse, key_bias = lse.float().contiguous(), None if key_bias is None else key_bias.contiguous()
    num_sequences, block_k = cu_seqlens_q.shape[0] - 1, padded_head_dim(K)
    keys, queries = backward_blocks(K, q.dtype, compute_capability(q))
    *window, has_left, has_right = window_of(causal, window_left, window_right)
    safe_lse, delta = (torch.empty(num_heads, total_q, dtype=torch.float32, device=q.device) for _ in range(2))
    with torch.cuda.device_of(q):
        if total_q > 0:
            block_m = max(1, 4096 // block_k)
            attention_bwd_delta_kernel[(triton.cdiv(total_q, block_m), num_heads)](
                dout, out, lse, dlse, safe_lse, delta, total_q, *dout.stride()[:2], *out.stride()[:2], lse.stride(0),
                *((0, 0) if dlse is None else dlse.stride()), K, block_m, block_k, num_warps=4,
            )  # fmt: skip
            attention_bwd_dq_kernel[(num_slots(total_q, num_sequences, queries.m), num_heads)](
                q, k, v, key_bias, dout, safe_lse, delta, dq, cu_seqlens_q, cu_seqlens_k, total_q, num_sequences,
                search_steps(num_sequences), softmax_scale, *window, *q.stride()[:2], *k.stride()[:2],
                *v.stride()[:2], *dout.stride()[:2], num_heads, num_heads // num_kv_heads, has_left, has_right, K,
                queries.m, queries.n, block_k, num_warps=queries.num_warps, num_stages=queries.num_stages,
            )  # fmt: skip
        if total_k > 0:
            attention_bwd_dkdv_kernel[(num_slots(total_k, num_sequences, keys.n), num_kv_heads)](
                q, k, v, key_bias, dout, safe_lse, delta, dk, dv, cu_seqlens_q, cu_seqlens_k, total_k, total_q,
                num_sequences, search_steps(num_sequences), softmax_scale, *window, *q.stride()[:2], *k.stride()[:2],
                *v.stride()[:2], *dout.stride()[:2], num_kv_heads, num_heads // num_kv_heads, has_left, has_right, K,
                keys.m, keys.n, block_k, num_warps=keys.num_warps, num_stages=keys.num_stages,
            )  # fmt: skip
    return dq, dk, dv
