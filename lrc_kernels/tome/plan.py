# SPDX-License-Identifier: Apache-2.0
"""What a merge is made of, on the host: its schedule, its budget, the addresses of ViT tokens, and the plan."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc_kernels.checks import check_int
from lrc_kernels.layout import VarlenLayout, register_pytree


def merge_schedule(num_tokens: int, target: int) -> tuple[int, ...]:
    """Tokens merged in each iteration: halve while more than half must go, then the remainder.

    A bipartite iteration can remove at most half of the tokens (paper section 3.1, "a few of iterations"):
    `merge_schedule(2048, 128) == (1024, 512, 256, 128)`, `merge_schedule(98, 64) == (34,)`.

    Raises:
        TypeError: arguments that are no ints. ValueError: target > num_tokens, or a target of 0 for tokens that exist.
    """
    check_int("num_tokens", num_tokens, minimum=0)
    check_int("target", target, minimum=0)
    schedule, left = _schedule_within(num_tokens, target, num_protected=0)
    assert left == target
    return schedule


def mergeable_tokens(num_tokens: int, num_protected: int = 0) -> int:
    """The most tokens that one iteration can merge, wherever the protected tokens lie: half of them without any.

    A protected token may lie in either set, so that it takes one source and one destination away in the worst case.
    """
    if num_protected and num_tokens // 2 <= num_protected:
        return 0
    return max(0, min(num_tokens // 2, (num_tokens + 1) // 2 - num_protected))


def _schedule_within(num_tokens: int, target: int, num_protected: int) -> tuple[tuple[int, ...], int]:
    if target > num_tokens or (target == 0 and num_tokens > 0):
        wanted = f"between 1 and num_tokens = {num_tokens}" if num_tokens > 0 else "0 for an empty segment"
        raise ValueError(f"target must be {wanted}, got {target}")
    schedule, n = [], num_tokens
    while n > target and (r := min(n - target, mergeable_tokens(n, num_protected))) > 0:
        schedule.append(r)
        n -= r
    return tuple(schedule), n


@dataclass(frozen=True)
class TokenLayout:
    """How a ViT output [F, prefix + h*w, D] maps to clip tokens [B, clip_frames*h*w/shuffle^2, shuffle^2*D].

    This is InternVL's pixel shuffle (version 2) after the class token is dropped, by index arithmetic and without
    copies: token (f, i, j) of a clip, frames first, concatenates the D channels of the shuffle x shuffle patches
    (i*shuffle + di, j*shuffle + dj), di slowest.

    Args:
        clip_frames: frames of one clip, F = B * clip_frames.
        grid: patch rows and columns (h, w) of a frame, each a multiple of `shuffle`.
        shuffle: side of the square of patches that one token concatenates.
        prefix: tokens to skip at the start of each frame (1 class token in InternViT).
    """

    clip_frames: int
    grid: tuple[int, int] = (32, 32)
    shuffle: int = 2
    prefix: int = 1

    def __post_init__(self) -> None:
        if not isinstance(self.grid, (tuple, list)) or len(self.grid) != 2:
            raise TypeError(f"grid must be (rows, columns), got {self.grid!r}")
        h, w = self.grid
        named = {"clip_frames": self.clip_frames, "grid[0]": h, "grid[1]": w, "shuffle": self.shuffle}
        for name, value in {**named, "prefix": self.prefix}.items():
            check_int(name, value, minimum=0 if name == "prefix" else 1)
        if h % self.shuffle or w % self.shuffle:
            raise ValueError(f"grid must be a multiple of shuffle = {self.shuffle} in both directions, got {self.grid}")

    @property
    def tokens_per_clip(self) -> int:
        return self.clip_frames * self.grid[0] * self.grid[1] // self.shuffle**2

    @property
    def rows_per_frame(self) -> int:
        return self.prefix + self.grid[0] * self.grid[1]

    def as_ints(self) -> list[int]:
        """[clip_frames, h, w, shuffle, prefix]: the form that the ops take."""
        return [self.clip_frames, *self.grid, self.shuffle, self.prefix]

    def num_clips(self, x: Tensor) -> int:
        """Clips in x [F, prefix + h*w, D]; ValueError where the frames or the rows do not fit this layout."""
        if x.dim() != 3 or x.shape[1] != self.rows_per_frame:
            wanted = f"[F, {self.prefix} + {self.grid[0]}*{self.grid[1]}, D]"
            raise ValueError(f"x must have shape {wanted} under this TokenLayout, got {list(x.shape)}")
        if x.shape[0] % self.clip_frames:
            raise ValueError(
                f"x must hold whole clips: a multiple of clip_frames = {self.clip_frames} frames, got {x.shape[0]}"
            )
        return x.shape[0] // self.clip_frames


@dataclass(frozen=True, eq=False)
class MergeBudget:
    """How many tokens each segment merges in each iteration; made on the host by `merge_budget`.

    Attributes:
        layout_in, layout_out: segments before and after.
        r: int32 [I, S] on the device of `layout_in`, tokens merged per iteration and segment.
        num_protected: protected tokens allowed per segment.
    """

    layout_in: VarlenLayout
    layout_out: VarlenLayout
    r: Tensor
    num_protected: int = 0

    @property
    def num_out(self) -> int:
        """Rows of the packed output."""
        return self.layout_out.num_tokens

    @property
    def num_iterations(self) -> int:
        return self.r.shape[0]


def merge_budget(
    layout: VarlenLayout,
    *,
    target: int | Sequence[int] | None = None,
    r: int | Sequence[int] | None = None,
    num_protected: int = 0,
) -> MergeBudget:
    """Decide, on the host and once per batch, how many tokens every segment keeps.

    Args:
        layout: the segments to merge.
        target: tokens to keep, one int for all segments or one per segment (0 only for an empty segment).
        r: instead of `target`: tokens to merge in one iteration, or a list with one entry per iteration; clamped per
            segment to what one iteration can merge.
        num_protected: the most protected tokens in any segment; they are never merged, so less can be.

    Raises:
        TypeError, ValueError: both or neither of target and r, a negative or unreachable value (segment named).
    """
    if not isinstance(layout, VarlenLayout):
        raise TypeError(f"layout must be a VarlenLayout, got {type(layout).__name__}")
    if (target is None) == (r is None):
        raise ValueError(f"exactly one of target and r must be given, got target={target!r}, r={r!r}")
    check_int("num_protected", num_protected, minimum=0)
    if target is not None:
        schedules = _schedules_to_target(layout, target, num_protected)
    else:
        assert r is not None
        schedules = _schedules_of_r(layout, r, num_protected)
    num_iterations = max((len(schedule) for schedule in schedules), default=0)
    table = [[schedule[i] if i < len(schedule) else 0 for schedule in schedules] for i in range(num_iterations)]
    device = layout.cu_seqlens.device
    kept = [n - sum(schedule) for n, schedule in zip(layout.lengths, schedules, strict=True)]
    r_table = torch.tensor(table, dtype=torch.int32).reshape(num_iterations, layout.num_sequences)
    r_table = r_table.to(device, non_blocking=True)
    torch._dynamo.maybe_mark_dynamic(r_table, [0, 1])
    return MergeBudget(layout, VarlenLayout(kept, device), r_table, num_protected)


def uniform_budget(
    num_segments: int, length: int, schedule: Sequence[int], device: torch.device, num_protected: int = 0
) -> MergeBudget:
    """The budget of equal segments that follow one schedule; neither builds a host list nor copies from the host, so
    that a compiled graph and a CUDA graph may call it.

    The schedule is taken as it is: whoever knows where the protected tokens or the destinations lie can merge more than
    `mergeable_tokens`, which has to hold wherever they lie.
    """
    layout_in = VarlenLayout.uniform(num_segments, length, device)
    layout_out = VarlenLayout.uniform(num_segments, length - sum(schedule), device)
    r = torch.empty(len(schedule), num_segments, dtype=torch.int32, device=device)
    for row, merged in enumerate(schedule):
        r[row].fill_(merged)
    return MergeBudget(layout_in, layout_out, r, num_protected)


def _schedules_to_target(
    layout: VarlenLayout, target: int | Sequence[int], num_protected: int
) -> list[tuple[int, ...]]:
    targets = _per_segment(target, layout, "target")
    schedules = []
    for segment, (n, wanted) in enumerate(zip(layout.lengths, targets, strict=True)):
        try:
            schedule, reached = _schedule_within(n, wanted, num_protected)
        except ValueError as error:
            raise ValueError(f"segment {segment}: {error}") from None
        if reached != wanted:
            raise ValueError(
                f"segment {segment}: target must be reachable with num_protected = {num_protected}, got {wanted}, "
                f"but {n} tokens cannot go below {reached}"
            )
        schedules.append(schedule)
    return schedules


def _schedules_of_r(layout: VarlenLayout, r: int | Sequence[int], num_protected: int) -> list[tuple[int, ...]]:
    steps = [r] if isinstance(r, int) else _ints("r", r)
    for index, step in enumerate(steps):
        check_int(f"r[{index}]", step, minimum=0)
    schedules = []
    for n in layout.lengths:
        schedule = []
        for step in steps:
            schedule.append(min(int(step), mergeable_tokens(n, num_protected)))
            n -= schedule[-1]
        schedules.append(tuple(schedule))
    return schedules


def _ints(name: str, value: Sequence[int]) -> list[int]:
    if isinstance(value, (str, bytes, Tensor)) or not isinstance(value, Iterable):
        raise TypeError(f"{name} must be an int or a sequence of ints, got {type(value).__name__}")
    return list(value)


def _per_segment(value: int | Sequence[int], layout: VarlenLayout, name: str) -> list[int]:
    if isinstance(value, int):
        check_int(name, value, minimum=0)
        # An empty segment can only keep nothing, whatever the others keep.
        return [value if n > 0 else 0 for n in layout.lengths]
    values = _ints(name, value)
    if len(values) != layout.num_sequences:
        raise ValueError(f"{name} must have one entry per segment ({layout.num_sequences}), got {len(values)}")
    for index, entry in enumerate(values):
        check_int(f"{name}[{index}]", entry, minimum=0)
    return values


@dataclass(frozen=True, eq=False)
class MergePlan:
    """Which input token goes into which output row: what `plan_merge` returns. Immutable, a pytree.

    Attributes:
        assign: int32 [T_in], packed output row of each input token.
        size: fp32 [T_out], total weight of each output row.
        weight: fp32 [T_in], input weights, 0 for a token that `zero_policy="isolate"` masks; None means ones.
        anchor: int32 [T_out], segment-local input index that each output row descends from.
        valid: bool [T_out] in threshold mode (False rows are padding, size 0), else None.
        layout_in, layout_out: segments before and after.
        binary_weight: True where `weight` holds only 0 and 1 (no `size` was given): one tensor-core product suffices.
    """

    assign: Tensor
    size: Tensor
    weight: Tensor | None
    anchor: Tensor
    valid: Tensor | None
    layout_in: VarlenLayout
    layout_out: VarlenLayout
    binary_weight: bool = True

    @property
    def num_out(self) -> int:
        """T_out, rows of the packed output."""
        return self.layout_out.num_tokens

    def compose(self, after: MergePlan) -> MergePlan:
        """One plan that does `self` and then `after`; `after` must be planned with `size=self.size`.

        Where `self` has a threshold, `after` should have one too, or its r may merge tokens into rows of padding.

        Raises:
            ValueError: `after` does not start where `self` ends.
        """
        if after.layout_in != self.layout_out:
            raise ValueError(f"after.layout_in must equal self.layout_out = {self.layout_out}, got {after.layout_in}")
        if after.binary_weight:
            raise ValueError("after must be planned with size=self.size, got a plan that weighs every row by 1")
        middle = self.assign.long()
        weight = self.weight
        if after.weight is not None:
            alive = after.weight[middle] > 0
            ones = torch.ones_like(middle, dtype=torch.float32) if weight is None else weight
            weight = torch.where(alive, ones, 0.0)
        valid = after.valid
        if self.valid is not None:
            # Padding of `self` goes through `after` as tokens of weight 0, and is padding still where it stays alone.
            real = torch.zeros(after.num_out, dtype=torch.int32, device=middle.device)
            real = real.index_add(0, after.assign.long(), self.valid.int()) > 0
            valid = real if valid is None else real & valid
        # anchor and assign are local and global indices: the start of the segment turns one into the other.
        starts = self.layout_out.cu_seqlens[:-1].long()
        counts = after.layout_out.cu_seqlens.diff().long()
        segment_start = torch.repeat_interleave(starts, counts, output_size=after.num_out)
        return MergePlan(
            assign=after.assign[middle],
            size=after.size,
            weight=weight,
            anchor=self.anchor[segment_start + after.anchor.long()],
            valid=valid,
            layout_in=self.layout_in,
            layout_out=after.layout_out,
            binary_weight=self.binary_weight,
        )


register_pytree(MergePlan, leaves=7)
register_pytree(MergeBudget, leaves=3)
