# SPDX-License-Identifier: Apache-2.0
"""Balance across data-parallel ranks: equal counts, its bound, any number of ranks, and the figures of stage 3."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from lrc_kernels.packing import PackConfig, PackPlan, plan_packs
from lrc_kernels.packing.balance import deal, imbalance
from lrc_kernels.packing.simulate import stage3_lengths


@pytest.fixture(scope="module")
def columns() -> dict:
    return stage3_lengths(40_000, seed=2)


def steps_as_sets(plan: PackPlan) -> list[frozenset[int]]:
    ends = plan.pack_ptr[:: plan.packs_per_step]
    return [frozenset(plan.sample_index[a:b].tolist()) for a, b in itertools.pairwise(ends)]


@given(st.lists(st.floats(0, 1e15), min_size=1, max_size=6), st.integers(1, 6), st.integers(1, 5))
def test_ranks_get_equally_many_and_differ_by_no_more_than_a_round(seeds: list[float], dp: int, rounds: int) -> None:
    random = np.random.default_rng([int(x) for x in seeds])
    cost = random.exponential(size=(3, dp * rounds)) * (random.random((3, dp * rounds)) < 0.9)
    ranks = deal(cost, dp, by_cost=True)
    for step in range(3):
        assert (np.bincount(ranks[step], minlength=dp) == rounds).all()
        load = np.bincount(ranks[step], weights=cost[step], minlength=dp)
        by_round = -np.sort(-cost[step]).reshape(rounds, dp)
        assert load.max() - load.min() <= (by_round[:, 0] - by_round[:, -1]).max() * (1 + 1e-12) + 1e-12
    assert (deal(cost, dp, by_cost=False) == np.arange(dp * rounds) % dp).all()


def test_imbalance_by_hand() -> None:
    cost = np.array([[4.0, 3.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])
    assert imbalance(cost, 2, by_cost=False).tolist() == [6 / 5, 1.0]
    assert imbalance(cost, 2, by_cost=True).tolist() == [1.0, 1.0]


@pytest.mark.parametrize("balance", ["none", "lpt", "group"])
def test_any_number_of_ranks_runs_the_same_steps(columns: dict, balance: str) -> None:
    plan = plan_packs(columns, packs_per_step=8, balance=balance)
    for step in (0, plan.num_steps - 1):
        whole = set(range(step * 8, step * 8 + 8))
        for dp_size in (1, 2, 4, 8):
            ranks = plan.rank_of_pack(step, dp_size)
            assert ranks.dtype == np.int64 and (np.bincount(ranks, minlength=dp_size) == 8 // dp_size).all()
            parts = [plan.packs_of_rank(step, rank, dp_size) for rank in range(dp_size)]
            assert sorted(np.concatenate(parts).tolist()) == sorted(whole)
            for rank, packs in enumerate(parts):
                assert (ranks[packs - step * 8] == rank).all()


def test_lpt_moves_no_pack_and_its_ranks_run_like_packs_at_the_same_time(columns: dict) -> None:
    none, lpt = (plan_packs(columns, packs_per_step=32, balance=b) for b in ("none", "lpt"))
    assert np.array_equal(none.sample_index, lpt.sample_index) and np.array_equal(none.pack_ptr, lpt.pack_ptr)
    cost = np.stack([lpt.cost[lpt.packs_of_rank(0, rank, 8)] for rank in range(8)])
    by_round = -np.sort(-lpt.cost[:32]).reshape(4, 8)
    assert np.array_equal(np.sort(cost, axis=0), np.sort(by_round.T, axis=0))


@pytest.mark.parametrize("drop_last", [True, False])
def test_group_keeps_the_packs_and_puts_neighbours_together(columns: dict, drop_last: bool) -> None:
    config = PackConfig(drop_last=drop_last)
    none, group = (plan_packs(columns, config, packs_per_step=16, balance=b) for b in ("none", "group"))
    packs = [sorted(tuple(p.samples_of_pack(i).tolist()) for i in range(p.num_packs)) for p in (none, group)]
    assert packs[0] == packs[1]
    assert steps_as_sets(none) != steps_as_sets(group)
    cost = group.cost.reshape(-1, 16)
    ends = sorted(zip(cost.min(axis=1).tolist(), cost.max(axis=1).tolist(), strict=True))
    assert all(a[1] <= b[0] for a, b in itertools.pairwise(ends))
    assert not (np.diff(cost.mean(axis=1)) >= 0).all()
    assert group.skipped == none.skipped


def test_stage_3_over_64_ranks() -> None:
    columns = stage3_lengths(350_000, seed=0)
    for config in (PackConfig(), PackConfig(strategy="in_order")):
        uneven = {
            balance: plan_packs(columns, config, packs_per_step=pps, balance=balance).stats(64)
            for balance, pps in (("none", 64), ("lpt", 256), ("group", 64))
        }
        assert uneven["lpt"].imbalance <= 1.02 and uneven["lpt"].imbalance_max <= 1.02
        assert uneven["group"].imbalance <= 1.005
        assert uneven["none"].imbalance > 1.03


def test_bad_ranks() -> None:
    plan = plan_packs([60] * 12, PackConfig(max_tokens=100), packs_per_step=6)
    with pytest.raises(
        ValueError, match=r"packs_per_step must be a multiple of dp_size = 4, got 6 \(nearest: 4 or 8\)"
    ):
        plan.rank_of_pack(0, 4)
    with pytest.raises(ValueError, match=r"multiple of dp_size = 7, got 6 \(nearest: 7\)"):
        plan.stats(7)
    with pytest.raises(ValueError, match="step must be below 2, got 2"):
        plan.rank_of_pack(2, 2)
    with pytest.raises(ValueError, match="step must be >= 0, got -1"):
        plan.rank_of_pack(-1, 2)
    with pytest.raises(ValueError, match="rank must be below dp_size = 2, got 2"):
        plan.packs_of_rank(0, 2, 2)
    with pytest.raises(TypeError, match="dp_size must be an int"):
        plan.stats(2.0)  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="pack must be below 12, got 12"):
        plan.samples_of_pack(12)
