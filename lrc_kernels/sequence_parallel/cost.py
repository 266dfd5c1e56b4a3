# SPDX-License-Identifier: Apache-2.0
"""The cost model: a SequencePlan in, the bytes that it moves and the time that one attention layer takes out.

Compute is bounded by the fullest rank; a kernel whose queries see `keys` keys each reaches keys / (keys + half_keys) of
the peak. A ring step takes the longer of its compute and its hop. `simulate.py` uses the same terms for plans that
nobody has to build, and compares them with published figures.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lrc_kernels.sequence_parallel.plan import SequencePlan

# The backward has five matrix products where the forward has two.
BACKWARD_FLOPS = 2.5
# Of an element on the wire: activations in 16 bits, gradients in fp32.
ACTIVATION_BYTES, GRADIENT_BYTES = 2, 4


@dataclass(frozen=True)
class Hardware:
    """What one GPU and its links reach.

    Attributes:
        flops: attention forward in 16 bits on long sequences, FLOP/s.
        half_keys: keys per query at which a kernel reaches half of that.
        nvlink, network: bytes/s per GPU and direction, inside a node and between nodes.
        node_size: GPUs of a node.
        latency: seconds that a step of a ring or an all-to-all takes beside its bytes: launch, merge and first byte.
        backward: share of `flops` that the backward reaches.
    """

    name: str
    flops: float
    half_keys: float
    nvlink: float
    network: float
    node_size: int = 8
    latency: float = 40e-6
    backward: float = 0.95

    def compute(self, pairs: float, rows: float, width: int) -> float:
        """Seconds for the forward of `pairs` (query, key) pairs of `rows` queries; width = heads x head dim."""
        if pairs == 0:
            return 0.0
        keys = pairs / rows
        return 4 * pairs * width / (self.flops * keys / (keys + self.half_keys))

    def link(self, num_ranks: int) -> float:
        """Bytes/s of the slowest hop among `num_ranks` ranks of neighbouring numbers."""
        return self.nvlink if num_ranks <= self.node_size else self.network

    def all_to_all(self, nbytes: float, num_ranks: int, stride: int = 1) -> float:
        """Seconds for each of `num_ranks` ranks, `stride` apart, to send `nbytes` to the others."""
        if num_ranks == 1:
            return 0.0
        inside = max(1, min(num_ranks, self.node_size // stride))
        outside = (num_ranks - inside) / (num_ranks - 1)
        return max(nbytes * (1 - outside) / self.nvlink, nbytes * outside / self.network) + self.latency


H100 = Hardware("H100", flops=640e12, half_keys=2300, nvlink=370e9, network=45e9)
A100 = Hardware("A100", flops=215e12, half_keys=1000, nvlink=230e9, network=22e9)


def bytes_moved(plan: SequencePlan) -> tuple[int, int]:
    """(forward, backward) bytes that all ranks of the group send for one attention layer."""
    heads = plan.heads
    row, gradient_row = (2 * heads.num_kv * plan.head_dim * size for size in (ACTIVATION_BYTES, GRADIENT_BYTES))
    if plan.transport == "ring":
        forward = backward = (plan.ring - 1) * sum(plan.shard_rows)
    else:
        forward = backward = sum(plan.remote_rows(rank) for rank in range(plan.ring))
    if plan.transport == "gather":
        forward = plan.ring * (plan.ring - 1) * max(plan.shard_rows)
    key_bytes = (plan.ulysses * forward * row, plan.ulysses * (forward * row + backward * gradient_row))
    queries, keys, key_gradients = _head_exchange(plan)
    return key_bytes[0] + 2 * queries + keys, key_bytes[1] + 2 * queries + key_gradients


def predicted_time(plan: SequencePlan, hardware: Hardware = H100) -> float:
    """Seconds for forward and backward of one attention layer, ring ranks `ulysses` apart (head_first)."""
    heads, ring = plan.heads, plan.ring
    width, longest = heads.num_q * plan.head_dim, max(plan.shard_rows)
    link = hardware.link(ring * plan.ulysses)
    total = 0.0
    for flops, row_bytes in ((1.0, 1), (BACKWARD_FLOPS / hardware.backward, 1 + GRADIENT_BYTES / ACTIVATION_BYTES)):
        row = 2 * heads.num_kv * plan.head_dim * ACTIVATION_BYTES * row_bytes
        slowest = 0.0
        for rank, rows in enumerate(plan.shard_rows):
            local, remote = plan.areas(rank)
            own = flops * hardware.compute(local, rows, width)
            if plan.transport == "ring":
                step = flops * hardware.compute(remote / max(1, ring - 1), rows, width)
                seconds = own + (ring - 1) * (max(step, longest * row / link) + hardware.latency)
            else:
                arriving = plan.remote_rows(rank) if plan.transport == "sparse" else (ring - 1) * longest
                exchange = arriving * row / link + hardware.latency if ring > 1 else 0.0
                seconds = max(own, exchange) + flops * hardware.compute(remote, rows, width)
            slowest = max(slowest, seconds)
        total += slowest
    queries, keys, key_gradients = (nbytes / (ring * plan.ulysses) for nbytes in _head_exchange(plan))
    exchanges = hardware.all_to_all(4 * queries + keys + key_gradients, plan.ulysses)
    return total + exchanges


def _head_exchange(plan: SequencePlan) -> tuple[int, int, int]:
    """Bytes that all ranks send to exchange heads once: query rows, K and V rows, gradients of K and V rows."""
    heads = plan.heads
    rows = plan.ulysses * (plan.ulysses - 1) * sum(plan.local_rows(rank) for rank in range(plan.ring)) * plan.head_dim
    wire = GRADIENT_BYTES if heads.replicated else ACTIVATION_BYTES
    queries, keys = rows * heads.num_q * ACTIVATION_BYTES, 2 * rows * heads.num_kv
    return queries, keys * ACTIVATION_BYTES, keys * wire
