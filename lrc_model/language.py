# SPDX-License-Identifier: Apache-2.0
"""The language model InternLM2.5 (a Llama): packed embeddings [T, D] in, hidden states of the rows that are left out.

Its own loop over the layers, because rows leave between them: inside a drop layer, after the norm and q/k/v of all
rows and before the rotary embedding, tokens are scored, selected and gathered, and the layer goes on with the rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn
from torch.nn.functional import linear, silu
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from lrc_kernels.attention import varlen_attention
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.packing import PackedBatch
from lrc_kernels.token_dropout import (
    CHECKPOINT_OPS,
    DropBudget,
    Selection,
    attention_scores,
    drop_position_ids,
    drop_tokens,
    query_rows,
    select_tokens,
)
from lrc_model.config import TextConfig
from lrc_model.connector import place_visual_tokens

T = TypeVar("T")


class Placement:
    """Where the rows of a pack lie, and what has to know it: here all on one device. `lrc_model.parallel` spreads them.

    Hidden states, queries, keys and values are those of the rows here; everything of `PackedRows` but its rotary tables
    is of the whole pack, so that every rank selects by itself and alike.
    """

    def checkpoint_options(self, drops: bool) -> Mapping[str, Any]:
        """Of torch.utils.checkpoint, for a layer that is computed again in the backward. One that drops keeps its
        selection: other rows than those of the first time would give another layer's gradient."""
        return {"context_fn": partial(create_selective_checkpoint_contexts, list(CHECKPOINT_OPS))} if drops else {}

    def local(self, x: Tensor, fill: float = 0) -> Tensor:
        """[T, ...] of the whole pack -> the rows here; `fill` for padding."""
        return x

    def rows_at(self, x: Tensor, rows: Tensor) -> Tensor:
        """Rows here -> those of the pack at `rows` [N]. No gradient."""
        return x.detach()[rows]

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout) -> Tensor:
        """Causal attention over the whole pack for the rows here, [T, Hq, K]."""
        return attend(q, k, v, layout)

    def scores(self, q: Tensor, k: Tensor, layout: VarlenLayout, sequence: Tensor, position: Tensor) -> Tensor:
        """[T] of the whole pack, from asking rows q [S, Hq, K] and the keys of the rows here."""
        return attention_scores(q, k, cu_seqlens_k=layout, query_sequence=sequence, query_position=position)

    def drop(self, tensors: tuple[Tensor, ...], selection: Selection) -> tuple[tuple[Tensor, ...], Placement]:
        """The rows that stay, and where they lie from here on."""
        return cast("tuple[Tensor, ...]", drop_tokens(tensors, selection)), self

    def run_drop(self, step: Callable[..., T], *args: Any) -> T:
        """The result of a whole drop, `step(*args)`: here a compiled layer goes through it without a break."""
        return step(*args)

    def place_visual(self, x: Tensor, tokens: Tensor, batch: PackedBatch) -> Tensor:
        """Embeddings x of the rows here with the features of their frames, of which `tokens` [V, D] are those here."""
        if not len(batch.visual_index):
            return x
        visual = torch.zeros_like(batch.droppable).index_fill(0, batch.visual_index, True)
        return place_visual_tokens(x, visual, tokens, num_visual_tokens=len(batch.visual_index))

    def num_targets(self, targets: Tensor, of_pack: int) -> int:
        """How many of the rows here have a target."""
        return of_pack


ONE_DEVICE = Placement()


