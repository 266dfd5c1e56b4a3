# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the matching schedule, executed on the host with emulated matrix instructions and clusters."""

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.testing import make_input
from lrc_kernels.tome import merge_budget, native, reference

MARGIN = 1e-5


def plan(host_kernels, metric, budget, *, size=None, protected=None, destination=None, threshold=None,
         precision="fp32", order="reference", zero_policy="isolate", team=1, reverse=False):  # fmt: skip
    """(assign, size, weight, anchor, valid) of the kernel."""
    layout_out = budget.layout_out if threshold is None else budget.layout_in
    total, num_out = metric.shape[0], layout_out.num_tokens
    assign, anchor = torch.full((total,), -7, dtype=torch.int32), torch.full((num_out,), -7, dtype=torch.int32)
    weight, size_out = torch.empty(total), torch.empty(num_out)
    valid = torch.full((num_out,), 7, dtype=torch.uint8)
    host_kernels.call(
        "plan_merge",
        *(metric, total, metric.shape[1], budget.layout_in.cu_seqlens, layout_out.cu_seqlens),
        *(budget.layout_in.num_sequences, budget.layout_in.max_seqlen, budget.r, budget.num_iterations),
        *(size, protected, destination, None if threshold is None else torch.tensor([threshold])),
        *(precision == "bf16", order == "position", zero_policy == "isolate", team),
        *(assign, weight, size_out, anchor, valid),
        reverse=reverse,
    )
    assert bool((valid <= 1).all())
    return assign, size_out, weight, anchor, valid.bool()


def reference_plan(metric, budget, *, size=None, protected=None, destination=None, threshold=None, precision="fp32",
                   order="reference", zero_policy="isolate"):  # fmt: skip
    layout_out = budget.layout_out if threshold is None else budget.layout_in
    return reference.plan(
        metric, budget.layout_in.cu_seqlens, layout_out.cu_seqlens, budget.r, size, protected, destination,
        layout_out.num_tokens, budget.layout_in.max_seqlen, threshold, precision, order, zero_policy, 1,
    )  # fmt: skip


def assert_same_plan(got, wanted):
    for name, mine, theirs in zip(("assign", "size", "weight", "anchor", "valid"), got, wanted, strict=True):
        if name == "size":
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        else:
            assert torch.equal(mine, theirs), name


def check(host_kernels, metric, budget, **options):
    kernel = {name: options.pop(name) for name in ("team", "reverse") if name in options}
    got = plan(host_kernels, metric, budget, **options, **kernel)
    assert_same_plan(got, reference_plan(metric.double(), budget, **options))
    return got


def is_close_call(metric, budget, **options):
    """Whether noise far below the margin rule's 1e-5 per score, drawn eight times, changes the plan in fp64."""
    generator = torch.Generator().manual_seed(0)
    wanted = reference_plan(metric.double(), budget, **options)
    for _ in range(8):
        noise = 1 + 3e-5 * torch.randn(metric.shape, generator=generator, dtype=torch.float64)
        other = reference_plan(metric.double() * noise, budget, **options)
        if not (torch.equal(other[0], wanted[0]) and torch.equal(other[3], wanted[3])):
            return True
    return False


@pytest.mark.parametrize(
    ("lengths", "width", "budget_of"),
    [
        ([96], 64, {"target": 6}),
        ([70, 0, 33, 1], 20, {"target": [9, 0, 5, 1]}),
        ([33, 57, 2], 88, {"r": [8, 0, 9]}),
        ([49, 7], 1, {"r": 0}),
        ([40], 200, {"target": 12}),
        ([64], 128, {"target": 16}),
        ([290], 16, {"target": 30}),
    ],
    ids=str,
)
@pytest.mark.parametrize("order", ["reference", "position"])
def test_plan_equals_the_reference(host_kernels, lengths, width, budget_of, order):
    layout = VarlenLayout(lengths)
    metric = make_input("gaussian", (layout.num_tokens, width), seed=1)
    check(host_kernels, metric, merge_budget(layout, **budget_of), order=order)


