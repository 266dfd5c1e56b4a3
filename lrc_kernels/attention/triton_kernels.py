# SPDX-License-Identifier: Apache-2.0
"""Forward kernels of varlen attention: packed q, k, v -> out and lse, or -> an un-normalised fp32 state (acc, m, l)
that the next block of keys continues; and the merge of two normalised partial results. Gradients: `triton_backward.py`.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc_kernels.attention.triton_backward import launch_bwd, supports_bwd
from lrc_kernels.attention.triton_tiles import (
    LN2,
    LOG2E,
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

# `op.py` finds every launch in this module.
__all__ = ["launch_bwd", "supports_bwd"]


@triton.jit
def _attend(
    acc, m, l, b_q, k_ptr, v_ptr, bias_ptr, begin, end, lower, upper, length, scale,
    stride_k_row, stride_v_row, HAS_LOWER: tl.constexpr, MASKED: tl.constexpr, K: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Online softmax over key tiles begin..end, in units of log2; m is the largest logit of a row so far."""
    o_n = tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    offset_k = o_n.to(tl.int64)[:, None] * stride_k_row + o_k[None, :]
    offset_v = o_n.to(tl.int64)[:, None] * stride_v_row + o_k[None, :]
    for i_tile in tl.range(begin, end):
        first = i_tile * BLOCK_N
        m_n = first + o_n < length
        tile_k = k_ptr + first.to(tl.int64) * stride_k_row
        tile_v = v_ptr + first.to(tl.int64) * stride_v_row
        b_k = load_tile(tile_k, offset_k, m_n, o_k < K, MASKED, K != BLOCK_K)
        scores = tl.dot(b_q, tl.trans(b_k), input_precision=PRECISION) * scale
        if bias_ptr is not None:
            scores += load_vector(bias_ptr + first, o_n, m_n, 0.0, MASKED)[None, :] * LOG2E
        if MASKED:
            scores = tl.where(within(first + o_n, lower, upper, HAS_LOWER, True), scores, -float("inf"))
        m_new = tl.maximum(m, tl.max(scores, 1))
        # Of a row that has seen no key yet, -inf - -inf must not come up.
        m_safe = tl.where(m_new == -float("inf"), 0.0, m_new)
        p = tl.exp2(scores - m_safe[:, None])
        alpha = tl.exp2(m - m_safe)
        l = l * alpha + tl.sum(p, 1)
        acc = acc * alpha[:, None]
        b_v = load_tile(tile_v, offset_v, m_n, o_k < K, MASKED, K != BLOCK_K)
        acc = tl.dot(p.to(b_v.dtype), b_v, acc, input_precision=PRECISION)
        m = m_new
    return acc, m, l


_VARYING = ["total_q", "num_sequences", "num_steps", "stride_lse", "left", "right"]


