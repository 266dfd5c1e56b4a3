# SPDX-License-Identifier: Apache-2.0
"""ToMe at the sizes of the real models: the connector's one call beside its peers, and each op by itself.

Bytes are the fewest that the task needs: x read twice and the output written for `compress_clips` (the merge cannot
start before the matching has seen all of the metric), x read once for each op alone.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import tome as peers
from lrc_kernels import VarlenLayout
from lrc_kernels.testing.inputs import make_input
from lrc_kernels.testing.tolerance import assert_close
from lrc_kernels.tome import (
    MergePlan,
    TokenLayout,
    compress_clips,
    head_mean,
    merge_budget,
    merge_tokens,
    plan_merge,
    unmerge_tokens,
)
from lrc_model.config import PRESETS
from lrc_model.plan import MODEL_FLOP_UTILISATION, prefill_cost

# id: clips on a GPU, clips on a CPU, tokens, target, width, heads (tome/README.md says where each comes from).
SHAPES = {
    "iv25-rel": (64, 8, 1024, 64, 4096, 32),
    "iv25-paper": (32, 4, 2048, 128, 4096, 32),
    "iv25-stream": (1, 1, 2048, 128, 4096, 32),
    "iv25-r64": (64, 8, 1024, 256, 4096, 32),
    "livestar": (256, 8, 256, 16, 4096, 32),
    "vcf-umt224": (128, 8, 784, 64, 1024, 16),
    "vcf-umt448": (128, 4, 3136, 64, 1024, 16),
    "vcf-iv2-1b": (128, 8, 1024, 64, 1408, 16),
    "vcf-image": (64, 8, 196, 64, 1024, 16),
    "brief": (64, 8, 2048, 128, 1024, 16),
}
# id: images, tokens, tokens merged, width, channels of the metric (the keys' mean over heads; of tomesd, x itself).
STEPS = {
    "tome-L224": (64, 197, 8, 1024, 64),
    "tome-L384": (64, 577, 23, 1024, 64),
    "tome-L512": (16, 1025, 40, 1024, 64),
    "tome-H518": (16, 1370, 40, 1280, 80),
    "tomesd-15": (2, 4096, 2048, 320, 320),
    "tomesd-xl": (2, 4096, 2048, 640, 640),
    "tomesd-2k": (2, 65536, 32768, 320, 320),
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
DATA = ("gaussian", "video_like", "all_equal")
# Without --full-size, shapes but the first take fewer kinds of data, and no peer is compiled: CI has minutes.
REDUCED = (("bf16", "video_like"), ("fp32", "all_equal"))
# The preset whose prefill a clip of this shape is part of, and its frames.
PREFILLS = {"iv25-rel": ("internvideo2_5_8b", 4), "iv25-paper": ("internvideo2_5_8b_paper", 8)}


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "shape" not in metafunc.fixturenames:
        return
    everything = [(dtype, data) for dtype in DTYPES for data in DATA]
    kinds = everything[: len(DATA)] if torch.cuda.is_available() else REDUCED
    if metafunc.config.getoption("--full-size"):
        kinds = everything
    shapes = STEPS if metafunc.function is test_single_step else SHAPES
    cases = [(shape, *kind) for shape in shapes for kind in (everything if shape == "iv25-rel" else kinds)]
    metafunc.parametrize(("shape", "dtype", "data"), cases)


def sizes_of(shape: str, device: torch.device, full_size: bool) -> tuple[int, int, int, int, int]:
    """(B, N, target, D, H); a quarter of the tokens and clips where the sizes are not full."""
    on_gpu, on_cpu, tokens, target, width, heads = SHAPES[shape]
    if full_size:
        return (on_gpu if device.type == "cuda" else on_cpu), tokens, target, width, heads
    return max(1, on_cpu // 4), tokens // 4, target // 4, width, heads


def prefill_shares(shape: str, batch: int, record: dict[str, Any]) -> dict[str, float]:
    """The merge's part of a prefill of 512 and of 10,000 frames, the rest of which is arithmetic: the FLOPs that
    `lrc_model.plan` counts, at 45 % of the matrix product that the same run measured.
    """
    preset, clip_frames = PREFILLS[shape]
    shares = {}
    for frames in (512, 10_000):
        cost = prefill_cost(PRESETS[preset](), frames)
        step = (cost.flops_vision + cost.flops_text) / (record["ceiling_tflops"] * 1e12 * MODEL_FLOP_UTILISATION)
        merge = record["median_us"] / 1e6 / batch * (frames / clip_frames)
        shares[f"share_of_{frames}_frames"] = merge / (merge + step)
    return shares


def maker(
    data: str, sizes: tuple[int, ...], dtype: torch.dtype, device: torch.device
) -> Callable[[int], tuple[Tensor]]:
    """Input sets of clips. Eight clips are drawn on the CPU, the others are those with noise drawn on the device."""
    batch, tokens, _, width, _ = sizes

    def make(i: int) -> tuple[Tensor]:
        drawn = make_input(data, (min(batch, 8), tokens, width), dtype=dtype, device=device, seed=i)
        if batch <= 8:
            return (drawn,)
        x = drawn.repeat(-(-batch // 8), 1, 1)[:batch]
        return (x.add_(torch.randn_like(x), alpha=0.05),)

    return make


def conserves_mass(x: Tensor, target: int) -> Callable[[Any], None]:
    """A check that every merge passes, whatever it decides: sizes sum to N, and the weighted mean of all stays put."""

    def check(output: tuple[Tensor, Tensor]) -> None:
        y, size = output
        batch, tokens = x.shape[:2]
        assert y.shape == (batch, target, x.shape[2]) and y.dtype == x.dtype
        weights = size.reshape(batch, target).double()
        # Sizes that a peer keeps in bf16 are rounded past 256.
        assert (weights.sum(1) - tokens).abs().max() <= (0.05 * tokens if x.dtype == torch.bfloat16 else 0)
        mean = (y.double() * weights[..., None]).sum(1) / weights.sum(1, keepdim=True)
        error = (mean - x.double().mean(1)).abs().max() / x.double().abs().max()
        assert error <= (1e-2 if x.dtype == torch.bfloat16 else 1e-5), error

    return check


def torch_merge(x: Tensor, plan: MergePlan, target: int, dtype: torch.dtype) -> Tensor:
    """The plan's groups averaged in `dtype`, one clip at a time."""
    clips = []
    for index, clip in enumerate(x):
        rows = plan.assign.view(x.shape[0], -1)[index].long() - index * target
        total = torch.zeros(target, x.shape[2], dtype=dtype, device=x.device).index_add(0, rows, clip.to(dtype))
        clips.append(total / plan.size.view(-1, target)[index][:, None])
    return torch.stack(clips)


