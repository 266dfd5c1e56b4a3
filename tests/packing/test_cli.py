# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.packing plan` on files and on the demo, and the one line that bad input gets."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from lrc_kernels.packing import PackConfig, TemporalSampling, plan_packs
from lrc_kernels.packing.__main__ import main
from lrc_kernels.packing.simulate import read_lengths, stage3_lengths

LENGTHS = [60, 30, 40, 70, 50, 20, 90, 10] * 20
SMALL = ["--max-tokens", "100", "--ranks", "2", "--accumulate", "2"]


def rows_of(printed: str) -> dict[str, list[str]]:
    return {line.split()[0]: line.split() for line in printed.splitlines() if line}


def test_the_table_says_what_the_plan_says(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    path = tmp_path / "lengths.npy"
    np.save(path, np.array(LENGTHS))
    assert main(["plan", str(path), *SMALL]) == 0
    rows = rows_of(capsys.readouterr().out)
    for strategy in ("in_order", "open_best_fit", "first_fit", "best_fit", "bfd"):
        stats = plan_packs(LENGTHS, PackConfig(max_tokens=100, strategy=strategy)).stats()
        assert rows[strategy][1:5] == [str(stats.num_packs), f"{stats.utilisation:.4f}", "tokens", "100%"]
        lpt = plan_packs(LENGTHS, PackConfig(max_tokens=100, strategy=strategy), packs_per_step=4, balance="lpt")
        assert rows[strategy][5:8:2] == [str(stats.lateness), f"{lpt.stats(2).imbalance:.4f}"]
    for strategy in ("in_order", "bfd"):
        plan = plan_packs(LENGTHS, PackConfig(max_tokens=100, strategy=strategy))
        tenths = np.histogram(plan.n_tokens / 100, bins=10, range=(0, 1))[0]
        assert [bar == "." for bar in rows[strategy][10]] == (tenths == 0).tolist()
        assert rows[strategy][10][tenths.argmax()] == "@" and rows[strategy][10].count("@") == 1
    assert rows["padded"][:6] == ["padded", "batches", "of", "8", "-", f"{sum(LENGTHS) / (90 * len(LENGTHS)):.4f}"]


def test_lengths_that_are_none_or_unreadable(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    (tmp_path / "none.json").write_text("[]")
    assert main(["plan", str(tmp_path / "none.json"), *SMALL]) == 0
    assert "0 samples, 0 packed" in capsys.readouterr().out
    (tmp_path / "a.json").write_text("[[")
    (tmp_path / "a.npy").write_bytes(b"xx")
    for name in ("a.json", "a.npy"):
        assert main(["plan", str(tmp_path / name), *SMALL]) == 1
        assert f"{name} cannot be read: " in capsys.readouterr().err


def test_every_kind_of_file_reads_alike(tmp_path: Path) -> None:
    table = np.array([[10, 2, 5], [20, 3, 0], [30, 0, 30]])
    np.save(tmp_path / "a.npy", table)
    (tmp_path / "b.csv").write_text("\n".join(",".join(map(str, row)) for row in table.tolist()))
    (tmp_path / "c.csv").write_text("num_supervised,num_tokens,num_frames\n5,10,2\n0,20,3\n30,30,0\n")
    names = ("num_tokens", "num_frames", "num_supervised")
    (tmp_path / "d.json").write_text(json.dumps(dict(zip(names, table.T.tolist(), strict=True))))
    (tmp_path / "e.json").write_text(json.dumps(table.tolist()))
    for path in sorted(tmp_path.iterdir()):
        columns = read_lengths(path)
        assert set(columns) == set(names)
        for name, values in zip(names, table.T, strict=True):
            assert np.array_equal(columns[name], values), path
    (tmp_path / "f.csv").write_text("10\n20\n")
    assert {name: values.tolist() for name, values in read_lengths(tmp_path / "f.csv").items()} == {
        "num_tokens": [10, 20]
    }


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", "10\n2.5\n", "must hold integers"),
        ("a.csv", "10,1\n20\n", "must hold integers, as many in each line"),
        ("a.csv", "tokens\n10\n", "got 'tokens'"),
        ("a.csv", "num_tokens,num_frames\n10\n", "must hold 2 integers in each line, as its header does names"),
        ("a.json", "[1.5]", "num_tokens must hold integers, got float64"),
        ("a.json", "[1, ", "Expecting value"),
        ("a.json", "[1, -3]", "num_tokens must be >= 0, got -3 at index 1"),
        ("a.json", "[1, 300]", "1 of 2 samples do not fit a pack of 100 tokens"),
        ("a.json", "[[[1]]]", r"got shape [1, 1, 1]"),
        ("a.json", "3", "got shape []"),
        ("a.txt", "1", "must end in .npy, .json or .csv"),
    ],
)
def test_a_bad_file_gets_one_line(
    tmp_path: Path, capsys: pytest.CaptureFixture, name: str, text: str, message: str
) -> None:
    (tmp_path / name).write_text(text)
    assert main(["plan", str(tmp_path / name), *SMALL]) == 1
    seen = capsys.readouterr()
    assert seen.err.startswith("error: ") and message in seen.err and seen.err.count("\n") == 1
    assert seen.out == ""


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["plan"], "give a file of lengths or --demo stage3"),
        (["plan", "nowhere.npy"], "nowhere.npy"),
        (["plan", "--demo", "stage3", "--ranks", "0"], "--ranks, --accumulate and --samples must be >= 1"),
        (["plan", "--demo", "stage3", "--samples", "50", "--max-cost", "x"], "max_cost must be a number"),
    ],
)
def test_bad_arguments_get_one_line(capsys: pytest.CaptureFixture, arguments: list[str], message: str) -> None:
    assert main(arguments) == 1
    assert message in capsys.readouterr().err


