# SPDX-License-Identifier: Apache-2.0
"""The configuration of an LRCModel: nested frozen dataclasses, presets, overrides, and the public config.json read."""

from __future__ import annotations

import difflib
import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, fields, replace
from typing import Any, cast

from lrc_kernels.checks import check_choice, check_int
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.vision import VisionConfig

FORMAT = "lrc_model/1"
TOKENIZERS = ("bytes", "internlm2")
TEMPLATES = ("internvl2_5", "internlm2-chat", "plain")
# Fields that LRCConfig shows, and `override` takes, without the name of their part.
SHORT_NAMES = {
    **dict.fromkeys(("num_layers", "num_heads", "num_kv_heads", "hidden_size", "vocab_size"), "text"),
    "image_size": "vision",
    **dict.fromkeys(("clip_frames", "tokens_per_frame"), "connector"),
}


def _nearest_multiple(value: int, of: int) -> int:
    return max(of, round(value / of) * of)


def _nearest_divisor(value: int, of: int) -> int:
    return min((d for d in range(1, of + 1) if of % d == 0), key=lambda d: (abs(d - value), d))


def _check_ints(config: Any, *names: str) -> None:
    for name in names:
        check_int(name, getattr(config, name), minimum=1)


@dataclass(frozen=True)
class ConnectorConfig:
    """From ViT tokens to tokens of the LLM.

    Args:
        clip_frames: frames that are merged together; 4 in the released checkpoint, 8 in the paper (section 3.5).
        tokens_per_frame: tokens that a frame costs the LLM; a clip keeps clip_frames * tokens_per_frame. As many as the
            pixel shuffle leaves (256 in the 8B model) means that nothing is merged, as in stock InternVL.
        num_metric_heads: heads whose mean is the similarity metric of the merge.
        shuffle: side of the square of patches that the pixel shuffle turns into one token.
    """

    clip_frames: int = 4
    tokens_per_frame: int = 16
    num_metric_heads: int = 32
    shuffle: int = 2

    def __post_init__(self) -> None:
        _check_ints(self, "clip_frames", "tokens_per_frame", "num_metric_heads", "shuffle")


@dataclass(frozen=True)
class TextConfig:
    """The LLM: InternLM2.5, which is Llama with grouped-query attention, RMSNorm, SwiGLU and no biases.

    Args:
        vocab_size: rows of the embedding and of the (untied) output head, added tokens included.
        hidden_size: D, a multiple of `num_heads`.
        num_layers: decoder layers.
        num_heads: query heads.
        num_kv_heads: key and value heads, a divisor of `num_heads`.
        intermediate_size: width of the SwiGLU MLP.
        max_position: positions that were trained without scaling of RoPE.
        rope_theta: base of RoPE.
        rope_factor: factor of dynamic NTK scaling past `max_position`, >= 1; None = RoPE is never scaled.
        rms_norm_eps: added to the mean square in RMSNorm.
    """

    vocab_size: int
    hidden_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    intermediate_size: int
    max_position: int = 32768
    rope_theta: float = 1e6
    rope_factor: float | None = 2.0
    rms_norm_eps: float = 1e-5

    def __post_init__(self) -> None:
        _check_ints(self, "vocab_size", "hidden_size", "num_layers", "num_heads", "num_kv_heads", "intermediate_size")
        _check_ints(self, "max_position")
        for name, minimum in (("rope_theta", 1.0), ("rope_factor", 1.0), ("rms_norm_eps", 0.0)):
            value = getattr(self, name)
            if name == "rope_factor" and value is None:
                continue
            if not isinstance(value, (int, float)) or not math.isfinite(value) or value < minimum:
                raise ValueError(f"{name} must be a finite number >= {minimum}, got {value!r}")
        # RoPE turns pairs of channels, and the NTK exponent divides by head_dim - 2.
        unit = 2 * self.num_heads
        if self.hidden_size % unit or self.hidden_size < 2 * unit:
            nearest = max(2 * unit, _nearest_multiple(self.hidden_size, unit))
            raise ValueError(
                f"hidden_size must be num_heads = {self.num_heads} times an even head size >= 4, got "
                f"{self.hidden_size}; the nearest is {nearest}"
            )
        if self.num_heads % self.num_kv_heads:
            nearest = _nearest_divisor(self.num_kv_heads, self.num_heads)
            raise ValueError(
                f"num_kv_heads must divide num_heads = {self.num_heads}, got {self.num_kv_heads}; the nearest is "
                f"{nearest}"
            )

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    def rope_base(self, num_positions: int) -> float:
        """The base of RoPE for a prefill of `num_positions`: dynamic NTK scaling, a function of its arguments alone.

        >>> TextConfig(16, 8, 1, 2, 1, 8, max_position=8, rope_theta=100.0).rope_base(8)
        100.0
        """
        check_int("num_positions", num_positions, minimum=0)
        if self.rope_factor is None or num_positions <= self.max_position:
            return self.rope_theta
        stretch = self.rope_factor * num_positions / self.max_position - (self.rope_factor - 1)
        return self.rope_theta * stretch ** (self.head_dim / (self.head_dim - 2))


