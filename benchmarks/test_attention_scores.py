# SPDX-License-Identifier: Apache-2.0
"""Scores for token dropout at the sizes of the real models, beside eager torch and a plain read of the keys.

Bytes are those of K, read once: q, and the scores, are small beside it. Lengths are those of 512, 1,000, 3,000 and
10,000 frames at 16 tokens each.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from benchmarks.peers import token_dropout as peers
from lrc_kernels import VarlenLayout
from lrc_kernels.token_dropout import attention_column_sums, attention_scores

# Qwen2-7B, InternLM2.5-7B: query heads, kv heads, head dimension.
HEADS = {"qwen2": (28, 4, 128), "internlm2.5": (32, 8, 128)}
LENGTHS = {"8k": 8_192, "16k": 16_000, "32k": 32_768, "49k": 48_000, "160k": 160_000}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
# The public form holds a mask of L * L * 4 bytes, and a boolean one: what it may take at full size, and else.
LARGEST_MASK = {True: 2 << 30, False: 1 << 24}


def make_keys(seed: int, length: int, heads: tuple[int, int, int], dtype: torch.dtype, device: torch.device) -> Any:
    """(q [1, Hq, K], k [L, Hkv, K]) of random numbers."""
    random = torch.Generator(device).manual_seed(seed)
    q = torch.randn(1, heads[0], heads[2], generator=random, device=device)
    k = torch.randn(length, *heads[1:], generator=random, device=device)
    return q.to(dtype), k.to(dtype)


def exact_scores(q: Tensor, k: Tensor) -> Tensor:
    """In fp64, one kv head at a time."""
    group = q.shape[1] // k.shape[1]
    total = torch.zeros(k.shape[0], dtype=torch.float64, device=k.device)
    for head in range(k.shape[1]):
        logits = q[0, head * group : (head + 1) * group].double() @ k[:, head].double().T
        total += (logits * k.shape[2] ** -0.5).softmax(-1).sum(0)
    return total / q.shape[1]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model", HEADS)
@pytest.mark.parametrize("size", LENGTHS)
def test_attention_scores(bench, device, full_size, size, model, dtype):
    heads = HEADS[model]
    length = LENGTHS[size] if full_size else LENGTHS[size] // 32
    layout = VarlenLayout([length], device)
    zero = torch.zeros(1, dtype=torch.int32, device=device)
    last = zero + length - 1

    def ours(q: Tensor, k: Tensor) -> Tensor:
        return attention_scores(q, k, cu_seqlens_k=layout, query_sequence=zero, query_position=last)

    def make(i: int) -> tuple[Tensor, Tensor]:
        return make_keys(i, length, heads, DTYPES[dtype], device)

    q, k = make(0)
    exact, total_of_k = exact_scores(q, k), float(peers.read_keys(k))

    def check(output: Tensor) -> None:
        # The read of K gives one number, which is no score.
        if output.dim() or output.numel() != 1 or float(output) != total_of_k:
            # Eager bf16 rounds its logits, whose error the exponential multiplies.
            bound = 2e-5 if dtype == "fp32" else 2.0**-5
            assert (output.double() - exact).abs().max() <= bound * exact.max()

    assert (ours(q, k).double() - exact).abs().max() <= 1e-5 * exact.max()
    contestants = {"grouped_matmul": peers.grouped_matmul, "einsum": peers.einsum}
    if 5 * length**2 <= LARGEST_MASK[full_size]:
        contestants["videochat_flash"] = peers.videochat_flash
    contestants["read of K"] = lambda q, k: peers.read_keys(k)
    bench(
        ours,
        bytes_moved=k.numel() * k.element_size(),
        flops=2 * length * heads[0] * heads[2],
        check=check,
        make_inputs=make,
        peers=contestants,
        backend="cpu" if device.type == "cpu" else "triton",
        shape=f"{model} {heads[0]}/{heads[1]}/{heads[2]}, {length} keys, 1 row",
        dtype=dtype,
    )


@pytest.mark.parametrize("model", HEADS)
def test_column_sums(bench, device, full_size, model):
    """Column sums from a known lse beside eager torch, which holds P [Hq, L, L]. On a CPU both are torch."""
    query_heads, kv_heads, head_dim = HEADS[model]
    length = 8_192 if device.type == "cuda" else 2_048 if full_size else 256
    layout = VarlenLayout([length], device)
    group = query_heads // kv_heads

    def probabilities(q: Tensor, k: Tensor) -> Tensor:
        logits = torch.einsum("ihd,jhd->hij", q, k.repeat_interleave(group, dim=1)).float() * head_dim**-0.5
        return logits.masked_fill(torch.ones_like(logits[0], dtype=torch.bool).triu(1), -torch.inf)

    def make(i: int) -> tuple[Tensor, Tensor, Tensor]:
        random = torch.Generator(device).manual_seed(i)
        q = torch.randn(length, query_heads, head_dim, generator=random, device=device).bfloat16()
        k = torch.randn(length, kv_heads, head_dim, generator=random, device=device).bfloat16()
        lse = torch.cat([probabilities(q[:, h : h + group], k[:, h // group : h // group + 1]).logsumexp(-1)
                         for h in range(0, query_heads, group)])  # fmt: skip
        return q, k, lse

    def ours(q: Tensor, k: Tensor, lse: Tensor) -> Tensor:
        return attention_column_sums(q, k, lse, cu_seqlens_q=layout, cu_seqlens_k=layout)

    q, k, lse = make(0)
    exact = torch.zeros(length, dtype=torch.float64, device=device)
    for head in range(query_heads):
        logits = (q[:, head].double() @ k[:, head // group].double().T) * head_dim**-0.5
        exact += (logits - lse[head].double()[:, None]).exp().tril().sum(0) / query_heads

    def check(output: Tensor) -> None:
        # Eager bf16 rounds its logits, whose error the exponential multiplies.
        assert ((output.double() - exact).abs() <= 2.0**-5 * exact.abs()).all()

    contestants = {"eager": lambda q, k, lse: probabilities(q, k).softmax(-1).sum(1).mean(0)}
    if device.type == "cuda" and (colreduce := peers.flash_colreduce()) is not None:
        contestants["flash_colreduce"] = lambda q, k, lse: colreduce(q, k)
    bench(
        ours,
        bytes_moved=2 * length * head_dim * (query_heads + kv_heads),
        flops=length**2 * query_heads * head_dim,
        check=check,
        make_inputs=make,
        peers=contestants,
        backend="reference" if device.type == "cpu" else "triton",
        shape=f"{model} {query_heads}/{kv_heads}/{head_dim}, {length} rows and keys, causal",
        dtype="bf16",
    )
