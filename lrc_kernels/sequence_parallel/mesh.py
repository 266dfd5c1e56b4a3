# SPDX-License-Identifier: Apache-2.0
"""The mesh of ranks that sequence parallelism runs on: degrees in, a DeviceMesh out; and this process's place in it."""

from __future__ import annotations

import weakref
from collections import Counter

import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.sequence_parallel.comm import TorchRanks
from lrc_kernels.sequence_parallel.plan import SequencePlan

PLACEMENTS = ("head_first", "context_first")
DIMENSIONS = ("dp", "ring", "ulysses")

# How many there have been of the same ranks: every rank makes them in the same order.
_made: Counter[str] = Counter()
# By identity: meshes of the same ranks are equal, and may have different groups.
_ranks: dict[int, tuple[weakref.ref[DeviceMesh], TorchRanks]] = {}


def make_mesh(
    device_type: str, *, dp: int = 1, ring: int = 1, ulysses: int = 1, placement: str = "head_first"
) -> DeviceMesh:
    """A mesh of all ranks with dimensions "dp", "ring" and "ulysses". Collective; `init_process_group` comes first.

    Args:
        device_type: "cuda" or "cpu".
        dp, ring, ulysses: degrees; their product is the world size.
        placement: which ranks are neighbours. "head_first": those of one ulysses group, whose all-to-all then stays
            inside a node. "context_first": those of one ring (the literal text of InternVideo2.5, section 3.5).

    Raises:
        TypeError, ValueError: a degree below 1, an unknown placement, or another world size.
        RuntimeError: torch.distributed is not initialised.
    """
    for name, value in (("dp", dp), ("ring", ring), ("ulysses", ulysses)):
        check_int(name, value, minimum=1)
    check_choice("placement", placement, PLACEMENTS)
    if not distributed.is_initialized():
        raise RuntimeError("torch.distributed must be initialised before make_mesh: call init_process_group")
    world = distributed.get_world_size()
    if dp * ring * ulysses != world:
        raise ValueError(f"dp * ring * ulysses must be the world size ({world}), got {dp} * {ring} * {ulysses}")
    if placement == "head_first":
        return init_device_mesh(device_type, (dp, ring, ulysses), mesh_dim_names=("dp", "ring", "ulysses"))
    return init_device_mesh(device_type, (dp, ulysses, ring), mesh_dim_names=("dp", "ulysses", "ring"))


def place(plan: SequencePlan, mesh: DeviceMesh) -> tuple[int, int]:
    """(ring rank, ulysses rank) of this process.

    Raises:
        TypeError: no plan, no mesh. ValueError: a mesh whose degrees are not those of the plan.
    """
    if not isinstance(plan, SequencePlan):
        raise TypeError(f"plan must be a SequencePlan, got {type(plan).__name__}")
    return ranks_of(mesh).place(plan.ring, plan.ulysses)


def degree_of(mesh: DeviceMesh, name: str) -> int:
    """Ranks of a dimension of the mesh, 1 where it has none of that name; TypeError where it is no mesh."""
    if not isinstance(mesh, DeviceMesh):
        raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
    return mesh[name].size() if name in (mesh.mesh_dim_names or ()) else 1


def ranks_of(mesh: DeviceMesh) -> TorchRanks:
    """What runs schedules on this mesh, made once for each; its `bytes_sent` counts what this process has sent."""
    key = id(mesh)
    if key not in _ranks:
        groups = {name: mesh.get_group(name) for name in DIMENSIONS if degree_of(mesh, name) > 1}
        forget = weakref.ref(mesh, lambda _: _ranks.pop(key, None))
        members = f"{mesh.mesh_dim_names} {mesh.mesh.tolist()}"
        _ranks[key] = forget, TorchRanks(groups, torch.device(mesh.device_type), f"{members} #{_made[members]}")
        _made[members] += 1
    return _ranks[key][1]
