# SPDX-License-Identifier: Apache-2.0
"""LRCModel over a pack that lies on many ranks: a PackedBatch and a mesh in, this rank's rows and what the model asks
about the others out. The model itself does not change.

Each rank encodes its own clips; the merged features go to the ranks that hold their rows. Every rank knows words,
targets and positions of the whole pack (30 bytes a row), so that all make the same selection from the same scores.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any, TypeVar, cast

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.utils.checkpoint import create_selective_checkpoint_contexts

from lrc_kernels.layout import VarlenLayout
from lrc_kernels.packing import PackedBatch
from lrc_kernels.sequence_parallel import (
    CHECKPOINT_OPS,
    SequencePlan,
    degree_of,
    drop_rows,
    exchange_rows,
    gather_rows,
    place,
    plan_after_drop,
    plan_exchange,
    plan_sequence,
    rows_at,
    rows_of_ranks,
    sequence_parallel_attention,
    sequence_parallel_decode_attention,
    sequence_parallel_scores,
    unshard,
)
from lrc_kernels.token_dropout import Selection
from lrc_model.cache import KVCache
from lrc_model.config import TextConfig
from lrc_model.language import Placement
from lrc_model.losses import IGNORE_INDEX

T = TypeVar("T")


class ShardedCache(KVCache):
    """The keys and values of the rows on this rank, layer by layer as prompts pass; new rows are dealt to the ranks in
    turn, and each sends only its part of the attention.

    Args:
        num_layers: decoder layers.
        mesh: where the rows lie.
        max_new_tokens: room for so many new rows of each sequence, all ranks together.
    """

    def __init__(self, num_layers: int, mesh: DeviceMesh, max_new_tokens: int):
        super().__init__(num_layers)
        self.mesh, self.size = mesh, degree_of(mesh, "ring") * degree_of(mesh, "ulysses")
        self.room = -(-max_new_tokens // self.size)
        self.rank = 0
        self._seen: list[list[int]] = []

    @torch.compiler.disable
    def fill(self, k: Tensor, v: Tensor, plan: SequencePlan, here: tuple[int, int]) -> None:
        """The keys and values [T_local, Hkv, K] of all prompts in the next layer, whose rows lie as `plan` says."""
        layer, self.rank = len(self._seen), here[0] * plan.ulysses + here[1]
        while self.num_sequences < plan.layout.num_sequences:
            self.add_sequence()
        # Rows of a rank ascend, those of padding come last.
        index = plan.local_indices(*here)
        starts = torch.tensor([0, *plan.layout.lengths]).cumsum(0)
        bounds = torch.searchsorted(index[index >= 0], starts).tolist()
        for sequence, (start, end) in enumerate(pairwise(bounds)):
            self.reserve(layer, sequence, end - start + self.room, k)
            self.append(layer, sequence, k[start:end], v[start:end])
        self._seen.append(list(plan.layout.lengths))

    def seen(self, layer: int, sequence: int) -> int:
        return self._seen[layer][sequence]

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        held = []
        for sequence, seen in enumerate(self._seen[layer]):
            if seen % self.size == self.rank:
                self.append(layer, sequence, k[sequence : sequence + 1], v[sequence : sequence + 1])
            self._seen[layer][sequence] += 1
            held.append(self.rows(layer, sequence, self.length(layer, sequence)))
        keys, values = zip(*held, strict=True)
        return sequence_parallel_decode_attention(q, keys, values, self.mesh)


@dataclass(frozen=True)
class ShardedPlacement(Placement):
    """The rows of a plan on a mesh; what a drop leaves has a plan of its own. A cache gets the keys of each layer."""

    plan: SequencePlan
    mesh: DeviceMesh
    here: tuple[int, int]
    grad_wire: torch.dtype | None = None
    cache: ShardedCache | None = None

    def checkpoint_options(self, drops: bool) -> Mapping[str, Any]:
        """Attention keeps (out, lse), and a drop its scores, its selection and the rows that arrive, so that a layer
        that is computed again sends nothing again."""
        return {"context_fn": partial(create_selective_checkpoint_contexts, list(CHECKPOINT_OPS))}

    def local(self, x: Tensor, fill: float = 0) -> Tensor:
        index = self.plan.local_indices(*self.here).to(x.device)
        rows = x[index.clamp(min=0)]
        return rows.masked_fill((index < 0).view(-1, *[1] * (x.dim() - 1)), fill)

    def rows_at(self, x: Tensor, rows: Tensor) -> Tensor:
        return rows_at(x, rows, self.plan, self.mesh)

    def attend(self, q: Tensor, k: Tensor, v: Tensor, layout: VarlenLayout) -> Tensor:
        if self.cache is not None:
            self.cache.fill(k, v, self.plan, self.here)
        return cast(Tensor, sequence_parallel_attention(q, k, v, self.plan, self.mesh, grad_wire=self.grad_wire))

    def scores(self, q: Tensor, k: Tensor, layout: VarlenLayout, sequence: Tensor, position: Tensor) -> Tensor:
        return sequence_parallel_scores(q, k, self.plan, self.mesh, query_position=position)

    def drop(self, tensors: tuple[Tensor, ...], selection: Selection) -> tuple[tuple[Tensor, ...], Placement]:
        after = plan_after_drop(self.plan, selection)
        return drop_rows(tensors, selection, self.plan, after, self.mesh), replace(self, plan=after)

    @torch.compiler.disable
    def run_drop(self, step: Callable[..., T], *args: Any) -> T:
        # It plans on the host and communicates: one break in a compiled layer instead of one at each call.
        return step(*args)

    def place_visual(self, x: Tensor, tokens: Tensor, batch: PackedBatch) -> Tensor:
        if tokens.shape[0] != len(batch.visual_index):
            raise ValueError(
                f"tokens must hold one row per visual token of this rank's clips ({len(batch.visual_index)}), got "
                f"{tokens.shape[0]}: build the prompt with the frames that are encoded, padding included"
            )
        held = self._visual_rows(batch)
        visual = torch.zeros(self.plan.layout.num_tokens, dtype=torch.bool)
        visual[torch.cat(held)] = True
        ranks = rows_of_ranks(self.plan)
        wanted = [torch.where((rows >= 0) & visual[rows.clamp(min=0)], rows, -1) for rows in ranks]
        exchange = plan_exchange(held, wanted, ring=self.plan.ring, ulysses=self.plan.ulysses)
        (arrived,) = exchange_rows((tokens.to(x.dtype),), exchange, self.mesh)
        here = wanted[self.here[0] * self.plan.ulysses + self.here[1]] >= 0
        return torch.where(here.to(x.device)[:, None], arrived, x)

    def agree(self, words: list[int]) -> list[int]:
        """The words of the first rank on every rank: where ranks round differently they would go on apart."""
        mine = torch.tensor(words, device=self.mesh.device_type)
        return gather_rows(mine, [len(words)] * self._size, self.plan, self.mesh)[: len(words)].tolist()

    def num_targets(self, targets: Tensor, of_pack: int) -> int:
        # Which rank holds a target changes with a drop, so the host has to ask.
        return int((targets != IGNORE_INDEX).sum())

    def _visual_rows(self, batch: PackedBatch) -> list[Tensor]:
        """Rows of the pack that each rank's clips are for, on the host; all ranks see the same and raise alike."""
        pack = self.plan.layout.lengths, self.plan.shards, batch.sample_ids.tolist()
        digest = hashlib.sha256(repr(pack).encode()).digest()
        own = torch.tensor([int.from_bytes(digest[:8], "big", signed=True), len(batch.visual_index)])
        facts = gather_rows(own[None].to(batch.visual_index.device), [1] * self._size, self.plan, self.mesh).tolist()
        if len({plan for plan, _ in facts}) > 1:
            raise ValueError(
                "batch must be the same pack on all ranks of a sequence-parallel group, got different ones"
            )
        counts = [count for _, count in facts]
        held = gather_rows(batch.visual_index, counts, self.plan, self.mesh).cpu()
        rows, count = held.unique(return_counts=True)
        if len(rows) != len(held):
            raise ValueError(f"clips must be on one rank each, got row {int(rows[count > 1][0])} on more than one")
        if len(rows) < sum(batch.num_droppable):
            raise ValueError(
                f"clips must hold all clips of the pack, all ranks together, got {len(rows)} visual tokens of at least "
                f"{sum(batch.num_droppable)}"
            )
        return list(held.split(counts))

    @property
    def _size(self) -> int:
        return self.plan.ring * self.plan.ulysses


