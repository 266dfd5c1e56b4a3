# SPDX-License-Identifier: Apache-2.0
"""ToMe ops: x [B, N, D] or packed [T, D] -> metric -> MergePlan -> merged rows, and back again.

The whole schedule runs on the metric, so that the features are read once for the metric and once for the merge.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import Op
from lrc_kernels.checks import check_choice, check_device, check_tensor, check_values
from lrc_kernels.tome import native, reference
from lrc_kernels.tome.arguments import (
    check_destination,
    check_features,
    check_flags,
    check_heads,
    check_plan,
    check_protected,
    check_threshold,
    resolve_budget,
)
from lrc_kernels.tome.plan import MergeBudget, MergePlan, TokenLayout, merge_schedule, uniform_budget

PRECISIONS = ("fp32", "bf16", "eager_bf16")
ORDERS = ("reference", "position")
ZERO_POLICIES = ("isolate", "reference")
REDUCTIONS = ("mean", "sum", "max")


def _token_shape(x: Tensor, layout: list[int]) -> tuple[Any, Any]:
    if not layout:
        return x.numel() // x.shape[-1] if x.dim() == 2 else x.shape[0] * x.shape[1], x.shape[-1]
    clip_frames, h, w, shuffle, _ = layout
    return x.shape[0] // clip_frames * (clip_frames * h * w // shuffle**2), shuffle**2 * x.shape[-1]


def _fake_head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    rows, width = _token_shape(x, layout)
    return x.new_empty(rows, width // num_heads, dtype=reference.accumulation_dtype(x))


def _fake_plan(metric: Tensor, cu_in: Tensor, cu_out: Tensor, r: Tensor, size: Any, protected: Any, destination: Any,
               num_out: int, *options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    total = metric.shape[0]
    return (
        metric.new_empty(total, dtype=torch.int32),
        metric.new_empty(num_out, dtype=torch.float32),
        metric.new_empty(total, dtype=torch.float32),
        metric.new_empty(num_out, dtype=torch.int32),
        metric.new_empty(num_out, dtype=torch.bool),
    )


def _fake_merge(x: Tensor, assign: Tensor, size: Tensor, weight: Any, cu_in: Tensor, cu_out: Tensor, num_out: int,
                max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int]) -> Tensor:  # fmt: skip
    return x.new_empty(num_out, _token_shape(x, layout)[1])


def _fake_compress(x: Tensor, cu_in: Tensor, cu_out: Tensor, r: Tensor, num_out: int, max_seqlen: int, num_heads: int,
                   precision: str, layout: list[int]) -> tuple[Tensor, ...]:  # fmt: skip
    rows, width = _token_shape(x, layout)
    assign, size, weight, anchor, _ = _fake_plan(x.new_empty(rows, 0), cu_in, cu_out, r, None, None, None, num_out)
    return x.new_empty(num_out, width), assign, size, weight, anchor


head_mean_op = Op("tome_head_mean_fwd(Tensor x, int num_heads, int[] layout) -> Tensor", _fake_head_mean)
plan_op = Op(
    "tome_plan_fwd(Tensor metric, Tensor cu_seqlens_in, Tensor cu_seqlens_out, Tensor r, Tensor? size, "
    "Tensor? protected, Tensor? destination, SymInt num_out, SymInt max_seqlen, float? threshold, str precision, "
    "str order, str zero_policy, int num_heads) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_plan,
)
merge_op = Op(
    "tome_merge_fwd(Tensor x, Tensor assign, Tensor size, Tensor? weight, Tensor cu_seqlens_in, Tensor cu_seqlens_out, "
    "SymInt num_out, SymInt max_seqlen_out, str reduce, bool binary_weight, int[] layout) -> Tensor",
    _fake_merge,
)
gather_op = Op(
    "tome_gather_fwd(Tensor y, Tensor assign, Tensor? size, Tensor? weight, int[] layout) -> Tensor",
    lambda y, assign, size, weight, layout: reference.empty_tokens(y, assign.shape[0], layout),
)
max_backward_op = Op(
    "tome_merge_max_bwd(Tensor grad, Tensor x, Tensor y, Tensor assign, Tensor? weight, int[] layout) -> Tensor",
    lambda grad, x, y, assign, weight, layout: x.new_empty(x.shape if layout else (assign.shape[0], x.shape[-1])),
)
compress_op = Op(
    "tome_compress_fwd(Tensor x, Tensor cu_seqlens_in, Tensor cu_seqlens_out, Tensor r, SymInt num_out, "
    "SymInt max_seqlen, int num_heads, str precision, int[] layout) -> (Tensor, Tensor, Tensor, Tensor, Tensor)",
    _fake_compress,
)


def _triton(name: str) -> Any:
    """Launch functions are imported on the first call, so that the package imports where Triton is missing."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module("lrc_kernels.tome.triton_kernels"), name)(*args)

    return launch


