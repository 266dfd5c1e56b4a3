# SPDX-License-Identifier: Apache-2.0
"""ring-flash-attn's ring and zigzag functions, dense and varlen, and its stripe functions, dense, with q, k, v apart or
packed: this rank's rows in, this rank's rows out; and its llama3 functions.

`deterministic` is accepted and needs nothing: sums have a fixed order wherever the attention backend's do.
"""

from __future__ import annotations

from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor, distributed
from torch.distributed.device_mesh import DeviceMesh

from lrc_kernels.sequence_parallel.compat.llama3 import attend as gathered
from lrc_kernels.sequence_parallel.compat.llama3 import prepare_cu_seqlens
from lrc_kernels.sequence_parallel.compat.local import attend, refuse

Result = Tensor | tuple[Tensor, Tensor, None]


def dense(
    cut: str, q: Tensor, k: Tensor, v: Tensor, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, group: Any = None,
) -> Result:  # fmt: skip
    """q, k, v [B, S / R, H, K] -> out alike; with `return_attn_probs` (out, lse [B, H, S / R], None).

    Raises:
        ValueError: dropout, a window or slopes, or rows that the cuts do not divide.
    """
    refuse(dropout_p, window_size, alibi_slopes)
    mesh, size = _mesh(group, q.device.type)
    batch, rows, heads = q.shape[:3]
    lengths = (rows * size,) * batch
    out, lse = attend(q.flatten(0, 1), k.flatten(0, 1), v.flatten(0, 1), lengths, mesh, (size, 1), cut=cut,
                      causal=causal, softmax_scale=softmax_scale)  # fmt: skip
    out = out.view(q.shape)
    return (out, lse.view(heads, batch, rows).transpose(0, 1), None) if return_attn_probs else out


def dense_kvpacked(cut: str, q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Result:
    """kv [B, S / R, 2, H, K]."""
    k, v = kv.unbind(2)
    return dense(cut, q, k, v, *options, **named)


def dense_qkvpacked(cut: str, qkv: Tensor, *options: Any, **named: Any) -> Result:
    """qkv [B, S / R, 3, H, K]."""
    q, k, v = qkv.unbind(2)
    return dense(cut, q, k, v, *options, **named)


def varlen(
    cut: str, q: Tensor, k: Tensor, v: Tensor, cu_seqlens: Tensor, max_seqlen: int, dropout_p: float = 0.0,
    softmax_scale: float | None = None, causal: bool = False, window_size: tuple[int, int] = (-1, -1),
    alibi_slopes: Any = None, deterministic: bool = False, return_attn_probs: bool = False, group: Any = None,
) -> Result:  # fmt: skip
    """q, k, v [T / R, H, K], cu_seqlens of the local rows (each sequence has 1 / R of its rows here; read on the host,
    which synchronises) -> out alike; with `return_attn_probs` (out, lse [H, T / R], None).

    Raises:
        ValueError: dropout, a window or slopes, or rows that the cuts do not divide.
    """
    refuse(dropout_p, window_size, alibi_slopes)
    mesh, size = _mesh(group, q.device.type)
    lengths = tuple(length * size for length in cu_seqlens.diff().tolist())
    out, lse = attend(q, k, v, lengths, mesh, (size, 1), cut=cut, causal=causal, softmax_scale=softmax_scale)
    return (out, lse, None) if return_attn_probs else out


def varlen_kvpacked(cut: str, q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Result:
    """kv [T / R, 2, H, K]."""
    k, v = kv.unbind(1)
    return varlen(cut, q, k, v, *options, **named)


def varlen_qkvpacked(cut: str, qkv: Tensor, *options: Any, **named: Any) -> Result:
    """qkv [T / R, 3, H, K]."""
    q, k, v = qkv.unbind(1)
    return varlen(cut, q, k, v, *options, **named)


def llama3(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int,
    heads_k_stride: int, local_k_slice: slice, dropout_p: float = 0.0, softmax_scale: float | None = None,
    causal: bool = False, window_size: tuple[int, int] = (-1, -1), alibi_slopes: Any = None,
    deterministic: bool = False, return_attn_probs: bool = False, group: Any = None,
) -> Result:  # fmt: skip
    """q, k, v [T / R, H, K], the rest as `llama3_flash_attn_prepare_cu_seqlens` gives it -> out like q; with
    `return_attn_probs` (out, lse [H, T / R], None), lse without gradient. All heads are gathered at once, whatever
    `heads_k_stride`.

    Raises:
        ValueError: dropout, a window or slopes.
    """
    refuse(dropout_p, window_size, alibi_slopes)
    options = {"cu_seqlens_q": cu_seqlens_q, "cu_seqlens_k": cu_seqlens_k, "max_seqlen_q": max_seqlen_q,
               "max_seqlen_k": max_seqlen_k, "causal": causal, "softmax_scale": softmax_scale}  # fmt: skip
    out, lse = gathered(q, k, v, _mesh(group, q.device.type)[0], local_k_slice, options)
    return (out, lse, None) if return_attn_probs else out


def llama3_kvpacked(q: Tensor, kv: Tensor, *options: Any, **named: Any) -> Result:
    """kv [T / R, 2, H, K]."""
    k, v = kv.unbind(1)
    return llama3(q, k, v, *options, **named)


def llama3_qkvpacked(qkv: Tensor, *options: Any, **named: Any) -> Result:
    """qkv [T / R, 3, H, K]."""
    q, k, v = qkv.unbind(1)
    return llama3(q, k, v, *options, **named)


llama3_flash_attn_prepare_cu_seqlens = prepare_cu_seqlens
llama3_flash_attn_varlen_func = llama3
llama3_flash_attn_varlen_kvpacked_func = llama3_kvpacked
llama3_flash_attn_varlen_qkvpacked_func = llama3_qkvpacked
ring_flash_attn_func = partial(dense, "contiguous")
ring_flash_attn_kvpacked_func = partial(dense_kvpacked, "contiguous")
ring_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "contiguous")
ring_flash_attn_varlen_func = partial(varlen, "contiguous")
ring_flash_attn_varlen_kvpacked_func = partial(varlen_kvpacked, "contiguous")
ring_flash_attn_varlen_qkvpacked_func = partial(varlen_qkvpacked, "contiguous")
stripe_flash_attn_func = partial(dense, "stripe")
stripe_flash_attn_kvpacked_func = partial(dense_kvpacked, "stripe")
stripe_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "stripe")
zigzag_ring_flash_attn_func = partial(dense, "zigzag")
zigzag_ring_flash_attn_kvpacked_func = partial(dense_kvpacked, "zigzag")
zigzag_ring_flash_attn_qkvpacked_func = partial(dense_qkvpacked, "zigzag")
zigzag_ring_flash_attn_varlen_func = partial(varlen, "zigzag")
zigzag_ring_flash_attn_varlen_kvpacked_func = partial(varlen_kvpacked, "zigzag")
zigzag_ring_flash_attn_varlen_qkvpacked_func = partial(varlen_qkvpacked, "zigzag")


@torch.compiler.disable
def _mesh(group: Any, device_type: str) -> tuple[DeviceMesh, int]:
    """The ring that `group` (None = all ranks) is, and its size."""
    mesh = _mesh_of(distributed.group.WORLD if group is None else group, device_type)
    return mesh, mesh.size()


@lru_cache(maxsize=8)
def _mesh_of(group: Any, device_type: str) -> DeviceMesh:
    return DeviceMesh.from_group(group, device_type, mesh_dim_names=("ring",))
