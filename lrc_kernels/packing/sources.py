# SPDX-License-Identifier: Apache-2.0
"""Where samples come from: JSONL annotations as the public InternVideo2.5 training code lists them, webdataset tars, or
anything that is a SampleSource; conversations and places of videos out, nothing opened or decoded."""

from __future__ import annotations

import hashlib
import json
import math
import os
import tarfile
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

MAX_RECORD_BYTES = 16 * 2**20
VIDEO_SUFFIXES = ("mp4", "mkv", "webm", "avi", "mov", "mpg", "mpeg", "ts", "m4v", "flv", "gif")
_ROLES = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class SourceSample:
    """One conversation, perhaps about a part of a video.

    Args:
        where: file and line, for people.
        turns: (role, text), roles "system", "user" and "assistant".
        root: the folder that the video must lie in; None for a sample of text.
        video: path under `root`: the file, or the tar that holds it.
        offset, size: bytes of the tar that are the video; None for a file.
        duration_s: what the annotation says of the file's or the part's duration, if anything.
        start_s, end_s: the part of the video that is meant; None for its start and end.
    """

    where: str
    turns: tuple[tuple[str, str], ...]
    root: Path | None = None
    video: str | None = None
    offset: int | None = None
    size: int | None = None
    duration_s: float | None = None
    start_s: float | None = None
    end_s: float | None = None


class SampleSource(Protocol):
    """Samples in a fixed order."""

    def fingerprint(self) -> str:
        """Text that changes with the samples: an index that was begun from others is not continued."""

    def __iter__(self) -> Iterator[SourceSample | ValueError]:
        """Samples; a ValueError, not raised, in place of one that cannot be read."""

    def __len__(self) -> int: ...


