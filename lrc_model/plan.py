# SPDX-License-Identifier: Apache-2.0
"""What a prefill will take: a configuration and a number of frames in; bytes, FLOPs and seconds on a given GPU out."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from lrc_kernels.checks import check_choice, check_int
from lrc_model.config import LRCConfig
from lrc_model.convert import PARTS, state_shapes

GIB = 2**30
# Dense bf16 FLOP/s, bytes of memory, and bytes/s to and from it, from the vendors' data sheets.
GPUS = {
    "a100-40": (312e12, 40e9, 1.555e12),
    "a100-80": (312e12, 80e9, 2.039e12),
    "h100-80": (989e12, 80e9, 3.35e12),
    "h200-141": (989e12, 141e9, 4.8e12),
    "rtx4090-24": (165e12, 24e9, 1.008e12),
}
# Text tokens per frame of the public template ("FrameN: <img>...</img>"), as facts count them.
FRAME_TEXT_TOKENS = 9
# Share of the peak that a good prefill reaches; an assumption, which the measured waterfall replaces.
MODEL_FLOP_UTILISATION = 0.45
# Share of a GPU's memory that is there for tensors, beside the context and fragmentation.
USABLE = 0.95


@dataclass(frozen=True)
class PrefillCost:
    """What `prefill_cost` returns. Bytes unless said otherwise.

    Attributes:
        num_tokens: rows of the prompt before any drop.
        weights: parameters. cache: keys and values of all layers. visual: embeddings of the prompt. work: what one
            chunk needs at its widest.
        flops_vision, flops_text: floating-point operations.
    """

    num_frames: int
    num_tokens: int
    weights: int
    cache: int
    visual: int
    work: int
    flops_vision: float
    flops_text: float

    @property
    def memory(self) -> int:
        """All of it together."""
        return self.weights + self.cache + self.visual + self.work

    def seconds(self, gpu: str) -> float:
        """On that GPU at 45 % of its peak: arithmetic, not a measurement."""
        check_choice("gpu", gpu, tuple(GPUS))
        return (self.flops_vision + self.flops_text) / (GPUS[gpu][0] * MODEL_FLOP_UTILISATION)


def peak_rates(name: str) -> tuple[float, float] | None:
    """(dense bf16 FLOP/s, bytes/s of memory) of the GPU that its driver calls `name`, None where `GPUS` lacks it.

    >>> peak_rates("NVIDIA H100 80GB HBM3")
    (989000000000000.0, 3350000000000.0)
    """
    words = name.lower().replace("rtx ", "rtx").replace("-", " ").split()
    if "pcie" in words or "nvl" in words:
        # Cards of the same name with other clocks and memory.
        return None
    for key, (flops, _, bandwidth) in reversed(GPUS.items()):
        chip, size = key.split("-")
        if chip in words and (chip != "a100" or f"{size}gb" in words):
            return flops, bandwidth
    return None


def rows_per_layer(config: LRCConfig, num_visual: int, num_text: int) -> list[int]:
    """Rows that attention and MLP of each layer see: a drop of layer l is felt by layer l itself."""
    ratios = {} if config.dropout is None else dict(zip(config.dropout.layers, config.dropout.keep_ratios, strict=True))
    rows, ratio = [], 1.0
    for layer in range(config.text.num_layers):
        ratio = ratios.get(layer, ratio)
        rows.append(int(num_visual * ratio) + num_text)
    return rows


def prefill_cost(
    config: LRCConfig,
    num_frames: int,
    *,
    frame_text: bool = False,
    chunk: int = 8192,
    chunk_clips: int = 4,
    bytes_per_value: int = 2,
) -> PrefillCost:
    """The cost model of a chunked prefill.

    Args:
        num_frames: padded up to whole clips.
        frame_text: with the public template's nine text tokens per frame.
        chunk: rows of the prompt in flight. chunk_clips: clips in flight in the ViT.
        bytes_per_value: 2 for bf16 and fp16.
    """
    check_int("num_frames", num_frames, minimum=0)
    text, vision = config.text, config.vision
    clip = config.connector.clip_frames
    num_frames = -(-num_frames // clip) * clip
    num_visual = num_frames * config.connector.tokens_per_frame
    num_text = num_frames * FRAME_TEXT_TOKENS if frame_text else 0
    rows = rows_per_layer(config, num_visual, num_text)
    kv_width = 2 * text.num_kv_heads * text.head_dim
    parameters = sum(_product(shape) for shape in state_shapes(config, PARTS).values())
    patches = (vision.image_size // vision.patch_size) ** 2
    in_flight = chunk_clips * clip * (1 + patches)
    vision_work = in_flight * (vision.intermediate_size + 4 * vision.hidden_size)
    merge_work = chunk_clips * clip * patches * vision.hidden_size
    text_work = min(chunk, num_visual + num_text) * (3 * text.intermediate_size + 4 * text.hidden_size)
    # A drop holds the keys and values of all rows, turned and not, beside the rows themselves.
    drop_work = (num_visual + num_text) * (2 * kv_width) if config.dropout is not None else 0
    linear = 2 * (text.hidden_size * (text.hidden_size * 2 + kv_width) + 3 * text.hidden_size * text.intermediate_size)
    per_patch = 2 * (4 * vision.hidden_size**2 + 2 * vision.hidden_size * vision.intermediate_size)
    attention_vision = 4 * (1 + patches) * vision.hidden_size
    return PrefillCost(
        num_frames=num_frames,
        num_tokens=num_visual + num_text,
        weights=parameters * bytes_per_value,
        cache=sum(rows) * kv_width * bytes_per_value,
        visual=(num_visual + num_text) * text.hidden_size * bytes_per_value,
        work=(max(vision_work + merge_work, text_work) + drop_work) * bytes_per_value,
        flops_vision=float(num_frames) * vision.num_layers * (1 + patches) * (per_patch + attention_vision),
        flops_text=sum(float(n) * linear + 2.0 * float(n) * n * text.hidden_size for n in rows),
    )


def most_frames(config: LRCConfig, memory: float, **options: Any) -> int:
    """The most whole clips' frames whose prefill fits `memory` bytes; 0 where not even the weights do.

    Args:
        options: of `prefill_cost`.
    """
    clip = config.connector.clip_frames

    def fits(clips: int) -> bool:
        return prefill_cost(config, clips * clip, **options).memory <= memory

    low, high = 0, 1
    while fits(high) and high < 2**24:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if fits(middle) else (low, middle)
    return low * clip


def check_fits(config: LRCConfig, num_frames: int, memory: float, **options: Any) -> PrefillCost:
    """The cost; ValueError with the numbers where it exceeds the usable part of `memory` bytes.

    Args:
        options: of `prefill_cost`.
    """
    cost = prefill_cost(config, num_frames, **options)
    if cost.memory > memory * USABLE:
        most = most_frames(config, memory * USABLE, **options)
        raise ValueError(
            f"{num_frames} frames need {cost.memory / GIB:.1f} GiB (weights {cost.weights / GIB:.1f}, keys and values "
            f"{cost.cache / GIB:.1f}, embeddings {cost.visual / GIB:.1f}, work {cost.work / GIB:.1f}) and must fit "
            f"{memory * USABLE / GIB:.1f} GiB: at most {most} frames do; fewer frames, dropout, or a larger GPU"
        )
    return cost


def _product(shape: tuple[int, ...]) -> int:
    total = 1
    for size in shape:
        total *= size
    return total