@dataclass(frozen=True)
class PackedRows:
    """What travels with the rows of a pack through the layers.

    Attributes:
        layout: the sequences.
        position_ids: int64 [T], what the rotary embedding turns by.
        token_positions: int32 [T], where in its sequence each row stood before any drop, which keys random drops.
        prefill_length: int64 [S], rows of each prompt before any drop: the rotary base past the trained range.
        droppable: bool [T], visual tokens; None where nothing is ever dropped.
        targets: int64 [T], the word that each row has to predict, -100 elsewhere; None at inference.
        loss_weight: fp32 [T] or None.
        sequence_ids: int64 [S], ids of the samples, which key random drops.
        rope: cos and sin [T, K] of the positions of the rows here, once `with_rope` has made them.
        place: where the rows lie.
    """

    layout: VarlenLayout
    position_ids: Tensor
    token_positions: Tensor
    prefill_length: Tensor
    droppable: Tensor | None = None
    targets: Tensor | None = None
    loss_weight: Tensor | None = None
    sequence_ids: Tensor | None = None
    rope: tuple[Tensor, Tensor] | None = None
    place: Placement = ONE_DEVICE

    @classmethod
    def of(cls, layout: VarlenLayout, **given: Any) -> PackedRows:
        """Rows that count from 0 in every sequence; `given` are other fields, or position_ids of one's own."""
        cu_seqlens = layout.cu_seqlens.long()
        position = torch.arange(layout.num_tokens, device=cu_seqlens.device) - cu_seqlens[sequence_of_rows(layout)]
        given.setdefault("position_ids", position)
        return cls(layout, token_positions=position.int(), prefill_length=cu_seqlens.diff(), **given)

    def with_rope(self, text: TextConfig, dtype: torch.dtype) -> PackedRows:
        """The same with the rotary tables of the positions of the rows here."""
        length = self.prefill_length[sequence_of_rows(self.layout)]
        position_ids, length = (self.place.local(x) for x in (self.position_ids, length))
        return replace(self, rope=rope_tables(position_ids, length, text, dtype))

    @property
    def tables(self) -> tuple[Tensor, Tensor]:
        """cos and sin [T, K]; ValueError before `with_rope`."""
        if self.rope is None:
            raise ValueError("rope must be made by with_rope before a layer turns its queries, got None")
        return self.rope

    def drop(self, selection: Selection, positions: str, place: Placement | None = None) -> PackedRows:
        """The same for the rows that a selection keeps, without rotary tables; rows of padding get no target.

        Args:
            place: where they lie; None = where they lay.
        """
        kept = selection.indices.clamp(min=0).long()
        is_row = selection.indices >= 0
        targets = None if self.targets is None else torch.where(is_row, self.targets[kept], -100)
        return replace(
            self,
            layout=selection.layout,
            position_ids=drop_position_ids(self.position_ids, selection, positions),
            token_positions=self.token_positions[kept],
            droppable=None if self.droppable is None else self.droppable[kept] & is_row,
            targets=targets,
            loss_weight=None if self.loss_weight is None else torch.where(is_row, self.loss_weight[kept], 0.0),
            rope=None,
            place=place or self.place,
        )


def sequence_of_rows(layout: VarlenLayout) -> Tensor:
    """int64 [T]: the sequence of each row."""
    row = torch.arange(layout.num_tokens, device=layout.cu_seqlens.device)
    return torch.searchsorted(layout.cu_seqlens[1:].long(), row, right=True)


def rope_tables(
    position_ids: Tensor, prefill_length: Tensor, text: TextConfig, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """cos and sin [T, K] in fp32 (fp64 for fp64), a pure function of positions and prompt lengths.

    Past `max_position` the base grows with the length of the prompt (dynamic NTK). It stays that of the
    prompt while tokens are generated, so that keys in the cache and new queries turn alike, and one long prompt leaves
    nothing behind for the next.

    Args:
        position_ids: int64 [T].
        prefill_length: int64 [T], the length of the prompt that each row belongs to.
    """
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    exponent = torch.arange(0, text.head_dim, 2, device=position_ids.device, dtype=wide) / text.head_dim
    base = torch.full(prefill_length.shape, text.rope_theta, device=position_ids.device, dtype=wide)
    if text.rope_factor is not None:
        ratio = prefill_length.clamp(min=text.max_position).to(wide) / text.max_position
        growth = text.rope_factor * ratio - (text.rope_factor - 1)
        base = base * growth ** (text.head_dim / (text.head_dim - 2))
    angle = position_ids.to(wide).unsqueeze(1) / base.unsqueeze(1) ** exponent
    angle = torch.cat([angle, angle], 1)
    return angle.cos(), angle.sin()


def warn_past_trained(num_rows: int, text: TextConfig) -> None:
    """Say once that a sequence is longer than the positions that were trained, and what is done about it."""
    if not torch.compiler.is_compiling() and num_rows > text.max_position:
        scaling = "RoPE is not scaled" if text.rope_factor is None else f"dynamic NTK, factor {text.rope_factor}, is on"
        warnings.warn(
            f"a sequence is longer than the {text.max_position} trained positions ({scaling}): answers may suffer; "
            "fewer frames, or renumbered positions with token dropout, stay within them",
            stacklevel=3,
        )


def apply_rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x [T, H, K] turned by cos and sin [T, K], computed in their dtype and rounded once."""
    first, second = x.chunk(2, -1)
    turned = torch.cat([-second, first], -1)
    return (x * cos.unsqueeze(1) + turned * sin.unsqueeze(1)).to(x.dtype)


def attend(q: Tensor, k: Tensor, v: Tensor, layout_q: VarlenLayout, layout_k: VarlenLayout | None = None) -> Tensor:
    """Causal attention of packed rows, [T, Hq, K]."""
    return cast(Tensor, varlen_attention(q, k, v, cu_seqlens_q=layout_q, cu_seqlens_k=layout_k))


class RMSNorm(nn.Module):
    """Llama's: normalised in fp32, rounded, then scaled in the input's dtype."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, x: Tensor) -> Tensor:
        wide = x if x.dtype == torch.float64 else x.float()
        return self.weight * (wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)).to(x.dtype)


