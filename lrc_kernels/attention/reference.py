# SPDX-License-Identifier: Apache-2.0
"""Varlen attention in plain PyTorch: the specification that every backend is checked against.

Sequence s has queries i < Lq, keys j < Lk, query head h and its KV head h // (Hq / Hkv). All in fp32 (fp64 for fp64):
    s_ij   = softmax_scale * <q_i, k_j> + key_bias_j      over the visible j (`visible`)
    lse_i  = log sum_j exp(s_ij),   P_ij = exp(s_ij - lse_i),   out_i = sum_j P_ij v_j
    dS_ij  = P_ij (<dout_i, v_j> - <dout_i, out_i> + dlse_i)
    dq_i   = softmax_scale * sum_j dS_ij k_j,   dk_j = softmax_scale * sum_i dS_ij q_i,   dv_j = sum_i P_ij dout_i
A row that sees no key has out 0, lse -inf and no gradient. The backward takes (out, lse) as they are given, so that
with those of all keys each block of keys gives its own exact share of dq and its own dk, dv.
Every argument list is that of the op's schema (`op.py`), shapes: q [Tq, Hq, K], k, v [Tk, Hkv, K], lse [Hq, Tq].
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor


def accumulation_dtype(*tensors: Tensor) -> torch.dtype:
    """fp64 where one of the tensors is fp64, else fp32."""
    return torch.float64 if any(x.dtype == torch.float64 for x in tensors) else torch.float32


def visible(distance: Tensor, causal: bool, window_left: int, window_right: int) -> Tensor:
    """Whether query i sees key j at distance = j - (i + Lk - Lq): the diagonal ends at the last key. -window_left <=
    distance <= window_right, where -1 means no bound and `causal` caps window_right at 0."""
    seen = torch.ones_like(distance, dtype=torch.bool)
    if causal:
        seen &= distance <= 0
    if window_right >= 0:
        seen &= distance <= window_right
    if window_left >= 0:
        seen &= distance >= -window_left
    return seen


def _groups(
    cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, num_heads: int, num_kv_heads: int
) -> Iterator[tuple[slice, slice, slice, int]]:
    """(query rows, key rows, query heads, KV head) for each KV head of each sequence that has queries and keys."""
    q_ends, k_ends, ratio = cu_seqlens_q.tolist(), cu_seqlens_k.tolist(), num_heads // num_kv_heads
    for s in range(len(q_ends) - 1):
        rows, keys = slice(q_ends[s], q_ends[s + 1]), slice(k_ends[s], k_ends[s + 1])
        if rows.start < rows.stop and keys.start < keys.stop:
            for head in range(num_kv_heads):
                yield rows, keys, slice(head * ratio, (head + 1) * ratio), head


def _logits(
    q: Tensor, k: Tensor, key_bias: Tensor | None, causal: bool, softmax_scale: float, window_left: int,
    window_right: int,
) -> Tensor:  # fmt: skip
    """s_ij [G, Lq, Lk] of one group: q [Lq, G, K], k [Lk, K], key_bias [Lk]; -inf where key j is not visible."""
    logits = torch.einsum("igd,jd->gij", q, k) * softmax_scale
    if key_bias is not None:
        logits = logits + key_bias.to(logits.dtype)
    diagonal = torch.arange(q.shape[0], device=q.device)[:, None] + (k.shape[0] - q.shape[0])
    distance = torch.arange(k.shape[0], device=q.device) - diagonal
    return logits.masked_fill(~visible(distance, causal, window_left, window_right), -torch.inf)


def accumulate_(
    acc: Tensor,
    m: Tensor,
    l: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> None:
    """Fold one block of keys into the un-normalised state, in place: m = max s, l = sum exp(s - m), acc = sum
    exp(s - m) v over all keys so far; acc [Tq, Hq, K], m, l [Hq, Tq]. The empty state is (0, -inf, 0)."""
    dtype = acc.dtype
    for rows, keys, heads, head in _groups(cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1]):
        bias = None if key_bias is None else key_bias[keys]
        logits = _logits(q[rows, heads].to(dtype), k[keys, head].to(dtype), bias, causal, softmax_scale, window_left,
                         window_right)  # fmt: skip
        m_old = m[heads, rows]
        m_new = torch.maximum(m_old, logits.amax(-1))
        # A row that has seen no key yet keeps m = -inf; exp(-inf - 0) = 0 there.
        shift = m_new.masked_fill(m_new == -torch.inf, 0)
        p = torch.exp(logits - shift[..., None])
        decay = torch.exp(m_old - shift)
        product = torch.einsum("gij,jd->gid", p, v[keys, head].to(dtype)).masked_fill(
            (m_new == -torch.inf)[..., None], 0
        )
        acc[rows, heads] = (acc[rows, heads].transpose(0, 1) * decay[..., None] + product).transpose(0, 1)
        l[heads, rows] = l[heads, rows] * decay + p.sum(-1)
        m[heads, rows] = m_new


def finish(acc: Tensor, m: Tensor, l: Tensor) -> tuple[Tensor, Tensor]:
    """(out, lse) of a state: out = acc / l and lse = m + log l, or 0 and -inf where no key was seen."""
    empty = l == 0
    out = torch.where(empty.T[..., None], 0, acc / l.T[..., None])
    return out, torch.where(empty, -torch.inf, m + torch.log(l))


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor]:
    """out [Tq, Hq, K] in q's dtype and lse [Hq, Tq] in the accumulation dtype."""
    dtype = accumulation_dtype(q)
    out = torch.zeros_like(q, memory_format=torch.contiguous_format)
    lse = q.new_full((q.shape[1], q.shape[0]), -torch.inf, dtype=dtype)
    for rows, keys, heads, head in _groups(cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1]):
        bias = None if key_bias is None else key_bias[keys]
        logits = _logits(q[rows, heads].to(dtype), k[keys, head].to(dtype), bias, causal, softmax_scale, window_left,
                         window_right)  # fmt: skip
        lse[heads, rows] = logits.logsumexp(-1)
        empty = (lse[heads, rows] == -torch.inf)[..., None]
        product = torch.einsum("gij,jd->igd", logits.softmax(-1).masked_fill(empty, 0), v[keys, head].to(dtype))
        out[rows, heads] = product.masked_fill(empty.transpose(0, 1), 0).to(q.dtype)
    return out, lse


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    dlse: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    key_bias: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    causal: bool,
    softmax_scale: float,
    window_left: int,
    window_right: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """dq, dk, dv in the dtypes of q, k, v; `out` and `lse` are the final ones, of this block of keys and all others."""
    dtype = accumulation_dtype(q)
    dq, dk, dv = (torch.zeros_like(x, dtype=dtype, memory_format=torch.contiguous_format) for x in (q, k, v))
    for rows, keys, heads, head in _groups(cu_seqlens_q, cu_seqlens_k, q.shape[1], k.shape[1]):
        q_igd, dout_igd, out_igd = (x[rows, heads].to(dtype) for x in (q, dout, out))
        k_jd, v_jd = k[keys, head].to(dtype), v[keys, head].to(dtype)
        bias = None if key_bias is None else key_bias[keys]
        logits = _logits(q_igd, k_jd, bias, causal, softmax_scale, window_left, window_right)
        p = torch.exp(logits - lse[heads, rows, None].to(dtype)).masked_fill(logits == -torch.inf, 0)
        correction = (dout_igd * out_igd).sum(-1).T
        if dlse is not None:
            correction = correction - dlse[heads, rows].to(dtype)
        ds = p * (torch.einsum("igd,jd->gij", dout_igd, v_jd) - correction[..., None]) * softmax_scale
        # 0 * NaN: a row that sees no key of this block must not spread what its dout or out holds.
        ds = ds.masked_fill(logits == -torch.inf, 0)
        dq[rows, heads] = torch.einsum("gij,jd->igd", ds, k_jd)
        dk[keys, head] = torch.einsum("gij,igd->jd", ds, q_igd)
        dv[keys, head] = torch.einsum("gij,igd->jd", p, dout_igd)
    return dq.to(q.dtype), dk.to(k.dtype), dv.to(v.dtype)


