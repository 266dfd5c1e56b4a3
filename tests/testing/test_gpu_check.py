# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check.sh: its dry run proves every step, and a real run survives steps that fail or hang.

The real run is driven with stand-ins for python, nvidia-smi and compute-sanitizer that record how they were called.
"""

import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STEPS = ["machine", "build", "report", "test_ops", "test_rest", "bench", "bench_report", "model", "prefill", "ablation"]
STEPS += ["memcheck_cuda", "memcheck_triton", "racecheck_cuda", "racecheck_triton"]
pytestmark = pytest.mark.skipif(shutil.which("timeout") is None, reason="no coreutils `timeout`")


def gpu_check(*args, path=None, python=sys.executable):
    environment = {**os.environ, "PYTHON": str(python)}
    if path is not None:
        environment["PATH"] = f"{path}{os.pathsep}{environment['PATH']}"
    command = ["bash", str(SCRIPT), *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=250)


def steps(out):
    """{step: (exit code, rest of its line)} of the summary."""
    lines = [line.split(None, 5) for line in (out / "summary.txt").read_text().splitlines() if " exit " in line]
    return {line[0]: (int(line[2]), line[5]) for line in lines}


def logs(out):
    with tarfile.open(out / "results.tar.gz") as tar:
        return {Path(member.name).name: tar.extractfile(member).read().decode() for member in tar if member.isfile()}


@pytest.fixture
def machine(tmp_path):
    """A PATH folder and a python that pretend to be a GPU machine; `plan` maps a part of a command to what it does."""

    def build(plan):
        folder = tmp_path / "bin"
        folder.mkdir()
        cases = "".join(f"  *{what}*) {action} ;;\n" for what, action in plan.items())
        (folder / "python").write_text(f'#!/bin/bash\ncase "$*" in\n{cases}  *) echo "ran $*" ;;\nesac\n')
        (folder / "nvidia-smi").write_text("#!/bin/bash\necho a GPU\n")
        (folder / "compute-sanitizer").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
        # Deadlines of minutes become one second.
        (folder / "timeout").write_text(f'#!/bin/bash\nshift 2\nexec {shutil.which("timeout")} --kill-after=1 2 "$@"\n')
        for file in folder.iterdir():
            file.chmod(0o755)
        return folder

    return build


def test_bad_arguments(tmp_path):
    for args, message in (
        ((), "OUT_DIR is missing"),
        ((tmp_path, "--only", "build,tests"), "unknown stage tests"),
        ((tmp_path, "--fast"), "unknown option --fast"),
        ((tmp_path, "--only"), "--only needs a list"),
        ((tmp_path, "second"), "one OUT_DIR"),
    ):
        run = gpu_check(*args)
        assert run.returncode == 2 and message in run.stderr and run.stderr.startswith("usage:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(tmp_path):
    run = gpu_check(tmp_path, "--only", "build")
    assert run.returncode == 1 and "no CUDA device" in run.stdout and "--dry-run" in run.stdout


def test_dry_run_proves_every_stage(tmp_path, machine):
    run = gpu_check(tmp_path / "out", "--dry-run", path=machine({}), python=tmp_path / "bin" / "python")
    assert run.returncode == 0, run.stdout + run.stderr
    for step in STEPS[1:]:
        assert f"{step} (deadline " in run.stdout
    deadlines = [
        int(line.split("(deadline ")[1].split()[0]) for line in run.stdout.splitlines() if "(deadline " in line
    ]
    assert len(deadlines) == len(STEPS) - 1 and max(deadlines) <= 540
    assert "setup.py build_ext --inplace" in run.stdout and "--tool=racecheck" in run.stdout


def test_dry_run_names_what_is_absent(tmp_path):
    run = gpu_check(tmp_path, "--dry-run", "--only", "sanitize")
    assert run.returncode == 0, run.stdout + run.stderr
    absent = shutil.which("compute-sanitizer") is None
    assert ("compute-sanitizer: ABSENT here" in run.stdout) == absent
    assert f"dry run: {4 if absent else 0} of the things needed" in (tmp_path / "summary.txt").read_text()
    assert "op calls ran on reference" in logs(tmp_path)["memcheck_cuda.log"]


def test_all_stages_pass_in_order(tmp_path, machine):
    out = tmp_path / "out"
    run = gpu_check(out, path=machine({}), python=tmp_path / "bin" / "python")
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(steps(out)) == STEPS and set(steps(out).values()) == {(0, "ok")}
    contents = logs(out)
    assert set(contents) == {f"{step}.log" for step in STEPS} | {"summary.txt"}
    assert "all steps passed" in contents["summary.txt"]
    assert "examples.demo --video synthetic:20" in contents["model.log"]


def test_a_failing_and_a_hanging_step_do_not_stop_the_next(tmp_path, machine):
    out = tmp_path / "out"
    plan = {
        '"pytest -q -m not slow -p no:cacheprovider --durations=15 tests/"': "echo planted failure; exit 7",
        '"--benchmark-only"': "sleep 60",
        '"examples.demo"': f'tar -tzf "{out}/results.tar.gz"',
    }
    run = gpu_check(out, path=machine(plan), python=tmp_path / "bin" / "python")
    assert run.returncode == 1 and "planted failure" in run.stdout
    seen = steps(out)
    assert list(seen) == STEPS
    assert seen["test_ops"] == (7, "FAILED") and seen["bench"] == (124, "FAILED (deadline of 540 s)")
    assert [step for step, (code, _) in seen.items() if code] == ["test_ops", "bench"]
    # The archive that the model step saw held all that had run before it.
    assert {"./build.log", "./bench.log", "./summary.txt"} <= set(logs(out)["model.log"].split())


def test_only_runs_the_stages_named(tmp_path, machine):
    out = tmp_path / "out"
    run = gpu_check(out, "--only", "bench", path=machine({}), python=tmp_path / "bin" / "python")
    assert run.returncode == 0 and list(steps(out)) == ["machine", "bench", "bench_report"]
