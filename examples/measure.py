# SPDX-License-Identifier: Apache-2.0
"""Our `compress_clips` beside the two peers on one ViT output: checks first, then time, then peak memory.

`python -m examples.measure METHOD F,H,W,D DTYPE` prints the peak extra bytes of one call in a fresh process.
"""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.peers import tome as peers
from lrc_kernels.tome import MergePlan, TokenLayout, compress_clips

CLIP_FRAMES, TOKENS_PER_CLIP, NUM_HEADS, SHUFFLE = 8, 128, 8, 2
REPEATS, TIMED_CLIPS = 5, 8
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
METHODS = ("ours", "torch_best", "published")
ROOT = Path(__file__).resolve().parents[1]


def compare(x: Tensor, layout: TokenLayout, dtype: str) -> dict[str, Any]:
    """Checks, then time and memory of the three methods, on at most `TIMED_CLIPS` clips of x [F, 1 + h*w, D]."""
    clips, grid = min(x.shape[0] // CLIP_FRAMES, TIMED_CLIPS), layout.grid
    part = x[: clips * CLIP_FRAMES]
    checks = check_methods(part, grid, compress(part, layout)[1])
    seconds, memory = time_methods(part, grid), measure_memory(part, grid, dtype)
    methods = {
        name: {
            "seconds": seconds[name],
            "memory_bytes": memory[name],
            "time_ratio": seconds[name] / seconds["ours"],
            "memory_ratio": memory[name] / max(memory["ours"], 1),
            "checks": checks[name],
        }
        for name in METHODS
    }
    input_bytes = part.numel() * part.element_size()
    return {"clips": clips, "repeats": REPEATS, "input_bytes": input_bytes, "methods": methods}


def call(method: str, x: Tensor, grid: tuple[int, int], clip_frames: int = CLIP_FRAMES,
         target: int = TOKENS_PER_CLIP) -> tuple[Tensor, Tensor]:  # fmt: skip
    """One of `METHODS`, pixel shuffle included: x [F, 1 + h*w, D] -> (y [B, target, 4 D], size [B, target])."""
    if method == "ours":
        layout = TokenLayout(clip_frames=clip_frames, grid=grid, shuffle=SHUFFLE, prefix=1)
        y, plan = compress(x, layout, target)
        return y, plan.size.view(y.shape[:2])
    tokens = peers.pixel_shuffle(x, grid, SHUFFLE)
    clips = tokens.reshape(x.shape[0] // clip_frames, -1, tokens.shape[-1])
    return getattr(peers, method)(clips, target, NUM_HEADS)


def compress(x: Tensor, layout: TokenLayout, target: int = TOKENS_PER_CLIP) -> tuple[Tensor, MergePlan]:
    """`compress_clips` with the demo's heads, and its plan."""
    result = compress_clips(x, target, NUM_HEADS, layout=layout, return_plan=True)
    assert isinstance(result, tuple)
    return result


def backend_figures(ran: list[tuple[str, str]]) -> list[dict[str, str]]:
    """What `backend.record` collected, each (op, backend) once."""
    return [{"op": op, "backend": name} for op, name in dict.fromkeys(ran)]


@contextmanager
def one_thread() -> Iterator[None]:
    """torch computes with one CPU thread inside."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        yield
    finally:
        torch.set_num_threads(threads)


def synchronize(device: torch.device) -> None:
    """Wait for the GPU, so that a clock read here counts its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def check_methods(x: Tensor, grid: tuple[int, int], plan: MergePlan) -> dict[str, Any]:
    """Assert that the three methods merge the same tokens equally well, before anyone times them.

    Near ties may fall either way where sums are ordered differently, and one such decision changes later ones; so what
    is compared is what every right answer shares: each token counted once, the mean kept, and the scatter within
    groups. Our merge is also recomputed from its own plan in fp64. `published` is asserted on an fp32 copy of x: its
    sizes and sums live in the dtype of x, and bf16 cannot count past 256 one by one.

    Raises:
        AssertionError: with the method and the figures.
    """
    tokens = peers.pixel_shuffle(x, grid, SHUFFLE).double()
    clips = tokens.view(x.shape[0] // CLIP_FRAMES, -1, tokens.shape[-1])
    coarse = x.dtype != torch.float32
    outputs = {method: call(method, x, grid) for method in METHODS}
    results = {method: _quality(clips, *outputs[method]) for method in METHODS}
    asserted = dict(results)
    if coarse:
        asserted["published"] = _quality(clips, *call("published", x.float(), grid))
    # torch_best rounds 1 / size to bf16, which alone moves the energy by up to 2^-8.
    wanted, slack = asserted["torch_best"]["scatter"], 6e-3 if coarse else 1e-3
    for method, quality in asserted.items():
        assert quality["uncounted_tokens"] == 0, f"{method}: every token must count once: {quality}"
        assert quality["mean_drift"] < (8e-3 if coarse else 1e-4), f"{method}: the mean must stay: {quality}"
        assert abs(quality["scatter"] - wanted) < 0.1 * wanted + slack, f"{method}: wanted scatter {wanted}: {quality}"
    ours = outputs["ours"][0].double()
    merged = torch.zeros(plan.num_out, clips.shape[-1], dtype=torch.float64, device=x.device)
    merged.index_add_(0, plan.assign.long(), clips.flatten(0, 1)).div_(plan.size.double().unsqueeze(1))
    error = ((ours.flatten(0, 1) - merged).abs().max() / merged.abs().max()).item()
    assert error < (8e-3 if coarse else 1e-4), f"ours differs from its own plan by {error:.2e}"
    close = (ours - outputs["torch_best"][0].double()).abs().amax(-1) <= 0.02 * ours.abs().amax()
    results["ours"] |= {"error_against_own_plan": error, "rows_equal_to_torch_best": close.double().mean().item()}
    return results


def _quality(clips: Tensor, y: Tensor, size: Tensor) -> dict[str, float]:
    """How far y [B, M, D] with `size` [B, M] is from conserving `clips` fp64 [B, N, D], and the energy it loses."""
    y, weight = y.double(), size.double().unsqueeze(-1)
    drift = ((y * weight).sum(1) - clips.sum(1)).abs().max() / clips.abs().sum(1).max()
    energy = clips.square().sum()
    uncounted = (weight.sum((1, 2)) - clips.shape[1]).abs().max()
    scatter = (energy - (y.square() * weight).sum()) / energy
    return {"mean_drift": drift.item(), "scatter": scatter.item(), "uncounted_tokens": uncounted.item()}


def time_methods(x: Tensor, grid: tuple[int, int]) -> dict[str, float]:
    """Seconds of each method on x, interleaved, minimum of `REPEATS`, one thread each on CPU."""
    best = dict.fromkeys(METHODS, float("inf"))
    with one_thread():
        for _ in range(REPEATS):
            for method in METHODS:
                synchronize(x.device)
                start = time.perf_counter()
                call(method, x, grid)
                synchronize(x.device)
                best[method] = min(best[method], time.perf_counter() - start)
    return best


def _resident(field: str) -> int:
    """Bytes of VmRSS or VmHWM. Not ru_maxrss: that one survives exec, so that a child inherits its parent's peak."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1]) * 1024
    raise RuntimeError(f"/proc/self/status has no {field}")


def measure_memory_here(method: str, frames: int, grid: tuple[int, int], width: int, dtype: str) -> int:
    """Peak extra bytes of one call in this (fresh) process, output included, on random features of that shape."""
    torch.set_num_threads(1)
    # A tiny call loads code and starts threads; a large one would leave freed memory behind for the next to reuse.
    call(method, torch.ones(2, 17, width, dtype=DTYPES[dtype]), (4, 4), clip_frames=1, target=2)
    x = torch.empty(frames, 1 + grid[0] * grid[1], width, dtype=DTYPES[dtype])
    for frame in x:
        frame.normal_()
    before = _resident("VmRSS")
    result = call(method, x, grid)
    assert result[0].shape[0] == frames // CLIP_FRAMES
    return max(0, _resident("VmHWM") - before)


def measure_memory(x: Tensor, grid: tuple[int, int], dtype: str) -> dict[str, int]:
    """Peak extra bytes of each method: allocator statistics on CUDA, growth of the resident set of a process on CPU."""
    return _measure_on_cuda(x, grid) if x.device.type == "cuda" else _measure_in_processes(x, grid, dtype)


def _measure_on_cuda(x: Tensor, grid: tuple[int, int]) -> dict[str, int]:
    extra = {}
    for method in METHODS:
        synchronize(x.device)
        torch.cuda.reset_peak_memory_stats(x.device)
        before = torch.cuda.memory_allocated(x.device)
        call(method, x, grid)
        synchronize(x.device)
        extra[method] = torch.cuda.max_memory_allocated(x.device) - before
    return extra


def _measure_in_processes(x: Tensor, grid: tuple[int, int], dtype: str) -> dict[str, int]:
    shape = ",".join(str(n) for n in (x.shape[0], *grid, x.shape[2]))
    started = {}
    for method in METHODS:
        command = [sys.executable, "-m", "examples.measure", method, shape, dtype]
        started[method] = subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    extra = {}
    for method, process in started.items():
        printed, errors = process.communicate()
        if process.returncode:
            raise RuntimeError(f"measuring the memory of {method} failed: {errors.strip()}")
        extra[method] = int(printed.split()[-1])
    return extra


if __name__ == "__main__":
    name, shape, dtype = sys.argv[1:]
    frames, h, w, width = (int(n) for n in shape.split(","))
    print(measure_memory_here(name, frames, (h, w), width, dtype))
