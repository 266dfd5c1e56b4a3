# SPDX-License-Identifier: Apache-2.0
"""Bridges from the token dropout ops to `lrc_kernels._C` and to torch's own CPU gathers: tensors in, tensors out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrc_kernels.native import DTYPES, C, cpu_unavailable, cuda_device_status, cuda_unavailable, pointer

# `op.py` finds beside each bridge why it may be unavailable.
__all__ = ["cpu_unavailable", "cuda_unavailable"]

_MODES = {"topk": 0, "linspace": 1, "random": 2}
# One block walks a sequence; past this many rows several blocks per sequence (Triton) are faster.
_LONGEST = 65536
_MOST_MOVES = 8
# Keys over which the statistics of scores are taken.
_SCORE_BLOCK = 128
# Elements of a CPU tile: 512 KiB in fp32.
_TILE = 131072


def cpu_supports_scores(q: Tensor, k: Tensor, *rest: Any) -> str | None:
    if k.dtype in DTYPES:
        return None
    return f"k must be fp32, bf16 or fp16, got {str(k.dtype).removeprefix('torch.')}"


def cpu_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    row_sequence: Tensor,
    row_position: Tensor,
    block_table: Tensor | None,
    lse: Tensor | None,
    num_tokens: int,
    max_seqlen: int,
    head_reduce: str,
    one_row: bool,
    softmax_scale: float,
    statistics: Tensor | None = None,
    factor: Tensor | None = None,
) -> Tensor:
    """`reference_scores.scores`; of sequences of one block also their statistics out, or their factors in."""
    # A key's channels are read as vectors; any other stride may be what it is.
    k = k if k.stride(-1) == 1 or k.shape[-1] == 1 else k.contiguous()
    q, cu_seqlens = q.float().contiguous(), cu_seqlens_k.to(torch.int64).contiguous()
    row_sequence, row_position = row_sequence.int().contiguous(), row_position.int().contiguous()
    lse = None if lse is None else lse.contiguous()
    table = None if block_table is None else block_table.int().contiguous()
    strides: tuple[int, ...]
    if table is None:
        strides, sizes = (0, k.stride(0), k.stride(1)), (0, 0, 0, k.shape[0])
    else:
        strides, sizes = k.stride()[:3], (k.shape[0], k.shape[1], table.shape[1], 0)
    scores = torch.empty(num_tokens, dtype=torch.float32)
    C.attention_scores(
        *(q.data_ptr(), q.shape[0], q.shape[1], k.data_ptr(), DTYPES[k.dtype], k.shape[-2], k.shape[-1], strides),
        *(0 if table is None else table.data_ptr(), sizes, cu_seqlens.data_ptr(), cu_seqlens.numel() - 1),
        *(row_sequence.data_ptr(), row_position.data_ptr(), 0 if lse is None else lse.data_ptr()),
        *(head_reduce == "max", 1.0 / q.shape[1] if head_reduce == "mean" else 1.0, softmax_scale),
        *(scores.data_ptr(), num_tokens, torch.get_num_threads(), pointer(statistics), pointer(factor)),
    )
    return scores


cpu_supports_block_statistics = cpu_supports_block_scores = cpu_supports_scores


def cpu_supports_block_factors(statistics: Tensor, *rest: Any) -> str | None:
    if statistics.dtype == torch.float32:
        return None
    return f"statistics must be fp32, got {str(statistics.dtype).removeprefix('torch.')}"


def cpu_block_statistics(
    q: Tensor, k: Tensor, cu_blocks: Tensor, query_position: Tensor, softmax_scale: float
) -> Tensor:
    statistics = torch.zeros(2, *q.shape[:2])
    statistics[0] = -torch.inf
    row, longest = torch.arange(q.shape[0], dtype=torch.int32), k.shape[0]
    options = (None, None, longest, longest, "sum", True, softmax_scale)
    cpu_scores(q, k, cu_blocks, row, query_position, *options, statistics=statistics)
    return statistics


def cpu_block_factors(statistics: Tensor, cu_seqlens_k: Tensor, query_position: Tensor) -> Tensor:
    statistics = statistics.contiguous()
    seen = torch.minimum(cu_seqlens_k.diff(), query_position + 1).clamp(min=0).long()
    seen = (seen + _SCORE_BLOCK - 1) // _SCORE_BLOCK
    factor = torch.zeros_like(statistics[0])
    C.attention_score_factors(
        *(statistics[0].data_ptr(), statistics[1].data_ptr(), seen.data_ptr(), *factor.shape, factor.data_ptr())
    )
    return factor


def cpu_block_scores(
    q: Tensor,
    k: Tensor,
    cu_blocks: Tensor,
    query_position: Tensor,
    factor: Tensor,
    head_reduce: str,
    softmax_scale: float,
) -> Tensor:
    row, longest = torch.arange(q.shape[0], dtype=torch.int32), k.shape[0]
    options = (None, None, longest, longest, head_reduce, True, softmax_scale)
    return cpu_scores(q, k, cu_blocks, row, query_position, *options, factor=factor.contiguous())


def cpu_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    """`reference.move_rows` by torch's gathers, which copy rows at the speed of memory."""
    whole = index.numel() == 0 or int(index.min()) >= 0
    present = index if whole else (index >= 0).nonzero()[:, 0]
    chosen = index if whole else index[present]
    moved = []
    for x, value in zip(tensors, fill, strict=True):
        # One outer row as a matrix: torch copies whole rows there.
        rows = x[0].index_select(0, chosen)[None] if x.shape[0] == 1 else x.index_select(1, chosen)
        if not whole:
            y = x.new_full((x.shape[0], index.shape[0], x.shape[2]), _element(value, x))
            rows = y.index_copy_(1, present, rows)
        moved.append(rows)
    return moved


