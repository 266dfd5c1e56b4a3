# SPDX-License-Identifier: Apache-2.0
"""PackedLoader: a PackedDataset in, batches of this rank out, decoded ahead in threads, with a state to resume from."""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from types import TracebackType
from typing import Any, Literal

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.packing.batch import PackedBatch
from lrc_kernels.packing.dataset import BadSample, OpenPack, PackedDataset
from lrc_kernels.packing.decode import DecodePart, DecodePool
from lrc_kernels.packing.plan import PackPlan, PackStats
from lrc_kernels.packing.state import LoaderState, StateMismatchError, config_digest

# A first few bad samples say nothing about the share of bad ones.
FORGIVEN = 10


class BadSampleError(RuntimeError):
    """A sample could not be decoded, and on_bad is "raise"."""


class TooManyBadSamples(RuntimeError):  # noqa: N818
    """So many samples could not be decoded that something else must be wrong.

    Args:
        last: the last five of them.
    """

    def __init__(self, message: str, last: tuple[BadSample, ...]):
        super().__init__(message)
        self.last = last


@dataclass(frozen=True)
class ParallelRank:
    """Which of the data-parallel ranks this is, and which of the sequence-parallel ranks that share its packs.

    Raises:
        TypeError, ValueError: a size below 1, a rank outside of [0, size).
    """

    dp_rank: int = 0
    dp_size: int = 1
    sp_rank: int = 0
    sp_size: int = 1

    def __post_init__(self) -> None:
        for kind in ("dp", "sp"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            check_int(f"{kind}_size", size, minimum=1)
            check_int(f"{kind}_rank", rank, minimum=0)
            if rank >= size:
                raise ValueError(f"{kind}_rank must be below {kind}_size = {size}, got {rank}")


@dataclass
class LoaderStats:
    """What a loader has delivered since it was made.

    Args:
        packs, samples, tokens, frames: delivered; frames are those decoded here.
        bad: samples that were masked or dropped. reasons: how often each reason, without names of files.
        lost_weight: what the masked samples would have weighed, summed over steps; the trainer does not make up for it.
        utilisation: tokens of samples / room of the packs.
        wait_s: seconds that the consumer waited. decode_s: seconds of all decoding threads.
    """

    _plan: PackPlan
    _dp_size: int
    packs: int = 0
    samples: int = 0
    tokens: int = 0
    frames: int = 0
    bad: int = 0
    reasons: Counter[str] = field(default_factory=Counter)
    lost_weight: float = 0.0
    utilisation: float = 0.0
    wait_s: float = 0.0
    decode_s: float = 0.0

    @property
    def plan(self) -> PackStats:
        """Figures of the whole plan: which budget binds, imbalance over the ranks, what was left out and why."""
        return self._plan.stats(self._dp_size)


class PackedLoader:
    """Iterates the packs of one epoch that belong to this rank, from where it stands to the end of the epoch.

    A new `iter` goes on after the last pack that was delivered; after the end, it begins the epoch again. Batches do
    not depend on threads, and the packs of a step on no number of ranks.

    Args:
        dataset: index and plan.
        rank: who this is. Sequence-parallel ranks get the same tokens and each its share of the clips.
        decode_threads: threads that decode.
        prefetch_packs: packs that are decoded ahead; each takes the memory of its frames.
        pin: put batches into page-locked memory where there is CUDA.
        device: where batches are copied to, without waiting for the copy; None leaves them on the host.
        on_bad: what becomes of a sample that cannot be decoded: "mask" keeps its tokens without frames, targets and
            weight; "drop" takes it out of its pack, which gets shorter; "raise" raises BadSampleError.
        max_bad_fraction, max_bad_run: more bad samples than this share of those seen (after the first ten), or more in
            a row, raise TooManyBadSamples.
        decode_timeout_s: seconds after which a sample is bad.
        agree: for sp_size > 1, called with the positions of the bad samples of a pack, returns those that any
            sequence-parallel rank found: decoding other frames of the same sample, ranks may differ. It is called in
            the consumer's thread for every pack with frames, so it may communicate.
        local_indices: if given, called with each batch's layout; batches are then shards of these rows
            (`SequencePlan.local_indices`).

    Attributes:
        bad: sample_id -> BadSample of those that were met.

    Raises:
        TypeError, ValueError: naming the argument; a dp_size that does not divide packs_per_step.
    """

    def __init__(
        self,
        dataset: PackedDataset,
        *,
        rank: ParallelRank | None = None,
        decode_threads: int = 2,
        prefetch_packs: int = 2,
        pin: bool = True,
        device: torch.device | str | None = None,
        on_bad: Literal["mask", "drop", "raise"] = "mask",
        max_bad_fraction: float = 0.01,
        max_bad_run: int = 100,
        decode_timeout_s: float = 60.0,
        agree: Callable[[list[int]], Iterable[int]] | None = None,
        local_indices: Callable[[VarlenLayout], Tensor] | None = None,
    ):
        rank = ParallelRank() if rank is None else rank
        for name, value, kind in (("dataset", dataset, PackedDataset), ("rank", rank, ParallelRank)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        check_int("decode_threads", decode_threads, minimum=1)
        check_int("prefetch_packs", prefetch_packs, minimum=0)
        check_choice("on_bad", on_bad, ("mask", "drop", "raise"))
        check_int("max_bad_run", max_bad_run, minimum=0)
        if not 0 <= max_bad_fraction <= 1:
            raise ValueError(f"max_bad_fraction must be in [0, 1], got {max_bad_fraction}")
        if not decode_timeout_s > 0:
            raise ValueError(f"decode_timeout_s must be above 0, got {decode_timeout_s}")
        if dataset.plan.num_steps:
            # A dp_size that does not divide the packs of a step is refused before anything starts.
            dataset.plan.rank_of_pack(0, rank.dp_size)
        self.stats = LoaderStats(dataset.plan, rank.dp_size)
        self.dataset, self.rank, self.on_bad = dataset, rank, on_bad
        self.bad: dict[int, BadSample] = {}
        self._threads, self._prefetch, self._timeout_s = decode_threads, prefetch_packs, decode_timeout_s
        self._pin, self._device = pin and torch.cuda.is_available(), device
        self._max_bad_fraction, self._max_bad_run = max_bad_fraction, max_bad_run
        self._agree, self._local_indices = agree, local_indices
        self._known_bad: frozenset[int] = frozenset()
        self._step = self._packs = self._run_of_bad = 0
        self._finished = False
        self._pool: DecodePool | None = None

    def __enter__(self) -> PackedLoader:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __len__(self) -> int:
        """Batches of a whole epoch on this rank."""
        return self.dataset.plan.num_packs // self.rank.dp_size

    def close(self) -> None:
        """End the threads; the position stays."""
        pool, self._pool = self._pool, None
        if pool is not None:
            pool.close()

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; nothing happens where the loader is in it already and has not ended it."""
        if epoch == self.dataset.plan.epoch and not self._finished:
            return
        self.close()
        self.dataset.set_epoch(epoch)
        self.stats._plan = self.dataset.plan
        self._step = self._packs = 0
        self._finished = False

    def __iter__(self) -> Iterator[PackedBatch]:
        self.close()
        if self._finished:
            self._step = self._packs = 0
            self._finished = False
        return self._run()

    def state_dict(self) -> dict[str, Any]:
        """The packs delivered so far and the bad samples, JSON-able; call it between any two batches.

        Each rank knows its own bad samples: `merge_states` makes one state of those of all ranks.
        """
        bad = self._known_bad | self.bad.keys()
        return LoaderState.of(self.dataset, self._step, self._packs, self.rank.dp_size, bad).as_dict()

    def load_state_dict(self, state: Mapping[str, Any], *, strict: bool = True) -> None:
        """Go on after the packs that the state counts, at any dp_size and sp_size. Bad samples stay bad.

        A state within a step needs the same dp_size, since another shares the step in another way. Another
        packs_per_step needs a position that is a whole number of its steps.

        Args:
            strict: False begins the step again where the state lies within it and cannot be gone on with.

        Raises:
            TypeError, StateMismatchError: a state of something else, naming both.
        """
        loaded = LoaderState.from_dict(state)
        plan, pps = self.dataset.plan, self.dataset.plan.packs_per_step
        expected = {
            "index_digest": self.dataset.index.digest,
            "config_digest": config_digest(self.dataset),
            "seed": plan.seed,
        }
        for name, value in expected.items():
            if getattr(loaded, name) != value:
                raise StateMismatchError(f"state has {name} {getattr(loaded, name)!r}, this loader {value!r}")
        step, packs = loaded.step, loaded.packs
        if packs and (loaded.packs_per_step != pps or loaded.dp_size != self.rank.dp_size):
            if strict:
                raise StateMismatchError(
                    f"state lies {packs} packs within a step of {loaded.packs_per_step} on {loaded.dp_size} ranks, "
                    f"this loader has steps of {pps} on {self.rank.dp_size}: save between steps, or use strict=False"
                )
            packs = 0
        delivered = step * loaded.packs_per_step
        if loaded.packs_per_step != pps and (plan.balance == "group" or delivered % pps):
            raise StateMismatchError(
                f"state has packs_per_step {loaded.packs_per_step} and {delivered} packs, this loader {pps}: "
                + ('balance "group" orders packs by it' if plan.balance == "group" else "no whole number of steps")
            )
        self.close()
        self.dataset.set_epoch(loaded.epoch)
        steps = self.dataset.plan.num_steps
        if delivered // pps > steps or (packs and delivered // pps == steps):
            self.dataset.set_epoch(plan.epoch)
            raise StateMismatchError(f"state has {delivered // pps} steps and {packs} packs, this loader {steps} steps")
        self._step, self._packs = delivered // pps, packs
        self.stats._plan = self.dataset.plan
        self._known_bad, self._finished = frozenset(loaded.bad), False

    def _run(self) -> Iterator[PackedBatch]:
        self.close()
        pool = self._pool = DecodePool(self._threads)
        pending: deque[OpenPack] = deque()
        todo = self._todo()
        try:
            while True:
                if self._pool is not pool:
                    raise RuntimeError("the loader was closed or iterated anew, which ends this iteration")
                while len(pending) <= self._prefetch and (pack := next(todo, None)) is not None:
                    pending.append(self._open(pool, pack))
                if not pending:
                    break
                batch = self._batch(pool, pending.popleft())
                self._advance()
                yield batch
            self._finished = True
        finally:
            pool.close()
            if self._pool is pool:
                self._pool = None

    def _todo(self) -> Iterator[int]:
        plan, rank = self.dataset.plan, self.rank
        for step in range(self._step, plan.num_steps):
            packs = plan.packs_of_rank(step, rank.dp_rank, rank.dp_size)
            yield from packs[self._packs if step == self._step else 0 :].tolist()

    def _advance(self) -> None:
        self._packs += 1
        if self._packs == self.dataset.plan.packs_per_step // self.rank.dp_size:
            self._step, self._packs = self._step + 1, 0

    def _open(self, pool: DecodePool, pack: int) -> OpenPack:
        share = self.rank.sp_rank, self.rank.sp_size
        opened = self.dataset.open(pack, share=share, pin=self._pin, known_bad=self._known_bad)
        for part in opened.parts.values():
            part.timeout_s = self._timeout_s
            pool.submit(part)
        return opened

    def _batch(self, pool: DecodePool, opened: OpenPack) -> PackedBatch:
        started = time.monotonic()
        for part in opened.parts.values():
            _wait(pool, part)
        self.stats.wait_s += time.monotonic() - started
        bad = self._agreed(opened)
        self._record(opened, bad)
        batch = opened.batch(bad, drop=self.on_bad == "drop")
        self._count(opened, batch, bad)
        if self._local_indices is not None:
            batch = batch.shard(self._local_indices(batch.layout))
        if self._pin:
            batch = batch.pin_memory()
        return batch if self._device is None else batch.to(self._device, non_blocking=True)

    def _agreed(self, opened: OpenPack) -> dict[int, str]:
        bad = opened.bad()
        if self.rank.sp_size == 1 or opened.num_clips == 0:
            return bad
        if self._agree is None:
            if bad.keys() - opened.known_bad.keys():
                seen = self.dataset.bad_sample(*next((opened.sample_ids[i], bad[i]) for i in bad))
                raise BadSampleError(f"{seen}: sequence-parallel ranks must agree on it, give agree=")
            return bad
        return {i: bad.get(i, "bad on another sequence-parallel rank") for i in sorted(self._agree(sorted(bad)))}

    def _record(self, opened: OpenPack, bad: dict[int, str]) -> None:
        """Enter bad samples into the ledger, and stop where there are too many."""
        for i, sample_id in enumerate(opened.sample_ids):
            self.stats.samples += 1
            if i not in bad:
                self._run_of_bad = 0
                continue
            self.stats.bad += 1
            self.stats.reasons[_kind(bad[i])] += 1
            if i in opened.known_bad:
                continue
            found = self.dataset.bad_sample(sample_id, bad[i])
            if self.on_bad == "raise":
                raise BadSampleError(str(found))
            self.bad.pop(sample_id, None)
            self.bad[sample_id] = found
            self._run_of_bad += 1
            count, seen = len(self.bad), self.stats.samples
            share = count > self._max_bad_fraction * seen and (count > FORGIVEN or self._max_bad_fraction == 0)
            if share or self._run_of_bad > self._max_bad_run:
                last = tuple(self.bad.values())[-5:]
                what = f"{self._run_of_bad} samples in a row" if not share else f"{count} of {seen} samples"
                listed = "\n  ".join(map(str, last))
                raise TooManyBadSamples(f"{what} could not be decoded, the last of them:\n  {listed}", last)

    def _count(self, opened: OpenPack, batch: PackedBatch, bad: Mapping[int, str]) -> None:
        stats, step = self.stats, batch.step
        columns = self.dataset.index.columns
        lost = [opened.sample_ids[i] for i in bad]
        weights = self.dataset.token_weights(step, lost)
        stats.lost_weight += math.fsum(
            weight * int(columns["n_supervised"][i]) for weight, i in zip(weights, lost, strict=True)
        )
        stats.packs += 1
        stats.tokens += int(columns["n_tokens"][opened.sample_ids].sum())
        stats.frames += batch.frames.shape[0]
        stats.utilisation = stats.tokens / (stats.packs * self.dataset.plan.config.max_tokens)
        stats.decode_s += sum(part.seconds for part in opened.parts.values())


def _wait(pool: DecodePool, part: DecodePart) -> None:
    """Wait for a part; one that does not even look at the clock is left to itself."""
    while not part.done.wait(0.05 if math.isfinite(part.timeout_s) else None):
        if part.started is not None and time.monotonic() - part.started > 1.25 * part.timeout_s + 0.25:
            pool.give_up(part)
            return


def _kind(reason: str) -> str:
    """A reason without its names and numbers, so that equal ones are counted together."""
    words = [word for word in reason.split() if "/" not in word and not any(c.isdigit() for c in word)]
    return " ".join(words)[:80]
