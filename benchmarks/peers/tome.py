# SPDX-License-Identifier: Apache-2.0
"""Peers of `lrc_kernels.tome.compress_clips`, written from the description of the public code, not from the code.

Both take clips x [B, N, D] and return (y [B, target, D], size [B, target]).
"""

from __future__ import annotations

import torch
from torch import Tensor


def _schedule(num_tokens: int, target: int) -> list[int]:
    steps = []
    while num_tokens > target:
        steps.append(min(num_tokens // 2, num_tokens - target))
        num_tokens -= steps[-1]
    return steps


def pixel_shuffle(x: Tensor, grid: tuple[int, int], shuffle: int) -> Tensor:
    """ViT output [F, 1 + h*w, C] -> [F, h*w / shuffle^2, shuffle^2 * C] with the public code's two copies."""
    x = x[:, 1:].reshape(x.shape[0], *grid, -1)
    frames, rows, columns, width = x.shape
    x = x.view(frames, rows, columns // shuffle, width * shuffle).permute(0, 2, 1, 3).contiguous()
    x = x.view(frames, columns // shuffle, rows // shuffle, width * shuffle**2).permute(0, 2, 1, 3).contiguous()
    return x.view(frames, -1, width * shuffle**2)


def published(x: Tensor, target: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """The connector of the released model: in every iteration the full features are matched, gathered and merged."""
    size = torch.ones_like(x[..., :1])
    for r in _schedule(x.shape[1], target):
        batch, tokens, width = x.shape
        metric = x.reshape(batch, tokens, num_heads, width // num_heads).mean(2)
        metric = metric / metric.norm(dim=-1, keepdim=True)
        a, b = metric[:, ::2], metric[:, 1::2]
        best, partner = (a @ b.transpose(-1, -2)).max(dim=-1)
        order = best.argsort(dim=-1, descending=True)[..., None]
        unmerged, source = order[:, r:], order[:, :r]
        destination = partner[..., None].gather(1, source)
        x, size = _merge(x * size, unmerged, source, destination), _merge(size, unmerged, source, destination)
        x = x / size
    return x, size[..., 0]


def _merge(x: Tensor, unmerged: Tensor, source: Tensor, destination: Tensor) -> Tensor:
    even, odd, width = x[:, ::2], x[:, 1::2], x.shape[-1]
    kept = even.gather(1, unmerged.expand(-1, -1, width))
    moved = even.gather(1, source.expand(-1, -1, width))
    return torch.cat([kept, odd.scatter_add(1, destination.expand(-1, -1, width), moved)], dim=1)


def torch_best(x: Tensor, target: int, num_heads: int) -> tuple[Tensor, Tensor]:
    """Our algorithm in short torch: the schedule on an fp32 metric, the assignment composed, x merged once."""
    batch, tokens, width = x.shape
    metric = _head_mean(x.reshape(batch * tokens, num_heads, -1)).view(batch, tokens, -1)
    size = metric.new_ones(batch, tokens, 1)
    assign = torch.arange(tokens, device=x.device).expand(batch, -1)
    for r in _schedule(tokens, target):
        unit = torch.nn.functional.normalize(metric, dim=-1)
        best, partner = torch.bmm(unit[:, ::2], unit[:, 1::2].mT).max(-1)
        order = best.argsort(dim=-1, descending=True, stable=True)
        unmerged, source = order[:, r:], order[:, :r]
        new = torch.empty(metric.shape[:2], dtype=torch.long, device=x.device)
        new[:, 1::2] = torch.arange(new.shape[1] // 2, device=x.device) + unmerged.shape[1]
        even = torch.empty_like(order)
        even.scatter_(1, unmerged, torch.arange(unmerged.shape[1], device=x.device).expand_as(unmerged))
        even.scatter_(1, source, partner.gather(1, source) + unmerged.shape[1])
        new[:, ::2] = even
        left = metric.shape[1] - r
        total = size.new_zeros(batch, left, 1).scatter_add_(1, new[..., None], size)
        summed = metric.new_zeros(batch, left, metric.shape[2])
        metric = summed.scatter_add_(1, new[..., None].expand_as(metric), metric * size) / total
        size, assign = total, new.gather(1, assign)
    rows = (assign + torch.arange(batch, device=x.device)[:, None] * target).flatten()
    return _merge_once(x.reshape(-1, width), rows, size.reshape(-1, 1)).view(batch, target, width), size[..., 0]


def _head_mean(x: Tensor) -> Tensor:
    if x.device.type == "cuda" or x.dtype == torch.float32:
        return x.mean(1, dtype=torch.float32)
    # On CPU a 16-bit mean over heads is four times faster in tiles that are widened in cache.
    return torch.cat([tile.float().mean(1) for tile in x.split(64)])


def _merge_once(x: Tensor, rows: Tensor, size: Tensor) -> Tensor:
    if x.device.type == "cuda":
        summed = torch.zeros(size.shape[0], x.shape[1], device=x.device).index_add_(0, rows, x.float())
        return (summed / size).to(x.dtype)
    if x.dtype == torch.float32:
        return torch.zeros(size.shape[0], x.shape[1]).index_add_(0, rows, x).div_(size)
    # embedding_bag accumulates in fp32 and reads bf16 once: the fastest 16-bit merge that torch has on CPU.
    order = rows.argsort(stable=True)
    offsets = torch.zeros(size.shape[0], dtype=torch.long)
    offsets[1:] = size.flatten().long().cumsum(0)[:-1]
    return torch.nn.functional.embedding_bag(order, x, offsets, mode="mean")


def published_step(
    x: Tensor, metric: Tensor, in_b: Tensor, r: int, *, class_token: bool = False
) -> tuple[Tensor, Tensor]:
    """One iteration of the public loops: r tokens outside `in_b` [N] join their best partner inside; unmerged tokens by
    descending similarity, then set B. The class token is never merged away. (y [B, N - r, D], size [B, N - r])
    """
    a, b = (~in_b).nonzero()[:, 0], in_b.nonzero()[:, 0]
    unit = metric / metric.norm(dim=-1, keepdim=True)
    scores = unit[:, a] @ unit[:, b].mT
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True)[..., None]
    unmerged, source = order[:, r:], order[:, :r]
    destination = partner[..., None].gather(1, source)

    def merge(rows: Tensor) -> Tensor:
        even, odd, width = rows[:, a], rows[:, b], rows.shape[-1]
        kept = even.gather(1, unmerged.expand(-1, -1, width))
        moved = even.gather(1, source.expand(-1, -1, width))
        return torch.cat([kept, odd.scatter_add(1, destination.expand(-1, -1, width), moved)], dim=1)

    size = merge(torch.ones_like(x[..., :1]))
    return merge(x) / size, size[..., 0]


def torch_best_step(
    x: Tensor, metric: Tensor, in_b: Tensor, r: int, *, class_token: bool = False
) -> tuple[Tensor, Tensor]:
    """The same decisions on fp32 scores, and x merged in one pass with fp32 sums."""
    batch, tokens, width = x.shape
    a, b = (~in_b).nonzero()[:, 0], in_b.nonzero()[:, 0]
    unit = torch.nn.functional.normalize(metric.float(), dim=-1)
    scores = unit[:, a] @ unit[:, b].mT
    if class_token:
        scores[:, 0] = -torch.inf
    best, partner = scores.max(-1)
    order = best.argsort(dim=-1, descending=True, stable=True)
    unmerged, source = order[:, r:], order[:, :r]
    first_b = unmerged.shape[1]
    row_a = torch.empty_like(order)
    row_a.scatter_(1, unmerged, torch.arange(first_b, device=x.device).expand_as(unmerged))
    row_a.scatter_(1, source, partner.gather(1, source) + first_b)
    rows = torch.empty(batch, tokens, dtype=torch.long, device=x.device)
    rows[:, a], rows[:, b] = row_a, torch.arange(b.shape[0], device=x.device) + first_b
    left = tokens - r
    rows += torch.arange(batch, device=x.device)[:, None] * left
    ones = torch.ones(batch * tokens, 1, device=x.device)
    size = torch.zeros(batch * left, 1, device=x.device).index_add_(0, rows.flatten(), ones)
    y = _merge_once(x.reshape(-1, width), rows.flatten(), size).view(batch, left, width)
    return y.to(x.dtype), size.view(batch, left)


def tomesd_step(x: Tensor, side: int, r: int) -> tuple[Tensor, Tensor]:
    """The public package on a square image, its destinations the first token of each 2 x 2 window (no_rand).

    Raises:
        ImportError: tomesd is not installed.
    """
    from tomesd.merge import bipartite_soft_matching_random2d

    merge, _ = bipartite_soft_matching_random2d(x, side, side, 2, 2, r, no_rand=True)
    return merge(x), merge(torch.ones_like(x[..., :1]), mode="sum")[..., 0]
