# SPDX-License-Identifier: Apache-2.0
"""One pack as the model takes it: tokenised samples with their frames in, a PackedBatch of tensors out."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from lrc_kernels.checks import check_int, check_tensor, check_values
from lrc_kernels.layout import VarlenLayout

IGNORE_INDEX = -100


@dataclass(frozen=True)
class Sample:
    """One tokenised conversation and the frames that its visual tokens stand for.

    Attributes:
        input_ids: int64 [n].
        visual: bool [n], the tokens that features of the frames replace, in frame order.
        frames: uint8 [F, 3, H, W], whole clips; None for a sample of text.
        labels: int64 [n], the words to learn at their own places, -100 elsewhere; None at inference.
        sample_id: what random drops are keyed by.
        frame_pts: float64 [F] seconds, or None.
        frame_valid: bool [F], False for a frame that stands in for one that could not be decoded; None = all valid.
    """

    input_ids: Tensor
    visual: Tensor
    frames: Tensor | None = None
    labels: Tensor | None = None
    sample_id: int = 0
    frame_pts: Tensor | None = None
    frame_valid: Tensor | None = None


@dataclass(frozen=True)
class PackedBatch:
    """Samples back to back: what the model reads, and what attention, merging, dropout and the loss need. Immutable.

    Attributes:
        input_ids: int64 [T].
        targets: int64 [T], the word that each row has to predict: the labels shifted by one inside their sequence, so
            that the last row of a sequence never has the first word of the next one as its target. -100 elsewhere.
        position_ids: int64 [T], or [3, T] for M-RoPE.
        loss_weight: fp32 [T], the share of each row in the loss; the shares of all packs of a step sum to 1.
        droppable: bool [T], visual tokens that token dropout may drop: those that have nothing to predict.
        frames: uint8 [F, 3, H, W].
        frame_pts: fp32 [F] seconds. frame_valid: bool [F].
        visual_index: int64 [V], the rows that visual tokens stand in, in frame order.
        sample_ids: int64 [S].
        layout: the sequences.
        clip_frames: frames of one clip.
        num_droppable: droppable tokens of each sequence, on the host.
        num_targets: rows with a target, on the host.
        pack_id, step: where the plan puts this pack.
        rows: int64 [T], the row of the whole pack that each row here is, -1 for padding; None = all rows in order. In
            such a shard everything with a T holds these rows only, while `layout`, `num_droppable`, `sample_ids` and
            the numbers in `visual_index` still speak of the whole pack.
        clips: int64 [C], the clips of the whole pack that `frames`, `frame_pts`, `frame_valid` and `visual_index` hold;
            None = all of them.
    """

    input_ids: Tensor
    targets: Tensor
    position_ids: Tensor
    loss_weight: Tensor
    droppable: Tensor
    frames: Tensor
    frame_pts: Tensor
    frame_valid: Tensor
    visual_index: Tensor
    sample_ids: Tensor
    layout: VarlenLayout
    clip_frames: int
    num_droppable: tuple[int, ...]
    num_targets: int
    pack_id: int = 0
    step: int = 0
    rows: Tensor | None = None
    clips: Tensor | None = None

    def _map(self, function: Callable[[Tensor], Tensor]) -> dict[str, Tensor]:
        values = {field.name: getattr(self, field.name) for field in fields(self)}
        return {name: function(value) for name, value in values.items() if isinstance(value, Tensor)}

    def shard(self, indices: Tensor, clips: Sequence[int] | None = None) -> PackedBatch:
        """What one sequence-parallel rank works on.

        Args:
            indices: int64 [T_local] rows of the pack, -1 for padding: `SequencePlan.local_indices`. Padding is token 0
                at position 0 without a target.
            clips: the clips that this rank encodes; None = those that this batch holds. Their features belong to the
                rows `visual_index` of the whole pack, which other ranks may own.

        Raises:
            TypeError, ValueError: rows or clips that this batch does not have, or a batch that is a shard already.
        """
        if self.rows is not None or (clips is not None and self.clips is not None):
            raise ValueError("a shard must be taken of a whole batch, got a batch that is a shard already")
        check_tensor("indices", indices, dims=(1,), dtypes=(torch.int64,), like=self.input_ids)
        total = self.layout.num_tokens
        check_values("indices", indices, (indices >= -1) & (indices < total), f"in [-1, {total})")
        real, at = indices >= 0, indices.clamp(min=0)

        def rows(values: Tensor, padding: float) -> Tensor:
            return torch.where(real, values[..., at], padding)

        targets = rows(self.targets, IGNORE_INDEX)
        whole = self if clips is None else self._only(clips)
        return replace(
            whole,
            input_ids=rows(self.input_ids, 0),
            targets=targets,
            position_ids=rows(self.position_ids, 0),
            loss_weight=rows(self.loss_weight, 0.0),
            droppable=rows(self.droppable, False),
            num_targets=int((targets != IGNORE_INDEX).sum()),
            rows=indices,
        )

    def _only(self, clips: Sequence[int]) -> PackedBatch:
        count = self.frames.shape[0] // self.clip_frames
        index = torch.as_tensor(list(clips), dtype=torch.int64, device=self.frames.device)
        check_values("clips", index, (index >= 0) & (index < count), f"in [0, {count})")
        if count and self.visual_index.shape[0] % count:
            raise ValueError(
                f"visual_index must hold equally many rows for each of {count} clips, got {self.visual_index.shape[0]}"
            )

        def of_clips(values: Tensor) -> Tensor:
            if count == 0:
                return values
            by_clip = values.unflatten(0, (count, -1))
            start, end = (int(index[0]), int(index[-1]) + 1) if len(index) else (0, 0)
            # Neighbouring clips, the usual case, are a view.
            near = end - start == len(index) and bool((index.diff() == 1).all())
            return (by_clip[start:end] if near else by_clip[index]).flatten(0, 1)

        names = ("frames", "frame_pts", "frame_valid", "visual_index")
        return replace(self, **{name: of_clips(getattr(self, name)) for name in names}, clips=index)  # type: ignore[arg-type]

    def to(self, device: torch.device | str, *, non_blocking: bool = True) -> PackedBatch:
        """The same batch on a device; from pinned memory the copies overlap with what runs there."""
        # What comes back to the host must be there when it is read.
        overlaps = non_blocking and torch.device(device).type != "cpu"
        moved = self._map(lambda tensor: tensor.to(device, non_blocking=overlaps))
        return replace(self, **moved, layout=self.layout.to(device))  # type: ignore[arg-type]

    def pin_memory(self) -> PackedBatch:
        """The same batch in page-locked memory; torch's DataLoader calls this by its name."""
        return replace(self, **self._map(Tensor.pin_memory))  # type: ignore[arg-type]

    def validate(self) -> None:
        """Check everything that a model relies on.

        Raises:
            ValueError: naming the field, the index, what was expected and what was found.
        """
        total = self.layout.num_tokens if self.rows is None else self.rows.shape[0]
        num_frames = self.frames.shape[0]
        shapes = {
            "input_ids": (total,),
            "targets": (total,),
            "position_ids": (3, total) if self.position_ids.dim() == 2 else (total,),
            "loss_weight": (total,),
            "droppable": (total,),
            "frame_pts": (num_frames,),
            "frame_valid": (num_frames,),
            "sample_ids": (self.layout.num_sequences,),
        }
        for name, shape in shapes.items():
            if tuple(getattr(self, name).shape) != shape:
                raise ValueError(f"{name} must have shape {list(shape)}, got {list(getattr(self, name).shape)}")
        if self.frames.dtype != torch.uint8 or self.frames.dim() != 4 or self.frames.shape[1] != 3:
            raise ValueError(f"frames must be uint8 [F, 3, H, W], got {self.frames.dtype} {list(self.frames.shape)}")
        if self.clip_frames < 1 or num_frames % self.clip_frames:
            raise ValueError(f"frames must be whole clips of {self.clip_frames}, got {num_frames} frames")
        if len(self.num_droppable) != self.layout.num_sequences:
            found = len(self.num_droppable)
            raise ValueError(f"num_droppable must have one entry per sequence ({len(self.sample_ids)}), got {found}")
        self._validate_targets()
        if self.rows is not None or self.clips is not None:
            self._validate_shard()
            return
        counts = [int(part.sum()) for part in self.droppable.split(self.layout.lengths)]
        for index, (expected, found) in enumerate(zip(self.num_droppable, counts, strict=True)):
            if expected != found:
                raise ValueError(f"num_droppable[{index}] must be the droppable tokens ({found}), got {expected}")
        self._validate_visual()

    def _validate_visual(self) -> None:
        total = self.layout.num_tokens
        index = self.visual_index
        ascends = bool((index.diff() > 0).all()) and (not len(index) or 0 <= int(index[0]) <= int(index[-1]) < total)
        if index.dtype != torch.int64 or not ascends:
            raise ValueError(
                f"visual_index must be int64, ascending and within the {total} rows, got {index.tolist()[:8]}"
            )
        wanted = torch.zeros_like(self.droppable)
        wanted[self.visual_index] = True
        wanted &= self.targets == IGNORE_INDEX
        if not torch.equal(self.droppable, wanted):
            at = int((self.droppable != wanted).nonzero()[0])
            raise ValueError(
                f"droppable[{at}] must be {bool(wanted[at])} (True: visual and predicts nothing), got {not wanted[at]}"
            )

    def _validate_targets(self) -> None:
        has_target = self.targets != IGNORE_INDEX
        if int(has_target.sum()) != self.num_targets:
            raise ValueError(
                f"num_targets must be {int(has_target.sum())}, the rows with a target, got {self.num_targets}"
            )
        weighs = self.loss_weight != 0
        if bool((weighs & ~has_target).any()) or not bool(self.loss_weight.isfinite().all()):
            at = int(((weighs & ~has_target) | ~self.loss_weight.isfinite()).nonzero()[0])
            raise ValueError(
                f"loss_weight[{at}] must be 0 where there is no target and finite elsewhere, got {self.loss_weight[at]}"
            )
        if self.rows is not None:
            return
        for index, (start, end) in enumerate(zip(self.layout.cu_seqlens, self.layout.cu_seqlens[1:], strict=False)):
            if end > start and self.targets[end - 1] != IGNORE_INDEX:
                raise ValueError(
                    f"targets[{int(end) - 1}] must be -100, the last row of sequence {index} predicts nothing, "
                    f"got {int(self.targets[end - 1])}"
                )

    def _validate_shard(self) -> None:
        """What can be said of a part: the rest of the pack decides which tokens are visual."""
        total = self.layout.num_tokens
        outside = (self.visual_index < 0) | (self.visual_index >= total)
        if bool(outside.any()):
            at = int(outside.nonzero()[0])
            raise ValueError(f"visual_index[{at}] must be a row in [0, {total}), got {int(self.visual_index[at])}")
        wrong = self.droppable & (self.targets != IGNORE_INDEX)
        if self.rows is not None:
            wrong |= (self.rows < 0) & ((self.targets != IGNORE_INDEX) | self.droppable)
            ends = torch.isin(self.rows, self.layout.cu_seqlens[1:].long() - 1)
            wrong |= ends & (self.targets != IGNORE_INDEX)
        if bool(wrong.any()):
            at = int(wrong.nonzero()[0])
            raise ValueError(f"targets[{at}] must be -100 (padding, droppable, or the last row of a sequence)")


