# SPDX-License-Identifier: Apache-2.0
"""The configurations of ToMe's Triton kernels that ship, which `tools/compile_check.py` compiles ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from lrc_kernels._triton import CompileCase
from lrc_kernels.tome.triton_groups import (
    MODES,
    PIECE,
    group_blocks,
    tome_merge_fwd_groups_kernel,
    tome_merge_fwd_pieces_kernel,
)
from lrc_kernels.tome.triton_kernels import (
    head_mean_blocks,
    merge_blocks,
    tome_gather_fwd_kernel,
    tome_head_mean_fwd_kernel,
    tome_merge_fwd_kernel,
)
from lrc_kernels.tome.triton_plan import (
    MATRIX_WARPS,
    plan_blocks,
    tome_plan_fwd_key_kernel,
    tome_plan_fwd_match_kernel,
    tome_plan_fwd_prepare_kernel,
    tome_plan_fwd_rank_kernel,
)
from lrc_kernels.tome.triton_step import (
    tome_plan_fwd_assign_kernel,
    tome_plan_fwd_rows_kernel,
    tome_plan_fwd_step_kernel,
)


def _compile_case(
    name: str, kernel: Any, arguments: dict[str, Any], *, num_warps: int = 4, num_stages: int = 3,
    tensor_cores: bool = False, rounds_exactly: bool = False,
) -> CompileCase:  # fmt: skip
    """A CompileCase whose run-time arguments are those given by a Triton type ("*fp32", "i32")."""
    types = {key: value for key, value in arguments.items() if isinstance(value, str)}
    values = {key: value for key, value in arguments.items() if not isinstance(value, str)}
    return CompileCase(name, kernel, types, values, num_warps, num_stages, tensor_cores, rounds_exactly=rounds_exactly)


_ABSENT = dict.fromkeys(
    ("order_ptr", "sources_ptr", "protected_ptr", "next_protected_ptr", "rank_ptr", "final_row_ptr", "survives_ptr")
)
_TYPES = {
    **dict.fromkeys(("new_row_ptr", "partner_ptr", "anchor_ptr", "next_anchor_ptr"), "*i32"),
    **dict.fromkeys(
        ("r_ptr", "cu_ptr", "cu_out_ptr", "cu_next_ptr", "count_ptr", "anchor_out_ptr", "assign_ptr"), "*i32"
    ),
    **dict.fromkeys(("payload_ptr", "next_payload_ptr", "size_ptr", "next_size_ptr", "score_ptr"), "*fp32"),
    **dict.fromkeys(("size_out_ptr", "weight_ptr"), "*fp32"),
    **dict.fromkeys(("state_ptr", "valid_ptr"), "*i8"),
    **dict.fromkeys(("total", "num_segments", "num_blocks", "iteration", "num_iterations"), "i32"),
    "threshold": "fp32",
    "key_ptr": "*i64",
}


def _plan_case(name: str, kernel: Any, arguments: dict[str, Any], num_warps: int = 4) -> CompileCase:
    known = {key: value for key, value in {**_TYPES, **_ABSENT}.items() if key in kernel.arg_names}
    tensor_cores = num_warps == MATRIX_WARPS and arguments.get("next_payload_ptr", True) is not None
    return _compile_case(
        name, kernel, {**known, **arguments}, num_warps=num_warps, tensor_cores=tensor_cores, rounds_exactly=True
    )


def _metric_case(part: str, name: str, width: int, bf16: bool = False, **changed: Any) -> CompileCase:
    at = plan_blocks(width)
    options = {"PADDED_K": at.padded_k, "BLOCK_K": at.k, "BF16": bf16, "ISOLATE": True}
    unit = {"unit_ptr": "*bf16" if bf16 else "*fp16", **options}
    kernels: dict[str, tuple[Any, dict[str, Any], int]] = {
        "prepare": (tome_plan_fwd_prepare_kernel, {**unit, "K": width, "BLOCK_T": at.tokens}, 4),
        "match": (
            tome_plan_fwd_match_kernel,
            {**unit, "BLOCK_A": at.match_a, "BLOCK_B": at.match_b, "HALVING": False},
            MATRIX_WARPS,
        ),
        "step": (
            tome_plan_fwd_step_kernel,
            {**unit, "K": width, "BLOCK_B": at.step_b, "BLOCK_A": at.step_a, "HALVING": False},
            MATRIX_WARPS,
        ),
    }
    kernel, tiles, num_warps = kernels[part]
    return _plan_case(f"tome_{part}-{name}", kernel, {**tiles, **changed}, num_warps)


# K = 88 (InternVideo2-1B) is padded to 128 and runs the same code as K = 128 (InternVideo2.5).
_UNFUSED: dict[str, Any] = {"unit_ptr": None, "state_ptr": None}
_PLAN_CASES = [
    _metric_case("prepare", "k128-fp32", 128),
    _metric_case("prepare", "k128-bf16", 128, bf16=True),
    _metric_case("match", "k64-fp32", 64, HALVING=True),
    _metric_case("match", "k128-fp32", 128, HALVING=True),
    _metric_case("match", "k128-fp32-ranked", 128),
    _metric_case("match", "k128-bf16", 128, bf16=True, ISOLATE=False),
    _metric_case("match", "k320-fp32", 320),
    _metric_case("step", "k64", 64, HALVING=True),
    _metric_case("step", "k128", 128, HALVING=True),
    _metric_case("step", "k128-ranked", 128, protected_ptr="*i8", next_protected_ptr="*i8"),
    _metric_case("step", "k128-bf16-nan", 128, bf16=True, ISOLATE=False),
    _metric_case("step", "k320", 320, **_UNFUSED),
    _metric_case("step", "last", 128, next_payload_ptr=None, **_UNFUSED),
    _metric_case("step", "last-position", 128, next_payload_ptr=None, survives_ptr="*i32", **_UNFUSED),
    _plan_case("tome_key", tome_plan_fwd_key_kernel, {"BLOCK": 64}),
    _plan_case("tome_rank", tome_plan_fwd_rank_kernel, {"BLOCK": 64, "HAS_THRESHOLD": False}),
    _plan_case("tome_rank-threshold", tome_plan_fwd_rank_kernel, {"BLOCK": 64, "HAS_THRESHOLD": True}),
    _plan_case(
        "tome_rank-sorted", tome_plan_fwd_rank_kernel, {"BLOCK": 64, "HAS_THRESHOLD": False, "rank_ptr": "*i64"}
    ),
    _plan_case(
        "tome_rows-position", tome_plan_fwd_rows_kernel, {"BLOCK": 64, "survivors_ptr": "*i32", "final_row_ptr": "*i32"}
    ),
    _plan_case("tome_assign", tome_plan_fwd_assign_kernel, {"BLOCK": 64}),
    _plan_case("tome_assign-position", tome_plan_fwd_assign_kernel, {"BLOCK": 64, "final_row_ptr": "*i32"}),
]


def _head_mean_case(name: str, dtype: str, K: int, num_heads: int, channels: int, shuffle: int) -> CompileCase:
    block_t, block_k, unroll = head_mean_blocks(K, num_heads)
    arguments = {
        "x_ptr": f"*{dtype}", "metric_ptr": "*fp32", "num_tokens": "i32", **_ADDRESS, "stride_c": 1, "K": K,
        "NUM_HEADS": num_heads, "D": channels, "SHUFFLE": shuffle, "BLOCK_T": block_t, "BLOCK_K": block_k,
        "UNROLL": unroll,
    }  # fmt: skip
    return _compile_case(f"tome_head_mean-{name}", tome_head_mean_fwd_kernel, arguments)


def _merge_case(name: str, dtype: str, rows: int, channels: int, shuffle: int, binary: bool = True) -> CompileCase:
    direct = binary and dtype != "fp32"
    block_r, block_t, block_c = merge_blocks(rows * 64, 64, direct)
    arguments = {
        "x_ptr": f"*{dtype}", "assign_ptr": "*i32", "weight_ptr": "*fp32", "size_ptr": "*fp32", "y_ptr": f"*{dtype}",
        "cu_in_ptr": "*i32", "cu_out_ptr": "*i32", **_ADDRESS, "stride_c": 1, "num_columns": "i32",
        "num_splits": "i32", "most_rows": "i32", "D": channels, "SHUFFLE": shuffle, "BLOCK_R": block_r,
        "BLOCK_T": block_t, "BLOCK_C": block_c, "BINARY": binary, "MEAN": True,
    }  # fmt: skip
    return _compile_case(
        f"tome_merge-{name}", tome_merge_fwd_kernel, arguments, num_warps=MATRIX_WARPS, tensor_cores=True
    )


def _gather_case(name: str, dtype: str, channels: int, shuffle: int) -> CompileCase:
    arguments = {
        "y_ptr": f"*{dtype}", "assign_ptr": "*i32", "size_ptr": "*fp32", "weight_ptr": "*fp32", "first_ptr": None,
        "x_ptr": f"*{dtype}", "num_tokens": "i32", "num_columns": "i32", "stride_y_row": "i32", "stride_y_c": 1,
        **_ADDRESS, "D": channels, "SHUFFLE": shuffle, "BLOCK_T": 2, "BLOCK_C": 1024,
    }  # fmt: skip
    return _compile_case(f"tome_gather-{name}", tome_gather_fwd_kernel, arguments)


def _group_case(name: str, dtype: str, channels: int, mode: str) -> CompileCase:
    block_r, block_c, unroll = group_blocks(channels, mode)
    part = "*i32" if mode == "first" else "*fp32"
    arguments = {
        "x_ptr": f"*{dtype}", "order_ptr": "*i64", "row_start_ptr": "*i32", "piece_start_ptr": "*i32",
        "partial_ptr": part, "size_ptr": "*fp32", "weight_ptr": "*fp32", "y_ptr": f"*{dtype}",
        "out_ptr": "*i32" if mode == "first" else f"*{dtype}", "cu_out_ptr": None if mode == "first" else "*i32",
        **_ADDRESS, "stride_c": 1, "num_blocks": "i32", "num_columns": "i32", "num_rows": "i32", "most_rows": "i32",
        "search_steps": "i32", "D": channels, "SHUFFLE": 1, "BLOCK_R": block_r, "BLOCK_C": block_c, "UNROLL": unroll,
        "PIECE": PIECE, "MODE": MODES[mode],
    }  # fmt: skip
    kernel = tome_merge_fwd_pieces_kernel if name.startswith("pieces") else tome_merge_fwd_groups_kernel
    known = {key: value for key, value in arguments.items() if key in kernel.arg_names}
    return _compile_case(f"tome_{name}", kernel, known)


_ADDRESS = dict.fromkeys(("tokens_per_frame", "grid_w", "prefix", "stride_frame", "stride_row"), "i32")

# The released and the paper's connector (1024 channels, pixel shuffle 2, 64 and 128 rows a clip), plain rows beside it.
COMPILE_CASES = [
    _head_mean_case("vit-bf16", "bf16", 128, 32, 1024, 2),
    _head_mean_case("d4096-bf16", "bf16", 128, 32, 4096, 1),
    _head_mean_case("d4096-fp32", "fp32", 128, 32, 4096, 1),
    _head_mean_case("k88-bf16", "bf16", 88, 16, 1408, 1),
    *_PLAN_CASES,
    _merge_case("vit-bf16-64", "bf16", 64, 1024, 2),
    _merge_case("vit-bf16-128", "bf16", 128, 1024, 2),
    _merge_case("d4096-bf16-128", "bf16", 128, 4096, 1),
    _merge_case("d4096-fp32-64", "fp32", 64, 4096, 1),
    _merge_case("d4096-fp32-128", "fp32", 128, 4096, 1),
    _merge_case("d1408-bf16-weighted", "bf16", 128, 1408, 1, binary=False),
    _group_case("pieces-d320-fp16", "fp16", 320, "mean"),
    _group_case("groups-d320-fp16", "fp16", 320, "mean"),
    _group_case("groups-d4096-bf16", "bf16", 4096, "mean"),
    _group_case("groups-d1024-max", "bf16", 1024, "max"),
    _group_case("groups-d1024-first", "bf16", 1024, "first"),
    _gather_case("vit-bf16", "bf16", 1024, 2),
    _gather_case("d4096-fp32", "fp32", 4096, 1),
]

# What an AMD GPU launches: half as many waves, which have twice the lanes, and two stages. One case of each kernel.
_AMD = (
    "tome_head_mean-vit-bf16", "tome_prepare-k128-fp32", "tome_match-k128-fp32", "tome_match-k320-fp32",
    "tome_step-k128-ranked", "tome_key", "tome_rank-threshold", "tome_rows-position", "tome_assign",
    "tome_merge-vit-bf16-128", "tome_merge-d4096-fp32-128", "tome_pieces-d320-fp16", "tome_groups-d1024-max",
    "tome_gather-vit-bf16",
)  # fmt: skip
COMPILE_CASES += [
    replace(
        case, name=f"{case.name}-amd", archs=("gfx942",), num_stages=2,
        num_warps=case.num_warps // 2 if case.num_warps == MATRIX_WARPS else case.num_warps,
    )
    for case in COMPILE_CASES
    if case.name in _AMD
]  # fmt: skip
