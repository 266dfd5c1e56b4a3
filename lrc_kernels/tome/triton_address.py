# SPDX-License-Identifier: Apache-2.0
"""Where the tokens of x lie: token t at base(t) + offset(channel), for plain rows, packed rows and the ViT layout."""

from __future__ import annotations

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


@triton.jit
def token_base(o_t, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE: tl.constexpr):
    """Offset of the first channel of each token."""
    frame = o_t // tokens_per_frame
    row = o_t - frame * tokens_per_frame
    if SHUFFLE > 1:
        i = row // (grid_w // SHUFFLE)
        row = i * SHUFFLE * grid_w + (row - i * (grid_w // SHUFFLE)) * SHUFFLE
    return frame.to(tl.int64) * stride_frame + (prefix + row).to(tl.int64) * stride_row


@triton.jit
def channel_offset(o_c, grid_w, stride_row, stride_c, D: tl.constexpr, SHUFFLE: tl.constexpr):
    """Offset of token channels from the token's base: the patches of the shuffle square one after the other."""
    offset = o_c.to(tl.int64) * stride_c
    if SHUFFLE > 1:
        patch = o_c // D
        row = patch // SHUFFLE * grid_w + patch % SHUFFLE
        offset = (o_c % D).to(tl.int64) * stride_c + row.to(tl.int64) * stride_row
    return offset


class Address(NamedTuple):
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


def address_of(x: Tensor, layout: list[int]) -> Address:
    if layout:
        _, h, w, s, prefix = layout
        per_frame = h * w // s**2
        frame, row, channel = x.stride()
        return Address(per_frame, w, prefix, frame, row, channel, x.shape[-1], s, x.shape[0] * per_frame)
    frame, row, channel = x.stride() if x.dim() == 3 else (0, *x.stride())
    per_frame = x.shape[-2]
    return Address(max(1, per_frame), 1, 0, frame, row, channel, x.shape[-1], 1, x.shape[:-1].numel())
