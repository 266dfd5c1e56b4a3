# SPDX-License-Identifier: Apache-2.0
"""transformers' AttentionInterface on `varlen_attention`: dense, padded and packed batches of any model that takes an
attention implementation by name, with GQA, a sliding window and a growing KV cache."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lrc_kernels.attention import varlen_attention
from lrc_kernels.checks import check_int
from lrc_kernels.layout import VarlenLayout

# Arguments that change the result of attention and that it does not know. None or False means that they are not used.
UNSUPPORTED = ("softcap", "s_aux", "position_bias", "cache", "block_table", "k_cache", "v_cache", "head_mask")
LENGTH_ARGUMENTS = ("cu_seq_lens_q", "cu_seq_lens_k", "max_length_q", "max_length_k")
# The patterns that `sliding_window`, `is_causal` and packed `position_ids` say again when attention itself is called.
KNOWN_PATTERNS = (
    "causal_mask_function",
    "bidirectional_mask_function",
    "and_masks",
    "sliding_window_overlay",
    "sliding_window_bidirectional_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
)


def register_attention(name: str = "lrc") -> None:
    """Make `attn_implementation=name` mean `varlen_attention` in transformers.

    >>> register_attention("lrc")
    >>> model = AutoModelForCausalLM.from_pretrained(path, attn_implementation="lrc")

    A padding mask [B, L] hides its keys (what rows of padding give means nothing, but is finite), a packed batch comes
    as `cu_seq_lens_q`, `cu_seq_lens_k`, `max_length_q`, `max_length_k` (no synchronisation) or as `position_ids`
    [B, L] that start anew (one synchronisation per layer), as flash attention takes them.

    torch.compile works, with graph breaks where the mask's pattern and the packed positions are read.

    When it runs it raises ValueError rather than leave something out: dropout > 0, attention weights, soft-capping,
    sinks, a position bias, a paged or static cache, a mask of four dimensions, and mask patterns other than causal,
    bidirectional, sliding window and packed sequences.

    Raises:
        TypeError: a name that is no str. ImportError: transformers is missing, or has no AttentionInterface.
    """
    if not isinstance(name, str) or not name:
        raise TypeError(f"name must be a non-empty str, got {name!r}")
    try:
        from transformers import AttentionInterface, AttentionMaskInterface
    except ImportError as error:
        raise ImportError(
            f"register_attention needs transformers >= 4.57 (pip install transformers): {error}"
        ) from error
    AttentionInterface.register(name, attention_forward)
    AttentionMaskInterface.register(name, padding_mask)


def padding_mask(
    batch_size: int,
    q_length: int,
    kv_length: int,
    q_offset: int | Tensor = 0,
    kv_offset: int = 0,
    mask_function: Callable | None = None,
    attention_mask: Tensor | None = None,
    **kwargs: Any,
) -> Tensor | None:
    """The mask that every layer gets: the padding mask bool [B, kv_length] where it hides a key, else None.

    Raises:
        ValueError: a pattern that `attention_forward` cannot follow, or a cache with room for more keys than there are.
    """
    patterns = set() if mask_function is None else _patterns(mask_function)
    if kwargs.get("use_vmap") or not patterns <= set(KNOWN_PATTERNS):
        unknown = sorted(patterns - set(KNOWN_PATTERNS)) or ["a function of the user's"]
        raise ValueError(f"the mask must be causal, bidirectional, sliding or packed, got {', '.join(unknown)}")
    causal = "bidirectional_mask_function" not in patterns
    if causal and (isinstance(q_offset, Tensor) or q_offset + q_length != kv_offset + kv_length):
        raise ValueError(
            "the last query must stand at the last key, got a cache with more room than keys (a static cache?) or a "
            f"prefix: {q_length} queries from {q_offset}, {kv_length} keys from {kv_offset}"
        )
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2:
        raise ValueError(f"attention_mask must have shape [B, L], got {list(attention_mask.shape)}")
    mask = attention_mask[:, -kv_length:].bool()
    if mask.shape[1] != kv_length:
        raise ValueError(f"attention_mask must cover the {kv_length} keys, got {mask.shape[1]}")
    if not torch.compiler.is_compiling() and bool(mask.all()):
        return None
    return mask


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    is_causal: bool | None = None,
    sliding_window: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """An attention function of transformers: query [B, Hq, Lq, K], key, value [B, Hkv, Lk, K] -> [B, Lq, Hq, K], None.

    Raises:
        ValueError: see `register_attention`.
    """
    _check_supported(dropout, attention_mask, key, kwargs)
    if sliding_window is not None:
        check_int("sliding_window", sliding_window, minimum=1)
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    options: dict[str, Any] = {
        "causal": bool(causal) and getattr(getattr(module, "config", None), "is_causal", None) is not False,
        "softmax_scale": scaling,
        "window": None if sliding_window is None else (sliding_window - 1, sliding_window - 1),
    }
    batch, _, num_queries, head_dim = query.shape
    num_keys, value_dim = key.shape[2], value.shape[3]
    if value_dim < head_dim:
        value = torch.nn.functional.pad(value, (0, head_dim - value_dim))
    lengths = [kwargs.get(name) for name in LENGTH_ARGUMENTS]
    if any(length is not None for length in lengths):
        if attention_mask is not None or any(length is None for length in lengths):
            raise ValueError(f"{', '.join(LENGTH_ARGUMENTS)} must come together and without a padding mask")
        options.update(
            zip(("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k"), lengths, strict=True),
        )
    elif attention_mask is None and num_queries == num_keys and (packed := _packed(position_ids, batch)) is not None:
        options["cu_seqlens_q"] = packed
    else:
        options["cu_seqlens_q"] = VarlenLayout.uniform(batch, num_queries, query.device)
        options["cu_seqlens_k"] = VarlenLayout.uniform(batch, num_keys, query.device)
    if attention_mask is not None:
        # Hidden keys instead of rows taken out: no synchronisation, and the same graph for every padding.
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        options["key_bias"] = torch.zeros(batch * num_keys, dtype=dtype, device=query.device).masked_fill(
            ~attention_mask.flatten(), -torch.inf
        )
    q, k, v = (x.transpose(1, 2).flatten(0, 1) for x in (query, key, value))
    out = varlen_attention(q, k, v, **options)
    assert isinstance(out, Tensor)
    return out.unflatten(0, (batch, num_queries))[..., :value_dim], None


def _check_supported(dropout: float, attention_mask: Tensor | None, key: Tensor, arguments: dict[str, Any]) -> None:
    if dropout > 0:
        raise ValueError(f"dropout must be 0, got {dropout}: set the model's attention_dropout to 0")
    if arguments.get("output_attentions"):
        raise ValueError("output_attentions must be False: the weights are never formed")
    for name in UNSUPPORTED:
        if arguments.get(name) is not None:
            raise ValueError(f"{name} must be None, which is all that this attention supports")
    if attention_mask is None:
        return
    wanted = [key.shape[0], key.shape[2]]
    if list(attention_mask.shape) != wanted or attention_mask.dtype != torch.bool:
        raise ValueError(
            f"attention_mask must be a bool padding mask {wanted} or None, "
            f"got {attention_mask.dtype} {list(attention_mask.shape)}"
        )


def _packed(position_ids: Tensor | None, batch: int) -> VarlenLayout | None:
    """The sequences of a packed batch, whose positions [B, L] do not go on by one, or None where all of them do.

    Positions of three dimensions (mRoPE) repeat and jump within a sequence, so they say nothing about packing."""
    if position_ids is None or position_ids.dim() != 2 or position_ids.shape[1] == 1:
        return None
    starts = torch.ones(batch, position_ids.shape[1], dtype=torch.bool, device=position_ids.device)
    starts[:, 1:] = position_ids.diff() != 1
    first_rows = starts.flatten().nonzero().flatten()
    if first_rows.shape[0] == batch:
        return None
    return VarlenLayout.from_cu_seqlens(torch.nn.functional.pad(first_rows, (0, 1), value=starts.numel()))


def _patterns(mask_function: Callable) -> set[str]:
    """The functions of transformers.masking_utils that a mask function was built from; others by their full name."""
    name = mask_function.__qualname__.partition(".")[0]
    if mask_function.__module__ != "transformers.masking_utils":
        name = f"{mask_function.__module__}.{mask_function.__qualname__}"
    found = {name}
    for cell in mask_function.__closure__ or ():
        contents = cell.cell_contents if isinstance(cell.cell_contents, tuple) else (cell.cell_contents,)
        found = found.union(
            *(_patterns(inner) for inner in contents if callable(inner) and hasattr(inner, "__closure__"))
        )
    return found
