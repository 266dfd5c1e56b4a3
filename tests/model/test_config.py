# SPDX-License-Identifier: Apache-2.0
"""Configurations: presets, what validate says, overrides, JSON, and the public config.json."""

from __future__ import annotations

import copy
import json
import pickle
from collections.abc import Callable
from typing import Any

import pytest

from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.config import (
    PRESETS,
    ConnectorConfig,
    LRCConfig,
    TextConfig,
    internvideo2_5_8b,
    internvideo2_5_8b_paper,
    preset,
    tiny,
)
from lrc_model.public_config import from_public, text_from_public, to_transformers

DROPOUT = DropoutSchedule((1, 3), (0.5, 0.25), ("bernoulli", "attention"))


def test_the_release_and_the_paper() -> None:
    config = internvideo2_5_8b()
    assert (config.clip_frames, config.tokens_per_frame, config.frame_tokens, config.token_width) == (4, 16, 256, 4096)
    assert (config.num_layers, config.num_heads, config.num_kv_heads, config.hidden_size) == (32, 32, 8, 4096)
    assert (config.image_size, config.text.head_dim, config.merges, config.dropout) == (448, 128, True, None)
    assert config.num_visual_tokens(4) == 64
    assert config.num_visual_tokens(10_000) == 160_000
    assert internvideo2_5_8b_paper().num_visual_tokens(8) == 128
    assert internvideo2_5_8b_paper().clip_frames == 8


@pytest.mark.parametrize("name", PRESETS)
def test_presets_survive_json_pickle_and_copy(name: str) -> None:
    config = preset(name).override({"dropout": DROPOUT})
    assert LRCConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    assert pickle.loads(pickle.dumps(config)) == copy.deepcopy(config) == config
    assert hash(config) != hash(preset(name))


def test_unknown_names_are_answered_with_the_nearest() -> None:
    with pytest.raises(ValueError, match="unknown preset 'tinny', did you mean 'tiny'"):
        preset("tinny")
    with pytest.raises(ValueError, match="unknown field 'clip_frame', did you mean 'clip_frames'"):
        tiny().override({"clip_frame": 8})
    with pytest.raises(ValueError, match=r"unknown field 'text.layers'.*text"):
        tiny().override({"text.layers": 8})
    with pytest.raises(AttributeError, match="no field 'num_layer', did you mean 'num_layers'"):
        _ = tiny().num_layer
    with pytest.raises(ValueError, match="text: unknown field 'heads'"):
        LRCConfig.from_dict({**tiny().to_dict(), "text": {"heads": 1}})
    with pytest.raises(ValueError, match=r"text: .*missing .*hidden_size"):
        LRCConfig.from_dict({**tiny().to_dict(), "text": {"vocab_size": 1}})
    with pytest.raises(ValueError, match="config format must be 'lrc_model/1', got 'x'"):
        LRCConfig.from_dict({"format": "x"})


