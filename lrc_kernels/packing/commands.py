# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.packing index | verify | bench-decode`: annotations in, an index out; videos in, frames per
second out."""

from __future__ import annotations

import argparse
import importlib
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from lrc_kernels.packing.build import build_index
from lrc_kernels.packing.index import INVALID, NO_VIDEO, OK, OVERLONG, UNREADABLE, Index
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.video import decode_frames, probe_video

_STATUS = {
    OK: "ok",
    UNREADABLE: "unreadable",
    NO_VIDEO: "without video",
    OVERLONG: "over-long",
    INVALID: "invalid annotation",
}
_SAMPLING = {
    "paper": TemporalSampling.paper(),
    "smooth": TemporalSampling(policy="smooth"),
    "release": TemporalSampling.release(),
}


def add_commands(commands: Any) -> None:
    """Enter the commands of this file."""
    _add_index(commands)
    verify = commands.add_parser("verify", help="read an index and compare its videos with those it was built from")
    verify.add_argument("index", type=Path)
    verify.set_defaults(run=_verify)
    _add_bench(commands)


def _add_index(commands: Any) -> None:
    parser = commands.add_parser(
        "index",
        help="open every video, tokenise every conversation",
        description='Builds an index from a JSON file {name: {"root", "annotation" or "shards"}}. A build that was cut '
        "off goes on where it stopped.",
    )
    parser.add_argument("source", type=Path, help="the JSON file")
    parser.add_argument("out", type=Path, help="the folder to write")
    parser.add_argument("--tokenizer", required=True, metavar="MODULE:NAME", help="what makes a tokenizer when called")
    parser.add_argument("--tokenizer-path", metavar="PATH", help="what it is called with (default: nothing)")
    parser.add_argument("--sampling", choices=tuple(_SAMPLING), default="paper", help="default %(default)s")
    parser.add_argument("--tokens-per-frame", type=int, default=16, help="visual tokens (default %(default)s)")
    parser.add_argument("--max-tokens", type=int, help="give longer samples fewer frames (default: no limit)")
    parser.add_argument("--skip-invalid", action="store_true", help="leave annotations out that cannot be right")
    parser.add_argument("--allow-outside-root", action="store_true", help="allow videos outside of their roots")
    parser.add_argument("--threads", type=int, help="that open videos (default: one per core)")
    parser.set_defaults(run=_index)


def _add_bench(commands: Any) -> None:
    parser = commands.add_parser(
        "bench-decode",
        help="frames per second of your videos",
        description="Decodes frames spread evenly over each video and prints the best of a few rounds.",
    )
    parser.add_argument("videos", nargs="+", type=Path)
    parser.add_argument("--frames", type=int, default=64, help="of each video (default %(default)s)")
    parser.add_argument("--size", type=int, help="rows and columns to resize to (default: as the video is)")
    parser.add_argument("--threads", type=int, default=2, help="videos decoded at once (default %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="default %(default)s")
    parser.set_defaults(run=_bench)


def _index(options: argparse.Namespace) -> None:
    module, colon, name = options.tokenizer.partition(":")
    if not colon:
        raise ValueError(f"--tokenizer must be MODULE:NAME, got {options.tokenizer!r}")
    try:
        make = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise ValueError(f"--tokenizer {options.tokenizer} cannot be imported: {error}") from None
    tokenizer = make() if options.tokenizer_path is None else make(options.tokenizer_path)
    index = build_index(
        options.source,
        _SAMPLING[options.sampling],
        tokenizer,
        options.out,
        tokens_per_frame=options.tokens_per_frame,
        max_tokens=options.max_tokens,
        invalid="skip" if options.skip_invalid else "raise",
        allow_outside_root=options.allow_outside_root,
        threads=options.threads,
    )
    print(_summary(index))


def _verify(options: argparse.Namespace) -> None:
    index = Index.load(options.index)
    print(_summary(index))
    index.verify()
    print("all columns and videos are as they were")


def _summary(index: Index) -> str:
    columns = index.columns
    ok = columns["status"] == OK
    lines = [f"{index.path}: {len(index)} samples, digest {index.digest[:16]}"]
    for status, count in zip(*np.unique(columns["status"], return_counts=True), strict=True):
        lines.append(f"  {_STATUS[int(status)]:<18} {count}")
    video = ok & (columns["n_frames"] > 0)
    for name, values in (
        ("tokens", columns["n_tokens"][ok]),
        ("supervised", columns["n_supervised"][ok]),
        ("frames", columns["n_frames"][video]),
        ("seconds", (columns["end"] - columns["start"])[video]),
    ):
        if len(values):
            low, middle, high = np.percentile(values, [0, 50, 100])
            lines.append(f"  {name:<18} sum {values.sum():,.0f}  min {low:g}  median {middle:g}  max {high:g}")
    return "\n".join(lines)


def _bench(options: argparse.Namespace) -> None:
    for name in ("frames", "threads", "rounds"):
        if getattr(options, name) < 1:
            raise ValueError(f"--{name} must be >= 1, got {getattr(options, name)}")
    size = None if options.size is None else (options.size, options.size)
    rule = TemporalSampling(min_frames=options.frames, max_frames=options.frames, multiple_of=1)
    print(
        f"{'video':<32} {'size':>11} {'seconds':>8} {'exact':>8} {'keyframe':>8} {f'x {options.threads}':>8}  frames/s"
    )
    for path in options.videos:
        info = probe_video(path)
        times = rule.timestamps(info.duration_s, options.frames)
        spacing = info.duration_s / options.frames

        def decode(snap_s: float, threads: int, path: Path = path, times: Any = times) -> int:
            return len(decode_frames(path, times, size=size, snap_s=snap_s, threads=threads).frames)

        def at_once(count: int = options.threads) -> int:
            with ThreadPoolExecutor(count) as pool:
                return sum(pool.map(lambda _: decode(0.0, 1), range(count)))

        ways = (lambda: decode(0.0, 0), lambda snap_s=spacing / 2: decode(snap_s, 0), at_once)
        best = [0.0, 0.0, 0.0]
        for _ in range(options.rounds):
            for i, way in enumerate(ways):
                started = time.perf_counter()
                frames = way()
                best[i] = max(best[i], frames / (time.perf_counter() - started))
        pixels = f"{info.width}x{info.height}"
        rates = " ".join(f"{rate:>8.1f}" for rate in best)
        print(f"{path.name[:32]:<32} {pixels:>11} {info.duration_s:>8.1f} {rates}")
