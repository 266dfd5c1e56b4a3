# SPDX-License-Identifier: Apache-2.0
"""What the forward and the backward attention kernels share: which tile of which sequence a program owns, which tiles
of the other side it visits, and how a tile is loaded and masked. `cu_seqlens` in, row and tile numbers out.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)
# The fp32 products of fp32 inputs: three TF32 products would keep fewer bits than PyTorch does.
PRECISION = tl.constexpr("ieee")


@triton.jit
def locate_tile(cu_ptr, total, num_sequences, num_steps, BLOCK: tl.constexpr):
    """(sequence, its first row, its rows, tile) of the slot program_id(0).

    Sequence s owns the slots from cu[s] // BLOCK + s on: at least as many as it has tiles, and at most one more. Rows
    behind the last sequence are those of sequence `num_sequences`, whose other side is empty.
    """
    i_slot = tl.program_id(0)
    low = 0
    high = num_sequences
    for _ in range(num_steps):
        middle = (low + high + 1) // 2
        reached = tl.load(cu_ptr + middle) // BLOCK + middle <= i_slot
        low = tl.where(reached, middle, low)
        high = tl.where(reached, high, middle - 1)
    start = tl.load(cu_ptr + low)
    end = tl.where(low < num_sequences, tl.load(cu_ptr + tl.minimum(low + 1, num_sequences)), total)
    return low, start, end - start, i_slot - start // BLOCK - low


@triton.jit
def other_side(cu_ptr, i_sequence, num_sequences):
    """(first row, rows) of a sequence that `locate_tile` found on the other side."""
    start = tl.load(cu_ptr + i_sequence)
    return start, tl.load(cu_ptr + tl.minimum(i_sequence + 1, num_sequences)) - start


@triton.jit
def visited_tiles(
    first, last, length, diagonal, left, right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr, BLOCK: tl.constexpr
):
    """Tiles of `length` columns that rows first..last meet: (begin, full_begin, full_end, end).

    Row i meets columns i + diagonal - left to i + diagonal + right; every row meets all of full_begin..full_end.
    """
    begin, full_begin = 0, 0
    end, full_end = tl.cdiv(length, BLOCK), length // BLOCK
    if HAS_RIGHT:
        end = tl.cdiv(tl.minimum(tl.maximum(last + diagonal + right + 1, 0), length), BLOCK)
        full_end = tl.minimum(tl.maximum(first + diagonal + right + 1, 0), length) // BLOCK
    if HAS_LEFT:
        begin = tl.minimum(tl.maximum(first + diagonal - left, 0) // BLOCK, end)
        full_begin = tl.minimum(tl.maximum(tl.cdiv(tl.maximum(last + diagonal - left, 0), BLOCK), begin), end)
        full_end = tl.maximum(full_end, full_begin)
    return begin, full_begin, tl.minimum(full_end, end), end


@triton.jit
def load_tile(ptr, offset, m_row, m_column, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head; ROWS and COLUMNS say which of the masks can be false."""
    if ROWS and COLUMNS:
        tile = tl.load(ptr + offset, mask=m_row[:, None] & m_column[None, :], other=0.0)
    elif ROWS:
        tile = tl.load(ptr + offset, mask=m_row[:, None], other=0.0)
    elif COLUMNS:
        tile = tl.load(ptr + offset, mask=m_column[None, :], other=0.0)
    else:
        tile = tl.load(ptr + offset)
    return tile


@triton.jit
def load_vector(ptr, offset, mask, other: tl.constexpr, MASKED: tl.constexpr):
    """One value per row or per key; `mask` counts where MASKED says so."""
    return tl.load(ptr + offset, mask=mask, other=other) if MASKED else tl.load(ptr + offset)


@triton.jit
def within(column, lower, upper, HAS_LOWER: tl.constexpr, HAS_UPPER: tl.constexpr):
    """lower[i] <= column[j] <= upper[i]. Bounds per row keep the matrix of distances out of the registers."""
    if HAS_LOWER and HAS_UPPER:
        inside = (column[None, :] <= upper[:, None]) & (column[None, :] >= lower[:, None])
    elif HAS_UPPER:
        inside = column[None, :] <= upper[:, None]
    else:
        inside = column[None, :] >= lower[:, None]
    return inside


class Blocks(NamedTuple):
    """A kernel's tile: `m` queries times `n` keys, and how it is launched."""

    m: int
    n: int
    num_warps: int
    num_stages: int


def padded_head_dim(K: int) -> int:
    """Channels of a tile: a power of two, and no less than a matrix instruction takes."""
    return max(16, triton.next_power_of_2(K))


def num_slots(total: int, num_sequences: int, block: int) -> int:
    """Programs that `locate_tile` needs; it takes `search_steps(num_sequences)` steps to find a slot's sequence."""
    return total // block + num_sequences + 1


def search_steps(num_sequences: int) -> int:
    return num_sequences.bit_length()


def window_of(causal: bool, window_left: int, window_right: int) -> tuple[int, int, bool, bool]:
    """(left, right, whether left is bounded, whether right is): causal is a window that ends at the diagonal."""
    right = 0 if causal else window_right
    return window_left, right, window_left >= 0, right >= 0


def compute_capability(x: Tensor) -> tuple[int, int]:
    """Of the GPU that holds x; the interpreter runs the code of (8, 0)."""
    return torch.cuda.get_device_capability(x.device) if x.is_cuda else (8, 0)


def unit_stride(x: Tensor) -> Tensor:
    """x with its channels next to each other."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


def why_unsupported(q: Tensor, k: Tensor, v: Tensor) -> str | None:
    """Why the Triton kernels decline q, k and v, or None."""
    if q.dtype not in (torch.float32, torch.bfloat16, torch.float16) or not q.dtype == k.dtype == v.dtype:
        dtypes = ", ".join(str(x.dtype).removeprefix("torch.") for x in (q, k, v))
        return f"q, k, v are {dtypes}; it takes float32, bfloat16 or float16, one for all three"
    if q.shape[-1] > 256:
        return f"the head dim is {q.shape[-1]}, it takes at most 256"
    return None
