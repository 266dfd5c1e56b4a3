# SPDX-License-Identifier: Apache-2.0
"""The second decoder: the same frames as the first where torchcodec is installed, and everywhere what surrounds it, by
a stand-in with torchcodec's interface that hands out frames PyAV decoded in turn."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

from lrc_kernels.packing import MediaSlice, decode_frames
from lrc_kernels.packing.torchcodec_frames import FileSlice, video_decoder
from tests.packing.videos import level, rotate_header, write_video

av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")

FRAMES = 30
UNEVEN = [37 * i + 400 * (i // 5) for i in range(FRAMES)]


class StandIn:
    """What is used of torchcodec.decoders.VideoDecoder: times of the stream's own clock, the frame on show at them."""

    def __init__(
        self, source: object, *, stream_index: int, num_ffmpeg_threads: int, seek_mode: str, device: str
    ) -> None:
        assert (seek_mode, device) == ("exact", "cpu") and num_ffmpeg_threads >= 0
        with av.open(str(source) if isinstance(source, Path) else source) as container:
            stream = container.streams[stream_index]
            self.shown = sorted(container.decode(stream), key=lambda frame: frame.pts)
            base = stream.time_base
        self.begun = [float(frame.pts * base) for frame in self.shown]
        end = self.begun[-1] + float(self.shown[-1].duration * base)
        self.metadata = SimpleNamespace(begin_stream_seconds=self.begun[0], end_stream_seconds=end)

    def __len__(self) -> int:
        return len(self.shown)

    def get_frames_played_at(self, seconds: list[float]) -> SimpleNamespace:
        for second in seconds:
            if not self.metadata.begin_stream_seconds <= second < self.metadata.end_stream_seconds:
                raise IndexError(f"Invalid pts in seconds: {second}")
        return self.get_frames_at((np.searchsorted(self.begun, seconds, side="right") - 1).tolist())

    def get_frames_at(self, numbers: list[int]) -> SimpleNamespace:
        pictures = []
        for at in numbers:
            picture = self.shown[at].to_ndarray(format="rgb24")
            pictures.append(torch.from_numpy(np.rot90(picture, round(self.shown[at].rotation / 90) % 4).copy()))
        begun = torch.tensor([self.begun[at] for at in numbers], dtype=torch.float64)
        return SimpleNamespace(data=torch.stack(pictures).permute(0, 3, 1, 2), pts_seconds=begun)


def has_torchcodec() -> bool:
    try:
        video_decoder()
    except ImportError:
        return False
    return True


@pytest.fixture(params=["stand-in", "torchcodec"])
def torchcodec(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "torchcodec":
        if not has_torchcodec():
            pytest.skip("torchcodec or the shared libraries of FFmpeg that it needs are not installed")
        return
    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = StandIn
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)


@pytest.mark.usefixtures("torchcodec")
@pytest.mark.parametrize("name", ["even.mp4", "uneven.mp4", "uneven.mkv", "even.avi", "late.mp4", "turned.mp4"])
def test_frames_and_times_are_those_of_the_first_decoder(tmp_path, name):
    ticks = UNEVEN if name.startswith("uneven") else [100 * i for i in range(FRAMES)]
    ticks = [tick + 5000 for tick in ticks] if name.startswith("late") else ticks
    # Odd sizes are cropped, which the two must do alike.
    path = write_video(tmp_path / name, ticks, size=(48, 70))
    if name.startswith("turned"):
        rotate_header(path)
    random = np.random.default_rng(0)
    length = (ticks[-1] - ticks[0]) / 1000
    times = np.concatenate([random.uniform(0, length, 25), np.array(ticks[:9]) / 1000 - ticks[0] / 1000, [length]])
    first, second = (decode_frames(path, times, backend=backend) for backend in ("pyav", "torchcodec"))
    assert second.valid.all() and torch.equal(second.valid, first.valid)
    assert torch.equal(second.frames, first.frames) and torch.equal(second.pts, first.pts)
    assert name.startswith("turned") or level(second.frames[-1]) == FRAMES - 1
    last = decode_frames(path, times, backend="torchcodec", layout="NHWC")
    assert torch.equal(last.frames.permute(0, 3, 1, 2), first.frames)


