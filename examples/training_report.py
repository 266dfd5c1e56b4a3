# SPDX-License-Identifier: Apache-2.0
"""What training on the demo's video gave, as a part of the report: losses, packing, answers beside the truth."""

from __future__ import annotations

import math
from html import escape
from typing import Any

import numpy as np
from PIL import Image

from examples.data_uris import jpeg_uri
from examples.questions import FPS, KINDS, LONGEST
from examples.training import Answered
from lrc_kernels.tome import drawing

SHOWN_PER_KIND, SHOWN_FRAMES, SIDE, MEAN_OVER = 3, 8, 56, 10

STYLE = """
.plot { position: relative; height: 220px; margin: 8px 0 26px 42px; max-width: 760px; }
.plot svg { width: 100%; height: 100%; display: block; overflow: visible; }
.plot polyline { fill: none; stroke: var(--bar2); stroke-width: 1.2; vector-effect: non-scaling-stroke; }
.plot polyline.mean { stroke: var(--bar); stroke-width: 2.4; }
.plot line { stroke: var(--line); stroke-width: 1; vector-effect: non-scaling-stroke; }
.plot span { position: absolute; font-size: 0.78rem; color: var(--soft); font-variant-numeric: tabular-nums; }
.plot .y { right: 100%; margin-right: 8px; transform: translateY(-50%); }
.plot .x { top: 100%; margin-top: 4px; transform: translateX(-50%); white-space: nowrap; }
.answers { display: grid; grid-template-columns: repeat(3, 1fr); gap: 14px 18px; margin: 10px 0; }
.answers figure { margin: 0; } .answers img { width: 100%; height: auto; display: block; border-radius: 4px; }
.answers figcaption { padding-top: 3px; } .answers b { color: var(--ink); }
.wrong { text-decoration: line-through; }
details { font-size: 0.88rem; } details p { max-width: none; color: var(--soft); }
@media (max-width: 640px) { .accuracy th, .accuracy td { padding: 5px 4px; }
  .accuracy th:first-child, .accuracy td:first-child { min-width: 7.5em; }
  .answers { grid-template-columns: 1fr; gap: 12px; } }
"""


def render(training: dict[str, Any], answered: list[Answered]) -> str:
    """The sections; `training` and `answered` as `examples.training.learn` gives them."""
    return _head(training) + _losses(training) + _packing(training) + _accuracy(training) + _answers(answered)


def _head(training: dict[str, Any]) -> str:
    steps, questions = training["steps"], training["questions"]
    tokens = sum(step["tokens"] for step in steps)
    ran = ", ".join(
        f"<code>{escape(entry['op'])}</code> on {escape(entry['backend'])}" for entry in training["backends"]
    )
    return (
        "<section><h2>A tiny model trained on this video</h2>"
        f"<p>{questions['train']:,} questions about clips of up to {LONGEST / FPS:.1f} s, cut from the first three "
        f"quarters of the video and encoded anew, were indexed, packed and learnt by an LRCModel of "
        f"{training['parameters']:,} parameters: ViT, merging, language model, all trained from random weights. "
        f"{len(steps)} steps of one pack, "
        f"{tokens / training['seconds']:,.0f} tokens/s ({training['waited_for_data_s']:.1f} of "
        f"{training['seconds']:.0f} s spent waiting for the next pack). Then it was "
        f"asked {questions['held_out']} questions about clips of the last quarter, of which it had seen nothing.</p>"
        f'<p class="note">Ran: {ran}.</p></section>'
    )


def _losses(training: dict[str, Any]) -> str:
    losses = np.array([step["loss"] for step in training["steps"]])
    marks = [base * 10.0**power for power in range(-9, 9) for base in (1, 2, 5)]
    low = max([mark for mark in marks if mark <= losses.min()], default=marks[0])
    high = max(losses.max(), 2 * low)

    def points(values: np.ndarray, first: int) -> str:
        x = (np.arange(len(values)) + first) / max(len(losses) - 1, 1) * 100
        y = 100 * (1 - np.log(values / low) / math.log(high / low))
        return " ".join(f"{a:.2f},{b:.2f}" for a, b in zip(x, y, strict=True))

    ticks = [mark for mark in marks if low <= mark <= high]
    heights = [100 * (1 - math.log(tick / low) / math.log(high / low)) for tick in ticks]
    lines = "".join(f'<line x1="0" x2="100" y1="{y:.2f}" y2="{y:.2f}"/>' for y in heights)
    labels = "".join(
        f'<span class="y" style="top:{y:.2f}%">{tick:g}</span>' for y, tick in zip(heights, ticks, strict=True)
    )
    labels += "".join(
        f'<span class="x" style="left:{100 * share:.0f}%">{"step " if share == 0.5 else ""}'
        f"{round(1 + share * (len(losses) - 1))}</span>"
        for share in (0, 0.5, 1)
    )
    width = min(MEAN_OVER, len(losses))
    mean = np.exp(np.convolve(np.log(losses), np.ones(width) / width, mode="valid"))
    return (
        f"<section><h3>Loss, {losses[0]:.2f} to {mean[-1]:.3f}</h3>"
        f'<div class="plot"><svg viewBox="0 0 100 100" preserveAspectRatio="none" role="img" aria-label="loss by step">'
        f'{lines}<polyline points="{points(losses, 0)}"/><polyline class="mean" points="{points(mean, width - 1)}"/>'
        f"</svg>{labels}</div>"
        f'<p class="note">Cross-entropy per supervised token of each pack, logarithmic scale; bold: geometric mean '
        f"of the last {width} steps. The form of the answers is learnt first; what is left is the choice among them."
        "</p></section>"
    )


