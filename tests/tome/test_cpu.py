# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of every instruction set of this machine against the fp64 reference, and what must hold bitwise."""

import dataclasses

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout, native
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, assert_equal_index, make_input
from lrc_kernels.tome import (
    MergeBudget,
    TokenLayout,
    compress_clips,
    head_mean,
    merge_budget,
    merge_tokens,
    op,
    plan_merge,
    reference,
    unmerge_tokens,
)

if native.cpu_unavailable() is not None:
    pytest.skip(native.cpu_unavailable(), allow_module_level=True)

from lrc_kernels import _C

ISAS = _C.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
MARGIN = 1e-5
PROPERTY = settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.filter_too_much])


@pytest.fixture(autouse=True)
def cpu_backend():
    """Every op runs on the cpu backend or raises, but for the references that a test asks for by name."""
    best = _C.cpu_isa()
    with use_backend("cpu"), record() as ran:
        yield ran
    _C.set_cpu_isa(best)
    assert not ran or "cpu" in {backend for _, backend in ran}


@pytest.fixture(params=ISAS)
def isa(request):
    _C.set_cpu_isa(request.param)
    return request.param


def tokens_in_any_form(form, batch, n, width, dtype, generator):
    """(x, layout): dense, a slice without its first token, every second token, transposed, packed, or a ViT output."""
    if form == "vit":
        layout = TokenLayout(clip_frames=2, grid=(4, 2 * n), shuffle=2, prefix=1)
        return torch.randn(2 * batch, layout.rows_per_frame, width, generator=generator).to(dtype), layout
    if form == "packed":
        return torch.randn(n, width, generator=generator).to(dtype), None
    if form == "every second":
        return torch.randn(batch, 2 * n, width, generator=generator).to(dtype)[:, ::2], None
    if form == "transposed":
        return torch.randn(width, batch, n, generator=generator).to(dtype).permute(1, 2, 0), None
    return torch.randn(batch, n + 1, width, generator=generator).to(dtype)[:, 1:], None


FORMS = st.sampled_from(["dense", "every second", "transposed", "packed", "vit"])


@PROPERTY
@given(
    form=FORMS,
    batch=st.integers(1, 3),
    n=st.integers(1, 9),
    heads=st.integers(1, 6),
    head_dim=st.sampled_from([1, 3, 8, 16, 20, 88, 128, 136, 260]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_head_mean(form, batch, n, heads, head_dim, dtype, isa, seed):
    x, layout = tokens_in_any_form(form, batch, n, heads * head_dim, dtype, torch.Generator().manual_seed(seed))
    _C.set_cpu_isa(isa)
    ints = layout.as_ints() if layout else []
    metric = head_mean(x, heads, layout=layout).flatten(0, -2)
    same = reference.head_mean(x, heads, ints)
    assert_close(metric, reference.head_mean(x.double(), heads, ints), same, name=isa)


def test_heads_that_straddle_the_pieces_of_a_token(random, isa):
    layout = TokenLayout(clip_frames=1, grid=(2, 4), shuffle=2, prefix=1)
    x = torch.randn(3, 9, 6, generator=random)
    same = reference.head_mean(x, 6, layout.as_ints())
    metric = head_mean(x, 6, layout=layout).flatten(0, -2)
    assert_close(metric, reference.head_mean(x.double(), 6, layout.as_ints()), same)


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


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf, -torch.inf])
def test_spoiled_token_touches_nothing_else(spoil, isa, random):
    x = torch.randn(3, 48, 32, generator=random)
    clean, clean_plan = compress_clips(x, 6, 4, return_plan=True)
    x[1, 10] = spoil
    y, plan = compress_clips(x, 6, 4, return_plan=True)
    for clip in (0, 2):
        assert torch.equal(y[clip], clean[clip])
        rows = slice(48 * clip, 48 * clip + 48)
        assert torch.equal(plan.assign[rows], clean_plan.assign[rows])
    assert plan.weight[48 + 10] == 0 and plan.size.view(3, 6).sum(1).tolist() == [48, 47, 48]
    assert y.isfinite().all()
    # By a fixed plan a value reaches its own row alone, whatever it is.
    spoiled = merge_tokens(x, clean_plan).flatten(0, 1)
    others = torch.arange(18) != clean_plan.assign[48 + 10]
    assert torch.equal(spoiled[others], clean.flatten(0, 1)[others])


def test_every_token_spoiled(isa):
    y, plan = compress_clips(torch.zeros(2, 33, 16), 5, 2, return_plan=True)
    with use_backend("reference"), record() as ran:
        expected = compress_clips(torch.zeros(2, 33, 16), 5, 2, return_plan=True)[1]
    assert {backend for _, backend in ran} == {"reference"}
    assert torch.equal(plan.assign, expected.assign) and torch.equal(plan.size, expected.size)
    assert torch.equal(y, torch.zeros(2, 5, 16))


