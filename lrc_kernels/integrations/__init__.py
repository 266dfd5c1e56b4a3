# SPDX-License-Identifier: Apache-2.0
"""One-line adoption by other frameworks, none of which is imported before it is needed."""

from lrc_kernels.integrations.transformers import register_attention

__all__ = ["register_attention"]
