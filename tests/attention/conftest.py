# SPDX-License-Identifier: Apache-2.0
"""Inputs of the attention tests, and attention as eager torch computes it in any dtype: the measure of a backend."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from lrc_kernels import VarlenLayout

# Name: (rows of q, rows of k) per sequence; empty sequences on either side, Lq below, at and above Lk.
LAYOUTS = {
    "self": ([7, 0, 1, 20, 5], [7, 0, 1, 20, 5]),
    "cross": ([3, 0, 9, 4, 1, 6], [8, 5, 9, 0, 6, 2]),
    "one": ([33], [33]),
    "decode": ([1, 1, 1], [12, 1, 19]),
}
WINDOWS = [None, (3, -1), (-1, 2), (0, 0), (4, 3)]


@pytest.fixture
def random() -> torch.Generator:
    """A seeded generator: the same numbers in every run and in any order of the tests."""
    return torch.Generator().manual_seed(20250121)


@pytest.fixture
def make_problem(random: torch.Generator) -> Callable[..., SimpleNamespace]:
    """make(layout, dtype, heads=(Hq, Hkv), head_dim, bias, **options): q, k, v, dout, and `options` for the ops."""

    def make(
        layout: str | tuple[list[int], list[int]],
        dtype: torch.dtype = torch.float32,
        *,
        heads: tuple[int, int] = (4, 2),
        head_dim: int = 8,
        bias: bool = False,
        **options: object,
    ) -> SimpleNamespace:
        lengths_q, lengths_k = LAYOUTS[layout] if isinstance(layout, str) else layout
        draw = lambda *shape: torch.randn(*shape, generator=random).to(dtype)  # noqa: E731
        shape_q, shape_k = (sum(lengths_q), heads[0], head_dim), (sum(lengths_k), heads[1], head_dim)
        problem = SimpleNamespace(q=draw(*shape_q), k=draw(*shape_k), v=draw(*shape_k), dout=draw(*shape_q))
        problem.options = {
            "cu_seqlens_q": VarlenLayout(lengths_q),
            "cu_seqlens_k": VarlenLayout(lengths_k),
            **options,
        }
        if bias:
            drawn = torch.randn(sum(lengths_k), generator=random)
            hidden = torch.rand(sum(lengths_k), generator=random) < 0.2
            wide = torch.float64 if dtype == torch.float64 else torch.float32
            problem.options["key_bias"] = drawn.masked_fill(hidden, -torch.inf).to(wide)
        return problem

    return make


@pytest.fixture
def eager() -> Callable[..., tuple[Tensor, ...]]:
    """eager(problem, dtype) -> (out, lse, dq, dk, dv): dense attention per sequence and head, all in `dtype`; the lse
    in fp32 or wider."""
    return eager_attention


def eager_attention(problem: SimpleNamespace, dtype: torch.dtype) -> tuple[Tensor, ...]:
    options = problem.options
    q, k, v = (x.detach().to(dtype).requires_grad_() for x in (problem.q, problem.k, problem.v))
    ratio = q.shape[1] // k.shape[1]
    left, right = options.get("window") or (-1, -1)
    scale = options.get("softmax_scale") or q.shape[2] ** -0.5
    outs, lses = [], []
    ends_q, ends_k = options["cu_seqlens_q"].cu_seqlens.tolist(), options["cu_seqlens_k"].cu_seqlens.tolist()
    for (q0, q1), (k0, k1) in zip(pairwise(ends_q), pairwise(ends_k), strict=True):
        seen = torch.tensor(
            [
                [
                    sees(j - (i + (k1 - k0) - (q1 - q0)), options.get("causal", True), left, right)
                    for j in range(k1 - k0)
                ]
                for i in range(q1 - q0)
            ],
            dtype=torch.bool,
        ).reshape(q1 - q0, k1 - k0)
        if (bias := options.get("key_bias")) is not None:
            seen &= bias[k0:k1] > -torch.inf
        k_hjd, v_hjd = (x[k0:k1].repeat_interleave(ratio, 1).transpose(0, 1) for x in (k, v))
        scores = q[q0:q1].transpose(0, 1) @ k_hjd.mT * scale
        if bias is not None:
            scores = scores + bias[k0:k1].masked_fill(bias[k0:k1] == -torch.inf, 0).to(dtype)
        some = seen.any(-1)
        # Rows without a key get one whose probability is then struck out, so that no NaN enters the gradients.
        hidden = ~seen & some[:, None]
        p = scores.masked_fill(hidden, -torch.inf).softmax(-1) * some[:, None]
        outs.append((p @ v_hjd).transpose(0, 1))
        wide = torch.promote_types(dtype, torch.float32)
        lses.append(scores.to(wide).masked_fill(~seen, -torch.inf).logsumexp(-1) if k1 > k0 else
                    torch.full((q.shape[1], q1 - q0), -torch.inf, dtype=wide))  # fmt: skip
    out, lse = torch.cat(outs), torch.cat(lses, -1)
    gradients = torch.autograd.grad(out, (q, k, v), problem.dout.to(dtype))
    return out.detach(), lse.detach(), *gradients


def sees(distance: int, causal: bool, left: int, right: int) -> bool:
    """Whether a query sees the key that stands `distance` after its diagonal."""
    return not (causal and distance > 0) and (right < 0 or distance <= right) and (left < 0 or distance >= -left)
