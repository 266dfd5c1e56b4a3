# SPDX-License-Identifier: Apache-2.0
"""Token dropout ops: flags of droppable tokens and a budget -> Selection -> compacted rows, and back again.

Selecting and moving are separate, so that scores can be reduced over ranks between them, and so that one selection
moves hidden states, labels and position ids alike.
"""

from __future__ import annotations

import importlib
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from lrc_kernels.backend import Op
from lrc_kernels.checks import check_choice, check_device, check_int, check_tensor, values_are_checked
from lrc_kernels.layout import VarlenLayout, as_layout
from lrc_kernels.token_dropout import native, reference
from lrc_kernels.token_dropout.plan import DropBudget, Selection, drop_budget

MODES = ("topk", "linspace", "random", "bernoulli")
SCALE = 2**32


def _fake_select(droppable: Tensor, cu_in: Tensor, cu_out: Tensor, keep: Tensor, scores: Any, seed: Tensor, layer: int,
                 sequence_ids: Any, positions: Any, num_kept: int, *options: Any) -> tuple[Tensor, Tensor]:  # fmt: skip
    return droppable.new_empty(num_kept, dtype=torch.int32), droppable.new_empty(droppable.shape[0], dtype=torch.int32)


def _fake_bernoulli(droppable: Tensor, cu_seqlens: Tensor, seed: Tensor, layer: int, sequence_ids: Any, positions: Any,
                    capacity: int, *options: Any) -> tuple[Tensor, ...]:  # fmt: skip
    sizes = (capacity, droppable.shape[0], cu_seqlens.shape[0] + 1, 1)
    return tuple(droppable.new_empty(size, dtype=torch.int32) for size in sizes)


