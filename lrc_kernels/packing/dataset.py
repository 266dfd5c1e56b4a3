# SPDX-License-Identifier: Apache-2.0
"""PackedDataset: an index and a plan in, the PackedBatch of any pack out. Decoding never changes a length."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.packing.batch import IGNORE_INDEX, PackedBatch, Sample, lay_out
from lrc_kernels.packing.decode import DecodePart
from lrc_kernels.packing.index import Index
from lrc_kernels.packing.plan import PackPlan, plan_packs
from lrc_kernels.packing.sampling import TemporalSampling

PAD_ID = -1
_SHARES: dict[str, Callable[[int], float]] = {"token": float, "sample": lambda n: float(n > 0), "sqrt": math.sqrt}


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be decoded, where it comes from, and why."""

    sample_id: int
    where: str
    reason: str

    def __str__(self) -> str:
        return f"sample {self.sample_id} ({self.where}): {self.reason}"


@dataclass
class OpenPack:
    """A pack whose frames are being decoded: `parts` to run, then `batch`.

    Args:
        sample_ids: samples of the pack.
        clips: [first, last) clips of the pack that are decoded here.
        frames: uint8 [F, 3, H, W], the place for the frames of these clips.
        parts: what there is to decode, by position in sample_ids.
        spans: [first, last) rows of `frames` of each sample.
        known_bad: positions of samples that are not decoded, since an earlier run could not.
    """

    dataset: PackedDataset
    pack_id: int
    sample_ids: list[int]
    clips: tuple[int, int]
    num_clips: int
    frames: Tensor
    parts: dict[int, DecodePart]
    spans: list[tuple[int, int]]
    known_bad: dict[int, str]

    def bad(self) -> dict[int, str]:
        """Position -> reason of every sample that is bad so far as this rank can see."""
        return {**self.known_bad, **{i: part.reason for i, part in self.parts.items() if part.reason}}

    def batch(self, bad: Collection[int], *, drop: bool = False) -> PackedBatch:
        """The pack once all parts are done.

        Args:
            bad: positions of samples that keep their tokens, with frames of zeros, no targets and no weight.
            drop: leave them out instead, unless no sample would be left.
        """
        frames, parts = self.frames, self.parts.values()
        if any(part.abandoned for part in parts):
            frames = frames.clone()
        for i in bad:
            frames[slice(*self.spans[i])].zero_()
        pts, valid = torch.zeros(len(frames)), torch.zeros(len(frames), dtype=torch.bool)
        for i, part in self.parts.items():
            if i not in bad:
                pts[slice(*self.spans[i])], valid[slice(*self.spans[i])] = part.pts, part.valid
        if drop and 0 < len(bad) < len(self.sample_ids):
            return self._without(bad, frames, pts, valid)
        return self._lay_out(range(len(self.sample_ids)), bad, frames, pts, valid)

    def _without(self, bad: Collection[int], frames: Tensor, pts: Tensor, valid: Tensor) -> PackedBatch:
        kept = [i for i in range(len(self.sample_ids)) if i not in bad]
        rows = torch.cat([torch.arange(*self.spans[i]) for i in kept])
        return self._lay_out(kept, (), frames[rows], pts[rows], valid[rows])

    def _lay_out(
        self, kept: Sequence[int], bad: Collection[int], frames: Tensor, pts: Tensor, valid: Tensor
    ) -> PackedBatch:
        dataset, step = self.dataset, self.pack_id // self.dataset.plan.packs_per_step
        weights = dataset.token_weights(step, [self.sample_ids[i] for i in kept])
        samples, token_weight = [], []
        for i, weight in zip(kept, weights, strict=True):
            laid = dataset.samples_of(self.sample_ids[i], masked=i in bad)
            samples += laid
            token_weight += [weight] + [0.0] * (len(laid) - 1)
        if not samples:
            samples, token_weight = [_padding(1)], [0.0]
        batch = lay_out(
            samples,
            frames,
            pts,
            valid,
            clip_frames=dataset.clip_frames,
            token_weight=token_weight,
            pack_id=self.pack_id,
            step=step,
        )
        if self.clips == (0, self.num_clips):
            return batch
        first, last = self._clips_among(kept)
        per_clip = dataset.index.tokens_per_frame * dataset.clip_frames
        return replace(
            batch,
            visual_index=batch.visual_index[first * per_clip : last * per_clip],
            clips=torch.arange(first, last),
        )

    def _clips_among(self, kept: Sequence[int]) -> tuple[int, int]:
        """`clips` counted among the clips of the samples that are kept."""
        per_sample = [self.dataset.num_clips(sample_id) for sample_id in self.sample_ids]
        starts = np.concatenate([[0], np.cumsum(per_sample)])
        alive = np.zeros(self.num_clips, dtype=bool)
        for i in kept:
            alive[starts[i] : starts[i + 1]] = True
        first, last = self.clips
        return int(alive[:first].sum()), int(alive[:last].sum())