class SequenceParallel:
    """How `LRCModel.forward(batch, parallel=...)` runs over ring x ulysses ranks.

    >>> parallel = SequenceParallel(model.config.text, mesh)  # doctest: +SKIP
    >>> loss = model(batch, parallel=parallel).loss
    >>> loss.backward()
    >>> sum_gradients(model.parameters(), mesh)
    >>> total = sum_over_ranks(loss, mesh)

    Args:
        text: sizes of the language model.
        mesh: `make_mesh`, or one that has dimensions "ring" and "ulysses".
        arrangement, transport: of `plan_sequence`.
        grad_wire: dtype in which gradients of keys and values travel, as in `sequence_parallel_attention`.
    """

    def __init__(
        self,
        text: TextConfig,
        mesh: DeviceMesh,
        *,
        arrangement: str = "auto",
        transport: str = "auto",
        grad_wire: torch.dtype | None = None,
    ):
        if not isinstance(text, TextConfig):
            raise TypeError(f"text must be a TextConfig, got {type(text).__name__}")
        if not isinstance(mesh, DeviceMesh):
            raise TypeError(f"mesh must be a DeviceMesh, got {type(mesh).__name__}")
        self.text, self.mesh, self.grad_wire = text, mesh, grad_wire
        self.arrangement, self.transport = arrangement, transport

    def plan(self, layout: VarlenLayout) -> SequencePlan:
        """Where the rows of such a pack lie before the first drop: a pure function, the same on every rank."""
        return plan_sequence(
            layout,
            ring=degree_of(self.mesh, "ring"),
            ulysses=degree_of(self.mesh, "ulysses"),
            num_heads=self.text.num_heads,
            num_kv_heads=self.text.num_kv_heads,
            head_dim=self.text.head_dim,
            arrangement=self.arrangement,
            transport=self.transport,
        )

    def local_indices(self, layout: VarlenLayout) -> Tensor:
        """The rows of this rank: what `PackedLoader(local_indices=...)` and `PackedBatch.shard` take."""
        plan = self.plan(layout)
        return plan.local_indices(*place(plan, self.mesh))

    def open(self, batch: PackedBatch) -> tuple[PackedBatch, PackedBatch, ShardedPlacement]:
        """What all ranks know of a pack, this rank's rows and clips, and where the rows lie. A collective for a shard.

        Args:
            batch: the pack with the clips of this rank (`PackedLoader` with sp_size > 1), or with all, of which an
                equal share is encoded here; also the shard `batch.shard(local_indices(layout), clips)`.

        Raises:
            TypeError: no PackedBatch. ValueError: the shard of another plan, or M-RoPE positions.
        """
        if not isinstance(batch, PackedBatch):
            raise TypeError(f"batch must be a PackedBatch, got {type(batch).__name__}")
        if batch.position_ids.dim() != 1:
            raise ValueError(
                f"position_ids must have shape [T], got {list(batch.position_ids.shape)}: this is no M-RoPE model"
            )
        plan = self.plan(batch.layout)
        here = place(plan, self.mesh)
        index = plan.local_indices(*here).to(batch.input_ids.device)
        placement = ShardedPlacement(plan, self.mesh, here, self.grad_wire)
        if batch.rows is None:
            clips = self._share(batch, here) if batch.clips is None else None
            return batch, batch.shard(index, clips), placement
        if not torch.equal(batch.rows, index):
            raise ValueError(
                "batch must be the shard of this rank's rows (SequenceParallel.local_indices), got one of other rows"
            )
        if batch.clips is None:
            raise ValueError("batch must say which clips are this rank's, got a shard with clips=None")
        known = ("targets", "position_ids", "loss_weight", "droppable")
        # The words are not asked for: each rank embeds its own.
        fields: dict[str, Any] = {name: unshard(getattr(batch, name), plan, self.mesh) for name in known}
        num_targets = int((fields["targets"] != IGNORE_INDEX).sum())
        return replace(batch, **fields, num_targets=num_targets, rows=None), batch, placement

    def _share(self, batch: PackedBatch, here: tuple[int, int]) -> range:
        ring, ulysses = degree_of(self.mesh, "ring"), degree_of(self.mesh, "ulysses")
        rank, clips = here[0] * ulysses + here[1], batch.frames.shape[0] // batch.clip_frames
        return range(clips * rank // (ring * ulysses), clips * (rank + 1) // (ring * ulysses))
