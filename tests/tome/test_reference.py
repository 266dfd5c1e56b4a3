# SPDX-License-Identifier: Apache-2.0
"""The reference against a loop over Python floats, and the properties that every backend inherits from it."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.tome import (
    TokenLayout,
    compress_clips,
    head_mean,
    merge_budget,
    merge_schedule,
    merge_tokens,
    plan_merge,
    size_bias,
    unmerge_tokens,
)


@pytest.fixture(autouse=True)
def reference_backend():
    with use_backend("reference"):
        yield


def naive_plan(metric, schedule, size, protected):
    """One segment by the text of the paper: lists, no tensors, no tricks. Returns (assign, size, anchor)."""
    tokens = [
        {"m": list(m), "s": s, "p": p, "anchor": i, "members": [i]}
        for i, (m, s, p) in enumerate(zip(metric, size, protected, strict=True))
    ]
    for r in schedule:
        if r == 0:
            continue
        set_a, set_b = tokens[0::2], tokens[1::2]
        edges = []
        for i, a in enumerate(set_a):
            best, partner = -math.inf, None
            for j, b in enumerate(set_b):
                if b["p"]:
                    continue
                norms = math.hypot(*a["m"]) * math.hypot(*b["m"])
                similarity = sum(x * y for x, y in zip(a["m"], b["m"], strict=True)) / norms
                if similarity > best:
                    best, partner = similarity, j
            edges.append((a["p"], -best, i, partner))
        edges.sort(key=lambda edge: edge[:3])
        groups = [[b] for b in set_b]
        for _, _, i, partner in edges[:r]:
            groups[partner].append(set_a[i])
        merged = []
        for group in groups:
            total = sum(t["s"] for t in group)
            mean = [sum(t["s"] * t["m"][k] for t in group) / total for k in range(len(group[0]["m"]))]
            members = [i for t in group for i in t["members"]]
            merged.append({"m": mean, "s": total, "p": group[0]["p"], "anchor": group[0]["anchor"], "members": members})
        tokens = [set_a[i] for _, _, i, _ in edges[r:]] + merged
    assign = {i: row for row, t in enumerate(tokens) for i in t["members"]}
    return [assign[i] for i in range(len(metric))], [t["s"] for t in tokens], [t["anchor"] for t in tokens]


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 17), min_size=1, max_size=4),
    r=st.lists(st.integers(0, 9), min_size=1, max_size=4),
    num_protected=st.integers(0, 2),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
def test_plan_equals_naive_loop(lengths, r, num_protected, weighted, seed):
    generator = torch.Generator().manual_seed(seed)
    total = sum(lengths)
    metric = torch.randn(total, 5, generator=generator, dtype=torch.float64)
    size = torch.randint(1, 4, (total,), generator=generator).float() if weighted else None
    protected = torch.zeros(total, dtype=torch.bool)
    for start, n in zip(VarlenLayout(lengths).cu_seqlens.tolist(), lengths, strict=False):
        protected[start + torch.randperm(n, generator=generator)[:num_protected]] = True
    layout = VarlenLayout(lengths)
    plan = plan_merge(metric, merge_budget(layout, r=r, num_protected=num_protected), size=size, protected=protected)
    row = 0
    for s, n in enumerate(lengths):
        rows = slice(row, row + n)
        schedule = merge_budget(layout, r=r, num_protected=num_protected).r[:, s].tolist()
        sizes = [1.0] * n if size is None else size[rows].tolist()
        assign, size_out, anchor = naive_plan(metric[rows].tolist(), schedule, sizes, protected[rows].tolist())
        first = int(plan.layout_out.cu_seqlens[s])
        out = slice(first, first + len(size_out))
        assert (plan.assign[rows] - first).tolist() == assign
        assert plan.size[out].tolist() == size_out
        assert plan.anchor[out].tolist() == anchor
        row += n


def test_merge_equals_naive_loop(random):
    x = torch.randn(11, 3, generator=random, dtype=torch.float64)
    size = torch.tensor([1, 2, 0, 3, 1, 1, 5, 0.5, 1, 2, 1])
    plan = plan_merge(x, merge_budget(VarlenLayout([11]), target=4), size=size)
    for reduce in ("mean", "sum", "max"):
        y = merge_tokens(x, plan, reduce=reduce)
        for row in range(4):
            members = [i for i in range(11) if plan.assign[i] == row and size[i] > 0]
            weighted = sum(size[i].double() * x[i] for i in members)
            total = sum(float(size[i]) for i in members)
            wanted = {"sum": weighted, "mean": weighted / total, "max": torch.stack([x[i] for i in members]).amax(0)}
            torch.testing.assert_close(y[row], wanted[reduce], rtol=1e-12, atol=1e-12)


def test_schedule_of_the_facts():
    assert merge_schedule(2048, 128) == (1024, 512, 256, 128)
    assert merge_schedule(1024, 64) == (512, 256, 128, 64)
    assert merge_schedule(784, 64) == (392, 196, 98, 34)
    assert merge_schedule(7, 3) == (3, 1)
    assert merge_schedule(64, 64) == ()
    assert merge_schedule(0, 0) == ()


def test_vit_large_token_counts():
    """ViT-L with 24 layers and one class token: 7 tokens are left for r = 8, since the last layer can only merge 6."""

    def left(n, r):
        return merge_budget(VarlenLayout([n]), r=[r] * 24, num_protected=1).num_out

    assert (left(197, 8), left(197, 7), left(577, 23)) == (7, 29, 25)


def test_halving_keeps_position_order(random):
    metric = torch.randn(2, 64, 8, generator=random)
    plan = plan_merge(metric, target=8)
    assert plan.anchor.view(2, 8).tolist() == [[8 * j + 7 for j in range(8)]] * 2
    assert torch.equal(plan.assign, plan_merge(metric, target=8, order="position").assign)


def test_order_position_sorts_rows_by_anchor(random):
    metric = torch.randn(1, 49, 8, generator=random)
    plan, sorted_plan = plan_merge(metric, r=[9, 5]), plan_merge(metric, r=[9, 5], order="position")
    assert sorted_plan.anchor.tolist() == sorted(plan.anchor.tolist()) != plan.anchor.tolist()
    assert torch.equal(sorted_plan.anchor[sorted_plan.assign.long()], plan.anchor[plan.assign.long()])


def test_mass_is_conserved(random):
    x = torch.randn(3, 50, 16, generator=random, dtype=torch.float64)
    y, plan = compress_clips(x, 9, 4, return_plan=True)
    assert plan.size.view(3, 9).sum(1).tolist() == [50.0] * 3
    mean = (y * plan.size.view(3, 9, 1)).sum(1) / 50
    torch.testing.assert_close(mean, x.mean(1), rtol=1e-12, atol=1e-12)


def test_compose_equals_the_whole_schedule(random):
    metric = torch.randn(40, 8, generator=random, dtype=torch.float64)
    layout = VarlenLayout([24, 16])
    whole = plan_merge(metric, merge_budget(layout, r=[6, 5]))
    first = plan_merge(metric, merge_budget(layout, r=6))
    second = plan_merge(merge_tokens(metric, first), merge_budget(first.layout_out, r=5), size=first.size)
    composed = first.compose(second)
    for name in ("assign", "size", "weight", "anchor"):
        assert torch.equal(getattr(composed, name), getattr(whole, name)), name
    assert composed.layout_out == whole.layout_out and composed.num_out == whole.num_out


def test_compose_refuses_a_plan_without_sizes(random):
    metric = torch.randn(16, 4, generator=random)
    first = plan_merge(metric, merge_budget(VarlenLayout([16]), r=4))
    second = plan_merge(merge_tokens(metric, first), merge_budget(first.layout_out, r=4))
    with pytest.raises(ValueError, match="size=self.size"):
        first.compose(second)
    with pytest.raises(ValueError, match="layout_in"):
        first.compose(first)


def test_unmerge_undoes_constant_groups(random):
    x = torch.randn(1, 32, 8, generator=random)
    plan = plan_merge(x, target=8)
    constant = unmerge_tokens(merge_tokens(x, plan), plan)
    torch.testing.assert_close(unmerge_tokens(merge_tokens(constant, plan), plan), constant)


def test_all_equal_tokens_merge_into_the_first_destination():
    plan = plan_merge(torch.ones(1, 16, 4), r=8)
    assert plan.size.tolist() == [9.0] + [1.0] * 7


@pytest.mark.parametrize("poison", [0.0, float("nan"), float("inf")])
@pytest.mark.parametrize("at", [0, 5, 6, 31])
def test_isolated_token_touches_only_its_own_row(random, poison, at):
    x = torch.randn(2, 32, 8, generator=random)
    spoiled = x.clone()
    spoiled[1, at] = poison
    y, plan = compress_clips(x, 4, 2, return_plan=True)
    y_spoiled, plan_spoiled = compress_clips(spoiled, 4, 2, return_plan=True)
    assert torch.equal(y[0], y_spoiled[0]) and torch.equal(plan.assign[:32], plan_spoiled.assign[:32])
    assert plan_spoiled.num_out == plan.num_out
    own_row = int(plan_spoiled.assign[32 + at]) - 4
    others = [row for row in range(4) if row != own_row]
    assert y_spoiled[1, others].isfinite().all()
    if at % 2 == 0:
        # An even token has to merge at once: weight 0 keeps even its own row clean.
        assert plan_spoiled.weight[32 + at] == 0 and y_spoiled.isfinite().all()


@pytest.mark.parametrize(("dtype", "exponents"), [(torch.float32, (-120, 125)), (torch.float64, (-1000, 1020))])
@pytest.mark.parametrize("precision", ["fp32", "bf16", "eager_bf16"])
def test_no_length_of_a_finite_token_matters(random, dtype, exponents, precision):
    if precision != "fp32" and dtype == torch.float64:
        exponents = (-120, 125)  # bf16 has the exponents of fp32
    metric = torch.randint(1, 4, (1, 20, 8), generator=random).to(dtype)
    length = 2.0 ** torch.randint(*exponents, (1, 20, 1), generator=random).to(dtype)
    plan, wanted = (plan_merge(m, r=10, precision=precision) for m in (metric * length, metric))
    assert torch.equal(plan.assign, wanted.assign) and bool((plan.weight == 1).all())


@pytest.mark.parametrize("precision", ["fp32", "bf16", "eager_bf16"])
def test_a_metric_without_channels_is_of_zero_tokens(precision):
    plan, wanted = (plan_merge(torch.zeros(2, 8, k), target=4, precision=precision) for k in (0, 3))
    assert torch.equal(plan.assign, wanted.assign) and torch.equal(plan.weight, wanted.weight)


def test_reference_zero_policy_lets_nan_through():
    metric = torch.ones(1, 8, 2)
    metric[0, 1] = 0.0
    plan = plan_merge(metric, r=4, zero_policy="reference")
    assert plan.weight is None
    assert plan.size.tolist() == [5.0, 1.0, 1.0, 1.0]


def test_threshold_keeps_dissimilar_tokens():
    metric = torch.tensor([[[1.0, 0], [1, 0], [0, 1], [1, 0], [1, 0.1], [1, 0]]])
    plan = plan_merge(metric, r=3, threshold=0.9)
    assert plan.valid.tolist() == [True] * 4 + [False] * 2
    assert plan.layout_out == plan.layout_in and plan.size.tolist() == [1.0, 3.0, 1.0, 1.0, 0.0, 0.0]
    y = merge_tokens(metric, plan)
    assert y.shape == metric.shape and (y[0, 4:] == 0).all()


def test_destination_chooses_set_b(random):
    metric = torch.randn(1, 12, 4, generator=random)
    destination = torch.zeros(12, dtype=torch.bool)
    destination[[0, 5, 7]] = True
    plan = plan_merge(metric, r=6, destination=destination)
    assert plan.anchor[-3:].tolist() == [0, 5, 7]
    assert plan.size.sum() == 12


def test_protected_tokens_stay_alone(random):
    metric = torch.randn(1, 33, 4, generator=random)
    protected = torch.zeros(33, dtype=torch.bool)
    protected[[0, 7, 20]] = True
    plan = plan_merge(
        metric.flatten(0, 1), merge_budget(VarlenLayout([33]), target=9, num_protected=3), protected=protected
    )
    for token in (0, 7, 20):
        assert (plan.assign == plan.assign[token]).sum() == 1


def test_sequential_scale_invariance(random):
    metric = torch.randn(1, 40, 8, generator=random)
    assert torch.equal(plan_merge(metric, target=7).assign, plan_merge(metric * 4, target=7).assign)


def published_pixel_shuffle(x, grid, scale=0.5):
    """InternVL's two permutes (version 2) on [F, 1 + h*w, C]."""
    x = x[:, 1:].reshape(x.shape[0], *grid, -1)
    n, w, h, c = x.shape
    x = x.view(n, w, int(h * scale), int(c / scale)).permute(0, 2, 1, 3).contiguous()
    x = x.view(n, int(h * scale), int(w * scale), int(c / scale**2)).permute(0, 2, 1, 3).contiguous()
    return x.view(n, -1, x.shape[-1])


