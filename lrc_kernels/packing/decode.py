# SPDX-License-Identifier: Apache-2.0
"""Decoding for packs: one part of a sample's frames into its place, in threads that a hanging decoder cannot stop."""

from __future__ import annotations

import math
import queue
import threading
import time
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lrc_kernels.packing.index import Index
from lrc_kernels.packing.media import MediaSlice
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.video import decode_frames, video_activity


class _StopDecodingError(Exception):
    """Raised between two frames of a sample that took too long or that nobody waits for."""


@dataclass
class DecodePart:
    """Frames [first, last) of a sample, written to `frames`. `run` never raises: `reason` says what went wrong.

    Args:
        frames: uint8 [last - first, 3, H, W] to write to.
        pts, valid: per frame, once `done` is set.
        reason: why the sample is bad; empty where it is not.
        started: time.monotonic() at which decoding began.
    """

    index: Index
    sampling: TemporalSampling
    sample_id: int
    first: int
    last: int
    frames: Tensor
    pts: Tensor = field(init=False)
    valid: Tensor = field(init=False)
    reason: str = ""
    started: float | None = None
    seconds: float = 0.0
    timeout_s: float = math.inf
    abandoned: bool = False
    done: threading.Event = field(default_factory=threading.Event)

    def __post_init__(self) -> None:
        self.pts = torch.zeros(self.last - self.first)
        self.valid = torch.zeros(self.last - self.first, dtype=torch.bool)

    def run(self) -> None:
        self.started = time.monotonic()
        try:
            self._decode()
        except _StopDecodingError:
            self.reason = f"decoding took longer than {self.timeout_s:g} s"
        except (ValueError, OSError, MemoryError) as error:
            self.reason = str(error)
        except Exception as error:
            # Whatever a library raises for a damaged file, the other samples of the pack are whole.
            self.reason = f"{type(error).__name__}: {error}"
        finally:
            if self.reason and not self.abandoned:
                self.frames.zero_()
                self.valid.zero_()
            self.seconds = time.monotonic() - self.started
            self.done.set()

    def give_up(self) -> None:
        """The decoder hangs; what it may still write goes to memory that nobody reads."""
        self.abandoned = True
        self.reason = f"decoding hung for longer than {self.timeout_s:g} s"

    def _decode(self) -> None:
        media = self.index.media(self.sample_id)
        if media is None:
            raise ValueError("the sample has frames and no video")
        path = media.path if isinstance(media, MediaSlice) else media
        size = path.stat().st_size
        if size != self.index.columns["file_bytes"][self.sample_id]:
            wanted = int(self.index.columns["file_bytes"][self.sample_id])
            raise ValueError(f"{path} has {size} bytes, but {wanted} when the index was built")
        rule = self._rule(media)
        times = self.index.timestamps(self.sample_id, rule)
        start, end, duration = (float(self.index.columns[k][self.sample_id]) for k in ("start", "end", "duration"))
        snap_s = rule.tolerance_s(end - start, len(times))
        if (start, end) != (0.0, duration):
            # No frame of a part may come from outside of it.
            snap_s = min(snap_s, float(times[0]) - start, end - float(times[-1]))
        valid = self._into(self.frames, media, times, self.first, self.last, snap_s)
        if bool(valid.all()):
            return
        # Whether a sample is bad must not depend on which of its frames this rank has.
        if self.last - self.first < len(times):
            whole = torch.empty(len(times), *self.frames.shape[1:], dtype=torch.uint8)
            part = slice(self.first, self.last)
            valid = self._into(whole, media, times, 0, len(times), snap_s)
            self._stand_in(whole, valid)
            self.frames.copy_(whole[part])
            self.pts, self.valid = self.pts[part].clone(), self.valid[part].clone()
        else:
            self._stand_in(self.frames, valid)

    def _rule(self, media: object) -> TemporalSampling:
        if not isinstance(self.sampling.content, str):
            return self.sampling
        start, end = (float(self.index.columns[name][self.sample_id]) for name in ("start", "end"))
        duration = float(self.index.columns["duration"][self.sample_id])
        activity = video_activity(media)  # type: ignore[arg-type]
        return self.sampling.with_content(activity_between(activity, duration, start, end))

    def _into(
        self, out: Tensor, media: object, times: npt.NDArray[np.float64], first: int, last: int, snap_s: float
    ) -> Tensor:
        height, width = out.shape[2:]
        video = decode_frames(
            media,  # type: ignore[arg-type]
            times[first:last],
            size=(height, width),
            snap_s=snap_s,
            threads=1,
            out=out,
            progress=self._check_time,
        )
        self.pts, self.valid = video.pts.float(), video.valid
        return video.valid

    def _check_time(self, done: int, total: int) -> None:
        assert self.started is not None
        if self.abandoned or time.monotonic() - self.started > self.timeout_s:
            raise _StopDecodingError

    def _stand_in(self, frames: Tensor, valid: Tensor) -> None:
        """A damaged frame shows its neighbour, and stays invalid; two damaged ones side by side spoil the sample.

        Raises:
            ValueError: a damaged frame without a whole one beside it.
        """
        for i in (~valid).nonzero().flatten().tolist():
            beside = [j for j in (i - 1, i + 1) if 0 <= j < len(valid) and valid[j]]
            if not beside:
                damaged = int((~valid).sum())
                raise ValueError(f"{damaged} of {len(valid)} frames of {self.index.media(self.sample_id)} are damaged")
            frames[i].copy_(frames[beside[0]])
            self.pts[i] = self.pts[beside[0]]


