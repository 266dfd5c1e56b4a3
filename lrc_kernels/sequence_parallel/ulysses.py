# SPDX-License-Identifier: Apache-2.0
"""Rows of all heads become all rows of some heads, and back: one all-to-all over the ulysses ranks each way."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lrc_kernels.sequence_parallel.blocks import Task, accumulation_dtype
from lrc_kernels.sequence_parallel.comm import AllGather, AllToAll, Schedule


def scatter_heads(task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor], step: int = 0) -> Schedule[Tensor]:
    """Rows of this rank, all heads -> rows of the ring rank's whole shard, this rank's heads, in one message.

    Args:
        queries, keys: [T_local, Hq, K] and [T_local, Hkv, K], of one dtype.

    Returns:
        [U * T_local, slots, K]: num_q slots for each of `queries`, then num_kv for each of `keys`; zeros where a rank
        has fewer heads than slots.
    """
    heads, size = task.plan.heads, task.plan.ulysses
    layout = [(x, heads.q, heads.num_q) for x in queries] + [(x, heads.kv, heads.num_kv) for x in keys]
    rows, head_dim = layout[0][0].shape[0], layout[0][0].shape[2]
    message = layout[0][0].new_zeros(size, rows, sum(slots for *_, slots in layout), head_dim)
    at = 0
    for x, slices, slots in layout:
        for rank, part in enumerate(slices):
            message[rank, :, at : at + part.stop - part.start] = x[:, part]
        at += slots
    arriving = yield AllToAll("ulysses", message.flatten(0, 1), [rows] * size, [rows] * size, step)
    return (yield arriving)


def gather_heads(
    task: Task, queries: Sequence[Tensor], keys: Sequence[Tensor], step: int = 0
) -> Schedule[list[Tensor]]:
    """The adjoint of `scatter_heads`: rows of the shard, this rank's heads -> this rank's rows, all heads. Heads of
    padding are dropped, and a KV head that several ranks hold gets their sum, in rank order, in fp32 or wider."""
    heads, size = task.plan.heads, task.plan.ulysses
    message = torch.cat([*queries, *keys], 1)
    rows = message.shape[0] // size
    arriving = yield AllToAll("ulysses", message, [rows] * size, [rows] * size, step)
    parts = (yield arriving).unflatten(0, (size, rows))
    gathered, at = [], 0
    layout = [(task.plan.num_heads, heads.q, heads.num_q, parts.dtype)] * len(queries)
    layout += [(task.plan.num_kv_heads, heads.kv, heads.num_kv, accumulation_dtype(parts.dtype))] * len(keys)
    for num_heads, slices, slots, dtype in layout:
        x = parts.new_zeros(rows, num_heads, parts.shape[3], dtype=dtype)
        for rank, part in enumerate(slices):
            x[:, part] += parts[rank, :, at : at + part.stop - part.start]
        gathered.append(x)
        at += slots
    return gathered


def gather_rows(x: Tensor) -> Schedule[Tensor]:
    """[T_local, ...] of each ulysses rank -> [U * T_local, ...], the same on all of them."""
    arriving = yield AllGather("ulysses", x, 0)
    return (yield arriving)
