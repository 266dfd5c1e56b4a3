# SPDX-License-Identifier: Apache-2.0
"""Compiled and checkpointed layers on real processes: no graph break, few compiles, and no message sent twice."""

import gc

import pytest
import torch
from torch import distributed
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lrc_kernels import VarlenLayout
from lrc_kernels.sequence_parallel import (
    CHECKPOINT_OPS,
    drop_rows,
    make_mesh,
    plan_after_drop,
    plan_exchange,
    plan_sequence,
    rows_of_ranks,
    sequence_parallel_attention,
    shard,
)
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_kernels.token_dropout import select_tokens
from tests.sequence_parallel.posts import counted_posts

TORCH = tuple(int(part) for part in torch.__version__.split(".")[:2])
HEADS = {"num_heads": 6, "num_kv_heads": 2, "head_dim": 16}
PACKS = ([70, 0, 1, 130, 40], [9, 64], [1, 2, 3, 100, 5, 60], [200])


def mesh_of(ring, ulysses):
    dp = distributed.get_world_size() // (ring * ulysses)
    return make_mesh("cpu", dp=dp, ring=ring, ulysses=ulysses)


def local_inputs(plan, mesh, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = plan.layout.num_tokens
    whole = [torch.randn(rows, n, 16, generator=draw, dtype=torch.float64) for n in (6, 2, 2, 6)]
    *local, dout = (shard(x, plan, mesh) for x in whole)
    return [x.requires_grad_() for x in local], dout


def compiled_and_eager(ring, ulysses, return_lse):
    """Whether a compiled layer gives the bits of an eager one on every pack, and how often it was compiled."""
    torch._dynamo.reset()
    mesh, counter = mesh_of(ring, ulysses), CompileCounterWithBackend("aot_eager")

    def layer(q, k, v, bias, plan):
        found = sequence_parallel_attention(q * 2, k + 1, v, plan, mesh, key_bias=bias, return_lse=return_lse)
        return found[0].sin() * found[1].exp().T[..., None] if return_lse else found.sin()

    equal, compiled = [], torch.compile(layer, fullgraph=True, backend=counter)
    for lengths in PACKS:
        plan = plan_sequence(VarlenLayout(lengths), ring=ring, ulysses=ulysses, **HEADS)
        found = []
        for run in (layer, compiled):
            local, dout = local_inputs(plan, mesh)
            out = run(*local, local[1].detach()[:, 0, 0].contiguous(), plan)
            out.backward(dout)
            found.append([out.detach(), *(x.grad for x in local)])
        equal += [torch.equal(x, y) for x, y in zip(*found, strict=True)]
    return all(equal), counter.frame_count


@pytest.mark.no_poison
@pytest.mark.parametrize(("ring", "ulysses", "return_lse"), [(4, 1, True), (2, 2, False), (2, 2, True), (1, 4, False)])
def test_a_compiled_layer_has_no_graph_break_and_serves_every_pack(rank_pools, ring, ulysses, return_lse):
    for equal, compiles in rank_pools(4).run(compiled_and_eager, ring, ulysses, return_lse):
        assert equal and compiles <= 2


def messages(ring, ulysses, compiled):
    """(messages, bytes) of a layer, of it under a plain and under a selective checkpoint; whether gradients agree."""
    torch._dynamo.reset()
    mesh = mesh_of(ring, ulysses)
    plan = plan_sequence(VarlenLayout(PACKS[0]), ring=ring, ulysses=ulysses, **HEADS)

    def layer(q, k, v):
        return sequence_parallel_attention(q, k, v, plan, mesh).sin()

    def plain(*x):
        return checkpoint(layer, *x, use_reentrant=False)

    def selective(*x):
        return checkpoint(layer, *x, use_reentrant=False, context_fn=keep)

    def keep():
        return create_selective_checkpoint_contexts(list(CHECKPOINT_OPS))

    sent, gradients = [], []
    for run in (layer, plain, selective):
        run = torch.compile(run, fullgraph=True, backend="aot_eager") if compiled else run
        local, dout = local_inputs(plan, mesh)
        before = ranks_of(mesh).bytes_sent
        with counted_posts() as posts:
            run(*local).backward(dout)
        sent.append((posts.count, ranks_of(mesh).bytes_sent - before))
        gradients.append([x.grad for x in local])
    return sent, all(torch.equal(x, y) for xs in gradients[1:] for x, y in zip(gradients[0], xs, strict=True))


@pytest.mark.no_poison
@pytest.mark.parametrize(("ring", "ulysses", "compiled"), [(4, 1, False), (2, 2, False), (2, 2, True)])
def test_recompute_posts_no_message_again(rank_pools, ring, ulysses, compiled):
    for (once, plain, selective), equal in rank_pools(4).run(messages, ring, ulysses, compiled):
        assert equal and once == selective and once[0] > 0
        # Without the policy the forward's messages are sent twice, save that a compiled graph may see to it itself.
        assert plain > once or (compiled and plain >= once)


def opchecks():
    mesh = mesh_of(2, 2)
    plan = plan_sequence(VarlenLayout(PACKS[0]), ring=2, ulysses=2, transport="ring", **HEADS)
    (q, k, v), dout = local_inputs(plan, mesh)
    q, k, v = (x.detach() for x in (q, k, v))
    options = (plan.encoded, ranks_of(mesh).number, 2, 6, 2, 0.25)
    bias = q[:, 0, 0].contiguous()
    _, lse, *kept = torch.ops.lrc.sequence_parallel_attention_fwd(q, k, v, bias, True, *options)
    checks = ("test_schema", "test_faketensor")
    forward, backward = CHECKPOINT_OPS[0], torch.ops.lrc.sequence_parallel_attention_bwd.default
    torch.library.opcheck(forward, (q, k, v, bias, True, *options), test_utils=checks)
    torch.library.opcheck(forward, (q, k, v, None, False, *options), test_utils=checks)
    torch.library.opcheck(backward, (dout, lse, kept, bias, torch.float32, *options), test_utils=checks)
    torch.library.opcheck(backward, (None, lse, kept, bias, torch.float64, *options), test_utils=checks)
    # A ring alone, heads outside rows: results are laid out as the fake ones are, and share no memory.
    mesh = mesh_of(4, 1)
    plan = plan_sequence(VarlenLayout(PACKS[0]), ring=4, transport="ring", **HEADS)
    (q, k, v), dout = local_inputs(plan, mesh)
    q, k, v = (x.detach().transpose(0, 1).contiguous().transpose(0, 1) for x in (q, k, v))
    options = (plan.encoded, ranks_of(mesh).number, 1, 6, 2, 0.25)
    torch.library.opcheck(forward, (q, k, v, None, True, *options), test_utils=checks)
    out, lse, *_ = forward(q, k, v, None, True, *options)
    given = (dout, None, [q, k, v, out, lse], None, torch.float64, *options)
    torch.library.opcheck(backward, given, test_utils=checks)
    assert len({x.untyped_storage().data_ptr() for x in backward(*given)}) == 3
    # What a drop communicates by.
    other = plan_sequence(VarlenLayout(PACKS[0][::-1]), ring=4, arrangement="contiguous", **HEADS)
    exchange, number = plan_exchange(rows_of_ranks(plan), rows_of_ranks(other), ring=4, ulysses=1), options[1]
    x = q.flatten(1)
    for back, rows in ((False, x), (True, torch.ops.lrc.exchange_rows(x, exchange.number, number, False))):
        torch.library.opcheck(torch.ops.lrc.exchange_rows, (rows, exchange.number, number, back), test_utils=checks)
    asked = torch.tensor([3, 200])
    torch.library.opcheck(torch.ops.lrc.rows_at, (x, asked, plan.encoded, number), test_utils=checks)
    given = (q[:5].contiguous(), k.contiguous(), torch.arange(5, dtype=torch.int32), plan.encoded, number)
    given += (plan.layout.num_tokens, "mean", None)
    torch.library.opcheck(torch.ops.lrc.sequence_parallel_scores, given, test_utils=checks)


def test_the_ops_are_what_they_say(rank_pools):
    rank_pools(4).run(opchecks)


def gone_mesh():
    mesh = mesh_of(4, 1)
    plan = plan_sequence(VarlenLayout([16]), ring=4, **HEADS)
    (q, k, v), _ = local_inputs(plan, mesh)
    with pytest.raises(RuntimeError, match="mesh must live until the last backward on it, got one"):
        torch.ops.lrc.sequence_parallel_attention_fwd(q, k, v, None, True, plan.encoded, 10**6, 1, 6, 2, 0.25)


def test_a_mesh_that_is_gone_is_named(rank_pools):
    rank_pools(4).run(gone_mesh)


def mesh_as_argument():
    """Bytes that a compiled layer sends by each of two equal meshes that it is given, and whether others see them."""
    torch._dynamo.reset()
    meshes = [mesh_of(4, 1) for _ in range(2)]
    plan = plan_sequence(VarlenLayout(PACKS[0]), ring=4, transport="ring", **HEADS)

    @torch.compile(fullgraph=True, backend="aot_eager")
    def layer(q, k, v, mesh):
        return sequence_parallel_attention(q, k, v, plan, mesh)

    sent = []
    for mesh in meshes:
        local, dout = local_inputs(plan, mesh)
        before = [ranks_of(x).bytes_sent for x in meshes]
        out = layer(*local, mesh)
        gc.collect()
        out.backward(dout)
        sent.append([ranks_of(x).bytes_sent > y for x, y in zip(meshes, before, strict=True)])
    return sent


@pytest.mark.skipif(
    TORCH < (2, 13), reason="there Dynamo lets the graph of one mesh serve an equal one: the same numbers"
)
@pytest.mark.no_poison
def test_a_mesh_that_is_an_argument_is_the_caller_s_own(rank_pools):
    assert rank_pools(4).run(mesh_as_argument) == [[[True, False], [False, True]]] * 4


def compiled_drop():
    torch._dynamo.reset()
    mesh, layout = mesh_of(2, 2), VarlenLayout(PACKS[1])
    plan = plan_sequence(layout, ring=2, ulysses=2, **HEADS)
    (q, *_), _ = local_inputs(plan, mesh)

    def drop(q, selection, plan):
        after = plan_after_drop(plan, selection)
        (kept,) = drop_rows((q * 2,), selection, plan, after, mesh)
        return kept.sin()

    droppable = torch.ones(layout.num_tokens, dtype=torch.bool)
    selection = select_tokens(layout, droppable, keep=0.5, mode="linspace")
    return torch.equal(torch.compile(drop, backend="aot_eager")(q, selection, plan), drop(q, selection, plan))


@pytest.mark.no_poison
def test_a_drop_breaks_a_graph_and_no_more(rank_pools):
    assert all(rank_pools(4).run(compiled_drop))