def activity_between(
    activity: npt.NDArray[np.float64], duration_s: float, start_s: float, end_s: float
) -> npt.NDArray[np.float64]:
    """The activity of each second of a part of a video, float64 [ceil(end_s - start_s)]."""
    edges = np.append(np.arange(len(activity), dtype=np.float64), duration_s)
    total = np.append(0, np.cumsum(activity))
    seconds = math.ceil(end_s - start_s)
    wanted = np.minimum(start_s + np.arange(seconds + 1), end_s)
    return np.diff(np.interp(wanted, edges, total))


class DecodePool:
    """Daemon threads: a decoder that never returns must keep neither the loader nor the interpreter from ending."""

    def __init__(self, threads: int):
        self._parts: queue.SimpleQueue[DecodePart | None] = queue.SimpleQueue()
        self._lock = threading.Lock()
        self._running: dict[threading.Thread, DecodePart | None] = {}
        self._closed = False
        for _ in range(threads):
            self._start()

    def submit(self, part: DecodePart) -> None:
        self._parts.put(part)

    def give_up(self, part: DecodePart) -> None:
        """Leave the thread that hangs in `part` to itself and start another in its place."""
        with self._lock:
            part.give_up()
            for thread in [thread for thread, now in self._running.items() if now is part]:
                del self._running[thread]
        self._start()

    def close(self) -> None:
        """Stop all threads but those that hang; returns when they have ended."""
        with self._lock:
            self._closed = True
            threads = dict(self._running)
            for part in threads.values():
                if part is not None:
                    part.abandoned = True
        for _ in threads:
            self._parts.put(None)
        for thread, part in threads.items():
            # A decoder looks up after every frame; one that does not has hung.
            thread.join(None if part is None or math.isinf(part.timeout_s) else part.timeout_s)

    def _start(self) -> None:
        thread = threading.Thread(target=self._work, daemon=True, name="lrc-decode")
        with self._lock:
            self._running[thread] = None
        thread.start()

    def _work(self) -> None:
        me = threading.current_thread()
        while (part := self._parts.get()) is not None:
            with self._lock:
                if self._closed:
                    return
                self._running[me] = part
            part.run()
            with self._lock:
                if me not in self._running:
                    return
                self._running[me] = None
