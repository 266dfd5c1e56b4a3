# SPDX-License-Identifier: Apache-2.0
"""Attention ops: q [Tq, Hq, K], k, v [Tk, Hkv, K] of packed sequences -> out like q and lse [Hq, Tq], and back.

The schemas, which backend may run each, and their gradients; `arguments.py` checks what a user gives.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.attention import aten, aten_cpu, flash_attn, native, reference
from lrc_kernels.attention.arguments import check_like, check_lse, check_pack
from lrc_kernels.backend import Op
from lrc_kernels.layout import VarlenLayout

_PACK = (
    "Tensor cu_seqlens_q, Tensor cu_seqlens_k, Tensor? key_bias, SymInt max_seqlen_q, SymInt max_seqlen_k, "
    "bool causal, float softmax_scale, int window_left, int window_right"
)


def _fake_forward(q: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[1], q.shape[0], dtype=reference.accumulation_dtype(q))


def _fake_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape)


def _fake_merge(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    dtype = reference.accumulation_dtype(out, lse, out_block, lse_block)
    return out.new_empty(out.shape, dtype=dtype), lse.new_empty(lse.shape, dtype=dtype)


forward_op = Op(
    f"attention_fwd(Tensor q, Tensor k, Tensor v, {_PACK}) -> (Tensor out, Tensor lse)",
    _fake_forward,
    autocast=("q", "k", "v"),
)
backward_op = Op(
    f"attention_bwd(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, Tensor lse, Tensor? dlse, {_PACK}) "
    "-> (Tensor dq, Tensor dk, Tensor dv)",
    _fake_backward,
)
accumulate_op = Op(
    f"attention_accumulate_(Tensor(a!) acc, Tensor(b!) m, Tensor(c!) l, Tensor q, Tensor k, Tensor v, {_PACK}) -> ()",
    lambda *args: None,
    autocast=("q", "k", "v"),
)
merge_op = Op(
    "attention_merge_partials(Tensor out, Tensor lse, Tensor out_block, Tensor lse_block) -> (Tensor, Tensor)",
    _fake_merge,
)


def _triton(name: str) -> Any:
    """Launch functions are imported on the first call, so that the package imports where Triton is missing."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module("lrc_kernels.attention.triton_kernels"), name)(*args)

    return launch


for _op, _reference, _name in (
    (forward_op, reference.forward, "fwd"),
    (backward_op, reference.backward, "bwd"),
    (accumulate_op, reference.accumulate_, "accumulate"),
    (merge_op, reference.merge_partials, "merge_partials"),
):
    _op.implement("reference", _reference)
    _op.implement("triton", _triton(f"launch_{_name}"), supports=_triton(f"supports_{_name}"))
for _backend, _room in (("flash_attn", flash_attn), ("aten", aten)):
    forward_op.implement(_backend, _room.forward, supports=_room.supports_forward, available=_room.unavailable)
    backward_op.implement(_backend, _room.backward, supports=_room.supports_backward, available=_room.unavailable)
forward_op.implement(
    "cudnn", aten.cudnn_forward, supports=aten.cudnn_supports_forward, available=aten.cudnn_unavailable
)
backward_op.implement(
    "cudnn", aten.cudnn_backward, supports=aten.cudnn_supports_backward, available=aten.cudnn_unavailable
)
merge_op.implement(
    "cuda",
    native.cuda_merge_partials,
    supports=native.cuda_supports_merge_partials,
    available=native.cuda_unavailable,
)
forward_op.implement("cpu", aten_cpu.forward)
backward_op.implement("cpu", aten_cpu.backward, supports=aten_cpu.supports_backward)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, lse_has_gradient: bool, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor,
        cu_seqlens_k: Tensor | None, key_bias: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor]:  # fmt: skip
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        out, lse = forward_op(q, k, v, cu_seqlens_q, keys, key_bias, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias)
        ctx.options = options
        # An unused lse should give no dlse, which most backends cannot take. Eager autograd then passes None; a
        # compiled graph passes zeros, unless the output has no gradient at all.
        ctx.lse_has_gradient = lse_has_gradient
        ctx.set_materialize_grads(False)
        if not lse_has_gradient:
            ctx.mark_non_differentiable(lse)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias = ctx.saved_tensors
        dout = torch.zeros_like(out) if grads[0] is None else grads[0]
        dlse = grads[1] if ctx.lse_has_gradient else None
        pack = (cu_seqlens_q, cu_seqlens_k, key_bias, *ctx.options)
        gradients = _AttentionBackward.apply(dout, q, k, v, out, lse, dlse, *pack)
        return None, *gradients, *[None] * (3 + len(ctx.options))


