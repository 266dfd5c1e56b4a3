# SPDX-License-Identifier: Apache-2.0
"""PackedDataset and PackedLoader: every sample once, the right pixels, weights that sum to one, and bad samples."""

from __future__ import annotations

import gc
import math
import os
import threading

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from lrc_kernels.packing import (
    PackConfig,
    PackedDataset,
    PackedLoader,
    ParallelRank,
    TemporalSampling,
    build_index,
    decode_frames,
    pack_samples,
    plan_packs,
)
from lrc_kernels.packing.batch import Sample
from lrc_kernels.packing.decode import activity_between
from tests.packing.datasets import (
    CONFIG,
    COUNTS,
    TEMPLATE,
    ByteTokenizer,
    dataset_of,
    make_index,
    talk,
    threads_named,
    write_dataset,
    write_videos,
)
from tests.packing.videos import level

pytest.importorskip("av", reason="frames are decoded with PyAV (pip install lrc-kernels[video])")


def ids_of(batches):
    return [i for batch in batches for i in batch.sample_ids.tolist() if i >= 0]


def same(a, b):
    names = [name for name, value in vars(a).items() if isinstance(value, torch.Tensor)]
    assert names == [name for name, value in vars(b).items() if isinstance(value, torch.Tensor)]
    for name in names:
        assert torch.equal(getattr(a, name), getattr(b, name)), name
    assert a.layout == b.layout and (a.pack_id, a.step, a.num_targets) == (b.pack_id, b.step, b.num_targets)


def test_a_pack_is_its_samples(index):
    dataset = dataset_of(index)
    seen = []
    for pack in range(len(dataset)):
        batch = dataset[pack]
        batch.validate()
        samples, ids = [], batch.sample_ids.tolist()
        for i in ids:
            input_ids, labels, visual = map(torch.from_numpy, index.tokens(i))
            video = (
                None if index.media(i) is None else decode_frames(index.media(i), index.timestamps(i), size=(16, 16))
            )
            frames = {} if video is None else {"frames": video.frames, "frame_pts": video.pts}
            samples.append(Sample(input_ids, visual, labels=labels, sample_id=i, **frames))
        weights = dataset.token_weights(batch.step, ids)
        alone = pack_samples(samples, clip_frames=4, token_weight=weights, pack_id=pack, step=pack)
        same(batch, alone if len(alone.frames) else batch)
        assert batch.loss_weight.sum().item() == pytest.approx(1)
        seen += ids
    assert sorted(seen) == list(range(14)) and not dataset.bad


def test_frames_are_those_shown_at_the_times_of_the_rule(index):
    dataset = dataset_of(index)
    for batch in map(dataset.__getitem__, range(len(dataset))):
        at = 0
        for i in batch.sample_ids.tolist():
            times = index.timestamps(i) if index.media(i) else []
            for t in times:
                assert level(batch.frames[at]) == math.floor(t * 10 + 1e-6)
                at += 1
        assert at == len(batch.frames) and batch.frame_valid.all()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("prefetch", [0, 2])
def test_a_loader_gives_what_the_dataset_has(index, threads, prefetch):
    dataset = dataset_of(index)
    with PackedLoader(dataset, decode_threads=threads, prefetch_packs=prefetch) as loader:
        batches = list(loader)
        assert len(loader) == len(batches) == len(dataset)
        for pack, batch in enumerate(batches):
            same(batch, dataset[pack])
        assert loader.stats.samples == 14 and loader.stats.packs == len(dataset) and loader.stats.bad == 0
        assert loader.stats.plan == dataset.plan.stats(1) and loader.stats.plan.binding == {"tokens": 1.0}
        assert loader.stats.utilisation == pytest.approx(dataset.plan.stats().utilisation)
        assert [batch.pack_id for batch in loader] == [batch.pack_id for batch in batches]


