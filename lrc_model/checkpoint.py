# SPDX-License-Identifier: Apache-2.0
"""Folders of safetensors files <-> an LRCModel's tensors: every tensor is used, skipped by a rule, or an error.

What a folder holds is read from the headers of its files; an index.json is never believed. Nothing is unpickled.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lrc_model import convert
from lrc_model.config import FORMAT, LRCConfig
from lrc_model.convert import PARTS, Stored
from lrc_model.public_config import from_public, is_public, to_transformers
from lrc_model.tokenizer import INTERNLM2_TOKENS, ByteTokenizer

MAX_SHARD_BYTES = 5 * 10**9
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16, "F64": torch.float64}
_PICKLES = ("*.bin", "*.pt", "*.pth", "*.ckpt")
# A tensor by which each layout is known, whatever else the folder holds.
_MARKS = {
    "own": "connector.linear_1.weight",
    "public": "language_model.model.tok_embeddings.weight",
    "internlm2": "model.tok_embeddings.weight",
    "transformers": "model.multi_modal_projector.linear_1.weight",
    "transformers_saved": "multi_modal_projector.linear_1.weight",
}


@dataclass(frozen=True)
class TensorHeader:
    """What the header of a safetensors file says of one tensor; `dtype` in safetensors' spelling, e.g. "BF16"."""

    file: Path
    dtype: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class ImportReport:
    """What became of the tensors of a checkpoint.

    Attributes:
        layout: "own", "public", "internlm2", "transformers" or "transformers_saved".
        num_used: stored tensors that were used.
        num_loaded: our tensors that they made.
        skipped: rule -> names of the tensors that it skipped.
        dtype: of the loaded tensors.
    """

    layout: str
    num_used: int
    num_loaded: int
    dtype: torch.dtype
    skipped: Mapping[str, tuple[str, ...]] = field(default_factory=dict)

    def __str__(self) -> str:
        dtype = str(self.dtype).removeprefix("torch.")
        lines = [f"{self.layout} checkpoint: {self.num_used} tensors -> {self.num_loaded} of ours, {dtype}"]
        lines += [f"  skipped {len(names):4d}  {rule}" for rule, names in self.skipped.items()]
        return "\n".join(lines)


def read_headers(path: str | Path) -> dict[str, TensorHeader]:
    """Name -> header of every tensor in the safetensors files of a folder (or in one file).

    Raises:
        FileNotFoundError: no such folder, no safetensors file in it, or a shard of a numbered set is missing.
        ValueError: a file that is cut or damaged, or a tensor that stands in two files; the files are named.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"checkpoint {path} does not exist")
    files = [path] if path.is_file() else sorted(path.glob("*.safetensors"))
    if not files or (path.is_file() and path.suffix != ".safetensors"):
        raise FileNotFoundError(_no_safetensors(path))
    if path.is_dir():
        _check_shard_numbers(files)
    headers: dict[str, TensorHeader] = {}
    for file in files:
        with _open(file) as opened:
            for name in opened.keys():  # noqa: SIM118
                if name in headers:
                    raise ValueError(f"tensor {name!r} is in both {headers[name].file} and {file}: remove one of them")
                part = opened.get_slice(name)
                headers[name] = TensorHeader(file, part.get_dtype(), tuple(part.get_shape()))
    return headers


def read_config(path: str | Path) -> LRCConfig:
    """The configuration of a checkpoint folder: our own config.json, the public one, or transformers'.

    Raises:
        FileNotFoundError: no config.json. ValueError: one that is not understood; the file and the entry are named.
    """
    file = Path(path) / "config.json"
    if not file.is_file():
        raise FileNotFoundError(f"{file} does not exist: a checkpoint folder holds config.json beside its weights")
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and (values.get("format") == FORMAT or not is_public(values)):
            return LRCConfig.from_dict(values)
        return from_public(values)
    except (TypeError, ValueError, AttributeError) as error:
        raise ValueError(f"{file}: {error}") from error


def read_weights(
    path: str | Path,
    config: LRCConfig,
    *,
    parts: Collection[str] = PARTS,
    dtype: torch.dtype | None = None,
    device: torch.device | str = "cpu",
) -> tuple[dict[str, Tensor], ImportReport]:
    """An LRCModel's state dict from a checkpoint folder of any layout that `convert` knows.

    Args:
        parts: of "vision_model", "connector", "language_model"; the tensors of the others are skipped and reported.
        dtype: cast to it; None keeps the stored dtype, which must then be one and the same.

    Returns:
        Tensors by our names, for `load_state_dict(..., assign=True)`, and what was used and skipped.

    Raises:
        FileNotFoundError, ValueError: as `read_headers`; a missing, unknown or misshapen tensor, with its name, file
            and both shapes; mixed or quantised dtypes.
    """
    plan = _plan(path, config, parts, dtype)
    state: dict[str, Tensor] = {}
    for name, tensor in plan.tensors():
        state[name] = tensor.to(device)
    return state, plan.report


def read_dtype(path: str | Path, config: LRCConfig) -> torch.dtype:
    """The dtype of a checkpoint's tensors, from their headers alone. Raises as `read_weights` does."""
    return _plan(path, config, PARTS, None).report.dtype


