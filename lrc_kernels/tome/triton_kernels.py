# SPDX-License-Identifier: Apache-2.0
"""ToMe in Triton: head mean, merge and gather kernels, and the launches of all ops as `reference.py` defines them.

The same kernels read and write plain rows, packed rows and the ViT layout in place (`triton_address.py`).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc_kernels.tome.triton_address import address_of, channel_offset, token_base
from lrc_kernels.tome.triton_groups import first_tokens, group_tokens, launch_groups
from lrc_kernels.tome.triton_plan import MATRIX_STAGES, MATRIX_WARPS
from lrc_kernels.tome.triton_schedule import launch_plan, supports_plan
from lrc_kernels.tome.triton_step import split_bf16

__all__ = ["launch_plan", "supports_plan"]

# Past these values fp32 does not survive the split into bf16 parts.
LARGEST = tl.constexpr(3.38e38)
NEGATIVE = tl.constexpr(4096.0)
NAN = tl.constexpr(1073741824.0)

# Rows of a segment up to which a one-hot product, 2 * N * N_out * D FLOPs, hides behind the one read of x.
ONE_HOT_ROWS = 256


@triton.jit(do_not_specialize=["num_tokens"])
def tome_head_mean_fwd_kernel(
    x_ptr, metric_ptr, num_tokens, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c,
    K: tl.constexpr, NUM_HEADS: tl.constexpr, D: tl.constexpr, SHUFFLE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_K: tl.constexpr, UNROLL: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens, blocks of K). metric [T, K] = mean over heads h of channel h*K + k, in order."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    o_k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    m_t = o_t < num_tokens
    m_tk = m_t[:, None] & (o_k < K)[None, :]
    base = token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for first in range(0, NUM_HEADS, UNROLL):
        # Loads of several heads in flight hide the latency of memory.
        for i in tl.static_range(UNROLL):
            head = first + i
            offset = channel_offset(head * K + o_k, grid_w, stride_row, stride_c, D, SHUFFLE)
            b_x = tl.load(x_ptr + base[:, None] + offset[None, :], mask=m_tk & (head < NUM_HEADS), other=0.0)
            acc += b_x.to(tl.float32)
    out_ptr = metric_ptr + o_t.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(out_ptr, acc / NUM_HEADS, mask=m_tk)


@triton.jit
def _each_code_once(code):
    """A sum of codes without repetitions: 4096 times +inf must not pass for -inf."""
    negative = tl.where(code >= NEGATIVE, NEGATIVE, 0.0)
    positive = tl.where(code - tl.floor(code / NEGATIVE) * NEGATIVE > 0, 1.0, 0.0)
    return tl.where(code >= NAN, NAN, negative + positive)


@triton.jit
def _merge_rows(
    x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first_row,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BINARY: tl.constexpr, PASS: tl.constexpr,
):  # fmt: skip
    """One-hot [BLOCK_R, tokens] x tokens [.., BLOCK_C] in fp32, over the tokens of a segment in ascending order.

    PASS "sum" takes values as they are, "finite" replaces NaN and infinities by 0, and "poison" adds up codes of them:
    1 for +inf, 4096 for -inf, 2^30 for NaN.
    """
    direct: tl.constexpr = BINARY and x_ptr.dtype.element_ty != tl.float32
    acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    o_r = first_row + tl.arange(0, BLOCK_R)
    for t in range(start, end, BLOCK_T):
        o_t = t + tl.arange(0, BLOCK_T)
        m_t = o_t < end
        row = tl.load(assign_ptr + o_t, mask=m_t, other=-1)
        if weight_ptr is not None:
            weight = tl.load(weight_ptr + o_t, mask=m_t, other=0.0)
            row = tl.where(weight == 0.0, -1, row)
        hit = row[None, :] == o_r[:, None]
        base = token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
        b_x = tl.load(x_ptr + base[:, None] + offset[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0)
        if direct and PASS == "sum":
            acc = tl.dot(hit.to(tl.float32).to(b_x.dtype), b_x, acc)
        else:
            value = b_x.to(tl.float32)
            if weight_ptr is not None and not BINARY:
                value = tl.where((weight == 0.0)[:, None], 0.0, value * weight[:, None])
            b_hit = hit.to(tl.float32).to(tl.bfloat16)
            if PASS == "poison":
                code = tl.where(value > LARGEST, 1.0, tl.where(value < -LARGEST, NEGATIVE, 0.0))
                code = tl.where(value != value, NAN, code)
                acc = _each_code_once(tl.dot(b_hit, code.to(tl.bfloat16), acc))
            else:
                if PASS == "finite":
                    value = tl.where(tl.abs(value) <= LARGEST, value, 0.0)
                if direct:
                    acc = tl.dot(hit.to(tl.float32).to(b_x.dtype), value.to(b_x.dtype), acc)
                else:
                    high, middle, low = split_bf16(value)
                    acc = tl.dot(b_hit, low, acc)
                    acc = tl.dot(b_hit, middle, acc)
                    acc = tl.dot(b_hit, high, acc)
    return acc


@triton.jit(do_not_specialize=["num_splits", "num_columns", "most_rows"])
def tome_merge_fwd_kernel(
    x_ptr, assign_ptr, weight_ptr, size_ptr, y_ptr, cu_in_ptr, cu_out_ptr,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c, num_columns, num_splits, most_rows,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BINARY: tl.constexpr, MEAN: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of channels * splits). y [num_out, D_token] of segments with up to `most_rows` rows; a
    program owns every num_splits-th block of rows. In a one-hot product 0 * NaN would reach every row of its column: a
    block that comes out non-finite is summed again from the finite values, in the same order, and rows that really
    hold NaN or infinity are put back.
    """
    width: tl.constexpr = D * SHUFFLE * SHUFFLE
    i_split = tl.program_id(0) % num_splits
    i_column = tl.program_id(0) // num_splits % num_columns
    i_segment = tl.program_id(0) // num_splits // num_columns
    start = tl.load(cu_in_ptr + i_segment)
    end = tl.load(cu_in_ptr + i_segment + 1)
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < width
    offset = channel_offset(o_c, grid_w, stride_row, stride_c, D, SHUFFLE)
    first_row = tl.load(cu_out_ptr + i_segment)
    last = tl.load(cu_out_ptr + i_segment + 1)
    if last - first_row > most_rows:
        return
    for first in range(first_row + i_split * BLOCK_R, last, num_splits * BLOCK_R):
        acc = _merge_rows(
            x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first, tokens_per_frame, grid_w, prefix,
            stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, "sum",
        )  # fmt: skip
        non_finite = tl.where(tl.abs(acc) < float("inf"), 0, 1)
        poisoned = tl.max(tl.max(non_finite, 1), 0) > 0
        if poisoned:
            acc = _merge_rows(
                x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first, tokens_per_frame, grid_w, prefix,
                stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, "finite",
            )  # fmt: skip
        o_r = first + tl.arange(0, BLOCK_R)
        m_rc = (o_r < last)[:, None] & m_c[None, :]
        if MEAN:
            size = tl.load(size_ptr + o_r, mask=o_r < last, other=0.0)
            acc = tl.where((size == 0.0)[:, None], 0.0, acc / size[:, None])
        out_ptr = y_ptr + o_r.to(tl.int64)[:, None] * width + o_c[None, :]
        tl.store(out_ptr, acc.to(y_ptr.dtype.element_ty), mask=m_rc)
        if poisoned:
            code = _merge_rows(
                x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first, tokens_per_frame, grid_w, prefix,
                stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, "poison",
            )  # fmt: skip
            negative = code >= NEGATIVE
            positive = code - tl.floor(code / NEGATIVE) * NEGATIVE > 0
            value = tl.where(negative, -float("inf"), float("inf"))
            value = tl.where((code >= NAN) | (negative & positive), float("nan"), value)
            # Another thread may have stored the finite value of this element.
            tl.debug_barrier()
            tl.store(out_ptr, value.to(y_ptr.dtype.element_ty), mask=m_rc & (code > 0))


