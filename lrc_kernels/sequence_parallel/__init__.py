# SPDX-License-Identifier: Apache-2.0
"""Exact attention over one pack that lies on many ranks: ring, Ulysses and both, for documents of any lengths."""

from lrc_kernels.sequence_parallel.attention_2d import (
    CHECKPOINT_OPS,
    ring_attention,
    sequence_parallel_attention,
    ulysses_attention,
)
from lrc_kernels.sequence_parallel.comm import PeerError
from lrc_kernels.sequence_parallel.mesh import make_mesh
from lrc_kernels.sequence_parallel.plan import Block, Mask, PlanStats, SequencePlan, plan_sequence
from lrc_kernels.sequence_parallel.shard import shard, unshard

__all__ = [
    "CHECKPOINT_OPS",
    "Block",
    "Mask",
    "PeerError",
    "PlanStats",
    "SequencePlan",
    "make_mesh",
    "plan_sequence",
    "ring_attention",
    "sequence_parallel_attention",
    "shard",
    "ulysses_attention",
    "unshard",
]
