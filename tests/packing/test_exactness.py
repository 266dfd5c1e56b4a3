# SPDX-License-Identifier: Apache-2.0
"""A small model in fp64 on packs of real files: what it computes is what it computes of every sample alone, however the
samples are packed and shared."""

from __future__ import annotations

import pytest
import torch

from lrc_kernels.attention import varlen_attention
from lrc_kernels.packing import PackConfig, PackedLoader, ParallelRank, decode_frames, pack_samples
from lrc_kernels.packing.batch import Sample
from tests.packing.datasets import TOKENS_PER_FRAME, dataset_of

pytest.importorskip("av", reason="frames are decoded with PyAV (pip install lrc-kernels[video])")


@pytest.fixture
def model():
    """One layer of attention over tokens and the frames put in their places, in fp64: rows of a batch in, hidden states
    [N, 8] and the loss out."""
    torch.manual_seed(0)
    table, pixels = (torch.randn(rows, 8, dtype=torch.float64, requires_grad=True) for rows in (300, 3))
    mixing = torch.randn(3, 8, 8, dtype=torch.float64, requires_grad=True)

    def run(batch):
        hidden = table[batch.input_ids]
        if len(batch.frames):
            # Rows differ within a frame, or a swap of two rows would pass.
            seen = batch.frames.double().mean((2, 3)) / 255 @ pixels
            scale = torch.arange(1, TOKENS_PER_FRAME + 1, dtype=torch.float64)[:, None]
            hidden = hidden.index_put((batch.visual_index,), (seen[:, None] * scale).flatten(0, 1))
        q, k, v = ((hidden @ weight)[:, None] for weight in mixing)
        hidden = hidden + varlen_attention(q, k, v, cu_seqlens_q=batch.layout)[:, 0]
        real = batch.targets != -100
        losses = torch.nn.functional.cross_entropy(hidden[real] @ table.T, batch.targets[real], reduction="none")
        return hidden, (losses * batch.loss_weight[real].double()).sum()

    return run, (table, pixels, mixing)


def test_packed_outputs_losses_and_gradients_are_those_of_samples_alone(index, model):
    run, parameters = model
    dataset = dataset_of(index, packs_per_step=16)
    packed = [batch for batch in PackedLoader(dataset) if batch.num_targets]
    hidden = {}
    for batch in packed:
        hidden |= dict(zip(batch.sample_ids.tolist(), run(batch)[0].split(batch.layout.lengths), strict=True))
    alone = []
    for i in range(14):
        input_ids, labels, visual = map(torch.from_numpy, index.tokens(i))
        times = index.timestamps(i) if index.media(i) else []
        video = decode_frames(index.media(i), times, size=(16, 16)) if len(times) else None
        frames = {} if video is None else {"frames": video.frames, "frame_pts": video.pts}
        sample = Sample(input_ids, visual, labels=labels, sample_id=i, **frames)
        alone.append(pack_samples([sample], clip_frames=4, token_weight=dataset.token_weights(0, [i])))
        torch.testing.assert_close(hidden[i], run(alone[-1])[0], rtol=0, atol=1e-10)
    sums = []
    for batches in (packed, alone):
        loss = sum(run(batch)[1] for batch in batches)
        sums.append([loss.detach(), *torch.autograd.grad(loss, parameters)])
    for both in zip(*sums, strict=True):
        torch.testing.assert_close(*both, rtol=0, atol=1e-10)


def test_nothing_of_a_sample_reaches_another(index, model):
    run, _ = model
    dataset = dataset_of(index)
    (batch,) = [b for b in PackedLoader(dataset) if 0 in b.sample_ids.tolist()]
    assert len(batch.layout.lengths) > 1
    before = run(batch)[0].split(batch.layout.lengths)
    at = batch.sample_ids.tolist().index(0)
    start, stop = batch.layout.cu_seqlens[at : at + 2].tolist()
    inside = (batch.visual_index >= start) & (batch.visual_index < stop)
    batch.frames[inside[::TOKENS_PER_FRAME]] += 17
    text = torch.arange(start, stop)
    text = text[~torch.isin(text, batch.visual_index)]
    batch.input_ids[text] = (batch.input_ids[text] + 1) % 256
    for i, (rows, was) in enumerate(zip(run(batch)[0].split(batch.layout.lengths), before, strict=True)):
        assert torch.equal(rows, was) == (i != at)


@pytest.mark.parametrize("loss", ["token", "sample", "sqrt"])
def test_gradients_are_the_same_however_samples_are_packed_and_shared(index, model, loss):
    """The step over all samples, by strategy, data-parallel ranks and accumulation; sequence-parallel ranks each hold a
    part of the rows and their weights."""
    run, parameters = model
    wanted = None
    for strategy, max_tokens, packs in (("in_order", 160, 16), ("open_best_fit", 160, 16), ("bfd", 1000, 4)):
        config = PackConfig(max_tokens=max_tokens, strategy=strategy, drop_last=False)
        dataset = dataset_of(index, packs_per_step=packs, loss=loss, config=config)
        assert dataset.plan.num_steps == 1
        for dp_size in (1, 2):
            batches = [b for rank in range(dp_size) for b in PackedLoader(dataset, rank=ParallelRank(rank, dp_size))]
            total = sum(run(batch)[1] for batch in batches if batch.num_targets)
            gradients = torch.autograd.grad(total, parameters)
            wanted = wanted or gradients
            # Weights are stored in fp32: they round alike, but 1 / 3 of 1 / 4 is not 1 / 12 to the last bit.
            for a, b in zip(gradients, wanted, strict=True):
                torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-9)
            weights = {batch.pack_id: batch.loss_weight for batch in batches}
        for sp_size in (2, 3):
            shards = [
                {
                    batch.pack_id: batch.loss_weight
                    for batch in PackedLoader(
                        dataset,
                        rank=ParallelRank(0, 1, rank, sp_size),
                        agree=list,
                        local_indices=lambda layout, rank=rank, n=sp_size: torch.arange(layout.num_tokens)[rank::n],
                    )
                }
                for rank in range(sp_size)
            ]
            for pack, whole in weights.items():
                parts = torch.zeros_like(whole)
                for rank, shard in enumerate(shards):
                    parts[rank::sp_size] = shard[pack]
                assert torch.equal(parts, whole)
