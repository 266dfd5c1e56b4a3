# SPDX-License-Identifier: Apache-2.0
"""tools/gpu_check.sh: its dry run proves every step, and a real run survives steps that fail or hang.

The real run is driven with stand-ins for python, nvidia-smi and compute-sanitizer that record how they were called.
tools/sanitize.py, whose list the steps smoke and sanitize run, is tried on the CPU backend.
"""

import importlib.util
import os
import re
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest
import torch

from lrc_kernels import native
from lrc_kernels.backend import forced_backend

ROOT = Path(__file__).parents[2]
SCRIPT = ROOT / "tools" / "gpu_check.sh"
STEPS = ["build", "report", "smoke", "prefill", "bench_attention", "bench_tome", "bench_dropout", "ablation"]
STEPS += ["test", "sanitize"]
COLLECTED = "".join(rf"tests/a/test_a.py::test_{name}[1]\n" for name in "abbcd") + r"\n5 tests collected\n"
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
        plan = {"get_device_capability": "echo 90a", "--collect-only": f"printf '{COLLECTED}'", **plan}
        cases = "".join(f"  *{what}*) {action} ;;\n" for what, action in plan.items())
        (folder / "python").write_text(f'#!/bin/bash\ncase "$*" in\n{cases}  *) echo "ran $*" ;;\nesac\n')
        (folder / "nvidia-smi").write_text("#!/bin/bash\necho a GPU\n")
        (folder / "compute-sanitizer").write_text('#!/bin/bash\nwhile [[ $1 == --* ]]; do shift; done\nexec "$@"\n')
        # Deadlines of minutes become two seconds.
        (folder / "timeout").write_text(f'#!/bin/bash\nshift 3\nexec {shutil.which("timeout")} -s INT -k 1 2 "$@"\n')
        for file in folder.iterdir():
            file.chmod(0o755)
        return folder

    return build


def test_bad_arguments(tmp_path):
    for args, message in (
        ((), "OUT_DIR is missing"),
        ((tmp_path, "--only", "build,tests"), "unknown step tests"),
        ((tmp_path, "--fast"), "unknown option --fast"),
        ((tmp_path, "--only"), "--only needs a list"),
        ((tmp_path, "--seconds"), "--seconds needs a whole number, got none"),
        ((tmp_path, "--seconds", "1.5"), "--seconds needs a whole number, got 1.5"),
        ((tmp_path, "second"), "one OUT_DIR"),
    ):
        run = gpu_check(*args)
        assert run.returncode == 2 and message in run.stderr and run.stderr.startswith("usage:")


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device here")
def test_without_a_gpu_it_says_so(tmp_path):
    run = gpu_check(tmp_path, "--only", "build")
    assert run.returncode == 1 and "no CUDA device" in run.stdout and "--dry-run" in run.stdout


def test_dry_run_proves_every_step(tmp_path, machine):
    run = gpu_check(tmp_path / "out", "--dry-run", path=machine({}), python=tmp_path / "bin" / "python")
    assert run.returncode == 0, run.stdout + run.stderr
    assert re.findall(r"^(\w+) \(deadline \d+ s\):$", run.stdout, re.MULTILINE) == STEPS
    assert list(steps(tmp_path / "out")) == STEPS
    assert "setup.py build_ext --inplace" in run.stdout and "compute-sanitizer" in run.stdout


def test_dry_run_names_what_is_absent(tmp_path):
    run = gpu_check(tmp_path, "--dry-run", "--only", "bench,sanitize")
    assert run.returncode == 0, run.stdout + run.stderr
    absent = shutil.which("compute-sanitizer") is None
    assert ("compute-sanitizer: ABSENT here" in run.stdout) == absent
    assert "op calls ran on reference" in logs(tmp_path)["sanitize.log"]
    # The benchmarks that it names exist.
    assert "::test_drop_step[160k-4096]" in logs(tmp_path)["bench_dropout.log"]


def test_all_steps_pass_in_order(tmp_path, machine):
    out = tmp_path / "out"
    plan = {"pytest*--benchmark-json=*": 'for a; do [[ $a != *json=* ]] || echo {} >"${a#*=}"; done'}
    run = gpu_check(out, path=machine(plan), python=tmp_path / "bin" / "python")
    assert run.returncode == 0, run.stdout + run.stderr
    assert list(steps(out)) == STEPS and set(steps(out).values()) == {(0, "ok")}
    contents = logs(out)
    assert set(contents) >= {f"{step}.log" for step in STEPS} | {"summary.txt"}
    assert "all steps passed" in contents["summary.txt"]
    assert "sanitize.py --each aten cudnn cuda triton" in contents["smoke.log"]
    # Each test function once, three a process; each benchmark's figures in one report.
    tests = [text for name, text in contents.items() if re.match(r"test_\d+\.log", name)]
    functions = [re.findall(r"::(test_\w+)", text) for text in tests]
    assert sorted(functions, key=len) == [["test_d"], ["test_a", "test_b", "test_c"]]
    assert contents["bench_report.log"].count(".json") == 3
    checks = [name for name in contents if name.startswith("sanitize_")]
    assert len(checks) == 4 and "sanitize.py triton" in contents["sanitize_racecheck_triton.log"]


