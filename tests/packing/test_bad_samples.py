# SPDX-License-Identifier: Apache-2.0
"""What becomes of samples that cannot be decoded: masked, dropped, too many, slow, hanging, and damaged in part."""

from __future__ import annotations

import math
import threading
import time

import numpy as np
import pytest
import torch

from lrc_kernels.packing import BadSampleError, PackedLoader, ParallelRank, TooManyBadSamples
from lrc_kernels.packing import decode as decode_module
from tests.packing.datasets import COUNTS, TOKENS_PER_FRAME, dataset_of, make_index, threads_named, write_videos
from tests.packing.videos import level

pytest.importorskip("av", reason="frames are decoded with PyAV (pip install lrc-kernels[video])")


@pytest.fixture
def own(tmp_path):
    """An index whose files a test may damage."""
    write_videos(tmp_path, COUNTS)
    return make_index(tmp_path)


def damage(index):
    """One file in each way that a file can be bad; v1 stays whole. Sizes stay as they were where the bytes change."""
    folder = index.roots[0]
    text = folder / "v0.mp4"
    text.write_bytes(b"x" * text.stat().st_size)
    (folder / "v2.mp4").write_bytes((folder / "v2.mp4").read_bytes()[:-50])
    (folder / "v3.mp4").unlink()
    return {i for i in range(14) if i % 5 in (0, 2, 3)}


def test_damaged_files_are_masked(own):
    before = {batch.pack_id: batch for batch in PackedLoader(dataset_of(own, packs_per_step=2))}
    bad = damage(own)
    loader = PackedLoader(dataset_of(own, packs_per_step=2), max_bad_fraction=1.0)
    lost = 0.0
    for batch in loader:
        batch.validate()
        was = before[batch.pack_id]
        assert torch.equal(batch.input_ids, was.input_ids) and batch.layout == was.layout
        assert torch.equal(batch.visual_index, was.visual_index) and batch.frames.shape == was.frames.shape
        rows = torch.repeat_interleave(batch.sample_ids, torch.tensor(batch.layout.lengths))
        masked = torch.isin(rows, torch.tensor(sorted(bad)))
        assert (batch.targets[masked] == -100).all() and not batch.loss_weight[masked].any()
        assert torch.equal(batch.targets[~masked], was.targets[~masked])
        assert torch.equal(batch.loss_weight[~masked], was.loss_weight[~masked])
        frames = torch.repeat_interleave(masked[batch.visual_index], 1)[::TOKENS_PER_FRAME]
        assert torch.equal(batch.frame_valid, ~frames) and not batch.frames[frames].any()
        assert torch.equal(batch.frames[~frames], was.frames[~frames])
        lost += (was.loss_weight - batch.loss_weight).double().sum().item()
    assert loader.bad.keys() == bad and loader.stats.bad == len(bad)
    assert loader.stats.lost_weight == pytest.approx(lost, rel=1e-5) and sum(loader.stats.reasons.values()) == len(bad)
    reasons = {i % 5: loader.bad[i].reason for i in bad}
    assert "cannot read" in reasons[0] and "bytes, but" in reasons[2] and "No such file" in reasons[3]
    assert loader.bad[0].where.endswith("set.jsonl:1")


def test_damaged_files_are_dropped_or_raise(own):
    bad = damage(own)
    dataset = dataset_of(own, packs_per_step=1)
    batches = list(PackedLoader(dataset, on_bad="drop", max_bad_fraction=1.0))
    for batch in batches:
        batch.validate()
        assert batch.frame_valid.all() or batch.num_targets == 0
    kept = {i for batch in batches if batch.num_targets for i in batch.sample_ids.tolist()}
    assert kept == set(range(14)) - bad and len(batches) == len(dataset)
    with pytest.raises(BadSampleError, match=r"sample \d+ \(.*set.jsonl:\d+\): "):
        list(PackedLoader(dataset, on_bad="raise"))
    for sp_rank in range(2):
        # Ranks that decode other frames of a sample hear of it from each other.
        both = PackedLoader(
            dataset,
            rank=ParallelRank(0, 1, sp_rank, 2),
            on_bad="drop",
            max_bad_fraction=1.0,
            agree=agreement(dataset, bad),
        )
        for batch, whole in zip(both, batches, strict=True):
            batch.validate()
            assert torch.equal(batch.input_ids, whole.input_ids)
    with pytest.raises(BadSampleError, match="sequence-parallel ranks must agree on it, give agree="):
        list(PackedLoader(dataset, rank=ParallelRank(0, 1, 0, 2)))