def test_pickles_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    np.save(tmp_path / "a.npy", np.array([{"a": 1}]), allow_pickle=True)
    assert main(["plan", str(tmp_path / "a.npy")]) == 1
    assert "pickle" in capsys.readouterr().err


def test_plot_is_drawn(tmp_path: Path, capsys: pytest.CaptureFixture) -> None:
    pytest.importorskip("matplotlib", reason="drawing needs matplotlib (pip install lrc-kernels[bench])")
    path = tmp_path / "plan.png"
    assert main(["plan", "--demo", "stage3", "--samples", "3000", "--ranks", "4", "--plot", str(path)]) == 0
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert str(path) in capsys.readouterr().out


def test_plot_without_matplotlib_says_how_to_get_it(
    tmp_path: Path, capsys: pytest.CaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    assert main(["plan", "--demo", "stage3", "--samples", "300", "--plot", str(tmp_path / "plan.png")]) == 1
    assert "pip install lrc-kernels[bench]" in capsys.readouterr().err


def test_it_runs_as_a_module_without_a_decoder() -> None:
    code = (
        "import sys, runpy; sys.modules['av'] = None; sys.argv = ['packing', 'plan', '--demo', 'stage3', "
        "'--samples', '2000', '--ranks', '2', '--strategy', 'bfd']; "
        "runpy.run_module('lrc_kernels.packing', run_name='__main__')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "bfd" in rows_of(done.stdout) and "in_order" not in rows_of(done.stdout)


def test_stage3_is_the_mix_of_the_paper() -> None:
    columns = stage3_lengths(100_000, seed=3)
    tokens, frames = columns["num_tokens"], columns["num_frames"]
    images = frames == 1
    assert images.mean() == pytest.approx(1.1 / 3.5, abs=0.01)
    assert ((tokens[images] >= 306) & (tokens[images] <= 756)).all()
    videos = frames[~images]
    assert videos.min() == 64 and videos.max() == 512 and (videos % 8 == 0).all()
    assert tokens.mean() == pytest.approx(3417, rel=0.01)
    assert (stage3_lengths(100, seed=3, sampling=TemporalSampling.release())["num_frames"] <= 512).all()
    again = stage3_lengths(100_000, seed=3)
    assert np.array_equal(again["num_tokens"], tokens)
