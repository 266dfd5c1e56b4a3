# SPDX-License-Identifier: Apache-2.0
"""Parameters that every rank holds whole: the gradients of its own rows in, those of all rows out."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor

from lrc_kernels.checks import FLOATS, check_choice, check_tensor
from lrc_kernels.sequence_parallel.comm import AllReduce, Schedule
from lrc_kernels.sequence_parallel.mesh import DIMENSIONS, degree_of, ranks_of

# Elements that travel in one all-reduce.
BUCKET = 1 << 25
# What both gloo and NCCL can add up.
SUMMED = (*FLOATS, torch.int64, torch.int32, torch.int8, torch.uint8)


@torch.no_grad()
def sum_over_ranks(x: Tensor, mesh: DeviceMesh, dims: Sequence[str] = DIMENSIONS) -> Tensor:
    """The sum of x over the ranks of these dimensions, on each of them; x stays as it is. No gradient. A collective.

    The loss of a step is that of the local losses: every rank sums over its own rows, with weights that add up to 1
    over all packs of the step.

    Args:
        x: any shape; floating point of 16, 32 or 64 bits, int64, int32, int8 or uint8.

    Raises:
        TypeError: another dtype. ValueError: a dimension that is none of "dp", "ring", "ulysses".
        PeerError: a rank died or stalled (gloo).
    """
    check_tensor("x", x, dims=(x.dim(),) if isinstance(x, Tensor) else (), dtypes=SUMMED)
    for dim in dims:
        check_choice("dims", dim, DIMENSIONS)
    axes = [dim for dim in dims if degree_of(mesh, dim) > 1]
    return ranks_of(mesh).run("sum over ranks", _sum(x.detach(), axes))


def _sum(x: Tensor, axes: Sequence[str]) -> Schedule[Tensor]:
    for step, axis in enumerate(axes):
        arriving = yield AllReduce(axis, x, step)
        x = yield arriving
    return x if axes else x.clone()


@torch.no_grad()
def sum_gradients(parameters: Iterable[nn.Parameter], mesh: DeviceMesh, dims: Sequence[str] = DIMENSIONS) -> None:
    """Give every rank the gradients of all ranks' rows: their sum, not their mean. A collective.

    16-bit gradients travel and add up in fp32. A parameter that got a gradient on no rank keeps None.

    Args:
        parameters: the same on every rank, in the same order; those that are frozen are left out.

    Raises:
        TypeError: a parameter that is a DTensor, whose gradients FSDP has summed already.
        ValueError: a dimension that is none of "dp", "ring", "ulysses".
        PeerError: a rank died or stalled (gloo).
    """
    trained = [p for p in parameters if p.requires_grad]
    for index, p in enumerate(trained):
        if isinstance(p, DTensor):
            raise TypeError(f"parameters[{index}] must be whole on every rank, got a DTensor of shape {list(p.shape)}")
    if not trained:
        return
    present = torch.tensor([float(p.grad is not None) for p in trained], device=trained[0].device)
    present = sum_over_ranks(present, mesh, dims)
    found = [p for p, ranks in zip(trained, present.tolist(), strict=True) if ranks]
    for wide in (torch.float32, torch.float64):
        bucket: list[nn.Parameter] = []
        for p in [p for p in found if (p.dtype == torch.float64) == (wide == torch.float64)]:
            if bucket and sum(x.numel() for x in bucket) + p.numel() > BUCKET:
                _sum_bucket(bucket, wide, mesh, dims)
                bucket = []
            bucket.append(p)
        if bucket:
            _sum_bucket(bucket, wide, mesh, dims)


def _sum_bucket(bucket: list[nn.Parameter], wide: torch.dtype, mesh: DeviceMesh, dims: Sequence[str]) -> None:
    message = torch.cat(
        [torch.zeros_like(p, dtype=wide).flatten() if p.grad is None else p.grad.to(wide).flatten() for p in bucket]
    )
    parts = sum_over_ranks(message, mesh, dims).split([p.numel() for p in bucket])
    for p, part in zip(bucket, parts, strict=True):
        p.grad = part.view_as(p).to(p.dtype)
