# SPDX-License-Identifier: Apache-2.0
"""Kernels for long-video multimodal LLMs. Import a room (`from lrc_kernels import tome`) or a name from it."""

from lrc_kernels import attention, backend, tome
from lrc_kernels.layout import VarlenLayout

__version__ = "0.1.0"
__all__ = ["VarlenLayout", "attention", "backend", "tome"]
