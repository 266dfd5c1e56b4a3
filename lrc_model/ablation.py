# SPDX-License-Identifier: Apache-2.0
"""What a prefill is compared with: a model in, the same model with one of our parts in its public form out, and its
waterfall or why it has none."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import use_backend
from lrc_kernels.tome import compress_clips
from lrc_model.config import LRCConfig
from lrc_model.connector import Connector
from lrc_model.model import LRCModel
from lrc_model.waterfall import Waterfall, run_prefill


class _PublishedMerge(Connector):
    """The public loop: it merges features in every iteration and in their own dtype, after a copy for the shuffle."""

    def compress(self, tokens: Tensor) -> Tensor:
        side, s = self.layout.grid[0], self.layout.shuffle
        patches = tokens[:, self.layout.prefix :].unflatten(1, (side // s, s, side // s, s))
        clips = patches.permute(0, 1, 3, 2, 4, 5).reshape(-1, self.layout.tokens_per_clip, tokens.shape[-1] * s * s)
        with use_backend("reference"):
            merged = compress_clips(clips, self.target, self.config.num_metric_heads, precision="eager_bf16")
        assert isinstance(merged, Tensor)
        return merged


def _with(model: LRCModel, config: LRCConfig, connector: type[Connector] = Connector) -> LRCModel:
    """The same weights under another configuration."""
    dtype = next(model.parameters()).dtype
    bridge = connector.empty(config, dtype=dtype)
    bridge.load_state_dict(model.connector.state_dict(), assign=True)
    return LRCModel(config, model.vision_model, bridge, model.language_model).eval()


def _published_merge(model: LRCModel) -> tuple[LRCModel, dict[str, Any]]:
    return _with(model, model.config, _PublishedMerge), {}


def _no_merge(model: LRCModel) -> tuple[LRCModel, dict[str, Any]]:
    return _with(model, model.config.override({"tokens_per_frame": model.config.frame_tokens})), {}


def _no_dropout(model: LRCModel) -> tuple[LRCModel, dict[str, Any]]:
    return _with(model, model.config.override({"dropout": None})), {}


def _one_shot(model: LRCModel) -> tuple[LRCModel, dict[str, Any]]:
    return model, {"chunk": 2**31, "chunk_clips": 2**31}


def _eager(model: LRCModel) -> tuple[LRCModel, dict[str, Any]]:
    return model, {"backend": "reference"}


ABLATIONS: dict[str, Callable[[LRCModel], tuple[LRCModel, dict[str, Any]]]] = {
    "published merge": _published_merge,
    "no token dropout": _no_dropout,
    "one shot": _one_shot,
    "eager PyTorch": _eager,
    "no merging": _no_merge,
}


def measured_prefill(model: LRCModel, num_frames: int, **options: Any) -> Waterfall:
    """`run_prefill` after one clip to warm up: what a first call loads and compiles belongs to no stage."""
    run_prefill(model, model.config.connector.clip_frames, **options)
    return run_prefill(model, num_frames, **options)


def ablate(model: LRCModel, num_frames: int, **options: Any) -> Iterator[tuple[str, Waterfall | str]]:
    """(name, waterfall) of each public form, or (name, why it has none): out of memory, or nothing to replace."""
    for name, form in ABLATIONS.items():
        if name == "no token dropout" and model.config.dropout is None:
            yield name, "this configuration drops nothing"
            continue
        if "merg" in name and not model.config.merges:
            yield name, "this configuration merges nothing"
            continue
        changed, extra = form(copy.copy(model))
        backend = extra.pop("backend", None)
        try:
            with use_backend(backend) if backend else _nothing():
                yield name, measured_prefill(changed, num_frames, **{**options, **extra})
        except (torch.OutOfMemoryError, MemoryError) as error:
            yield name, f"out of memory: {str(error).splitlines()[0]}"
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


@contextmanager
def _nothing() -> Iterator[None]:
    yield
