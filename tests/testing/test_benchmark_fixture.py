# SPDX-License-Identifier: Apache-2.0
"""The `bench` fixture refuses what is wrong before it times anything, and the report holds what was measured."""

import csv
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import report

pytest.importorskip("pytest_benchmark", reason="pytest-benchmark is not installed (pip install lrc-kernels[test])")
ROOT = Path(__file__).parents[2]

BENCHMARKS = """
import torch
from lrc_kernels.backend import use_backend
from lrc_kernels.tome import head_mean

def make(i):
    return (torch.randn(2, 64, 128, generator=torch.Generator().manual_seed(i)),)

def eager(x):
    return x.unflatten(-1, (4, 32)).mean(2)

def reference(x):
    with use_backend("reference"):
        return head_mean(x, 4)

def check(y):
    torch.testing.assert_close(y, eager(make(0)[0]))

SIZES = dict(bytes_moved=2 * 64 * 160 * 4, flops=2 * 64 * 128, check=check, make_inputs=make, dtype="fp32")

def test_right(bench):
    record = bench(reference, peers={"eager": eager}, backend="reference", **SIZES)
    assert record["median_us"] >= record["min_us"] > 0 and record["fraction_of_ceiling"] > 0

def test_wrong_result(bench):
    bench(lambda x: eager(x) + 1, **SIZES)

def test_unwritten_result(bench):
    bench(lambda x: torch.empty(2, 64, 32), **SIZES)

def test_wrong_peer(bench):
    bench(eager, peers={"zero": lambda x: eager(x) * 0}, **SIZES)

def test_wrong_backend(bench):
    bench(reference, backend="cuda", **SIZES)

def test_silent_reference(bench):
    bench(reference, **SIZES)

def test_no_op_of_ours(bench):
    bench(eager, backend="reference", **SIZES)
"""


@pytest.mark.skipif(torch.cuda.is_available(), reason="the planted benchmarks use CPU tensors")
def test_correctness_comes_first_and_the_report_follows(tmp_path):
    file, result, out = tmp_path / "test_planted.py", tmp_path / "result.json", tmp_path / "out"
    file.write_text(BENCHMARKS)
    # In a worker of pytest-xdist, pytest-benchmark would refuse to measure.
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_XDIST")}
    environment |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    options = ["-p", "benchmarks.conftest", "--rootdir", str(tmp_path), "-q", "-p", "no:cacheprovider"]
    command = [sys.executable, "-m", "pytest", str(file), *options, "--benchmark-only", f"--benchmark-json={result}"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=tmp_path)
    summary = [line for line in run.stdout.splitlines() if line.startswith("FAILED")]
    assert len(summary) == 6 and "1 passed" in run.stdout, run.stdout
    assert not [line for line in summary if "test_right" in line]
    assert "expected every op on 'cuda', got reference" in run.stdout and "got no op of lrc_kernels" in run.stdout
    assert "an op fell back to the reference" in run.stdout
    (entry,) = json.loads(result.read_text())["benchmarks"]
    assert entry["extra_info"]["device"].startswith("CPU, 1 thread") and set(entry["extra_info"]["peers"]) == {"eager"}

    command = [sys.executable, "-m", "benchmarks.report", str(result), "--out", str(out), "--command", "make bench"]
    run = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=ROOT)
    assert run.returncode == 0, run.stderr
    table = (out / "results.md").read_text()
    assert "| right | reference |" in table and "| eager µs |" in table and "Made by `make bench`" in table
    (row,) = csv.DictReader((out / "results.csv").open())
    assert row["name"] == "right" and float(row["peer_eager_us"]) > 0 and row["dtype"] == "fp32"
    assert (out / "roofline.png").exists() or "matplotlib is not installed" in run.stdout


def test_peers_are_drawn_from_the_committed_results(tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed (pip install lrc-kernels[bench])")
    results = str(ROOT / "benchmarks" / "results" / "cpu" / "results.csv")
    report.main([results, "--peers", "compress_clips", "--out", str(tmp_path)])
    assert (tmp_path / "compress_clips.png").stat().st_size < 150_000
    with pytest.raises(ValueError, match="must be that of a benchmark in the results, got 'compress'"):
        report.main([results, "--peers", "compress", "--out", str(tmp_path)])
