# SPDX-License-Identifier: Apache-2.0
"""Video decoding: a file and times in seconds in, uint8 RGB frames [F, 3, H, W] and their times out, through
PyAV, or torchcodec where it is asked for."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.packing.media import MediaSlice
from lrc_kernels.packing.stream import Picture, VideoStream, open_stream
from lrc_kernels.packing.torchcodec_frames import torchcodec_frames

if TYPE_CHECKING:
    import av


@dataclass(frozen=True)
class VideoInfo:
    """What a video file says of its first video stream.

    Args:
        path: the file.
        duration_s: seconds of the video stream; sampling times lie in [0, duration_s).
        width: pixels of a row as stored, before `rotation`.
        height: rows as stored, before `rotation`.
        fps: mean frames per second, None where the file does not say.
        num_frames: frames of the stream, None where the file does not say.
        codec: FFmpeg's name of the codec, e.g. "h264".
        rotation: degrees counterclockwise by which a stored frame is turned for display: 0, 90, 180 or 270.
    """

    path: Path | MediaSlice
    duration_s: float
    width: int
    height: int
    fps: float | None
    num_frames: int | None
    codec: str
    rotation: int


@dataclass(frozen=True)
class DecodedVideo:
    """Frames in the order of the timestamps that were asked for.

    Args:
        frames: uint8 RGB [F, 3, H, W], or [F, H, W, 3] where layout was "NHWC"; zeros where `valid` is False.
        pts: float64 [F], seconds from the stream's start at which each frame begins to be shown, NaN where invalid.
        valid: bool [F], False where the demuxer or the decoder noticed damage to the frame shown at that time.
    """

    frames: Tensor
    pts: Tensor
    valid: Tensor


def probe_video(src: str | os.PathLike[str] | MediaSlice) -> VideoInfo:
    """Duration, size, rate and codec of the first video stream; decodes one frame, which alone tells the rotation.

    Raises:
        ImportError: PyAV is not installed. FileNotFoundError: no such file. ValueError: the file is unreadable, holds
        no video or no frame that can be decoded. All name the file.
    """
    path = _as_source(src)
    with open_stream(path) as stream:
        return _info(path, stream)


def video_activity(src: str | os.PathLike[str] | MediaSlice) -> npt.NDArray[np.float64]:
    """Bytes that the file spends on each begun second, keyframes left out: float64 [ceil(duration_s)].

    Nothing is decoded. Encoders spend bits where the picture changes, so this is what `TemporalSampling.content` takes.

    Raises:
        As `probe_video`.
    """
    with open_stream(_as_source(src)) as stream:
        return np.array(stream.activity())


def decode_frames(
    src: str | os.PathLike[str] | MediaSlice,
    timestamps: Sequence[float] | npt.NDArray[np.float64] | Tensor,
    *,
    size: tuple[int, int] | None = None,
    layout: Literal["NCHW", "NHWC"] = "NCHW",
    backend: Literal["auto", "pyav", "torchcodec"] = "auto",
    snap_s: float = 0.0,
    threads: int = 0,
    out: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedVideo:
    """The frames that a player shows at `timestamps`: for each time t the last frame with pts <= t.

    Rotation metadata is applied. Only the frames between a time and the keyframe before it are decoded where the file
    has an index of its keyframes (MP4, MOV, Matroska, WebM, AVI), all frames otherwise.

    Args:
        src: path of a video file, or a MediaSlice of one.
        timestamps: F times in seconds from the stream's start, in any order, each in [0, duration_s).
        size: (H, W) to resize to (bicubic, aspect not kept), None for the size of the video as displayed.
        layout: of the frames, "NCHW" or "NHWC".
        backend: "pyav", which "auto" is, or "torchcodec", which must be installed with FFmpeg's shared libraries. Of
            whole files the times of both are the same, and so are frames of 8 bits; of 10 bits the colour is filtered
            otherwise, and what is resized differs by rounding. torchcodec reads MP4, MOV, Matroska, WebM and AVI. It
            conceals damage: its `valid` is always True.
        snap_s: where a keyframe is shown at most this many seconds from a time, it is taken instead, which needs no
            other frame to be decoded. `pts` says what was taken. Files without an index have no keyframes to take.
        threads: of the decoder; 0 is one per core. Many videos at once decode best with one each.
        out: uint8 on the CPU, as `layout` says, to write to; None for a new tensor.
        progress: called as progress(frames done, F) after each frame.

    Raises:
        ImportError: PyAV is not installed, or torchcodec, asked for, cannot be loaded. FileNotFoundError: no such file.
        TypeError: a size or `out` of the wrong type. ValueError: the file is unreadable or holds no video, a time
        outside of [0, duration_s), a size below 1, an `out` of the wrong shape, dtype or device, snap_s with
        torchcodec. Errors of the file name it; damage within it makes `valid` False.
    """
    path = _as_source(src)
    times = _as_times(timestamps)
    check_choice("layout", layout, ("NCHW", "NHWC"))
    check_choice("backend", backend, ("auto", "pyav", "torchcodec"))
    if not (math.isfinite(snap_s) and snap_s >= 0):
        raise ValueError(f"snap_s must be finite and >= 0, got {snap_s}")
    if backend == "torchcodec" and snap_s:
        raise ValueError(f'snap_s must be 0 with backend="torchcodec", got {snap_s}')
    check_int("threads", threads, minimum=0)
    with open_stream(path, threads) as stream:
        info = _info(path, stream)
        _check_inside(times, info)
        height, width = _display_size(info) if size is None else _checked_size(size)
        planes_last = layout == "NHWC"
        frames = _frames_out(out, (len(times), height, width, 3) if planes_last else (len(times), 3, height, width))
        if backend == "torchcodec":
            planes = frames.permute(0, 3, 1, 2) if planes_last else frames
            pts = torchcodec_frames(stream, times, (height, width), threads, planes, progress)
            return DecodedVideo(frames, pts, torch.ones(len(times), dtype=torch.bool))
        painter = _Painter(height, width, info.rotation, threads, planes_last)
        return _painted(_pictures(stream, times, snap_s), painter, frames, progress)


def _painted(
    pictures: Iterator[tuple[int, Picture | None]],
    painter: _Painter,
    frames: Tensor,
    progress: Callable[[int, int], None] | None,
) -> DecodedVideo:
    pts = torch.full((len(frames),), math.nan, dtype=torch.float64)
    valid = torch.zeros(len(frames), dtype=torch.bool)
    shown, last = None, -1
    for done, (i, picture) in enumerate(pictures, 1):
        if picture is None:
            frames[i].zero_()
        else:
            if picture is shown:
                frames[i].copy_(frames[last])
            else:
                painter.paint(picture.frame, frames[i])
            shown, last = picture, i
            pts[i] = picture.time_s
            valid[i] = True
        if progress is not None:
            progress(done, len(frames))
    return DecodedVideo(frames, pts, valid)


def _pictures(
    stream: VideoStream, times: npt.NDArray[np.float64], snap_s: float
) -> Iterator[tuple[int, Picture | None]]:
    """(index of the time, picture) of every time: first those that a keyframe answers, then the others."""
    rest = []
    for i in np.argsort(times, kind="stable").tolist():
        picture = stream.keyframe_near(float(times[i]), snap_s) if snap_s else None
        if picture is None:
            rest.append(i)
        else:
            yield i, picture
    if snap_s:
        stream.restart()
    for i in rest:
        yield i, stream.picture_at(float(times[i]))


def _as_source(src: str | os.PathLike[str] | MediaSlice) -> Path | MediaSlice:
    return src if isinstance(src, MediaSlice) else Path(src)


def _info(path: Path | MediaSlice, stream: VideoStream) -> VideoInfo:
    frame = stream.first_frame()
    return VideoInfo(
        path=path,
        duration_s=stream.duration_s,
        width=frame.width,
        height=frame.height,
        fps=stream.fps,
        num_frames=stream.num_frames,
        codec=stream.codec,
        rotation=round(frame.rotation / 90) * 90 % 360,
    )


def _display_size(info: VideoInfo) -> tuple[int, int]:
    return (info.width, info.height) if info.rotation % 180 else (info.height, info.width)


class _Painter:
    """Frames to RGB, turned counterclockwise by `rotation` degrees. The scaler is set up once for all frames."""

    def __init__(self, height: int, width: int, rotation: int, threads: int, planes_last: bool) -> None:
        from av.video.reformatter import VideoReformatter

        self._scaler, self._packer, self._turns = VideoReformatter(), VideoReformatter(), rotation // 90
        self._threads = threads or None
        self._height, self._width = (width, height) if self._turns % 2 else (height, width)
        # The scaler's planes stand in the order green, blue, red.
        self._format = "rgb24" if planes_last else "gbrp"
        self._targets: tuple[Any, ...] = (...,) if planes_last else (1, 2, 0)

    def paint(self, frame: av.VideoFrame, out: Tensor) -> None:
        """Write uint8 [3, H, W], or [H, W, 3] where planes come last."""
        if self._format == "gbrp" and self._leaves_columns_out(frame):
            frame = self._packer.reformat(frame, format="rgb24", threads=self._threads)
        picture = self._scaler.reformat(
            frame,
            width=self._width,
            height=self._height,
            format=self._format,
            interpolation="BICUBIC",
            threads=self._threads,
        )
        pixels = out.numpy()
        for plane, target in zip(picture.planes, self._targets, strict=True):
            rows = np.frombuffer(memoryview(plane), dtype=np.uint8).reshape(-1, plane.line_size)[: self._height]
            if self._format == "rgb24":
                image = rows[:, : 3 * self._width].reshape(self._height, self._width, 3)
            else:
                image = rows[:, : self._width]
            np.copyto(pixels[target], np.rot90(image, self._turns) if self._turns else image)

    def _leaves_columns_out(self, frame: av.VideoFrame) -> bool:
        # FFmpeg 8's own loop from YUV to planes of the same size leaves up to 8 columns of other widths unwritten.
        same_size = (frame.height, frame.width) == (self._height, self._width)
        return same_size and self._width % 16 > 0


def _as_times(timestamps: Sequence[float] | npt.NDArray[np.float64] | Tensor) -> npt.NDArray[np.float64]:
    if isinstance(timestamps, Tensor):
        timestamps = timestamps.detach().cpu().numpy()
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1:
        raise ValueError(f"timestamps must have 1 dimension, got shape {list(times.shape)}")
    return times


def _check_inside(times: npt.NDArray[np.float64], info: VideoInfo) -> None:
    outside = np.flatnonzero(~((times >= 0) & (times < info.duration_s)))
    if outside.size:
        at = int(outside[0])
        raise ValueError(
            f"timestamps must lie in [0, {info.duration_s}), the duration of {info.path}, got {times[at]} at index {at}"
        )


def _checked_size(size: tuple[int, int]) -> tuple[int, int]:
    if not isinstance(size, (tuple, list)) or len(size) != 2:
        raise TypeError(f"size must be (height, width), got {size!r}")
    for name, pixels in zip(("size[0]", "size[1]"), size, strict=True):
        check_int(name, pixels, minimum=1)
    return size[0], size[1]


def _frames_out(out: Tensor | None, shape: tuple[int, int, int, int]) -> Tensor:
    if out is None:
        # NumPy asks for large pages, which a fresh tensor does without: its page faults cost as much as a conversion.
        return torch.from_numpy(np.empty(shape, dtype=np.uint8))
    if not isinstance(out, Tensor):
        raise TypeError(f"out must be a tensor, got {type(out).__name__}")
    if out.dtype != torch.uint8 or out.device.type != "cpu" or tuple(out.shape) != shape:
        dtype = str(out.dtype).removeprefix("torch.")
        raise ValueError(f"out must be uint8 {list(shape)} on cpu, got {dtype} {list(out.shape)} on {out.device}")
    return out
