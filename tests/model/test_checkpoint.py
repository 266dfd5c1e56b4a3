# SPDX-License-Identifier: Apache-2.0
"""Checkpoint folders: strict reading by headers, our own format, conversion, and folders that are refused."""

from __future__ import annotations

import json
import pickle
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc_model import convert
from lrc_model.checkpoint import convert_checkpoint, read_config, read_headers, read_weights, save_weights
from lrc_model.config import LRCConfig, internvideo2_5_8b, tiny
from lrc_model.connector import Connector, encode_clips
from lrc_model.vision import VisionEncoder

pytest.importorskip("safetensors", reason='safetensors is not installed (pip install "lrc-kernels[model]")')
from safetensors.torch import save_file

Make = Callable[..., Any]
WQKV = "language_model.model.layers.0.attention.wqkv.weight"


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return set(a) == set(b) and all(a[name].dtype == b[name].dtype and torch.equal(a[name], b[name]) for name in a)


def test_a_public_checkpoint_is_read_from_its_headers(public_checkpoint: Make, tiny_config: LRCConfig) -> None:
    public = public_checkpoint(heads=True)
    # The public index leaves the heads out; this one also names a tensor and a file that do not exist.
    index = {"metadata": {}, "weight_map": {"nothing.weight": "model-00009-of-00009.safetensors"}}
    (public.path / "model.safetensors.index.json").write_text(json.dumps(index))
    assert read_config(public.path) == tiny_config
    state, report = read_weights(public.path, tiny_config)
    layout = convert.public_layout(tiny_config)
    assert same(state, convert.import_state({s.name: public.tensors[s.name] for s in layout}, layout))
    assert (report.layout, report.num_used, report.num_loaded) == ("public", len(layout), len(state))
    assert report.dtype == torch.float32
    counts = {rule: len(names) for rule, names in report.skipped.items()}
    assert counts == {
        "mask head (SAM 2)": 1,
        "temporal head (CG-DETR)": 2,
        "mask adapter": 3,
        "region head and position prompts": 2,
        "older temporal head": 2,
        "task vectors": 3,
    }
    assert "skipped    3  task vectors" in str(report) and "public checkpoint" in str(report)


def test_all_573_tensors_of_the_release_match_by_header(tmp_path: Path) -> None:
    # A shard whose data is a hole in the file: the real names, shapes and sizes without 16 GB on the disk.
    config = internvideo2_5_8b()
    entries, offset = {}, 0
    for stored in convert.public_layout(config):
        size = 2 * torch.Size(stored.shape).numel()
        entries[stored.name] = {"dtype": "BF16", "shape": list(stored.shape), "data_offsets": [offset, offset + size]}
        offset += size
    header = json.dumps(entries).encode()
    with (tmp_path / "model.safetensors").open("wb") as file:
        file.write(struct.pack("<Q", len(header)) + header)
        file.truncate(8 + len(header) + offset)
    headers = read_headers(tmp_path)
    assert len(headers) == 573
    assert headers[WQKV].shape == (6144, 4096) and headers[WQKV].dtype == "BF16"
    state, report = read_weights(tmp_path, config, parts=("connector",))
    assert (len(state), report.num_used, report.dtype) == (6, 6, torch.bfloat16)
    assert len(report.skipped["part that was not asked for"]) == 567
    (tmp_path / "model.safetensors").unlink()


def test_weights_load_into_the_modules(public_checkpoint: Make, tiny_config: LRCConfig) -> None:
    public = public_checkpoint()
    state, _ = read_weights(public.path, tiny_config, parts=("vision_model", "connector"), dtype=torch.float64)
    vision, connector = VisionEncoder.empty(tiny_config.vision), Connector.empty(tiny_config)
    for prefix, module in (("vision_model.", vision), ("connector.", connector)):
        held = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        module.load_state_dict(held, strict=True, assign=True)
    frames = torch.randint(0, 256, (8, 3, 56, 56), dtype=torch.uint8)
    with torch.no_grad():
        tokens = encode_clips(vision, connector, frames).tokens
    assert tokens.shape == (2, 4, 64) and tokens.dtype == torch.float64 and bool(tokens.isfinite().all())


