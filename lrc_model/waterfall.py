# SPDX-License-Identifier: Apache-2.0
"""A long video through a model, stage by stage: seconds and GiB of decoding, ViT, merging, connector, language model,
token dropout. In: a model and frames. Out: a Waterfall, as text, JSON or a picture."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.checks import check_int
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.packing import TemporalSampling, decode_frames, probe_video
from lrc_model.cache import KVCache
from lrc_model.chat import synthetic_frames
from lrc_model.generate import PREFILL_CHUNK, prefill
from lrc_model.language import PackedRows
from lrc_model.memory import forget_peak, peak_memory
from lrc_model.model import LRCModel
from lrc_model.plan import FRAME_TEXT_TOKENS, peak_rates, prefill_cost

STAGES = ("decode", "vision", "merge", "connector", "language", "dropout", "other")
GIB = 2**30
# Words around the visual tokens. With random weights they mean nothing, so that any will do.
_TEXT_ID = 1


@dataclass
class Waterfall:
    """What a prefill took.

    Attributes:
        seconds: stage -> seconds, the device synchronised at both ends of each; "other" is what the whole took beyond
            the stages.
        peak_bytes: stage -> most memory in use during it: of the GPU's allocator, else of the process (where the system
            lets no process forget its peak, as outside of Linux, the peak since it started).
        flops, traffic: stage -> floating-point operations, and bytes read and written, by arithmetic.
        num_frames, num_tokens: of the prompt. num_rows: rows that the last layer saw.
        cache_bytes, visual_bytes: keys and values, and embeddings of the prompt: what grows with the video.
        device, gpu: what it ran on, and its name where it is a GPU.
        next_word: the word that the prompt ends in, as proof that all of it was read.
        error: why it is not whole: out of memory, what was raised, or that there is nothing to replace; else empty.
        failed: whether that is a fault.
    """

    seconds: dict[str, float] = field(default_factory=lambda: dict.fromkeys(STAGES, 0.0))
    peak_bytes: dict[str, int] = field(default_factory=lambda: dict.fromkeys(STAGES, 0))
    flops: dict[str, float] = field(default_factory=dict)
    traffic: dict[str, float] = field(default_factory=dict)
    num_frames: int = 0
    num_tokens: int = 0
    num_rows: int = 0
    cache_bytes: int = 0
    visual_bytes: int = 0
    device: str = "cpu"
    gpu: str = ""
    next_word: int = -1
    error: str = ""
    failed: bool = False

    @contextmanager
    def clock(self, stage: str) -> Iterator[None]:
        """Add what runs inside to a stage."""
        self._wait()
        self._note_peak("other")
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds[stage] += time.perf_counter() - start
        self._note_peak(stage)

    @contextmanager
    def whole(self) -> Iterator[None]:
        """Around all stages: what runs between them is "other"."""
        if self.device.startswith("cuda"):
            self.gpu = torch.cuda.get_device_name(self.device)
        self._wait()
        forget_peak(self.device)
        start = time.perf_counter()
        yield
        self._wait()
        self.seconds["other"] = time.perf_counter() - start - sum(self.seconds.values())
        self._note_peak("other")

    def _wait(self) -> None:
        if self.device.startswith("cuda"):
            torch.cuda.synchronize(self.device)

    def _note_peak(self, stage: str) -> None:
        self.peak_bytes[stage] = max(self.peak_bytes[stage], peak_memory(self.device))
        forget_peak(self.device)

    def rate(self, stage: str) -> str:
        """FLOP/s or bytes/s of a stage, and their share of the data sheet's peak where the GPU is known; else empty."""
        if not self.seconds[stage]:
            return ""
        peak = peak_rates(self.gpu)
        for work, unit, most in ((self.flops, "FLOP/s", 0), (self.traffic, "B/s", 1)):
            if stage in work:
                rate = work[stage] / self.seconds[stage]
                scale, prefix = (1e12, "T") if rate >= 1e11 else (1e9, "G")
                return f"{rate / scale:.3g} {prefix}{unit}" + (f" = {rate / peak[most]:.0%} of peak" if peak else "")
        return ""

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values."""
        return asdict(self)

    @property
    def peak(self) -> int:
        """Bytes: the most of any stage."""
        return max(self.peak_bytes.values())

    def __str__(self) -> str:
        total = sum(self.seconds.values())
        lines = [self.error] if self.error else []
        if not total:
            return lines[0] if lines else "nothing was measured"
        lines.append(
            f"{self.num_frames} frames -> {self.num_tokens} tokens, {self.num_rows} of them in the last layer, "
            f"on {self.device}{f' ({self.gpu})' if self.gpu else ''}"
        )
        for stage, seconds in self.seconds.items():
            shown = f"  {stage:<10} {seconds:9.2f} s {seconds / total:5.0%}  {self.peak_bytes[stage] / GIB:6.2f} GiB"
            lines.append(f"{shown}  {'#' * round(20 * seconds / total):<20}  {self.rate(stage)}".rstrip())
        lines.append(
            f"  {'all':<10} {total:9.2f} s  100%  {self.peak / GIB:6.2f} GiB  keys and values "
            f"{self.cache_bytes / GIB:.2f}, embeddings {self.visual_bytes / GIB:.2f} GiB"
        )
        return "\n".join(lines)


def run_prefill(
    model: LRCModel,
    num_frames: int,
    *,
    video: str | Path | None = None,
    frame_text: bool = False,
    chunk: int = PREFILL_CHUNK,
    chunk_clips: int = 4,
    seed: int = 0,
    fall: Waterfall | None = None,
) -> Waterfall:
    """Read a video of any length in bounded memory: only its merged tokens, keys and values grow with it.

    Args:
        num_frames: rounded up to whole clips.
        video: a file to sample the frames from, over and over where it has fewer; None = noise.
        frame_text: nine words per frame, as many as the public template writes; else the paper's 16 tokens per frame.
        chunk: rows of the prompt in flight. chunk_clips: clips in flight in the ViT.
        seed: of the noise and of random drops.
        fall: what is filled and returned, so that an error leaves what was measured before it; None = a new one.

    Raises:
        FileNotFoundError, ValueError: a video that cannot be read, num_frames, chunk or chunk_clips < 1.
        RuntimeError: logits that are not finite.
    """
    for name, value in (("num_frames", num_frames), ("chunk", chunk), ("chunk_clips", chunk_clips)):
        check_int(name, value, minimum=1)
    device = next(model.parameters()).device
    clip, tokens = model.config.connector.clip_frames, model.config.connector.tokens_per_frame
    num_frames = -(-num_frames // clip) * clip
    fall = fall if fall is not None else Waterfall()
    fall.device, fall.num_frames = str(device), num_frames
    _count_work(fall, model, frame_text)
    with torch.no_grad(), fall.whole():
        visual = _prompt_mask(num_frames, tokens, frame_text, device)
        fall.num_tokens = len(visual)
        x = model.language_model.embed(torch.full((len(visual),), _TEXT_ID, device=device))
        fall.visual_bytes = x.numel() * x.element_size()
        # Visual tokens stand in order, so that the rows of each chunk of clips are known on the host.
        where = visual.nonzero().squeeze(1)
        filled = 0
        for frames in _frame_chunks(model, num_frames, video, chunk_clips * clip, seed, fall):
            encoded = _encode(model, frames, fall)
            x[where[filled : filled + encoded.shape[0]]] = encoded
            filled += encoded.shape[0]
        rows = PackedRows.of(VarlenLayout([len(visual)], device), droppable=visual)
        drops = model.drops(rows.layout, (num_frames * tokens,), rows, seed)
        cache = KVCache(model.config.text.num_layers)
        number = cache.add_sequence()
        last = prefill(model.language_model, x, rows, drops, cache, sequence=number, chunk=chunk, clock=fall.clock)
        logits = model.language_model.logits(last)
        if not bool(logits.isfinite().all()):
            raise RuntimeError("the logits of the prompt's last row must be finite, got NaN or infinity")
        fall.next_word = int(logits.argmax())
    fall.cache_bytes = cache.num_bytes
    fall.num_rows = cache.length(cache.num_layers - 1, number)
    return fall


def _count_work(fall: Waterfall, model: LRCModel, frame_text: bool) -> None:
    """What the stages have to do at least: the merge reads its tokens twice where it merges, and writes those kept."""
    config, weight = model.config, model.connector.linear_1.weight
    cost = prefill_cost(config, fall.num_frames, frame_text=frame_text)
    kept = fall.num_frames * config.connector.tokens_per_frame
    fall.flops = {
        "vision": cost.flops_vision,
        "connector": 2.0 * kept * (weight.numel() + model.connector.linear_2.weight.numel()),
        "language": cost.flops_text,
    }
    passes = 2 if config.merges else 1
    read = passes * fall.num_frames * config.frame_tokens
    fall.traffic = {"merge": float((read + kept) * config.token_width * weight.element_size())}


def _prompt_mask(num_frames: int, tokens: int, frame_text: bool, device: torch.device) -> Tensor:
    """bool [T]: the visual tokens of a prompt that begins with one word and ends with the question's last."""
    text = FRAME_TEXT_TOKENS if frame_text else 0
    frame = torch.arange(text + tokens, device=device) >= text
    one = torch.zeros(1, dtype=torch.bool, device=device)
    return torch.cat([one, frame.repeat(num_frames), one])


