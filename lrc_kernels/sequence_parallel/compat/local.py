# SPDX-License-Identifier: Apache-2.0
"""Attention over rows that were cut sequence by sequence, as the older libraries cut them: local q, k, v in, (out, lse)
out. What they accept and we cannot do is refused."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel.arrangements import ARRANGEMENTS, Documents, Shards
from lrc_kernels.sequence_parallel.attention_2d import sequence_parallel_attention
from lrc_kernels.sequence_parallel.plan import SequencePlan
from lrc_kernels.sequence_parallel.stripe import stripe_sequence

# How the rows of a sequence lie on the ranks: equal cuts, two cuts each, or every R-th row.
CUTS = ("contiguous", "zigzag", "stripe")


@torch.compiler.disable
def attend(
    q: Tensor, k: Tensor, v: Tensor, lengths: tuple[int, ...], mesh: DeviceMesh, degrees: tuple[int, int], *,
    cut: str, causal: bool, softmax_scale: float | None,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    """out [T_local, Hq, K] and lse [Hq, T_local] for sequences of `lengths` rows on degrees = (ring, ulysses) ranks.

    Raises:
        ValueError: a length that the cuts do not divide.
    """
    plan = _plan(lengths, *degrees, q.shape[1], k.shape[1], q.shape[2], cut, bool(causal))
    out, lse = sequence_parallel_attention(q, k, v, plan, mesh, softmax_scale=softmax_scale, return_lse=True)
    return out, lse


def refuse(dropout_p: float, window_size: tuple[int, int], alibi_slopes: Any, softcap: float = 0.0) -> None:
    """ValueError for an option that the schedules do not have; nothing is ignored that changes the result."""
    for name, value, wanted in (
        ("dropout_p", dropout_p, 0),
        ("window_size", tuple(window_size), (-1, -1)),
        ("alibi_slopes", alibi_slopes, None),
        ("softcap", softcap, 0),
    ):
        if value is not wanted and value != wanted:
            raise ValueError(f"{name} must be {wanted}, sequence-parallel attention has no other, got {value}")


@lru_cache(maxsize=64)
def _plan(
    lengths: tuple[int, ...], ring: int, ulysses: int, num_heads: int, num_kv_heads: int, head_dim: int, cut: str,
    causal: bool,
) -> SequencePlan:  # fmt: skip
    cuts = ring * ulysses if cut != "zigzag" else 2 * ring
    for index, length in enumerate(lengths):
        if length % cuts or length % (ring * ulysses):
            raise ValueError(f"sequence {index} must have a number of rows that {cuts} cuts divide, got {length}")
    layout = VarlenLayout(lengths)
    if cut == "stripe":
        return stripe_sequence(layout, ring=ring, ulysses=ulysses, num_heads=num_heads, num_kv_heads=num_kv_heads,
                               head_dim=head_dim, causal=causal)  # fmt: skip
    documents = Documents(lengths, causal)
    if cut == "zigzag":
        name, shards = "zigzag_per_seq", ARRANGEMENTS["zigzag_per_seq"](documents, ring, None)
    else:
        name, shards = "contiguous_per_seq", _contiguous_per_seq(documents, ring)
    return SequencePlan(layout, ring, ulysses, num_heads, num_kv_heads, head_dim, name, "ring", causal, shards)


def _contiguous_per_seq(documents: Documents, ring: int) -> Shards:
    pairs = list(zip(documents.starts, documents.starts[1:], strict=False))
    return tuple(
        tuple(range(a + r * (b - a) // ring, a + (r + 1) * (b - a) // ring) for a, b in pairs if b > a)
        for r in range(ring)
    )
