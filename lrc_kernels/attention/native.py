# SPDX-License-Identifier: Apache-2.0
"""Bridge from `lrc::attention_merge_partials` to `lrc_kernels._C`: two partial results in, the merged one out."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.native import DTYPES, C, cuda_device_status, cuda_unavailable, declines_dtype

# `op.py` finds beside the bridge why it may be unavailable.
__all__ = ["cuda_unavailable"]


def cuda_supports_merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> str | None:
    for name, value in (("lse", lse), ("lse_block", lse_block)):
        if value.dtype != torch.float32:
            return f"{name} must be fp32, got {str(value.dtype).removeprefix('torch.')}"
    return declines_dtype("out", out) or declines_dtype("out_block", out_block) or cuda_device_status(out.device.index)


def _partial(out: Tensor, lse: Tensor) -> tuple[int, ...]:
    """The fields of `lrc::PartialAttention`."""
    return out.data_ptr(), DTYPES[out.dtype], out.stride(0), out.stride(1), lse.data_ptr(), *lse.stride()


def cuda_merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    num_rows, num_heads, num_channels = out.shape
    # A row's channels are read as vectors; any other stride may be what it is.
    out, out_block = (x if num_channels <= 1 or x.stride(2) == 1 else x.contiguous() for x in (out, out_block))
    merged = torch.empty(out.shape, dtype=torch.float32, device=out.device)
    merged_lse = torch.empty(num_heads, num_rows, dtype=torch.float32, device=out.device)
    with torch.cuda.device(out.device):
        stream = torch.cuda.current_stream().cuda_stream
        C.cuda_attention_merge_partials(
            *(_partial(out, lse), _partial(out_block, lse_block), num_rows, num_heads, num_channels),
            *(merged.data_ptr(), merged_lse.data_ptr(), stream),
        )
    return merged, merged_lse
