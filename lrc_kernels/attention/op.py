# SPDX-License-Identifier: Apache-2.0
"""Attention ops: q [Tq, Hq, K], k, v [Tk, Hkv, K] of packed sequences -> out like q and lse [Hq, Tq], and back.

The schemas, which backend may run each, and their gradients; `arguments.py` checks what a user gives.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.attention import reference
from lrc_kernels.backend import Op

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


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                key_bias: Tensor | None, *options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
        out, lse = forward_op(q, k, v, cu_seqlens_q, cu_seqlens_k, key_bias, *options)
        ctx.save_for_backward(q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias)
        ctx.options = options
        # An unused lse then gives no dlse, which most backends cannot take.
        ctx.set_materialize_grads(False)
        return out, lse

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        q, k, v, out, lse, cu_seqlens_q, cu_seqlens_k, key_bias = ctx.saved_tensors
        dout, dlse = grads
        dout = torch.zeros_like(out) if dout is None else dout
        pack = (cu_seqlens_q, cu_seqlens_k, key_bias, *ctx.options)
        return *backward_op(dout, q, k, v, out, lse, dlse, *pack), *[None] * (3 + len(ctx.options))
