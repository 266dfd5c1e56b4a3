# SPDX-License-Identifier: Apache-2.0
"""Attention of one ring rank over the keys of all: its q and its K|V message in, (out, lse) or gradients out.

Three ways for keys to travel: shard by shard around the ring, one exchange of only the rows that are needed, or all to
all ranks. All are schedules (`comm.py`): `pending = yield request` posts, `tensor = yield pending` waits.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.sequence_parallel.blocks import Partial, Saved, Task, accumulation_dtype, attend, gradients
from lrc_kernels.sequence_parallel.comm import AllGather, AllToAll, Pending, Schedule, Shift


def forward(task: Task, q: Tensor, rows: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
    """out [n, Hq, K] in q's dtype and lse [Hq, n] in fp32 or wider, by the transport of the plan."""
    way = _ring_forward if task.plan.transport == "ring" else _exchange_forward
    total: Partial = yield from way(task, q, rows)
    out, lse = total.finish()
    return out.to(q.dtype), lse


def backward(task: Task, saved: Saved, rows: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
    """dq [n, Hq, K] and dk | dv [n, 2HK], both in fp32 or wider, from the out and lse over all keys."""
    way = _ring_backward if task.plan.transport == "ring" else _exchange_backward
    return (yield from way(task, saved, rows))


def _ring_forward(task: Task, q: Tensor, rows: Tensor) -> Schedule[Partial]:
    total, size = Partial(q), task.plan.ring
    for step in range(size):
        peer = (task.ring_rank - step) % size
        if step + 1 < size:
            arriving = yield Shift("ring", rows, task.plan.shard_rows[peer - 1], step)
        attend(task, peer, q, rows, total)
        if step + 1 < size:
            rows = yield arriving
    return total


def _ring_backward(task: Task, saved: Saved, rows: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
    """The gradient of a shard follows it one step behind: what the rank before has summed up arrives, this rank's part
    is added, and it goes on until it is home. A shard's own part waits there."""
    size, shard_rows = task.plan.ring, task.plan.shard_rows
    dq = _zeros_like(saved.q)
    returning: Pending | None = None
    for step in range(size):
        peer = (task.ring_rank - step) % size
        if step + 1 < size:
            arriving = yield Shift("ring", rows, shard_rows[peer - 1], step)
        part = gradients(task, peer, saved, rows, dq)
        if step == 0:
            own = part
        else:
            if returning is not None:
                part += yield returning
            returning = yield Shift("ring", part.to(task.grad_wire), shard_rows[peer - 1], step)
        if step + 1 < size:
            rows = yield arriving
    if returning is not None:
        own += yield returning
    return dq, own


def _exchange_forward(task: Task, q: Tensor, rows: Tensor) -> Schedule[Partial]:
    total = Partial(q)
    arriving = yield from _post_keys(task, rows)
    attend(task, task.ring_rank, q, rows, total)
    if arriving is not None:
        attend(task, None, q, _in_order(task, (yield arriving)), total)
    return total


def _exchange_backward(task: Task, saved: Saved, rows: Tensor) -> Schedule[tuple[Tensor, Tensor]]:
    dq = _zeros_like(saved.q)
    arriving = yield from _post_keys(task, rows)
    own = gradients(task, task.ring_rank, saved, rows, dq)
    if arriving is None:
        return dq, own
    exchange = task.plan.exchange(task.ring_rank, rows.device)
    part = gradients(task, None, saved, _in_order(task, (yield arriving)), dq)
    sent = part[exchange.inverse].to(task.grad_wire)
    arriving = yield AllToAll("ring", sent, exchange.receive_counts, exchange.send_counts, 1)
    returned = yield arriving
    # Peer by peer, each row at most once: the order of the sum, and so its rounding, is fixed.
    for index, rows_of_peer in zip(*(x.split(exchange.send_counts) for x in (exchange.send, returned)), strict=True):
        own[index] += rows_of_peer
    return dq, own


def _post_keys(task: Task, rows: Tensor) -> Schedule[Pending | None]:
    if task.plan.ring == 1:
        return None
    if task.plan.transport == "gather":
        padding = max(task.plan.shard_rows) - rows.shape[0]
        return (yield AllGather("ring", torch.nn.functional.pad(rows, (0, 0, 0, padding)), 0))
    exchange = task.plan.exchange(task.ring_rank, rows.device)
    return (yield AllToAll("ring", rows[exchange.send], exchange.send_counts, exchange.receive_counts, 0))


def _in_order(task: Task, arrived: Tensor) -> Tensor:
    """The remote rows that this rank needs, in the order of the pack."""
    exchange = task.plan.exchange(task.ring_rank, arrived.device)
    return arrived[exchange.gathered if task.plan.transport == "gather" else exchange.order]


def _zeros_like(x: Tensor) -> Tensor:
    return torch.zeros(x.shape, dtype=accumulation_dtype(x.dtype), device=x.device)
