# SPDX-License-Identifier: Apache-2.0
"""Test inputs by name: a shape, a dtype and a seed go in, the same tensor comes out on any machine."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor


def gaussian(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Independent standard normal numbers."""
    return torch.randn(tuple(shape), generator=generator)


def video_like(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Features as frozen video encoders give them: a large common mode, a few clusters, one of which is a hub.

    Cluster sizes fall as 1/rank^2.2 and the largest cluster (a static background) has little noise, so that repeated
    bipartite matching of 1024 tokens to 64 builds one group of half the tokens beside 40 to 50 % singletons.
    """
    *batch, num_tokens, width = shape
    num_clusters = max(2, num_tokens // 4)
    share = torch.arange(1, num_clusters + 1, dtype=torch.float64).pow(-2.2)
    num_draws = max(1, math.prod(batch) * num_tokens)
    cluster = torch.multinomial(share, num_draws, replacement=True, generator=generator)
    cluster = cluster[: math.prod(batch) * num_tokens].reshape(*batch, num_tokens)
    centers = torch.randn(num_clusters, width, generator=generator)
    common = 2.0 * torch.randn(width, generator=generator)
    noise = torch.randn(*batch, num_tokens, width, generator=generator)
    spread = torch.where(cluster == 0, 0.05, 1.0).unsqueeze(-1)
    return common + centers[cluster] + spread * noise


def all_equal(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Every token of the tensor is the same vector: each comparison is a tie, and all work lands on one row."""
    return torch.randn(shape[-1], generator=generator).expand(tuple(shape)).clone()


def with_ties(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Tokens drawn from four vectors of small integers: scores are exact in any dtype, and most of them tie."""
    *batch, num_tokens, width = shape
    vectors = torch.randint(-2, 3, (4, width), generator=generator).float()
    vectors[:, 0] = torch.tensor([1.0, 2.0, -1.0, -2.0])
    return vectors[torch.randint(0, 4, (*batch, num_tokens), generator=generator)]


def with_zero_tokens(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian, with the first, the second and every seventh token zero: cosine similarity is 0/0 there."""
    x = gaussian(shape, generator)
    x[..., :2, :] = 0
    x[..., ::7, :] = 0
    return x


def with_nan_token(shape: Sequence[int], generator: torch.Generator) -> Tensor:
    """Gaussian, with one NaN in the token at half, and an infinity in the one at three quarters, of the first batch."""
    x = gaussian(shape, generator)
    first = x.reshape(-1, *shape[-2:])[:1]
    if first.numel():
        first[0, shape[-2] // 2, 0] = torch.nan
        first[0, (3 * shape[-2]) // 4, -1] = torch.inf
    return x


INPUTS: dict[str, Callable[[Sequence[int], torch.Generator], Tensor]] = {
    maker.__name__: maker for maker in (gaussian, video_like, all_equal, with_ties, with_zero_tokens, with_nan_token)
}


def make_input(
    name: str,
    shape: Sequence[int],
    *,
    dtype: torch.dtype = torch.float32,
    device: torch.device | str = "cpu",
    seed: int = 0,
) -> Tensor:
    """Tokens [..., N, D] of a named distribution, drawn on the CPU in fp32 and then rounded, so equal on every device.

    Args:
        name: a key of `INPUTS`.
        shape: at least [N, D].
        dtype: floating dtype of the result.
        device: where the result lives.
        seed: of the `torch.Generator`; the global one is not touched.

    Raises:
        ValueError: an unknown name, or a shape of fewer than two dimensions.
    """
    if name not in INPUTS:
        raise ValueError(f"name must be one of {', '.join(INPUTS)}, got {name!r}")
    if len(shape) < 2 or min(shape) < 0:
        raise ValueError(f"shape must be [..., N, D] with sizes >= 0, got {list(shape)}")
    return INPUTS[name](shape, torch.Generator().manual_seed(seed)).to(device=device, dtype=dtype)


def segment_lengths(max_segments: int = 6, max_length: int = 40, *, min_segments: int = 1) -> Any:
    """A hypothesis strategy for the lengths of packed segments, in which 0, 1 and `max_length` are common.

    Raises:
        ImportError: hypothesis is not installed.
    """
    strategies = _hypothesis_strategies()
    length = strategies.one_of(
        strategies.sampled_from(sorted({0, 1, 2, max_length})), strategies.integers(0, max_length)
    )
    return strategies.lists(length, min_size=min_segments, max_size=max_segments)


def token_shapes(max_batch: int = 3, max_tokens: int = 40, widths: Sequence[int] = (1, 8, 13, 64)) -> Any:
    """A hypothesis strategy for shapes (B, N, D), N from 1 on.

    Raises:
        ImportError: hypothesis is not installed.
    """
    strategies = _hypothesis_strategies()
    return strategies.tuples(
        strategies.integers(1, max_batch), strategies.integers(1, max_tokens), strategies.sampled_from(tuple(widths))
    )


def _hypothesis_strategies() -> Any:
    try:
        from hypothesis import strategies
    except ImportError as error:
        raise ImportError("hypothesis is not installed (pip install lrc-kernels[test])") from error
    return strategies
