# SPDX-License-Identifier: Apache-2.0
"""All ranks of a plan in one process and on one device: whole tensors in and out, every message passed as between
processes. For tests, for debugging on one GPU, and to measure what the schedule itself costs."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrc_kernels.sequence_parallel.attention_2d import backward, forward, refuse_second_order
from lrc_kernels.sequence_parallel.blocks import Task, accumulation_dtype
from lrc_kernels.sequence_parallel.comm import Schedule, VirtualRanks
from lrc_kernels.sequence_parallel.plan import SequencePlan
from lrc_kernels.sequence_parallel.shard import take_rows


def virtual_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SequencePlan,
    *,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    grad_wire: torch.dtype | None = None,
    return_lse: bool = False,
    ranks: VirtualRanks | None = None,
) -> Tensor | tuple[Tensor, Tensor]:
    """`sequence_parallel_attention` with all ranks of the plan in this process. Autograd.

    Args:
        q: [T, Hq, K]; k, v: [T, Hkv, K]; key_bias: [T]: of the whole pack.
        ranks: what passes the messages, to read its `bytes_sent`; None = new ones.
        softmax_scale, grad_wire, return_lse: as `sequence_parallel_attention`.

    Returns:
        out [T, Hq, K]; with `return_lse` also lse [Hq, T].
    """
    wire = accumulation_dtype(q.dtype) if grad_wire is None else grad_wire
    scale = plan.head_dim**-0.5 if softmax_scale is None else softmax_scale
    tasks = {
        (r, u): Task(plan, r, u, scale, key_bias is not None, wire)
        for r in range(plan.ring)
        for u in range(plan.ulysses)
    }
    ranks = VirtualRanks(plan.ring, plan.ulysses) if ranks is None else ranks
    out, lse = _VirtualAttention.apply(q, k, v, key_bias, tasks, ranks)
    return (out, lse) if return_lse else out


class _VirtualAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, tasks: dict[tuple[int, int], Task],
                ranks: VirtualRanks) -> tuple[Tensor, Tensor]:  # fmt: skip
        plan = next(iter(tasks.values())).plan

        def make(*here: int) -> Schedule[Any]:
            at = here[0], here[1]
            bias = None if key_bias is None else take_rows(key_bias, plan, at)
            return _forward(tasks[at], take_rows(q, plan, at), take_rows(k, plan, at), take_rows(v, plan, at), bias)

        results = ranks.run(make)
        ctx.set_materialize_grads(False)
        ctx.tasks, ctx.ranks, ctx.states = tasks, ranks, [state for _, _, state in results]
        out = _assemble(q.new_empty(q.shape), plan, [out for out, _, _ in results])
        lse = _assemble(q.new_empty(q.shape[:2], dtype=accumulation_dtype(q.dtype)), plan, [x.T for _, x, _ in results])
        return out, lse.T.contiguous()

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        tasks: dict[tuple[int, int], Task] = ctx.tasks
        plan, places = next(iter(tasks.values())).plan, list(tasks)
        dout, dlse = grads

        def make(*here: int) -> Schedule[Any]:
            at = here[0], here[1]
            kept, key_bias = ctx.states[places.index(at)]
            dout_local = None if dout is None else take_rows(dout, plan, at)
            dlse_local = None if dlse is None else take_rows(dlse, plan, at, 1)
            return backward(tasks[at], kept, dout_local, dlse_local, key_bias)

        results = ctx.ranks.run(make)
        sizes = [(plan.layout.num_tokens, heads, plan.head_dim) for heads in (plan.num_heads, *[plan.num_kv_heads] * 2)]
        gradients = [
            _assemble(results[0][i].new_empty(size), plan, [result[i] for result in results])
            for i, size in enumerate(sizes)
        ]
        return *gradients, None, None, None


def _forward(task: Task, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Schedule[Any]:
    out, lse, exchanged = yield from forward(task, q, k, v, key_bias, True)
    return out, lse, (exchanged or (q, k, v, out, lse), key_bias)


def _assemble(whole: Tensor, plan: SequencePlan, parts: list[Tensor]) -> Tensor:
    for number, part in enumerate(parts):
        index = plan.local_indices(*divmod(number, plan.ulysses))
        held = (index >= 0).to(part.device)
        whole[index[index >= 0].to(part.device)] = part[held]
    return whole
