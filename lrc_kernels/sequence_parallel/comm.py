# SPDX-License-Identifier: Apache-2.0
"""Communication as an argument: a schedule (a generator of one rank) yields what it sends and gets what arrives, from
`TorchRanks` over torch.distributed or from `VirtualRanks`, which runs all ranks of a group in one process."""

from __future__ import annotations

import itertools
import logging
import time
import weakref
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, ClassVar, TypeVar

import torch
from torch import Tensor, distributed

from lrc_kernels.backend import LIB

_log = logging.getLogger(__name__)
T = TypeVar("T")

# Part of the timeout, at most this many seconds, in which ranks that failed wait for each other's reports.
REPORT_SHARE, REPORT_SECONDS = 0.2, 5.0


@dataclass(frozen=True, eq=False)
class Shift:
    """Send `tensor` to the next rank of `axis`; [receive_rows, ...] arrives from the one before."""

    axis: str
    tensor: Tensor
    receive_rows: int
    step: int


@dataclass(frozen=True, eq=False)
class AllToAll:
    """Send `send_counts[p]` rows of `tensor` to each rank p of `axis`; `receive_counts[p]` rows arrive from it."""

    axis: str
    tensor: Tensor
    send_counts: list[int]
    receive_counts: list[int]
    step: int


@dataclass(frozen=True, eq=False)
class AllGather:
    """Send `tensor` to all ranks of `axis`; those of all, [size * rows, ...], arrive. Same shape on every rank."""

    axis: str
    tensor: Tensor
    step: int


@dataclass(frozen=True, eq=False)
class AllReduce:
    """Give `tensor`; the sum of those of all ranks of `axis` arrives. Same shape on every rank."""

    axis: str
    tensor: Tensor
    step: int


Request = Shift | AllToAll | AllGather | AllReduce


class Pending:
    """What a posted request will bring; a schedule that yields it waits, and gets the tensor. Until then it must not
    write to what it sent."""

    def __init__(self, request: Request, tensor: Tensor, works: Sequence[tuple[Any, tuple[int, ...]]]):
        self.request, self.tensor, self.works = request, tensor, works


# A schedule posts by `pending = yield request` and waits by `tensor = yield pending`.
Schedule = Generator[Any, Any, T]


class PeerError(RuntimeError):
    """A rank did not do its part. `peer` is its global rank (None where nobody can tell), `step` that of this rank."""

    def __init__(self, message: str, peer: int | None, step: int):
        super().__init__(message)
        self.peer, self.step = peer, step


