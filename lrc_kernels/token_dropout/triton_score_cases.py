# SPDX-License-Identifier: Apache-2.0
"""The configurations of the score kernels that ship, which `tools/compile_check.py` compiles ahead of time."""

from __future__ import annotations

from typing import Any

import torch

from lrc_kernels._triton import CompileCase
from lrc_kernels.token_dropout.triton_scores import (
    attention_column_sums_fwd_kernel,
    attention_scores_fwd_apply_kernel,
    attention_scores_fwd_merge_kernel,
    attention_scores_fwd_partial_kernel,
    attention_scores_fwd_reduce_kernel,
    head_tiles,
    score_blocks,
)

_BLOCKS = score_blocks(torch.bfloat16)
_DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
_POINTERS = {
    **dict.fromkeys(("cu_ptr", "cu_q_ptr", "cu_k_ptr", "position_ptr", "row_sequence_ptr"), "*i32"),
    **dict.fromkeys(("order_ptr", "cu_rows_ptr"), "*i64"),
    **dict.fromkeys(
        ("maximum_ptr", "sum_ptr", "offset_ptr", "inverse_ptr", "scores_ptr", "out_ptr", "lse_ptr"), "*fp32"
    ),
    **dict.fromkeys(("num_blocks", "num_tokens", "block_size", "max_blocks"), "i32"),
    **dict.fromkeys(("softmax_scale", "head_scale"), "fp32"),
    **dict.fromkeys(("stride_k_block", "stride_k_token", "stride_k_head", "stride_q_row", "stride_q_head"), "i32"),
    **dict.fromkeys(("stride_offset_row", "stride_offset_head", "stride_lse_head"), "i32"),
    "table_ptr": None,
    "mask_ptr": None,
    "p_ptr": "*fp32",
    "factor_ptr": None,
}


def _case(name: str, kernel: Any, dtype: str = "fp32", *, matrix: bool = False, **changed: Any) -> CompileCase:
    arguments = {**_POINTERS, "q_ptr": f"*{dtype}", "k_ptr": f"*{dtype}", **changed}
    known = {key: value for key, value in arguments.items() if key in kernel.arg_names}
    types = {key: value for key, value in known.items() if key not in changed and value is not None}
    types.update({key: value for key, value in changed.items() if key.endswith("_ptr") and value is not None})
    constants = {key: value for key, value in known.items() if key not in types}
    blocks = score_blocks(_DTYPES[dtype])
    num_warps = blocks.column_warps if "REDUCE" in changed else blocks.num_warps if matrix else 4
    return CompileCase(name, kernel, types, constants, num_warps, blocks.num_stages if matrix else 3, matrix)


def _matrix_cases(name: str, dtype: str, heads: int, kv_heads: int, head_dim: int = 128) -> list[CompileCase]:
    """The kernels that multiply."""
    tiles, blocks = head_tiles(heads, kv_heads, head_dim), score_blocks(_DTYPES[dtype])
    paged = {"table_ptr": "*i32"}
    keys, apply = {**tiles, "BLOCK_N": blocks.keys}, {**tiles, "HKV": kv_heads, "BLOCK_N": blocks.apply_keys}
    partial_kernel, apply_kernel = attention_scores_fwd_partial_kernel, attention_scores_fwd_apply_kernel
    columns = {
        "HKV": kv_heads,
        "G": tiles["G"],
        "K": head_dim,
        "BLOCK_M": blocks.column_rows,
        "BLOCK_N": blocks.column_keys,
        "BLOCK_K": tiles["BLOCK_K"],
        "CAUSAL": True,
        "MAX": False,
    }
    return [
        _case(f"scores_partial-{name}", partial_kernel, dtype, matrix=True, **keys),
        _case(f"scores_partial-{name}-paged", partial_kernel, dtype, matrix=True, **keys, **paged),
        _case(f"scores_partial-{name}-rows", partial_kernel, dtype, matrix=True, **keys, p_ptr=None),
        _case(f"scores_apply-{name}", apply_kernel, dtype, matrix=True, **apply, MAX=False),
        _case(f"scores_apply-{name}-lse", apply_kernel, dtype, matrix=True, **apply, MAX=False, inverse_ptr=None),
        _case(f"column_sums-{name}", attention_column_sums_fwd_kernel, dtype, matrix=True, **columns,
              REDUCE="sum"),
        _case(f"column_sums-{name}-mean", attention_column_sums_fwd_kernel, dtype, matrix=True, **columns,
              REDUCE="mean", mask_ptr="*i8"),
    ]  # fmt: skip


def _reduce_case(name: str, heads: int, largest: bool) -> CompileCase:
    tiles: dict[str, Any] = {"HQ": heads, "BLOCK_H": _BLOCKS.heads, "BLOCK_N": _BLOCKS.keys, "MAX": largest}
    return _case(f"scores_reduce-{name}", attention_scores_fwd_reduce_kernel, **tiles)


# Qwen2-7B has 28/4 heads of 128 channels, InternLM2.5-7B 32/8.
COMPILE_CASES = [
    *_matrix_cases("h32-bf16", "bf16", 32, 8),
    *_matrix_cases("h28-bf16", "bf16", 28, 4),
    *_matrix_cases("h32-fp32", "fp32", 32, 8),
    _case("scores_merge", attention_scores_fwd_merge_kernel, HQ=32, BLOCK_N=_BLOCKS.keys, BLOCK_B=_BLOCKS.merge),
    _case(
        "scores_merge-blocks",
        attention_scores_fwd_merge_kernel,
        HQ=32,
        BLOCK_N=_BLOCKS.keys,
        BLOCK_B=_BLOCKS.merge,
        factor_ptr="*fp32",
        offset_ptr=None,
        inverse_ptr=None,
    ),
    _reduce_case("h32", 32, False),
    _reduce_case("h28-max", 28, True),
]
