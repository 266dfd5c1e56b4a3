# SPDX-License-Identifier: Apache-2.0
"""How far a stage of the demo is: one line on stderr."""

from __future__ import annotations

import sys
import time


class Progress:
    """Things done, and how fast, on stderr: a bar on a terminal, else a plain line every few seconds.

    Args:
        label: of the stage.
        unit: what is counted.
        every_s: seconds between two lines where there is no terminal.
    """

    def __init__(self, label: str, unit: str = "frames", every_s: float = 5.0):
        self.label, self.unit, self.tty = label, unit, sys.stderr.isatty()
        self.every_s = 0.1 if self.tty else every_s
        self.start = self.shown = time.perf_counter()

    def __call__(self, done: int, total: int, note: str | None = None) -> None:
        """Show that `done` of `total` are done; `note` stands where their rate would."""
        now = time.perf_counter()
        if now - self.shown < self.every_s and done < total:
            return
        self.shown = now
        rate = f"{done / max(now - self.start, 1e-9):7.1f} {self.unit}/s"
        text = f"{self.label:<8} {done:>4}/{total} {self.unit}  {note or rate}"
        if self.tty:
            filled = 30 * done // max(total, 1)
            text = f"\r{text}  [{'#' * filled}{'.' * (30 - filled)}]" + ("\n" if done >= total else "")
        print(text, end="" if self.tty else "\n", file=sys.stderr, flush=True)
