# SPDX-License-Identifier: Apache-2.0
"""Peers of `lrc_kernels.packing.plan_packs`, restated from their published descriptions, not from their code.

Each takes lengths in the order in which samples arrive and the tokens of a pack, and returns the packs as lists of
positions. They show what those algorithms fill and cost in Python; where the original is compiled, it says so.
"""

from __future__ import annotations

import bisect

Packs = list[list[int]]


def next_fit(lengths: list[int], capacity: int) -> Packs:
    """InternVideo2.5's soft packing: a sample that does not fit closes the pack."""
    packs: Packs = []
    room = -1
    for position, length in enumerate(lengths):
        if length > room:
            packs.append([])
            room = capacity
        packs[-1].append(position)
        room -= length
    return packs


def trl_bfd(lengths: list[int], capacity: int, batch: int = 1000) -> Packs:
    """TRL's "bfd": best fit decreasing in map batches, after "Fewer Truncations Improve Language Modeling" (2404.10830,
    section 3). A tree over capacities finds the smallest room that takes a sample."""
    size = 1 << capacity.bit_length()
    packs: Packs = []
    for first in range(0, len(lengths), batch):
        occupied = bytearray(2 * size)
        packs_with_room: dict[int, list[list[int]]] = {}
        positions = range(first, min(len(lengths), first + batch))
        for position in sorted(positions, key=lengths.__getitem__, reverse=True):
            room = _least_room(occupied, size, lengths[position])
            if room < 0:
                room, pack = capacity, []
                packs.append(pack)
            else:
                pack = packs_with_room[room].pop()
                if not packs_with_room[room]:
                    _mark(occupied, size, room, 0)
            pack.append(position)
            left = room - lengths[position]
            packs_with_room.setdefault(left, []).append(pack)
            _mark(occupied, size, left, 1)
    return packs


def _least_room(occupied: bytearray, size: int, wanted: int) -> int:
    """The least marked value >= wanted, or -1."""
    node = wanted + size
    while not occupied[node]:
        while node & 1:
            node >>= 1
        if node == 0:
            return -1
        node += 1
    while node < size:
        node = 2 * node if occupied[2 * node] else 2 * node + 1
    return node - size


def _mark(occupied: bytearray, size: int, value: int, flag: int) -> None:
    node = value + size
    occupied[node] = flag
    while node > 1:
        node >>= 1
        occupied[node] = occupied[2 * node] | occupied[2 * node + 1]


def llamafactory_knapsack(lengths: list[int], capacity: int, batch: int = 1000) -> Packs:
    """LLaMA-Factory's greedy knapsack in preprocessing batches: a pack takes the longest sample that still fits, found
    by bisection and removed from the sorted list, until none does."""
    packs: Packs = []
    for first in range(0, len(lengths), batch):
        waiting = sorted((lengths[i], i) for i in range(first, min(len(lengths), first + batch)))
        while waiting:
            pack: list[int] = []
            room = capacity
            while (at := bisect.bisect_right(waiting, (room, len(lengths)))) > 0:
                length, position = waiting.pop(at - 1)
                pack.append(position)
                room -= length
            packs.append(pack)
    return packs


def axolotl_first_fit(lengths: list[int], capacity: int, group: int = 100_000) -> Packs:
    """Axolotl's multipack: first fit over groups of 100,000 samples in their order. The original scans all packs in
    compiled numba; a tree of the most room finds the same packs here, so only its utilisation is comparable."""
    packs: Packs = []
    for first in range(0, len(lengths), group):
        members = lengths[first : first + group]
        size = 1 << max(1, (len(members) - 1).bit_length())
        most_room = [capacity] * (2 * size)
        opened: Packs = []
        for offset, length in enumerate(members):
            node = 1
            while node < size:
                node = 2 * node if most_room[2 * node] >= length else 2 * node + 1
            if node - size == len(opened):
                opened.append([])
            opened[node - size].append(first + offset)
            most_room[node] -= length
            while node > 1:
                node >>= 1
                most_room[node] = max(most_room[2 * node], most_room[2 * node + 1])
        packs += opened
    return packs
