# SPDX-License-Identifier: Apache-2.0
"""The C++ selection on the CPU against the specification, in every mode, also where nothing checks the budget."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import segment_lengths
from lrc_kernels.token_dropout import drop_budget, reference
from lrc_kernels.token_dropout.op import bernoulli_op, select_op


def on_cpu(op, *args):
    with use_backend("cpu"), record() as ran:
        result = op(*args)
    assert [backend for _, backend in ran] == ["cpu"]
    return result


@pytest.fixture(params=[1, 2])
def threads(request):
    previous = torch.get_num_threads()
    torch.set_num_threads(request.param)
    yield request.param
    torch.set_num_threads(previous)


def draw_inputs(random, lengths, share=0.7):
    layout = VarlenLayout(lengths)
    total = layout.num_tokens
    flags = torch.rand(total, generator=random) < share
    scores = torch.randint(-2, 3, (total,), generator=random) * -0.5
    scores[torch.rand(total, generator=random) < 0.2] = torch.nan
    scores[torch.rand(total, generator=random) < 0.2] = -torch.inf
    ids = torch.randperm(2 * len(lengths), generator=random)[: len(lengths)] * 2**33 - 5
    positions = torch.randint(0, 2**40, (total,), generator=random)
    return layout, flags, scores, ids, positions


@settings(max_examples=80, deadline=None)
@given(
    segment_lengths(max_length=30),
    st.sampled_from(["topk", "linspace", "random"]),
    st.integers(-(2**63), 2**63 - 1),
    st.booleans(),
    st.integers(-2, 2),
)
def test_select_equals_the_reference(lengths, mode, seed, named, mistake):
    """`mistake` shifts the budget against the flags, as a device tensor that nobody checks may do."""
    layout, flags, scores, ids, positions = draw_inputs(torch.Generator().manual_seed(seed % 2**31), lengths)
    counts = [int(piece.sum()) for piece in flags.split(lengths)]
    promised = [min(max(n + mistake, 0), length) for n, length in zip(counts, lengths, strict=True)]
    keep = [(n + 1) // 2 for n in promised]
    budget = drop_budget(layout, promised, keep=keep)
    options = (torch.tensor(seed), 2**32 - 1, ids if named else None, positions if named else None)
    layouts = (layout.cu_seqlens, budget.layout_out.cu_seqlens)
    args = (flags, *layouts, budget.keep, scores, *options, budget.num_kept, layout.max_seqlen, mode)
    for got, wanted in zip(on_cpu(select_op, *args), reference.select(*args), strict=True):
        assert torch.equal(got, wanted)


@settings(max_examples=60, deadline=None)
@given(segment_lengths(max_length=30), st.integers(-(2**63), 2**63 - 1), st.booleans(), st.floats(0.0, 1.3))
def test_bernoulli_equals_the_reference(lengths, seed, named, share):
    layout, flags, _, ids, positions = draw_inputs(torch.Generator().manual_seed(seed % 2**31), lengths)
    options = (torch.tensor(seed), 3, ids if named else None, positions.int() if named else None)
    capacity = int(share * layout.num_tokens)
    args = (flags, layout.cu_seqlens, *options, capacity, layout.max_seqlen, int(0.6 * 2**32))
    for got, wanted in zip(on_cpu(bernoulli_op, *args), reference.select_bernoulli(*args), strict=True):
        assert torch.equal(got, wanted)


@pytest.mark.parametrize("mode", ["topk", "linspace", "random"])
def test_threads_change_nothing(random, threads, mode):
    layout, flags, scores, ids, positions = draw_inputs(random, [4000, 3000, 0, 2000, 17])
    counts = [int(piece.sum()) for piece in flags.split([4000, 3000, 0, 2000, 17])]
    budget = drop_budget(layout, counts, keep=0.5)
    options = (torch.tensor(3), 1, ids, positions, budget.num_kept, layout.max_seqlen, mode)
    args = (flags, layout.cu_seqlens, budget.layout_out.cu_seqlens, budget.keep, scores, *options)
    for got, wanted in zip(on_cpu(select_op, *args), reference.select(*args), strict=True):
        assert torch.equal(got, wanted)
