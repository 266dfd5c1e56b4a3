# SPDX-License-Identifier: Apache-2.0
"""What other people's attention kernels have in common: what they decline, and how they write an empty row."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.attention.reference import accumulation_dtype

HALF = (torch.bfloat16, torch.float16)


def declines(
    q: Tensor,
    key_bias: Tensor | None,
    *,
    capability: tuple[int, int],
    head_dim: int = 256,
    dlse: Tensor | None = None,
) -> str | None:
    """Why a flash kernel cannot take q on its device, or None; `capability` and `head_dim` are its least and most."""
    if q.dtype not in HALF:
        return f"q must be bf16 or fp16, got {str(q.dtype).removeprefix('torch.')}"
    if q.shape[2] % 8 or q.shape[2] > head_dim:
        return f"the head dim must be a multiple of 8 up to {head_dim}, got {q.shape[2]}"
    if key_bias is not None:
        return "it takes no key_bias"
    if dlse is not None:
        return "it takes no gradient of the lse"
    if (seen := torch.cuda.get_device_capability(q.device)) < capability:
        return (
            f"the device must have compute capability {capability[0]}.{capability[1]} or newer, got {seen[0]}.{seen[1]}"
        )
    return None


def rows_contiguous(*tensors: Tensor) -> tuple[Tensor, ...]:
    """The tensors, each with a last dimension of stride 1."""
    return tuple(x if x.stride(-1) == 1 else x.contiguous() for x in tensors)


def empty_forward(q: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) where there is no key: such a call never reaches a vendor's kernel."""
    lse = torch.full((q.shape[1], q.shape[0]), -torch.inf, dtype=accumulation_dtype(q), device=q.device)
    return torch.zeros_like(q, memory_format=torch.contiguous_format), lse


def empty_backward(q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """(dq, dk, dv) where there is no query or no key."""
    dq, dk, dv = (torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (q, k, v))
    return dq, dk, dv


def normalised(out: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
    """flash-attn writes one infinite lse (+inf in 2, -inf in 3 and 4) both for a row without keys, whose out is 0, and
    for a row of NaN; here the first has lse -inf and the second NaN."""
    # A probability of NaN spoils every channel, so one of them tells.
    meaning = torch.where(out[..., 0].T.isnan(), torch.nan, -torch.inf)
    return out.contiguous(), torch.where(lse.isinf(), meaning, lse).contiguous()


def lse_for_backward(lse: Tensor) -> Tensor:
    """exp(s - inf) = 0: in this form a row without keys gives no gradient, in any kernel."""
    return lse.masked_fill(lse == -torch.inf, torch.inf).contiguous()
