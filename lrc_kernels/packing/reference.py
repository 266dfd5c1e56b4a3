# SPDX-License-Identifier: Apache-2.0
"""The specification of the pack planner in plain Python: columns and budgets in, packs in CSR form out.

csrc/cpu/packing.cpp gives the same output bit for bit; it exists because a plan of millions of samples takes seconds
here. "Arrival" is a sample's place in the epoch's permutation, among those that are kept.
"""

from __future__ import annotations

import bisect
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import numpy.typing as npt

from lrc_kernels.packing.permutation import Permutation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


_PATIENCE = 48


@dataclass
class _Pack:
    arrivals: list[int] = field(default_factory=list)
    tokens: int = 0
    frames: int = 0
    cost: float = 0.0
    opened_at: int = 0
    fullness: float = 0.0


class _Planner:
    """The samples by arrival, and the packs emitted so far."""

    def __init__(
        self,
        samples: list[tuple[int, int, float]],
        limits: tuple[int, int, float],
        open_packs: int,
        window: int,
    ):
        self.samples, self.limits, self.open_packs, self.window = samples, limits, open_packs, window
        self.emitted: list[_Pack] = []

    def fits(self, pack: _Pack, arrival: int) -> bool:
        tokens, frames, cost = self.samples[arrival]
        max_tokens, max_frames, max_cost = self.limits
        return (
            tokens <= max_tokens - pack.tokens and frames <= max_frames - pack.frames and pack.cost + cost <= max_cost
        )

    def place(self, pack: _Pack, arrival: int) -> None:
        tokens, frames, cost = self.samples[arrival]
        pack.arrivals.append(arrival)
        pack.tokens, pack.frames, pack.cost = pack.tokens + tokens, pack.frames + frames, pack.cost + cost
        shares = zip((pack.tokens, pack.frames, pack.cost), self.limits, strict=True)
        pack.fullness = max(float(used) / float(limit) for used, limit in shares)

    def in_order(self) -> None:
        """Next fit: a sample that does not fit the pack closes it (InternVideo2.5 section 3.5, merging by order)."""
        for arrival in range(len(self.samples)):
            if not self.emitted or not self.fits(self.emitted[-1], arrival):
                self.emitted.append(_Pack())
            self.place(self.emitted[-1], arrival)

    def open_best_fit(self) -> None:
        """`open_packs` packs are open; a sample goes to the fullest that takes it, ties to the oldest.

        Fullness is the largest share of a budget that is used. Where no pack takes the sample, the fullest is closed,
        or the oldest if 48 samples or more have left since it was opened: a pack of few tokens would otherwise wait for
        the whole epoch.
        """
        opened: list[_Pack] = []
        left = 0
        for arrival in range(len(self.samples)):
            best = max((p for p in opened if self.fits(p, arrival)), key=lambda p: p.fullness, default=None)
            if best is None:
                if len(opened) == self.open_packs:
                    waited = left - opened[0].opened_at >= _PATIENCE
                    closing = opened[0] if waited else max(opened, key=lambda p: p.fullness)
                    opened = [pack for pack in opened if pack is not closing]
                    self.emitted.append(closing)
                    left += len(closing.arrivals)
                best = _Pack(opened_at=left)
                opened.append(best)
            self.place(best, arrival)
        self.emitted += opened

    def first_fit(self) -> None:
        """Of a buffer of `window` samples a pack takes, from the oldest to the newest, every one that fits."""

        def fill(pack: _Pack, buffer: list[int]) -> None:
            for arrival in buffer:
                if self.fits(pack, arrival):
                    self.place(pack, arrival)

        self._from_buffer(fill)

    def best_fit(self) -> None:
        """Of a buffer of `window` samples a pack takes the oldest, then again and again the longest that still fits
        (ties to the oldest). Short samples may wait long."""

        def fill(pack: _Pack, buffer: list[int]) -> None:
            self.place(pack, buffer[0])
            for arrival in sorted(buffer[1:], key=lambda arrival: (-self.samples[arrival][0], arrival)):
                if self.fits(pack, arrival):
                    self.place(pack, arrival)

        self._from_buffer(fill)

    def _from_buffer(self, fill: Callable[[_Pack, list[int]], None]) -> None:
        buffer: list[int] = []
        admitted = 0
        while buffer or admitted < len(self.samples):
            end = min(len(self.samples), admitted + self.window - len(buffer))
            buffer += range(admitted, end)
            admitted = end
            pack = _Pack()
            fill(pack, buffer)
            self.emitted.append(pack)
            taken = set(pack.arrivals)
            buffer = [arrival for arrival in buffer if arrival not in taken]

    def bfd(self) -> None:
        """Best fit decreasing over windows of `window` samples: the longest first, each to the pack with the least
        room that takes it (ties to the pack opened first). Packs leave in the order in which the samples that opened
        them arrived, so that long samples do not all come first."""
        for first in range(0, len(self.samples), self.window):
            arrivals = range(first, min(len(self.samples), first + self.window))
            packs: list[_Pack] = []
            room: list[tuple[int, int]] = []
            for arrival in sorted(arrivals, key=lambda arrival: (-self.samples[arrival][0], arrival)):
                at = bisect.bisect_left(room, (self.samples[arrival][0], 0))
                while at < len(room) and not self.fits(packs[room[at][1]], arrival):
                    at += 1
                number = room.pop(at)[1] if at < len(room) else len(packs)
                if number == len(packs):
                    packs.append(_Pack())
                self.place(packs[number], arrival)
                bisect.insort(room, (self.limits[0] - packs[number].tokens, number))
            self.emitted += sorted(packs, key=lambda pack: pack.arrivals[0])


def pack_samples(
    num_tokens: Ints,
    num_frames: Ints,
    cost: Floats,
    keep: npt.NDArray[np.bool_] | None,
    *,
    seed: int,
    epoch: int,
    strategy: str,
    max_tokens: int,
    max_frames: int,
    max_cost: float,
    open_packs: int,
    window: int,
) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """(sample_index [kept], pack_ptr [packs + 1], and tokens, frames and cost of each pack [packs]).

    Packs stand in the order in which they are emitted, their samples in the order of arrival.

    Raises:
        ValueError: a kept sample that fits no pack.
    """
    order = Permutation(num_tokens.shape[0], seed, epoch).all()
    order = order if keep is None else order[keep[order]]
    samples = list(zip(num_tokens[order].tolist(), num_frames[order].tolist(), cost[order].tolist(), strict=True))
    planner = _Planner(samples, (max_tokens, max_frames, max_cost), open_packs, window)
    for arrival, sample in enumerate(order.tolist()):
        if not planner.fits(_Pack(), arrival):
            raise ValueError(f"every kept sample must fit a pack by itself, but sample {sample} does not")
    getattr(planner, strategy)()
    packs = planner.emitted
    arrivals = np.array([arrival for pack in packs for arrival in sorted(pack.arrivals)], dtype=np.int64)
    pack_ptr = np.zeros(len(packs) + 1, dtype=np.int64)
    np.cumsum([len(pack.arrivals) for pack in packs], out=pack_ptr[1:])
    return (
        order[arrivals],
        pack_ptr,
        np.array([pack.tokens for pack in packs], dtype=np.int64),
        np.array([pack.frames for pack in packs], dtype=np.int64),
        np.array([pack.cost for pack in packs], dtype=np.float64),
    )
