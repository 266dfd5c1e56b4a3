# SPDX-License-Identifier: Apache-2.0
"""What ranks have to say about one that died or stalled."""

from __future__ import annotations

import re

TIMEOUT = 4.0


def check_blame(message: str, victim: int, where: str) -> None:
    """The victim, the step and a time within the timeout."""
    found = re.search(
        rf"{where}, step \d+: rank {victim} died or stalled .*\[peer {victim} after ([\d.]+) s\]", message, re.DOTALL
    )
    assert found, message
    # A busy machine takes a while to say so.
    assert float(found[1]) <= 2 * TIMEOUT + 2, message


def check_all_blame(failure: str, victim: int, where: str) -> None:
    """The same of every other rank, from the message of the pool's RankError."""
    parts = re.split(r"--- rank (\d) ---", failure)
    told = dict(zip(parts[1::2], parts[2::2], strict=True))
    assert sorted(told) == sorted({"0", "1", "2", "3"} - {str(victim)})
    for message in told.values():
        check_blame(message, victim, where)