def with_compiled(contestants: dict[str, Callable], worth_it: bool) -> dict[str, Callable]:
    """The peers, and each of them through torch.compile where its time is well spent."""
    if worth_it:
        torch._dynamo.reset()
        for name, function in list(contestants.items()):
            contestants[f"{name}_compiled"] = torch.compile(function, dynamic=False)
    return contestants


def test_compress_clips(bench, benchmark, pytestconfig, device, full_size, shape, dtype, data):
    sizes = sizes_of(shape, device, full_size)
    batch, tokens, target, width, heads = sizes
    make = maker(data, sizes, DTYPES[dtype], device)
    (x,) = make(0)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        y, plan = compress_clips(x, target, heads, return_plan=True)
        return y, plan.size

    y, plan = compress_clips(x, target, heads, return_plan=True)
    same_dtype = torch_merge(x, plan, target, torch.float32).to(x.dtype)
    assert_close(y, torch_merge(x, plan, target, torch.float64), same_dtype)

    contestants = with_compiled(
        {
            "published": lambda x: peers.published(x, target, heads),
            "torch_best": lambda x: peers.torch_best(x, target, heads),
        },
        pytestconfig.getoption("--full-size") and data == DATA[0],
    )
    nbytes = (2 * x.numel() + batch * target * width) * x.element_size()
    # Iterations halve the tokens, so that the score products sum to a third more than the first one.
    flops = sum(2 * (n // 2) ** 2 * (width // heads) for n in _lengths(tokens, target)) * batch
    backend = "cpu" if device.type == "cpu" else None
    record = bench(
        ours,
        bytes_moved=nbytes,
        flops=flops,
        check=conserves_mass(x, target),
        make_inputs=make,
        peers=contestants,
        backend=backend,
        shape=f"{shape} [{batch}, {tokens}, {width}] -> {target}",
        dtype=dtype,
        data=data,
    )
    if shape in PREFILLS and full_size:
        benchmark.extra_info.update(prefill_shares(shape, batch, record))


def test_single_step(bench, pytestconfig, device, full_size, shape, dtype, data):
    """One merge inside a ViT, its class token protected, or in a diffusion model, one destination a 2 x 2 window."""
    batch, tokens, r, width, channels = STEPS[shape]
    diffusion = shape.startswith("tomesd")
    if not full_size:
        part = tokens // 256 if diffusion else 4
        batch, tokens, r = 2, tokens // part, max(1, r // part)
    position = torch.arange(tokens, device=device)
    side = round(tokens**0.5)
    in_b = (position // side % 2 == 0) & (position % side % 2 == 0) if diffusion else position % 2 == 1
    protected = None if diffusion else (position == 0).repeat(batch)
    layout = VarlenLayout([tokens] * batch, device)
    budget = merge_budget(layout, r=r, num_protected=0 if diffusion else 1)
    destination = in_b.repeat(batch) if diffusion else None

    def make(i: int) -> tuple[Tensor, ...]:
        drawn = make_input(data, (batch, tokens, width + channels), dtype=DTYPES[dtype], device=device, seed=i)
        return drawn[..., :width].contiguous(), drawn[..., width:].contiguous()

    def metric_of(x: Tensor, keys: Tensor) -> Tensor:
        return x if diffusion else keys

    def ours(x: Tensor, keys: Tensor) -> tuple[Tensor, Tensor]:
        plan = plan_merge(metric_of(x, keys), budget, protected=protected, destination=destination)
        return merge_tokens(x, plan), plan.size

    options: dict[str, Any] = {"class_token": not diffusion}
    contestants = with_compiled(
        {
            "published": lambda x, keys: peers.published_step(x, metric_of(x, keys), in_b, r, **options),
            "torch_best": lambda x, keys: peers.torch_best_step(x, metric_of(x, keys), in_b, r, **options),
        },
        pytestconfig.getoption("--full-size") and data == DATA[0],
    )
    if diffusion and importlib.util.find_spec("tomesd") is not None:
        contestants["tomesd"] = lambda x, keys: peers.tomesd_step(x, side, r)
    (x, keys), sources = make(0), int((~in_b).sum())
    bench(
        ours,
        bytes_moved=(2 * x.numel() - r * batch * width + (0 if diffusion else keys.numel())) * x.element_size(),
        flops=2 * batch * sources * (tokens - sources) * channels,
        check=conserves_mass(x, tokens - r),
        make_inputs=make,
        peers=contestants,
        backend="cpu" if device.type == "cpu" else None,
        shape=f"{shape} [{batch}, {tokens}, {width}] -> {tokens - r}",
        dtype=dtype,
        data=data,
    )


@pytest.mark.parametrize("dtype", DTYPES)
def test_compress_vit_layout(bench, device, full_size, dtype):
    """The ViT's output read in place, beside the published pixel shuffle in front of either peer."""
    frames, side, width = (512, 32, 1024) if device.type == "cuda" else (16, 32 if full_size else 16, 1024)
    layout = TokenLayout(clip_frames=8, grid=(side, side), shuffle=2, prefix=1)
    target = layout.tokens_per_clip // 16

    def make(i: int) -> tuple[Tensor]:
        return (make_input("gaussian", (frames, 1 + side * side, width), dtype=DTYPES[dtype], seed=i).to(device),)

    def shuffled(x: Tensor) -> Tensor:
        return peers.pixel_shuffle(x, (side, side), 2).reshape(-1, layout.tokens_per_clip, 4 * width)

    def ours(x: Tensor) -> tuple[Tensor, Tensor]:
        y, plan = compress_clips(x, target, 32, layout=layout, return_plan=True)
        return y, plan.size

    (x,) = make(0)
    y, plan = compress_clips(x, target, 32, layout=layout, return_plan=True)
    same_dtype = torch_merge(shuffled(x), plan, target, torch.float32).to(x.dtype)
    assert_close(y, torch_merge(shuffled(x), plan, target, torch.float64), same_dtype)
    nbytes = (2 * x.numel() * side**2 // (1 + side**2) + frames // 8 * target * 4 * width) * x.element_size()
    bench(
        ours,
        bytes_moved=nbytes,
        check=conserves_mass(shuffled(x), target),
        make_inputs=make,
        peers={
            "published": lambda x: peers.published(shuffled(x), target, 32),
            "torch_best": lambda x: peers.torch_best(shuffled(x), target, 32),
        },
        shape=f"ViT [{frames}, {1 + side * side}, {width}] -> {target} a clip",
        dtype=dtype,
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["head_mean", "plan", "merge", "merge_backward"])
def test_op(bench, device, full_size, op, dtype):
    sizes = sizes_of("iv25-rel", device, full_size)
    batch, tokens, target, width, heads = sizes
    make = maker("gaussian", sizes, DTYPES[dtype], device)
    (x,) = make(0)
    metric = head_mean(x, heads)
    plan = plan_merge(metric, target=target)
    rows = plan.assign.long()
    x_bytes, y_bytes = x.numel() * x.element_size(), batch * target * width * x.element_size()
    metric_bytes = 4 * metric.numel()

    leaf = x.detach().requires_grad_()
    merged = merge_tokens(leaf, plan)

    def flat_merge(x: Tensor) -> Tensor:
        total = torch.zeros(batch * target, width, device=device).index_add_(0, rows, x.flatten(0, 1).float())
        return (total / plan.size[:, None]).to(x.dtype).view(batch, target, width)

    def torch_gather(y: Tensor) -> Tensor:
        return (y.flatten(0, 1) / plan.size[:, None].to(y.dtype))[rows].view(batch, tokens, width)

    def gather(y: Tensor) -> Tensor:
        return torch.autograd.grad(merged, leaf, y, retain_graph=True)[0]

    mean64 = x.unflatten(-1, (heads, -1)).double().mean(-2)
    cases: dict[str, tuple[Callable, Callable[[int], tuple], Tensor | None, dict[str, Callable], int]] = {
        "head_mean": (
            lambda x: head_mean(x, heads),
            make,
            mean64,
            {"torch": lambda x: x.unflatten(-1, (heads, -1)).mean(-2, dtype=torch.float32)},
            x_bytes + metric_bytes,
        ),
        "plan": (
            lambda metric: plan_merge(metric, target=target).size.view(batch, target),
            lambda i: (head_mean(make(i)[0], heads),),
            None,
            {},
            metric_bytes,
        ),
        "merge": (
            lambda x: merge_tokens(x, plan),
            make,
            torch_merge(x, plan, target, torch.float64),
            {"torch": flat_merge},
            x_bytes + y_bytes,
        ),
        "merge_backward": (
            gather,
            lambda i: (make_input("gaussian", (batch, target, width), dtype=x.dtype, seed=i).to(device),),
            None,
            {"torch": torch_gather},
            x_bytes + y_bytes,
        ),
    }  # fmt: skip
    fn, make_inputs, exact, contestants, nbytes = cases[op]

    def check(output: Tensor) -> None:
        assert output.isfinite().all()
        if exact is not None:
            error = (output.double() - exact).abs().max() / exact.abs().max()
            assert error <= 2 * torch.finfo(output.dtype).eps, error
        if op == "plan":
            assert (output.sum(1) == tokens).all()
        if op == "merge_backward":
            gradient = make_inputs(0)[0]
            wanted = (gradient.flatten(0, 1).double() / plan.size[:, None].double())[rows].view(batch, tokens, width)
            assert (output.double() - wanted).abs().max() <= 4 * torch.finfo(output.dtype).eps * wanted.abs().max()

    bench(
        fn,
        bytes_moved=nbytes,
        check=check,
        make_inputs=make_inputs,
        peers=contestants,
        shape=f"iv25-rel [{batch}, {tokens}, {width}] -> {target}",
        dtype=dtype,
    )


def test_unmerge(bench, device, full_size):
    sizes = sizes_of("iv25-rel", device, full_size)
    batch, tokens, target, width, heads = sizes
    (x,) = maker("gaussian", sizes, torch.bfloat16, device)(0)
    plan = compress_clips(x, target, heads, return_plan=True)[1]
    rows = plan.assign.long()

    def make(i: int) -> tuple[Tensor]:
        return (make_input("gaussian", (batch, target, width), dtype=torch.bfloat16, seed=i).to(device),)

    (y,) = make(0)

    def check(output: Tensor) -> None:
        assert torch.equal(output.flatten(0, 1), y.flatten(0, 1)[rows])

    bench(
        lambda y: unmerge_tokens(y, plan),
        bytes_moved=(x.numel() + y.numel()) * 2,
        check=check,
        make_inputs=make,
        peers={"torch": lambda y: y.flatten(0, 1)[rows].view(batch, tokens, width)},
        shape=f"iv25-rel {target} -> [{batch}, {tokens}, {width}]",
        dtype="bf16",
    )


def _lengths(tokens: int, target: int) -> list[int]:
    lengths = []
    while tokens > target:
        lengths.append(tokens)
        tokens -= min(tokens // 2, tokens - target)
    return lengths
