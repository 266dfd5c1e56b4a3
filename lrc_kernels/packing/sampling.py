# SPDX-License-Identifier: Apache-2.0
"""Adaptive temporal sampling: the duration of a video in, the number of frames and their times out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
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
        content: what moves the times of frames towards change, without changing their number: None for even times,
            "packets" for the bytes that the file itself spends on each second (`video_activity`), or the activity of
            each second of the video, numbers >= 0. Half of the frames follow it and half stay even, so no gap between
            frames more than doubles.
        snap: "exact" shows the frame at each time; "keyframe" may show a keyframe close to it instead, which needs no
            other frame to be decoded: an hour of video then costs little more than a minute.
        snap_tolerance: how far "keyframe" may go, as a share of the even spacing of the times, in (0, 1]. Beyond a
            half, neighbouring times may show the same keyframe.

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
    content: Literal["packets"] | Sequence[float] | npt.NDArray[np.float64] | None = None
    snap: Literal["exact", "keyframe"] = "exact"
    snap_tolerance: float = 0.5

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
        check_choice("snap", self.snap, ("exact", "keyframe"))
        _check_positive("snap_tolerance", self.snap_tolerance)
        if self.snap_tolerance > 1:
            raise ValueError(f"snap_tolerance must be in (0, 1], got {self.snap_tolerance}")
        if isinstance(self.content, str):
            check_choice("content", self.content, ("packets",))
        elif self.content is not None:
            # A tuple keeps the rule hashable and immutable.
            object.__setattr__(self, "content", _checked_activity(self.content))

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

    def with_content(self, activity: Sequence[float] | npt.NDArray[np.float64]) -> TemporalSampling:
        """The same rule for one video whose activity in each second is known."""
        return replace(self, content=activity)

    def timestamps(self, duration_s: float, n: int) -> npt.NDArray[np.float64]:
        """Seconds, float64 [n], rising: the middles of n intervals of equal time, strictly inside [0, duration_s).

        With an activity, the intervals hold equal shares of (time / duration + activity / its sum) / 2 instead.
        Times and not frame numbers, so that videos of variable frame rate are sampled evenly too.

        Raises:
            TypeError: n that is no int. ValueError: n < 1, duration_s that is not finite and above 0, an activity of
            another number of seconds, or "packets", which only decoding can measure.
        """
        _check_positive("duration_s", duration_s)
        check_int("n", n, minimum=1)
        even = (np.arange(n, dtype=np.float64) + 0.5) / n
        if self.content is None:
            return even * duration_s
        if isinstance(self.content, str):
            raise ValueError('content must be the activity of each second here, got "packets": see with_content')
        seconds = np.asarray(self.content, dtype=np.float64)
        if len(seconds) != math.ceil(duration_s):
            wanted = math.ceil(duration_s)
            raise ValueError(f"content must have one number per begun second ({wanted}), got {len(seconds)}")
        total = seconds.sum()
        if total == 0:
            return even * duration_s
        edges = np.append(np.arange(len(seconds), dtype=np.float64), duration_s)
        share = (edges / duration_s + np.append(0, np.cumsum(seconds / total))) / 2
        return np.interp(even, share, edges)

    def tolerance_s(self, duration_s: float, n: int) -> float:
        """Seconds by which a frame may miss its time: 0 for "exact"."""
        return self.snap_tolerance * duration_s / n if self.snap == "keyframe" else 0.0

    def _whole_clips(self, frames: float) -> int:
        return self.multiple_of * math.floor(frames / self.multiple_of)


def _checked_activity(activity: Sequence[float] | npt.NDArray[np.float64]) -> tuple[float, ...]:
    values = np.asarray(activity, dtype=np.float64)
    if values.ndim != 1 or values.size == 0:
        raise ValueError(f"content must have one number per second, got shape {list(values.shape)}")
    bad = np.flatnonzero(~(np.isfinite(values) & (values >= 0)))
    if bad.size:
        raise ValueError(f"content must be finite and >= 0, got {values[bad[0]]} at second {bad[0]}")
    return tuple(values.tolist())


def _check_positive(name: str, value: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise TypeError(f"{name} must be a number, got {type(value).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(f"{name} must be finite and above 0, got {value}")
