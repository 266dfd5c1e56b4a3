# SPDX-License-Identifier: Apache-2.0
"""The configurations of the attention kernels that ship, which `tools/compile_check.py` compiles ahead of time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch

from lrc_kernels._triton import CompileCase
from lrc_kernels.attention.triton_backward import (
    attention_bwd_delta_kernel,
    attention_bwd_dkdv_kernel,
    attention_bwd_dq_kernel,
    backward_blocks,
)
from lrc_kernels.attention.triton_kernels import (
    attention_fwd_kernel,
    attention_merge_partials_kernel,
    forward_blocks,
)
from lrc_kernels.attention.triton_tiles import Blocks, padded_head_dim

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_INTEGERS = (
    *("total", "total_q", "num_sequences", "num_steps", "num_rows", "num_heads", "num_kv_heads", "group", "left"),
    "right",
)
_FP32 = (
    *("bias_ptr", "lse_ptr", "dlse_ptr", "l_ptr", "delta_ptr", "safe_lse_ptr", "lse_block_ptr", "merged_ptr"),
    "merged_lse_ptr",
)

# What a plain causal call leaves out, and the unmasked rectangle of a ring; a call with everything leaves out nothing.
_CAUSAL = {"HAS_LEFT": False, "HAS_RIGHT": True, "bias_ptr": None}
_RECTANGLE = {"HAS_LEFT": False, "HAS_RIGHT": False, "bias_ptr": None}
_EVERYTHING = {"HAS_LEFT": True, "HAS_RIGHT": True}


def _case(name: str, kernel: Any, dtype: str, blocks: Blocks, archs: tuple[str, ...], **values: object) -> CompileCase:
    """A kernel's arguments by name: what `values` gives, else the type that the name has in every attention kernel."""
    signature, constexprs = {}, {}
    for argument in kernel.arg_names:
        if argument in values:
            constexprs[argument] = values[argument]
        elif argument == "scale":
            signature[argument] = "fp32"
        elif argument in _INTEGERS or argument.startswith("stride"):
            signature[argument] = "i32"
        elif argument.startswith("cu_"):
            signature[argument] = "*i32"
        else:
            signature[argument] = "*fp32" if argument in _FP32 else f"*{dtype}"
    tensor_cores = dtype != "fp32" and "BLOCK_N" in constexprs
    return CompileCase(name, kernel, signature, constexprs, blocks.num_warps, blocks.num_stages, tensor_cores, archs)


def _attention_case(part: str, name: str, dtype: str, K: int, arch: str, options: dict[str, Any]) -> CompileCase:
    capability = (int(arch[3]), int(arch[4]))
    keys, queries = backward_blocks(K, _DTYPES[dtype], capability)
    kernel, blocks = {
        "fwd": (attention_fwd_kernel, forward_blocks(K, _DTYPES[dtype], capability)),
        "bwd_dkdv": (attention_bwd_dkdv_kernel, keys),
        "bwd_dq": (attention_bwd_dq_kernel, queries),
    }[part]
    values = {**options, "K": K, "BLOCK_M": blocks.m, "BLOCK_N": blocks.n, "BLOCK_K": padded_head_dim(K)}
    # The accumulate kernel holds its state in fp32 where the forward writes q's dtype.
    if options.get("l_ptr", "") is None or part != "fwd":
        return _case(f"attention_{part}-{name}-{arch}", kernel, dtype, blocks, (arch,), **values)
    case = _case(f"attention_accumulate-{name}-{arch}", kernel, dtype, blocks, (arch,), **values)
    return replace(case, signature={**case.signature, "out_ptr": "*fp32"})


def _cases_of(arch: str) -> list[CompileCase]:
    final = {"l_ptr": None}
    cases = [
        _attention_case(part, name, dtype, K, arch, {**options, **(final if part == "fwd" else {})})
        for part in ("fwd", "bwd_dkdv", "bwd_dq")
        for name, dtype, K, options in (
            ("k64-bf16", "bf16", 64, _CAUSAL),
            ("k128-bf16", "bf16", 128, _CAUSAL),
            ("k80-fp16-everything", "fp16", 80, _EVERYTHING),
            ("k128-bf16-everything", "bf16", 128, _EVERYTHING),
            ("k256-bf16-everything", "bf16", 256, _EVERYTHING),
            ("k128-fp32-everything", "fp32", 128, _EVERYTHING),
        )
    ]
    return [
        *cases,
        _attention_case("fwd", "k128-bf16-rectangle", "bf16", 128, arch, {**_RECTANGLE, **final}),
        _attention_case("fwd", "k128-bf16", "bf16", 128, arch, _CAUSAL),
        _attention_case("fwd", "k128-bf16-everything", "bf16", 128, arch, _EVERYTHING),
    ]


_BOTH = ("sm_80", "sm_90")
_ROWS = Blocks(32, 0, 4, 3)

# K = 128 is the head dim of the 8B language model, 64 and 80 those of vision towers.
COMPILE_CASES = [
    *_cases_of("sm_80"),
    *_cases_of("sm_90"),
    _case("attention_bwd_delta-bf16", attention_bwd_delta_kernel, "bf16", _ROWS, _BOTH, K=128, BLOCK_M=32, BLOCK_K=128),
    _case(
        "attention_merge_partials-bf16", attention_merge_partials_kernel, "bf16", _ROWS, _BOTH, K=128, BLOCK_T=16,
        BLOCK_K=128,
    ),
]  # fmt: skip