def save_weights(
    path: str | Path, config: LRCConfig, state: Mapping[str, Tensor], *, max_shard_bytes: int = MAX_SHARD_BYTES
) -> None:
    """Write a checkpoint of our own: config.json and model*.safetensors. An earlier one there is replaced.

    Raises:
        ValueError: a tensor of `state` is missing, unknown or misshapen; mixed dtypes.
    """
    headers = {name: tuple(tensor.shape) for name, tensor in state.items()}
    _match(convert.own_layout(config), headers, dict.fromkeys(headers, "state"), other_parts=frozenset())
    spelt = {dtype: name for name, dtype in _DTYPES.items()}
    _one_dtype({name: spelt.get(tensor.dtype, str(tensor.dtype)) for name, tensor in state.items()}, None)
    sizes = {name: tensor.numel() * tensor.element_size() for name, tensor in state.items()}
    _write(Path(path), config.to_dict(), iter(state.items()), sizes, max_shard_bytes)


def convert_checkpoint(
    source: str | Path,
    target: str | Path,
    *,
    layout: str = "own",
    dtype: torch.dtype | None = None,
    config: LRCConfig | None = None,
    max_shard_bytes: int = MAX_SHARD_BYTES,
) -> ImportReport:
    """Rewrite a checkpoint in another layout, a shard in memory at a time.

    Args:
        layout: "own", or "transformers" for InternVLForConditionalGeneration, which has neither token merging nor token
            dropout: it computes what we do with `tokens_per_frame` = 256 and `dropout` = None.
        config: instead of the config.json of `source`.

    Raises:
        FileNotFoundError, ValueError: as `read_weights`; target that is source.
    """
    if layout not in ("own", "transformers"):
        raise ValueError(f"layout must be one of own, transformers, got {layout!r}")
    if Path(source).resolve() == Path(target).resolve():
        raise ValueError(f"target must be another folder than source, got {target} twice")
    config = config or read_config(source)
    plan = _plan(source, config, PARTS, dtype)
    values = config.to_dict()
    if layout == "transformers":
        tokens = INTERNLM2_TOKENS if config.tokenizer == "internlm2" else ByteTokenizer().special_tokens
        dtype_name = str(plan.report.dtype).removeprefix("torch.")
        values = to_transformers(config, dtype=dtype_name, image_token_id=tokens["<IMG_CONTEXT>"])
    renamed = {stored.targets[0]: stored.name for stored in convert.LAYOUTS[layout](config)}
    item = plan.report.dtype.itemsize
    sizes = {renamed[name]: torch.Size(shape).numel() * item for name, shape in convert.state_shapes(config).items()}
    tensors = ((renamed[name], tensor) for name, tensor in plan.tensors())
    # A wqkv is three neighbouring tensors of ours, so the order of the layout that is read is the order of writing.
    order = [renamed[name] for stored in plan.layout for name in stored.targets]
    _write(Path(target), values, tensors, {name: sizes[name] for name in order}, max_shard_bytes)
    return plan.report


@dataclass(frozen=True)
class _Plan:
    layout: list[Stored]
    headers: Mapping[str, TensorHeader]
    report: ImportReport

    def tensors(self) -> Iterator[tuple[str, Tensor]]:
        opened: dict[Path, Any] = {}
        for stored in self.layout:
            file = self.headers[stored.name].file
            if file not in opened:
                opened[file] = _open(file)
            tensor = opened[file].get_tensor(stored.name).to(self.report.dtype)
            yield from stored.split(tensor).items()


def _plan(path: str | Path, config: LRCConfig, parts: Collection[str], dtype: torch.dtype | None) -> _Plan:
    headers = read_headers(path)
    kind = next((kind for kind, mark in _MARKS.items() if mark in headers), None)
    if kind is None:
        marks = ", ".join(repr(mark) for mark in _MARKS.values())
        raise ValueError(f"{path} holds no checkpoint that is known: one of {marks} must be in it")
    if kind == "internlm2":
        layout, others = convert.internlm2_layout(config.text), frozenset[str]()
        if set(parts) != {"language_model"}:
            raise ValueError(f"{path} holds the LLM alone: ask for parts=('language_model',), got {tuple(parts)}")
    else:
        layout = convert.LAYOUTS[kind](config, parts)
        others = frozenset(s.name for s in convert.LAYOUTS[kind](config)) - {s.name for s in layout}
    shapes = {name: header.shape for name, header in headers.items()}
    skipped = _match(layout, shapes, {name: str(header.file) for name, header in headers.items()}, others)
    kept = _one_dtype({stored.name: headers[stored.name].dtype for stored in layout}, dtype)
    loaded = sum(len(stored.targets) for stored in layout)
    return _Plan(layout, headers, ImportReport(kind, len(layout), loaded, kept, skipped))


