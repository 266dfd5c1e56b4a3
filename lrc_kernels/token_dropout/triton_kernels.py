# SPDX-License-Identifier: Apache-2.0
"""Moving rows in Triton: several tensors [outer, rows, width] by one index in one launch, and the gather fused with
RMSNorm, forward and backward, as `reference.py` defines them. No atomics."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

# Elements of a tile, and tensors that one launch moves.
TILE = 2048
MOST_TENSORS = 8
# Programs of the RMSNorm backward: each sums the weight's gradient over its own rows.
BACKWARD_PROGRAMS = 512
_SAME_SIZE = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


@triton.jit
def _move_tile(
    x_ptr, y_ptr, index_ptr, fill, i_tile, num_rows, width, stride_outer, stride_row,
    BLOCK_R: tl.constexpr, BLOCK_C: tl.constexpr,
):  # fmt: skip
    """One tile of y [outer, num_rows, width]; tiles run over columns, then rows, then outer."""
    num_columns = tl.cdiv(width, BLOCK_C)
    num_blocks = tl.cdiv(num_rows, BLOCK_R)
    i_row = i_tile // num_columns % num_blocks
    i_outer = (i_tile // num_columns // num_blocks).to(tl.int64)
    o_r = i_row * BLOCK_R + tl.arange(0, BLOCK_R)
    o_c = i_tile % num_columns * BLOCK_C + tl.arange(0, BLOCK_C)
    m_r, m_c = o_r < num_rows, o_c < width
    index = tl.load(index_ptr + o_r, mask=m_r, other=-1).to(tl.int64)
    source_ptr = x_ptr + i_outer * stride_outer + index[:, None] * stride_row + o_c[None, :]
    value = tl.load(source_ptr, mask=(index >= 0)[:, None] & m_c[None, :], other=0)
    value = tl.where((index >= 0)[:, None], value, fill)
    target_ptr = y_ptr + (i_outer * num_rows + o_r)[:, None] * width + o_c[None, :]
    tl.store(target_ptr, value, mask=m_r[:, None] & m_c[None, :])


@triton.jit(do_not_specialize=["num_rows"])
def drop_tokens_fwd_kernel(
    x_ptrs, y_ptrs, index_ptr, fills, outers, widths, strides_outer, strides_row, num_rows,
    BLOCKS_R: tl.constexpr, BLOCKS_C: tl.constexpr,
):  # fmt: skip
    """Grid (tiles of all tensors, one tensor after the other). y_j[o, i] = x_j[o, index[i]], or fill_j for index -1.

    Elements move as integers of their size, so that NaN payloads stay as they are and any dtype fits.
    """
    i_tile = tl.program_id(0)
    for j in tl.static_range(len(x_ptrs)):
        num_tiles = outers[j] * tl.cdiv(num_rows, BLOCKS_R[j]) * tl.cdiv(widths[j], BLOCKS_C[j])
        if (i_tile >= 0) & (i_tile < num_tiles):
            _move_tile(
                x_ptrs[j], y_ptrs[j], index_ptr, fills[j], i_tile, num_rows, widths[j], strides_outer[j],
                strides_row[j], BLOCKS_R[j], BLOCKS_C[j],
            )  # fmt: skip
        i_tile -= num_tiles


@triton.jit
def drop_tokens_rmsnorm_fwd_kernel(
    residual_ptr, weight_ptr, indices_ptr, dropped_ptr, normed_ptr, rstd_ptr, eps, stride_row,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (kept rows). The row is read once, copied, and normalised as LlamaRMSNorm rounds."""
    row = tl.program_id(0).to(tl.int64)
    source = tl.load(indices_ptr + row).to(tl.int64)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_x = tl.load(residual_ptr + source * stride_row + o_d, mask=m_d & (source >= 0), other=0.0)
    tl.store(dropped_ptr + row * D + o_d, b_x, mask=m_d)
    wide = b_x.to(tl.float32)
    # A padding row has no root to take: with eps = 0 it would be 0 / 0.
    mean = tl.where(source >= 0, tl.sum(wide * wide, 0) / D + eps, 1.0)
    rstd = tl.where(source >= 0, 1.0 / tl.sqrt_rn(mean), 0.0)
    tl.store(rstd_ptr + row, rstd)
    dtype = normed_ptr.dtype.element_ty
    unit = (wide * rstd).to(dtype).to(tl.float32)
    weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32).to(dtype).to(tl.float32)
    tl.store(normed_ptr + row * D + o_d, (unit * weight).to(dtype), mask=m_d)