def _rows_per_clip(num_out: int, r: Tensor) -> int:
    """Rows that each clip keeps, of clips that all have one budget r [I, B]."""
    return num_out // max(1, r.shape[1])


def _compress_in_steps(backend: str) -> Any:
    """The head mean, the plan and the merge of a backend that has no kernel for the whole."""

    def run(x: Tensor, cu_in: Tensor, cu_out: Tensor, r: Tensor, num_out: int, max_seqlen: int, num_heads: int,
            precision: str, layout: list[int]) -> tuple[Tensor, ...]:  # fmt: skip
        head_mean, plan, merge = (op.implementations[backend].run for op in (head_mean_op, plan_op, merge_op))
        metric = head_mean(x, num_heads, layout)
        options = (num_out, max_seqlen, None, precision, "reference", "isolate", 1)
        assign, size, weight, anchor, _ = plan(metric, cu_in, cu_out, r, None, None, None, *options)
        y = merge(x, assign, size, weight, cu_in, cu_out, num_out, _rows_per_clip(num_out, r), "mean", True, layout)
        return y, assign, size, weight, anchor

    return run


for _op, _name in (
    (head_mean_op, "head_mean"),
    (plan_op, "plan"),
    (merge_op, "merge"),
    (gather_op, "gather"),
    (max_backward_op, "max_backward"),
    (compress_op, "compress"),
):
    _op.implement("reference", getattr(reference, _name, None) or _compress_in_steps("reference"))
    if _op is not compress_op:
        _op.implement("triton", _triton(f"launch_{_name}"), supports=_triton(f"supports_{_name}"))
    for _backend in ("cpu", "cuda"):
        if hasattr(native, f"{_backend}_{_name}"):
            _op.implement(
                _backend,
                getattr(native, f"{_backend}_{_name}"),
                supports=getattr(native, f"{_backend}_supports_{_name}"),
                available=getattr(native, f"{_backend}_unavailable"),
            )
compress_op.implement(
    "triton",
    _compress_in_steps("triton"),
    supports=lambda x, *rest: head_mean_op.implementations["triton"].supports(x, rest[-3], rest[-1]),
)


