# SPDX-License-Identifier: Apache-2.0
"""Bridges from the pack planner to `lrc_kernels._C`: numpy arrays in, their addresses down, numpy arrays out."""

from __future__ import annotations

import importlib
from typing import Any

import numpy as np
import numpy.typing as npt

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_STRATEGIES = {"in_order": 0, "open_best_fit": 1, "first_fit": 2, "best_fit": 3, "bfd": 4}
_BUILD_HINT = "build it with `pip install -e . --no-build-isolation` in a checkout"


def _load() -> tuple[Any, str | None]:
    """(the native module, None), or (None, why it is missing): a source tree without a build stays importable."""
    try:
        return importlib.import_module("lrc_kernels._C"), None
    except ImportError as error:
        return None, f"lrc_kernels._C cannot be imported ({error}); {_BUILD_HINT}"


_C, _missing = _load()


def unavailable() -> str | None:
    """Why the C++ planner cannot run in this process, or None when it can."""
    return _missing


def pack_samples(
    num_tokens: Ints,
    num_frames: Ints,
    cost: Floats,
    keep: npt.NDArray[np.bool_] | None,
    *,
    seed: int,
    epoch: int,
    strategy: str,
    max_tokens: int,
    max_frames: int,
    max_cost: float,
    open_packs: int,
    window: int,
) -> tuple[Ints, Ints, Ints, Ints, Floats]:
    """As `reference.pack_samples`, the arrays contiguous."""
    num_samples = num_tokens.shape[0]
    num_kept = num_samples if keep is None else int(np.count_nonzero(keep))
    sample_index, pack_ptr = np.empty(num_kept, dtype=np.int64), np.empty(num_kept + 1, dtype=np.int64)
    tokens, frames = np.empty(num_kept, dtype=np.int64), np.empty(num_kept, dtype=np.int64)
    pack_cost = np.empty(num_kept, dtype=np.float64)
    packs = _C.pack_samples(
        *(num_tokens.ctypes.data, num_frames.ctypes.data, cost.ctypes.data, 0 if keep is None else keep.ctypes.data),
        *(num_samples, num_kept, seed, epoch, _STRATEGIES[strategy], max_tokens, max_frames, max_cost),
        *(open_packs, window, sample_index.ctypes.data, pack_ptr.ctypes.data),
        *(tokens.ctypes.data, frames.ctypes.data, pack_cost.ctypes.data),
    )
    return (
        sample_index,
        pack_ptr[: packs + 1].copy(),
        *(x[:packs].copy() for x in (tokens, frames)),
        pack_cost[:packs].copy(),
    )


def permutation(n: int, seed: int, epoch: int, stream: int = 0) -> Ints:
    """As `Permutation(n, seed, epoch, stream).all()`."""
    out = np.empty(n, dtype=np.int64)
    _C.pack_permutation(n, seed, epoch, stream, out.ctypes.data)
    return out
