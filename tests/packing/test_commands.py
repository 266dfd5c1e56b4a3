# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.packing index | verify | bench-decode` on small files, and `plan` on an index."""

from __future__ import annotations

import re

import pytest

from lrc_kernels.packing import Index
from lrc_kernels.packing.__main__ import main
from tests.packing.datasets import talk, write_dataset, write_videos

pytest.importorskip("av", reason="videos are read with PyAV (pip install lrc-kernels[video])")

TOKENIZER = ["--tokenizer", "tests.packing.datasets:ByteTokenizer"]


def test_from_annotations_to_a_plan(tmp_path, capsys):
    names = write_videos(tmp_path, [20, 10])
    config = write_dataset(tmp_path, [talk("a?", "b", video=names[i % 2]) for i in range(6)])
    out = tmp_path / "index"
    assert main(["index", str(config), str(out), *TOKENIZER, "--sampling", "release", "--tokens-per-frame", "4"]) == 0
    printed = capsys.readouterr().out
    assert "6 samples, digest" in printed and re.search(r"ok +6\n", printed) and "frames" in printed
    index = Index.load(out)
    assert index.columns["n_frames"].tolist() == [64] * 6 and index.sampling.dense_fps == 1
    assert main(["verify", str(out)]) == 0
    assert "all columns and videos are as they were" in capsys.readouterr().out
    assert main(["plan", str(out), "--max-tokens", "3000", "--ranks", "1", "--accumulate", "1"]) == 0
    assert "6 samples, 6 packed" in capsys.readouterr().out
    write_videos(tmp_path, [20, 15])
    assert main(["verify", str(out)]) == 1
    assert re.match(r"error: .*6 samples have other videos than when it was built", capsys.readouterr().err)


def test_bench_decode(tmp_path, capsys):
    write_videos(tmp_path, [40])
    assert main(["bench-decode", str(tmp_path / "videos" / "v0.mp4"), "--frames", "8", "--rounds", "1"]) == 0
    head, line = capsys.readouterr().out.splitlines()
    assert head.split()[-2:] == ["2", "frames/s"] and line.split()[:3] == ["v0.mp4", "32x32", "4.0"]
    assert all(float(rate) > 0 for rate in line.split()[3:]) and len(line.split()) == 6


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (["index", "none.json", "out", *TOKENIZER], "No such file"),
        (["index", "none.json", "out", "--tokenizer", "bytes"], "--tokenizer must be MODULE:NAME, got 'bytes'"),
        (["index", "none.json", "out", "--tokenizer", "no.such:one"], "cannot be imported: No module named 'no'"),
        (["index", "none.json", "out", "--tokenizer", "json:none"], "cannot be imported: module 'json' has no"),
        (["index", __file__, "out", "--tokenizer", "builtins:int"], "test_commands.py: must be JSON"),
        (["verify", "none"], "no index at none"),
        (["bench-decode", "none.mp4"], "no such video file: none.mp4"),
        (["bench-decode", "none.mp4", "--frames", "0"], "--frames must be >= 1, got 0"),
    ],
)
def test_bad_input_gets_one_line(command, message, capsys):
    assert main(command) == 1
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ") and message in line
