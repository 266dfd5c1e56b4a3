# SPDX-License-Identifier: Apache-2.0
"""Turns the JSON of `pytest benchmarks --benchmark-only --benchmark-json=FILE` into a CSV file, a Markdown table and a
roofline picture (where matplotlib is installed): `python -m benchmarks.report FILE... --out DIR`.

With `--peers NAME` it draws the times of benchmarks NAME[...] of a results.csv beside their peers': DIR/NAME.png.
"""

from __future__ import annotations

import argparse
import csv
import json
import sys
from pathlib import Path
from typing import Any

FIRST = ("name", "backend", "median_us", "p20_us", "p80_us", "min_us", "gbps", "tflops", "fraction_of_ceiling")


def read(paths: list[Path]) -> list[dict[str, Any]]:
    """One flat row per benchmark: its name, the fixture's record, and peer_<name>_us columns."""
    rows = []
    for path in paths:
        for entry in json.loads(path.read_text(encoding="utf-8"))["benchmarks"]:
            info = dict(entry["extra_info"])
            if "median_us" not in info:
                raise ValueError(f"{path}: benchmark {entry['name']} was not made by the fixture `bench`")
            peers = info.pop("peers", {})
            rows.append({"name": entry["name"].removeprefix("test_"), **info})
            rows[-1].update({f"peer_{name}_us": peer["median_us"] for name, peer in peers.items()})
    return rows


def read_csv(path: Path) -> list[dict[str, Any]]:
    """The rows of a results.csv, times and ceilings as numbers, without its empty cells."""
    with path.open(newline="", encoding="utf-8") as file:
        return [
            {
                key: float(value) if key.endswith(("_us", "gbps", "tflops", "bytes", "flops")) else value
                for key, value in row.items()
                if value
            }
            for row in csv.DictReader(file)
        ]


def write_csv(rows: list[dict[str, Any]], path: Path) -> None:
    names = list(FIRST) + sorted({key for row in rows for key in row} - set(FIRST))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names, restval="")
        writer.writeheader()
        writer.writerows(rows)


def markdown(rows: list[dict[str, Any]], command: str) -> str:
    """Times in microseconds; a peer's column gives its time and how many times as long it took."""
    peers = sorted({key for row in rows for key in row if key.startswith("peer_")})
    head = ["benchmark", "backend", "median (p20–p80) µs", "GB/s", "TFLOP/s", "of ceiling"]
    head += [key.removeprefix("peer_").removesuffix("_us") + " µs" for key in peers]
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        cells = [row["name"], row["backend"], f"{row['median_us']:.1f} ({row['p20_us']:.1f}–{row['p80_us']:.1f})"]
        cells += [f"{row['gbps']:.1f}", f"{row['tflops']:.3g}", f"{row['fraction_of_ceiling']:.0%}"]
        for key in peers:
            cells.append(f"{row[key]:.1f} ({row[key] / row['median_us']:.2f}×)" if key in row else "–")
        lines.append("| " + " | ".join(cells) + " |")
    where = sorted({f"{row['device']}, torch {row['torch']}, triton {row['triton']}" for row in rows})
    ceilings = sorted(
        {f"{row['ceiling_gbps']:.0f} GB/s copy, {row['ceiling_tflops']:.3g} TFLOP/s matmul" for row in rows}
    )
    notes = [f"Measured on {'; '.join(where)}.", f"Ceiling of the same run: {'; '.join(ceilings)}."]
    return "\n".join([*lines, "", *notes, f"Made by `{command}`.", ""])