class PackedDataset(Dataset[PackedBatch]):
    """Map-style over the packs of a plan, in the order in which they are trained on. Works in torch's DataLoader with
    `batch_size=None`; `PackedLoader` is faster, resumes and shares the work among ranks.

    Args:
        index: the data.
        plan: of `plan_packs(index, ...)`.
        sampling: another rule for where the frames lie; how many there are stays as the index says.
        image_size: rows and columns of a frame.
        loss: what has equal weight in the loss of a step: each supervised "token", each "sample", or "sqrt": each
            sample the root of its supervised tokens. The weights of a whole step sum to 1, whichever packs and ranks
            hold its samples.

    Attributes:
        bad: samples that `dataset[i]` could not decode, by sample_id; those of a DataLoader's workers stay with them.

    Raises:
        TypeError, ValueError: naming the argument.
    """

    def __init__(
        self,
        index: Index,
        plan: PackPlan,
        *,
        sampling: TemporalSampling | None = None,
        image_size: int = 448,
        loss: Literal["token", "sample", "sqrt"] = "token",
    ):
        for name, value, kind in (("index", index, Index), ("plan", plan, PackPlan)):
            if not isinstance(value, kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(value).__name__}")
        if plan.num_samples != len(index):
            raise ValueError(f"plan must be of the index's {len(index)} samples, got one of {plan.num_samples}")
        check_int("image_size", image_size, minimum=1)
        check_choice("loss", loss, tuple(_SHARES))
        sampling = index.sampling if sampling is None else sampling
        if sampling.multiple_of != index.sampling.multiple_of:
            wanted = index.sampling.multiple_of
            raise ValueError(f"sampling.multiple_of must be the index's {wanted}, got {sampling.multiple_of}")
        if not (sampling.content is None or isinstance(sampling.content, str)):
            raise ValueError("sampling.content must be None or 'packets' here, got the activity of one video")
        self.index, self.plan, self.sampling, self.loss = index, plan, sampling, loss
        self.image_size, self.clip_frames = image_size, sampling.multiple_of
        self.bad: dict[int, BadSample] = {}
        self._total: tuple[int, int, float] | None = None

    def __len__(self) -> int:
        return self.plan.num_packs

    def __getitem__(self, pack_id: int) -> PackedBatch:
        """A pack with whatever can be decoded; what cannot is masked and stands in `bad`."""
        opened = self.open(range(len(self))[pack_id])
        for part in opened.parts.values():
            part.run()
        bad = opened.bad()
        for i, reason in bad.items():
            self.bad[opened.sample_ids[i]] = self.bad_sample(opened.sample_ids[i], reason)
        return opened.batch(bad)

    def set_epoch(self, epoch: int) -> None:
        """Plan another epoch as this one was planned."""
        if epoch != self.plan.epoch:
            plan = self.plan
            self.plan = plan_packs(
                self.index,
                plan.config,
                seed=plan.seed,
                epoch=epoch,
                packs_per_step=plan.packs_per_step,
                balance=plan.balance,  # type: ignore[arg-type]
            )
            self._total = None

    def num_clips(self, sample_id: int) -> int:
        return int(self.index.columns["n_frames"][sample_id]) // self.clip_frames

    def bad_sample(self, sample_id: int, reason: str) -> BadSample:
        return BadSample(sample_id, self.index.where(sample_id), reason)

    def open(
        self, pack_id: int, *, share: tuple[int, int] = (0, 1), pin: bool = False, known_bad: Collection[int] = ()
    ) -> OpenPack:
        """Lay out the frames of a pack, undecoded.

        Args:
            share: (rank, ranks): of this many equal shares of the pack's clips, which one is decoded.
            pin: put the frames into page-locked memory.
            known_bad: sample_ids that are not decoded.
        """
        sample_ids = self.plan.samples_of_pack(pack_id).tolist()
        counts = [self.num_clips(sample_id) for sample_id in sample_ids]
        num_clips, (rank, ranks) = sum(counts), share
        first, last = num_clips * rank // ranks, num_clips * (rank + 1) // ranks
        shape = ((last - first) * self.clip_frames, 3, self.image_size, self.image_size)
        frames = torch.empty(shape, dtype=torch.uint8, pin_memory=pin)
        opened = OpenPack(self, pack_id, sample_ids, (first, last), num_clips, frames, {}, [], {})
        start = 0
        for i, (sample_id, count) in enumerate(zip(sample_ids, counts, strict=True)):
            begin, end = (min(max(start + k, first), last) for k in (0, count))
            span = (begin - first) * self.clip_frames, (end - first) * self.clip_frames
            opened.spans.append(span)
            if sample_id in known_bad:
                opened.known_bad[i] = "bad in an earlier run"
            elif end > begin:
                ours = (begin - start) * self.clip_frames, (end - start) * self.clip_frames
                opened.parts[i] = DecodePart(self.index, self.sampling, sample_id, *ours, frames[slice(*span)])
            start += count
        return opened

    def token_weights(self, step: int, sample_ids: Sequence[int]) -> list[float]:
        """The weight of one supervised token of each sample; over all samples of the step the tokens' sum to 1."""
        supervised, share = self.index.columns["n_supervised"], _SHARES[self.loss]
        if self._total is None or self._total[:2] != (step, self.plan.epoch):
            first, last = (self.plan.pack_ptr[k * self.plan.packs_per_step] for k in (step, step + 1))
            counts = supervised[self.plan.sample_index[first:last]].tolist()
            # Exactly rounded, so that every rank divides by the same number.
            self._total = step, self.plan.epoch, math.fsum(map(share, counts))
        total = self._total[2]
        counts = [int(supervised[sample_id]) for sample_id in sample_ids]
        return [share(n) / n / total if n else 0.0 for n in counts]

    def samples_of(self, sample_id: int, *, masked: bool) -> list[Sample]:
        """The tokens of a sample, followed by a sequence of padding where the plan aligns samples."""
        input_ids, labels, visual = map(torch.from_numpy, self.index.tokens(sample_id))
        if masked:
            labels = torch.full_like(labels, IGNORE_INDEX)
        samples = [Sample(input_ids, visual, labels=labels, sample_id=sample_id)]
        padding = -len(input_ids) % self.plan.config.align
        return [*samples, _padding(padding)] if padding else samples


def _padding(length: int) -> Sample:
    return Sample(torch.zeros(length, dtype=torch.int64), torch.zeros(length, dtype=torch.bool), sample_id=PAD_ID)
