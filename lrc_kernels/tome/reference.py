# SPDX-License-Identifier: Apache-2.0
"""Bipartite soft matching (ToMe) in plain PyTorch: the specification that every kernel is checked against.

Per iteration over a segment of n tokens with metric rows m_i and weights s_i: A = even, B = odd tokens (or B =
`destination`); every A token finds its most similar B token, sim_ij = <m_i, m_j> / (|m_i| |m_j|), ties to the lowest j;
the r most similar A tokens (stable, descending) merge into their partners; a merged row is sum(s_i m_i) / sum(s_i). The
next iteration sees [unmerged A by descending similarity | B in order]. The matching has no gradient.
Source: InternVideo2.5 section 3.1 (spatiotemporal token merging), Bolya et al. 2022.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def tokens_of(x: Tensor, layout: list[int]) -> Tensor:
    """ViT output [F, prefix + h*w, D] -> clip tokens [B, N, shuffle^2 * D]; `layout` = [] leaves x as it is."""
    if not layout:
        return x
    clip_frames, h, w, s, prefix = layout
    grid = x[:, prefix:].reshape(-1, clip_frames, h // s, s, w // s, s, x.shape[-1])
    return grid.permute(0, 1, 2, 4, 3, 5, 6).reshape(-1, clip_frames * h * w // s**2, s * s * x.shape[-1])


def rows_of(tokens: Tensor, layout: list[int]) -> Tensor:
    """The inverse of `tokens_of` for packed tokens [T, shuffle^2 * D]; the skipped prefix rows become 0."""
    if not layout:
        return tokens
    clip_frames, h, w, s, prefix = layout
    width = tokens.shape[-1] // (s * s)
    grid = tokens.reshape(-1, clip_frames, h // s, w // s, s, s, width).permute(0, 1, 2, 4, 3, 5, 6)
    frames = grid.reshape(-1, h * w, width)
    return torch.cat([frames.new_zeros(frames.shape[0], prefix, width), frames], dim=1)


def empty_tokens(y: Tensor, num_tokens: int, layout: list[int]) -> Tensor:
    """Room for what `rows_of` makes of tokens with as many channels as y [*, D_token] has."""
    if not layout:
        return y.new_empty(num_tokens, y.shape[1])
    clip_frames, h, w, s, prefix = layout
    frames = num_tokens // (clip_frames * h * w // s**2) * clip_frames
    return y.new_empty(frames, prefix + h * w, y.shape[1] // s**2)


def accumulation_dtype(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def head_mean(x: Tensor, num_heads: int, layout: list[int]) -> Tensor:
    """metric[t, k] = mean over heads h of x[t, h*K + k], in fp32 (fp64 for fp64): [T_in, D_token / num_heads]."""
    tokens = tokens_of(x, layout)
    return tokens.to(accumulation_dtype(x)).unflatten(-1, (num_heads, -1)).mean(-2).flatten(0, -2)


def plan(
    metric: Tensor,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    r: Tensor,
    size: Tensor | None,
    protected: Tensor | None,
    destination: Tensor | None,
    num_out: int,
    max_seqlen: int,
    threshold: float | None,
    precision: str,
    order: str,
    zero_policy: str,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """metric [T, D] -> (assign int32 [T], size [num_out], weight [T], anchor int32 [num_out], valid bool [num_out])."""
    total = metric.shape[0]
    weight_in = torch.ones(total, device=metric.device) if size is None else size.float()
    assign = torch.zeros(total, dtype=torch.int32, device=metric.device)
    weight = torch.zeros(total, device=metric.device)
    size_out = torch.zeros(num_out, device=metric.device)
    anchor = torch.zeros(num_out, dtype=torch.int32, device=metric.device)
    valid = torch.zeros(num_out, dtype=torch.bool, device=metric.device)
    starts_in, starts_out, schedules = cu_seqlens_in.tolist(), cu_seqlens_out.tolist(), r.T.tolist()
    for segment, schedule in enumerate(schedules):
        rows = slice(starts_in[segment], starts_in[segment + 1])
        if rows.start == rows.stop:
            continue
        shield = torch.zeros(rows.stop - rows.start, dtype=torch.bool, device=metric.device)
        one = plan_segment(
            metric[rows],
            schedule,
            weight_in[rows],
            shield if protected is None else protected[rows],
            None if destination is None else destination[rows],
            threshold,
            precision,
            order,
            zero_policy,
            num_heads,
        )
        first = starts_out[segment]
        out = slice(first, first + one[1].numel())
        assign[rows], weight[rows] = one[0].int() + first, one[2]
        size_out[out], anchor[out], valid[out] = one[1], one[3].int(), True
    return assign, size_out, weight, anchor, valid


def plan_segment(
    payload: Tensor,
    schedule: list[int],
    size: Tensor,
    protected: Tensor,
    destination: Tensor | None,
    threshold: float | None,
    precision: str,
    order: str,
    zero_policy: str,
    num_heads: int,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One segment: payload [n, D] -> (assign [n], size [n_out], weight [n], anchor [n_out]), indices in the segment.

    payload is the metric itself (num_heads 1), or for "eager_bf16" the features, whose metric is taken anew each time.
    """
    n = payload.shape[0]
    assign = anchor = torch.arange(n, device=payload.device)
    weight = size.clone()
    payload = payload.to(torch.bfloat16 if precision == "eager_bf16" else accumulation_dtype(payload))
    for r in schedule:
        if r == 0:
            continue
        n = payload.shape[0]
        in_b = torch.arange(n, device=payload.device) % 2 == 1 if destination is None else destination
        a, b = (~in_b).nonzero()[:, 0], in_b.nonzero()[:, 0]
        metric = payload.unflatten(-1, (num_heads, -1)).mean(-2)
        score, partner, spoiled = best_partners(metric, a, b, protected[b], precision, zero_policy)
        ranked = score.argsort(descending=True, stable=True)
        ranked = ranked[protected[a][ranked].int().argsort(stable=True)]
        merged = ranked[:r] if threshold is None else ranked[:r][~(score[ranked[:r]] < threshold)]
        unmerged = ranked[merged.numel() :]

        new_row = torch.empty(n, dtype=torch.long, device=payload.device)
        new_row[b] = unmerged.numel() + torch.arange(b.numel(), device=payload.device)
        new_row[a[unmerged]] = torch.arange(unmerged.numel(), device=payload.device)
        new_row[a[merged]] = unmerged.numel() + partner[merged]

        masked = torch.zeros(n, dtype=torch.bool, device=payload.device)
        masked[a[merged]] = spoiled[merged]
        weight = torch.where(masked[assign], 0.0, weight)
        payload, size = weighted_mean(payload, torch.where(masked, 0.0, size), new_row, n - merged.numel())
        protected = torch.zeros(payload.shape[0], dtype=torch.bool, device=payload.device).index_put(
            (new_row[protected],), torch.ones((), dtype=torch.bool, device=payload.device)
        )
        anchor = torch.cat([anchor[a[unmerged]], anchor[b]])
        assign = new_row[assign]
    if order == "position":
        permutation = anchor.argsort()
        assign, size, anchor = permutation.argsort()[assign], size[permutation], anchor[permutation]
    return assign, size, weight, anchor


