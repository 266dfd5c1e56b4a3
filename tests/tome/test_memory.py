# SPDX-License-Identifier: Apache-2.0
"""Peak memory of compress_clips at a real size, measured as resident memory of a process of its own."""

import os
import subprocess
import sys

import pytest

PROGRAM = """
import resource, torch
from lrc_kernels import backend
from lrc_kernels.tome import compress_clips
batch, tokens, target, dtype = {batch}, {tokens}, {target}, torch.{dtype}
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
x = torch.empty(batch, tokens, 4096, dtype=dtype)
for clip in x:
    for row in clip.split(128):
        row.copy_(torch.randn(row.shape))
compress_clips(x[:1, :64], 16, 32)  # what the first call allocates once is not the op's
before = peak()
with backend.record() as ran:
    y = compress_clips(x, target, 32)
assert ran == [("tome_compress_fwd", "cpu")], ran
print((peak() - before) / (x.numel() * x.element_size()))
"""


@pytest.mark.parametrize(("batch", "tokens", "target"), [(8, 1024, 64), (4, 2048, 128)])
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_peak_memory_is_a_fraction_of_the_input(batch, tokens, target, dtype):
    program = PROGRAM.format(batch=batch, tokens=tokens, target=target, dtype=dtype)
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert float(run.stdout) <= 0.25