def agreement(dataset, bad):
    """All ranks' findings for each pack with frames, in order."""
    packs = (dataset.plan.samples_of_pack(pack).tolist() for pack in range(len(dataset)))
    packs = [ids for ids in packs if any(dataset.num_clips(i) for i in ids)]
    answers = iter([[k for k, i in enumerate(ids) if i in bad] for ids in packs])
    return lambda found: sorted({*found, *next(answers)})


def test_the_breaker(own):
    damage(own)
    dataset = dataset_of(own)
    with pytest.raises(TooManyBadSamples, match=r"1 of \d+ samples could not be decoded, the last of them:\n  sample"):
        list(PackedLoader(dataset, max_bad_fraction=0.0))
    (own.roots[0] / "v1.mp4").unlink()
    with pytest.raises(TooManyBadSamples, match="samples in a row could not be decoded") as error:
        list(PackedLoader(dataset, max_bad_fraction=1.0, max_bad_run=2))
    assert 3 <= len(error.value.last) <= 5 and str(error.value.last[-1]) in str(error.value)
    with pytest.raises(TooManyBadSamples, match=r"11 of \d+ samples") as error:
        list(PackedLoader(dataset))
    assert len(error.value.last) == 5
    assert threads_named("lrc-decode") == 0


def test_a_frame_beside_a_whole_one_stands_in(index, monkeypatch):
    real = decode_module.decode_frames

    def with_damage(holes):
        def decode(media, times, *, out, **options):
            video = real(media, times, out=out, **options)
            for t in holes:
                hit = np.isclose(times, t)
                video.valid[torch.from_numpy(hit)] = False
                out[torch.from_numpy(hit)] = 0
            return video

        return decode

    dataset = dataset_of(index)
    one = index.timestamps(0)
    monkeypatch.setattr(decode_module, "decode_frames", with_damage([one[0], one[3]]))
    for ranks in (1, 2, 4):
        opened = [dataset.open(int(pack_of(dataset, 0)), share=(rank, ranks)) for rank in range(ranks)]
        for pack in opened:
            for part in pack.parts.values():
                part.run()
        at = opened[0].sample_ids.index(0)
        parts = [pack.parts[at] for pack in opened if at in pack.parts]
        frames, valid = torch.cat([p.frames for p in parts]), torch.cat([p.valid for p in parts])
        assert not any(part.reason for part in parts)
        assert valid.tolist() == [False, True, True, False, True, True, True, True]
        assert torch.equal(frames[0], frames[1]) and torch.equal(frames[3], frames[2])
        assert level(frames[4]) == math.floor(one[4] * 10 + 1e-6)
    monkeypatch.setattr(decode_module, "decode_frames", with_damage(one[2:5]))
    opened = dataset.open(int(pack_of(dataset, 0)))
    part = opened.parts[opened.sample_ids.index(0)]
    part.run()
    assert "3 of 8 frames of" in part.reason and not part.frames.any()


def pack_of(dataset, sample_id):
    at = int(np.flatnonzero(dataset.plan.sample_index == sample_id)[0])
    return np.searchsorted(dataset.plan.pack_ptr, at, side="right") - 1


def test_slow_and_hanging_decoders(index, monkeypatch):
    real, release, hung = decode_module.decode_frames, threading.Event(), []

    def decode(media, times, *, progress, **options):
        if media.name == "v0.mp4":
            time.sleep(0.3)
            progress(1, 2)
        if media.name == "v1.mp4" and not hung:
            hung.append(options["out"])
            release.wait(20)
            hung[0].fill_(7)
        return real(media, times, progress=progress, **options)

    monkeypatch.setattr(decode_module, "decode_frames", decode)
    with PackedLoader(dataset_of(index), decode_timeout_s=0.25, max_bad_fraction=1.0, decode_threads=1) as loader:
        batches = list(loader)
        release.set()
        time.sleep(0.1)
        slow = {i for i in range(14) if i % 5 == 0}
        reasons = {i: bad.reason for i, bad in loader.bad.items()}
        assert slow <= reasons.keys() and len(reasons) == len(slow) + 1
        assert {reasons[i] for i in slow} == {"decoding took longer than 0.25 s"}
        assert "decoding hung for longer than 0.25 s" in reasons.values()
    # What the decoder writes once it wakes up reaches no batch.
    for batch in batches:
        assert not batch.frames[~batch.frame_valid].any()
    time.sleep(0.1)
    assert threads_named("lrc-decode") == 0