@triton.jit(do_not_specialize=["num_tokens"])
def drop_tokens_rmsnorm_bwd_kernel(
    d_dropped_ptr, d_normed_ptr, dropped_ptr, weight_ptr, rstd_ptr, inverse_ptr, d_residual_ptr, partial_ptr,
    num_tokens, D: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """Grid (programs). A program takes every num_programs-th row of the residual, in order: the gradient of a kept row,
    0 for a dropped one; partial [programs, D] is the sum over its rows of the weight's gradient.
    """
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    dtype = dropped_ptr.dtype.element_ty
    weight = tl.load(weight_ptr + o_d, mask=m_d, other=0.0).to(tl.float32).to(dtype).to(tl.float32)
    d_weight = tl.zeros([BLOCK_D], tl.float32)
    # A pointer that steps instead of a product, which would be 32 bits wide.
    out_ptr = d_residual_ptr + tl.program_id(0).to(tl.int64) * D
    for token in range(tl.program_id(0), num_tokens, tl.num_programs(0)):
        row = tl.load(inverse_ptr + token).to(tl.int64)
        m_row = m_d & (row >= 0)
        wide = tl.load(dropped_ptr + row * D + o_d, mask=m_row, other=0.0).to(tl.float32)
        upstream = tl.load(d_normed_ptr + row * D + o_d, mask=m_row, other=0.0).to(tl.float32)
        skip = tl.load(d_dropped_ptr + row * D + o_d, mask=m_row, other=0.0).to(tl.float32)
        rstd = tl.load(rstd_ptr + row, mask=row >= 0, other=0.0)
        unit = wide * rstd
        d_weight += upstream * unit.to(dtype).to(tl.float32)
        g = upstream * weight
        d_row = skip + rstd * (g - unit * (tl.sum(g * unit, 0) / D))
        tl.store(out_ptr + o_d, d_row.to(dtype), mask=m_d)
        out_ptr += tl.num_programs(0).to(tl.int64) * D
    tl.store(partial_ptr + tl.program_id(0).to(tl.int64) * D + o_d, d_weight, mask=m_d)


def supports_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> str | None:
    """Why Triton declines a call of `reference.move_rows`, or None."""
    for x in tensors:
        if x.element_size() not in _SAME_SIZE or x.is_complex():
            return f"a tensor is {x.dtype}, it takes real dtypes of 1, 2, 4 and 8 bytes"
    return None


def move_blocks(width: int) -> tuple[int, int]:
    """(rows, columns) of a tile: narrow rows (labels, position ids) share one."""
    columns = min(TILE, triton.next_power_of_2(width))
    return TILE // columns, columns


def launch_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    """`reference.move_rows`, up to eight tensors in one launch."""
    num_rows = index.shape[0]
    tensors = [x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous() for x in tensors]
    moved = [x.new_empty(x.shape[0], num_rows, x.shape[2]) for x in tensors]
    work = [i for i, y in enumerate(moved) if y.numel() > 0]
    for first in range(0, len(work), MOST_TENSORS):
        chosen = work[first : first + MOST_TENSORS]
        sources, targets = [tensors[i] for i in chosen], [moved[i] for i in chosen]
        blocks = [move_blocks(x.shape[2]) for x in sources]
        tiles = [
            x.shape[0] * triton.cdiv(num_rows, rows) * triton.cdiv(x.shape[2], columns)
            for x, (rows, columns) in zip(sources, blocks, strict=True)
        ]
        with torch.cuda.device_of(index):
            drop_tokens_fwd_kernel[(sum(tiles),)](
                tuple(map(_as_integers, sources)),
                tuple(map(_as_integers, targets)),
                index,
                tuple(_bits(fill[i], tensors[i].dtype) for i in chosen),
                tuple(x.shape[0] for x in sources),
                tuple(x.shape[2] for x in sources),
                # The number of tokens must not decide how the kernel is specialised where it is of no use.
                tuple(x.stride(0) if x.shape[0] > 1 else 0 for x in sources),
                tuple(x.stride(1) for x in sources),
                num_rows,
                tuple(rows for rows, _ in blocks),
                tuple(columns for _, columns in blocks),
                num_warps=4,
            )
    return moved


def _as_integers(x: Tensor) -> Tensor:
    return x.view(_SAME_SIZE[x.element_size()])


def _bits(value: float, dtype: torch.dtype) -> int:
    """The bits of a fill value, as the integer of its dtype's size."""
    if value == 0:
        return 0
    return int(_as_integers(torch.tensor([value if dtype.is_floating_point else int(value)], dtype=dtype)))


def _supports_rmsnorm(residual: Tensor) -> str | None:
    if residual.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"residual is {residual.dtype}, it takes float32, bfloat16 and float16"
    return None if residual.shape[1] <= 16384 else f"width is {residual.shape[1]}, it takes at most 16384"


def supports_drop_tokens_rmsnorm(residual: Tensor, *args: object) -> str | None:
    """Why Triton declines a call of `reference.drop_tokens_rmsnorm`, or None."""
    return _supports_rmsnorm(residual)


def rmsnorm_warps(width: int) -> int:
    """Eight to sixteen elements a thread."""
    return min(16, max(1, triton.next_power_of_2(width) // 512))


def launch_drop_tokens_rmsnorm(
    residual: Tensor, weight: Tensor, eps: float, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.drop_tokens_rmsnorm`: a kept row is read once."""
    rows, width = indices.shape[0], residual.shape[1]
    dropped = torch.empty(rows, width, dtype=residual.dtype, device=residual.device)
    normed, rstd = torch.empty_like(dropped), torch.empty(rows, dtype=torch.float32, device=residual.device)
    if width == 0:
        return dropped, normed, torch.where(indices < 0, 0.0, torch.nan)
    if rows:
        with torch.cuda.device_of(residual):
            drop_tokens_rmsnorm_fwd_kernel[(rows,)](
                residual, weight, indices, dropped, normed, rstd, eps, residual.stride(0), width,
                triton.next_power_of_2(width), num_warps=rmsnorm_warps(width),
            )  # fmt: skip
    return dropped, normed, rstd


def supports_drop_tokens_rmsnorm_backward(
    d_dropped: Tensor, d_normed: Tensor, dropped: Tensor, *args: object
) -> str | None:
    """Why Triton declines a call of `reference.drop_tokens_rmsnorm_backward`, or None."""
    return _supports_rmsnorm(dropped)


def launch_drop_tokens_rmsnorm_backward(
    d_dropped: Tensor, d_normed: Tensor, dropped: Tensor, weight: Tensor, rstd: Tensor, inverse: Tensor
) -> tuple[Tensor, Tensor]:
    """`reference.drop_tokens_rmsnorm_backward`: one pass over the rows, then the sum of one partial per program."""
    total, width = inverse.shape[0], dropped.shape[1]
    d_residual = torch.empty(total, width, dtype=dropped.dtype, device=dropped.device)
    programs = min(total, BACKWARD_PROGRAMS)
    partial = torch.empty(programs, width, dtype=torch.float32, device=dropped.device)
    if total and width:
        with torch.cuda.device_of(dropped):
            drop_tokens_rmsnorm_bwd_kernel[(programs,)](
                d_dropped, d_normed, dropped, weight, rstd, inverse, d_residual, partial, total, width,
                triton.next_power_of_2(width), num_warps=rmsnorm_warps(width),
            )  # fmt: skip
    return d_residual, partial.sum(0).to(weight.dtype)
