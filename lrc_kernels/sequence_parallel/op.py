# SPDX-License-Identifier: Apache-2.0
"""The copies of the head exchange as ops: one read and one write each, where PyTorch has a permute, a copy and a cat.
They have no gradient of their own: each is the other's adjoint, and the schedules call both ways."""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.backend import Op
from lrc_kernels.sequence_parallel import reference


def _fake_scatter(xs: list[Tensor], table: Tensor) -> Tensor:
    return xs[0].new_empty(table.shape[0], xs[0].shape[0], table.shape[1], xs[0].shape[2])


def _fake_gather(parts: Tensor, table: Tensor, num_heads: list[int], dtype: torch.dtype) -> list[Tensor]:
    return [parts.new_empty(parts.shape[1], heads, parts.shape[3], dtype=dtype) for heads in num_heads]


scatter_heads_op = Op("scatter_heads_fwd(Tensor[] xs, Tensor table) -> Tensor", _fake_scatter)
gather_heads_op = Op(
    "gather_heads_fwd(Tensor parts, Tensor table, int[] num_heads, ScalarType dtype) -> Tensor[]", _fake_gather
)


def _triton(name: str) -> Any:
    """Launch functions are imported on the first call, so that the package imports where Triton is missing."""

    def launch(*args: Any) -> Any:
        return getattr(importlib.import_module("lrc_kernels.sequence_parallel.triton_kernels"), name)(*args)

    return launch


for _op, _reference, _name in (
    (scatter_heads_op, reference.scatter_heads, "scatter_heads"),
    (gather_heads_op, reference.gather_heads, "gather_heads"),
):
    _op.implement("reference", _reference)
    _op.implement("triton", _triton(f"launch_{_name}"), supports=_triton(f"supports_{_name}"))
