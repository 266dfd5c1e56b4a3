# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.packing index|verify|plan|bench-decode`; `plan`: lengths in, a table (and a picture) of what
each strategy makes of them out."""

from __future__ import annotations

import argparse
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from lrc_kernels.packing.commands import add_commands
from lrc_kernels.packing.config import STRATEGIES, PackConfig
from lrc_kernels.packing.plan import PackStats, plan_packs
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.simulate import read_lengths, stage3_lengths

_PADDED_BATCH = 8
_BARS = ".,:-=+*#@"


@dataclass(frozen=True)
class _Row:
    strategy: str
    stats: PackStats
    imbalance: dict[str, float]
    seconds: float
    fullness: str


def _max_cost(text: str) -> float | str:
    return text if text.endswith("x") else float(text)


def _add_plan(commands: Any) -> None:
    parser = commands.add_parser(
        "plan",
        help="utilisation and imbalance of each packing strategy on your lengths",
        description="Packs the samples of a file by each strategy and prints what comes of it.",
    )
    parser.add_argument("lengths", nargs="?", type=Path, help="an index, or .npy, .json, .csv of num_tokens[, ...]")
    parser.add_argument("--demo", choices=("stage3",), help="instead of a file: a mix like the paper's stage 3")
    parser.add_argument("--samples", type=int, default=350_000, help="samples that --demo draws (default %(default)s)")
    parser.add_argument("--sampling", choices=("paper", "release"), default="paper", help="frame policy of --demo")
    parser.add_argument("--strategy", action="append", choices=STRATEGIES, help="may be repeated (default: all)")
    parser.add_argument("--max-tokens", type=int, default=32768, help="tokens of a pack (default %(default)s)")
    parser.add_argument("--max-frames", type=int, help="frames of a pack (default: no limit)")
    parser.add_argument("--max-cost", type=_max_cost, help='cost of a pack, or "1.05x" the mean (default: no limit)')
    parser.add_argument("--open-packs", type=int, default=8, help="open_best_fit's (default %(default)s)")
    parser.add_argument("--window", type=int, default=4096, help="first_fit's, best_fit's, bfd's (default %(default)s)")
    parser.add_argument("--overlong", choices=("error", "drop"), default="error", help="samples that fit no pack")
    parser.add_argument("--align", type=int, default=1, help="samples take multiples of it (default %(default)s)")
    parser.add_argument("--ranks", type=int, default=64, help="data-parallel ranks (default %(default)s)")
    parser.add_argument("--accumulate", type=int, default=4, help="packs of a rank in a step (default %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="of the permutation and of --demo (default %(default)s)")
    parser.add_argument("--plot", type=Path, help="also draw the table into this picture (needs matplotlib)")
    parser.set_defaults(run=_plan)


def _plan(options: argparse.Namespace) -> None:
    if (options.lengths is None) == (options.demo is None):
        raise ValueError("give a file of lengths or --demo stage3, one of the two")
    if options.ranks < 1 or options.accumulate < 1 or options.samples < 1:
        raise ValueError("--ranks, --accumulate and --samples must be >= 1")
    if options.plot is not None:
        _pyplot()
    if options.demo is None:
        columns = read_lengths(options.lengths)
    else:
        sampling = getattr(TemporalSampling, options.sampling)()
        columns = stage3_lengths(options.samples, seed=options.seed, sampling=sampling)
    config = PackConfig(
        max_tokens=options.max_tokens,
        max_frames=options.max_frames,
        max_cost=options.max_cost,
        open_packs=options.open_packs,
        window=options.window,
        overlong=options.overlong,
        align=options.align,
        drop_last=False,
    )
    strategies = options.strategy or STRATEGIES
    rows = [_row(columns, replace(config, strategy=strategy), options) for strategy in dict.fromkeys(strategies)]
    print(_table(columns, rows, options))
    if options.plot is not None:
        _draw(rows, options)
        print(f"\nPicture: {options.plot}")


def _row(columns: dict[str, Any], config: PackConfig, options: argparse.Namespace) -> _Row:
    """The plan without a last step to fill gives the utilisation, whole steps over the ranks give the imbalance."""
    started = time.perf_counter()
    plan = plan_packs(columns, config, seed=options.seed)
    seconds = time.perf_counter() - started
    uneven = {}
    for balance in ("none", "lpt", "group"):
        steps = plan_packs(
            columns,
            replace(config, drop_last=True),
            seed=options.seed,
            packs_per_step=options.ranks * options.accumulate,
            balance=balance,  # type: ignore[arg-type]
        )
        uneven[balance] = steps.stats(options.ranks).imbalance if steps.num_steps else float("nan")
    return _Row(config.strategy, plan.stats(), uneven, seconds, _histogram(plan.n_tokens / config.max_tokens))


def _histogram(shares: Any) -> str:
    """How many packs are up to a tenth, two tenths, ... full: from a dot for none to @ for the most."""
    counts, _ = np.histogram(shares, bins=10, range=(0.0, 1.0))
    heights = np.ceil(counts / max(1, counts.max()) * (len(_BARS) - 1)).astype(int)
    return "".join(_BARS[height] for height in heights)


def _padded_utilisation(num_tokens: Any, batch: int) -> float:
    """Of batches in the file's order, padded to their longest sample."""
    whole = np.asarray(num_tokens[: len(num_tokens) // batch * batch], dtype=np.int64).reshape(-1, batch)
    return float(whole.sum() / (whole.max(axis=1).sum() * batch)) if whole.sum() else float("nan")


def _table(columns: dict[str, Any], rows: list[_Row], options: argparse.Namespace) -> str:
    stats = rows[0].stats
    head = ["strategy", "packs", "utilisation", "binding", "lateness", "none", "lpt", "group", "seconds", "fullness"]
    cells = [
        [f"padded batches of {_PADDED_BATCH}", "-", f"{_padded_utilisation(columns['num_tokens'], _PADDED_BATCH):.4f}"]
    ]
    cells[0] += ["-"] * (len(head) - len(cells[0]))
    for row in rows:
        binding = ", ".join(f"{name} {share:.0%}" for name, share in row.stats.binding.items() if share)
        cells.append([row.strategy, f"{row.stats.num_packs}", f"{row.stats.utilisation:.4f}", binding or "-"])
        cells[-1] += [f"{row.stats.lateness}", *(f"{row.imbalance[name]:.4f}" for name in head[5:8])]
        cells[-1] += [f"{row.seconds:.3f}", row.fullness]
    widths = [max(len(line[i]) for line in (head, *cells)) for i in range(len(head))]
    lines = [
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in (head, *cells)
    ]
    skipped = ", ".join(f"{count} {reason}" for reason, count in stats.skipped.items() if count)
    notes = [
        f"{stats.num_samples} samples, {stats.num_packed} packed" + (f"; left out: {skipped}" if skipped else ""),
        f"packs of {options.max_tokens} tokens",
        f"none, lpt, group: by balance, the cost of the busiest of {options.ranks} ranks over that of the mean rank, "
        f"{options.accumulate} packs each",
        "fullness: how many packs are up to 10, 20, ... 100 % full, from . for none to @ for the most",
        "",
    ]
    return "\n".join([*notes, *lines])


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise ValueError("--plot needs matplotlib, which is not installed (pip install lrc-kernels[bench])") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    return pyplot


def _draw(rows: list[_Row], options: argparse.Namespace) -> None:
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    names = [row.strategy for row in rows]
    bars = left.bar(names, [row.stats.utilisation for row in rows], color="tab:blue")
    left.bar_label(bars, fmt="%.3f")
    left.set(title=f"tokens of samples / tokens of packs ({options.max_tokens})", ylim=(0, 1.1))
    places = np.arange(len(rows))
    for i, balance in enumerate(("none", "lpt", "group")):
        heights = [row.imbalance[balance] - 1 for row in rows]
        right.bar(places + 0.27 * (i - 1), heights, width=0.27, bottom=1, label=balance)
    right.set(title=f"busiest rank / mean rank ({options.ranks} ranks)", xticks=places, xticklabels=names)
    right.legend()
    for axes in (left, right):
        axes.tick_params(axis="x", rotation=20)
    figure.savefig(options.plot, dpi=150)
    pyplot.close(figure)


def main(arguments: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(prog="python -m lrc_kernels.packing", description=__doc__)
    commands = parser.add_subparsers(required=True, metavar="command")
    add_commands(commands)
    _add_plan(commands)
    options = parser.parse_args(arguments)
    try:
        options.run(options)
    except (ValueError, TypeError, OSError, ImportError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