@settings(max_examples=25, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 3, 9, 33, 64, 101]), min_size=1, max_size=3),
    width=st.sampled_from([1, 2, 15, 24, 72, 88, 144]),
    r=st.lists(st.integers(0, 40), min_size=1, max_size=3),
    num_protected=st.integers(0, 2),
    weights=st.sampled_from(["none", "real", "with zeros"]),
    value=st.sampled_from([0.0, torch.nan, torch.inf, 1e30, 1e-40]),
    spoiled=st.sampled_from(["none", "one", "half"]),
    order=st.sampled_from(["reference", "position"]),
    team=st.sampled_from([1, 2]),
    reverse=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_any_plan(host_kernels, lengths, width, r, num_protected, weights, value, spoiled, order, team, reverse, seed):
    generator = torch.Generator().manual_seed(seed)
    layout, total = VarlenLayout(lengths), sum(lengths)
    metric = torch.randn(total, width, generator=generator)
    victims = torch.rand(total, generator=generator) < (0.5 if spoiled == "half" and value in (0.0, torch.nan) else 0.0)
    if spoiled == "one" and total:
        victims[torch.randint(total, (), generator=generator)] = True
    metric[victims] *= value
    size = {
        "none": None,
        "real": torch.rand(total, generator=generator) + 0.1,
        "with zeros": torch.randint(0, 3, (total,), generator=generator).float(),
    }[weights]
    protected = torch.zeros(total, dtype=torch.bool)
    for start, n in zip(layout.cu_seqlens.tolist(), lengths, strict=False):
        protected[start + torch.randperm(n, generator=generator)[:num_protected]] = True
    budget = merge_budget(layout, r=r, num_protected=num_protected)
    options = {"size": size, "protected": protected, "order": order}
    assume(not is_close_call(metric, budget, **options))
    check(host_kernels, metric, budget, team=team, reverse=reverse, **options)


