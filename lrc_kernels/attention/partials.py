# SPDX-License-Identifier: Apache-2.0
"""Attention over the keys in several blocks: (out, lse) of two blocks become those of both, or a state in fp32 takes
one block after the other and gives (out, lse) at the end."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.attention import reference
from lrc_kernels.attention.arguments import check_like, check_pack
from lrc_kernels.attention.op import accumulate_op, merge_op
from lrc_kernels.checks import check_device, check_int, check_tensor
from lrc_kernels.layout import VarlenLayout

STATE_DTYPES = (torch.float32, torch.float64)


class _MergePartials(torch.autograd.Function):
    """With weights a = exp(lse - merged), b = exp(lse_block - merged): dout_x = x dmerged and dlse_x = x (dmerged_lse +
    <dmerged, out_x - merged>). All in torch, so that autograd differentiates it again."""

    @staticmethod
    def forward(ctx: Any, *partials: Tensor) -> tuple[Tensor, Tensor]:
        merged = merge_op(*partials)
        ctx.save_for_backward(*partials, *merged)
        return merged

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        *partials, merged, merged_lse = ctx.saved_tensors
        dmerged, dmerged_lse = grads
        gradients: list[Tensor] = []
        for out, lse in (partials[:2], partials[2:]):
            seen = lse.isfinite() & merged_lse.isfinite()
            weight = torch.exp(
                torch.where(seen, lse.to(merged_lse.dtype), -torch.inf) - torch.where(seen, merged_lse, 0)
            )
            seen_thk = seen.T[..., None]
            gradients.append((weight.T[..., None] * dmerged).to(out.dtype))
            difference = torch.where(seen_thk, out.to(merged.dtype) - merged, 0)
            gradients.append((weight * (dmerged_lse + (dmerged * difference).sum(-1).T)).to(lse.dtype))
        return tuple(gradients)


def merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys, from that over each. Autograd.

    Accumulates in fp32 or wider and never rounds the lse, so that many blocks merge without a growing error.

    Args:
        out, out_block: [T, H, K], fp32, bf16, fp16 or fp64.
        lse, lse_block: [H, T], fp32 or fp64, natural logarithm. A row of -inf or +inf (libraries differ) saw no key: it
            has weight 0, whatever its out holds, and so has a row whose lse is NaN beside a finite one. Where neither
            lse is finite the row is empty (out 0, lse -inf), or NaN where one of them is NaN.

    Returns:
        out [T, H, K] and lse [H, T] in fp32, in fp64 where an argument is.

    Raises:
        TypeError, ValueError: dtypes, shapes or devices that do not fit.

    Source: Milakov and Gimelshein 2018 (online softmax); Liu et al. 2023 (ring attention).
    """
    check_tensor("out", out, dims=(3,))
    check_tensor("out_block", out_block, dims=(3,), like=out)
    if out_block.shape != out.shape:
        raise ValueError(f"out_block must have the shape of out {list(out.shape)}, got {list(out_block.shape)}")
    rows = torch.Size((out.shape[1], out.shape[0]))
    check_like("lse", lse, rows, STATE_DTYPES, out)
    check_like("lse_block", lse_block, rows, STATE_DTYPES, out)
    return _MergePartials.apply(out, lse, out_block, lse_block)


@dataclass(frozen=True)
class AttentionState:
    """Attention over the keys seen so far, not yet normalised: a ring folds one block of keys after the other into it,
    and no partial result is rounded to 16 bits. The tensors change in place; no gradient.

    Attributes:
        acc: [T, H, K], sum over keys of exp(logit - m) v, fp32 or fp64, contiguous.
        m: [H, T], the largest logit so far, -inf at first.
        l: [H, T], sum over keys of exp(logit - m).

    Source: Dao et al. 2022 (FlashAttention), algorithm 1, with the division left to the end.
    """

    acc: Tensor
    m: Tensor
    l: Tensor

    @classmethod
    def zeros(
        cls,
        num_rows: int,
        num_heads: int,
        head_dim: int,
        device: torch.device | str | None = None,
        dtype: torch.dtype = torch.float32,
    ) -> AttentionState:
        """The state before any key, for `num_rows` queries; dtype fp32, or fp64 for fp64 queries.

        Raises:
            TypeError: another dtype. ValueError: a negative size.
        """
        for name, size in (("num_rows", num_rows), ("num_heads", num_heads), ("head_dim", head_dim)):
            check_int(name, size, minimum=0)
        if dtype not in STATE_DTYPES:
            raise TypeError(f"dtype must be torch.float32 or torch.float64, got {dtype}")
        acc = torch.zeros(num_rows, num_heads, head_dim, device=device, dtype=dtype)
        m = torch.full((num_heads, num_rows), -torch.inf, device=device, dtype=dtype)
        return cls(acc, m, torch.zeros_like(m))

    def accumulate(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        *,
        cu_seqlens_q: VarlenLayout | Tensor,
        cu_seqlens_k: VarlenLayout | Tensor | None = None,
        max_seqlen_q: int | None = None,
        max_seqlen_k: int | None = None,
        causal: bool = True,
        softmax_scale: float | None = None,
        key_bias: Tensor | None = None,
        window: tuple[int, int] | None = None,
    ) -> AttentionState:
        """Fold one block of keys into the state, in place; arguments as those of `varlen_attention`. Returns self.

        Raises:
            TypeError, ValueError: as `varlen_attention`; q that is not of the state's rows, heads and precision; q, k
                or v that requires a gradient while gradients are enabled.
        """
        pack = check_pack(
            q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, causal, softmax_scale, key_bias, window
        )
        if q.shape != self.acc.shape:
            raise ValueError(f"q must have the state's shape {list(self.acc.shape)}, got {list(q.shape)}")
        check_device("q", q, self.acc)
        for name, value in (("m", self.m), ("l", self.l)):
            check_like(name, value, torch.Size((q.shape[1], q.shape[0])), (self.acc.dtype,), self.acc)
        if reference.accumulation_dtype(q) != self.acc.dtype:
            raise TypeError(f"q must accumulate in the state's dtype ({self.acc.dtype}), got {q.dtype}")
        if torch.is_grad_enabled() and any(x.requires_grad for x in (q, k, v)):
            raise ValueError(
                "q, k and v must not require a gradient, which AttentionState does not carry: use no_grad()"
            )
        accumulate_op(self.acc, self.m, self.l, q, k, v, *pack)
        return self

    def finish(self) -> tuple[Tensor, Tensor]:
        """(out [T, H, K], lse [H, T]) in the state's dtype; 0 and -inf for a row that saw no key."""
        return reference.finish(self.acc, self.m, self.l)
