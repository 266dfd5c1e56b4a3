# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of ToMe against the fp64 reference: in the interpreter with small tiles, on a GPU as shipped."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.tome import (
    TokenLayout,
    compress_clips,
    merge_budget,
    merge_tokens,
    plan_merge,
    reference,
    unmerge_tokens,
)
from lrc_kernels.tome.op import gather_op, head_mean_op, max_backward_op, merge_op

# numpy warns in the interpreter where NaN and 0/0 are computed and then masked.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:invalid value encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:divide by zero encountered:RuntimeWarning"),
]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
VIT = [2, 4, 6, 2, 1]
MARGIN = 1e-5


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    """Tiles of 16 in the interpreter, so that every loop runs three times or more; the shipped ones on a GPU."""
    if device.type == "cuda":
        return
    from lrc_kernels.tome import triton_groups, triton_kernels, triton_schedule

    shipped = triton_schedule.plan_blocks
    small = dict.fromkeys(("match_a", "match_b", "tokens", "step_b", "step_a"), 16)
    monkeypatch.setattr(triton_schedule, "plan_blocks", lambda width: shipped(width)._replace(**small))
    monkeypatch.setattr(triton_kernels, "merge_blocks", lambda num_out, num_segments, direct: (16, 16, 16))
    monkeypatch.setattr(triton_groups, "group_blocks", lambda width, mode: (4, 16, 2))
    monkeypatch.setattr(triton_groups, "PIECE", 5)


def on_triton(function, *args, **options):
    """Run on the Triton backend, and see that nothing else ran."""
    with use_backend("triton"), record() as ran:
        result = function(*args, **options)
    assert ran and {backend for _, backend in ran} == {"triton"}
    return result


def on_reference(function, *args, **options):
    with use_backend("reference"):
        return function(*args, **options)


def assert_same_plan(plan, wanted):
    assert torch.equal(plan.assign, wanted.assign)
    assert torch.equal(plan.anchor, wanted.anchor)
    torch.testing.assert_close(plan.size, wanted.size, rtol=1e-6, atol=0)
    assert torch.equal(plan.weight, wanted.weight)
    assert (plan.valid is None) == (wanted.valid is None)
    assert plan.valid is None or torch.equal(plan.valid, wanted.valid)


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


def feature_cases(dtype, device):
    """(x, num_heads, layout): dense, strided, packed, one head per channel, and the ViT layout in two memory orders."""

    def make(*shape):
        return make_input("gaussian", shape, dtype=dtype, device=device, seed=len(shape))

    yield "dense", make(2, 47, 50), 2, []
    yield "strided", make(2, 60, 37)[:, ::2, 3:], 1, []
    yield "packed", make(75, 36), 36, []
    yield "vit", make(4, 25, 12), 6, VIT
    yield "vit transposed", make(4, 24, 25).transpose(1, 2), 24, VIT


@pytest.mark.parametrize("dtype", DTYPES)
def test_head_mean(device, dtype):
    for name, x, num_heads, layout in feature_cases(dtype, device):
        metric = on_triton(head_mean_op, x, num_heads, layout)
        wanted = reference.head_mean(x.double(), num_heads, layout)
        assert_close(metric, wanted, reference.head_mean(x, num_heads, layout), name=name)


