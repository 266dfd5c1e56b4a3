# SPDX-License-Identifier: Apache-2.0
"""ToMe inside the ViTs of timm and transformers: tokens merge between attention and MLP, and attention weighs each key
by the tokens that it stands for (Bolya et al. 2022, sections 3.1 and 3.2)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from lrc_kernels.attention import varlen_attention
from lrc_kernels.checks import check_int
from lrc_kernels.integrations.patch import Patch
from lrc_kernels.layout import VarlenLayout
from lrc_kernels.tome import head_mean, merge_tokens
from lrc_kernels.tome.compat import bipartite_plan


@dataclass(frozen=True)
class BlockParts:
    """The names of what a pre-norm block is made of: x += after(attention(norm1(x))); x += after(mlp(norm2(x))).

    A name in a tuple may be missing, since options add and remove modules. A part of the block that is not named here
    is refused, since it would be left out.

    Attributes:
        attention: class name of the attention module, and its name in the block.
        after_attention, after_mlp: modules that are called, or parameters that are multiplied, in this order.
        qkv: the projections, one for all three or three.
        output: what follows attention, in this order.
        heads, scale, dropout: attributes of the attention module.
        norm_per_head: `q_norm` and `k_norm` see one head at a time.
        prefix: tokens before the patches, or the attribute of the model that says how many.
    """

    attention: tuple[str, str]
    norms: tuple[str, str]
    after_attention: tuple[str, ...]
    after_mlp: tuple[str, ...]
    qkv: tuple[str, ...]
    output: tuple[str, ...]
    heads: str
    scale: str
    dropout: str
    norm_per_head: bool
    prefix: int | str

    def names(self) -> set[str]:
        return {self.attention[1], *self.norms, "mlp", *self.after_attention, *self.after_mlp}

    def attention_names(self) -> set[str]:
        return {*self.qkv, "q_norm", "k_norm", *self.output, self.dropout}


_TIMM = BlockParts(
    attention=("Attention", "attn"),
    norms=("norm1", "norm2"),
    after_attention=("ls1", "drop_path1"),
    after_mlp=("ls2", "drop_path2"),
    qkv=("qkv",),
    output=("norm", "proj", "proj_drop"),
    heads="num_heads",
    scale="scale",
    dropout="attn_drop",
    norm_per_head=True,
    prefix="num_prefix_tokens",
)
_VIT = BlockParts(
    attention=("ViTAttention", "attention"),
    norms=("layernorm_before", "layernorm_after"),
    after_attention=("dropout",),
    after_mlp=("dropout",),
    qkv=("q_proj", "k_proj", "v_proj"),
    output=("o_proj",),
    heads="num_attention_heads",
    scale="scaling",
    dropout="attention_dropout",
    norm_per_head=False,
    prefix=1,
)
_DINOV2 = replace(
    _VIT,
    attention=("Dinov2Attention", "attention"),
    norms=("norm1", "norm2"),
    after_attention=("layer_scale1", "drop_path"),
    after_mlp=("layer_scale2", "drop_path"),
)
_INTERNVL = replace(
    _VIT,
    attention=("InternVLVisionAttention", "attention"),
    after_attention=("lambda_1",),
    after_mlp=("dropout", "lambda_2"),
    output=("projection_layer", "projection_dropout"),
    heads="num_heads",
    scale="scale",
)
_CLIP = replace(
    _VIT,
    attention=("CLIPAttention", "self_attn"),
    norms=("layer_norm1", "layer_norm2"),
    after_attention=(),
    after_mlp=(),
    output=("out_proj",),
    heads="num_heads",
    scale="scale",
    dropout="dropout",
)
# By class name of the block, so that no framework is imported before its model is at hand.
BLOCKS = {
    "Block": _TIMM,
    "ViTLayer": _VIT,
    "Dinov2Layer": _DINOV2,
    "InternVLVisionLayer": _INTERNVL,
    "CLIPEncoderLayer": _CLIP,
    "SiglipEncoderLayer": replace(_CLIP, attention=("SiglipAttention", "self_attn"), prefix=0),
}


class MergedTokens(NamedTuple):
    """What a patched block hands to the next: tokens [B, N, D] and fp32 [B, N], the tokens that each row stands for."""

    tokens: Tensor
    size: Tensor

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, (int, slice)):
            return tuple(self)[index]
        raise ValueError(
            "features between the blocks of a ViT must not be read as [B, N, D] where tokens merge: "
            "a block hands on MergedTokens (tokens, size), which are no grid of patches"
        )


@dataclass(frozen=True)
class BlockMerge:
    """What one patched block does: its parts, tokens to merge, protected first tokens, and where it stands."""

    parts: BlockParts
    r: int
    num_protected: int
    proportional: bool
    is_last: bool


def apply_lrc_to_vit(
    model: nn.Module,
    r: int | Sequence[int] | tuple[int, float],
    *,
    num_protected: int | None = None,
    proportional: bool = True,
) -> Patch:
    """Merge r tokens in every block of a ViT, without training it. Attention runs on `varlen_attention`.

    >>> patch = apply_lrc_to_vit(timm.create_model("vit_large_patch16_224"), r=8)  # 197 tokens in, 7 after 24 blocks
    >>> patch.undo()

    Knows the blocks of timm's VisionTransformer (`Block`) and of transformers' (>= 5) ViT, DINOv2, CLIP vision, SigLIP
    vision and InternVL vision. The metric is the mean of the keys over heads. Sizes travel with the tokens from block
    to block, so that a patched model is re-entrant, trains, and may be recomputed by checkpointing
    (`use_reentrant=False`). Applying it again replaces what the first call did. With r = 0 the model computes what it
    did before.

    The model's own head sees the merged rows: a class token is as before, mean pooling is over rows that weigh alike.
    What expects the patches as a grid (InternVL's pixel shuffle) cannot take them: there, merge in the connector.

    Args:
        model: the ViT, or a model that holds exactly one (pass the vision tower of a CLIP).
        r: tokens to merge per block, clamped to half of those that are not protected; a list with one entry per block;
            or (r, inflect) for a linear schedule from r * (1 - inflect) to r * (1 + inflect), rounded down: inflect 0
            is constant, -1 decreases from 2r to 0.
        num_protected: first tokens that never merge, None = the prefix tokens (class token, registers) of the model.
        proportional: add log(size) to the logits of every key; what a model trained without it may not want.

    Returns:
        A `Patch` with `.model` and `.undo()`.

    Raises:
        TypeError: an r of another type. ValueError: no ViT or more than one in the model, a block with parts that this
        does not know, a forward that something else replaced, a list r of another length, values below 0.
        When it runs, ValueError: an attention mask, causal attention, attention weights, attention dropout in training.
    """
    owner, blocks = _find_blocks(model)
    parts = [_parts_of(block) for block in blocks]
    schedule = merge_schedule_of(r, len(blocks))
    if num_protected is None:
        prefix = parts[0].prefix
        num_protected = getattr(owner, prefix) if isinstance(prefix, str) else prefix
    check_int("num_protected", num_protected, minimum=0)
    merges = [
        BlockMerge(known, entry, num_protected, proportional, index == len(blocks) - 1)
        for index, (known, entry) in enumerate(zip(parts, schedule, strict=True))
    ]
    patch = Patch(model)
    patch.replace_forwards([(block, merging_block, merge) for block, merge in zip(blocks, merges, strict=True)])
    patch.replace_pre_hook(model, _refuse_weights)
    return patch


def merge_schedule_of(r: int | Sequence[int] | tuple[int, float], num_blocks: int) -> list[int]:
    """Tokens to merge in each of `num_blocks` blocks; see `apply_lrc_to_vit` for the forms of r and what raises."""
    if isinstance(r, tuple):
        if len(r) != 2:
            raise ValueError(f"r as a tuple must be (r, inflect), got {len(r)} entries (a schedule is a list)")
        mean, inflect = r
        if not isinstance(mean, (int, float)) or not isinstance(inflect, (int, float)):
            raise TypeError(f"r as a tuple must be two numbers (r, inflect), got {r!r}")
        if mean < 0 or not -1 <= inflect <= 1:
            raise ValueError(f"(r, inflect) must have r >= 0 and -1 <= inflect <= 1, got {r!r}")
        first = int(mean * (1 - inflect))
        step = (2 * mean - 2 * first) / max(num_blocks - 1, 1)
        return [int(first + step * index) for index in range(num_blocks)]
    if isinstance(r, (str, bytes)) or not isinstance(r, (int, Sequence)):
        raise TypeError(f"r must be an int, a list of ints or (r, inflect), got {type(r).__name__}")
    schedule: list[Any] = [r] * num_blocks if isinstance(r, int) else list(r)
    if len(schedule) != num_blocks:
        raise ValueError(f"r must have one entry per block ({num_blocks}), got {len(schedule)}")
    for index, entry in enumerate(schedule):
        check_int("r" if isinstance(r, int) else f"r[{index}]", entry, minimum=0)
    return schedule


def merging_block(
    merge: BlockMerge, block: nn.Module, hidden_states: Tensor | MergedTokens, *arguments: Any, **options: Any
) -> Tensor | MergedTokens:
    """The forward of a patched block: tokens [B, N, D] in, tokens out, with their sizes once some have merged."""
    parts = merge.parts
    attention = getattr(block, parts.attention[1])
    _check_call(attention, arguments, options)
    tokens, size = hidden_states if isinstance(hidden_states, MergedTokens) else (hidden_states, None)
    normed = getattr(block, parts.norms[0])(tokens)
    attended, keys = _attend(parts, attention, normed, size if merge.proportional else None)
    tokens = tokens + _through(block, parts.after_attention, attended)
    tokens, size = _merge(tokens, keys, size, merge)
    tokens = tokens + _through(block, parts.after_mlp, block.mlp(getattr(block, parts.norms[1])(tokens)))  # type: ignore[operator]
    return tokens if merge.is_last or size is None else MergedTokens(tokens, size)


def _attend(parts: BlockParts, attention: nn.Module, x: Tensor, size: Tensor | None) -> tuple[Tensor, Tensor]:
    """(attention's output [B, N, D], keys [B, N, H, K]) of normalised tokens x, each key weighed by its size."""
    dropout: Any = getattr(attention, parts.dropout, 0.0)
    dropout = dropout.p if isinstance(dropout, nn.Dropout) else dropout
    if attention.training and dropout > 0:
        raise ValueError(f"{parts.dropout} must be 0 in training, got {dropout}: attention weights are never formed")
    batch, length, _ = x.shape
    projected = [getattr(attention, name)(x) for name in parts.qkv]
    q, k, v = projected[0].chunk(3, dim=-1) if len(projected) == 1 else projected
    heads = getattr(attention, parts.heads)
    if not parts.norm_per_head:
        q, k = _through(attention, ("q_norm",), q), _through(attention, ("k_norm",), k)
    q, k, v = (part.unflatten(-1, (heads, part.shape[-1] // heads)) for part in (q, k, v))
    if parts.norm_per_head:
        q, k = _through(attention, ("q_norm",), q), _through(attention, ("k_norm",), k)
    bias = None if size is None else size.log().flatten()
    out = varlen_attention(
        *(part.flatten(0, 1) for part in (q, k, v)),
        cu_seqlens_q=VarlenLayout.uniform(batch, length, x.device),
        causal=False,
        softmax_scale=getattr(attention, parts.scale),
        key_bias=bias if q.dtype != torch.float64 or bias is None else bias.double(),
    )
    assert isinstance(out, Tensor)
    return _through(attention, parts.output, out.flatten(1).unflatten(0, (batch, length))), k


def _merge(tokens: Tensor, keys: Tensor, size: Tensor | None, merge: BlockMerge) -> tuple[Tensor, Tensor | None]:
    heads = keys.shape[2]
    if merge.r == 0:
        return tokens, size
    metric = head_mean(keys.detach().flatten(2), heads)
    plan = bipartite_plan(metric, merge.r, protected=tuple(range(merge.num_protected)), size=size)
    if plan is None:
        return tokens, size
    merged = merge_tokens(tokens, plan)
    return merged, plan.size.view(merged.shape[:2])


def _through(module: nn.Module, names: tuple[str, ...], x: Tensor) -> Tensor:
    for name in names:
        part = getattr(module, name, None)
        if part is not None:
            x = part * x if isinstance(part, Tensor) else part(x)
    return x


def _check_call(attention: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    masks = [*arguments, options.get("attention_mask"), options.get("attn_mask")]
    if any(mask is not None for mask in masks):
        raise ValueError(
            "the attention mask must be None in a ViT whose tokens merge: merged tokens have no place in it"
        )
    if options.get("is_causal"):
        raise ValueError(f"is_causal must be False in a ViT whose tokens merge, got {options['is_causal']}")
    _refuse_weights(attention, arguments, options)


def _refuse_weights(module: nn.Module, arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
    """Of a block's attention, and a forward pre-hook of the model, whose blocks may not see what it is asked for."""
    if options.get("output_attentions") or getattr(getattr(module, "config", None), "output_attentions", False):
        raise ValueError("output_attentions must be False in a ViT whose tokens merge: its weights are never formed")


def _find_blocks(model: nn.Module) -> tuple[nn.Module, list[nn.Module]]:
    """(the module that holds the list of blocks, the blocks) of the one ViT in `model`."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
    found = []
    for name, owner in model.named_modules():
        for child_name, child in owner.named_children():
            if not isinstance(child, (nn.ModuleList, nn.Sequential)) or len(child) == 0:
                continue
            if all(type(block).__name__ in BLOCKS for block in child):
                found.append((f"{name}.{child_name}".lstrip("."), owner, list(child)))
    if not found:
        known = ", ".join(BLOCKS)
        raise ValueError(f"model must hold a list of ViT blocks ({known}), got {type(model).__name__} without one")
    if len(found) > 1:
        raise ValueError(f"model must hold one ViT, got {', '.join(name for name, *_ in found)}: pass one of them")
    return found[0][1], found[0][2]


def _parts_of(block: nn.Module) -> BlockParts:
    """The parts of a block; ValueError where it has parts that `merging_block` would leave out."""
    parts = BLOCKS[type(block).__name__]
    attention = getattr(block, parts.attention[1], None)
    if type(attention).__name__ != parts.attention[0]:
        raise ValueError(
            f"{type(block).__name__}.{parts.attention[1]} must be {parts.attention[0]}, got {type(attention).__name__}"
        )
    for module, names in ((block, parts.names()), (attention, parts.attention_names())):
        assert module is not None
        seen = {name for name, _ in (*module.named_children(), *module.named_parameters(recurse=False))}
        if not seen <= names:
            unknown = ", ".join(sorted(seen - names))
            raise ValueError(f"{type(module).__name__} must consist of {', '.join(sorted(names))}, got also {unknown}")
    if not all(isinstance(getattr(attention, name, None), nn.Module) for name in parts.qkv):
        raise ValueError(f"{parts.attention[0]} must project by {', '.join(parts.qkv)}, got {attention}")
    return parts
