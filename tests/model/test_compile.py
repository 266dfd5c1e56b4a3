# SPDX-License-Identifier: Apache-2.0
"""Compiled decoder layers that drop: no graph break on one device, one for each drop on many ranks, few compiles."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch._dynamo.utils import counters

from lrc_kernels.sequence_parallel import make_mesh
from lrc_model.parallel import SequenceParallel
from tests.model.test_parallel import make_model, packs
from tests.sequence_parallel.posts import counted_posts

DROPS = "bernoulli then attention"


def losses_and_gradients(model, batches, **options):
    found = []
    for batch in batches:
        model.zero_grad()
        with counted_posts() as posts:
            loss = model(batch, seed=5, **options).loss
            loss.backward()
        found.append((torch.cat([loss.detach()[None], *(p.grad.flatten() for p in model.language_model.parameters())]),
                      posts.count))  # fmt: skip
    return found


def compile_last(model, backend="aot_eager", **options):
    """Compile the layer of the second drop, by attention; what counts its graphs."""
    torch._dynamo.reset()
    counters.clear()
    counter = CompileCounterWithBackend(backend)
    model.language_model.model.layers[1].compile(backend=counter, **options)
    return counter


@pytest.mark.no_poison
@pytest.mark.parametrize("num_packs", [1, pytest.param(3, marks=pytest.mark.slow)])
def test_a_layer_that_drops_has_no_break_on_one_device(num_packs):
    model, batches = make_model(DROPS), packs()[:num_packs]
    wanted = losses_and_gradients(model, batches)
    counter = compile_last(model, fullgraph=True)
    found = losses_and_gradients(model, batches)
    assert all(torch.equal(x, y) for (x, _), (y, _) in zip(found, wanted, strict=True))
    # Once more for dynamic shapes, and for packs without visual tokens, where nothing drops.
    assert counter.frame_count <= (1 if num_packs == 1 else 3)


def on_many_ranks(num_packs, backend, recompute):
    """Worst relative error of a compiled layer that drops, messages of both, graphs, and graph breaks by reason."""
    mesh, model, batches = make_mesh("cpu", ring=2, ulysses=2), make_model(DROPS), packs()[:num_packs]
    options = {"parallel": SequenceParallel(model.config.text, mesh), "recompute": recompute}
    wanted = losses_and_gradients(model, batches, **options)
    counter = compile_last(model, backend)
    found = losses_and_gradients(model, batches, **options)
    error = max(float((x - y).norm() / y.norm()) for (x, _), (y, _) in zip(found, wanted, strict=True))
    sent = [[count for _, count in run] for run in (found, wanted)]
    return error, sent, counter.frame_count, dict(counters["graph_break"])


@pytest.mark.no_poison
@pytest.mark.parametrize(
    ("num_packs", "backend", "recompute"),
    [(1, "eager", True), pytest.param(3, "aot_eager", False, marks=pytest.mark.slow)],
)
def test_a_drop_breaks_a_layer_once_on_many_ranks(rank_pools, num_packs, backend, recompute):
    results = rank_pools(4).run(on_many_ranks, num_packs, backend, recompute)
    for error, (compiled, eager), graphs, breaks in results:
        assert error <= 1e-14 and compiled == eager and min(eager) > 0
        # Before the drop and behind it, once more for dynamic shapes.
        assert graphs <= 2 * min(num_packs, 2)
        assert 1 <= sum(breaks.values()) <= min(num_packs, 2) and all("run_drop" in reason for reason in breaks)
