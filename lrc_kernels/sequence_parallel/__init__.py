# SPDX-License-Identifier: Apache-2.0
"""Exact attention over one pack that lies on many ranks: ring, Ulysses and both, for documents of any lengths."""

from lrc_kernels.sequence_parallel.plan import Block, Mask, PlanStats, SequencePlan, plan_sequence

__all__ = ["Block", "Mask", "PlanStats", "SequencePlan", "plan_sequence"]