@dataclass(frozen=True)
class LRCConfig:
    """A whole model. It is validated when it is built; `config.num_layers` is short for `config.text.num_layers`.

    Args:
        vision: the ViT.
        connector: pixel shuffle, token merging and MLP.
        text: the LLM.
        dropout: token dropout inside the LLM, None = off.
        tokenizer: "bytes" or "internlm2" (reads `tokenizer.model` of a checkpoint).
        template: the chat template that the weights were trained with, see `lrc_model.templates`.

    Raises:
        TypeError, ValueError: what is wrong, and the nearest right value.
    """

    vision: VisionConfig
    connector: ConnectorConfig
    text: TextConfig
    dropout: DropoutSchedule | None = field(default=None)
    tokenizer: str = "internlm2"
    template: str = "internvl2_5"

    def __post_init__(self) -> None:
        self.validate()

    def __getattr__(self, name: str) -> Any:
        # Reached only for names that are no fields; the parts are read from __dict__, so that copying cannot recurse.
        if name in SHORT_NAMES and SHORT_NAMES[name] in self.__dict__:
            return getattr(self.__dict__[SHORT_NAMES[name]], name)
        raise AttributeError(f"LRCConfig has no field {name!r}{_did_you_mean(name, _names())}")

    @property
    def frame_tokens(self) -> int:
        """Tokens of a frame after the pixel shuffle, before any merge."""
        side = self.vision.image_size // self.vision.patch_size // self.connector.shuffle
        return side * side

    @property
    def token_width(self) -> int:
        """Channels of a token after the pixel shuffle."""
        return self.vision.hidden_size * self.connector.shuffle**2

    @property
    def merges(self) -> bool:
        """Whether tokens are merged at all (HiCo)."""
        return self.connector.tokens_per_frame < self.frame_tokens

    def num_visual_tokens(self, num_frames: int) -> int:
        """Tokens that whole clips of `num_frames` frames cost the LLM; ValueError where they are no whole clips."""
        check_int("num_frames", num_frames, minimum=0)
        clip = self.connector.clip_frames
        if num_frames % clip:
            raise ValueError(
                f"num_frames must be a multiple of clip_frames = {clip}, got {num_frames}: pad the video to "
                f"{math.ceil(num_frames / clip) * clip} frames (lrc_model.connector.pad_frames) or sample so many"
            )
        return num_frames * self.connector.tokens_per_frame

    def validate(self) -> None:
        """Check the fields against each other."""
        for name, kind in (("vision", VisionConfig), ("connector", ConnectorConfig), ("text", TextConfig)):
            if not isinstance(getattr(self, name), kind):
                raise TypeError(f"{name} must be a {kind.__name__}, got {type(getattr(self, name)).__name__}")
        if self.dropout is not None and not isinstance(self.dropout, DropoutSchedule):
            raise TypeError(f"dropout must be a DropoutSchedule or None, got {type(self.dropout).__name__}")
        check_choice("tokenizer", self.tokenizer, TOKENIZERS)
        check_choice("template", self.template, TEMPLATES)
        connector, unit = self.connector, self.vision.patch_size * self.connector.shuffle
        if self.vision.image_size % unit:
            raise ValueError(
                f"image_size must be a multiple of patch_size * shuffle = {unit}, got {self.vision.image_size}; the "
                f"nearest is {_nearest_multiple(self.vision.image_size, unit)}"
            )
        if connector.tokens_per_frame > self.frame_tokens:
            raise ValueError(
                f"tokens_per_frame must be <= {self.frame_tokens}, the tokens of a frame after the pixel shuffle, got "
                f"{connector.tokens_per_frame}; the nearest is {self.frame_tokens}, which merges nothing"
            )
        if self.merges and self.token_width % connector.num_metric_heads:
            nearest = _nearest_divisor(connector.num_metric_heads, self.token_width)
            raise ValueError(
                f"num_metric_heads must divide the token width {self.token_width}, got {connector.num_metric_heads}; "
                f"the nearest is {nearest}"
            )
        if self.dropout is not None:
            self.dropout.validate(self.text.num_layers)

    def override(self, values: Mapping[str, Any]) -> LRCConfig:
        """A copy with other values, e.g. `{"clip_frames": 8, "text.rope_factor": 1.0, "dropout": None}`.

        Raises:
            ValueError: an unknown name (the nearest is named), or values that do not fit.
        """
        parts: dict[str, dict[str, Any]] = {}
        top: dict[str, Any] = {}
        for key, value in values.items():
            part, _, name = key.rpartition(".") if "." in key else (SHORT_NAMES.get(key, ""), "", key)
            known = _names() if not part else _fields_of(part)
            if part not in ("", *_PARTS) or name not in known or (not part and name in _PARTS and name != "dropout"):
                raise ValueError(f"unknown field {key!r}{_did_you_mean(key, _names())}")
            if name in _PARTS and isinstance(value, Mapping):
                value = _build(_PARTS[name], value, name)
            (parts.setdefault(part, {}) if part else top)[name] = value
        for part, changes in parts.items():
            if getattr(self, part) is None:
                raise ValueError(f"{part} is None: set {part} itself before {part}.{next(iter(changes))}")
            top[part] = replace(getattr(self, part), **changes)
        return replace(self, **top)

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON values; `from_dict` reads them back."""
        return {"format": FORMAT, **asdict(self)}

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LRCConfig:
        """Read what `to_dict` wrote.

        Raises:
            ValueError: another format, a missing or an unknown field.
        """
        if values.get("format") != FORMAT:
            raise ValueError(f"config format must be {FORMAT!r}, got {values.get('format')!r}: convert the checkpoint")
        found: dict[str, Any] = {}
        for name, value in values.items():
            if name in _PARTS and value is not None:
                found[name] = _build(_PARTS[name], value, name)
            elif name != "format":
                found[name] = value
        return cast(LRCConfig, _build(cls, found, "config"))


_PARTS: dict[str, type] = {
    "vision": VisionConfig,
    "connector": ConnectorConfig,
    "text": TextConfig,
    "dropout": DropoutSchedule,
}


def _fields_of(part: str) -> list[str]:
    return [f.name for f in fields(_PARTS[part])] if part in _PARTS else []


def _names() -> list[str]:
    dotted = [f"{part}.{name}" for part in _PARTS for name in _fields_of(part)]
    return [*(f.name for f in fields(LRCConfig)), *SHORT_NAMES, *dotted]


def _did_you_mean(name: str, known: list[str]) -> str:
    near = difflib.get_close_matches(name, known, 1)
    return f", did you mean {near[0]!r}?" if near else f"; known are {', '.join(known)}"


def _build(cls: Callable[..., Any], values: Mapping[str, Any], where: str) -> Any:
    known = [f.name for f in fields(cast(Any, cls))]
    for name in values:
        if name not in known:
            raise ValueError(f"{where}: unknown field {name!r}{_did_you_mean(name, known)}")
    try:
        return cls(**values)
    except TypeError as error:
        raise ValueError(f"{where}: {error}") from error


def tiny() -> LRCConfig:
    """A model for tests, a fraction of a second per step on a CPU: 56-pixel frames, one token per frame, bytes."""
    return LRCConfig(
        vision=VisionConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, image_size=56),
        connector=ConnectorConfig(clip_frames=4, tokens_per_frame=1, num_metric_heads=4),
        text=TextConfig(
            vocab_size=272, hidden_size=64, num_layers=4, num_heads=4, num_kv_heads=2, intermediate_size=128,
            max_position=4096,
        ),
        tokenizer="bytes",
        template="plain",
    )  # fmt: skip


def nano() -> LRCConfig:
    """A model of 27 M parameters that trains in minutes on one GPU: 112-pixel frames, four tokens per frame, bytes."""
    return LRCConfig(
        vision=VisionConfig(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024, image_size=112),
        connector=ConnectorConfig(clip_frames=4, tokens_per_frame=4, num_metric_heads=8),
        text=TextConfig(
            vocab_size=272, hidden_size=512, num_layers=8, num_heads=8, num_kv_heads=2, intermediate_size=1408,
        ),
        tokenizer="bytes",
        template="plain",
    )  # fmt: skip


def internvideo2_5_8b() -> LRCConfig:
    """InternVideo2.5-Chat-8B as released: InternViT-300M, clips of 4 frames -> 64 tokens, InternLM2.5-7B."""
    return LRCConfig(
        vision=VisionConfig.internvit_300m(),
        connector=ConnectorConfig(),
        text=TextConfig(
            vocab_size=92560, hidden_size=4096, num_layers=32, num_heads=32, num_kv_heads=8, intermediate_size=14336,
        ),
    )  # fmt: skip


def internvideo2_5_8b_paper() -> LRCConfig:
    """The same with the clips of the paper (section 3.5): 8 frames -> 128 tokens."""
    return internvideo2_5_8b().override({"clip_frames": 8})


PRESETS: dict[str, Callable[[], LRCConfig]] = {
    f.__name__: f for f in (tiny, nano, internvideo2_5_8b, internvideo2_5_8b_paper)
}


def preset(name: str) -> LRCConfig:
    """The preset of that name; ValueError names the nearest one."""
    if name not in PRESETS:
        raise ValueError(f"unknown preset {name!r}{_did_you_mean(name, list(PRESETS))}")
    return PRESETS[name]()
