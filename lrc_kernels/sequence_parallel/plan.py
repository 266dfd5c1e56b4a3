# SPDX-License-Identifier: Apache-2.0
"""The plan of one pack: host lengths in; which rows each rank holds, which (query, key) blocks it computes and which
rows it must be sent out. Pure: no communication, no device, the same on every rank."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from enum import Enum
from functools import cached_property
from itertools import groupby
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel import cost
from lrc_kernels.sequence_parallel.arrangements import ARRANGEMENTS, Documents, Piece, Shards, intersect, merge_runs
from lrc_kernels.sequence_parallel.heads import HeadLayout, head_layout

TRANSPORTS = ("ring", "sparse", "gather")


class Mask(Enum):
    """FULL: every query sees every key of the block. CAUSAL: query i of the block sees its keys 0..i."""

    FULL = "full"
    CAUSAL = "causal"


class Block(NamedTuple):
    """One rectangle of attention: rows `q` of a ring rank's shard over rows `k` of the shard of ring rank `peer`."""

    peer: int
    q: range
    k: range
    mask: Mask


class Call(NamedTuple):
    """One varlen attention call: slices of the query and key rows at hand, cut into sequences. A sequence without keys
    or without queries stands for rows that have no part in this call."""

    q: slice
    k: slice
    layout_q: VarlenLayout
    layout_k: VarlenLayout
    causal: bool


class Exchange(NamedTuple):
    """What a ring rank sends and receives where only needed rows move; counts are per ring rank.

    `send` are rows of the own shard, grouped by receiver. Rows arrive grouped by sender; `order` picks them in the
    order of the pack, and `inverse` undoes it. `gathered` picks the same rows, in the order of the pack, from all
    shards, each padded to the longest.
    """

    send: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    order: Tensor
    inverse: Tensor
    gathered: Tensor


@dataclass(frozen=True)
class PlanStats:
    """What a plan costs, of one attention layer and one sequence-parallel group; also `stats["imbalance"]`.

    Attributes:
        imbalance: attention area of the fullest ring rank over the mean (1.0 is even).
        padding: padded rows over all rows.
        bytes_forward, bytes_backward: bytes that all ranks together send, with 16-bit activations and fp32 gradients.
        predicted_time: seconds for forward and backward by the cost model on `cost.H100`.
    """

    imbalance: float
    padding: float
    bytes_forward: int
    bytes_backward: int
    predicted_time: float

    def __getitem__(self, name: str) -> float:
        return getattr(self, name)


