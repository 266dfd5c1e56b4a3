# SPDX-License-Identifier: Apache-2.0
"""Where in the LLM tokens are dropped and how many stay: a schedule and the lengths of a pack go in, one DropBudget per
drop layer comes out, on the host and once per batch; also which rows ask for attention-guided scores."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int, check_tensor
from lrc_kernels.layout import VarlenLayout, as_layout
from lrc_kernels.token_dropout import reference
from lrc_kernels.token_dropout.plan import POSITIONS, DropBudget, Selection, drop_budget

# What a drop decides by, and the mode of `select_tokens` that does it. A Bernoulli drop keeps the tokens whose Philox
# words lie below p * 2^32: once the host has counted them, they are that many smallest words.
MODES = {"attention": "topk", "linspace": "linspace", "random": "random", "bernoulli": "random"}


@dataclass(frozen=True)
class DropoutSchedule:
    """The layers that drop tokens, what they keep, and how they choose.

    Args:
        layers: decoder layers, 0-based and increasing; the drop happens inside the layer, before its attention.
        keep_ratios: of the droppable tokens that a sequence had at first, the share that is left after each drop, in
            (0, 1] and not increasing.
        kinds: how each drop chooses. "attention" keeps the tokens that the query rows attend to most; "linspace" evenly
            spaced ones; "random" exactly as many, without replacement; "bernoulli" each by itself (paper eq. 2), only
            as the first, since its counts are drawn on the host.
        positions: "keep" leaves the position ids as they were, "renumber" counts the rows that are left.

    Raises:
        TypeError, ValueError: a field of the wrong type, length, order or range.

    Source: InternVideo2.5 section 3.1 and eq. 2: uniform in early layers, attention-guided in deep ones.
    """

    layers: tuple[int, ...]
    keep_ratios: tuple[float, ...]
    kinds: tuple[str, ...]
    positions: str = "keep"

    def __post_init__(self) -> None:
        for name in ("layers", "keep_ratios", "kinds"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not len(self.layers) == len(self.keep_ratios) == len(self.kinds):
            raise ValueError(
                "keep_ratios and kinds must have one entry per layer, got "
                f"{len(self.layers)} layers, {len(self.keep_ratios)} keep_ratios and {len(self.kinds)} kinds"
            )
        for index, layer in enumerate(self.layers):
            check_int(f"layers[{index}]", layer, minimum=0)
        if list(self.layers) != (wanted := sorted(set(self.layers))):
            raise ValueError(f"layers must increase, got {list(self.layers)}; the nearest is {wanted}")
        for index, (ratio, kind) in enumerate(zip(self.keep_ratios, self.kinds, strict=True)):
            if isinstance(ratio, bool) or not isinstance(ratio, (int, float)):
                raise TypeError(f"keep_ratios[{index}] must be a number, got {type(ratio).__name__}")
            if not 0 < ratio <= 1:
                raise ValueError(f"keep_ratios[{index}] must be in (0, 1], got {ratio}: 0 would leave no visual token")
            check_choice(f"kinds[{index}]", kind, tuple(MODES))
            if index and kind == "bernoulli":
                raise ValueError(f"kinds: a bernoulli drop must be the first, got {list(self.kinds)}")
        if list(self.keep_ratios) != (shares := sorted(self.keep_ratios, reverse=True)):
            raise ValueError(
                "keep_ratios are shares of the original tokens and must not increase, got "
                f"{list(self.keep_ratios)}; the nearest is {shares}"
            )
        check_choice("positions", self.positions, POSITIONS)

    @property
    def modes(self) -> tuple[str, ...]:
        """The mode of `select_tokens` for each drop."""
        return tuple(MODES[kind] for kind in self.kinds)

    @classmethod
    def none(cls) -> DropoutSchedule:
        """No drop at all."""
        return cls((), (), ())

    @classmethod
    def paper(cls, *, positions: str = "keep") -> DropoutSchedule:
        """Uniform in an early layer (Bernoulli, eq. 2), attention-guided in two deep ones.

        The paper gives neither layers nor rates; these are those of VideoChat-Flash's code for 32 layers.
        """
        return cls((8, 16, 24), (0.5, 0.25, 0.125), ("bernoulli", "attention", "attention"), positions)

    @classmethod
    def videochat_flash(cls, config: Mapping[str, Any] | Any = None) -> DropoutSchedule:
        """The schedule of a VideoChat-Flash config (a dict or an object), or of its code's defaults.

        Reads `llm_compress_type` ("attention", "uniform0_attention", "uniform1_attention"), `llm_compress_layer_list`
        and `llm_image_token_ratio_list`, whose first entry is the ratio before any drop. Its layers count from 1 and
        drop behind the layer, which is inside the next one, so that the numbers stay. Positions are renumbered.

        Raises:
            ValueError: an unknown type, or ratios that do not fit the layers.
        """

        def read(name: str, default: Any) -> Any:
            value = config.get(name) if isinstance(config, Mapping) else getattr(config, name, None)
            return default if value is None else value

        kind = read("llm_compress_type", "attention")
        uniform = {"attention": 0, "uniform0_attention": 1, "uniform1_attention": 2}
        check_choice("llm_compress_type", kind, tuple(uniform))
        default = ([8, 16, 24], [1.0, 0.5, 0.25, 0.125]) if kind == "attention" else ([4, 18], [1.0, 0.75, 0.25])
        layers = read("llm_compress_layer_list", default[0])
        ratios = read("llm_image_token_ratio_list", default[1])
        if len(ratios) != len(layers) + 1 or ratios[0] != 1:
            raise ValueError(
                "llm_image_token_ratio_list must hold 1.0 and then one ratio per entry of llm_compress_layer_list, got "
                f"{list(ratios)} for layers {list(layers)}"
            )
        kinds = ["linspace" if index < uniform[kind] else "attention" for index in range(len(layers))]
        return cls(tuple(layers), tuple(ratios[1:]), tuple(kinds), "renumber")

    def validate(self, num_layers: int) -> None:
        """ValueError where a layer of the schedule does not exist in a model of `num_layers` layers."""
        check_int("num_layers", num_layers, minimum=1)
        if self.layers and self.layers[-1] >= num_layers:
            kept = [layer for layer in self.layers if layer < num_layers] or [num_layers - 1]
            raise ValueError(
                f"layers must be < num_layers = {num_layers}, got {list(self.layers)}; the nearest is {kept}"
            )

    def plan(
        self,
        layout: VarlenLayout,
        num_droppable: Sequence[int],
        *,
        droppable: Tensor | None = None,
        seed: int = 0,
        sequence_ids: Tensor | None = None,
        positions: Tensor | None = None,
    ) -> tuple[DropBudget, ...]:
        """How many rows every drop of this pack leaves: on the host, with no look at a hidden state.

        Args:
            layout: the packed sequences before the first drop.
            num_droppable: droppable (visual) tokens of each sequence; 0 for a sequence of text.
            droppable, seed, sequence_ids, positions: as `select_tokens` will get them, but on the host; only a
                "bernoulli" drop needs them, whose counts follow from the same Philox words. droppable bool [T].

        Returns:
            One budget per layer, each starting from the layout that the one before leaves.

        Raises:
            TypeError, ValueError: counts that do not fit the layout, a drop that leaves a sequence empty, a "bernoulli"
                drop without `droppable`.
        """
        counts = list(num_droppable)
        for index, count in enumerate(counts):
            check_int(f"num_droppable[{index}]", count, minimum=0)
        budgets: list[DropBudget] = []
        left = counts
        for layer, ratio, kind in zip(self.layers, self.keep_ratios, self.kinds, strict=True):
            if kind == "bernoulli":
                if droppable is None:
                    raise ValueError("droppable must be given, on the host, for a bernoulli drop, got None")
                keep = _bernoulli_counts(layout, droppable, ratio, seed, layer, sequence_ids, positions)
            else:
                keep = [min(int(n * ratio), now) for n, now in zip(counts, left, strict=True)]
            budget = drop_budget(layout, left, keep=keep, positions=self.positions, layer=layer)
            left = keep
            budgets.append(budget)
            layout = budget.layout_out
        return tuple(budgets)


def _bernoulli_counts(
    layout: VarlenLayout, droppable: Tensor, p: float, seed: int, layer: int, sequence_ids: Tensor | None,
    positions: Tensor | None,
) -> list[int]:  # fmt: skip
    """How many droppable tokens of each sequence have a Philox word below p * 2^32."""
    check_tensor("droppable", droppable, dims=(1,), dtypes=(torch.bool,), numel=layout.num_tokens)
    cu_seqlens = layout.cu_seqlens.cpu()
    words = reference.random_words(cu_seqlens, layout.num_tokens, torch.tensor(seed), layer, sequence_ids, positions)
    kept = droppable.cpu() & (words < int(p * 2**32))
    return [int(part.sum()) for part in kept.split(layout.lengths)]


def query_rows(
    cu_seqlens: VarlenLayout | Tensor, targets: Tensor | None = None, *, max_answers: int = 1, ignore_index: int = -100
) -> tuple[Tensor, Tensor, Tensor]:
    """The rows whose attention decides a drop: each sequence's row before its first answer, or its last row.

    In training that is the row that predicts the first supervised token, so that nothing of a later turn is seen. A
    sequence without supervised tokens, and every sequence at inference (`targets=None`), asks with its last row.

    Args:
        cu_seqlens: S packed sequences.
        targets: int [T], what each row has to predict (labels shifted inside their sequence), `ignore_index` elsewhere.
        max_answers: rows per sequence, one for each of its first answers (1 is the default of training; VideoChat-Flash
            averages over all answers: more rows and `query_reduce="mean"`).

    Returns:
        rows int64 [S * max_answers] into the packed tensor, query_sequence int32 and query_position int32 of the same
        length, as `attention_scores` takes them. query_position is -1 for a row that does not exist.

    Raises:
        TypeError, ValueError: arguments of the wrong dtype, shape or range.

    Source: InternVideo2.5 section 3.1 (attention-guided dropout); VideoChat-Flash for the choice of rows.
    """
    layout = as_layout(cu_seqlens)
    check_int("max_answers", max_answers, minimum=1)
    starts = layout.cu_seqlens[:-1].long()
    lengths = layout.cu_seqlens.diff().long()
    position = starts.new_full((layout.num_sequences, max_answers), -1)
    if targets is not None:
        integers = (torch.int64, torch.int32)
        check_tensor("targets", targets, dims=(1,), dtypes=integers, numel=layout.num_tokens, like=starts)
        position = _answer_positions(layout, targets != ignore_index, max_answers)
    first = torch.where(position[:, 0] < 0, lengths - 1, position[:, 0])
    position = torch.cat([first.unsqueeze(1), position[:, 1:]], 1).flatten()
    sequence = torch.arange(layout.num_sequences, device=starts.device).repeat_interleave(max_answers)
    rows = starts.repeat_interleave(max_answers) + position.clamp(min=0)
    # An empty sequence behind the last row has no row of its own to point at.
    rows = rows.clamp(max=max(layout.num_tokens - 1, 0))
    return rows, sequence.int(), position.int()


def _answer_positions(layout: VarlenLayout, supervised: Tensor, max_answers: int) -> Tensor:
    """int64 [S, max_answers]: the local row at which each of the first answers of a sequence starts, else -1."""
    starts = layout.cu_seqlens[:-1].long()
    row = torch.arange(layout.num_tokens, device=starts.device)
    sequence = torch.searchsorted(layout.cu_seqlens[1:].long(), row, right=True)
    is_first = row == starts[sequence]
    previous = torch.nn.functional.pad(supervised, (1, 0))[:-1] & ~is_first
    begins = supervised & ~previous
    before = torch.nn.functional.pad(begins.long().cumsum(0), (1, 0))
    answer = before[:-1] - before[starts[sequence]]
    # Rows that begin no answer, or one too many, land in a column that is cut off.
    column = torch.where(begins & (answer < max_answers), answer, max_answers)
    table = starts.new_full((layout.num_sequences, max_answers + 1), -1)
    table.view(-1)[sequence * (max_answers + 1) + column] = row - starts[sequence]
    return table[:, :max_answers]


def drop_position_ids(position_ids: Tensor, selection: Selection, positions: str) -> Tensor:
    """Position ids after a drop: those of the rows that stayed, or a new count.

    Args:
        position_ids: [T], or [3, T] for M-RoPE.
        positions: "keep" (FastV, the default of our schedules) or "renumber" (VideoChat-Flash: 0, 1, ... per sequence).

    Raises:
        ValueError: an unknown policy; "renumber" for [3, T], where height and width have no next number.
    """
    check_choice("positions", positions, POSITIONS)
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    integers = (torch.int64, torch.int32)
    check_tensor("position_ids", position_ids, dims=(1, 2), dtypes=integers, like=selection.indices)
    if position_ids.shape[-1] != selection.inverse.shape[0]:
        rows = selection.inverse.shape[0]
        raise ValueError(f"position_ids must have {rows} rows in its last dimension, got {list(position_ids.shape)}")
    if positions == "keep":
        return position_ids.index_select(position_ids.dim() - 1, selection.indices.clamp(min=0).long())
    if position_ids.dim() != 1:
        raise ValueError(
            f"positions must be 'keep' for position_ids of shape {list(position_ids.shape)}, got 'renumber'"
        )
    row = torch.arange(selection.num_kept, device=position_ids.device)
    offsets = selection.layout.cu_seqlens.long()
    return (row - offsets[torch.searchsorted(offsets[1:], row, right=True)]).to(position_ids.dtype)