def without(name: str) -> Callable[[dict[str, Tensor]], Any]:
    return lambda tensors: tensors.pop(name)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (without(WQKV), rf"1 of \d+ tensors are missing, first '{WQKV}' \[128, 64\]: fetch all shards"),
        (without("mlp1.3.bias"), r"first 'mlp1.3.bias' \[64\]"),
        (without("vision_model.encoder.layers.1.ls2"), r"first 'vision_model.encoder.layers.1.ls2' \[32\]"),
        (lambda t: t.update(extra=torch.ones(2, 3)), r"unknown tensor 'extra' of shape \[2, 3\] in .*: it is"),
        (
            lambda t: t.update({WQKV.replace(".0.", ".4."): torch.ones(1)}),
            r"unknown tensor 'language_model.model.layers.4.*check num_layers in config.json",
        ),
        (
            lambda t: t.update({"language_model.output.weight": torch.ones(279, 64)}),
            r"'language_model.output.weight' in .* must have shape \[272, 64\] by config.json, got \[279, 64\]",
        ),
        (lambda t: t.update({"mlp1.1.bias": torch.ones(1, 64)}), r"'mlp1.1.bias' .* shape \[64\] .* got \[1, 64\]"),
        (
            lambda t: t.update({"mlp1.1.bias": torch.ones(64).bfloat16()}),
            r"mixed dtypes: .*1 BF16.*\(first BF16: 'mlp1.1.bias'\): choose one, e.g. dtype=torch.bfloat16",
        ),
        (lambda t: t.update({"mlp1.1.bias": torch.ones(64).to(torch.int8)}), "'mlp1.1.bias' .* I8: it is quantised"),
        (without("language_model.model.tok_embeddings.weight"), "holds no checkpoint that is known"),
    ],
)  # fmt: skip
def test_what_is_missing_unknown_or_misshapen_is_named(
    change: Callable[[dict[str, Tensor]], Any], match: str, public_checkpoint: Make, tiny_config: LRCConfig
) -> None:
    public = public_checkpoint(change)
    with pytest.raises(ValueError, match=match):
        read_weights(public.path, tiny_config)


def test_a_dtype_settles_mixed_dtypes(public_checkpoint: Make, tiny_config: LRCConfig) -> None:
    public = public_checkpoint(lambda t: t.update({"mlp1.1.bias": torch.ones(64).bfloat16()}))
    state, report = read_weights(public.path, tiny_config, dtype=torch.bfloat16)
    assert {t.dtype for t in state.values()} == {report.dtype} == {torch.bfloat16}


def cut(file: Path, size: int) -> None:
    file.write_bytes(file.read_bytes()[:size])


@pytest.mark.parametrize(
    "damage",
    [
        lambda file: cut(file, 0),
        lambda file: cut(file, 5),
        lambda file: cut(file, 40),
        lambda file: cut(file, file.stat().st_size - 1),
        lambda file: file.write_bytes(b"<html>404 not found</html>" * 100),
        lambda file: file.write_bytes(b"\xff" * 8 + file.read_bytes()[8:]),
        lambda file: file.write_bytes(file.read_bytes() + b"more"),
    ],
    ids=["empty", "length cut", "header cut", "data cut", "html", "huge header", "too long"],
)
def test_a_damaged_shard_is_named(damage: Callable[[Path], Any], public_checkpoint: Make) -> None:
    public = public_checkpoint()
    damage(public.shards[1])
    with pytest.raises(
        ValueError, match=r"model-00002-of-00003.safetensors is cut or damaged .*: copy or download this"
    ):
        read_headers(public.path)


def test_folders_without_weights_are_refused(tmp_path: Path, public_checkpoint: Make) -> None:
    with pytest.raises(FileNotFoundError, match="nowhere does not exist"):
        read_headers(tmp_path / "nowhere")
    (tmp_path / "empty").mkdir()
    with pytest.raises(FileNotFoundError, match="empty holds no .safetensors file"):
        read_headers(tmp_path / "empty")
    public = public_checkpoint()
    public.shards[2].unlink()
    with pytest.raises(FileNotFoundError, match="model-00003-of-00003.safetensors is missing: download all 3 shards"):
        read_headers(public.path)
    shutil.copy(public.shards[0], public.path / "copy.safetensors")
    for shard, name in zip(public.shards[1:], ("b.safetensors", "a.safetensors"), strict=True):
        shard.rename(public.path / name)
    with pytest.raises(ValueError, match=r"tensor '.*' is in both .*b.safetensors and .*copy.safetensors: remove one"):
        read_headers(public.path)