class _HeadMean(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
        ctx.x_shape, ctx.dtype, ctx.num_heads, ctx.layout = x.shape, x.dtype, num_heads, layout
        return head_mean_op(x, num_heads, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        spread = (grads[0] / ctx.num_heads).to(ctx.dtype).repeat(1, ctx.num_heads)
        return reference.rows_of(spread, ctx.layout).reshape(ctx.x_shape), None, None


class _Merge(torch.autograd.Function):
    """y = merge(x): linear for "mean" and "sum", so its backward is a gather and the backward's backward is itself."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, assign: Tensor, size: Tensor, weight: Tensor | None, cu_in: Tensor, cu_out: Tensor,
                max_seqlen_out: int, reduce: str, binary_weight: bool, layout: list[int]) -> Tensor:  # fmt: skip
        y = merge_op(
            x, assign, size, weight, cu_in, cu_out, size.shape[0], max_seqlen_out, reduce, binary_weight, layout
        )
        kept = (x, y) if reduce == "max" else (None, None)
        ctx.save_for_backward(assign, size, weight, cu_in, cu_out, *kept)
        ctx.options = (max_seqlen_out, reduce, binary_weight, layout)
        ctx.x_shape = x.shape
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assign, size, weight, cu_in, cu_out, x, y = ctx.saved_tensors
        _, reduce, _, layout = ctx.options
        if reduce == "max":
            dx = max_backward_op(grads[0].contiguous(), x, y, assign, weight, layout)
        else:
            dx = _Gather.apply(
                grads[0], assign, size if reduce == "mean" else None, weight, cu_in, cu_out, size, *ctx.options
            )
        return dx.reshape(ctx.x_shape), *[None] * 9


class _Compress(torch.autograd.Function):
    """(y, assign, size, weight, anchor) of clips; only y has a gradient, which is that of the merge."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, cu_in: Tensor, cu_out: Tensor, r: Tensor, num_out: int, max_seqlen: int,
                num_heads: int, precision: str, layout: list[int]) -> tuple[Tensor, ...]:  # fmt: skip
        y, *plan = compress_op(x, cu_in, cu_out, r, num_out, max_seqlen, num_heads, precision, layout)
        assign, size, weight, _ = plan
        ctx.mark_non_differentiable(*plan)
        ctx.save_for_backward(assign, size, weight, cu_in, cu_out)
        ctx.options = (_rows_per_clip(num_out, r), "mean", True, layout)
        ctx.x_shape = x.shape
        return y, *plan

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assign, size, weight, cu_in, cu_out = ctx.saved_tensors
        dx = _Gather.apply(grads[0], assign, size, weight, cu_in, cu_out, size, *ctx.options)
        return dx.reshape(ctx.x_shape), *[None] * 8


class _Gather(torch.autograd.Function):
    """x = gather(y), the transpose of the merge; `out_size` and what follows it are what the merge needs."""

    @staticmethod
    def forward(ctx: Any, y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, cu_in: Tensor,
                cu_out: Tensor, out_size: Tensor, max_seqlen_out: int, reduce: str, binary_weight: bool,
                layout: list[int]) -> Tensor:  # fmt: skip
        ctx.save_for_backward(assign, weight, cu_in, cu_out, out_size)
        ctx.options = (max_seqlen_out, reduce, binary_weight, layout)
        return gather_op(y.contiguous(), assign, size, weight, layout)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        assign, weight, cu_in, cu_out, out_size = ctx.saved_tensors
        return _Merge.apply(grads[0], assign, out_size, weight, cu_in, cu_out, *ctx.options), *[None] * 10


def head_mean(x: Tensor, num_heads: int, *, layout: TokenLayout | None = None) -> Tensor:
    """The matching metric of the connector: the mean of x over its heads, in fp32 (fp64 for fp64). Autograd.

    Args:
        x: [B, N, D] or packed [T, D]; with `layout` a ViT output [F, prefix + h*w, D], read in place.
        num_heads: heads that the token width D_token (shuffle^2 * D with `layout`, else D) splits into.

    Returns:
        [B, N, D_token / num_heads], or [T, ...] for packed x.

    Raises:
        TypeError: a dtype that is no fp32, bf16, fp16, fp64. ValueError: shapes that do not fit.

    Source: the released connector's metric (InternVideo2.5 section 3.1); 32 heads of 128 channels in the 8B model.
    """
    ints, batch = check_heads(x, num_heads, layout)
    metric = _HeadMean.apply(x, num_heads, ints)
    if batch is None:
        return metric
    return metric.view(batch, x.shape[1] if layout is None else layout.tokens_per_clip, metric.shape[1])


def plan_merge(
    metric: Tensor,
    budget: MergeBudget | None = None,
    *,
    target: int | None = None,
    r: int | list[int] | None = None,
    size: Tensor | None = None,
    protected: Tensor | None = None,
    destination: Tensor | None = None,
    threshold: float | None = None,
    precision: str = "fp32",
    order: str = "reference",
    zero_policy: str = "isolate",
) -> MergePlan:
    """Match tokens bipartitely and say which output row each of them joins. No gradient.

    Args:
        metric: [B, N, K], or packed [T, K] with a budget.
        budget: from `merge_budget`; for dense metric `target` or `r` makes one.
        size: fp32 [T] (or [B, N]) weights of the input tokens, >= 0; None = ones.
        protected: bool [T] (or [B, N]), tokens that never merge away and never receive; at most
            `budget.num_protected` in a segment.
        destination: bool [T] (or [B, N]), set B of the (then only) iteration instead of the odd tokens.
        threshold: tokens whose best similarity is below it stay. `layout_out` then has room for every input token and
            `valid` says which rows are real.
        precision: "fp32"; "bf16" rounds metric, norms and scores to bf16; "eager_bf16" is the public loop, which rounds
            the merged metric to bf16 in every iteration (reference backend only).
        order: rows of a segment as the public loop leaves them, or ascending in `anchor` ("position").
        zero_policy: "isolate" gives a zero or non-finite token similarity -inf both ways, and weight 0 if it has to
            merge (into its right neighbour); "reference" lets NaN through as the public loop does.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.

    Source: InternVideo2.5 section 3.1; Bolya et al. 2022, section 3.
    """
    check_choice("precision", precision, PRECISIONS)
    check_choice("order", order, ORDERS)
    check_choice("zero_policy", zero_policy, ZERO_POLICIES)
    check_tensor("metric", metric, dims=(2, 3))
    budget = resolve_budget(metric, budget, target, r)
    return _plan(
        metric.detach().flatten(0, -2),
        budget,
        size,
        protected,
        destination,
        threshold,
        precision,
        order,
        zero_policy,
        1,
    )


def merge_tokens(x: Tensor, plan: MergePlan, *, layout: TokenLayout | None = None, reduce: str = "mean") -> Tensor:
    """Merge the rows of x by a plan: y[j] over all i with assign[i] = j. Autograd.

    Sums run in fp32 (fp64 for fp64) in ascending token order without atomics: the same bits in every run.

    Args:
        x: [B, N, D], packed [T, D], or with `layout` a ViT output [F, prefix + h*w, D], read in place.
        reduce: "mean" (weighted by `plan.weight`), "sum" (likewise), or "max" (over tokens of weight > 0).

    Returns:
        [B, N_out, D_token] where x is dense and all segments keep as many rows, else packed [T_out, D_token].

    Raises:
        TypeError, ValueError: x does not fit the plan (rows, device, dtype), an unknown reduce.
    """
    check_choice("reduce", reduce, REDUCTIONS)
    ints, batch = check_features(x, layout)
    check_plan(plan)
    rows = _token_shape(x, ints)[0]
    if rows != plan.assign.shape[0]:
        raise ValueError(f"x must hold the plan's {plan.assign.shape[0]} tokens, got {rows}")
    check_device("x", x, plan.assign)
    if not ints and not (x.stride(-1) == 1 or x.shape[-1] == 1):
        x = x.contiguous()
    y = _Merge.apply(
        x,
        plan.assign,
        plan.size,
        plan.weight,
        plan.layout_in.cu_seqlens,
        plan.layout_out.cu_seqlens,
        plan.layout_out.max_seqlen,
        reduce,
        plan.binary_weight,
        ints,
    )
    if batch is not None and plan.layout_out.is_uniform and plan.layout_out.num_sequences == batch:
        return y.view(batch, plan.layout_out.max_seqlen, y.shape[1])
    return y


def unmerge_tokens(y: Tensor, plan: MergePlan) -> Tensor:
    """Give every input token the row that it was merged into: x[i] = y[assign[i]]. Autograd.

    Args:
        y: [B, N_out, D] or packed [T_out, D].

    Returns:
        [B, N, D] for dense y where all segments had as many tokens, else packed [T_in, D].

    Raises:
        TypeError, ValueError: y does not fit the plan.
    """
    _, batch = check_features(y, None, name="y")
    check_plan(plan)
    rows = y.flatten(0, -2)
    if rows.shape[0] != plan.num_out:
        raise ValueError(f"y must hold the plan's {plan.num_out} rows, got {rows.shape[0]}")
    check_device("y", y, plan.assign)
    x = _Gather.apply(
        rows,
        plan.assign,
        None,
        None,
        plan.layout_in.cu_seqlens,
        plan.layout_out.cu_seqlens,
        plan.size,
        plan.layout_out.max_seqlen,
        "sum",
        plan.binary_weight,
        [],
    )
    if batch is not None and plan.layout_in.is_uniform and plan.layout_in.num_sequences == batch:
        return x.view(batch, plan.layout_in.max_seqlen, x.shape[1])
    return x


def compress_clips(
    x: Tensor,
    target: int,
    num_heads: int,
    *,
    layout: TokenLayout | None = None,
    precision: str = "fp32",
    return_plan: bool = False,
) -> Tensor | tuple[Tensor, MergePlan]:
    """The connector's one call: compress every clip to `target` tokens. x is read twice. Autograd through the merge.

    Args:
        x: clips [B, N, D], or with `layout` a ViT output [F, prefix + h*w, D].
        target: tokens to keep per clip (128 for 8 frames in the paper, 64 for 4 in the release).
        num_heads: heads of the metric (32 in the 8B model), see `head_mean`.
        precision: see `plan_merge`; "eager_bf16" decides as the public loop does on x itself.
        return_plan: also return the MergePlan.

    Returns:
        [B, target, D_token], and the plan if asked for.

    Raises:
        TypeError, ValueError: as `head_mean`, `merge_budget` and `plan_merge` do.

    Source: InternVideo2.5 section 3.1 and 3.5 (8-frame clip -> 128 tokens).
    """
    check_choice("precision", precision, PRECISIONS)
    if isinstance(x, Tensor) and x.dim() != 3:
        raise ValueError(f"x must have shape [B, N, D] (or [F, prefix + h*w, D] with a layout), got {list(x.shape)}")
    ints, batch = check_heads(x, num_heads, layout)
    length = x.shape[1] if layout is None else layout.tokens_per_clip
    assert batch is not None
    budget = uniform_budget(batch, length, merge_schedule(length, target), x.device)
    if x.device.type == "cpu" and precision != "eager_bf16":
        sizes = (budget.num_out, budget.layout_in.max_seqlen, num_heads, precision, ints)
        layouts = (budget.layout_in, budget.layout_out)
        y, assign, size, weight, anchor = _Compress.apply(x, *(one.cu_seqlens for one in layouts), budget.r, *sizes)
        plan = MergePlan(assign, size, weight, anchor, None, *layouts)
        y = y.view(batch, budget.layout_out.max_seqlen, y.shape[1])
    else:
        payload, heads = head_mean(x.detach(), num_heads, layout=layout).flatten(0, 1), 1
        if precision == "eager_bf16":
            payload, heads = reference.tokens_of(x.detach(), ints).flatten(0, 1), num_heads
        plan = _plan(payload, budget, None, None, None, None, precision, "reference", "isolate", heads)
        y = merge_tokens(x, plan, layout=layout)
    return (y, plan) if return_plan else y


def size_bias(plan: MergePlan) -> Tensor:
    """log(size), fp32 [T_out]: the `key_bias` of attention over merged tokens (proportional attention, Bolya et al.).

    A row without weight gets -inf: no query attends to it.
    """
    return plan.size.log()


def _plan(
    payload: Tensor,
    budget: MergeBudget,
    size: Tensor | None,
    protected: Tensor | None,
    destination: Tensor | None,
    threshold: float | None,
    precision: str,
    order: str,
    zero_policy: str,
    num_heads: int,
) -> MergePlan:
    total = payload.shape[0]
    if size is not None:
        check_tensor("size", size, dims=(1, 2), numel=total, like=payload)
        check_values("size", size, (size.float() >= 0) & size.isfinite(), "finite and >= 0")
        size = size.detach().float().reshape(total).contiguous()
    protected = check_flags("protected", protected, payload)
    destination = check_flags("destination", destination, payload)
    if protected is not None:
        check_protected(protected, budget)
    if destination is not None:
        check_destination(destination, protected, budget)
    check_threshold(threshold)
    layout_out = budget.layout_out if threshold is None else budget.layout_in
    assign, size_out, weight, anchor, valid = plan_op(
        payload.contiguous(),
        budget.layout_in.cu_seqlens,
        layout_out.cu_seqlens,
        budget.r,
        size,
        protected,
        destination,
        layout_out.num_tokens,
        budget.layout_in.max_seqlen,
        threshold,
        precision,
        order,
        zero_policy,
        num_heads,
    )
    return MergePlan(
        assign=assign,
        size=size_out,
        weight=None if size is None and zero_policy == "reference" else weight,
        anchor=anchor,
        valid=None if threshold is None else valid,
        layout_in=budget.layout_in,
        layout_out=layout_out,
        binary_weight=size is None,
    )
