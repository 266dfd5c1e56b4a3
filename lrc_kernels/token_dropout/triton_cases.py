# SPDX-License-Identifier: Apache-2.0
"""The configurations of token dropout's row kernels that ship, for `tools/compile_check.py` to compile."""

from __future__ import annotations

from typing import Any

import triton

from lrc_kernels._triton import CompileCase
from lrc_kernels.token_dropout.triton_kernels import (
    drop_tokens_fwd_kernel,
    drop_tokens_rmsnorm_bwd_kernel,
    drop_tokens_rmsnorm_fwd_kernel,
    move_blocks,
    rmsnorm_warps,
)
from lrc_kernels.token_dropout.triton_select import (
    select_block,
    select_tokens_bernoulli_fwd_count_kernel,
    select_tokens_bernoulli_fwd_write_kernel,
    select_tokens_fwd_histogram_kernel,
    select_tokens_fwd_write_kernel,
)

_TYPES = {
    **dict.fromkeys(("cu_ptr", "cu_out_ptr", "keep_ptr", "hist_ptr", "indices_ptr", "inverse_ptr"), "*i32"),
    **dict.fromkeys(("counts_ptr", "before_ptr", "room_ptr"), "*i32"),
    **dict.fromkeys(("layer", "num_blocks", "num_segments", "capacity"), "i32"),
    **dict.fromkeys(("seed_ptr", "ids_ptr", "positions_ptr", "state_ptr"), "*i64"),
    "droppable_ptr": "*i8",
    "scores_ptr": "*fp32",
    "threshold": "i64",
}


def _select_case(name: str, kernel: Any, *absent: str, **constexprs: Any) -> CompileCase:
    constexprs = {"BLOCK": select_block(), **dict.fromkeys(absent), **constexprs}
    types = {key: _TYPES[key] for key in kernel.arg_names if key not in constexprs}
    return CompileCase(f"select_tokens-{name}", kernel, types, constexprs, num_warps=8)


def _drop_case(name: str, *tensors: tuple[str, int]) -> CompileCase:
    """Tensors of one outer row, by the Triton type of their elements and their width."""
    count = len(tensors)
    pointers = tuple(f"*{kind}" for kind, _ in tensors)
    types: dict[str, Any] = {"x_ptrs": pointers, "y_ptrs": pointers, "index_ptr": "*i32", "num_rows": "i32"}
    types |= dict.fromkeys(("fills", "outers", "widths", "strides_outer", "strides_row"), ("i32",) * count)
    blocks = [move_blocks(width) for _, width in tensors]
    constexprs = {"BLOCKS_R": tuple(r for r, _ in blocks), "BLOCKS_C": tuple(c for _, c in blocks)}
    return CompileCase(f"drop_tokens-{name}", drop_tokens_fwd_kernel, types, constexprs)


def _rmsnorm_case(part: str, dtype: str, width: int) -> CompileCase:
    kernel = drop_tokens_rmsnorm_fwd_kernel if part == "fwd" else drop_tokens_rmsnorm_bwd_kernel
    floats = {"rstd_ptr": "*fp32", "partial_ptr": "*fp32", "eps": "fp32"}
    integers = {"indices_ptr": "*i32", "inverse_ptr": "*i32", "stride_row": "i32", "num_tokens": "i32"}
    constexprs = {"D": width, "BLOCK_D": triton.next_power_of_2(width)}
    types = {name: {**floats, **integers}.get(name, f"*{dtype}") for name in kernel.arg_names if name not in constexprs}
    case = f"drop_tokens_rmsnorm_{part}-d{width}-{dtype}"
    return CompileCase(case, kernel, types, constexprs, num_warps=rmsnorm_warps(width))


_NO_RANDOM = ("seed_ptr", "ids_ptr", "positions_ptr")

# Widths of the two language models: Qwen2-7B (3584) and InternLM2.5-7B (4096), head dimension 128.
COMPILE_CASES = [
    _select_case("topk-first", select_tokens_fwd_histogram_kernel, *_NO_RANDOM, MODE="topk", LEVEL=0),
    _select_case("topk-last", select_tokens_fwd_histogram_kernel, *_NO_RANDOM, MODE="topk", LEVEL=3),
    _select_case("topk-write", select_tokens_fwd_write_kernel, *_NO_RANDOM, MODE="topk"),
    _select_case("random-last", select_tokens_fwd_histogram_kernel, "scores_ptr", MODE="random", LEVEL=3),
    _select_case("random-write", select_tokens_fwd_write_kernel, "scores_ptr", MODE="random"),
    _select_case("linspace-write", select_tokens_fwd_write_kernel, "scores_ptr", *_NO_RANDOM, MODE="linspace"),
    _select_case("bernoulli-count", select_tokens_bernoulli_fwd_count_kernel),
    _select_case("bernoulli-write", select_tokens_bernoulli_fwd_write_kernel),
    _drop_case("d4096-labels", ("i16", 4096), ("i64", 1)),
    _drop_case("d3584-all", ("i16", 3584), ("i16", 3584), ("i64", 1), ("i64", 1), ("i16", 128), ("i16", 128)),
    _rmsnorm_case("fwd", "bf16", 4096),
    _rmsnorm_case("fwd", "fp32", 3584),
    _rmsnorm_case("bwd", "bf16", 4096),
    _rmsnorm_case("bwd", "fp32", 3584),
]