def _match(
    layout: Collection[Stored],
    shapes: Mapping[str, tuple[int, ...]],
    files: Mapping[str, str],
    other_parts: frozenset[str],
) -> dict[str, tuple[str, ...]]:
    """Hold a checkpoint against the layout; the tensors that rules skip, by rule."""
    wanted = {stored.name: stored for stored in layout}
    if missing := [name for name in wanted if name not in shapes]:
        shown = ", ".join(f"{name!r} {list(wanted[name].shape)}" for name in missing[:3])
        raise ValueError(
            f"{len(missing)} of {len(wanted)} tensors are missing, first {shown}: fetch all shards of the checkpoint, "
            "and check num_layers in its config.json"
        )
    skipped: dict[str, list[str]] = {}
    for name, shape in shapes.items():
        if name in wanted:
            if tuple(shape) != wanted[name].shape:
                raise ValueError(
                    f"tensor {name!r} in {files[name]} must have shape {list(wanted[name].shape)} by config.json, got "
                    f"{list(shape)}: correct the sizes in config.json (vocab_size counts added tokens too)"
                )
            continue
        rule = "part that was not asked for" if name in other_parts else convert.skip_rule(name)
        if rule is None:
            raise ValueError(
                f"unknown tensor {name!r} of shape {list(shape)} in {files[name]}: it is neither used nor skipped by a "
                "rule (convert.HEAD_RULES); check num_layers in config.json"
            )
        skipped.setdefault(rule, []).append(name)
    return {rule: tuple(names) for rule, names in skipped.items()}


def _one_dtype(seen: Mapping[str, str], dtype: torch.dtype | None) -> torch.dtype:
    counts = Counter(seen.values())
    for name, kind in seen.items():
        if kind not in _DTYPES:
            raise ValueError(f"tensor {name!r} must be one of {', '.join(_DTYPES)}, got {kind}: it is quantised")
    if dtype is not None:
        return dtype
    if len(counts) > 1:
        rarest = min(counts, key=lambda kind: counts[kind])
        first = next(name for name, kind in seen.items() if kind == rarest)
        listed = ", ".join(f"{count} {kind}" for kind, count in counts.items())
        raise ValueError(f"mixed dtypes: {listed} (first {rarest}: {first!r}): choose one, e.g. dtype=torch.bfloat16")
    return _DTYPES[next(iter(counts))]


def _write(
    path: Path, config: Mapping[str, Any], tensors: Iterator[tuple[str, Tensor]], sizes: Mapping[str, int], limit: int
) -> None:
    """Write shards beside what is there, then put them in its place."""
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    shards = _shards(sizes, limit)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i:05d}-of-{len(shards):05d}.safetensors" for i in range(1, len(shards) + 1)]
    partial = [path / f"{name}.partial" for name in names]
    try:
        for file, shard in zip(partial, shards, strict=True):
            pairs = (next(tensors) for _ in shard)
            save_file(
                {name: tensor.detach().cpu().contiguous().clone() for name, tensor in pairs}, file, {"format": "pt"}
            )
        for old in [*path.glob("model*.safetensors"), *path.glob("model*.safetensors.index.json")]:
            old.unlink()
        for file, name in zip(partial, names, strict=True):
            file.replace(path / name)
    finally:
        for file in partial:
            file.unlink(missing_ok=True)
    if len(shards) > 1:
        weight_map = {name: file for file, shard in zip(names, shards, strict=True) for name in shard}
        index = {"metadata": {"total_size": sum(sizes.values())}, "weight_map": weight_map}
        (path / "model.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")


def _shards(sizes: Mapping[str, int], limit: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > limit:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _open(file: Path) -> Any:
    try:
        from safetensors import SafetensorError, safe_open
    except ImportError as error:
        raise ImportError(f'reading weights needs safetensors: pip install "lrc-kernels[model]" ({error})') from error
    try:
        return safe_open(file, framework="pt")
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file} is cut or damaged ({error}): copy or download this file again") from error


def _check_shard_numbers(files: Collection[Path]) -> None:
    present = {file.name for file in files}
    for file in files:
        if found := re.fullmatch(r"(.*-)(\d+)(-of-)(\d+)(\.safetensors)", file.name):
            start, digits, of, total, end = found.groups()
            for number in range(1, int(total) + 1):
                name = f"{start}{number:0{len(digits)}d}{of}{total}{end}"
                if name not in present:
                    raise FileNotFoundError(f"{file.parent / name} is missing: download all {int(total)} shards")


def _no_safetensors(path: Path) -> str:
    pickles = [path] if path.is_file() else [file for pattern in _PICKLES for file in path.glob(pattern)]
    if pickles:
        return (
            f"{path} holds no .safetensors file, and {pickles[0].name} is a pickle, which is never read: convert it "
            "with safetensors.torch.save_file where you trust it"
        )
    return f"{path} holds no .safetensors file"
