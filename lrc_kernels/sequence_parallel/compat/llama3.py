# SPDX-License-Identifier: Apache-2.0
"""ring-flash-attn's llama3 functions: a pack cut into equal parts whatever its documents; every rank gathers all keys
and attends to those that its rows see."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.attention import varlen_attention_backward, varlen_attention_forward
from lrc_kernels.sequence_parallel.attention_2d import refuse_second_order
from lrc_kernels.sequence_parallel.blocks import accumulation_dtype, pack_keys
from lrc_kernels.sequence_parallel.comm import AllGather, AllToAll, Schedule
from lrc_kernels.sequence_parallel.mesh import ranks_of


def prepare_cu_seqlens(
    cu_seqlens: Tensor, causal: bool, rank: int, world_size: int
) -> tuple[Tensor, Tensor, int, int, slice]:
    """(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, local_k_slice) of a rank, from the offsets of the whole
    pack, which are read on the host: its rows, the keys that they see, and where these lie in the pack.

    Raises:
        ValueError: rows that `world_size` does not divide.
    """
    offsets = _on_host(cu_seqlens)
    if offsets[-1] % world_size:
        raise ValueError(f"cu_seqlens must end at a multiple of world_size ({world_size}), got {offsets[-1]}")
    rows = offsets[-1] // world_size
    first, last = rank * rows, (rank + 1) * rows
    held = [(a, b) for a, b in pairwise(offsets) if a < last and b > first]
    queries = [min(b, last) - max(a, first) for a, b in held]
    keys = [(min(b, last) if causal else b) - a for a, b in held]
    start = held[0][0] if held else first
    seen = slice(start, start + sum(keys))
    return (
        _offsets(queries, cu_seqlens),
        _offsets(keys, cu_seqlens),
        max(queries, default=0),
        max(keys, default=0),
        seen,
    )


@torch.compiler.disable
def attend(q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, seen: slice, options: dict[str, Any]) -> Any:
    """out [T / R, Hq, K] and lse [Hq, T / R]; differentiable. `options` are those of `varlen_attention`."""
    return _Gathered.apply(q, k, v, mesh, seen, options)


class _Gathered(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, mesh: DeviceMesh, seen: slice, options: dict[str, Any]
    ) -> tuple[Tensor, Tensor]:
        keys = ranks_of(mesh).run("llama3 attention forward", _gather(k, v, mesh.size()))[seen]
        out, lse = varlen_attention_forward(q, *_unpack(keys, k), **options)
        ctx.save_for_backward(q, k, v, out, lse)
        ctx.mesh, ctx.seen, ctx.options = mesh, seen, options
        ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        q, k, v, out, lse = ctx.saved_tensors
        size, ranks = ctx.mesh.size(), ranks_of(ctx.mesh)
        keys = ranks.run("llama3 attention backward", _gather(k, v, size))[ctx.seen]
        dq, dk, dv = varlen_attention_backward(grads[0], q, *_unpack(keys, k), out, lse, **ctx.options)
        whole = torch.zeros(size * k.shape[0], keys.shape[1], dtype=accumulation_dtype(k.dtype), device=k.device)
        whole[ctx.seen] = pack_keys(dk, dv, None).to(whole.dtype)
        dk, dv = _unpack(ranks.run("llama3 attention backward", _sum_home(whole, size)), k)
        return dq, dk.to(k.dtype), dv.to(v.dtype), None, None, None


def _gather(k: Tensor, v: Tensor, size: int) -> Schedule[Tensor]:
    rows = pack_keys(k, v, None)
    if size > 1:
        arriving = yield AllGather("ring", rows, 0)
        rows = yield arriving
    return rows


def _sum_home(whole: Tensor, size: int) -> Schedule[Tensor]:
    """Every rank's share of the gradient of each row -> the sum for this rank's rows, in rank order."""
    rows = whole.shape[0] // size
    if size > 1:
        arriving = yield AllToAll("ring", whole, [rows] * size, [rows] * size, 1)
        whole = yield arriving
    total = whole[:rows].clone()
    for part in whole.split(max(rows, 1))[1:]:
        total += part
    return total


def _unpack(rows: Tensor, like: Tensor) -> tuple[Tensor, Tensor]:
    k, v = rows.unflatten(1, (2, *like.shape[1:])).unbind(1)
    return k, v


# A function of its own, as torch.compile looks through the mark on the function that it is given.
@torch.compiler.disable
def _on_host(offsets: Tensor) -> list[int]:
    return offsets.tolist()


def _offsets(lengths: list[int], like: Tensor) -> Tensor:
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32).to(like.device)
