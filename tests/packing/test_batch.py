# SPDX-License-Identifier: Apache-2.0
"""PackedBatch: what samples become when they lie back to back, and what `validate` and `pack_samples` refuse."""

import dataclasses

import pytest
import torch

from lrc_kernels.packing import Sample, pack_samples


def sample(n=7, at=(2, 3), num_frames=2, seed=0, **changed):
    random = torch.Generator().manual_seed(seed)
    mask = torch.zeros(n, dtype=torch.bool)
    mask[list(at)] = True
    frames = torch.randint(0, 256, (num_frames, 3, 4, 4), generator=random).to(torch.uint8) if num_frames else None
    labels = torch.full((n,), -100)
    labels[-3:] = torch.arange(3) + 10
    fields = {
        "input_ids": torch.randint(0, 50, (n,), generator=random),
        "visual": mask,
        "frames": frames,
        "labels": labels,
        "sample_id": seed,
    }
    return Sample(**{**fields, **changed})


def pack(**changed):
    samples = [sample(), sample(5, (), 0, 1), sample(6, (0, 1, 5), 4, 2, labels=None)]
    return dataclasses.replace(pack_samples(samples, clip_frames=2, pack_id=3, step=9), **changed)


def test_samples_back_to_back():
    batch = pack()
    batch.validate()
    assert batch.layout.lengths == (7, 5, 6) and batch.num_droppable == (1, 0, 3) and batch.num_targets == 6
    assert batch.targets.tolist() == [-100] * 3 + [10, 11, 12, -100] + [-100] + [10, 11, 12, -100] + [-100] * 6
    assert batch.position_ids.tolist() == [*range(7), *range(5), *range(6)]
    assert batch.visual_index.tolist() == [2, 3, 12, 13, 17] and batch.frames.shape == (6, 3, 4, 4)
    assert batch.loss_weight.sum().item() == pytest.approx(1) and batch.sample_ids.tolist() == [0, 1, 2]
    assert (batch.pack_id, batch.step, batch.frame_valid.all().item(), len(batch.frame_pts)) == (3, 9, True, 6)


def test_a_pack_without_frames_or_targets():
    batch = pack_samples([sample(5, (), 0, labels=None)], clip_frames=4, token_weight=0.5)
    batch.validate()
    assert batch.frames.shape[0] == 0 and batch.num_targets == 0 and not batch.loss_weight.any()


def test_a_visual_token_with_a_target_is_not_droppable():
    batch = pack_samples([sample(at=(2, 3))], clip_frames=2)
    assert batch.visual_index.tolist() == [2, 3] and batch.targets[3] == 10
    assert batch.droppable.nonzero().flatten().tolist() == [2] and batch.num_droppable == (1,)


def test_moving_keeps_everything():
    batch = pack()
    moved = batch.to("cpu")
    for field in dataclasses.fields(batch):
        before, after = getattr(batch, field.name), getattr(moved, field.name)
        assert torch.equal(before, after) if isinstance(before, torch.Tensor) else before == after
    assert batch.to("meta").frames.device.type == "meta" and batch.to("meta").layout.cu_seqlens.device.type == "meta"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"targets": torch.zeros(3)}, "targets must have shape \\[18\\], got \\[3\\]"),
        ({"frames": torch.zeros(6, 3, 4, 4)}, "frames must be uint8"),
        ({"clip_frames": 4}, "frames must be whole clips of 4, got 6 frames"),
        ({"num_droppable": (1, 1, 2)}, "num_droppable\\[1\\] must be the droppable tokens \\(0\\), got 1"),
        ({"num_droppable": (1, 3)}, "num_droppable must have one entry per sequence \\(3\\), got 2"),
        (
            {"visual_index": torch.arange(5)},
            "droppable\\[0\\] must be True \\(True: visual and predicts nothing\\), got False",
        ),
        (
            {"visual_index": torch.tensor([3, 2, 12, 13, 17])},
            "visual_index must be int64, ascending and within the 18 rows",
        ),
        ({"visual_index": torch.tensor([2, 3, 12, 13, 18])}, "visual_index must be int64, ascending"),
        ({"visual_index": torch.tensor([-1, 3, 12, 13, 17])}, "visual_index must be int64, ascending"),
        ({"num_targets": 5}, "num_targets must be 6, the rows with a target, got 5"),
        ({"loss_weight": torch.full((18,), 0.1)}, "loss_weight\\[0\\] must be 0 where there is no target"),
        ({"loss_weight": torch.full((18,), torch.nan)}, "loss_weight\\[0\\] must be 0 where"),
        (
            {"targets": torch.zeros(18).long(), "num_targets": 18},
            "targets\\[6\\] must be -100, the last row of sequence 0",
        ),
    ],
)
def test_validate(change, message):
    with pytest.raises(ValueError, match=message):
        pack(**change).validate()


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"input_ids": torch.zeros(7)}, "samples\\[0\\].input_ids must be int64 \\[n\\], n > 0, got torch.float32"),
        ({"input_ids": torch.zeros(0).long()}, "samples\\[0\\].input_ids must be int64"),
        ({"visual": torch.zeros(6).bool()}, "samples\\[0\\].visual must be bool \\[7\\], got torch.bool \\[6\\]"),
        ({"labels": torch.zeros(6).long()}, "samples\\[0\\].labels must be int64 \\[7\\]"),
        ({"frames": torch.zeros(3, 3, 4, 4).byte()}, "samples\\[0\\].frames must be whole clips of 2, got 3 frames"),
        ({"frames": torch.zeros(2, 3, 4, 4)}, "samples\\[0\\].frames must be uint8"),
        ({"frames": None}, "samples\\[0\\].visual must be set exactly where there are frames, got 2 tokens, 0 frames"),
        ({"frame_pts": torch.zeros(3)}, "samples\\[0\\].frame_pts must have shape \\[2\\], got \\[3\\]"),
    ],
)
def test_bad_samples(changed, message):
    with pytest.raises(ValueError, match=message):
        pack_samples([sample(**changed)], clip_frames=2)
    with pytest.raises(ValueError, match="samples must hold at least one sample"):
        pack_samples([], clip_frames=2)


