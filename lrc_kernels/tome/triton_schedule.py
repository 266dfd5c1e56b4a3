# SPDX-License-Identifier: Apache-2.0
"""Launches ToMe's plan: the kernels of every iteration, and the plan from what they leave. Nothing synchronises."""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
from torch import Tensor

from lrc_kernels.tome import triton_plan, triton_step
from lrc_kernels.tome.triton_plan import MATRIX_STAGES, MATRIX_WARPS, plan_blocks

# Tokens of set A up to which a rank is counted; past it they are sorted, which ranks them the same.
RANKS_COUNTED = 8192


def supports_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> str | None:  # fmt: skip
    """Why the Triton plan declines a call of `reference.plan`, or None."""
    if metric.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        return f"metric is {metric.dtype}, it takes float32, bfloat16 and float16"
    if precision == "eager_bf16" or num_heads != 1:
        return f"precision={precision!r} with num_heads={num_heads} runs on the features themselves"
    if destination is not None and r.shape[0] > 1:
        return f"destination fixes set B of one iteration, got {r.shape[0]}"
    return None


def _destination_order(destination: Tensor, cu_seqlens: Tensor) -> tuple[Tensor, Tensor]:
    """(segment-local token at each set position int32 [T], tokens of set A per segment int32 [S])."""
    total, num_segments = destination.shape[0], cu_seqlens.shape[0] - 1
    starts, lengths = cu_seqlens[:-1].long(), cu_seqlens.diff().long()
    segment = torch.repeat_interleave(torch.arange(num_segments, device=destination.device), lengths, output_size=total)
    order = torch.argsort(2 * segment + destination.long(), stable=True) - starts[segment]
    before = torch.nn.functional.pad((~destination).long().cumsum(0), (1, 0))
    sources = before[cu_seqlens[1:].long()] - before[starts]
    return order.int(), sources.int()


class _Launch(NamedTuple):
    """What the launches of one plan share.

    `halving`: the host knows from the shapes alone that every iteration halves every segment.
    """

    cu_seqlens: Tensor
    cu_seqlens_out: Tensor
    r: Tensor
    counts: Tensor
    order: Tensor | None
    sources: Tensor | None
    survives: Tensor | None
    new_row: Tensor
    unit: Tensor | None
    state: Tensor
    score: Tensor
    partner: Tensor
    size_out: Tensor
    anchor_out: Tensor
    max_seqlen: int
    longest_set: int
    threshold: float | None
    permutes: bool
    bf16: bool
    isolate: bool
    halving: bool

    def grid(self, length: int, block: int, i: int) -> tuple[int, tuple[int, int, int, int]]:
        """(programs, what every kernel of iteration i takes before its tiles) for `length` rows a segment."""
        num_segments, num_blocks = self.r.shape[1], triton.cdiv(length, block)
        return num_segments * num_blocks, (self.state.shape[0], num_segments, num_blocks, i)


class _Tokens(NamedTuple):
    """The tokens before an iteration; None where size 1, the token's own index, no flag is meant.

    `payload` is the metric, and has no rows after the last iteration, where nothing reads it.
    """

    payload: Tensor
    size: Tensor | None
    anchor: Tensor | None
    protected: Tensor | None


def _prepare(i: int, tokens: _Tokens, at: _Launch) -> None:
    width = tokens.payload.shape[1]
    blocks = plan_blocks(width)
    programs, common = at.grid(at.max_seqlen, blocks.tokens, i)
    triton_plan.tome_plan_fwd_prepare_kernel[(programs,)](
        tokens.payload, at.unit, at.state, tokens.protected, at.order, at.sources, at.cu_seqlens, at.counts, *common,
        width, blocks.tokens, blocks.k, blocks.padded_k, at.bf16, at.isolate, num_warps=4,
    )  # fmt: skip


def _ranks(i: int, at: _Launch, block: int) -> Tensor | None:
    """Places of all tokens in a stable sort by rank, counted from the batch's first token; None where few are ranked.

    Counting takes n^2 / 4 compares a segment, which at tomesd's 65,536 tokens would cost as much as the match.
    """
    if at.longest_set <= RANKS_COUNTED:
        return None
    keys = torch.empty_like(at.score, dtype=torch.int64)
    programs, (total, *common) = at.grid(at.max_seqlen, block, i)
    triton_plan.tome_plan_fwd_key_kernel[(programs,)](
        at.score, at.state, keys, at.sources, at.cu_seqlens, at.counts, *common, block, num_warps=4
    )
    by_rank = torch.argsort(keys, stable=True)
    return torch.empty_like(by_rank).scatter_(0, by_rank, torch.arange(total, device=keys.device))


def _match(i: int, at: _Launch, width: int) -> None:
    """Launches what decides the new row of every token in iteration i."""
    blocks = plan_blocks(width)
    programs, common = at.grid(at.longest_set, blocks.match_a, i)
    triton_plan.tome_plan_fwd_match_kernel[(programs,)](
        at.unit, at.state, at.score, at.partner, at.new_row, at.order, at.sources, at.r, at.cu_seqlens, at.counts,
        *common, blocks.match_a, blocks.match_b, blocks.k, blocks.padded_k, at.bf16, at.isolate, at.halving,
        num_warps=MATRIX_WARPS, num_stages=MATRIX_STAGES,
    )  # fmt: skip
    if at.halving:
        return
    programs, common = at.grid(at.longest_set, blocks.tokens, i)
    triton_plan.tome_plan_fwd_rank_kernel[(programs,)](
        at.score, at.partner, at.state, _ranks(i, at, blocks.tokens), at.new_row, at.order, at.sources, at.r,
        at.cu_seqlens, at.counts, 0.0 if at.threshold is None else float(at.threshold), *common, blocks.tokens,
        at.threshold is not None, num_warps=4,
    )  # fmt: skip


