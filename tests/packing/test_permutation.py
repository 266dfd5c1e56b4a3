# SPDX-License-Identifier: Apache-2.0
"""The permutation of an epoch: a bijection, the same in C++ and Python, and never another one in a later version."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrc_kernels.packing import native
from lrc_kernels.packing.permutation import Permutation

SIZES = [*range(70), 127, 128, 129, 255, 257, 1000, 4095, 4097, 65_537, 300_000]
WORDS = st.integers(0, 2**64 - 1)


@pytest.mark.parametrize("seed", [0, 1, 2**64 - 1])
def test_every_size_is_a_bijection_and_equal_in_cpp_and_python(seed: int) -> None:
    for n in SIZES:
        entries = Permutation(n, seed, 3).all()
        assert entries.dtype == np.int64
        assert np.array_equal(np.sort(entries), np.arange(n)), n
        assert np.array_equal(entries, native.permutation(n, seed, 3)), n


@given(st.integers(0, 3000), WORDS, WORDS, st.integers(0, 3))
def test_cpp_equals_python(n: int, seed: int, epoch: int, stream: int) -> None:
    entries = Permutation(n, seed, epoch, stream).all()
    assert np.array_equal(entries, native.permutation(n, seed, epoch, stream))


@given(st.integers(1, 2**63), WORDS, st.integers(0, 2**63 - 1))
def test_any_position_can_be_read_without_the_others(n: int, seed: int, position: int) -> None:
    positions = np.array([0, position % n, n - 1], dtype=np.int64)
    entries = Permutation(n, seed, 0)(positions)
    assert ((entries >= 0) & (entries < n)).all()
    assert np.unique(entries).size == np.unique(positions).size


def test_known_answers() -> None:
    """A change here changes the data order of every run that resumes."""
    assert Permutation(10, 0, 0).all().tolist() == [9, 6, 7, 4, 8, 5, 3, 0, 2, 1]
    assert Permutation(10, 0, 1).all().tolist() == [3, 1, 2, 7, 8, 0, 4, 5, 6, 9]
    assert Permutation(3_500_000, 42, 7)(np.arange(5)).tolist() == [1562431, 1905146, 2944805, 546425, 3267371]


def test_seeds_epochs_and_streams_differ() -> None:
    orders = [Permutation(1000, *key).all() for key in itertools.product((0, 1, 2), (0, 1, 2), (0, 1))]
    for a, b in itertools.combinations(orders, 2):
        assert (a == b).mean() < 0.02


def test_no_order_of_four_is_favoured() -> None:
    """24 orders over 6,000 seeds: chi-square below its 99.9 % point at 23 degrees of freedom."""
    orders = [tuple(Permutation(4, seed, 0).all().tolist()) for seed in range(6000)]
    counts = np.array([orders.count(order) for order in itertools.permutations(range(4))])
    assert ((counts - 250) ** 2 / 250).sum() < 49.7


def test_neighbours_are_torn_apart() -> None:
    """Places and steps are uniform: the mean of n uniforms, and of n distances, within five standard errors."""
    n = 100_000
    order = Permutation(n, 5, 0).all()
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 5 / n**0.5
    assert abs(np.abs(np.diff(order)).mean() / n - 1 / 3) < 5 * (1 / 18) ** 0.5 / n**0.5
