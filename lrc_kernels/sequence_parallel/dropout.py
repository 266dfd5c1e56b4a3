# SPDX-License-Identifier: Apache-2.0
"""Token dropout of a pack that lies on many ranks: scores of all its rows on every rank and, after the same selection
on each, the plan of the rows that are left and their way to the ranks that hold them from there on."""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.nn.functional import pad

from lrc_kernels.checks import check_choice, check_tensor
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel.arrangements import ARRANGEMENTS
from lrc_kernels.sequence_parallel.blocks import accumulation_dtype
from lrc_kernels.sequence_parallel.comm import AllGather, Schedule, TorchRanks, as_words, collective_op, from_words
from lrc_kernels.sequence_parallel.encoding import decode
from lrc_kernels.sequence_parallel.exchange import RowExchange, exchange_rows, holders, plan_exchange, send_rows
from lrc_kernels.sequence_parallel.mesh import place, ranks_of
from lrc_kernels.sequence_parallel.plan import SequencePlan, plan_sequence
from lrc_kernels.token_dropout import (
    SCORE_BLOCK,
    Selection,
    block_factors,
    block_scores,
    block_statistics,
)

# Rows or attention of the fullest rank over the mean that a drop may leave before rows change their rank.
SLACK = 0.05
# Drops whose plan and exchange are kept: a layer that is computed again makes the selection of its first time.
_KEPT = 8


class ScoreBlocks(NamedTuple):
    """Who scores which keys: the rank that holds the first row of a block of 128 keys scores all of it.

    Attributes:
        exchange: from the rows of the plan to those of each rank's blocks.
        rows: per rank, the rows of the pack that it scores. blocks: per rank, its blocks, numbered over the pack.
        lengths: rows of each block of the pack. sequence, number: whose block it is, and its number there, from 0.
    """

    exchange: RowExchange
    rows: list[Tensor]
    blocks: list[Tensor]
    lengths: Tensor
    sequence: Tensor
    number: Tensor


def rows_of_ranks(plan: SequencePlan) -> list[Tensor]:
    """`local_indices` of every rank, ring-major: int64 [T_local] each; TypeError where it is no plan."""
    if not isinstance(plan, SequencePlan):
        raise TypeError(f"plan must be a SequencePlan, got {type(plan).__name__}")
    return [plan.local_indices(r, u) for r in range(plan.ring) for u in range(plan.ulysses)]


def score_blocks(plan: SequencePlan) -> ScoreBlocks:
    """Deal the blocks of keys to the ranks. Pure."""
    lengths = torch.tensor(plan.layout.lengths, dtype=torch.int64)
    num_blocks = (lengths + SCORE_BLOCK - 1) // SCORE_BLOCK
    sequence = torch.arange(len(lengths)).repeat_interleave(num_blocks)
    number = torch.arange(len(sequence)) - (num_blocks.cumsum(0) - num_blocks)[sequence]
    size = (lengths[sequence] - number * SCORE_BLOCK).clamp(max=SCORE_BLOCK)
    held = rows_of_ranks(plan)
    # Blocks lie in the order of the pack, back to back.
    owner = holders(held, plan.layout.num_tokens)[0][size.cumsum(0) - size]
    owner_of_row = owner.repeat_interleave(size)
    rows = [(owner_of_row == rank).nonzero().squeeze(1) for rank in range(len(held))]
    blocks = [(owner == rank).nonzero().squeeze(1) for rank in range(len(held))]
    exchange = plan_exchange(held, rows, ring=plan.ring, ulysses=plan.ulysses)
    return ScoreBlocks(exchange, rows, blocks, size, sequence, number)


def gather_lists(x: Tensor, counts: Sequence[int], ring: int, ulysses: int) -> Schedule[Tensor]:
    """[count of this rank, ...] of every rank -> those of all, back to back in the order of ranks (ring-major)."""
    longest, like = max(counts), x
    x = pad(as_words(x), (0, 0, 0, longest - x.shape[0]))
    for step, (axis, size) in enumerate((("ulysses", ulysses), ("ring", ring))):
        if size > 1:
            arriving = yield AllGather(axis, x, step)
            x = yield arriving
    parts = x.unflatten(0, (len(counts), longest)).unbind(0)
    return from_words(torch.cat([part[:count] for part, count in zip(parts, counts, strict=True)]), like)