def test_token_layout_is_the_pixel_shuffle(random):
    x = torch.randn(8, 1 + 24, 3, generator=random)
    layout = TokenLayout(clip_frames=4, grid=(4, 6), shuffle=2, prefix=1)
    tokens = published_pixel_shuffle(x, (4, 6)).reshape(2, -1, 12)
    plan = plan_merge(head_mean(x, 4, layout=layout), target=5)
    assert torch.equal(head_mean(x, 4, layout=layout), head_mean(tokens, 4))
    assert torch.equal(merge_tokens(x, plan, layout=layout), merge_tokens(tokens, plan))


def test_size_bias_is_the_log_of_the_sizes(random):
    plan = plan_merge(torch.randn(1, 16, 4, generator=random), target=4)
    assert torch.equal(size_bias(plan).exp().round(), plan.size)


def test_eager_bf16_decides_on_the_rounded_features(random):
    x = torch.randn(2, 32, 16, generator=random).bfloat16()
    y, plan = compress_clips(x, 8, 4, precision="eager_bf16", return_plan=True)
    assert plan.size.sum() == 64 and y.dtype == torch.bfloat16
    payload = x[0]
    size = torch.ones(32, 1, dtype=torch.bfloat16)
    assign = torch.arange(32)
    for r in merge_schedule(32, 8):
        metric = payload.view(-1, 4, 4).mean(1)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        partner = (metric[0::2] @ metric[1::2].T).max(1).indices
        assert r == partner.numel()
        new = torch.empty(payload.shape[0], dtype=torch.long)
        new[0::2], new[1::2] = partner, torch.arange(r)
        total = (payload * size).new_zeros(r, 16).index_add(0, new, payload * size)
        size = size.new_zeros(r, 1).index_add(0, new, size)
        payload, assign = total / size, new[assign]
    assert plan.assign[:32].tolist() == assign.tolist()


def test_a_nan_similarity_is_below_no_threshold():
    """It merges first, as it does without one; what is below the threshold stays."""
    metric = torch.tensor([[1.0, 0.0], [1.0, 0.0], [torch.nan, 0.0], [0.0, 1.0], [-1.0, 0.0], [1.0, 0.1]])[None]
    plan = plan_merge(metric, r=3, threshold=0.9, zero_policy="reference")
    assert plan.assign.tolist() == [1, 1, 1, 2, 0, 3] and plan.size.tolist() == [1, 3, 1, 1, 0, 0]
    with pytest.raises(ValueError, match="threshold must be a number, got nan"):
        plan_merge(metric, r=3, threshold=float("nan"))
