# SPDX-License-Identifier: Apache-2.0
"""States of loaders: a run that dies anywhere goes on as if it had not, on any number of ranks."""

from __future__ import annotations

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from lrc_kernels.packing import (
    Index,
    PackConfig,
    PackedDataset,
    PackedLoader,
    ParallelRank,
    StateMismatchError,
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

ROOT = Path(__file__).parents[2]


def dataset_of(index, packs_per_step=4, epoch=0, balance="lpt", **options):
    plan = plan_packs(
        index, PackConfig(max_tokens=80), seed=3, epoch=epoch, packs_per_step=packs_per_step, balance=balance
    )
    return PackedDataset(index, plan, **{"image_size": 16, **options})


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("resume")
    write_videos(folder, [40, 20])
    talks = [talk(f"{i}", "abc"[: 1 + i % 3], **({"video": f"v{i % 3}.mp4"} if i % 3 < 2 else {})) for i in range(60)]
    options = {"tokens_per_frame": TOKENS_PER_FRAME, "template": TEMPLATE}
    build_index(write_dataset(folder, talks), SAMPLING, ByteTokenizer(), folder / "index", **options)
    return folder


@pytest.fixture(scope="module")
def index(folder):
    return Index.load(folder / "index")


def line_of(batch):
    """What a batch trains on."""
    pixels = hashlib.sha256(batch.frames.numpy().tobytes() + batch.loss_weight.numpy().tobytes()).hexdigest()
    return [batch.step, batch.pack_id, batch.sample_ids.tolist(), pixels]


def steps_of(lines):
    """Step -> its packs, in the order of their numbers, whichever rank had them."""
    steps = {}
    for step, pack, ids, pixels in lines:
        steps.setdefault(step, []).append((pack, tuple(ids), pixels))
    return [sorted(steps[step]) for step in sorted(steps)]


@pytest.fixture(scope="module")
def uninterrupted(index):
    lines = [line_of(batch) for batch in PackedLoader(dataset_of(index))]
    assert len({i for line in lines for i in line[2]}) == sum(len(line[2]) for line in lines) > 50
    return steps_of(lines)


TRAINER = """
import json, os, sys
from pathlib import Path
from lrc_kernels.packing import Index, PackedLoader, ParallelRank, merge_states
from tests.packing.test_resume import dataset_of, line_of

folder, dp_size = Path(sys.argv[1]), int(sys.argv[2])
index = Index.load(folder / "index")
loaders = [PackedLoader(dataset_of(index), rank=ParallelRank(rank, dp_size)) for rank in range(dp_size)]
streams = [iter(loader) for loader in loaders]
print("ready", flush=True)
for step in range(loaders[0].dataset.plan.num_steps):
    lines = [line_of(next(stream)) for stream in streams for _ in range(4 // dp_size)]
    new = folder / "checkpoint.new"
    said = json.loads((folder / "checkpoint").read_text())["lines"] if step else []
    state = merge_states(loader.state_dict() for loader in loaders)
    new.write_text(json.dumps({"state": state, "lines": said + lines}))
    os.replace(new, folder / "checkpoint")
"""


@pytest.mark.parametrize(("before", "after", "sp_size"), [(2, 1, 1), (1, 4, 2)])
def test_a_killed_run_goes_on_at_another_size(folder, index, uninterrupted, before, after, sp_size):
    (folder / "checkpoint").unlink(missing_ok=True)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-c", TRAINER, str(folder), str(before)]
    with subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE) as process:
        assert process.stdout.readline() == b"ready\n"
        while not (folder / "checkpoint").exists():
            assert process.poll() is None
            time.sleep(0.001)
        time.sleep(random.SystemRandom().uniform(0, 0.15))
        process.send_signal(signal.SIGKILL)
    saved = json.loads((folder / "checkpoint").read_text())
    lines = saved["lines"]
    for rank in range(after):
        shards = []
        for sp_rank in range(sp_size):
            loader = PackedLoader(dataset_of(index), rank=ParallelRank(rank, after, sp_rank, sp_size), agree=list)
            loader.load_state_dict(saved["state"])
            shards.append(list(loader))
        for parts in zip(*shards, strict=True):
            line = line_of(parts[0])
            frames = torch.cat([part.frames for part in parts])
            pixels = hashlib.sha256(frames.numpy().tobytes() + parts[0].loss_weight.numpy().tobytes()).hexdigest()
            lines.append([*line[:3], pixels])
    assert steps_of(lines) == uninterrupted


@pytest.mark.parametrize("delivered", range(0, 13, 3))
def test_a_state_counts_what_was_delivered(index, uninterrupted, delivered):
    loader = PackedLoader(dataset_of(index), prefetch_packs=3)
    assert len(loader) > 12
    stream = iter(loader)
    lines = [line_of(next(stream)) for _ in range(delivered)]
    state = json.loads(json.dumps(loader.state_dict()))
    assert (state["step"], state["packs"]) == divmod(delivered, 4) and len(json.dumps(state)) < 1024
    loader.close()
    other = PackedLoader(dataset_of(index, epoch=5))
    other.load_state_dict(state)
    assert other.state_dict() == state and steps_of(lines + [line_of(b) for b in other]) == uninterrupted


