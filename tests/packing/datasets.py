# SPDX-License-Identifier: Apache-2.0
"""Small data sets of questions about videos whose frames say which they are."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

from lrc_kernels.packing import Index, PackConfig, PackedDataset, TemporalSampling, build_index, plan_packs
from lrc_kernels.packing.template import ChatTemplate
from tests.packing.videos import write_video

SAMPLING = TemporalSampling(dense_fps=2.0, sparse_fps=1.0, short_max_s=60.0, min_frames=4, max_frames=16, multiple_of=4)
TEMPLATE = ChatTemplate(intro="{num_frames}:", frame="{visual}", between="", turn="<|im_start|>{role} {text}<|im_end|>")
TOKENS_PER_FRAME = 2


class ByteTokenizer:
    """Bytes as ids, and four special tokens behind them."""

    def __init__(self) -> None:
        self.special_tokens = {"<IMG_CONTEXT>": 256, "<|im_start|>": 257, "<|im_end|>": 258, "<img>": 259}

    def encode(self, text: str) -> list[int]:
        return list(text.encode())


def talk(question: str, answer: str, **fields: object) -> dict:
    turns = [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]
    return {"id": 0, "conversations": turns, **fields}


def write_dataset(folder: Path, records: list[dict], *, name: str = "set", **entry: object) -> Path:
    """The configuration file of one data set whose videos lie in folder/videos."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(record) for record in records]
    (folder / f"{name}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    config = folder / f"{name}.json"
    config.write_text(json.dumps({name: {"root": "videos", "annotation": f"{name}.jsonl", **entry}}))
    return config


def write_videos(folder: Path, counts: list[int]) -> list[str]:
    """One video of `count` frames, ten a second, for each count."""
    (folder / "videos").mkdir(parents=True, exist_ok=True)
    names = [f"v{i}.mp4" for i in range(len(counts))]
    for name, count in zip(names, counts, strict=True):
        write_video(folder / "videos" / name, [100 * i for i in range(count)], size=(32, 32))
    return names


CONFIG = PackConfig(max_tokens=160, drop_last=False)
COUNTS = [40, 25, 10, 30]
ANSWERS = ["no", "maybe so", "y", "it is the third of them"]


def _records(n: int) -> list[dict]:
    made = []
    for i in range(n):
        video = {"video": f"v{i % 5}.mp4"} if i % 5 < 4 else {}
        made.append(talk(f"question {i}", ANSWERS[i % 4], **video))
    return made


def make_index(folder: Path, n: int = 14) -> Index:
    """An index of n questions about the videos of `write_videos(folder, COUNTS)`; every fifth has none."""
    return build_index(
        write_dataset(folder, _records(n)),
        SAMPLING,
        ByteTokenizer(),
        folder / "index",
        tokens_per_frame=TOKENS_PER_FRAME,
        template=TEMPLATE,
        threads=2,
    )


def dataset_of(index: Index, packs_per_step: int = 1, **options: Any) -> PackedDataset:
    """A plan of it, and its dataset of small frames."""
    plan_options = {k: options.pop(k) for k in ("balance", "epoch", "seed") if k in options}
    config = options.pop("config", CONFIG)
    plan = plan_packs(index, config, packs_per_step=packs_per_step, **plan_options)
    return PackedDataset(index, plan, **{"image_size": 16, **options})


def threads_named(prefix: str) -> int:
    return sum(thread.name.startswith(prefix) for thread in threading.enumerate())