@settings(max_examples=15, deadline=None)
@given(
    n=st.integers(2, 60),
    threshold=st.sampled_from([None, -0.2, 0.3, 0.8]),
    by_destination=st.booleans(),
    team=st.sampled_from([1, 2]),
    seed=st.integers(0, 2**31),
)
def test_threshold_and_destination(host_kernels, n, threshold, by_destination, team, seed):
    generator = torch.Generator().manual_seed(seed)
    metric = torch.randn(n, 12, generator=generator)
    destination = None
    if by_destination:
        destination = torch.rand(n, generator=generator) < 0.4
        destination[torch.randint(n, (), generator=generator)] = True
    sources = (n + 1) // 2 if destination is None else int((~destination).sum())
    budget = merge_budget(VarlenLayout([n]), r=min(sources, n // 2, 1 + seed % n))
    options = {"threshold": threshold, "destination": destination}
    assume(not is_close_call(metric, budget, **options))
    check(host_kernels, metric, budget, team=team, **options)


def test_destination_over_several_rounds_of_a_block(host_kernels):
    generator = torch.Generator().manual_seed(3)
    metric = torch.randn(600, 4, generator=generator)
    destination = torch.arange(600) % 4 == 2
    metric[2], metric[3], metric[301] = 0.0, torch.nan, torch.nan
    budget = merge_budget(VarlenLayout([600]), r=[300])
    options = {"destination": destination}
    got = plan(host_kernels, metric, budget, **options)
    assert_same_plan(plan(host_kernels, metric, budget, team=4, reverse=True, **options), got)
    wanted = reference_plan(metric.double(), budget, **options)
    assert float((got[0] == wanted[0]).float().mean()) > 0.99


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("width", [48, 130])
def test_equal_tokens_merge_into_the_first(host_kernels, precision, width):
    # Integers, so that a mean of equal rows is that row exactly.
    metric = torch.randint(-3, 4, (1, width), generator=torch.Generator().manual_seed(0)).float().repeat(70, 1)
    budget = merge_budget(VarlenLayout([70]), r=[20, 15])
    assert_same_plan(
        plan(host_kernels, metric, budget, precision=precision),
        reference_plan(metric, budget, precision=precision),
    )


def test_two_tied_columns_far_apart(host_kernels):
    """The same best partner in every tile of columns, and in every lane of a quad: the lowest index wins."""
    generator = torch.Generator().manual_seed(1)
    metric = torch.randn(300, 8, generator=generator)
    metric[1::2] = metric[1:17:2].repeat(19, 1)[:150]
    budget = merge_budget(VarlenLayout([300]), r=[150])
    assign = check(host_kernels, metric, budget)[0]
    assert int(assign[0::2].max()) < 8


@pytest.mark.parametrize("broken", [0.0, torch.nan, torch.inf])
def test_broken_tokens_under_the_reference_policy(host_kernels, broken):
    generator = torch.Generator().manual_seed(2)
    metric = torch.randn(2, 40, 16, generator=generator)
    metric[0, 9] = broken
    budget = merge_budget(VarlenLayout([40, 40]), r=[12])
    check(host_kernels, metric.flatten(0, 1), budget, zero_policy="reference")


def test_all_tokens_broken(host_kernels):
    metric = torch.full((33, 8), torch.nan)
    protected = torch.zeros(33, dtype=torch.bool)
    protected[[1, 7, 31]] = True
    budget = merge_budget(VarlenLayout([33]), r=[9, 4], num_protected=3)
    assign, size, weight, _, _ = check(host_kernels, metric, budget, protected=protected)
    assert int((weight == 0).sum()) == 13 and float(size.sum()) == 20
    assert bool((size[assign[protected].long()] == 1).all())


def test_a_hub_of_nearly_all_tokens(host_kernels):
    """One group over many chunks of the list, beside groups that begin and end within one."""
    generator = torch.Generator().manual_seed(4)
    metric = torch.randn(300, 24, generator=generator)
    metric[0:280:2] = metric[101] + 0.01 * torch.randn(140, 24, generator=generator)
    budget = merge_budget(VarlenLayout([300]), r=[150, 75])
    size = torch.rand(300, generator=generator) + 0.5
    got = plan(host_kernels, metric, budget, size=size)
    wanted = reference_plan(metric.double(), budget, size=size)
    assert_same_plan(got, wanted)
    assert float(got[1].max()) > 100


def test_bf16_scores_are_rounded(host_kernels):
    metric = make_input("gaussian", (90, 64), seed=5)
    assign, _, _, _, _ = plan(host_kernels, metric, merge_budget(VarlenLayout([90]), r=45), precision="bf16")
    wanted = reference_plan(metric, merge_budget(VarlenLayout([90]), r=45), precision="bf16")[0]
    # A sum in another order may round to the neighbouring bf16 number, which ties or unties a few rows.
    assert float((assign == wanted).float().mean()) > 0.95
    # In the ranking, tied scores go by index; in fp32 they do not tie.
    tied = torch.tensor([[1.0, 0.0], [1.0, 0.0], [1.0, 0.02], [0.0, 1.0]])
    budget = merge_budget(VarlenLayout([4]), r=1)
    assert plan(host_kernels, tied[[2, 1, 0, 3]], budget, precision="bf16")[0].tolist() == [1, 1, 0, 2]
    assert plan(host_kernels, tied[[2, 1, 0, 3]], budget)[0].tolist() == [0, 1, 1, 2]


def test_the_result_depends_on_neither_team_nor_batch_nor_order(host_kernels):
    lengths = [41, 0, 280, 12]
    metric = make_input("video_like", (sum(lengths), 40), seed=6)
    budget = merge_budget(VarlenLayout(lengths), target=[5, 0, 64, 12])
    whole = plan(host_kernels, metric, budget)
    for team, reverse in ((2, True), (8, False)):
        for mine, theirs in zip(plan(host_kernels, metric, budget, team=team, reverse=reverse), whole, strict=True):
            assert torch.equal(mine, theirs)
    first = start = 0
    for n, kept in zip(lengths, (5, 0, 64, 12), strict=True):
        alone = plan(host_kernels, metric[start : start + n].clone(), merge_budget(VarlenLayout([n]), target=kept))
        assert torch.equal(alone[0] + first, whole[0][start : start + n])
        assert torch.equal(alone[1], whole[1][first : first + kept])
        start, first = start + n, first + kept


@pytest.mark.parametrize("kind", ["gaussian", "video_like"])
def test_each_iteration_from_the_same_state(host_kernels, kind):
    """Decisions are those of fp64 wherever the best partner is clear by 1e-5."""
    metric, sure_tokens = make_input(kind, (256, 32), seed=7), []
    while (rows := metric.shape[0]) > 16:
        budget = merge_budget(VarlenLayout([rows]), r=rows // 2)
        assign = plan(host_kernels, metric, budget)[0].long()
        unit = torch.nn.functional.normalize(metric.double(), dim=-1)
        best = (unit[0::2] @ unit[1::2].T).topk(2, dim=1)
        sure = best.values.diff(dim=1)[:, 0].abs() > MARGIN
        assert torch.equal(assign[0::2][sure], best.indices[sure, 0])
        assert torch.equal(assign[1::2], torch.arange(rows // 2))
        sure_tokens.append(sure.float().mean())
        metric, _ = reference.weighted_mean(metric, torch.ones(rows), assign, rows // 2)
    assert min(sure_tokens) > 0.5


def test_halving_anchors(host_kernels):
    metric = make_input("gaussian", (128, 16), seed=8)
    anchor = plan(host_kernels, metric, merge_budget(VarlenLayout([128]), target=16))[3]
    assert torch.equal(anchor, 8 * torch.arange(16, dtype=torch.int32) + 7)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"num_channels": 0}, "num_channels must be >= 1, got 0"),
        ({"team": 3}, "team must be 1, 2, 4 or 8, got 3"),
        ({"max_seqlen": 65537}, "max_seqlen must be <= 65536, got 65537"),
        ({"num_iterations": 2, "destination": torch.zeros(4, dtype=torch.bool)}, "destination fixes set B .* got 2"),
        ({"num_segments": -1}, "num_segments must be >= 0, got -1"),
    ],
)
def test_bad_arguments(host_kernels, change, message):
    x = torch.zeros(64)
    names = ["metric", "num_tokens", "num_channels", "cu_in", "cu_out", "num_segments", "max_seqlen", "r",
             "num_iterations", "size", "protected", "destination", "threshold", "bf16", "position_order", "isolate",
             "team", "assign", "weight", "size_out", "anchor", "valid"]  # fmt: skip
    values = [x, 4, 2, x, x, 1, 4, x, 1, None, None, None, None, 0, 0, 1, 1, x, x, x, x, x]
    call = {**dict(zip(names, values, strict=True)), **change}
    with pytest.raises(RuntimeError, match=message):
        host_kernels.call("plan_merge", *call.values())


def test_blocks_per_segment():
    """H100: 132 multiprocessors and clusters; A100: 108 and none."""
    assert [native.plan_team(n, 2048, 132, True) for n in (1, 8, 16, 17, 33, 64, 67, 500)] == [8, 8, 8, 4, 4, 2, 1, 1]
    assert [native.plan_team(1, n, 132, True) for n in (0, 1, 256, 512, 1024, 65536)] == [1, 1, 1, 2, 4, 8]
    assert native.plan_team(1, 2048, 108, False) == 1
    assert native.plan_team(0, 0, 132, True) == 1


def test_long_segments_go_to_tiled_launches_while_the_device_idles():
    assert native.declines_plan_work(1, 2048, 128, 132, True) is None
    assert native.declines_plan_work(64, 2048, 128, 132, True) is None
    assert native.declines_plan_work(64, 2048, 128, 108, False) is None
    assert native.declines_plan_work(16, 1024, 128, 108, False) is None
    assert native.declines_plan_work(0, 0, 128, 132, True) is None
    assert "occupy 1 of 108 multiprocessors" in native.declines_plan_work(1, 2048, 128, 108, False)
    assert "occupy 8 of 132 multiprocessors" in native.declines_plan_work(1, 16384, 640, 132, True)


@pytest.mark.parametrize(("ptx_version", "declines"), [(90, False), (80, True)])
def test_code_for_sm_80_forms_no_clusters_on_any_device(monkeypatch, ptx_version, declines):
    """What LRC_CUDA_ARCHS=80 builds runs on newer devices, through its PTX, where the barrier of a cluster traps."""
    built = SimpleNamespace(cuda_ptx_version=lambda: ptx_version)
    hopper = SimpleNamespace(multi_processor_count=132, major=9)
    monkeypatch.setattr(native, "C", built)
    monkeypatch.setattr(native, "cuda_device_status", lambda device: None)
    monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: hopper)
    metric = SimpleNamespace(
        shape=(2048, 128), dtype=torch.float32, device=SimpleNamespace(index=f"compiled for {ptx_version}")
    )
    options = (None, None, None, 1024, 2048, None, "fp32", "reference", "isolate", 1)
    reason = native.cuda_supports_plan(metric, None, None, torch.ones(1, 1), *options)
    assert ("occupy 1 of 132 multiprocessors" in reason) if declines else reason is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"precision": "eager_bf16"}, "features themselves"),
        ({"num_heads": 2}, "features themselves"),
        ({"threshold": 0.5, "zero_policy": "reference"}, "threshold"),
        ({"destination": torch.zeros(8, dtype=torch.bool)}, "one iteration, got 2"),
        ({"max_seqlen": 65537}, "max_seqlen must be <= 65536, got 65537"),
        ({"metric": torch.zeros(8, 0)}, "one channel"),
        ({"metric": torch.zeros(8, 4, dtype=torch.float64)}, "fp32, bf16 or fp16, got float64"),
    ],
)
def test_what_the_plan_declines(change, reason):
    call = {"metric": torch.zeros(8, 4), "cu_in": None, "cu_out": None, "r": torch.ones(2, 1), "size": None,
            "protected": None, "destination": None, "num_out": 6, "max_seqlen": 8, "threshold": None,
            "precision": "fp32", "order": "reference", "zero_policy": "isolate", "num_heads": 1}  # fmt: skip
    assert reason in native.cuda_supports_plan(*{**call, **change}.values())