def best_partners(
    metric: Tensor, a: Tensor, b: Tensor, protected_b: Tensor, precision: str, zero_policy: str
) -> tuple[Tensor, Tensor, Tensor]:
    """For each token of set A: (best cosine similarity, its index in B, whether the token is zero or non-finite)."""
    round_ = (lambda t: t.bfloat16().to(t.dtype)) if precision == "bf16" else (lambda t: t)
    metric = round_(metric)
    metric = metric * power_near_one_over(metric)
    norm = round_(metric.norm(dim=-1, keepdim=True))
    unit = round_(metric / norm)
    healthy = (norm.isfinite() & (norm > 0))[:, 0]
    spoiled = torch.zeros_like(a, dtype=torch.bool)
    if zero_policy == "isolate":
        unit = torch.where(healthy[:, None], unit, 0.0)
        spoiled = ~healthy[a]
    similarity = round_(unit[a] @ unit[b].T)
    if zero_policy == "isolate":
        similarity = similarity.masked_fill(spoiled[:, None] | ~healthy[b][None, :], -torch.inf)
    similarity = similarity.masked_fill(protected_b[None, :], -torch.inf)
    score, partner = similarity.max(dim=1)
    # Without any partner a token that must go takes the next B token that may receive, or else the last such token.
    open_b = (~protected_b).nonzero()[:, 0]
    if open_b.numel():
        right = torch.searchsorted(b[open_b], a).clamp(max=open_b.numel() - 1)
        partner = torch.where(score == -torch.inf, open_b[right], partner)
    return score, partner, spoiled


