# SPDX-License-Identifier: Apache-2.0
"""ToMe in Triton: head mean, merge and gather kernels, and the launches of all four ops as `reference.py` defines them.

Token t of x lies at base(t) + offset(channel), so plain rows, packed rows and the ViT layout (pixel shuffle, skipped
prefix) are read and written in place by the same kernels.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc_kernels.tome import triton_plan
from lrc_kernels.tome.triton_plan import MATRIX_WARPS, plan_blocks, split_bf16

# Past these values fp32 does not survive the split into bf16 parts.
LARGEST = tl.constexpr(3.38e38)
NEGATIVE = tl.constexpr(4096.0)
NAN = tl.constexpr(1073741824.0)


@triton.jit
def _token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE: tl.constexpr):
    """Offset of the first channel of each token."""
    frame = o_t // tokens_per_frame
    row = o_t - frame * tokens_per_frame
    if SHUFFLE > 1:
        i = row // (grid_w // SHUFFLE)
        row = i * SHUFFLE * grid_w + (row - i * (grid_w // SHUFFLE)) * SHUFFLE
    return frame.to(tl.int64) * stride_frame + (prefix + row).to(tl.int64) * stride_row


@triton.jit
def _channel_offset(o_c, grid_w, stride_row, stride_c, D: tl.constexpr, SHUFFLE: tl.constexpr):
    """Offset of token channels from the token's base: the patches of the shuffle square one after the other."""
    offset = o_c.to(tl.int64) * stride_c
    if SHUFFLE > 1:
        patch = o_c // D
        row = patch // SHUFFLE * grid_w + patch % SHUFFLE
        offset = (o_c % D).to(tl.int64) * stride_c + row.to(tl.int64) * stride_row
    return offset


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
    base = _token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
    acc = tl.zeros([BLOCK_T, BLOCK_K], tl.float32)
    for first in range(0, NUM_HEADS, UNROLL):
        # Loads of several heads in flight hide the latency of memory.
        for i in tl.static_range(UNROLL):
            head = first + i
            offset = _channel_offset(head * K + o_k, grid_w, stride_row, stride_c, D, SHUFFLE)
            b_x = tl.load(x_ptr + base[:, None] + offset[None, :], mask=m_tk & (head < NUM_HEADS), other=0.0)
            acc += b_x.to(tl.float32)
    out_ptr = metric_ptr + o_t.to(tl.int64)[:, None] * K + o_k[None, :]
    tl.store(out_ptr, acc / NUM_HEADS, mask=m_tk)


