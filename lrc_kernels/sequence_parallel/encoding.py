# SPDX-License-Identifier: Apache-2.0
"""A plan as a tensor of integers, back to a plan. Ops of torch.library take tensors and numbers: with the plan among
them they are functions of their arguments alone, whatever a compiled graph or a checkpoint does with them."""

from __future__ import annotations

from functools import lru_cache

import numpy as np
from torch import Tensor

from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel.plan import TRANSPORTS, SequencePlan
from lrc_kernels.sequence_parallel.stripe import StripePlan

_KINDS = {kind.kind: kind for kind in (SequencePlan, StripePlan)}
# Plans whose index tensors are kept; an older one is worked out once more where it is needed.
_KEPT = 32


def decode(encoded: Tensor) -> SequencePlan:
    """The plan of `SequencePlan.encoded`. Its arrangement has no name; what it executes is the same."""
    return _decode(encoded.numpy().tobytes())


@lru_cache(maxsize=_KEPT)
def _decode(data: bytes) -> SequencePlan:
    numbers = iter(np.frombuffer(data, dtype=np.int64).tolist())
    kind, ring, ulysses, num_heads, num_kv_heads, head_dim, transport, causal, sequences = (
        next(numbers) for _ in range(9)
    )
    layout = VarlenLayout([next(numbers) for _ in range(sequences)])
    shards = tuple(
        tuple(range(next(numbers), next(numbers), next(numbers)) for _ in range(next(numbers))) for _ in range(ring)
    )
    return _KINDS[kind](
        layout, ring, ulysses, num_heads, num_kv_heads, head_dim, "decoded", TRANSPORTS[transport], bool(causal), shards
    )
