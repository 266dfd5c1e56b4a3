# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.tome VIDEO`: one clip of a video in, a picture of what merges with what in its frames out."""

from __future__ import annotations

import argparse
import math
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from torch import Tensor

from lrc_kernels.packing import decode_frames, probe_video
from lrc_kernels.tome import MergePlan, TokenLayout, compress_clips

if TYPE_CHECKING:
    from PIL import Image

# Mean and deviation of ImageNet, which the ViTs of InternVL and most others expect.
MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
IMAGE_SIZE, PATCH = 448, 14
MARGIN, COLUMNS = 12, 4


@dataclass(frozen=True)
class Features:
    """What the tokens of a clip are matched by: x [F, prefix + h*w, D], the heads of its metric, and what it is."""

    x: Tensor
    layout: TokenLayout
    num_heads: int
    name: str


def pixel_features(frames: Tensor, image_size: int = IMAGE_SIZE, patch: int = PATCH) -> Features:
    """The normalised pixels of every patch of uint8 frames [F, 3, S, S], where no model is at hand."""
    side = image_size // patch
    patches = normalised(frames).unflatten(2, (side, patch)).unflatten(4, (side, patch))
    x = patches.permute(0, 2, 4, 3, 5, 1).reshape(len(frames), side * side, 3 * patch * patch)
    layout = TokenLayout(len(frames), (side, side), shuffle=2, prefix=0)
    return Features(x, layout, 1, f"the pixels of {patch} x {patch} patches (no model)")


def load_vit(checkpoint: Path) -> tuple[Any, int]:
    """(the ViT of a transformers checkpoint, the side of the images that it takes).

    Raises:
        ImportError: transformers is missing. OSError, ValueError: no checkpoint there, or none with a ViT.
    """
    try:
        from transformers import AutoModel
    except ImportError as error:
        raise ImportError(f'--checkpoint needs transformers: pip install "lrc-kernels[model]" ({error})') from error
    if not (checkpoint / "config.json").is_file():
        raise FileNotFoundError(f"--checkpoint must be a folder with a config.json, got {checkpoint}")
    model = AutoModel.from_pretrained(checkpoint, local_files_only=True).eval()
    for name in ("vision_tower", "vision_model"):
        model = getattr(model, name, model)
    size = getattr(model.config, "image_size", None)
    size = size[0] if isinstance(size, (tuple, list)) else size
    if not isinstance(size, int):
        raise ValueError(f"--checkpoint must hold a ViT with an image_size, got {type(model).__name__}")
    return model, size


def vit_features(frames: Tensor, model: Any) -> Features:
    """The last hidden state of a transformers ViT on uint8 frames [F, 3, S, S]."""
    with torch.inference_mode():
        x = model(pixel_values=normalised(frames)).last_hidden_state
    patch = model.config.patch_size
    side = frames.shape[-1] // (patch[0] if isinstance(patch, (tuple, list)) else patch)
    prefix = x.shape[1] - side * side
    if prefix < 0:
        raise ValueError(f"the ViT must give one token per patch ({side} x {side}), got {x.shape[1]}")
    layout = TokenLayout(len(frames), (side, side), shuffle=1 if side % 2 else 2, prefix=prefix)
    return Features(x.clone(), layout, model.config.num_attention_heads, f"the output of {type(model).__name__}")


def normalised(frames: Tensor) -> Tensor:
    mean, std = (torch.tensor(values)[:, None, None] for values in (MEAN, STD))
    return (frames.float() / 255 - mean) / std


def clip_times(duration_s: float, start: float, fps: float, num_frames: int) -> list[float]:
    """Times in seconds of `num_frames` frames from `start` on, `fps` of them per second.

    Raises:
        ValueError: they do not lie within the video.
    """
    if num_frames < 1 or not fps > 0 or not start >= 0:
        raise ValueError(f"--frames must be >= 1, --fps > 0 and --start >= 0, got {num_frames}, {fps} and {start}")
    times = [start + index / fps for index in range(num_frames)]
    if not times[-1] < duration_s:
        raise ValueError(
            f"{num_frames} frames at {fps:g} per second from {start:g} s must end before the video does at "
            f"{duration_s:.2f} s: pass another --start, --fps or --frames"
        )
    return times


