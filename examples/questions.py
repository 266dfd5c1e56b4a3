# SPDX-License-Identifier: Apache-2.0
"""Shots of a video in, questions about short clips of them out: files that PyAV encodes and annotations in JSONL.

Every answer is known from how the clip was made, or measured on its pixels. Each kind of question asks for each of its
answers equally often, so that chance is 1 / the number of answers.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from PIL import Image, ImageDraw, ImageFont

from lrc_kernels.packing import DecodedVideo

# Frames a second, frames of the shortest and the longest clip, and rows and columns that shots are read with.
FPS, SHORTEST, LONGEST, SHOT_SIDE = 15, 6, 32, 112
# The quadrant that moves most moves so many times as much as the next one, and by more grey levels than encoding does.
MARGIN, LEAST_MOTION, TRIES = 1.3, 1.0, 40
RED, BLUE = (230, 30, 30), (40, 70, 255)

UInt8 = NDArray[np.uint8]
# Seconds of a shot, shots that are trained on, shots that are held out, and the share of the video for the former.
SHOT_S, TRAIN_SHOTS, HELD_OUT_SHOTS, TRAIN_SHARE = 2.0, 9, 3, 0.75


@dataclass(frozen=True)
class Kind:
    """A kind of question: what is asked, and every answer there is."""

    question: str
    answers: tuple[str, ...]


KINDS = {
    "digit": Kind("Which digit was inserted?", tuple("0123456789")),
    "order": Kind("Which framed picture came first?", ("red", "blue")),
    "quadrant": Kind("Which quadrant moves most?", ("top left", "top right", "bottom left", "bottom right")),
}


@dataclass(frozen=True)
class Question:
    """One question: its kind, the name of its video, and the right answer."""

    kind: str
    video: str
    answer: str


def read_shots(
    duration_s: float, read: Callable[[NDArray[np.float64]], DecodedVideo]
) -> tuple[list[UInt8], list[UInt8]]:
    """Shots of the first three quarters of a video, to train on, and of the last one, which is held out.

    A short video is read whole, of a long one evenly spread shots.

    Args:
        read: the frames at some times.

    Raises:
        ValueError: a video one part of which is shorter than a clip, or so damaged that no clip is left.
    """
    border = TRAIN_SHARE * duration_s
    train, held_out = _times(0, border, TRAIN_SHOTS), _times(border, duration_s, HELD_OUT_SHOTS)
    if len(held_out[0]) < SHORTEST:
        wanted = SHORTEST / FPS / (1 - TRAIN_SHARE)
        raise ValueError(f"training needs a video of at least {wanted:g} s, got {duration_s:g} s: --steps 0 skips it")
    video = read(np.concatenate(train + held_out))
    ends = np.cumsum([len(times) for times in train + held_out]).tolist()
    borders = [0.0] * len(train) + [border] * len(held_out)
    shots = [_unbroken(video, slice(*span), began) for span, began in zip(pairwise([0, *ends]), borders, strict=True)]
    parts = shots[: len(train)], shots[len(train) :]
    learnt, asked = ([shot for shot in part if len(shot) >= SHORTEST] for part in parts)
    if not (learnt and asked):
        raise ValueError(
            f"training needs {SHORTEST} frames in a row to learn from and as many behind them, got at most "
            f"{max(map(len, parts[0]))} and {max(map(len, parts[1]))}: --steps 0 skips it"
        )
    return learnt, asked


def _unbroken(video: DecodedVideo, shot: slice, begin: float) -> UInt8:
    """A shot without what came on before `begin`; a damaged frame shows the one before it, of the same shot."""
    fresh = ~(video.pts[shot] < begin).numpy()
    frames, valid = video.frames[shot].numpy()[fresh], video.valid[shot].numpy()[fresh]
    first = int(valid.argmax()) if valid.any() else len(valid)
    shown = np.where(valid[first:], np.arange(first, len(valid)), first)
    return frames[np.maximum.accumulate(shown)]


def _times(start: float, end: float, count: int) -> list[NDArray[np.float64]]:
    length = end - start
    if length <= count * SHOT_S:
        spans = [(start, length)]
    else:
        spans = [(start + (i + 0.5) * length / count - SHOT_S / 2, SHOT_S) for i in range(count)]
    return [at + (np.arange(int(FPS * seconds + 1e-9)) + 0.5) / FPS for at, seconds in spans]


def write_questions(
    shots: list[UInt8], folder: Path, *, per_kind: int, size: int, seed: int, progress: Callable[[int, int], None]
) -> list[Question]:
    """Cut, draw and encode `per_kind` clips of each kind, and write `folder`/{data.json, questions.jsonl, *.mp4}.

    Args:
        shots: uint8 [N, 3, H, W] each, consecutive frames at `FPS`, at least `SHORTEST` of them.
        size: rows and columns of a clip.

    Returns:
        The questions in the order of the annotations, fewer of a kind that the shots do not allow: in a video that
        does not move, no quadrant moves most.
    """
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.default_rng(seed)
    questions = []
    asked: Counter[str] = Counter()
    kinds = [kind for kind in KINDS for _ in range(per_kind)]
    for number, kind in enumerate(kinds):
        answers = KINDS[kind].answers
        answer = answers[asked[kind] % len(answers)]
        frames = MAKERS[kind](shots, size, answer, random)
        if frames is not None:
            name = f"{kind}-{number:04d}.mp4"
            write_clip(folder / name, frames)
            questions.append(Question(kind, name, answer))
            asked[kind] += 1
        progress(number + 1, len(kinds))
    lines = [
        {
            "video": question.video,
            "conversations": [
                {"from": "human", "value": KINDS[question.kind].question},
                {"from": "gpt", "value": question.answer},
            ],
        }
        for question in questions
    ]
    (folder / "questions.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines), encoding="utf-8")
    entry = {"questions": {"root": ".", "annotation": "questions.jsonl"}}
    (folder / "data.json").write_text(json.dumps(entry), encoding="utf-8")
    return questions


def cut(shots: list[UInt8], size: int, random: np.random.Generator) -> UInt8:
    """Consecutive frames of one shot, of random length, place and zoom, perhaps mirrored: uint8 [n, size, size, 3]."""
    shot = shots[random.choice(len(shots), p=np.array([len(s) for s in shots]) / sum(len(s) for s in shots))]
    # Log-uniform: many short clips and a few long ones, as data sets of video have them.
    length = int(np.exp(random.uniform(np.log(SHORTEST), np.log(min(LONGEST, len(shot)) + 1))))
    start = int(random.integers(0, len(shot) - length + 1))
    height, width = shot.shape[2:]
    side = int(random.uniform(0.5, 1.0) * min(height, width))
    top, left = int(random.integers(0, height - side + 1)), int(random.integers(0, width - side + 1))
    part = torch.from_numpy(shot[start : start + length, :, top : top + side, left : left + side])
    small = torch.nn.functional.interpolate(part, (size, size), mode="bilinear", antialias=True)
    return small.numpy().transpose(0, 2, 3, 1)[:, :, :: int(random.choice((-1, 1)))].copy()


def insert_digit(shots: list[UInt8], size: int, answer: str, random: np.random.Generator) -> UInt8:
    """A white card with a large digit in place of a third of a clip, anywhere in it."""
    frames = cut(shots, size, random)
    run = math.ceil(len(frames) / 3)
    start = int(random.integers(0, len(frames) - run + 1))
    card = Image.new("RGB", (size, size), "white")
    font = ImageFont.load_default(size=round(random.uniform(0.85, 1.0) * size))
    x, y = size / 2 + random.uniform(-0.05, 0.05, 2) * size
    ImageDraw.Draw(card).text((x, y), answer, "black", font, "mm", stroke_width=size // 28, stroke_fill="black")
    frames[start : start + run] = np.asarray(card)
    return frames


def frame_two(shots: list[UInt8], size: int, answer: str, random: np.random.Generator) -> UInt8:
    """One picture of a clip framed in red, another one in blue; each stands still for a third of the clip."""
    frames = cut(shots, size, random)
    run = math.ceil(len(frames) / 3)
    first = int(random.integers(0, len(frames) - 2 * run + 1))
    second = int(random.integers(first + run, len(frames) - run + 1))
    border = max(2, size // 7)
    for start, colour in zip((first, second), (RED, BLUE) if answer == "red" else (BLUE, RED), strict=True):
        still = frames[start].copy()
        still[:border], still[-border:], still[:, :border], still[:, -border:] = colour, colour, colour, colour
        frames[start : start + run] = still
    return frames


def motion(frames: UInt8) -> NDArray[np.float64]:
    """Mean absolute change from frame to frame of the quadrants, float64 [4] in the order of the answers."""
    change = np.abs(np.diff(frames.astype(np.int16), axis=0)).mean(axis=(0, 3))
    half = frames.shape[1] // 2
    return np.array([change[rows, columns].mean() for rows in (slice(half), slice(half, None))
                     for columns in (slice(half), slice(half, None))])  # fmt: skip


def find_motion(shots: list[UInt8], size: int, answer: str, random: np.random.Generator) -> UInt8 | None:
    """A clip one quadrant of which clearly moves most, mirrored such that it is the one of the answer."""
    wanted = KINDS["quadrant"].answers.index(answer)
    for _ in range(TRIES):
        frames = cut(shots, size, random)
        moves = motion(frames)
        most, next_most = np.sort(moves)[::-1][:2]
        if most > max(MARGIN * next_most, LEAST_MOTION):
            flips = wanted ^ int(moves.argmax())
            return frames[:, :: -1 if flips & 2 else 1, :: -1 if flips & 1 else 1].copy()
    return None


MAKERS = {"digit": insert_digit, "order": frame_two, "quadrant": find_motion}


def write_clip(path: Path, frames: UInt8) -> None:
    """Encode uint8 [n, H, W, 3] as a video of `FPS`."""
    import av

    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=FPS)
        stream.height, stream.width = frames.shape[1:3]
        stream.pix_fmt, stream.bit_rate = "yuv420p", 2_000_000
        for picture in frames:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
        container.mux(stream.encode(None))