def _frame_chunks(
    model: LRCModel, num_frames: int, video: str | Path | None, step: int, seed: int, fall: Waterfall
) -> Iterator[Tensor]:
    size, device = model.config.vision.image_size, next(model.parameters()).device
    if video is None:
        for start in range(0, num_frames, step):
            with fall.clock("decode"):
                frames = synthetic_frames(min(step, num_frames - start), size, device, seed + start)
            yield frames
        return
    info = probe_video(video)
    times = TemporalSampling.release().timestamps(
        info.duration_s, min(num_frames, max(1, info.num_frames or num_frames))
    )
    for start in range(0, num_frames, step):
        wanted = [float(times[i % len(times)]) for i in range(start, min(start + step, num_frames))]
        with fall.clock("decode"):
            frames = decode_frames(video, wanted, size=(size, size)).frames.to(device)
        yield frames


def _encode(model: LRCModel, frames: Tensor, fall: Waterfall) -> Tensor:
    """[rows, D] of a few clips."""
    with fall.clock("vision"):
        patches = model.vision_model(frames, chunk_frames=frames.shape[0])
    with fall.clock("merge"):
        merged = model.connector.compress(patches)
    with fall.clock("connector"):
        return model.connector.project(merged).flatten(0, 1)


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError as error:
        raise ImportError(f"the picture needs matplotlib: pip install lrc-kernels[bench] ({error})") from error
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def draw(falls: dict[str, Waterfall], path: str | Path) -> None:
    """One bar of stages per form, as a PNG. ImportError where matplotlib is missing."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 1.5 + 0.5 * len(falls)), sharey=True)
    names = list(falls)[::-1]
    start = [0.0] * len(names)
    for stage in STAGES:
        seconds = [falls[name].seconds[stage] for name in names]
        left.barh(names, seconds, left=start, label=stage)
        start = [a + b for a, b in zip(start, seconds, strict=True)]
    left.set_xlabel("seconds")
    left.legend(fontsize="small", ncols=2)
    right.barh(names, [falls[name].peak / GIB for name in names], color="tab:gray")
    right.set_xlabel("peak GiB")
    most = max(falls.values(), key=lambda fall: fall.num_frames)
    figure.suptitle(f"{most.num_frames} frames, {most.num_tokens} tokens, {most.device}")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)


def draw_curve(curve: dict[str, list[tuple[int, int]]], path: str | Path) -> None:
    """Frames against peak memory, one line per form, as a PNG. ImportError where matplotlib is missing."""
    pyplot = _pyplot()
    figure, axes = pyplot.subplots(figsize=(7, 4.5))
    for name, points in curve.items():
        axes.plot([frames for frames, _ in points], [peak / GIB for _, peak in points], marker="o", label=name)
    axes.set(xscale="log", xlabel="frames", ylabel="peak GiB", title="a line ends where its form runs out of memory")
    axes.legend(fontsize="small")
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    pyplot.close(figure)
