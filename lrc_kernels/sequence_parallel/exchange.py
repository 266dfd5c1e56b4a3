# SPDX-License-Identifier: Apache-2.0
"""Rows that change their rank: which rank holds which row before and after goes in, an all-to-all per axis of the mesh
comes out. Differentiable; the gradient goes back the way the rows came."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.checks import check_device, check_int
from lrc_kernels.sequence_parallel.comm import AllToAll, Schedule, TorchRanks, as_words, collective_op, from_words
from lrc_kernels.sequence_parallel.mesh import ranks_of


class Hop(NamedTuple):
    """One all-to-all: `order` lays the rows at hand out by receiver, `send` and `receive` count them per rank."""

    order: Tensor
    send: list[int]
    receive: list[int]


class Moves(NamedTuple):
    """What one rank does: a hop over the ring, one over ulysses, and where in its result the arriving rows stand."""

    ring: Hop
    ulysses: Hop
    put: Tensor


@dataclass(frozen=True, eq=False)
class RowExchange:
    """Who holds which rows before and after; made by `plan_exchange`. Pure, the same on every rank.

    Attributes:
        before, after: int64 row numbers of each rank (ring-major), in the order of its rows; -1 for a row that nobody
            wants (before), or that stays zero (after).
        ring, ulysses: degrees.
    """

    before: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    ring: int
    ulysses: int
    _cache: dict[Any, Moves] = field(default_factory=dict, repr=False)
    _numbers: ClassVar[Iterator[int]] = itertools.count()
    _by_number: ClassVar[weakref.WeakValueDictionary[int, RowExchange]] = weakref.WeakValueDictionary()

    @cached_property
    def number(self) -> int:
        """What ops of torch.library name it by, as long as it lives."""
        number = next(self._numbers)
        self._by_number[number] = self
        return number

    @classmethod
    def of(cls, number: int) -> RowExchange:
        """The one of that `number`."""
        return cls._by_number[number]

    @cached_property
    def table(self) -> dict[str, Tensor]:
        """Per row that moves, ascending: ring and ulysses rank and local row, before and after."""
        total = 1 + max((int(x.max()) for x in (*self.before, *self.after) if len(x)), default=-1)
        sides = [holders(side, total) for side in (self.before, self.after)]
        moving = (sides[0][0] >= 0) & (sides[1][0] >= 0)
        found = {}
        for name, (rank, local) in zip(("from", "to"), sides, strict=True):
            found[name + "_ring"], found[name + "_ulysses"] = rank[moving] // self.ulysses, rank[moving] % self.ulysses
            found[name + "_local"] = local[moving]
        return found

    def crosses(self, axis: str) -> bool:
        """Whether any rank has to send another one of this axis a row."""
        return not torch.equal(self.table[f"from_{axis}"], self.table[f"to_{axis}"])

    def moves(self, ring_rank: int, ulysses_rank: int, device: torch.device) -> Moves:
        """What this rank does, with indices on `device`."""
        key = ring_rank, ulysses_rank, device
        if key not in self._cache:
            self._cache[key] = self._make_moves(ring_rank, ulysses_rank, device)
        return self._cache[key]

    def _make_moves(self, r: int, u: int, device: torch.device) -> Moves:
        t = self.table
        sent = ((t["from_ring"] == r) & (t["from_ulysses"] == u)).nonzero().squeeze(1)
        sent = sent[t["to_ring"][sent].argsort(stable=True)]
        # Between the hops a row is on the ring rank of its goal and still on the ulysses rank of its origin.
        held = ((t["to_ring"] == r) & (t["from_ulysses"] == u)).nonzero().squeeze(1)
        held = held[t["from_ring"][held].argsort(stable=True)]
        order = t["to_ulysses"][held].argsort(stable=True)
        arriving = ((t["to_ring"] == r) & (t["to_ulysses"] == u)).nonzero().squeeze(1)
        arriving = arriving[(t["from_ulysses"] * self.ring + t["from_ring"])[arriving].argsort(stable=True)]

        def counts(name: str, rows: Tensor, ranks: int) -> list[int]:
            return t[name][rows].bincount(minlength=ranks).tolist()

        over_ring = counts("to_ring", sent, self.ring), counts("from_ring", held, self.ring)
        over_ulysses = counts("to_ulysses", held, self.ulysses), counts("from_ulysses", arriving, self.ulysses)
        return Moves(
            Hop(t["from_local"][sent].to(device), *over_ring),
            Hop(order.to(device), *over_ulysses),
            t["to_local"][arriving].to(device),
        )


def plan_exchange(before: Sequence[Tensor], after: Sequence[Tensor], *, ring: int, ulysses: int) -> RowExchange:
    """Plan how rows get from the ranks that hold them to those that shall.

    Args:
        before, after: for each of ring * ulysses ranks, ring-major, int64 on the host: the numbers of its rows in
            order; -1 for a row that nobody wants (before) or that stays zero (after). Only rows that `after` names
            travel.

    Raises:
        TypeError, ValueError: no such lists, a number that two ranks hold, or one that is wanted and nobody holds.
    """
    for name, value in (("ring", ring), ("ulysses", ulysses)):
        check_int(name, value, minimum=1)
    for name, side in (("before", before), ("after", after)):
        if len(side) != ring * ulysses:
            raise ValueError(f"{name} must hold one list for each of {ring} * {ulysses} ranks, got {len(side)}")
        for rows in side:
            if not isinstance(rows, Tensor) or rows.dtype != torch.int64 or rows.dim() != 1 or rows.is_cuda:
                raise TypeError(f"{name} must hold int64 tensors [n] on the host, got {_kind(rows)}")
        named = torch.cat(list(side))
        named = named[named >= 0]
        unique, count = named.unique(return_counts=True)
        if len(unique) != len(named):
            raise ValueError(f"{name} must name every row once, got row {int(unique[count > 1][0])} more than once")
    held, wanted = (torch.cat(list(side)) for side in (before, after))
    missing = wanted[(wanted >= 0) & ~torch.isin(wanted, held)]
    if len(missing):
        raise ValueError(f"before must hold every row of after, got none that holds row {int(missing[0])}")
    return RowExchange(tuple(before), tuple(after), ring, ulysses)


def send_rows(x: Tensor, exchange: RowExchange, here: tuple[int, int]) -> Schedule[Tensor]:
    """[rows before, W] -> [rows after, W]; zeros where no row arrives."""
    moves = exchange.moves(*here, x.device)
    for step, axis in enumerate(("ring", "ulysses")):
        hop: Hop = getattr(moves, axis)
        x = x[hop.order]
        if exchange.crosses(axis):
            arriving = yield AllToAll(axis, x, hop.send, hop.receive, step)
            x = yield arriving
    out = x.new_zeros(len(exchange.after[here[0] * exchange.ulysses + here[1]]), *x.shape[1:])
    out[moves.put] = x
    return out


def return_rows(grad: Tensor, exchange: RowExchange, here: tuple[int, int]) -> Schedule[Tensor]:
    """The adjoint of `send_rows`: [rows after, W] -> [rows before, W]."""
    moves = exchange.moves(*here, grad.device)
    x = grad[moves.put]
    for step, axis in ((2, "ulysses"), (3, "ring")):
        hop: Hop = getattr(moves, axis)
        if exchange.crosses(axis):
            arriving = yield AllToAll(axis, x, hop.receive, hop.send, step)
            x = yield arriving
        rows = len(hop.order) if axis == "ulysses" else len(exchange.before[here[0] * exchange.ulysses + here[1]])
        laid_out = x.new_zeros(rows, *x.shape[1:])
        laid_out[hop.order] = x
        x = laid_out
    return x


def _run_exchange(x: Tensor, exchange: int, ranks: int, back: bool) -> Tensor:
    plan, runs = RowExchange.of(exchange), TorchRanks.of(ranks)
    what, schedule = ("exchange of rows backward", return_rows) if back else ("exchange of rows", send_rows)
    return from_words(runs.run(what, schedule(as_words(x), plan, runs.place(plan.ring, plan.ulysses))), x)


def _fake_exchange(x: Tensor, exchange: int, ranks: int, back: bool) -> Tensor:
    plan = RowExchange.of(exchange)
    ring_rank, ulysses_rank = TorchRanks.of(ranks).place(plan.ring, plan.ulysses)
    side = plan.before if back else plan.after
    return x.new_empty(len(side[ring_rank * plan.ulysses + ulysses_rank]), *x.shape[1:])


exchange_rows_op = collective_op(
    "exchange_rows(Tensor x, int exchange, int ranks, bool back) -> Tensor", _run_exchange, _fake_exchange
)


class _ExchangeRows(torch.autograd.Function):
    """Rows to where they shall be, or back, which is the gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, exchange: RowExchange, mesh: DeviceMesh, back: bool) -> Tensor:
        # They live until the last backward.
        ctx.options, ctx.back = (exchange, mesh), back
        return exchange_rows_op(x, exchange.number, ranks_of(mesh).number, back)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return _ExchangeRows.apply(grads[0], *ctx.options, not ctx.back), None, None, None