def pack_samples(
    samples: Sequence[Sample],
    *,
    clip_frames: int,
    token_weight: float | Sequence[float] | None = None,
    pack_id: int = 0,
    step: int = 0,
) -> PackedBatch:
    """Lay samples back to back.

    Args:
        samples: at least one.
        clip_frames: frames of one clip; every sample's frames must be whole clips.
        token_weight: share of one supervised token in the loss of the step, or that of each sample's tokens; None =
            1 / those of this pack.

    Raises:
        TypeError, ValueError: naming the sample and the field that does not fit.
    """
    check_int("clip_frames", clip_frames, minimum=1)
    if not samples:
        raise ValueError("samples must hold at least one sample, got none")
    for index, sample in enumerate(samples):
        _check_sample(index, sample, clip_frames)
    size = next((sample.frames.shape[1:] for sample in samples if sample.frames is not None), (3, 0, 0))
    frames = [sample.frames for sample in samples if sample.frames is not None]
    return lay_out(
        samples,
        torch.cat(frames) if frames else torch.empty(0, *size, dtype=torch.uint8),
        torch.cat([_per_frame(sample, sample.frame_pts, 0.0).float() for sample in samples]),
        torch.cat([_per_frame(sample, sample.frame_valid, True).bool() for sample in samples]),
        clip_frames=clip_frames,
        token_weight=token_weight,
        pack_id=pack_id,
        step=step,
    )


