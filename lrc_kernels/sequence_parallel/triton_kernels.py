# SPDX-License-Identifier: Apache-2.0
"""The head exchange's copies in Triton: several tensors [T, H, K] to one message by a table of heads, and back, each in
one launch that reads and writes every element once. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, and tensors that one launch moves.
TILE = 2048
MOST_TENSORS = 4
_SAME_SIZE = {2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit(do_not_specialize=["num_rows"])
def scatter_heads_fwd_kernel(
    x_ptrs, message_ptr, table_ptr, heads, strides_row, strides_head, strides_dim, num_rows, num_slots, num_places, K,
    BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks x places), the U * slots places of a row block next to each other. A place is one slot of one
    rank; it takes the head of x that the table says, counted over all tensors, or zeros for -1.

    Elements move as integers of their size.
    """
    place = tl.program_id(0) % num_places
    o_r = (tl.program_id(0) // num_places).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    mask = (o_r < num_rows)[:, None] & (o_k < K)[None, :]
    head = tl.load(table_ptr + place)
    b_x = tl.zeros([BLOCK_R, BLOCK_K], message_ptr.dtype.element_ty)
    for j in tl.static_range(len(x_ptrs)):
        if (head >= 0) & (head < heads[j]):
            rows = x_ptrs[j] + o_r * strides_row[j] + head.to(tl.int64) * strides_head[j]
            b_x = tl.load(rows[:, None] + o_k.to(tl.int64)[None, :] * strides_dim[j], mask=mask, other=0)
        head -= heads[j]
    row = (place // num_slots).to(tl.int64) * num_rows + o_r
    out = message_ptr + (row * num_slots + place % num_slots) * K
    tl.store(out[:, None] + o_k[None, :], b_x, mask=mask)


@triton.jit(do_not_specialize=["num_rows"])
def gather_heads_fwd_kernel(
    parts_ptr, y_ptrs, table_ptr, heads, num_rows, num_slots, num_heads, K,
    COPIES: tl.constexpr, ACC: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """Grid (row blocks x heads of all y), the heads of a row block next to each other. A head of y is the sum of up to
    COPIES places of the message, in the order of the table."""
    head = tl.program_id(0) % num_heads
    o_r = (tl.program_id(0) // num_heads).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_k = tl.arange(0, BLOCK_K)
    mask = (o_r < num_rows)[:, None] & (o_k < K)[None, :]
    total = tl.zeros([BLOCK_R, BLOCK_K], ACC)
    for copy in tl.static_range(COPIES):
        place = tl.load(table_ptr + head * COPIES + copy)
        row = (place // num_slots).to(tl.int64) * num_rows + o_r
        part = parts_ptr + (row * num_slots + place % num_slots) * K
        total += tl.load(part[:, None] + o_k[None, :], mask=mask & (place >= 0), other=0.0).to(ACC)
    for j in tl.static_range(len(y_ptrs)):
        # A mask, not a branch around the store: Triton 3.6 fails to compile the branch for 16-bit parts and fp32 y.
        own = mask & (head >= 0) & (head < heads[j])
        y = y_ptrs[j] + (o_r * heads[j] + head) * K
        tl.store(y[:, None] + o_k[None, :], total.to(y_ptrs[j].dtype.element_ty), mask=own)
        head -= heads[j]


def copy_blocks(width: int) -> tuple[int, int]:
    """(BLOCK_R, BLOCK_K) of a tile for heads of `width` elements."""
    block = triton.next_power_of_2(width)
    return max(1, TILE // block), block


def supports_scatter_heads(xs: list[Tensor], table: Tensor) -> str | None:
    """Why Triton declines a call of `reference.scatter_heads`, or None."""
    if len(xs) > MOST_TENSORS:
        return f"it moves up to {MOST_TENSORS} tensors, got {len(xs)}"
    return _supports_width(xs[0].shape[2])


def launch_scatter_heads(xs: list[Tensor], table: Tensor) -> Tensor:
    """`reference.scatter_heads`."""
    (num_rows, _, width), (size, num_slots) = xs[0].shape, table.shape
    message = torch.empty(size, num_rows, num_slots, width, dtype=xs[0].dtype, device=xs[0].device)
    if message.numel():
        bits = _SAME_SIZE[message.element_size()]
        block_r, block_k = copy_blocks(width)
        strides = ((tuple(x.stride(dim) for x in xs)) for dim in range(3))
        with torch.cuda.device_of(message):
            scatter_heads_fwd_kernel[(triton.cdiv(num_rows, block_r) * size * num_slots,)](
                tuple(x.view(bits) for x in xs), message.view(bits), table, tuple(x.shape[1] for x in xs), *strides,
                num_rows, num_slots, size * num_slots, width, block_r, block_k,
            )  # fmt: skip
    return message


def supports_gather_heads(parts: Tensor, table: Tensor, num_heads: list[int], dtype: torch.dtype) -> str | None:
    """Why Triton declines a call of `reference.gather_heads`, or None."""
    if len(num_heads) > MOST_TENSORS:
        return f"it moves up to {MOST_TENSORS} tensors, got {len(num_heads)}"
    return _supports_width(parts.shape[3])


def launch_gather_heads(parts: Tensor, table: Tensor, num_heads: list[int], dtype: torch.dtype) -> list[Tensor]:
    """`reference.gather_heads`."""
    _, num_rows, num_slots, width = parts.shape
    gathered = [torch.empty(num_rows, heads, width, dtype=dtype, device=parts.device) for heads in num_heads]
    if num_rows and width:
        block_r, block_k = copy_blocks(width)
        wide = tl.float64 if parts.dtype == torch.float64 else tl.float32
        with torch.cuda.device_of(parts):
            gather_heads_fwd_kernel[(triton.cdiv(num_rows, block_r) * table.shape[0],)](
                parts.contiguous(), tuple(gathered), table, tuple(num_heads), num_rows, num_slots, table.shape[0],
                width, table.shape[1], wide, block_r, block_k,
            )  # fmt: skip
    return gathered


def _supports_width(width: int) -> str | None:
    return f"a head must have up to {TILE} elements, got {width}" if width > TILE else None
