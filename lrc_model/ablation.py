# SPDX-License-Identifier: Apache-2.0
"""What a prefill is compared with: a model in, the same model with one of our parts in its public form out, and its
waterfall or why it has none."""

from __future__ import annotations

import gc
import traceback
from collections.abc import Callable, Iterator
from contextlib import nullcontext, suppress
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import use_backend
from lrc_kernels.checks import check_choice
from lrc_kernels.tome import compress_clips
from lrc_model.config import LRCConfig
from lrc_model.connector import Connector
from lrc_model.generate import PREFILL_CHUNK
from lrc_model.model import LRCModel
from lrc_model.waterfall import Waterfall, run_prefill

WARM_UP_CLIPS = 4


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


def warm_up(model: LRCModel, num_frames: int, *, chunk: int, chunk_clips: int, **options: Any) -> None:
    """One chunk of clips and, in a quarter of the frames at most, one of rows: what a first call of such shapes loads
    and compiles belongs to no stage."""
    connector = model.config.connector
    clips = min(chunk_clips, WARM_UP_CLIPS) * connector.clip_frames
    rows = min(-(-min(chunk, PREFILL_CHUNK) // connector.tokens_per_frame), num_frames // 4)
    run_prefill(model, min(num_frames, max(clips, rows)), chunk=chunk, chunk_clips=chunk_clips, **options)


def _why_not(model: LRCModel, name: str) -> str | None:
    if name == "no token dropout" and model.config.dropout is None:
        return "this configuration drops nothing"
    if name in ("published merge", "no merging") and not model.config.merges:
        return "this configuration merges nothing"
    return None


def run_form(
    model: LRCModel,
    name: str,
    num_frames: int,
    *,
    warm: bool = True,
    chunk: int = PREFILL_CHUNK,
    chunk_clips: int = 4,
    **options: Any,
) -> Waterfall:
    """The waterfall of "ours" or of a public form; `error` says why it is not whole, such as out of memory.

    A fault of a backend or device ends this form alone: its traceback goes to standard error, and the figures up to
    there are returned.

    Args:
        warm: run a short prefill of the same shapes first.
        chunk, chunk_clips, options: of `run_prefill`.

    Raises:
        ValueError: an unknown form, or as `run_prefill`.
    """
    check_choice("name", name, ("ours", *ABLATIONS))
    fall = Waterfall()
    if (reason := _why_not(model, name)) is not None:
        fall.error = reason
        return fall
    changed, extra = ABLATIONS[name](model) if name in ABLATIONS else (model, {})
    backend = extra.pop("backend", None)
    options = {"chunk": chunk, "chunk_clips": chunk_clips, **options, **extra}
    try:
        with use_backend(backend) if backend else nullcontext():
            if warm:
                # What fails here fails below too, where the stages before it are kept.
                with suppress(RuntimeError, MemoryError):
                    warm_up(changed, num_frames, **options)
            run_prefill(changed, num_frames, fall=fall, **options)
    except (ValueError, TypeError, OSError):
        raise
    except Exception as error:
        what = (str(error) or "no message").splitlines()[0]
        fall.failed = not _is_out_of_memory(error)
        fall.error = f"failed: {type(error).__name__}: {what}" if fall.failed else f"out of memory: {what}"
        if fall.failed:
            traceback.print_exc()
    finally:
        _free()
    return fall


def memory_curve(model: LRCModel, most_frames: int, **options: Any) -> Iterator[tuple[str, list[tuple[int, int]]]]:
    """Each form and its (frames, peak bytes) for 64, 128, ... frames up to `most_frames`, until it runs out of memory.

    Args:
        options: of `run_prefill`.
    """
    for name in ("ours", *ABLATIONS):
        frames, points = min(64, most_frames), []
        while not (fall := run_form(model, name, frames, warm=False, **options)).error:
            points.append((fall.num_frames, fall.peak))
            if frames == most_frames:
                break
            frames = min(2 * frames, most_frames)
        if points:
            yield name, points


def _free() -> None:
    """Give back what a form held, whose traceback may have tied it up in cycles."""
    gc.collect()
    if torch.cuda.is_available():
        # A kernel's fault leaves a device on which nothing works, not even this.
        with suppress(RuntimeError):
            torch.cuda.empty_cache()


def _is_out_of_memory(error: Exception) -> bool:
    # torch's CPU allocator has no error class of its own.
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
