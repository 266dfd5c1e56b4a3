# SPDX-License-Identifier: Apache-2.0
"""One-line adoption by other frameworks, none of which is imported before it is needed."""

from lrc_kernels.integrations.diffusers import apply_tome_to_diffusers
from lrc_kernels.integrations.patch import Patch
from lrc_kernels.integrations.transformers import register_attention
from lrc_kernels.integrations.vit import apply_lrc_to_vit

__all__ = ["Patch", "apply_lrc_to_vit", "apply_tome_to_diffusers", "register_attention"]
