# SPDX-License-Identifier: Apache-2.0
"""Attention by the flash-attn packages, the newest of 4, 3 and 2 that is installed and takes the call: arguments of the
ops' schemas in, their results out. A package whose functions lack the keywords used here counts as not installed."""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lrc_kernels.attention import vendors


class _Package(NamedTuple):
    """Where one generation keeps its two functions, the keywords that are passed to them, and what it can run on."""

    name: str
    module: str
    forward: str
    backward: str
    keywords: tuple[tuple[str, ...], tuple[str, ...]]
    capability: tuple[int, int]
    newest: int
    head_dim: int
    window: bool


_LENGTHS = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "softmax_scale")
_SIDES = ("window_size_left", "window_size_right")
_GRADIENTS = ("dq", "dk", "dv", "deterministic")

# Newest first. Capabilities: the least, and the greatest major version, that its kernels were written for.
PACKAGES = (
    _Package(
        *("flash-attn 4", "flash_attn.cute.interface", "flash_attn_varlen_func", "_flash_attn_bwd"),
        keywords=((*_LENGTHS, "causal", "return_lse"), (*_LENGTHS, "causal", "deterministic")),
        capability=(9, 0),
        newest=11,
        head_dim=128,
        window=False,
    ),
    _Package(
        *("flash-attn 3", "flash_attn_interface", "_flash_attn_forward", "_flash_attn_backward"),
        keywords=((*_LENGTHS, "causal", *_SIDES), (*_LENGTHS, "is_causal", *_SIDES, *_GRADIENTS)),
        capability=(9, 0),
        newest=9,
        head_dim=256,
        window=True,
    ),
    _Package(
        *("flash-attn 2", "flash_attn.flash_attn_interface"),
        *("_flash_attn_varlen_forward", "_flash_attn_varlen_backward"),
        keywords=(
            (*_LENGTHS, "dropout_p", "causal", *_SIDES),
            (*_LENGTHS, "dropout_p", "causal", *_SIDES, "softcap", "alibi_slopes", *_GRADIENTS),
        ),
        capability=(8, 0),
        newest=99,
        head_dim=256,
        window=True,
    ),
)


@functools.cache
def _functions(package: _Package) -> tuple[Callable, Callable] | str:
    """(forward, backward) of a package, or why it cannot be used."""
    try:
        module = importlib.import_module(package.module)
        functions = tuple(getattr(module, name) for name in (package.forward, package.backward))
    except (ImportError, AttributeError, OSError) as error:
        return f"{package.name} cannot be imported ({error})"
    for function, keywords in zip(functions, package.keywords, strict=True):
        # torch.library.custom_op hides the signature of the function that it wraps.
        parameters = inspect.signature(getattr(function, "_init_fn", function)).parameters
        if missing := [name for name in keywords if name not in parameters]:
            return f"{package.name} has an interface that lacks {', '.join(missing)}"
    return functions[0], functions[1]


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    reasons = [found for package in PACKAGES if isinstance(found := _functions(package), str)]
    return "; ".join(reasons) if len(reasons) == len(PACKAGES) else None


def _declines(package: _Package, q: Tensor, key_bias: Tensor | None, dlse: Tensor | None, backward: bool, causal: bool,
              window_left: int, window_right: int) -> str | None:  # fmt: skip
    if isinstance(found := _functions(package), str):
        return found
    limits = {"capability": package.capability, "head_dim": package.head_dim}
    if (reason := vendors.declines(q, key_bias, **limits, dlse=dlse)) is not None:  # type: ignore[arg-type]
        return f"{package.name}: {reason}"
    major = torch.cuda.get_device_capability(q.device)[0]
    if major > package.newest:
        return f"{package.name}: no kernel for compute capability {major}"
    if not package.window and (window_left >= 0 or (window_right >= 0 and not causal)):
        return f"{package.name}: a window is left to the other backends"
    if package is PACKAGES[0] and backward and major < 10:
        return f"{package.name}: its varlen backward needs compute capability 10.0 or newer, got {major}"
    return None


def _choose(q: Tensor, key_bias: Tensor | None, dlse: Tensor | None, backward: bool, causal: bool, window_left: int,
            window_right: int) -> _Package | str:  # fmt: skip
    """The newest package that takes the call, or why none does."""
    reasons = []
    for package in PACKAGES:
        reason = _declines(package, q, key_bias, dlse, backward, causal, window_left, window_right)
        if reason is None:
            return package
        reasons.append(reason)
    return "; ".join(reasons)


def supports_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, max_q: int,
                     max_k: int, causal: bool, softmax_scale: float, left: int, right: int) -> str | None:  # fmt: skip
    chosen = _choose(q, key_bias, None, False, causal, left, right)
    return chosen if isinstance(chosen, str) else None


def supports_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
                      cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, max_q: int, max_k: int, causal: bool,
                      softmax_scale: float, left: int, right: int) -> str | None:  # fmt: skip
    chosen = _choose(q, key_bias, dlse, True, causal, left, right)
    return chosen if isinstance(chosen, str) else None


def _call(package: _Package, index: int, tensors: tuple[Tensor, ...], values: dict[str, Any]) -> Any:
    functions = _functions(package)
    assert not isinstance(functions, str)
    return functions[index](*tensors, **{name: values[name] for name in package.keywords[index]})


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None,
            max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, window_left: int,
            window_right: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0 or k.shape[0] == 0:
        return vendors.empty_forward(q)
    package = _choose(q, key_bias, None, False, causal, window_left, window_right)
    assert isinstance(package, _Package)
    values = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "window_size_left": window_left,
        "window_size_right": window_right,
        "dropout_p": 0.0,
        "return_lse": True,
    }
    out, lse, *_ = _call(package, 0, vendors.rows_contiguous(q, k, v), values)
    return vendors.normalised(out, lse)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
             cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
             causal: bool, softmax_scale: float, window_left: int,
             window_right: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0 or k.shape[0] == 0:
        return vendors.empty_backward(q, k, v)
    package = _choose(q, key_bias, dlse, True, causal, window_left, window_right)
    assert isinstance(package, _Package)
    dq, dk, dv = vendors.empty_backward(q, k, v)
    values = {
        "cu_seqlens_q": cu_seqlens_q,
        "cu_seqlens_k": cu_seqlens_k,
        "max_seqlen_q": max_seqlen_q,
        "max_seqlen_k": max_seqlen_k,
        "softmax_scale": softmax_scale,
        "causal": causal,
        "is_causal": causal,
        "window_size_left": window_left,
        "window_size_right": window_right,
        "dropout_p": 0.0,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "dq": dq,
        "dk": dk,
        "dv": dv,
    }
    dout, q, k, v, out = vendors.rows_contiguous(dout.to(q.dtype), q, k, v, out.to(q.dtype))
    lse = vendors.lse_for_backward(lse)
    if package is PACKAGES[0]:
        # It takes `out` before `dout`, and returns the gradients instead of filling them.
        dq, dk, dv = (x.contiguous() for x in _call(package, 1, (q, k, v, out, dout, lse), values)[:3])
    else:
        _call(package, 1, (dout, q, k, v, out, lse), values)
    return dq, dk, dv