def test_batches_go_to_a_device(index):
    for batch in PackedLoader(dataset_of(index), device="meta"):
        assert batch.frames.device.type == batch.layout.cu_seqlens.device.type == batch.input_ids.device.type == "meta"


@pytest.mark.gpu
def test_batches_arrive_on_the_gpu_from_pinned_memory(index):
    dataset = dataset_of(index)
    assert all(batch.frames.is_pinned() and batch.input_ids.is_pinned() for batch in PackedLoader(dataset))
    for batch in PackedLoader(dataset, device="cuda"):
        assert batch.frames.is_cuda and batch.layout.cu_seqlens.is_cuda
        same(batch.to("cpu", non_blocking=False), dataset[batch.pack_id])


@pytest.mark.parametrize("workers", [0, 2])
def test_torch_data_loader(index, workers):
    dataset = dataset_of(index)
    loaded = list(DataLoader(dataset, batch_size=None, num_workers=workers))
    assert len(loaded) == len(dataset)
    for pack, batch in enumerate(loaded):
        same(batch, dataset[pack])


@pytest.mark.parametrize("workers", [0, 2])
def test_stateful_data_loader_goes_on_within_an_epoch(index, workers):
    stateful = pytest.importorskip("torchdata.stateful_dataloader", reason="torchdata comes with lrc-kernels[test]")
    dataset = dataset_of(index, config=PackConfig(max_tokens=90, drop_last=False))

    def loader():
        return stateful.StatefulDataLoader(dataset, batch_size=None, num_workers=workers)

    first = loader()
    stream, delivered = iter(first), 3
    for pack in range(delivered):
        same(next(stream), dataset[pack])
    state = first.state_dict()
    rest = list(stream)
    assert len(rest) == len(dataset) - delivered > 2
    second = loader()
    second.load_state_dict(state)
    for pack, (batch, again) in enumerate(zip(rest, second, strict=True), delivered):
        same(batch, dataset[pack])
        same(again, dataset[pack])


@pytest.mark.parametrize("loss", ["token", "sample", "sqrt"])
def test_weights_are_the_same_however_samples_are_packed(index, loss):
    """One step over the whole epoch: the weight of each sample, whatever strategy, dp and accumulation."""
    share = {"token": lambda n: n, "sample": lambda n: 1, "sqrt": math.sqrt}[loss]
    supervised = index.columns["n_supervised"].tolist()
    total = sum(map(share, supervised))
    for strategy, max_tokens in (("in_order", 160), ("open_best_fit", 160), ("bfd", 120), ("bfd", 1000)):
        config = PackConfig(max_tokens=max_tokens, strategy=strategy, drop_last=False)
        for dp_size in (1, 2, 4):
            dataset = dataset_of(index, packs_per_step=16, loss=loss, config=config)
            assert dataset.plan.num_steps == 1
            found = {}
            for rank in range(dp_size):
                for batch in PackedLoader(dataset, rank=ParallelRank(rank, dp_size)):
                    parts = batch.loss_weight.double().split(batch.layout.lengths)
                    found |= {i: part.sum().item() for i, part in zip(batch.sample_ids.tolist(), parts, strict=True)}
            found.pop(-1, None)
            assert sorted(found) == list(range(14)) and sum(found.values()) == pytest.approx(1, abs=1e-6)
            assert all(found[i] == pytest.approx(share(supervised[i]) / total, rel=1e-5) for i in found)