def power_near_one_over(x: Tensor) -> Tensor:
    """A power of two for each row [n, 1] that brings its largest entry near 1, so that squares neither overflow nor
    vanish. It moves exponents alone: what is finite and not 0 has the same unit vector, bit for bit, at any length.
    """
    largest = torch.nn.functional.pad(x.abs(), (0, 1)).amax(dim=-1, keepdim=True)  # of no channels, 0
    exponent = torch.where(largest.isfinite(), torch.frexp(largest).exponent, 0)
    limit = int(-math.log2(torch.finfo(x.dtype).tiny))
    return torch.ones_like(largest).ldexp(-exponent.clamp(-limit, limit))


def weighted_mean(x: Tensor, size: Tensor, new_row: Tensor, num_rows: int) -> tuple[Tensor, Tensor]:
    """Rows [n, D] with weights [n] -> (mean [num_rows, D], total weight [num_rows]); weight 0 masks, 0 rows give 0."""
    w = size.to(x.dtype)[:, None]
    total = torch.zeros(num_rows, 1, dtype=x.dtype, device=x.device).index_add(0, new_row, w)
    weighted = torch.where(w == 0, 0.0, x * w)
    mean = torch.zeros(num_rows, x.shape[1], dtype=x.dtype, device=x.device).index_add(0, new_row, weighted) / total
    size_out = torch.zeros(num_rows, dtype=size.dtype, device=x.device).index_add(0, new_row, size)
    return torch.where(total == 0, 0.0, mean), size_out


def merge(
    x: Tensor,
    assign: Tensor,
    size: Tensor,
    weight: Tensor | None,
    cu_seqlens_in: Tensor,
    cu_seqlens_out: Tensor,
    num_out: int,
    max_seqlen_out: int,
    reduce: str,
    binary_weight: bool,
    layout: list[int],
) -> Tensor:
    """y[j] = sum (or size-weighted mean, or maximum) of w_i x_i over assign[i] = j: [num_out, D_token].

    Weight 0 masks a token and is never multiplied. A row without weight is 0.
    """
    tokens = tokens_of(x, layout).flatten(0, -2)
    dtype = accumulation_dtype(x)
    row = assign.long()
    if reduce == "max":
        alive = torch.ones_like(row, dtype=torch.bool) if weight is None else weight != 0
        lowest = torch.full((num_out, tokens.shape[1]), -torch.inf, dtype=tokens.dtype, device=x.device)
        best = lowest.scatter_reduce(0, row[alive, None].expand(-1, tokens.shape[1]), tokens[alive], "amax")
        return torch.where((size == 0)[:, None], 0.0, best).to(x.dtype)
    scaled = tokens.to(dtype)
    if weight is not None:
        w = weight.to(dtype)[:, None]
        scaled = torch.where(w == 0, 0.0, scaled * w)
    total = torch.zeros(num_out, tokens.shape[1], dtype=dtype, device=x.device).index_add(0, row, scaled)
    if reduce == "mean":
        s = size.to(dtype)[:, None]
        total = torch.where(s == 0, 0.0, total / s)
    return total.to(x.dtype)


def gather(y: Tensor, assign: Tensor, size: Tensor | None, weight: Tensor | None, layout: list[int]) -> Tensor:
    """x[i] = y[assign[i]] * w_i / size[assign[i]] (each factor only where given), laid out as the merge's input was."""
    row = assign.long()
    dtype = accumulation_dtype(y)
    scale = torch.ones(row.shape[0], dtype=dtype, device=y.device)
    if weight is not None:
        scale = scale * weight.to(dtype)
    if size is not None:
        s = size.to(dtype)[row]
        scale = torch.where(s == 0, 0.0, scale / s)
    rows = torch.where(scale[:, None] == 0, 0.0, y[row].to(dtype) * scale[:, None]).to(y.dtype)
    return rows_of(rows, layout)


def max_backward(
    grad: Tensor, x: Tensor, y: Tensor, assign: Tensor, weight: Tensor | None, layout: list[int]
) -> Tensor:
    """Gradient of the "max" merge: each output element's gradient goes to the first token that attains it."""
    tokens = tokens_of(x, layout).flatten(0, -2)
    row = assign.long()
    attains = (tokens == y[row]) | (tokens.isnan() & y[row].isnan())
    if weight is not None:
        attains &= (weight != 0)[:, None]
    index = torch.arange(row.shape[0], device=x.device)[:, None]
    candidate = torch.where(attains, index, row.shape[0])
    none = torch.full(y.shape, row.shape[0], device=x.device)
    first = none.scatter_reduce(0, row[:, None].expand_as(candidate), candidate, "amin")
    return rows_of(torch.where(first[row] == index, grad[row], 0.0), layout)
