# SPDX-License-Identifier: Apache-2.0
"""The second decoder: torchcodec gives the frames at times that PyAV has looked up in the file.

PyAV opens every file first, since the formats and the frame sizes that it may open are restricted there. torchcodec,
which knows no such restriction, then reads only what PyAV took for MP4, MOV, Matroska, WebM or AVI.
"""

from __future__ import annotations

import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrc_kernels.packing.media import MediaSlice
from lrc_kernels.packing.stream import INDEXED_FORMATS, VideoStream


class FileSlice(io.RawIOBase):
    """The bytes of a member of a tar as a file of its own, read only."""

    def __init__(self, media: MediaSlice) -> None:
        self._file, self._media, self._at = open(media.path, "rb"), media, 0  # noqa: SIM115

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = {os.SEEK_SET: 0, os.SEEK_CUR: self._at, os.SEEK_END: self._media.size}[whence]
        if start + offset < 0:
            raise ValueError(f"cannot seek to {start + offset} of {self._media}")
        self._at = start + offset
        return self._at

    def read(self, size: int = -1) -> bytes:
        left = max(0, self._media.size - self._at)
        self._file.seek(self._media.offset + self._at)
        data = self._file.read(left if size is None or size < 0 else min(size, left))
        self._at += len(data)
        return data

    def close(self) -> None:
        self._file.close()
        super().close()


def video_decoder() -> Any:
    """torchcodec's VideoDecoder.

    Raises:
        ImportError: torchcodec is not installed, or not with the libraries of FFmpeg that it needs.
    """
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, OSError, RuntimeError) as error:
        # It loads FFmpeg's shared libraries on import and raises RuntimeError, over many lines, where there are none.
        reason = next(iter(str(error).splitlines()), type(error).__name__)
        raise ImportError(
            f'backend="torchcodec" needs torchcodec and the libraries of FFmpeg 4 to 8: '
            f'pip install "lrc-kernels[torchcodec]" ({reason})'
        ) from error
    return VideoDecoder


def torchcodec_frames(
    stream: VideoStream,
    times: npt.NDArray[np.float64],
    size: tuple[int, int],
    threads: int,
    frames: Tensor,
    progress: Callable[[int, int], None] | None,
) -> Tensor:
    """Write the frame shown at each time to `frames` [F, 3, H, W]; returns their pts, float64 [F].

    Raises:
        ImportError: as `video_decoder`. ValueError: a container that torchcodec is not let read, or one that it cannot.
    """
    make = video_decoder()
    if not stream.is_indexed:
        raise ValueError(f'backend="torchcodec" reads {", ".join(INDEXED_FORMATS)}, got {stream.path}: use "pyav"')
    pts = torch.empty(len(times), dtype=torch.float64)
    for done, (i, picture, seconds) in enumerate(_shown(make, stream, times, threads), 1):
        frames[i].copy_(_resized(picture, size))
        pts[i] = stream.time_of(seconds)
        if progress is not None:
            progress(done, len(times))
    return pts


def _shown(
    make: Any, stream: VideoStream, times: npt.NDArray[np.float64], threads: int
) -> Iterator[tuple[int, Tensor, float]]:
    """(index of the time, uint8 [3, H, W], the stream's own second at which it begins) of every time, rising."""
    with _opened(stream.path) as source:
        try:
            options = {"num_ffmpeg_threads": threads, "seek_mode": "exact", "device": "cpu"}
            decoder = make(source, stream_index=stream.index, **options)
            first, end = (float(getattr(decoder.metadata, f"{edge}_stream_seconds")) for edge in ("begin", "end"))
            for i in np.argsort(times, kind="stable").tolist():
                # Between two ticks of the clock, where rounding cannot change which frame is on show.
                seconds = max(stream.seconds_within_tick(float(times[i])), first)
                # A last frame without a duration is on show at no time; get_frame_played_at passes over all of these.
                if seconds >= end:
                    shown = decoder.get_frames_at([len(decoder) - 1])
                else:
                    shown = decoder.get_frames_played_at([seconds])
                yield i, shown.data[0], float(shown.pts_seconds[0])
        except (RuntimeError, IndexError) as error:
            raise ValueError(f"torchcodec cannot read {stream.path}: {error}") from error


@contextmanager
def _opened(path: Path | MediaSlice) -> Iterator[Path | FileSlice]:
    if isinstance(path, Path):
        yield path
        return
    file = FileSlice(path)
    try:
        yield file
    finally:
        file.close()


def _resized(picture: Tensor, size: tuple[int, int]) -> Tensor:
    """RGB uint8 [3, H, W] of any size to `size`, by the scaler and the filter of the other backend."""
    if tuple(picture.shape[1:]) == size:
        return picture
    import av

    frame = av.VideoFrame.from_ndarray(picture.permute(1, 2, 0).contiguous().numpy(), format="rgb24")
    scaled = frame.reformat(width=size[1], height=size[0], interpolation="BICUBIC")
    return torch.from_numpy(scaled.to_ndarray()).permute(2, 0, 1)
