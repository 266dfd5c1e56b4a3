# SPDX-License-Identifier: Apache-2.0
"""`lrc_kernels.tome.compat` against ToMe written as loops over fp64 numbers, from its description."""

import functools
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels.backend import record, use_backend
from lrc_kernels.tome import MergePlan, compat, compress_clips, merge_tokens
from lrc_kernels.tome.compat import bipartite_soft_matching, merge_source, merge_wavg

BACKENDS = ["cpu", "reference", pytest.param("triton", marks=pytest.mark.triton)]


def groups_of(metric, r, class_token, distill_token):
    """One clip [n, K] -> the positions that each output row holds, its own first."""
    n = len(metric)
    even, odd = list(range(0, n, 2)), list(range(1, n, 2))
    r = min(r, (n - class_token - distill_token) // 2)
    if r <= 0 or len(odd) == distill_token:
        return [[i] for i in range(n)]
    edges = []
    for i in even:
        best, partner = -math.inf, None
        for j in odd:
            a, b = metric[i], metric[j]
            cosine = float((a * b).sum() / (a.norm() * b.norm()))
            if not (distill_token and j == 1) and cosine > best:
                best, partner = cosine, j
        edges.append((-math.inf if class_token and i == 0 else best, i, partner))
    edges.sort(key=lambda edge: (-edge[0], edge[1]))
    received = {j: [j] for j in odd}
    for _, i, j in edges[:r]:
        received[j].append(i)
    unmerged = [[i] for _, i, _ in edges[r:]]
    if class_token:
        unmerged.sort()
    rows = list(received.values())
    return [unmerged[0], rows[0], *unmerged[1:], *rows[1:]] if distill_token else [*unmerged, *rows]


def reduced(x, groups, reduce):
    """x [B, n, D] by the groups of each clip."""
    return torch.stack(
        [torch.stack([reduce(clip[group]) for group in rows]) for clip, rows in zip(x, groups, strict=True)]
    )


@settings(max_examples=50, deadline=None)
@given(
    length=st.integers(2, 25),
    r=st.integers(-1, 14),
    class_token=st.booleans(),
    distill_token=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_equals_the_loops(length, r, class_token, distill_token, seed):
    random = torch.Generator().manual_seed(seed)
    metric = torch.randn(2, length, 4, generator=random)
    x = torch.randn(2, length, 3, generator=random, dtype=torch.float64)
    groups = [groups_of(clip.double(), r, class_token, distill_token) for clip in metric]
    merge, unmerge = bipartite_soft_matching(metric, r, class_token, distill_token)
    mean = functools.partial(torch.mean, dim=0)
    for mode, reduce in {"mean": mean, "sum": functools.partial(torch.sum, dim=0), "amax": lambda t: t.amax(0)}.items():
        torch.testing.assert_close(merge(x, mode=mode), reduced(x, groups, reduce))
    torch.testing.assert_close(merge(x), reduced(x, groups, mean))
    y = merge(x)
    restored = unmerge(y)
    for clip, rows in enumerate(groups):
        for row, group in enumerate(rows):
            assert all(torch.equal(restored[clip, i], y[clip, row]) for i in group)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("class_token", "distill_token"), [(False, False), (True, False), (True, True), (False, True)])
@pytest.mark.parametrize(("length", "r"), [(38, 11), (6, 9)])
def test_backends_agree_on_rows(random, device, backend, class_token, distill_token, length, r):
    metric = torch.randn(2, length, 8, generator=random)
    x = torch.arange(2.0 * length).view(2, length, 1)
    groups = [groups_of(clip.double(), r, class_token, distill_token) for clip in metric]
    where = device if backend == "triton" else "cpu"
    with use_backend(backend), record() as ran:
        merge, _ = bipartite_soft_matching(metric.to(where), r, class_token, distill_token)
        y = merge(x.to(where), mode="sum").cpu()
    assert ("tome_plan_fwd", backend) in ran and {name for _, name in ran} == {backend}
    assert torch.equal(y, reduced(x, groups, lambda t: t.sum(0)))


def test_distillation_token_survives_unmerge(random):
    """The original moves it to row 1 in merge and forgets so in unmerge."""
    metric = torch.randn(1, 10, 4, generator=random)
    x = torch.arange(10.0).view(1, 10, 1)
    merge, unmerge = bipartite_soft_matching(metric, 3, class_token=True, distill_token=True)
    assert merge(x)[0, :2, 0].tolist() == [0.0, 1.0]
    assert unmerge(merge(x))[0, :2, 0].tolist() == [0.0, 1.0]


def test_plan_comes_with_the_functions(random):
    metric = torch.randn(2, 12, 4, generator=random)
    merge, _ = bipartite_soft_matching(metric, 3, class_token=True)
    assert isinstance(merge.plan, MergePlan) and merge.plan.anchor.view(2, 9)[:, 0].tolist() == [0, 0]
    x = torch.randn(2, 12, 5, generator=random)
    assert torch.equal(merge(x), merge_tokens(x, merge.plan))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_weighted_average_over_steps(random, dtype):
    """Sizes multiply out over three steps, and the weighted mean of the rows stays that of the tokens."""
    x = torch.randn(2, 32, 6, generator=random).to(dtype)
    whole, size, source = x.double().mean(1), None, None
    for _ in range(3):
        merge, _ = bipartite_soft_matching(x, 8)
        source = merge_source(merge, x, source)
        x, size = merge_wavg(merge, x, size)
    assert x.dtype == size.dtype == dtype and x.shape == (2, 8, 6) and size.shape == (2, 8, 1)
    assert torch.equal(size.sum(1), torch.full((2, 1), 32.0, dtype=dtype))
    assert torch.equal(source.sum(-1, keepdim=True).to(dtype), size) and torch.equal(source.sum(1), torch.ones(2, 32))
    bound = 4 * torch.finfo(dtype).eps
    torch.testing.assert_close((x.double() * size).sum(1) / 32, whole, rtol=bound, atol=bound)


def test_fp16_sums_and_bf16_sizes_do_not_saturate():
    """60,000 * 2 overflows fp16, and 1 more is lost on a bf16 size of 256."""
    x = torch.full((1, 4, 1), 60000.0, dtype=torch.float16)
    merge, _ = bipartite_soft_matching(torch.ones(1, 4, 2), 2)
    merged, size = merge_wavg(merge, x)
    assert merged.tolist() == [[[60000.0], [60000.0]]] and size.tolist() == [[[3.0], [1.0]]]
    merge, _ = bipartite_soft_matching(torch.ones(1, 1024, 2), 512)
    _, size = merge_wavg(merge, torch.zeros(1, 1024, 1, dtype=torch.bfloat16))
    assert size[0, 0] == 512 and size.float().sum() == 1023  # 513 rounds once, at the end


def test_gradients(random):
    metric = torch.randn(2, 9, 4, generator=random)
    size = torch.rand(2, 9, 1, generator=random, dtype=torch.float64) + 0.5
    merge, unmerge = bipartite_soft_matching(metric, 3, class_token=True)
    x = torch.randn(2, 9, 3, generator=random, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t: merge_wavg(merge, t, size)[0], (x,))
    torch.autograd.gradcheck(lambda t: unmerge(merge(t)), (x,))


def test_no_gradient_reaches_the_metric(random):
    metric = torch.randn(1, 8, 4, generator=random, requires_grad=True)
    merge, _ = bipartite_soft_matching(metric, 2)
    assert not merge(torch.ones(1, 8, 2)).requires_grad


@pytest.mark.parametrize("poison", [0.0, math.nan, math.inf])
@pytest.mark.parametrize("at", [4, 5])
def test_a_spoiled_metric_costs_no_token(random, poison, at):
    """The metric is not the features: a token whose keys are useless keeps its weight, and disturbs no other token."""
    metric = torch.randn(2, 16, 4, generator=random)
    spoiled = metric.clone()
    spoiled[1, at] = poison
    x = torch.randn(2, 16, 3, generator=random)
    merge, _ = bipartite_soft_matching(spoiled, 8)
    merged, size = merge_wavg(merge, x)
    assert merged.isfinite().all() and torch.equal(size.sum(1), torch.full((2, 1), 16.0))
    torch.testing.assert_close((merged * size).sum(1), x.sum(1))
    assert torch.equal(merged[0], merge_wavg(bipartite_soft_matching(metric, 8)[0], x)[0][0])


def test_connector_drop_in(random):
    """As a method of a connector, with the target that the released code refuses."""
    x = torch.randn(3, 98, 16, generator=random)
    method = functools.partial(compat.merge_tokens, num_heads=4)
    assert torch.equal(method(x, 64), compress_clips(x, 64, 4))
    assert torch.equal(method(x, target_num_token=98), x)


BAD = {
    "metric flat": (lambda: bipartite_soft_matching(torch.ones(4, 2), 1), ValueError, "metric must have 3 dim"),
    "r": (lambda: bipartite_soft_matching(torch.ones(1, 4, 2), 1.5), TypeError, "r must be an int, got float"),
    "mode": (
        lambda: bipartite_soft_matching(torch.ones(1, 4, 2), 1)[0](torch.ones(1, 4, 2), mode="median"),
        ValueError,
        "mode must be one of mean, sum, amax, got 'median'",
    ),
    "other tokens": (
        lambda: bipartite_soft_matching(torch.ones(1, 4, 2), 1)[0](torch.ones(1, 5, 2)),
        ValueError,
        "x must hold the plan's 4 tokens, got 5",
    ),
    "other batch": (
        lambda: bipartite_soft_matching(torch.ones(2, 4, 2), 1)[0](torch.ones(4, 2, 2)),
        ValueError,
        "x must hold the metric's 2 clips, got shape",
    ),
    "other rows": (
        lambda: bipartite_soft_matching(torch.ones(1, 4, 2), 1)[1](torch.ones(1, 4, 2)),
        ValueError,
        "y must hold the plan's 3 rows, got 4",
    ),
    "size": (
        lambda: merge_wavg(
            bipartite_soft_matching(torch.ones(1, 4, 2), 1)[0], torch.ones(1, 4, 2), torch.ones(1, 3, 1)
        ),
        ValueError,
        r"size must hold one value per token \(4\)",
    ),
    "target": (lambda: compat.merge_tokens(torch.ones(1, 4, 2), 5, 1), ValueError, "target must be.*got 5"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_input(case):
    call, error, message = BAD[case]
    with pytest.raises(error, match=message):
        call()
