# SPDX-License-Identifier: Apache-2.0
"""The index: what every sample weighs and says, in memory-mapped columns; a folder in, integers and tokens out."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from lrc_kernels.packing.media import MediaSlice, resolve_inside
from lrc_kernels.packing.sampling import TemporalSampling
from lrc_kernels.packing.template import SUPERVISED, VISUAL

SCHEMA = 1
OK, UNREADABLE, NO_VIDEO, OVERLONG, INVALID = 0, 1, 2, 4, 5
COLUMNS: dict[str, Any] = {
    "n_text": np.int32,
    "n_frames": np.int32,
    "n_tokens": np.int32,
    "n_supervised": np.int32,
    "duration": np.float64,
    "start": np.float64,
    "end": np.float64,
    "fps": np.float32,
    "width": np.int32,
    "height": np.int32,
    "rotation": np.int16,
    "status": np.uint8,
    "root": np.int32,
    "offset": np.int64,
    "nbytes": np.int64,
    "file_bytes": np.int64,
    "mtime_ns": np.int64,
}
# Values of all samples back to back; sample i owns [ptr[i], ptr[i + 1]).
RAGGED: dict[str, Any] = {"tokens": np.int32, "flags": np.uint8, "path": np.uint8, "where": np.uint8, "error": np.uint8}
# A copy of a data set has other times of files and is the same data set.
_NOT_IN_DIGEST = ("file_bytes", "mtime_ns", "error")


class IndexStaleError(ValueError):
    """Files that an index was built from have changed.

    Args:
        paths: the first five of them.
    """

    def __init__(self, message: str, paths: tuple[str, ...]):
        super().__init__(message)
        self.paths = paths


class Index:
    """A data set ready to be planned over: sample i is row i of every column, and i is its `sample_id`.

    Attributes:
        path: its folder.
        columns: name -> read-only array [n], memory-mapped: n_text (without frames), n_frames, n_tokens, n_supervised
            (rows with a target), duration of the file and start, end of the part in seconds, fps, width, height,
            rotation, status (0 ok, 1 unreadable, 2 without video, 4 over-long, 5 invalid annotation), root, offset
            (-1: a file), nbytes, file_bytes, mtime_ns.
        digest: 64 hexadecimal digits that name its contents.
        sampling: the rule that gave n_frames.
        tokens_per_frame: what one placeholder stands for.
    """

    def __init__(self, path: Path, meta: Mapping[str, Any], columns: dict[str, npt.NDArray[Any]]):
        self.path, self.meta, self._arrays = path, meta, columns
        self.columns = {name: columns[name] for name in COLUMNS}
        self.digest: str = meta["digest"]
        self.sampling = TemporalSampling(**meta["sampling"])
        self.tokens_per_frame: int = meta["tokens_per_frame"]
        self.roots = tuple(Path(root) for root in meta["roots"])

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Index:
        """Open a folder that `build_index` wrote; nothing is read before it is asked for.

        Raises:
            FileNotFoundError: no such index. ValueError: another schema, or a column that does not fit the others.
        """
        folder = Path(path)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except (FileNotFoundError, NotADirectoryError):
            raise FileNotFoundError(f"no index at {folder}: build one with build_index") from None
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{folder / 'meta.json'}: must be JSON: {error}") from None
        if not isinstance(meta, dict) or meta.get("schema") != SCHEMA:
            seen = meta.get("schema") if isinstance(meta, dict) else meta
            raise ValueError(f"{folder}: schema must be {SCHEMA}, got {seen!r}: build the index anew")
        try:
            return cls(folder, meta, _read_columns(folder, meta["num_samples"]))
        except KeyError as error:
            raise ValueError(f"{folder / 'meta.json'}: must hold {error}") from None

    def __len__(self) -> int:
        return int(self.meta["num_samples"])

    def __reduce__(self) -> tuple[Any, ...]:
        # Workers map the files again instead of receiving copies of them.
        return Index.load, (self.path,)

    def lengths(self) -> dict[str, npt.NDArray[Any]]:
        """What `plan_packs` needs."""
        names = {"num_tokens": "n_tokens", "num_frames": "n_frames", "num_supervised": "n_supervised"}
        return {name: self.columns[column] for name, column in names.items()}

    def tokens(self, sample_id: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64], npt.NDArray[np.bool_]]:
        """(input_ids, labels with -100 where nothing is learnt, visual), each [n_tokens], placeholders repeated."""
        ids, flags = self._ragged("tokens", sample_id), self._ragged("flags", sample_id)
        times = np.where(flags & VISUAL, self.tokens_per_frame, 1)
        input_ids = np.repeat(ids.astype(np.int64), times)
        flags = np.repeat(flags, times)
        return input_ids, np.where(flags & SUPERVISED, input_ids, -100), (flags & VISUAL).astype(bool)

    def media(self, sample_id: int) -> Path | MediaSlice | None:
        """The video of a sample, None for one of text.

        Raises:
            ValueError: a link has been put in its way that leads out of the root.
        """
        if self.columns["root"][sample_id] < 0:
            return None
        name = bytes(self._ragged("path", sample_id)).decode()
        root = self.roots[self.columns["root"][sample_id]]
        path = root / name if self.meta["allow_outside_root"] else resolve_inside(root, name)
        offset = int(self.columns["offset"][sample_id])
        return path if offset < 0 else MediaSlice(path, offset, int(self.columns["nbytes"][sample_id]))

    def timestamps(self, sample_id: int, sampling: TemporalSampling | None = None) -> npt.NDArray[np.float64]:
        """Seconds of the file, float64 [n_frames], by the index's own rule or another one for the places.

        Raises:
            ValueError: as `TemporalSampling.timestamps`.
        """
        rule = self.sampling if sampling is None else sampling
        start, end = float(self.columns["start"][sample_id]), float(self.columns["end"][sample_id])
        times = start + rule.timestamps(end - start, int(self.columns["n_frames"][sample_id]))
        # start + x rounds up to the end where x was just below its length.
        return np.minimum(times, np.nextafter(end, 0))

    def where(self, sample_id: int) -> str:
        """File and line that a sample comes from."""
        return bytes(self._ragged("where", sample_id)).decode()

    def error(self, sample_id: int) -> str:
        """Why a sample has a status other than 0; empty otherwise."""
        return bytes(self._ragged("error", sample_id)).decode()

    def verify(self) -> None:
        """Read everything and compare it with what was built.

        Raises:
            ValueError: damaged columns. IndexStaleError: videos that are gone, or whose size or time has changed.
        """
        found = content_digest(self._arrays, self.meta)
        if found != self.digest:
            raise ValueError(f"{self.path}: columns must have digest {self.digest}, got {found}: build the index anew")
        changed = []
        for i in np.flatnonzero((self.columns["root"] >= 0) & (self.columns["status"] == OK)).tolist():
            media = self.media(i)
            assert media is not None
            path = media.path if isinstance(media, MediaSlice) else media
            stat = path.stat() if path.exists() else None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != (
                self.columns["file_bytes"][i],
                self.columns["mtime_ns"][i],
            ):
                changed.append(str(path))
        if changed:
            first = tuple(dict.fromkeys(changed))[:5]
            raise IndexStaleError(
                f"{self.path}: {len(changed)} samples have other videos than when it was built "
                f"({', '.join(first)}): build it anew",
                first,
            )

    def _ragged(self, name: str, sample_id: int) -> npt.NDArray[Any]:
        pointer = self._arrays[f"{name}_ptr"]
        return self._arrays[name][pointer[sample_id] : pointer[sample_id + 1]]


def content_digest(arrays: Mapping[str, npt.NDArray[Any]], meta: Mapping[str, Any]) -> str:
    """Names the samples, their tokens, their places in files and the rules that made them."""
    rules = {name: meta[name] for name in ("schema", "sampling", "tokens_per_frame", "tokenizer", "template")}
    digest = hashlib.sha256(json.dumps(rules, sort_keys=True).encode())
    for name in sorted(arrays):
        if name.removesuffix("_ptr") in _NOT_IN_DIGEST or name.removesuffix("_ptr") == "where":
            continue
        digest.update(name.encode())
        array = arrays[name]
        for start in range(0, len(array), 1 << 22):
            digest.update(np.ascontiguousarray(array[start : start + (1 << 22)]).data)
    return digest.hexdigest()


def _read_columns(folder: Path, num_samples: Any) -> dict[str, npt.NDArray[Any]]:
    if isinstance(num_samples, bool) or not isinstance(num_samples, int) or num_samples < 0:
        raise ValueError(f"{folder / 'meta.json'}: num_samples must be an int >= 0, got {num_samples!r}")
    arrays = {name: _read(folder, name, dtype, num_samples) for name, dtype in COLUMNS.items()}
    for name, dtype in RAGGED.items():
        pointer = _read(folder, f"{name}_ptr", np.int64, num_samples + 1)
        arrays[f"{name}_ptr"], arrays[name] = pointer, _read(folder, name, dtype, int(pointer[-1]))
        if pointer[0] != 0 or bool((np.diff(pointer) < 0).any()):
            raise ValueError(f"{folder / name}_ptr.npy: must start at 0 and not decrease")
    return arrays


def _read(folder: Path, name: str, dtype: Any, length: int) -> npt.NDArray[Any]:
    path = folder / f"{name}.npy"
    try:
        # An empty array cannot be mapped. Pickles stay closed, and a header that claims more than the file holds fails.
        array = np.load(path, mmap_mode="r" if length else None, allow_pickle=False)
    except FileNotFoundError:
        raise ValueError(f"{folder}: must hold {path.name}: build the index anew") from None
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path}: cannot be read: {error}") from None
    if array.dtype != dtype or array.shape != (length,):
        wanted = f"{np.dtype(dtype)} [{length}]"
        raise ValueError(f"{path}: must be {wanted}, got {array.dtype} {list(array.shape)}")
    return array
