# SPDX-License-Identifier: Apache-2.0
"""From frames to tokens of the LLM: ViT -> pixel shuffle -> token merging -> MLP, a few clips at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import cast

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from lrc_kernels.checks import check_choice, check_device, check_int
from lrc_kernels.tome import TokenLayout, compress_clips
from lrc_model.config import LRCConfig
from lrc_model.vision import VisionEncoder

REMAINDERS = ("error", "repeat")


def pad_frames(frames: Tensor, clip_frames: int, *, remainder: str = "error") -> tuple[Tensor, int]:
    """Whole clips from any number of frames.

    Args:
        frames: [F, ...].
        remainder: what happens to frames that fill no clip: "error", or "repeat" the last frame.

    Returns:
        Frames of whole clips, and how many of them are repeats (0 returns `frames` itself).

    Raises:
        ValueError: no frames, or F % clip_frames != 0 under "error".
    """
    missing = _missing_frames(frames.shape[0], clip_frames, remainder)
    if missing == 0:
        return frames, 0
    return torch.cat([frames, frames[-1:].expand(missing, *frames.shape[1:])]), missing


class Connector(nn.Module):
    """ViT tokens [F, 1 + h*w, Dv] -> tokens of the LLM [F / clip_frames, clip_frames * tokens_per_frame, D].

    The pixel shuffle is index arithmetic inside the merge; then LayerNorm, linear, GELU, linear. Where the
    configuration merges nothing this is InternVL's connector. Parameters are named as in transformers'
    `InternVLMultiModalProjector`. Source: InternVideo2.5 section 3.1; the release merges before the MLP.

    Args:
        config: of the whole model.
        seed: the weights are a function of (config, seed) alone; the global random state is neither read nor moved.
        dtype: of weights and output.
    """

    def __init__(self, config: LRCConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config.connector
        side = config.vision.image_size // config.vision.patch_size
        self.layout = TokenLayout(config.connector.clip_frames, (side, side), config.connector.shuffle, prefix=1)
        self.target = config.connector.clip_frames * config.connector.tokens_per_frame
        width, out = config.token_width, config.text.hidden_size
        with torch.random.fork_rng(devices=[]):
            torch.default_generator.manual_seed(seed)
            self.layer_norm = nn.LayerNorm(width, dtype=dtype)
            self.linear_1 = nn.Linear(width, out).to(dtype)
            self.linear_2 = nn.Linear(out, out).to(dtype)

    @classmethod
    def empty(cls, config: LRCConfig, *, dtype: torch.dtype = torch.float32) -> Connector:
        """The connector on the meta device, for `load_state_dict(..., assign=True)`."""
        with torch.device("meta"):
            return cls(config, dtype=dtype)

    def forward(self, tokens: Tensor) -> Tensor:
        """See the class; ValueError where the tokens do not fit the layout or are no whole clips."""
        return self.project(self.compress(tokens))

    def project(self, compressed: Tensor) -> Tensor:
        """The MLP alone: [B, tokens, shuffle^2 * Dv] -> [B, tokens, D]."""
        return self.linear_2(nn.functional.gelu(self.linear_1(self.layer_norm(compressed))))

    def compress(self, tokens: Tensor) -> Tensor:
        """Pixel shuffle and merge alone: [F, 1 + h*w, Dv] -> [B, tokens, shuffle^2 * Dv]."""
        if self.target == self.layout.tokens_per_clip:
            return _pixel_shuffle(tokens, self.layout)
        merged = compress_clips(tokens, self.target, self.config.num_metric_heads, layout=self.layout)
        return cast(Tensor, merged)


@dataclass(frozen=True)
class ClipTokens:
    """What `encode_clips` returns.

    Attributes:
        tokens: [B, clip_frames * tokens_per_frame, D].
        num_frames: frames that went in.
        num_padded: repeats of the last frame behind them.
    """

    tokens: Tensor
    num_frames: int
    num_padded: int


def encode_clips(
    vision: VisionEncoder,
    connector: Connector,
    frames: Tensor,
    *,
    chunk_clips: int = 4,
    remainder: str = "error",
    progress: Callable[[int, int], None] | None = None,
) -> ClipTokens:
    """Encode a video in O(chunk_clips) working memory: a chunk is recomputed in backward, only its output is kept.

    Under a frozen ViT its merged tokens are kept instead, and only the MLP is recomputed.

    Args:
        frames: uint8 RGB [F, 3, H, W] on any device; chunks move to the weights' device by themselves.
        chunk_clips: clips that are in flight at a time.
        remainder: see `pad_frames`.
        progress: called as progress(clips done, B) after each chunk.

    Raises:
        TypeError, ValueError: what `pad_frames` and `VisionEncoder` refuse; chunk_clips < 1.
    """
    if not isinstance(frames, Tensor):
        raise TypeError(f"frames must be a tensor, got {type(frames).__name__}")
    check_int("chunk_clips", chunk_clips, minimum=1)
    weight, clip = connector.linear_1.weight, connector.config.clip_frames
    _check_weights(vision, weight)
    whole, step = frames.shape[0] // clip * clip, chunk_clips * clip
    chunks = [frames[start : min(start + step, whole)] for start in range(0, whole, step)]
    num_padded = _missing_frames(frames.shape[0], clip, remainder)
    if num_padded:
        # Only the last clip is copied, not the video.
        chunks.append(pad_frames(frames[whole:], clip, remainder=remainder)[0])

    def encode(chunk: Tensor) -> Tensor:
        return connector.compress(vision(chunk.to(weight.device, non_blocking=True), chunk_frames=chunk.shape[0]))

    trains_vision, trains_connector = (
        torch.is_grad_enabled() and any(p.requires_grad for p in module.parameters()) for module in (vision, connector)
    )
    trains = trains_vision or trains_connector
    num_clips = (frames.shape[0] + num_padded) // clip
    tokens = weight.new_empty(0 if trains else num_clips, connector.target, weight.shape[0])
    outputs, done = [], 0
    for chunk in chunks:
        if trains_vision:
            output = _recomputed(lambda frames: connector.project(encode(frames)), chunk)
        elif trains_connector:
            output = _recomputed(connector.project, encode(chunk))
        else:
            output = connector.project(encode(chunk))
        # A slice assignment under autograd would copy the whole gradient once per chunk, hence the list.
        if trains:
            outputs.append(output)
        else:
            tokens[done : done + output.shape[0]] = output
        done += output.shape[0]
        if progress is not None:
            progress(done, num_clips)
    return ClipTokens(torch.cat(outputs) if trains else tokens, frames.shape[0], num_padded)


def place_visual_tokens(embeddings: Tensor, visual: Tensor, tokens: Tensor, *, num_visual_tokens: int) -> Tensor:
    """Put the connector's rows where the prompt has its placeholders. Autograd; does not synchronise.

    Args:
        embeddings: [T, D] of all tokens.
        visual: bool [T], True at placeholders.
        tokens: [..., D], the rows in order.
        num_visual_tokens: placeholders in `visual`, known on the host.

    Raises:
        ValueError: as many rows as placeholders are needed; both counts are named.
    """
    rows = tokens.reshape(-1, tokens.shape[-1])
    if rows.shape[0] != num_visual_tokens or rows.shape[1] != embeddings.shape[1]:
        raise ValueError(
            f"tokens must hold one row of width {embeddings.shape[1]} per placeholder, got {num_visual_tokens} "
            f"placeholders and {rows.shape[0]} rows of width {rows.shape[1]}: build the prompt with the frames that "
            "are encoded, padding included"
        )
    check_device("tokens", rows, embeddings)
    return embeddings.masked_scatter(visual.unsqueeze(-1), rows.to(embeddings.dtype))


def _recomputed(function: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    return cast(Tensor, checkpoint(function, x, use_reentrant=False))


def _missing_frames(num_frames: int, clip_frames: int, remainder: str) -> int:
    check_int("clip_frames", clip_frames, minimum=1)
    check_choice("remainder", remainder, REMAINDERS)
    if num_frames == 0:
        raise ValueError("frames must hold at least one frame, got 0: check that the video could be decoded")
    missing = -num_frames % clip_frames
    if missing and remainder == "error":
        raise ValueError(
            f"frames must be whole clips of clip_frames = {clip_frames}, got {num_frames}: sample "
            f"{num_frames + missing} frames, or pass remainder='repeat' to repeat the last frame {missing} times"
        )
    return missing


def _pixel_shuffle(tokens: Tensor, layout: TokenLayout) -> Tensor:
    clips, (h, w), s = layout.num_clips(tokens), layout.grid, layout.shuffle
    # di before dj, both before the channels: the order in which TokenLayout concatenates patches.
    patches = tokens[:, layout.prefix :].reshape(-1, h // s, s, w // s, s, tokens.shape[-1])
    shuffled = patches.permute(0, 1, 3, 2, 4, 5)
    return shuffled.reshape(clips, layout.tokens_per_clip, s * s * tokens.shape[-1])


def _check_weights(vision: VisionEncoder, weight: Tensor) -> None:
    seen = next(vision.parameters())
    check_device("connector", weight, seen)
    if seen.dtype != weight.dtype:
        raise ValueError(
            f"vision and connector must have one dtype, got {seen.dtype} and {weight.dtype}: call "
            f"model.to({seen.dtype})"
        )