class Attention(nn.Module):
    """The projections of grouped-query attention; the attention itself is one call of `varlen_attention`."""

    def __init__(self, text: TextConfig):
        super().__init__()
        width = text.num_heads * text.head_dim
        self.head_dim = text.head_dim
        self.q_proj = nn.Linear(text.hidden_size, width, bias=False)
        self.k_proj = nn.Linear(text.hidden_size, text.num_kv_heads * text.head_dim, bias=False)
        self.v_proj = nn.Linear(text.hidden_size, text.num_kv_heads * text.head_dim, bias=False)
        self.o_proj = nn.Linear(width, text.hidden_size, bias=False)

    def project(self, projection: nn.Linear, x: Tensor) -> Tensor:
        """[T, D] -> [T, H, K]."""
        return projection(x).unflatten(-1, (-1, self.head_dim))


class MLP(nn.Module):
    """SwiGLU."""

    def __init__(self, text: TextConfig):
        super().__init__()
        self.gate_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.up_proj = nn.Linear(text.hidden_size, text.intermediate_size, bias=False)
        self.down_proj = nn.Linear(text.intermediate_size, text.hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(silu(self.gate_proj(x)) * self.up_proj(x))


@dataclass(frozen=True)
class Drop:
    """A drop of this pack: how many rows stay (`budget`), how they are chosen (a mode of `select_tokens`), the seed."""

    budget: DropBudget
    mode: str
    seed: int | Tensor = 0

    def select(self, rows: PackedRows, scores: Tensor | None) -> Selection:
        """What stays of these rows; ValueError where they do not say which of them are droppable."""
        if rows.droppable is None:
            raise ValueError("droppable must say which rows a drop may drop, got None")
        return select_tokens(
            rows.layout,
            rows.droppable,
            self.budget,
            mode=self.mode,
            scores=scores,
            seed=self.seed,
            layer=self.budget.layer,
            sequence_ids=rows.sequence_ids,
            positions=rows.token_positions,
        )


class DecoderLayer(nn.Module):
    """One layer of the decoder, with the names that transformers gives to Llama's parameters."""

    def __init__(self, text: TextConfig):
        super().__init__()
        self.text = text
        self.input_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.self_attn = Attention(text)
        self.post_attention_layernorm = RMSNorm(text.hidden_size, text.rms_norm_eps)
        self.mlp = MLP(text)

    def scores(self, q: Tensor, k: Tensor, rows: PackedRows, asking: tuple[Tensor, Tensor, Tensor]) -> Tensor:
        """fp32 [T]: how much the query rows of each sequence attend to each row. No gradient.

        `asking` is what `query_rows` gives; q [R, Hq, K] of these rows, not turned yet; k of the rows here, turned.
        """
        with torch.no_grad():
            row, sequence, position = asking
            tables = rope_tables(rows.position_ids[row], rows.prefill_length[sequence.long()], self.text, q.dtype)
            return rows.place.scores(apply_rope(q, *tables), k, rows.layout, sequence, position).float()

    def forward(self, x: Tensor, rows: PackedRows, drop: Drop | None = None) -> tuple[Tensor, PackedRows]:
        """x [T, D] -> x of the rows that stay, and what travels with them."""
        h = self.input_layernorm(x)
        attn = self.self_attn
        q, k, v = (attn.project(projection, h) for projection in (attn.q_proj, attn.k_proj, attn.v_proj))
        if drop is not None:
            (x, q, k, v), rows = rows.place.run_drop(self.drop, (x, q, k, v), rows, drop)
        q, k = apply_rope(q, *rows.tables), apply_rope(k, *rows.tables)
        return self.finish(x, rows.place.attend(q, k, v, rows.layout)), rows

    def drop(self, tensors: tuple[Tensor, ...], rows: PackedRows, drop: Drop) -> tuple[tuple[Tensor, ...], PackedRows]:
        """Of `tensors`, x [T, D] and q, k, v [T, H, K] not turned yet, the rows that stay."""
        scores = None
        if drop.mode == "topk":
            _, q, k, _ = tensors
            asking = query_rows(rows.layout, rows.targets)
            asked = rows.place.rows_at(q, asking[0])
            scores = self.scores(asked, apply_rope(k.detach(), *rows.tables), rows, asking)
        selection = drop.select(rows, scores)
        kept, place = rows.place.drop(tensors, selection)
        return kept, rows.drop(selection, drop.budget.positions, place).with_rope(self.text, kept[0].dtype)

    def finish(self, x: Tensor, out: Tensor) -> Tensor:
        """The output projection, both residuals and the MLP: x [T, D], out [T, Hq, K] -> [T, D]."""
        x = x + self.self_attn.o_proj(out.flatten(1))
        return x + self.mlp(self.post_attention_layernorm(x))


class Decoder(nn.Module):
    """Embedding, layers and the last norm: transformers' `model.`."""

    def __init__(self, text: TextConfig):
        super().__init__()
        self.embed_tokens = nn.Embedding(text.vocab_size, text.hidden_size)
        self.layers = nn.ModuleList(DecoderLayer(text) for _ in range(text.num_layers))
        self.norm = RMSNorm(text.hidden_size, text.rms_norm_eps)

    @property
    def typed_layers(self) -> list[DecoderLayer]:
        return cast("list[DecoderLayer]", list(self.layers))


class LanguageModel(nn.Module):
    """The language model, with the names that transformers gives to the parameters of LlamaForCausalLM.

    Args:
        text: its sizes.
    """

    def __init__(self, text: TextConfig):
        super().__init__()
        self.text = text
        self.model = Decoder(text)
        self.lm_head = nn.Linear(text.hidden_size, text.vocab_size, bias=False)

    @classmethod
    def empty(cls, text: TextConfig, *, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """On the meta device, for `load_state_dict(..., assign=True)` or `to_empty`."""
        with torch.device("meta"):
            return cls(text).to(dtype)

    def embed(self, input_ids: Tensor) -> Tensor:
        """int64 [T] -> [T, D]."""
        return self.model.embed_tokens(input_ids)

    def logits(self, hidden: Tensor) -> Tensor:
        """[R, D] -> fp32 (fp64 for fp64) [R, V]; only for as many rows as needed: 160k rows would take 55 GiB."""
        logits = linear(hidden, self.lm_head.weight)
        return logits if logits.dtype == torch.float64 else logits.float()

    def forward(
        self, x: Tensor, rows: PackedRows, drops: tuple[Drop, ...] = (), *, recompute: bool = False
    ) -> tuple[Tensor, PackedRows]:
        """Normalised hidden states [T', D] of the rows that are left, and what travels with them. Autograd.

        Args:
            x: embeddings [T, D].
            rows: of this pack.
            drops: one per drop layer, from `DropoutSchedule.plan`.
            recompute: keep only the input of every layer and compute it again in the backward.
        """
        drop_of = {drop.budget.layer: drop for drop in drops}
        warn_past_trained(rows.layout.max_seqlen, self.text)
        rows = rows.with_rope(self.text, x.dtype)
        for index, layer in enumerate(self.model.typed_layers):
            if recompute and torch.is_grad_enabled():
                options = rows.place.checkpoint_options(index in drop_of)
                x, rows = checkpoint(layer, x, rows, drop_of.get(index), use_reentrant=False, **options)
            else:
                x, rows = layer(x, rows, drop_of.get(index))
        return self.model.norm(x), rows
