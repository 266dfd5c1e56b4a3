# SPDX-License-Identifier: Apache-2.0
"""A question about a video file, and the answer as it is written: video -> frames -> prompt -> words -> text."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch

from lrc_kernels.checks import check_int
from lrc_kernels.packing import PackedBatch, Sample, TemporalSampling, decode_frames, pack_samples, probe_video
from lrc_model.connector import pad_frames
from lrc_model.model import LRCModel
from lrc_model.templates import Turn, VideoSpan, encode_chat

MAX_NEW_TOKENS = 1024


def video_prompt(
    model: LRCModel,
    video: str | Path | None,
    question: str,
    *,
    history: Sequence[Turn] = (),
    num_frames: int | None = None,
    sampling: TemporalSampling | None = None,
) -> PackedBatch:
    """One prompt on the model's device: sampled frames of a video, earlier turns, and the question.

    Args:
        video: path of a video file, None for a question without one.
        history: earlier questions and answers; the video stands before the first question.
        num_frames: frames to sample, rounded up to whole clips by repeating the last; None = what `sampling` says.
        sampling: None = `TemporalSampling.release()`, as the released weights were trained.

    Raises:
        FileNotFoundError, ValueError: a video that cannot be read, no question.
    """
    if not question.strip():
        raise ValueError("question must hold some text, got none")
    frames, spans = None, []
    if video is not None:
        info = probe_video(video)
        sampling = sampling or TemporalSampling.release()
        count = sampling.num_frames(info.duration_s) if num_frames is None else num_frames
        size = model.config.vision.image_size
        decoded = decode_frames(video, sampling.timestamps(info.duration_s, count), size=(size, size))
        frames, _ = pad_frames(decoded.frames, model.config.connector.clip_frames, remainder="repeat")
        spans = [VideoSpan(frames.shape[0], duration=info.duration_s)]
    turns = [*history, Turn("user", question)]
    prompt = encode_chat(model.tokenizer, model.config, turns, videos=spans)
    sample = Sample(input_ids=prompt.input_ids, visual=prompt.visual, frames=frames)
    batch = pack_samples([sample], clip_frames=model.config.connector.clip_frames)
    return batch.to(next(model.parameters()).device)


def chat(
    model: LRCModel,
    video: str | Path | None,
    question: str,
    *,
    history: Sequence[Turn] = (),
    num_frames: int | None = None,
    max_new_tokens: int = MAX_NEW_TOKENS,
    on_text: Callable[[str], None] | None = None,
) -> str:
    """The answer to a question about a video, greedily decoded.

    Args:
        history, num_frames: see `video_prompt`.
        on_text: called with each new piece of text, never half a character.

    Raises:
        FileNotFoundError, ValueError: as `video_prompt`. RuntimeError: logits that are not finite.
    """
    batch = video_prompt(model, video, question, history=history, num_frames=num_frames)
    tokenizer = model.tokenizer
    stops = {tokenizer.eos_id, tokenizer.id("<|im_end|>")}
    stream = tokenizer.stream()
    pieces: list[str] = []

    def write(piece: str) -> None:
        if piece:
            pieces.append(piece)
            if on_text is not None:
                on_text(piece)

    def word(words: list[int]) -> None:
        if words[0] >= 0:
            write(stream.push(words[0]))

    model.generate(batch, max_new_tokens=max_new_tokens, stop_ids=stops, on_token=word)
    write(stream.finish())
    return "".join(pieces)


def synthetic_frames(num_frames: int, size: int, device: torch.device | str, seed: int = 0) -> torch.Tensor:
    """uint8 [F, 3, size, size] of noise: pixels cost what they cost, whatever they show."""
    check_int("num_frames", num_frames, minimum=0)
    generator = torch.Generator(device).manual_seed(seed)
    shape = (num_frames, 3, size, size)
    return torch.randint(0, 256, shape, generator=generator, device=device, dtype=torch.uint8)
