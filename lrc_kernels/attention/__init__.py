# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences that returns (out, lse) and takes them back: the block of a ring."""

from lrc_kernels.attention.op import varlen_attention, varlen_attention_backward, varlen_attention_forward
from lrc_kernels.attention.partials import AttentionState, merge_partials

__all__ = [
    "AttentionState",
    "merge_partials",
    "varlen_attention",
    "varlen_attention_backward",
    "varlen_attention_forward",
]
