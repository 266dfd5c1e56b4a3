# SPDX-License-Identifier: Apache-2.0
"""What the ToMe ops check of their arguments before any kernel runs."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.checks import check_device, check_int, check_tensor, values_are_checked
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.tome.plan import MergeBudget, MergePlan, TokenLayout, merge_budget, merge_schedule, uniform_budget


def resolve_budget(
    metric: Tensor, budget: MergeBudget | None, target: int | None, r: int | list[int] | None
) -> MergeBudget:
    """The budget given, or the one that `target` or `r` makes for a dense metric."""
    if budget is not None:
        if target is not None or r is not None:
            raise ValueError(f"budget already fixes the merge, got target={target!r}, r={r!r} besides it")
        if not isinstance(budget, MergeBudget):
            raise TypeError(f"budget must be a MergeBudget, got {type(budget).__name__}")
        rows = metric.shape[0] if metric.dim() == 2 else metric.shape[0] * metric.shape[1]
        if rows != budget.layout_in.num_tokens:
            raise ValueError(f"metric must hold the budget's {budget.layout_in.num_tokens} tokens, got {rows}")
        check_device("metric", metric, budget.r)
        return budget
    if metric.dim() != 3:
        raise ValueError("a packed metric [T, K] needs a budget (merge_budget), got none")
    batch, length = metric.shape[0], metric.shape[1]
    if target is not None and r is None:
        return uniform_budget(batch, length, merge_schedule(length, target), metric.device)
    return merge_budget(VarlenLayout([length] * batch, metric.device), target=target, r=r)


def check_features(x: Tensor, layout: TokenLayout | None, name: str = "x") -> tuple[list[int], int | None]:
    """(the layout's ints, or [] without one; clips, or None for packed x)."""
    check_tensor(name, x, dims=(2, 3))
    if layout is None:
        return [], x.shape[0] if x.dim() == 3 else None
    if not isinstance(layout, TokenLayout):
        raise TypeError(f"layout must be a TokenLayout, got {type(layout).__name__}")
    return layout.as_ints(), layout.num_clips(x)


def check_heads(x: Tensor, num_heads: int, layout: TokenLayout | None) -> tuple[list[int], int | None]:
    """As `check_features`; ValueError where the heads do not divide the token width."""
    ints, batch = check_features(x, layout)
    width = x.shape[-1] * (layout.shuffle**2 if layout is not None else 1)
    check_int("num_heads", num_heads, minimum=1)
    if width % num_heads:
        raise ValueError(f"num_heads must divide the token width {width}, got {num_heads}")
    return ints, batch


def check_flags(name: str, flags: Tensor | None, payload: Tensor) -> Tensor | None:
    """The flags of packed tokens, bool [T], or None."""
    if flags is None:
        return None
    check_tensor(name, flags, dims=(1, 2), dtypes=(torch.bool,), numel=payload.shape[0], like=payload)
    return flags.reshape(-1).contiguous()


def check_protected(protected: Tensor, budget: MergeBudget) -> None:
    """ValueError where a segment protects more tokens than the budget allows for."""
    if not values_are_checked(protected):
        return
    for segment, flags in enumerate(protected.split(list(budget.layout_in.lengths))):
        if int(flags.sum()) > budget.num_protected:
            raise ValueError(
                f"protected must mark at most num_protected = {budget.num_protected} tokens of a segment "
                f"(merge_budget(num_protected=...)), got {int(flags.sum())} in segment {segment}"
            )


def check_plan(plan: MergePlan) -> None:
    if not isinstance(plan, MergePlan):
        raise TypeError(f"plan must be a MergePlan, got {type(plan).__name__}")


def check_threshold(threshold: float | None) -> None:
    if threshold is not None and not isinstance(threshold, (int, float)):
        raise TypeError(f"threshold must be a float, got {type(threshold).__name__}")
    if threshold is not None and threshold != threshold:
        raise ValueError("threshold must be a number, got nan")


def check_destination(destination: Tensor, protected: Tensor | None, budget: MergeBudget) -> None:
    """ValueError where set B serves several iterations, or leaves a segment too few sources or no receiver."""
    if budget.num_iterations > 1:
        raise ValueError(
            f"destination fixes set B of one iteration, got a budget of {budget.num_iterations} iterations"
        )
    if not values_are_checked(destination) or budget.num_iterations == 0:
        return
    movable, open_ = ~destination, destination
    if protected is not None:
        movable, open_ = movable & ~protected, open_ & ~protected
    lengths = list(budget.layout_in.lengths)
    for segment, (sources, receivers) in enumerate(zip(movable.split(lengths), open_.split(lengths), strict=True)):
        r = int(budget.r[0, segment])
        if r > int(sources.sum()) or (r > 0 and not bool(receivers.any())):
            raise ValueError(
                f"destination must leave r = {r} sources and one receiver in segment {segment}, "
                f"got {int(sources.sum())} and {int(receivers.sum())}"
            )