def _element(value: float, x: Tensor) -> float | int:
    return value if x.is_floating_point() or x.is_complex() else int(value)


def cpu_drop_tokens_rmsnorm(
    residual: Tensor, weight: Tensor, eps: float, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """`reference.drop_tokens_rmsnorm` in tiles of rows that stay in the cache between torch's passes."""
    rows, width = indices.shape[0], residual.shape[1]
    dtype = torch.float64 if residual.dtype == torch.float64 else torch.float32
    dropped = residual.new_empty(rows, width)
    normed, rstd = torch.empty_like(dropped), residual.new_empty(rows, dtype=dtype)
    weight = weight.to(residual.dtype)
    absent = indices < 0
    whole = not bool(absent.any())
    # An empty residual still has rows to give where every index is -1.
    source = residual if residual.shape[0] else residual.new_zeros(1, width)
    tile = max(1, _TILE // max(1, width))
    for first in range(0, rows, tile):
        at = slice(first, first + tile)
        torch.index_select(source, 0, indices[at].clamp(min=0), out=dropped[at])
        if not whole:
            dropped[at].masked_fill_(absent[at, None], 0)
        wide = dropped[at].to(dtype)
        scale = wide.square().mean(-1).add_(eps).rsqrt_()
        rstd[at] = scale if whole else scale.masked_fill_(absent[at], 0)
        torch.mul((wide * rstd[at, None]).to(residual.dtype), weight, out=normed[at])
    return dropped, normed, rstd


def cpu_select(
    droppable: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    keep: Tensor,
    scores: Tensor | None,
    seed: Tensor,
    layer: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    num_kept: int,
    max_seqlen: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    indices = torch.full((num_kept,), -1, dtype=torch.int32)
    inverse = torch.empty(droppable.shape[0], dtype=torch.int32)
    ids, places = _int64(sequence_ids), _int64(positions)
    C.select_tokens(
        *(_MODES[mode], droppable.data_ptr(), cu_seqlens_in.data_ptr(), cu_seqlens_out.data_ptr(), keep.data_ptr()),
        *(pointer(scores), int(seed), layer, pointer(ids), pointer(places), keep.shape[0]),
        *(indices.data_ptr(), inverse.data_ptr(), torch.get_num_threads()),
    )
    return indices, inverse


def cpu_select_bernoulli(
    droppable: Tensor,
    cu_seqlens: Tensor,
    seed: Tensor,
    layer: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    capacity: int,
    max_seqlen: int,
    threshold: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    indices = torch.full((capacity,), -1, dtype=torch.int32)
    inverse = torch.empty(droppable.shape[0], dtype=torch.int32)
    cu_out, wanted = (torch.empty(size, dtype=torch.int32) for size in (cu_seqlens.shape[0] + 1, 1))
    ids, places = _int64(sequence_ids), _int64(positions)
    C.select_tokens_bernoulli(
        *(droppable.data_ptr(), cu_seqlens.data_ptr(), int(seed), layer, pointer(ids), pointer(places)),
        *(cu_seqlens.shape[0] - 1, capacity, threshold, indices.data_ptr(), inverse.data_ptr(), cu_out.data_ptr()),
        *(wanted.data_ptr(), torch.get_num_threads()),
    )
    return indices, inverse, cu_out, wanted


def _int64(x: Tensor | None) -> Tensor | None:
    return None if x is None else x.to(torch.int64).contiguous()


def cuda_supports_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> str | None:
    for x in tensors:
        if x.element_size() not in (1, 2, 4, 8):
            return f"a tensor is {x.dtype}, it takes dtypes of 1, 2, 4 and 8 bytes"
    return cuda_device_status(index.device.index)


def row_moves(tensors: list[Tensor], targets: list[Tensor], fill: list[float]) -> list[tuple[int, ...]]:
    """The fields of `lrc::RowMove` for tensors [outer, rows, width] of unit width stride."""
    moves: list[tuple[int, ...]] = []
    for x, y, value in zip(tensors, targets, fill, strict=True):
        size = x.element_size()
        # A stride that no step uses must not narrow the vectors.
        outer_stride = x.stride(0) * size if x.shape[0] > 1 else 0
        places = (x.shape[0], x.shape[2] * size, outer_stride, x.stride(1) * size)
        moves.append((x.data_ptr(), y.data_ptr(), *places, _pattern(value, x)))
    return moves


def _pattern(value: float, x: Tensor) -> int:
    """A fill value's bits, repeated over 8 bytes."""
    if value == 0:
        return 0
    repeated = torch.full((8 // x.element_size(),), _element(value, x), dtype=x.dtype, device="cpu")
    return int(repeated.view(torch.int64)) % 2**64


def cuda_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    tensors = [x if x.shape[2] <= 1 or x.stride(2) == 1 else x.contiguous() for x in tensors]
    moved = [x.new_empty(x.shape[0], index.shape[0], x.shape[2]) for x in tensors]
    moves = row_moves(tensors, moved, fill)
    index = index.contiguous()
    with torch.cuda.device(index.device):
        stream = torch.cuda.current_stream().cuda_stream
        for first in range(0, len(moves), _MOST_MOVES):
            C.cuda_move_rows(moves[first : first + _MOST_MOVES], index.data_ptr(), index.shape[0], stream)
    return moved


def cuda_supports_drop_tokens_rmsnorm(residual: Tensor, weight: Tensor, eps: float, indices: Tensor) -> str | None:
    if residual.dtype not in DTYPES:
        return f"residual must be fp32, bf16 or fp16, got {str(residual.dtype).removeprefix('torch.')}"
    width, size = residual.shape[1], 16 // residual.element_size()
    aligned = width % size == 0 and residual.stride(0) % size == 0 and residual.data_ptr() % 16 == 0
    most = 4096 * (size if aligned and weight.data_ptr() % 16 == 0 else 1)
    if not 1 <= width <= most:
        return f"the width must be 1 to {most} at these addresses, got {width}"
    return cuda_device_status(residual.device.index)


def cuda_drop_tokens_rmsnorm(
    residual: Tensor, weight: Tensor, eps: float, indices: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = indices.shape[0], residual.shape[1]
    weight, indices = weight.to(residual.dtype), indices.contiguous()
    dropped = residual.new_empty(rows, width)
    normed, rstd = torch.empty_like(dropped), residual.new_empty(rows, dtype=torch.float32)
    with torch.cuda.device(residual.device):
        C.cuda_drop_tokens_rmsnorm(
            *(residual.data_ptr(), DTYPES[residual.dtype], residual.stride(0), weight.data_ptr(), eps),
            *(indices.data_ptr(), rows, width, dropped.data_ptr(), normed.data_ptr(), rstd.data_ptr()),
            torch.cuda.current_stream().cuda_stream,
        )
    return dropped, normed, rstd


def cuda_supports_select(droppable: Tensor, *args: Any) -> str | None:
    max_seqlen = args[9]
    if max_seqlen > _LONGEST:
        return f"max_seqlen must be at most {_LONGEST}, got {max_seqlen}"
    return cuda_device_status(droppable.device.index)


def cuda_select(
    droppable: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    keep: Tensor,
    scores: Tensor | None,
    seed: Tensor,
    layer: int,
    sequence_ids: Tensor | None,
    positions: Tensor | None,
    num_kept: int,
    max_seqlen: int,
    mode: str,
) -> tuple[Tensor, Tensor]:
    indices = torch.full((num_kept,), -1, dtype=torch.int32, device=droppable.device)
    inverse = torch.empty(droppable.shape[0], dtype=torch.int32, device=droppable.device)
    sequence_ids = None if sequence_ids is None else sequence_ids.contiguous()
    positions = None if positions is None else positions.contiguous()
    with torch.cuda.device(droppable.device):
        C.cuda_select_tokens(
            *(_MODES[mode], droppable.data_ptr(), cu_seqlens_in.data_ptr(), cu_seqlens_out.data_ptr()),
            *(keep.data_ptr(), pointer(scores), seed.data_ptr(), layer, pointer(sequence_ids), pointer(positions)),
            *(positions is not None and positions.dtype == torch.int64, keep.shape[0], max_seqlen),
            *(indices.data_ptr(), inverse.data_ptr(), torch.cuda.current_stream().cuda_stream),
        )
    return indices, inverse
