# SPDX-License-Identifier: Apache-2.0
"""Counts what a rank posts."""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Iterator


class Posts(logging.Handler):
    """The messages that this rank posts, `count` of them."""

    def __init__(self) -> None:
        super().__init__(logging.DEBUG)
        self.count = 0

    def emit(self, record: logging.LogRecord) -> None:
        self.count += 1


@contextlib.contextmanager
def counted_posts() -> Iterator[Posts]:
    """Those posted inside the context."""
    log, posts = logging.getLogger("lrc_kernels.sequence_parallel.comm"), Posts()
    level = log.level
    log.addHandler(posts)
    log.setLevel(logging.DEBUG)
    try:
        yield posts
    finally:
        log.setLevel(level)
        log.removeHandler(posts)
