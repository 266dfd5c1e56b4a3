# SPDX-License-Identifier: Apache-2.0
"""What a drop is made of: the budget that the host decides once per batch, and the selection that the device makes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.layout import VarlenLayout, register_pytree

POSITIONS = ("keep", "renumber")


@dataclass(frozen=True, eq=False)
class Selection:
    """Which rows of a pack stay: what `select_tokens` returns. Immutable, a pytree.

    Attributes:
        indices: int32 [T_keep], the packed row that each kept row comes from, ascending; -1 for the padding rows that a
            Bernoulli `capacity` leaves.
        inverse: int32 [T], the kept row that each row went to, -1 for a dropped one.
        layout: the sequences of the kept rows; with a Bernoulli `capacity` one padding sequence follows them, so that
            the real rows end at `layout.cu_seqlens[S]`.
    """

    indices: Tensor
    inverse: Tensor
    layout: VarlenLayout

    @property
    def num_kept(self) -> int:
        """T_keep, padding rows included."""
        return self.layout.num_tokens


@dataclass(frozen=True, eq=False)
class DropBudget:
    """How many droppable tokens each sequence keeps in one drop; made on the host by `drop_budget`.

    Attributes:
        layout_in, layout_out: sequences before and after.
        keep: int32 [S] on the device of `layout_in`, droppable tokens to keep.
        num_droppable: droppable tokens of each sequence. Host only: a compiled graph must not read it.
        positions: "keep" the position ids of the kept tokens, or "renumber" them from 0 in each sequence.
        layer: index of the drop's layer, which the random modes hash.
    """

    layout_in: VarlenLayout
    layout_out: VarlenLayout
    keep: Tensor
    num_droppable: tuple[int, ...]
    positions: str = "keep"
    layer: int = 0

    @property
    def num_kept(self) -> int:
        """Rows of all sequences after the drop."""
        return self.layout_out.num_tokens

    @property
    def max_seqlen(self) -> int:
        """Rows of the longest sequence after the drop."""
        return self.layout_out.max_seqlen


def drop_budget(
    layout: VarlenLayout,
    num_droppable: int | Sequence[int],
    *,
    keep: float | int | Sequence[int],
    positions: str = "keep",
    layer: int = 0,
) -> DropBudget:
    """Decide, on the host and once per batch, how many droppable tokens every sequence keeps.

    Args:
        layout: the sequences to drop from.
        num_droppable: droppable (visual) tokens of each sequence; one int means that many in every sequence.
        keep: a float in (0, 1] keeps `int(n * keep)` of a sequence's n droppable tokens; an int keeps that many in
            every sequence that has any; a sequence of ints is one count per sequence.
        positions: what becomes of position ids, "keep" (FastV) or "renumber" (VideoChat-Flash).
        layer: index of the drop's layer.

    Raises:
        TypeError, ValueError: a ratio outside (0, 1], a count above the droppable tokens or below 0, more droppable
            tokens than rows, a sequence that would lose all of its rows, one count too few or too many.
    """
    if not isinstance(layout, VarlenLayout):
        raise TypeError(f"layout must be a VarlenLayout, got {type(layout).__name__}")
    check_choice("positions", positions, POSITIONS)
    check_int("layer", layer, minimum=0)
    if layer >= 2**32:
        raise ValueError(f"layer must be below 2^32, got {layer}")
    lengths = layout.lengths
    droppable = [num_droppable] * len(lengths) if isinstance(num_droppable, int) else num_droppable
    droppable = _counts("num_droppable", droppable, lengths, "rows")
    if isinstance(keep, float):
        if not 0.0 < keep <= 1.0:
            raise ValueError(f"keep must be a ratio in (0, 1] or a count, got {keep}")
        kept = tuple(int(n * keep) for n in droppable)
    else:
        # A sequence without droppable tokens keeps none of them, whatever the others keep.
        counts = [keep if n else 0 for n in droppable] if isinstance(keep, int) else keep
        kept = _counts("keep", counts, droppable, "droppable tokens")
    out = [length - n + k for length, n, k in zip(lengths, droppable, kept, strict=True)]
    for index, (length, left) in enumerate(zip(lengths, out, strict=True)):
        if length > 0 and left == 0:
            raise ValueError(f"keep must leave every sequence a row, got {keep} for the {length} of sequence {index}")
    device = layout.cu_seqlens.device
    keep_per_sequence = torch.tensor(kept, dtype=torch.int32).to(device, non_blocking=True)
    torch._dynamo.maybe_mark_dynamic(keep_per_sequence, 0)
    return DropBudget(layout, VarlenLayout(out, device), keep_per_sequence, droppable, positions, layer)


def _counts(name: str, values: Any, limits: Sequence[int], of: str) -> tuple[int, ...]:
    """One int per sequence, each between 0 and its limit."""
    if isinstance(values, (str, bytes, Tensor)) or not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a number or a sequence of ints on the host, got {type(values).__name__}")
    counts = tuple(values)
    if len(counts) != len(limits):
        raise ValueError(f"{name} must have one entry per sequence ({len(limits)}), got {len(counts)}")
    for index, (count, limit) in enumerate(zip(counts, limits, strict=True)):
        check_int(f"{name}[{index}]", count, minimum=0)
        if count > limit:
            raise ValueError(f"{name}[{index}] must be at most the {limit} {of} of that sequence, got {count}")
    return counts


register_pytree(Selection, leaves=3)
register_pytree(DropBudget, leaves=3)