class Boom:
    def __reduce__(self) -> tuple[Any, ...]:
        return (pytest.fail, ("a pickle was loaded",))


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pth"])
def test_pickles_are_never_read(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(pickle.dumps(Boom()))
    for path in (tmp_path, tmp_path / name):
        with pytest.raises(
            FileNotFoundError, match=f"{name} is a pickle, which is never read: convert it with safeten"
        ):
            read_headers(path)


def test_configs_that_cannot_be_read_name_the_file(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="config.json does not exist: a checkpoint folder holds config.json"):
        read_config(tmp_path)
    for text, match in (("{", "config.json: Expecting"), ("[]", "config.json: "), ("{}", "config format must be")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(ValueError, match=match):
            read_config(tmp_path)


@pytest.mark.parametrize("max_shard_bytes", [10**9, 100_000])
def test_our_own_format_comes_back_bit_by_bit(max_shard_bytes: int, tmp_path: Path) -> None:
    config = tiny().override({"clip_frames": 8})
    state = {name: torch.randn(shape).bfloat16() for name, shape in convert.state_shapes(config).items()}
    save_weights(tmp_path, config, state, max_shard_bytes=max_shard_bytes)
    files = list(tmp_path.glob("*.safetensors"))
    assert (len(files) > 1) == (max_shard_bytes < 10**6)
    assert all(file.stat().st_size < max_shard_bytes + 20_000 for file in files)
    loaded, report = read_weights(tmp_path, read_config(tmp_path))
    assert read_config(tmp_path) == config and same(loaded, state)
    assert (report.layout, report.dtype, dict(report.skipped)) == ("own", torch.bfloat16, {})


def test_saving_again_replaces_what_was_there(tmp_path: Path) -> None:
    state = {name: torch.zeros(shape) for name, shape in convert.state_shapes(tiny()).items()}
    save_weights(tmp_path, tiny(), state, max_shard_bytes=100_000)
    (tmp_path / "tokenizer.model").write_bytes(b"kept")
    loaded, _ = read_weights(tmp_path, tiny())
    save_weights(tmp_path, tiny(), {name: t + 1 for name, t in loaded.items()})
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors", "tokenizer.model"}
    assert all(bool((t == 1).all()) for t in read_weights(tmp_path, tiny())[0].values())
    with pytest.raises(ValueError, match=r"tensors are missing, first 'language_model.lm_head.weight' \[272, 64\]"):
        save_weights(tmp_path, tiny(), {name: t for name, t in loaded.items() if "lm_head" not in name})
    mixed = {name: t.bfloat16() if "lm_head" in name else t for name, t in loaded.items()}
    with pytest.raises(
        ValueError, match=r"mixed dtypes: .*\(first BF16: 'language_model.lm_head.weight'\): choose one"
    ):
        save_weights(tmp_path, tiny(), mixed)
    assert len(list(tmp_path.iterdir())) == 3


def test_a_failed_save_leaves_the_old_checkpoint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = {name: torch.zeros(shape) for name, shape in convert.state_shapes(tiny()).items()}
    save_weights(tmp_path, tiny(), state)
    before = (tmp_path / "model.safetensors").read_bytes()

    def full_disk(tensors: dict[str, Tensor], file: Path, metadata: dict[str, str]) -> None:
        file.write_bytes(b"half")
        raise OSError("no space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full_disk)
    with pytest.raises(OSError, match="no space left"):
        save_weights(tmp_path, tiny(), {name: t + 1 for name, t in state.items()})
    assert (tmp_path / "model.safetensors").read_bytes() == before
    assert {file.name for file in tmp_path.iterdir()} == {"config.json", "model.safetensors"}


@pytest.mark.parametrize("max_shard_bytes", [10**9, 200_000])
def test_conversion_rewrites_a_public_checkpoint(
    max_shard_bytes: int, public_checkpoint: Make, tiny_config: LRCConfig, tmp_path: Path
) -> None:
    public = public_checkpoint(heads=True)
    wanted, _ = read_weights(public.path, tiny_config, dtype=torch.bfloat16)
    report = convert_checkpoint(public.path, tmp_path / "own", dtype=torch.bfloat16, max_shard_bytes=max_shard_bytes)
    assert report.layout == "public" and len(report.skipped) == 6
    assert same(read_weights(tmp_path / "own", read_config(tmp_path / "own"))[0], wanted)
    convert_checkpoint(tmp_path / "own", tmp_path / "hf", layout="transformers", max_shard_bytes=max_shard_bytes)
    back, report = read_weights(tmp_path / "hf", read_config(tmp_path / "hf"))
    assert report.layout == "transformers" and same(back, wanted)
    with pytest.raises(ValueError, match="target must be another folder than source"):
        convert_checkpoint(public.path, public.path)
    with pytest.raises(ValueError, match="layout must be one of own, transformers, got 'gguf'"):
        convert_checkpoint(public.path, tmp_path / "x", layout="gguf")


def test_an_llm_alone_is_read(tmp_path: Path, tiny_config: LRCConfig) -> None:
    layout = convert.internlm2_layout(tiny_config.text)
    tensors = {stored.name: torch.randn(stored.shape) for stored in layout}
    save_file(tensors | {"model.layers.0.attention.rotary_emb.inv_freq": torch.ones(4)}, tmp_path / "a.safetensors")
    state, report = read_weights(tmp_path, tiny_config, parts=("language_model",))
    assert same(state, convert.import_state(tensors, layout))
    assert report.layout == "internlm2" and list(report.skipped) == ["RoPE frequencies"]
    with pytest.raises(ValueError, match=r"holds the LLM alone: ask for parts=\('language_model',\)"):
        read_weights(tmp_path, tiny_config)


def test_transformers_loads_the_export_and_computes_the_same_tokens(
    public_checkpoint: Make, tiny_config: LRCConfig, tmp_path: Path
) -> None:
    transformers = pytest.importorskip("transformers", reason="transformers reads the export (pip install [model])")
    config = tiny_config.override({"clip_frames": 1, "tokens_per_frame": 4})
    public = public_checkpoint(config=config)
    convert_checkpoint(public.path, tmp_path / "hf", layout="transformers", max_shard_bytes=200_000)
    model, info = transformers.InternVLForConditionalGeneration.from_pretrained(
        tmp_path / "hf", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info[kind] for kind in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    state, _ = read_weights(public.path, config)
    # A loaded model is saved by the names it was loaded from, a fresh one by those that lie on the hub.
    fresh = transformers.InternVLForConditionalGeneration(model.config)
    fresh.load_state_dict(model.state_dict())
    fresh.save_pretrained(tmp_path / "saved")
    saved, report = read_weights(tmp_path / "saved", read_config(tmp_path / "saved"))
    assert report.layout == "transformers_saved" and same(saved, state)
    assert read_config(tmp_path / "saved") == read_config(tmp_path / "hf")
    vision, connector = VisionEncoder.empty(config.vision), Connector.empty(config)
    for prefix, module in (("vision_model.", vision), ("connector.", connector)):
        held = {name.removeprefix(prefix): t for name, t in state.items() if name.startswith(prefix)}
        module.load_state_dict(held, strict=True, assign=True)
    frames = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (frames / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        stock = model.eval().get_image_features(pixel_values=pixels)
        ours = encode_clips(vision.eval(), connector, frames).tokens
    assert float(stock.pooler_output.abs().max()) > 0.5
    torch.testing.assert_close(vision(frames), stock.last_hidden_state, rtol=0, atol=1e-5)
    torch.testing.assert_close(ours, stock.pooler_output, rtol=0, atol=1e-5)
    assert model.config.text_config.rope_parameters["rope_type"] == "dynamic"
    assert torch.equal(model.lm_head.weight, state["language_model.lm_head.weight"])