def lay_out(
    samples: Sequence[Sample],
    frames: Tensor,
    frame_pts: Tensor,
    frame_valid: Tensor,
    *,
    clip_frames: int,
    token_weight: float | Sequence[float] | None = None,
    pack_id: int = 0,
    step: int = 0,
) -> PackedBatch:
    """`pack_samples` with the frames of all samples in one tensor already; those of the samples are not looked at."""
    lengths = [len(sample.input_ids) for sample in samples]
    targets = torch.cat([_targets(sample) for sample in samples])
    num_targets = int((targets != IGNORE_INDEX).sum())
    if token_weight is None:
        token_weight = 1 / num_targets if num_targets else 0.0
    if not isinstance(token_weight, (int, float)):
        if len(token_weight) != len(samples):
            raise ValueError(f"token_weight must hold one weight per sample ({len(samples)}), got {len(token_weight)}")
        weight: Tensor | float = torch.tensor(token_weight, dtype=torch.float64).repeat_interleave(
            torch.tensor(lengths)
        )
    else:
        weight = token_weight
    visual = torch.cat([sample.visual for sample in samples])
    droppable = visual & (targets == IGNORE_INDEX)
    return PackedBatch(
        input_ids=torch.cat([sample.input_ids for sample in samples]),
        targets=targets,
        position_ids=torch.cat([torch.arange(n) for n in lengths]),
        loss_weight=torch.where(targets != IGNORE_INDEX, weight, 0.0).float(),
        droppable=droppable,
        frames=frames,
        frame_pts=frame_pts,
        frame_valid=frame_valid,
        visual_index=visual.nonzero().squeeze(1),
        sample_ids=torch.tensor([sample.sample_id for sample in samples]),
        layout=VarlenLayout(lengths),
        clip_frames=clip_frames,
        num_droppable=tuple(int(part.sum()) for part in droppable.split(lengths)),
        num_targets=num_targets,
        pack_id=pack_id,
        step=step,
    )