def random_assignment(num_tokens, device):
    """Three segments, the second empty; some rows without tokens, many tokens with weight 0."""
    random = torch.Generator().manual_seed(num_tokens)
    half = num_tokens // 2 + 1
    layout_in, layout_out = VarlenLayout([half, 0, num_tokens - half], device), VarlenLayout([37, 0, 5], device)
    assign = torch.cat(
        [torch.randint(0, 37, (half,), generator=random), torch.randint(37, 42, (num_tokens - half,), generator=random)]
    )
    alive = (torch.rand(num_tokens, generator=random) > 0.3).float()
    weight = alive * (torch.rand(num_tokens, generator=random) + 0.5)
    return layout_in, layout_out, assign.int().to(device), alive.to(device), weight.to(device)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("kind", "reduce"), [("ones", "sum"), ("binary", "mean"), ("weighted", "mean"), ("weighted", "sum")]
)
def test_merge_and_gather(device, dtype, kind, reduce):
    for name, x, _, layout in feature_cases(dtype, device):
        num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
        layout_in, layout_out, assign, alive, weight = random_assignment(num_tokens, device)
        weight = {"ones": None, "binary": alive, "weighted": weight}[kind]
        ones = torch.ones(num_tokens, device=device)
        size = torch.zeros(42, device=device).index_add(0, assign.long(), ones if weight is None else weight)
        cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_in.max_seqlen)
        args = (assign, size, weight, *cu, reduce, kind != "weighted", layout)
        y = on_triton(merge_op, x, *args)
        assert_close(y, reference.merge(x.double(), *args), reference.merge(x, *args), name=f"merge {name}")
        assert bool((y[size == 0] == 0).all())
        args = (assign, size if reduce == "mean" else None, weight, layout)
        rows = on_triton(gather_op, y, *args)
        assert_close(rows, reference.gather(y.double(), *args), reference.gather(y, *args), name=f"gather {name}")


def merge_arguments(assign, weight, layout_in, layout_out, reduce, binary, layout, hub):
    """Arguments of merge_op for a random assignment, of which a hub takes every token of the first segment."""
    if hub:
        assign = torch.where(torch.arange(assign.shape[0], device=assign.device) < layout_in.lengths[0], 3, assign)
    total = torch.ones(assign.shape[0], device=assign.device) if weight is None else weight
    size = torch.zeros(42, device=assign.device).index_add(0, assign.long(), total)
    cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_out.max_seqlen)
    return assign, size, weight, *cu, reduce, binary, layout


@pytest.mark.parametrize(
    ("name", "dtype", "kind", "reduce", "hub"),
    [
        ("strided", torch.float32, "weighted", "mean", True),
        ("vit", torch.bfloat16, "binary", "mean", True),
        ("packed", torch.float16, "ones", "sum", False),
    ],
)
def test_merge_group_by_group(device, monkeypatch, name, dtype, kind, reduce, hub):
    """Past ONE_HOT_ROWS rows; the hub's group is cut into pieces, the segment with few rows stays a product."""
    monkeypatch.setattr("lrc_kernels.tome.triton_kernels.ONE_HOT_ROWS", 16)
    ((x, layout),) = [(case[1], case[3]) for case in feature_cases(dtype, device) if case[0] == name]
    num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
    layout_in, layout_out, assign, alive, weight = random_assignment(num_tokens, device)
    weight = {"ones": None, "binary": alive, "weighted": weight}[kind]
    args = merge_arguments(assign, weight, layout_in, layout_out, reduce, kind != "weighted", layout, hub)
    y = on_triton(merge_op, x, *args)
    assert_close(y, reference.merge(x.double(), *args), reference.merge(x, *args))
    assert torch.equal(on_triton(merge_op, x, *args), y)


@pytest.mark.parametrize(
    ("name", "dtype", "hub"),
    [("packed", torch.float32, True), ("vit", torch.bfloat16, True), ("packed", torch.float16, False)],
)
def test_maximum_and_its_gradient(device, name, dtype, hub):
    ((x, layout),) = [(case[1], case[3]) for case in feature_cases(dtype, device) if case[0] == name]
    # Few values: maxima tie, and the first token that attains one has its gradient.
    x = x.mul(2).round()
    x[1, -1], x[0, 0] = torch.nan, -torch.inf
    num_tokens = reference.tokens_of(x, layout).flatten(0, -2).shape[0]
    layout_in, layout_out, assign, alive, _ = random_assignment(num_tokens, device)
    args = merge_arguments(assign, alive, layout_in, layout_out, "max", True, layout, hub)
    y = on_triton(merge_op, x, *args)
    torch.testing.assert_close(y, reference.merge(x, *args), rtol=0, atol=0, equal_nan=True)
    grad = make_input("gaussian", y.shape, dtype=dtype, device=device, seed=15)
    backward = (grad, x, y, args[0], alive, layout)
    assert torch.equal(on_triton(max_backward_op, *backward), reference.max_backward(*backward))


