# SPDX-License-Identifier: Apache-2.0
"""Token dropout over real gloo processes: the same selection on every rank, gradients, sums, and peers that fail."""

import os
import re
import signal
import time
from datetime import timedelta

import pytest
import torch
from torch import distributed, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor

from lrc_kernels import VarlenLayout
from lrc_kernels.sequence_parallel import (
    PeerError,
    drop_rows,
    gather_rows,
    make_mesh,
    plan_after_drop,
    plan_sequence,
    rows_at,
    sequence_parallel_attention,
    sequence_parallel_scores,
    shard,
    sum_gradients,
    sum_over_ranks,
    unshard,
)
from lrc_kernels.testing import RankError
from lrc_kernels.token_dropout import attention_scores, drop_tokens, query_rows, select_tokens
from tests.sequence_parallel.failures import TIMEOUT, check_all_blame, check_blame

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
LENGTHS = [70, 0, 1, 230, 40]
MESHES = {}


def mesh_of(*degrees):
    if degrees not in MESHES:
        MESHES[degrees] = make_mesh("cpu", dp=degrees[0], ring=degrees[1], ulysses=degrees[2])
    return MESHES[degrees]


def inputs(dtype=torch.float64):
    draw = torch.Generator().manual_seed(0)
    return [torch.randn(sum(LENGTHS), heads, 16, generator=draw, dtype=torch.float64).to(dtype) for heads in (4, 2)]


def droppable_of(layout):
    """All rows but the first of each sequence."""
    droppable = torch.ones(layout.num_tokens + 1, dtype=torch.bool)
    droppable[layout.cu_seqlens.long()] = False
    return droppable[:-1]


def one_drop(ring, ulysses, dtype, keep):
    """A drop on one process and on many: equal scores, selections, rows and gradients, bit for bit."""
    mesh, layout = mesh_of(4 // (ring * ulysses), ring, ulysses), VarlenLayout(LENGTHS)
    plan = plan_sequence(layout, ring=ring, ulysses=ulysses, arrangement="zigzag", **HEADS)
    q, k = inputs(dtype)
    rows, sequence, position = query_rows(layout)
    one = attention_scores(q[rows], k, cu_seqlens_k=layout, query_sequence=sequence, query_position=position)
    asked = rows_at(shard(q, plan, mesh), rows, plan, mesh)
    scores = sequence_parallel_scores(asked, shard(k, plan, mesh), plan, mesh, query_position=position)
    selection = select_tokens(layout, droppable_of(layout), keep=keep, mode="topk", scores=scores.float())
    after = plan_after_drop(plan, selection)
    whole = [x.clone().requires_grad_() for x in (q, k)]
    kept = drop_rows([shard(x, plan, mesh) for x in whole], selection, plan, after, mesh)
    sum((unshard(x, after, mesh) ** 3).sum() for x in kept).backward()
    exact = [x.clone().requires_grad_() for x in (q, k)]
    wanted = drop_tokens(tuple(exact), selection)
    sum((x**3).sum() for x in wanted).backward()
    checks = [torch.equal(asked, q[rows]), torch.equal(scores, one)]
    checks += [torch.equal(unshard(x.detach(), after, mesh), y) for x, y in zip(kept, wanted, strict=True)]
    checks += [torch.equal(x.grad, y.grad) for x, y in zip(whole, exact, strict=True)]
    return checks, selection.indices.tolist()


@pytest.mark.parametrize(("ring", "ulysses"), [(4, 1), (1, 4), (2, 2)])
def test_a_drop_is_that_of_one_process(rank_pools, ring, ulysses):
    for dtype in (torch.float64, torch.float32):
        results = rank_pools(4).run(one_drop, ring, ulysses, dtype, 0.4)
        assert all(all(checks) for checks, _ in results)
        assert all(indices == results[0][1] for _, indices in results)


def sums():
    mesh, rank = mesh_of(2, 2, 1), distributed.get_rank()
    parameters = [nn.Parameter(torch.zeros(3, dtype=dtype)) for dtype in (torch.float32, torch.bfloat16, torch.float64)]
    parameters += [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2), requires_grad=False)]
    for p in parameters[:3]:
        # One rank has rows of its own only for the first.
        if rank != 2 or p is parameters[0]:
            p.grad = torch.full_like(p, 1 + rank)
    sum_gradients(parameters, mesh)
    found = [None if p.grad is None else (p.grad.tolist(), p.grad.dtype == p.dtype) for p in parameters]
    local = sum_over_ranks(torch.tensor(float(rank)), mesh, ("ring",)).item()
    with pytest.raises(ValueError, match="dims must be one of dp, ring, ulysses, got 'tp'"):
        sum_over_ranks(torch.zeros(1), mesh, ("tp",))
    sharded = nn.Parameter(distribute_tensor(torch.zeros(8, 2), mesh["ring"], [Shard(0)]))
    with pytest.raises(
        TypeError, match=r"parameters\[1\] must be whole on every rank, got a DTensor of shape \[8, 2\]"
    ):
        sum_gradients([parameters[0], sharded], mesh)
    return found, local, sum_over_ranks(torch.tensor(float(rank)), mesh).item()


