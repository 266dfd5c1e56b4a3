# SPDX-License-Identifier: Apache-2.0
"""The matching of the C++ CPU kernels against the fp64 reference, wherever the margin of every decision is wide."""

import pytest
import torch
from hypothesis import assume, given
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout, native
from lrc_kernels.backend import use_backend
from lrc_kernels.testing import assert_equal_index, make_input
from lrc_kernels.tome import head_mean, merge_budget, op, plan_merge, reference

if native.cpu_unavailable() is not None:
    pytest.skip(native.cpu_unavailable(), allow_module_level=True)

from lrc_kernels import _C
from tests.tome.cpu_cases import ISAS, PROPERTY

pytestmark = pytest.mark.usefixtures("cpu_backend")

MARGIN = 1e-5


def decision_margin(metric, schedule, size, protected, destination):
    """The smallest gap, in fp64, that decides anything along a segment's schedule: best against second best partner,
    and neighbours in the ranking from rank r on."""
    payload, margin = metric.double(), torch.inf
    for r in schedule:
        if r == 0:
            continue
        n = payload.shape[0]
        in_b = torch.arange(n) % 2 == 1 if destination is None else destination
        a, b = (~in_b).nonzero()[:, 0], in_b.nonzero()[:, 0]
        unit = payload / payload.norm(dim=1, keepdim=True)
        similarity = (unit[a] @ unit[b].T).nan_to_num(-2.0).masked_fill(protected[b], -2.0)
        best = similarity.topk(min(2, b.numel()), dim=1).values
        if best.shape[1] == 2:
            gaps = best[:, 0] - best[:, 1]
            margin = min(margin, *gaps[best[:, 0] > -2].tolist(), torch.inf)
        ranked = best[:, 0][~protected[a]].sort(descending=True).values
        if r < a.numel():
            gaps = (ranked[:-1] - ranked[1:])[max(r - 1, 0) :]
            margin = min(margin, *gaps[ranked[1:][max(r - 1, 0) :] > -2].tolist(), torch.inf)
        assign, next_size, weight, _ = reference.plan_segment(
            payload, [r], size.double(), protected, destination, None, "fp32", "reference", "isolate", 1
        )
        payload = reference.weighted_mean(payload, weight, assign, n - r)[0]
        protected = torch.zeros(n - r, dtype=torch.bool).index_fill(0, assign[protected], True)
        size = next_size
    return margin


def assert_plan_equals_reference(metric, budget, **options):
    """Every index equal, sizes within the tolerance; the caller has made sure of the margins."""
    plan = plan_merge(metric, budget, **options)
    with use_backend("reference"):
        expected = plan_merge(metric.double(), budget, **options)
    for name in ("assign", "anchor"):
        assert_equal_index(getattr(plan, name), getattr(expected, name), name=name)
    torch.testing.assert_close(plan.size, expected.size, rtol=1e-6, atol=0)
    assert torch.equal(plan.weight, expected.weight)
    if plan.valid is not None:
        assert_equal_index(plan.valid, expected.valid, name="valid")
    return plan