@pytest.mark.parametrize("balance", ["none", "lpt", "group"])
@pytest.mark.parametrize(("dp_size", "sp_size"), [(1, 1), (2, 1), (1, 2), (2, 3), (4, 2)])
def test_ranks_share_an_epoch(index, balance, dp_size, sp_size):
    dataset = dataset_of(index, packs_per_step=4, balance=balance)
    whole = {batch.pack_id: batch for batch in map(dataset.__getitem__, range(len(dataset)))}
    samples, frames = [], 0
    for dp_rank in range(dp_size):
        streams = [
            list(PackedLoader(dataset, rank=ParallelRank(dp_rank, dp_size, sp_rank, sp_size), agree=list))
            for sp_rank in range(sp_size)
        ]
        for shards in zip(*streams, strict=True):
            batch = whole[shards[0].pack_id]
            samples += ids_of(shards[:1])
            for shard in shards:
                shard.validate()
                assert torch.equal(shard.input_ids, batch.input_ids) and shard.step == batch.step
                assert torch.equal(shard.loss_weight, batch.loss_weight)
                # No rank decodes more than its share and one clip.
                assert len(shard.frames) <= len(batch.frames) / sp_size + 4
                frames += len(shard.frames)
            for name in ("frames", "frame_pts", "frame_valid", "visual_index"):
                assert torch.equal(torch.cat([getattr(shard, name) for shard in shards]), getattr(batch, name))
    assert sorted(samples) == list(range(14)) and frames == sum(len(batch.frames) for batch in whole.values())


def test_a_loader_gives_shards_of_rows(index):
    dataset = dataset_of(index)
    for rank in range(2):
        loader = PackedLoader(
            dataset,
            rank=ParallelRank(0, 1, rank, 2),
            agree=list,
            local_indices=lambda layout, rank=rank: torch.arange(rank, layout.num_tokens, 2),
        )
        for batch in loader:
            batch.validate()
            assert torch.equal(batch.input_ids, dataset[batch.pack_id].input_ids[rank::2])


def test_aligned_samples_and_empty_packs(index):
    config = PackConfig(max_tokens=192, align=16, drop_last=False)
    dataset = dataset_of(index, packs_per_step=16, config=config)
    batches = list(PackedLoader(dataset))
    assert len(batches) == 16 and sorted(ids_of(batches)) == list(range(14))
    empty = [batch for batch in batches if batch.sample_ids.tolist() == [-1]]
    assert empty and all(batch.layout.lengths == (1,) and batch.num_targets == 0 for batch in empty)
    for pack, batch in enumerate(batches):
        batch.validate()
        if batch.num_targets:
            assert batch.layout.num_tokens == dataset.plan.n_tokens[pack]
            starts = batch.layout.cu_seqlens[:-1][batch.sample_ids >= 0]
            assert (starts % 16 == 0).all()


def test_nothing_grows_over_many_epochs(tmp_path):
    write_videos(tmp_path, COUNTS)
    dataset = dataset_of(make_index(tmp_path, n=4), config=PackConfig(max_tokens=90, drop_last=False))
    loader = PackedLoader(dataset, decode_threads=3)

    def census():
        gc.collect()
        return threading.active_count(), len(os.listdir("/proc/self/fd"))

    for epoch in range(3):
        loader.set_epoch(epoch)
        assert sorted(ids_of(loader)) == list(range(4))
    before, resident = census(), rss()
    orders = set()
    for epoch in range(200):
        loader.set_epoch(epoch)
        # An iteration that is left early cleans up after itself.
        first = ids_of([next(iter(loader))])
        orders.add((*first, *ids_of(loader)))
    assert census() == before and len(orders) > 6 and {len(order) for order in orders} == {4}
    assert rss() - resident < 64 * 2**20


def rss():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def test_an_iteration_ends_with_its_loader(index):
    loader = PackedLoader(dataset_of(index))
    first = iter(loader)
    one = next(first)
    second = iter(loader)
    two = next(second)
    assert (one.pack_id, two.pack_id) == (0, 1)
    with pytest.raises(RuntimeError, match="the loader was closed or iterated anew"):
        next(first)
    del first, second
    assert threads_named("lrc-decode") == 0
    assert [batch.pack_id for batch in loader] == list(range(2, len(loader)))


