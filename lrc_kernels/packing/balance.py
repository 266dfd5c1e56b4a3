# SPDX-License-Identifier: Apache-2.0
"""Which data-parallel rank runs which pack of a step, and which packs share a step: costs in, numbers out."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from lrc_kernels.packing.permutation import Permutation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]


def deal(cost: Floats, dp_size: int, *, by_cost: bool) -> Ints:
    """The rank of each pack, int64 [steps, packs_per_step], for costs of that shape; every rank gets equally many.

    by_cost False deals the packs round robin. True deals the costliest first, dp_size of them in a round, each round's
    costliest to the rank that has least so far. The packs of a round differ little, so that ranks which wait for each
    other after every pack (sharded parameters) wait little too; and the loads of two ranks never differ by more than
    the costs within one round.
    """
    steps, packs_per_step = cost.shape
    if not by_cost:
        return np.broadcast_to(np.arange(packs_per_step, dtype=np.int64) % dp_size, cost.shape)
    by_size = np.argsort(-cost, axis=1, kind="stable")
    load = np.zeros((steps, dp_size))
    ranks = np.empty(cost.shape, dtype=np.int64)
    for first in range(0, packs_per_step, dp_size):
        packs = by_size[:, first : first + dp_size]
        least_first = np.argsort(load, axis=1, kind="stable")
        np.put_along_axis(ranks, packs, least_first, axis=1)
        spread = np.take_along_axis(load, least_first, axis=1) + np.take_along_axis(cost, packs, axis=1)
        np.put_along_axis(load, least_first, spread, axis=1)
    return ranks


def imbalance(cost: Floats, dp_size: int, *, by_cost: bool) -> Floats:
    """Cost of the busiest rank over the mean of all ranks, float64 [steps]; 1 where a step costs nothing."""
    ranks = deal(cost, dp_size, by_cost=by_cost)
    steps = cost.shape[0]
    cell = (np.arange(steps)[:, None] * dp_size + ranks).ravel()
    load = np.bincount(cell, weights=cost.ravel(), minlength=steps * dp_size).reshape(steps, dp_size)
    mean = load.mean(axis=1)
    return np.divide(load.max(axis=1), mean, out=np.ones(steps), where=mean > 0)


def group_steps(cost: Floats, packs_per_step: int, *, seed: int, epoch: int) -> Ints:
    """An order of the packs, whole steps of them, in which a step holds packs of neighbouring costs.

    The steps themselves are shuffled, so that an epoch does not run from cheap to costly.
    """
    steps = cost.shape[0] // packs_per_step
    by_cost = np.argsort(cost, kind="stable").reshape(steps, packs_per_step)
    return by_cost[Permutation(steps, seed, epoch, stream=1).all()].ravel()
