# SPDX-License-Identifier: Apache-2.0
"""What every op's Triton files share: how a `triton_cases.py` names a configuration that ships, to be compiled ahead of
time by `tools/compile_check.py`, and the names of dtypes in a Triton signature."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

_SIGNATURE_NAMES = {
    torch.float64: "fp64",
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.int64: "i64",
    torch.int32: "i32",
    torch.int8: "i8",
    torch.uint8: "u8",
    torch.bool: "i1",
}


@dataclass(frozen=True)
class CompileCase:
    """One shipped configuration of a kernel.

    Args:
        name: unique over the project, "<kernel>-<what sets this configuration apart>".
        kernel: the `@triton.jit` function.
        signature: Triton type of each run-time argument ("*bf16", "i32", "fp32"), in any order; a tuple of types for
            an argument that is a tuple.
        constexprs: value of each constexpr argument.
        num_warps, num_stages: as launched.
        tensor_cores: True where `wgmma` or `mma.sync` must appear in the PTX.
        archs: where this configuration ships, if the tile depends on the device.
        rounds_exactly: True where no division or root may be the GPU's approximate one.
        multiples_of_16: integers, beside the strides, for which Triton specialises the kernel as multiples of 16.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str | tuple[str, ...]]
    constexprs: Mapping[str, object]
    num_warps: int = 4
    num_stages: int = 2
    tensor_cores: bool = False
    archs: tuple[str, ...] = ("sm_80", "sm_90")
    rounds_exactly: bool = False
    multiples_of_16: tuple[str, ...] = ()


def signature_type(value: torch.dtype | torch.Tensor) -> str:
    """The Triton signature of an argument: "*bf16" for a bf16 tensor, "bf16" for the dtype itself.

    Raises:
        TypeError: a dtype that no kernel takes.
    """
    dtype = value.dtype if isinstance(value, torch.Tensor) else value
    if dtype not in _SIGNATURE_NAMES:
        raise TypeError(f"value must be one of {', '.join(map(str, _SIGNATURE_NAMES))}, got {dtype}")
    return ("*" if isinstance(value, torch.Tensor) else "") + _SIGNATURE_NAMES[dtype]
