# SPDX-License-Identifier: Apache-2.0
"""Bridge from `lrc::attention_scores_fwd` to `lrc_kernels._C`: tensors in, `data_ptr()`s, sizes and strides down, the
scores out."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

_DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
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


def cpu_supports_scores(q: Tensor, k: Tensor, *rest: Any) -> str | None:
    if k.dtype in _DTYPES:
        return None
    return f"k must be fp32, bf16 or fp16, got {str(k.dtype).removeprefix('torch.')}"


def cpu_scores(
    q: Tensor,
    k: Tensor,
    cu_seqlens_k: Tensor,
    row_sequence: Tensor,
    row_position: Tensor,
    block_table: Tensor | None,
    lse: Tensor | None,
    num_tokens: int,
    max_seqlen: int,
    head_reduce: str,
    one_row: bool,
    softmax_scale: float,
) -> Tensor:
    # A key's channels are read as vectors; any other stride may be what it is.
    k = k if k.stride(-1) == 1 or k.shape[-1] == 1 else k.contiguous()
    q, cu_seqlens = q.float().contiguous(), cu_seqlens_k.to(torch.int64).contiguous()
    row_sequence, row_position = row_sequence.int().contiguous(), row_position.int().contiguous()
    lse = None if lse is None else lse.contiguous()
    table = None if block_table is None else block_table.int().contiguous()
    strides: tuple[int, ...]
    if table is None:
        strides, sizes = (0, k.stride(0), k.stride(1)), (0, 0, 0, k.shape[0])
    else:
        strides, sizes = k.stride()[:3], (k.shape[0], k.shape[1], table.shape[1], 0)
    scores = torch.empty(num_tokens, dtype=torch.float32)
    _C.attention_scores(
        *(q.data_ptr(), q.shape[0], q.shape[1], k.data_ptr(), _DTYPES[k.dtype], k.shape[-2], k.shape[-1], strides),
        *(0 if table is None else table.data_ptr(), sizes, cu_seqlens.data_ptr(), cu_seqlens.numel() - 1),
        *(row_sequence.data_ptr(), row_position.data_ptr(), 0 if lse is None else lse.data_ptr()),
        *(head_reduce == "max", 1.0 / q.shape[1] if head_reduce == "mean" else 1.0, softmax_scale),
        *(scores.data_ptr(), num_tokens, torch.get_num_threads()),
    )
    return scores
