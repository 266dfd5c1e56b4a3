# SPDX-License-Identifier: Apache-2.0
"""Peers of one drop step, written from the description of the public code, not from the code.

All take (hidden [T, D], scores [T], droppable bool [T], labels [T], position_ids [T], cos, sin [T, K]) of packed
sequences, of whose visual tokens a ratio stays, and return (hidden, labels, position_ids, cos, sin) of the kept rows.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Rows = tuple[Tensor, ...]


def torch_best(rows: Rows, scores: Tensor, droppable: Tensor, keep: Sequence[int], lengths: Sequence[int]) -> Rows:
    """The short torch form: one stable sort by (sequence, kept first, score), one index_select per tensor."""
    device = scores.device
    sequence = torch.repeat_interleave(torch.arange(len(lengths), device=device), torch.tensor(lengths, device=device))
    order = scores.masked_fill(~droppable, torch.inf).argsort(descending=True, stable=True)
    order = order[sequence[order].argsort(stable=True)]
    starts, kept, ends = 0, [], [0]
    counts = torch.zeros(len(lengths), dtype=torch.long, device=device).index_add_(0, sequence, (~droppable).long())
    for length, k, fixed in zip(lengths, keep, counts.tolist(), strict=True):
        kept.append(order[starts : starts + fixed + k])
        starts += length
        ends.append(ends[-1] + fixed + k)
    index = torch.cat(kept).sort().values
    return tuple(x.index_select(0, index) for x in rows)


def published(rows: Rows, scores: Tensor, droppable: Tensor, keep: Sequence[int], lengths: Sequence[int]) -> Rows:
    """VideoChat-Flash's step: sample by sample the visual span is ranked by topk, its rows and the text around it are
    concatenated, and all samples are padded to the longest. Returned without the padding, which every caller must skip.
    """
    samples = []
    start = 0
    for length, k in zip(lengths, keep, strict=True):
        own = slice(start, start + length)
        sample, flags = tuple(x[own] for x in rows), droppable[own]
        start += length
        visual = flags.nonzero()[:, 0]
        if visual.numel() == 0:
            samples.append(sample)
            continue
        first, last = int(visual[0]), int(visual[-1]) + 1
        chosen = scores[own][visual].topk(k).indices.sort().values
        top = visual[chosen]
        samples.append(tuple(torch.cat([x[:first], x[top], x[last:]]) for x in sample))
    longest = max(sample[0].shape[0] for sample in samples)
    padded = [x.new_zeros(len(samples), longest, *x.shape[1:]) for x in rows]
    for i, sample in enumerate(samples):
        for target, x in zip(padded, sample, strict=True):
            target[i, : x.shape[0]] = x
    lengths_out = [sample[0].shape[0] for sample in samples]
    return tuple(torch.cat([x[i, :n] for i, n in enumerate(lengths_out)]) for x in padded)


def llama_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)
