# SPDX-License-Identifier: Apache-2.0
"""A pack's tensors and a rank's part of them: embeddings, labels, position ids [T, ...] in, [T_local, ...] out, and
back. Differentiable."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from lrc_kernels.sequence_parallel.comm import AllGather, Schedule, as_words, from_words
from lrc_kernels.sequence_parallel.mesh import place, ranks_of
from lrc_kernels.sequence_parallel.plan import SequencePlan


def take_rows(x: Tensor, plan: SequencePlan, here: tuple[int, int], dim: int = 0, fill: float = 0) -> Tensor:
    """The rows of `x` that the rank (ring, ulysses) holds; `fill` for padding."""
    index = plan.local_indices(*here).to(x.device)
    dim %= x.dim()
    missing = (index < 0).view(-1, *[1] * (x.dim() - 1 - dim))
    # Neither index_select nor masked_fill, which know fewer dtypes.
    rows = x[(slice(None),) * dim + (index.clamp(min=0),)]
    return torch.where(missing, torch.tensor(fill, device=x.device).to(x.dtype), rows)


def collect_rows(x: Tensor, plan: SequencePlan, ring_rank: int) -> Schedule[Tensor]:
    """[T_local, ...] of every rank -> [T, ...] in the order of the pack, the same on all of them."""
    if plan.ulysses > 1:
        arriving = yield AllGather("ulysses", x, 0)
        x = yield arriving
    x = x[: plan.shard_rows[ring_rank]]
    longest = max(plan.shard_rows)
    if plan.ring > 1:
        arriving = yield AllGather("ring", pad(x, (*[0, 0] * (x.dim() - 1), 0, longest - x.shape[0])), 1)
        x = yield arriving
    held = [torch.cat([plan.local_indices(r, u) for u in range(plan.ulysses)]) for r in range(plan.ring)]
    index = torch.empty(plan.layout.num_tokens, dtype=torch.int64)
    for r, rows in enumerate(held):
        index[rows[: plan.shard_rows[r]]] = r * longest + torch.arange(plan.shard_rows[r])
    return x.index_select(0, index.to(x.device))


@torch.compiler.disable
def shard(x: Tensor, plan: SequencePlan, mesh: DeviceMesh, dim: int = 0, *, fill: float = 0) -> Tensor:
    """This rank's rows of a tensor that every rank holds whole.

    Differentiable: the gradient of x is that of all ranks' rows together, the same on each rank, for a loss that is
    the sum of all ranks' losses. That gathers, so the backward is a collective.

    Args:
        x: T rows along `dim`, any dtype, equal on all ranks of the plan. Labels are shifted BEFORE sharding: the next
            row of a rank is not the next row of the pack.
        fill: what padding rows hold; -100 for labels.

    Returns:
        T_local rows along `dim`.

    Raises:
        ValueError: another number of rows, or a mesh of other degrees.
    """
    dim = _check("x", x, plan.layout.num_tokens, dim)
    place(plan, mesh)
    return _Shard.apply(x, plan, mesh, dim, fill)


@torch.compiler.disable
def unshard(x: Tensor, plan: SequencePlan, mesh: DeviceMesh, dim: int = 0) -> Tensor:
    """All rows of a tensor of which every rank holds its own, in the order of the pack; padding is dropped. A
    collective.

    Differentiable: each rank takes its rows of the gradient, which must be the same on all ranks, as it is where all
    compute the same loss from the result.

    Args:
        x: T_local rows along `dim`, any dtype.

    Returns:
        T rows along `dim`.

    Raises:
        ValueError: another number of rows, or a mesh of other degrees.
        PeerError: a rank died or stalled (gloo).
    """
    here = place(plan, mesh)
    dim = _check("x", x, plan.local_rows(here[0]), dim)
    return _Unshard.apply(x, plan, mesh, dim)


class _Shard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: SequencePlan, mesh: DeviceMesh, dim: int, fill: float) -> Tensor:
        ctx.options = plan, mesh, dim
        return take_rows(x, plan, place(plan, mesh), dim, fill)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return unshard(grads[0], *ctx.options), None, None, None, None


class _Unshard(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, plan: SequencePlan, mesh: DeviceMesh, dim: int) -> Tensor:
        ctx.options = plan, mesh, dim
        rows = x.movedim(dim, 0)
        whole = ranks_of(mesh).run("unshard", collect_rows(as_words(rows), plan, place(plan, mesh)[0]))
        return from_words(whole, rows).movedim(0, dim).contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return shard(grads[0], *ctx.options), None, None, None


def _check(name: str, x: Tensor, rows: int, dim: int) -> int:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"dim must be a dimension of {name}, which has shape {list(x.shape)}, got {dim}")
    dim %= x.dim()
    if x.shape[dim] != rows:
        raise ValueError(f"{name} must have {rows} rows in dimension {dim}, got shape {list(x.shape)}")
    return dim
