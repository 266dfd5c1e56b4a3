# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of an LRCModel's tensors, and how other code stores them: tables in, converted tensors out.

LRCModel's state dict: `vision_model.model.*` (transformers' InternVLVisionModel), `connector.*` (its
InternVLMultiModalProjector) and `language_model.*` (its LlamaForCausalLM). A layout is a list of `Stored`.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice
from lrc_model.config import LRCConfig, TextConfig
from lrc_model.vision import VisionConfig

PARTS = ("vision_model", "connector", "language_model")
Shape = tuple[int, ...]

# Tensors of the released shards that belong to the task heads (TPO): skipped, and reported by the rule's name.
HEAD_RULES: dict[str, tuple[str, ...]] = {
    "mask head (SAM 2)": ("sam.",),
    "temporal head (CG-DETR)": ("cg_model.", "cg_criterion."),
    "mask adapter": ("track_embed.", "track_embed_decoder.", "track_embed_decode2."),
    "region head and position prompts": ("loc_encoder.", "loc_decoder."),
    "task vectors": ("box_token", "temporal_token", "track_token"),
    "older temporal head": ("temporal_embed.", "action_embed."),
    # RoPE frequencies, which some exports of InternLM2 store: they are computed from the configuration.
    "RoPE frequencies": (".rotary_emb.inv_freq",),
}

_VISION_TOP = {
    "embeddings.class_embedding": "embeddings.cls_token",
    "embeddings.position_embedding": "embeddings.position_embeddings",
    "embeddings.patch_embedding.weight": "embeddings.patch_embeddings.projection.weight",
    "embeddings.patch_embedding.bias": "embeddings.patch_embeddings.projection.bias",
}
_VISION_LAYER = {
    "ls1": "lambda_1",
    "ls2": "lambda_2",
    "norm1": "layernorm_before",
    "norm2": "layernorm_after",
    "attn.proj": "attention.projection_layer",
    "mlp.fc1": "mlp.fc1",
    "mlp.fc2": "mlp.fc2",
}
_CONNECTOR = {"0": "layer_norm", "1": "linear_1", "3": "linear_2"}
_TEXT_TOP = {
    "model.tok_embeddings.weight": "model.embed_tokens.weight",
    "model.norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_TEXT_LAYER = {
    "attention.wo": "self_attn.o_proj",
    "feed_forward.w1": "mlp.gate_proj",
    "feed_forward.w3": "mlp.up_proj",
    "feed_forward.w2": "mlp.down_proj",
    "attention_norm": "input_layernorm",
    "ffn_norm": "post_attention_layernorm",
}
# As the modules are named, and as save_pretrained and the hub's files name them.
_TRANSFORMERS = {
    "vision_model.model.": "model.vision_tower.",
    "connector.": "model.multi_modal_projector.",
    "language_model.model.": "model.language_model.",
    "language_model.lm_head.": "lm_head.",
}
_TRANSFORMERS_SAVED = {
    "vision_model.model.": "vision_tower.",
    "connector.": "multi_modal_projector.",
    "language_model.": "language_model.",
}


@dataclass(frozen=True)
class Stored:
    """One tensor of another layout.

    Args:
        name, shape: as the other layout stores it.
        targets: names of our tensors that it holds.
        kind: "same"; "rows" (q, k, v one behind the other); "grouped" (InternLM2's wqkv: for each kv head its queries,
            one key head and one value head).
        groups, head_dim: kv heads and rows of a head, for "grouped".
    """

    name: str
    shape: Shape
    targets: tuple[str, ...]
    kind: str = "same"
    groups: int = 0
    head_dim: int = 0

    def split(self, tensor: Tensor) -> dict[str, Tensor]:
        """Our tensors from the stored one; each owns its memory where it was part of a larger one."""
        if self.kind == "same":
            return {self.targets[0]: tensor}
        if self.kind == "rows":
            parts = list(tensor.chunk(3))
        else:
            heads = tensor.view(self.groups, -1, self.head_dim, *tensor.shape[1:])
            parts = [part.flatten(0, 2) for part in (heads[:, :-2], heads[:, -2:-1], heads[:, -1:])]
        return {name: part.clone() for name, part in zip(self.targets, parts, strict=True)}

    def join(self, ours: Mapping[str, Tensor]) -> Tensor:
        """The stored tensor from ours: the inverse of `split`."""
        parts = [ours[name] for name in self.targets]
        if self.kind == "same":
            return parts[0]
        if self.kind == "rows":
            return torch.cat(parts)
        heads = [part.view(self.groups, -1, self.head_dim, *part.shape[1:]) for part in parts]
        return torch.cat(heads, dim=1).flatten(0, 2)


