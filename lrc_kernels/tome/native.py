# SPDX-License-Identifier: Apache-2.0
"""Bridges from the ToMe ops to `lrc_kernels._C`: tensors in, `data_ptr()`s, sizes and strides down, tensors out."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.native import (
    DTYPES,
    C,
    cpu_unavailable,
    cuda_device_status,
    cuda_unavailable,
    declines_dtype,
    pointer,
)
from lrc_kernels.tome.reference import empty_tokens

__all__ = ["cpu_unavailable", "cuda_unavailable"]

# As `lrc::Reduction` numbers them.
_REDUCTIONS = {"sum": 0, "mean": 1, "max": 2}


def _unit_channel_stride(x: Tensor) -> Tensor:
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def _token_rows(x: Tensor, layout: list[int]) -> tuple[int, tuple[int, ...]]:
    """(tokens, `lrc::TokenRows`) of x [B, N, D], packed [T, D], or a ViT output [F, prefix + h*w, D]."""
    width = x.shape[-1]
    if layout:
        _, h, w, shuffle, prefix = layout
        per_frame = h * w // shuffle**2
        return x.shape[0] * per_frame, (width, shuffle, per_frame, w // shuffle, prefix, x.stride(0), x.stride(1))
    if x.dim() == 2:
        return x.shape[0], (width, 1, x.shape[0], x.shape[0], 0, 0, x.stride(0))
    return x.shape[0] * x.shape[1], (width, 1, x.shape[1], x.shape[1], 0, x.stride(0), x.stride(1))


def cpu_supports_head_mean(x: Tensor, *rest: Any) -> str | None:
    return declines_dtype("x", x)


cpu_supports_compress = cpu_supports_merge = cpu_supports_max_backward = cpu_supports_head_mean


def cpu_supports_gather(y: Tensor, *rest: Any) -> str | None:
    return declines_dtype("y", y)


def cuda_supports_head_mean(x: Tensor, *rest: Any) -> str | None:
    return declines_dtype("x", x) or cuda_device_status(x.device.index)


cuda_supports_max_backward = cuda_supports_head_mean


def cuda_supports_gather(y: Tensor, *rest: Any) -> str | None:
    return declines_dtype("y", y) or cuda_device_status(y.device.index)


def cpu_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    metric = torch.empty(num_tokens, rows[0] * rows[1] ** 2 // num_heads, dtype=torch.float32)
    threads = torch.get_num_threads()
    C.tome_head_mean(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), threads)
    return metric


def cpu_supports_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> str | None:  # fmt: skip
    if precision == "eager_bf16":
        return f'precision must be "fp32" or "bf16", got {precision!r}'
    if threshold is not None and zero_policy != "isolate":
        return f'zero_policy must be "isolate" with a threshold, got {zero_policy!r}'
    return declines_dtype("metric", metric)


def _plan_inputs(
    num_channels: int, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, *optional: Tensor | None
) -> tuple[tuple[int, ...], tuple[Tensor | None, ...]]:
    """`inputs` of the native plan behind the number of tokens, and what must stay alive while it runs."""
    cu_in, cu_out = cu_seqlens_in.to(torch.int64).contiguous(), cu_seqlens_out.to(torch.int64).contiguous()
    r = r.to(torch.int32).contiguous()
    kept = tuple(None if value is None else value.contiguous() for value in optional)
    sizes = (num_channels, cu_in.data_ptr(), cu_out.data_ptr(), cu_in.numel() - 1, r.data_ptr(), r.shape[0])
    return (*sizes, *map(pointer, kept)), (cu_in, cu_out, r, *kept)


def _plan_outputs(total: int, num_out: int) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """assign, size, weight, anchor, valid; rows of segments that need less room than they have stay 0."""
    assign, weight = torch.zeros(total, dtype=torch.int32), torch.zeros(total)
    size, anchor = torch.zeros(num_out), torch.zeros(num_out, dtype=torch.int32)
    return assign, size, weight, anchor, torch.zeros(num_out, dtype=torch.bool)


def cpu_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    if num_heads != 1:
        metric = cpu_head_mean(metric, num_heads, [])
    metric = metric.float().contiguous()
    size = None if size is None else size.float()
    inputs, kept = _plan_inputs(metric.shape[1], cu_seqlens_in, cu_seqlens_out, r, size, protected, destination)
    outputs = _plan_outputs(metric.shape[0], num_out)
    C.tome_plan(
        *(metric.data_ptr(), (metric.shape[0], *inputs), num_out, threshold, order == "position"),
        *(precision == "bf16", zero_policy == "isolate", tuple(map(pointer, outputs)), torch.get_num_threads()),
    )
    del kept
    return outputs


def cpu_compress(
    x: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, num_out: int, max_seqlen: int,
    num_heads: int, precision: str, layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    width = rows[0] * rows[1] ** 2
    inputs, kept = _plan_inputs(width // num_heads, cu_seqlens_in, cu_seqlens_out, r, None, None, None)
    assign, size, weight, anchor, valid = outputs = _plan_outputs(num_tokens, num_out)
    y = torch.empty(num_out, width, dtype=x.dtype)
    C.tome_compress(
        *(x.data_ptr(), DTYPES[x.dtype], rows, num_heads, (num_tokens, *inputs), num_out, precision == "bf16"),
        *(tuple(map(pointer, outputs)), y.data_ptr(), torch.get_num_threads()),
    )
    del kept, valid
    return y, assign, size, weight, anchor


def cpu_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int],
) -> Tensor:  # fmt: skip
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    assign, size = assign.contiguous(), size.float().contiguous()
    weight = None if weight is None else weight.float().contiguous()
    y = torch.empty(num_out, rows[0] * rows[1] ** 2, dtype=x.dtype)
    C.tome_merge(
        *(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, assign.data_ptr()),
        *(0 if reduce == "sum" else size.data_ptr(), pointer(weight)),
        # By name: a module that was built while reductions had other numbers and another name refuses the call.
        reduction=_REDUCTIONS[reduce],
        num_out=num_out,
        y=y.data_ptr(),
        threads=torch.get_num_threads(),
    )
    return y


def cpu_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> Tensor:
    x, grad, y, assign = _unit_channel_stride(x), grad.contiguous(), y.contiguous(), assign.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    num_tokens, rows = _token_rows(x, layout)
    dx = x.new_zeros(x.shape if layout else (num_tokens, x.shape[-1]))
    C.tome_max_backward(
        *(grad.data_ptr(), x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, y.data_ptr(), assign.data_ptr()),
        *(pointer(weight), y.shape[0], dx.data_ptr(), _token_rows(dx, layout)[1], torch.get_num_threads()),
    )
    return dx


def _gather_inputs(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None
) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None]:
    size = None if size is None else size.float().contiguous()
    weight = None if weight is None else weight.float().contiguous()
    return y.contiguous(), assign.contiguous(), size, weight


def cpu_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    y, assign, size, weight = _gather_inputs(y, assign, size, weight)
    x = empty_tokens(y, assign.shape[0], layout)
    num_tokens, rows = _token_rows(x, layout)
    C.tome_gather(
        *(y.data_ptr(), DTYPES[y.dtype], y.shape[0], assign.data_ptr(), pointer(size), pointer(weight)),
        *(rows, num_tokens, x.data_ptr(), torch.get_num_threads()),
    )
    return x


def cuda_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    metric = torch.empty(num_tokens, rows[0] * rows[1] ** 2 // num_heads, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        C.cuda_tome_head_mean(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), stream)
    return metric


# Tokens of a segment up to which the CUDA plan goes, `lrc::kMaxPlanTokens`.
_MAX_PLAN_TOKENS = 65536
# Rows of a segment up to which the CUDA merge goes: its blocks look at every token of a segment for each 128 rows.
_MAX_MERGE_ROWS = 4096
# Multiply-adds of the first iteration that one block may do while most of the device idles: about half a millisecond.
_MAX_BLOCK_WORK = 2**26


@functools.cache
def _device_shape(device: int) -> tuple[int, bool]:
    """(multiprocessors, whether blocks can form clusters): code for sm_80 cannot, even where the device could."""
    with torch.cuda.device(device):
        return torch.cuda.get_device_properties(device).multi_processor_count, C.cuda_ptx_version() >= 90


def plan_team(num_segments: int, max_seqlen: int, num_multiprocessors: int, has_clusters: bool) -> int:
    """Blocks that share a segment in the CUDA plan: as many as the device holds at once, 8 at most, and no more than
    there are tiles of 128 rows of set A. The plan is the same for any number."""
    team = 1
    while has_clusters and team < 8 and 2 * team * num_segments <= num_multiprocessors:
        if (2 * team - 1) * 256 >= max_seqlen:
            break
        team *= 2
    return team


def declines_plan_work(
    num_segments: int, max_seqlen: int, width: int, num_multiprocessors: int, has_clusters: bool
) -> str | None:
    """Why tiled launches (Triton) plan faster than one block or cluster per segment, or None."""
    blocks = num_segments * plan_team(num_segments, max_seqlen, num_multiprocessors, has_clusters)
    work = num_segments * (max_seqlen // 2) ** 2 * width // max(1, blocks)
    if 2 * blocks >= num_multiprocessors or work <= _MAX_BLOCK_WORK:
        return None
    return (
        f"{num_segments} segments of up to {max_seqlen} tokens occupy {blocks} of {num_multiprocessors} "
        f"multiprocessors with {work} multiply-adds each, more than {_MAX_BLOCK_WORK}"
    )


def cuda_supports_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> str | None:  # fmt: skip
    if precision == "eager_bf16" or num_heads != 1:
        return f"precision={precision!r} with num_heads={num_heads} runs on the features themselves"
    if threshold is not None and zero_policy == "reference":
        return "a threshold with zero_policy='reference', under which NaN similarities rank first and never reach it"
    if destination is not None and r.shape[0] > 1:
        return f"destination fixes set B of one iteration, got {r.shape[0]}"
    if metric.shape[1] == 0:
        return "metric must have one channel at least, got none"
    if max_seqlen > _MAX_PLAN_TOKENS:
        return f"max_seqlen must be <= {_MAX_PLAN_TOKENS}, got {max_seqlen}"
    if (reason := declines_dtype("metric", metric) or cuda_device_status(metric.device.index)) is not None:
        return reason
    return declines_plan_work(r.shape[1], max_seqlen, metric.shape[1], *_device_shape(metric.device.index))


def cuda_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    (total, width), (num_iterations, num_segments), device = metric.shape, r.shape, metric.device
    metric, r = metric.float().contiguous(), r.to(torch.int32).contiguous()
    cu_in, cu_out = cu_seqlens_in.to(torch.int32).contiguous(), cu_seqlens_out.to(torch.int32).contiguous()
    size = None if size is None else size.float().contiguous()
    protected = None if protected is None else protected.contiguous()
    destination = None if destination is None else destination.contiguous()
    assign = torch.empty(total, dtype=torch.int32, device=device)
    weight = torch.empty(total, dtype=torch.float32, device=device)
    size_out = torch.empty(num_out, dtype=torch.float32, device=device)
    anchor = torch.empty(num_out, dtype=torch.int32, device=device)
    valid = torch.empty(num_out, dtype=torch.bool, device=device)
    if total == 0:
        return assign, size_out, weight, anchor, valid
    workspace = torch.empty(C.cuda_tome_plan_workspace_bytes(total, width), dtype=torch.uint8, device=device)
    team = plan_team(num_segments, max_seqlen, *_device_shape(device.index))
    with torch.cuda.device(device):
        C.cuda_tome_plan(
            *(metric.data_ptr(), total, width, cu_in.data_ptr(), cu_out.data_ptr(), num_segments, max_seqlen),
            *(r.data_ptr(), num_iterations, pointer(size), pointer(protected), pointer(destination), threshold),
            *(precision == "bf16", order == "position", zero_policy == "isolate", team),
            *(workspace.data_ptr(), workspace.numel()),
            *(assign.data_ptr(), weight.data_ptr(), size_out.data_ptr(), anchor.data_ptr(), valid.data_ptr()),
            torch.cuda.current_stream().cuda_stream,
        )
    return assign, size_out, weight, anchor, valid


def cuda_supports_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int],
) -> str | None:  # fmt: skip
    if (rows := min(max_seqlen_out, num_out)) > _MAX_MERGE_ROWS:
        return f"a segment keeps up to {rows} rows, more than {_MAX_MERGE_ROWS}: every 128 are a pass over its tokens"
    return declines_dtype("x", x) or cuda_device_status(x.device.index)


def cuda_merge(
    x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor,
    num_out: int, max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int],
) -> Tensor:  # fmt: skip
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    assign, size = assign.contiguous(), size.float().contiguous()
    weight = None if weight is None else weight.float().contiguous()
    cu_in, cu_out = cu_seqlens_in.to(torch.int32).contiguous(), cu_seqlens_out.to(torch.int32).contiguous()
    y = torch.empty(num_out, rows[0] * rows[1] ** 2, dtype=x.dtype, device=x.device)
    with torch.cuda.device(x.device):
        C.cuda_tome_merge(
            *(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, assign.data_ptr(), size.data_ptr(), pointer(weight)),
            *(cu_in.data_ptr(), cu_out.data_ptr(), cu_in.numel() - 1, num_out, _REDUCTIONS[reduce]),
            *(y.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return y


def cuda_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    return _cuda_gather(y, assign, size, weight, None, layout)


def _cuda_gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, first_token: Tensor | None, layout: list[int]
) -> Tensor:
    y, assign, size, weight = _gather_inputs(y, assign, size, weight)
    x = empty_tokens(y, assign.shape[0], layout)
    num_tokens, rows = _token_rows(x, layout)
    with torch.cuda.device(y.device):
        C.cuda_tome_gather(
            *(y.data_ptr(), DTYPES[y.dtype], assign.data_ptr(), pointer(size), pointer(weight), pointer(first_token)),
            *(rows, num_tokens, x.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return x


def cuda_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> Tensor:
    x, y, assign = _unit_channel_stride(x), y.contiguous(), assign.contiguous()
    weight = None if weight is None else weight.float().contiguous()
    num_tokens, rows = _token_rows(x, layout)
    first_token = torch.empty(y.shape, dtype=torch.int32, device=y.device)
    with torch.cuda.device(x.device):
        C.cuda_tome_first_tokens(
            *(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, y.data_ptr(), y.shape[0], assign.data_ptr()),
            *(pointer(weight), first_token.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return _cuda_gather(grad, assign, None, None, first_token, layout)
