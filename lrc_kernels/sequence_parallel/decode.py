# SPDX-License-Identifier: Apache-2.0
"""Attention of one new row per sequence over keys that lie on many ranks: each rank attends to those it holds, and the
partial results are merged on all of them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.checks import check_tensor
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.sequence_parallel.blocks import Keys, Partial, merge
from lrc_kernels.sequence_parallel.comm import AllGather, Schedule
from lrc_kernels.sequence_parallel.mesh import degree_of, ranks_of


@torch.compiler.disable
def sequence_parallel_decode_attention(
    q: Tensor,
    keys: Sequence[Tensor],
    values: Sequence[Tensor],
    mesh: DeviceMesh,
    *,
    softmax_scale: float | None = None,
) -> Tensor:
    """Attention of one query row per sequence over all its keys, wherever they lie. No gradient. A collective.

    A rank sends its partial result, K + 1 numbers in fp32 (fp64 for fp64) for each head and sequence, to each other
    one, and no keys. All merge in the order of ranks, so that all get the same bits.

    Args:
        q: [S, Hq, K], positions applied, the same on every rank.
        keys, values: for each sequence [L_local, Hkv, K], the rows that this rank holds, none of them later than the
            query; in any order, also none at all. Views of a cache: nothing is copied.
        mesh: `make_mesh`, or one that has dimensions "ring" and "ulysses".
        softmax_scale: None = K ** -0.5.

    Returns:
        [S, Hq, K] in q's dtype.

    Raises:
        TypeError, ValueError: shapes, dtypes or devices that do not fit each other. PeerError: a rank died or stalled
            (gloo).

    Source: Dao et al. 2023 (Flash-Decoding), over ranks instead of thread blocks.
    """
    check_tensor("q", q, dims=(3,))
    for name, held in (("keys", keys), ("values", values)):
        if not isinstance(held, (list, tuple)):
            raise TypeError(f"{name} must be a list or tuple of tensors, got {type(held).__name__}")
        if len(held) != q.shape[0]:
            raise ValueError(f"{name} must hold one tensor for each of {q.shape[0]} sequences, got {len(held)}")
        for index, x in enumerate(held):
            check_tensor(f"{name}[{index}]", x, dims=(3,), dtypes=(q.dtype,), like=q)
    for index, (k, v) in enumerate(zip(keys, values, strict=True)):
        if v.shape != k.shape:
            raise ValueError(
                f"values[{index}] must have the shape of keys[{index}] {list(k.shape)}, got {list(v.shape)}"
            )
        if q.shape[1] % max(k.shape[1], 1) or k.shape[1] == 0 or k.shape[2] != q.shape[2]:
            raise ValueError(
                f"keys[{index}] must have heads that divide those of q and its head dim, {list(q.shape[1:])}, got "
                f"{list(k.shape[1:])}"
            )
    sizes = {axis: degree_of(mesh, axis) for axis in ("ulysses", "ring")}
    if not len(q):
        return q.clone()
    with torch.no_grad():
        outs, lses = zip(
            *(_attend(q[s : s + 1], keys[s], values[s], softmax_scale) for s in range(len(q))), strict=True
        )
        return ranks_of(mesh).run("decode attention", _merge(torch.cat(outs), torch.cat(lses, 1), sizes)).to(q.dtype)


def _attend(q: Tensor, k: Tensor, v: Tensor, softmax_scale: float | None) -> tuple[Tensor, Tensor]:
    total = Partial(q)
    layouts = {"cu_seqlens_q": VarlenLayout([1], q.device), "cu_seqlens_k": VarlenLayout([k.shape[0]], q.device)}
    total.add(slice(0, 1), q, Keys(k, v, None), causal=False, softmax_scale=softmax_scale, **layouts)
    return total.finish()


def _merge(out: Tensor, lse: Tensor, sizes: dict[str, int]) -> Schedule[Tensor]:
    parts = torch.cat([out, lse.T[..., None]], 2)[None]
    for step, (axis, size) in enumerate(sizes.items()):
        if size > 1:
            arriving = yield AllGather(axis, parts, step)
            parts = yield arriving
    out, lse = parts[0, ..., :-1], parts[0, ..., -1].T
    for part in parts[1:]:
        out, lse = merge(out, lse, part[..., :-1], part[..., -1].T)
    return out