@triton.jit(do_not_specialize=["num_tokens", "num_columns"])
def tome_gather_fwd_kernel(
    y_ptr, assign_ptr, size_ptr, weight_ptr, first_ptr, x_ptr, num_tokens, num_columns, stride_y_row, stride_y_c,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens * blocks of channels). x[t] = y[assign[t]] * weight[t] / size[assign[t]], and with
    first_ptr [num_out, D_token] only where it names the token t.
    """
    i_token = tl.program_id(0) // num_columns
    i_column = tl.program_id(0) % num_columns
    o_t = i_token * BLOCK_T + tl.arange(0, BLOCK_T)
    m_t = o_t < num_tokens
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_tc = m_t[:, None] & (o_c < D * SHUFFLE * SHUFFLE)[None, :]
    row = tl.load(assign_ptr + o_t, mask=m_t, other=0).to(tl.int64)
    scale = tl.full([BLOCK_T], 1.0, tl.float32)
    if weight_ptr is not None:
        scale = tl.load(weight_ptr + o_t, mask=m_t, other=0.0).to(tl.float32)
    if size_ptr is not None:
        size = tl.load(size_ptr + row, mask=m_t, other=0.0).to(tl.float32)
        scale = tl.where(size == 0.0, 0.0, scale / size)
    in_ptr = y_ptr + row[:, None] * stride_y_row + o_c.to(tl.int64)[None, :] * stride_y_c
    value = tl.load(in_ptr, mask=m_tc, other=0.0).to(tl.float32)
    value = tl.where((scale == 0.0)[:, None], 0.0, value * scale[:, None])
    if first_ptr is not None:
        first = tl.load(first_ptr + row[:, None] * (D * SHUFFLE * SHUFFLE) + o_c[None, :], mask=m_tc, other=-1)
        value = tl.where(first == o_t[:, None], value, 0.0)
    base = token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
    offset = channel_offset(o_c, grid_w, stride_row, 1, D, SHUFFLE)
    tl.store(x_ptr + base[:, None] + offset[None, :], value.to(x_ptr.dtype.element_ty), mask=m_tc)


def _check_dtype(name: str, x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{name} is {x.dtype}, it takes float32, bfloat16 and float16"
    return None


def supports_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> str | None:
    """Why the Triton head mean declines a call of `reference.head_mean`, or None."""
    return _check_dtype("x", x)


def launch_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    """`reference.head_mean` with a Triton kernel: x is read once, in place."""
    at = address_of(x, layout)
    K = at.width // num_heads
    metric = torch.empty(at.num_tokens, K, dtype=torch.float32, device=x.device)
    if metric.numel() == 0:
        return metric
    block_t, block_k, unroll = head_mean_blocks(K, num_heads)
    with torch.cuda.device_of(x):
        tome_head_mean_fwd_kernel[(triton.cdiv(at.num_tokens, block_t), triton.cdiv(K, block_k))](
            x, metric, at.num_tokens, *at[:6], K, num_heads, at.channels, at.shuffle, block_t, block_k, unroll,
            num_warps=4,
        )  # fmt: skip
    return metric


def head_mean_blocks(K: int, num_heads: int) -> tuple[int, int, int]:
    """(tokens, channels, heads in flight): 1024 elements a tile, so that 128 threads load 16 bytes of bf16 each."""
    block_k = min(256, triton.next_power_of_2(K))
    return 1024 // block_k, block_k, min(8, num_heads)


def supports_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int],
) -> str | None:  # fmt: skip
    """Why the Triton merge declines a call of `reference.merge`, or None."""
    return _check_dtype("x", x)


def merge_blocks(num_out: int, num_segments: int, direct: bool) -> tuple[int, int, int]:
    """(rows, tokens, channels) of a tile. The token block orders the sums, so it depends on the dtype alone; there
    are 64 rows at least: a smaller tile takes another matrix instruction, and a clip alone might differ from its batch.
    """
    return 64 if num_out <= 64 * num_segments else 128, 64 if direct else 32, 64


def launch_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int],
) -> Tensor:  # fmt: skip
    """`reference.merge`; x is read in place. Segments of up to ONE_HOT_ROWS rows are one-hot matrix products in fp32,
    those with more, and "max", go group by group.

    16-bit x with weights of 0 and 1 is multiplied as it is; otherwise weight * x is split into three bf16 parts.
    """
    at, num_segments = address_of(x, layout), cu_seqlens_in.shape[0] - 1
    y = torch.empty(num_out, at.width, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    assign, size = assign.contiguous(), size.contiguous()
    weight = None if weight is None else weight.contiguous()
    most_rows = 0 if reduce == "max" else ONE_HOT_ROWS
    with torch.cuda.device_of(x):
        if min(max_seqlen_out, num_out) > most_rows:
            groups = group_tokens(assign, num_out)
            launch_groups(x, at, groups, size, weight, cu_seqlens_out, max_seqlen_out, most_rows, reduce, y)
        if most_rows == 0 or (num_segments == 1 and num_out > most_rows):
            return y
        direct = binary_weight and x.dtype != torch.float32
        block_r, block_t, block_c = merge_blocks(num_out, num_segments, direct)
        num_columns = triton.cdiv(at.width, block_c)
        longest = triton.cdiv(min(max_seqlen_out, num_out, most_rows), block_r)
        num_splits = min(longest, max(1, 512 // (num_segments * num_columns)))
        tome_merge_fwd_kernel[(num_segments * num_columns * num_splits,)](
            x, assign, weight, size, y, cu_seqlens_in, cu_seqlens_out, *at[:6], num_columns, num_splits, most_rows,
            at.channels, at.shuffle, block_r, block_t, block_c, binary_weight, reduce == "mean",
            num_warps=MATRIX_WARPS, num_stages=MATRIX_STAGES,
        )  # fmt: skip
    return y


def supports_gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]
) -> str | None:
    """Why the Triton gather declines a call of `reference.gather`, or None."""
    return _check_dtype("y", y)


def launch_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    """`reference.gather` with a Triton kernel: rows go straight to their place in the ViT layout."""
    return _gather(y, assign, size, weight, None, layout)


def _gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, first: Tensor | None, layout: list[int]
) -> Tensor:
    num_tokens, width = assign.shape[0], y.shape[1]
    if layout:
        clip_frames, h, w, s, prefix = layout
        frames = num_tokens // (clip_frames * h * w // s**2) * clip_frames
        x = torch.empty(frames, prefix + h * w, width // s**2, dtype=y.dtype, device=y.device)
        x[:, :prefix] = 0
    else:
        x = torch.empty(num_tokens, width, dtype=y.dtype, device=y.device)
    if num_tokens == 0 or width == 0:
        return x
    at = address_of(x, layout)
    block_c = min(1024, triton.next_power_of_2(width))
    block_t = 2048 // block_c
    num_columns = triton.cdiv(width, block_c)
    with torch.cuda.device_of(y):
        tome_gather_fwd_kernel[(triton.cdiv(num_tokens, block_t) * num_columns,)](
            y, assign.contiguous(), None if size is None else size.contiguous(),
            None if weight is None else weight.contiguous(), first, x, num_tokens, num_columns, *y.stride(), *at[:5],
            at.channels, at.shuffle, block_t, block_c, num_warps=4,
        )  # fmt: skip
    return x


def supports_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> str | None:
    """Why the Triton backward of the "max" merge declines a call of `reference.max_backward`, or None."""
    return _check_dtype("x", x)


def launch_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> Tensor:
    """`reference.max_backward`: the first token of each output element, then a gather of what names it."""
    assign = assign.contiguous()
    weight = None if weight is None else weight.contiguous()
    first = first_tokens(x, address_of(x, layout), group_tokens(assign, y.shape[0]), y.contiguous(), weight)
    return _gather(grad, assign, None, None, first, layout)
