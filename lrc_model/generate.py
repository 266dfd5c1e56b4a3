# SPDX-License-Identifier: Apache-2.0
"""Prompts in, words out: prefill in chunks of bounded memory, then a row per sequence and step over a ragged cache."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor

from lrc_kernels.checks import check_int
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.token_dropout import drop_tokens, query_rows
from lrc_model.cache import KVCache
from lrc_model.language import (
    DecoderLayer,
    Drop,
    LanguageModel,
    PackedRows,
    apply_rope,
    attend,
    rope_tables,
    warn_past_trained,
)

PREFILL_CHUNK = 8192
Clock = Callable[[str], AbstractContextManager[None]]


def no_clock(stage: str) -> AbstractContextManager[None]:
    """Measures nothing."""
    return nullcontext()


@torch.no_grad()
def prefill(
    language: LanguageModel,
    x: Tensor,
    rows: PackedRows,
    drops: Sequence[Drop],
    cache: KVCache,
    *,
    sequence: int,
    chunk: int = PREFILL_CHUNK,
    max_new_tokens: int = 0,
    clock: Clock = no_clock,
) -> Tensor:
    """Read one prompt into the cache and return the normalised hidden state [1, D] of its last row.

    Stage by stage: all chunks pass the layers up to a drop, then the last prompt row selects among all rows, then the
    rows that are left go on. Selecting per chunk would ask a row that is not the question's.

    Args:
        x: embeddings [T, D] of one sequence; overwritten, so that no second copy of a long prompt exists.
        rows: of this sequence alone.
        drops: of this sequence alone, in the order of their layers.
        sequence: its place in the cache.
        chunk: rows at a time.
        max_new_tokens: room that the cache reserves behind the prompt.
        clock: a context manager per stage, "dropout" or "language"; see `lrc_model.waterfall`.

    Raises:
        TypeError, ValueError: rows of more than one sequence or of other lengths than x, a place in the cache that is
            taken, a chunk below 1.
    """
    _check_prompt(x, rows, cache, sequence, chunk)
    drop_of = {drop.budget.layer: drop for drop in drops}
    first_layers = sorted({0, *drop_of})
    warn_past_trained(x.shape[0], language.text)
    for first, end in zip(first_layers, [*first_layers[1:], len(language.model.typed_layers)], strict=True):
        rows = rows.with_rope(language.text, x.dtype)
        if first in drop_of:
            layer = language.model.typed_layers[first]
            with clock("dropout"):
                x, rows = _drop_stage(layer, x, rows, drop_of[first], cache, first, sequence, chunk, max_new_tokens)
        for index in range(first, end):
            if cache.length(index, sequence) == 0:
                like = x.new_empty(0, language.text.num_kv_heads, language.text.head_dim)
                cache.reserve(index, sequence, x.shape[0] + max_new_tokens, like)
        for part in _parts(x.shape[0], chunk):
            with clock("language"):
                h = x[part]
                for index in range(first, end):
                    layer = language.model.typed_layers[index]
                    h = _layer_chunk(layer, h, rows, part, cache, index, sequence, index == first and first in drop_of)
                x[part] = h
    return language.model.norm(x[-1:])


def _check_prompt(x: Tensor, rows: PackedRows, cache: KVCache, sequence: int, chunk: int) -> None:
    check_int("chunk", chunk, minimum=1)
    if rows.layout.num_sequences != 1 or rows.layout.num_tokens != x.shape[0] or x.shape[0] == 0:
        raise ValueError(f"rows must be those of one prompt, the {x.shape[0]} of x and at least one, got {rows.layout}")
    if any(cache.length(layer, sequence) for layer in range(cache.num_layers)):
        raise ValueError(f"sequence must be an empty place of the cache, got {sequence}, which holds a prompt already")


def _parts(num_rows: int, chunk: int) -> list[slice]:
    return [slice(start, min(start + chunk, num_rows)) for start in range(0, num_rows, chunk)]


def _drop_stage(
    layer: DecoderLayer, x: Tensor, rows: PackedRows, drop: Drop, cache: KVCache, index: int, sequence: int, chunk: int,
    max_new_tokens: int,
) -> tuple[Tensor, PackedRows]:  # fmt: skip
    """Select among all rows of the prompt; the keys and values of those that stay go into the cache."""
    attn = layer.self_attn
    k, v, turned = (x.new_empty(x.shape[0], layer.text.num_kv_heads, layer.text.head_dim) for _ in range(3))
    for part in _parts(x.shape[0], chunk):
        h = layer.input_layernorm(x[part])
        k[part] = attn.project(attn.k_proj, h)
        v[part] = attn.project(attn.v_proj, h)
        turned[part] = apply_rope(k[part], *(table[part] for table in rows.tables))
    scores = None
    if drop.mode == "topk":
        asking = query_rows(rows.layout, rows.targets)
        q = attn.project(attn.q_proj, layer.input_layernorm(x[asking[0]]))
        scores = layer.scores(q, turned, rows, asking)
    del turned
    selection = drop.select(rows, scores)
    x, k, v = drop_tokens((x, k, v), selection)
    rows = rows.drop(selection, drop.budget.positions).with_rope(layer.text, x.dtype)
    cache.reserve(index, sequence, x.shape[0] + max_new_tokens, k)
    for part in _parts(x.shape[0], chunk):
        cache.append(index, sequence, apply_rope(k[part], *(table[part] for table in rows.tables)), v[part])
    return x, rows


def _layer_chunk(
    layer: DecoderLayer, x: Tensor, rows: PackedRows, part: slice, cache: KVCache, index: int, sequence: int,
    has_keys: bool,
) -> Tensor:  # fmt: skip
    """One layer on the rows `part` of a prompt, whose earlier keys are in the cache (`has_keys`: all of them are)."""
    attn = layer.self_attn
    rope = (rows.tables[0][part], rows.tables[1][part])
    h = layer.input_layernorm(x)
    q = apply_rope(attn.project(attn.q_proj, h), *rope)
    if has_keys:
        k, v = cache.rows(index, sequence, part.stop)
    else:
        k = apply_rope(attn.project(attn.k_proj, h), *rope)
        k, v = cache.append(index, sequence, k, attn.project(attn.v_proj, h))
    queries, keys = VarlenLayout([q.shape[0]], x.device), VarlenLayout([k.shape[0]], x.device)
    return layer.finish(x, attend(q, k, v, queries, keys))


@torch.no_grad()
def decode_step(
    language: LanguageModel,
    x: Tensor,
    cache: KVCache,
    *,
    position: Tensor,
    prefill_length: Tensor,
    renumbered_from: int | None = None,
) -> Tensor:
    """One more row of every sequence: embeddings [S, D] in, normalised hidden states [S, D] out.

    Args:
        position: int64 [S], the position id of these rows in layers without renumbering.
        prefill_length: int64 [S], rows of each prompt, which fix the rotary base.
        renumbered_from: the first layer behind a drop that renumbers; from there on a row's position is the number of
            rows that its layer has seen already.
    """
    for index, layer in enumerate(language.model.typed_layers):
        attn = layer.self_attn
        if renumbered_from is not None and index >= renumbered_from:
            held = [cache.seen(index, sequence) for sequence in range(cache.num_sequences)]
            at = torch.tensor(held, dtype=torch.int64).to(x.device, non_blocking=True)
        else:
            at = position
        rope = rope_tables(at, prefill_length, language.text, x.dtype)
        h = layer.input_layernorm(x)
        q = apply_rope(attn.project(attn.q_proj, h), *rope)
        k = apply_rope(attn.project(attn.k_proj, h), *rope)
        v = attn.project(attn.v_proj, h)
        x = layer.finish(x, cache.attend(index, q, k, v))
    return language.model.norm(x)
