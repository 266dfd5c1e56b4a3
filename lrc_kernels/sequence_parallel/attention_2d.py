# SPDX-License-Identifier: Apache-2.0
"""Attention of a pack that lies on ring x ulysses ranks: local q, k, v in, local out out, differentiable.

Heads are exchanged over ulysses, then keys travel over the ring. Forward and backward are one op of torch.library each,
functions of tensors and numbers: torch.compile leaves them whole, and selective activation checkpointing
(`CHECKPOINT_OPS`) can keep the forward's results and repeat no communication.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from lrc_kernels import token_dropout
from lrc_kernels.checks import check_tensor, check_values
from lrc_kernels.sequence_parallel import ring
from lrc_kernels.sequence_parallel.blocks import Saved, Task, accumulation_dtype, pack_keys
from lrc_kernels.sequence_parallel.comm import Schedule, TorchRanks, collective_op
from lrc_kernels.sequence_parallel.dropout import rows_at_op, scores_op
from lrc_kernels.sequence_parallel.encoding import decode
from lrc_kernels.sequence_parallel.exchange import exchange_rows_op
from lrc_kernels.sequence_parallel.heads import head_layout
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_kernels.sequence_parallel.plan import SequencePlan
from lrc_kernels.sequence_parallel.ulysses import gather_heads, gather_rows, scatter_heads

WIRES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)


def forward(
    task: Task, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, with_lse: bool
) -> Schedule[tuple[Tensor, Tensor, tuple[Tensor, ...]]]:
    """out [T_local, Hq, K], lse [Hq, T_local] (empty without, where heads are exchanged) and what of the exchanged
    heads the backward needs: q | k | v, out and lse of this rank's heads, for the rows of the whole shard."""
    if task.plan.ulysses == 1:
        out, lse = yield from ring.forward(task, q, pack_keys(k, v, key_bias))
        return out, lse, ()
    packed = yield from scatter_heads(task, [q], [k, v])
    q, k, v = _split_heads(task, packed)
    rows = yield from _message(task, k, v, key_bias)
    out, lse = yield from ring.forward(task, q, rows)
    out_heads, lse_heads = _pad_rows(task, out), _pad_rows(task, lse.T[..., None], -torch.inf)
    (out,) = yield from gather_heads(task, [out_heads], [])
    lse = lse.new_empty(0)
    if with_lse:
        (lse_th1,) = yield from gather_heads(task, [lse_heads], [], step=1)
        lse = lse_th1.squeeze(2).T.contiguous()
    return out, lse, (packed, out_heads, lse_heads)


def backward(
    task: Task, kept: Sequence[Tensor], dout: Tensor | None, dlse: Tensor | None, key_bias: Tensor | None
) -> Schedule[tuple[Tensor, Tensor, Tensor]]:
    """dq, dk, dv of this rank's rows. `kept`: q, k, v, out, lse, or the exchanged heads where `forward` gives them."""
    plan, dtype = task.plan, kept[0].dtype
    if dout is None:
        dout = kept[0].new_zeros(plan.local_rows(task.ring_rank), plan.num_heads, plan.head_dim)
    if plan.ulysses == 1:
        q, k, v, out, lse = kept
    else:
        packed, out_heads, lse_heads = kept
        rows = plan.shard_rows[task.ring_rank]
        (q, k, v), out, lse = _split_heads(task, packed), out_heads[:rows], lse_heads[:rows, :, 0].T
        dout = (yield from scatter_heads(task, [dout], []))[:rows]
        if dlse is not None:
            dlse = (yield from scatter_heads(task, [dlse.T[..., None]], [], step=1))[:rows, :, 0].T
    message = yield from _message(task, k, v, key_bias)
    dq, dkv = yield from ring.backward(task, Saved(q, dout, out, lse, dlse), message)
    dk, dv = dkv.unflatten(1, (2, *k.shape[1:])).unbind(1)
    if plan.ulysses > 1:
        (dq,) = yield from gather_heads(task, [_pad_rows(task, dq.to(dtype))], [], step=2)
        # Heads on one rank only have their final gradient, which is rounded once either way.
        wire = task.grad_wire if plan.heads.replicated else dtype
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
    return pad(x, (0, 0, 0, 0, 0, missing), value=value) if missing else x.contiguous()