@torch.compiler.disable
def exchange_rows(tensors: Sequence[Tensor], exchange: RowExchange, mesh: DeviceMesh) -> tuple[Tensor, ...]:
    """Move this rank's rows to the ranks that shall hold them, in one message per dtype. Autograd. A collective.

    Args:
        tensors: [rows before, ...] each, of any dtype, on one device.
        exchange: by `plan_exchange`, the same on every rank.
        mesh: `make_mesh`, or one that has dimensions "ring" and "ulysses".

    Returns:
        For each of them [rows after, ...]; zeros at rows that `after` numbers -1.

    Raises:
        TypeError, ValueError: rows or devices that do not fit, a mesh of other degrees.
        PeerError: a rank died or stalled (gloo), in the forward or the backward.
    """
    if not isinstance(exchange, RowExchange):
        raise TypeError(f"exchange must be a RowExchange, got {type(exchange).__name__}")
    here = ranks_of(mesh).place(exchange.ring, exchange.ulysses)
    rows = len(exchange.before[here[0] * exchange.ulysses + here[1]])
    if not tensors:
        return ()
    for index, x in enumerate(tensors):
        if not isinstance(x, Tensor):
            raise TypeError(f"tensors[{index}] must be a tensor, got {type(x).__name__}")
        if x.dim() < 1 or x.shape[0] != rows:
            raise ValueError(f"tensors[{index}] must have {rows} rows, got shape {list(x.shape)}")
        check_device(f"tensors[{index}]", x, tensors[0])
    found = list(tensors)
    for dtype in dict.fromkeys(x.dtype for x in tensors):
        group = {index: x for index, x in enumerate(tensors) if x.dtype == dtype}
        widths = [x.shape[1:].numel() for x in group.values()]
        message = torch.cat([x.reshape(rows, width) for x, width in zip(group.values(), widths, strict=True)], 1)
        moved = _ExchangeRows.apply(message, exchange, mesh, False).split(widths, 1)
        for (index, x), part in zip(group.items(), moved, strict=True):
            found[index] = part.unflatten(1, x.shape[1:]) if x.dim() > 1 else part.squeeze(1)
    return tuple(found)


def holders(side: Sequence[Tensor], total: int) -> tuple[Tensor, Tensor]:
    """int64 [total]: the rank whose list names each row (-1: none), and where in it. Pure."""
    rank, local = torch.full((total,), -1), torch.full((total,), -1)
    for number, rows in enumerate(side):
        real = rows >= 0
        rank[rows[real]] = number
        local[rows[real]] = real.nonzero().squeeze(1)
    return rank, local


def _kind(value: object) -> str:
    if not isinstance(value, Tensor):
        return type(value).__name__
    return f"{value.dtype} {list(value.shape)} on {value.device}"