def test_another_rule_moves_frames_only(index):
    moved = TemporalSampling(multiple_of=4, min_frames=4, max_frames=4, content="packets", snap="keyframe")
    plain, other = dataset_of(index), dataset_of(index, sampling=moved)
    for pack in range(len(plain)):
        a, b = plain[pack], other[pack]
        assert torch.equal(a.input_ids, b.input_ids) and a.frames.shape == b.frames.shape and b.frame_valid.all()
    assert not other.bad


def test_activity_of_a_part():
    whole = np.array([1.0, 2.0, 4.0, 1.0])
    assert activity_between(whole, 3.5, 0.0, 3.5).tolist() == [1, 2, 4, 1]
    assert activity_between(whole, 3.5, 1.0, 3.0).tolist() == [2, 4]
    assert activity_between(whole, 3.5, 0.5, 2.0).tolist() == [1.5, 1.0]
    assert activity_between(whole, 3.5, 3.0, 3.25).tolist() == [0.5]


@pytest.mark.parametrize(
    ("changed", "error", "message"),
    [
        ({"decode_threads": 0}, ValueError, "decode_threads must be >= 1, got 0"),
        ({"prefetch_packs": -1}, ValueError, "prefetch_packs must be >= 0, got -1"),
        ({"on_bad": "skip"}, ValueError, "on_bad must be one of mask, drop, raise, got 'skip'"),
        ({"max_bad_fraction": 1.5}, ValueError, r"max_bad_fraction must be in \[0, 1\], got 1.5"),
        ({"decode_timeout_s": 0}, ValueError, "decode_timeout_s must be above 0, got 0"),
        ({"rank": 3}, TypeError, "rank must be a ParallelRank, got int"),
        ({"rank": ParallelRank(0, 3)}, ValueError, "packs_per_step must be a multiple of dp_size = 3, got 1"),
    ],
)
def test_bad_arguments(index, changed, error, message):
    with pytest.raises(error, match=message):
        PackedLoader(dataset_of(index), **changed)


def test_bad_datasets_and_ranks(index):
    plan = plan_packs(index, CONFIG)
    with pytest.raises(ValueError, match="plan must be of the index's 14 samples, got one of 3"):
        PackedDataset(index, plan_packs([1, 2, 3]))
    with pytest.raises(TypeError, match="index must be a Index, got list"):
        PackedDataset([], plan)
    with pytest.raises(ValueError, match="sampling.multiple_of must be the index's 4, got 8"):
        PackedDataset(index, plan, sampling=TemporalSampling())
    with pytest.raises(ValueError, match="loss must be one of token, sample, sqrt, got 'square'"):
        PackedDataset(index, plan, loss="square")
    with pytest.raises(IndexError):
        PackedDataset(index, plan)[99]
    with pytest.raises(ValueError, match="sp_rank must be below sp_size = 2, got 2"):
        ParallelRank(0, 1, 2, 2)
    with pytest.raises(ValueError, match="dp_size must be >= 1, got 0"):
        ParallelRank(0, 0)


def test_no_frame_of_a_part_comes_from_outside_of_it(tmp_path):
    write_videos(tmp_path, [40])
    rule = TemporalSampling(
        multiple_of=4, min_frames=4, max_frames=4, dense_fps=2, snap="keyframe", snap_tolerance=1.0, content="packets"
    )
    parts = [[0.9, 1.7], [1.5, 3.1], [0.0, 3.9]]
    config = write_dataset(tmp_path, [talk("a", "b", video="v0.mp4", clip=part) for part in parts])
    index = build_index(config, rule, ByteTokenizer(), tmp_path / "index", tokens_per_frame=1, template=TEMPLATE)
    dataset = dataset_of(index, config=PackConfig(max_tokens=1000, drop_last=False))
    (batch,) = PackedLoader(dataset)
    assert batch.frame_valid.all() and not dataset.bad
    for i, pts in zip(batch.sample_ids.tolist(), batch.frame_pts.split(4), strict=True):
        start, end = parts[i]
        # The frame on show at a time may have begun before it, by a tenth of a second here.
        assert pts.min() > start - 0.1 and pts.max() < end