class _AttentionBackward(torch.autograd.Function):
    """The backward op, which has no gradient of its own: to ask for one raises instead of leaving it out."""

    @staticmethod
    def forward(
        ctx: Any, dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
        cu_seqlens_q: Tensor, cu_seqlens_k: Tensor | None, *options: Any,
    ) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
        keys = cu_seqlens_q if cu_seqlens_k is None else cu_seqlens_k
        return backward_op(dout, q, k, v, out, lse, dlse, cu_seqlens_q, keys, *options)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> None:
        raise RuntimeError("attention has no second-order gradient: got a backward pass through its backward")


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    *,
    cu_seqlens_q: VarlenLayout | Tensor,
    cu_seqlens_k: VarlenLayout | Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    return_lse: bool = False,
) -> Tensor | tuple[Tensor, Tensor]:
    """Attention of packed sequences: query i of a sequence sees the keys of the same sequence. Autograd, once.

    With d = i + Lk - Lq the last key that query i sees under `causal` (the diagonal ends at the last key), it sees the
    keys d - left <= j <= d + right of the window. A row that sees no key has out 0 and lse -inf. A NaN stays within its
    sequence. Under autocast q, k, v are cast to its dtype.

    Args:
        q: [Tq, Hq, K], fp32, bf16, fp16 (fp64 on CPU).
        k, v: [Tk, Hkv, K], like q; Hkv divides Hq, query head h reads KV head h // (Hq / Hkv).
        cu_seqlens_q: where the sequences of q begin: a VarlenLayout, or int32 [S + 1] on q's device. It must cover
            exactly the rows of q.
        cu_seqlens_k: the same for k; None = that of q.
        max_seqlen_q, max_seqlen_k: at least the rows of the longest sequence. A VarlenLayout knows them; to read them
            from a tensor costs one synchronisation.
        causal: bottom-right aligned per sequence.
        softmax_scale: None = K ** -0.5.
        key_bias: fp32 [Tk] (fp64 for fp64 q), added to the scaled logits of a key, no gradient; -inf hides the key.
        window: (left, right), -1 = no bound; causal caps right at 0.
        return_lse: also return lse, natural logarithm. A gradient may flow into it.

    Returns:
        out [Tq, Hq, K] in q's dtype; with `return_lse` also lse [Hq, Tq] in fp32 (fp64 for fp64 q).

    Raises:
        TypeError: a dtype that is not supported, or that differs among q, k, v.
        ValueError: shapes or devices that do not fit, offsets that do not cover the rows, another number of sequences
            in q and k, a key_bias that requires a gradient. RuntimeError: a gradient of a gradient.

    Source: Dao et al. 2022 (FlashAttention), section 3.1 and appendix B.
    """
    if isinstance(q, Tensor) and torch.is_autocast_enabled(q.device.type):
        # Above autograd, so that the gradients come back in the dtypes of q, k and v.
        dtype = torch.get_autocast_dtype(q.device.type)
        q, k, v = (x if x.dtype == torch.float64 else x.to(dtype) for x in (q, k, v))
    pack = check_pack(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, key_bias, window
    )
    # Dynamo breaks a graph at a Function that gets one tensor twice: None stands for offsets that are those of q.
    cu_seqlens_q, cu_seqlens_k, *options = pack
    same = cu_seqlens_k is cu_seqlens_q
    out, lse = _Attention.apply(return_lse, q, k, v, cu_seqlens_q, None if same else cu_seqlens_k, *options)
    return (out, lse) if return_lse else out


def varlen_attention_forward(q: Tensor, k: Tensor, v: Tensor, **options: Any) -> tuple[Tensor, Tensor]:
    """(out, lse) of `varlen_attention`, whose keyword arguments it takes: one block of keys of a ring, forward."""
    return varlen_attention(q, k, v, **options, return_lse=True)  # type: ignore[return-value]


def varlen_attention_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: VarlenLayout | Tensor,
    cu_seqlens_k: VarlenLayout | Tensor | None = None,
    max_seqlen_q: int | None = None,
    max_seqlen_k: int | None = None,
    causal: bool = True,
    softmax_scale: float | None = None,
    key_bias: Tensor | None = None,
    window: tuple[int, int] | None = None,
    dlse: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The gradients of one block of keys, from the GLOBAL out and lse: one block of a ring, backward. No autograd.

    Given the out and lse over all keys, the dq of disjoint blocks of keys sum to the dq of all, and each block's dk, dv
    are final.

    Args:
        dout, out: [Tq, Hq, K], in q's dtype or in fp32 (as `merge_partials` returns it).
        lse: [Hq, Tq] fp32 (fp64 for fp64 q).
        dlse: the gradient that flows into lse, like lse; None = none.
        q, k, v and the others: as `varlen_attention`, of this block of keys.

    Returns:
        dq, dk, dv like q, k, v.

    Raises:
        TypeError, ValueError: as `varlen_attention`.
    """
    pack = check_pack(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, key_bias, window
    )
    dtypes = (q.dtype, reference.accumulation_dtype(q))
    check_like("dout", dout, q.shape, dtypes, q)
    check_like("out", out, q.shape, dtypes, q)
    check_lse("lse", lse, q)
    if dlse is not None:
        check_lse("dlse", dlse, q)
    return _AttentionBackward.apply(dout, q, k, v, out, lse, dlse, *pack)