def _packing(training: dict[str, Any]) -> str:
    facts = training["packing"]
    packs, padded = facts["utilisation"], facts["padded_utilisation"]
    rows = "".join(
        f'<span>{name}</span><span class="track"><i{kind} style="width:{55 * share:.1f}%"></i>{share:.1%}</span>'
        for name, kind, share in (("packed", "", packs), ("padded", ' class="rest"', padded))
    )
    return (
        f'<section><h3>Room that tokens of samples fill</h3><div class="bars">{rows}</div>'
        f'<p class="note">{facts["packs"]} packs of {facts["max_tokens"]:,} tokens hold samples of {facts["shortest"]} '
        f"to {facts['longest']} tokens. Padding the same samples in the same order to the longest of each batch of "
        f"{facts['padded_batch']} would compute {packs / padded:.2f}× as many tokens.</p></section>"
    )


def _accuracy(training: dict[str, Any]) -> str:
    rows = "".join(
        f"<tr><td>{escape(KINDS[kind].question)}</td><td>{entry['right']}/{entry['questions']}</td>"
        f"<td>{entry['accuracy']:.0%}</td><td>{entry['chance']:.0%}</td><td>{_luck(entry['luck'])}</td></tr>"
        for kind, entry in training["accuracy"].items()
    )
    missing = [kind for kind in KINDS if kind not in training["accuracy"]]
    left_out = f" No clip of this video suits the kind {escape(', '.join(missing))}." if missing else ""
    return (
        '<section><h3>Held-out questions</h3><div class="scroll"><table class="accuracy"><tr><th></th><th>right</th>'
        f"<th>accuracy</th><th>chance</th><th>by luck</th></tr>{rows}</table></div>"
        '<p class="note">An answer is right if all of its bytes are. Every answer of a kind is asked for equally '
        f"often; the last column is the probability that guessing does at least as well.{left_out}</p></section>"
    )


def _luck(probability: float) -> str:
    return f"{probability:.2g}" if probability >= 1e-3 else "below 0.001"


def _answers(answered: list[Answered]) -> str:
    shown, everything = [], []
    for kind, facts in KINDS.items():
        of_kind = [one for one in answered if one.question.kind == kind]
        # The first ones, not the best ones.
        shown += [_figure(one) for one in of_kind[:SHOWN_PER_KIND]]
        listed = ", ".join(_beside_truth(one) for one in of_kind)
        everything.append(f"<p><b>{escape(facts.question)}</b> {listed}</p>" if of_kind else "")
    return (
        f'<section><h3>Answers beside the truth</h3><div class="answers">{"".join(shown)}</div>'
        f"<details><summary>All {len(answered)} answers</summary>{''.join(everything)}</details></section>"
    )


def _beside_truth(one: Answered) -> str:
    truth, said = escape(one.question.answer), escape(one.answer) or "nothing"
    return truth if one.right else f'<span class="wrong">{said}</span> {truth}'


def _figure(one: Answered) -> str:
    count = len(one.frames)
    chosen = np.unique(np.linspace(0, count - 1, min(SHOWN_FRAMES, count)).round().astype(int))
    strip = Image.new("RGB", (SHOWN_FRAMES * (SIDE + 3) - 3, SIDE), "white")
    for place, frame in enumerate(chosen):
        strip.paste(drawing.photograph(one.frames[frame], (SIDE, SIDE)), (place * (SIDE + 3), 0))
    mark = "✓" if one.right else "✗"
    said = escape(one.answer) or "nothing"
    question = escape(KINDS[one.question.kind].question)
    return (
        f'<figure><img width="{strip.width}" height="{strip.height}" alt="{len(chosen)} of {count} frames" '
        f'src="{jpeg_uri(strip, 85)}"><figcaption>{question} <b>{said}</b> {mark}, '
        f"truth: {escape(one.question.answer)}</figcaption></figure>"
    )
