# SPDX-License-Identifier: Apache-2.0
"""The public ToMe functions as PyTorch sees them: gradients, opcheck, torch.compile, autocast, checkpoint, errors."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils import _pytree as pytree
from torch.utils.checkpoint import checkpoint

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import OPS, record, use_backend
from lrc_kernels.tome import (
    MergePlan,
    TokenLayout,
    compress_clips,
    head_mean,
    merge_budget,
    merge_schedule,
    merge_tokens,
    plan_merge,
    unmerge_tokens,
)

BACKENDS = ["cpu", "reference"]


def make_plan(random, **options):
    """A packed plan over three segments, one of them empty; `options` go to plan_merge."""
    layout = VarlenLayout([9, 0, 6])
    metric = torch.randn(15, 4, generator=random)
    return plan_merge(metric, merge_budget(layout, target=[4, 0, 3]), **options)


@pytest.mark.parametrize("reduce", ["mean", "sum", "max"])
@pytest.mark.parametrize("weighted", [False, True])
def test_gradients_of_merge(random, reduce, weighted):
    size = torch.rand(15, generator=random).add(0.5) if weighted else None
    plan = make_plan(random, size=size)
    x = torch.randn(15, 3, generator=random, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: merge_tokens(t, plan, reduce=reduce), (x,))
    if reduce != "max":
        torch.autograd.gradgradcheck(lambda t: merge_tokens(t, plan, reduce=reduce), (x,))


def test_gradients_of_unmerge_head_mean_and_compress(random):
    plan = make_plan(random)
    y = torch.randn(plan.num_out, 3, generator=random, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: unmerge_tokens(t, plan), (y,))
    layout = TokenLayout(clip_frames=2, grid=(2, 4), shuffle=2, prefix=1)
    x = torch.randn(4, 9, 2, generator=random, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: head_mean(t, 4, layout=layout), (x,))
    torch.autograd.gradcheck(lambda t: compress_clips(t, 2, 4, layout=layout), (x,))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_backward_equals_autograd_of_the_definition(random, backend, dtype):
    x = torch.randn(2, 24, 16, generator=random).to(dtype).requires_grad_()
    with use_backend(backend), record() as ran:
        y, plan = compress_clips(x, 5, 4, return_plan=True)
        upstream = torch.randn(y.shape, generator=random).to(dtype)
        y.backward(upstream)
    assert {name for _, name in ran} == {backend} and ran[-1][0] == "tome_gather_fwd"
    wanted = upstream.flatten(0, 1)[plan.assign.long()].double() / plan.size[plan.assign.long()].double()[:, None]
    torch.testing.assert_close(x.grad.flatten(0, 1).double(), wanted, rtol=2 * torch.finfo(dtype).eps, atol=0)


def op_samples(random, dtype, backend):
    x = torch.randn(2, 12, 8, generator=random).to(dtype)
    y, plan = compress_clips(x, 3, 2, return_plan=True)
    cu_in, cu_out = plan.layout_in.cu_seqlens, plan.layout_out.cu_seqlens
    budget = merge_budget(plan.layout_in, target=3)
    ones = torch.ones(24)
    metric = head_mean(x, 2).flatten(0, 1)
    common = (plan.num_out, 12)
    yield "tome_head_mean_fwd", (x, 2, [])
    yield "tome_head_mean_fwd", (torch.randn(4, 5, 8, generator=random).to(dtype), 2, [2, 2, 2, 2, 1])
    options = (None, "fp32", "reference", "isolate", 1)
    yield "tome_plan_fwd", (metric, cu_in, cu_out, budget.r, ones, ones == 0, None, *common, *options)
    yield "tome_merge_fwd", (x, plan.assign, plan.size, plan.weight, cu_in, cu_out, *common, "mean", True, [])
    yield "tome_gather_fwd", (y.flatten(0, 1), plan.assign, plan.size, plan.weight, [])
    yield "tome_compress_fwd", (x, cu_in, cu_out, budget.r, *common, 2, "fp32", [])
    best = merge_tokens(x, plan, reduce="max").flatten(0, 1)
    yield "tome_merge_max_bwd", (best, x, best, plan.assign, plan.weight, [])


@pytest.mark.parametrize("backend", BACKENDS)
def test_opcheck(random, backend):
    seen = set()
    with use_backend(backend):
        for dtype in (torch.float32, torch.bfloat16):
            for name, args in op_samples(random, dtype, backend):
                torch.library.opcheck(getattr(torch.ops.lrc, name).default, args)
                seen.add(name)
    assert seen == {name for name in OPS if name.startswith("tome_")}


def packs(random, count):
    for _ in range(count):
        num_segments = int(torch.randint(2, 12, (), generator=random))
        lengths = torch.randint(6, 30, (num_segments,), generator=random).tolist()
        layout = VarlenLayout(lengths)
        metric = torch.randn(layout.num_tokens, 8, generator=random)
        yield metric, torch.randn(layout.num_tokens, 16, generator=random), merge_budget(layout, target=4)


@pytest.mark.no_poison
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("function", ["plan", "merge", "unmerge", "compress", "head_mean"])
def test_twenty_packs_need_two_compiles(random, backend, function):
    torch._dynamo.reset()
    functions = {
        "plan": lambda metric, x, budget, plan: plan_merge(metric, budget).assign,
        "merge": lambda metric, x, budget, plan: merge_tokens(x, plan),
        "unmerge": lambda metric, x, budget, plan: unmerge_tokens(x[: plan.num_out], plan),
        "compress": lambda metric, x, budget, plan: compress_clips(x, 4, 4),
        "head_mean": lambda metric, x, budget, plan: head_mean(x, 4),
    }
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(functions[function], fullgraph=True, backend=counter)
    with use_backend(backend):
        for index, (metric, x, budget) in enumerate(packs(random, 20)):
            plan = plan_merge(metric, budget)
            if function == "compress":
                x = torch.randn(2 + index % 7, 16, 8, generator=random)
            x.requires_grad_(function != "plan")
            y = compiled(metric, x, budget, plan)
            assert torch.equal(y, functions[function](metric, x, budget, plan))
            if function != "plan":
                y.sum().backward()
                assert x.grad is not None
    assert counter.frame_count <= 2


@pytest.mark.no_poison
def test_compiled_graph_returns_a_plan(random):
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: compress_clips(x, 4, 2, return_plan=True), fullgraph=True, backend="aot_eager")
    x = torch.randn(3, 16, 8, generator=random)
    (y, plan), (y_eager, plan_eager) = compiled(x), compress_clips(x, 4, 2, return_plan=True)
    assert isinstance(plan, MergePlan) and plan.layout_out == plan_eager.layout_out
    assert torch.equal(y, y_eager) and torch.equal(plan.assign, plan_eager.assign)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_changes_nothing(random, backend):
    """The autocast rule of every ToMe op is "keep": which tokens merge must not depend on a training wrapper."""
    x = torch.randn(2, 32, 16, generator=random)
    with use_backend(backend):
        y, plan = compress_clips(x, 8, 4, return_plan=True)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            assert (x @ x.mT).dtype == torch.bfloat16
            y_autocast, plan_autocast = compress_clips(x, 8, 4, return_plan=True)
    assert y_autocast.dtype == torch.float32 and torch.equal(y, y_autocast)
    assert torch.equal(plan.assign, plan_autocast.assign)


def test_checkpoint_gives_the_same_gradient(random):
    x = torch.randn(2, 32, 16, generator=random, requires_grad=True)
    compress_clips(x, 8, 4).square().sum().backward()
    wanted, x.grad = x.grad, None
    checkpoint(lambda t: compress_clips(t, 8, 4), x, use_reentrant=False).square().sum().backward()
    assert torch.equal(x.grad, wanted)


def test_plan_is_a_pytree(random):
    plan = make_plan(random)
    doubled = pytree.tree_map_only(torch.Tensor, torch.clone, plan)
    assert isinstance(doubled, MergePlan) and doubled.layout_in == plan.layout_in
    assert torch.equal(doubled.assign, plan.assign) and doubled.num_out == plan.num_out


@pytest.mark.parametrize("backend", BACKENDS)
def test_empty_inputs(backend):
    with use_backend(backend):
        assert compress_clips(torch.zeros(0, 16, 8), 4, 2).shape == (0, 4, 8)
        assert head_mean(torch.zeros(0, 8), 2).shape == (0, 4)
        plan = plan_merge(torch.zeros(0, 4), merge_budget(VarlenLayout([0, 0]), target=3))
        assert merge_tokens(torch.zeros(0, 8), plan).shape == (0, 8)
        assert unmerge_tokens(torch.zeros(0, 8), plan).shape == (0, 8)


@pytest.mark.parametrize("backend", BACKENDS)
def test_target_equal_to_the_tokens_is_the_identity(random, backend):
    x = torch.randn(2, 5, 8, generator=random)
    with use_backend(backend):
        y, plan = compress_clips(x, 5, 2, return_plan=True)
    assert torch.equal(y, x) and plan.assign.tolist() == list(range(10))


BAD_CALLS = {
    "x is no tensor": (lambda: compress_clips([1.0], 2, 1), TypeError, "x must be a tensor, got list"),
    "x is integer": (lambda: compress_clips(torch.ones(1, 4, 4).long(), 2, 1), TypeError, "x must be one of.*int64"),
    "x is flat": (lambda: compress_clips(torch.ones(4, 4), 2, 1), ValueError, r"x must have shape.*got \[4, 4\]"),
    "target too large": (lambda: compress_clips(torch.ones(1, 4, 4), 5, 1), ValueError, "target must be.*4, got 5"),
    "target zero": (lambda: compress_clips(torch.ones(1, 4, 4), 0, 1), ValueError, "target must be.*got 0"),
    "target negative": (lambda: merge_schedule(4, -1), ValueError, "target must be >= 0, got -1"),
    "target float": (lambda: merge_schedule(4, 2.0), TypeError, "target must be an int, got float"),
    "num_heads": (lambda: head_mean(torch.ones(1, 4, 6), 4), ValueError, "num_heads must divide.*6, got 4"),
    "num_heads zero": (lambda: head_mean(torch.ones(1, 4, 6), 0), ValueError, "num_heads must be >= 1, got 0"),
    "r negative": (lambda: plan_merge(torch.ones(1, 4, 2), r=-1), ValueError, r"r\[0\] must be >= 0, got -1"),
    "both": (lambda: plan_merge(torch.ones(1, 4, 2), r=1, target=2), ValueError, "exactly one of target and r"),
    "neither": (lambda: plan_merge(torch.ones(1, 4, 2)), ValueError, "exactly one of target and r"),
    "packed without budget": (lambda: plan_merge(torch.ones(4, 2), target=2), ValueError, "needs a budget"),
    "budget of another pack": (
        lambda: plan_merge(torch.ones(5, 2), merge_budget(VarlenLayout([4]), target=2)),
        ValueError,
        "metric must hold the budget's 4 tokens, got 5",
    ),
    "precision": (lambda: plan_merge(torch.ones(1, 4, 2), r=1, precision="tf32"), ValueError, "precision.*'tf32'"),
    "size shape": (lambda: plan_merge(torch.ones(1, 4, 2), r=1, size=torch.ones(3)), ValueError, "size must hold.*4"),
    "size negative": (
        lambda: plan_merge(torch.ones(1, 4, 2), r=1, size=torch.tensor([1.0, 1, -1, 1])),
        ValueError,
        "size must be finite and >= 0, got -1.0 at index 2",
    ),
    "protected dtype": (
        lambda: plan_merge(torch.ones(1, 4, 2), r=1, protected=torch.ones(4)),
        TypeError,
        "protected must be one of bool, got float32",
    ),
    "too many protected": (
        lambda: plan_merge(torch.ones(1, 4, 2), r=1, protected=torch.ones(4, dtype=torch.bool)),
        ValueError,
        "at most num_protected = 0.*got 4 in segment 0",
    ),
    "unreachable target": (
        lambda: merge_budget(VarlenLayout([8]), target=1, num_protected=3),
        ValueError,
        "segment 0: target must be reachable with num_protected = 3, got 1",
    ),
    "targets per segment": (
        lambda: merge_budget(VarlenLayout([8, 8]), target=[4]),
        ValueError,
        r"target must have one entry per segment \(2\), got 1",
    ),
    "two devices": (
        lambda: plan_merge(torch.ones(1, 4, 2), r=1, size=torch.ones(4, device="meta")),
        ValueError,
        "size must be on cpu.*got meta",
    ),
    "destination twice": (
        lambda: plan_merge(torch.ones(1, 8, 2), target=2, destination=torch.ones(8, dtype=torch.bool)),
        ValueError,
        "destination fixes set B of one iteration, got a budget of 2",
    ),
    "no sources": (
        lambda: plan_merge(torch.ones(1, 8, 2), r=2, destination=torch.ones(8, dtype=torch.bool)),
        ValueError,
        "destination must leave r = 2 sources",
    ),
    "merge of other rows": (
        lambda: merge_tokens(torch.ones(1, 5, 2), plan_merge(torch.ones(1, 4, 2), r=1)),
        ValueError,
        "x must hold the plan's 4 tokens, got 5",
    ),
    "unmerge of other rows": (
        lambda: unmerge_tokens(torch.ones(1, 5, 2), plan_merge(torch.ones(1, 4, 2), r=1)),
        ValueError,
        "y must hold the plan's 3 rows, got 5",
    ),
    "reduce": (
        lambda: merge_tokens(torch.ones(1, 4, 2), plan_merge(torch.ones(1, 4, 2), r=1), reduce="median"),
        ValueError,
        "reduce must be one of mean, sum, max, got 'median'",
    ),
    "half a clip": (
        lambda: compress_clips(torch.ones(3, 5, 2), 1, 1, layout=TokenLayout(2, grid=(2, 2))),
        ValueError,
        "whole clips: a multiple of clip_frames = 2 frames, got 3",
    ),
    "other grid": (
        lambda: compress_clips(torch.ones(2, 6, 2), 1, 1, layout=TokenLayout(2, grid=(2, 2))),
        ValueError,
        r"x must have shape \[F, 1 \+ 2\*2, D\].*got \[2, 6, 2\]",
    ),
    "r float": (lambda: plan_merge(torch.ones(1, 4, 2), r=2.0), TypeError, "r must be an int or.*, got float"),
    "merge by no plan": (lambda: merge_tokens(torch.ones(1, 4, 2), 3), TypeError, "plan must be a MergePlan, got int"),
    "unmerge by no plan": (lambda: unmerge_tokens(torch.ones(1, 4, 2), None), TypeError, "plan must be a MergePlan"),
    "grid of one side": (lambda: TokenLayout(2, grid=32), TypeError, r"grid must be \(rows, columns\), got 32"),
    "half a frame": (lambda: TokenLayout(2.5), TypeError, "clip_frames must be an int, got float"),
    "no prefix": (lambda: TokenLayout(2, prefix=-1), ValueError, "prefix must be >= 0, got -1"),
    "odd grid": (lambda: TokenLayout(2, grid=(3, 2)), ValueError, "grid must be a multiple of shuffle = 2"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case):
    call, error, message = BAD_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call()
    assert all(name not in ("tome_merge_fwd", "tome_gather_fwd") for name, _ in ran)
