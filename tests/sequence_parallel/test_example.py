# SPDX-License-Identifier: Apache-2.0
"""The example as a user starts it: it succeeds, and ends non-zero in time where a rank is killed."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from lrc_kernels.sequence_parallel import simulate

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "4", "--master-port", "0",
           "--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0", "examples/ring_attention.py"]  # fmt: skip
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}


@pytest.mark.slow
def test_the_example_succeeds():
    done = subprocess.run(COMMAND, cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr
    assert re.search(r"relative errors against full attention: out \S+e-07, dq", done.stdout)
    assert re.search(r"bytes moved by all ranks, forward and backward: [\d,]+\nok", done.stdout)


@pytest.mark.slow
def test_killing_one_rank_ends_the_example():
    timeout = 20
    process = subprocess.Popen([*COMMAND, "--rounds", "100000", "--timeout", str(timeout)], cwd=ROOT, env=ENVIRONMENT,
                               stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)  # fmt: skip
    assert process.stdout is not None
    while "round 3" not in (line := process.stdout.readline()):
        assert line, "it ended before the third round"
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    started = time.monotonic()
    process.stdout.close()
    assert process.wait(timeout + 30) != 0
    # The launcher may take as long again to end the ranks that are left.
    assert time.monotonic() - started < timeout + 30


def test_the_simulator_plots(tmp_path):
    pytest.importorskip("matplotlib", reason="plots need matplotlib (pip install lrc-kernels[bench])")
    simulate.main(["--plot", str(tmp_path / "cost.png")])
    assert (tmp_path / "cost.png").stat().st_size > 10_000


# Of every published figure: by how much the model is off at worst, and whether that is near enough to rely on it.
ERRORS = {
    ("Ulysses, causal", "forward"): (0.06, True),
    ("Ulysses, causal", "backward"): (0.06, True),
    ("ring P2P, causal", "forward"): (0.08, True),
    ("ring P2P, causal", "backward"): (0.12, True),
    ("USP, causal", "forward"): (0.05, True),
    ("USP, causal", "backward"): (0.05, True),
    ("ring all-gather, causal", "forward"): (0.25, False),
    ("ring all-gather, causal", "backward"): (0.25, False),
    ("ring P2P, packs", "forward"): (1.20, False),
    ("ring P2P, packs", "backward"): (1.20, False),
    **{(f"yunchang, 32K, 64:8 heads, ulysses {u}", ""): (0.09, True) for u in (1, 2, 4, 8)},
    ("yunchang, 128K, 8:8 heads, ulysses 1", ""): (0.26, False),
    **{(f"yunchang, 128K, 8:8 heads, ulysses {u}", ""): (0.12, True) for u in (2, 4, 8)},
    ("ring-flash-attn, A100", ""): (0.09, True),
    ("ring-flash-attn, H800", ""): (0.65, False),
}


def test_the_simulator_says_what_it_reproduces(capsys):
    simulate.main(["--tokens", str(1 << 18)])
    printed = capsys.readouterr().out
    worst = {}
    for anchor, _, _, _, difference in simulate.anchor_rows():
        key = anchor.name, "backward" if anchor.backward else "forward"
        worst[key] = max(worst.get(key, 0), abs(difference))
    for anchor in simulate.THROUGHPUTS:
        model = zip(simulate.throughput(anchor), anchor.published, strict=True)
        worst[anchor.name, ""] = max(abs(x / y - 1) for x, y in model)
    assert worst.keys() == ERRORS.keys()
    for (name, direction), (bound, reproduced) in ERRORS.items():
        (line,) = re.findall(rf"^{re.escape(name)} +{direction}.*worst.*$", printed, re.MULTILINE)
        assert worst[name, direction] <= bound and ("NOT reproduced" in line) != reproduced, line
        assert f"worst {worst[name, direction]:>4.0%}," in line
    assert len(re.findall(r"ring \d+ x ulysses \d+", printed)) == len(simulate.SIZES)


@pytest.mark.parametrize(
    ("hardware", "tokens", "num_gpus", "wanted", "within"),
    [("H100", 20, 64, 860, 0.06), ("H100", 20, 256, 217, 0.06), ("H100", 20, 1024, 57, 0.06),
     ("H100", 18, 32, 109.5, 0.06), ("H100", 18, 256, 15.4, 0.06), ("H100", 22, 1024, 862, 0.06),
     ("A100", 20, 64, 2782, 0.15), ("A100", 20, 1024, 179, 0.15)],
)  # fmt: skip
def test_the_scaling_of_the_best_ring_split(hardware, tokens, num_gpus, wanted, within):
    """ms per layer of 32:8 heads of 128, forward + backward, that the first cost model of this project gave."""
    splits = [simulate.Case(1 << tokens, num_gpus // u, u, 32, 8) for u in (1, 2, 4, 8, 16, 32) if num_gpus % u == 0]
    best = min(sum(simulate.layer_time(case, simulate.HARDWARE[hardware])) for case in splits)
    assert best * 1e3 == pytest.approx(wanted, rel=within)


def test_more_gpus_are_never_slower_and_faster_links_never_hurt():
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    times = [sum(simulate.best_split(1 << 20, n, simulate.H100, **heads)[1]) for n in simulate.SIZES]
    assert times == sorted(times, reverse=True)
    slow, fast = (simulate.layer_time(simulate.Case(1 << 18, 64, 1, 32, 8, phi=0.05), hardware)
                  for hardware in (simulate.A100, simulate.H100))  # fmt: skip
    assert sum(fast) < sum(slow)
    assert simulate.layer_time(simulate.Case(1 << 18, 1, 1, 32, 8), simulate.H100).forward == pytest.approx(
        4 * 2**35 * 32 * 128 / (simulate.H100.flops * 2**17 / (2**17 + simulate.H100.half_keys))
    )