@dataclass(frozen=True, eq=False)
class SequencePlan:
    """Who holds which rows of a pack and who computes what; made by `plan_sequence`.

    A ring rank holds a shard: ascending row ranges of the pack (`shards[rank]`), laid back to back. Its rows are padded
    to a multiple of `ulysses` at the end and cut evenly among its ulysses ranks.
    """

    layout: VarlenLayout
    ring: int
    ulysses: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    arrangement: str
    transport: str
    causal: bool
    shards: Shards
    # What is worked out once per rank; plans that differ in their transport only share it.
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)
    # int64, on the host: the plan as ops of torch.library take it, see `encoding.py`. It holds all that is executed.
    encoded: Tensor = field(init=False, repr=False)
    kind: ClassVar[int] = 0

    def __post_init__(self) -> None:
        runs = [(len(held), *(x for run in held for x in (run.start, run.stop, run.step))) for held in self.shards]
        numbers = (
            self.kind,
            *(self.ring, self.ulysses, self.num_heads, self.num_kv_heads, self.head_dim),
            *(TRANSPORTS.index(self.transport), self.causal),
            *(self.layout.num_sequences, *self.layout.lengths),
            *(x for shard in runs for x in shard),
        )
        # Plans are remembered: one that was made in inference mode serves a training step too.
        with torch.inference_mode(False):
            object.__setattr__(self, "encoded", torch.tensor(numbers, dtype=torch.int64, device="cpu"))
        torch._dynamo.maybe_mark_dynamic(self.encoded, 0)

    @cached_property
    def documents(self) -> Documents:
        return Documents(self.layout.lengths, self.causal)

    @cached_property
    def heads(self) -> HeadLayout:
        return head_layout(self.num_heads, self.num_kv_heads, self.ulysses)

    @cached_property
    def shard_rows(self) -> tuple[int, ...]:
        """Rows of each ring rank, without padding."""
        return tuple(sum(map(len, runs)) for runs in self.shards)

    def local_rows(self, ring_rank: int) -> int:
        """T_local: rows of each ulysses rank of this ring rank, padding included."""
        return -(-self.shard_rows[ring_rank] // self.ulysses)

    def local_indices(self, ring_rank: int, ulysses_rank: int = 0) -> Tensor:
        """int64 [T_local]: the row of the pack that each local row holds, -1 for padding.

        Raises:
            ValueError: a rank outside the mesh.
        """
        _check_rank("ring_rank", ring_rank, self.ring)
        _check_rank("ulysses_rank", ulysses_rank, self.ulysses)
        rows = self.local_rows(ring_rank)
        index = torch.full((rows * self.ulysses,), -1)
        index[: self.shard_rows[ring_rank]] = _rows_of(self.shards[ring_rank])
        return index[ulysses_rank * rows : (ulysses_rank + 1) * rows]

    def blocks(self, rank: int) -> list[Block]:
        """The blocks of a ring rank, its own keys first, then those of the ranks before it, as a ring brings them.

        Together the blocks of all ranks cover every allowed (query, key) pair exactly once. Two pieces of a document on
        different ranks never overlap, so that between ranks every block is FULL; a CAUSAL one is a document's rows on
        one rank with themselves, in which the order of local rows is that of the pack.
        """
        _check_rank("rank", rank, self.ring)
        own = Mask.CAUSAL if self.causal else Mask.FULL
        blocks = [Block(rank, rows, rows, own) for rows in self._local_documents(rank)]
        for step in range(1, self.ring):
            peer = (rank - step) % self.ring
            for rectangles in self._rounds(rank, self.shards[peer]):
                blocks += [Block(peer, q, k, Mask.FULL) for q, k in rectangles]
        return blocks

    def needs(self, rank: int, peer: int) -> list[range]:
        """Rows of the shard of `peer` that ring rank `rank` has to be sent: ascending, disjoint ranges."""
        _check_rank("rank", rank, self.ring)
        _check_rank("peer", peer, self.ring)
        if rank == peer:
            return []
        runs, rows = self._needed(rank, peer), []
        for piece in self.documents.pieces(self.shards[peer]):
            for run in intersect([piece.rows], runs):
                start = piece.local.start + run.start - piece.rows.start
                rows.append(range(start, start + len(run)))
        return merge_runs(rows)

    def calls(self, rank: int, peer: int | None, device: torch.device) -> list[Call]:
        """The attention calls of ring rank `rank` over the shard of `peer`, or, with None, over the rows of
        `exchange(rank)`: everything remote that it needs, in the order of the pack."""
        key = ("calls", rank, peer, device)
        if key not in self._cache:
            self._cache[key] = list(self._make_calls(rank, peer, device))
        return self._cache[key]

    def exchange(self, rank: int, device: torch.device) -> Exchange:
        """What `rank` sends and receives where only needed rows move."""
        key = ("exchange", rank, device)
        if key not in self._cache:
            self._cache[key] = self._make_exchange(rank, device)
        return self._cache[key]

    def stats(self) -> PlanStats:
        """Balance, padding, bytes and predicted time."""
        key = ("stats", self.transport)
        if key not in self._cache:
            areas = [sum(self.areas(rank)) for rank in range(self.ring)]
            rows = self.layout.num_tokens
            padded = sum(self.local_rows(rank) * self.ulysses for rank in range(self.ring)) - rows
            forward, backward = cost.bytes_moved(self)
            self._cache[key] = PlanStats(
                imbalance=max(areas) * self.ring / sum(areas) if sum(areas) else 1.0,
                padding=padded / rows if rows else 0.0,
                bytes_forward=forward,
                bytes_backward=backward,
                predicted_time=cost.predicted_time(self),
            )
        return self._cache[key]

    def remote_rows(self, rank: int) -> int:
        """Rows that other ranks hold and `rank` needs."""
        visible = self._visible(rank)
        return sum(map(len, visible)) - sum(map(len, intersect(visible, self.shards[rank])))

    def areas(self, rank: int) -> tuple[int, int]:
        """(query, key) pairs of a ring rank's queries with its own rows, and with those of others."""
        key = ("areas", rank)
        if key not in self._cache:
            lengths = [len(rows) for rows in self._local_documents(rank)]
            local = sum(n * (n + 1) // 2 if self.causal else n * n for n in lengths)
            self._cache[key] = local, self.documents.area(self.shards[rank]) - local
        return self._cache[key]

    def _visible(self, rank: int) -> list[range]:
        key = ("visible", rank)
        if key not in self._cache:
            self._cache[key] = self.documents.visible(self.shards[rank])
        return self._cache[key]

    def _needed(self, rank: int, peer: int) -> list[range]:
        return list(intersect(self._visible(rank), self.shards[peer]))

    def _pieces(self, runs: Iterable[range]) -> Iterator[tuple[int, list[Piece]]]:
        for document, pieces in groupby(self.documents.pieces(runs), key=lambda piece: piece.document):
            yield document, list(pieces)

    def _local_documents(self, rank: int) -> list[range]:
        held = self._pieces(self.shards[rank])
        return [range(pieces[0].local.start, pieces[-1].local.stop) for _, pieces in held]

    def _rounds(self, rank: int, key_runs: Iterable[range]) -> list[list[tuple[range, range]]]:
        """Rectangles (query rows, key rows) of a rank over others' keys. Those of one round are disjoint and ascending
        both ways; a document takes several rounds where its pieces on the two sides alternate."""
        keys = dict(self._pieces(key_runs))
        rounds: list[list[tuple[range, range]]] = []
        for document, queries in self._pieces(self.shards[rank]):
            if document not in keys:
                continue
            rectangles: list[tuple[range, range]] = []
            for piece in queries:
                seen = [k for k in keys[document] if not self.causal or k.rows.stop <= piece.rows.start]
                if not seen:
                    continue
                local, span = piece.local, range(seen[0].local.start, seen[-1].local.stop)
                if rectangles and rectangles[-1][1] == span:
                    local = range(rectangles.pop()[0].start, local.stop)
                rectangles.append((local, span))
            for number, rectangle in enumerate(rectangles):
                if number == len(rounds):
                    rounds.append([])
                rounds[number].append(rectangle)
        return rounds

    def _make_calls(self, rank: int, peer: int | None, device: torch.device) -> Iterator[Call]:
        if peer == rank:
            rectangles = [(rows, rows) for rows in self._local_documents(rank)]
            if rectangles:
                yield make_call(rectangles, self.causal, device)
            return
        if peer is None:
            runs = sorted(
                (run for other in range(self.ring) if other != rank for run in self._needed(rank, other)),
                key=lambda run: run.start,
            )
        else:
            runs = list(self.shards[peer])
        for rectangles in self._rounds(rank, runs):
            yield make_call(rectangles, False, device)

    def _make_exchange(self, rank: int, device: torch.device) -> Exchange:
        peers = range(self.ring)
        sent = [self.needs(peer, rank) for peer in peers]
        received = [self.needs(rank, peer) for peer in peers]
        arriving = [_rows_of(self._needed(rank, peer) if peer != rank else []) for peer in peers]
        order = torch.cat(arriving).argsort()
        longest = max(self.shard_rows)
        gathered = torch.cat([_rows_of(rows) + peer * longest for peer, rows in enumerate(received)])[order]
        return Exchange(
            send=torch.cat([_rows_of(rows) for rows in sent]).to(device),
            send_counts=[sum(map(len, rows)) for rows in sent],
            receive_counts=[sum(map(len, rows)) for rows in received],
            order=order.to(device),
            inverse=order.argsort().to(device),
            gathered=gathered.to(device),
        )


@torch.compiler.disable
def plan_sequence(
    layout: VarlenLayout,
    *,
    ring: int,
    ulysses: int = 1,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    arrangement: str = "auto",
    chunk: int | None = None,
    causal: bool = True,
    transport: str = "auto",
) -> SequencePlan:
    """Plan attention over one pack on ring x ulysses ranks. Pure and the same on every rank; no length has to be
    divisible by anything, and no document is padded.

    Args:
        layout: the documents of the pack, lengths known on the host; empty ones are fine.
        ring, ulysses: degrees, >= 1.
        num_heads, num_kv_heads, head_dim: of the attention layers; num_kv_heads divides num_heads. Neither has to be
            divisible by `ulysses`.
        arrangement: "contiguous": equal cuts, most local, unbalanced under causality. "zigzag": two cuts per rank,
            balanced for one document. "zigzag_per_seq": that for each document by itself, balanced for any pack, moves
            most. "balanced": chunks dealt by attention area, the same number to each rank. "auto": the fastest by the
            cost model.
        chunk: rows of a chunk of "balanced"; None = up to 8 chunks a rank, of 128 rows or more.
        causal: whether a query sees the keys up to its own position only, or all of its document.
        transport: "ring": shards of keys pass from rank to rank. "sparse": one all-to-all of exactly the rows needed.
            "gather": all keys to all ranks. "auto": the fastest by the cost model.

    Raises:
        TypeError, ValueError: an argument outside of what is said above.
    """
    if not isinstance(layout, VarlenLayout):
        raise TypeError(f"layout must be a VarlenLayout, got {type(layout).__name__}")
    sizes = {"ring": ring, "ulysses": ulysses, "num_heads": num_heads, "num_kv_heads": num_kv_heads}
    for name, value in {**sizes, "head_dim": head_dim, **({} if chunk is None else {"chunk": chunk})}.items():
        check_int(name, value, minimum=1)
    if num_heads % num_kv_heads:
        raise ValueError(f"num_kv_heads must divide num_heads ({num_heads}), got {num_kv_heads}")
    check_choice("arrangement", arrangement, (*ARRANGEMENTS, "auto"))
    check_choice("transport", transport, (*TRANSPORTS, "auto"))
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if chunk is not None and arrangement not in ("balanced", "auto"):
        raise ValueError(f"chunk must be None for arrangement {arrangement!r}, got {chunk}")
    documents = Documents(layout.lengths, causal)
    # One ring rank holds everything: all arrangements are the same, and nothing moves.
    arrangements = (("contiguous",) if ring == 1 else tuple(ARRANGEMENTS)) if arrangement == "auto" else (arrangement,)
    transports = (("ring",) if ring == 1 else TRANSPORTS) if transport == "auto" else (transport,)
    plans = [
        SequencePlan(layout, ring, ulysses, num_heads, num_kv_heads, head_dim, name, way, causal, shards, cache)
        for name in arrangements
        for shards, cache in [(ARRANGEMENTS[name](documents, ring, chunk), dict[Hashable, Any]())]
        for way in transports
    ]
    return plans[0] if len(plans) == 1 else min(plans, key=cost.predicted_time)


def make_call(rectangles: list[tuple[range, range]], causal: bool, device: torch.device) -> Call:
    """One call that computes rectangles (query rows, key rows), disjoint and ascending both ways."""
    q_lengths: list[int] = []
    k_lengths: list[int] = []
    q_at, k_at = (side.start for side in rectangles[0])
    for q, k in rectangles:
        if q.start > q_at:
            q_lengths.append(q.start - q_at)
            k_lengths.append(0)
        if k.start > k_at:
            q_lengths.append(0)
            k_lengths.append(k.start - k_at)
        q_lengths.append(len(q))
        k_lengths.append(len(k))
        q_at, k_at = q.stop, k.stop
    first_q, first_k = rectangles[0]
    return Call(
        slice(first_q.start, q_at),
        slice(first_k.start, k_at),
        VarlenLayout(q_lengths, device),
        VarlenLayout(k_lengths, device),
        causal,
    )


def _rows_of(runs: Iterable[range]) -> Tensor:
    parts = [torch.arange(run.start, run.stop, run.step) for run in runs]
    return torch.cat(parts) if parts else torch.empty(0, dtype=torch.int64)


def _check_rank(name: str, rank: int, size: int) -> None:
    check_int(name, rank, minimum=0)
    if rank >= size:
        raise ValueError(f"{name} must be below {size}, got {rank}")
