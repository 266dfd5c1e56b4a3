# SPDX-License-Identifier: Apache-2.0
"""Bridges from the ToMe ops to `lrc_kernels._C`: tensors in, `data_ptr()`s, sizes and strides down, tensors out."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.native import (
    DTYPES,
    cpu_unavailable,
    cuda_device_status,
    cuda_unavailable,
    declines_dtype,
    module,
    pointer,
)

# `op.py` finds beside each bridge why it may be unavailable.
__all__ = ["cpu_unavailable", "cuda_unavailable"]


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with: "avx512", "avx2", "baseline", or "none" without a build."""
    return "none" if module is None else module.cpu_isa()


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
    module.tome_head_mean(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), threads)
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
    if metric.dtype != torch.float32:
        return f"metric must be fp32, got {str(metric.dtype).removeprefix('torch.')}"
    if precision != "fp32":
        return f'precision must be "fp32", got {precision!r}'
    if zero_policy != "isolate":
        return f'zero_policy must be "isolate", got {zero_policy!r}'
    if num_heads != 1:
        return f"num_heads must be 1, got {num_heads}"
    return None


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
    total = metric.shape[0]
    metric, r = metric.contiguous(), r.to(torch.int32).contiguous()
    cu_in, cu_out = cu_seqlens_in.to(torch.int64), cu_seqlens_out.to(torch.int64)
    size = None if size is None else size.float().contiguous()
    protected = None if protected is None else protected.contiguous()
    destination = None if destination is None else destination.contiguous()
    assign, weight = torch.zeros(total, dtype=torch.int32), torch.zeros(total)
    size_out, anchor = torch.zeros(num_out), torch.zeros(num_out, dtype=torch.int32)
    valid = torch.zeros(num_out, dtype=torch.bool)
    module.tome_plan(
        *(metric.data_ptr(), total, metric.shape[1], cu_in.data_ptr(), cu_out.data_ptr(), cu_in.numel() - 1),
        *(r.data_ptr(), r.shape[0], pointer(size), pointer(protected), pointer(destination), num_out),
        *(threshold, order == "position"),
        *(assign.data_ptr(), size_out.data_ptr(), weight.data_ptr(), anchor.data_ptr(), valid.data_ptr()),
        torch.get_num_threads(),
    )
    return assign, size_out, weight, anchor, valid


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
    if reduce == "max":
        return 'reduce must be "mean" or "sum", got \'max\''
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
    module.tome_merge(
        *(x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, assign.data_ptr()),
        *(size.data_ptr() if reduce == "mean" else 0, pointer(weight), num_out, y.data_ptr()),
        torch.get_num_threads(),
    )
    return y


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
    module.tome_gather(
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
        module.cuda_tome_head_mean(
            x.data_ptr(), DTYPES[x.dtype], rows, num_tokens, num_heads, metric.data_ptr(), stream
        )
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
        module.cuda_tome_gather(
            *(y.data_ptr(), DTYPES[y.dtype], assign.data_ptr(), pointer(size), pointer(weight)),
            *(rows, num_tokens, x.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return x