def test_sums_of_gradients_and_losses(rank_pools):
    for rank, (found, over_ring, total) in enumerate(rank_pools(4).run(sums)):
        assert found == [([10.0] * 3, True), ([7.0] * 3, True), ([7.0] * 3, True), None, None]
        assert over_ring == (1.0 if rank < 2 else 5.0) and total == 6.0


def mixed_dtypes():
    """Residuals in fp32 beside queries in bf16, as under autocast: rows and gradients of one process."""
    mesh, layout = mesh_of(1, 2, 2), VarlenLayout(LENGTHS)
    plan = plan_sequence(layout, ring=2, ulysses=2, arrangement="zigzag", **HEADS)
    selection = select_tokens(layout, droppable_of(layout), keep=0.5, mode="linspace")
    after = plan_after_drop(plan, selection, slack=0)
    q, k = inputs()
    whole = [q.float(), k.bfloat16(), q[:, 0, 0].float(), torch.arange(len(q))]
    trained = [x.requires_grad_() for x in whole[:3]]
    kept = drop_rows([shard(x, plan, mesh) for x in whole], selection, plan, after, mesh)
    found = [unshard(x, after, mesh) for x in kept]
    sum((x.float() ** 2).sum() for x in found[:3]).backward()
    wanted = drop_tokens(tuple(x.detach() for x in whole), selection)
    equal = [x.dtype == y.dtype and torch.equal(x, y) for x, y in zip(found, wanted, strict=True)]
    stays = (selection.inverse >= 0).view(-1, 1, 1)
    return equal + [torch.equal(x.grad, 2 * x.detach() * stays.view(-1, *[1] * (x.dim() - 1))) for x in trained]


def test_tensors_of_several_dtypes_move_together(rank_pools):
    assert rank_pools(4).run(mixed_dtypes) == [[True] * 7] * 4


def refusals():
    mesh, layout = mesh_of(2, 2, 1), VarlenLayout(LENGTHS)
    plan = plan_sequence(layout, ring=2, **HEADS)
    other = plan_sequence(VarlenLayout([9]), ring=2, **HEADS)
    q, k = inputs()
    selection = select_tokens(layout, droppable_of(layout), keep=0.5, mode="linspace")
    after, local = plan_after_drop(plan, selection), shard(k, plan, mesh)
    position = torch.zeros(5, dtype=torch.int32)
    messages = []
    for call in (
        lambda: sequence_parallel_scores(q[:3], local, plan, mesh, query_position=position),
        lambda: sequence_parallel_scores(q[:5], local[1:], plan, mesh, query_position=position),
        lambda: sequence_parallel_scores(q[:5], local, plan, mesh, query_position=position[1:]),
        lambda: sequence_parallel_scores(q[:5], local, plan, mesh, query_position=position, head_reduce="median"),
        lambda: sequence_parallel_scores(q[:5], local, plan, mesh_of(4, 1, 1), query_position=position),
        lambda: rows_at(local, torch.tensor([999]), plan, mesh),
        lambda: rows_at(local[1:], torch.tensor([1]), plan, mesh),
        lambda: drop_rows([local], selection, plan, other, mesh),
        lambda: drop_rows([local], selection, other, after, mesh),
        lambda: drop_rows([local[1:]], selection, plan, after, mesh),
        lambda: gather_rows(local, [1, 2], plan, mesh),
    ):
        with pytest.raises((TypeError, ValueError)) as caught:
            call()
        messages.append(str(caught.value))
    return messages


