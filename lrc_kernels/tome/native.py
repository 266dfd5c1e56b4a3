# SPDX-License-Identifier: Apache-2.0
"""Bridges from the ToMe ops to `lrc_kernels._C`: tensors in, `data_ptr()`s, sizes and strides down, tensors out."""

from __future__ import annotations

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

__all__ = ["cpu_unavailable", "cuda_unavailable"]

# As `lrc::cpu::Reduce` numbers them.
REDUCTIONS = {"mean": 0, "sum": 1, "max": 2}


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


def cpu_supports_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> str | None:
    return declines_dtype("x", x)


def cpu_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    metric = torch.empty(num_tokens, rows[0] * rows[1] ** 2 // num_heads, dtype=torch.float32)
    threads = torch.get_num_threads()
    C.tome_head_mean(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), threads)
    return metric


def cpu_supports_plan(
    metric: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    r: Tensor,
    size: Tensor | None,
    protected: Tensor | None,
    destination: Tensor | None,
    num_out: int,
    max_seqlen: int,
    threshold: float | None,
    precision: str,
    order: str,
    zero_policy: str,
    num_heads: int,
) -> str | None:
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
    metric: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    r: Tensor,
    size: Tensor | None,
    protected: Tensor | None,
    destination: Tensor | None,
    num_out: int,
    max_seqlen: int,
    threshold: float | None,
    precision: str,
    order: str,
    zero_policy: str,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def cpu_supports_compress(
    x: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    r: Tensor,
    num_out: int,
    max_seqlen: int,
    num_heads: int,
    precision: str,
    layout: list[int],
) -> str | None:
    return declines_dtype("x", x)


def cpu_compress(
    x: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    r: Tensor,
    num_out: int,
    max_seqlen: int,
    num_heads: int,
    precision: str,
    layout: list[int],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
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


def cpu_supports_merge(
    x: Tensor,
    assign: Tensor,
    size: Tensor,
    weight: Tensor | None,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    num_out: int,
    max_seqlen: int,
    reduce: str,
    binary_weight: bool,
    layout: list[int],
) -> str | None:
    return declines_dtype("x", x)


def cpu_merge(
    x: Tensor,
    assign: Tensor,
    size: Tensor,
    weight: Tensor | None,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    num_out: int,
    max_seqlen: int,
    reduce: str,
    binary_weight: bool,
    layout: list[int],
) -> Tensor:
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    assign, size = assign.contiguous(), size.float().contiguous()
    weight = None if weight is None else weight.float().contiguous()
    y = torch.empty(num_out, rows[0] * rows[1] ** 2, dtype=x.dtype)
    C.tome_merge(
        *(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, assign.data_ptr()),
        *(0 if reduce == "sum" else size.data_ptr(), pointer(weight), REDUCTIONS[reduce], num_out, y.data_ptr()),
        torch.get_num_threads(),
    )
    return y


def cpu_supports_max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> str | None:
    return declines_dtype("x", x)


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


def _gather_output(y: Tensor, assign: Tensor, layout: list[int]) -> Tensor:
    if not layout:
        return y.new_empty(assign.shape[0], y.shape[1])
    _, h, w, shuffle, prefix = layout
    return y.new_empty(assign.shape[0] * shuffle**2 // (h * w), prefix + h * w, y.shape[1] // shuffle**2)


def cpu_supports_gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]
) -> str | None:
    return declines_dtype("y", y)


def cpu_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    y, assign, size, weight = _gather_inputs(y, assign, size, weight)
    x = _gather_output(y, assign, layout)
    num_tokens, rows = _token_rows(x, layout)
    C.tome_gather(
        *(y.data_ptr(), DTYPES[y.dtype], y.shape[0], assign.data_ptr(), pointer(size), pointer(weight)),
        *(rows, num_tokens, x.data_ptr(), torch.get_num_threads()),
    )
    return x


def cuda_supports_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> str | None:
    return declines_dtype("x", x) or cuda_device_status(x.device.index)


def cuda_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    x = _unit_channel_stride(x)
    num_tokens, rows = _token_rows(x, layout)
    metric = torch.empty(num_tokens, rows[0] * rows[1] ** 2 // num_heads, dtype=torch.float32, device=x.device)
    with torch.cuda.device(x.device):
        stream = torch.cuda.current_stream().cuda_stream
        C.cuda_tome_head_mean(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), stream)
    return metric


def cuda_supports_gather(
    y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]
) -> str | None:
    return declines_dtype("y", y) or cuda_device_status(y.device.index)


def cuda_gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    y, assign, size, weight = _gather_inputs(y, assign, size, weight)
    x = _gather_output(y, assign, layout)
    num_tokens, rows = _token_rows(x, layout)
    with torch.cuda.device(y.device):
        C.cuda_tome_gather(
            *(y.data_ptr(), DTYPES[y.dtype], assign.data_ptr(), pointer(size), pointer(weight)),
            *(rows, num_tokens, x.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return x
