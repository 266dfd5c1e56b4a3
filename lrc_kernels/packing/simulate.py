# SPDX-License-Identifier: Apache-2.0
"""Lengths to try a plan on before there is an index: drawn like the paper's stage 3, or read from a user's file."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrc_kernels.packing.index import Index
from lrc_kernels.packing.sampling import TemporalSampling

COLUMNS = ("num_tokens", "num_frames", "num_supervised")
_TOKENS_PER_FRAME = 16
_TOKENS_PER_IMAGE = 256


def stage3_lengths(num_samples: int, *, seed: int = 0, sampling: TemporalSampling | None = None) -> dict[str, Any]:
    """Columns int64 [num_samples] of a mix like InternVideo2.5's stage 3 (section 3.4).

    The paper gives the counts (1.1M images, 1.7M videos under 60 s, 0.7M of 60 to 3600 s) and 16 tokens per frame; the
    durations and the text are assumed: short videos lognormal (median 15 s, sigma 0.8) within [2, 60), long ones
    log-uniform, text uniform within 50..500 tokens, an image 256 tokens and one frame.
    """
    sampling = TemporalSampling.paper() if sampling is None else sampling
    random = np.random.Generator(np.random.PCG64(seed))
    kind = random.choice(3, size=num_samples, p=np.array([1.1, 1.7, 0.7]) / 3.5)
    text = random.integers(50, 501, size=num_samples)
    short = np.exp(np.log(15.0) + 0.8 * random.standard_normal(num_samples))
    while (redraw := np.flatnonzero((short < 2.0) | (short >= 60.0))).size:
        short[redraw] = np.exp(np.log(15.0) + 0.8 * random.standard_normal(redraw.size))
    duration = np.where(kind == 1, short, np.exp(random.uniform(np.log(60.0), np.log(3600.0), num_samples)))
    num_frames = np.ones(num_samples, dtype=np.int64)
    videos = np.flatnonzero(kind > 0)
    num_frames[videos] = [sampling.num_frames(seconds) for seconds in duration[videos].tolist()]
    media = np.where(kind == 0, _TOKENS_PER_IMAGE, _TOKENS_PER_FRAME * num_frames)
    return {"num_tokens": text + media, "num_frames": num_frames}


def read_lengths(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Columns num_tokens, and where there are more num_frames and num_supervised, of an index, a .npy, .json or .csv.

    .npy: integers [n] or [n, 1 to 3]. .json: a list of integers, or an object of such lists by column name.
    .csv: one sample a line, with a header of column names or without.

    Raises:
        ValueError: another suffix, or contents of another form. FileNotFoundError: no such file.
    """
    if path.is_dir():
        return Index.load(path).lengths()
    if path.suffix in (".npy", ".json"):
        try:
            data = (
                np.load(path, allow_pickle=False)
                if path.suffix == ".npy"
                else json.loads(path.read_text(encoding="utf-8"))
            )
        except (ValueError, EOFError, RecursionError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        if isinstance(data, dict):
            return {str(name): np.asarray(values) for name, values in data.items()}
        return _named(np.asarray(data), path)
    if path.suffix == ".csv":
        with path.open(newline="", encoding="utf-8") as file:
            rows = [row for row in csv.reader(file) if row]
        names = [cell.strip() for cell in rows.pop(0)] if rows and not rows[0][0].strip().isdecimal() else None
        try:
            table = np.array([[int(cell) for cell in row] for row in rows], dtype=np.int64)
        except ValueError as error:
            raise ValueError(f"{path} must hold integers, as many in each line: {error}") from None
        if names is None:
            return _named(table, path)
        if table.shape[1:] != (len(names),):
            raise ValueError(f"{path} must hold {len(names)} integers in each line, as its header does names")
        return dict(zip(names, table.T, strict=True))
    raise ValueError(f"{path} must end in .npy, .json or .csv")


def _named(table: npt.NDArray[Any], path: Path) -> dict[str, npt.NDArray[Any]]:
    if table.ndim not in (1, 2) or (table.ndim == 2 and not 1 <= table.shape[1] <= len(COLUMNS)):
        raise ValueError(f"{path} must hold [n] or [n, 1 to {len(COLUMNS)}] integers, got shape {list(table.shape)}")
    if table.ndim == 1:
        return {COLUMNS[0]: table}
    return dict(zip(COLUMNS, np.ascontiguousarray(table.T), strict=False))
