# SPDX-License-Identifier: Apache-2.0
"""Peers of `lrc_kernels.token_dropout.attention_scores`, written from the description of the public code, not from it.

All take q [1, Hq, K], the last row of one sequence, and k [L, Hkv, K], and return the scores [L].
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def _reduced(logits: Tensor, head_dim: int) -> Tensor:
    """logits [Hq, L] in the input dtype -> the mean over heads of their fp32 softmax."""
    return (logits.float() * head_dim**-0.5).softmax(-1).mean(0)


def grouped_matmul(q: Tensor, k: Tensor) -> Tensor:
    """One matmul per kv head, its query heads as rows: no key is repeated."""
    kv_heads, head_dim = k.shape[1:]
    return _reduced((q[0].view(kv_heads, -1, head_dim) @ k.permute(1, 2, 0)).flatten(0, 1), head_dim)


def einsum(q: Tensor, k: Tensor) -> Tensor:
    kv_heads, head_dim = k.shape[1:]
    return _reduced(torch.einsum("hgd,thd->hgt", q[0].view(kv_heads, -1, head_dim), k).flatten(0, 1), head_dim)


def videochat_flash(q: Tensor, k: Tensor) -> Tensor:
    """The public form without its projections: keys repeated for the query heads, and a causal mask of [L, L] in fp32
    (with the boolean one that makes it) of which the last row is used."""
    length, kv_heads, head_dim = k.shape
    keys = k.repeat_interleave(q.shape[1] // kv_heads, dim=1).transpose(0, 1)
    mask = torch.full((length, length), torch.finfo(torch.float32).min, device=k.device)
    position = torch.arange(length, device=k.device)
    mask.masked_fill_(position < (position + 1)[:, None], 0)
    logits = (q.transpose(0, 1) @ keys.transpose(1, 2))[:, 0] * head_dim**-0.5
    return (logits + mask[-1]).softmax(-1, dtype=torch.float32).to(q.dtype).mean(0).float()


def read_keys(k: Tensor) -> Tensor:
    """The ceiling: every byte of k read once, by torch's vectorised sum over it as fp32."""
    return k.flatten().view(torch.float32).sum()


def flash_colreduce() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Causal column sums by the public package (q [L, Hq, K], k [L, Hkv, K] -> [L]), None where it is not installed. It
    takes as many key heads as query heads, so that keys are repeated first, and it finds the lse by itself."""
    try:
        from flash_colreduce import flash_colreduce as column_sums
    except ImportError:
        return None

    def run(q: Tensor, k: Tensor) -> Tensor:
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        sums = column_sums(
            q.transpose(0, 1)[None].contiguous(),
            keys.transpose(0, 1)[None].contiguous(),
            reduction="sum",
            is_causal=True,
        )
        return sums[0].float().mean(0)

    return run