def _targets(sample: Sample) -> Tensor:
    targets = torch.full_like(sample.input_ids, IGNORE_INDEX)
    if sample.labels is not None:
        targets[:-1] = sample.labels[1:]
    return targets


def _per_frame(sample: Sample, values: Tensor | None, default: float | bool) -> Tensor:
    if values is not None:
        return values
    return torch.full((0 if sample.frames is None else sample.frames.shape[0],), default)


def _check_sample(index: int, sample: Sample, clip_frames: int) -> None:
    where = f"samples[{index}]"
    if not isinstance(sample, Sample):
        raise TypeError(f"{where} must be a Sample, got {type(sample).__name__}")
    for name in ("input_ids", "visual", "frames", "labels", "frame_pts", "frame_valid"):
        value = getattr(sample, name)
        if not isinstance(value, Tensor) and (value is not None or name in ("input_ids", "visual")):
            raise TypeError(f"{where}.{name} must be a tensor, got {type(value).__name__}")
    n = sample.input_ids.shape
    if sample.input_ids.dtype != torch.int64 or len(n) != 1 or n[0] == 0:
        raise ValueError(f"{where}.input_ids must be int64 [n], n > 0, got {sample.input_ids.dtype} {list(n)}")
    if sample.visual.dtype != torch.bool or sample.visual.shape != n:
        raise ValueError(
            f"{where}.visual must be bool {list(n)}, got {sample.visual.dtype} {list(sample.visual.shape)}"
        )
    if sample.labels is not None and (sample.labels.dtype != torch.int64 or sample.labels.shape != n):
        raise ValueError(
            f"{where}.labels must be int64 {list(n)}, got {sample.labels.dtype} {list(sample.labels.shape)}"
        )
    num_frames = 0 if sample.frames is None else sample.frames.shape[0]
    if sample.frames is not None and (sample.frames.dtype != torch.uint8 or sample.frames.dim() != 4):
        raise ValueError(f"{where}.frames must be uint8 [F, 3, H, W], got {sample.frames.dtype}")
    if num_frames % clip_frames:
        raise ValueError(f"{where}.frames must be whole clips of {clip_frames}, got {num_frames} frames")
    if bool(sample.visual.any()) != (num_frames > 0):
        found = int(sample.visual.sum())
        raise ValueError(
            f"{where}.visual must be set exactly where there are frames, got {found} tokens, {num_frames} frames"
        )
    for name in ("frame_pts", "frame_valid"):
        values = getattr(sample, name)
        if values is not None and values.shape != (num_frames,):
            raise ValueError(f"{where}.{name} must have shape [{num_frames}], got {list(values.shape)}")
