# SPDX-License-Identifier: Apache-2.0
"""Scores in three steps, for keys that lie on many ranks, with the kernels of `triton_scores.py`. Launches as
`reference_scores.py` defines the ops."""

from __future__ import annotations

import torch
import triton
from torch import Tensor

from lrc_kernels.token_dropout.triton_scores import (
    attention_scores_fwd_merge_kernel,
    attention_scores_fwd_partial_kernel,
    attention_scores_fwd_reduce_kernel,
    declines,
    head_tiles,
    score_blocks,
    unit_channel_stride,
)


def supports_block_statistics(q: Tensor, k: Tensor, *rest: object) -> str | None:
    return declines("k", k)


def supports_block_factors(statistics: Tensor, *rest: object) -> str | None:
    if statistics.dtype == torch.float32:
        return None
    return f"statistics must be fp32, got {str(statistics.dtype).removeprefix('torch.')}"


supports_block_scores = supports_block_statistics


def _launch_blocks(
    q: Tensor, k: Tensor, cu_blocks: Tensor, query_position: Tensor, p: Tensor | None, softmax_scale: float
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Statistics [2, B, Hq] of blocks that are sequences of their own, row b asking block b, and what kernels share."""
    q, k, blocks = q.contiguous(), unit_channel_stride(k), score_blocks(k.dtype)
    num_rows, heads, head_dim = q.shape
    statistics = torch.zeros(2, num_rows, heads, dtype=torch.float32, device=k.device)
    statistics[0] = -torch.inf
    rows = torch.arange(num_rows + 1, device=k.device)
    shared = (cu_blocks.contiguous(), rows, rows, query_position.contiguous())
    if num_rows:
        with torch.cuda.device_of(k):
            attention_scores_fwd_partial_kernel[(num_rows, k.shape[1])](
                q, k, None, *shared, p, *statistics, 1, k.shape[0], 0, 0, 0, k.stride(0), k.stride(1), softmax_scale,
                **head_tiles(heads, k.shape[1], head_dim), BLOCK_N=blocks.keys, num_warps=blocks.num_warps,
                num_stages=blocks.num_stages,
            )  # fmt: skip
    return statistics, shared


def launch_block_statistics(
    q: Tensor, k: Tensor, cu_blocks: Tensor, query_position: Tensor, softmax_scale: float
) -> Tensor:
    return _launch_blocks(q, k, cu_blocks, query_position, None, softmax_scale)[0]


def launch_block_factors(statistics: Tensor, cu_seqlens_k: Tensor, query_position: Tensor) -> Tensor:
    statistics, blocks = statistics.contiguous(), score_blocks(torch.bfloat16)
    factor = torch.zeros_like(statistics[0])
    num_sequences, heads, num_blocks = factor.shape
    if factor.numel():
        sequence = torch.arange(num_sequences, dtype=torch.int32, device=factor.device)
        with torch.cuda.device_of(statistics):
            attention_scores_fwd_merge_kernel[(num_sequences, heads)](
                cu_seqlens_k.contiguous(), sequence, query_position.contiguous(), *statistics, None, None, factor,
                num_blocks, HQ=heads, BLOCK_N=blocks.keys, BLOCK_B=blocks.merge,
            )  # fmt: skip
    return factor


def launch_block_scores(
    q: Tensor,
    k: Tensor,
    cu_blocks: Tensor,
    query_position: Tensor,
    factor: Tensor,
    head_reduce: str,
    softmax_scale: float,
) -> Tensor:
    blocks, heads = score_blocks(k.dtype), q.shape[1]
    scores = torch.zeros(k.shape[0], dtype=torch.float32, device=k.device)
    p = torch.empty(heads, k.shape[0], dtype=torch.float32, device=k.device)
    (maximum, _), shared = _launch_blocks(q, k, cu_blocks, query_position, p, softmax_scale)
    if q.shape[0]:
        # exp(maximum - offset) is then 1, or 0 where all logits are -inf.
        offset = maximum.masked_fill(maximum == -torch.inf, 0.0)
        with torch.cuda.device_of(k):
            attention_scores_fwd_reduce_kernel[(q.shape[0],)](
                p, *shared, maximum, offset, factor.contiguous(), scores, 1, k.shape[0],
                1.0 / heads if head_reduce == "mean" else 1.0, HQ=heads,
                BLOCK_H=min(blocks.heads, triton.next_power_of_2(heads)), BLOCK_N=blocks.keys, MAX=head_reduce == "max",
            )  # fmt: skip
    return scores
