# SPDX-License-Identifier: Apache-2.0
"""Attention of a pack that lies on ring x ulysses ranks: local q, k, v in, local out out, differentiable.

Heads are exchanged over ulysses, then keys travel over the ring. Each stage of the forward is one op of torch.library,
so that selective activation checkpointing (`CHECKPOINT_OPS`) can keep its results and repeat no communication.
"""

from __future__ import annotations

import itertools
import weakref
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from lrc_kernels.backend import LIB
from lrc_kernels.checks import check_tensor, check_values
from lrc_kernels.sequence_parallel import ring
from lrc_kernels.sequence_parallel.blocks import Saved, Task, accumulation_dtype, pack_keys
from lrc_kernels.sequence_parallel.comm import Schedule, TorchRanks
from lrc_kernels.sequence_parallel.mesh import place, ranks_of
from lrc_kernels.sequence_parallel.plan import SequencePlan
from lrc_kernels.sequence_parallel.ulysses import gather_heads, gather_rows, scatter_heads

WIRES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
_numbers = itertools.count()
# torch.library passes numbers, not plans; an entry lives as long as the call that made it, or its graph.
_contexts: weakref.WeakValueDictionary[int, _Context] = weakref.WeakValueDictionary()


@dataclass(eq=False)
class _Context:
    task: Task
    ranks: TorchRanks
    number: int = field(default_factory=_numbers.__next__)

    def __post_init__(self) -> None:
        _contexts[self.number] = self


def enter_heads(task: Task, q: Tensor, k: Tensor, v: Tensor) -> Schedule[tuple[Tensor, Tensor, Tensor]]:
    """q, k, v of this rank's rows -> those of its heads, for the rows of the whole shard."""
    if task.plan.ulysses == 1:
        return q, k, v
    return _split_heads(task, (yield from scatter_heads(task, [q], [k, v])))