def test_epochs(index):
    loader = PackedLoader(dataset_of(index))
    first = [line_of(batch) for batch in loader]
    ended = loader.state_dict()
    assert ended["step"] == loader.dataset.plan.num_steps
    assert [line_of(batch) for batch in loader] == first
    loader.set_epoch(1)
    second = [line_of(batch) for batch in loader]
    assert second != first and loader.dataset.plan.epoch == 1
    loader.set_epoch(0)
    assert [line_of(batch) for batch in loader] == first
    # A state of the end stays at the end, until another epoch is asked for.
    again = PackedLoader(dataset_of(index))
    again.load_state_dict(ended)
    again.set_epoch(0)
    assert list(again) == []
    again.set_epoch(1)
    assert [line_of(batch) for batch in again] == second
    middle = iter(loader)
    next(middle)
    loader.set_epoch(0)
    assert loader.state_dict()["packs"] == 1


def test_within_a_step_the_same_ranks_go_on(index, uninterrupted):
    loaders = [PackedLoader(dataset_of(index), rank=ParallelRank(rank, 2)) for rank in range(2)]
    streams = [iter(loader) for loader in loaders]
    lines = [line_of(next(stream)) for stream in streams for _ in range(3)]
    state = merge_states(loader.state_dict() for loader in loaders)
    assert (state["step"], state["packs"]) == (1, 1)
    resumed = list(lines)
    for rank in range(2):
        loader = PackedLoader(dataset_of(index), rank=ParallelRank(rank, 2))
        loader.load_state_dict(state)
        resumed += [line_of(batch) for batch in loader]
    assert steps_of(resumed) == uninterrupted
    alone = PackedLoader(dataset_of(index))
    with pytest.raises(StateMismatchError, match="state lies 1 packs within a step of 4 on 2 ranks, this loader has"):
        alone.load_state_dict(state)
    alone.load_state_dict(state, strict=False)
    assert steps_of(map(line_of, alone)) == uninterrupted[1:]


def test_another_number_of_packs_per_step(index):
    loader = PackedLoader(dataset_of(index, packs_per_step=2, balance="none"))
    stream = iter(loader)
    done = [next(stream).pack_id for _ in range(8)]
    state = loader.state_dict()
    other = PackedLoader(dataset_of(index, packs_per_step=4, balance="none"))
    other.load_state_dict(state)
    assert [batch.pack_id for batch in other] == list(range(8, len(other))) and done == list(range(8))
    with pytest.raises(
        StateMismatchError, match="packs_per_step 2 and 8 packs, this loader 3: no whole number of steps"
    ):
        PackedLoader(dataset_of(index, packs_per_step=3, balance="none")).load_state_dict(state)


def test_bad_samples_stay_bad(tmp_path):
    write_videos(tmp_path, [40, 20])
    talks = [talk(f"{i}", "ab", video=f"v{i % 2}.mp4") for i in range(40)]
    options = {"tokens_per_frame": TOKENS_PER_FRAME, "template": TEMPLATE}
    index = build_index(write_dataset(tmp_path, talks), SAMPLING, ByteTokenizer(), tmp_path / "index", **options)
    video = index.roots[0] / "v1.mp4"
    whole = video.read_bytes()
    video.write_bytes(b"?" * len(whole))
    loaders = [PackedLoader(dataset_of(index), rank=ParallelRank(r, 2), max_bad_fraction=1.0) for r in range(2)]
    masked = [line_of(batch) for loader in loaders for batch in loader]
    state = merge_states(loader.state_dict() for loader in loaders)
    assert len(json.dumps(state)) < 1024 + 8 * 20
    state["step"] = 0
    # The file is repaired, and yet the run is the one that it was.
    video.write_bytes(whole)
    again = PackedLoader(dataset_of(index), max_bad_fraction=0.0)
    again.load_state_dict(state)
    assert steps_of(map(line_of, again)) == steps_of(masked)
    assert again.stats.bad == len({i for line in masked for i in line[2] if i % 2}) and not again.bad
    fresh = PackedLoader(dataset_of(index))
    assert steps_of(map(line_of, fresh)) != steps_of(masked)


def test_states_of_something_else(index, tmp_path):
    loader = PackedLoader(dataset_of(index))
    state = loader.state_dict()
    cases = [
        ({"schema": 2}, "state must have schema 1, got 2"),
        ({"index_digest": "0"}, "state has index_digest '0', this loader '"),
        ({"config_digest": "0"}, "state has config_digest '0', this loader '"),
        ({"seed": 4}, "state has seed 4, this loader 3"),
        ({"step": -1}, r"state\['step'\] must be an int >= 0, got -1"),
        ({"step": "1"}, r"state\['step'\] must be an int >= 0, got '1'"),
        ({"step": 999}, "state has 999 steps and 0 packs, this loader"),
        ({"bad": "%"}, r"state\['bad'\] must be base64 of 32-bit numbers"),
        ({"bad": 3}, r"state\['bad'\] must be a str, got 3"),
    ]
    for change, message in cases:
        with pytest.raises(StateMismatchError, match=message):
            loader.load_state_dict({**state, **change})
    with pytest.raises(StateMismatchError, match="state must hold 'epoch'"):
        loader.load_state_dict({k: v for k, v in state.items() if k != "epoch"})
    with pytest.raises(TypeError, match="state must be a dict of state_dict"):
        loader.load_state_dict([])
    with pytest.raises(StateMismatchError, match="state has config_digest"):
        PackedLoader(dataset_of(index, image_size=32)).load_state_dict(state)
    with pytest.raises(StateMismatchError, match=r"states\[1\] has step 1, states\[0\] 0"):
        merge_states([state, {**state, "step": 1}])
    with pytest.raises(ValueError, match="states must hold at least one state"):
        merge_states([])
    assert loader.state_dict() == state
