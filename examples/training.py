# SPDX-License-Identifier: Apache-2.0
"""A tiny LRCModel learns from questions about clips of the demo's video, and answers some about clips it never saw.

Clips on disk -> index -> plan -> packs -> a training loop of a dozen lines -> greedy answers: all of it the path that
a user's own training takes.
"""

from __future__ import annotations

import json
import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from examples.measure import backend_figures, one_thread
from examples.progress import Progress
from examples.questions import KINDS, Question, UInt8, write_questions
from lrc_kernels import backend
from lrc_kernels.packing import (
    ChatTemplate,
    Index,
    PackConfig,
    PackedDataset,
    PackedLoader,
    PackPlan,
    Sample,
    TemporalSampling,
    build_index,
    decode_frames,
    pack_samples,
    plan_packs,
)
from lrc_model.config import LRCConfig, preset
from lrc_model.model import LRCModel

# 15 frames/s as in the paper, but clips of seconds need no 64 frames.
SAMPLING = TemporalSampling(min_frames=4, max_frames=64, multiple_of=4)
# A byte is a token here, so frames are not numbered and the video is not introduced.
TEMPLATE = ChatTemplate(intro="", frame="{visual}", between="")
MAX_TOKENS, TRAIN_PER_KIND, HELD_OUT_PER_KIND, ANSWERED_AT_ONCE = 2048, 400, 60, 30
LEARNING_RATE, WARM_UP, LAST_SHARE, CLIP_NORM, WEIGHT_DECAY = 4e-3, 10, 0.05, 1.0, 0.01


@dataclass(frozen=True)
class Answered:
    """A held-out question, what the model said, and the frames that it saw: uint8 [F, 3, H, W]."""

    question: Question
    answer: str
    frames: UInt8

    @property
    def right(self) -> bool:
        return self.answer == self.question.answer


def learn(
    train: list[UInt8], held_out: list[UInt8], out: Path, *, steps: int, device: torch.device, seed: int
) -> tuple[dict[str, Any], list[Answered]]:
    """Write questions and losses to `out`, train, and answer.

    Args:
        train, held_out: shots as `write_questions` takes them, of different parts of the video.
        out: gets `questions/` and `losses.jsonl`.
        steps: optimizer steps; the set of questions shrinks where so few steps would not see all of it.

    Returns:
        Figures for the report, and every held-out question.
    """
    model = initial_model(preset("tiny"), seed, device)
    # Multiples of 20, so that every answer of every kind is asked for equally often.
    num_train, num_held_out = min(TRAIN_PER_KIND, 20 * steps), min(HELD_OUT_PER_KIND, 20 + steps // 40 * 20)
    folder = _fresh(out / "questions")
    index, learnt = write_and_index(train, folder / "train", model, per_kind=num_train, seed=seed)
    held_out_index, asked = write_and_index(held_out, folder / "held_out", model, per_kind=num_held_out, seed=seed + 1)
    plan = plan_packs(index, PackConfig(max_tokens=MAX_TOKENS), seed=seed)
    dataset = PackedDataset(index, plan, image_size=model.config.vision.image_size)
    # On matrices as small as these a second thread waits more than it computes, and decoding has use for the core.
    with one_thread(), PackedLoader(dataset, device=device) as loader:
        losses, ran = optimise(model, loader, steps, out / "losses.jsonl")
        answered = ask(model, held_out_index, asked)
    figures = {
        "steps": losses,
        "seconds": sum(step["seconds"] + step["waited_s"] for step in losses),
        "waited_for_data_s": sum(step["waited_s"] for step in losses),
        "parameters": sum(p.numel() for p in model.parameters()),
        "questions": {"train": len(learnt), "held_out": len(asked)},
        "packing": packing_figures(index, plan),
        "accuracy": accuracy(answered),
        "answers": [{**asdict(one.question), "said": one.answer} for one in answered],
        "backends": backend_figures(ran),
    }
    return figures, answered


def _fresh(folder: Path) -> Path:
    """An empty folder, in place of one that an earlier run made and of no other."""
    if (folder / "train" / "questions.jsonl").is_file():
        shutil.rmtree(folder)
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def write_and_index(
    shots: list[UInt8], folder: Path, model: LRCModel, *, per_kind: int, seed: int
) -> tuple[Index, list[Question]]:
    """Questions about these shots on disk, and their index."""
    size, show = model.config.vision.image_size, Progress("cut", "clips")
    questions = write_questions(shots, folder, per_kind=per_kind, size=size, seed=seed, progress=show)
    index = build_index(
        folder / "data.json",
        SAMPLING,
        model.tokenizer,
        folder / "index",
        tokens_per_frame=model.config.connector.tokens_per_frame,
        template=TEMPLATE,
    )
    return index, questions


def initial_model(config: LRCConfig, seed: int, device: torch.device) -> LRCModel:
    """Random weights of variance 1 / fan-in: the usual 0.02 is made for widths of thousands, and at 64 it whispers."""
    model = LRCModel.from_config(config, seed=seed, device=device)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.Linear):
                module.weight.mul_(module.in_features**-0.5 / module.weight.std())
    return model


def learning_rate(step: int, steps: int) -> float:
    """Warm-up, then a straight line down."""
    return LEARNING_RATE * min((step + 1) / WARM_UP, 1.0) * max(LAST_SHARE, 1 - step / steps)