def test_a_failing_and_a_hanging_step_do_not_stop_the_next(tmp_path, machine):
    out = tmp_path / "out"
    plan = {
        '"test_a.py::test_d"': "echo FAILED test_d - planted; exit 7",
        '"benchmarks/test_tome"': "sleep 60",
        '"--frames 1000"': 'echo prefill on ${LRC_BACKEND:-the best}; [ -n "${LRC_BACKEND:-}" ]',
        '"--ablate"': f'tar -tzf "{out}/results.tar.gz"',
    }
    run = gpu_check(out, path=machine(plan), python=tmp_path / "bin" / "python")
    assert run.returncode == 1
    seen = steps(out)
    assert list(seen) == STEPS
    assert seen["bench_tome"] == (124, "FAILED (deadline of 80 s)") and seen["test"][1] == "FAILED"
    assert [step for step, (code, _) in seen.items() if code] == ["prefill", "bench_tome", "test"]
    # The archive that the ablation saw held all that had run before it.
    assert {"./build.log", "./prefill.log", "./summary.txt"} <= set(logs(out)["ablation.log"].split())
    # The end says what failed and why, within what a lent machine returns of it.
    end = run.stdout[-12000:]
    assert "FAILED test_d - planted" in end[end.index("--- test\n") :] and "FAILED: prefill bench_tome test\n" in end
    assert "prefill on the best\nagain with LRC_BACKEND=triton\nprefill on triton\n" in end


def test_what_no_longer_fits_is_not_run(tmp_path, machine):
    out = tmp_path / "out"
    run = gpu_check(out, "--seconds", "45", path=machine({}), python=tmp_path / "bin" / "python")
    assert run.returncode == 0, run.stdout + run.stderr
    seen, summary = steps(out), (out / "summary.txt").read_text()
    assert "report" in seen and "bench_dropout" in seen and not {"build", "prefill", "sanitize"} & set(seen)
    assert re.search(r"^build +not run: [34]\d s left$", summary, re.MULTILINE)
    assert re.search(r"^not run, --only takes them: build smoke prefill .*sanitize$", summary, re.MULTILINE)


def test_only_runs_the_steps_named(tmp_path, machine):
    out = tmp_path / "out"
    run = gpu_check(out, "--only", "bench", path=machine({}), python=tmp_path / "bin" / "python")
    assert list(steps(out)) == [step for step in STEPS if step.startswith("bench")], run.stdout


@pytest.fixture
def sanitize():
    spec = importlib.util.spec_from_file_location("sanitize", ROOT / "tools" / "sanitize.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.skipif(native.C is None, reason="lrc_kernels._C is not built")
def test_each_op_is_checked_in_a_process_of_its_own(sanitize, capsys, monkeypatch, tmp_path):
    for op, verdict in (("unmerge_tokens", "ok"), ("merge_partials", "left out")):
        assert sanitize.main(["--each", "cpu", "--op", op]) == 0
        assert re.search(rf"^{verdict} +cpu {op} \d+ s$", capsys.readouterr().out, re.MULTILINE)
    crashing = tmp_path / "python"
    crashing.write_text("#!/bin/bash\necho an illegal access >&2\nkill -ABRT $$\n")
    crashing.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(crashing))
    assert sanitize.main(["--each", "cpu", "cuda", "--op", "unmerge_tokens"]) == 1
    said = capsys.readouterr().out
    assert "FAILED   cuda unmerge_tokens 0 s: exit -6: an illegal access" in said and "2 of 2 pairs" in said
    # A backend that takes no op at all, as the native kernels do where they were built without CUDA, is no success.
    crashing.write_text(
        '#!/bin/bash\nif [ $2 = cpu ]; then exit 0; fi\nprintf "why\\n0 op calls ran on %s\\n" $2\nexit 1\n'
    )
    assert sanitize.main(["--each", "cpu", "cuda"]) == 1
    assert capsys.readouterr().out.endswith("pairs of op and backend failed\nFAILED   no op ran on cuda\n")


@pytest.mark.skipif(native.C is None, reason="lrc_kernels._C is not built")
def test_a_wrong_result_and_a_wrong_gradient_are_found(sanitize, capsys, monkeypatch):
    right = sanitize.unmerge_tokens
    assert sanitize.main(["cpu", "--op", "unmerge_tokens"]) == 0
    for wrong, message in (
        (lambda y: 1.01 * y, "unmerge_tokens, torch.float32, N 64, result: error"),
        (lambda y: 1.01 * y - 0.01 * y.detach(), "unmerge_tokens, torch.float32, N 64, gradient 1: error"),
    ):
        changed = lambda y, plan, wrong=wrong: (wrong if forced_backend() == "cpu" else (lambda y: y))(right(y, plan))  # noqa: E731
        monkeypatch.setattr(sanitize, "unmerge_tokens", changed)
        with pytest.raises(AssertionError, match=message):
            sanitize.main(["cpu", "--op", "unmerge_tokens"])
    with pytest.raises(SystemExit):
        sanitize.main(["cpu", "--op", "unmerge"])
    assert "--op must be one of head_mean, " in capsys.readouterr().err
