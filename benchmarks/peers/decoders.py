# SPDX-License-Identifier: Apache-2.0
"""The video decoders that are installed: a file, times and frame numbers in, uint8 RGB frames [F, 3, H, W] out.

None of them is a dependency. decord, decord2 and eva-decord all install the module `decord`, so one run has one of
them; a run for each, with `pip install --target` and PYTHONPATH, has them all.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from importlib import import_module, metadata
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# (path, seconds, frame numbers) -> frames.
Decode = Callable[[Path, list[float], list[int]], Tensor]


def installed() -> dict[str, Decode]:
    """Name with version -> decoder, of those that can be imported; torchcodec cannot without FFmpeg's libraries. Those
    that let one choose are there twice, with as many threads as they like and with one."""
    found: dict[str, Decode] = {}
    for module, distributions, decode in (
        ("torchcodec.decoders", ("torchcodec",), _torchcodec),
        ("decord", ("decord2", "eva-decord", "decord"), _decord),
        ("cv2", ("opencv-python-headless", "opencv-python"), _opencv),
    ):
        try:
            import_module(module)
        except (ImportError, OSError, RuntimeError):
            continue
        name = _versioned(distributions)
        if module == "cv2":
            found[name] = decode
        else:
            found |= {name: partial(decode, threads=0), f"{name} 1 thread": partial(decode, threads=1)}
    return found


def _versioned(distributions: tuple[str, ...]) -> str:
    for name in distributions:
        try:
            return f"{name} {metadata.version(name)}"
        except metadata.PackageNotFoundError:
            continue
    return distributions[-1]


def _torchcodec(path: Path, seconds: list[float], numbers: list[int], threads: int) -> Tensor:
    from torchcodec.decoders import VideoDecoder

    return VideoDecoder(path, num_ffmpeg_threads=threads).get_frames_played_at(seconds).data


def _decord(path: Path, seconds: list[float], numbers: list[int], threads: int) -> Tensor:
    import decord

    frames = decord.VideoReader(str(path), num_threads=threads).get_batch(numbers).asnumpy()
    return torch.from_numpy(frames).permute(0, 3, 1, 2)


def _opencv(path: Path, seconds: list[float], numbers: list[int]) -> Tensor:
    """Grabs every frame and converts those asked for."""
    import cv2

    capture, at, frames = cv2.VideoCapture(str(path)), -1, []
    for number in numbers:
        while at < number:
            capture.grab()
            at += 1
        frames.append(cv2.cvtColor(capture.retrieve()[1], cv2.COLOR_BGR2RGB))
    return torch.from_numpy(np.stack(frames)).permute(0, 3, 1, 2)
