# SPDX-License-Identifier: Apache-2.0
"""Rows of all heads become all rows of some heads, and back: one all-to-all over the ulysses ranks each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrc_kernels.sequence_parallel.blocks import Task, accumulation_dtype
from lrc_kernels.sequence_parallel.comm import AllGather, AllToAll, Schedule
from lrc_kernels.sequence_parallel.heads import HeadTables, head_tables
from lrc_kernels.sequence_parallel.op import gather_heads_op, scatter_heads_op


def scatter_heads(task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor], step: int = 0) -> Schedule[Tensor]:
    """Rows of this rank, all heads -> rows of the ring rank's whole shard, this rank's heads, in one message.

    Args:
        queries, keys: [T_local, Hq, K] and [T_local, Hkv, K], of one dtype.

    Returns:
        [U * T_local, slots, K]: num_q slots for each of `queries`, then num_kv for each of `keys`; zeros where a rank
        has fewer heads than slots.
    """
    size, rows = task.plan.ulysses, [*queries, *keys][0].shape[0]
    tables = _tables(task, len(queries), len(keys), [*queries, *keys][0].device)
    message = scatter_heads_op([*queries, *keys], tables.scatter)
    arriving = yield AllToAll("ulysses", message.flatten(0, 1), [rows] * size, [rows] * size, step)
    return (yield arriving)


def gather_heads(
    task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor], step: int = 0
) -> Schedule[list[Tensor]]:
    """The adjoint of `scatter_heads`: rows of the shard, this rank's heads -> this rank's rows, all heads. Heads of
    padding are dropped. A KV head that several ranks hold gets their sum, in rank order: with `keys` the results are in
    fp32 or wider."""
    size = task.plan.ulysses
    message = torch.cat([*queries, *keys], 1)
    rows = message.shape[0] // size
    arriving = yield AllToAll("ulysses", message, [rows] * size, [rows] * size, step)
    parts = (yield arriving).unflatten(0, (size, rows))
    dtype = accumulation_dtype(parts.dtype) if keys else parts.dtype
    num_heads = [task.plan.num_heads] * len(queries) + [task.plan.num_kv_heads] * len(keys)
    return gather_heads_op(parts, _tables(task, len(queries), len(keys), parts.device).gather, num_heads, dtype)


def gather_rows(x: Tensor) -> Schedule[Tensor]:
    """[T_local, ...] of each ulysses rank -> [U * T_local, ...], the same on all of them."""
    arriving = yield AllGather("ulysses", x, 0)
    return (yield arriving)


def _tables(task: Task, queries: int, keys: int, device: torch.device) -> HeadTables:
    return head_tables(task.plan.num_heads, task.plan.num_kv_heads, task.plan.ulysses, queries, keys, device)