def test_bad_types():
    with pytest.raises(ValueError, match="clip_frames must be >= 1, got 0"):
        pack_samples([sample()], clip_frames=0)
    with pytest.raises(TypeError, match="samples\\[0\\] must be a Sample, got int"):
        pack_samples([3], clip_frames=2)
    with pytest.raises(TypeError, match="samples\\[0\\].input_ids must be a tensor, got list"):
        pack_samples([sample(input_ids=[1, 2])], clip_frames=2)
    with pytest.raises(TypeError, match="samples\\[0\\].frames must be a tensor, got str"):
        pack_samples([sample(frames="a.mp4")], clip_frames=2)


@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_shards_together_are_the_batch(ranks):
    batch = pack()
    rows = torch.arange(18 + (-18) % ranks).where(torch.arange(18 + (-18) % ranks) < 18, -1)
    seen, visual = torch.zeros(18, dtype=torch.int64), []
    for rank in range(ranks):
        clips = range(3 * rank // ranks, 3 * (rank + 1) // ranks)
        part = dataclasses.replace(batch, visual_index=batch.visual_index[:3]).shard(
            rows.view(-1, ranks)[:, rank], clips
        )
        part.validate()
        real = part.rows >= 0
        own = part.rows[real]
        seen[own] += 1
        for name in ("input_ids", "targets", "position_ids", "loss_weight", "droppable"):
            assert torch.equal(getattr(part, name)[real], getattr(batch, name)[own])
        assert (part.targets[~real] == -100).all() and not part.loss_weight[~real].any()
        assert torch.equal(part.frames, batch.frames[2 * clips.start : 2 * clips.stop])
        assert part.clips.tolist() == list(clips) and part.layout == batch.layout
        visual += part.visual_index.tolist()
    assert (seen == 1).all() and visual == batch.visual_index[:3].tolist()


def test_shards_of_scattered_clips_and_of_positions_in_three_axes():
    batch = pack(position_ids=torch.arange(54).view(3, 18), visual_index=torch.tensor([2, 3, 12]))
    part = batch.shard(torch.tensor([17, -1, 0]), [2, 0])
    part.validate()
    assert part.position_ids.tolist() == [[17, 0, 0], [35, 0, 18], [53, 0, 36]]
    assert torch.equal(part.frames, batch.frames[[4, 5, 0, 1]]) and part.visual_index.tolist() == [12, 2]
    assert part.to("meta").rows.device.type == "meta"
    assert pack().shard(torch.arange(18)).frames.shape == (6, 3, 4, 4)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((torch.tensor([18]),), "indices must be in \\[-1, 18\\), got 18 at index 0"),
        ((torch.tensor([-2]),), "indices must be in \\[-1, 18\\), got -2 at index 0"),
        ((torch.tensor([[1]]),), "indices must have 1 dimensions"),
        ((torch.tensor([1]), [3]), "clips must be in \\[0, 3\\), got 3 at index 0"),
        ((torch.tensor([1]), [0]), "visual_index must hold equally many rows for each of 3 clips, got 5"),
    ],
)
def test_bad_shards(arguments, message):
    with pytest.raises(ValueError, match=message):
        pack().shard(*arguments)
    with pytest.raises(TypeError, match="indices must be one of int64"):
        pack().shard(torch.tensor([1.0]))
    with pytest.raises(ValueError, match="got a batch that is a shard already"):
        pack().shard(torch.tensor([1])).shard(torch.tensor([0]))
    shard = pack().shard(torch.tensor([4, -1]))
    with pytest.raises(ValueError, match="targets\\[1\\] must be -100 \\(padding"):
        dataclasses.replace(shard, targets=torch.tensor([11, 5]), num_targets=2).validate()


def test_weights_of_each_sample():
    samples = [sample(), sample(5, (), 0, 1)]
    batch = pack_samples(samples, clip_frames=2, token_weight=[0.25, 1 / 12])
    assert batch.loss_weight[batch.targets != -100].tolist() == pytest.approx([0.25] * 3 + [1 / 12] * 3)
    with pytest.raises(ValueError, match="token_weight must hold one weight per sample \\(2\\), got 1"):
        pack_samples(samples, clip_frames=2, token_weight=[1.0])
