# SPDX-License-Identifier: Apache-2.0
"""What a rank computes between two messages: its queries over one set of key rows, forward and backward, by the calls
of the plan. Partial results and gradients are kept in fp32 or wider."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc_kernels.attention import (
    AttentionState,
    merge_partials,
    varlen_attention_backward,
    varlen_attention_forward,
)
from lrc_kernels.sequence_parallel.plan import Call, SequencePlan


@dataclass(frozen=True)
class Task:
    """One attention call on one rank.

    Attributes:
        ring_rank, ulysses_rank: this rank's place in the mesh.
        softmax_scale: what logits are multiplied by.
        biased: whether keys carry a key_bias.
        grad_wire: dtype of gradients of keys and values on the wire.
    """

    plan: SequencePlan
    ring_rank: int
    ulysses_rank: int
    softmax_scale: float
    biased: bool
    grad_wire: torch.dtype


class Keys(NamedTuple):
    """k, v [n, Hkv, K] and key_bias [n] or None, views of message rows."""

    k: Tensor
    v: Tensor
    key_bias: Tensor | None

    def take(self, rows: slice) -> Keys:
        return Keys(self.k[rows], self.v[rows], None if self.key_bias is None else self.key_bias[rows])


class Saved(NamedTuple):
    """What the backward needs beside the keys: q, dout, out [n, Hq, K], lse and its gradient [Hq, n] or None."""

    q: Tensor
    dout: Tensor
    out: Tensor
    lse: Tensor
    dlse: Tensor | None


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def pack_keys(k: Tensor, v: Tensor, key_bias: Tensor | None) -> Tensor:
    """One message [n, W], a row per key: k, v and the bytes of its bias."""
    parts = [k.flatten(1), v.flatten(1)]
    if key_bias is not None:
        parts.append(key_bias[:, None].contiguous().view(k.dtype))
    return torch.cat(parts, 1)


def unpack_keys(task: Task, rows: Tensor) -> Keys:
    heads, head_dim = task.plan.heads.num_kv, task.plan.head_dim
    width = heads * head_dim
    k, v = (rows[:, at : at + width].unflatten(1, (heads, head_dim)) for at in (0, width))
    if not task.biased:
        return Keys(k, v, None)
    return Keys(k, v, rows[:, 2 * width :].contiguous().view(accumulation_dtype(rows.dtype)).squeeze(1))


def merge(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """`merge_partials`, NaN where one lse is NaN or +inf. That leaves such a result out, as in some libraries it saw no
    key; here its keys were not finite, and who holds them must not decide whether it is seen."""
    spoiled = ~((lse < torch.inf) & (lse_block < torch.inf))
    out, lse = merge_partials(out, lse, out_block, lse_block)
    return out.masked_fill(spoiled.T[..., None], torch.nan), lse.masked_fill(spoiled, torch.nan)


class Partial:
    """Attention over the keys seen so far. For 16-bit inputs an un-normalised state in fp32, as a block's own result
    would be rounded to 16 bits; for wider ones (out, lse), which any backend gives."""

    def __init__(self, q: Tensor):
        rows, heads, head_dim = q.shape
        self.state: AttentionState | None = None
        if q.element_size() == 2:
            self.state = AttentionState.zeros(rows, heads, head_dim, q.device)
        else:
            self.out, self.lse, self.empty = q.new_zeros(q.shape), q.new_full((heads, rows), -torch.inf), True

    def add(self, rows: slice, q: Tensor, keys: Keys, **options: Any) -> None:
        """Take the keys into the rows of the queries q."""
        if self.state is not None:
            part = AttentionState(self.state.acc[rows], self.state.m[:, rows], self.state.l[:, rows])
            part.accumulate(q, keys.k, keys.v, key_bias=keys.key_bias, **options)
            return
        out, lse = varlen_attention_forward(q, keys.k, keys.v, key_bias=keys.key_bias, **options)
        if not self.empty:
            out, lse = merge(self.out[rows], self.lse[:, rows], out, lse)
        self.out[rows], self.lse[:, rows], self.empty = out, lse, False

    def finish(self) -> tuple[Tensor, Tensor]:
        """out [n, Hq, K] and lse [Hq, n], in fp32 or wider."""
        return (self.out, self.lse) if self.state is None else self.state.finish()


def attend(task: Task, peer: int | None, q: Tensor, rows: Tensor, total: Partial) -> None:
    """Fold the keys of `peer` (None: those of `Exchange`) into the total."""
    keys = unpack_keys(task, rows)
    for call in task.plan.calls(task.ring_rank, peer, q.device):
        total.add(call.q, q[call.q], keys.take(call.k), softmax_scale=task.softmax_scale, **_sequences(call))


def _sequences(call: Call) -> dict[str, Any]:
    return {"cu_seqlens_q": call.layout_q, "cu_seqlens_k": call.layout_k, "causal": call.causal}


def gradients(task: Task, peer: int | None, saved: Saved, rows: Tensor, dq: Tensor) -> Tensor:
    """Add to dq what the keys of `peer` contribute; return dk | dv of these keys from this rank's queries, [n, 2HK]."""
    keys = unpack_keys(task, rows)
    dkv = torch.zeros(2, *keys.k.shape, dtype=dq.dtype, device=dq.device)
    for call in task.plan.calls(task.ring_rank, peer, rows.device):
        seen = keys.take(call.k)
        dq_block, dk_block, dv_block = varlen_attention_backward(
            saved.dout[call.q],
            saved.q[call.q],
            seen.k,
            seen.v,
            saved.out[call.q],
            saved.lse[:, call.q],
            softmax_scale=task.softmax_scale,
            key_bias=seen.key_bias,
            dlse=None if saved.dlse is None else saved.dlse[:, call.q],
            **_sequences(call),
        )
        dq[call.q] += dq_block
        dkv[0, call.k] += dk_block
        dkv[1, call.k] += dv_block
    return dkv.movedim(0, 1).flatten(1)
