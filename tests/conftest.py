# SPDX-License-Identifier: Apache-2.0
"""What every test gets: Triton's interpreter where there is no GPU, uninitialised memory filled with NaN, fixed seeds,
one thread, and pools of ranks."""

from __future__ import annotations

import contextlib
import os
import random
import warnings
from collections.abc import Callable, Iterator

os.environ.setdefault("OMP_NUM_THREADS", "1")

import numpy as np
import pytest
import torch

# Kernel modules decide at import whether they are interpreted, so this stands before anything imports lrc_kernels.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

from lrc_kernels.testing import RankPool, install_interpreter

TRITON_MISSING = None if torch.cuda.is_available() else install_interpreter()
if torch.cuda.is_available():
    try:
        import triton  # noqa: F401
    except ImportError:
        TRITON_MISSING = "triton is not installed (pip install lrc-kernels[triton])"

torch.set_num_threads(1)

# The same examples in every run: a bound that one input in a thousand misses fails for everyone or for nobody.
# `--hypothesis-profile default` draws new ones.
with contextlib.suppress(ImportError):
    import hypothesis

    hypothesis.settings.register_profile("same", derandomize=True)
    hypothesis.settings.load_profile("same")
    # It also draws numbers that it finds in the source of the modules loaded so far: other ones in every process.
    with contextlib.suppress(ImportError):
        from hypothesis.internal.conjecture import providers

        providers.is_local_module_file = lambda path: False


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: leave uninitialised memory as torch.empty returns it")
    config.addinivalue_line("markers", "triton: needs Triton, on a GPU or in its interpreter")


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("triton") and TRITON_MISSING is not None:
        pytest.skip(TRITON_MISSING)
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("no CUDA device")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where kernels are tested: the GPU where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seeds() -> None:
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    """torch.empty*, new_empty and resize_ give NaN (integers their largest value), so an unwritten element fails."""
    if request.node.get_closest_marker("no_poison"):
        yield
        return
    previous = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    # PyTorch fills in C++, below torch.compile and every library, which no patch of torch.empty could.
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*does not have a deterministic implementation.*")
            warnings.filterwarnings("ignore", message=".*CUBLAS_WORKSPACE_CONFIG.*")
            yield
    finally:
        torch.use_deterministic_algorithms(previous[0], warn_only=previous[1])
        torch.utils.deterministic.fill_uninitialized_memory = filled


@pytest.fixture(scope="session")
def rank_pools() -> Iterator[Callable[[int], RankPool]]:
    """Pools of gloo ranks by world size, started at their first use and kept for the whole session."""
    pools: dict[int, RankPool] = {}

    def pool_of(world_size: int) -> RankPool:
        pool = pools.setdefault(world_size, RankPool(world_size))
        if pool.broken is not None:
            pool.restart()
        return pool

    yield pool_of
    for pool in pools.values():
        pool.close()


@pytest.fixture
def rank_pool(rank_pools: Callable[[int], RankPool]) -> RankPool:
    """Two gloo ranks, shared by all tests of the session; restarted where a test broke them."""
    return rank_pools(2)
