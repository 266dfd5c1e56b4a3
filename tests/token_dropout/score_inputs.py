# SPDX-License-Identifier: Apache-2.0
"""What the score tests share: packs with rows, the eager fp64 softmax that they are compared with, and paging."""

from __future__ import annotations

import torch

from lrc_kernels import VarlenLayout


def make_pack(lengths, rows, *, heads=4, kv_heads=2, head_dim=16, dtype=torch.float32, seed=0, device="cpu"):
    """(q, k, arguments of attention_scores); rows are (sequence, position) pairs."""
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(len(rows), heads, head_dim, generator=random).to(device, dtype)
    k = torch.randn(sum(lengths), kv_heads, head_dim, generator=random).to(device, dtype)
    pairs = torch.tensor(rows, dtype=torch.int32, device=device).view(-1, 2)
    layout = VarlenLayout(lengths, device)
    return q, k, {"cu_seqlens_k": layout, "query_sequence": pairs[:, 0], "query_position": pairs[:, 1]}


def eager_scores(q, k, cu_seqlens_k, query_sequence, query_position, *, head_reduce="mean", query_reduce="first",
                 softmax_scale=None, dtype=torch.float64):  # fmt: skip
    """The definition, written once more with torch.softmax over the keys that each row sees."""
    q, k, (rows, heads, head_dim) = q.to(dtype), k.to(dtype), q.shape
    k = k.repeat_interleave(heads // k.shape[1], dim=1)
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    starts, result = cu_seqlens_k.cu_seqlens.tolist(), torch.zeros(k.shape[0], dtype=dtype, device=k.device)
    for s in range(len(starts) - 1):
        mine = [r for r in range(rows) if query_sequence[r] == s and query_position[r] >= 0]
        if query_reduce == "first" and mine:
            mine = [min(mine, key=lambda r: (int(query_position[r]), r))]
        for r in mine:
            stop = min(starts[s + 1], starts[s] + int(query_position[r]) + 1)
            p = (torch.einsum("hd,thd->ht", q[r], k[starts[s] : stop]) * scale).softmax(-1)
            p = {"mean": p.mean(0), "sum": p.sum(0), "max": p.amax(0) if p.numel() else p.sum(0)}[head_reduce]
            result[starts[s] : stop] += p / len(mine)
    return result


def into_pages(k, layout, block_size, seed=0):
    """(paged k, block_table) with blocks in random order; rows that hold no key are NaN."""
    random = torch.Generator().manual_seed(seed)
    needed = [-(-length // block_size) for length in layout.lengths]
    order = torch.randperm(sum(needed) + 2, generator=random).tolist()
    paged = torch.full((len(order), block_size, *k.shape[1:]), torch.nan, dtype=k.dtype, device=k.device)
    table = torch.full((len(needed), max(needed, default=0) + 1), -1, dtype=torch.int32)
    starts, used = layout.cu_seqlens.tolist(), 0
    for s, length in enumerate(layout.lengths):
        for j in range(0, length, block_size):
            table[s, j // block_size] = order[used]
            count = min(block_size, length - j)
            paged[order[used], :count] = k[starts[s] + j : starts[s] + j + count]
            used += 1
    return paged, table.to(k.device)
