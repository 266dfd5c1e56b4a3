# SPDX-License-Identifier: Apache-2.0
"""The pack planner on lengths like the paper's stage 3: its strategies, and its utilisation and speed beside peers on
the same lengths in the same run. Permutation and checks of the input are part of our times, not of the peers'.

Bytes are what any planner must move: three columns read, a sample number written.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from benchmarks.peers import packers
from benchmarks.peers import packing as peers
from lrc_kernels.packing import PackConfig, PackPlan, plan_packs
from lrc_kernels.packing.config import STRATEGIES
from lrc_kernels.packing.permutation import Permutation
from lrc_kernels.packing.simulate import stage3_lengths

CAPACITY = 32_768
BYTES_PER_SAMPLE = 32
PEERS = {
    "next_fit": peers.next_fit,
    "trl_bfd": peers.trl_bfd,
    "llamafactory_knapsack": peers.llamafactory_knapsack,
    "axolotl_first_fit": peers.axolotl_first_fit,
}


@pytest.fixture(scope="module")
def columns(full_size: bool) -> dict[str, Any]:
    return stage3_lengths(350_000 if full_size else 20_000, seed=0)


def exactly_once_within(lengths: Any, capacity: int) -> Callable[[PackPlan | peers.Packs], None]:
    """A check that every packer passes. A plan holds sample numbers, a peer's packs positions in `lengths`."""

    def check(packed: PackPlan | peers.Packs) -> None:
        if isinstance(packed, PackPlan):
            assert (packed.n_tokens <= capacity).all() and packed.n_tokens.sum() == lengths.sum()
            assert np.array_equal(np.sort(packed.sample_index), np.arange(lengths.size))
            return
        assert sorted(position for pack in packed for position in pack) == list(range(lengths.size))
        assert all(sum(lengths[pack].tolist()) <= capacity for pack in packed)

    return check


@pytest.mark.parametrize("strategy", STRATEGIES)
def test_plan_packs(bench, columns, strategy):
    """Each strategy in C++, the default beside its specification in Python."""
    config = PackConfig(max_tokens=CAPACITY, strategy=strategy)
    stats = plan_packs(columns, config).stats()
    beside = {"python": lambda: plan_packs(columns, config, impl="python")} if strategy == PackConfig.strategy else {}
    bench(
        lambda: plan_packs(columns, config, impl="cpp"),
        bytes_moved=BYTES_PER_SAMPLE * stats.num_samples,
        check=exactly_once_within(columns["num_tokens"], CAPACITY),
        peers=beside,
        samples=stats.num_samples,
        utilisation=round(stats.utilisation, 4),
        lateness=stats.lateness,
    )


def test_plan_packs_beside_peers(bench, columns):
    lengths = columns["num_tokens"]
    arriving = lengths[Permutation(lengths.size, 0, 0).all()].tolist()
    least = lengths.sum() / CAPACITY
    utilisation = {name: round(float(least / len(pack(arriving, CAPACITY))), 4) for name, pack in PEERS.items()}
    contestants: dict[str, Callable] = {
        name: lambda pack=pack: pack(arriving, CAPACITY) for name, pack in PEERS.items()
    }
    ours = {name: PackConfig(max_tokens=CAPACITY, strategy=name) for name in ("open_best_fit", "bfd")}
    contestants["lrc_bfd"] = lambda: plan_packs(columns, ours["bfd"], impl="cpp")
    utilisation["lrc_bfd"] = round(plan_packs(columns, ours["bfd"]).stats().utilisation, 4)
    check_plan, check_peer = (exactly_once_within(values, CAPACITY) for values in (lengths, np.array(arriving)))
    bench(
        lambda: plan_packs(columns, ours["open_best_fit"], impl="cpp"),
        bytes_moved=BYTES_PER_SAMPLE * lengths.size,
        check=lambda packed: (check_plan if isinstance(packed, PackPlan) else check_peer)(packed),
        peers=contestants,
        samples=lengths.size,
        utilisation=round(plan_packs(columns, ours["open_best_fit"]).stats().utilisation, 4),
        **{f"utilisation_{name}": value for name, value in utilisation.items()},
    )


def test_utilisation_beside_installed_packers(bench, columns):
    """What other libraries' own packers fill, those that are installed, each run once; the others as restated."""
    lengths = columns["num_tokens"]
    arriving = lengths[Permutation(lengths.size, 0, 0).all()].tolist()
    check, check_plan = (exactly_once_within(values, CAPACITY) for values in (np.array(arriving), lengths))
    originals, figures = packers.installed(), {}
    for name, pack in {**PEERS, **originals}.items():
        started = time.perf_counter()
        packs = pack(arriving, CAPACITY)
        seconds = time.perf_counter() - started
        check(packs)
        utilisation = float(lengths.sum() / CAPACITY / len(packs))
        form = "original" if name in originals else "restated"
        print(f"{name:<22} {form}  {utilisation:.4f}  {seconds:.2f} s")
        figures |= {f"utilisation_{name}_{form}": round(utilisation, 4), f"seconds_{name}_{form}": round(seconds, 3)}
        if name in originals and name in PEERS:
            assert len(packs) == len(PEERS[name](arriving, CAPACITY)), "the restated form packs otherwise"
    for strategy in STRATEGIES:
        stats = plan_packs(columns, PackConfig(max_tokens=CAPACITY, strategy=strategy)).stats()
        print(f"{'lrc ' + strategy:<32}  {stats.utilisation:.4f}  at most {stats.lateness} late")
        figures[f"utilisation_lrc_{strategy}"] = round(stats.utilisation, 4)
    bench(
        lambda: plan_packs(columns, PackConfig(max_tokens=CAPACITY), impl="cpp"),
        bytes_moved=BYTES_PER_SAMPLE * lengths.size,
        check=check_plan,
        samples=lengths.size,
        **figures,
    )


def test_whole_stage_3(bench, full_size):
    """The 3.5M samples of the paper's stage 3 (a tenth where sizes are not full), dealt to 64 ranks."""
    tenth = stage3_lengths(350_000, seed=0)
    columns = {name: np.tile(values, 10 if full_size else 1) for name, values in tenth.items()}
    arguments = {"packs_per_step": 256, "balance": "lpt", "impl": "cpp"}
    config = PackConfig(max_tokens=CAPACITY, drop_last=False)
    stats = plan_packs(columns, config, **arguments).stats(64)
    bench(
        lambda: plan_packs(columns, config, **arguments),
        bytes_moved=BYTES_PER_SAMPLE * stats.num_samples,
        check=exactly_once_within(columns["num_tokens"], CAPACITY),
        samples=stats.num_samples,
        utilisation=round(stats.utilisation, 4),
        imbalance=round(stats.imbalance, 4),
    )
