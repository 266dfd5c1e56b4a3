# SPDX-License-Identifier: Apache-2.0
"""`attention_scores` in three steps, for a sequence whose keys lie on many ranks: statistics of the blocks of keys at
hand, factors from the statistics of all blocks, scores of the blocks at hand. Together they give the same bits."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.backend import Op
from lrc_kernels.checks import check_choice, check_tensor
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.token_dropout import native, reference_scores
from lrc_kernels.token_dropout.scores import HEAD_REDUCTIONS, check_heads, triton_function

# Keys of a block, counted from the start of their sequence.
SCORE_BLOCK = reference_scores.BLOCK

statistics_op = Op(
    "attention_score_statistics_fwd(Tensor q, Tensor k, Tensor cu_blocks, Tensor query_position, float softmax_scale) "
    "-> Tensor",
    lambda q, k, *rest: k.new_empty(2, *q.shape[:2], dtype=reference_scores.accumulation_dtype(k)),
)
factors_op = Op(
    "attention_score_factors_fwd(Tensor statistics, Tensor cu_seqlens_k, Tensor query_position) -> Tensor",
    lambda statistics, *rest: statistics.new_empty(statistics.shape[1:]),
)
block_scores_op = Op(
    "attention_block_scores_fwd(Tensor q, Tensor k, Tensor cu_blocks, Tensor query_position, Tensor factor, "
    "str head_reduce, float softmax_scale) -> Tensor",
    lambda q, k, *rest: k.new_empty(k.shape[0], dtype=reference_scores.accumulation_dtype(k)),
)


for _op, _name in (
    (statistics_op, "block_statistics"),
    (factors_op, "block_factors"),
    (block_scores_op, "block_scores"),
):
    _op.implement("reference", getattr(reference_scores, _name))
    _op.implement(
        "cpu",
        getattr(native, f"cpu_{_name}"),
        supports=getattr(native, f"cpu_supports_{_name}"),
        available=native.cpu_unavailable,
    )
    _op.implement(
        "triton",
        triton_function(f"launch_{_name}", "triton_block_scores"),
        supports=triton_function(f"supports_{_name}", "triton_block_scores"),
    )


def block_statistics(
    q: Tensor, k: Tensor, blocks: VarlenLayout, query_position: Tensor, *, softmax_scale: float | None = None
) -> Tensor:
    """Maximum and sum of exp(logit - maximum) of one query row over each block of keys. No gradient.

    Args:
        q: [B, Hq, K], for every block the row that asks its sequence.
        k: [Tk, Hkv, K], the blocks back to back, Hq a multiple of Hkv.
        blocks: rows of each block: keys 128 i, 128 i + 1, ... of a sequence, at most 128 of them and whole.
        query_position: int32 [B], the row's position less that of the block's first key; it sees the keys 0..position,
            none below 0.
        softmax_scale: default K**-0.5.

    Returns:
        fp32 [2, B, Hq] (fp64 for fp64); -inf and 0 where the row sees no key.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    scale = _check(q, k, blocks, query_position, softmax_scale)
    return statistics_op(q.detach(), k.detach(), blocks.cu_seqlens, query_position, scale)


def block_factors(statistics: Tensor, cu_seqlens_k: VarlenLayout, query_position: Tensor) -> Tensor:
    """What `block_scores` multiplies by: statistics merged over the blocks of each sequence, in ascending order.

    Args:
        statistics: fp32 [2, S, Hq, NB] (fp64 for fp64) of `block_statistics`, block by block; what stands behind a
            sequence's last block is not read.
        cu_seqlens_k: layout of the keys of the S sequences, on the host.
        query_position: int32 [S], the position of each sequence's row.

    Returns:
        [S, Hq, NB] like statistics: exp(block maximum - maximum) / sum; 0 for blocks that the row does not see.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    if not isinstance(cu_seqlens_k, VarlenLayout):
        raise TypeError(f"cu_seqlens_k must be a VarlenLayout, got {type(cu_seqlens_k).__name__}")
    check_tensor("statistics", statistics, dims=(4,), dtypes=(torch.float32, torch.float64))
    wanted = (2, cu_seqlens_k.num_sequences, -(-cu_seqlens_k.max_seqlen // SCORE_BLOCK))
    if (*statistics.shape[:2], statistics.shape[3]) != wanted:
        raise ValueError(f"statistics must have shape [2, {wanted[1]}, Hq, {wanted[2]}], got {list(statistics.shape)}")
    check_tensor("query_position", query_position, dims=(1,), dtypes=(torch.int32,), numel=wanted[1], like=statistics)
    return factors_op(statistics, cu_seqlens_k.cu_seqlens, query_position)


def block_scores(
    q: Tensor,
    k: Tensor,
    blocks: VarlenLayout,
    query_position: Tensor,
    factor: Tensor,
    *,
    head_reduce: str = "mean",
    softmax_scale: float | None = None,
) -> Tensor:
    """The scores of each block's keys: what `attention_scores` gives them. No gradient.

    Args:
        q, k, blocks, query_position, softmax_scale: as in `block_statistics`.
        factor: fp32 [B, Hq] (fp64 for fp64), those blocks' entries of `block_factors`.
        head_reduce: "mean", "sum" or "max".

    Returns:
        fp32 [Tk] (fp64 for fp64); 0 for keys that the row does not see.

    Raises:
        TypeError, ValueError: an argument of the wrong dtype, shape, device or value.
    """
    scale = _check(q, k, blocks, query_position, softmax_scale)
    check_choice("head_reduce", head_reduce, HEAD_REDUCTIONS)
    wide = (reference_scores.accumulation_dtype(k),)
    check_tensor("factor", factor, dims=(2,), dtypes=wide, like=q)
    if factor.shape != q.shape[:2]:
        raise ValueError(f"factor must have shape {list(q.shape[:2])}, got {list(factor.shape)}")
    return block_scores_op(q.detach(), k.detach(), blocks.cu_seqlens, query_position, factor, head_reduce, scale)


def _check(q: Tensor, k: Tensor, blocks: VarlenLayout, query_position: Tensor, softmax_scale: float | None) -> float:
    scale = check_heads(q, k, 3, softmax_scale)
    if not isinstance(blocks, VarlenLayout):
        raise TypeError(f"blocks must be a VarlenLayout, got {type(blocks).__name__}")
    if blocks.max_seqlen > SCORE_BLOCK:
        raise ValueError(f"blocks must have at most {SCORE_BLOCK} rows, got {blocks.max_seqlen}")
    if blocks.num_tokens != k.shape[0]:
        raise ValueError(f"k must hold the {blocks.num_tokens} keys of blocks, got {k.shape[0]}")
    if blocks.num_sequences != q.shape[0]:
        raise ValueError(f"q must hold one row per block ({blocks.num_sequences}), got {q.shape[0]}")
    check_tensor("query_position", query_position, dims=(1,), dtypes=(torch.int32,), numel=q.shape[0], like=q)
    return scale