def optimise(
    model: LRCModel, loader: PackedLoader, steps: int, log: Path
) -> tuple[list[dict[str, float]], list[tuple[str, str]]]:
    """Train for `steps` optimizer steps of one pack each; the losses go to `log` as they come.

    Returns:
        What stands in `log`, and the (op, backend) of everything that ran.
    """
    matrices = [p for p in model.parameters() if p.dim() > 1]
    others = [p for p in model.parameters() if p.dim() < 2]
    groups = [{"params": matrices, "weight_decay": WEIGHT_DECAY}, {"params": others, "weight_decay": 0.0}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.99))
    show = Progress("train", "steps")
    steps_done: list[dict[str, float]] = []
    tokens, epoch = 0, 0
    model.train()
    with backend.record() as ran, log.open("w", encoding="utf-8") as lines:
        begin = ready = time.perf_counter()
        while len(steps_done) < steps:
            loader.set_epoch(epoch)
            for batch in loader:
                step, start = len(steps_done), time.perf_counter()
                for group in optimizer.param_groups:
                    group["lr"] = learning_rate(step, steps)
                # Clips of 56-pixel frames are small enough to be encoded all at once.
                loss = model(batch, chunk_clips=len(batch.frames)).loss
                optimizer.zero_grad()
                loss.backward()
                norm = nn.utils.clip_grad_norm_(model.parameters(), CLIP_NORM)
                optimizer.step()
                used = batch.layout.num_tokens
                entry = {"step": step, "epoch": epoch, "loss": loss.item(), "grad_norm": norm.item(),
                         "learning_rate": learning_rate(step, steps), "tokens": used,
                         "utilisation": used / MAX_TOKENS, "waited_s": start - ready,
                         "seconds": time.perf_counter() - start}  # fmt: skip
                lines.write(json.dumps(entry) + "\n")
                lines.flush()
                steps_done.append(entry)
                tokens += used
                rate = tokens / (time.perf_counter() - begin)
                show(step + 1, steps, f"{rate:7.0f} tokens/s  utilisation {loader.stats.utilisation:.1%}  "
                     f"loss {entry['loss']:.3f}")  # fmt: skip
                if len(steps_done) == steps:
                    break
                ready = time.perf_counter()
            epoch += 1
    model.eval()
    return steps_done, ran


def ask(model: LRCModel, index: Index, questions: list[Question]) -> list[Answered]:
    """Greedy answers to the questions of an index, whose own answers are cut off first."""
    size, device = model.config.vision.image_size, next(model.parameters()).device
    stop = model.tokenizer.id("<|im_end|>")
    longest = 1 + max(len(model.tokenizer.encode(answer)) for kind in KINDS.values() for answer in kind.answers)
    show = Progress("answer", "questions")
    answered: list[Answered] = []
    for start in range(0, len(questions), ANSWERED_AT_ONCE):
        prompts = [_prompt(index, i, size) for i in range(start, min(start + ANSWERED_AT_ONCE, len(questions)))]
        batch = pack_samples(prompts, clip_frames=model.config.connector.clip_frames).to(device)
        words = model.generate(batch, max_new_tokens=longest, stop_ids={stop})
        for question, prompt, ids in zip(questions[start:], prompts, words, strict=False):
            assert prompt.frames is not None
            answered.append(Answered(question, model.tokenizer.decode(ids.tolist()), prompt.frames.numpy()))
        show(len(answered), len(questions))
    return answered


def _prompt(index: Index, sample_id: int, size: int) -> Sample:
    input_ids, labels, visual = map(torch.from_numpy, index.tokens(sample_id))
    end = int((labels != -100).nonzero()[0])
    media = index.media(sample_id)
    assert media is not None
    frames = decode_frames(media, index.timestamps(sample_id), size=(size, size), threads=1).frames
    return Sample(input_ids[:end], visual[:end], frames=frames, sample_id=sample_id)


def packing_figures(index: Index, plan: PackPlan) -> dict[str, float]:
    """Utilisation of the packs, and of the same samples in the same order padded to the longest of each batch.

    A padded batch takes as many samples as a pack holds on average, so that both cut the epoch into equally many steps.
    """
    stats, lengths = plan.stats(), index.columns["n_tokens"][plan.sample_index]
    batch = max(1, round(stats.num_packed / stats.num_packs))
    padded = sum(int(part.max()) * len(part) for part in np.split(lengths, range(batch, len(lengths), batch)))
    return {
        "max_tokens": MAX_TOKENS,
        "packs": stats.num_packs,
        "utilisation": stats.utilisation,
        "padded_batch": batch,
        "padded_utilisation": float(lengths.sum()) / padded,
        "shortest": int(lengths.min()),
        "longest": int(lengths.max()),
    }


def accuracy(answered: list[Answered]) -> dict[str, dict[str, float]]:
    """By kind: questions, right answers, what guessing gets, and how likely guessing gets at least as many right."""
    figures = {}
    for kind, facts in KINDS.items():
        marks = [one.right for one in answered if one.question.kind == kind]
        if marks:
            n, right, chance = len(marks), sum(marks), 1 / len(facts.answers)
            luck = sum(math.comb(n, k) * chance**k * (1 - chance) ** (n - k) for k in range(right, n + 1))
            figures[kind] = {"questions": n, "right": right, "accuracy": right / n, "chance": chance, "luck": luck}
    return figures
