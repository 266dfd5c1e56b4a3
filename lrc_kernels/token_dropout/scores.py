# SPDX-License-Identifier: Apache-2.0
"""How much attention each key receives: q, k -> one number per key, from a few query rows or as sums of columns."""

from __future__ import annotations

import importlib
import math
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import Op
from lrc_kernels.checks import check_choice, check_device, check_tensor, check_values, values_are_checked
from lrc_kernels.layout import VarlenLayout, as_layout
from lrc_kernels.token_dropout import native, reference_scores

HEAD_REDUCTIONS = ("mean", "sum", "max")
QUERY_REDUCTIONS = ("first", "mean")
COLUMN_REDUCTIONS = ("sum", "mean", "max")


def _fake_scores(q: Tensor, k: Tensor, cu_seqlens_k: Tensor, row_sequence: Tensor, row_position: Tensor,
                 block_table: Any, lse: Any, num_tokens: int, *options: Any) -> Tensor:  # fmt: skip
    return k.new_empty(num_tokens, dtype=reference_scores.accumulation_dtype(k))


scores_op = Op(
    "attention_scores_fwd(Tensor q, Tensor k, Tensor cu_seqlens_k, Tensor row_sequence, Tensor row_position, "
    "Tensor? block_table, Tensor? lse, SymInt num_tokens, SymInt max_seqlen, str head_reduce, bool one_row, "
    "float softmax_scale) -> Tensor",
    _fake_scores,
)
column_sums_op = Op(
    "attention_column_sums_fwd(Tensor q, Tensor k, Tensor lse, Tensor cu_seqlens_q, Tensor cu_seqlens_k, "
    "Tensor? query_mask, SymInt max_seqlen_q, SymInt max_seqlen_k, bool causal, str reduce, str head_reduce, "
    "float softmax_scale) -> Tensor",
    lambda q, k, *rest: k.new_empty(k.shape[0], dtype=reference_scores.accumulation_dtype(k)),
)


