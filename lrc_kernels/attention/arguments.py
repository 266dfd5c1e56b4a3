# SPDX-License-Identifier: Apache-2.0
"""What a user gives to attention, checked and turned into the arguments that the ops' schemas share (`Pack`)."""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc_kernels.attention.reference import accumulation_dtype
from lrc_kernels.checks import check_device, check_int, check_tensor, check_values, values_are_checked
from lrc_kernels.layout import VarlenLayout


class Pack(NamedTuple):
    """The arguments that follow the data tensors in the schemas of `op.py`, in their order."""

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    key_bias: Tensor | None
    max_seqlen_q: int
    max_seqlen_k: int
    causal: bool
    softmax_scale: float
    window_left: int
    window_right: int


def check_pack(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: VarlenLayout | Tensor,
    cu_seqlens_k: VarlenLayout | Tensor | None,
    max_seqlen_q: int | None,
    max_seqlen_k: int | None,
    causal: bool,
    softmax_scale: float | None,
    key_bias: Tensor | None,
    window: tuple[int, int] | None,
) -> Pack:
    """The Pack of one call. TypeError, ValueError as `varlen_attention` documents them."""
    _check_qkv(q, k, v)
    if cu_seqlens_k is None:
        if max_seqlen_k is not None:
            raise ValueError(f"max_seqlen_k must be None where cu_seqlens_k is, got {max_seqlen_k}")
        if k.shape[0] != q.shape[0]:
            raise ValueError(
                f"cu_seqlens_k must be given where k has other rows than q, got {k.shape[0]}, {q.shape[0]}"
            )
    starts_q, longest_q = _resolve("q", cu_seqlens_q, max_seqlen_q, q)
    if cu_seqlens_k is None:
        starts_k, longest_k = starts_q, longest_q
    else:
        starts_k, longest_k = _resolve("k", cu_seqlens_k, max_seqlen_k, k)
    if starts_k.shape[0] != starts_q.shape[0]:
        raise ValueError(
            f"cu_seqlens_k must have as many sequences as cu_seqlens_q ({starts_q.shape[0] - 1}), "
            f"got {starts_k.shape[0] - 1}"
        )
    if not isinstance(causal, bool):
        raise TypeError(f"causal must be a bool, got {type(causal).__name__}")
    if softmax_scale is None:
        softmax_scale = q.shape[2] ** -0.5
    elif not math.isfinite(softmax_scale):
        raise ValueError(f"softmax_scale must be finite, got {softmax_scale}")
    if key_bias is not None:
        _check_key_bias(key_bias, k)
    left, right = _check_window(window)
    return Pack(starts_q, starts_k, key_bias, longest_q, longest_k, causal, float(softmax_scale), left, right)


def check_like(name: str, value: Tensor, shape: torch.Size, dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """TypeError, ValueError where `value` has not exactly `shape`, one of `dtypes` and the device of `like`."""
    check_tensor(name, value, dims=(len(shape),), dtypes=dtypes, like=like)
    if value.shape != shape:
        raise ValueError(f"{name} must have shape {list(shape)}, got {list(value.shape)}")


def check_lse(name: str, value: Tensor, q: Tensor) -> None:
    """TypeError, ValueError where `value` is no [Hq, Tq] in the accumulation dtype of q."""
    check_like(name, value, torch.Size((q.shape[1], q.shape[0])), (accumulation_dtype(q),), q)


def _check_qkv(q: Tensor, k: Tensor, v: Tensor) -> None:
    for name, x in (("q", q), ("k", k), ("v", v)):
        check_tensor(name, x, dims=(3,))
    for name, x in (("k", k), ("v", v)):
        check_device(name, x, q)
        if x.dtype != q.dtype:
            raise TypeError(f"{name} must have the dtype of q ({q.dtype}), got {x.dtype}")
    if k.shape != v.shape:
        raise ValueError(f"v must have the shape of k {list(k.shape)}, got {list(v.shape)}")
    if q.shape[2] != k.shape[2] or q.shape[2] == 0:
        raise ValueError(f"k must have the head dim of q ({q.shape[2]}), which must be > 0, got {k.shape[2]}")
    if k.shape[1] == 0 or q.shape[1] % k.shape[1]:
        raise ValueError(f"k must have a number of heads that divides that of q ({q.shape[1]}), got {k.shape[1]}")


def _resolve(name: str, cu_seqlens: VarlenLayout | Tensor, max_seqlen: int | None, rows: Tensor) -> tuple[Tensor, Any]:
    """(int32 offsets, rows of the longest sequence) of q or k, which must hold exactly the rows of the layout."""
    if max_seqlen is not None:
        check_int(f"max_seqlen_{name}", max_seqlen, minimum=0)
    if not isinstance(cu_seqlens, VarlenLayout):
        if not isinstance(cu_seqlens, Tensor) or cu_seqlens.dtype not in (torch.int32, torch.int64):
            seen = cu_seqlens.dtype if isinstance(cu_seqlens, Tensor) else type(cu_seqlens).__name__
            raise TypeError(f"cu_seqlens_{name} must be a VarlenLayout or an int32 or int64 tensor, got {seen}")
        if cu_seqlens.dim() != 1 or cu_seqlens.shape[0] == 0:
            raise ValueError(f"cu_seqlens_{name} must have shape [S + 1], got {list(cu_seqlens.shape)}")
        check_device(f"cu_seqlens_{name}", cu_seqlens, rows)
        if max_seqlen is not None and not values_are_checked(cu_seqlens):
            return cu_seqlens.to(torch.int32).contiguous(), max_seqlen
        if torch.compiler.is_compiling():
            raise ValueError(
                f"max_seqlen_{name} must be given inside torch.compile where cu_seqlens_{name} is a tensor"
            )
        try:
            cu_seqlens = VarlenLayout.from_cu_seqlens(cu_seqlens)
        except ValueError as error:
            raise ValueError(f"cu_seqlens_{name}: {error}") from None
    check_device(f"cu_seqlens_{name}", cu_seqlens.cu_seqlens, rows)
    if cu_seqlens.num_tokens != rows.shape[0]:
        raise ValueError(
            f"cu_seqlens_{name} must cover exactly the {rows.shape[0]} rows of {name}, got {cu_seqlens.num_tokens}"
        )
    if max_seqlen is not None and max_seqlen < cu_seqlens.max_seqlen:
        raise ValueError(
            f"max_seqlen_{name} must be at least the longest sequence ({cu_seqlens.max_seqlen} rows), got {max_seqlen}"
        )
    return cu_seqlens.cu_seqlens, cu_seqlens.max_seqlen


def _check_key_bias(key_bias: Tensor, k: Tensor) -> None:
    check_like("key_bias", key_bias, torch.Size((k.shape[0],)), (accumulation_dtype(k),), k)
    if key_bias.requires_grad:
        raise ValueError("key_bias must not require a gradient, which attention does not compute: detach it")
    if values_are_checked(key_bias):
        check_values("key_bias", key_bias, key_bias < torch.inf, "finite or -inf")


def _check_window(window: tuple[int, int] | None) -> tuple[int, int]:
    if window is None:
        return -1, -1
    if not isinstance(window, (tuple, list)) or len(window) != 2:
        raise ValueError(f"window must be (left, right), -1 for no bound, got {window!r}")
    for side, value in zip(("left", "right"), window, strict=True):
        check_int(f"window {side}", value, minimum=-1)
    # No sequence is as long: past this a bound binds nothing, and kernels add positions to it in 32 bits.
    left, right = (-1 if value >= 2**30 else value for value in window)
    return left, right