def state_shapes(config: LRCConfig, parts: Collection[str] = PARTS) -> dict[str, Shape]:
    """Name -> shape of every tensor of an LRCModel, or of some of its `parts`."""
    for part in parts:
        check_choice("parts", part, PARTS)
    shapes: dict[str, Shape] = {}
    if "vision_model" in parts:
        shapes |= _vision_shapes(config.vision)
    if "connector" in parts:
        width, out = config.token_width, config.text.hidden_size
        shapes |= {"connector.layer_norm.weight": (width,), "connector.layer_norm.bias": (width,)}
        for layer, size in (("linear_1", width), ("linear_2", out)):
            shapes |= {f"connector.{layer}.weight": (out, size), f"connector.{layer}.bias": (out,)}
    if "language_model" in parts:
        shapes |= text_shapes(config.text)
    return shapes


def text_shapes(text: TextConfig) -> dict[str, Shape]:
    """Name -> shape of the LLM's tensors: LlamaForCausalLM's names under `language_model.`."""
    d, kv, ffn = text.hidden_size, text.num_kv_heads * text.head_dim, text.intermediate_size
    shapes: dict[str, Shape] = {"model.embed_tokens.weight": (text.vocab_size, d)}
    for layer in range(text.num_layers):
        shapes |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "self_attn.q_proj": (d, d),
                "self_attn.k_proj": (kv, d),
                "self_attn.v_proj": (kv, d),
                "self_attn.o_proj": (d, d),
                "mlp.gate_proj": (ffn, d),
                "mlp.up_proj": (ffn, d),
                "mlp.down_proj": (d, ffn),
                "input_layernorm": (d,),
                "post_attention_layernorm": (d,),
            }.items()
        }
    shapes |= {"model.norm.weight": (d,), "lm_head.weight": (text.vocab_size, d)}
    return {f"language_model.{name}": shape for name, shape in shapes.items()}


