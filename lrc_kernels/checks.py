# SPDX-License-Identifier: Apache-2.0
"""Argument checks of the public boundary: each names the argument, the value seen and the value wanted."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels import env

FLOATS = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def check_tensor(
    name: str,
    value: Tensor,
    *,
    dims: tuple[int, ...],
    dtypes: tuple[torch.dtype, ...] = FLOATS,
    numel: int | None = None,
    like: Tensor | None = None,
) -> None:
    """TypeError for what is no tensor of one of `dtypes`; ValueError for its dimensions, elements or device."""
    if not isinstance(value, Tensor):
        raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    if value.dtype not in dtypes:
        wanted = ", ".join(str(dtype).removeprefix("torch.") for dtype in dtypes)
        raise TypeError(f"{name} must be one of {wanted}, got {str(value.dtype).removeprefix('torch.')}")
    if value.dim() not in dims:
        raise ValueError(f"{name} must have {' or '.join(map(str, dims))} dimensions, got shape {list(value.shape)}")
    if numel is not None and value.numel() != numel:
        raise ValueError(f"{name} must hold one value per token ({numel}), got shape {list(value.shape)}")
    if like is not None:
        check_device(name, value, like)


def check_device(name: str, value: Tensor, like: Tensor) -> None:
    if value.device != like.device:
        raise ValueError(f"{name} must be on {like.device} as the other arguments are, got {value.device}")


def check_choice(name: str, value: str, choices: tuple[str, ...]) -> None:
    if value not in choices:
        raise ValueError(f"{name} must be one of {', '.join(choices)}, got {value!r}")


def check_int(name: str, value: int, *, minimum: int) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, torch.SymInt)):
        raise TypeError(f"{name} must be an int, got {type(value).__name__}")
    if value < minimum:
        raise ValueError(f"{name} must be >= {minimum}, got {value}")


def check_values(name: str, value: Tensor, ok: Tensor, wanted: str) -> None:
    """ValueError where `ok` is False; only for values that `values_are_checked`."""
    if values_are_checked(value) and not bool(ok.all()):
        at = int((~ok.flatten()).nonzero()[0])
        raise ValueError(f"{name} must be {wanted}, got {value.flatten()[at].item()} at index {at}")


def values_are_checked(value: Tensor) -> bool:
    """Whether values are read: always on CPU, on a device only under LRC_CHECK=1 (it synchronises)."""
    return not torch.compiler.is_compiling() and (value.device.type == "cpu" or env.check())