# The plan as `encoding.py` has it, the number of its TorchRanks, and what shapes follow from.
_OPTIONS = "Tensor plan, int ranks, int ulysses, int num_heads, int num_kv_heads, float softmax_scale"


def _run_forward(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, with_lse: bool, plan: Tensor, ranks: int, ulysses: int,
    num_heads: int, num_kv_heads: int, softmax_scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    task = _task(plan, ranks, softmax_scale, key_bias, accumulation_dtype(q.dtype))
    _check_rows(q, k, v, key_bias, task)
    with torch.no_grad():
        schedule = forward(task, q, k, v, key_bias, with_lse)
        out, lse, kept = TorchRanks.of(ranks).run("sequence-parallel attention forward", schedule)
    return out, lse, *(kept or (q.new_empty(0), q.new_empty(0), lse.new_empty(0)))


def _run_backward(
    dout: Tensor | None, dlse: Tensor | None, kept: list[Tensor], key_bias: Tensor | None, grad_wire: torch.dtype,
    plan: Tensor, ranks: int, ulysses: int, num_heads: int, num_kv_heads: int, softmax_scale: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    task = _task(plan, ranks, softmax_scale, key_bias, grad_wire)
    with torch.no_grad():
        schedule = backward(task, kept, dout, dlse, key_bias)
        dq, dk, dv = TorchRanks.of(ranks).run("sequence-parallel attention backward", schedule)
    # A ring sums dk and dv in one tensor; results of an op share no memory.
    return dq, dk.contiguous(), dv.contiguous()


def _fake_forward(
    q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, with_lse: bool, plan: Tensor, ranks: int, ulysses: int,
    *rest: Any,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, num_heads, head_dim = q.shape
    wide = accumulation_dtype(q.dtype)
    out = q.new_empty(q.shape)
    if ulysses == 1:
        return (
            out,
            q.new_empty(num_heads, rows, dtype=wide),
            *(q.new_empty(0, dtype=x) for x in (q.dtype, q.dtype, wide)),
        )
    heads = head_layout(num_heads, k.shape[1], ulysses)
    return (
        out,
        q.new_empty((num_heads, rows) if with_lse else 0, dtype=wide),
        q.new_empty(rows * ulysses, heads.num_q + 2 * heads.num_kv, head_dim),
        q.new_empty(rows * ulysses, heads.num_q, head_dim),
        q.new_empty(rows * ulysses, heads.num_q, 1, dtype=wide),
    )


def _fake_backward(
    dout: Tensor | None, dlse: Tensor | None, kept: list[Tensor], key_bias: Tensor | None, grad_wire: torch.dtype,
    plan: Tensor, ranks: int, ulysses: int, num_heads: int, num_kv_heads: int, softmax_scale: float,
) -> tuple[Tensor, ...]:  # fmt: skip
    rows, head_dim = kept[0].shape[0] // ulysses, kept[0].shape[2]
    return tuple(kept[0].new_empty(rows, heads, head_dim) for heads in (num_heads, num_kv_heads, num_kv_heads))


_forward_op = collective_op(
    f"sequence_parallel_attention_fwd(Tensor q, Tensor k, Tensor v, Tensor? key_bias, bool with_lse, {_OPTIONS}) "
    "-> (Tensor out, Tensor lse, Tensor packed, Tensor out_heads, Tensor lse_heads)",
    _run_forward,
    _fake_forward,
)
_backward_op = collective_op(
    "sequence_parallel_attention_bwd(Tensor? dout, Tensor? dlse, Tensor[] kept, Tensor? key_bias, "
    f"ScalarType grad_wire, {_OPTIONS}) -> (Tensor dq, Tensor dk, Tensor dv)",
    _run_backward,
    _fake_backward,
)
# For torch.utils.checkpoint.create_selective_checkpoint_contexts: what they give is kept, so that a layer that is
# computed again communicates nothing again, and drops what it dropped.
CHECKPOINT_OPS = (_forward_op, exchange_rows_op, rows_at_op, scores_op, *token_dropout.CHECKPOINT_OPS)


def refuse_second_order() -> None:
    """RuntimeError in a backward pass that is itself recorded, whose gradient would silently be incomplete."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError("sequence-parallel attention has no second-order gradient: got create_graph=True")


class _SequenceParallelAttention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, plan: Tensor, grad_wire: torch.dtype,
        with_lse: bool, *options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse, *exchanged = _forward_op(q, k, v, key_bias, with_lse, plan, *options)
        kept = (q, k, v, out, lse) if options[1] == 1 else exchanged
        ctx.save_for_backward(key_bias, plan, *kept)
        ctx.grad_wire, ctx.with_lse, ctx.options = grad_wire, with_lse, options
        # A compiled graph passes zeros for the gradient of an unused output, unless it has none at all.
        ctx.set_materialize_grads(False)
        if not with_lse:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        refuse_second_order()
        key_bias, plan, *kept = ctx.saved_tensors
        dlse = grads[1] if ctx.with_lse else None
        gradients = _backward_op(grads[0], dlse, kept, key_bias, ctx.grad_wire, plan, *ctx.options)
        return *gradients, *[None] * (4 + len(ctx.options))


# A mesh is the same for a whole run: its number is a constant of a compiled graph.
@torch.compiler.assume_constant_result
def _number_of(mesh: DeviceMesh) -> int:
    # While a graph is traced, a mesh that is an argument is wrapped: the wrapper would die with the trace.
    return ranks_of(getattr(mesh, "real_obj", mesh)).number


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
    if grad_wire is not None and grad_wire not in WIRES:
        raise TypeError(f"grad_wire must be a floating dtype of 16, 32 or 64 bits or None, got {grad_wire}")
    _check_inputs(q, k, v, key_bias)
    wire = accumulation_dtype(q.dtype) if grad_wire is None else grad_wire
    scale = plan.head_dim**-0.5 if softmax_scale is None else float(softmax_scale)
    shape = (plan.ulysses, plan.num_heads, plan.num_kv_heads)
    out, lse = _SequenceParallelAttention.apply(
        q, k, v, key_bias, plan.encoded, wire, return_lse, _number_of(mesh), *shape, scale
    )
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


def _task(plan: Tensor, ranks: int, softmax_scale: float, key_bias: Tensor | None, grad_wire: torch.dtype) -> Task:
    decoded = decode(plan)
    return Task(
        decoded,
        *TorchRanks.of(ranks).place(decoded.ring, decoded.ulysses),
        softmax_scale,
        key_bias is not None,
        grad_wire,
    )


def _check_inputs(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None) -> None:
    check_tensor("q", q, dims=(3,))
    for name, x in (("k", k), ("v", v)):
        check_tensor(name, x, dims=(3,), like=q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {x.dtype}")
    if key_bias is not None:
        check_tensor("key_bias", key_bias, dims=(1,), dtypes=(accumulation_dtype(q.dtype),), like=q)
        if key_bias.requires_grad:
            raise ValueError("key_bias must not require a gradient, which attention does not compute: detach it")
        check_values("key_bias", key_bias, key_bias < torch.inf, "finite or -inf")


def _check_rows(q: Tensor, k: Tensor, v: Tensor, key_bias: Tensor | None, task: Task) -> None:
    """What only this rank's place in the plan can tell."""
    plan, rows = task.plan, task.plan.local_rows(task.ring_rank)
    for name, x, heads in (("q", q, plan.num_heads), ("k", k, plan.num_kv_heads), ("v", v, plan.num_kv_heads)):
        if x.shape != (rows, heads, plan.head_dim):
            raise ValueError(f"{name} must have shape [{rows}, {heads}, {plan.head_dim}], got {list(x.shape)}")
    if key_bias is not None and key_bias.shape != (rows,):
        raise ValueError(f"key_bias must have shape [{rows}], got {list(key_bias.shape)}")