@triton.jit
def _merge_rows(
    x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first_row,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE: tl.constexpr,
    BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BINARY: tl.constexpr, SKIP: tl.constexpr, PASS: tl.constexpr,
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
        needed = True
        if SKIP:
            needed = tl.max(tl.max(hit.to(tl.int32), 1), 0) > 0
        if needed:
            base = _token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
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
                    acc = tl.dot(b_hit, code.to(tl.bfloat16), acc)
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


@triton.jit(do_not_specialize=["num_splits", "num_columns"])
def tome_merge_fwd_kernel(
    x_ptr, assign_ptr, weight_ptr, size_ptr, y_ptr, cu_in_ptr, cu_out_ptr,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c, num_columns, num_splits,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
    BINARY: tl.constexpr, MEAN: tl.constexpr, SKIP: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of channels * splits). y [num_out, D_token]; a program owns every num_splits-th block of
    rows. In a one-hot product 0 * NaN would reach every row of its column: a block that comes out non-finite is summed
    again from the finite values, in the same order, and rows that really hold NaN or infinity are put back.
    """
    width: tl.constexpr = D * SHUFFLE * SHUFFLE
    i_split = tl.program_id(0) % num_splits
    i_column = tl.program_id(0) // num_splits % num_columns
    i_segment = tl.program_id(0) // num_splits // num_columns
    start = tl.load(cu_in_ptr + i_segment)
    end = tl.load(cu_in_ptr + i_segment + 1)
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < width
    offset = _channel_offset(o_c, grid_w, stride_row, stride_c, D, SHUFFLE)
    last = tl.load(cu_out_ptr + i_segment + 1)
    for first in range(tl.load(cu_out_ptr + i_segment) + i_split * BLOCK_R, last, num_splits * BLOCK_R):
        acc = _merge_rows(
            x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first, tokens_per_frame, grid_w, prefix,
            stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, SKIP, "sum",
        )  # fmt: skip
        non_finite = tl.where(tl.abs(acc) < float("inf"), 0, 1)
        poisoned = tl.max(tl.max(non_finite, 1), 0) > 0
        if poisoned:
            acc = _merge_rows(
                x_ptr, assign_ptr, weight_ptr, offset, m_c, start, end, first, tokens_per_frame, grid_w, prefix,
                stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, SKIP, "finite",
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
                stride_frame, stride_row, SHUFFLE, BLOCK_R, BLOCK_T, BLOCK_C, BINARY, SKIP, "poison",
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
    y_ptr, assign_ptr, size_ptr, weight_ptr, x_ptr, num_tokens, num_columns, stride_y_row, stride_y_c,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of tokens * blocks of channels). x[t] = y[assign[t]] * weight[t] / size[assign[t]]."""
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
    base = _token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
    offset = _channel_offset(o_c, grid_w, stride_row, 1, D, SHUFFLE)
    tl.store(x_ptr + base[:, None] + offset[None, :], value.to(x_ptr.dtype.element_ty), mask=m_tc)


class _Address(NamedTuple):
    """Where the tokens of x lie: what the kernels take, in their order, and the shape of the tokens."""

    tokens_per_frame: int
    grid_w: int
    prefix: int
    stride_frame: int
    stride_row: int
    stride_c: int
    channels: int
    shuffle: int
    num_tokens: int

    @property
    def width(self) -> int:
        return self.channels * self.shuffle**2


def _address(x: Tensor, layout: list[int]) -> _Address:
    if layout:
        _, h, w, s, prefix = layout
        per_frame = h * w // s**2
        frame, row, channel = x.stride()
        return _Address(per_frame, w, prefix, frame, row, channel, x.shape[-1], s, x.shape[0] * per_frame)
    frame, row, channel = x.stride() if x.dim() == 3 else (0, *x.stride())
    per_frame = x.shape[-2]
    return _Address(max(1, per_frame), 1, 0, frame, row, channel, x.shape[-1], 1, x.shape[:-1].numel())


def _check_dtype(name: str, x: Tensor) -> str | None:
    if x.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"{name} is {x.dtype}, it takes float32, bfloat16 and float16"
    return None


def supports_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> str | None:
    """Why the Triton head mean declines a call of `reference.head_mean`, or None."""
    return _check_dtype("x", x)


def launch_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    """`reference.head_mean` with a Triton kernel: x is read once, in place."""
    at = _address(x, layout)
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
    num_out: int, max_seqlen: int, reduce: str, binary_weight: bool, layout: list[int],
) -> str | None:  # fmt: skip
    """Why the Triton merge declines a call of `reference.merge`, or None."""
    if reduce == "max":
        return "reduce='max' is no matrix product, it takes 'mean' and 'sum'"
    return _check_dtype("x", x)


def merge_blocks(num_out: int, num_segments: int, direct: bool) -> tuple[int, int, int]:
    """(rows, tokens, channels) of a tile. The token block orders the sums, so it depends on the dtype alone; there
    are 64 rows at least: a smaller tile takes another matrix instruction, and a clip alone might differ from its batch.
    """
    return 64 if num_out <= 64 * num_segments else 128, 64 if direct else 32, 64


def launch_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen: int, reduce: str, binary_weight: bool, layout: list[int],
) -> Tensor:  # fmt: skip
    """`reference.merge` for "mean" and "sum" as a one-hot matrix product in fp32; x is read in place.

    16-bit x with weights of 0 and 1 is multiplied as it is; otherwise weight * x is split into three bf16 parts.
    """
    at, num_segments = _address(x, layout), cu_seqlens_in.shape[0] - 1
    y = torch.empty(num_out, at.width, dtype=x.dtype, device=x.device)
    if y.numel() == 0:
        return y
    direct = binary_weight and x.dtype != torch.float32
    block_r, block_t, block_c = merge_blocks(num_out, num_segments, direct)
    num_columns = triton.cdiv(at.width, block_c)
    longest = triton.cdiv(min(max_seqlen, num_out), block_r)
    num_splits = min(longest, max(1, 512 // (num_segments * num_columns)))
    # Where a segment has many blocks of rows, a token tile hits few of them.
    skip = longest >= 32
    with torch.cuda.device_of(x):
        tome_merge_fwd_kernel[(num_segments * num_columns * num_splits,)](
            x, assign.contiguous(), None if weight is None else weight.contiguous(), size.contiguous(), y,
            cu_seqlens_in, cu_seqlens_out, *at[:6], num_columns, num_splits, at.channels, at.shuffle,
            block_r, block_t, block_c, binary_weight, reduce == "mean", skip,
            num_warps=MATRIX_WARPS, num_stages=3,
        )  # fmt: skip
    return y


def supports_gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]
) -> str | None:
    """Why the Triton gather declines a call of `reference.gather`, or None."""
    return _check_dtype("y", y)