def _fake_move(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    return [x.new_empty(x.shape[0], index.shape[0], x.shape[2]) for x in tensors]


def _fake_rmsnorm(residual: Tensor, weight: Tensor, eps: float, indices: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    rows, width = indices.shape[0], residual.shape[1]
    dropped = residual.new_empty(rows, width)
    return dropped, torch.empty_like(dropped), residual.new_empty(rows, dtype=reference.accumulation_dtype(residual))


def _fake_rmsnorm_backward(d_dropped: Tensor, d_normed: Tensor, dropped: Tensor, weight: Tensor, rstd: Tensor,
                           inverse: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
    return dropped.new_empty(inverse.shape[0], dropped.shape[1]), torch.empty_like(weight)


_RANDOM = "Tensor seed, SymInt layer, Tensor? sequence_ids, Tensor? positions"
select_op = Op(
    "select_tokens_fwd(Tensor droppable, Tensor cu_seqlens_in, Tensor cu_seqlens_out, Tensor keep, Tensor? scores, "
    f"{_RANDOM}, SymInt num_kept, SymInt max_seqlen, str mode) -> (Tensor, Tensor)",
    _fake_select,
)
bernoulli_op = Op(
    f"select_tokens_bernoulli_fwd(Tensor droppable, Tensor cu_seqlens, {_RANDOM}, SymInt capacity, SymInt max_seqlen, "
    "SymInt threshold) -> (Tensor, Tensor, Tensor, Tensor)",
    _fake_bernoulli,
)
drop_op = Op("drop_tokens_fwd(Tensor[] tensors, Tensor indices, float[] fill) -> Tensor[]", _fake_move)
restore_op = Op("restore_tokens_fwd(Tensor[] tensors, Tensor inverse, float[] fill) -> Tensor[]", _fake_move)
rmsnorm_op = Op(
    "drop_tokens_rmsnorm_fwd(Tensor residual, Tensor weight, float eps, Tensor indices) -> (Tensor, Tensor, Tensor)",
    _fake_rmsnorm,
)
rmsnorm_backward_op = Op(
    "drop_tokens_rmsnorm_bwd(Tensor d_dropped, Tensor d_normed, Tensor dropped, Tensor weight, Tensor rstd, "
    "Tensor inverse) -> (Tensor, Tensor)",
    _fake_rmsnorm_backward,
)


def _triton(name: str) -> Any:
    """Launch functions are imported on the first call, so that the package imports where Triton is missing."""

    def launch(*args: Any) -> Any:
        module = "triton_select" if "select" in name else "triton_kernels"
        return getattr(importlib.import_module(f"lrc_kernels.token_dropout.{module}"), name)(*args)

    return launch


for _op, _name in (
    (select_op, "select"),
    (bernoulli_op, "select_bernoulli"),
    (drop_op, "move_rows"),
    (restore_op, "move_rows"),
    (rmsnorm_op, "drop_tokens_rmsnorm"),
    (rmsnorm_backward_op, "drop_tokens_rmsnorm_backward"),
):
    _op.implement("reference", getattr(reference, _name))
    _op.implement("triton", _triton(f"launch_{_name}"), supports=_triton(f"supports_{_name}"))
    for _backend in ("cpu", "cuda"):
        if hasattr(native, f"{_backend}_{_name}"):
            _op.implement(
                _backend,
                getattr(native, f"{_backend}_{_name}"),
                supports=getattr(native, f"{_backend}_supports_{_name}", lambda *args: None),
                available=getattr(native, f"{_backend}_unavailable"),
            )


class _MoveRows(torch.autograd.Function):
    """Rows of each [outer, rows, width] by `index`. Its transpose is the same move by `inverse`."""

    @staticmethod
    def forward(ctx: Any, index: Tensor, inverse: Tensor, fill: list[float], restores: bool,
                *tensors: Tensor) -> tuple[Tensor, ...]:  # fmt: skip
        moved = (restore_op if restores else drop_op)(list(tensors), index, fill)
        ctx.save_for_backward(index, inverse)
        ctx.restores = restores
        ctx.floats = [x.is_floating_point() for x in tensors]
        ctx.mark_non_differentiable(*(y for y in moved if not y.is_floating_point()))
        return tuple(moved)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        index, inverse = ctx.saved_tensors
        upstream = [gradient for gradient, is_float in zip(grads, ctx.floats, strict=True) if is_float]
        moved = list(_MoveRows.apply(inverse, index, [0.0] * len(upstream), not ctx.restores, *upstream))
        return None, None, None, None, *(moved.pop(0) if is_float else None for is_float in ctx.floats)


class _DropRMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, residual: Tensor, weight: Tensor, eps: float, indices: Tensor,
                inverse: Tensor) -> tuple[Tensor, Tensor]:  # fmt: skip
        dropped, normed, rstd = rmsnorm_op(residual, weight, eps, indices)
        ctx.save_for_backward(dropped, weight, rstd, inverse)
        return dropped, normed

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        dropped, weight, rstd, inverse = ctx.saved_tensors
        d_dropped, d_normed = (gradient.contiguous() for gradient in grads)
        return *rmsnorm_backward_op(d_dropped, d_normed, dropped, weight, rstd, inverse), None, None, None


def select_tokens(
    layout: VarlenLayout | Tensor,
    droppable: Tensor,
    budget: DropBudget | None = None,
    *,
    keep: float | int | Sequence[int] | None = None,
    mode: str,
    scores: Tensor | None = None,
    seed: int | Tensor = 0,
    layer: int = 0,
    sequence_ids: Tensor | None = None,
    positions: Tensor | None = None,
    capacity: int | None = None,
) -> Selection:
    """Decide which tokens of a pack stay. Tokens that are not droppable always do. No gradient.

    The random modes hash (seed, layer, sequence id, position) with Philox-4x32-10, so that the decision is the same
    under repacking, any sharding and recomputation. Counter = (position, layer, sequence id low, high), key = (seed
    low, high), word 0 decides.

    Args:
        layout: the packed sequences, or their cu_seqlens (a device tensor costs a synchronisation).
        droppable: bool [T], the visual tokens.
        budget: from `drop_budget`.
        keep: instead of a budget, in eager mode: what `drop_budget` takes. The droppable tokens are counted, which on
            a device costs one synchronisation. With mode "bernoulli" the probability of a droppable token to stay.
        mode: "topk" keeps the largest scores (NaN ranks last, ties go to the lowest row); "linspace" the droppable
            tokens i * (n - 1) // (k - 1) of each sequence; "random" exactly the budget, without replacement;
            "bernoulli" every token by itself, so that the count is random.
        scores: fp32 [T], for "topk" only.
        seed: an int, or an int64 scalar tensor on the device, which a CUDA graph reads anew at every replay.
        layer: index of the layer; a budget's own counts where this is 0.
        sequence_ids: int64 [S], distinct; what identifies a sequence wherever it is packed. Default 0 .. S - 1.
        positions: int32 or int64 [T], a token's position in its whole sequence. Default: its row in the sequence.
        capacity: "bernoulli" only: rows of the result, padding included (index -1, sequence S of the layout). Droppable
            tokens that would exceed it are dropped, the last ones first; where values are checked (CPU, LRC_CHECK=1)
            that is a ValueError. Without a capacity the exact count costs one synchronisation.

    Returns:
        a Selection; with a capacity its layout has S + 1 sequences and `max_seqlen` is the capacity, an upper bound.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value, or one that `mode` does not take.

    Source: InternVideo2.5 section 3.1, eq. 2 (bernoulli); VideoChat-Flash's released code (linspace, topk).
    """
    check_choice("mode", mode, MODES)
    layout = as_layout(layout)
    _check_rows(layout, droppable, mode, scores, positions, sequence_ids)
    seed = _seed_tensor(seed, droppable)
    check_int("layer", layer, minimum=0)
    if layer >= SCALE:
        raise ValueError(f"layer must be below 2^32, got {layer}")
    options = (sequence_ids, positions)
    if mode == "bernoulli":
        if budget is not None:
            raise ValueError('mode "bernoulli" takes keep=<probability> and capacity=, got a budget')
        return _select_bernoulli(layout, droppable, keep, seed, layer, *options, capacity)
    if capacity is not None:
        raise ValueError(f'capacity is for mode "bernoulli", got capacity={capacity} with mode {mode!r}')
    budget = _resolve_budget(layout, droppable, budget, keep, layer)
    indices, inverse = select_op(
        droppable.contiguous(),
        budget.layout_in.cu_seqlens,
        budget.layout_out.cu_seqlens,
        budget.keep,
        None if scores is None else scores.detach().contiguous(),
        seed,
        layer or budget.layer,
        *options,
        budget.num_kept,
        budget.layout_in.max_seqlen,
        mode,
    )
    return Selection(indices, inverse, budget.layout_out)


def drop_tokens(
    tensors: Tensor | Sequence[Tensor],
    selection: Selection,
    *,
    dims: int | Sequence[int] = 0,
    fill: float | Sequence[float] = 0,
) -> Any:
    """Gather the kept rows of one or several tensors: hidden states, labels, position ids, in one pass. Autograd.

    Floating-point tensors get gradients (those of dropped rows are 0), integer tensors only move. Any strides.

    Args:
        tensors: a tensor, or several, of any dtype of 1, 2, 4 or 8 bytes (16 on the reference backend).
        dims: the dimension of size T, one for all tensors or one each (position ids [3, T]: 1).
        fill: what the padding rows of a Bernoulli capacity get, one for all tensors or one each (labels: -100).

    Returns:
        contiguous tensors with T_keep in place of T: one for one, else a tuple.

    Raises:
        TypeError, ValueError: a dimension that is not T, another device, dims or fills of
            another number than the tensors.
    """
    single = isinstance(tensors, Tensor)
    items = (tensors,) if single else tuple(tensors)
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    places = _per_tensor("dims", dims, len(items))
    fills = _per_tensor("fill", fill, len(items))
    rows = []
    for i, (x, dim) in enumerate(zip(items, places, strict=True)):
        _check_moved(f"tensors[{i}]", x, dim, selection.inverse.shape[0], selection, fills[i])
        rows.append(_as_rows(x, dim))
    if not items:
        return ()
    moved = _MoveRows.apply(selection.indices, selection.inverse, [float(f) for f in fills], False, *rows)
    shaped = tuple(
        y.view(*x.shape[: dim % x.dim()], selection.num_kept, *x.shape[dim % x.dim() + 1 :])
        for x, y, dim in zip(items, moved, places, strict=True)
    )
    return shaped[0] if single else shaped


def restore_tokens(y: Tensor, selection: Selection, *, fill: float = 0.0) -> Tensor:
    """Scatter kept rows back to where they came from: the transpose of `drop_tokens`. Autograd.

    Args:
        y: [T_keep, ...]; padding rows are left out.
        fill: value of the rows that were dropped.

    Returns:
        [T, ...].

    Raises:
        TypeError, ValueError: y does not have the selection's rows, another device, a fill that its dtype cannot hold.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    _check_moved("y", y, 0, selection.indices.shape[0], selection, fill)
    moved = _MoveRows.apply(selection.inverse, selection.indices, [float(fill)], True, _as_rows(y, 0))
    return moved[0].view(selection.inverse.shape[0], *y.shape[1:])


def drop_tokens_rmsnorm(residual: Tensor, weight: Tensor, eps: float, selection: Selection) -> tuple[Tensor, Tensor]:
    """Gather the kept rows of the residual stream and normalise them, reading each kept row once. Autograd (once).

    normed = weight * (h / sqrt(mean(h^2) + eps)), rounded as transformers' LlamaRMSNorm does: the mean and the quotient
    in fp32, the quotient to the residual's dtype, then times the weight (rounded to that dtype) in that dtype.

    Args:
        residual: [T, D] fp32, bf16, fp16 or fp64.
        weight: [D], a floating dtype; its gradient is summed in fp32, in a fixed order.
        eps: >= 0, added to the mean square.

    Returns:
        (h = residual[kept] [T_keep, D], normed [T_keep, D]), both of the residual's dtype; padding rows are 0.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit the selection, a negative eps.
    """
    if not isinstance(selection, Selection):
        raise TypeError(f"selection must be a Selection, got {type(selection).__name__}")
    check_tensor("residual", residual, dims=(2,))
    _check_moved("residual", residual, 0, selection.inverse.shape[0], selection)
    check_tensor("weight", weight, dims=(1,), like=residual)
    if weight.shape[0] != residual.shape[1]:
        raise ValueError(f"weight must have the residual's width {residual.shape[1]}, got {weight.shape[0]}")
    if not eps >= 0:
        raise ValueError(f"eps must be >= 0, got {eps}")
    residual = residual if residual.stride(1) == 1 or residual.shape[1] <= 1 else residual.contiguous()
    return _DropRMSNorm.apply(residual, weight.contiguous(), float(eps), selection.indices, selection.inverse)


def _select_bernoulli(
    layout: VarlenLayout, droppable: Tensor, keep: Any, seed: Tensor, layer: int, sequence_ids: Tensor | None,
    positions: Tensor | None, capacity: int | None,
) -> Selection:  # fmt: skip
    if not isinstance(keep, float) or not 0.0 < keep <= 1.0:
        raise ValueError(f'keep must be a probability in (0, 1] as a float for mode "bernoulli", got {keep!r}')
    if capacity is not None:
        check_int("capacity", capacity, minimum=0)
        if capacity >= 2**31:
            raise ValueError(f"capacity must be below 2^31 rows, got {capacity}")
        if values_are_checked(droppable) and capacity < (fixed := int((~droppable).sum())):
            raise ValueError(f"capacity must hold the {fixed} tokens that are not droppable, got {capacity}")
    rows = layout.num_tokens if capacity is None else capacity
    indices, inverse, cu_seqlens, num_wanted = bernoulli_op(
        droppable.contiguous(),
        layout.cu_seqlens,
        seed,
        layer,
        sequence_ids,
        positions,
        rows,
        layout.max_seqlen,
        int(keep * SCALE),
    )
    if capacity is None:
        kept = VarlenLayout.from_cu_seqlens(cu_seqlens[:-1])
        return Selection(indices[: kept.num_tokens].clone(), inverse, kept)
    if values_are_checked(droppable) and int(num_wanted) > capacity:
        raise ValueError(f"capacity must hold the {int(num_wanted)} rows that this draw keeps, got {capacity}")
    return Selection(indices, inverse, VarlenLayout.on_device(cu_seqlens, capacity, capacity))


def _resolve_budget(
    layout: VarlenLayout, droppable: Tensor, budget: DropBudget | None, keep: Any, layer: int
) -> DropBudget:
    if budget is None:
        if keep is None:
            raise ValueError("a budget or keep must be given, got neither")
        return drop_budget(layout, _count_droppable(layout, droppable), keep=keep, layer=layer)
    if keep is not None:
        raise ValueError(f"budget already fixes what is kept, got keep={keep!r} besides it")
    if not isinstance(budget, DropBudget):
        raise TypeError(f"budget must be a DropBudget, got {type(budget).__name__}")
    made_for = budget.layout_in
    same = made_for.num_sequences == layout.num_sequences and made_for.num_tokens == layout.num_tokens
    if same and not torch.compiler.is_compiling() and made_for.is_on_host and layout.is_on_host:
        same = made_for == layout
    if not same:
        raise ValueError(f"budget must be made for {layout}, got one for {budget.layout_in}")
    if layer != 0 and budget.layer not in (0, layer):
        raise ValueError(f"layer must be the budget's {budget.layer} (or left out), got {layer}")
    check_device("budget", budget.keep, droppable)
    if values_are_checked(droppable) and (counts := _count_droppable(layout, droppable)) != budget.num_droppable:
        at = next(i for i, (a, b) in enumerate(zip(counts, budget.num_droppable, strict=True)) if a != b)
        raise ValueError(
            f"droppable must mark the budget's {budget.num_droppable[at]} tokens of sequence {at}, got {counts[at]}"
        )
    return budget


def _count_droppable(layout: VarlenLayout, droppable: Tensor) -> tuple[int, ...]:
    before = torch.nn.functional.pad(droppable.cumsum(0, dtype=torch.int64), (1, 0))
    return tuple(before[layout.cu_seqlens.long()].diff().tolist())


def _check_rows(layout: VarlenLayout, droppable: Tensor, mode: str, scores: Tensor | None, positions: Tensor | None,
                sequence_ids: Tensor | None) -> None:  # fmt: skip
    total = layout.num_tokens
    check_tensor("droppable", droppable, dims=(1,), dtypes=(torch.bool,), numel=total, like=layout.cu_seqlens)
    if (scores is None) == (mode == "topk"):
        raise ValueError(f'scores must be given for mode "topk" and for no other, got {mode!r} with scores={scores}')
    if scores is not None:
        check_tensor("scores", scores, dims=(1,), dtypes=(torch.float32,), numel=total, like=droppable)
    if positions is not None:
        wanted = (torch.int32, torch.int64)
        check_tensor("positions", positions, dims=(1,), dtypes=wanted, numel=total, like=droppable)
    if sequence_ids is not None:
        check_tensor("sequence_ids", sequence_ids, dims=(1,), dtypes=(torch.int64,), like=droppable)
        if sequence_ids.shape[0] != layout.num_sequences:
            wanted_ids = f"one id per sequence ({layout.num_sequences})"
            raise ValueError(f"sequence_ids must hold {wanted_ids}, got shape {list(sequence_ids.shape)}")
        if values_are_checked(sequence_ids):
            ids, counts = sequence_ids.unique(return_counts=True)
            if ids.shape[0] != sequence_ids.shape[0]:
                raise ValueError(f"sequence_ids must be distinct, got {int(ids[counts > 1][0])} more than once")


def _seed_tensor(seed: int | Tensor, like: Tensor) -> Tensor:
    if isinstance(seed, Tensor):
        check_tensor("seed", seed, dims=(0,), dtypes=(torch.int64,), like=like)
        return seed
    check_int("seed", seed, minimum=-(2**63))
    if seed >= 2**64:
        raise ValueError(f"seed must be below 2^64, got {seed}")
    return torch.full((), seed if seed < 2**63 else seed - 2**64, dtype=torch.int64, device=like.device)


def _per_tensor(name: str, value: Any, count: int) -> list[Any]:
    if not isinstance(value, Sequence):
        return [value] * count
    if len(value) != count:
        raise ValueError(f"{name} must have one entry per tensor ({count}), got {len(value)}")
    return list(value)


def _check_moved(name: str, x: Tensor, dim: int, rows: int, selection: Selection, fill: float = 0.0) -> None:
    if not isinstance(x, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(x).__name__}")
    if isinstance(dim, bool) or not isinstance(dim, int):
        raise TypeError(f"dims must be ints, got {type(dim).__name__}")
    if not -x.dim() <= dim < x.dim():
        raise ValueError(f"{name} must have dimension {dim}, got shape {list(x.shape)}")
    if x.shape[dim] != rows:
        raise ValueError(f"{name} must have {rows} rows in dimension {dim}, got shape {list(x.shape)}")
    check_device(name, x, selection.inverse)
    if not x.is_floating_point() and not x.is_complex() and fill != int(fill):
        raise ValueError(f"fill must be an integer for {str(x.dtype).removeprefix('torch.')} rows, got {fill}")


def _as_rows(x: Tensor, dim: int) -> Tensor:
    """x as [outer, rows, width], without a copy where its strides allow."""
    dim %= x.dim()
    return x.reshape(math.prod(x.shape[:dim]), x.shape[dim], math.prod(x.shape[dim + 1 :]))
