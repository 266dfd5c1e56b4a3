# SPDX-License-Identifier: Apache-2.0
"""Which implementation runs: forced, automatic, recorded, and refused with a reason."""

import subprocess
import sys

import pytest
import torch

from lrc_kernels import backend
from lrc_kernels.tome import compress_clips, head_mean, plan_merge


def test_record_lists_every_op_in_order():
    x = torch.randn(1, 16, 8)
    with backend.use_backend("reference"), backend.record() as ran:
        compress_clips(x, 4, 2)
        compress_clips(x, 4, 2, precision="eager_bf16")
    names = ("compress", "head_mean", "plan", "merge")
    assert ran == [(f"tome_{name}_fwd", "reference") for name in names]


def test_record_nests_and_stops():
    x = torch.randn(1, 4, 8)
    with backend.use_backend("reference"), backend.record() as outer:
        with backend.record() as inner:
            head_mean(x, 2)
        head_mean(x, 2)
    head_mean(x, 2)
    assert (len(outer), len(inner)) == (2, 1)


def test_forced_backend_that_cannot_take_a_call_says_why():
    metric = torch.randn(1, 8, 4)
    with backend.use_backend("cuda"), pytest.raises(RuntimeError, match="'cuda' was forced but cannot take this call"):
        plan_merge(metric, target=4)
    with backend.use_backend("cpu"), pytest.raises(RuntimeError, match="precision"):
        plan_merge(metric, target=4, precision="eager_bf16")


def test_automatic_choice_reaches_the_reference_for_what_no_kernel_takes():
    with backend.record() as ran:
        plan_merge(torch.randn(1, 8, 4), target=4, precision="eager_bf16")
    assert ran == [("tome_plan_fwd", "reference")]


def test_unknown_backend():
    with pytest.raises(ValueError, match="'gpu'"), backend.use_backend("gpu"):
        raise AssertionError("the context must not be entered")


def test_use_backend_restores_after_an_error():
    with pytest.raises(KeyError), backend.use_backend("reference"):
        raise KeyError
    assert backend.forced_backend() is None


@pytest.mark.parametrize(("value", "returncode"), [("reference", 0), ("nonsense", 1)])
def test_environment_variable(value, returncode):
    program = (
        "import torch; from lrc_kernels import backend, tome\n"
        "with backend.record() as ran: tome.head_mean(torch.ones(1, 2, 4), 2)\n"
        "print(ran)"
    )
    run = subprocess.run([sys.executable, "-c", program], env=_env(LRC_BACKEND=value), capture_output=True, text=True)
    assert run.returncode == returncode, run.stderr
    if returncode == 0:
        assert run.stdout.strip() == "[('tome_head_mean_fwd', 'reference')]"
    else:
        assert "LRC_BACKEND" in run.stderr and "'nonsense'" in run.stderr


def test_import_works_without_triton():
    program = (
        "import sys; sys.modules['triton'] = None\n"
        "import lrc_kernels, torch; from lrc_kernels import tome\n"
        "print(tome.compress_clips(torch.randn(1, 8, 4), 4, 2).shape)"
    )
    run = subprocess.run([sys.executable, "-c", program], env=_env(), capture_output=True, text=True)
    assert run.returncode == 0, run.stderr
    assert "[1, 4, 4]" in run.stdout


def test_describe_names_every_op_and_backend():
    table = backend.describe()
    assert set(table) == set(backend.OPS)
    assert all(set(row) == set(backend.ORDER) and row["reference"] is None for row in table.values())


def _env(**extra):
    import os

    return {k: v for k, v in os.environ.items() if not k.startswith("LRC_")} | extra