def test_overrides_reach_every_part() -> None:
    config = tiny().override(
        {"clip_frames": 2, "text.rope_factor": None, "image_size": 84, "vocab_size": 300, "dropout": DROPOUT}
    )
    assert (config.clip_frames, config.text.rope_factor, config.vision.image_size) == (2, None, 84)
    assert (config.text.vocab_size, config.frame_tokens) == (300, 9)
    assert config.override({"dropout.positions": "renumber"}).dropout.positions == "renumber"
    assert config.override({"dropout": None}).dropout is None
    with pytest.raises(ValueError, match="dropout is None: set dropout itself before dropout.layers"):
        tiny().override({"dropout.layers": (1,)})


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ({"tokens_per_frame": 5}, r"tokens_per_frame must be <= 4, .* got 5; the nearest is 4"),
        ({"image_size": 70}, "image_size must be a multiple of patch_size . shuffle = 28, got 70; the nearest is 56"),
        ({"connector.num_metric_heads": 5}, "num_metric_heads must divide .* width 128, got 5; the nearest is 4"),
        ({"num_kv_heads": 3}, "num_kv_heads must divide num_heads = 4, got 3; the nearest is 2"),
        ({"hidden_size": 63}, "hidden_size must be num_heads = 4 times .* got 63; the nearest is 64"),
        ({"hidden_size": 8}, "hidden_size must be num_heads = 4 times .* got 8; the nearest is 16"),
        ({"clip_frames": 0}, "clip_frames must be >= 1, got 0"),
        ({"num_layers": 2, "dropout": DROPOUT}, r"layers must be < num_layers = 2, got \[1, 3\].*nearest is \[1\]"),
        ({"text.rope_factor": 0.5}, "rope_factor must be a finite number >= 1.0, got 0.5"),
        ({"tokenizer": "bpe"}, "tokenizer must be one of bytes, internlm2, got 'bpe'"),
        ({"template": "llama"}, "template must be one of internvl2_5, internlm2-chat, plain, got 'llama'"),
    ],
)  # fmt: skip
def test_what_does_not_fit_is_named_with_the_nearest_value(values: dict[str, Any], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        tiny().override(values)


@pytest.mark.parametrize(
    ("arguments", "match"),
    [
        (((3, 1), (0.5, 0.25), ("random",) * 2), r"layers must increase, got \[3, 1\]; the nearest is \[1, 3\]"),
        (((1, 1), (0.5, 0.25), ("random",) * 2), r"must increase, got \[1, 1\]; the nearest is \[1\]"),
        (((1, 3), (0.5, 0.0), ("random",) * 2), r"keep_ratios\[1\] must be in \(0, 1\], got 0.0: 0 would leave no"),
        (((1, 3), (0.25, 0.5), ("random",) * 2), r"must not increase, got \[0.25, 0.5\]; the nearest is \[0.5, 0.25\]"),
        (((1, 3), (0.5,), ("random",) * 2), "one entry per layer, got 2 layers, 1 keep_ratios and 2 kinds"),
        (((1,), (0.5,), ("uniform",)), "kinds.0. must be one of attention, linspace, random, bernoulli, got 'uniform'"),
        (((1,), (0.5,), ("random",), "drop"), "positions must be one of keep, renumber, got 'drop'"),
    ],
)  # fmt: skip
def test_bad_dropout_is_refused(arguments: tuple[Any, ...], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        DropoutSchedule(*arguments)


def test_a_remainder_of_frames_names_the_next_whole_clip() -> None:
    with pytest.raises(ValueError, match="multiple of clip_frames = 4, got 6: pad the video to 8 frames"):
        tiny().num_visual_tokens(6)


def test_rope_base_is_a_function_of_the_prefill_alone() -> None:
    text = internvideo2_5_8b().text
    long = text.rope_base(65_536)
    assert text.rope_base(32_768) == text.rope_base(10) == 1e6
    assert long == pytest.approx(1e6 * 3 ** (128 / 126))
    assert text.rope_base(10) == 1e6
    assert TextConfig(16, 16, 1, 2, 1, 8, max_position=8, rope_factor=None).rope_base(100) == 1e6


def test_the_public_config_is_read(public_config: dict[str, Any], tiny_config: LRCConfig) -> None:
    assert from_public(public_config) == tiny_config


def test_the_release_defaults_to_clips_of_four(public_config: dict[str, Any]) -> None:
    for name in ("local_num_frames", "num_tome_tokens"):
        del public_config[name]
    public_config["force_image_size"] = 448
    config = from_public(public_config)
    assert config.connector == ConnectorConfig(4, 16, num_metric_heads=4)


@pytest.mark.parametrize(
    ("change", "match"),
    [
        (lambda c: c.pop("llm_config"), "must hold vision_config and llm_config"),
        (lambda c: c.update(ps_version="v1"), "config.json: ps_version must be 'v2', .* got 'v1'"),
        (lambda c: c.update(template="vicuna"), "template must be one of .*got 'vicuna'"),
        (lambda c: c.update(num_tome_tokens=6), "num_tome_tokens must be a multiple of local_num_frames = 4, got 6"),
        (lambda c: c["vision_config"].update(qk_normalization=True), "vision_config: qk_normalization must be False"),
        (lambda c: c["vision_config"].update(image_size=[56, 28]) or c.pop("force_image_size"), "must be square"),
        (lambda c: c["llm_config"].pop("hidden_size"), "llm_config: hidden_size is missing"),
        (lambda c: c["llm_config"].update(architectures=["Qwen2ForCausalLM"]), "must be InternLM2 or Llama, got Qwen2"),
        (lambda c: c["llm_config"].update(rope_scaling={"type": "yarn"}), "rope_scaling must be dynamic .* got 'yarn'"),
        (lambda c: c["llm_config"].update(tie_word_embeddings=True), "tie_word_embeddings must be false"),
    ],
)
def test_public_settings_we_lack_are_named(
    change: Callable[[dict[str, Any]], Any], match: str, public_config: dict[str, Any]
) -> None:
    change(public_config)
    with pytest.raises(ValueError, match=match):
        from_public(public_config)


def test_transformers_config_comes_back_without_merging(tiny_config: LRCConfig) -> None:
    config = from_public(to_transformers(tiny_config, dtype="float32", image_token_id=5))
    assert (config.vision, config.text) == (tiny_config.vision, tiny_config.text)
    assert (config.clip_frames, config.tokens_per_frame, config.merges) == (1, 4, False)


def test_an_llm_alone_is_read(public_config: dict[str, Any], tiny_config: LRCConfig) -> None:
    assert text_from_public(public_config["llm_config"]) == tiny_config.text
