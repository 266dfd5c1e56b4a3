# SPDX-License-Identifier: Apache-2.0
"""The pack plan: C++ against the specification, the promises of each strategy, steps, and what bad input gets."""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import numpy as np
import pytest

from lrc_kernels.packing import (
    CostModel,
    OverlongSampleError,
    PackConfig,
    PackPlan,
    native,
    plan_packs,
    reference,
)
from lrc_kernels.packing.config import STRATEGIES
from lrc_kernels.packing.simulate import stage3_lengths

ARRAYS = ("sample_index", "pack_ptr", "n_tokens", "n_frames", "cost")
COST = CostModel(a=1.0, b=0.01, v=0.7)


def random_case(random: np.random.Generator) -> tuple[dict[str, Any], PackConfig, dict[str, Any]]:
    """Lengths, configuration and arguments, with equal lengths, full packs and powers of two among them."""
    n, max_tokens = int(random.integers(0, 40)), int(random.integers(1, 65))
    lengths = {
        0: random.integers(0, max_tokens + 3, n),
        1: np.full(n, max(1, max_tokens - 1)),
        2: 1 << random.integers(0, 6, n),
        3: random.choice([1, max_tokens // 2 + 1, max_tokens], n),
    }[int(random.integers(0, 4))]
    columns = {"num_tokens": lengths, "num_frames": random.integers(0, 9, n)}
    if random.random() < 0.3:
        columns["num_supervised"] = np.minimum(lengths, random.integers(0, 3, n))
    config = PackConfig(
        max_tokens=max_tokens,
        max_frames=None if random.random() < 0.5 else int(random.integers(1, 30)),
        max_cost=[None, 20.0, "1.05x"][int(random.integers(0, 3))],
        strategy=STRATEGIES[int(random.integers(0, len(STRATEGIES)))],  # type: ignore[arg-type]
        open_packs=int(random.integers(1, 6)),
        window=int(random.integers(1, 50)),
        overlong="drop",
        align=min(max_tokens, int(random.integers(1, 5))),
        keep_unsupervised=bool(random.random() < 0.5),
        drop_last=bool(random.random() < 0.5),
        cost_model=COST,
    )
    arguments = {
        "seed": int(random.integers(0, 2**63)),
        "epoch": int(random.integers(0, 3)),
        "packs_per_step": int(random.integers(1, 5)),
        "balance": ("none", "lpt", "group")[int(random.integers(0, 3))],
    }
    return columns, config, arguments


def check_promises(plan: PackPlan, columns: dict[str, Any], config: PackConfig) -> None:
    """Every sample once or counted as skipped, no budget exceeded, totals that add up."""
    assert np.unique(plan.sample_index).size == plan.sample_index.size
    assert plan.sample_index.size + sum(plan.skipped.values()) == len(columns["num_tokens"])
    assert plan.pack_ptr[0] == 0 and plan.pack_ptr[-1] == plan.sample_index.size
    assert plan.num_packs == plan.num_steps * plan.packs_per_step
    assert (plan.n_tokens <= config.max_tokens).all()
    assert (plan.n_frames <= (config.max_frames or 1 << 60)).all()
    assert (plan.cost <= plan.limits.get("cost", np.inf)).all()
    tokens = -(-columns["num_tokens"] // config.align) * config.align
    cost = COST.cost(tokens, columns["num_frames"])
    for pack in range(plan.num_packs):
        samples = plan.samples_of_pack(pack)
        assert plan.n_tokens[pack] == tokens[samples].sum()
        assert plan.n_frames[pack] == columns["num_frames"][samples].sum()
        assert plan.cost[pack] == pytest.approx(cost[samples].sum(), rel=1e-12)


@pytest.mark.parametrize("batch", range(10))
def test_cpp_equals_the_specification_and_keeps_its_promises(batch: int) -> None:
    """1,000 random instances each, all strategies, budgets, alignments and ways of balancing."""
    random = np.random.default_rng(batch)
    for _ in range(1000):
        columns, config, arguments = random_case(random)
        cpp = plan_packs(columns, config, impl="cpp", **arguments)
        python = plan_packs(columns, config, impl="python", **arguments)
        for name in ARRAYS:
            a, b = getattr(cpp, name), getattr(python, name)
            assert a.dtype == b.dtype and np.array_equal(a, b), (name, columns, config, arguments)
        assert cpp.skipped == python.skipped
        check_promises(cpp, columns, config)


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_cpp_equals_the_specification_on_real_lengths(strategy: str) -> None:
    columns = stage3_lengths(20_000, seed=1)
    config = PackConfig(strategy=strategy, max_frames=1900, max_cost="1.02x", window=700)
    cpp, python = (plan_packs(columns, config, impl=impl) for impl in ("cpp", "python"))
    assert cpp.digest == python.digest
    assert cpp.stats() == python.stats()


def test_in_order_is_next_fit() -> None:
    random = np.random.default_rng(0)
    for seed in range(200):
        lengths = random.integers(1, 101, 60)
        packs: list[list[int]] = []
        room = 0
        for sample in native.permutation(60, seed, 0).tolist():
            if lengths[sample] > room:
                packs.append([])
                room = 100
            packs[-1].append(sample)
            room -= lengths[sample]
        plan = plan_packs(lengths, PackConfig(max_tokens=100, strategy="in_order"), seed=seed)
        assert [plan.samples_of_pack(p).tolist() for p in range(plan.num_packs)] == packs
        one_open = plan_packs(lengths, PackConfig(max_tokens=100, open_packs=1), seed=seed)
        assert one_open.digest == plan.digest


@pytest.mark.parametrize("open_packs", [1, 2, 8])
@pytest.mark.parametrize("lengths", ["mixed", "one short, then long"])
def test_open_best_fit_lets_no_sample_wait(open_packs: int, lengths: str) -> None:
    """Packs that were opened later leave earlier only while fewer than 48 samples have left since this one was opened,
    and of the packs that were opened earlier fewer than `open_packs` take later samples."""
    random = np.random.default_rng(open_packs)
    n = 1000
    tokens = random.integers(1, 60, n) if lengths == "mixed" else np.full(n, 100)
    arrival = np.argsort(native.permutation(n, 9, 0))
    if lengths != "mixed":
        tokens[arrival == 0] = 1
    plan = plan_packs(tokens, PackConfig(max_tokens=100, open_packs=open_packs), seed=9)
    pack, when = np.repeat(np.arange(plan.num_packs), np.diff(plan.pack_ptr)), arrival[plan.sample_index]
    opened, counts = when[plan.pack_ptr[:-1]], np.diff(plan.pack_ptr)
    for p in range(plan.num_packs):
        younger = np.flatnonzero(opened[:p] > opened[p])
        assert counts[younger[:-1]].sum() < 48
    for place in range(n):
        later = pack[:place][(when[:place] > when[place]) & (opened[pack[:place]] < opened[pack[place]])]
        assert np.unique(later).size < open_packs
    assert plan.stats().lateness < 64


@pytest.mark.parametrize("strategy", ["first_fit", "best_fit", "bfd"])
def test_a_window_bounds_what_a_sample_can_be_overtaken_by(strategy: str) -> None:
    """The oldest sample of a buffer goes into the next pack; a sorted window ends before the next begins."""
    lengths = np.random.default_rng(3).integers(1, 60, 500)
    window = 32
    plan = plan_packs(lengths, PackConfig(max_tokens=100, strategy=strategy, window=window), seed=4)
    when = np.argsort(native.permutation(500, 4, 0))[plan.sample_index]
    if strategy == "bfd":
        assert (np.abs(np.arange(500) - when) < window).all()
        return
    waiting = list(range(500))
    for pack in range(plan.num_packs):
        taken = when[plan.pack_ptr[pack] : plan.pack_ptr[pack + 1]].tolist()
        assert taken[0] == waiting[0] and set(taken) <= set(waiting[:window])
        waiting = [arrival for arrival in waiting if arrival not in taken]
    assert not waiting


def fewest_packs(lengths: tuple[int, ...], capacity: int) -> int:
    """The optimum, by dynamic programming over sets: (packs, tokens of the last one) of each set, smallest first."""
    best = [(0, capacity)] + [(len(lengths) + 1, 0)] * ((1 << len(lengths)) - 1)
    for chosen in range(1, 1 << len(lengths)):
        for i, length in enumerate(lengths):
            if chosen >> i & 1:
                packs, used = best[chosen ^ (1 << i)]
                best[chosen] = min(
                    best[chosen], (packs, used + length) if used + length <= capacity else (packs + 1, length)
                )
    return best[-1][0]


def test_bfd_is_within_its_bound_of_the_optimum() -> None:
    random = np.random.default_rng(0)
    for seed in range(60):
        lengths = random.integers(1, 31, 10)
        plan = plan_packs(lengths, PackConfig(max_tokens=40, strategy="bfd"), seed=seed)
        assert plan.num_packs <= 11 / 9 * fewest_packs(tuple(lengths.tolist()), 40) + 1


@functools.cache
def stage3() -> dict[str, Any]:
    return stage3_lengths(350_000, seed=0)


@pytest.mark.parametrize(
    ("strategy", "utilisation", "lateness"),
    [
        ("in_order", 0.9095, 0),
        ("open_best_fit", 0.9960, 64),
        ("first_fit", 0.9966, 64),
        ("best_fit", 0.9975, 350_000),
        ("bfd", 0.9980, 4096),
    ],
)
def test_utilisation_of_stage_3(strategy: str, utilisation: float, lateness: int) -> None:
    """The paper's mix with its frame policy, 350,000 samples into 32,768 tokens."""
    for seed in (0, 1):
        stats = plan_packs(stage3(), PackConfig(strategy=strategy), seed=seed).stats()
        assert stats.num_packed == 350_000
        assert stats.utilisation == pytest.approx(utilisation, abs=0.002)
        assert stats.lateness <= lateness


def test_a_budget_that_binds_is_named() -> None:
    plans = {frames: plan_packs(stage3(), PackConfig(max_frames=frames)).stats() for frames in (4000, 1024)}
    assert plans[4000].binding == {"tokens": 1.0, "frames": 0.0}
    assert plans[1024].binding["frames"] > 0.9 and plans[1024].usage["frames"] > 0.95
    assert plans[1024].utilisation < 0.6


def test_digest_is_stable() -> None:
    """A change here breaks every run that resumes."""
    columns = {"num_tokens": np.arange(1, 200) * 37 % 101 + 1, "num_frames": np.arange(199) % 7}
    config = PackConfig(max_tokens=128, max_frames=12, max_cost="1.1x", cost_model=COST)
    plan = plan_packs(columns, config, seed=1, epoch=2, packs_per_step=4, balance="group")
    assert plan.digest == "ca17c47e6f8a8dce66bf01670afff2bc212637ba9b4a7ac31d40b8fbc5c1108b"
    changes = [{"seed": 2}, {"epoch": 3}, {"packs_per_step": 2}, {"balance": "lpt"}]
    base = {"seed": 1, "epoch": 2, "packs_per_step": 4, "balance": "group"}
    digests = {plan_packs(columns, config, **{**base, **change}).digest for change in [{}, *changes]}
    assert len(digests) == 5


def test_the_order_depends_on_seed_epoch_and_n_alone() -> None:
    lengths = np.random.default_rng(0).integers(1, 100, 300)
    order = native.permutation(300, 7, 1)
    arrival = np.argsort(order)
    for strategy in STRATEGIES:
        plan = plan_packs(lengths, PackConfig(max_tokens=100, strategy=strategy), seed=7, epoch=1)
        if strategy == "in_order":
            assert np.array_equal(plan.sample_index, order)
        for pack in range(plan.num_packs):
            assert (np.diff(arrival[plan.samples_of_pack(pack)]) > 0).all()


def test_incomplete_step_is_dropped_or_filled() -> None:
    lengths = np.full(10, 60)
    dropped = plan_packs(lengths, PackConfig(max_tokens=100), packs_per_step=4)
    assert (dropped.num_packs, dropped.num_steps, dropped.skipped["incomplete_step"]) == (8, 2, 2)
    filled = plan_packs(lengths, PackConfig(max_tokens=100, drop_last=False), packs_per_step=4)
    assert (filled.num_packs, filled.num_steps, filled.skipped["incomplete_step"]) == (12, 3, 0)
    assert np.array_equal(filled.sample_index[:8], dropped.sample_index)
    assert np.diff(filled.pack_ptr).tolist() == [1] * 10 + [0] * 2
    assert filled.n_tokens[-2:].tolist() == [0, 0] and filled.cost[-2:].tolist() == [0, 0]
    assert filled.stats(4).utilisation == pytest.approx(600 / 1200)
    too_few = plan_packs(lengths, PackConfig(max_tokens=100), packs_per_step=64)
    assert (too_few.num_steps, too_few.stats().skipped["incomplete_step"]) == (0, 10)


def test_samples_that_teach_nothing_are_left_out_and_counted() -> None:
    columns = {"num_tokens": [5, 0, 7, 9], "num_supervised": [5, 0, 0, 1]}
    plan = plan_packs(columns, PackConfig(max_tokens=50))
    assert sorted(plan.sample_index.tolist()) == [0, 3]
    assert (plan.skipped["empty"], plan.skipped["unsupervised"]) == (1, 1)
    kept = plan_packs(columns, PackConfig(max_tokens=50, keep_unsupervised=True))
    assert sorted(kept.sample_index.tolist()) == [0, 2, 3]


def test_align_takes_room_but_is_not_utilisation() -> None:
    plan = plan_packs([5, 9, 16], PackConfig(max_tokens=48, align=16))
    assert plan.n_tokens.tolist() == [48] and plan.num_real_tokens == 30
    assert plan.stats().utilisation == 30 / 48


def test_overlong_samples() -> None:
    lengths = np.array([10, 300, 20, 400, 500, 600, 700, 800])
    with pytest.raises(
        OverlongSampleError, match=r"6 of 8 samples .*100 tokens \(sample 1: 300 tokens; .*overlong='drop'"
    ) as e:
        plan_packs(lengths, PackConfig(max_tokens=100))
    assert (e.value.count, e.value.sample_ids) == (6, (1, 3, 4, 5, 6))
    with pytest.raises(OverlongSampleError, match="overlong='reduce_frames' is done where lengths are made"):
        plan_packs(lengths, PackConfig(max_tokens=100, overlong="reduce_frames"))
    plan = plan_packs(lengths, PackConfig(max_tokens=100, overlong="drop"))
    assert sorted(plan.sample_index.tolist()) == [0, 2] and plan.stats().skipped["overlong"] == 6
    frames = {"num_tokens": [10, 10], "num_frames": [4, 9]}
    with pytest.raises(OverlongSampleError, match=r"sample 1: 9 frames"):
        plan_packs(frames, PackConfig(max_tokens=100, max_frames=8))
    with pytest.raises(OverlongSampleError, match=r"sample 1: \S+ cost"):
        plan_packs(frames, PackConfig(max_tokens=100, max_cost=15.0, cost_model=CostModel(1, 0, 1)))


def test_relative_cost_budget() -> None:
    columns = {"num_tokens": [10, 30], "num_frames": [2, 2]}
    plan = plan_packs(columns, PackConfig(max_tokens=100, max_cost="1.5x", cost_model=CostModel(2.0, 0.1, 5.0)))
    assert plan.limits["cost"] == pytest.approx(1.5 * 100 * (20 + 10 + 10 + 60 + 90 + 10) / 40)


def test_sums_past_32_bits() -> None:
    lengths = np.full(1000, 3 << 30)
    for impl in ("cpp", "python"):
        plan = plan_packs({"num_tokens": lengths, "num_frames": lengths}, PackConfig(max_tokens=1 << 40), impl=impl)
        assert plan.n_tokens[0] == plan.n_frames[0] == 341 * (3 << 30)
        assert plan.num_real_tokens == int(lengths.sum())
    largest = plan_packs([(1 << 62) - 1024, 5], PackConfig(max_tokens=1 << 62), impl="cpp")
    assert largest.n_tokens.tolist() == [(1 << 62) - 1019]


def test_any_integer_column_is_taken_and_not_changed() -> None:
    lengths = np.arange(1, 50)
    wanted = plan_packs(lengths, PackConfig(max_tokens=64)).digest
    for other in (lengths.tolist(), lengths.astype(np.uint8), np.repeat(lengths, 2)[::2], {"num_tokens": lengths}):
        assert plan_packs(other, PackConfig(max_tokens=64)).digest == wanted
    assert np.array_equal(lengths, np.arange(1, 50))
    plan = plan_packs(lengths, PackConfig(max_tokens=64))
    with pytest.raises(ValueError, match="read-only"):
        plan.sample_index[0] = 1


@pytest.mark.parametrize("impl", ["cpp", "python"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_no_samples(strategy: str, impl: str) -> None:
    for columns in ([], np.zeros(0, np.int64), [0, 0]):
        plan = plan_packs(columns, PackConfig(strategy=strategy), impl=impl)
        assert (plan.num_packs, plan.num_steps, plan.pack_ptr.tolist()) == (0, 0, [0])
        assert plan.stats().utilisation == 0.0


@pytest.mark.parametrize(
    ("lengths", "error", "message"),
    [
        ([1.5], TypeError, "num_tokens must hold integers, got float64"),
        ([float("nan")], TypeError, "num_tokens must hold integers"),
        ([True], TypeError, "num_tokens must hold integers, got bool"),
        (None, TypeError, "num_tokens must hold integers"),
        ([3, -1], ValueError, "num_tokens must be >= 0, got -1 at index 1"),
        ([[3]], ValueError, r"num_tokens must have 1 dimension, got shape \[1, 1\]"),
        (np.array([2**63], np.uint64), ValueError, r"num_tokens must sum to less than 2\^62"),
        ([2**61] * 3, ValueError, r"num_tokens must sum to less than 2\^62"),
        ({"num_frames": [1]}, ValueError, "must hold num_tokens"),
        ({"num_tokens": [1], "frames": [1]}, ValueError, "got 'frames'"),
        (
            {"num_tokens": [1], "num_frames": [1, 2]},
            ValueError,
            r"num_frames must hold one value per sample \(1\), got 2",
        ),
        ({"num_tokens": [1, 4], "num_supervised": [1, 5]}, ValueError, "num_supervised must be at most num_tokens = 4"),
    ],
)
def test_bad_lengths(lengths: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_packs(lengths)


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"seed": -1}, ValueError, "seed must be >= 0, got -1"),
        ({"seed": 1 << 64}, ValueError, r"seed must be below 2\^64"),
        ({"epoch": 1.0}, TypeError, "epoch must be an int, got float"),
        ({"packs_per_step": 0}, ValueError, "packs_per_step must be >= 1, got 0"),
        ({"balance": "best"}, ValueError, "balance must be one of none, lpt, group, got 'best'"),
        ({"impl": "c"}, ValueError, "impl must be one of auto, cpp, python"),
        ({"config": {}}, TypeError, "config must be a PackConfig, got dict"),
        ({"config": PackConfig(cost_model=CostModel(0, 1e308, 0))}, ValueError, "cost_model must give finite costs"),
    ],
)
def test_bad_arguments(arguments: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        plan_packs([1, 20], **arguments)


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"max_tokens": 0}, ValueError, "max_tokens must be >= 1, got 0"),
        ({"max_tokens": 1e4}, TypeError, "max_tokens must be an int, got float"),
        ({"max_tokens": 1 << 63}, ValueError, r"max_tokens must be at most 2\^62"),
        ({"max_frames": 0}, ValueError, "max_frames must be >= 1, got 0"),
        ({"max_cost": 0}, ValueError, "max_cost must be above 0, got 0"),
        ({"max_cost": float("nan")}, ValueError, "max_cost must be finite"),
        ({"max_cost": "1.05"}, ValueError, "max_cost must be a number, None, or a multiple"),
        ({"max_cost": "0x"}, ValueError, "max_cost must be a number, None, or a multiple"),
        ({"strategy": "next_fit"}, ValueError, "strategy must be one of in_order"),
        ({"open_packs": 0}, ValueError, "open_packs must be >= 1"),
        ({"window": True}, TypeError, "window must be an int, got bool"),
        ({"overlong": "cut"}, ValueError, "overlong must be one of error, drop"),
        ({"align": 200, "max_tokens": 100}, ValueError, "align must be at most max_tokens = 100, got 200"),
        ({"drop_last": 1}, TypeError, "drop_last must be a bool, got int"),
        ({"cost_model": None}, TypeError, "cost_model must be a CostModel, got NoneType"),
    ],
)
def test_bad_config(fields: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        PackConfig(**fields)


def test_config_is_frozen_and_the_papers_is_in_order() -> None:
    assert (PackConfig.paper().strategy, PackConfig.paper().max_tokens) == ("in_order", 32768)
    with pytest.raises(dataclasses.FrozenInstanceError):
        PackConfig().max_tokens = 1  # type: ignore[misc]


def test_cost_model() -> None:
    model = CostModel.internvideo2_5_8b()
    assert model.a == pytest.approx(4.42e10, rel=0.01)
    assert model.b == pytest.approx(7.86e5, rel=0.01)
    assert model.v == pytest.approx(2.18e12, rel=0.01)
    shape = {"hidden_size": 2, "num_layers": 3, "num_params": 5, "vit_flops": 7.0}
    assert CostModel.for_model(**shape) == CostModel(30, 36, 21)
    assert CostModel.for_model(**shape, train_vit=False).v == 7
    assert CostModel(2, 3, 5).cost(np.array([4]), np.array([6])).tolist() == [2 * 4 + 3 * 16 + 5 * 6]
    for bad, message in (
        ((0, 0, 0), "one of a, b and v"),
        ((-1, 0, 0), "a must be finite"),
        ((1, float("inf"), 0), "b must"),
    ):
        with pytest.raises(ValueError, match=message):
            CostModel(*bad)
    with pytest.raises(TypeError, match="v must be a number, got str"):
        CostModel(1, 1, "1")  # type: ignore[arg-type]


def test_without_a_build_auto_plans_in_python_and_cpp_says_why(monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = plan_packs([3, 4, 5])
    monkeypatch.setattr(native, "_C", None)
    monkeypatch.setattr(native, "_missing", "lrc_kernels._C cannot be imported")
    plan = plan_packs([3, 4, 5])
    assert plan.digest == wanted.digest and plan.stats() == wanted.stats()
    with pytest.raises(RuntimeError, match='impl="cpp" cannot run: lrc_kernels._C cannot be imported'):
        plan_packs([3, 4, 5], impl="cpp")


@pytest.mark.parametrize("planner", [native, reference], ids=["cpp", "python"])
@pytest.mark.parametrize("strategy", STRATEGIES)
def test_planners_refuse_samples_that_fit_no_pack(strategy: str, planner: Any) -> None:
    """Rather than wait for them without end."""
    one = np.ones(3, np.int64)
    limits = {"max_tokens": 4, "max_frames": 1 << 60, "max_cost": np.inf, "open_packs": 2, "window": 2}
    with pytest.raises(ValueError, match="every kept sample must fit a pack by itself, but sample 1 does not"):
        planner.pack_samples(
            np.array([1, 9, 1]), one, one.astype(float), None, seed=0, epoch=0, strategy=strategy, **limits
        )
