# SPDX-License-Identifier: Apache-2.0
"""Which rows of a pack each rank holds: document lengths in, for each of R ranks its ascending row ranges out."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from itertools import accumulate
from typing import NamedTuple

# Rows below which a kernel's tiles no longer fill a GPU, and chunks that a rank may hold of one pack.
SMALLEST_CHUNK = 128
CHUNKS_PER_RANK = 8
# Attention area above the mean that `balanced` accepts in order to keep the chunks of a document together.
SLACK = 0.01

# The ascending row ranges of each ring rank.
Shards = tuple[tuple[range, ...], ...]


class Piece(NamedTuple):
    """Consecutive rows of one document: its index, and row ranges in the pack and in what holds the piece."""

    document: int
    rows: range
    local: range


class Documents:
    """Where the documents of a pack begin and end; empty ones have no rows and never appear."""

    def __init__(self, lengths: Sequence[int], causal: bool):
        self.causal = causal
        self.starts = [0, *accumulate(lengths)]
        self.num_tokens = self.starts[-1]

    def of(self, row: int) -> int:
        """The document that holds a row: the last one that begins at or before it, empty ones aside."""
        return bisect_right(self.starts, row) - 1

    def pieces(self, runs: Iterable[range]) -> Iterator[Piece]:
        """The runs cut at the borders of documents, in order, with the places they take when laid back to back."""
        offset = 0
        for run in runs:
            row = run.start
            while row < run.stop:
                document = self.of(row)
                stop = min(run.stop, self.starts[document + 1])
                yield Piece(document, range(row, stop), range(offset, offset + stop - row))
                offset, row = offset + stop - row, stop

    def area(self, runs: Iterable[range]) -> int:
        """(query, key) pairs that the queries of these rows take part in."""
        total = 0
        for document, rows, _ in self.pieces(runs):
            start = self.starts[document]
            if self.causal:
                first, last = rows.start - start, rows.stop - start
                total += (last * (last + 1) - first * (first + 1)) // 2
            else:
                total += len(rows) * (self.starts[document + 1] - start)
        return total

    def visible(self, runs: Iterable[range]) -> list[range]:
        """Ascending disjoint ranges that cover every key which the queries of these (ascending) rows see."""
        last: dict[int, int] = {}
        for document, rows, _ in self.pieces(runs):
            last[document] = rows.stop if self.causal else self.starts[document + 1]
        return merge_runs(range(self.starts[document], stop) for document, stop in last.items())


def merge_runs(runs: Iterable[range]) -> list[range]:
    """The same rows in ascending order, touching runs joined, empty ones dropped."""
    merged: list[range] = []
    for run in sorted((run for run in runs if len(run)), key=lambda run: run.start):
        if merged and merged[-1].stop >= run.start:
            merged[-1] = range(merged[-1].start, max(merged[-1].stop, run.stop))
        else:
            merged.append(run)
    return merged


def contiguous(documents: Documents, ring: int, chunk: int | None) -> Shards:
    """Rank r holds the r-th of R equal cuts of the pack."""
    return tuple((cut,) if len(cut) else () for cut in _cuts(documents.num_tokens, ring))


def zigzag(documents: Documents, ring: int, chunk: int | None) -> Shards:
    """Of 2R equal cuts rank r holds r and 2R - 1 - r: equal area where the pack is one document."""
    cuts = _cuts(documents.num_tokens, 2 * ring)
    return tuple(tuple(merge_runs((cuts[r], cuts[2 * ring - 1 - r]))) for r in range(ring))


def zigzag_per_seq(documents: Documents, ring: int, chunk: int | None) -> Shards:
    """`zigzag` of every document by itself. Rows that 2R does not divide go where the fewest are."""
    shards: list[list[range]] = [[] for _ in range(ring)]
    held = [0] * ring
    for start, end in zip(documents.starts, documents.starts[1:], strict=False):
        base, rest = divmod(end - start, 2 * ring)
        lengths = [base] * (2 * ring)
        for _ in range(rest):
            free = [i for i in range(2 * ring) if lengths[i] == base]
            # Late cuts first, as their rows cost most and so spread the remainders' area.
            at = min(free, key=lambda i: (held[_owner(i, ring)], -i))
            lengths[at] += 1
            held[_owner(at, ring)] += 1
        row = start
        for i, length in enumerate(lengths):
            shards[_owner(i, ring)].append(range(row, row + length))
            row += length
    return tuple(tuple(merge_runs(runs)) for runs in shards)


def balanced(documents: Documents, ring: int, chunk: int | None) -> Shards:
    """Chunks dealt by area, largest first, the same number to each rank: to the rank that already holds most of what
    the chunk sees, among those that the chunk leaves within SLACK of the mean area; else to the one with least."""
    total = documents.num_tokens
    if chunk is None:
        per_rank = min(max(total // (SMALLEST_CHUNK * ring), 2), CHUNKS_PER_RANK)
        chunks = [cut for cut in _cuts(total, per_rank * ring) if len(cut)]
    else:
        chunks = [range(row, min(row + chunk, total)) for row in range(0, total, chunk)]
    areas = [documents.area([rows]) for rows in chunks]
    limit = (1 + SLACK) * sum(areas) / ring
    dealt: list[list[int]] = [[] for _ in range(ring)]
    load, seen = [0] * ring, [dict[int, int]() for _ in range(ring)]
    slots, extra = divmod(len(chunks), ring)
    quota = [slots] * ring
    order = sorted(range(len(chunks)), key=lambda i: (-areas[i], i))
    movable = set(order)
    if extra and len(chunks[-1]) < len(chunks[0]):
        # Where some ranks hold a chunk more than others, the short one counts as such, and stays where it is.
        order.remove(len(chunks) - 1)
        order.insert(0, len(chunks) - 1)
        movable.remove(len(chunks) - 1)
    for i in order:
        document = documents.of(chunks[i].start)
        need = chunks[i].start - documents.starts[document]
        free = [r for r in range(ring) if len(dealt[r]) < quota[r] or (extra and quota[r] == slots)]
        roomy = [r for r in free if load[r] + areas[i] <= limit]
        if roomy:
            rank = min(roomy, key=lambda r: (max(0, need - seen[r].get(document, 0)), load[r], r))
        else:
            rank = min(free, key=lambda r: (load[r], r))
        if len(dealt[rank]) == quota[rank] or i not in movable:
            quota[rank], extra = slots + 1, extra - 1
        dealt[rank].append(i)
        load[rank] += areas[i]
        seen[rank][document] = max(seen[rank].get(document, 0), need)
    _swap(dealt, load, areas, limit, movable)
    return tuple(tuple(merge_runs(chunks[i] for i in held)) for held in dealt)


def _swap(dealt: list[list[int]], load: list[int], areas: list[int], limit: float, movable: set[int]) -> None:
    """Swap chunks of the fullest rank for others', each time the two that level best, until it is within the limit."""
    while max(load) > limit:
        full = load.index(max(load))
        after, rank, mine, theirs = min(
            (
                (max(load[full] - areas[i] + areas[j], load[rank] + areas[i] - areas[j]), rank, i, j)
                for rank in range(len(load))
                if rank != full
                for i in dealt[full]
                for j in dealt[rank]
                if i in movable and j in movable
            ),
            default=(load[full], full, 0, 0),
        )
        if after >= load[full]:
            return
        for holder, lost, won in ((full, mine, theirs), (rank, theirs, mine)):
            dealt[holder][dealt[holder].index(lost)] = won
            load[holder] += areas[won] - areas[lost]


ARRANGEMENTS = {f.__name__: f for f in (contiguous, zigzag, zigzag_per_seq, balanced)}


def _cuts(total: int, parts: int) -> list[range]:
    return [range(i * total // parts, (i + 1) * total // parts) for i in range(parts)]


def _owner(cut: int, ring: int) -> int:
    return min(cut, 2 * ring - 1 - cut)


def intersect(first: Iterable[range], second: Iterable[range]) -> Iterator[range]:
    """Rows that two ascending lists of disjoint ranges share."""
    others = list(second)
    at = 0
    for run in first:
        while at < len(others) and others[at].stop <= run.start:
            at += 1
        for other in others[at:]:
            if other.start >= run.stop:
                break
            yield range(max(run.start, other.start), min(run.stop, other.stop))
