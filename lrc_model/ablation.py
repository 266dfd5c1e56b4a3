# SPDX-License-Identifier: Apache-2.0
"""What a prefill is compared with: a model in, the same model with one of our parts in its public form out, and its
waterfall or why it has none."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import use_backend
from lrc_kernels.checks import check_choice
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


def _why_not(model: LRCModel, name: str) -> str | None:
    if name == "no token dropout" and model.config.dropout is None:
        return "this configuration drops nothing"
    if name in ("published merge", "no merging") and not model.config.merges:
        return "this configuration merges nothing"
    return None


def run_form(model: LRCModel, name: str, num_frames: int, **options: Any) -> Waterfall | str:
    """The waterfall of "ours" or of a public form, or why it has none: out of memory, or nothing to replace.

    Raises:
        ValueError: an unknown form, or as `run_prefill`.
    """
    check_choice("name", name, ("ours", *ABLATIONS))
    if (reason := _why_not(model, name)) is not None:
        return reason
    changed, extra = ABLATIONS[name](model) if name in ABLATIONS else (model, {})
    backend = extra.pop("backend", None)
    try:
        with use_backend(backend) if backend else _nothing():
            return measured_prefill(changed, num_frames, **{**options, **extra})
    except (torch.OutOfMemoryError, MemoryError, RuntimeError) as error:
        # torch's CPU allocator has no error class of its own.
        if isinstance(error, RuntimeError) and not _is_out_of_memory(error):
            raise
        return f"out of memory: {str(error).splitlines()[0]}"
    finally:
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def memory_curve(model: LRCModel, most_frames: int, **options: Any) -> dict[str, list[tuple[int, int]]]:
    """form -> (frames, peak bytes) for 64, 128, ... frames up to `most_frames`, until the form runs out of memory."""
    curve: dict[str, list[tuple[int, int]]] = {}
    for name in ("ours", *ABLATIONS):
        frames = min(64, most_frames)
        while isinstance(fall := run_form(model, name, frames, **options), Waterfall):
            curve.setdefault(name, []).append((fall.num_frames, fall.peak))
            if frames == most_frames:
                break
            frames = min(2 * frames, most_frames)
    return curve


def _is_out_of_memory(error: RuntimeError) -> bool:
    return isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error)


@contextmanager
def _nothing() -> Iterator[None]:
    yield
