# SPDX-License-Identifier: Apache-2.0
"""Checkpoints as the public code writes them, at a tiny size: config.json and shards, with or without heads."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from lrc_model import convert
from lrc_model.config import LRCConfig, tiny

HEADS = {
    "sam.image_encoder.trunk.pos_embed": (1, 4),
    "cg_model.transformer.decoder.bias": (3,),
    "cg_criterion.empty_weight": (2,),
    "track_embed.layers.0.weight": (4, 4),
    "track_embed_decode2.layers.0.weight": (4, 4),
    "track_embed_decoder.layers.1.weight": (4, 4),
    "loc_encoder.0.weight": (4, 4),
    "loc_decoder.2.bias": (4,),
    "temporal_embed.layers.0.bias": (4,),
    "action_embed.layers.0.bias": (1,),
    "box_token": (1, 1, 4),
    "temporal_token": (1, 1, 4),
    "track_token": (1, 1, 4),
}


def public_json(config: LRCConfig) -> dict[str, Any]:
    """The public config.json of a model, as the hub has it."""
    vision, text = config.vision, config.text
    return {
        "architectures": ["InternVLChatModel"],
        "downsample_ratio": 0.5,
        "force_image_size": vision.image_size,
        "ps_version": "v2",
        "select_layer": -1,
        "template": config.template,
        "local_num_frames": config.clip_frames,
        "num_tome_tokens": config.clip_frames * config.tokens_per_frame,
        "llm_config": {
            "architectures": ["InternLM2ForCausalLM"],
            "vocab_size": text.vocab_size,
            "hidden_size": text.hidden_size,
            "num_hidden_layers": text.num_layers,
            "num_attention_heads": text.num_heads,
            "num_key_value_heads": text.num_kv_heads,
            "intermediate_size": text.intermediate_size,
            "max_position_embeddings": text.max_position,
            "rms_norm_eps": text.rms_norm_eps,
            "rope_theta": text.rope_theta,
            "rope_scaling": {"type": "dynamic", "factor": text.rope_factor},
            "bias": False,
            "hidden_act": "silu",
            "tie_word_embeddings": False,
        },
        "vision_config": {
            "hidden_size": vision.hidden_size,
            "num_hidden_layers": vision.num_layers,
            "num_attention_heads": vision.num_heads,
            "intermediate_size": vision.intermediate_size,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "norm_type": "layer_norm",
            "qkv_bias": True,
            "qk_normalization": False,
            "layer_norm_eps": 1e-6,
            "hidden_act": "gelu",
        },
    }


def random_public(config: LRCConfig, seed: int = 0) -> dict[str, Tensor]:
    """Random tensors of a public checkpoint, with its names and shapes; norms near one, so that layers matter."""
    generator = torch.Generator().manual_seed(seed)
    tensors = {}
    for stored in convert.public_layout(config):
        value = torch.randn(stored.shape, generator=generator) * 0.2
        is_norm = "norm" in stored.name or ".ls" in stored.name or stored.name == "mlp1.0.weight"
        tensors[stored.name] = value + 1 if is_norm and not stored.name.endswith("bias") else value
    return tensors


@dataclass
class PublicCheckpoint:
    path: Path
    config: LRCConfig
    tensors: dict[str, Tensor]

    @property
    def shards(self) -> list[Path]:
        return sorted(self.path.glob("*.safetensors"))


def write_public(path: Path, config: LRCConfig, tensors: Mapping[str, Tensor], num_shards: int = 3) -> None:
    from safetensors.torch import save_file

    path.mkdir(parents=True, exist_ok=True)
    names = sorted(tensors)
    for shard in range(num_shards):
        held = {name: tensors[name] for name in names[shard::num_shards]}
        save_file(held, path / f"model-{shard + 1:05d}-of-{num_shards:05d}.safetensors", {"format": "pt"})
    (path / "config.json").write_text(json.dumps(public_json(config)))


@pytest.fixture(scope="session")
def tiny_config() -> LRCConfig:
    # What a public config.json can say: 4 metric heads are the LLM's heads. No number is a default of other code.
    settings = {"tokenizer": "internlm2", "template": "internvl2_5", "text.rope_theta": 5e5, "text.rope_factor": 1.5}
    return tiny().override(settings)


@pytest.fixture
def public_checkpoint(tmp_path: Path, tiny_config: LRCConfig) -> Callable[..., PublicCheckpoint]:
    """make(change=None, config=..., num_shards=3): a checkpoint folder; `change` edits its tensors before writing."""

    def make(
        change: Callable[[dict[str, Tensor]], Any] | None = None,
        *,
        config: LRCConfig = tiny_config,
        num_shards: int = 3,
        heads: bool = False,
    ) -> PublicCheckpoint:
        tensors = random_public(config)
        if heads:
            tensors |= {name: torch.randn(shape) for name, shape in HEADS.items()}
        if change is not None:
            change(tensors)
        write_public(tmp_path / "public", config, tensors, num_shards)
        return PublicCheckpoint(tmp_path / "public", config, tensors)

    return make


@pytest.fixture
def public_config(tiny_config: LRCConfig) -> dict[str, Any]:
    """The public config.json of `tiny_config`, fresh for every test."""
    return public_json(tiny_config)