def launch_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    """`reference.gather` with a Triton kernel: rows go straight to their place in the ViT layout."""
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
    at = _address(x, layout)
    block_c = min(1024, triton.next_power_of_2(width))
    block_t = 2048 // block_c
    num_columns = triton.cdiv(width, block_c)
    with torch.cuda.device_of(y):
        tome_gather_fwd_kernel[(triton.cdiv(num_tokens, block_t) * num_columns,)](
            y, assign.contiguous(), None if size is None else size.contiguous(),
            None if weight is None else weight.contiguous(), x, num_tokens, num_columns, *y.stride(), *at[:5],
            at.channels, at.shuffle, block_t, block_c, num_warps=4,
        )  # fmt: skip
    return x


def supports_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> str | None:  # fmt: skip
    """Why the Triton plan declines a call of `reference.plan`, or None."""
    if metric.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"metric is {metric.dtype}, it takes float32, bfloat16 and float16"
    if precision == "eager_bf16" or num_heads != 1:
        return f"precision={precision!r} with num_heads={num_heads} runs on the features themselves"
    if zero_policy != "isolate":
        return f"zero_policy={zero_policy!r}, it takes only 'isolate'"
    if destination is not None and r.shape[0] > 1:
        return f"destination fixes set B of one iteration, got {r.shape[0]}"
    return None