@PROPERTY
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 7, 16, 33, 64, 101]), min_size=1, max_size=3),
    channels=st.sampled_from([2, 7, 16, 24, 88, 128]),
    r=st.lists(st.integers(0, 40), min_size=1, max_size=4),
    num_protected=st.integers(0, 2),
    weights=st.sampled_from(["none", "whole", "real", "with zeros"]),
    order=st.sampled_from(op.ORDERS),
    value=st.sampled_from([0.0, torch.nan, torch.inf, 1e30, 1e-40]),
    spoiled=st.sampled_from(["none", "one", "half", "all"]),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_plan(lengths, channels, r, num_protected, weights, order, value, spoiled, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    metric = torch.randn(total, channels, generator=generator)
    # A token of extreme length is a token like any other; 0, NaN and infinity have no direction.
    victims = torch.rand(total, generator=generator) < {"none": 0.0, "one": 0.0, "half": 0.5, "all": 1.0}[spoiled]
    if spoiled == "one" and total:
        victims[torch.randint(total, (), generator=generator)] = True
    if value in (1e30, 1e-40):
        assume(int(victims.sum()) <= 1)
        metric[victims] *= value
    else:
        metric[victims, 0] = value
        metric[victims] *= value
    size = {
        "none": None,
        "whole": torch.randint(1, 4, (total,), generator=generator).float(),
        "real": torch.rand(total, generator=generator) + 0.1,
        "with zeros": torch.randint(0, 3, (total,), generator=generator).float(),
    }[weights]
    layout = VarlenLayout(lengths)
    protected = torch.zeros(total, dtype=torch.bool)
    for start, n in zip(layout.cu_seqlens.tolist(), lengths, strict=False):
        protected[start + torch.randperm(n, generator=generator)[:num_protected]] = True
    budget = merge_budget(layout, r=r, num_protected=num_protected)
    ones = torch.ones(total) if size is None else size
    for segment, rows in enumerate(torch.arange(total).split(lengths)):
        schedule = budget.r[:, segment].tolist()
        assume(decision_margin(metric[rows], schedule, ones[rows], protected[rows], None) > MARGIN)
    _C.set_cpu_isa(isa)
    assert_plan_equals_reference(metric, budget, size=size, protected=protected, order=order)


@PROPERTY
@given(
    n=st.integers(2, 50),
    threshold=st.floats(-0.5, 0.9),
    by_destination=st.booleans(),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_plan_with_threshold_and_destination(n, threshold, by_destination, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n, 12, generator=generator)
    destination = None
    if by_destination:
        destination = torch.rand(n, generator=generator) < 0.4
        destination[torch.randint(n, (), generator=generator)] = True
    sources = (n + 1) // 2 if destination is None else int((~destination).sum())
    r = min(sources, n // 2, 1 + seed % n)
    assume(r > 0)
    nothing = torch.zeros(n, dtype=torch.bool)
    assume(decision_margin(metric, [r], torch.ones(n), nothing, destination) > MARGIN)
    in_b = torch.arange(n) % 2 == 1 if destination is None else destination
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    score = (unit[~in_b] @ unit[in_b].T).amax(1)
    # With a threshold every source is ranked, so every gap counts.
    ranked = score.sort(descending=True).values
    assume(bool(((ranked[:-1] - ranked[1:]) > MARGIN).all()) and bool(((score - threshold).abs() > MARGIN).all()))
    _C.set_cpu_isa(isa)
    budget = merge_budget(VarlenLayout([n]), r=r)
    plan = assert_plan_equals_reference(metric, budget, threshold=threshold, destination=destination)
    assert plan.valid.sum() == n - int((score.topk(r).values >= threshold).sum())


@pytest.mark.parametrize("kind", ["gaussian", "video_like"])
def test_one_iteration_on_a_whole_clip(kind, isa):
    """2048 tokens always hold near-ties: each decision is compared by itself, where its own margin is wide enough."""
    metric = make_input(kind, (2048, 128), seed=3)
    plan = plan_merge(metric, merge_budget(VarlenLayout([2048]), r=700))
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    best = (unit[0::2] @ unit[1::2].T).topk(2, dim=1)
    score, boundary = best.values[:, 0], best.values[:, 0].sort(descending=True).values[699:701].mean()
    merged = ~torch.isin(torch.arange(0, 2048, 2), plan.anchor)
    assert int(merged.sum()) == 700
    decided = (score - boundary).abs() > MARGIN
    assert torch.equal(merged[decided], (score > boundary)[decided]) and decided.float().mean() > 0.9
    clear = merged & (best.values[:, 0] - best.values[:, 1] > MARGIN)
    partner = plan.anchor[plan.assign[0::2].long()].long()
    assert torch.equal(partner[clear], 2 * best.indices[:, 0][clear] + 1) and clear.float().mean() > 0.25
    unmerged = score[plan.anchor[: 1024 - 700].long() // 2]
    assert (unmerged[:-1] - unmerged[1:]).min() > -MARGIN
    counts = torch.bincount(plan.assign.long(), minlength=plan.num_out).float()
    assert torch.equal(plan.size, counts)


def test_ties_go_to_the_first_partner_and_keep_the_order(isa):
    metric = make_input("all_equal", (97, 24))
    plan = plan_merge(metric, merge_budget(VarlenLayout([97]), r=30))
    assert plan.assign[0:60:2].unique().tolist() == [plan.assign[1].item()]
    assert plan.anchor.tolist() == [*range(60, 97, 2), *range(1, 97, 2)]
    whole = plan_merge(metric, merge_budget(VarlenLayout([97]), r=48))
    assert whole.size.tolist() == [1.0, 49.0] + [1.0] * 47


@PROPERTY
@given(
    n=st.integers(2, 40),
    channels=st.sampled_from([1, 7, 16, 88]),
    share=st.floats(0.02, 0.5),
    spoiled=st.integers(0, 3),
    value=st.sampled_from([0.0, torch.nan, torch.inf]),
    num_protected=st.integers(0, 2),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_plan_that_lets_nan_through(n, channels, share, spoiled, value, num_protected, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n, channels, generator=generator)
    victims = torch.randperm(n, generator=generator)[:spoiled]
    metric[victims, 0] = value
    if value == 0.0:
        metric[victims] = 0.0
    protected = torch.zeros(n, dtype=torch.bool)
    protected[torch.randperm(n, generator=generator)[:num_protected]] = True
    budget = merge_budget(VarlenLayout([n]), r=max(1, int(share * n)), num_protected=num_protected)
    r = budget.r[0].tolist()
    assume(decision_margin(metric, r, torch.ones(n), protected, None) > MARGIN)
    _C.set_cpu_isa(isa)
    options = {"protected": protected, "zero_policy": "reference"}
    plan = plan_merge(metric, budget, **options)
    with use_backend("reference"):
        expected = plan_merge(metric.double(), budget, **options)
    assert torch.equal(plan.assign, expected.assign) and torch.equal(plan.anchor, expected.anchor)
    assert torch.equal(plan.size, expected.size) and plan.weight is None


def test_one_zero_token_captures_its_clip_as_in_the_public_loop(isa, random):
    metric = torch.randn(2, 32, 8, generator=random)
    metric[0, 5] = 0.0
    options = {"r": [16, 8], "zero_policy": "reference"}
    plan = plan_merge(metric, **options)
    with use_backend("reference"):
        expected = plan_merge(metric.double(), **options)
    assert torch.equal(plan.assign, expected.assign) and plan.size.view(2, 8)[0].max() >= 17


@PROPERTY
@given(
    n=st.integers(2, 24),
    channels=st.sampled_from([1, 7, 16, 24]),
    order=st.sampled_from(op.ORDERS),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_bf16_plan(n, channels, order, isa, seed):
    """Equal where no score lies so near to the middle of two bf16 numbers that fp32 and fp64 round it differently."""
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(1, n, channels, generator=generator)
    rounded = metric[0].bfloat16().double()
    unit = (rounded / rounded.norm(dim=1, keepdim=True).bfloat16().double()).bfloat16().double()
    score = unit[0::2] @ unit[1::2].T
    assume(bool(((score * (1 - 1e-6)).bfloat16() == (score * (1 + 1e-6)).bfloat16()).all()))
    _C.set_cpu_isa(isa)
    options = {"r": 1 + seed % (n // 2), "order": order, "precision": "bf16"}
    plan = plan_merge(metric, **options)
    with use_backend("reference"):
        expected = plan_merge(metric.double(), **options)
    assert torch.equal(plan.assign, expected.assign) and torch.equal(plan.anchor, expected.anchor)


def test_bf16_plan_rounds_the_merged_metric_too(isa):
    """Whole numbers whose means, norms and scores are exact or far from a tie, over three iterations."""
    metric = make_input("with_ties", (3, 64, 16), seed=4)
    plan = plan_merge(metric, r=[32, 16, 5], precision="bf16")
    with use_backend("reference"):
        expected = plan_merge(metric, r=[32, 16, 5], precision="bf16")
    assert torch.equal(plan.assign, expected.assign) and torch.equal(plan.size, expected.size)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_heads_of_the_metric_are_averaged(precision, random):
    metric = torch.randn(60, 24, generator=random).bfloat16()
    layout = merge_budget(VarlenLayout([60]), r=20)
    cu = layout.layout_in.cu_seqlens, layout.layout_out.cu_seqlens
    options = (None, None, None, 40, 60, None, precision, "reference", "isolate")
    several = op.plan_op(metric, *cu, layout.r, *options, 3)
    one = op.plan_op(head_mean(metric, 3), *cu, layout.r, *options, 1)
    assert all(torch.equal(a, b) for a, b in zip(several, one, strict=True))


def test_the_tokens_of_a_large_diffusion_image():
    """65,536 tokens in 2x2 windows with one destination each, as tomesd has them at 2048 px: 49,152 x 16,384 scores."""
    metric = make_input("gaussian", (65536, 4), seed=5)
    destination = torch.zeros(256, 256, dtype=torch.bool)
    destination[1::2, 0::2] = True
    destination = destination.flatten()
    plan = plan_merge(metric, merge_budget(VarlenLayout([65536]), r=32768), destination=destination)
    unit = metric.double() / metric.double().norm(dim=1, keepdim=True)
    a, b = (~destination).nonzero()[:, 0], destination.nonzero()[:, 0]
    merged = ~torch.isin(torch.arange(65536), plan.anchor)
    assert int(merged.sum()) == 32768 and not bool(merged[destination].any())
    partner = plan.anchor[plan.assign.long()].long()
    chosen = (unit[a] * unit[partner[a]]).sum(1)
    sample = torch.arange(0, a.numel(), 97)
    best = (unit[a[sample]] @ unit[b].T).amax(1)
    into = merged[a[sample]]
    assert bool((best[into] - chosen[sample][into] <= 1e-6).all()) and bool(destination[partner[merged]].all())
    assert best[into].min() >= best[~into].max() - 1e-6


@pytest.mark.parametrize("options", [{"precision": "eager_bf16"}, {"zero_policy": "reference", "threshold": 0.5}])
def test_plan_declines(options, random):
    metric = torch.randn(1, 8, 4, generator=random)
    with pytest.raises(RuntimeError, match=next(iter(options))):
        plan_merge(metric, r=4, **options)


def test_a_segment_of_destinations_alone_is_refused(isa, random):
    """A compiled graph reads no values beforehand: without a source the rows do not fit, and nothing divides by 0."""
    metric, budget = torch.randn(6, 4, generator=random), merge_budget(VarlenLayout([6]), r=2)
    cu = budget.layout_in.cu_seqlens, budget.layout_out.cu_seqlens
    options = (4, 6, None, "fp32", "reference", "isolate", 1)
    with pytest.raises(ValueError, match="room for the rows that r keeps"):
        op.plan_op(metric, *cu, budget.r, None, None, torch.ones(6, dtype=torch.bool), *options)
