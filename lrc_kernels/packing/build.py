# SPDX-License-Identifier: Apache-2.0
"""Building an index: annotations and videos in, a folder of columns out. Every video is opened once, in threads."""

from __future__ import annotations

import dataclasses
import fcntl
import hashlib
import json
import os
import shutil
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from functools import lru_cache
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import numpy as np
import numpy.typing as npt

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.packing.index import (
    COLUMNS,
    INVALID,
    NO_VIDEO,
    OK,
    OVERLONG,
    RAGGED,
    SCHEMA,
    UNREADABLE,
    Index,
    content_digest,
)
from lrc_kernels.packing.media import MediaSlice, resolve_inside
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.sources import JsonSource, SampleSource, SourceSample
from lrc_kernels.packing.template import VISUAL, ChatTemplate, Encoder, Tokenizer
from lrc_kernels.packing.video import VideoInfo, probe_video

Row = dict[str, Any]


def build_index(
    source: str | os.PathLike[str] | SampleSource,
    sampling: TemporalSampling,
    tokenizer: Tokenizer,
    out: str | os.PathLike[str],
    *,
    tokens_per_frame: int = 16,
    template: ChatTemplate | None = None,
    max_tokens: int | None = None,
    invalid: Literal["raise", "skip"] = "raise",
    allow_outside_root: bool = False,
    threads: int | None = None,
    chunk: int = 1024,
) -> Index:
    """Open every video, tokenise every conversation, and write what they weigh.

    Lengths are decided here and never again, by the files' durations. The index is renamed from `out` + ".partial" when
    it is whole; a build that was cut off goes on. An index of the same inputs is loaded (see `Index.verify`).

    Args:
        source: a JSON file as JsonSource takes it, or a SampleSource.
        sampling, tokenizer, out: how many frames a video gets, a Tokenizer, and the folder to write.
        tokens_per_frame: visual tokens of a frame: those of a clip / its frames.
        template: how a conversation is written.
        max_tokens: a sample with more gets fewer frames, in whole clips and at least one; its text is never cut.
        invalid: what an annotation that cannot be right does, a path out of the root for one: "raise" collects them all
            and raises at the end, "skip" leaves them in the index without tokens, with a warning.
        allow_outside_root: allow videos outside of their roots.
        threads: that open videos; None is one per core.
        chunk: samples between two saves.

    Raises:
        TypeError, ValueError: naming the argument, or file and line of annotations. FileExistsError: something else at
        `out`. BlockingIOError: another process builds it. Videos that cannot be read do not raise: they are counted in
        a warning and get no tokens.
    """
    threads = (os.cpu_count() or 1) if threads is None else threads
    _check_options(sampling, tokens_per_frame, chunk, threads, max_tokens, invalid)
    samples = JsonSource(source) if isinstance(source, (str, os.PathLike)) else source
    template = ChatTemplate() if template is None else template
    encoder = Encoder(tokenizer, template)
    meta = {
        **_inputs(sampling, tokenizer, samples, template),
        "tokens_per_frame": tokens_per_frame,
        "max_tokens": max_tokens,
        "allow_outside_root": allow_outside_root,
    }
    target = Path(out)
    if target.exists():
        return _existing(target, meta)
    work = target.with_name(target.name + ".partial")
    builder = _Builder(encoder, sampling, tokens_per_frame, max_tokens, allow_outside_root)
    with _locked(work):
        _prepare(work, {**meta, "chunk": chunk})
        _write_parts(samples, builder, work, chunk, threads)
        parts = sorted(work.glob("part-*.npz"))
        _report(parts, invalid)
        _finish(parts, work / "index", target, meta)
        shutil.rmtree(work)
    return Index.load(target)


def _inputs(
    sampling: TemporalSampling, tokenizer: Tokenizer, samples: SampleSource, template: ChatTemplate
) -> dict[str, Any]:
    return {
        "schema": SCHEMA,
        "sampling": dataclasses.asdict(sampling),
        "tokenizer": tokenizer_fingerprint(tokenizer),
        "template": dataclasses.asdict(template),
        "source": samples.fingerprint(),
    }


def _check_options(
    sampling: TemporalSampling, tokens_per_frame: int, chunk: int, threads: int, max_tokens: int | None, invalid: str
) -> None:
    check_int("tokens_per_frame", tokens_per_frame, minimum=1)
    check_int("chunk", chunk, minimum=1)
    check_choice("invalid", invalid, ("raise", "skip"))
    if max_tokens is not None:
        check_int("max_tokens", max_tokens, minimum=1)
    check_int("threads", threads, minimum=1)
    if not isinstance(sampling, TemporalSampling):
        raise TypeError(f"sampling must be a TemporalSampling, got {type(sampling).__name__}")
    if not (sampling.content is None or isinstance(sampling.content, str)):
        raise ValueError("sampling.content must be None or 'packets' here, got the activity of one video")