def test_bad_arguments_are_named_before_anything_is_sent(rank_pools):
    wanted = (
        r"q must have shape \[5, Hq, 16\], one row per sequence",
        r"k must have the 17\d rows of this rank",
        "query_position must hold",
        "head_reduce must be one of",
        "mesh must have 2 ranks in dimension 'ring'",
        r"rows must be in \[0, 341\)",
        r"x must have the 17\d rows of this rank",
        "after must be the plan of the selection's",
        "selection must be one of the 9 rows of the plan, got 341",
        r"tensors\[0\] must have 17\d rows",
        "counts must hold the rows of 2 ranks",
    )
    for messages in rank_pools(4).run(refusals):
        for message, pattern in zip(messages, wanted, strict=True):
            assert re.search(pattern, message), (pattern, message)


def fail(victim, how, where):
    """Rank `victim` dies or stalls before the step `where`; the others raise."""
    world = distributed.distributed_c10d._get_default_group()
    world._get_backend(torch.device("cpu")).options._timeout = timedelta(seconds=TIMEOUT)
    # gloo closes the connections of a group that timed out, and the default group is needed again.
    mesh = DeviceMesh.from_group(distributed.new_group(range(4)), "cpu", mesh_dim_names=("ring",))
    if where == "sum over ranks":
        mesh = make_mesh("cpu", ring=2, ulysses=2)
    layout, degree = VarlenLayout(LENGTHS), dict(zip(mesh.mesh_dim_names, mesh.mesh.shape, strict=True))
    plan = plan_sequence(layout, ring=degree["ring"], ulysses=degree.get("ulysses", 1), arrangement="zigzag", **HEADS)
    q, k = inputs()
    selection = select_tokens(layout, droppable_of(layout), keep=0.5, mode="linspace")
    after = plan_after_drop(plan, selection, slack=0)
    local = shard(k, plan, mesh).requires_grad_()
    if where == "exchange of rows backward":
        (kept,) = drop_rows([local], selection, plan, after, mesh)
    distributed.barrier()
    if distributed.get_rank() == victim:
        if how == "dies":
            os.kill(os.getpid(), signal.SIGKILL)
        time.sleep(1.5 * TIMEOUT)
        return None
    started = time.monotonic()
    try:
        if where == "exchange of rows backward":
            kept.sum().backward()
        elif where == "exchange of rows":
            drop_rows([local], selection, plan, after, mesh)
        elif where == "sum over ranks":
            # Rank 0 is done with the first, and then waits for rank 2, which still waits for the victim in the first.
            sum_over_ranks(k, mesh, ("ulysses",))
            sum_over_ranks(k, mesh, ("ring",))
        else:
            position = torch.tensor([n - 1 for n in LENGTHS], dtype=torch.int32)
            sequence_parallel_scores(q[:5], local, plan, mesh, query_position=position)
    except PeerError as error:
        message = f"{error} [peer {error.peer} after {time.monotonic() - started:.1f} s]"
        if how == "dies":
            raise RuntimeError(message) from None
        return message
    return "nothing happened"


@pytest.mark.parametrize(("victim", "where"), [(1, "scores of token dropout"), (3, "sum over ranks")])
def test_a_stalled_rank_is_named_by_all_others(rank_pools, victim, where):
    for rank, message in enumerate(rank_pools(4).run(fail, victim, "stalls", where)):
        if rank != victim:
            check_blame(message, victim, where)


def test_a_killed_rank_is_named_by_all_others(rank_pools):
    victim, where = 2, "exchange of rows backward"
    with pytest.raises(RankError, match=f"rank {victim} died in fail: killed by signal 9") as caught:
        rank_pools(4).run(fail, victim, "dies", where)
    check_all_blame(str(caught.value), victim, where)


def evaluate_then_train():
    """Gradients of q through a drop, alone and after the same drop in inference mode."""
    mesh, layout = mesh_of(1, 4, 1), VarlenLayout(LENGTHS)
    q, k = inputs()
    gradients = []
    for evaluated in (False, True):
        plan = plan_sequence(layout, ring=4, **HEADS)
        for inference in (True, False) if evaluated else (False,):
            with torch.inference_mode(inference):
                selection = select_tokens(layout, droppable_of(layout), keep=0.5, mode="linspace")
                local = [shard(x, plan, mesh).requires_grad_(not inference) for x in (q, k, k)]
                after = plan_after_drop(plan, selection)
                out = sequence_parallel_attention(*drop_rows(local, selection, plan, after, mesh), after, mesh)
        out.sum().backward()
        gradients.append(local[0].grad)
    return torch.equal(*gradients)


def test_a_drop_remembered_from_inference_mode_trains(rank_pools):
    assert rank_pools(4).run(evaluate_then_train) == [True] * 4
