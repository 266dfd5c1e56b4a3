# SPDX-License-Identifier: Apache-2.0
"""What a plan is good for after it was made: other payloads, positions, provenance, composition; and ToMe at full width
in fp64 beside the schedule that runs on the metric alone."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.backend import use_backend
from lrc_kernels.tome import (
    compress_clips,
    merge_budget,
    merge_tokens,
    plan_merge,
    size_bias,
    unmerge_tokens,
)


def full_width_tome(clip, schedule, num_heads):
    """ToMe on the features [n, D] themselves, one token at a time: returns (rows [n_out, D], [members of each row])."""
    rows, members = list(clip), [[i] for i in range(len(clip))]
    for r in schedule:
        metric = [row.unflatten(0, (num_heads, -1)).mean(0) for row in rows]
        best = []
        for i in range(0, len(rows), 2):
            cosines = [float(torch.cosine_similarity(metric[i], metric[j], dim=0)) for j in range(1, len(rows), 2)]
            top = max(cosines)
            best.append((-top, i, 2 * cosines.index(top) + 1))
        best.sort()
        received = {j: [j] for j in range(1, len(rows), 2)}
        for _, i, j in best[:r]:
            received[j].append(i)
        groups = [[i] for _, i, _ in best[r:]] + list(received.values())
        counts = [len(group) for group in members]
        rows = [sum(counts[i] * rows[i] for i in group) / sum(counts[i] for i in group) for group in groups]
        members = [[token for i in group for token in members[i]] for group in groups]
    return torch.stack(rows), members


@settings(max_examples=25, deadline=None)
@given(
    length=st.integers(2, 40),
    kept=st.floats(0.05, 1.0),
    heads=st.sampled_from([1, 2, 4]),
    seed=st.integers(0, 2**31),
)
def test_metric_only_equals_full_width(length, kept, heads, seed):
    random = torch.Generator().manual_seed(seed)
    x = torch.randn(2, length, 12, generator=random, dtype=torch.float64)
    target = max(1, int(length * kept))
    y, plan = compress_clips(x, target, heads, return_plan=True)
    schedule = merge_budget(VarlenLayout([length]), target=target).r[:, 0].tolist()
    for index, clip in enumerate(x):
        rows, members = full_width_tome(clip, schedule, heads)
        torch.testing.assert_close(y[index], rows, rtol=1e-12, atol=1e-12)
        assign = plan.assign.view(2, -1)[index] - index * target
        assert [sorted(group) for group in members] == [
            (assign == row).nonzero().flatten().tolist() for row in range(target)
        ]


def test_identity_gives_the_provenance(random):
    plan = plan_merge(torch.randn(1, 30, 4, generator=random), target=7)
    provenance = merge_tokens(torch.eye(30)[None], plan, reduce="sum")[0]
    assert torch.equal(provenance, torch.nn.functional.one_hot(plan.assign.long(), 7).T.float())
    assert torch.equal(provenance.sum(1), plan.size) and (plan.size > 0).all(), "every row holds a token"
    assert torch.equal(provenance.gather(1, plan.anchor.long()[:, None]), torch.ones(7, 1)), "an anchor is a member"


def test_payloads_of_a_clip(random):
    """Timestamps, boxes and position embeddings go where the tokens went."""
    frames, per_frame = 4, 16
    plan = plan_merge(torch.randn(2, frames * per_frame, 8, generator=random), target=8)
    seconds = torch.arange(frames).repeat_interleave(per_frame).float().expand(2, -1)[..., None] * 0.5
    # Halving anchors row j at token 8j + 7, so that "two rows per frame" means what it says.
    assert (plan.anchor.view(2, 8) // per_frame).tolist() == [[0, 0, 1, 1, 2, 2, 3, 3]] * 2
    members = plan.assign.view(2, -1)
    centre = torch.randn(2, frames * per_frame, 2, generator=random)
    boxes = torch.cat([centre - 1, centre + 1], -1)
    hull_low, hull_high = -merge_tokens(-boxes, plan, reduce="max")[..., :2], merge_tokens(boxes, plan, reduce="max")
    position = torch.nn.Embedding(frames * per_frame, 6)
    merged = merge_tokens(position.weight.expand(2, -1, -1), plan)
    mean_seconds = merge_tokens(seconds, plan)
    for clip in range(2):
        for row in range(8):
            group = members[clip] == clip * 8 + row
            torch.testing.assert_close(mean_seconds[clip, row], seconds[clip, group].mean(0))
            torch.testing.assert_close(hull_low[clip, row], boxes[clip, group, :2].amin(0))
            torch.testing.assert_close(hull_high[clip, row, 2:], boxes[clip, group, 2:].amax(0))
            torch.testing.assert_close(merged[clip, row], position.weight[group].mean(0))
    merged.sum().backward()
    torch.testing.assert_close(position.weight.grad.sum(), torch.tensor(2 * 8 * 6.0))


def test_size_bias_is_attention_over_copies(random):
    """A merged key with bias log(n) draws as much attention as the n equal keys that it stands for."""
    groups = torch.randint(5, (24,), generator=random)
    keys, values = (torch.randn(5, 2, 8, generator=random)[groups] for _ in range(2))
    q = torch.randn(7, 2, 8, generator=random)
    # Equal tokens of one group merge only if their sets allow it, so the plan is for the keys as they come.
    plan = plan_merge(keys.flatten(1)[None], r=12, threshold=0.999)
    k, v = (merge_tokens(x.flatten(1)[None], plan)[0].unflatten(1, (2, 8)) for x in (keys, values))
    assert plan.size.max() > 2 and (size_bias(plan)[~plan.valid] == -torch.inf).all()
    options = {"cu_seqlens_q": VarlenLayout([7]), "cu_seqlens_k": VarlenLayout([24]), "causal": False}
    merged = varlen_attention(q, k, v, key_bias=size_bias(plan), **options)
    torch.testing.assert_close(merged, varlen_attention(q, keys, values, **options), rtol=1e-4, atol=1e-5)


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.integers(0, 20), min_size=1, max_size=3),
    r=st.tuples(st.integers(0, 8), st.integers(0, 8)),
    orders=st.tuples(st.sampled_from(["reference", "position"]), st.sampled_from(["reference", "position"])),
    threshold=st.sampled_from([None, 0.0, 0.5]),
    weighted=st.booleans(),
    seed=st.integers(0, 2**31),
)
@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_compose_does_one_after_the_other(backend, lengths, r, orders, threshold, weighted, seed):
    random = torch.Generator().manual_seed(seed)
    layout = VarlenLayout(lengths)
    metric = torch.randn(layout.num_tokens, 4, generator=random)
    x = torch.randn(layout.num_tokens, 3, generator=random, dtype=torch.float64)
    size = torch.rand(layout.num_tokens, generator=random) + 0.5 if weighted else None
    with use_backend(backend):
        first = plan_merge(metric, merge_budget(layout, r=r[0]), size=size, order=orders[0], threshold=threshold)
        middle = merge_tokens(metric, first)
        budget = merge_budget(first.layout_out, r=r[1])
        second = plan_merge(middle, budget, size=first.size, order=orders[1], threshold=threshold)
    both = first.compose(second)
    with use_backend("reference"):
        torch.testing.assert_close(
            merge_tokens(x, both), merge_tokens(merge_tokens(x, first), second), rtol=1e-5, atol=1e-5
        )
        y = torch.randn(both.num_out, 3, generator=random)
        assert torch.equal(unmerge_tokens(y, both), unmerge_tokens(unmerge_tokens(y, second), first))
    torch.testing.assert_close(both.size.sum(), torch.tensor(float(layout.num_tokens)) if size is None else size.sum())
    assert (both.valid is None) == (threshold is None)
    real = torch.ones_like(both.size, dtype=torch.bool) if both.valid is None else both.valid
    assert torch.equal(real, both.size > 0)
    # An anchor is a member of its row, by positions within the segment.
    start = layout.cu_seqlens[:-1].long().repeat_interleave(both.layout_out.cu_seqlens.diff().long())
    anchored = both.assign[(start + both.anchor.long())[real]]
    assert torch.equal(anchored.long(), real.nonzero().flatten())


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_permuted_clips_give_permuted_rows(random, device, backend):
    x = torch.randn(4, 26, 8, generator=random).to(device if backend == "triton" else "cpu")
    order = torch.tensor([2, 0, 3, 1])
    with use_backend(backend):
        assert torch.equal(compress_clips(x[order], 9, 2), compress_clips(x, 9, 2)[order])


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_copies_of_a_token_merge_into_it(random, device, backend):
    """Small integers, whose means are exact: merging what is equal changes nothing, however many there are."""
    colours = torch.randint(1, 9, (1, 3, 8), generator=random).float().to(device if backend == "triton" else "cpu")
    x = colours.expand(2, 16, 3, 8).reshape(2, 48, 8)
    with use_backend(backend):
        plan = plan_merge(x, r=12)
        assert torch.equal(unmerge_tokens(merge_tokens(x, plan), plan), x)