def _vision_shapes(vision: VisionConfig) -> dict[str, Shape]:
    d, patch, ffn = vision.hidden_size, vision.patch_size, vision.intermediate_size
    shapes: dict[str, Shape] = {
        "embeddings.cls_token": (1, 1, d),
        "embeddings.position_embeddings": (1, 1 + (vision.image_size // patch) ** 2, d),
        "embeddings.patch_embeddings.projection.weight": (d, 3, patch, patch),
        "embeddings.patch_embeddings.projection.bias": (d,),
    }
    linears = {f"attention.{name}": (d, d) for name in ("q_proj", "k_proj", "v_proj", "projection_layer")}
    linears |= {"mlp.fc1": (ffn, d), "mlp.fc2": (d, ffn)}
    for layer in range(vision.num_layers):
        prefix = f"encoder.layer.{layer}."
        shapes |= {prefix + "lambda_1": (d,), prefix + "lambda_2": (d,)}
        for norm in ("layernorm_before", "layernorm_after"):
            shapes |= {f"{prefix}{norm}.weight": (d,), f"{prefix}{norm}.bias": (d,)}
        for name, shape in linears.items():
            shapes |= {f"{prefix}{name}.weight": shape, f"{prefix}{name}.bias": shape[:1]}
    return {f"vision_model.model.{name}": shape for name, shape in shapes.items()}


def own_layout(config: LRCConfig, parts: Collection[str] = PARTS) -> list[Stored]:
    """LRCModel's own names."""
    return [Stored(name, shape, (name,)) for name, shape in state_shapes(config, parts).items()]


def transformers_layout(config: LRCConfig, parts: Collection[str] = PARTS) -> list[Stored]:
    """transformers' InternVLForConditionalGeneration, by the names of its modules; it loads these too."""
    return _renamed(config, parts, _TRANSFORMERS)


def transformers_saved_layout(config: LRCConfig, parts: Collection[str] = PARTS) -> list[Stored]:
    """The same as its `save_pretrained` writes it, which is what lies on the hub."""
    return _renamed(config, parts, _TRANSFORMERS_SAVED)


def _renamed(config: LRCConfig, parts: Collection[str], prefixes: Mapping[str, str]) -> list[Stored]:
    layout = []
    for name, shape in state_shapes(config, parts).items():
        prefix = next(prefix for prefix in prefixes if name.startswith(prefix))
        layout.append(Stored(prefixes[prefix] + name.removeprefix(prefix), shape, (name,)))
    return layout


def public_layout(config: LRCConfig, parts: Collection[str] = PARTS) -> list[Stored]:
    """The 573 tensors of the public InternVideo2.5 and InternVL2.5-HiCo checkpoints, without their heads."""
    shapes = state_shapes(config, parts)
    layout: list[Stored] = []
    if "vision_model" in parts:
        layout += _public_vision(config.vision, shapes)
    if "connector" in parts:
        for theirs, ours in _CONNECTOR.items():
            for kind in ("weight", "bias"):
                name = f"connector.{ours}.{kind}"
                layout.append(Stored(f"mlp1.{theirs}.{kind}", shapes[name], (name,)))
    if "language_model" in parts:
        layout += internlm2_layout(config.text, prefix="language_model.")
    return layout


def internlm2_layout(text: TextConfig, *, prefix: str = "") -> list[Stored]:
    """InternLM2's own tensors; `prefix` stands before every stored name."""
    shapes, ours = text_shapes(text), "language_model."
    layout = [Stored(prefix + theirs, shapes[ours + name], (ours + name,)) for theirs, name in _TEXT_TOP.items()]
    for layer in range(text.num_layers):
        base = f"model.layers.{layer}."
        qkv = tuple(f"{ours}{base}self_attn.{part}_proj.weight" for part in "qkv")
        shape = (sum(shapes[name][0] for name in qkv), text.hidden_size)
        wqkv = f"{prefix}{base}attention.wqkv.weight"
        layout.append(Stored(wqkv, shape, qkv, "grouped", text.num_kv_heads, text.head_dim))
        for theirs, mine in _TEXT_LAYER.items():
            name = f"{ours}{base}{mine}.weight"
            layout.append(Stored(f"{prefix}{base}{theirs}.weight", shapes[name], (name,)))
    return layout


def _public_vision(vision: VisionConfig, shapes: Mapping[str, Shape]) -> list[Stored]:
    ours = "vision_model.model."
    layout = [
        Stored(f"vision_model.{theirs}", shapes[ours + name], (ours + name,)) for theirs, name in _VISION_TOP.items()
    ]
    for layer in range(vision.num_layers):
        public, mine = f"vision_model.encoder.layers.{layer}.", f"{ours}encoder.layer.{layer}."
        for kind in ("weight", "bias"):
            qkv = tuple(f"{mine}attention.{part}_proj.{kind}" for part in "qkv")
            shape = (3 * vision.hidden_size, *shapes[qkv[0]][1:])
            layout.append(Stored(f"{public}attn.qkv.{kind}", shape, qkv, "rows"))
        for theirs, name in _VISION_LAYER.items():
            for suffix in ("",) if theirs.startswith("ls") else (".weight", ".bias"):
                target = mine + name + suffix
                layout.append(Stored(public + theirs + suffix, shapes[target], (target,)))
    return layout


LAYOUTS: dict[str, Callable[..., list[Stored]]] = {
    "own": own_layout,
    "public": public_layout,
    "transformers": transformers_layout,
    "transformers_saved": transformers_saved_layout,
}


def skip_rule(name: str) -> str | None:
    """The rule of `HEAD_RULES` by which a tensor of a public checkpoint is skipped, or None."""
    for rule, patterns in HEAD_RULES.items():
        for pattern in patterns:
            if (
                name == pattern
                or (pattern[-1] == "." and name.startswith(pattern))
                or (pattern[0] == "." and name.endswith(pattern))
            ):
                return rule
    return None


def export_state(state: Mapping[str, Tensor], layout: Collection[Stored]) -> dict[str, Tensor]:
    """Our tensors under the names of another layout; ValueError names the first one that is missing."""
    for stored in layout:
        for name in stored.targets:
            if name not in state:
                raise ValueError(f"state must hold {name!r}, needed for {stored.name!r}")
    return {stored.name: stored.join(state) for stored in layout}


def import_state(stored: Mapping[str, Tensor], layout: Collection[Stored]) -> dict[str, Tensor]:
    """Our tensors from those of another layout: the inverse of `export_state`."""
    ours: dict[str, Tensor] = {}
    for entry in layout:
        if entry.name not in stored:
            raise ValueError(f"tensor {entry.name!r} of shape {list(entry.shape)} is missing")
        ours |= entry.split(stored[entry.name])
    return ours
