# SPDX-License-Identifier: Apache-2.0
"""A video file in, the frames shown at given times out (uint8 RGB), through PyAV."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Two clocks of the same file (container, stream) differ by less than this; frames are never this close.
_EPSILON_S = 1e-6
# A shorter distance is decoded through: keyframes are seldom closer than this.
_FIRST_SEEK_S = 2.0


@dataclass(frozen=True)
class VideoInfo:
    """What a file says of its first video stream; width and height as displayed, after rotation.

    duration_s: seconds. fps: average, 0 where unknown. num_frames: None where the container does not count them.
    rotation: degrees counter-clockwise that the decoded picture is turned by for display (0, 90, 180 or 270).
    """

    path: str
    duration_s: float
    width: int
    height: int
    fps: float
    num_frames: int | None
    codec: str
    rotation: int


@dataclass(frozen=True)
class DecodedVideo:
    """frames: uint8 [F, 3, H, W] RGB. pts: float64 [F], seconds of the frame that was shown. valid: bool [F]; False where
    the file is damaged or ends too early, and the frame is then 0."""

    frames: Tensor
    pts: np.ndarray
    valid: np.ndarray


def probe_video(src: str | os.PathLike[str]) -> VideoInfo:
    """Read duration, size, rate and rotation; decodes one frame.

    Raises:
        FileNotFoundError: no such file. ValueError: no video that can be read (the file is named).
        ImportError: PyAV is missing.
    """
    with _Video(src) as video:
        return video.info


def decode_frames(
    src: str | os.PathLike[str],
    timestamps: Sequence[float] | np.ndarray,
    *,
    size: tuple[int, int] | None = None,
    out: Tensor | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> DecodedVideo:
    """Decode the frame shown at each time: the last one with pts <= t, exact on variable frame rates.

    Args:
        src: path of a video file.
        timestamps: seconds from the stream's start, each in [0, duration), in any order.
        size: (H, W) to resize to (bicubic, the aspect is not kept); None keeps the displayed size.
        out: uint8 [F, 3, H, W] on CPU that receives the frames.
        progress: called as progress(done, total) after each frame.

    Raises:
        FileNotFoundError, ValueError: the file, a time or `out` is wrong (named). ImportError: PyAV is missing.
    """
    with _Video(src) as video:
        info = video.info
        times = _check_times(timestamps, info)
        height, width = _check_size(size, info)
        shape = (len(times), 3, height, width)
        frames = torch.zeros(shape, dtype=torch.uint8) if out is None else _check_out(out, shape)
        pts, valid = np.zeros(len(times)), np.zeros(len(times), dtype=bool)
        order = np.argsort(times, kind="stable")
        pictures = video.frames_at([float(times[index]) for index in order])
        last: tuple[Any, np.ndarray] | None = None
        for done, (index, (frame, shown_at, ok)) in enumerate(zip(order, pictures, strict=True), start=1):
            if ok:
                if last is None or last[0] is not frame:
                    last = (frame, _to_rgb(frame, height, width, info.rotation))
                frames[int(index)] = torch.from_numpy(last[1])
            else:
                frames[int(index)] = 0
            pts[index], valid[index] = shown_at, ok
            if progress is not None:
                progress(done, len(times))
    return DecodedVideo(frames, pts, valid)


def _av() -> Any:
    try:
        import av
    except ImportError as error:
        raise ImportError('decoding video needs PyAV: pip install "lrc-kernels[video]"') from error
    return av


def _to_rgb(frame: Any, height: int, width: int, rotation: int) -> np.ndarray:
    turned = rotation in (90, 270)
    picture = frame.reformat(
        width=height if turned else width, height=width if turned else height, format="rgb24", interpolation="BICUBIC"
    ).to_ndarray()
    return np.ascontiguousarray(np.rot90(picture, rotation // 90).transpose(2, 0, 1))


class _Video:
    """An open file: `info`, and the frames at ascending times with as few decoded in between as seeking allows."""

    def __init__(self, src: str | os.PathLike[str]):
        self._av, self._path = _av(), str(src)
        if not Path(src).is_file():
            raise FileNotFoundError(f"src must be a video file, got {self._path!r}, which does not exist")
        try:
            self._container = self._av.open(self._path)
        except (self._av.error.FFmpegError, OSError, ValueError) as error:
            raise ValueError(f"src must be a readable video, got {self._path!r}: {error}") from error
        try:
            self.info = self._probe()
        except BaseException:
            self._container.close()
            raise

    def __enter__(self) -> _Video:
        return self

    def __exit__(self, *exception: object) -> None:
        self._container.close()

    def _probe(self) -> VideoInfo:
        if not self._container.streams.video:
            raise ValueError(f"src must hold a video stream, got {self._path!r} with none")
        self._stream = self._container.streams.video[0]
        self._stream.thread_type = "AUTO"
        first = next(self._decode(), None)
        if first is None:
            raise ValueError(f"src must be a readable video, got {self._path!r}, of which no frame can be decoded")
        self._start = self._stream.start_time
        if self._start is None:
            self._start = first.pts or 0
        rotation = round(first.rotation / 90) * 90 % 360
        width, height = (first.height, first.width) if rotation in (90, 270) else (first.width, first.height)
        rate = self._stream.average_rate
        return VideoInfo(
            path=self._path,
            duration_s=self._duration(),
            width=width,
            height=height,
            fps=float(rate) if rate else 0.0,
            num_frames=self._stream.frames or None,
            codec=self._stream.codec_context.name,
            rotation=rotation,
        )

    def _duration(self) -> float:
        if self._stream.duration:
            return float(self._stream.duration * self._stream.time_base)
        if self._container.duration:
            return float(self._container.duration) / self._av.time_base
        # Raw streams and cut-off containers name no duration: the packets tell it.
        self._container.seek(0)
        ends = [p.pts + (p.duration or 0) for p in self._container.demux(self._stream) if p.pts is not None]
        if not ends or max(ends) <= self._start:
            raise ValueError(f"src must have a duration, got {self._path!r} without timestamps")
        return float((max(ends) - self._start) * self._stream.time_base)

    def _decode(self) -> Iterator[Any]:
        """Frames from here on; a packet that cannot be decoded marks what follows as damaged up to the next keyframe."""
        self._damaged = False
        try:
            for packet in self._container.demux(self._stream):
                if packet.is_keyframe:
                    self._damaged = False
                try:
                    yield from packet.decode()
                except self._av.error.InvalidDataError:
                    self._damaged = True
        except (self._av.error.FFmpegError, OSError):
            return

    def _seconds(self, frame: Any) -> float:
        return float((frame.pts - self._start) * self._stream.time_base)

    def _seek(self, t: float) -> Iterator[Any]:
        """Frames from the last keyframe at or before t."""
        back = 0.0
        while True:
            at = max(t - back, 0.0)
            self._container.seek(self._start + int(at / self._stream.time_base), stream=self._stream)
            frames = self._decode()
            first = next((frame for frame in frames if frame.pts is not None), None)
            if first is None or at == 0.0 or self._seconds(first) <= t + _EPSILON_S:
                return _chain(first, frames)
            # Some containers seek past the time asked for: ask for an earlier one.
            back = max(1.0, 4.0 * back)

    def frames_at(self, times: list[float]) -> Iterator[tuple[Any, float, bool]]:
        """(frame, its pts in seconds, whether it is intact) for each of the ascending times."""
        seek_gap, frames = _FIRST_SEEK_S, self._seek(times[0] if times else 0.0)
        shown, following = None, next(frames, None)
        interval, damaged = 1.0 / self.info.fps if self.info.fps else 0.04, False
        for t in times:
            if shown is not None and following is not None and t - self._seconds(following) > seek_gap:
                before = self._seconds(following)
                frames = self._seek(t)
                shown, following = None, next(frames, None)
                if following is not None and self._seconds(following) <= before:
                    seek_gap *= 2.0
            while following is not None and (shown is None or self._seconds(following) <= t + _EPSILON_S):
                shown, damaged = following, self._damaged or bool(following.is_corrupt)
                following = next((frame for frame in frames if frame.pts is not None), None)
            if shown is None:
                yield None, math.nan, False
                continue
            length = float(shown.duration * self._stream.time_base) if shown.duration else interval
            ended = following is None and t > self._seconds(shown) + length + interval
            yield shown, self._seconds(shown), not (damaged or ended)


def _chain(first: Any, rest: Iterator[Any]) -> Iterator[Any]:
    if first is not None:
        yield first
        yield from rest


def _check_times(timestamps: Sequence[float] | np.ndarray, info: VideoInfo) -> np.ndarray:
    times = np.asarray(timestamps, dtype=np.float64)
    if times.ndim != 1:
        raise ValueError(f"timestamps must have one dimension, got shape {list(times.shape)}")
    outside = np.flatnonzero(~((times >= 0) & (times < info.duration_s)))
    if outside.size:
        raise ValueError(
            f"timestamps must lie in [0, {info.duration_s:.6g}) s, the duration of {info.path!r}, "
            f"got {times[outside[0]]:.6g} at index {outside[0]}"
        )
    return times


def _check_size(size: tuple[int, int] | None, info: VideoInfo) -> tuple[int, int]:
    if size is None:
        return info.height, info.width
    if len(size) != 2 or min(size) < 1:
        raise ValueError(f"size must be (H, W) with both >= 1, got {size}")
    return int(size[0]), int(size[1])


def _check_out(out: Tensor, shape: tuple[int, ...]) -> Tensor:
    if out.dtype != torch.uint8 or out.device.type != "cpu":
        raise TypeError(f"out must be a uint8 tensor on CPU, got {out.dtype} on {out.device}")
    if tuple(out.shape) != shape:
        raise ValueError(f"out must have shape {list(shape)}, got {list(out.shape)}")
    return out
