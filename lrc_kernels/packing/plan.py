# SPDX-License-Identifier: Apache-2.0
"""The pack plan: lengths, a configuration, a seed and an epoch in; which samples share a pack, and which packs a step,
out. A pure function over integers that every rank computes for itself instead of being told."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.packing import native, reference
from lrc_kernels.packing.balance import deal, group_steps, imbalance
from lrc_kernels.packing.config import PackConfig
from lrc_kernels.packing.permutation import Permutation

Ints = npt.NDArray[np.int64]
Floats = npt.NDArray[np.float64]

_BALANCES = ("none", "lpt", "group")
_COLUMNS = ("num_tokens", "num_frames", "num_supervised")
_NO_LIMIT = (1 << 63) - 1


class OverlongSampleError(ValueError):
    """Samples that fit no pack.

    Args:
        count: how many there are.
        sample_ids: the first five.
    """

    def __init__(self, message: str, count: int, sample_ids: tuple[int, ...]):
        super().__init__(message)
        self.count, self.sample_ids = count, sample_ids


@dataclass(frozen=True)
class PackStats:
    """What a plan makes of its samples.

    Args:
        num_samples: samples that were planned over. num_packed: those that stand in a pack.
        num_packs: packs, with the empty ones that fill the last step. num_steps: optimizer steps.
        utilisation: tokens of samples, without alignment, over num_packs * max_tokens.
        usage: by budget ("tokens", "frames", "cost"), the mean share of it that a pack uses.
        binding: by budget, the share of the packs in which it is the fullest budget.
        lateness: the most places by which a sample stands behind its place in the epoch's permutation.
        imbalance, imbalance_max: cost of the busiest rank over the mean rank, mean and maximum over the steps.
        skipped: samples in no pack by reason ("empty", "unsupervised", "overlong", "incomplete_step").
    """

    num_samples: int
    num_packed: int
    num_packs: int
    num_steps: int
    utilisation: float
    usage: dict[str, float]
    binding: dict[str, float]
    lateness: int
    imbalance: float
    imbalance_max: float
    skipped: dict[str, int]


@dataclass(frozen=True, eq=False)
class PackPlan:
    """The packs of one epoch in the order in which they are trained on; step s takes packs_per_step of them from
    s * packs_per_step on. Arrays are read-only.

    Args:
        sample_index: int64 [n], sample numbers, pack after pack; within a pack in the order of the permutation.
        pack_ptr: int64 [packs + 1]; pack p holds sample_index[pack_ptr[p] : pack_ptr[p + 1]], nothing where it only
            fills the last step.
        n_tokens, n_frames: int64 [packs], tokens with alignment.
        cost: float64 [packs], by the cost model.
        packs_per_step: packs of an optimizer step, over all ranks.
        balance: how packs are dealt to ranks.
        limits: budget -> its limit, of the budgets that there are.
        num_real_tokens: tokens of all packs without alignment.
        num_samples, seed, epoch: what the permutation came from.
        skipped: samples in no pack by reason.
        config: the budgets and the strategy, with which the next epoch is planned.
    """

    sample_index: Ints
    pack_ptr: Ints
    n_tokens: Ints
    n_frames: Ints
    cost: Floats
    packs_per_step: int
    balance: str
    limits: dict[str, float]
    num_real_tokens: int
    num_samples: int
    seed: int
    epoch: int
    skipped: dict[str, int]
    config: PackConfig

    def __post_init__(self) -> None:
        for array in (self.sample_index, self.pack_ptr, self.n_tokens, self.n_frames, self.cost):
            array.flags.writeable = False

    @property
    def num_packs(self) -> int:
        return self.n_tokens.shape[0]

    @property
    def num_steps(self) -> int:
        return self.num_packs // self.packs_per_step

    @cached_property
    def digest(self) -> str:
        """64 hexadecimal digits that name the packs, their order, the steps and the way they are dealt."""
        head = {"schema": 1, "packs_per_step": self.packs_per_step, "balance": self.balance, "packs": self.num_packs}
        digest = hashlib.sha256(json.dumps(head, sort_keys=True).encode())
        for array in (self.sample_index, self.pack_ptr, self.n_tokens, self.n_frames, self.cost):
            digest.update(np.ascontiguousarray(array.astype(array.dtype.newbyteorder("<"), copy=False)).data)
        return digest.hexdigest()

    def samples_of_pack(self, pack: int) -> Ints:
        """Sample numbers, int64."""
        check_int("pack", pack, minimum=0)
        if pack >= self.num_packs:
            raise ValueError(f"pack must be below {self.num_packs}, got {pack}")
        return self.sample_index[self.pack_ptr[pack] : self.pack_ptr[pack + 1]]

    def rank_of_pack(self, step: int, dp_size: int) -> Ints:
        """The data-parallel rank that runs each pack of a step, int64 [packs_per_step]; every rank has equally many.

        The packs of a step do not depend on dp_size, so that a run resumes at another one.

        Raises:
            TypeError: arguments that are no ints. ValueError: no such step, or a dp_size that does not divide
                packs_per_step.
        """
        cost = self._cost_of_steps(dp_size)
        check_int("step", step, minimum=0)
        if step >= self.num_steps:
            raise ValueError(f"step must be below {self.num_steps}, got {step}")
        return deal(cost[step : step + 1], dp_size, by_cost=self.balance != "none")[0]

    def packs_of_rank(self, step: int, rank: int, dp_size: int) -> Ints:
        """Pack numbers that a rank runs in a step, int64 [packs_per_step // dp_size], in the order in which it should.

        The k-th packs of all ranks cost about the same where the plan is balanced.

        Raises:
            TypeError, ValueError: as rank_of_pack; ValueError for no such rank.
        """
        ranks = self.rank_of_pack(step, dp_size)
        check_int("rank", rank, minimum=0)
        if rank >= dp_size:
            raise ValueError(f"rank must be below dp_size = {dp_size}, got {rank}")
        packs = step * self.packs_per_step + np.flatnonzero(ranks == rank)
        return packs if self.balance == "none" else packs[np.argsort(-self.cost[packs], kind="stable")]

    def stats(self, dp_size: int | None = None) -> PackStats:
        """Figures of the plan, its imbalance over dp_size ranks (None: as many as a step has packs).

        Raises:
            TypeError, ValueError: as rank_of_pack.
        """
        dp_size = self.packs_per_step if dp_size is None else dp_size
        uneven = imbalance(self._cost_of_steps(dp_size), dp_size, by_cost=self.balance != "none")
        real = self.n_tokens > 0
        used = {"tokens": self.n_tokens[real], "frames": self.n_frames[real], "cost": self.cost[real]}
        shares = {name: used[name] / limit for name, limit in self.limits.items()}
        fullest = np.argmax(np.stack(list(shares.values())), axis=0)
        some = bool(real.any())
        return PackStats(
            num_samples=self.num_samples,
            num_packed=self.sample_index.shape[0],
            num_packs=self.num_packs,
            num_steps=self.num_steps,
            utilisation=self.num_real_tokens / (self.num_packs * self.limits["tokens"]) if self.num_packs else 0.0,
            usage={name: float(share.mean()) if some else 0.0 for name, share in shares.items()},
            binding={name: float((fullest == i).mean()) if some else 0.0 for i, name in enumerate(shares)},
            lateness=self._lateness(),
            imbalance=float(uneven.mean()) if uneven.size else 1.0,
            imbalance_max=float(uneven.max()) if uneven.size else 1.0,
            skipped=dict(self.skipped),
        )

    def _cost_of_steps(self, dp_size: int) -> Floats:
        check_int("dp_size", dp_size, minimum=1)
        if self.packs_per_step % dp_size:
            below = self.packs_per_step // dp_size * dp_size
            valid = f"{below} or {below + dp_size}" if below else f"{dp_size}"
            raise ValueError(
                f"packs_per_step must be a multiple of dp_size = {dp_size}, got {self.packs_per_step} "
                f"(nearest: {valid})"
            )
        return self.cost.reshape(self.num_steps, self.packs_per_step)

    def _lateness(self) -> int:
        if self.sample_index.size == 0:
            return 0
        order = _permutation(self.num_samples, self.seed, self.epoch)
        position = np.empty_like(order)
        position[order] = np.arange(order.shape[0])
        arrived = position[self.sample_index]
        present = np.zeros(order.shape[0], dtype=np.int64)
        present[arrived] = 1
        place = np.cumsum(present)[arrived] - 1
        return max(0, int((np.arange(place.shape[0]) - place).max()))


def plan_packs(
    index_or_lengths: Any,
    config: PackConfig | None = None,
    *,
    seed: int = 0,
    epoch: int = 0,
    packs_per_step: int = 1,
    balance: Literal["none", "lpt", "group"] = "none",
    impl: Literal["auto", "cpp", "python"] = "auto",
) -> PackPlan:
    """Put every sample of an epoch into one pack, and the packs into steps (InternVideo2.5 section 3.5, soft packing).

    The samples are walked in a permutation that depends on (seed, epoch, number of samples) alone. Nothing is drawn
    twice; samples without tokens, or without supervised ones, are left out and counted.

    Args:
        index_or_lengths: an Index, integers [n], or a mapping of such columns: "num_tokens", and where known
            "num_frames" (0 where left out) and "num_supervised" (all where left out).
        config: budgets and strategy; None is PackConfig().
        seed, epoch: at least 0, below 2^64.
        packs_per_step: packs of one optimizer step over all data-parallel ranks and accumulation.
        balance: "none" deals the packs of a step round robin. "lpt" deals them by cost and leaves every step's packs as
            they are. "group" also fills each step with packs of similar cost from the whole epoch.
        impl: "cpp", "python" (the specification: the same output, some 50 times slower), or "auto": cpp where built.

    Raises:
        TypeError, ValueError: naming the argument. OverlongSampleError: samples that fit no pack, unless
            config.overlong is "drop". RuntimeError: impl="cpp" without a build.
    """
    config = PackConfig() if config is None else config
    _check_arguments(config, seed, epoch, packs_per_step, balance, impl)
    pack_samples = _implementation(impl)
    real_tokens, num_frames, num_supervised = _columns(index_or_lengths)
    num_tokens = real_tokens if config.align == 1 else -(-real_tokens // config.align) * config.align
    cost = _cost(num_tokens, num_frames, config)
    keep, limits, skipped = _keep(num_tokens, num_frames, num_supervised, cost, config)
    packs = pack_samples(
        *(num_tokens, num_frames, cost, keep),
        seed=seed,
        epoch=epoch,
        max_frames=_NO_LIMIT if config.max_frames is None else config.max_frames,
        max_cost=limits.get("cost", np.inf),
        **{name: getattr(config, name) for name in ("strategy", "max_tokens", "open_packs", "window")},
    )
    packed = packs[0].shape[0]
    packs = _whole_steps(packs, packs_per_step, config.drop_last)
    if balance == "group":
        packs = _reordered(packs, group_steps(packs[4], packs_per_step, seed=seed, epoch=epoch))
    return PackPlan(
        *packs,
        packs_per_step=packs_per_step,
        balance=balance,
        limits=limits,
        num_real_tokens=int(packs[2].sum() if config.align == 1 else real_tokens[packs[0]].sum()),
        num_samples=num_tokens.shape[0],
        seed=seed,
        epoch=epoch,
        skipped={**skipped, "incomplete_step": packed - packs[0].shape[0]},
        config=config,
    )


def _check_arguments(config: PackConfig, seed: int, epoch: int, packs_per_step: int, balance: str, impl: str) -> None:
    if not isinstance(config, PackConfig):
        raise TypeError(f"config must be a PackConfig, got {type(config).__name__}")
    for name, value in (("seed", seed), ("epoch", epoch)):
        check_int(name, value, minimum=0)
        if value >= 1 << 64:
            raise ValueError(f"{name} must be below 2^64, got {value}")
    check_int("packs_per_step", packs_per_step, minimum=1)
    check_choice("balance", balance, _BALANCES)
    check_choice("impl", impl, ("auto", "cpp", "python"))


def _implementation(impl: str) -> Any:
    reason = native.cpu_unavailable()
    if impl == "cpp" and reason is not None:
        raise RuntimeError(f'impl="cpp" cannot run: {reason}')
    return reference.pack_samples if impl == "python" or reason is not None else native.pack_samples


def _permutation(n: int, seed: int, epoch: int) -> Ints:
    return native.permutation(n, seed, epoch) if native.cpu_unavailable() is None else Permutation(n, seed, epoch).all()


def _columns(source: Any) -> tuple[Ints, Ints, Ints | None]:
    """num_tokens, num_frames and num_supervised, int64 [n] and contiguous, checked."""
    source = source.lengths() if hasattr(source, "lengths") else source
    columns = source if isinstance(source, Mapping) else {"num_tokens": source}
    if unknown := sorted(set(columns) - set(_COLUMNS), key=str):
        raise ValueError(f"index_or_lengths must hold columns of {', '.join(_COLUMNS)}, got {unknown[0]!r}")
    if "num_tokens" not in columns:
        raise ValueError(f"index_or_lengths must hold num_tokens, got {sorted(columns)}")
    checked = {name: _column(name, values) for name, values in columns.items()}
    num_tokens = checked["num_tokens"]
    for name, values in checked.items():
        if values.shape != num_tokens.shape:
            raise ValueError(f"{name} must hold one value per sample ({num_tokens.size}), got {values.size}")
    num_supervised = checked.get("num_supervised")
    if num_supervised is not None and (more := np.flatnonzero(num_supervised > num_tokens)).size:
        at = int(more[0])
        raise ValueError(
            f"num_supervised must be at most num_tokens = {num_tokens[at]}, got {num_supervised[at]} at index {at}"
        )
    num_frames = checked.get("num_frames")
    return num_tokens, np.zeros_like(num_tokens) if num_frames is None else num_frames, num_supervised


def _column(name: str, values: Any) -> Ints:
    array = np.asarray(values)
    if array.size == 0 and array.ndim == 1:
        return np.zeros(0, dtype=np.int64)
    if array.dtype.kind not in "iu":
        raise TypeError(f"{name} must hold integers, got {array.dtype}")
    if array.ndim != 1:
        raise ValueError(f"{name} must have 1 dimension, got shape {list(array.shape)}")
    if int(array.min()) < 0:
        at = int(np.argmin(array))
        raise ValueError(f"{name} must be >= 0, got {array[at]} at index {at}")
    if float(array.sum(dtype=np.float64)) >= 1 << 62:
        raise ValueError(f"{name} must sum to less than 2^62, got a largest value of {array.max()}")
    return np.ascontiguousarray(array, dtype=np.int64)


def _cost(num_tokens: Ints, num_frames: Ints, config: PackConfig) -> Floats:
    with np.errstate(over="ignore"):
        cost = config.cost_model.cost(num_tokens, num_frames)
    if not np.isfinite(cost.max(initial=0.0)):
        raise ValueError(f"cost_model must give finite costs, got {cost.max()} at index {int(np.argmax(cost))}")
    return cost


def _keep(
    num_tokens: Ints, num_frames: Ints, num_supervised: Ints | None, cost: Floats, config: PackConfig
) -> tuple[npt.NDArray[np.bool_] | None, dict[str, float], dict[str, int]]:
    """(which samples are packed, None for all; the limit of each budget; samples left out by reason)."""
    keep = num_tokens > 0
    skipped = {"empty": int(keep.size - np.count_nonzero(keep)), "unsupervised": 0}
    if num_supervised is not None and not config.keep_unsupervised:
        unsupervised = keep & (num_supervised == 0)
        skipped["unsupervised"] = int(np.count_nonzero(unsupervised))
        keep &= ~unsupervised
    limits: dict[str, float] = {"tokens": config.max_tokens}
    overlong = keep & (num_tokens > config.max_tokens)
    if config.max_frames is not None:
        limits["frames"] = config.max_frames
        overlong |= keep & (num_frames > config.max_frames)
    if config.max_cost is not None:
        # A relative limit is that of the average token, which samples that fit nowhere must not raise.
        fitting = keep & ~overlong
        limits["cost"] = config.cost_limit(num_tokens[fitting], cost[fitting])
        overlong |= fitting & (cost > limits["cost"])
    skipped["overlong"] = int(np.count_nonzero(overlong))
    if skipped["overlong"]:
        if config.overlong != "drop":
            raise _overlong_error(overlong, {"tokens": num_tokens, "frames": num_frames, "cost": cost}, limits, config)
        keep &= ~overlong
    return (keep if sum(skipped.values()) else None), limits, skipped


def _overlong_error(
    overlong: npt.NDArray[np.bool_], columns: dict[str, Any], limits: dict[str, float], config: PackConfig
) -> OverlongSampleError:
    found = np.flatnonzero(overlong)
    first = tuple(found[:5].tolist())
    seen = []
    for i in first:
        over = [f"{columns[name][i]:g} {name}" for name, limit in limits.items() if columns[name][i] > limit]
        seen.append(f"sample {i}: {', '.join(over)}")
    listed = "; ".join(seen) + ("; ..." if found.size > len(first) else "")
    allowed = ", ".join(f"{limit:g} {name}" for name, limit in limits.items())
    hint = "Give them fewer frames where their lengths are made, raise the budget, or set overlong='drop'"
    if config.overlong != "error":
        hint = f"overlong={config.overlong!r} is done where lengths are made; a plan changes none. {hint}"
    message = f"{found.size} of {overlong.size} samples do not fit a pack of {allowed} ({listed}). {hint}"
    return OverlongSampleError(message, int(found.size), first)


Packs = tuple[Ints, Ints, Ints, Ints, Floats]


def _whole_steps(packs: Packs, packs_per_step: int, drop_last: bool) -> Packs:
    sample_index, pack_ptr, n_tokens, n_frames, cost = packs
    num_packs = n_tokens.shape[0]
    if drop_last:
        kept = num_packs // packs_per_step * packs_per_step
        pack_ptr = pack_ptr[: kept + 1]
        return sample_index[: pack_ptr[-1]], pack_ptr, n_tokens[:kept], n_frames[:kept], cost[:kept]
    fill = -num_packs % packs_per_step
    pack_ptr = np.pad(pack_ptr, (0, fill), mode="edge")
    return sample_index, pack_ptr, np.pad(n_tokens, (0, fill)), np.pad(n_frames, (0, fill)), np.pad(cost, (0, fill))


def _reordered(packs: Packs, order: Ints) -> Packs:
    sample_index, pack_ptr, n_tokens, n_frames, cost = packs
    counts = np.diff(pack_ptr)[order]
    new_ptr = np.concatenate([np.zeros(1, dtype=np.int64), np.cumsum(counts)])
    source = np.repeat(pack_ptr[order] - new_ptr[:-1], counts) + np.arange(sample_index.shape[0])
    return sample_index[source], new_ptr, n_tokens[order], n_frames[order], cost[order]
