# SPDX-License-Identifier: Apache-2.0
"""Bridges from the token dropout ops to `lrc_kernels._C` and to torch's own CPU gathers: tensors in, tensors out."""

from __future__ import annotations

import functools
import importlib
from typing import Any

import torch
from torch import Tensor

_BUILD_HINT = "build it with `pip install -e . --no-build-isolation` in a checkout"


def _load() -> tuple[Any, str | None]:
    """(the native module, None), or (None, why it is missing): a source tree without a build stays importable."""
    try:
        return importlib.import_module("lrc_kernels._C"), None
    except ImportError as error:
        return None, f"lrc_kernels._C cannot be imported ({error}); {_BUILD_HINT}"


_C, _missing = _load()


def cpu_unavailable() -> str | None:
    """Why the CPU kernels cannot run in this process, or None when they can."""
    return _missing


def cpu_move_rows(tensors: list[Tensor], index: Tensor, fill: list[float]) -> list[Tensor]:
    """`reference.move_rows` by torch's gathers, which copy rows at the speed of memory."""
    present = (index >= 0).nonzero()[:, 0]
    whole = present.numel() == index.numel()
    chosen = index if whole else index[present]
    moved = []
    for x, value in zip(tensors, fill, strict=True):
        # One outer row as a matrix: torch copies whole rows there.
        rows = x[0].index_select(0, chosen)[None] if x.shape[0] == 1 else x.index_select(1, chosen)
        if not whole:
            y = x.new_full((x.shape[0], index.shape[0], x.shape[2]), _element(value, x))
            rows = y.index_copy_(1, present, rows)
        moved.append(rows)
    return moved


def _element(value: float, x: Tensor) -> float | int:
    return value if x.is_floating_point() or x.is_complex() else int(value)


@functools.cache
def _cuda_device_status(device: int) -> str | None:
    with torch.cuda.device(device):
        return _C.cuda_device_status()


def cuda_unavailable() -> str | None:
    """Why the CUDA kernels cannot run in this process, or None when they can on some device."""
    if _missing is not None:
        return _missing
    if not _C.has_cuda:
        return "lrc_kernels was built without CUDA (no nvcc was found, or LRC_CUDA=0)"
    return None if torch.cuda.is_available() else "torch sees no CUDA device"
