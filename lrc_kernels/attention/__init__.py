# SPDX-License-Identifier: Apache-2.0
"""Attention over packed sequences that returns (out, lse) and takes them back: the block of a ring."""
