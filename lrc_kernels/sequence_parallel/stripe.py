# SPDX-License-Identifier: Apache-2.0
"""Striped attention: ring rank r holds the rows r, r + R, r + 2R, ... of every document, and blocks between ranks are
causal triangles. Even for any pack, but every rank needs all keys, so that only the ring transports them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate, pairwise
from typing import ClassVar

import torch

from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel.plan import Block, Call, Mask, SequencePlan, make_call


class StripePlan(SequencePlan):
    """The plan of `stripe_sequence`: query i of a rank sees the keys 0..i of ranks up to its own, 0..i-1 of later."""

    kind: ClassVar[int] = 1

    def blocks(self, rank: int) -> list[Block]:
        mask = Mask.CAUSAL if self.causal else Mask.FULL
        peers = [(rank - step) % self.ring for step in range(self.ring)]
        return [Block(peer, q, k, mask) for peer in peers for q, k in self._triangles(rank, peer)]

    def needs(self, rank: int, peer: int) -> list[range]:
        raise ValueError("a striped plan must use the transport 'ring', which moves whole shards")

    def areas(self, rank: int) -> tuple[int, int]:
        local, *remote = (
            sum(len(q) * (len(q) + 1) // 2 if self.causal else len(q) * len(k) for q, k in self._triangles(rank, peer))
            for peer in (rank, *(peer for peer in range(self.ring) if peer != rank))
        )
        return local, sum(remote)

    def _make_calls(self, rank: int, peer: int | None, device: torch.device) -> Iterator[Call]:
        assert peer is not None, "the ring asks for the shard of one peer"
        triangles = self._triangles(rank, peer)
        if triangles:
            yield make_call(triangles, self.causal, device)

    def _triangles(self, rank: int, peer: int) -> list[tuple[range, range]]:
        """(query rows, key rows) of each document, of equal length, where any are seen."""
        ends = [0, *accumulate(length // self.ring for length in self.layout.lengths)]
        late = int(self.causal and peer > rank)
        return [(range(a + late, b), range(a, b - late)) for a, b in pairwise(ends) if b - a > late]


def stripe_sequence(
    layout: VarlenLayout, *, ring: int, ulysses: int = 1, num_heads: int, num_kv_heads: int, head_dim: int,
    causal: bool = True,
) -> StripePlan:  # fmt: skip
    """A striped plan for documents whose lengths `ring` divides.

    Raises:
        ValueError: a length that `ring` does not divide.

    Source: Brandon et al. 2023 (Striped Attention).
    """
    for index, length in enumerate(layout.lengths):
        if length % ring:
            raise ValueError(f"document {index} must have a number of rows that {ring} ranks divide, got {length}")
    starts = [0, *accumulate(layout.lengths)]
    shards = tuple(tuple(range(a + r, b, ring) for a, b in pairwise(starts) if b > a) for r in range(ring))
    return StripePlan(layout, ring, ulysses, num_heads, num_kv_heads, head_dim, "stripe", "ring", causal, shards)
