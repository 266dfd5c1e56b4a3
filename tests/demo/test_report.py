# SPDX-License-Identifier: Apache-2.0
"""The demo as a user runs it: its figures, its pictures in a real browser, and what bad input gets."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lrc_kernels.backend import ORDER

ROOT = Path(__file__).resolve().parents[2]
CHROMIUM_FLAGS = [
    *("--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-sync"),
    *("--disable-background-networking", "--disable-component-update", "--virtual-time-budget=10000", "--dump-dom"),
]

pytest.importorskip("PIL", reason="the report's pictures need pillow (pip install lrc-kernels[video])")


def run_demo(*arguments: str) -> subprocess.CompletedProcess[str]:
    """`python -m examples.demo` on the CPU; Triton's interpreter stays out, as for a user."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LRC_BACKEND")}
    command = [sys.executable, "-m", "examples.demo", "--device", "cpu", "--threads", "1", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=240)


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("demo")
    done = run_demo(
        "--video", "synthetic:4", "--max-frames", "17", "--dtype", "fp32", "--steps", "6", "--out", str(folder)
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == [str(folder / "report.html")]
    assert "16/16 frames" in done.stderr and "frames/s" in done.stderr
    return folder


@pytest.fixture(scope="module")
def figures(out: Path) -> dict[str, Any]:
    return json.loads((out / "report.json").read_text())


def test_counts_add_up(figures: dict[str, Any]) -> None:
    frames, groups = figures["frames"], figures["groups"]
    assert figures["source"]["kind"] == "synthetic"
    assert (frames["count"], frames["clips"], len(frames["timestamps"])) == (16, 2, 16)
    assert frames["tokens"] == {"patches": 16 * 1024, "pixel_shuffle": 16 * 256, "merged": 2 * 128}
    assert groups["count"] == sum(entry["groups"] for entry in groups["histogram"]) == 256
    assert sum(entry["tokens"] for entry in groups["histogram"]) == 16 * 256


def test_backends_that_ran_are_named(figures: dict[str, Any]) -> None:
    ran = {entry["op"]: entry["backend"] for entry in figures["backends"]}
    assert set(ran) == {"tome_compress_fwd"}
    assert set(ran.values()) <= set(ORDER)


def test_three_methods_are_measured_and_checked(figures: dict[str, Any]) -> None:
    methods = figures["comparison"]["methods"]
    assert set(methods) == {"ours", "torch_best", "published"}
    for entry in methods.values():
        assert entry["seconds"] > 0 and entry["memory_bytes"] > 0
        assert 0 < entry["checks"]["scatter"] < 1 and entry["checks"]["uncounted_tokens"] == 0
    # The output alone has 2 clips x 128 tokens x 1024 channels of fp32.
    assert methods["ours"]["memory_bytes"] >= 2 * 128 * 1024 * 4 // 2
    stages = figures["stages"]
    assert [stage["name"] for stage in stages["list"]] == ["draw", "ViT", "compress"]
    assert sum(stage["share"] for stage in stages["list"]) == pytest.approx(1)


def test_losses_are_one_json_object_a_line_and_fall(out: Path, figures: dict[str, Any]) -> None:
    steps = [json.loads(line) for line in (out / "losses.jsonl").read_text().splitlines()]
    assert steps == figures["training"]["steps"] and [step["step"] for step in steps] == list(range(6))
    losses = [step["loss"] for step in steps]
    # Six steps from random weights: 272 tokens guessed evenly cost log(272) = 5.6.
    assert 5 < losses[0] < 8 and losses[-1] < losses[0] - 1
    assert all(0 < step["utilisation"] <= 1 and step["grad_norm"] > 0 for step in steps)


def test_training_ran_on_the_kernels(figures: dict[str, Any]) -> None:
    ran = {entry["op"]: entry["backend"] for entry in figures["training"]["backends"]}
    wanted = {"tome_compress_fwd", "tome_gather_fwd", "attention_fwd", "attention_bwd"}
    assert wanted <= set(ran) and set(ran.values()) <= set(ORDER) - {"reference"}


def test_answers_stand_beside_the_truth(out: Path, figures: dict[str, Any]) -> None:
    training, page = figures["training"], (out / "report.html").read_text()
    assert training["questions"] == {"train": 3 * 120, "held_out": 3 * 20}
    assert set(training["accuracy"]) == {"digit", "order", "quadrant"}
    steps = training["steps"]
    assert training["seconds"] == pytest.approx(sum(step["seconds"] + step["waited_s"] for step in steps))
    rate = sum(step["tokens"] for step in steps) / training["seconds"]
    assert f"{rate:,.0f} tokens/s ({training['waited_for_data_s']:.1f} of {training['seconds']:.0f} s" in page
    for entry in training["accuracy"].values():
        assert entry["questions"] == 20 and entry["accuracy"] == entry["right"] / 20
    table = re.search(r'<table class="accuracy">(.*?)</table>', page)
    assert table is not None and table[1].count("<tr>") == 1 + 3
    assert page.count("truth: ") == 3 * 3 and "All 60 answers" in page
    packing = training["packing"]
    assert packing["padded_utilisation"] < packing["utilisation"] <= 1


def test_page_needs_no_network(out: Path) -> None:
    page = (out / "report.html").read_text()
    assert (out / "report.html").stat().st_size < 4 << 20
    assert set(re.findall(r'(?:src|href)="([a-z]+:)', page)) == {"data:"}
    assert not re.search(r'(?:src|href)="(?!data:)|@import|url\(', page)


def test_chromium_shows_every_picture(out: Path, tmp_path: Path) -> None:
    chromium = shutil.which("chromium")
    if chromium is None:
        if os.environ.get("LRC_REQUIRE_CHROMIUM") == "1":
            pytest.fail("LRC_REQUIRE_CHROMIUM=1, but there is no chromium on PATH")
        pytest.skip("no chromium on PATH (apt-get install chromium); LRC_REQUIRE_CHROMIUM=1 makes this a failure")
    command = [chromium, *CHROMIUM_FLAGS, f"--user-data-dir={tmp_path}", (out / "report.html").as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=120)
    seen = re.search(r'<html[^>]*data-images="(\d+)/(\d+)"', done.stdout)
    assert seen, f"the page did not count its pictures: {done.stderr[-2000:]}"
    shown, pictures = int(seen[1]), int(seen[2])
    # Two clips of eight frames, each a photograph, its outlines and its mean colours; three questions of each kind.
    assert shown == pictures == 2 * 8 * 3 + 3 * 3


def test_missing_video_gets_one_line_and_exit_code_2(tmp_path: Path) -> None:
    done = run_demo("--video", str(tmp_path / "missing.mp4"), "--out", str(tmp_path / "out"))
    assert done.returncode == 2
    assert len(done.stderr.strip().splitlines()) == 1 and "missing.mp4: no such file" in done.stderr
    assert not (tmp_path / "out").exists()


def test_text_file_as_video_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("av", reason="reading a video file needs PyAV (pip install lrc-kernels[video])")
    from examples import demo

    (tmp_path / "notes.mp4").write_text("not a video\n" * 100)
    assert demo.main(["--video", str(tmp_path / "notes.mp4"), "--out", str(tmp_path / "out")]) == 2
    printed = capsys.readouterr()
    assert len(printed.err.strip().splitlines()) == 1 and "notes.mp4" in printed.err and printed.out == ""


@pytest.mark.parametrize("limits", [("--max-frames", "7"), ("--max-frames", "1")])
def test_less_than_one_clip_names_seen_and_wanted(
    limits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples import demo

    assert demo.main(["--video", "synthetic:4", *limits, "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip()
    assert message.endswith(f"max_frames must be at least one clip of 8 frames, got {limits[1]}")


def test_video_too_short_to_train_on_gets_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from examples import demo

    assert demo.main(["--video", "synthetic:1.5", "--out", str(tmp_path)]) == 2
    message = capsys.readouterr().err.strip()
    assert message == "examples.demo: training needs a video of at least 1.6 s, got 1.5 s: --steps 0 skips it"


def test_a_folder_that_cannot_be_made_stops_before_anything_is_computed(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from examples import demo

    (tmp_path / "file").write_text("")
    assert demo.main(["--video", "synthetic:4", "--out", str(tmp_path / "file")]) == 2
    message = capsys.readouterr().err.strip()
    assert len(message.splitlines()) == 1 and "File exists" in message and str(tmp_path / "file") in message


def test_outlines_separate_groups_and_keep_their_colour() -> None:
    from lrc_kernels.tome import drawing

    groups = np.zeros((2, 2, 3), dtype=np.int64)
    groups[:, :, 2] = 1
    groups[1, 1, 2] = 2
    style = drawing.clip_style(groups, 3)
    assert style.named == [0, 1] and style.sizes.tolist() == [8, 3, 1]
    first, second = (drawing.outlines(ids, style, (20, 20), letters=False) for ids in groups)
    assert first.shape == (40, 60, 4)
    # Either side of the border between groups 0 and 1, then the inside of group 0 where no border runs.
    assert first[10, 39].tolist() == [*drawing.NAMED_COLOURS[0], 255]
    assert first[10, 40].tolist() == [*drawing.NAMED_COLOURS[1], 255]
    assert first[10, 19].tolist() == [*drawing.NAMED_COLOURS[0], first[10, 10, 3]] and first[10, 19, 3] < 100
    assert second[39, 59, :3].tolist() == list(drawing.SINGLE_COLOUR)


def test_mean_colours_average_over_the_clip() -> None:
    from lrc_kernels.tome import drawing

    frames = np.zeros((2, 3, 4, 4), dtype=np.uint8)
    frames[1, 0] = 200
    groups = np.zeros((2, 2, 2), dtype=np.int64)
    groups[0, 0, 0] = 1
    means = drawing.mean_colours(frames, groups, 2)
    assert means[0, 0, 0].tolist() == [0, 0, 0]
    assert means[1, 1, 1].tolist() == [round(200 * 4 / 7), 0, 0]