def picture(frames: Tensor, plan: MergePlan, layout: TokenLayout, size: tuple[int, int], title: str) -> Image.Image:
    """Every frame of one clip with the outlines of its groups, and below it each token in the mean colour of its group.

    Args:
        frames: uint8 [F, 3, S, S].
        plan: of one clip of `layout`.
        size: (width, height) of the video as it is displayed.
        title: lines of text above the frames.
    """
    from PIL import Image, ImageDraw, ImageFont

    from lrc_kernels.tome import drawing

    h, w = (patches // layout.shuffle for patches in layout.grid)
    groups = plan.assign.long().view(len(frames), h, w).numpy()
    pixels = frames.numpy()
    cell = drawing.cell_size(*size, (h, w), 384)
    height, width = h * cell[0], w * cell[1]
    style = drawing.clip_style(groups, plan.num_out)
    # A ViT whose patches do not divide the image leaves its last pixels out.
    side = frames.shape[-1]
    means = drawing.mean_colours(pixels[:, :, : side // h * h, : side // w * w], groups, plan.num_out)
    columns = min(COLUMNS, len(frames))
    rows = math.ceil(len(frames) / columns)
    font = ImageFont.load_default(size=18)
    top = MARGIN + 26 * len(title.splitlines())
    row_height = 2 * (height + MARGIN)
    whole = Image.new("RGB", (columns * (width + MARGIN) + MARGIN, top + rows * row_height), (255, 255, 255))
    ImageDraw.Draw(whole).multiline_text((MARGIN, MARGIN // 2), title, (27, 31, 36), font, spacing=6)
    for index, (frame, ids, mean) in enumerate(zip(pixels, groups, means, strict=True)):
        left = MARGIN + index % columns * (width + MARGIN)
        upper = top + index // columns * row_height
        outlined = drawing.photograph(frame, (height, width)).convert("RGBA")
        outlined.alpha_composite(Image.fromarray(drawing.outlines(ids, style, cell), "RGBA"))
        whole.paste(outlined.convert("RGB"), (left, upper))
        blocks = Image.fromarray(mean, "RGB").resize((width, height), Image.Resampling.NEAREST)
        whole.paste(blocks, (left, upper + height + MARGIN // 2))
    return whole


def draw(arguments: argparse.Namespace) -> str:
    """Do what the command line asks for; the line to print. Raises what `main` turns into one line."""
    try:
        import PIL  # noqa: F401
    except ImportError as error:
        raise ImportError('the picture needs pillow: pip install "lrc-kernels[video]"') from error
    model, side = (None, IMAGE_SIZE) if arguments.checkpoint is None else load_vit(arguments.checkpoint)
    info = probe_video(arguments.video)
    times = clip_times(info.duration_s, arguments.start, arguments.fps, arguments.frames)
    decoded = decode_frames(arguments.video, times, size=(side, side))
    if not decoded.valid.all():
        raise ValueError(f"{arguments.video}: {int((~decoded.valid).sum())} of {len(times)} frames cannot be decoded")
    features = pixel_features(decoded.frames) if model is None else vit_features(decoded.frames, model)
    num_tokens = features.layout.tokens_per_clip
    target = min(16 * arguments.frames, num_tokens) if arguments.target is None else arguments.target
    result = compress_clips(features.x, target, features.num_heads, layout=features.layout, return_plan=True)
    plan = cast("tuple[Tensor, MergePlan]", result)[1]
    upright = info.rotation % 180 == 0
    size = (info.width, info.height) if upright else (info.height, info.width)
    alone, largest = int((plan.size == 1).sum()), int(plan.size.max())
    said = f"{num_tokens} tokens -> {target}, {alone} of them single tokens, the largest holds {largest}"
    title = (
        f"{info.path.name if isinstance(info.path, Path) else info.path}, {arguments.frames} frames from "
        f"{arguments.start:g} s at {arguments.fps:g} per second: {said}\n"
        f"matched by {features.name}; letters: the largest groups; below: each token in the mean colour of its group"
    )
    picture(decoded.frames, plan, features.layout, size, title).save(arguments.out)
    return f"{arguments.out}: {said}, matched by {features.name}"


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lrc_kernels.tome", description="Draws which tokens of a video's clip merge into one."
    )
    parser.add_argument("video", type=Path, help="a video file")
    parser.add_argument("--out", type=Path, default=Path("merge_groups.png"), help="picture (default %(default)s)")
    parser.add_argument("--start", type=float, default=0.0, help="seconds at which the clip begins (default 0)")
    parser.add_argument("--fps", type=float, default=4.0, help="frames of the clip per second (default 4)")
    parser.add_argument("--frames", type=int, default=8, help="frames of the clip (default 8)")
    parser.add_argument("--target", type=int, help="tokens to keep (default 16 per frame)")
    parser.add_argument(
        "--checkpoint", type=Path, help="folder of a transformers ViT to match by its output instead of by pixels"
    )
    arguments = parser.parse_args(argv)
    try:
        print(draw(arguments))
    except (ValueError, OSError, ImportError) as error:
        print(f"python -m lrc_kernels.tome: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
