# SPDX-License-Identifier: Apache-2.0
"""The call names and signatures of ring-flash-attn and of yunchang on our schedules: `from
lrc_kernels.sequence_parallel.compat.ring_flash_attn import zigzag_ring_flash_attn_func`. No line comes from either."""
