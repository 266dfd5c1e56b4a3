# SPDX-License-Identifier: Apache-2.0
"""The configurations of the head exchange's kernels that ship, for `tools/compile_check.py` to compile."""

from __future__ import annotations

from typing import Any

import triton.language as tl

from lrc_kernels._triton import CompileCase
from lrc_kernels.sequence_parallel.triton_kernels import copy_blocks, gather_heads_fwd_kernel, scatter_heads_fwd_kernel


def _scatter_case(name: str, kind: str, count: int, width: int) -> CompileCase:
    block_r, block_k = copy_blocks(width)
    types: dict[str, Any] = {"x_ptrs": (f"*{kind}",) * count, "message_ptr": f"*{kind}", "table_ptr": "*i32"}
    types |= dict.fromkeys(("heads", "strides_row", "strides_head", "strides_dim"), ("i32",) * count)
    types |= dict.fromkeys(("num_rows", "num_slots", "num_places", "K"), "i32")
    constexprs = {"BLOCK_R": block_r, "BLOCK_K": block_k}
    return CompileCase(
        f"scatter_heads-{name}", scatter_heads_fwd_kernel, types, constexprs, multiples_of_16=_wide(width)
    )


def _gather_case(name: str, kind: str, result: str, count: int, copies: int, width: int) -> CompileCase:
    block_r, block_k = copy_blocks(width)
    types: dict[str, Any] = {"parts_ptr": f"*{kind}", "y_ptrs": (f"*{result}",) * count, "table_ptr": "*i32"}
    types |= {"heads": ("i32",) * count, **dict.fromkeys(("num_rows", "num_slots", "num_heads", "K"), "i32")}
    constexprs = {"COPIES": copies, "ACC": tl.float32, "BLOCK_R": block_r, "BLOCK_K": block_k}
    return CompileCase(f"gather_heads-{name}", gather_heads_fwd_kernel, types, constexprs, multiples_of_16=_wide(width))


def _wide(width: int) -> tuple[str, ...]:
    """K where Triton knows that rows are aligned, and so moves several elements at once."""
    return () if width % 16 else ("K",)


# Heads of 128: q | k | v on the way in, out or dq, dk | dv of replicated heads, 16-bit dq | dk | dv to
# fp32, and lse (K = 1).
COMPILE_CASES = [
    _scatter_case("k128-qkv", "i16", 3, 128),
    _scatter_case("k1-lse", "i32", 1, 1),
    _gather_case("k128-out", "bf16", "bf16", 1, 1, 128),
    _gather_case("k128-dkdv", "fp32", "fp32", 2, 4, 128),
    _gather_case("k128-wide", "bf16", "fp32", 3, 1, 128),
    _gather_case("k1-lse", "fp32", "fp32", 1, 1, 1),
]
