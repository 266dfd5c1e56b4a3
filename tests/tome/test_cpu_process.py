# SPDX-License-Identifier: Apache-2.0
"""What only a process of its own can show of the C++ CPU kernels: reads past an input, and work after a fork."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lrc_kernels import native

if native.cpu_unavailable() is not None:
    pytest.skip(native.cpu_unavailable(), allow_module_level=True)

GUARD = """
import ctypes, mmap, torch
from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.tome import head_mean, merge_budget, merge_tokens, plan_merge, unmerge_tokens
libc, page = ctypes.CDLL(None, use_errno=True), mmap.PAGESIZE
memory = mmap.mmap(-1, 33 * page)
start = ctypes.addressof(ctypes.c_char.from_buffer(memory))
assert libc.mprotect(ctypes.c_void_p(start + 32 * page), page, 0) == 0
def at_the_end(x):
    y = torch.frombuffer(memory, dtype=x.dtype, count=x.numel(), offset=32 * page - x.numel() * x.element_size())
    return y.view(x.shape).copy_(x)
from lrc_kernels import _C
for isa in _C.cpu_isas():
    _C.set_cpu_isa(isa)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for head_dim in (1, 3, 16, 20, 88):
            with use_backend("cpu"):
                x = at_the_end(torch.randn(9, 3 * head_dim).to(dtype))
                metric = head_mean(x, 3)
                plan = plan_merge(at_the_end(metric), merge_budget(VarlenLayout([9]), target=2))
                y = merge_tokens(at_the_end(x.clone()), plan)
                unmerge_tokens(at_the_end(y), plan)
"""


@pytest.mark.skipif(sys.platform != "linux", reason="guards a page with Linux's mprotect")
def test_nothing_is_read_past_the_end_of_an_input():
    """Each input ends where a page begins that may not be read: one element too far kills the process."""
    assert subprocess.run([sys.executable, "-c", GUARD], timeout=60).returncode == 0


FORK = """
import os, sys, torch
from lrc_kernels.backend import use_backend
from lrc_kernels.tome import compress_clips
x = torch.randn(4, 64, 32)
with use_backend("cpu"):
    torch.set_num_threads(2)
    y = compress_clips(x, 16, 2)
    child = os.fork()
    if child == 0:
        torch.set_num_threads(1)
        os._exit(0 if torch.equal(compress_clips(x, 16, 2), y) else 3)
    sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""


@pytest.mark.skipif(not hasattr(sys, "getdlopenflags"), reason="fork needs a Unix system")
def test_one_thread_after_a_fork_does_not_hang():
    assert subprocess.run([sys.executable, "-c", FORK], timeout=60).returncode == 0
