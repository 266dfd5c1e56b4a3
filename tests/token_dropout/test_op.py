# SPDX-License-Identifier: Apache-2.0
"""Token dropout as PyTorch sees it: opcheck, torch.compile, autocast, checkpoint, pytrees."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import OPS, use_backend
from lrc_kernels.token_dropout import (
    Selection,
    drop_budget,
    drop_tokens,
    drop_tokens_rmsnorm,
    restore_tokens,
    select_tokens,
)

OURS = ("select_tokens", "drop_tokens", "restore_tokens")


def make_pack(random, lengths):
    layout = VarlenLayout(lengths)
    flags = torch.rand(layout.num_tokens, generator=random) < 0.7
    flags[layout.cu_seqlens[:-1][layout.cu_seqlens.diff() > 0].long()] = False
    counts = [int(piece.sum()) for piece in flags.split(lengths)]
    return layout, flags, counts, torch.randn(layout.num_tokens, generator=random)


def op_samples(random):
    layout, flags, counts, scores = make_pack(random, [9, 0, 6])
    budget = drop_budget(layout, counts, keep=0.5)
    cu, seed = layout.cu_seqlens, torch.tensor(3)
    ids = torch.tensor([4, 5, 6])
    for mode in ("topk", "linspace", "random"):
        sizes = (budget.num_kept, layout.max_seqlen, mode)
        yield (
            "select_tokens_fwd",
            (flags, cu, budget.layout_out.cu_seqlens, budget.keep, scores, seed, 1, ids, torch.arange(15), *sizes),
        )
    yield "select_tokens_bernoulli_fwd", (flags, cu, seed, 1, None, None, 15, layout.max_seqlen, 2**31)
    selection = select_tokens(layout, flags, keep=0.5, mode="bernoulli", capacity=15)
    for dtype in (torch.float32, torch.bfloat16):
        tensors = [torch.randn(1, 15, 4, generator=random).to(dtype), torch.arange(30).view(2, 15, 1)]
        yield "drop_tokens_fwd", (tensors, selection.indices, [0.0, -100.0])
        yield "restore_tokens_fwd", (tensors, selection.inverse, [1.0, 2.0])
        residual, weight = tensors[0][0], torch.ones(4, dtype=dtype)
        dropped, normed, rstd = torch.ops.lrc.drop_tokens_rmsnorm_fwd(residual, weight, 1e-6, selection.indices)
        yield "drop_tokens_rmsnorm_fwd", (residual, weight, 1e-6, selection.indices)
        yield "drop_tokens_rmsnorm_bwd", (dropped, normed, dropped, weight, rstd, selection.inverse)


def test_opcheck(random):
    seen = set()
    for name, args in op_samples(random):
        torch.library.opcheck(getattr(torch.ops.lrc, name).default, args)
        seen.add(name)
    assert seen == {name for name in OPS if name.startswith(OURS)}


def packs(random, count):
    for _ in range(count):
        num_sequences = int(torch.randint(2, 12, (), generator=random))
        lengths = torch.randint(6, 30, (num_sequences,), generator=random).tolist()
        layout, flags, counts, scores = make_pack(random, lengths)
        budget = drop_budget(layout, counts, keep=0.5)
        ids = torch.randperm(1000, generator=random)[:num_sequences]
        x = torch.randn(layout.num_tokens, 16, generator=random, requires_grad=True)
        yield budget, flags, scores, ids, x


def drop_step(mode):
    def step(budget, flags, scores, ids, x, seed):
        scores = scores if mode == "topk" else None
        selection = select_tokens(
            budget.layout_in, flags, budget, mode=mode, scores=scores, sequence_ids=ids, seed=seed
        )
        labels = torch.arange(x.shape[0])
        hidden, labels = drop_tokens((x, labels), selection)
        return hidden, labels, selection.layout.cu_seqlens, restore_tokens(hidden, selection)

    return step


@pytest.mark.no_poison
@pytest.mark.parametrize("mode", ["topk", "linspace", "random"])
def test_twenty_packs_need_two_compiles(random, mode):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drop_step(mode), fullgraph=True, backend=counter)
    for index, pack in enumerate(packs(random, 20)):
        seed = torch.tensor(index)
        outputs = compiled(*pack, seed)
        for got, wanted in zip(outputs, drop_step(mode)(*pack, seed), strict=True):
            assert torch.equal(got, wanted)
        (outputs[0].sum() + outputs[3].sum()).backward()
        assert pack[-1].grad is not None
    assert counter.frame_count <= 2


@pytest.mark.no_poison
def test_rmsnorm_of_twenty_packs_needs_two_compiles(random):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(drop_tokens_rmsnorm, fullgraph=True, backend=counter)
    weight = torch.randn(16, generator=random, requires_grad=True)
    for budget, flags, scores, _, x in packs(random, 20):
        selection = select_tokens(budget.layout_in, flags, budget, mode="topk", scores=scores)
        dropped, normed = compiled(x, weight, 1e-6, selection)
        wanted = drop_tokens_rmsnorm(x, weight, 1e-6, selection)
        assert torch.equal(dropped, wanted[0]) and torch.equal(normed, wanted[1])
        (dropped + normed).sum().backward()
        assert x.grad is not None
    assert counter.frame_count <= 2


@pytest.mark.no_poison
def test_bernoulli_with_a_capacity_compiles_and_a_seed_tensor_draws_anew(random):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")

    def step(layout, flags, x, seed, capacity):
        selection = select_tokens(layout, flags, keep=0.5, mode="bernoulli", seed=seed, capacity=capacity)
        return drop_tokens(x, selection), selection.inverse

    compiled = torch.compile(step, fullgraph=True, backend=counter)
    draws = []
    for index, (budget, flags, _, _, x) in enumerate(packs(random, 20)):
        args = (budget.layout_in, flags, x, torch.tensor(index), x.shape[0])
        for got, wanted in zip(compiled(*args), step(*args), strict=True):
            assert torch.equal(got, wanted)
    compiles = counter.frame_count
    assert compiles <= 2
    seed = torch.tensor(0)
    for value in range(4):
        seed.fill_(value)
        draws.append(compiled(budget.layout_in, flags, x, seed, x.shape[0])[1])
    assert counter.frame_count == compiles
    assert len({tuple(draw.tolist()) for draw in draws}) == 4


def test_autocast_changes_nothing(random):
    """The autocast rule is "keep": what is kept must not depend on a training wrapper, and rows only move."""
    layout, flags, _, scores = make_pack(random, [20, 11])
    x, weight = torch.randn(31, 8, generator=random), torch.randn(8, generator=random)

    def step():
        selection = select_tokens(layout, flags, keep=0.5, mode="topk", scores=scores)
        return (*drop_tokens_rmsnorm(x, weight, 1e-6, selection), drop_tokens(x, selection))

    plain = step()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert (x @ x.mT).dtype == torch.bfloat16
        cast = step()
    for a, b in zip(plain, cast, strict=True):
        assert a.dtype == b.dtype == torch.float32 and torch.equal(a, b)


@pytest.mark.parametrize("mode", ["random", "bernoulli"])
def test_checkpoint_recomputes_the_same_selection(random, mode):
    layout, flags, _, _ = make_pack(random, [20, 11])
    x, weight = torch.randn(31, 8, generator=random, requires_grad=True), torch.ones(8)

    def layer(x):
        selection = select_tokens(layout, flags, keep=0.5, mode=mode, seed=torch.tensor(8), layer=4)
        return drop_tokens_rmsnorm(x, weight, 1e-6, selection)[1]

    layer(x).square().sum().backward()
    wanted, x.grad = x.grad, None
    checkpoint(layer, x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, wanted)


def test_selection_and_budget_are_pytrees(random):
    layout, flags, counts, scores = make_pack(random, [20, 11])
    budget = drop_budget(layout, counts, keep=0.5, layer=7)
    selection = select_tokens(layout, flags, budget, mode="topk", scores=scores)
    copies = pytree.tree_map_only(torch.Tensor, torch.clone, (selection, budget))
    assert isinstance(copies[0], Selection) and copies[0].num_kept == selection.num_kept
    assert torch.equal(copies[0].indices, selection.indices) and copies[0].layout == selection.layout
    assert copies[1].num_droppable == budget.num_droppable and copies[1].layer == 7
    assert torch.equal(copies[1].keep, budget.keep)


def test_no_backend_runs_twice_differently(random):
    layout, flags, _, scores = make_pack(random, [40, 31])
    for backend in (None, "reference"):
        with use_backend(backend):
            first, second = (select_tokens(layout, flags, keep=0.5, mode="topk", scores=scores) for _ in range(2))
        assert torch.equal(first.indices, second.indices) and torch.equal(first.inverse, second.inverse)