def merge_partials(out: Tensor, lse: Tensor, out_block: Tensor, lse_block: Tensor) -> tuple[Tensor, Tensor]:
    """Attention over two disjoint sets of keys from that over each: out [T, H, K], lse [H, T], in fp32 (fp64 where an
    input is fp64). With m = max(lse, lse_block), a = exp(lse - m), b = exp(lse_block - m):
        out = (a out + b out_block) / (a + b),   lse = m + log(a + b)
    A row whose lse is -inf or +inf (each means "no key" in some library) has weight 0, whatever its out holds; so has
    one whose lse is NaN beside a finite one. Two rows of weight 0 give 0 and -inf, or NaN where either lse is NaN.
    """
    dtype = accumulation_dtype(out, lse, out_block, lse_block)
    lse, lse_block = lse.to(dtype), lse_block.to(dtype)
    spoiled = (lse.isnan() & ~lse_block.isfinite()) | (lse_block.isnan() & ~lse.isfinite())
    first, second = (x.masked_fill(~x.isfinite(), -torch.inf) for x in (lse, lse_block))
    m = torch.maximum(first, second)
    shift = m.masked_fill(m == -torch.inf, 0)
    a, b = torch.exp(first - shift), torch.exp(second - shift)
    total = a + b
    merged_lse = torch.where(spoiled, torch.nan, torch.where(total == 0, -torch.inf, shift + torch.log(total)))
    merged = torch.zeros_like(out, dtype=dtype)
    for weight, partial in ((a, out), (b, out_block)):
        weight_thk = (weight / total.masked_fill(total == 0, 1)).T[..., None]
        merged = merged + torch.where(weight_thk > 0, weight_thk * partial.to(dtype), 0)
    return torch.where(spoiled.T[..., None], torch.nan, merged).contiguous(), merged_lse.contiguous()
