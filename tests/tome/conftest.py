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