def random_plan(num_tokens, num_out, weights, generator):
    """A plan with any assignment, so that groups of 0, 1 and many tokens occur."""
    hub = torch.rand(num_tokens, generator=generator) < 0.5
    assign = torch.where(hub, 0, torch.randint(num_out, (num_tokens,), generator=generator)).int()
    weight = None
    if weights != "none":
        high = 1.0 if weights == "binary" else 3.0
        weight = (torch.rand(num_tokens, generator=generator) * (1 + high)).floor()
        weight = weight if weights == "binary" else weight * torch.rand(num_tokens, generator=generator)
    ones = torch.ones(num_tokens) if weight is None else weight
    return assign, torch.zeros(num_out).index_add(0, assign.long(), ones), weight


@PROPERTY
@given(
    form=FORMS,
    batch=st.integers(1, 3),
    n=st.integers(1, 17),
    width=st.sampled_from([1, 3, 16, 40, 88, 130, 2050]),
    num_out=st.integers(1, 9),
    weights=st.sampled_from(["none", "binary", "real"]),
    reduce=st.sampled_from(["mean", "sum"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_merge_and_gather(form, batch, n, width, num_out, weights, reduce, dtype, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    x, layout = tokens_in_any_form(form, batch, n, width, dtype, generator)
    ints = layout.as_ints() if layout else []
    num_tokens = reference.tokens_of(x, ints).flatten(0, -2).shape[0]
    assign, size, weight = random_plan(num_tokens, num_out, weights, generator)
    if weights == "binary":
        x = spoil_rows(x, ints, weight == 0)
        size[-1] = 0
    cu = torch.zeros(2, dtype=torch.int64)
    rest = (weight, cu, cu, num_out, num_tokens, reduce, weights != "real", ints)
    _C.set_cpu_isa(isa)
    y = op.merge_op(x, assign, size, *rest)
    assert_close(y, reference.merge(x.double(), assign, size, *rest), reference.merge(x, assign, size, *rest), name=isa)
    for divisor in (None, size):
        back = op.gather_op(y, assign, divisor, weight, ints)
        expected = reference.gather(y.double(), assign, divisor, weight, ints)
        assert_close(back, expected, reference.gather(y, assign, divisor, weight, ints), name=isa)


def spoil_rows(x, ints, tokens):
    """x with NaN in these tokens: a token of weight 0 must not be read into any sum."""
    mark = torch.zeros(reference.tokens_of(x, ints).flatten(0, -2).shape)
    mark[tokens] = 1.0
    where = reference.rows_of(mark, ints).reshape(x.shape) if ints else mark.reshape(x.shape)
    return torch.where(where > 0, torch.nan, x.float()).to(x.dtype)


def test_backward_of_the_merge_runs_on_the_kernels(isa, random, cpu_backend):
    layout = TokenLayout(clip_frames=2, grid=(8, 8), shuffle=2, prefix=1)
    x = torch.randn(4, layout.rows_per_frame, 24, generator=random, requires_grad=True)
    y, plan = compress_clips(x, 4, 8, layout=layout, return_plan=True)
    grad = torch.randn(y.shape, generator=random)
    y.backward(grad)
    assert ("tome_gather_fwd", "cpu") in cpu_backend
    share = (plan.weight / plan.size[plan.assign.long()])[:, None] * grad.flatten(0, 1)[plan.assign.long()]
    torch.testing.assert_close(x.grad, reference.rows_of(share, layout.as_ints()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_of_every_16_bit_pattern(dtype, isa):
    """A merge of single tokens is load and store: each bit pattern comes back, and sums round to nearest even."""
    if dtype == torch.float32:
        x = torch.tensor([0.0, 1e-45, 1e-38, 3e38, torch.inf, -torch.inf, torch.nan, -1.5] * 8).view(1, 64)
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1024, 64)
    n = x.shape[0]
    plan = plan_merge(torch.randn(n, 4), merge_budget(VarlenLayout([n]), r=0))
    assert torch.equal(merge_tokens(x, plan).nan_to_num(7.0), x.nan_to_num(7.0))
    halves = torch.stack([x, x.roll(1, 0).roll(5, 1)], 1).flatten(0, 1)
    cu = torch.zeros(2, dtype=torch.int64)
    assign = torch.arange(2 * n).div(2, rounding_mode="floor").int()
    y = op.merge_op(halves, assign, torch.full((n,), 2.0), None, cu, cu, n, 2 * n, "sum", True, [])
    assert torch.equal(y.nan_to_num(7.0), (halves[0::2].float() + halves[1::2].float()).to(dtype).nan_to_num(7.0))


def test_nan_stays_nan_whatever_its_bits(isa):
    """Rounding to bf16 carries into the exponent: a NaN with all lower bits set must not become -0."""
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        y = torch.ones(1, 40, dtype=dtype)
        assert op.gather_op(y, torch.zeros(2, dtype=torch.int32), None, nan, []).isnan().all()


def test_half_of_the_tokens_in_one_group(isa, random):
    x = torch.randn(1, 512, 96, generator=random)
    metric = torch.randn(1, 512, 8, generator=random)
    metric[:, 0::2] = 5 * metric[:, 255:256] + 0.01 * metric[:, 0::2]
    plan = plan_merge(metric, target=256)
    assert plan.size.max() == 257
    y = merge_tokens(x, plan)
    with use_backend("reference"):
        assert_close(y, merge_tokens(x.double(), plan), merge_tokens(x, plan))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_again_and_on_two_threads(dtype, isa, random):
    x = torch.randn(3, 130, 88 * 2, generator=random).to(dtype)
    y, plan = compress_clips(x, 17, 2, return_plan=True)
    assert torch.equal(compress_clips(x, 17, 2), y)
    for clip in range(3):
        assert torch.equal(compress_clips(x[clip : clip + 1], 17, 2)[0], y[clip])
    torch.set_num_threads(2)
    try:
        assert torch.equal(compress_clips(x, 17, 2), y)
        assert torch.equal(unmerge_tokens(y, plan), y.flatten(0, 1)[plan.assign.long()].view(x.shape))
        # One clip on two threads shares its matching, several clips share the clips.
        assert torch.equal(compress_clips(x[:1], 17, 2)[0], y[0])
    finally:
        torch.set_num_threads(1)


@pytest.mark.no_poison
def test_offsets_past_two_billion_elements(isa, random):
    """The pages between the two clips are never touched, so that 4 GiB of addresses cost no memory."""
    far = torch.empty(2**31 + 2**12, dtype=torch.bfloat16).as_strided((2, 16, 64), (2**31, 64, 1))
    x = torch.randn(2, 16, 64, generator=random).bfloat16()
    far.copy_(x)
    assert torch.equal(compress_clips(far, 4, 4), compress_clips(x, 4, 4))


def test_empty_inputs(isa):
    y, plan = compress_clips(torch.zeros(0, 16, 8), 4, 2, return_plan=True)
    assert y.shape == (0, 4, 8) and plan.assign.shape == (0,)
    empty = plan_merge(torch.zeros(0, 4), merge_budget(VarlenLayout([0, 0]), r=[3, 1]))
    assert merge_tokens(torch.zeros(0, 9), empty).shape == (0, 9)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"zero_policy": "reference"}, "zero_policy"),
        ({"precision": "bf16"}, "precision"),
    ],
)
def test_plan_declines(options, reason, random):
    metric = torch.randn(1, 8, 4, generator=random)
    with pytest.raises(RuntimeError, match=reason):
        plan_merge(metric, target=4, **options)


def test_declines_fp64_and_max(random):
    x = torch.randn(1, 8, 4, generator=random)
    plan = plan_merge(x, target=4)
    for call in (
        lambda: head_mean(x.double(), 2),
        lambda: plan_merge(x.double(), target=4),
        lambda: merge_tokens(x.double(), plan),
        lambda: unmerge_tokens(x[:, :4].double(), plan),
    ):
        with pytest.raises(RuntimeError, match="fp32"):
            call()
    with pytest.raises(RuntimeError, match="max"):
        merge_tokens(x, plan, reduce="max")


def test_a_plan_that_does_not_fit_is_refused(random):
    x = torch.randn(1, 8, 4, generator=random)
    plan = plan_merge(x, target=4)
    with pytest.raises(ValueError, match=r"assign must lie in \[0, 4\), got 4 for token 7"):
        merge_tokens(x, dataclasses.replace(plan, assign=torch.tensor([0] * 7 + [4], dtype=torch.int32)))
    short = MergeBudget(VarlenLayout([8]), VarlenLayout([3]), torch.tensor([[4]], dtype=torch.int32))
    with pytest.raises(ValueError, match="room"):
        plan_merge(x.flatten(0, 1), short)


def test_instruction_set_is_checked():
    with pytest.raises(ValueError, match="baseline, avx2, avx512 or avx512_bf16, got sse9"):
        _C.set_cpu_isa("sse9")
    assert native.cpu_isa() == _C.cpu_isa() and native.cpu_isa() in ISAS
