# SPDX-License-Identifier: Apache-2.0
"""Keyframes in place of exact frames, activity from packet sizes, videos inside other files, and what is refused."""

from __future__ import annotations

import bisect
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from lrc_kernels.packing import MediaSlice, TemporalSampling, decode_frames, probe_video, video_activity
from lrc_kernels.packing.media import resolve_inside
from tests.packing.videos import level, write_video

av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")


@pytest.mark.parametrize("suffix", ["mp4", "mkv", "avi"])
def test_a_close_keyframe_stands_in(tmp_path, suffix):
    path = write_video(tmp_path / f"a.{suffix}", [100 * i for i in range(40)])
    times = [0.25, 0.75, 1.25, 1.6, 2.0, 3.05, 3.95]
    exact = decode_frames(path, times)
    near = decode_frames(path, times, snap_s=0.2)
    assert near.valid.all()
    # Encoders may set keyframes earlier than every eighth frame, never later.
    for i, t in enumerate(times):
        assert abs(near.pts[i].item() - t) <= 0.2 or torch.equal(near.frames[i], exact.frames[i])
        assert level(near.frames[i]) == round(near.pts[i].item() * 10)
    # The AVI encoder takes every step of grey for a cut, so there all frames are keyframes.
    assert suffix == "avi" or near.pts[1].item() != exact.pts[1].item()
    assert torch.equal(decode_frames(path, times, snap_s=1e-9).frames, exact.frames)


def test_snapping_a_rule_decodes_only_keyframes_of_a_long_video(tmp_path):
    path = write_video(tmp_path / "long.mp4", [1000 * i for i in range(600)], gop=4, rate=1)
    sampling = TemporalSampling(min_frames=32, max_frames=32, snap="keyframe")
    times = sampling.timestamps(600.0, 32)
    video = decode_frames(path, times, snap_s=sampling.tolerance_s(600.0, 32))
    assert video.valid.all()
    assert (np.abs(video.pts.numpy() - times) <= 600 / 64).all()
    assert [level(frame) for frame in video.frames] == [round(t) % 40 for t in video.pts.tolist()]


@pytest.mark.parametrize(
    ("codec", "suffix"),
    [
        ("libx264", "mp4"),
        ("libx265", "mp4"),
        ("mpeg4", "mp4"),
        ("libvpx-vp9", "webm"),
        ("libsvtav1", "mp4"),
    ],
)
@pytest.mark.parametrize("steady", [True, False])
def test_frames_say_which_they_are_in_every_codec(tmp_path, codec, suffix, steady):
    """Frame i is grey level 6 i, at an even or an uneven rate; the oracle is the last frame begun by each time."""
    path = tmp_path / f"a.{suffix}"
    starts = [100 * i if steady else 37 * i + 400 * (i // 5) for i in range(30)]
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=10)
        stream.height, stream.width, stream.pix_fmt, stream.bit_rate = 64, 64, "yuv420p", 2_000_000
        stream.codec_context.time_base = Fraction(1, 1000)
        stream.codec_context.gop_size = 10
        for i, start in enumerate(starts):
            frame = av.VideoFrame.from_ndarray(np.full((64, 64, 3), 6 * i, dtype=np.uint8), format="rgb24")
            frame.pts, frame.time_base = start, Fraction(1, 1000)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    times = np.sort(np.random.default_rng(0).uniform(0, (starts[-1] - 1) / 1000, 40))
    video = decode_frames(path, times)
    assert video.valid.all()
    # Times on a clock of milliseconds may be rounded by one.
    clear = [min(abs(1000 * t - s) for s in starts) > 1.5 for t in times]
    shown = [level(frame) for frame in video.frames]
    oracle = [bisect.bisect_right(starts, 1000 * t) - 1 for t in times]
    assert sum(clear) > 30
    assert [s for s, c in zip(shown, clear, strict=True) if c] == [o for o, c in zip(oracle, clear, strict=True) if c]


def test_a_stream_without_an_index_stays_exact(tmp_path):
    path = write_video(tmp_path / "a.ts", [100 * i for i in range(20)])
    assert torch.equal(decode_frames(path, [0.55], snap_s=0.5).frames, decode_frames(path, [0.55]).frames)


def test_activity_follows_the_change(tmp_path):
    path = tmp_path / "busy.mp4"
    random = np.random.default_rng(0)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=10, options={"bf": "0", "g": "250", "sc_threshold": "0"})
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuv420p"
        for i in range(50):
            image = np.full((48, 64, 3), 100, dtype=np.uint8)
            if 20 <= i < 30:
                image = random.integers(0, 256, (48, 64, 3), dtype=np.uint8)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode(None))
    activity = video_activity(path)
    assert len(activity) == 5 and activity.argmax() == 2
    times = TemporalSampling().with_content(activity).timestamps(probe_video(path).duration_s, 64)
    assert ((times >= 2) & (times < 3)).sum() > 32


