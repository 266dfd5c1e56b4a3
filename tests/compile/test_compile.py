# SPDX-License-Identifier: Apache-2.0
"""Every shipped kernel compiles for sm_80 and sm_90 within its budget, and the check finds what exceeds one."""

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TOOL = ROOT / "tools" / "compile_check.py"
pytestmark = pytest.mark.skipif(
    sys.platform != "linux" or os.uname().machine != "x86_64", reason="Triton's wheels carry cuobjdump for Linux x86-64"
)

KERNELS = """
import triton, triton.language as tl
from lrc_kernels._triton import CompileCase

@triton.jit
def copy_kernel(x_ptr, y_ptr, n, BLOCK: tl.constexpr):
    o_n = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    tl.store(y_ptr + o_n, tl.load(x_ptr + o_n, mask=o_n < n), mask=o_n < n)

@triton.jit
def dot_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    o = tl.arange(0, N)[:, None] * N + tl.arange(0, N)[None, :]
    tl.store(c_ptr + o, tl.dot(tl.load(a_ptr + o), tl.load(b_ptr + o)))

copy = {"x_ptr": "*fp32", "y_ptr": "*fp32", "n": "i32"}
dot = {"a_ptr": "*bf16", "b_ptr": "*bf16", "c_ptr": "*fp32"}
CASES = {
    "good": CompileCase("good", dot_kernel, dot, {"N": 64}, tensor_cores=True),
    "spills": CompileCase("spills", dot_kernel, dot, {"N": 128}, num_warps=1, tensor_cores=True),
    "no_dot": CompileCase("no_dot", copy_kernel, copy, {"BLOCK": 64}, tensor_cores=True),
    "greedy": CompileCase("greedy", copy_kernel, copy, {"BLOCK": 64}),
    "unbudgeted": CompileCase("unbudgeted", copy_kernel, copy, {"BLOCK": 64}),
    "shared": CompileCase("shared", dot_kernel, dot, {"N": 128}, num_warps=8),
    "misnamed": CompileCase("misnamed", copy_kernel, {"x": "*fp32"}, {"BLOCK": 64}),
}
COMPILE_CASES = list(CASES.values())
"""
BUDGETS = """
[shared_memory]
sm_80 = 40000
[registers]
good.sm_80 = 255
spills.sm_80 = 255
no_dot.sm_80 = 255
greedy.sm_80 = 2
shared.sm_80 = 255
"""


def check(*args, **env):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), **env}
    command = [sys.executable, str(TOOL), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT, timeout=900)


@pytest.mark.triton
@pytest.mark.timeout(900)
def test_shipped_kernels_stay_within_their_budgets():
    run = check()
    assert run.returncode == 0, run.stdout + run.stderr
    assert "0 failures" in run.stdout


@pytest.mark.triton
def test_each_kind_of_failure_is_found(tmp_path):
    kernels, budgets = tmp_path / "planted_kernels.py", tmp_path / "budgets.toml"
    kernels.write_text(KERNELS)
    budgets.write_text(BUDGETS)
    args = (kernels, "--budgets", budgets, "--arch", "sm_80", "--cache", tmp_path / "cache")
    run = check(*args)
    failures = [line for line in run.stdout.splitlines() if line.startswith("FAIL ")]
    assert run.returncode == 1, run.stdout + run.stderr
    for wanted in (
        r"spills sm_80: \d+ bytes of stack, budget 0",
        "no_dot sm_80: no tensor-core instruction",
        r"greedy sm_80: \d+ registers, budget 2",
        "unbudgeted sm_80: no register budget",
        r"shared sm_80: \d+ bytes of shared memory, device limit 40000",
        r"misnamed sm_80: does not compile: .*unknown arguments \['x'\], missing arguments \['x_ptr', 'y_ptr', 'n'\]",
    ):
        assert len([line for line in failures if re.search(wanted, line)]) == 1, (wanted, run.stdout)
    assert not [line for line in failures if line.startswith("FAIL good")]
    cached = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")}
    assert len(cached) == 6
    assert check(*args).stdout == run.stdout
    assert cached == {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").glob("*.json")}
    # Of another Triton than the budgets', registers and spills are named and no failure.
    budgets.write_text('triton = "3.0.0"' + BUDGETS)
    other = check(*args).stdout.splitlines()
    exceeded = [line for line in failures if re.search("budget (0|2)", line)]
    notes = [
        line.removeprefix("NOTE ").removesuffix(" (of triton 3.0.0)") for line in other if line.startswith("NOTE ")
    ]
    assert len(exceeded) == 2 and notes == [line.removeprefix("FAIL ") for line in exceeded]
    assert [line for line in other if line.startswith("FAIL ")] == [line for line in failures if line not in exceeded]


@pytest.mark.triton
def test_update_writes_limits_that_then_hold(tmp_path):
    kernels, budgets = tmp_path / "planted_kernels.py", tmp_path / "budgets.toml"
    kernels.write_text(
        KERNELS.split("CASES = {")[0] + 'COMPILE_CASES = [CompileCase("copy", copy_kernel, copy, {"BLOCK": 64})]\n'
    )
    budgets.write_text(BUDGETS)
    args = (kernels, "--budgets", budgets, "--arch", "sm_80", "--cache", tmp_path / "cache")
    assert check(*args).returncode == 1
    assert check(*args, "--update").returncode == 0
    assert check(*args, TRITON_INTERPRET="1").returncode == 0
    assert '[registers."copy"]\nsm_80 = ' in budgets.read_text()


@pytest.mark.triton
def test_no_triton_excuses_what_nvcc_made(monkeypatch):
    spec = importlib.util.spec_from_file_location("compile_check", TOOL)
    tool = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "compile_check", tool)
    spec.loader.exec_module(tool)
    spills = tool.Result("spills", "sm_90", 255, 16, 0, "", False)
    budgets = {"triton": "3.0.0", "shared_memory": {"sm_90": 0}, "registers": {"spills": {"sm_90": 255}}}
    line = "spills sm_90: 16 bytes of stack, budget 0 (registers spill)"
    assert tool.compare([spills], budgets) == ([], [line])
    assert tool.compare([spills], budgets, of_triton=False) == ([line], [])