def as_words(x: Tensor) -> Tensor:
    """[n, ...] of any dtype -> int64 [n, W], or int32 or uint8 where a row's bytes do not divide; a copy only where x
    is not contiguous or starts between two words. What only moves needs no dtype of its own: backends, indexing and
    padding each know some dtypes and not others, and all know these."""
    width = x.shape[1:].numel() * x.element_size()
    word = next(dtype for dtype in (torch.int64, torch.int32, torch.uint8) if width % dtype.itemsize == 0)
    x = x.resolve_conj().resolve_neg().contiguous()
    if x.storage_offset() * x.element_size() % word.itemsize:
        x = x.clone()
    return x.view(-1).view(word).view(x.shape[0], width // word.itemsize)


def from_words(rows: Tensor, like: Tensor) -> Tensor:
    """The inverse: rows as `as_words` has them, shaped and typed as those of `like`."""
    return rows.view(-1).view(like.dtype).view(rows.shape[0], *like.shape[1:])


class TorchRanks:
    """Runs this process's schedules over torch.distributed: `groups` by axis. `bytes_sent` counts what left this rank;
    `name` is the same on all ranks of the mesh, and no other mesh has it.

    Where the backend tells about a dead or stalled peer (gloo), every other rank raises PeerError within the timeout of
    the default process group. On NCCL its watchdog ends the process; the step under way is logged at level DEBUG.
    """

    _numbers = itertools.count()
    _by_number: ClassVar[weakref.WeakValueDictionary[int, TorchRanks]] = weakref.WeakValueDictionary()

    def __init__(self, groups: dict[str, distributed.ProcessGroup], device: torch.device, name: str):
        self.groups, self._name = groups, name
        self.number = next(self._numbers)
        self._by_number[self.number] = self
        self.ranks = {axis: distributed.get_process_group_ranks(group) for axis, group in groups.items()}
        self.rank = distributed.get_rank()
        self.bytes_sent = 0
        self._timeout = _default_timeout(device)
        self._report = min(self._timeout * REPORT_SHARE, REPORT_SECONDS)

    @classmethod
    def of(cls, number: int) -> TorchRanks:
        """The one of that `number`, as ops of torch.library name it.

        Raises:
            RuntimeError: its mesh is gone.
        """
        ranks = cls._by_number.get(number)
        if ranks is None:
            raise RuntimeError("mesh must live until the last backward on it, got one that is gone")
        return ranks

    def place(self, ring: int, ulysses: int) -> tuple[int, int]:
        """(ring rank, ulysses rank) of this process, for a plan of these degrees.

        Raises:
            ValueError: a mesh whose degrees are not those of the plan.
        """
        here = []
        for axis, degree in (("ring", ring), ("ulysses", ulysses)):
            ranks = self.ranks.get(axis, [self.rank])
            if len(ranks) != degree:
                raise ValueError(
                    f"mesh must have {degree} ranks in dimension {axis!r}, as the plan has, got {len(ranks)}"
                )
            here.append(ranks.index(self.rank))
        return here[0], here[1]

    def run(self, what: str, schedule: Schedule[T]) -> T:
        """The schedule's result; `what` names it in errors.

        Raises:
            PeerError: naming the global rank and the step.
        """
        answer: Any = None
        try:
            while True:
                asked = schedule.send(answer)
                answer = self._wait(what, asked) if isinstance(asked, Pending) else self._post(what, asked)
        except StopIteration as finished:
            return finished.value

    def _post(self, what: str, request: Request) -> Pending:
        _log.debug("rank %d: %s, step %d: %s", self.rank, what, request.step, type(request).__name__)
        if isinstance(request, AllReduce):
            sent = request.tensor.clone(memory_format=torch.contiguous_format)
        else:
            sent = as_words(request.tensor)
        try:
            return self._shift(request, sent) if isinstance(request, Shift) else self._collective(request, sent)
        except torch.OutOfMemoryError:
            raise
        except RuntimeError as error:
            raise self._peer_error(what, request, tuple(self.ranks[request.axis]), error) from error

    def _shift(self, request: Shift, sent: Tensor) -> Pending:
        group, ranks = self.groups[request.axis], self.ranks[request.axis]
        here = ranks.index(self.rank)
        after, before = ranks[(here + 1) % len(ranks)], ranks[here - 1]
        arriving = sent.new_empty(request.receive_rows, sent.shape[1])
        operations = []
        # Both sides know the sizes, so that both leave an empty message out.
        if sent.numel():
            operations.append((distributed.P2POp(distributed.isend, sent, after, group), after))
        if arriving.numel():
            operations.append((distributed.P2POp(distributed.irecv, arriving, before, group), before))
        works = distributed.batch_isend_irecv([operation for operation, _ in operations]) if operations else []
        self.bytes_sent += sent.nbytes
        # One work per operation (gloo) or one for all (NCCL).
        peers = [(peer,) for _, peer in operations] if len(works) == len(operations) else [(before, after)]
        # The receive first: who waits for a message names the rank that owes it.
        pairs = list(zip(works, peers, strict=True))[::-1]
        # The request keeps the tensor that is being sent alive.
        kept = Shift(request.axis, sent, request.receive_rows, request.step)
        return Pending(kept, from_words(arriving, request.tensor), pairs)

    def _collective(self, request: AllToAll | AllGather | AllReduce, sent: Tensor) -> Pending:
        group, ranks = self.groups[request.axis], self.ranks[request.axis]
        here = ranks.index(self.rank)
        if isinstance(request, AllReduce):
            work = distributed.all_reduce(sent, group=group, async_op=True)
            # What a ring of the backend sends: to scatter the sums, and to gather them.
            self.bytes_sent += 2 * sent.nbytes * (len(ranks) - 1) // len(ranks)
            return Pending(request, sent, [(work, tuple(ranks))])
        if isinstance(request, AllGather):
            arriving = sent.new_empty(len(ranks) * sent.shape[0], sent.shape[1])
            work = _all_gather(arriving, sent, group=group, async_op=True)
            self.bytes_sent += sent.nbytes * (len(ranks) - 1)
            kept: Request = AllGather(request.axis, sent, request.step)
            return Pending(kept, from_words(arriving, request.tensor), [(work, tuple(ranks))])
        arriving = sent.new_empty(sum(request.receive_counts), sent.shape[1])
        work = distributed.all_to_all_single(
            arriving, sent, request.receive_counts, request.send_counts, group=group, async_op=True
        )
        self.bytes_sent += sent.nbytes - request.send_counts[here] * sent[:1].nbytes
        kept = AllToAll(request.axis, sent, request.send_counts, request.receive_counts, request.step)
        return Pending(kept, from_words(arriving, request.tensor), [(work, tuple(ranks))])

    def _wait(self, what: str, pending: Pending) -> Tensor:
        for work, peers in pending.works:
            try:
                # NCCL would block the host for a wait with a timeout, and has a watchdog of its own.
                done = work.wait() if pending.tensor.is_cuda else work.wait(_seconds(self._timeout - self._report))
                if not done:
                    raise RuntimeError("the operation was aborted")
            except RuntimeError as error:
                raise self._peer_error(what, pending.request, peers, error) from error
        return pending.tensor

    def _peer_error(self, what: str, request: Request, peers: tuple[int, ...], error: Exception) -> PeerError:
        others = tuple(peer for peer in peers if peer != self.rank)
        culprit = self._culprit(others)
        named = f"rank {culprit}" if culprit is not None else "one of the ranks " + ", ".join(map(str, others))
        message = f"{what}, step {request.step}: {named} died or stalled (seen by rank {self.rank}: {error})"
        return PeerError(message, culprit, request.step)

    def _culprit(self, suspects: tuple[int, ...]) -> int | None:
        """The rank to blame. A rank that fails says so in the store, and whom it waited for; the one at the end of that
        chain, which says nothing, is dead or stalled."""
        store = _default_store()
        if store is None:
            return suspects[0] if len(suspects) == 1 else None
        # One for all groups of the mesh and all it runs, as who waits on one axis may wait for a rank that is stuck on
        # another, in a step before.
        prefix = f"lrc_sequence_parallel/{self._name}"
        try:
            store.set(f"{prefix}/{self.rank}", ",".join(map(str, suspects)))
            seen, deadline = {self.rank}, time.monotonic() + self._report
            while suspects:
                silent = [rank for rank in suspects if not _reported(store, f"{prefix}/{rank}", deadline)]
                if silent:
                    return silent[0] if len(silent) == 1 else None
                seen.update(suspects)
                named = (store.get(f"{prefix}/{rank}").decode().split(",") for rank in suspects)
                suspects = tuple({int(rank) for ranks in named for rank in ranks} - seen)
        except RuntimeError as error:
            # The store may have died with the rank that holds it.
            _log.warning("cannot ask the store which rank failed: %s", error)
        return suspects[0] if len(suspects) == 1 else None


def collective_op(schema: str, run: Callable[..., Any], fake: Callable[..., Any]) -> Any:
    """An op of torch.library that communicates: one node of a compiled graph, and one result that selective activation
    checkpointing can keep. It takes tensors and numbers, among them that of its `TorchRanks`."""
    name = schema.split("(")[0]
    LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    torch.library.register_fake(f"lrc::{name}", fake, lib=LIB)
    return getattr(torch.ops.lrc, name).default


class VirtualRanks:
    """Runs the schedules of ring x ulysses ranks in lockstep, in this process and on one device, without threads.

    A tensor arrives as a copy, and one that was written to between post and arrival is an error, as is a message of
    another size than expected, and a rank that waits for what nobody sends.
    """

    def __init__(self, ring: int, ulysses: int = 1):
        self.ring, self.ulysses = ring, ulysses
        self.bytes_sent = 0

    def run(self, make: Callable[[int, int], Schedule[T]]) -> list[T]:
        """Results of `make(ring_rank, ulysses_rank)` for all ranks, ring-major."""
        ranks = [(r, u) for r in range(self.ring) for u in range(self.ulysses)]
        schedules = {rank: make(*rank) for rank in ranks}
        results: dict[tuple[int, int], T] = {}
        posted: dict[tuple[int, int], dict[str, list[tuple[Request, int]]]] = {rank: {} for rank in ranks}
        waiting: dict[tuple[int, int], Any] = dict.fromkeys(ranks)
        while len(results) < len(ranks):
            moved = False
            for rank in [rank for rank in ranks if rank not in results]:
                answer = waiting[rank]
                if isinstance(answer, _Awaited):
                    answer = self._deliver(rank, answer, posted)
                    if answer is None:
                        continue
                moved = True
                try:
                    while not isinstance(asked := schedules[rank].send(answer), _Awaited):
                        requests = posted[rank].setdefault(asked.axis, [])
                        requests.append((asked, _version(asked.tensor)))
                        answer = _Awaited(asked, len(requests) - 1)
                    waiting[rank] = asked
                except StopIteration as finished:
                    results[rank] = finished.value
            if not moved:
                stuck = ", ".join(
                    f"{rank} at step {waiting[rank].request.step}" for rank in ranks if rank not in results
                )
                raise RuntimeError(f"deadlock: {stuck}")
        return [results[rank] for rank in ranks]

    def _members(self, rank: tuple[int, int], axis: str) -> list[tuple[int, int]]:
        if axis == "ring":
            return [(r, rank[1]) for r in range(self.ring)]
        return [(rank[0], u) for u in range(self.ulysses)]

    def _deliver(self, rank: tuple[int, int], awaited: _Awaited, posted: dict) -> Tensor | None:
        request, members = awaited.request, self._members(rank, awaited.request.axis)
        here = members.index(rank)
        senders = [members[here - 1]] if isinstance(request, Shift) else members
        parts: list[Tensor] = []
        for sender in senders:
            requests = posted[sender].get(request.axis, [])
            if len(requests) <= awaited.number:
                return None
            theirs, version = requests[awaited.number]
            if type(theirs) is not type(request):
                raise RuntimeError(f"rank {rank} posted a {type(request).__name__}, {sender} a {type(theirs).__name__}")
            if _version(theirs.tensor) != version:
                raise RuntimeError(f"rank {sender} wrote to what it sent at step {theirs.step} before it arrived")
            part = theirs.tensor
            if isinstance(theirs, AllToAll):
                part = part.split(theirs.send_counts)[here]
            if sender != rank:
                self.bytes_sent += part.nbytes
            parts.append(part)
        wanted = [request.receive_rows] if isinstance(request, Shift) else [len(part) for part in parts]
        wanted = request.receive_counts if isinstance(request, AllToAll) else wanted
        if [len(part) for part in parts] != wanted:
            raise RuntimeError(
                f"rank {rank} expected {wanted} rows at step {request.step}, got {list(map(len, parts))}"
            )
        if isinstance(request, AllReduce):
            return torch.stack(parts).sum(0)
        return torch.cat(parts) if len(parts) > 1 else parts[0].clone()


@dataclass(frozen=True, eq=False)
class _Awaited:
    request: Request
    number: int


def _version(tensor: Tensor) -> int:
    """How often it was written to; tensors of inference mode do not count."""
    return 0 if tensor.is_inference() else tensor._version


def _all_gather(output: Tensor, tensor: Tensor, **options: Any) -> Any:
    # torch 2.13 renames it and warns about the old name.
    gather = getattr(distributed, "all_gather_single", None) or distributed.all_gather_into_tensor
    return gather(output, tensor, **options)


def _seconds(seconds: float) -> timedelta:
    return timedelta(seconds=max(seconds, 0.001))


def _reported(store: Any, key: str, deadline: float) -> bool:
    while not store.check([key]):
        if time.monotonic() > deadline:
            return False
        time.sleep(0.01)
    return True


def _default_store() -> Any:
    get = getattr(distributed.distributed_c10d, "_get_default_store", None)
    return get() if get is not None else None


def _default_timeout(device: torch.device) -> float:
    """Seconds that the default group was given; the groups of a DeviceMesh do not inherit it."""
    backend = distributed.distributed_c10d._get_default_group()._get_backend(device)
    options = getattr(backend, "options", None)
    timeout = getattr(options, "_timeout", None)
    return (timeout if timeout is not None else distributed.default_pg_timeout).total_seconds()
