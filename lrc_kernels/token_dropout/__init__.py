# SPDX-License-Identifier: Apache-2.0
"""Token dropout inside the LLM: how much attention each key receives (InternVideo2.5 section 3.1)."""

from lrc_kernels.token_dropout.scores import attention_column_sums, attention_scores

__all__ = ["attention_column_sums", "attention_scores"]
