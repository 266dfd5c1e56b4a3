# SPDX-License-Identifier: Apache-2.0
"""ToMe's plan in Triton against the fp64 reference: in the interpreter with small tiles, on a GPU as shipped."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.testing import make_input
from lrc_kernels.tome import merge_budget, merge_tokens, plan_merge, reference
from lrc_kernels.tome.op import head_mean_op
from tests.tome.triton_checks import assert_same_plan, on_reference, on_triton

# numpy warns in the interpreter where NaN and 0/0 are computed and then masked.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.usefixtures("small_tiles"),
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
MARGIN = 1e-5


def smallest_margin(metric, schedule, size=None, protected=None):
    """The closest call of one segment in fp64: best against second best partner, and neighbours in the ranking."""
    metric, margin = metric.double().cpu(), torch.inf
    n = metric.shape[0]
    size = torch.ones(n) if size is None else size.cpu()
    protected = torch.zeros(n, dtype=torch.bool) if protected is None else protected.cpu()
    for r in schedule:
        n = metric.shape[0]
        norm = metric.norm(dim=-1)
        healthy = norm.isfinite() & (norm > 0)
        unit = torch.where(healthy[:, None], metric / norm[:, None], 0.0)
        score = (unit[0::2] @ unit[1::2].T).masked_fill(~healthy[0::2, None] | (~healthy | protected)[1::2], -torch.inf)
        best = score.sort(dim=1, descending=True).values[:, :2]
        if r < score.shape[0]:
            ranked = best[:, 0].sort(descending=True).values
            best = torch.cat([best, torch.stack([ranked[:-1], ranked[1:]], dim=1)]) if best.shape[1] == 2 else best
        if best.shape[1] == 2:
            gap = (best[:, 0] - best[:, 1])[best[:, 1].isfinite()]
            margin = min(margin, float(gap.min()) if gap.numel() else torch.inf)
        options = (None, None, "fp32", "reference", "isolate", 1)
        assign, size_out, weight, _ = reference.plan_segment(metric, [r], size, protected, *options)
        metric, _ = reference.weighted_mean(metric, torch.where(weight == 0, 0.0, size), assign, n - r)
        shield = torch.zeros(n - r, dtype=torch.bool)
        shield[assign[protected]] = True
        size, protected = size_out, shield
    return margin


def check_plan(metric, layout, *, size=None, protected=None, num_protected=0, budget_of, **options):
    budget = merge_budget(layout, num_protected=num_protected, **budget_of)
    start = 0
    for segment, n in enumerate(layout.lengths):
        rows = slice(start, start + n)
        schedule = [r for r in budget.r[:, segment].tolist() if r]
        shield = None if protected is None else protected[rows]
        margin = smallest_margin(metric[rows], schedule, None if size is None else size[rows], shield)
        assert margin > MARGIN, f"the input leaves segment {segment} a call as close as {margin:.2g}"
        start += n
    wanted = on_reference(plan_merge, metric.double(), budget, size=size, protected=protected, **options)
    plan = on_triton(plan_merge, metric, budget, size=size, protected=protected, **options)
    assert_same_plan(plan, wanted)
    return plan


@pytest.mark.parametrize(
    ("lengths", "width", "budget_of"),
    [
        ([96], 64, {"target": 6}),
        ([70, 0, 33, 1], 20, {"target": [9, 0, 5, 1]}),
        ([33, 57, 2], 88, {"r": [8, 9]}),
        ([49, 7], 1, {"r": 0}),
        ([40], 200, {"target": 12}),
        ([98], 32, {"target": 64}),
    ],
)
@pytest.mark.parametrize("order", ["reference", "position"])
def test_plan_equals_the_reference(device, lengths, width, budget_of, order):
    layout = VarlenLayout(lengths, device)
    metric = make_input("gaussian", (layout.num_tokens, width), device=device, seed=1)
    plan = check_plan(metric, layout, budget_of=budget_of, order=order)
    assert float(plan.size.sum()) == layout.num_tokens


@pytest.mark.filterwarnings("ignore:overflow encountered:RuntimeWarning")
@pytest.mark.parametrize(("width", "precision"), [(20, "fp32"), (20, "bf16"), (200, "fp32")])
def test_no_length_of_a_finite_token_matters(device, width, precision):
    """Squares of these lengths leave fp32."""
    metric = make_input("gaussian", (1, 32, width), device=device, seed=15)
    metric[0, 3], metric[0, 4, 1], metric[0, 9, 2] = 0.0, torch.nan, -torch.inf
    length = 2.0 ** torch.randint(-100, 100, (1, 32, 1), generator=torch.Generator().manual_seed(1)).to(device)
    plan, wanted = (on_triton(plan_merge, m, r=16, precision=precision) for m in (metric * length, metric))
    assert_same_plan(plan, wanted)
    assert int((wanted.weight == 0).sum()) == 1, "of the three broken ones, only token 4 is of set A"


@pytest.mark.parametrize("length", [2.0**100, 2.0**-100])
def test_nor_does_that_of_merged_tokens(device, length):
    metric = make_input("gaussian", (1, 32, 20), device=device, seed=16)
    assert_same_plan(*(on_triton(plan_merge, m, r=[16, 8]) for m in (metric * length, metric)))


def test_masked_tokens_match_after_an_iteration_that_merges_none(device):
    metric = make_input("gaussian", (30, 12), device=device, seed=17)
    size = (torch.arange(30, device=device) % 3 > 0).float()
    budget = merge_budget(VarlenLayout([30], device), r=[0, 4, 4])
    assert_same_plan(*(on(plan_merge, metric, budget, size=size) for on in (on_triton, on_reference)))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("kind", ["with_zero_tokens", "with_nan_token"])
def test_plan_of_broken_tokens(device, kind, dtype):
    layout = VarlenLayout([64, 33], device)
    parts = [make_input(kind, (n, 48), dtype=dtype, device=device, seed=n) for n in layout.lengths]
    plan = check_plan(torch.cat(parts), layout, budget_of={"target": [8, 4]})
    if kind == "with_nan_token":
        assert int((plan.weight == 0).sum()) > 0


@pytest.mark.parametrize("kind", ["gaussian", "video_like"])
def test_each_iteration_from_the_same_state(device, kind):
    """Where many tokens are near ties, a whole schedule may differ; an iteration may only where its margin is small."""
    num_tokens, width, target = (1024, 128, 64) if device.type == "cuda" else (128, 32, 8)
    state = make_input(kind, (2, num_tokens, width), device=device, seed=2)
    sure_tokens = []
    while (rows := state.shape[1]) > target:
        step = on_triton(plan_merge, state, r=rows // 2)
        wanted = on_reference(plan_merge, state.double(), r=rows // 2)
        unit = torch.nn.functional.normalize(state.double(), dim=-1)
        best = (unit[:, 0::2] @ unit[:, 1::2].transpose(1, 2)).sort(dim=-1, descending=True).values
        sure = ((best[..., 0] - best[..., 1]) > MARGIN).flatten()
        same = (step.assign == wanted.assign).reshape(-1, 2)
        assert bool(same[:, 0][sure].all()) and bool(same[:, 1].all())
        sure_tokens.append(sure)
        state = on_reference(merge_tokens, state.double(), wanted).float()
    assert float(torch.cat(sure_tokens).double().mean()) > 0.7


def test_halving_keeps_the_last_token_of_each_run(device):
    metric = make_input("video_like", (1, 96, 16), device=device, seed=2)
    plan = on_triton(plan_merge, metric, r=[48, 24, 12])
    assert plan.anchor.tolist() == list(range(7, 96, 8))
    assert float(plan.size.sum()) == 96


def test_rows_in_order_of_position_take_linear_work(device, monkeypatch):
    """Tiles that are read for the order: at tomesd's 65,536 tokens, to compare all anchors costs as much as a match."""
    if device.type == "cuda":
        pytest.skip("counts what the interpreter reads")
    from triton.runtime.interpreter import InterpreterBuilder

    loads, load = [], InterpreterBuilder.create_masked_load
    monkeypatch.setattr(InterpreterBuilder, "create_masked_load", lambda *args: loads.append(1) or load(*args))

    def tiles(num_tokens, order):
        before = len(loads)
        on_triton(plan_merge, exact_tokens(num_tokens, device)[None], r=[num_tokens // 2 - 1], order=order)
        return len(loads) - before

    few, many = (tiles(n, "position") - tiles(n, "reference") for n in (32, 160))
    assert 0 < many <= 5 * few


def exact_tokens(num_tokens, device, kinds=4, width=16):
    """Tokens of which each has four entries of +-1: unit vectors and scores are exact in bf16, and most scores tie."""
    random = torch.Generator().manual_seed(3)
    vectors = torch.zeros(kinds, width)
    for vector in vectors:
        vector[torch.randperm(width, generator=random)[:4]] = torch.tensor([1.0, -1.0, 1.0, -1.0])
    return vectors[torch.randint(0, kinds, (num_tokens,), generator=random)].to(device)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("r", [37, 20, 1])
def test_ties_go_to_the_lowest_index(device, precision, r):
    metric = exact_tokens(75, device)[None]
    wanted = on_reference(plan_merge, metric.double(), r=r, precision=precision)
    assert_same_plan(on_triton(plan_merge, metric, r=r, precision=precision), wanted)


def test_one_channel_and_two_tokens(device):
    """K = 1: every similarity is 1 or -1, all of them tie."""
    layout = VarlenLayout([37, 2, 1], device)
    metric = make_input("gaussian", (40, 1), device=device, seed=14)
    budget = merge_budget(layout, r=[18])
    wanted = on_reference(plan_merge, metric.double(), budget)
    assert_same_plan(on_triton(plan_merge, metric, budget), wanted)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_all_equal_tokens(device, precision):
    metric = exact_tokens(70, device, kinds=1)[None]
    wanted = on_reference(plan_merge, metric.double(), target=9, precision=precision)
    assert_same_plan(on_triton(plan_merge, metric, target=9, precision=precision), wanted)


def test_bf16_rounds_metric_norms_and_scores(device):
    metric = make_input("gaussian", (90, 24), device=device, seed=4)
    plan = on_triton(plan_merge, metric[None], r=45, precision="bf16")
    rounded = metric.bfloat16().double()
    unit = (rounded / rounded.norm(dim=-1, keepdim=True).bfloat16().double()).bfloat16().double()
    score = unit[0::2] @ unit[1::2].T
    chosen = score.gather(1, plan.assign[0::2].long()[:, None])[:, 0]
    # Scores that round to the same bf16 tie, and the first of them wins.
    ulp = score.abs().max() * 2**-8
    assert bool((chosen >= score.max(dim=1).values - ulp).all())
    tied = (score.bfloat16() == score.bfloat16().max(dim=1, keepdim=True).values).sum(1) > 1
    first = score.bfloat16().max(dim=1).indices
    sure = (score.sort(dim=1, descending=True).values[:, :2].diff()[:, 0].abs() > ulp) | tied
    assert float((plan.assign[0::2].long() == first)[sure].double().mean()) > 0.9


def test_sizes_weigh_the_metric(device):
    layout = VarlenLayout([60, 21], device)
    metric = make_input("gaussian", (81, 24), device=device, seed=5)
    size = make_input("gaussian", (81, 1), device=device, seed=6)[:, 0].abs()
    size[::9] = 0
    check_plan(metric, layout, size=size, budget_of={"target": [7, 6]})


def test_protected_tokens_stay_alone(device):
    layout = VarlenLayout([60, 21], device)
    metric = make_input("gaussian", (81, 24), device=device, seed=7)
    protected = torch.zeros(81, dtype=torch.bool, device=device)
    protected[[0, 7, 18, 62, 80]] = True
    plan = check_plan(
        metric, layout, protected=protected, num_protected=3, budget_of={"r": [18, 9, 4]}, order="position"
    )
    assert bool((plan.size[plan.assign[protected].long()] == 1).all())


def test_threshold_keeps_dissimilar_tokens(device):
    layout = VarlenLayout([60, 0, 21], device)
    metric = make_input("gaussian", (81, 24), device=device, seed=8)
    plan = check_plan(metric, layout, budget_of={"r": [25, 8]}, threshold=0.4)
    assert 20 < int(plan.valid.sum()) < 81
    everything = on_triton(plan_merge, metric, merge_budget(layout, r=[25]), threshold=1.5)
    assert torch.equal(everything.size, torch.ones(81, device=device))


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize(
    ("budget_of", "options"),
    [({"r": [20, 9]}, {}), ({"target": [10, 8]}, {"order": "position"}), ({"r": [16]}, {"threshold": 0.3})],
)
def test_nan_goes_through_as_in_the_public_loop(device, precision, budget_of, options):
    """A zero token in B captures its segment, a NaN token in A merges first and spoils the row that it joins."""
    layout = VarlenLayout([40, 33], device)
    metric = exact_tokens(73, device, kinds=5)
    metric[7], metric[50, 3], metric[44] = 0.0, torch.nan, torch.inf
    protected = torch.zeros(73, dtype=torch.bool, device=device)
    protected[[1, 41]] = True
    budget = merge_budget(layout, num_protected=1, **budget_of)
    options = {**options, "protected": protected, "precision": precision, "zero_policy": "reference"}
    wanted = on_reference(plan_merge, metric.double(), budget, **options)
    plan = on_triton(plan_merge, metric, budget, **options)
    assert int(wanted.size.max()) > 15
    assert torch.equal(plan.assign, wanted.assign) and torch.equal(plan.anchor, wanted.anchor)
    assert torch.equal(plan.size, wanted.size)


@pytest.mark.parametrize("options", [{}, {"threshold": 0.9}])
def test_sorted_ranks_equal_counted_ones(device, monkeypatch, options):
    layout = VarlenLayout([45, 0, 1, 60], device)
    metric = exact_tokens(106, device, kinds=9)
    protected = torch.zeros(106, dtype=torch.bool, device=device)
    protected[[2, 50, 60]] = True
    budget = merge_budget(layout, r=[12, 7], num_protected=2)
    counted = on_triton(plan_merge, metric, budget, protected=protected, **options)
    monkeypatch.setattr("lrc_kernels.tome.triton_schedule.RANKS_COUNTED", 0)
    assert_same_plan(on_triton(plan_merge, metric, budget, protected=protected, **options), counted)


def test_destination_chooses_set_b(device):
    layout = VarlenLayout([60, 0, 20], device)
    metric = make_input("gaussian", (80, 24), device=device, seed=9)
    destination = torch.arange(80, device=device) % 4 == 2
    metric[2], metric[3] = 0.0, torch.nan
    budget = merge_budget(layout, r=[30])
    wanted = on_reference(plan_merge, metric.double(), budget, destination=destination)
    assert_same_plan(on_triton(plan_merge, metric, budget, destination=destination), wanted)


def test_a_broken_token_touches_nothing_else(device):
    metric = make_input("gaussian", (2, 40, 16), device=device, seed=10)
    plans = []
    for value in (torch.nan, 0.0):
        broken = metric.clone()
        broken[0, 5], broken[0, 22] = value, value
        plans.append(on_triton(plan_merge, broken, target=6))
    for plan in plans[1:]:
        assert_same_plan(plan, plans[0])
    whole = on_triton(plan_merge, metric, target=6)
    assert torch.equal(plans[0].assign[40:], whole.assign[40:])


def test_a_clip_alone_equals_the_clip_in_a_batch(device, monkeypatch):
    """Two of the clips are merged as one-hot products, the third, which keeps 7 rows, group by group."""
    monkeypatch.setattr("lrc_kernels.tome.triton_kernels.ONE_HOT_ROWS", 6)
    lengths = [41, 60, 12]
    layout = VarlenLayout(lengths, device)
    x = make_input("video_like", (sum(lengths), 40), device=device, dtype=torch.bfloat16, seed=11)
    budget = merge_budget(layout, target=[5, 6, 7])
    metric = on_triton(head_mean_op, x, 4, [])
    plan = on_triton(plan_merge, metric, budget)
    assert plan.assign.unique().numel() == plan.num_out
    y = on_triton(merge_tokens, x, plan)
    again = on_triton(plan_merge, metric, budget)
    assert_same_plan(again, plan)
    assert torch.equal(on_triton(merge_tokens, x, again), y)
    start = first = 0
    for n, kept in zip(lengths, (5, 6, 7), strict=True):
        clip = x[start : start + n][None]
        alone = on_triton(plan_merge, on_triton(head_mean_op, clip, 4, [])[None], target=kept)
        assert torch.equal(alone.assign + first, plan.assign[start : start + n])
        assert torch.equal(on_triton(merge_tokens, clip, alone)[0], y[first : first + kept])
        start, first = start + n, first + kept


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [(torch.float32, {"precision": "eager_bf16"}, "features"), (torch.float64, {}, "float64")],
)
def test_what_the_plan_declines(device, dtype, options, reason):
    metric = make_input("gaussian", (1, 8, 4), device=device, dtype=dtype)
    with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        plan_merge(metric, r=2, **options)