def test_a_video_inside_another_file(tmp_path):
    path = write_video(tmp_path / "a.mp4", [100 * i for i in range(12)])
    data = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(b"?" * 700 + data + b"!" * 300)
    inside = MediaSlice(tmp_path / "b.tar", 700, len(data))
    assert probe_video(inside).duration_s == probe_video(path).duration_s
    times = [0.05, 0.55, 1.15]
    assert torch.equal(decode_frames(inside, times).frames, decode_frames(path, times).frames)
    with pytest.raises(ValueError, match=r"cannot read .*b\.tar \[0:700\] as a video"):
        probe_video(MediaSlice(tmp_path / "b.tar", 0, 700))
    with pytest.raises(ValueError, match="offset and size must be >= 0, got -1 and 5"):
        MediaSlice(path, -1, 5)


@pytest.mark.parametrize(
    ("side", "message"),
    [
        (9_000, r"huge\.avi claims frames of 9000 x 9000 pixels, more than 67108864 are refused"),
        (60_000, r"no frame of .*huge\.avi can be decoded"),
        (100_000, r"no frame of .*huge\.avi can be decoded"),
    ],
)
def test_a_huge_frame_is_refused_before_memory_is_taken(tmp_path, side, message):
    path = tmp_path / "huge.avi"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mjpeg", rate=10)
        stream.height, stream.width, stream.pix_fmt = 48, 64, "yuvj420p"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.zeros((48, 64, 3), np.uint8), format="rgb24")))
        container.mux(stream.encode(None))
    data = path.read_bytes()
    # The size stands in the start-of-frame marker of the picture and in the header of the container.
    marker = data.index(b"\xff\xc0") + 5
    header = data.index(b"strf") + 12
    container_size = side.to_bytes(4, "little") * 2
    picture = min(side, 2**16 - 1).to_bytes(2, "big") * 2
    path.write_bytes(data[:header] + container_size + data[header + 8 : marker] + picture + data[marker + 4 :])
    with pytest.raises(ValueError, match=message):
        probe_video(path)


def test_a_huge_duration_is_refused_before_memory_is_taken(tmp_path):
    path = write_video(tmp_path / "years.mkv", [0, 100, 200, 10**11])
    for read in (probe_video, video_activity):
        with pytest.raises(ValueError, match=r"years\.mkv claims to last 1e\+08 s, more than 4194304 are refused"):
            read(path)


def test_a_duration_that_cannot_be_read_is_measured(tmp_path):
    path = write_video(tmp_path / "a.mkv", [100 * i for i in range(10)])
    duration_s, data = probe_video(path).duration_s, path.read_bytes()
    assert b"00:00:01." in data
    path.write_bytes(data.replace(b"00:00:01.", b"00-00-01."))
    assert probe_video(path).duration_s == pytest.approx(duration_s, abs=0.01)


def test_a_playlist_is_not_followed(tmp_path):
    target = write_video(tmp_path / "secret.mp4", [0, 100, 200])
    playlist = tmp_path / "playlist.mp4"
    playlist.write_text(f"#EXTM3U\n#EXT-X-TARGETDURATION:1\n#EXTINF:1,\n{target}\n#EXT-X-ENDLIST\n")
    with pytest.raises(ValueError, match=r"cannot read .*playlist\.mp4 as a video"):
        probe_video(playlist)
    concat = tmp_path / "list.ffconcat"
    concat.write_text("ffconcat version 1.0\nfile secret.mp4\n")
    with pytest.raises(ValueError, match="as a video"):
        probe_video(concat)


def test_paths_stay_inside_their_root(tmp_path):
    root = tmp_path / "root"
    (root / "sub").mkdir(parents=True)
    (root / "sub" / "a.mp4").write_bytes(b"a")
    (tmp_path / "outside.mp4").write_bytes(b"b")
    (root / "out.mp4").symlink_to(tmp_path / "outside.mp4")
    (root / "in.mp4").symlink_to(root / "sub" / "a.mp4")
    (root / "up").symlink_to(tmp_path)
    assert resolve_inside(root, "sub/a.mp4") == (root / "sub" / "a.mp4").resolve()
    assert resolve_inside(root, "in.mp4") == (root / "sub" / "a.mp4").resolve()
    for bad in ("../outside.mp4", "sub/../../outside.mp4", str(root / "sub" / "a.mp4"), "/etc/passwd"):
        with pytest.raises(ValueError, match="must lie inside its root .*without .. and not absolute"):
            resolve_inside(root, bad)
    for bad in ("out.mp4", "up/outside.mp4"):
        with pytest.raises(ValueError, match="a link leads it to"):
            resolve_inside(root, bad)
    for bad in ("", "a\0b"):
        with pytest.raises(ValueError, match="must be a name without zero bytes"):
            resolve_inside(root, bad)


@pytest.mark.parametrize("snap_s", [-1.0, math.nan, math.inf])
def test_bad_tolerances(tmp_path, snap_s):
    with pytest.raises(ValueError, match="snap_s must be finite and >= 0, got"):
        decode_frames(tmp_path / "a.mp4", [0.0], snap_s=snap_s)
