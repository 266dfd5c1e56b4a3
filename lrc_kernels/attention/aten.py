# SPDX-License-Identifier: Apache-2.0
"""Attention on CUDA by the kernels that torch ships: its flash attention, which
`torch.nn.attention.activate_flash_attention_impl` re-routes to newer ones, and cuDNN's for packs of equal lengths.
Arguments of the ops' schemas in, their results out."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lrc_kernels.attention import vendors

ATEN = torch.ops.aten


def unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    if not torch.backends.cuda.is_flash_attention_available():
        return "this torch was built without flash attention"
    return None


def supports_forward(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None,
                     *rest: Any) -> str | None:  # fmt: skip
    return vendors.declines(q, key_bias, capability=(8, 0))


def supports_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
                      cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, *rest: Any) -> str | None:  # fmt: skip
    return vendors.declines(q, key_bias, capability=(8, 0), dlse=dlse)


def forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None,
            max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float, window_left: int,
            window_right: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0 or k.shape[0] == 0:
        return vendors.empty_forward(q)
    out, lse, *_ = ATEN._flash_attention_forward(
        *vendors.rows_contiguous(q, k, v),
        *(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal, False),
        scale=softmax_scale,
        window_size_left=window_left,
        window_size_right=window_right,
    )
    return vendors.normalised(out, lse)


def backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
             cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None, max_seqlen_q: int, max_seqlen_k: int,
             causal: bool, softmax_scale: float, window_left: int,
             window_right: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    if q.shape[0] == 0 or k.shape[0] == 0:
        return vendors.empty_backward(q, k, v)
    # The state of a random generator that nothing reads, because there is no dropout.
    rng_state = torch.zeros(2, dtype=torch.uint64, device=q.device)
    gradients = ATEN._flash_attention_backward(
        *vendors.rows_contiguous(dout.to(q.dtype), q, k, v, out.to(q.dtype)),
        *(vendors.lse_for_backward(lse), cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 0.0, causal),
        *(rng_state, torch.empty(0, device=q.device)),
        scale=softmax_scale,
        window_size_left=window_left,
        window_size_right=window_right,
    )
    dq, dk, dv = (x.contiguous() for x in gradients)
    return dq, dk, dv


def cudnn_unavailable() -> str | None:
    if not torch.cuda.is_available():
        return "torch sees no CUDA device"
    return None if torch.backends.cudnn.is_available() else "this torch was built without cuDNN"


def _cudnn_declines(q: Tensor, k: Tensor, cu_q: Tensor, cu_k: Tensor, key_bias: Tensor | None, max_q: int, max_k: int,
                    causal: bool, softmax_scale: float, window_left: int, window_right: int) -> str | None:  # fmt: skip
    num_sequences = cu_q.shape[0] - 1
    if q.shape[0] == 0 or k.shape[0] == 0:
        return "it takes no empty q or k"
    if max_q * num_sequences != q.shape[0] or max_k * num_sequences != k.shape[0]:
        return "all sequences must have the same length"
    if causal and max_q != max_k:
        return f"causal is top-left aligned there, so q and k must be equally long, got {max_q} and {max_k}"
    if q.shape[1] != k.shape[1]:
        return f"q and k must have as many heads, got {q.shape[1]} and {k.shape[1]}"
    if window_left >= 0 or (window_right >= 0 and not causal):
        return "it takes no window"
    return vendors.declines(q, key_bias, capability=(8, 0), head_dim=128)


def cudnn_supports_forward(q: Tensor, k: Tensor, v: Tensor, *pack: Any) -> str | None:
    return _cudnn_declines(q, k, *pack)


def cudnn_supports_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor,
                            dlse: Tensor | None, *pack: Any) -> str | None:  # fmt: skip
    if dlse is not None:
        return "it takes no gradient of the lse"
    if torch.are_deterministic_algorithms_enabled():
        return "its backward is not deterministic, which torch.use_deterministic_algorithms asks for"
    return _cudnn_declines(q, k, *pack)


def _dense(x: Tensor, num_sequences: int) -> Tensor:
    """Packed [S*L, H, K] as [S, H, L, K], in place."""
    return x.unflatten(0, (num_sequences, -1)).transpose(1, 2)


def _packed(x: Tensor) -> Tensor:
    """[S, H, L, K] as packed [S*L, H, K]."""
    return x.transpose(1, 2).flatten(0, 1).contiguous()


def cudnn_forward(q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor,
                  key_bias: Tensor | None, max_seqlen_q: int, max_seqlen_k: int, causal: bool, softmax_scale: float,
                  window_left: int, window_right: int) -> tuple[Tensor, Tensor]:  # fmt: skip
    num_sequences = cu_seqlens_q.shape[0] - 1
    q_shlk, k_shlk, v_shlk = (_dense(x, num_sequences) for x in vendors.rows_contiguous(q, k, v))
    out, lse, *_ = ATEN._scaled_dot_product_cudnn_attention(
        q_shlk, k_shlk, v_shlk, None, True, 0.0, causal, False, scale=softmax_scale
    )
    return _packed(out), _packed(lse.reshape(*lse.shape[:3], 1))[..., 0].T.contiguous()


def cudnn_backward(dout: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, dlse: Tensor | None,
                   cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, key_bias: Tensor | None, max_seqlen_q: int,
                   max_seqlen_k: int, causal: bool, softmax_scale: float, window_left: int,
                   window_right: int) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    num_sequences = cu_seqlens_q.shape[0] - 1
    rows = vendors.rows_contiguous(dout.to(q.dtype), q, k, v, out.to(q.dtype))
    lse_shlk = _dense(vendors.lse_for_backward(lse).T[..., None], num_sequences).contiguous()
    # The seed and offset of a random generator that nothing reads, because there is no dropout.
    seed = torch.zeros((), dtype=torch.int64, device=q.device)
    gradients = ATEN._scaled_dot_product_cudnn_attention_backward(
        *(_dense(x, num_sequences) for x in rows),
        *(lse_shlk, seed, seed, None, None, None, max_seqlen_q, max_seqlen_k, 0.0, causal),
        scale=softmax_scale,
    )
    dq, dk, dv = (_packed(x) for x in gradients)
    return dq, dk, dv