@pytest.mark.usefixtures("torchcodec")
def test_size_out_progress_and_files_inside_files(tmp_path):
    path = write_video(tmp_path / "a.mp4", [100 * i for i in range(12)])
    data = path.read_bytes()
    (tmp_path / "b.tar").write_bytes(b"?" * 700 + data + b"!" * 300)
    inside = MediaSlice(tmp_path / "b.tar", 700, len(data))
    out, seen = torch.full((3, 3, 30, 20), 7, dtype=torch.uint8), []
    options = {"size": (30, 20), "out": out, "progress": lambda *done: seen.append(done)}
    video = decode_frames(inside, [1.15, 0.05, 0.55], backend="torchcodec", **options)
    assert video.frames is out and seen == [(1, 3), (2, 3), (3, 3)]
    first = decode_frames(path, [1.15, 0.05, 0.55], size=(30, 20))
    assert (first.frames.float() - out.float()).abs().mean() < 1.5
    assert [level(frame) for frame in out] == [11, 0, 5] and torch.equal(video.pts, first.pts)


@pytest.mark.usefixtures("torchcodec")
def test_what_it_does_not_read_is_refused(tmp_path):
    path = write_video(tmp_path / "a.ts", [100 * i for i in range(12)])
    with pytest.raises(ValueError, match=r'backend="torchcodec" reads mov, mp4, .*got .*a\.ts: use "pyav"'):
        decode_frames(path, [0.5], backend="torchcodec")
    path = write_video(tmp_path / "a.mp4", [100 * i for i in range(12)])
    with pytest.raises(ValueError, match='snap_s must be 0 with backend="torchcodec", got 0.5'):
        decode_frames(path, [0.5], backend="torchcodec", snap_s=0.5)
    with pytest.raises(ValueError, match=r"timestamps must lie in \[0, 1\.2"):
        decode_frames(path, [1.3], backend="torchcodec")


def test_errors_of_the_decoder_name_the_file(tmp_path, monkeypatch):
    class Broken(StandIn):
        def get_frames_played_at(self, seconds):
            raise RuntimeError("Could not receive frame from decoder")

    module = ModuleType("torchcodec.decoders")
    module.VideoDecoder = Broken
    monkeypatch.setitem(sys.modules, "torchcodec", ModuleType("torchcodec"))
    monkeypatch.setitem(sys.modules, "torchcodec.decoders", module)
    path = write_video(tmp_path / "a.mp4", [100 * i for i in range(12)])
    with pytest.raises(ValueError, match=r"torchcodec cannot read .*a\.mp4: Could not receive frame"):
        decode_frames(path, [0.5], backend="torchcodec")


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (None, "needs torchcodec and the libraries of FFmpeg"),
        ("raise RuntimeError('Could not load libtorchcodec.\\nLikely causes: ...')", "Could not load libtorchcodec.)"),
        ("raise OSError('libavutil.so.56: cannot open')", "libavutil.so.56: cannot open"),
    ],
)
def test_torchcodec_that_cannot_be_loaded(tmp_path, monkeypatch, source, message):
    """Asked for, it is an error of one line; left to "auto", nothing is imported at all."""
    for name in [name for name in sys.modules if name.partition(".")[0] == "torchcodec"]:
        monkeypatch.delitem(sys.modules, name)
    if source is None:
        monkeypatch.setitem(sys.modules, "torchcodec", None)
    else:
        package = tmp_path / "fake" / "torchcodec"
        package.mkdir(parents=True)
        (package / "__init__.py").write_text(source)
        monkeypatch.syspath_prepend(str(tmp_path / "fake"))
        importlib.invalidate_caches()
    path = write_video(tmp_path / "a.mp4", [100 * i for i in range(12)])
    with pytest.raises(ImportError) as error:
        decode_frames(path, [0.5], backend="torchcodec")
    assert message in str(error.value) and "\n" not in str(error.value)
    assert decode_frames(path, [0.5]).valid.all()


def test_a_slice_is_a_file(tmp_path):
    (tmp_path / "a").write_bytes(bytes(range(100)))
    file = FileSlice(MediaSlice(tmp_path / "a", 10, 20))
    assert file.read(5) == bytes(range(10, 15)) and file.read() == bytes(range(15, 30)) and file.read(3) == b""
    assert file.seek(-3, 2) == 17 and file.tell() == 17 and file.read(9) == bytes(range(27, 30))
    assert file.seek(2) == 2 and file.seek(1, 1) == 3 and file.read(1) == bytes([13])
    with pytest.raises(ValueError, match="cannot seek to -1 of"):
        file.seek(-1)
    file.close()


@pytest.mark.parametrize("field", ["layout", "backend"])
def test_bad_choices(tmp_path, field):
    with pytest.raises(ValueError, match=f"{field} must be one of .*got 'other'"):
        decode_frames(tmp_path / "a.mp4", [0.0], **{field: "other"})
