# SPDX-License-Identifier: Apache-2.0
"""Fixtures of the ToMe tests."""

import pytest
import torch

from lrc_kernels import native
from lrc_kernels.backend import record, use_backend


@pytest.fixture
def random() -> torch.Generator:
    """A seeded generator: the same numbers in every run and in any order of the tests."""
    return torch.Generator().manual_seed(20250121)


@pytest.fixture
def cpu_backend():
    """Every op runs on the cpu backend or raises, but for the references that a test asks for by name."""
    best = native.C.cpu_isa()
    with use_backend("cpu"), record() as ran:
        yield ran
    native.C.set_cpu_isa(best)
    assert not ran or "cpu" in {backend for _, backend in ran}


@pytest.fixture(params=native.C.cpu_isas() if native.C is not None else [])
def isa(request):
    native.C.set_cpu_isa(request.param)
    return request.param


@pytest.fixture
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
