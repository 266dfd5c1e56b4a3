# SPDX-License-Identifier: Apache-2.0
"""LRCModel: frames -> ViT -> token merging -> connector -> language model with token dropout -> loss, or new words.

In: a PackedBatch. Out: an Output with the loss, or the ids of generated words. This file reads as the data flows.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Collection
from dataclasses import dataclass, field, replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from lrc_kernels.checks import check_int
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.packing import PackedBatch
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.cache import KVCache
from lrc_model.checkpoint import read_config, read_weights, save_weights
from lrc_model.config import LRCConfig
from lrc_model.connector import Connector, encode_clips
from lrc_model.generate import PREFILL_CHUNK, decode_step, prefill
from lrc_model.language import ONE_DEVICE, Drop, LanguageModel, PackedRows, Placement
from lrc_model.losses import IGNORE_INDEX, chunked_cross_entropy
from lrc_model.parallel import SequenceParallel, ShardedCache
from lrc_model.tokenizer import Tokenizer, load_tokenizer
from lrc_model.vision import VisionEncoder

INITIALIZER_RANGE = 0.02
LAYER_SCALE = 0.1


@dataclass(frozen=True)
class Output:
    """What `LRCModel.forward` returns.

    Attributes:
        loss: fp32 scalar, sum over rows of loss_weight * cross-entropy.
        loss_parts: each term of the loss, detached, by name.
        hidden: [T', D] normalised hidden states of the rows that token dropout left; of those on this rank.
        rows: what travels with them, of the whole pack; `rows.layout` says whose they are, `rows.place` where they lie.
        logits: fp32 [T', V] with `return_logits`, else None.
    """

    loss: Tensor
    loss_parts: dict[str, Tensor] = field(default_factory=dict)
    hidden: Tensor | None = None
    rows: PackedRows | None = None
    logits: Tensor | None = None


class LRCModel(nn.Module):
    """InternVideo2.5: InternViT, connector with token merging, InternLM2.5 with token dropout.

    Args:
        config: all sizes.
        vision_model, connector, language_model: the parts, of one dtype on one device.
    """

    def __init__(
        self, config: LRCConfig, vision_model: VisionEncoder, connector: Connector, language_model: LanguageModel
    ):
        super().__init__()
        self.config = config
        self.vision_model = vision_model
        self.connector = connector
        self.language_model = language_model
        self.schedule = config.dropout or DropoutSchedule.none()
        self.checkpoint: Path | None = None
        self._tokenizer: Tokenizer | None = None

    @classmethod
    def from_config(
        cls,
        config: LRCConfig,
        *,
        seed: int = 0,
        device: torch.device | str = "cpu",
        dtype: torch.dtype = torch.float32,
    ) -> LRCModel:
        """A model with random weights, drawn on its device, so that 8 billion of them take seconds on a GPU."""
        device = torch.device(device)
        connector, language = Connector.empty(config, dtype=dtype), LanguageModel.empty(config.text, dtype=dtype)
        drawn: list[nn.Module] = [connector, language]
        if device.type == "cpu":
            vision = VisionEncoder(config.vision, seed=seed, dtype=dtype)
        else:
            vision = VisionEncoder.empty(config.vision, dtype=dtype)
            drawn.append(vision)
        generator = torch.Generator(device).manual_seed(seed)
        for module in drawn:
            draw_weights(module.to_empty(device=device), generator)
        return cls(config, vision, connector, language).eval()

    @classmethod
    def from_pretrained(
        cls,
        path: str | Path,
        *,
        device: torch.device | str = "cpu",
        dtype: torch.dtype | None = None,
        config: LRCConfig | None = None,
    ) -> LRCModel:
        """A model from a checkpoint folder: our own, the public InternVideo2.5 shards, or transformers' layout.

        Args:
            dtype: cast to it; None keeps that of the checkpoint.
            config: instead of the checkpoint's, e.g. with token dropout.

        Raises:
            FileNotFoundError, ValueError: naming the file, or the tensor that is missing, unknown or misshapen.
        """
        config = config or read_config(path)
        state, report = read_weights(path, config, dtype=dtype, device=device)
        dtype = report.dtype
        model = cls(
            config,
            VisionEncoder.empty(config.vision, dtype=dtype),
            Connector.empty(config, dtype=dtype),
            LanguageModel.empty(config.text, dtype=dtype),
        )
        model.load_state_dict(state, assign=True)
        model.checkpoint = Path(path)
        return model.eval()

    def save_pretrained(self, path: str | Path) -> None:
        """Write config.json and safetensors files to a folder; `from_pretrained` reads them back.

        Raises:
            ValueError: parameters of mixed dtypes.
        """
        save_weights(path, self.config, self.state_dict())

    @property
    def tokenizer(self) -> Tokenizer:
        """The tokenizer of the configuration; the one of InternLM2 is read from the checkpoint's folder."""
        if self._tokenizer is None:
            self._tokenizer = load_tokenizer(self.config.tokenizer, self.checkpoint)
        return self._tokenizer

    def embed(self, batch: PackedBatch, *, chunk_clips: int = 4, place: Placement = ONE_DEVICE) -> Tensor:
        """[T, D]: the embeddings of all words, with the merged features of the clips at the visual tokens. Autograd."""
        x = self.language_model.embed(batch.input_ids)
        if len(batch.visual_index):
            tokens = encode_clips(self.vision_model, self.connector, batch.frames, chunk_clips=chunk_clips).tokens
            return place.place_visual(x, tokens.flatten(0, 1), batch)
        # Ranks without frames take part in the gradient of those that have some.
        trained = (p.requires_grad for part in (self.vision_model, self.connector) for p in part.parameters())
        return place.place_visual(x, x.new_empty(0, x.shape[1], requires_grad=any(trained)), batch)

    def forward(
        self,
        batch: PackedBatch,
        *,
        return_logits: bool = False,
        seed: int = 0,
        recompute: bool = False,
        chunk_clips: int = 4,
        parallel: SequenceParallel | None = None,
    ) -> Output:
        """The loss of a pack, computed without the logits of all its rows. Autograd.

        Args:
            batch: on the model's device.
            return_logits: also compute the logits of all rows that are left; for tests and short packs.
            seed: of random drops; the same seed drops the same tokens of a sample wherever it is packed.
            recompute: keep only the inputs of layers and clips, and compute the rest again in the backward. A layer
                that drops also keeps what it dropped, and then one backward is possible, even with retain_graph.
            chunk_clips: clips that pass the vision encoder at a time, see `encode_clips`; more are faster where a clip
                is small.
            parallel: the pack lies on many ranks, each of which calls this; loss, hidden states and logits are those of
                the rows of this rank, and gradients have to be summed over ranks. See `SequenceParallel`.

        Raises:
            TypeError: no PackedBatch. ValueError: frames, visual tokens or lengths that do not fit each other, or the
                mesh. PeerError: another rank died or stalled (gloo).
        """
        if parallel is None:
            _check_batch(batch)
            whole, place = batch, ONE_DEVICE
        else:
            whole, batch, place = parallel.open(batch)
        rows = PackedRows.of(
            whole.layout,
            position_ids=whole.position_ids,
            droppable=whole.droppable,
            targets=whole.targets,
            loss_weight=whole.loss_weight,
            sequence_ids=whole.sample_ids,
            place=place,
        )
        drops = self.drops(whole.layout, whole.num_droppable, rows, seed)
        x = self.embed(batch, place=place, chunk_clips=chunk_clips)
        hidden, rows = self.language_model(x, rows, drops, recompute=recompute)
        assert rows.targets is not None and rows.loss_weight is not None
        targets, loss_weight = rows.place.local(rows.targets, IGNORE_INDEX), rows.place.local(rows.loss_weight)
        text_loss = chunked_cross_entropy(
            hidden,
            self.language_model.lm_head.weight,
            targets,
            loss_weight,
            num_targets=rows.place.num_targets(targets, whole.num_targets),
        )
        logits = self.language_model.logits(hidden) if return_logits else None
        return Output(text_loss, {"text": text_loss.detach()}, hidden, rows, logits)

    def drops(
        self, layout: VarlenLayout, num_droppable: tuple[int, ...], rows: PackedRows, seed: int
    ) -> tuple[Drop, ...]:
        """The drops of a pack, whose sizes the host decides. A Bernoulli drop reads which tokens are droppable."""
        given: dict[str, Any] = {}
        if "bernoulli" in self.schedule.kinds:
            assert rows.droppable is not None
            ids = None if rows.sequence_ids is None else rows.sequence_ids.cpu()
            given = {"droppable": rows.droppable.cpu(), "seed": seed, "sequence_ids": ids}
        budgets = self.schedule.plan(layout, num_droppable, **given)
        return tuple(Drop(budget, mode, seed) for budget, mode in zip(budgets, self.schedule.modes, strict=True))

    @torch.no_grad()
    def generate(
        self,
        batch: PackedBatch,
        *,
        max_new_tokens: int,
        use_cache: bool = True,
        stop_ids: Collection[int] = (),
        seed: int = 0,
        chunk: int = PREFILL_CHUNK,
        on_token: Callable[[list[int]], None] | None = None,
        parallel: SequenceParallel | None = None,
    ) -> list[Tensor]:
        """Greedy decoding of every sequence of a pack of prompts.

        Args:
            batch: prompts, on the model's device.
            max_new_tokens: at most so many words each.
            use_cache: False computes every word again from all words, with the same selection of visual tokens.
            stop_ids: words that end a sequence; they are not part of the result.
            chunk: rows of a prompt that are in flight at a time.
            on_token: called after each step with one new word per sequence, -1 for a sequence that has ended.
            parallel: the prompts lie on many ranks, each of which calls this and gets the same words. A rank keeps the
                keys of its own rows; all rows of a rank are in flight at a time, whatever `chunk` says.

        Returns:
            int64 ids of the new words of each sequence, on the CPU.

        Raises:
            TypeError: no PackedBatch. ValueError: an empty prompt, or no cache with `parallel`.
            RuntimeError: logits that are not finite, which no word can be chosen by. PeerError: another rank died or
                stalled (gloo).
        """
        if parallel is None:
            _check_batch(batch)
        else:
            for name, value, kind in (("parallel", parallel, SequenceParallel), ("batch", batch, PackedBatch)):
                if not isinstance(value, kind):
                    raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
            if not use_cache:
                raise ValueError("use_cache must be True with parallel, got False")
        check_int("max_new_tokens", max_new_tokens, minimum=0)
        check_int("chunk", chunk, minimum=1)
        stop_ids = frozenset(stop_ids)
        if min(batch.layout.lengths, default=0) == 0:
            raise ValueError(f"batch must hold prompts of at least one token, got lengths {batch.layout.lengths}")
        reader: _Reader
        if parallel is not None:
            reader = _ShardedReader(self, max_new_tokens, parallel)
        else:
            reader = _CachedReader(self, max_new_tokens, chunk) if use_cache else _Recomputer(self)
        hidden = reader.start(batch, seed)
        words: list[list[int]] = [[] for _ in range(batch.layout.num_sequences)]
        ended = [False] * len(words)
        for step in range(max_new_tokens):
            new = self._choose(hidden, reader)
            for index, word in enumerate(new):
                ended[index] = ended[index] or word in stop_ids
                if not ended[index]:
                    words[index].append(word)
            if on_token is not None:
                on_token([-1 if over else word for word, over in zip(new, ended, strict=True)])
            if all(ended) or step + 1 == max_new_tokens:
                break
            hidden = reader.step(self.language_model.embed(torch.tensor(new, device=hidden.device)))
        return [torch.tensor(sequence, dtype=torch.int64) for sequence in words]

    def _choose(self, hidden: Tensor, reader: _Reader) -> list[int]:
        logits = self.language_model.logits(hidden)
        best = reader.agree(torch.where(logits.isfinite().all(1), logits.argmax(1), -1).tolist())
        if -1 in best:
            raise RuntimeError(
                f"the logits of sequence {best.index(-1)} are not finite: check the weights and the dtype (fp16 "
                "overflows where bf16 does not)"
            )
        return best


@torch.no_grad()
def draw_weights(module: nn.Module, generator: torch.Generator) -> None:
    """Random weights in place, on the device where the parameters and the generator are, as transformers draws them."""
    for name, parameter in module.named_parameters():
        if "norm" in name:
            parameter.fill_(1.0 if name.endswith("weight") else 0.0)
        elif "lambda" in name:
            parameter.fill_(LAYER_SCALE)
        elif name.endswith("bias"):
            parameter.zero_()
        else:
            parameter.normal_(std=INITIALIZER_RANGE, generator=generator)


def _check_batch(batch: PackedBatch) -> None:
    if not isinstance(batch, PackedBatch):
        raise TypeError(f"batch must be a PackedBatch, got {type(batch).__name__}")
    if batch.rows is not None or batch.clips is not None:
        raise ValueError("batch must be a whole pack, got the shard of a sequence-parallel rank")
    if batch.position_ids.dim() != 1:
        raise ValueError(
            f"position_ids must have shape [T], got {list(batch.position_ids.shape)}: this is no M-RoPE model"
        )


def _prompts(batch: PackedBatch) -> list[tuple[slice, PackedRows]]:
    """Each prompt of a pack: where it lies, and its rows. Its last row asks the question and is never dropped."""
    offsets = [0, *torch.tensor(batch.layout.lengths).cumsum(0).tolist()]
    prompts = []
    for index, (start, end) in enumerate(pairwise(offsets)):
        droppable = batch.droppable[start:end].clone()
        droppable[-1] = False
        rows = PackedRows.of(
            VarlenLayout([end - start], batch.input_ids.device),
            position_ids=batch.position_ids[..., start:end],
            droppable=droppable,
            sequence_ids=batch.sample_ids[index : index + 1],
        )
        prompts.append((slice(start, end), rows))
    return prompts


def _drops_of(model: LRCModel, rows: PackedRows, seed: int) -> tuple[Drop, ...]:
    assert rows.droppable is not None
    return model.drops(rows.layout, (int(rows.droppable.sum()),), rows, seed)


class _Reader(ABC):
    """Reads prompts, then one row of each at a time, and gives the hidden states [S, D] that choose the next words."""

    model: LRCModel

    def start(self, batch: PackedBatch, seed: int) -> Tensor:
        x = self.model.embed(batch)
        return torch.cat([self.read(x[part], rows, seed) for part, rows in _prompts(batch)])

    @abstractmethod
    def read(self, x: Tensor, rows: PackedRows, seed: int) -> Tensor:
        """One prompt: its embeddings [T, D] and rows."""

    @abstractmethod
    def step(self, x: Tensor) -> Tensor:
        """One more word of each: its embeddings [S, D]."""

    def agree(self, words: list[int]) -> list[int]:
        """The words that all who read these prompts go on with."""
        return words


class _CachedReader(_Reader):
    """Prompts into a cache, then one row of each at a time."""

    def __init__(self, model: LRCModel, max_new_tokens: int, chunk: int):
        self.model, self.max_new_tokens, self.chunk = model, max_new_tokens, chunk
        self.cache = KVCache(model.config.text.num_layers)
        self.positions: list[Tensor] = []
        self.lengths: list[int] = []
        renumbers = model.schedule.positions == "renumber" and model.schedule.layers
        self.renumbered_from = model.schedule.layers[0] if renumbers else None

    def read(self, x: Tensor, rows: PackedRows, seed: int) -> Tensor:
        self.positions.append(rows.position_ids[-1:])
        self.lengths.append(rows.layout.num_tokens)
        drops = _drops_of(self.model, rows, seed)
        return prefill(
            self.model.language_model,
            x,
            rows,
            drops,
            self.cache,
            sequence=self.cache.add_sequence(),
            chunk=self.chunk,
            max_new_tokens=self.max_new_tokens,
        )

    def step(self, x: Tensor) -> Tensor:
        self.positions = [position + 1 for position in self.positions]
        return decode_step(
            self.model.language_model,
            x,
            self.cache,
            position=torch.cat(self.positions),
            prefill_length=torch.tensor(self.lengths, device=x.device),
            renumbered_from=self.renumbered_from,
        )


class _ShardedReader(_CachedReader):
    """All prompts at once, their rows on many ranks, each of which keeps the keys of its own."""

    def __init__(self, model: LRCModel, max_new_tokens: int, parallel: SequenceParallel):
        super().__init__(model, max_new_tokens, PREFILL_CHUNK)
        self.parallel = parallel
        self.cache: ShardedCache = ShardedCache(model.config.text.num_layers, parallel.mesh, max_new_tokens)

    def start(self, batch: PackedBatch, seed: int) -> Tensor:
        whole, batch, place = self.parallel.open(batch)
        self.place = replace(place, cache=self.cache)
        last = whole.layout.cu_seqlens[1:].long() - 1
        droppable = whole.droppable.index_fill(0, last.to(whole.droppable.device), False)
        rows = PackedRows.of(
            whole.layout,
            position_ids=whole.position_ids,
            droppable=droppable,
            sequence_ids=whole.sample_ids,
            place=self.place,
        )
        self.positions = list(whole.position_ids[last].split(1))
        self.lengths = list(whole.layout.lengths)
        counts = tuple(int(part.sum()) for part in droppable.cpu().split(self.lengths))
        x = self.model.embed(batch, place=self.place)
        hidden, rows = self.model.language_model(x, rows, self.model.drops(whole.layout, counts, rows, seed))
        return rows.place.rows_at(hidden, rows.layout.cu_seqlens[1:].long() - 1)

    def agree(self, words: list[int]) -> list[int]:
        return self.place.agree(words)


class _Recomputer(_Reader):
    """Every word again from all words; the last row of the prompt goes on selecting."""

    def __init__(self, model: LRCModel):
        self.model = model
        self.sequences: list[tuple[Tensor, PackedRows, int]] = []

    def read(self, x: Tensor, rows: PackedRows, seed: int) -> Tensor:
        self.sequences.append((x, rows, seed))
        return self._last(len(self.sequences) - 1)

    def step(self, x: Tensor) -> Tensor:
        for index, (before, rows, seed) in enumerate(self.sequences):
            self.sequences[index] = (torch.cat([before, x[index : index + 1]]), rows, seed)
        return torch.cat([self._last(index) for index in range(len(self.sequences))])

    def _last(self, index: int) -> Tensor:
        x, prompt, seed = self.sequences[index]
        total, length = x.shape[0], prompt.layout.num_tokens
        row = torch.arange(total, device=x.device)
        new = row[length:] - length
        assert prompt.droppable is not None
        rows = replace(
            PackedRows.of(VarlenLayout([total], x.device), sequence_ids=prompt.sequence_ids),
            position_ids=torch.cat([prompt.position_ids, prompt.position_ids[-1:] + 1 + new]),
            prefill_length=prompt.prefill_length,
            droppable=torch.cat([prompt.droppable, torch.zeros_like(new, dtype=torch.bool)]),
            targets=torch.where(row < length - 1, -100, 0),
        )
        hidden, _ = self.model.language_model(x, rows, _drops_of(self.model, rows, seed))
        return hidden[-1:]
