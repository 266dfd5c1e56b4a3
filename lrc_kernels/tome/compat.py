# SPDX-License-Identifier: Apache-2.0
"""ToMe under the names that its users call: metric in, (merge, unmerge) functions out, for code written for ViT, LLaVA
and video connectors. Clean-room, from the paper (Bolya et al. 2022) and a description of what callers see."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import cast

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_tensor
from lrc_kernels.tome.op import compress_clips, plan_merge, unmerge_tokens
from lrc_kernels.tome.op import merge_tokens as merge_by_plan
from lrc_kernels.tome.plan import MergeBudget, MergePlan, uniform_budget

Merge = Callable[..., Tensor]
Unmerge = Callable[[Tensor], Tensor]
# "amax" is what scatter_reduce calls it, and with it the callers.
MODES = {"mean": "mean", "sum": "sum", "amax": "max"}


def bipartite_soft_matching(
    metric: Tensor, r: int, class_token: bool = False, distill_token: bool = False
) -> tuple[Merge, Unmerge]:
    """One matching step of ToMe, as two functions that carry gradients.

    Rows leave as [unmerged even tokens | odd tokens]. Without a class token the unmerged ones descend in similarity,
    with one they ascend in position, so that it stays in row 0. A distillation token (token 1) leaves in row 1.
    `merge.plan` is the `MergePlan`, which also merges other payloads and says where each row comes from.

    Two things differ from the original on purpose. Its unmerge does not undo the move of the distillation token and
    returns other tokens in its place; here unmerge(merge(x)) puts every row where it was. And matching is fp32 with
    ties to the lowest index, whatever the dtype, so that it does not depend on the device.

    Args:
        metric: [B, N, K], e.g. the keys averaged over heads. A token whose metric is zero or not finite merges into its
            right neighbour, if it has to, and disturbs no other token.
        r: tokens to merge, clamped to half of those that are not protected; where nothing merges (r <= 0), both
            functions are the identity and have no plan.
        class_token: token 0 is never merged away.
        distill_token: token 1 never receives.

    Returns:
        merge(x [B, N, D], mode="mean") -> [B, N - r, D], mode "mean" (unweighted), "sum" or "amax";
        unmerge(y [B, N - r, D]) -> [B, N, D].

    Raises:
        TypeError, ValueError: a metric that is no floating-point [B, N, K], an r that is no int, an unknown mode, an x
        that does not fit.
    """
    check_tensor("metric", metric, dims=(3,))
    if isinstance(r, bool) or not isinstance(r, int):
        raise TypeError(f"r must be an int, got {type(r).__name__}")
    protected = (0,) * bool(class_token) + (1,) * bool(distill_token)
    plan = bipartite_plan(metric, r, protected=protected)
    if plan is None:
        return _identity, _identity

    def merge(x: Tensor, mode: str = "mean") -> Tensor:
        check_choice("mode", mode, tuple(MODES))
        _check_batch("x", x, metric.shape[0])
        return merge_by_plan(x, plan, reduce=MODES[mode])

    def unmerge(y: Tensor) -> Tensor:
        _check_batch("y", y, metric.shape[0])
        return unmerge_tokens(y, plan)

    merge.plan = plan  # type: ignore[attr-defined]
    return merge, unmerge


def merge_wavg(merge: Merge, x: Tensor, size: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """Mean of the merged tokens weighted by their sizes, and the new sizes. Autograd through x.

    Sums run in fp32, so that fp16 features do not overflow and bf16 sizes do not stop counting.

    Args:
        merge: from `bipartite_soft_matching`.
        x: [B, N, D].
        size: [B, N, 1] tokens that each row stands for; None = ones.

    Returns:
        x [B, N - r, D] in its dtype, size [B, N - r, 1] in the dtype of the size given (of x where none was given).
    """
    check_tensor("x", x, dims=(3,))
    if size is None:
        size = torch.ones_like(x[..., :1])
    check_tensor("size", size, dims=(3,), numel=x.shape[0] * x.shape[1], like=x)
    wide = torch.promote_types(x.dtype, torch.float32)
    total = merge(size.to(wide), mode="sum")
    summed = merge(x.to(wide) * size.to(wide), mode="sum")
    return torch.where(total == 0, 0.0, summed / total).to(x.dtype), total.to(size.dtype)


def merge_source(merge: Merge, x: Tensor, source: Tensor | None = None) -> Tensor:
    """Which of the original tokens each row holds: [B, N - r, N_original], 1 where it does.

    It is dense, 16 MiB per clip of 2,048 tokens; `merge.plan.assign` says the same in one int per token.

    Args:
        merge: from `bipartite_soft_matching`.
        x: [B, N, D], used for its shape and device only.
        source: what the step before returned; None = every row is itself.
    """
    if source is None:
        check_tensor("x", x, dims=(3,))
        source = torch.eye(x.shape[1], device=x.device).expand(x.shape[0], -1, -1)
    return merge(source, mode="amax")


def merge_tokens(x: Tensor, target_num_token: int, num_heads: int, *, precision: str = "fp32") -> Tensor:
    """The `merge_tokens` method of the connectors of InternVideo2.5 and VideoChat-Flash: [B, N, D] -> [B, target, D].

    >>> connector.merge_tokens = functools.partial(compat.merge_tokens, num_heads=connector.num_attention_heads)

    Unlike theirs, a clip that already has `target_num_token` tokens passes through instead of failing.

    Args:
        x: [B, N, D] clips, frames first.
        target_num_token: tokens to keep, 1 to N.
        num_heads: heads of the metric: of the LLM in InternVideo2.5 (32), of the ViT in VideoChat-Flash (16).
        precision: "eager_bf16" decides as their bf16 code does, see `plan_merge`.

    Raises:
        TypeError, ValueError: as `compress_clips` does.
    """
    return cast(Tensor, compress_clips(x, target_num_token, num_heads, precision=precision))


def bipartite_plan(
    metric: Tensor, r: int, *, protected: tuple[int, ...] = (), size: Tensor | None = None
) -> MergePlan | None:
    """The plan behind `bipartite_soft_matching`, None where nothing merges.

    Args:
        metric: [B, N, K].
        protected: positions that stay alone: the first P of them, or (1,) for a distillation token without class token.
        size: fp32 [B, N], tokens that each row stands for.
    """
    batch, length, _ = metric.shape
    r = min(r, (length - len(protected)) // 2)
    receivers = length // 2 - sum(position % 2 for position in protected)
    if r <= 0 or receivers <= 0:
        return None
    budget = uniform_budget(batch, length, (r,), metric.device, len(protected))
    flags = None
    if protected:
        flags = torch.zeros(batch, length, dtype=torch.bool, device=metric.device)
        flags[:, list(protected)] = True
    order = "position" if protected[:1] == (0,) else "reference"
    plan = match_tokens(metric, budget, size=size, protected=flags, order=order)
    row = torch.arange(length - r, device=metric.device).expand(batch, -1)
    if order == "position":
        anchor = plan.anchor.view(batch, length - r)
        # The protected tokens first, then the even set, then the odd set, each in order of position.
        row = torch.where(anchor < len(protected), -1, anchor % 2).argsort(dim=1, stable=True)
    elif protected:
        first_odd = (length + 1) // 2 - r
        row = torch.cat(
            [row[:, :1], row[:, first_odd : first_odd + 1], row[:, 1:first_odd], row[:, first_odd + 1 :]], 1
        )
    return plan if order == "reference" and not protected else _reordered(plan, row)


def match_tokens(
    metric: Tensor,
    budget: MergeBudget,
    *,
    size: Tensor | None = None,
    protected: Tensor | None = None,
    destination: Tensor | None = None,
    order: str = "reference",
) -> MergePlan:
    """`plan_merge` for features that are not the metric, such as tokens that are matched by their keys.

    A zero or non-finite metric says nothing about the features of its token, which therefore keep their weight.
    """
    plan = plan_merge(metric, budget, size=size, protected=protected, destination=destination, order=order)
    weight = None if size is None else size.detach().float().reshape(-1)
    plan = dataclasses.replace(plan, weight=weight, binary_weight=weight is None)
    counted = torch.ones(plan.assign.shape[0], 1, device=metric.device) if weight is None else weight[:, None]
    total = merge_by_plan(counted, dataclasses.replace(plan, weight=None, binary_weight=True), reduce="sum")
    return dataclasses.replace(plan, size=total[:, 0])


def _reordered(plan: MergePlan, order: Tensor) -> MergePlan:
    """The plan whose row k of a segment is row order[segment, k] of `plan`."""
    first = plan.layout_out.cu_seqlens[:-1, None]
    rank = (order.argsort(dim=1) + first).flatten().int()
    row = (order + first).flatten()
    return dataclasses.replace(plan, assign=rank[plan.assign.long()], size=plan.size[row], anchor=plan.anchor[row])


def _identity(x: Tensor, mode: str | None = None) -> Tensor:
    return x


def _check_batch(name: str, x: Tensor, batch: int) -> None:
    check_tensor(name, x, dims=(3,))
    if x.shape[0] != batch:
        raise ValueError(f"{name} must hold the metric's {batch} clips, got shape {list(x.shape)}")
