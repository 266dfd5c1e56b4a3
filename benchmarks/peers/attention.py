# SPDX-License-Identifier: Apache-2.0
"""Attention restated: as public modelling code writes it (`published`), and as torch does it best (`torch_best`)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def published(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """Eager causal attention, document by document: KV heads repeated, scores in the input dtype, softmax in fp32.

    q [T, Hq, K], k, v [T, Hkv, K] -> [T, Hq, K]. It holds the scores [Hq, n, n] of one document at a time.
    """
    ratio = q.shape[1] // k.shape[1]
    outputs = []
    for q_doc, k_doc, v_doc in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_hnk, k_hnk, v_hnk = (x.transpose(0, 1) for x in (q_doc, k_doc, v_doc))
        k_hnk, v_hnk = k_hnk.repeat_interleave(ratio, 0), v_hnk.repeat_interleave(ratio, 0)
        scores = (q_hnk @ k_hnk.mT) * q.shape[2] ** -0.5
        hidden = torch.ones(scores.shape[1:], dtype=torch.bool, device=q.device).triu(1)
        weights = scores.masked_fill(hidden, torch.finfo(q.dtype).min).softmax(-1, dtype=torch.float32).to(q.dtype)
        outputs.append((weights @ v_hnk).transpose(0, 1))
    return torch.cat(outputs)


def published_bytes(num_heads: int, lengths: Sequence[int], element_size: int) -> int:
    """The least memory that `published` and its backward hold for scores: those of the longest document, three times
    in the input dtype and once in fp32."""
    return num_heads * max(lengths) ** 2 * (3 * element_size + 4)


def torch_best(q: Tensor, k: Tensor, v: Tensor, lengths: Sequence[int]) -> Tensor:
    """scaled_dot_product_attention, document by document, by whichever kernel torch picks. Shapes as `published`."""
    outputs = []
    for rows in zip(q.split(lengths), k.split(lengths), v.split(lengths), strict=True):
        q_doc, k_doc, v_doc = (x.transpose(0, 1)[None] for x in rows)
        out = torch.nn.functional.scaled_dot_product_attention(q_doc, k_doc, v_doc, is_causal=True, enable_gqa=True)
        outputs.append(out[0].transpose(0, 1))
    return torch.cat(outputs)
