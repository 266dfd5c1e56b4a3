# SPDX-License-Identifier: Apache-2.0
"""Videos whose every frame says which one it is: its grey level is STEP times its number."""

from __future__ import annotations

from fractions import Fraction
from pathlib import Path

import numpy as np
import torch

STEP = 6


def write_video(
    path: Path,
    ticks: list[int],
    *,
    size: tuple[int, int] = (48, 64),
    time_base: Fraction = Fraction(1, 1000),
    rate: int = 10,
    gop: int = 8,
    bf: int = 2,
) -> Path:
    """Frame i is grey level STEP * i with its left half 10 brighter, shown from `ticks[i]` on; B-frames, lossy."""
    import av

    codec = "mpeg4" if path.suffix == ".avi" else "libx264"
    with av.open(str(path), "w") as container:
        stream = container.add_stream(codec, rate=rate, options={} if path.suffix == ".avi" else {"bf": str(bf)})
        stream.bit_rate = 2_000_000
        stream.height, stream.width = size
        stream.pix_fmt = "yuv420p"
        stream.codec_context.gop_size = gop
        stream.codec_context.time_base = Fraction(1, rate) if path.suffix == ".avi" else time_base
        for i, tick in enumerate(ticks):
            image = np.full((*size, 3), STEP * (i % 40), dtype=np.uint8)
            image[:, : size[1] // 2] += 10
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (i, Fraction(1, rate)) if path.suffix == ".avi" else (tick, time_base)
            container.mux(stream.encode(frame))
        container.mux(stream.encode(None))
    return path


def level(frame: torch.Tensor) -> int:
    """The number, modulo 40, of the frame that a picture shows."""
    return round(frame[:, :, frame.shape[2] * 3 // 4 :].float().mean().item() / STEP)


def rotate_header(path: Path) -> None:
    """Write a quarter turn clockwise on display, 9 fixed-point numbers, into the track header of an MP4."""
    data = bytearray(path.read_bytes())
    start = data.index(b"tkhd") + 4 + 40
    matrix = (0, 1 << 16, 0, -(1 << 16), 0, 0, 0, 0, 1 << 30)
    data[start : start + 36] = b"".join(value.to_bytes(4, "big", signed=True) for value in matrix)
    path.write_bytes(data)
