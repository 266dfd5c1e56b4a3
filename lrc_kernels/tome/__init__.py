# SPDX-License-Identifier: Apache-2.0
"""Token merging: an 8-frame clip of 2,048 tokens in, 128 tokens out (InternVideo2.5 section 3.1 and 3.5)."""

from lrc_kernels.tome.op import (
    compress_clips,
    head_mean,
    merge_tokens,
    plan_merge,
    size_bias,
    unmerge_tokens,
)
from lrc_kernels.tome.plan import MergeBudget, MergePlan, TokenLayout, merge_budget, merge_schedule

__all__ = [
    "MergeBudget",
    "MergePlan",
    "TokenLayout",
    "compress_clips",
    "head_mean",
    "merge_budget",
    "merge_schedule",
    "merge_tokens",
    "plan_merge",
    "size_bias",
    "unmerge_tokens",
]
