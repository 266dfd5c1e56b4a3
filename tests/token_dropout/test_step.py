# SPDX-License-Identifier: Apache-2.0
"""The whole drop step, from scores to normalised rows: aligned with a loop over samples; one CUDA graph on a GPU."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record
from lrc_kernels.token_dropout import (
    attention_scores,
    drop_budget,
    drop_position_ids,
    drop_tokens,
    drop_tokens_rmsnorm,
    query_rows,
    select_tokens,
)

LENGTHS, COUNTS, KEEP = [40, 9, 0, 1, 64], [30, 5, 0, 0, 50], [11, 2, 0, 0, 50]
WIDTH, HEAD_DIM = 32, 16


def make_pack(device, seed=0):
    """Several visual spans per sequence, one sequence of text, one empty, one that keeps all."""
    random = torch.Generator().manual_seed(seed)
    layout = VarlenLayout(LENGTHS, device)
    droppable = torch.zeros(sum(LENGTHS), dtype=torch.bool)
    for start, n, count in zip(layout.cu_seqlens.tolist(), LENGTHS, COUNTS, strict=False):
        droppable[start + torch.randperm(max(n - 1, 0), generator=random)[:count]] = True
    targets = torch.full((sum(LENGTHS),), -100)
    targets[[38, 47, 112]] = torch.tensor([3, 4, 5])
    tensors = {
        "droppable": droppable,
        "targets": targets,
        "hidden": torch.randn(sum(LENGTHS), WIDTH, generator=random),
        "q": torch.randn(sum(LENGTHS), 4, HEAD_DIM, generator=random),
        "k": torch.randn(sum(LENGTHS), 2, HEAD_DIM, generator=random),
        "position_ids": torch.cat([torch.arange(n) for n in LENGTHS]),
        "weight": torch.rand(WIDTH, generator=random),
    }
    return layout, {name: tensor.to(device) for name, tensor in tensors.items()}


def drop_step(layout, budget, pack, mode, seed):
    """Scores, selection, rows, positions, targets and the next norm of one drop layer."""
    rows, sequence, position = query_rows(layout, pack["targets"])
    scores = attention_scores(
        pack["q"][rows], pack["k"], cu_seqlens_k=layout, query_sequence=sequence, query_position=position
    )
    scores = scores if mode == "topk" else None
    selection = select_tokens(layout, pack["droppable"], budget, mode=mode, scores=scores, seed=seed)
    targets = drop_tokens(pack["targets"], selection)
    position_ids = drop_position_ids(pack["position_ids"], selection, "renumber")
    hidden, normed = drop_tokens_rmsnorm(pack["hidden"], pack["weight"], 1e-6, selection)
    return selection.indices, targets, position_ids, hidden, normed


def oracle(layout, pack, mode):
    """The kept rows of each sample on its own, by sorting in Python."""
    kept = []
    for start, n, keep in zip(layout.cu_seqlens.tolist(), LENGTHS, KEEP, strict=False):
        rows = range(start, start + n)
        visual = [row for row in rows if pack["droppable"][row]]
        if mode == "topk" and visual:
            asks = next((row for row in rows if pack["targets"][row] != -100), start + n - 1)
            q, k = pack["q"][asks].double(), pack["k"][start : asks + 1].double().repeat_interleave(2, 1)
            p = (torch.einsum("hd,nhd->hn", q, k) * HEAD_DIM**-0.5).softmax(1).mean(0)
            scores = {row: float(p[row - start]) if row <= asks else 0.0 for row in visual}
            visual = sorted(visual, key=lambda row, scores=scores: (-scores[row], row))[:keep]
        elif keep:
            visual = [visual[i * (len(visual) - 1) // max(keep - 1, 1)] for i in range(keep)]
        kept += [row for row in rows if not pack["droppable"][row] or row in visual]
    return torch.tensor(kept)


@pytest.mark.parametrize("mode", ["topk", "linspace"])
def test_every_tensor_stays_aligned(device, mode):
    layout, pack = make_pack(device)
    budget = drop_budget(layout, COUNTS, keep=KEEP)
    with record() as ran:
        indices, targets, position_ids, hidden, normed = drop_step(layout, budget, pack, mode, 0)
    assert {name for name, _ in ran} >= {"attention_scores_fwd", "select_tokens_fwd", "drop_tokens_rmsnorm_fwd"}
    assert "reference" not in {backend for _, backend in ran}
    kept = oracle(layout, {name: tensor.cpu() for name, tensor in pack.items()}, mode).to(device)
    assert torch.equal(indices.long(), kept)
    assert torch.equal(targets, pack["targets"][kept]) and torch.equal(hidden, pack["hidden"][kept])
    assert position_ids.tolist() == [i for n in budget.layout_out.lengths for i in range(n)]
    wanted = hidden * torch.rsqrt(hidden.square().mean(1, keepdim=True) + 1e-6) * pack["weight"]
    torch.testing.assert_close(normed, wanted)


def test_a_seed_on_the_device_draws_anew(device):
    layout, pack = make_pack(device)
    budget = drop_budget(layout, COUNTS, keep=KEEP)
    seed = torch.tensor(1, device=device)
    first = drop_step(layout, budget, pack, "random", seed)[0]
    seed.fill_(2)
    second = drop_step(layout, budget, pack, "random", seed)[0]
    assert not torch.equal(first, second)
    assert torch.equal(second, drop_step(layout, budget, pack, "random", 2)[0])


@pytest.mark.gpu
@pytest.mark.no_poison
@pytest.mark.parametrize("mode", ["topk", "linspace", "random"])
def test_the_drop_step_is_one_cuda_graph_without_synchronisation(device, mode):
    layout, pack = make_pack(device)
    budget = drop_budget(layout, COUNTS, keep=KEEP)
    seed = torch.tensor(1, device=device)
    for _ in range(3):
        drop_step(layout, budget, pack, mode, seed)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        drop_step(layout, budget, pack, mode, seed)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = drop_step(layout, budget, pack, mode, seed)
    _, other = make_pack(device, seed=7)
    for name in ("hidden", "q", "k"):
        pack[name].copy_(other[name])
    seed.fill_(2)
    graph.replay()
    for replayed, eager in zip(captured, drop_step(layout, budget, pack, mode, seed), strict=True):
        assert torch.equal(replayed, eager)
