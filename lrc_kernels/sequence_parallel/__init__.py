# SPDX-License-Identifier: Apache-2.0
"""Exact attention over one pack that lies on many ranks: ring, Ulysses and both, for documents of any lengths."""

from lrc_kernels.sequence_parallel.attention_2d import (
    CHECKPOINT_OPS,
    ring_attention,
    sequence_parallel_attention,
    ulysses_attention,
)
from lrc_kernels.sequence_parallel.comm import PeerError
from lrc_kernels.sequence_parallel.decode import sequence_parallel_decode_attention
from lrc_kernels.sequence_parallel.dropout import (
    drop_rows,
    gather_rows,
    plan_after_drop,
    rows_at,
    rows_of_ranks,
    sequence_parallel_scores,
)
from lrc_kernels.sequence_parallel.exchange import RowExchange, exchange_rows, plan_exchange
from lrc_kernels.sequence_parallel.gradients import sum_gradients, sum_over_ranks
from lrc_kernels.sequence_parallel.mesh import degree_of, make_mesh, place
from lrc_kernels.sequence_parallel.plan import Block, Mask, PlanStats, SequencePlan, plan_sequence
from lrc_kernels.sequence_parallel.shard import shard, unshard

__all__ = [
    "CHECKPOINT_OPS",
    "Block",
    "Mask",
    "PeerError",
    "PlanStats",
    "RowExchange",
    "SequencePlan",
    "degree_of",
    "drop_rows",
    "exchange_rows",
    "gather_rows",
    "make_mesh",
    "place",
    "plan_after_drop",
    "plan_exchange",
    "plan_sequence",
    "ring_attention",
    "rows_at",
    "rows_of_ranks",
    "sequence_parallel_attention",
    "sequence_parallel_decode_attention",
    "sequence_parallel_scores",
    "shard",
    "sum_gradients",
    "sum_over_ranks",
    "ulysses_attention",
    "unshard",
]
