# SPDX-License-Identifier: Apache-2.0
"""The vision encoder InternViT: uint8 frames [F, 3, H, W] in, tokens [F, 1 + h*w, D] out, the class token first."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from lrc_kernels.checks import check_int

IMAGENET_MEAN = (0.485, 0.456, 0.406)
IMAGENET_STD = (0.229, 0.224, 0.225)


@dataclass(frozen=True)
class VisionConfig:
    """Sizes of an InternViT.

    Args:
        hidden_size: D, a multiple of `num_heads`.
        num_layers: transformer layers.
        num_heads: attention heads.
        intermediate_size: width of the MLP between its two linear layers.
        image_size: height and width of a frame in pixels, a multiple of `patch_size`.
        patch_size: height and width of a patch in pixels.

    Raises:
        TypeError: what is no int. ValueError: values below 1, or that do not divide as said.
    """

    hidden_size: int
    num_layers: int
    num_heads: int
    intermediate_size: int
    image_size: int = 448
    patch_size: int = 14

    def __post_init__(self) -> None:
        for field in fields(self):
            check_int(field.name, getattr(self, field.name), minimum=1)
        if self.hidden_size % self.num_heads:
            raise ValueError(f"hidden_size must be a multiple of num_heads = {self.num_heads}, got {self.hidden_size}")
        if self.image_size % self.patch_size:
            raise ValueError(f"image_size must be a multiple of patch_size = {self.patch_size}, got {self.image_size}")

    @classmethod
    def small(cls) -> VisionConfig:
        """Four layers of width 256 on 448-pixel frames: the token grid of InternViT-300M in a hundredth of its size."""
        return cls(hidden_size=256, num_layers=4, num_heads=4, intermediate_size=1024)

    @classmethod
    def internvit_300m(cls) -> VisionConfig:
        """InternViT-300M-448px-V2.5, the encoder of InternVideo2.5."""
        return cls(hidden_size=1024, num_layers=24, num_heads=16, intermediate_size=4096)


class VisionEncoder(nn.Module):
    """InternViT (transformers' `InternVLVisionModel`) with random weights: pre-LayerNorm, qkv bias, no final norm.

    Args:
        config: sizes.
        seed: the weights are a function of (config, seed) alone; the global random state is neither read nor moved.
        dtype: of weights and output.

    Raises:
        ImportError: transformers is not installed.
    """

    def __init__(self, config: VisionConfig, *, seed: int = 0, dtype: torch.dtype = torch.float32) -> None:
        super().__init__()
        self.config = config
        self.model = _random_internvit(config, seed).to(dtype)

    @classmethod
    def empty(cls, config: VisionConfig, *, dtype: torch.dtype = torch.float32) -> VisionEncoder:
        """The encoder on the meta device, for `load_state_dict(..., assign=True)`: no weight is drawn twice."""
        encoder = cls.__new__(cls)
        nn.Module.__init__(encoder)
        encoder.config = config
        with torch.device("meta"):
            encoder.model = _internvit(config).to(dtype)
        return encoder

    @property
    def grid(self) -> tuple[int, int]:
        """Patch rows and columns (h, w) of a frame."""
        side = self.config.image_size // self.config.patch_size
        return side, side

    def forward(
        self, frames: Tensor, *, chunk_frames: int = 8, progress: Callable[[int, int], None] | None = None
    ) -> Tensor:
        """Tokens of every frame, normalised by ImageNet's mean and standard deviation first.

        Args:
            frames: uint8 RGB [F, 3, image_size, image_size], on the device of the weights.
            chunk_frames: frames that pass the layers at a time; bounds the working memory.
            progress: called as progress(frames done, F) after each chunk.

        Returns:
            [F, 1 + h*w, hidden_size] in the dtype of the weights: class token, then patches in row-major order.

        Raises:
            TypeError: frames that are no tensor. ValueError: their dtype, shape or device; chunk_frames < 1.
        """
        weight = next(self.model.parameters())
        self._check_frames(frames, weight.device)
        check_int("chunk_frames", chunk_frames, minimum=1)
        mean = 255 * torch.tensor(IMAGENET_MEAN, device=frames.device).view(3, 1, 1)
        std = 255 * torch.tensor(IMAGENET_STD, device=frames.device).view(3, 1, 1)
        h, w = self.grid
        num_frames = frames.shape[0]
        tokens = torch.empty(num_frames, 1 + h * w, self.config.hidden_size, dtype=weight.dtype, device=weight.device)
        for start in range(0, num_frames, chunk_frames):
            end = min(start + chunk_frames, num_frames)
            pixels = (frames[start:end].float() - mean) / std
            tokens[start:end] = self.model(pixel_values=pixels.to(weight.dtype)).last_hidden_state
            if progress is not None:
                progress(end, num_frames)
        return tokens

    def _check_frames(self, frames: Tensor, device: torch.device) -> None:
        if not isinstance(frames, Tensor):
            raise TypeError(f"frames must be a tensor, got {type(frames).__name__}")
        if frames.dtype != torch.uint8:
            raise ValueError(f"frames must be uint8, got {str(frames.dtype).removeprefix('torch.')}")
        size = self.config.image_size
        if frames.dim() != 4 or tuple(frames.shape[1:]) != (3, size, size):
            raise ValueError(f"frames must have shape [F, 3, {size}, {size}], got {list(frames.shape)}")
        if frames.device != device:
            raise ValueError(f"frames must be on {device} as the weights are, got {frames.device}")


def _internvit(config: VisionConfig) -> Any:
    # Importing transformers takes seconds, which `import lrc_model` must not.
    try:
        from transformers import InternVLVisionConfig, InternVLVisionModel
    except ImportError as error:
        raise ImportError(f'VisionEncoder needs transformers: pip install "lrc-kernels[model]" ({error})') from error
    settings: dict[str, Any] = {
        "hidden_size": config.hidden_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "intermediate_size": config.intermediate_size,
        "image_size": (config.image_size, config.image_size),
        "patch_size": (config.patch_size, config.patch_size),
        "attention_bias": True,
        "norm_type": "layer_norm",
        # Mean pooling of the pooled output, which nobody reads, is what makes the final norm an identity.
        "use_mean_pooling": True,
        "attn_implementation": "sdpa",
    }
    return InternVLVisionModel(InternVLVisionConfig(**settings))


def _random_internvit(config: VisionConfig, seed: int) -> Any:
    with torch.random.fork_rng(devices=[]), torch.device("cpu"):
        # torch.manual_seed would seed the CUDA generators too, which fork_rng does not restore.
        torch.default_generator.manual_seed(seed)
        model = _internvit(config)
        # transformers starts these at zero, with which all patches of an even area would be the same token.
        for embedding in (model.embeddings.cls_token, model.embeddings.position_embeddings):
            nn.init.normal_(embedding, std=model.config.initializer_range)
    return model