@contextmanager
def _locked(work: Path) -> Iterator[None]:
    """Nobody else works in this folder meanwhile; the lock ends with the process, however that ends."""
    work.mkdir(parents=True, exist_ok=True)
    folder = os.open(work, os.O_RDONLY)
    try:
        try:
            fcntl.flock(folder, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise BlockingIOError(f"another process is building in {work}: let one build and the others load") from None
        yield
    finally:
        os.close(folder)


def _finish(parts: list[Path], folder: Path, target: Path, meta: dict[str, Any]) -> None:
    """Join the parts in `folder` and give it its name once it is whole."""
    roots = list(dict.fromkeys(root for part in parts for root in _strings(part, "roots")))
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    arrays = _join(parts, folder, roots)
    meta = {**meta, "roots": roots, "num_samples": len(arrays["status"])}
    meta["digest"] = content_digest(arrays, meta)
    (folder / "meta.json").write_text(json.dumps(meta, indent=1, sort_keys=True), encoding="utf-8")
    os.replace(folder, target)


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Changes with what a tokenizer makes of a few texts and with its special tokens."""
    probe = "The 2 cats, 漢字 and naïve\n\tcode_x = 3.14!  <|im_start|>"
    seen = {"special": dict(tokenizer.special_tokens), "probe": list(tokenizer.encode(probe))}
    return hashlib.sha256(json.dumps(seen, sort_keys=True).encode()).hexdigest()


@dataclasses.dataclass
class _Builder:
    """One sample at a time; called from threads."""

    encoder: Encoder
    sampling: TemporalSampling
    tokens_per_frame: int
    max_tokens: int | None
    allow_outside_root: bool

    def __post_init__(self) -> None:
        # Several questions are asked about the same video.
        self._probe = lru_cache(maxsize=1024)(probe_video)

    def row(self, sample: SourceSample | ValueError) -> Row:
        if isinstance(sample, ValueError):
            return _empty_row(INVALID, str(sample))
        try:
            return self._row(sample)
        except ValueError as error:
            text = str(error)
            return _empty_row(INVALID, text if text.startswith(sample.where) else f"{sample.where}: {text}", sample)

    def _row(self, sample: SourceSample) -> Row:
        row = _empty_row(OK, "", sample)
        info = None
        if sample.video is not None:
            root = Path(".") if sample.root is None else sample.root
            inside = not self.allow_outside_root
            path = resolve_inside(root, sample.video) if inside else (root / sample.video).resolve()
            row["roots"] = str(root.resolve())
            media: Path | MediaSlice = path
            if sample.offset is not None:
                media = MediaSlice(path, sample.offset, sample.size or 0)
                row["offset"], row["nbytes"] = sample.offset, sample.size or 0
            try:
                info = self._probe(media)
                stat = path.stat()
            except (ValueError, OSError) as error:
                status = NO_VIDEO if "no video stream" in str(error) else UNREADABLE
                return {**row, "status": status, "error": f"{sample.where}: {error}"}
            row["file_bytes"], row["mtime_ns"] = stat.st_size, stat.st_mtime_ns
            row["nbytes"] = row["nbytes"] or stat.st_size
            row |= {"width": info.width, "height": info.height, "rotation": info.rotation, "fps": info.fps or np.nan}
            row |= self._part(sample, info)
        self._encode(sample, row, info)
        return row

    def _part(self, sample: SourceSample, info: VideoInfo) -> Row:
        duration = info.duration_s
        start = sample.start_s or 0.0
        end = duration if sample.end_s is None else sample.end_s
        # Annotations round: an end just past the file's is the file's.
        if start >= duration or end > duration + max(1.0, 0.05 * duration):
            raise ValueError(f"part [{start}, {end}] s must lie inside of the video of {duration} s")
        end = min(end, duration)
        said = sample.duration_s
        whole = [duration] if sample.start_s is None and sample.end_s is None else [duration, end - start]
        differs = said is not None and all(abs(said - d) > 1 or abs(said - d) > 0.05 * d for d in whole)
        return {"duration": duration, "start": start, "end": end, "differs": differs}

    def _encode(self, sample: SourceSample, row: Row, info: VideoInfo | None) -> None:
        length = row["end"] - row["start"]
        num_frames = 0 if info is None else self.sampling.num_frames(length)
        clip = self.sampling.multiple_of
        while True:
            ids, flags = self.encoder.encode(sample.turns, num_frames=num_frames, duration_s=length, where=sample.where)
            num_tokens = len(ids) + num_frames * (self.tokens_per_frame - 1)
            excess = 0 if self.max_tokens is None else num_tokens - self.max_tokens
            if excess <= 0 or num_frames <= clip:
                break
            num_frames = max(clip, num_frames - clip * max(1, excess * num_frames // num_tokens // clip))
        # A target stands one row before its word, so the first word of a sample is never one.
        learnt = (flags[1:] & ~np.uint8(VISUAL)) != 0
        row |= {"tokens": ids, "flags": flags, "n_frames": num_frames, "n_text": len(ids) - num_frames}
        row |= {"n_tokens": num_tokens, "n_supervised": int(learnt.sum())}
        if excess > 0:
            row |= {"status": OVERLONG, "error": f"{sample.where}: {num_tokens} tokens with the fewest frames"}


def _empty_row(status: int, error: str, sample: SourceSample | None = None) -> Row:
    row: Row = dict.fromkeys(COLUMNS, 0)
    row |= {"status": status, "error": error, "offset": -1, "roots": "", "differs": False, "fps": np.nan}
    row |= {"where": "" if sample is None else sample.where, "path": (sample and sample.video) or ""}
    row |= {"tokens": np.zeros(0, np.int32), "flags": np.zeros(0, np.uint8)}
    return row


def _prepare(work: Path, inputs: dict[str, Any]) -> None:
    """Keep the parts of an earlier build from the same inputs, and nothing else."""
    said = work / "inputs.json"
    text = json.dumps(inputs, indent=1, sort_keys=True)
    if not (said.is_file() and said.read_text(encoding="utf-8") == text):
        for old in work.iterdir():
            shutil.rmtree(old) if old.is_dir() else old.unlink()
        said.write_text(text, encoding="utf-8")


def _existing(target: Path, meta: dict[str, Any]) -> Index:
    try:
        index = Index.load(target)
    except (FileNotFoundError, ValueError) as error:
        raise FileExistsError(f"{target} exists and is no index ({error}): remove it or write elsewhere") from None
    if differs := [name for name, value in meta.items() if index.meta.get(name) != json.loads(json.dumps(value))]:
        raise FileExistsError(
            f"{target} holds an index from another {', '.join(differs)}: remove it or write elsewhere"
        )
    return index


def _write_parts(samples: SampleSource, builder: _Builder, work: Path, chunk: int, threads: int) -> None:
    progress = _Progress(len(samples))
    items: Iterator[SourceSample | ValueError] = iter(samples)
    with ThreadPoolExecutor(threads, thread_name_prefix="lrc-index") as pool:
        for number in range(1 << 40):
            batch = list(islice(items, chunk))
            if not batch:
                break
            part = work / f"part-{number:08d}.npz"
            known = part.exists()
            if not known:
                _save(part, list(pool.map(builder.row, batch)))
            progress.advance(len(batch), known)
    progress.close()


def _save(part: Path, rows: list[Row]) -> None:
    arrays: dict[str, npt.NDArray[Any]] = {
        name: np.array([row[name] for row in rows], dtype=dtype) for name, dtype in COLUMNS.items()
    }
    arrays["differs"] = np.array([row["differs"] for row in rows], dtype=bool)
    for name in (*RAGGED, "roots"):
        # Names of files and of members of tars need not be Unicode.
        values = [
            np.frombuffer(row[name].encode(errors="backslashreplace"), np.uint8)
            if isinstance(row[name], str)
            else row[name]
            for row in rows
        ]
        arrays[f"{name}_len"] = np.array([len(value) for value in values], dtype=np.int64)
        arrays[name] = np.concatenate(values)
    # A part is there only when it is whole.
    temporary = part.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, **arrays)  # type: ignore[arg-type]
    os.replace(temporary, part)


def _strings(part: Path, name: str) -> list[str]:
    with np.load(part, allow_pickle=False) as arrays:
        data, ends = arrays[name].tobytes(), np.cumsum(arrays[f"{name}_len"]).tolist()
    return [data[start:end].decode() for start, end in zip([0, *ends], ends, strict=False) if end > start]


def _report(parts: list[Path], invalid: str) -> None:
    """Raise for annotations that cannot be right; warn of videos that cannot be read or last another time."""
    counts, differs, media = dict.fromkeys((UNREADABLE, NO_VIDEO, OVERLONG, INVALID), 0), 0, 0
    errors: dict[int, list[str]] = {}
    for part in parts:
        with np.load(part, allow_pickle=False) as arrays:
            status, differs = arrays["status"], differs + int(arrays["differs"].sum())
            media += int((arrays["path_len"] > 0).sum())
        for code in np.unique(status[status != OK]).tolist():
            counts[code] += int((status == code).sum())
        messages = iter(_strings(part, "error"))
        for code in status[status != OK].tolist():
            errors.setdefault(code, []).append(next(messages))
            del errors[code][5:]
    if counts[INVALID] and invalid == "raise":
        listed = "\n  ".join(errors[INVALID])
        raise ValueError(f"{counts[INVALID]} annotations cannot be right:\n  {listed}")
    unread = counts[UNREADABLE] + counts[NO_VIDEO]
    if unread and unread == media:
        raise ValueError(f"none of the {media} videos can be read:\n  " + "\n  ".join(chain(*errors.values())))
    kinds = {UNREADABLE: "unreadable videos", NO_VIDEO: "files without video", OVERLONG: "over-long samples"}
    for code, what in {**kinds, INVALID: "invalid annotations"}.items():
        if counts[code]:
            warnings.warn(f"{counts[code]} {what}, the first: {'; '.join(errors[code])}", stacklevel=3)
    if differs:
        message = (
            f"{differs} videos differ from the duration in their annotation by more than 1 s or 5 %; theirs counts"
        )
        warnings.warn(message, stacklevel=3)


def _join(parts: list[Path], folder: Path, roots: list[str]) -> dict[str, npt.NDArray[Any]]:
    """The columns of all parts, one file each, without holding more than one part in memory."""
    lengths: dict[str, int] = dict.fromkeys(RAGGED, 0)
    total = 0
    for part in parts:
        with np.load(part, allow_pickle=False) as arrays:
            total += len(arrays["status"])
            for name in RAGGED:
                lengths[name] += int(arrays[f"{name}_len"].sum())
    shapes = {name: (dtype, total) for name, dtype in COLUMNS.items()}
    shapes |= {name: (dtype, lengths[name]) for name, dtype in RAGGED.items()}
    shapes |= {f"{name}_ptr": (np.int64, total + 1) for name in RAGGED}
    joined = {name: _create(folder / f"{name}.npy", dtype, length) for name, (dtype, length) in shapes.items()}
    row, at = 0, dict.fromkeys(RAGGED, 0)
    for part in parts:
        numbers = [roots.index(root) for root in _strings(part, "roots")]
        with np.load(part, allow_pickle=False) as arrays:
            n = len(arrays["status"])
            for name in COLUMNS:
                joined[name][row : row + n] = arrays[name]
            joined["root"][row : row + n] = -1
            joined["root"][row + np.flatnonzero(arrays["roots_len"])] = numbers
            for name in RAGGED:
                ends = at[name] + np.cumsum(arrays[f"{name}_len"])
                joined[f"{name}_ptr"][row + 1 : row + n + 1] = ends
                joined[name][at[name] : int(ends[-1])] = arrays[name]
                at[name] = int(ends[-1])
            row += n
    for name, (_, length) in shapes.items():
        if length:
            joined[name].flush()  # type: ignore[attr-defined]
        else:
            np.save(folder / f"{name}.npy", joined[name])
    return joined


def _create(path: Path, dtype: Any, length: int) -> npt.NDArray[Any]:
    if length == 0:
        return np.zeros(0, dtype=dtype)
    array = np.lib.format.open_memmap(path, mode="w+", dtype=dtype, shape=(length,))
    array[0] = 0
    return array


class _Progress:
    """One line on a terminal, nothing elsewhere."""

    def __init__(self, total: int):
        self._total, self._done, self._new = total, 0, 0
        self._started = self._shown = time.monotonic()
        self._visible = sys.stderr.isatty()

    def advance(self, count: int, known: bool) -> None:
        self._done += count
        self._new += 0 if known else count
        now = time.monotonic()
        if self._visible and (now - self._shown > 0.2 or self._done == self._total):
            self._shown = now
            rate = self._new / max(now - self._started, 1e-9)
            left = int((self._total - self._done) / rate) if rate else 0
            eta = f"{left // 3600}:{left // 60 % 60:02d}:{left % 60:02d}"
            sys.stderr.write(f"\rindex {self._done:,}/{self._total:,}  {rate:,.0f} samples/s  ETA {eta} ")
            sys.stderr.flush()

    def close(self) -> None:
        if self._visible and self._done:
            sys.stderr.write("\n")
