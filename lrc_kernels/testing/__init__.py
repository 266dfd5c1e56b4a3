# SPDX-License-Identifier: Apache-2.0
"""How this project tests kernels, for others to reuse: the tolerance rule, inputs by name, a pool of gloo ranks, and
Triton's interpreter made safe. Needs torch alone; hypothesis and triton only where they are used."""

from lrc_kernels.testing.inputs import INPUTS, make_input, segment_lengths, token_shapes
from lrc_kernels.testing.interpreter import Bfloat16ArithmeticError, install_interpreter
from lrc_kernels.testing.ranks import RankError, RankPool
from lrc_kernels.testing.tolerance import assert_close, assert_equal_index, ulp

__all__ = [
    "INPUTS",
    "Bfloat16ArithmeticError",
    "RankError",
    "RankPool",
    "assert_close",
    "assert_equal_index",
    "install_interpreter",
    "make_input",
    "segment_lengths",
    "token_shapes",
    "ulp",
]
