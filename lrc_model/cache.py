# SPDX-License-Identifier: Apache-2.0
"""Keys and values of what has been read so far: ragged, because a layer behind a drop has seen fewer rows."""

from __future__ import annotations

import torch
from torch import Tensor

from lrc_kernels.layout import VarlenLayout
from lrc_model.language import attend


class KVCache:
    """Per layer and sequence the keys [L, Hkv, K] (turned by the rotary embedding) and values, in arrival order.

    Args:
        num_layers: decoder layers.
    """

    def __init__(self, num_layers: int):
        self.num_layers, self.num_sequences = num_layers, 0
        self._buffers: list[list[Tensor | None]] = [[] for _ in range(num_layers)]
        self._lengths: list[list[int]] = [[] for _ in range(num_layers)]

    def add_sequence(self) -> int:
        """Make room for one more sequence and return its number."""
        for buffers, lengths in zip(self._buffers, self._lengths, strict=True):
            buffers.append(None)
            lengths.append(0)
        self.num_sequences += 1
        return self.num_sequences - 1

    def length(self, layer: int, sequence: int) -> int:
        """Rows of a sequence that a layer holds."""
        return self._lengths[layer][sequence]

    def reserve(self, layer: int, sequence: int, num_rows: int, like: Tensor) -> None:
        """Room for `num_rows` rows in all, so that a long prompt is never copied; `like` is a key [*, Hkv, K]."""
        old = self._buffers[layer][sequence]
        if old is not None and old.shape[1] >= num_rows:
            return
        new = torch.empty(2, num_rows, *like.shape[1:], dtype=like.dtype, device=like.device)
        if old is not None:
            filled = self._lengths[layer][sequence]
            new[:, :filled] = old[:, :filled]
        self._buffers[layer][sequence] = new

    def append(self, layer: int, sequence: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add rows [n, Hkv, K] and return all keys and values of the sequence so far, without a copy."""
        if v.shape != k.shape:
            raise ValueError(f"v must have the shape of k, {list(k.shape)}, got {list(v.shape)}")
        start = self._lengths[layer][sequence]
        end = start + k.shape[0]
        buffer = self._buffers[layer][sequence]
        if buffer is None or buffer.shape[1] < end:
            self.reserve(layer, sequence, max(end, 2 * start), k)
            buffer = self._buffers[layer][sequence]
        assert buffer is not None
        buffer[0, start:end] = k
        buffer[1, start:end] = v
        self._lengths[layer][sequence] = end
        return self.rows(layer, sequence, end)

    def rows(self, layer: int, sequence: int, end: int) -> tuple[Tensor, Tensor]:
        """The first `end` keys and values [end, Hkv, K] of a sequence, without a copy."""
        if not (0 <= layer < self.num_layers and 0 <= sequence < self.num_sequences):
            held = f"{self.num_layers} layers and {self.num_sequences} sequences"
            raise ValueError(f"layer and sequence must be within the {held} held, got {layer} and {sequence}")
        buffer = self._buffers[layer][sequence]
        if buffer is None or end > self._lengths[layer][sequence]:
            raise ValueError(f"end must be at most the {self._lengths[layer][sequence]} rows held, got {end}")
        return buffer[0, :end], buffer[1, :end]

    def seen(self, layer: int, sequence: int) -> int:
        """Rows of a sequence that a layer has seen, wherever they lie."""
        return self.length(layer, sequence)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """One more row of every sequence, q [S, Hq, K], k and v [S, Hkv, K]: added, it attends to all, [S, Hq, K]."""
        one, outs = VarlenLayout([1], q.device), []
        for sequence in range(self.num_sequences):
            row = slice(sequence, sequence + 1)
            keys, values = self.append(layer, sequence, k[row], v[row])
            outs.append(attend(q[row], keys, values, one, VarlenLayout([keys.shape[0]], q.device)))
        return torch.cat(outs)

    @property
    def num_bytes(self) -> int:
        """Bytes of memory that the cache holds, room for later rows included."""
        return sum(b.numel() * b.element_size() for layer in self._buffers for b in layer if b is not None)
