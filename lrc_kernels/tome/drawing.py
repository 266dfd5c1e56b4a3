# SPDX-License-Identifier: Apache-2.0
"""Merge groups to pictures: uint8 frames and group ids in, outlines and mean colours out. Needs pillow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

# Eight colours that stay apart for colour-blind readers as well; the letters repeat what they say.
NAMED_COLOURS = (
    (255, 196, 0),
    (0, 174, 255),
    (255, 77, 77),
    (46, 204, 113),
    (214, 92, 255),
    (255, 140, 26),
    (0, 222, 209),
    (255, 120, 190),
)
LETTERS = "ABCDEFGH"
SINGLE_COLOUR = (190, 190, 190)

UInt8 = NDArray[np.uint8]
Groups = NDArray[np.int64]


@dataclass(frozen=True)
class ClipStyle:
    """How each group of one clip is drawn, the same in all its frames.

    Attributes:
        sizes: int64 [G], tokens of each group.
        named: the largest groups, largest first; they get `LETTERS` and `NAMED_COLOURS`.
        colour: uint8 [G, 3].
        width: int64 [G], pixels of the outline.
    """

    sizes: Groups
    named: list[int]
    colour: UInt8
    width: Groups


def clip_style(groups: Groups, num_groups: int) -> ClipStyle:
    """The style of one clip, `groups` int64 [F, h, w] with ids below `num_groups`."""
    sizes = np.bincount(groups.ravel(), minlength=num_groups)
    named = [int(g) for g in np.argsort(-sizes, kind="stable")[: len(LETTERS)] if sizes[g] > 1]
    # Hues a golden angle apart keep neighbours in the reference order distinct; pale, so that the named ones stand out.
    hues = (np.arange(num_groups) * 0.618034) % 1.0
    colour = np.array([_pale(hue) for hue in hues], dtype=np.uint8)
    colour[sizes == 1] = SINGLE_COLOUR
    width = np.where(sizes == 1, 1, 2)
    for letter, group in enumerate(named):
        colour[group], width[group] = NAMED_COLOURS[letter], 3
    return ClipStyle(sizes, named, colour, width)


def _pale(hue: float) -> tuple[int, int, int]:
    channels = (0.5 + 0.5 * np.cos(2 * np.pi * (hue + shift)) for shift in (0.0, 1 / 3, 2 / 3))
    red, green, blue = (round(120 + 120 * float(channel)) for channel in channels)
    return red, green, blue


def cell_size(width: int, height: int, grid: tuple[int, int], side: int) -> tuple[int, int]:
    """(rows, columns) of pixels per token: the drawn frame has the video's own shape and about side^2 pixels."""
    rows, columns = grid
    scale = side / math.sqrt(width * height)
    return max(4, round(height * scale / rows)), max(4, round(width * scale / columns))


def outlines(groups: Groups, style: ClipStyle, cell: tuple[int, int], *, letters: bool = True) -> UInt8:
    """RGBA [h * cell, w * cell, 4]: borders between groups, the named ones tinted and lettered; `groups` int64 [h, w].

    Each group draws its border inside its own cells, so that both colours of a shared border are seen.
    """
    height, width = cell
    grown = np.pad(groups, 1, constant_values=-1)
    row = np.tile(np.arange(height), groups.shape[0])[:, None]
    column = np.tile(np.arange(width), groups.shape[1])[None, :]
    pixels = _enlarge(groups, cell)
    thick = style.width[pixels]
    border = np.zeros(pixels.shape, dtype=bool)
    near = {
        "row": {-1: row < thick, 0: True, 1: row >= height - thick},
        "column": {-1: column < thick, 0: True, 1: column >= width - thick},
    }
    for down in (-1, 0, 1):
        for right in (-1, 0, 1):
            neighbour = grown[1 + down : 1 + down + groups.shape[0], 1 + right : 1 + right + groups.shape[1]]
            differs = _enlarge(neighbour != groups, cell)
            border |= differs & near["row"][down] & near["column"][right]
    single = style.sizes[pixels] == 1
    is_named = np.isin(pixels, style.named)
    alpha = np.where(border, np.where(single, 110, np.where(is_named, 255, 190)), np.where(is_named, 38, 0))
    rgba = np.concatenate([style.colour[pixels], alpha[..., None].astype(np.uint8)], axis=-1)
    return _letters(rgba, groups, style, cell) if letters else rgba


def _enlarge(cells: NDArray, cell: tuple[int, int]) -> NDArray:
    return cells.repeat(cell[0], axis=0).repeat(cell[1], axis=1)


def _letters(rgba: UInt8, groups: Groups, style: ClipStyle, cell: tuple[int, int]) -> UInt8:
    image = Image.fromarray(rgba, "RGBA")
    draw = ImageDraw.Draw(image)
    font = ImageFont.load_default(size=max(11, round(0.85 * min(cell))))
    for letter, group in zip(LETTERS, style.named, strict=False):
        cells = np.argwhere(groups == group)
        if len(cells):
            # The member nearest to the centre: the centre itself may lie outside a scattered group.
            i, j = cells[np.square(cells - cells.mean(axis=0)).sum(axis=1).argmin()]
            centre = ((j + 0.5) * cell[1], (i + 0.5) * cell[0])
            draw.text(centre, letter, (255, 255, 255, 255), font, "mm", stroke_width=2, stroke_fill=(0, 0, 0, 255))
    return np.asarray(image)


def mean_colours(frames: UInt8, groups: Groups, num_groups: int) -> UInt8:
    """Each token in the mean colour of its group: frames uint8 [F, 3, H, W], groups [F, h, w] -> uint8 [F, h, w, 3]."""
    count, rows, columns = groups.shape
    height, width = frames.shape[2] // rows, frames.shape[3] // columns
    tokens = frames.reshape(count, 3, rows, height, columns, width).mean(axis=(3, 5)).transpose(0, 2, 3, 1)
    flat, members = tokens.reshape(-1, 3), groups.ravel()
    sizes = np.maximum(np.bincount(members, minlength=num_groups), 1)
    means = np.stack([np.bincount(members, flat[:, c], num_groups) / sizes for c in range(3)], axis=-1)
    return means.round().astype(np.uint8)[groups]


def photograph(frame: UInt8, size: tuple[int, int]) -> Image.Image:
    """uint8 [3, H, W] as an RGB image of `size` (height, width)."""
    image = Image.fromarray(np.ascontiguousarray(frame.transpose(1, 2, 0)), "RGB")
    return image.resize((size[1], size[0]), Image.Resampling.LANCZOS)


def strip(frames: UInt8, groups: Groups, style: ClipStyle, cell: tuple[int, int]) -> Image.Image:
    """All frames of a clip side by side with their outlines in one small RGB image."""
    height, width = groups.shape[1] * cell[0], groups.shape[2] * cell[1]
    drawn_cell = (3 * cell[0], 3 * cell[1])
    whole = Image.new("RGB", (len(frames) * (width + 4) - 4, height), (255, 255, 255))
    for index, (frame, ids) in enumerate(zip(frames, groups, strict=True)):
        picture = photograph(frame, (3 * height, 3 * width)).convert("RGBA")
        picture.alpha_composite(Image.fromarray(outlines(ids, style, drawn_cell, letters=False), "RGBA"))
        small = picture.convert("RGB").resize((width, height), Image.Resampling.LANCZOS)
        whole.paste(small, (index * (width + 4), 0))
    return whole
