# SPDX-License-Identifier: Apache-2.0
"""Where a video lies: a file, or the bytes of one inside a tar; and the rule that it lies inside its root."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

# 8K video has 33 million pixels. A header may claim any size, and memory is taken by what it claims.
MAX_PIXELS = 2**26
# 48 days. A header may claim any duration too, and what is kept of each second takes memory by it.
MAX_SECONDS = 2**22


@dataclass(frozen=True)
class MediaSlice:
    """The `size` bytes of `path` from `offset` on: a member of a tar.

    Raises:
        ValueError: a negative offset or size.
    """

    path: Path
    offset: int
    size: int

    def __post_init__(self) -> None:
        if self.offset < 0 or self.size < 0:
            raise ValueError(f"offset and size must be >= 0, got {self.offset} and {self.size} for {self.path}")

    def __str__(self) -> str:
        return f"{self.path} [{self.offset}:{self.offset + self.size}]"

    @property
    def url(self) -> str:
        return f"subfile,,start,{self.offset},end,{self.offset + self.size},,:{self.path}"


def resolve_inside(root: Path, relative: str) -> Path:
    """The real path of `relative` under `root`.

    Raises:
        ValueError: an absolute path, a "..", a zero byte, or a link that leads out of the root.
    """
    if not relative or "\0" in relative:
        raise ValueError(f"a media path must be a name without zero bytes, got {relative!r}")
    if os.path.isabs(relative) or ".." in Path(relative).parts:
        raise ValueError(f"media path {relative!r} must lie inside its root {root}, without .. and not absolute")
    base = root.resolve()
    path = (base / relative).resolve()
    if not path.is_relative_to(base):
        raise ValueError(f"media path {relative!r} must lie inside its root {root}, but a link leads it to {path}")
    return path
