# SPDX-License-Identifier: Apache-2.0
"""Adaptive temporal sampling: the duration of a video in, the number of frames and their times out."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt

from lrc_kernels.checks import check_choice, check_int


@dataclass(frozen=True)
class TemporalSampling:
    """Dense sampling of short videos, sparse sampling of long ones, in whole clips (InternVideo2.5 section 3.1).

    The paper gives no duration that separates the two; 60 s is its border between short and long training videos
    (section 3.4). There, "cliff" falls from 512 frames to 64. "smooth" keeps the count of the dense rule at
    `short_max_s` until the sparse rate asks for more, so that the rate falls as 1 / duration.

    Args:
        dense_fps: frames per second of videos shorter than `short_max_s`.
        sparse_fps: frames per second of all others, at most `dense_fps`.
        short_max_s: seconds at which a video becomes long.
        min_frames: the fewest frames of a video, a multiple of `multiple_of`.
        max_frames: the most frames of a video, a multiple of `multiple_of`.
        multiple_of: frames of a clip; every count is a multiple of it.
        policy: "cliff" or "smooth".

    Raises:
        TypeError: counts that are no ints. ValueError: any other value that the rule cannot take.
    """

    dense_fps: float = 15.0
    sparse_fps: float = 1.0
    short_max_s: float = 60.0
    min_frames: int = 64
    max_frames: int = 512
    multiple_of: int = 8
    policy: Literal["cliff", "smooth"] = "cliff"

    def __post_init__(self) -> None:
        for name in ("dense_fps", "sparse_fps", "short_max_s"):
            _check_positive(name, getattr(self, name))
        if self.sparse_fps > self.dense_fps:
            raise ValueError(f"sparse_fps must be at most dense_fps = {self.dense_fps}, got {self.sparse_fps}")
        check_int("multiple_of", self.multiple_of, minimum=1)
        for name in ("min_frames", "max_frames"):
            frames = getattr(self, name)
            check_int(name, frames, minimum=self.multiple_of)
            if frames % self.multiple_of:
                raise ValueError(f"{name} must be a multiple of multiple_of = {self.multiple_of}, got {frames}")
        if self.max_frames < self.min_frames:
            raise ValueError(f"max_frames must be at least min_frames = {self.min_frames}, got {self.max_frames}")
        check_choice("policy", self.policy, ("cliff", "smooth"))

    @classmethod
    def paper(cls) -> TemporalSampling:
        """15 fps below 60 s, 1 fps from there, 64 to 512 frames (InternVideo2.5 sections 3.1, 3.4 and 3.5)."""
        return cls()

    @classmethod
    def release(cls) -> TemporalSampling:
        """1 fps at every duration, 64 to 512 frames: what the released code does; it has no dense branch."""
        return cls(dense_fps=1.0, sparse_fps=1.0)

    def num_frames(self, duration_s: float) -> int:
        """`multiple_of * floor(fps * duration_s / multiple_of)` within [min_frames, max_frames].

        Raises:
            ValueError: duration_s that is not finite and above 0.
        """
        _check_positive("duration_s", duration_s)
        if duration_s < self.short_max_s:
            frames = self._whole_clips(self.dense_fps * duration_s)
        else:
            frames = self._whole_clips(self.sparse_fps * duration_s)
            if self.policy == "smooth":
                frames = max(frames, self._whole_clips(self.dense_fps * self.short_max_s))
        return max(self.min_frames, min(self.max_frames, frames))

    def timestamps(self, duration_s: float, n: int) -> npt.NDArray[np.float64]:
        """Seconds, float64 [n], rising: the middles of n equal intervals, strictly inside [0, duration_s).

        Times and not frame numbers, so that videos of variable frame rate are sampled evenly too.

        Raises:
            TypeError: n that is no int. ValueError: n < 1, or duration_s that is not finite and above 0.
        """
        _check_positive("duration_s", duration_s)
        check_int("n", n, minimum=1)
        return (np.arange(n, dtype=np.float64) + 0.5) / n * duration_s

    def _whole_clips(self, frames: float) -> int:
        return self.multiple_of * math.floor(frames / self.multiple_of)


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