@pytest.mark.no_poison
def test_offsets_past_two_to_the_31(device):
    """Frames 2^31 elements apart: only their pages are touched."""
    memory = torch.empty(2**31 + 2048, dtype=torch.float16, device=device)
    x = memory.as_strided((2, 25, 16), (2**31, 16, 1))
    x.copy_(make_input("gaussian", (2, 25, 16), dtype=torch.float16, device=device))
    near = x.clone()
    assert torch.equal(on_triton(head_mean_op, x, 2, []), on_triton(head_mean_op, near, 2, []))
    plan = on_triton(plan_merge, on_triton(head_mean_op, near, 2, []).view(2, 25, 8), target=6)
    for reduce in ("mean", "max"):
        assert torch.equal(
            on_triton(merge_tokens, x, plan, reduce=reduce), on_triton(merge_tokens, near, plan, reduce=reduce)
        )
    rows = x.transpose(0, 1)[:2, :, :].transpose(0, 1)[:, 0]
    assign = torch.tensor([1, 0, 1], dtype=torch.int32, device=device)
    assert torch.equal(on_triton(gather_op, rows, assign, None, None, []), rows[assign.long()])


class Counted:
    """A kernel that notes its name at each launch."""

    def __init__(self, name, kernel, launched):
        self.name, self.kernel, self.launched = name, kernel, launched

    def __getitem__(self, grid):
        self.launched.append(self.name)
        return self.kernel[grid]


def test_one_clip_takes_twelve_launches(device, monkeypatch):
    from lrc_kernels.tome import triton_groups, triton_kernels, triton_plan, triton_step

    launched = []
    for module in (triton_groups, triton_kernels, triton_plan, triton_step):
        for name in dir(module):
            if name.startswith("tome_") and name.endswith("_kernel"):
                monkeypatch.setattr(module, name, Counted(name, getattr(module, name), launched))
    on_triton(compress_clips, make_input("gaussian", (1, 64, 32), device=device), 4, 2)
    assert len(launched) == 12 and sum("match" in name for name in launched) == 4
    launched.clear()
    on_triton(compress_clips, make_input("gaussian", (1, 49, 32), device=device), 4, 2)
    assert len(launched) == 16 and sum("rank" in name for name in launched) == 4


@pytest.mark.gpu
@pytest.mark.no_poison
def test_one_clip_is_one_cuda_graph_without_synchronisation(device):
    x = make_input("gaussian", (1, 2048, 1024), dtype=torch.bfloat16, device=device)
    for _ in range(3):
        on_triton(compress_clips, x, 128, 16)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        on_triton(compress_clips, x, 128, 16)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = on_triton(compress_clips, x, 128, 16)
    x.copy_(make_input("gaussian", x.shape, dtype=x.dtype, device=device, seed=7))
    graph.replay()
    assert torch.equal(captured, on_triton(compress_clips, x, 128, 16))


def test_opcheck(device):
    x = make_input("gaussian", (2, 12, 8), device=device)
    plan = on_triton(plan_merge, x, target=3)
    cu = (plan.layout_in.cu_seqlens, plan.layout_out.cu_seqlens)
    y = on_triton(merge_tokens, x, plan, reduce="max").flatten(0, 1)
    budget = merge_budget(plan.layout_in, target=3)
    options = (None, "fp32", "reference", "reference", 1)
    calls = {
        "tome_head_mean_fwd": (x, 2, []),
        "tome_plan_fwd": (x.flatten(0, 1), *cu, budget.r, None, None, None, 6, 12, *options),
        "tome_merge_fwd": (x, plan.assign, plan.size, None, *cu, 6, 3, "max", True, []),
        "tome_merge_max_bwd": (y, x, y, plan.assign, None, []),
        "tome_gather_fwd": (y, plan.assign, plan.size, None, []),
    }
    with use_backend("triton"):
        for name, args in calls.items():
            torch.library.opcheck(getattr(torch.ops.lrc, name).default, args)