@triton.jit(do_not_specialize=_VARYING)
def attention_fwd_kernel(
    q_ptr, k_ptr, v_ptr, bias_ptr, out_ptr, lse_ptr, l_ptr, cu_q_ptr, cu_k_ptr,
    total_q, num_sequences, num_steps, scale, left, right, stride_q_row, stride_q_head, stride_k_row, stride_k_head,
    stride_v_row, stride_v_head, stride_out_row, stride_out_head, stride_lse, group,
    HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, K: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (slots of query tiles, Hq). A program owns the rows of one tile of one sequence and one query head.

    Without l_ptr: out [Tq, Hq, K], lse [Hq, Tq]. With l_ptr the state is read and written back: acc as out, m as lse.
    `scale` turns products into logits in units of log2 and is not negative.
    """
    i_sequence, start, length_q, i_tile = locate_tile(cu_q_ptr, total_q, num_sequences, num_steps, BLOCK_M)
    if i_tile * BLOCK_M >= length_q:
        return
    # Under a causal mask the last tile sees most keys: programs start in this order, so the long ones start first.
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
    b_q = tl.load(q_ptr + i_head * stride_q_head + rows[:, None] * stride_q_row + o_k[None, :], mask=m_mk, other=0.0)
    if l_ptr is None:
        acc = tl.zeros([BLOCK_M, BLOCK_K], tl.float32)
        m = tl.full([BLOCK_M], -float("inf"), tl.float32)
        l = tl.zeros([BLOCK_M], tl.float32)
    else:
        acc_ptr = out_ptr + i_head * stride_out_head + rows[:, None] * stride_out_row + o_k[None, :]
        acc = tl.load(acc_ptr, mask=m_mk, other=0.0)
        m = tl.load(lse_ptr + i_head * stride_lse + rows, mask=m_m, other=-float("inf")) * LOG2E
        l = tl.load(l_ptr + i_head * stride_lse + rows, mask=m_m, other=0.0)
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
    if HAS_LEFT:
        acc, m, l = _attend(
            acc, m, l, b_q, k_ptr, v_ptr, bias_ptr, begin, full_begin, lower, upper, length_k, scale,
            stride_k_row, stride_v_row, HAS_LEFT, True, K, BLOCK_N, BLOCK_K,
        )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, b_q, k_ptr, v_ptr, bias_ptr, full_begin, full_end, lower, upper, length_k, scale,
        stride_k_row, stride_v_row, HAS_LEFT, False, K, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    acc, m, l = _attend(
        acc, m, l, b_q, k_ptr, v_ptr, bias_ptr, full_end, end, lower, upper, length_k, scale,
        stride_k_row, stride_v_row, HAS_LEFT, True, K, BLOCK_N, BLOCK_K,
    )  # fmt: skip
    if l_ptr is None:
        empty = l == 0.0
        acc = tl.where(empty[:, None], 0.0, acc / tl.where(empty, 1.0, l)[:, None])
        m = tl.where(empty, -float("inf"), m + tl.log2(tl.where(empty, 1.0, l)))
    else:
        tl.store(l_ptr + i_head * stride_lse + rows, l, mask=m_m)
    out_ptr += i_head * stride_out_head + rows[:, None] * stride_out_row + o_k[None, :]
    tl.store(out_ptr, acc.to(out_ptr.dtype.element_ty), mask=m_mk)
    tl.store(lse_ptr + i_head * stride_lse + rows, m * LN2, mask=m_m)


@triton.jit(do_not_specialize=["num_rows", "stride_lse_head", "stride_lse_block_head"])
def attention_merge_partials_kernel(
    out_ptr, lse_ptr, out_block_ptr, lse_block_ptr, merged_ptr, merged_lse_ptr, num_rows, num_heads,
    stride_out_row, stride_out_head, stride_block_row, stride_block_head,
    stride_lse_head, stride_lse_row, stride_lse_block_head, stride_lse_block_row,
    K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of rows, H). merged [T, H, K] and merged_lse [H, T] of two partial results, in fp32, in one pass."""
    i_head = tl.program_id(1).to(tl.int64)
    rows = (tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)).to(tl.int64)
    o_k = tl.arange(0, BLOCK_K)
    m_t = rows < num_rows
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    infinity: tl.constexpr = float("inf")
    lse = tl.load(lse_ptr + i_head * stride_lse_head + rows * stride_lse_row, mask=m_t, other=0.0)
    lse_block = tl.load(
        lse_block_ptr + i_head * stride_lse_block_head + rows * stride_lse_block_row, mask=m_t, other=0.0
    )
    finite, finite_block = tl.abs(lse) < infinity, tl.abs(lse_block) < infinity
    spoiled = ((lse != lse) & ~finite_block) | ((lse_block != lse_block) & ~finite)
    first, second = tl.where(finite, lse, -infinity), tl.where(finite_block, lse_block, -infinity)
    m = tl.maximum(first, second)
    empty = m == -infinity
    m = tl.where(empty, 0.0, m)
    weight, weight_block = tl.exp(first - m), tl.exp(second - m)
    total = tl.where(empty, 1.0, weight + weight_block)
    weight, weight_block = weight / total, weight_block / total
    # A row of weight 0 may hold NaN: it is not even read.
    b_out = tl.load(
        out_ptr + i_head * stride_out_head + rows[:, None] * stride_out_row + o_k[None, :],
        mask=m_tk & (weight > 0)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    b_block = tl.load(
        out_block_ptr + i_head * stride_block_head + rows[:, None] * stride_block_row + o_k[None, :],
        mask=m_tk & (weight_block > 0)[:, None], other=0.0,
    ).to(tl.float32)  # fmt: skip
    merged = weight[:, None] * b_out + weight_block[:, None] * b_block
    merged = tl.where(spoiled[:, None], float("nan"), merged)
    merged_lse = tl.where(empty, -infinity, m + tl.log(total))
    merged_lse = tl.where(spoiled, float("nan"), merged_lse)
    tl.store(merged_ptr + (rows[:, None] * num_heads + i_head) * K + o_k[None, :], merged, mask=m_tk)
    tl.store(merged_lse_ptr + i_head * num_rows + rows, merged_lse, mask=m_t)


def forward_blocks(K: int, dtype: torch.dtype, capability: tuple[int, int]) -> Blocks:
    """The tile of the forward kernels: as large as the registers allow in every configuration, without a spill.

    128 rows a program read each key from L2 once per 128 queries; with 64 rows an H100 would wait for L2.
    """
    if dtype == torch.float32:
        return Blocks(16, 16, 8, 1) if K <= 128 else Blocks(16, 16, 4, 2)
    if capability[0] in (9, 10):
        return Blocks(128, 128, 8, 3) if K <= 64 else Blocks(128, 64, 8, 3) if K <= 128 else Blocks(64, 32, 8, 2)
    return Blocks(128, 64, 8, 3) if K <= 64 else Blocks(128, 32, 8, 3) if K <= 128 else Blocks(32, 32, 8, 2)


def launch_forward_kernel(
    q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, l: Tensor | None, cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor, key_bias: Tensor | None, causal: bool, softmax_scale: float, window_left: int,
    window_right: int,
) -> None:  # fmt: skip
    """Writes (out, lse), or continues the state (acc, m, l) given in their place."""
    if softmax_scale < 0:
        q, softmax_scale = -q, -softmax_scale
    q, k, v = unit_stride(q), unit_stride(k), unit_stride(v)
    (total_q, num_heads, K), num_sequences = q.shape, cu_seqlens_q.shape[0] - 1
    if total_q == 0 or num_heads == 0 or K == 0:
        return
    blocks = forward_blocks(K, q.dtype, compute_capability(q))
    left, right, has_left, has_right = window_of(causal, window_left, window_right)
    with torch.cuda.device_of(q):
        attention_fwd_kernel[(num_slots(total_q, num_sequences, blocks.m), num_heads)](
            q, k, v, None if key_bias is None else key_bias.contiguous(), out, lse, l, cu_seqlens_q, cu_seqlens_k,
            total_q, num_sequences, search_steps(num_sequences), softmax_scale * LOG2E.value, left, right,
            *q.stride()[:2], *k.stride()[:2], *v.stride()[:2], *out.stride()[:2], lse.stride(0),
            num_heads // k.shape[1], has_left, has_right, K, blocks.m, blocks.n, padded_head_dim(K),
            num_warps=blocks.num_warps, num_stages=blocks.num_stages,
        )  # fmt: skip


def supports_fwd(q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    """Why the Triton forward declines a call of `reference.forward`, or None."""
    return why_unsupported(q, k, v)


def launch_fwd(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None,
    max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, window_left: int, window_right: int,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """`reference.forward` with a Triton kernel. fp32 is multiplied in fp32; 16-bit inputs on tensor cores, with P
    rounded to their dtype. NaN spoils rows of its own sequence only, and of those not more than the reference does.
    """
    out = torch.empty(q.shape, dtype=q.dtype, device=q.device)
    lse = torch.empty(q.shape[1], q.shape[0], dtype=torch.float32, device=q.device)
    pack = (cu_seqlens_q, cu_seqlens_k, key_bias, causal, softmax_scale, window_left, window_right)
    launch_forward_kernel(q, k, v, out, lse, None, *pack)
    return out, lse


def supports_accumulate(acc: Tensor, m: Tensor, l: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> str | None:
    """Why the Triton kernel declines a call of `reference.accumulate_`, or None."""
    if not acc.dtype == m.dtype == l.dtype == torch.float32:
        return f"acc, m, l are {acc.dtype}, {m.dtype}, {l.dtype}, it takes float32"
    if not (acc.stride(2) == 1 and m.stride(1) == l.stride(1) == 1 and m.stride(0) == l.stride(0)):
        return f"acc, m, l have strides {acc.stride()}, {m.stride()}, {l.stride()}, it writes into contiguous rows only"
    return why_unsupported(q, k, v)


def launch_accumulate(
    acc: Tensor, m: Tensor, l: Tensor, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
    key_bias: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
    window_left: int, window_right: int,
) -> None:  # fmt: skip
    """`reference.accumulate_` with the forward kernel, which starts from the state and writes it back."""
    pack = (cu_seqlens_q, cu_seqlens_k, key_bias, causal, softmax_scale, window_left, window_right)
    launch_forward_kernel(q, k, v, acc, m, l, *pack)


def supports_merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> str | None:
    """Why the Triton merge declines a call of `reference.merge_partials`, or None."""
    for name, x in (("out", out), ("lse", lse), ("out_block", out_block), ("lse_block", lse_block)):
        if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            return f"{name} is {x.dtype}, it takes float32, bfloat16 and float16"
    return None


def launch_merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """`reference.merge_partials` with a Triton kernel, in fp32."""
    num_rows, num_heads, K = out.shape
    merged = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    merged_lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=out.device)
    if num_rows == 0 or num_heads == 0:
        return merged, merged_lse
    out, out_block, lse, lse_block = unit_stride(out), unit_stride(out_block), lse.float(), lse_block.float()
    block_k = triton.next_power_of_2(max(1, K))
    block_t = max(1, 2048 // block_k)
    with torch.cuda.device_of(out):
        attention_merge_partials_kernel[(triton.cdiv(num_rows, block_t), num_heads)](
            out, lse, out_block, lse_block, merged, merged_lse, num_rows, num_heads,
            *out.stride()[:2], *out_block.stride()[:2], *lse.stride(), *lse_block.stride(), K, block_t, block_k,
            num_warps=4,
        )  # fmt: skip
    return merged, merged_lse
