# SPDX-License-Identifier: Apache-2.0
"""Every Triton launch stands under a guard for its tensors' device: Triton launches on the current one, which on a
machine of several GPUs need not be theirs."""

import contextlib
import importlib.util
from pathlib import Path

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.token_dropout import block_factors, block_scores, block_statistics

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="watches the launches of Triton's interpreter"),
]


@pytest.fixture
def launches(monkeypatch):
    """(kernel, whether a guard is held) of each launch, none of which runs."""
    from triton.runtime.interpreter import InterpretedFunction

    held, launched = [], []

    @contextlib.contextmanager
    def device_of(tensor):
        held.append(tensor)
        yield
        held.pop()

    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    monkeypatch.setattr(
        InterpretedFunction, "run", lambda self, *args, **options: launched.append((self.__name__, bool(held)))
    )
    return launched


def calls():
    """The calls of compute-sanitizer's list, and what takes several ranks."""
    from lrc_kernels.sequence_parallel.triton_kernels import launch_gather_heads, launch_scatter_heads

    spec = importlib.util.spec_from_file_location("sanitize", Path(__file__).parents[2] / "tools" / "sanitize.py")
    sanitize = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sanitize)
    layout, row = VarlenLayout([128, 44]), torch.tensor([127, 43], dtype=torch.int32)
    q, k, table = torch.randn(2, 4, 16), torch.randn(172, 2, 16), torch.tensor([[0, 1], [2, 3]], dtype=torch.int32)
    return {
        **sanitize.all_calls(sanitize.Inputs(torch.float32), 64, 32),
        "block_statistics": lambda: block_statistics(q, k, layout, row),
        "block_factors": lambda: block_factors(torch.zeros(2, 2, 4, 1), layout, row),
        "block_scores": lambda: block_scores(q, k, layout, row, torch.ones(2, 4)),
        "scatter_heads": lambda: launch_scatter_heads([q], table),
        "gather_heads": lambda: launch_gather_heads(q[None], table, [2], q.dtype)[0],
    }


def test_every_launch_is_guarded(launches):
    for name, call in calls().items():
        launches.clear()
        with use_backend("triton"):
            y = call()
            if y.requires_grad:
                y.sum().backward()
        assert launches, name
        assert all(guarded for _, guarded in launches), (name, launches)