def _destination_order(destination: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(segment-local token at each set position int32 [T], tokens of set A per segment int32 [S])."""
    total, num_segments = destination.shape[0], cu_seqlens.shape[0] - 1
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    segment = torch.repeat_interleave(torch.arange(num_segments, device=destination.device), lengths, output_size=total)
    order = torch.argsort(2 * segment + destination.long(), stable=True) - starts[segment]
    before = torch.nn.functional.pad((~destination).long().cumsum(0), (1, 0))
    sources = before[cu_seqlens[1:].long()] - before[starts]
    return order.int(), sources.int()


class _Buffers(NamedTuple):
    """What the launches of one plan share."""

    cu_seqlens: Tensor
    r: Tensor
    counts: Tensor
    order: Tensor | None
    sources: Tensor | None
    new_row: Tensor
    unit: Tensor | None
    state: Tensor
    score: Tensor
    partner: Tensor


class _Tokens(NamedTuple):
    """The tokens before an iteration; None where size 1, the token's own index, no flag is meant.

    `payload` is the metric, and has no rows after the last iteration, where nothing reads it.
    """

    payload: Tensor
    size: Tensor | None
    anchor: Tensor | None
    protected: Tensor | None


def _iterate(
    i: int, tokens: _Tokens, at: _Buffers, max_seqlen: int, longest_set: int, threshold: float | None, bf16: bool
) -> _Tokens:
    """Launches iteration i; the tokens after it."""
    (num_iterations, num_segments), total = at.r.shape, at.state.shape[0]
    payload, size, anchor, protected = tokens
    width = payload.shape[1]
    blocks = plan_blocks(width)

    def programs(length: int, block: int) -> int:
        return num_segments * triton.cdiv(length, block)

    def common(length: int, block: int) -> tuple[int, int, int, int]:
        return total, num_segments, triton.cdiv(length, block), i

    triton_plan.tome_plan_fwd_prepare_kernel[(programs(max_seqlen, blocks.tokens),)](
        payload, at.unit, at.state, protected, at.order, at.sources, at.cu_seqlens, at.counts,
        *common(max_seqlen, blocks.tokens), width, blocks.tokens, blocks.k, blocks.padded_k, bf16, num_warps=4,
    )  # fmt: skip
    triton_plan.tome_plan_fwd_match_kernel[(programs(longest_set, blocks.match_a),)](
        at.unit, at.state, at.score, at.partner, at.order, at.sources, at.r, at.cu_seqlens, at.counts,
        *common(longest_set, blocks.match_a), blocks.match_a, blocks.match_b, blocks.k, blocks.padded_k, bf16,
        num_warps=MATRIX_WARPS, num_stages=3,
    )  # fmt: skip
    triton_plan.tome_plan_fwd_rank_kernel[(programs(longest_set, blocks.tokens),)](
        at.score, at.partner, at.state, at.new_row, at.order, at.sources, at.r, at.cu_seqlens, at.counts,
        0.0 if threshold is None else float(threshold), *common(longest_set, blocks.tokens),
        blocks.tokens, threshold is not None, num_warps=4,
    )  # fmt: skip
    last = i == num_iterations - 1
    after = _Tokens(
        payload=torch.empty(0 if last else total, width, dtype=torch.float32, device=payload.device),
        size=torch.empty(total, dtype=torch.float32, device=payload.device),
        anchor=torch.empty(total, dtype=torch.int32, device=payload.device),
        protected=None if protected is None else torch.empty_like(protected),
    )
    columns = 1 if last else triton.cdiv(width, blocks.step_k)
    triton_plan.tome_plan_fwd_step_kernel[(programs(longest_set, blocks.step_b), columns)](
        payload, size, anchor, protected, at.new_row, None if last else after.payload, *after[1:],
        at.order, at.sources, at.r, at.cu_seqlens, at.counts, *common(longest_set, blocks.step_b), width,
        blocks.step_b, blocks.step_a, blocks.step_k, num_warps=MATRIX_WARPS, num_stages=3,
    )  # fmt: skip
    return after


def launch_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.plan` with Triton kernels: same arguments, same result. Four launches per iteration and two more."""
    (total, width), num_segments, num_iterations = metric.shape, cu_seqlens_in.shape[0] - 1, r.shape[0]

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=metric.device)

    assign, weight = empty(total, torch.int32), empty(total, torch.float32)
    size_out, anchor_out = empty(num_out, torch.float32), empty(num_out, torch.int32)
    valid = empty(num_out, torch.bool)
    if total == 0:
        return assign, size_out, weight, anchor_out, valid
    blocks, bf16 = plan_blocks(width), precision == "bf16"
    count = empty((num_iterations + 1, num_segments), torch.int32)
    count[0] = cu_seqlens_in.diff()
    unit_shape, unit_dtype = (1 if bf16 else 2, total, blocks.padded_k), torch.bfloat16 if bf16 else torch.float16
    order_in, sources = (None, None) if destination is None else _destination_order(destination, cu_seqlens_in)
    at = _Buffers(
        cu_seqlens=cu_seqlens_in, r=r.contiguous(), counts=count, order=order_in, sources=sources,
        new_row=empty((num_iterations, total), torch.int32),
        unit=empty(unit_shape, unit_dtype) if num_iterations else None,
        state=empty(total, torch.int8), score=empty(total, torch.float32), partner=empty(total, torch.int32),
    )  # fmt: skip
    size = None if size is None else size.float().contiguous()
    shield = None if protected is None else protected.contiguous().view(torch.int8)
    tokens = _Tokens(metric.contiguous(), size, None, shield)
    longest_set = (max_seqlen + 1) // 2 if destination is None else max_seqlen
    final_row, num_blocks = empty(total, torch.int32), triton.cdiv(max_seqlen, blocks.tokens)
    with torch.cuda.device_of(metric):
        for i in range(num_iterations):
            tokens = _iterate(i, tokens, at, max_seqlen, longest_set, threshold, bf16)
        triton_plan.tome_plan_fwd_rows_kernel[(num_segments * num_blocks,)](
            tokens.size, tokens.anchor, size_out, anchor_out, valid.view(torch.int8), final_row, cu_seqlens_in,
            cu_seqlens_out, count, num_segments, num_blocks, num_iterations, blocks.tokens, order == "position",
            num_warps=4,
        )  # fmt: skip
        triton_plan.tome_plan_fwd_assign_kernel[(num_segments * num_blocks,)](
            at.new_row, final_row, size, assign, weight, cu_seqlens_in, total, num_blocks, num_iterations,
            blocks.tokens, num_warps=4,
        )  # fmt: skip
    return assign, size_out, weight, anchor_out, valid
