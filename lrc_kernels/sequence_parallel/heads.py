# SPDX-License-Identifier: Apache-2.0
"""Which attention heads each of U ulysses ranks computes: any head counts in, one slice of heads per rank out."""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor


class HeadLayout(NamedTuple):
    """Query and KV heads of every ulysses rank.

    Attributes:
        q, kv: slices of the heads, one per rank; a slice shorter than the slots is padded with heads of zeros, which
            are dropped again. KV slices of several ranks may be the same: a replicated head.
        num_q, num_kv: slots per rank, the same on each; num_kv divides num_q, and slot j of q reads KV slot
            j // (num_q / num_kv).
        replicated: whether a KV head lives on several ranks, so that its gradients have to be summed.
    """

    q: tuple[slice, ...]
    kv: tuple[slice, ...]
    num_q: int
    num_kv: int
    replicated: bool


def head_layout(num_heads: int, num_kv_heads: int, ulysses: int) -> HeadLayout:
    """Heads for each rank, with the ratio Hq / Hkv kept: query head h stays with KV head h // (Hq / Hkv).

    With Hkv >= U each rank takes ceil(Hkv / U) KV heads and their query heads. With Hkv < U a KV head goes to U // Hkv
    ranks, which share its query heads.
    """
    ratio = num_heads // num_kv_heads
    if num_kv_heads >= ulysses:
        num_kv = -(-num_kv_heads // ulysses)
        kv = [_clip(u * num_kv, num_kv, num_kv_heads) for u in range(ulysses)]
        q = [slice(part.start * ratio, part.stop * ratio) for part in kv]
        return HeadLayout(tuple(q), tuple(kv), num_kv * ratio, num_kv, False)
    copies = ulysses // num_kv_heads
    num_q = -(-ratio // copies)
    q, kv = [], []
    for u in range(ulysses):
        head, part = divmod(u, copies)
        if head < num_kv_heads:
            own = _clip(part * num_q, num_q, ratio)
            q.append(slice(head * ratio + own.start, head * ratio + own.stop))
            kv.append(slice(head, head + 1))
        else:
            q.append(slice(0, 0))
            kv.append(slice(0, 0))
    return HeadLayout(tuple(q), tuple(kv), num_q, 1, copies > 1)


class HeadTables(NamedTuple):
    """Where the heads of several tensors lie in one message, int32.

    Attributes:
        scatter: [U, slots], the head in each slot of each rank, counted over all tensors; -1 for padding.
        gather: [heads, copies], where each head lies, u * slots + s, in rank order; -1 where it has fewer copies.
    """

    scatter: Tensor
    gather: Tensor


@lru_cache(maxsize=64)
def head_tables(
    num_heads: int, num_kv_heads: int, ulysses: int, queries: int, keys: int, device: torch.device
) -> HeadTables:
    """The tables for a message of `queries` tensors with query heads, then `keys` tensors with KV heads."""
    heads = head_layout(num_heads, num_kv_heads, ulysses)
    tensors = [(heads.q, heads.num_q, num_heads)] * queries + [(heads.kv, heads.num_kv, num_kv_heads)] * keys
    slots: list[list[int]] = [[] for _ in range(ulysses)]
    first = 0
    for slices, num_slots, count in tensors:
        for held, part in zip(slots, slices, strict=True):
            own = range(first + part.start, first + part.stop)
            held += [*own, *[-1] * (num_slots - len(own))]
        first += count
    places: list[list[int]] = [[] for _ in range(first)]
    for place, head in enumerate(head for held in slots for head in held):
        if head >= 0:
            places[head].append(place)
    copies = max(map(len, places))
    padded = [[*held, *[-1] * (copies - len(held))] for held in places]
    return HeadTables(*(torch.tensor(table, dtype=torch.int32).to(device) for table in (slots, padded)))


def _clip(start: int, length: int, end: int) -> slice:
    return slice(min(start, end), min(start + length, end))