def scores_of_pack(
    plan: SequencePlan,
    here: tuple[int, int],
    q: Tensor,
    k: Tensor,
    query_position: Tensor,
    head_reduce: str,
    softmax_scale: float | None,
) -> Schedule[Tensor]:
    """[T] on every rank, from q [S, Hq, K] (the same on all) and k [T_local, Hkv, K] of this rank."""
    dealt, rank = score_blocks(plan), here[0] * plan.ulysses + here[1]
    k = (yield from send_rows(k.flatten(1), dealt.exchange, here)).unflatten(1, k.shape[1:])
    mine = dealt.blocks[rank]
    layout = VarlenLayout(dealt.lengths[mine].tolist(), k.device)
    sequence, number = dealt.sequence.to(k.device), dealt.number.to(k.device)
    asking = q[sequence[mine]]
    position = (query_position[sequence[mine]] - number[mine].int() * SCORE_BLOCK).clamp(-1, SCORE_BLOCK - 1)
    statistics = block_statistics(asking, k, layout, position, softmax_scale=softmax_scale)
    lists = [len(blocks) for blocks in dealt.blocks]
    arrived = yield from gather_lists(statistics.transpose(0, 1), lists, plan.ring, plan.ulysses)
    order = torch.cat(dealt.blocks).to(k.device)
    longest = -(-plan.layout.max_seqlen // SCORE_BLOCK)
    whole = statistics.new_zeros(2, q.shape[0], q.shape[1], longest)
    whole[:, sequence[order], :, number[order]] = arrived
    factor = block_factors(whole, plan.layout.to(k.device), query_position)[sequence[mine], :, number[mine]]
    local = block_scores(asking, k, layout, position, factor, head_reduce=head_reduce, softmax_scale=softmax_scale)
    lists = [len(rows) for rows in dealt.rows]
    arrived = yield from gather_lists(local, lists, plan.ring, plan.ulysses)
    scores = torch.empty_like(arrived)
    scores[torch.cat(dealt.rows).to(k.device)] = arrived
    return scores


def _run_scores(
    q: Tensor, k: Tensor, query_position: Tensor, plan: Tensor, ranks: int, num_tokens: int, head_reduce: str,
    softmax_scale: float | None,
) -> Tensor:  # fmt: skip
    decoded, runs = decode(plan), TorchRanks.of(ranks)
    here = runs.place(decoded.ring, decoded.ulysses)
    schedule = scores_of_pack(decoded, here, q, k, query_position, head_reduce, softmax_scale)
    with torch.no_grad():
        return runs.run("scores of token dropout", schedule)


scores_op = collective_op(
    "sequence_parallel_scores(Tensor q, Tensor k, Tensor query_position, Tensor plan, int ranks, int num_tokens, "
    "str head_reduce, float? softmax_scale) -> Tensor",
    _run_scores,
    lambda q, k, query_position, plan, ranks, num_tokens, *rest: k.new_empty(
        num_tokens, dtype=accumulation_dtype(k.dtype)
    ),
)


@torch.compiler.disable
def sequence_parallel_scores(
    q: Tensor,
    k: Tensor,
    plan: SequencePlan,
    mesh: DeviceMesh,
    *,
    query_position: Tensor,
    head_reduce: str = "mean",
    softmax_scale: float | None = None,
) -> Tensor:
    """`attention_scores` of a pack whose keys lie on many ranks, the same bits on each of them, and those that one rank
    with all keys would give. No gradient. A collective.

    Softmax statistics are those of blocks of 128 keys, whoever holds them. What travels per rank: Hq / 16 bytes of
    statistics and 4 bytes of score for each row of the pack, and the keys of blocks that a border of ranks cuts.

    Args:
        q: [S, Hq, K], the row that asks each sequence, positions applied, the same on every rank (`rows_at`).
        k: [T_local, Hkv, K]: the keys of this rank's rows, positions applied.
        plan: of this pack; its degrees are those of the mesh.
        query_position: int32 [S], the place of each of these rows in its sequence; it sees the keys up to it. -1: none.
        head_reduce: "mean", "sum" or "max".
        softmax_scale: None = K ** -0.5.

    Returns:
        fp32 [T] (fp64 for fp64), 0 for keys that no row sees.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the plan, a mesh of other degrees.
        PeerError: a rank died or stalled (gloo).
    """
    here = place(plan, mesh)
    check_tensor("q", q, dims=(3,))
    check_tensor("k", k, dims=(3,), dtypes=(q.dtype,), like=q)
    if (q.shape[0], q.shape[2]) != (plan.layout.num_sequences, k.shape[2]):
        wanted = f"[{plan.layout.num_sequences}, Hq, {k.shape[2]}]"
        raise ValueError(f"q must have shape {wanted}, one row per sequence, got {list(q.shape)}")
    if k.shape[0] != plan.local_rows(here[0]):
        raise ValueError(f"k must have the {plan.local_rows(here[0])} rows of this rank, got {k.shape[0]}")
    check_tensor("query_position", query_position, dims=(1,), dtypes=(torch.int32,), numel=q.shape[0], like=q)
    check_choice("head_reduce", head_reduce, ("mean", "sum", "max"))
    options = plan.encoded, ranks_of(mesh).number, plan.layout.num_tokens, head_reduce, softmax_scale
    return scores_op(q.detach(), k.detach(), query_position, *options)


def _run_rows_at(x: Tensor, rows: Tensor, plan: Tensor, ranks: int) -> Tensor:
    decoded, runs = decode(plan), TorchRanks.of(ranks)
    here = runs.place(decoded.ring, decoded.ulysses)
    wanted, total = rows.cpu(), decoded.layout.num_tokens
    outside = wanted[(wanted < 0) | (wanted >= total)]
    if len(outside):
        raise ValueError(f"rows must be in [0, {total}), got {int(outside[0])}")
    owner, local = (table[wanted] for table in holders(rows_of_ranks(decoded), total))
    mine = owner == here[0] * decoded.ulysses + here[1]
    sent = as_words(x[local[mine].to(x.device)])
    message = sent.new_zeros(len(wanted), sent.shape[1])
    message[mine.to(x.device)] = sent
    counts = [len(wanted)] * (decoded.ring * decoded.ulysses)
    everything = runs.run("asking rows", gather_lists(message, counts, decoded.ring, decoded.ulysses))
    return from_words(everything[(owner * len(wanted) + torch.arange(len(wanted))).to(x.device)], x)


rows_at_op = collective_op(
    "rows_at(Tensor x, Tensor rows, Tensor plan, int ranks) -> Tensor",
    _run_rows_at,
    lambda x, rows, *rest: x.new_empty(rows.shape[0], *x.shape[1:]),
)


@torch.compiler.disable
def rows_at(x: Tensor, rows: Tensor, plan: SequencePlan, mesh: DeviceMesh) -> Tensor:
    """A few rows of a sharded tensor, on every rank: those that ask for scores. No gradient. A collective.

    Args:
        x: [T_local, ...], this rank's rows.
        rows: int64 [N], rows of the pack, the same on every rank. Their values are read on the host.

    Returns:
        [N, ...].

    Raises:
        TypeError, ValueError: rows that the pack does not have, another number of local rows, a mesh of other degrees.
        PeerError: a rank died or stalled (gloo).
    """
    here = place(plan, mesh)
    check_tensor("rows", rows, dims=(1,), dtypes=(torch.int64,))
    if x.shape[0] != plan.local_rows(here[0]):
        raise ValueError(f"x must have the {plan.local_rows(here[0])} rows of this rank, got {x.shape[0]}")
    return rows_at_op(x.detach(), rows, plan.encoded, ranks_of(mesh).number)


@torch.compiler.disable
def gather_rows(x: Tensor, counts: Sequence[int], plan: SequencePlan, mesh: DeviceMesh) -> Tensor:
    """Lists of any lengths on every rank: those of all ranks back to back, ring-major. No gradient. A collective.

    Args:
        x: [counts of this rank, ...].
        counts: rows of each of ring * ulysses ranks, the same on every rank.

    Raises:
        ValueError: counts that do not fit the plan or x. PeerError: a rank died or stalled (gloo).
    """
    here, size = place(plan, mesh), plan.ring * plan.ulysses
    if len(counts) != size or x.shape[0] != counts[here[0] * plan.ulysses + here[1]]:
        raise ValueError(f"counts must hold the rows of {size} ranks, of this one {x.shape[0]}, got {list(counts)}")
    return ranks_of(mesh).run("gather of rows", gather_lists(x.detach(), counts, plan.ring, plan.ulysses))


@torch.compiler.disable
def plan_after_drop(plan: SequencePlan, selection: Selection, *, slack: float = SLACK) -> SequencePlan:
    """The plan of the rows that a selection keeps. Pure, the same on every rank; reads the selection on the host.

    Ring ranks keep the rows that they hold where rows and attention area of the fullest rank then exceed the mean by at
    most `slack`, or by no more than they would anew. Else the pack is cut anew, by the plan's arrangement.

    Args:
        plan: of the rows that the selection was made of.
        selection: by `select_tokens`, the same on every rank; without `capacity`.
        slack: 0 always cuts anew where that is more even, inf never.

    Raises:
        TypeError, ValueError: what is no such selection, or a striped plan, which no drop leaves striped.
    """
    _check_selection(selection, plan)
    check_choice("arrangement of plan", plan.arrangement, tuple(ARRANGEMENTS))
    if not selection.layout.is_on_host:
        raise ValueError("selection must have lengths that the host knows, got one with a capacity")
    return _plan_after_drop(plan, selection.layout, _on_host(selection), slack)


@lru_cache(maxsize=_KEPT)
def _plan_after_drop(plan: SequencePlan, layout: VarlenLayout, inverse: bytes, slack: float) -> SequencePlan:
    kept_before = pad((_numbers(inverse) >= 0).cumsum(0), (1, 0))

    def left(runs: tuple[range, ...]) -> tuple[range, ...]:
        # Kept rows close up: a range of rows becomes a range of those that are left.
        parts = (range(int(kept_before[run.start]), int(kept_before[run.stop])) for run in runs)
        return tuple(part for part in parts if len(part))

    shards = tuple(left(runs) for runs in plan.shards)
    stay = SequencePlan(
        layout, plan.ring, plan.ulysses, plan.num_heads, plan.num_kv_heads, plan.head_dim, plan.arrangement,
        plan.transport, plan.causal, shards,
    )  # fmt: skip
    if plan.ring == 1 or _excess(stay) <= slack:
        return stay
    anew = plan_sequence(
        layout,
        ring=plan.ring,
        ulysses=plan.ulysses,
        num_heads=plan.num_heads,
        num_kv_heads=plan.num_kv_heads,
        head_dim=plan.head_dim,
        arrangement=plan.arrangement,
        causal=plan.causal,
        transport=plan.transport,
    )
    return anew if _excess(anew) < _excess(stay) else stay


@torch.compiler.disable
def drop_rows(
    tensors: Sequence[Tensor], selection: Selection, plan: SequencePlan, after: SequencePlan, mesh: DeviceMesh
) -> tuple[Tensor, ...]:
    """`drop_tokens` for a pack that lies on many ranks. Autograd. A collective.

    Args:
        tensors: [T_local, ...] each: this rank's rows by `plan`.
        selection: the same on every rank.
        after: `plan_after_drop(plan, selection)`.

    Returns:
        For each of them this rank's rows by `after`; zeros at padding.

    Raises:
        TypeError, ValueError: rows or devices that do not fit, plans that do not fit each other or the mesh.
        PeerError: a rank died or stalled (gloo), in the forward or the backward.
    """
    _check_selection(selection, plan)
    if not isinstance(after, SequencePlan):
        raise TypeError(f"after must be a SequencePlan, got {type(after).__name__}")
    if (plan.ring, plan.ulysses) != (after.ring, after.ulysses) or after.layout != selection.layout:
        raise ValueError(f"after must be the plan of the selection's {selection.layout}, got {after.layout}")
    return exchange_rows(tensors, _exchange_of_drop(plan, after, _on_host(selection)), mesh)


@lru_cache(maxsize=_KEPT)
def _exchange_of_drop(plan: SequencePlan, after: SequencePlan, inverse: bytes) -> RowExchange:
    kept = _numbers(inverse).long()
    before = [torch.where(rows >= 0, kept[rows.clamp(min=0)], -1) for rows in rows_of_ranks(plan)]
    return plan_exchange(before, rows_of_ranks(after), ring=plan.ring, ulysses=plan.ulysses)


def _on_host(selection: Selection) -> bytes:
    return selection.inverse.to("cpu", torch.int32).numpy().tobytes()


def _numbers(inverse: bytes) -> Tensor:
    return torch.from_numpy(np.frombuffer(inverse, dtype=np.int32).copy())


def _check_selection(selection: Selection, plan: SequencePlan) -> None:
    if not isinstance(plan, SequencePlan):
        raise TypeError(f"plan must be a SequencePlan, got {type(plan).__name__}")
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    total = plan.layout.num_tokens
    if selection.inverse.shape[0] != total:
        raise ValueError(f"selection must be one of the {total} rows of the plan, got {selection.inverse.shape[0]}")


def _excess(plan: SequencePlan) -> float:
    """By what the rows or the attention area of the fullest ring rank exceed the mean."""
    total = sum(plan.shard_rows)
    rows = max(plan.shard_rows) * plan.ring / total if total else 1.0
    return max(rows, plan.stats().imbalance) - 1
