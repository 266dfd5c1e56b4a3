# SPDX-License-Identifier: Apache-2.0
"""Inputs by name: reproducible, and of the kind that their name promises; memory that nothing wrote is poisoned."""

import pytest
import torch

from lrc_kernels.backend import use_backend
from lrc_kernels.testing import INPUTS, make_input, segment_lengths
from lrc_kernels.tome import plan_merge


@pytest.mark.parametrize("name", INPUTS)
def test_seeded_and_of_the_shape_asked_for(name):
    torch.manual_seed(1)
    state = torch.random.get_rng_state()
    x = make_input(name, (2, 32, 8), dtype=torch.bfloat16, seed=3)
    assert x.shape == (2, 32, 8) and x.dtype == torch.bfloat16 and x.is_contiguous()
    assert torch.equal(x, make_input(name, (2, 32, 8), seed=3).bfloat16()) or name == "with_nan_token"
    assert not torch.equal(x, make_input(name, (2, 32, 8), dtype=torch.bfloat16, seed=4))
    assert torch.equal(state, torch.random.get_rng_state())
    assert make_input(name, (1, 1, 3)).shape == (1, 1, 3)


def test_video_like_has_a_hub_and_singletons():
    with use_backend("reference"):
        size = plan_merge(make_input("video_like", (2, 1024, 64)), target=64).size.view(2, 64)
        smooth = plan_merge(make_input("gaussian", (2, 1024, 64)), target=64).size.view(2, 64)
    assert (size.amax(-1) > 1024 / 3).all() and ((size == 1).double().mean(-1) > 0.3).all()
    assert (smooth.amax(-1) < 1024 / 8).all()


def test_the_special_tokens_are_there():
    assert make_input("all_equal", (2, 5, 3)).unique(dim=1).shape[1] == 1
    assert make_input("with_ties", (1, 64, 8))[0].unique(dim=0).shape[0] <= 4
    assert (make_input("with_zero_tokens", (2, 16, 4)).abs().sum(-1) == 0)[0].nonzero().flatten().tolist() == [
        0,
        1,
        7,
        14,
    ]
    bad = ~make_input("with_nan_token", (2, 16, 4)).isfinite().all(-1)
    assert bad.nonzero().tolist() == [[0, 8], [0, 12]]


def test_refuses_arguments():
    with pytest.raises(ValueError, match="gaussian.*got 'normal'"):
        make_input("normal", (2, 2))
    with pytest.raises(ValueError, match=r"shape must be \[..., N, D\]"):
        make_input("gaussian", (2,))


def test_segment_lengths_reach_the_edges():
    hypothesis = pytest.importorskip("hypothesis", reason="hypothesis is not installed (pip install lrc-kernels[test])")
    seen: set[int] = set()

    @hypothesis.settings(max_examples=60, deadline=None, database=None, derandomize=True)
    @hypothesis.given(segment_lengths(max_segments=5, max_length=9))
    def collect(lengths):
        assert 1 <= len(lengths) <= 5 and all(0 <= length <= 9 for length in lengths)
        seen.update(lengths)

    collect()
    assert {0, 1, 9} <= seen


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_uninitialised_memory_is_nan(dtype, device):
    x = torch.zeros(2, 3, dtype=dtype, device=device)
    for fresh in (
        torch.empty(2, 3, dtype=dtype, device=device),
        torch.empty_like(x),
        torch.empty_strided((2, 3), (3, 1), dtype=dtype, device=device),
        x.new_empty(2, 3),
    ):
        assert fresh.isnan().all()


def test_uninitialised_integers_are_their_largest():
    assert (torch.empty(4, dtype=torch.int32) == torch.iinfo(torch.int32).max).all()


@pytest.mark.no_poison
def test_opt_out():
    assert not torch.are_deterministic_algorithms_enabled()
