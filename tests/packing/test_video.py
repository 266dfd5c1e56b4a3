# SPDX-License-Identifier: Apache-2.0
"""Decoding against videos whose every frame says which one it is: its grey level."""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from lrc_kernels.packing import decode_frames, probe_video
from tests.packing.videos import STEP, level, write_video

av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")

SIZE = (48, 64)
FRAMES = 40


@pytest.fixture(scope="module", params=["mp4", "mkv", "ts", "avi"])
def steady(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Ten frames a second."""
    folder = tmp_path_factory.mktemp("video")
    return write_video(folder / f"steady.{request.param}", [100 * i for i in range(FRAMES)])


def test_probe(steady):
    info = probe_video(steady)
    assert (info.height, info.width, info.rotation) == (*SIZE, 0)
    assert info.duration_s == pytest.approx(FRAMES / 10, abs=0.011)
    assert info.fps == pytest.approx(10, rel=0.02)
    assert info.num_frames in (None, FRAMES)


def test_each_time_shows_the_frame_begun_last(steady):
    times = [(i + 0.5) / 10 for i in range(FRAMES)]
    video = decode_frames(steady, times)
    assert video.frames.shape == (FRAMES, 3, *SIZE) and video.frames.dtype == torch.uint8
    assert video.valid.all()
    assert [level(frame) for frame in video.frames] == list(range(FRAMES))
    assert torch.allclose(video.pts, torch.arange(FRAMES, dtype=torch.float64) / 10, atol=2e-3)


def test_times_in_any_order_and_far_apart_are_the_same_pictures(steady):
    times = [3.95, 0.0, 2.05, 2.05, 0.31, 3.25]
    video = decode_frames(steady, times)
    assert [level(frame) for frame in video.frames] == [39, 0, 20, 20, 3, 32]
    assert torch.equal(video.frames[2], video.frames[3])
    alone = decode_frames(steady, [2.05])
    assert torch.equal(alone.frames[0], video.frames[2])


@pytest.mark.parametrize("suffix", ["mp4", "mkv"])
def test_variable_frame_rate_goes_by_time(tmp_path, suffix):
    ticks = [0, 40, 1000, 1033, 2500, 2600]
    # The MP4 header of a short file with reordered frames at such times says that it ends before its last frame.
    path = write_video(tmp_path / f"variable.{suffix}", ticks, bf=0)
    video = decode_frames(path, [0.02, 0.5, 0.99, 1.01, 2.0, 2.55, 2.61])
    assert [level(frame) for frame in video.frames] == [0, 1, 1, 2, 3, 4, 5]
    assert torch.allclose(video.pts, torch.tensor([0, 0.04, 0.04, 1, 1.033, 2.5, 2.6], dtype=torch.float64), atol=2e-3)


def test_size_out_and_progress(steady):
    out = torch.full((3, 3, 30, 20), 7, dtype=torch.uint8)
    seen = []
    video = decode_frames(steady, [0.1, 1.1, 2.1], size=(30, 20), out=out, progress=lambda *done: seen.append(done))
    assert video.frames is out and seen == [(1, 3), (2, 3), (3, 3)]
    assert out[0, :, :, 15].float().mean() == pytest.approx(STEP, abs=3)


@pytest.mark.parametrize("width", [20, 56, 60, 64, 90])
def test_every_column_of_a_video_in_its_own_size_is_written(tmp_path, width):
    path = write_video(tmp_path / "narrow.mp4", [100 * i for i in range(21)], size=(50, width))
    for size in (None, (50, width), (50, 2 * width)):
        # What nobody writes stays what it was, or whatever lay in memory: not grey level 6 * 20.
        frames = decode_frames(path, [2.05], size=size).frames
        right_half = frames[0, :, :, frames.shape[3] // 2 + 4 :].float()
        assert (right_half - 20 * STEP).abs().max() <= STEP


def test_no_times_give_no_frames(steady):
    assert decode_frames(steady, []).frames.shape == (0, 3, *SIZE)


def test_rotated_video_stands_upright(tmp_path):
    source = write_video(tmp_path / "plain.mp4", [100 * i for i in range(8)])
    data = bytearray(source.read_bytes())
    # The matrix of the track header, 9 fixed-point numbers: a quarter turn clockwise on display.
    start = data.index(b"tkhd") + 4 + 40
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path = tmp_path / "rotated.mp4"
    path.write_bytes(data)
    info = probe_video(path)
    assert (info.height, info.width, info.rotation) == (*SIZE, 270)
    frame = decode_frames(path, [0.75]).frames[0].float()
    assert frame.shape == (3, SIZE[1], SIZE[0])
    # What was the brighter left half is on top after a quarter turn clockwise.
    assert frame[:, : SIZE[1] // 2].mean() - frame[:, SIZE[1] // 2 :].mean() == pytest.approx(10, abs=2)


@pytest.mark.parametrize("suffix", ["mp4", "ts"])
def test_a_damaged_stretch_is_invalid_and_never_a_wrong_picture(tmp_path, suffix):
    path = write_video(tmp_path / f"damaged.{suffix}", [100 * i for i in range(FRAMES)])
    data = bytearray(path.read_bytes())
    random = np.random.default_rng(0)
    middle = slice(len(data) * 45 // 100, len(data) * 50 // 100)
    data[middle] = random.integers(0, 256, middle.stop - middle.start, dtype=np.uint8).tobytes()
    path.write_bytes(data)
    video = decode_frames(path, [(i + 0.5) / 10 for i in range(FRAMES)])
    assert 0 < int((~video.valid).sum()) < FRAMES
    shown = {i: level(video.frames[i]) for i in video.valid.nonzero().flatten().tolist()}
    if suffix == "mp4":
        assert shown == {i: i for i in shown}
    else:
        # A transport stream has no list of its frames: where a packet's header is gone, the frame before it stays on.
        assert all(i - 8 <= seen <= i for i, seen in shown.items())
    assert video.frames[~video.valid].eq(0).all() and video.pts[~video.valid].isnan().all()


def test_a_file_cut_short_ends_in_invalid_frames(tmp_path):
    path = write_video(tmp_path / "cut.mkv", [100 * i for i in range(FRAMES)])
    data = path.read_bytes()
    path.write_bytes(data[: len(data) * 6 // 10])
    info = probe_video(path)
    times = [(i + 0.5) / 10 for i in range(FRAMES) if (i + 0.5) / 10 < info.duration_s]
    video = decode_frames(path, times)
    assert video.valid[0]
    if len(times) == FRAMES:
        assert not video.valid[-1]
    for i in video.valid.nonzero().flatten().tolist():
        assert level(video.frames[i]) == i


def test_bad_files(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no such video file: .*none\.mp4"):
        probe_video(tmp_path / "none.mp4")
    text = tmp_path / "notes.mp4"
    text.write_text("no video\n" * 50)
    with pytest.raises(ValueError, match=r"cannot read .*notes\.mp4 as a video"):
        decode_frames(text, [0.0])
    (tmp_path / "empty.mkv").write_bytes(b"")
    with pytest.raises(ValueError, match=r"cannot read .*empty\.mkv as a video"):
        probe_video(tmp_path / "empty.mkv")
    sound = tmp_path / "sound.wav"
    with av.open(str(sound), "w") as container:
        stream = container.add_stream("pcm_s16le", rate=8000)
        frame = av.AudioFrame.from_ndarray(np.zeros((1, 8000), dtype=np.int16), format="s16", layout="mono")
        frame.rate = 8000
        container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    with pytest.raises(ValueError, match=r"sound\.wav holds no video stream"):
        probe_video(sound)
    os.mkdir(tmp_path / "folder.mp4")
    with pytest.raises(ValueError, match=r"cannot read .*folder\.mp4"):
        probe_video(tmp_path / "folder.mp4")


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"timestamps": [0.5, 4.5]}, ValueError, r"timestamps must lie in \[0, 4.*got 4\.5 at index 1"),
        ({"timestamps": [-0.1]}, ValueError, r"got -0\.1 at index 0"),
        ({"timestamps": [float("nan")]}, ValueError, "got nan at index 0"),
        ({"timestamps": [[0.5]]}, ValueError, r"timestamps must have 1 dimension, got shape \[1, 1\]"),
        ({"size": (0, 5)}, ValueError, r"size\[0\] must be .* 1, got 0"),
        ({"size": 5}, TypeError, r"size must be \(height, width\), got 5"),
        ({"out": [0]}, TypeError, "out must be a tensor, got list"),
        ({"out": torch.zeros(1, 3, 4, 4)}, ValueError, r"out must be uint8 \[1, 3, 48, 64\] on cpu, got float32"),
    ],
)
def test_bad_arguments(steady, change, error, message):
    with pytest.raises(error, match=message):
        decode_frames(steady, **{"timestamps": [0.5], **change})