class JsonSource:
    """The data sets of a JSON file {name: {"root", "annotation", ...}}; relative paths start at its folder.

    "annotation" names a JSONL file of {"video", "conversations": [{"from", "value"}], "duration", "start", "end",
    "clip"}. In its place "shards" may name tars under "root", as a pattern or a list, whose members "key.mp4" and
    "key.json" belong together and follow each other.

    Raises:
        FileNotFoundError, ValueError: naming the file and the entry.
    """

    def __init__(self, path: str | os.PathLike[str]):
        self.path = Path(path)
        try:
            entries = json.loads(self.path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            raise ValueError(f"{self.path}: must be JSON: {error}") from None
        if not isinstance(entries, dict) or not entries:
            raise ValueError(f'{self.path}: must be {{name: {{"root", "annotation"}}}}, got {type(entries).__name__}')
        self._entries = [_Entry.read(f"{self.path}: {name}", entry, self.path) for name, entry in entries.items()]
        self._digest = hashlib.sha256()
        self._count = sum(entry.scan(self._digest) for entry in self._entries)

    def fingerprint(self) -> str:
        return self._digest.hexdigest()

    def __len__(self) -> int:
        return self._count

    def __iter__(self) -> Iterator[SourceSample | ValueError]:
        for entry in self._entries:
            for _ in range(entry.repeat):
                yield from entry.samples() if entry.annotation else entry.members()


@dataclass(frozen=True)
class _Entry:
    root: Path
    annotation: Path | None
    shards: tuple[Path, ...]
    repeat: int

    @classmethod
    def read(cls, where: str, entry: Any, config: Path) -> _Entry:
        if not isinstance(entry, dict) or not isinstance(entry.get("root"), str):
            raise ValueError(f'{where}: must have "root", a folder, got {entry!r}')
        root = config.parent / entry["root"]
        if not root.is_dir():
            raise FileNotFoundError(f"{where}: root is no folder: {root}")
        if ("annotation" in entry) == ("shards" in entry):
            raise ValueError(f'{where}: must have one of "annotation" and "shards", got {sorted(entry)}')
        repeat = entry.get("repeat_time", 1)
        if isinstance(repeat, bool) or not isinstance(repeat, (int, float)) or not (repeat >= 1 and repeat % 1 == 0):
            raise ValueError(f"{where}: repeat_time must be a whole number >= 1, got {repeat!r}")
        # Both would change what is read, so neither is passed over in silence.
        if entry.get("data_augment") not in (None, False):
            raise ValueError(f"{where}: data_augment must be false, got {entry['data_augment']!r}")
        if entry.get("sampling_strategy", "all") != "all":
            raise ValueError(f'{where}: sampling_strategy must be "all", got {entry["sampling_strategy"]!r}')
        if "shards" in entry:
            return cls(root, None, cls._shards(where, entry["shards"], root), int(repeat))
        if not isinstance(entry["annotation"], str):
            raise ValueError(f"{where}: annotation must be a path, got {entry['annotation']!r}")
        annotation = config.parent / entry["annotation"]
        if not annotation.is_file():
            raise FileNotFoundError(f"{where}: no such annotation: {annotation}")
        return cls(root, annotation, (), int(repeat))

    @staticmethod
    def _shards(where: str, names: Any, root: Path) -> tuple[Path, ...]:
        listed = [names] if isinstance(names, str) else names
        if not isinstance(listed, list) or not all(isinstance(name, str) and name for name in listed):
            raise ValueError(f"{where}: shards must be a pattern or a list of paths, got {names!r}")
        for name in listed:
            if os.path.isabs(name) or ".." in Path(name).parts:
                raise ValueError(f"{where}: shards must lie under {root}, without .. and not absolute, got {name!r}")
        found = sorted(root.glob(names)) if isinstance(names, str) else [root / name for name in names]
        if not found or not all(path.is_file() for path in found):
            raise FileNotFoundError(f"{where}: shards must name files under {root}, got {names!r}")
        return tuple(found)

    def scan(self, digest: Any) -> int:
        """Hashes what an index depends on, and counts the samples."""
        digest.update(f"{self.root.resolve()} {self.repeat}\n".encode())
        count = 0
        if self.annotation is not None:
            for _, line in self._lines(self.annotation):
                digest.update(line)
                count += bool(line.strip())
        for shard in self.shards:
            stat = shard.stat()
            digest.update(f"{shard} {stat.st_size} {stat.st_mtime_ns}\n".encode())
            with _open_tar(shard) as tar:
                count += sum(member.name.endswith(".json") for member in tar if member.isreg())
        return count * self.repeat

    def samples(self) -> Iterator[SourceSample | ValueError]:
        assert self.annotation is not None
        for where, line in self._lines(self.annotation):
            if line.strip():
                yield _parsed(where, line, self.root)

    @staticmethod
    def _lines(annotation: Path) -> Iterator[tuple[str, bytes]]:
        with annotation.open("rb") as file:
            number = 0
            while line := file.readline(MAX_RECORD_BYTES + 1):
                number += 1
                where = f"{annotation}:{number}"
                if len(line) > MAX_RECORD_BYTES:
                    raise ValueError(f"{where}: a line must have at most {MAX_RECORD_BYTES} bytes")
                yield where, line

    def members(self) -> Iterator[SourceSample | ValueError]:
        for shard in self.shards:
            videos: dict[str, tuple[int, int]] = {}
            name = shard.relative_to(self.root).as_posix()
            total = shard.stat().st_size
            with _open_tar(shard) as tar:
                records: list[tuple[str, bytes]] = []
                for member in tar:
                    if not member.isreg():
                        continue
                    key, _, suffix = member.name.rpartition(".")
                    where = f"{shard}:{member.name}"
                    if member.offset_data + member.size > total:
                        yield ValueError(f"{where}: claims {member.size} bytes, past the end of the tar")
                    elif suffix.lower() in VIDEO_SUFFIXES:
                        videos[key] = (member.offset_data, member.size)
                    elif suffix == "json" and member.size > MAX_RECORD_BYTES:
                        yield ValueError(f"{where}: a record must have at most {MAX_RECORD_BYTES} bytes")
                    elif suffix == "json":
                        stream = tar.extractfile(member)
                        records.append((key, b"" if stream is None else stream.read()))
            for key, record in records:
                yield _parsed(f"{shard}:{key}.json", record, self.root, name, videos.get(key))


@contextmanager
def _open_tar(path: Path) -> Iterator[tarfile.TarFile]:
    try:
        with tarfile.open(path, "r:") as tar:
            yield tar
    except tarfile.TarError as error:
        raise ValueError(f"{path}: must be a whole uncompressed tar: {error}") from None


def _parsed(
    where: str, line: bytes, root: Path, shard: str | None = None, span: tuple[int, int] | None = None
) -> SourceSample | ValueError:
    try:
        record = json.loads(line)
        if not isinstance(record, dict):
            raise ValueError(f"must be an object, got {type(record).__name__}")
        turns = _turns(record.get("conversations"))
        if "image" in record:
            raise ValueError('"image" is not supported: the public code trains on videos only, and so does this index')
        video = record.get("video") if shard is None else shard if span else None
        if video is not None and not isinstance(video, str):
            raise ValueError(f"video must be one path, got {video!r}")
        _check_unicode("video", video or "")
        start, end = _part(record)
        duration = _seconds("duration", record.get("duration"))
        if duration is not None and duration <= 0:
            raise ValueError(f"duration must be above 0, got {duration}")
        offset, size = span or (None, None)
        return SourceSample(where, turns, root if video else None, video, offset, size, duration, start, end)
    except (ValueError, RecursionError, OverflowError) as error:
        return ValueError(f"{where}: {error}")


def _turns(conversations: Any) -> tuple[tuple[str, str], ...]:
    if not isinstance(conversations, list) or not conversations:
        raise ValueError(f'conversations must be a list of {{"from", "value"}}, got {conversations!r}')
    turns = []
    for i, turn in enumerate(conversations):
        if not isinstance(turn, dict) or not isinstance(turn.get("value"), str):
            raise ValueError(f'conversations[{i}] must have "value", a text, got {turn!r}')
        speaker = turn.get("from")
        if not isinstance(speaker, str) or speaker not in _ROLES:
            raise ValueError(f'conversations[{i}]: "from" must be human, gpt or system, got {speaker!r}')
        _check_unicode(f"conversations[{i}]", turn["value"])
        turns.append((_ROLES[speaker], turn["value"]))
    return tuple(turns)


def _check_unicode(name: str, text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError:
        raise ValueError(f"{name} must be valid Unicode, got a lone surrogate") from None


def _part(record: dict[str, Any]) -> tuple[float | None, float | None]:
    start, end = record.get("start"), record.get("end")
    clip = record.get("clip")
    if clip is not None:
        if not isinstance(clip, list) or len(clip) != 2:
            raise ValueError(f"clip must be [start, end], got {clip!r}")
        start, end = clip
    start, end = _seconds("start", start), _seconds("end", end)
    if start is not None and start < 0:
        raise ValueError(f"start must be >= 0, got {start}")
    if end is not None and end <= (start or 0.0):
        raise ValueError(f"end must be after start = {start or 0.0}, got {end}")
    return start, end


def _seconds(name: str, value: Any) -> float | None:
    if value is None:
        return None
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"{name} must be a finite number of seconds, got {value!r}")
    return float(value)
