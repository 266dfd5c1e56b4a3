# SPDX-License-Identifier: Apache-2.0
"""config.json of other code, in and out: public InternVideo2.5 / InternVL2.5 / InternLM2 and transformers' InternVL."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lrc_model.config import TEMPLATES, ConnectorConfig, LRCConfig, TextConfig
from lrc_model.vision import VisionConfig

# Settings that this code does not vary, by their public name, and the only value that each may have.
_FIXED_VISION = {
    "qk_normalization": False,
    "use_qk_norm": False,
    "qkv_bias": True,
    "attention_bias": True,
    "norm_type": "layer_norm",
    "hidden_act": "gelu",
    "layer_norm_eps": 1e-6,
    "num_channels": 3,
}
_FIXED_TEXT = {"bias": False, "attention_bias": False, "mlp_bias": False, "hidden_act": "silu"}
_FIXED_TOP = {"downsample_ratio": 0.5, "select_layer": -1, "vision_feature_layer": -1, "ps_version": "v2"}
_TEXT_MODELS = ("InternLM2ForCausalLM", "LlamaForCausalLM", "internlm2", "llama")


def is_public(values: Mapping[str, Any]) -> bool:
    """Whether a config.json is one that `from_public` reads."""
    return "vision_config" in values and ("llm_config" in values or "text_config" in values)


def from_public(values: Mapping[str, Any]) -> LRCConfig:
    """The public `config.json` (`vision_config` with `llm_config` or transformers' `text_config`) as an LRCConfig.

    `local_num_frames` and `num_tome_tokens` give the clips where they are present; the default is the released one, 4
    frames -> 64 tokens. transformers' InternVL merges nothing, so there the clips are single frames.

    Raises:
        ValueError: a missing entry, or a setting that this code does not have; both are named.
    """
    if not is_public(values):
        raise ValueError(f"config.json must hold vision_config and llm_config, got {sorted(values)}")
    _check_fixed(values, _FIXED_TOP, "config.json")
    seen, text_name = values["vision_config"], "llm_config" if "llm_config" in values else "text_config"
    _check_fixed(seen, _FIXED_VISION, "vision_config")
    text = text_from_public(values[text_name], where=text_name, tied=values.get("tie_word_embeddings"))
    vision = VisionConfig(
        hidden_size=_get(seen, "hidden_size", "vision_config", 1024),
        num_layers=_get(seen, "num_hidden_layers", "vision_config", 24),
        num_heads=_get(seen, "num_attention_heads", "vision_config", 16),
        intermediate_size=_get(seen, "intermediate_size", "vision_config", 4096),
        image_size=_square(values.get("force_image_size") or _get(seen, "image_size", "vision_config", 448)),
        patch_size=_square(_get(seen, "patch_size", "vision_config", 14)),
    )
    frame_tokens = (vision.image_size // vision.patch_size // 2) ** 2
    clip_frames = values.get("local_num_frames") or (4 if text_name == "llm_config" else 1)
    kept = values.get("num_tome_tokens") or (16 if text_name == "llm_config" else frame_tokens) * clip_frames
    if kept % clip_frames:
        raise ValueError(f"num_tome_tokens must be a multiple of local_num_frames = {clip_frames}, got {kept}")
    template = values.get("template", "internvl2_5")
    if template not in TEMPLATES:
        raise ValueError(f"config.json: template must be one of {', '.join(TEMPLATES)}, got {template!r}")
    # The public connector takes its metric heads from the LLM (hico2.py): 32 of them over 4096 channels.
    connector = ConnectorConfig(clip_frames, kept // clip_frames, num_metric_heads=text.num_heads)
    return LRCConfig(vision, connector, text, template=template)


def text_from_public(values: Mapping[str, Any], *, where: str = "config.json", tied: bool | None = None) -> TextConfig:
    """The public configuration of InternLM2 (or of a Llama of the same form) as a TextConfig.

    Raises:
        ValueError: a missing entry, or a setting that this code does not have; both are named.
    """
    kinds = [*values.get("architectures", []), *filter(None, [values.get("model_type")])]
    if kinds and not any(kind in _TEXT_MODELS for kind in kinds):
        raise ValueError(f"{where}: the LLM must be InternLM2 or Llama, got {kinds[0]}")
    _check_fixed(values, _FIXED_TEXT, where)
    if tied or (tied is None and values.get("tie_word_embeddings")):
        raise ValueError(f"{where}: tie_word_embeddings must be false, the output head has weights of its own")
    rope = {**(values.get("rope_scaling") or {}), **(values.get("rope_parameters") or {})}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind not in ("default", "dynamic"):
        raise ValueError(f"{where}: rope_scaling must be dynamic or absent, got {kind!r}")
    return TextConfig(
        vocab_size=_get(values, "vocab_size", where),
        hidden_size=_get(values, "hidden_size", where),
        num_layers=_get(values, "num_hidden_layers", where),
        num_heads=(heads := _get(values, "num_attention_heads", where)),
        num_kv_heads=values.get("num_key_value_heads") or heads,
        intermediate_size=_get(values, "intermediate_size", where),
        max_position=_get(values, "max_position_embeddings", where, 32768),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 1e6))),
        rope_factor=float(rope.get("factor", 1.0)) if kind == "dynamic" else None,
        rms_norm_eps=float(_get(values, "rms_norm_eps", where, 1e-5)),
    )


def to_transformers(config: LRCConfig, *, dtype: str, image_token_id: int) -> dict[str, Any]:
    """config.json of transformers' `InternVLForConditionalGeneration`; it has no token merging and no dropout."""
    vision, text = config.vision, config.text
    rope: dict[str, Any] = {"rope_type": "default"}
    if text.rope_factor is not None:
        rope = {"rope_type": "dynamic", "factor": text.rope_factor}
    return {
        "architectures": ["InternVLForConditionalGeneration"],
        "model_type": "internvl",
        "dtype": dtype,
        "downsample_ratio": 1 / config.connector.shuffle,
        "image_seq_length": config.frame_tokens,
        "image_token_id": image_token_id,
        "tie_word_embeddings": False,
        "vision_config": {
            "model_type": "internvl_vision",
            "attention_bias": True,
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": [vision.image_size, vision.image_size],
            "patch_size": [vision.patch_size, vision.patch_size],
            "norm_type": "layer_norm",
        },
        "text_config": {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": None if text.rope_factor is None else rope,
            "rope_parameters": {**rope, "rope_theta": text.rope_theta},
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 2,
        },
    }


def _get(values: Mapping[str, Any], name: str, where: str, default: Any = None) -> Any:
    value = values.get(name, default)
    if value is None:
        raise ValueError(f"{where}: {name} is missing")
    return value


def _square(size: Any) -> int:
    if isinstance(size, (list, tuple)):
        if len(set(size)) != 1:
            raise ValueError(f"vision_config: images and patches must be square, got {list(size)}")
        size = size[0]
    return int(size)


def _check_fixed(values: Mapping[str, Any], fixed: Mapping[str, Any], where: str) -> None:
    for name, wanted in fixed.items():
        if values.get(name, wanted) != wanted:
            raise ValueError(f"{where}: {name} must be {wanted!r}, which is all this code has, got {values[name]!r}")
