# SPDX-License-Identifier: Apache-2.0
"""ToMe's merge group by group: tokens sorted by their output row, each row summed in ascending token order.

Reads each token once, whatever the number of rows, without atomics. A group of more than PIECE tokens (a hub may hold
half of a clip) is cut every PIECE tokens, counted from its own first, the pieces are summed by programs of their own,
and the row adds them up in order: the bits of a row depend on its tokens alone.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from lrc_kernels.tome.triton_address import Address, channel_offset, token_base

PIECE = 64
NEVER = tl.constexpr(2147483647)
MODES = {"sum": 0, "mean": 1, "max": 2, "first": 3}
MEAN, MAX, FIRST = tl.constexpr(1), tl.constexpr(2), tl.constexpr(3)


@triton.jit
def _nothing(BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr, MODE: tl.constexpr):
    if MODE == FIRST:
        acc = tl.full([BLOCK_R, BLOCK_C], NEVER, tl.int32)
    elif MODE == MAX:
        acc = tl.full([BLOCK_R, BLOCK_C], -float("inf"), tl.float32)
    else:
        acc = tl.zeros([BLOCK_R, BLOCK_C], tl.float32)
    return acc


@triton.jit
def _join(acc, value, m_r, MODE: tl.constexpr):
    if MODE == FIRST:
        acc = tl.where(m_r[:, None], tl.minimum(acc, value), acc)
    elif MODE == MAX:
        acc = tl.where(m_r[:, None] & ((value > acc) | (value != value)), value, acc)
    else:
        acc += tl.where(m_r[:, None], value, 0.0)
    return acc


@triton.jit
def _join_tokens(
    x_ptr, order_ptr, weight_ptr, y_ptr, o_r, m_r, o_c, m_c, begin, count,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """[BLOCK_R, BLOCK_C] over tokens order[begin : begin + count] of each row; FIRST gives the first of them that
    holds the row's maximum y.
    """
    offset = channel_offset(o_c, grid_w, stride_row, stride_c, D, SHUFFLE)
    m_rc = m_r[:, None] & m_c[None, :]
    acc = _nothing(BLOCK_R, BLOCK_C, MODE)
    if MODE == FIRST:
        y_row_ptr = y_ptr + o_r.to(tl.int64)[:, None] * (D * SHUFFLE * SHUFFLE) + o_c[None, :]
        best = tl.load(y_row_ptr, mask=m_rc, other=0.0).to(tl.float32)
    for first in range(0, tl.max(count, 0), UNROLL):
        # Loads of several tokens in flight hide the latency of memory.
        for i in tl.static_range(UNROLL):
            m_t = first + i < count
            token = tl.load(order_ptr + begin + first + i, mask=m_t, other=0).to(tl.int32)
            if weight_ptr is not None:
                weight = tl.load(weight_ptr + token, mask=m_t, other=0.0)
                m_t = m_t & (weight != 0.0)
            base = token_base(token, tokens_per_frame, grid_w, prefix, stride_frame, stride_row, SHUFFLE)
            value = tl.load(x_ptr + base[:, None] + offset[None, :], mask=m_t[:, None] & m_c[None, :], other=0.0)
            value = value.to(tl.float32)
            if MODE == FIRST:
                attains = (value == best) | ((value != value) & (best != best))
                acc = _join(acc, tl.where(attains, token[:, None], NEVER), m_t, MODE)
            else:
                if weight_ptr is not None and MODE != MAX:
                    value = value * weight[:, None]
                acc = _join(acc, value, m_t, MODE)
    return acc


@triton.jit(do_not_specialize=["num_columns", "num_rows", "search_steps"])
def tome_merge_fwd_pieces_kernel(
    x_ptr, order_ptr, row_start_ptr, piece_start_ptr, weight_ptr, y_ptr, partial_ptr,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c, num_columns, num_rows, search_steps,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, PIECE: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid (blocks of pieces * blocks of channels). partial [pieces, D_token] of the rows that are cut."""
    i_column = tl.program_id(0) % num_columns
    i_block = tl.program_id(0) // num_columns
    num_pieces = tl.load(piece_start_ptr + num_rows)
    if i_block * BLOCK_R >= num_pieces:
        return
    o_p = i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_p = o_p < num_pieces
    low = tl.zeros([BLOCK_R], tl.int32)
    high = tl.zeros([BLOCK_R], tl.int32) + num_rows
    for _ in range(search_steps):
        middle = (low + high) // 2
        starts_before = tl.load(piece_start_ptr + middle) <= o_p
        low = tl.where(starts_before, middle, low)
        high = tl.where(starts_before, high, middle)
    row = tl.where(m_p, low, 0)
    begin = tl.load(row_start_ptr + row) + (o_p - tl.load(piece_start_ptr + row)) * PIECE
    count = tl.where(m_p, tl.minimum(tl.load(row_start_ptr + row + 1) - begin, PIECE), 0)
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D * SHUFFLE * SHUFFLE
    acc = _join_tokens(
        x_ptr, order_ptr, weight_ptr, y_ptr, row, m_p, o_c, m_c, begin, count, tokens_per_frame, grid_w, prefix,
        stride_frame, stride_row, stride_c, D, SHUFFLE, BLOCK_R, BLOCK_C, UNROLL, MODE,
    )  # fmt: skip
    out_ptr = partial_ptr + o_p.to(tl.int64)[:, None] * (D * SHUFFLE * SHUFFLE) + o_c[None, :]
    tl.store(out_ptr, acc, mask=m_p[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_blocks", "num_columns", "num_rows", "most_rows"])
def tome_merge_fwd_groups_kernel(
    x_ptr, order_ptr, row_start_ptr, piece_start_ptr, partial_ptr, size_ptr, weight_ptr, y_ptr, out_ptr, cu_out_ptr,
    tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c, num_blocks, num_columns, num_rows, most_rows,
    D: tl.constexpr, SHUFFLE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
    UNROLL: tl.constexpr, MODE: tl.constexpr,
):  # fmt: skip
    """Grid (segments * blocks of rows * blocks of channels). out [num_out, D_token] of segments (all rows are one where
    cu_out_ptr is None) with more than `most_rows` rows: y, or for FIRST the token that y came from.
    """
    i_column = tl.program_id(0) % num_columns
    i_block = tl.program_id(0) // num_columns % num_blocks
    i_segment = tl.program_id(0) // num_columns // num_blocks
    first = 0
    last = num_rows
    if cu_out_ptr is not None:
        first = tl.load(cu_out_ptr + i_segment)
        last = tl.load(cu_out_ptr + i_segment + 1)
    if (last - first <= most_rows) | (first + i_block * BLOCK_R >= last):
        return
    o_r = first + i_block * BLOCK_R + tl.arange(0, BLOCK_R)
    m_r = o_r < last
    o_c = i_column * BLOCK_C + tl.arange(0, BLOCK_C)
    m_c = o_c < D * SHUFFLE * SHUFFLE
    begin = tl.load(row_start_ptr + o_r, mask=m_r, other=0)
    count = tl.load(row_start_ptr + o_r + 1, mask=m_r, other=0) - begin
    piece = tl.load(piece_start_ptr + o_r, mask=m_r, other=0)
    num_pieces = tl.load(piece_start_ptr + o_r + 1, mask=m_r, other=0) - piece
    acc = _join_tokens(
        x_ptr, order_ptr, weight_ptr, y_ptr, o_r, m_r, o_c, m_c, begin, tl.where(num_pieces > 0, 0, count),
        tokens_per_frame, grid_w, prefix, stride_frame, stride_row, stride_c,
        D, SHUFFLE, BLOCK_R, BLOCK_C, UNROLL, MODE,
    )  # fmt: skip
    for i_first in range(0, tl.max(num_pieces, 0), UNROLL):
        for i in tl.static_range(UNROLL):
            m_p = i_first + i < num_pieces
            in_ptr = partial_ptr + (piece + i_first + i).to(tl.int64)[:, None] * (D * SHUFFLE * SHUFFLE) + o_c[None, :]
            acc = _join(acc, tl.load(in_ptr, mask=m_p[:, None] & m_c[None, :], other=0), m_p, MODE)
    if size_ptr is not None:
        size = tl.load(size_ptr + o_r, mask=m_r, other=0.0)
        value = acc / size[:, None] if MODE == MEAN else acc
        acc = tl.where((size == 0.0)[:, None], 0.0, value)
    at_ptr = out_ptr + o_r.to(tl.int64)[:, None] * (D * SHUFFLE * SHUFFLE) + o_c[None, :]
    tl.store(at_ptr, acc.to(out_ptr.dtype.element_ty), mask=m_r[:, None] & m_c[None, :])


class Groups(NamedTuple):
    """Tokens by output row.

    Attributes:
        order: int64 [T], the tokens, ascending within a row.
        row_start: int32 [num_out + 1], where those of each row begin.
        piece_start: int32 [num_out + 1], pieces before each row; only rows of more than PIECE tokens have any.
    """

    order: Tensor
    row_start: Tensor
    piece_start: Tensor


def group_tokens(assign: Tensor, num_out: int) -> Groups:
    """The tokens of each output row in ascending order, without a synchronisation."""
    rows, order = torch.sort(assign, stable=True)
    row_start = torch.searchsorted(
        rows, torch.arange(num_out + 1, dtype=rows.dtype, device=rows.device), out_int32=True
    )
    lengths = row_start.diff()
    num_pieces = torch.where(lengths > PIECE, (lengths + PIECE - 1) // PIECE, 0)
    piece_start = torch.nn.functional.pad(num_pieces.cumsum(0, dtype=torch.int32), (1, 0))
    return Groups(order, row_start, piece_start)


def group_blocks(width: int, mode: str) -> tuple[int, int, int]:
    """(rows, channels, tokens in flight) of a tile: 2048 elements, so that 128 threads load 16 bytes of bf16 each."""
    block_c = min(512, triton.next_power_of_2(width))
    return 2048 // block_c, block_c, 2 if mode == "first" else 4


def launch_groups(
    x: Tensor, at: Address, groups: Groups, size: Tensor | None, weight: Tensor | None, cu_seqlens_out: Tensor | None,
    max_seqlen_out: int, most_rows: int, mode: str, out: Tensor, y: Tensor | None = None,
) -> None:  # fmt: skip
    """Writes the rows of all segments that have more than `most_rows`; `mode` is a reduction, or "first"."""
    num_out, num_tokens = out.shape[0], groups.order.shape[0]
    block_r, block_c, unroll = group_blocks(at.width, mode)
    num_columns, num_blocks = triton.cdiv(at.width, block_c), triton.cdiv(min(max_seqlen_out, num_out), block_r)
    num_segments = 1 if cu_seqlens_out is None else cu_seqlens_out.shape[0] - 1
    # A row of n > PIECE tokens has fewer than 2 * n / PIECE pieces.
    most_pieces = 2 * num_tokens // PIECE
    dtype = torch.int32 if mode == "first" else torch.float32
    partial = torch.empty(most_pieces, at.width, dtype=dtype, device=x.device)
    tiles = (at.channels, at.shuffle, block_r, block_c, unroll)
    if most_pieces:
        tome_merge_fwd_pieces_kernel[(triton.cdiv(most_pieces, block_r) * num_columns,)](
            x, *groups, weight, y, partial, *at[:6], num_columns, num_out, num_out.bit_length(), *tiles, PIECE,
            MODES[mode], num_warps=4,
        )  # fmt: skip
    tome_merge_fwd_groups_kernel[(num_segments * num_blocks * num_columns,)](
        x, *groups, partial, size, weight, y, out, cu_seqlens_out, *at[:6], num_blocks, num_columns, num_out, most_rows,
        *tiles, MODES[mode], num_warps=4,
    )  # fmt: skip


def first_tokens(x: Tensor, at: Address, groups: Groups, y: Tensor, weight: Tensor | None) -> Tensor:
    """int32 [num_out, D_token]: the first token of weight > 0 that holds each element of the "max" merge y."""
    first = torch.empty(y.shape, dtype=torch.int32, device=x.device)
    if first.numel():
        with torch.cuda.device_of(x):
            launch_groups(x, at, groups, None, weight, None, y.shape[0], 0, "first", first, y)
    return first
