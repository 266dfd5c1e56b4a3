# SPDX-License-Identifier: Apache-2.0
"""The specification of the head exchange's copies: rows of all heads to the message of an all-to-all, and back."""

from __future__ import annotations

import torch
from torch import Tensor


def scatter_heads(xs: list[Tensor], table: Tensor) -> Tensor:
    """xs [T, H_i, K], table [U, slots] -> [U, T, slots, K]: slot s of row (u, t) has the head table[u, s] of row t,
    counted over all of xs, and zeros for -1."""
    heads = torch.cat(xs, 1)[:, table.clamp(min=0)]
    return heads.masked_fill((table < 0)[None, :, :, None], 0).movedim(1, 0).contiguous()


def gather_heads(parts: Tensor, table: Tensor, num_heads: list[int], dtype: torch.dtype) -> list[Tensor]:
    """parts [U, T, slots, K], table [sum of num_heads, copies] -> [T, H_i, K] in `dtype` for each of num_heads: a head
    is the sum, in fp32 or wider and in order, over its entries u * slots + s, of slot s of row (u, t); -1 adds none."""
    slots = parts.movedim(0, 1).flatten(1, 2)
    wide = torch.float64 if parts.dtype == torch.float64 else torch.float32
    total = torch.zeros(slots.shape[0], table.shape[0], parts.shape[3], dtype=wide, device=parts.device)
    for copy in table.unbind(1):
        total += slots[:, copy.clamp(min=0)].masked_fill((copy < 0)[None, :, None], 0)
    return [torch.empty_like(x, dtype=dtype).copy_(x) for x in total.split(num_heads, 1)]