def forward(task: Task, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Schedule[tuple[Tensor, Tensor]]:
    """out and lse of this rank's heads, for the rows of the shard; key_bias of this rank's rows."""
    rows = yield from _message(task, k, v, key_bias)
    return (yield from ring.forward(task, q, rows))


def leave_heads(task: Task, out: Tensor, lse: Tensor, with_lse: bool) -> Schedule[tuple[Tensor, Tensor]]:
    """out and lse of this rank's heads -> out [T_local, Hq, K] and lse [Hq, T_local] of its rows (empty without)."""
    if task.plan.ulysses > 1:
        (out,) = yield from gather_heads(task, [_pad_rows(task, out)], [])
        if with_lse:
            (lse_th1,) = yield from gather_heads(task, [_pad_rows(task, lse.T[..., None], -torch.inf)], [], step=1)
            lse = lse_th1.squeeze(2).T.contiguous()
    return out, lse if with_lse else lse.new_empty(0)


def backward(
    task: Task, saved: Saved, k: Tensor, v: Tensor, key_bias: Tensor | None
) -> Schedule[tuple[Tensor, Tensor, Tensor]]:
    """dq, dk, dv of this rank's rows, from dout and dlse of its rows and the rest for the rows of the shard."""
    dout, dlse, dtype = saved.dout, saved.dlse, saved.q.dtype
    spread = task.plan.ulysses > 1
    if spread:
        dout = (yield from scatter_heads(task, [dout], []))[: saved.q.shape[0]]
        if dlse is not None:
            dlse = (yield from scatter_heads(task, [dlse.T[..., None]], [], step=1))[: saved.q.shape[0], :, 0].T
    rows = yield from _message(task, k, v, key_bias)
    dq, dkv = yield from ring.backward(task, saved._replace(dout=dout, dlse=dlse), rows)
    dk, dv = dkv.unflatten(1, (2, *k.shape[1:])).unbind(1)
    if spread:
        (dq,) = yield from gather_heads(task, [_pad_rows(task, dq.to(dtype))], [], step=2)
        # Heads on one rank only have their final gradient, which is rounded once either way.
        wire = task.grad_wire if task.plan.heads.replicated else dtype
        dk, dv = yield from gather_heads(task, [], [_pad_rows(task, x.to(wire)) for x in (dk, dv)], step=3)
    return dq.to(dtype), dk.to(dtype), dv.to(dtype)


def _split_heads(task: Task, packed: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    heads = task.plan.heads
    rows = packed[: task.plan.shard_rows[task.ring_rank]]
    q, k, v = rows.split([heads.num_q, heads.num_kv, heads.num_kv], 1)
    return q, k, v


def _message(task: Task, k: Tensor, v: Tensor, key_bias: Tensor | None) -> Schedule[Tensor]:
    if key_bias is not None and task.plan.ulysses > 1:
        key_bias = (yield from gather_rows(key_bias))[: k.shape[0]]
    return pack_keys(k, v, key_bias)


def _pad_rows(task: Task, x: Tensor, value: float = 0.0) -> Tensor:
    missing = task.plan.local_rows(task.ring_rank) * task.plan.ulysses - x.shape[0]
    return pad(x, (0, 0, 0, 0, 0, missing), value=value) if missing else x


def _run(context: int, stage: str, schedule: Any, *args: Any) -> Any:
    entry = _contexts[context]
    with torch.no_grad():
        return entry.ranks.run(f"sequence-parallel attention {stage}", schedule(entry.task, *args))


def _packed_heads(q: Tensor, k: Tensor, v: Tensor, context: int) -> Tensor:
    return _run(context, "forward (heads in)", lambda task: scatter_heads(task, [q], [k, v]))


def _define(schema: str, run: Any) -> Any:
    name = schema.split("(")[0]
    LIB.define(schema)
    LIB.impl(name, run, "CompositeExplicitAutograd")
    return getattr(torch.ops.lrc, name).default


_heads_in_op = _define(
    "sequence_parallel_attention_heads_in(Tensor q, Tensor k, Tensor v, int context) -> Tensor", _packed_heads
)
_forward_op = _define(
    "sequence_parallel_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, int context) -> (Tensor, Tensor)",
    lambda q, k, v, key_bias, context: _run(context, "forward", forward, q, k, v, key_bias),
)
_heads_out_op = _define(
    "sequence_parallel_attention_heads_out(Tensor out, Tensor lse, bool with_lse, int context) -> (Tensor, Tensor)",
    lambda out, lse, with_lse, context: _run(context, "forward (heads out)", leave_heads, out, lse, with_lse),
)
# For torch.utils.checkpoint.create_selective_checkpoint_contexts: kept, these need not communicate again.
CHECKPOINT_OPS = (_heads_in_op, _forward_op, _heads_out_op)


def refuse_second_order() -> None:
    """RuntimeError in a backward pass that is itself recorded, whose gradient would silently be incomplete."""
    if torch.is_grad_enabled():
        raise RuntimeError("sequence-parallel attention has no second-order gradient: got create_graph=True")


class _SequenceParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, context: _Context, with_lse: bool
    ) -> tuple[Tensor, Tensor]:
        spread, number = context.task.plan.ulysses > 1, context.number
        if spread:
            q, k, v = _split_heads(context.task, _heads_in_op(q, k, v, number))
        out, lse = _forward_op(q, k, v, key_bias, number)
        ctx.save_for_backward(q, k, v, key_bias, out, lse)
        ctx.context = context
        ctx.set_materialize_grads(False)
        if spread:
            return _heads_out_op(out, lse, with_lse, number)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        q, k, v, key_bias, out, lse = ctx.saved_tensors
        task: Task = ctx.context.task
        dout, dlse = grads
        if dout is None:
            rows = task.plan.local_rows(task.ring_rank)
            dout = q.new_zeros(rows, task.plan.num_heads, task.plan.head_dim)
        if dlse is not None and dlse.numel() == 0:
            dlse = None
        schedule = backward(task, Saved(q, dout, out, lse, dlse), k, v, key_bias)
        gradients = ctx.context.ranks.run("sequence-parallel attention backward", schedule)
        return *gradients, None, None, None


@torch.compiler.disable
def sequence_parallel_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    plan: SequencePlan,
    mesh: DeviceMesh,
    *,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    grad_wire: torch.dtype | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention over the whole pack for the rows of this rank, equal to `varlen_attention` on one device. Autograd,
    once. A collective: every rank of the plan calls it, in the same order.

    Dropout and windows are not arguments: they are not supported. Padding rows give out 0 and lse -inf.

    Args:
        q: [T_local, Hq, K], fp32, bf16, fp16 (fp64 on CPU): the rows of `plan.local_indices`, positions applied.
        k, v: [T_local, Hkv, K], like q.
        plan: of this pack; its degrees are those of the mesh.
        mesh: `make_mesh`, or one that has dimensions "ring" and "ulysses".
        softmax_scale: None = K ** -0.5.
        key_bias: fp32 [T_local] (fp64 for fp64), sharded like k, added to the scaled logits of a key, no gradient.
        grad_wire: dtype in which gradients of keys and values travel; None = fp32, or wider for wider inputs.
            A narrower one moves fewer bytes and rounds once per hop.
        return_lse: also return lse, natural logarithm. A gradient may flow into it.

    Returns:
        out [T_local, Hq, K] in q's dtype; with `return_lse` also lse [Hq, T_local] in fp32 (fp64 for fp64).

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit the plan, a mesh of other degrees.
        PeerError: a rank died or stalled (gloo), in the forward or the backward.

    Source: Liu et al. 2023 (ring attention), Jacobs et al. 2023 (DeepSpeed-Ulysses), InternVideo2.5 section 3.5 (2D).
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    if not isinstance(plan, SequencePlan):
        raise TypeError(f"plan must be a SequencePlan, got {type(plan).__name__}")
    here = place(plan, mesh)
    _check_inputs(q, k, v, key_bias, plan, here[0])
    widest = accumulation_dtype(q.dtype)
    if grad_wire is not None and grad_wire not in WIRES:
        raise TypeError(f"grad_wire must be a floating dtype of 16, 32 or 64 bits or None, got {grad_wire}")
    scale = plan.head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    task = Task(plan, *here, scale, key_bias is not None, widest if grad_wire is None else grad_wire)
    context = _Context(task, ranks_of(mesh))
    out, lse = _SequenceParallelAttention.apply(q, k, v, key_bias, context, return_lse)
    return (out, lse) if return_lse else out


def ring_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, mesh: DeviceMesh, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`sequence_parallel_attention` for a plan with ulysses=1: every rank computes all heads of its rows.

    Raises:
        ValueError: a plan with another ulysses degree.
    """
    if plan.ulysses != 1:
        raise ValueError(f"plan must have ulysses=1 for ring_attention, got {plan.ulysses}")
    return sequence_parallel_attention(q, k, v, plan, mesh, **options)


def ulysses_attention(
    q: Tensor, k: Tensor, v: Tensor, plan: SequencePlan, mesh: DeviceMesh, **options: Any
) -> Tensor | tuple[Tensor, Tensor]:
    """`sequence_parallel_attention` for a plan with ring=1: every rank computes all rows of its heads.

    Raises:
        ValueError: a plan with another ring degree.
    """
    if plan.ring != 1:
        raise ValueError(f"plan must have ring=1 for ulysses_attention, got {plan.ring}")
    return sequence_parallel_attention(q, k, v, plan, mesh, **options)


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, plan: SequencePlan, ring_rank: int) -> None:
    check_tensor("q", q, dims=(3,))
    rows = plan.local_rows(ring_rank)
    for name, x, heads in (("q", q, plan.num_heads), ("k", k, plan.num_kv_heads), ("v", v, plan.num_kv_heads)):
        check_tensor(name, x, dims=(3,), like=q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {x.dtype}")
        if x.shape != (rows, heads, plan.head_dim):
            raise ValueError(f"{name} must have shape [{rows}, {heads}, {plan.head_dim}], got {list(x.shape)}")
    if key_bias is not None:
        check_tensor("key_bias", key_bias, dims=(1,), dtypes=(accumulation_dtype(q.dtype),), like=q)
        if key_bias.shape != (rows,):
            raise ValueError(f"key_bias must have shape [{rows}], got {list(key_bias.shape)}")
        if key_bias.requires_grad:
            raise ValueError("key_bias must not require a gradient, which attention does not compute: detach it")
        check_values("key_bias", key_bias, key_bias < torch.inf, "finite or -inf")