def draw_roofline(rows: list[dict[str, Any]], path: Path) -> str | None:
    """Writes the picture, or returns why not."""
    drawn = [row for row in rows if row["flops"] and row["bytes"]]
    if not drawn:
        return "no benchmark states both bytes and FLOPs"
    try:
        import matplotlib
    except ImportError:
        return "matplotlib is not installed (pip install lrc-kernels[bench])"
    matplotlib.use("Agg")
    from matplotlib import pyplot

    bandwidth, peak = max(row["ceiling_gbps"] for row in rows), max(row["ceiling_tflops"] for row in rows)
    intensity = [row["flops"] / row["bytes"] for row in drawn]
    low, high = min(*intensity, 1.0) / 2, max(*intensity, 2e3 * peak / bandwidth) * 2
    figure, axes = pyplot.subplots(figsize=(8, 5), layout="constrained")
    edges = [low, 1e3 * peak / bandwidth, high]
    axes.plot(edges, [min(bandwidth * x / 1e3, peak) for x in edges], color="0.3", label="measured ceiling")
    for row, x in zip(drawn, intensity, strict=True):
        axes.plot(x, row["tflops"], "o")
        axes.annotate(row["name"], (x, row["tflops"]), fontsize=7, xytext=(4, 4), textcoords="offset points")
    axes.set(xscale="log", yscale="log", xlabel="FLOP per byte", ylabel="TFLOP/s", title=drawn[0]["device"])
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
    return None


def draw_peers(rows: list[dict[str, Any]], name: str, path: Path) -> None:
    """One group of bars a benchmark `name`[...]: its time, its peers', and the least that its bytes take.

    Raises:
        ValueError: no such benchmark.
    """
    rows = [row for row in rows if row["name"].startswith(f"{name}[")]
    if not rows:
        raise ValueError(f"name must be that of a benchmark in the results, got {name!r}")
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    peers = list(dict.fromkeys(key for row in rows for key in row if key.startswith("peer_")))
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.3 * len(rows)), layout="constrained")
    height = 0.8 / (1 + len(peers))
    for index, key in enumerate(["median_us", *peers]):
        label = "lrc_kernels" if key == "median_us" else key.removeprefix("peer_").removesuffix("_us")
        places = [i + index * height for i, row in enumerate(rows) if key in row]
        axes.barh(places, [row[key] / 1e3 for row in rows if key in row], height, label=label)
    for i, row in enumerate(rows):
        least = row["bytes"] / row["ceiling_gbps"] / 1e6
        axes.plot([least, least], [i - height, i + 0.8], color="black", label=None if i else "its bytes, copied")
    axes.set_yticks(
        range(len(rows)), [row["name"].removeprefix(f"{name}[").removesuffix("]") for row in rows], fontsize=7
    )
    axes.set(xscale="log", xlabel="ms", title=f"{name}: {rows[0]['device']}")
    axes.invert_yaxis()
    axes.legend(fontsize=7)
    figure.savefig(path, dpi=100)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("files", nargs="+", type=Path, help="JSON files of pytest-benchmark; with --peers results.csv")
    parser.add_argument("--out", type=Path, required=True, help="folder for results.csv, results.md and roofline.png")
    parser.add_argument("--command", default="pytest benchmarks --benchmark-only", help="named in the Markdown file")
    parser.add_argument("--peers", metavar="NAME", help="draw this benchmark and its peers from a results.csv, no more")
    options = parser.parse_args(arguments)
    if options.peers:
        options.out.mkdir(parents=True, exist_ok=True)
        draw_peers(
            [row for path in options.files for row in read_csv(path)],
            options.peers,
            options.out / f"{options.peers}.png",
        )
        return 0
    rows = read(options.files)
    if not rows:
        print(f"report: no benchmark in {', '.join(map(str, options.files))}", file=sys.stderr)
        return 1
    options.out.mkdir(parents=True, exist_ok=True)
    write_csv(rows, options.out / "results.csv")
    table = markdown(rows, options.command)
    (options.out / "results.md").write_text(table, encoding="utf-8")
    reason = draw_roofline(rows, options.out / "roofline.png")
    print(table + (f"No roofline picture: {reason}." if reason else f"Roofline: {options.out / 'roofline.png'}"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