@pytest.mark.parametrize(("dtype", "binary"), [(torch.float32, True), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("values", [(torch.nan,), (-torch.inf,), (torch.inf, -torch.inf), (torch.inf, torch.inf)])
def test_non_finite_features_stay_in_their_row(device, dtype, binary, values):
    x = make_input("gaussian", (90, 24), dtype=dtype, device=device, seed=12)
    layout_in, layout_out, assign, alive, weight = random_assignment(90, device)
    weight = alive if binary else weight
    assign[20:22], weight[20:22] = 3, 1.0
    weight[30] = 0
    size = torch.zeros(42, device=device).index_add(0, assign.long(), weight)
    cu = (layout_in.cu_seqlens, layout_out.cu_seqlens, 42, layout_in.max_seqlen)
    args = (assign, size, weight, *cu, "mean", binary, [])
    clean = on_triton(merge_op, x, *args)
    for i, value in enumerate(values):
        x[20 + i, 7] = value
    x[30, 8] = torch.nan
    y = on_triton(merge_op, x, *args)
    wanted = reference.merge(x.double(), *args)
    torch.testing.assert_close(y[3, 7].double(), wanted[3, 7], rtol=0, atol=0, equal_nan=True)
    y[3, 7] = clean[3, 7]
    assert torch.equal(y, clean)
    rows = on_triton(gather_op, x, torch.arange(90, device=device, dtype=torch.int32), None, weight, [])
    assert bool(rows[30].eq(0).all()) and int((~rows.isfinite()).sum()) == len(values)


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_and_its_gradient(device, dtype):
    layout = TokenLayout(clip_frames=2, grid=(8, 12), shuffle=2, prefix=1)
    x = make_input("gaussian", (4, 97, 16), dtype=dtype, device=device, seed=13)
    results = {}
    for backend in ("triton", "reference"):
        leaf = x.clone().requires_grad_()
        with use_backend(backend), record() as ran:
            y, plan = compress_clips(leaf, 7, 4, layout=layout, return_plan=True)
            y.float().square().sum().backward()
            back = unmerge_tokens(y, plan)
        assert {name for _, name in ran} == {backend} and len(ran) == 5
        results[backend] = (plan, y.detach(), leaf.grad, back.detach())
    (plan, y, grad, back), (plan_, y_, grad_, back_) = results["triton"], results["reference"]
    assert_same_plan(plan, plan_)
    exact = on_reference(merge_tokens, x.double(), plan_, layout=layout)
    assert_close(y, exact, y_)
    tolerance = {"rtol": 4 * torch.finfo(dtype).eps, "atol": 1e-6}
    torch.testing.assert_close(grad, grad_, **tolerance)
    torch.testing.assert_close(back, back_, **tolerance)
    assert bool((grad[:, 0] == 0).all())


def test_empty_inputs(device):
    none = VarlenLayout([], device)
    empty = torch.zeros(0, 8, device=device)
    for layout in (none, VarlenLayout([0, 0], device)):
        plan = on_triton(plan_merge, empty, merge_budget(layout, r=[1]))
        assert plan.assign.shape == plan.size.shape == (0,)
        assert on_triton(merge_tokens, empty, plan).shape == (0, 8)
        assert on_triton(unmerge_tokens, empty, plan).shape == (0, 8)
    assert on_triton(head_mean_op, torch.zeros(2, 0, 8, device=device), 2, []).shape == (0, 4)
    one = on_triton(plan_merge, torch.ones(3, 1, 8, device=device), target=1)
    assert one.assign.tolist() == [0, 1, 2] and one.size.tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    ("dtype", "options", "reason"),
    [(torch.float32, {"precision": "eager_bf16"}, "features"), (torch.float64, {}, "float64")],
)
def test_what_the_plan_declines(device, dtype, options, reason):
    metric = make_input("gaussian", (1, 8, 4), device=device, dtype=dtype)
    with use_backend("triton"), pytest.raises(RuntimeError, match=reason):
        plan_merge(metric, r=2, **options)


def test_what_the_others_decline(device):
    x = make_input("gaussian", (1, 8, 4), device=device)
    plan = on_triton(plan_merge, x, r=2)
    with use_backend("triton"):
        for call in (lambda: head_mean_op(x.double(), 2, []), lambda: merge_tokens(x.double(), plan)):
            with pytest.raises(RuntimeError, match="float64"):
                call()