def _step(i: int, tokens: _Tokens, at: _Launch) -> _Tokens:
    """Launches the merge of iteration i; the tokens after it, whose unit vectors are ready where K fits one block."""
    payload, size, anchor, protected = tokens
    total, width = payload.shape
    blocks, last = plan_blocks(width), i == at.r.shape[0] - 1
    packed = last and not at.permutes
    fused = not last and blocks.k == blocks.padded_k
    after = _Tokens(
        payload=torch.empty(0 if last else total, width, dtype=torch.float32, device=payload.device),
        size=at.size_out if packed else torch.empty_like(at.score),
        anchor=at.anchor_out if packed else torch.empty_like(at.partner),
        protected=None if protected is None or last else torch.empty_like(protected),
    )
    programs, common = at.grid(at.longest_set, blocks.step_b, i)
    triton_step.tome_plan_fwd_step_kernel[(programs, 1 if last else triton.cdiv(blocks.padded_k, blocks.k))](
        payload, size, anchor, protected, at.new_row, None if last else after.payload, *after[1:],
        at.unit if fused else None, at.state if fused else None, at.survives if last else None, at.order, at.sources,
        at.r, at.cu_seqlens, at.cu_seqlens_out if packed else at.cu_seqlens, at.counts, *common, width,
        blocks.step_b, blocks.step_a, blocks.k, blocks.padded_k, at.bf16, at.isolate, at.halving,
        num_warps=MATRIX_WARPS, num_stages=MATRIX_STAGES,
    )  # fmt: skip
    if not fused and not last:
        _prepare(i + 1, after, at)
    return after


def launch_plan(
    metric: Tensor, cu_seqlens_in: Tensor, cu_seqlens_out: Tensor, r: Tensor, size: Tensor | None,
    protected: Tensor | None, destination: Tensor | None, num_out: int, max_seqlen: int, threshold: float | None,
    precision: str, order: str, zero_policy: str, num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """`reference.plan` with Triton kernels: same arguments, same result.
    Two launches besides two (pure halvings) or three for each iteration, while K <= 128.
    """
    (total, width), num_segments, num_iterations = metric.shape, cu_seqlens_in.shape[0] - 1, r.shape[0]

    def empty(shape: int | tuple[int, ...], dtype: torch.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device=metric.device)

    assign, weight = empty(total, torch.int32), empty(total, torch.float32)
    size_out, anchor_out = empty(num_out, torch.float32), empty(num_out, torch.int32)
    valid = empty(num_out, torch.bool)
    if total == 0:
        return assign, size_out, weight, anchor_out, valid
    blocks, bf16 = plan_blocks(width), precision == "bf16"
    # An iteration merges at most half of the tokens, so that this many are left only if each merged exactly half.
    halving = total == num_segments * max_seqlen == num_out << num_iterations and num_iterations > 0
    halving = halving and threshold is None and protected is None and destination is None
    unit_shape, unit_dtype = (1 if bf16 else 2, total, blocks.padded_k), torch.bfloat16 if bf16 else torch.float16
    order_in, sources = (None, None) if destination is None else _destination_order(destination, cu_seqlens_in)
    # Halved rows lie in the order of their anchors already.
    reorders = order == "position" and num_iterations > 0 and not halving
    at = _Launch(
        cu_seqlens=cu_seqlens_in, cu_seqlens_out=cu_seqlens_out, r=r.contiguous(),
        counts=empty((num_iterations, num_segments), torch.int32), order=order_in, sources=sources,
        survives=torch.zeros(total, dtype=torch.int32, device=metric.device) if reorders else None,
        new_row=empty((num_iterations, total), torch.int32),
        unit=empty(unit_shape, unit_dtype) if num_iterations else None,
        state=empty(total, torch.int8), score=empty(total, torch.float32), partner=empty(total, torch.int32),
        size_out=size_out, anchor_out=anchor_out, max_seqlen=max_seqlen,
        longest_set=(max_seqlen + 1) // 2 if destination is None else max_seqlen, threshold=threshold,
        permutes=num_iterations == 0 or reorders, bf16=bf16, isolate=zero_policy == "isolate", halving=halving,
    )  # fmt: skip
    size = None if size is None else size.float().contiguous()
    shield = None if protected is None else protected.contiguous().view(torch.int8)
    tokens = _Tokens(metric.contiguous(), size, None, shield)
    with torch.cuda.device_of(metric):
        if num_iterations:
            _prepare(0, tokens, at)
        for i in range(num_iterations):
            _match(i, at, width)
            tokens = _step(i, tokens, at)
        final_row = None
        programs, (_, *common) = at.grid(max_seqlen, blocks.tokens, num_iterations)
        if at.permutes:
            final_row = empty(total, torch.int32)
            survivors = None if at.survives is None else at.survives.cumsum(0, dtype=torch.int32)
            triton_step.tome_plan_fwd_rows_kernel[(programs,)](
                tokens.size, tokens.anchor, survivors, size_out, anchor_out, valid.view(torch.int8), final_row,
                cu_seqlens_in, cu_seqlens_out, at.counts, *common, blocks.tokens, num_warps=4,
            )  # fmt: skip
        triton_step.tome_plan_fwd_assign_kernel[(programs,)](
            at.new_row, final_row, size, assign, weight, size_out, anchor_out, valid.view(torch.int8), cu_seqlens_in,
            cu_seqlens_out, at.counts, total, *common, blocks.tokens, num_warps=4,
        )  # fmt: skip
    return assign, size_out, weight, anchor_out, valid
