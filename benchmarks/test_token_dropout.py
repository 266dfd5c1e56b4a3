# SPDX-License-Identifier: Apache-2.0
"""One drop inside the LLM at the sizes of the real models: select, then move every row once.

Bytes are the fewest that the task needs: scores and flags read once, every kept row read and written once (with the
norm: read once, written twice; its backward reads three rows and the upstream of kept rows and writes all rows).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import drop_tokens as peers
from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.testing.tolerance import assert_close
from lrc_kernels.token_dropout import drop_budget, drop_tokens, drop_tokens_rmsnorm, select_tokens

# Packed tokens of 512, 1000, 3000 and 10,000 frames; width of Qwen2-7B and InternLM2.5-7B. A CPU takes an eighth.
TOKENS = {"8k": 8192, "16k": 16384, "49k": 49152, "160k": 160_000}
WIDTHS = [3584, 4096]
HEAD_DIM, RATIO, EPS = 128, 0.5, 1e-6


def sizes_of(tokens: str, width: int, device: torch.device, full_size: bool) -> tuple[int, int]:
    """(T, D), an eighth of the tokens on a CPU and a quarter of the width where the sizes are not full."""
    total = TOKENS[tokens] if device.type == "cuda" else TOKENS[tokens] // 8
    return (total, width) if full_size else (total // 4, width // 4)


class Pack:
    """Two sequences, 90 % of each one visual span behind a prompt, as a video and its question are."""

    def __init__(self, total: int, device: torch.device):
        first = total * 3 // 5
        self.layout = VarlenLayout([first, total - first], device)
        flags = []
        for length in self.layout.lengths:
            row = torch.arange(length)
            flags.append((row >= length // 20) & (row < length // 20 + length * 9 // 10))
        self.droppable = torch.cat(flags).to(device)
        self.budget = drop_budget(self.layout, [int(f.sum()) for f in flags], keep=RATIO)
        self.keep = [int(int(f.sum()) * RATIO) for f in flags]


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_drop_step(bench, device, full_size, tokens, width):
    total, width = sizes_of(tokens, width, device, full_size)
    pack = Pack(total, device)
    kept = pack.budget.num_kept

    def make(i: int) -> tuple[Tensor, ...]:
        random = torch.Generator(device).manual_seed(i)
        draw = {"generator": random, "device": device}
        hidden = torch.randn(total, width, **draw).bfloat16()
        labels, positions = (torch.randint(0, 32000, (total,), **draw) for _ in range(2))
        cos, sin = (torch.randn(total, HEAD_DIM, **draw).bfloat16() for _ in range(2))
        return torch.randn(total, **draw), hidden, labels, positions, cos, sin

    def ours(scores: Tensor, *rows: Tensor) -> tuple[Tensor, ...]:
        selection = select_tokens(pack.layout, pack.droppable, pack.budget, mode="topk", scores=scores)
        return drop_tokens(rows, selection)

    def peer(function: Callable) -> Callable:
        options = (pack.droppable, pack.keep, pack.layout.lengths)
        return lambda scores, *rows: function(rows, scores, *options)

    scores, *rows = make(0)
    index = []
    start = 0
    for length, k in zip(pack.layout.lengths, pack.keep, strict=True):
        own = torch.arange(start, start + length, device=device)
        visual = own[pack.droppable[own]]
        best = visual[scores[visual].double().argsort(descending=True, stable=True)[:k]]
        index.append(torch.cat([own[~pack.droppable[own]], best]).sort().values)
        start += length
    wanted = tuple(x[torch.cat(index)] for x in rows)

    def check(output: tuple[Tensor, ...]) -> None:
        for got, expected in zip(output, wanted, strict=True):
            assert torch.equal(got, expected)

    row_bytes = sum(x[0].numel() * x.element_size() for x in rows)
    bench(
        ours,
        bytes_moved=2 * kept * row_bytes + 5 * total,
        check=check,
        make_inputs=make,
        peers={"published": peer(peers.published), "torch_best": peer(peers.torch_best)},
        shape=f"{total} -> {kept} x {width}",
        dtype="bf16",
    )


@pytest.mark.parametrize("width", WIDTHS)
@pytest.mark.parametrize("tokens", TOKENS)
def test_drop_tokens_rmsnorm(bench, device, full_size, tokens, width):
    total, width = sizes_of(tokens, width, device, full_size)
    pack = Pack(total, device)
    selection = select_tokens(pack.layout, pack.droppable, pack.budget, mode="linspace")
    index = selection.indices.long()

    def make(i: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator(device).manual_seed(i)
        residual = torch.randn(total, width, generator=random, device=device).bfloat16()
        return residual, torch.randn(width, generator=random, device=device).bfloat16()

    def torch_best(residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dropped = residual.index_select(0, index)
        return dropped, torch.nn.functional.rms_norm(dropped, (width,), weight, EPS)

    def published(residual: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
        dropped = residual.index_select(0, index)
        return dropped, peers.llama_rms_norm(dropped, weight, EPS)

    residual, weight = make(0)
    wide = residual[index].double()
    exact = weight.double() * wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + EPS)
    same = published(residual, weight)[1]

    def check(output: Any) -> None:
        assert torch.equal(output[0], residual[index])
        assert_close(output[1], exact, same)

    bench(
        lambda residual, weight: drop_tokens_rmsnorm(residual, weight, EPS, selection),
        bytes_moved=3 * selection.num_kept * width * 2,
        check=check,
        make_inputs=make,
        peers={"published": published, "torch_best": torch_best},
        shape=f"{total} -> {selection.num_kept} x {width}",
        dtype="bf16",
    )


@pytest.mark.parametrize("mode", ["topk", "linspace", "random", "bernoulli"])
@pytest.mark.parametrize("tokens", TOKENS)
def test_select(bench, device, full_size, tokens, mode):
    total, _ = sizes_of(tokens, 0, device, full_size)
    pack = Pack(total, device)

    def make(i: int) -> tuple[Tensor, Tensor]:
        random = torch.Generator(device).manual_seed(i)
        return torch.randn(total, generator=random, device=device), torch.tensor(i, device=device)

    def ours(scores: Tensor, seed: Tensor) -> Tensor:
        options = {"mode": mode, "seed": seed, "layer": 4}
        if mode == "bernoulli":
            return select_tokens(pack.layout, pack.droppable, keep=RATIO, capacity=total, **options).inverse
        scored = scores if mode == "topk" else None
        return select_tokens(pack.layout, pack.droppable, pack.budget, scores=scored, **options).inverse

    with use_backend("reference"):
        wanted = ours(*make(0))

    def check(inverse: Tensor) -> None:
        assert torch.equal(inverse, wanted)

    bench(
        ours,
        bytes_moved=total * (5 + 4 * (mode == "topk")) + 4 * pack.budget.num_kept,
        check=check,
        make_inputs=make,
        shape=f"{total} -> {pack.budget.num_kept}",
        dtype="fp32",
        mode=mode,
    )
