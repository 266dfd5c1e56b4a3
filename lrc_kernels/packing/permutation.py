# SPDX-License-Identifier: Apache-2.0
"""The order in which an epoch visits its samples: positions in, sample numbers out, without a table.

The generators of numpy, torch and Python promise no stable stream across versions; a plan that is recomputed on every
rank and after every resume needs one.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15
_ROUNDS = 8


def _mix(z: int) -> int:
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
    return z ^ (z >> 31)


def _mix_array(z: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))


class Permutation:
    """The permutation of range(n) that (seed, epoch, stream) names, with random access.

    A Feistel network of eight rounds on the fewest bits that hold n values, its round function splitmix64's finaliser
    (Steele, Lea and Flood 2014), walked along its cycle until it lands below n (Black and Rogaway 2002). Fewer than two
    applications are needed on average, whatever n is.

    Args:
        n: the number of values, at least 0 and at most 2^63.
        seed, epoch: at least 0, below 2^64.
        stream: 0 for the order of samples, 1 for the order of steps that were grouped by cost.
    """

    def __init__(self, n: int, seed: int, epoch: int, stream: int = 0):
        self.n = n
        bits = max(2, (n - 1).bit_length())
        self._low_bits = np.uint64(bits // 2)
        self._low_mask = np.uint64((1 << bits // 2) - 1)
        self._high_mask = np.uint64((1 << bits - bits // 2) - 1)
        state = _mix((seed + _GOLDEN) & _MASK)
        for value in (epoch, stream):
            state = _mix((state + value + _GOLDEN) & _MASK)
        self._keys = [np.uint64(_mix((state + (r + 1) * _GOLDEN) & _MASK)) for r in range(_ROUNDS)]

    def _encrypt(self, value: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
        low, high = value & self._low_mask, value >> self._low_bits
        for r in range(0, _ROUNDS, 2):
            low = low ^ (_mix_array(high + self._keys[r]) & self._low_mask)
            high = high ^ (_mix_array(low + self._keys[r + 1]) & self._high_mask)
        return high << self._low_bits | low

    def __call__(self, positions: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Entries int64 at the given positions, each in [0, n)."""
        value = self._encrypt(positions.astype(np.uint64))
        outside = np.flatnonzero(value >= np.uint64(self.n))
        while outside.size:
            value[outside] = self._encrypt(value[outside])
            outside = outside[value[outside] >= np.uint64(self.n)]
        return value.astype(np.int64)

    def all(self) -> npt.NDArray[np.int64]:
        """Every entry, int64 [n]."""
        return self(np.arange(self.n, dtype=np.int64))
