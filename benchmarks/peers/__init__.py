# SPDX-License-Identifier: Apache-2.0
"""What a kernel is measured against: the public algorithm step by step, and the best short torch form of ours."""
