# SPDX-License-Identifier: Apache-2.0
"""The language-model loss: hidden states, the output matrix and targets in, one scalar out, logits never kept."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrc_kernels.checks import check_int, check_tensor, values_are_checked

IGNORE_INDEX = -100


class _ChunkedCrossEntropy(torch.autograd.Function):
    """The gradients are those of a sum, so each chunk computes its own in the forward and no logits outlive it."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, loss_weight: Tensor, chunk: int) -> Tensor:
        wide = torch.float64 if hidden.dtype == torch.float64 else torch.float32
        needs_hidden, needs_weight = ctx.needs_input_grad[:2]
        d_hidden = torch.zeros_like(hidden) if needs_hidden else None
        d_weight = torch.zeros_like(weight, dtype=wide) if needs_weight else None
        loss = torch.zeros((), dtype=wide, device=hidden.device)
        for start in range(0, hidden.shape[0], chunk):
            rows = slice(start, start + chunk)
            supervised = targets[rows] != IGNORE_INDEX
            # A row without a target may hold NaN: it is masked before it meets a product.
            states = torch.where(supervised.unsqueeze(1), hidden[rows], 0.0)
            target = torch.where(supervised, targets[rows], 0).unsqueeze(1)
            scale = torch.where(supervised, loss_weight[rows].to(wide), 0.0)
            logits = (states @ weight.T).to(wide)
            log_sum = logits.logsumexp(1)
            loss += ((log_sum - logits.gather(1, target).squeeze(1)) * scale).sum()
            if d_hidden is None and d_weight is None:
                continue
            d_logits = logits.sub_(log_sum.unsqueeze(1)).exp_()
            d_logits.scatter_add_(1, target, torch.full_like(target, -1, dtype=wide))
            d_logits = (d_logits * scale.unsqueeze(1)).to(hidden.dtype)
            if d_hidden is not None:
                d_hidden[rows] = d_logits @ weight.to(hidden.dtype)
            if d_weight is not None:
                d_weight += (d_logits.T @ states).to(wide)
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.weight_dtype = weight.dtype
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        d_hidden, d_weight = ctx.saved_tensors
        if d_hidden is not None:
            d_hidden = (d_hidden * grads[0]).to(d_hidden.dtype)
        if d_weight is not None:
            d_weight = (d_weight * grads[0]).to(ctx.weight_dtype)
        return d_hidden, d_weight, None, None, None


def chunked_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weight: Tensor,
    *,
    num_targets: int | None = None,
    chunk: int = 2048,
) -> Tensor:
    """sum over rows of loss_weight * cross-entropy(hidden @ weight.T, targets), without the [T, V] logits. Autograd.

    At 160k rows and 92,553 words the logits would take 55 GiB in fp32; this holds `chunk` rows of them at a time.

    Args:
        hidden: [T, D], fp32, bf16, fp16 or fp64.
        weight: [V, D], the output matrix, in hidden's dtype.
        targets: int64 [T], the word that each row has to predict; -100 for rows without a target.
        loss_weight: [T], the share of each row in the loss.
        num_targets: rows with a target, where the host knows their number: only these rows are multiplied, which in a
            pack of video is one in twenty.
        chunk: rows at a time.

    Returns:
        fp32 (fp64 for fp64) scalar.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit.
    """
    check_tensor("hidden", hidden, dims=(2,))
    check_tensor("weight", weight, dims=(2,), like=hidden)
    check_tensor("targets", targets, dims=(1,), dtypes=(torch.int64,), numel=hidden.shape[0], like=hidden)
    check_tensor("loss_weight", loss_weight, dims=(1,), numel=hidden.shape[0], like=hidden)
    check_int("chunk", chunk, minimum=1)
    if weight.shape[1] != hidden.shape[1]:
        raise ValueError(f"weight must have shape [V, {hidden.shape[1]}], got {list(weight.shape)}")
    if num_targets is not None:
        supervised = targets != IGNORE_INDEX
        if values_are_checked(targets) and int(supervised.sum()) != num_targets:
            raise ValueError(f"num_targets must be the rows with a target ({int(supervised.sum())}), got {num_targets}")
        # Each supervised row writes its number to its rank; the others share one place that is cut off.
        rank = torch.where(supervised, supervised.long().cumsum(0) - 1, num_targets)
        number = torch.arange(len(targets), device=targets.device)
        rows = torch.zeros(num_targets + 1, dtype=torch.int64, device=targets.device).scatter_(0, rank, number)[:-1]
        hidden, targets, loss_weight = hidden[rows], targets[rows], loss_weight[rows]
    return _ChunkedCrossEntropy.apply(hidden, weight, targets, loss_weight, chunk)
