# SPDX-License-Identifier: Apache-2.0
"""The compiled module `lrc_kernels._C`, and what the bridges of every op share: why it cannot run, dtypes, pointers."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# As `lrc::DType` numbers them.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BUILD_HINT = "build it with `pip install -e . --no-build-isolation` in a checkout"


def _load() -> tuple[Any, str | None]:
    """(the native module, None), or (None, why it is missing): a source tree without a build stays importable."""
    try:
        return importlib.import_module("lrc_kernels._C"), None
    except ImportError as error:
        return None, f"lrc_kernels._C cannot be imported ({error}); {_BUILD_HINT}"


C, _missing = _load()


def cpu_unavailable() -> str | None:
    """Why the CPU kernels cannot run in this process, or None when they can."""
    return _missing


def cpu_isa() -> str:
    """The instruction set that the CPU kernels run with: "avx512", "avx2", "baseline", or "none" without a build."""
    return "none" if C is None else C.cpu_isa()


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None when they can on some device."""
    if _missing is not None:
        return _missing
    if not C.has_cuda:
        return "lrc_kernels was built without CUDA (no nvcc was found, or LRC_CUDA=0)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def cuda_device_status(device: int) -> str | None:
    """Why the CUDA kernels cannot run on this device (an old driver, no kernel image for it), or None."""
    with torch.cuda.device(device):
        return C.cuda_device_status()


def declines_dtype(name: str, value: Tensor) -> str | None:
    """Why the native kernels decline a tensor's dtype, or None."""
    if value.dtype in DTYPES:
        return None
    return f"{name} must be fp32, bf16 or fp16, got {str(value.dtype).removeprefix('torch.')}"


def pointer(tensor: Tensor | None) -> int:
    """The address of a tensor, 0 for None."""
    return 0 if tensor is None else tensor.data_ptr()