def triton_function(name: str, module: str = "triton_scores") -> Any:
    """Launch functions are imported on the first call, so that the package imports where Triton is missing."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module(f"lrc_kernels.token_dropout.{module}"), name)(*args)

    return launch


scores_op.implement("reference", reference_scores.scores)
scores_op.implement("cpu", native.cpu_scores, supports=native.cpu_supports_scores, available=native.cpu_unavailable)
scores_op.implement("triton", triton_function("launch_scores"), supports=triton_function("supports_scores"))
column_sums_op.implement("reference", reference_scores.column_sums)
column_sums_op.implement(
    "triton", triton_function("launch_column_sums"), supports=triton_function("supports_column_sums")
)


def attention_scores(
    q: Tensor,
    k: Tensor,
    *,
    cu_seqlens_k: VarlenLayout | Tensor,
    query_sequence: Tensor,
    query_position: Tensor,
    block_table: Tensor | None = None,
    lse: Tensor | None = None,
    head_reduce: str = "mean",
    query_reduce: str = "first",
    softmax_scale: float | None = None,
) -> Tensor:
    """The attention that each key receives from a few query rows; K is read once and no [L, L] exists. No gradient.

    Per row and head p = softmax over the keys that the row sees, then `head_reduce` over heads, then `query_reduce`
    over the rows of a sequence. Softmax statistics are those of blocks of 128 keys counted from the start of the
    sequence, merged in ascending order: equal q and k give the same bits under any packing, paging, sharding of
    sequences and number of threads. A NaN key that a row sees makes the scores of its own sequence NaN, no other's.

    Args:
        q: [R, Hq, K], the rows; a model passes the row before the answer (of each turn).
        k: packed [Tk, Hkv, K], Hq a multiple of Hkv; with `block_table` paged [num_blocks, block_size, Hkv, K].
        cu_seqlens_k: layout of the keys, also of paged ones (a device tensor costs one synchronisation).
        query_sequence: int32 [R], the sequence of each row.
        query_position: int32 [R]; a row sees the keys 0..position of its sequence. -1: it sees nothing and counts
            neither as the first row nor in a mean.
        block_table: int32 [S, max_blocks]; key j of sequence s is row j % block_size of block
            block_table[s, j // block_size].
        lse: fp32 [Hq, R] (fp64 for fp64), natural logarithm, of the rows over the keys they see: p = exp(logit - lse)
            without a pass that normalises; a row of -inf contributes 0.
        head_reduce: "mean", "sum" or "max".
        query_reduce: "first", the row with the smallest position (then the lowest index) of each sequence, which leaks
            nothing of later turns; or "mean" over the sequence's rows.
        softmax_scale: default K**-0.5.

    Returns:
        fp32 [Tk] (fp64 for fp64), packed as cu_seqlens_k says; 0 for keys that no row sees.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.

    Source: InternVideo2.5 section 3.1 (attention-guided token dropout); the preset of VideoChat-Flash is "mean".
    """
    check_choice("head_reduce", head_reduce, HEAD_REDUCTIONS)
    check_choice("query_reduce", query_reduce, QUERY_REDUCTIONS)
    softmax_scale = check_heads(q, k, 3 if block_table is None else 4, softmax_scale)
    layout = _check_layout("cu_seqlens_k", cu_seqlens_k, k)
    for name, value in (("query_sequence", query_sequence), ("query_position", query_position)):
        check_tensor(name, value, dims=(1,), dtypes=(torch.int32,), like=q)
        if value.shape[0] != q.shape[0]:
            raise ValueError(f"{name} must hold one value per row of q ({q.shape[0]}), got {value.shape[0]}")
    # Writing a number of a traced graph into a message would fix it, so the message is not made there.
    if values_are_checked(query_sequence):
        inside = (query_sequence >= 0) & (query_sequence < layout.num_sequences)
        check_values("query_sequence", query_sequence, inside, f"in [0, {layout.num_sequences})")
        check_values("query_position", query_position, query_position >= -1, ">= -1")
    if block_table is not None:
        _check_block_table(block_table, k, layout)
    elif k.shape[0] != layout.num_tokens:
        raise ValueError(f"k must hold the {layout.num_tokens} tokens of cu_seqlens_k, got {k.shape[0]}")
    if lse is not None:
        _check_lse(lse, q)
    rows = reference_scores.active_rows(query_sequence, query_position, layout.num_sequences, query_reduce)
    return scores_op(
        *(q.detach(), k.detach(), layout.cu_seqlens, rows, query_position, block_table),
        *(None if lse is None else lse.detach(), layout.num_tokens, layout.max_seqlen),
        *(head_reduce, query_reduce == "first", softmax_scale),
    )


def attention_column_sums(
    q: Tensor,
    k: Tensor,
    lse: Tensor,
    *,
    cu_seqlens_q: VarlenLayout | Tensor,
    cu_seqlens_k: VarlenLayout | Tensor,
    causal: bool = True,
    query_mask: Tensor | None = None,
    reduce: str = "sum",
    head_reduce: str = "mean",
    softmax_scale: float | None = None,
) -> Tensor:
    """The columns of the attention matrix reduced over its rows, from the lse that attention left. No gradient.

    Column j = reduce over the rows i that see key j of exp(softmax_scale * <q_i, k_j> - lse_i), in one product Q K^T
    that is never stored. Rows of P sum to 1, so with "sum" over rows and "mean" over heads the scores of a sequence sum
    to its number of rows. On a CPU this is torch's matmul over tiles of rows (the reference); there is no C++ kernel.

    Args:
        q: [Tq, Hq, K].
        k: [Tk, Hkv, K], Hq a multiple of Hkv.
        lse: fp32 [Hq, Tq] (fp64 for fp64), natural logarithm; a row of -inf contributes 0.
        cu_seqlens_q, cu_seqlens_k: layouts of the same sequences (a device tensor costs one synchronisation).
        causal: row i of Lq sees keys j <= i + Lk - Lq (aligned at the bottom right).
        query_mask: bool [Tq]; rows where it is False are left out.
        reduce: "sum", "mean" (over the rows that see the key) or "max"; a key that no row sees gets 0.
        head_reduce: "mean", "sum" or "max", after the rows.
        softmax_scale: default K**-0.5.

    Returns:
        fp32 [Tk] (fp64 for fp64).

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.

    Source: the scores of VisionZip and SparseVILA; z-lab's flash-colreduce has them without GQA, packing or lse.
    """
    check_choice("reduce", reduce, COLUMN_REDUCTIONS)
    check_choice("head_reduce", head_reduce, HEAD_REDUCTIONS)
    softmax_scale = check_heads(q, k, 3, softmax_scale)
    layout_q, layout_k = _check_layout("cu_seqlens_q", cu_seqlens_q, k), _check_layout("cu_seqlens_k", cu_seqlens_k, k)
    if layout_q.num_sequences != layout_k.num_sequences:
        raise ValueError(
            f"cu_seqlens_q must hold the {layout_k.num_sequences} sequences of cu_seqlens_k, "
            f"got {layout_q.num_sequences}"
        )
    for name, x, layout in (("q", q, layout_q), ("k", k, layout_k)):
        if x.shape[0] != layout.num_tokens:
            raise ValueError(f"{name} must hold the {layout.num_tokens} tokens of cu_seqlens_{name}, got {x.shape[0]}")
    _check_lse(lse, q)
    if query_mask is not None:
        check_tensor("query_mask", query_mask, dims=(1,), dtypes=(torch.bool,), numel=q.shape[0], like=q)
    return column_sums_op(
        *(q.detach(), k.detach(), lse.detach(), layout_q.cu_seqlens, layout_k.cu_seqlens, query_mask),
        *(layout_q.max_seqlen, layout_k.max_seqlen, bool(causal), reduce, head_reduce, softmax_scale),
    )


def check_heads(q: Tensor, k: Tensor, k_dims: int, softmax_scale: float | None) -> float:
    """Checks what q and k share, and returns the scale."""
    check_tensor("q", q, dims=(3,))
    check_tensor("k", k, dims=(k_dims,), dtypes=(q.dtype,), like=q)
    if q.shape[2] != k.shape[-1] or q.shape[2] == 0:
        raise ValueError(f"k must have the head dimension of q ({q.shape[2]}, > 0), got {k.shape[-1]}")
    if k.shape[-2] == 0 or q.shape[1] == 0 or q.shape[1] % k.shape[-2]:
        raise ValueError(f"q must have a multiple of k's heads ({k.shape[-2]}), got {q.shape[1]}")
    if softmax_scale is None:
        return float(q.shape[2] ** -0.5)
    if isinstance(softmax_scale, bool) or not isinstance(softmax_scale, (int, float)):
        raise TypeError(f"softmax_scale must be a float, got {type(softmax_scale).__name__}")
    if not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    return float(softmax_scale)


def _check_layout(name: str, cu_seqlens: VarlenLayout | Tensor, like: Tensor) -> VarlenLayout:
    try:
        layout = as_layout(cu_seqlens)
    except (TypeError, ValueError) as error:
        raise type(error)(str(error).replace("cu_seqlens", name, 1)) from None
    check_device(name, layout.cu_seqlens, like)
    return layout


def _check_lse(lse: Tensor, q: Tensor) -> None:
    check_tensor("lse", lse, dims=(2,), dtypes=(reference_scores.accumulation_dtype(q),), like=q)
    if lse.shape[0] != q.shape[1] or lse.shape[1] != q.shape[0]:
        raise ValueError(f"lse must have shape [Hq, rows of q] = [{q.shape[1]}, {q.shape[0]}], got {list(lse.shape)}")


def _check_block_table(block_table: Tensor, k: Tensor, layout: VarlenLayout) -> None:
    check_tensor("block_table", block_table, dims=(2,), dtypes=(torch.int32,), like=k)
    num_blocks, block_size = k.shape[0], k.shape[1]
    if block_size == 0:
        raise ValueError("k must have blocks of at least one row, got block_size 0")
    if block_table.shape[0] != layout.num_sequences:
        raise ValueError(
            f"block_table must have one row per sequence ({layout.num_sequences}), got {block_table.shape[0]}"
        )
    needed = -(-layout.max_seqlen // block_size)
    if block_table.shape[1] < needed:
        raise ValueError(
            f"block_table must have at least {needed} blocks for {layout.max_seqlen} keys, got {block_table.shape[1]}"
        )
    if values_are_checked(block_table):
        starts = torch.arange(block_table.shape[1], device=k.device) * block_size
        unused = starts >= layout.cu_seqlens.diff()[:, None]
        inside = unused | ((block_table >= 0) & (block_table < num_blocks))
        check_values("block_table", block_table, inside, f"in [0, {num_blocks})")
