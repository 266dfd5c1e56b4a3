# SPDX-License-Identifier: Apache-2.0
"""Real processes over gloo: the public functions against full attention, activation recompute, and peers that fail."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.sequence_parallel import (
    PeerError,
    make_mesh,
    plan_sequence,
    ring_attention,
    sequence_parallel_attention,
    shard,
    ulysses_attention,
    unshard,
)
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_kernels.testing import RankError
from tests.sequence_parallel.failures import TIMEOUT, check_all_blame, check_blame

LENGTHS = [70, 0, 1, 130, 40]
HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
MESHES = {}


def mesh_of(ring, ulysses, placement="head_first"):
    key = (ring, ulysses, placement)
    if key not in MESHES:
        dp = distributed.get_world_size() // (ring * ulysses)
        MESHES[key] = make_mesh("cpu", dp=dp, ring=ring, ulysses=ulysses, placement=placement)
    return MESHES[key]


def pack(dtype=torch.float64, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randn(sum(LENGTHS), n, 16, generator=draw, dtype=torch.float64).to(dtype) for n in (6, 2, 2, 6)]


def relative(actual, exact):
    return ((actual.double() - exact.double()).norm() / exact.double().norm()).item()


def errors_of_one_pass(ring, ulysses, placement, transport, dtype, attention=sequence_parallel_attention):
    """Relative errors of out, lse and gradients of the whole pack on this rank, and the bytes that it sent."""
    mesh, layout = mesh_of(ring, ulysses, placement), VarlenLayout(LENGTHS)
    plan = plan_sequence(layout, ring=ring, ulysses=ulysses, transport=transport, **HEADS)
    *whole, dout = pack(dtype)
    whole = [x.requires_grad_() for x in whole]
    bias = torch.linspace(-1, 1, sum(LENGTHS), dtype=dtype if dtype == torch.float64 else torch.float32)
    before = ranks_of(mesh).bytes_sent
    local = [shard(x, plan, mesh) for x in whole]
    out, lse = attention(*local, plan, mesh, key_bias=shard(bias, plan, mesh), return_lse=True)
    out = unshard(out, plan, mesh)
    out.backward(dout)
    sent = ranks_of(mesh).bytes_sent - before
    exact = [x.detach().double().requires_grad_() for x in whole]
    wanted, wanted_lse = varlen_attention(*exact, cu_seqlens_q=layout, key_bias=bias.double(), return_lse=True)
    wanted.backward(dout.double())
    pairs = [(out, wanted), (unshard(lse, plan, mesh, 1), wanted_lse)]
    pairs += [(x.grad, y.grad) for x, y in zip(whole, exact, strict=True)]
    return [relative(x.detach(), y.detach()) for x, y in pairs], sent


@pytest.mark.distributed
@pytest.mark.parametrize(
    ("ring", "ulysses", "placement", "transport"),
    [
        (4, 1, "head_first", "ring"),
        (2, 2, "head_first", "sparse"),
        (2, 2, "context_first", "ring"),
        (2, 2, "context_first", "gather"),
        (1, 4, "head_first", "auto"),
    ],
)
def test_four_processes(rank_pools, ring, ulysses, placement, transport):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        for errors, sent in rank_pools(4).run(errors_of_one_pass, ring, ulysses, placement, transport, dtype):
            assert max(errors) <= bound and sent > 0


def test_the_names_of_one_degree_beside_data_parallelism(rank_pools):
    for arguments in ((2, 1, "head_first", "sparse", torch.float64, ring_attention),
                      (1, 2, "context_first", "ring", torch.float64, ulysses_attention)):  # fmt: skip
        for errors, _ in rank_pools(4).run(errors_of_one_pass, *arguments):
            assert max(errors) <= 1e-14


@pytest.mark.parametrize(("ring", "ulysses"), [(2, 1), (1, 2)])
def test_two_processes(rank_pools, ring, ulysses):
    for dtype, bound in ((torch.float64, 1e-14), (torch.float32, 2e-6)):
        for errors, sent in rank_pools(2).run(errors_of_one_pass, ring, ulysses, "head_first", "ring", dtype):
            assert max(errors) <= bound and sent > 0


def test_one_rank_sends_nothing(rank_pools):
    for errors, sent in rank_pools(4).run(errors_of_one_pass, 1, 1, "head_first", "auto", torch.float64):
        assert max(errors) <= 1e-14 and sent == 0


@pytest.mark.slow
@pytest.mark.parametrize(("ring", "ulysses", "transport"), [(8, 1, "ring"), (4, 2, "sparse"), (2, 4, "gather")])
def test_eight_processes(rank_pools, ring, ulysses, transport):
    for errors, _ in rank_pools(8).run(errors_of_one_pass, ring, ulysses, "head_first", transport, torch.float64):
        assert max(errors) <= 1e-14


def shards_of_many_kinds():
    mesh, plan = mesh_of(1, 2), plan_sequence(VarlenLayout([5, 4]), ring=1, ulysses=2, **HEADS)
    rank = distributed.get_rank() % 2
    labels = shard(torch.arange(9), plan, mesh, fill=-100)
    positions = shard(torch.arange(27).view(3, 9), plan, mesh, 1)
    flags = unshard(labels % 2 == 0, plan, mesh)
    x = torch.randn(9, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(1)).requires_grad_()
    # The loss is the sum of the losses of all ranks.
    (shard(x, plan, mesh) ** 2).sum().backward()
    return rank, labels.tolist(), positions.tolist(), flags.tolist(), torch.equal(x.grad, 2 * x.detach())


def test_integers_other_dimensions_and_gradients_of_shards(rank_pools):
    for rank, labels, positions, flags, equal in rank_pools(4).run(shards_of_many_kinds):
        assert labels == ([0, 1, 2, 3, 4] if rank == 0 else [5, 6, 7, 8, -100])
        padded = [9 * i + 5 + j if j < 4 else 0 for i in range(3) for j in range(5)]
        wanted = [9 * i + j for i in range(3) for j in range(5)] if rank == 0 else padded
        assert [value for row in positions for value in row] == wanted
        assert flags == [i % 2 == 0 for i in range(9)] and equal


def equal_meshes():
    groups = [distributed.new_group(range(4)) for _ in range(2)]
    first, second = (DeviceMesh.from_group(group, "cpu", mesh_dim_names=("ring",)) for group in groups)
    return first == second, ranks_of(first) is ranks_of(first), ranks_of(first) is ranks_of(second)


def test_equal_meshes_of_different_groups_are_not_mixed_up(rank_pools):
    assert rank_pools(4).run(equal_meshes) == [(True, True, False)] * 4


def second_order():
    mesh, plan = mesh_of(2, 1), plan_sequence(VarlenLayout([9]), ring=2, **HEADS)
    rows = plan.local_rows(mesh.get_local_rank("ring"))
    q, k = torch.ones(rows, 6, 16, requires_grad=True), torch.ones(rows, 2, 16)
    out = sequence_parallel_attention(q, k, k, plan, mesh)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        torch.autograd.grad(out.sum(), q, create_graph=True)


def test_a_gradient_of_a_gradient_is_refused(rank_pools):
    rank_pools(4).run(second_order)


def refusals():
    mesh, plan = mesh_of(2, 1), plan_sequence(VarlenLayout([9]), ring=2, **HEADS)
    rows = plan.local_rows(mesh.get_local_rank("ring"))
    q, k = torch.zeros(rows, 6, 16), torch.zeros(rows, 2, 16)
    other = plan_sequence(VarlenLayout([9]), ring=1, ulysses=2, **HEADS)
    messages = []
    for call in (
        lambda: sequence_parallel_attention(q, k, k.double(), plan, mesh),
        lambda: sequence_parallel_attention(q[1:], k, k, plan, mesh),
        lambda: sequence_parallel_attention(q, k, k, plan, mesh, key_bias=torch.zeros(rows + 1)),
        lambda: sequence_parallel_attention(q, k, k, plan, mesh, grad_wire=torch.int8),
        lambda: sequence_parallel_attention(q, k, k, other, mesh),
        lambda: ring_attention(q, k, k, other, mesh),
        lambda: ulysses_attention(q, k, k, plan, mesh),
        lambda: shard(torch.zeros(8), plan, mesh),
        lambda: unshard(torch.zeros(50), plan, mesh),
        lambda: make_mesh("cpu", ring=3),
        lambda: make_mesh("cpu", ring=2, placement="nearest"),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_bad_arguments_are_named_before_anything_is_sent(rank_pools):
    wanted = ("v must have the dtype of q", "q must have shape", "key_bias must have shape", "grad_wire must be",
              "mesh must have 1 ranks in dimension 'ring'", "plan must have ulysses=1", "plan must have ring=1",
              "x must have 9 rows in dimension 0", "x must have", r"dp \* ring \* ulysses must be the world size \(4\)",
              "placement must be one of")  # fmt: skip
    for messages in rank_pools(4).run(refusals):
        for message, pattern in zip(messages, wanted, strict=True):
            assert re.search(pattern, message), (pattern, message)


def fail(victim, how, ring, transport, where):
    """Rank `victim` dies or stalls, before the forward or before the backward; the others raise."""
    rank = distributed.get_rank()
    world = distributed.distributed_c10d._get_default_group()
    world._get_backend(torch.device("cpu")).options._timeout = timedelta(seconds=TIMEOUT)
    # gloo closes the connections of a group that timed out, and the default group is needed again.
    if ring == 4:
        mesh = DeviceMesh.from_group(distributed.new_group(range(4)), "cpu", mesh_dim_names=("ring",))
    else:
        mesh = make_mesh("cpu", ring=ring, ulysses=4 // ring)
    plan = plan_sequence(VarlenLayout(LENGTHS), ring=ring, ulysses=4 // ring, transport=transport, arrangement="zigzag",
                         **HEADS)  # fmt: skip
    local = [shard(x, plan, mesh).requires_grad_() for x in pack()]
    if where == "backward":
        out = sequence_parallel_attention(*local[:3], plan, mesh)
    distributed.barrier()
    if rank == victim:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5 * TIMEOUT)
        return None
    started = time.monotonic()
    try:
        if where == "backward":
            out.backward(local[3])
        else:
            sequence_parallel_attention(*local[:3], plan, mesh)
    except PeerError as error:
        message = f"{error} [peer {error.peer} after {time.monotonic() - started:.1f} s]"
        if how == "dies":
            raise RuntimeError(message) from None
        return message
    return "nothing happened"


@pytest.mark.parametrize(
    ("victim", "ring", "transport", "where"),
    [(0, 4, "ring", "backward"), (1, 4, "sparse", "backward"), (3, 2, "ring", "forward"),
     (1, 2, "gather", "backward")],
)  # fmt: skip
def test_a_stalled_rank_is_named_by_all_others(rank_pools, victim, ring, transport, where):
    for rank, message in enumerate(rank_pools(4).run(fail, victim, "stalls", ring, transport, where)):
        if rank != victim:
            check_blame(message, victim, where)


@pytest.mark.parametrize(
    ("victim", "ring", "transport", "where"), [(2, 4, "ring", "backward"), (3, 2, "ring", "forward")]
)
def test_a_killed_rank_is_named_by_all_others(rank_pools, victim, ring, transport, where):
    with pytest.raises(RankError, match=f"rank {victim} died in fail: killed by signal 9") as caught:
        rank_pools(4).run(fail, victim, "dies", ring, transport, where)
    check_all_blame(str(caught.value), victim, where)
