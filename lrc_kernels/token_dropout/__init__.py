# SPDX-License-Identifier: Apache-2.0
"""Token dropout inside the LLM: scoring visual tokens, choosing those that stay, and moving their rows (InternVideo2.5
section 3.1, eq. 2)."""

from lrc_kernels.token_dropout.block_scores import SCORE_BLOCK, block_factors, block_scores, block_statistics
from lrc_kernels.token_dropout.op import (
    bernoulli_op,
    drop_tokens,
    drop_tokens_rmsnorm,
    restore_tokens,
    select_op,
    select_tokens,
)
from lrc_kernels.token_dropout.plan import DropBudget, Selection, drop_budget
from lrc_kernels.token_dropout.schedule import DropoutSchedule, drop_position_ids, query_rows
from lrc_kernels.token_dropout.scores import attention_column_sums, attention_scores, scores_op

# For torch.utils.checkpoint.create_selective_checkpoint_contexts: scores and selections are kept (8 bytes a row and 4 a
# kept one), so that a layer that is computed again drops what it dropped, even where its GEMMs round otherwise.
CHECKPOINT_OPS = tuple(op.overload for op in (scores_op, select_op, bernoulli_op))

__all__ = [
    "CHECKPOINT_OPS",
    "SCORE_BLOCK",
    "DropBudget",
    "DropoutSchedule",
    "Selection",
    "attention_column_sums",
    "attention_scores",
    "block_factors",
    "block_scores",
    "block_statistics",
    "drop_budget",
    "drop_position_ids",
    "drop_tokens",
    "drop_tokens_rmsnorm",
    "query_rows",
    "restore_tokens",
    "select_tokens",
]
