# SPDX-License-Identifier: Apache-2.0
"""What every room's `native.py` shares: the native module where it was built, else why not, and how tensors are named
to it: by address and by the number of their dtype."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

# `lrc::DType` in csrc/include/lrc/token_rows.h.
DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
_BUILD_HINT = "build it with `pip install -e . --no-build-isolation` in a checkout"


def _load() -> tuple[Any, str | None]:
    """(the native module, None), or (None, why it is missing): a source tree without a build stays importable."""
    try:
        return importlib.import_module("lrc_kernels._C"), None
    except ImportError as error:
        return None, f"lrc_kernels._C cannot be imported ({error}); {_BUILD_HINT}"


module, missing = _load()


def cpu_unavailable() -> str | None:
    """Why the CPU kernels cannot run in this process, or None when they can."""
    return missing


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None when they can on some device."""
    if missing is not None:
        return missing
    if not module.has_cuda:
        return "lrc_kernels was built without CUDA (no nvcc was found, or LRC_CUDA=0)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"


@functools.cache
def cuda_device_status(device: int) -> str | None:
    """Why the CUDA kernels cannot run on this device, or None when they can."""
    with torch.cuda.device(device):
        return module.cuda_device_status()


def pointer(tensor: Tensor | None) -> int:
    """The address that stands for a tensor, 0 for none."""
    return 0 if tensor is None else tensor.data_ptr()


def declines_dtype(name: str, value: Tensor) -> str | None:
    """Why the native kernels do not take the dtype of argument `name`, or None when they do."""
    if value.dtype in DTYPES:
        return None
    return f"{name} must be fp32, bf16 or fp16, got {str(value.dtype).removeprefix('torch.')}"
