# SPDX-License-Identifier: Apache-2.0
"""Loaders in real processes: sequence-parallel ranks that agree on bad samples over gloo, one state of all ranks."""

from __future__ import annotations

import hashlib

import pytest
import torch
from torch import distributed

from lrc_kernels.packing import (
    Index,
    PackConfig,
    PackedDataset,
    PackedLoader,
    ParallelRank,
    build_index,
    merge_states,
    plan_packs,
)
from tests.packing.datasets import (
    SAMPLING,
    TEMPLATE,
    TOKENS_PER_FRAME,
    ByteTokenizer,
    talk,
    write_dataset,
    write_videos,
)

pytest.importorskip("av", reason="frames are decoded with PyAV (pip install lrc-kernels[video])")


def dataset_of(folder):
    index = Index.load(folder)
    plan = plan_packs(index, PackConfig(max_tokens=150), packs_per_step=2, balance="lpt")
    return PackedDataset(index, plan, image_size=16)


def of_all_ranks(value):
    values = [None] * distributed.get_world_size()
    distributed.all_gather_object(values, value)
    return values


def share_packs(folder):
    """One pack on two ranks at a time: [pack, tokens and weights, clips, frames that are valid] and the state."""

    def agree(found):
        return sorted({position for positions in of_all_ranks(found) for position in positions})

    rank = ParallelRank(0, 1, distributed.get_rank(), 2)
    with PackedLoader(dataset_of(folder), rank=rank, agree=agree, max_bad_fraction=1.0) as loader:
        seen = []
        for batch in loader:
            batch.validate()
            rows = torch.cat([batch.input_ids, batch.targets, batch.loss_weight.double().view(torch.int64)])
            digest = hashlib.sha256(rows.numpy().tobytes()).hexdigest()
            assert len(set(of_all_ranks(digest))) == 1
            seen.append([batch.pack_id, digest, len(batch.frames), batch.frame_valid.tolist()])
        return seen, merge_states(of_all_ranks(loader.state_dict())), sorted(loader.bad)


@pytest.mark.distributed
def test_ranks_that_share_packs_agree_on_bad_samples(tmp_path, rank_pool):
    write_videos(tmp_path, [40, 20, 10])
    talks = [talk(f"{i}", "ab", video=f"v{i % 3}.mp4") for i in range(12)]
    options = {"tokens_per_frame": TOKENS_PER_FRAME, "template": TEMPLATE}
    index = build_index(write_dataset(tmp_path, talks), SAMPLING, ByteTokenizer(), tmp_path / "index", **options)
    video = index.roots[0] / "v0.mp4"
    # The second half of the frames is damaged, which the rank of the first half cannot see.
    data = bytearray(video.read_bytes())
    half = len(data) // 2
    data[half : half + 600] = b"\xff" * 600
    video.write_bytes(data)
    (one, state, bad), (two, other, bad_of_two) = rank_pool.run(share_packs, str(tmp_path / "index"))
    assert state == other and bad == bad_of_two and bad
    assert {i % 3 for i in bad} == {0}
    whole = list(PackedLoader(dataset_of(tmp_path / "index"), max_bad_fraction=1.0))
    for batch, a, b in zip(whole, one, two, strict=True):
        assert batch.pack_id == a[0] == b[0] and batch.frame_valid.tolist() == a[3] + b[3]
    resumed = PackedLoader(dataset_of(tmp_path / "index"), max_bad_fraction=0.0)
    resumed.load_state_dict({**state, "step": 0})
    assert [torch.equal(x.targets, y.targets) for x, y in zip(resumed, whole, strict=True)] == [True] * len(whole)
