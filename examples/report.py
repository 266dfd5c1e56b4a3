# SPDX-License-Identifier: Apache-2.0
"""The demo's figures, frames and merge groups in, one self-contained HTML page out: no network, no script it needs."""

from __future__ import annotations

from html import escape
from typing import Any

import numpy as np

from examples import training_report
from examples.data_uris import jpeg_uri, png_uri
from examples.training import Answered
from lrc_kernels.tome import drawing

SHOWN_CLIPS, STRIPS, SIDE, STRIP_SIDE = 3, 12, 336, 84
NAMES = {
    "ours": "lrc_kernels.compress_clips",
    "torch_best": "torch_best: same algorithm in short PyTorch",
    "published": "published: the public loop",
}

STYLE = """
:root { --ink: #1b1f24; --soft: #5d6772; --line: #dde2e7; --page: #fff; --card: #f6f8fa; --bar: #2f6fdb;
  --bar2: #b9c4d0; }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8ebee; --soft: #a0a9b3; --line: #333a42; --page: #14171a; --card: #1d2226; --bar: #6aa1ff;
  --bar2: #56616d; }
}
* { box-sizing: border-box; }
body { margin: 0 auto; max-width: 1180px; padding: 28px 20px 60px; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 6px; letter-spacing: -0.01em; }
h2 { font-size: 1.15rem; margin: 40px 0 8px; }
h3 { font-size: 1rem; margin: 28px 0 8px; }
p { margin: 6px 0 12px; max-width: 92ch; }
.soft, figcaption, .note { color: var(--soft); font-size: 0.88rem; }
.funnel { display: grid; grid-template-columns: repeat(3, 1fr); gap: 12px; margin: 14px 0; }
.funnel div { background: var(--card); border: 1px solid var(--line); border-radius: 10px; padding: 8px 14px;
  font-size: 0.88rem; }
.funnel b { display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums; }
.view { position: absolute; opacity: 0; }
.tabs { display: flex; flex-wrap: wrap; gap: 8px; margin: 10px 0; }
.tabs label { border: 1px solid var(--line); border-radius: 999px; padding: 4px 14px; cursor: pointer;
  font-size: 0.9rem; }
#view-groups:checked ~ .tabs [for=view-groups], #view-frames:checked ~ .tabs [for=view-frames],
#view-means:checked ~ .tabs [for=view-means] { background: var(--bar); border-color: var(--bar); color: var(--page); }
.view:focus-visible ~ .tabs { outline: 2px solid var(--bar); outline-offset: 4px; border-radius: 8px; }
.clip { display: grid; grid-template-columns: repeat(4, 1fr); gap: 6px; }
.frame { position: relative; margin: 0; line-height: 0; border-radius: 4px; overflow: hidden; }
.frame img { width: 100%; height: 100%; display: block; }
.frame .over { position: absolute; inset: 0; }
.frame .means { opacity: 0; image-rendering: pixelated; }
#view-frames:checked ~ .clips .outline, #view-means:checked ~ .clips .outline { opacity: 0; }
#view-means:checked ~ .clips .means { opacity: 1; }
.frame time { position: absolute; right: 4px; bottom: 4px; background: #000a; color: #fff; font-size: 0.7rem;
  line-height: 1;
  padding: 3px 5px; border-radius: 4px; font-variant-numeric: tabular-nums; }
.legend { display: flex; flex-wrap: wrap; gap: 4px 14px; list-style: none; padding: 0; margin: 8px 0 0;
  font-size: 0.86rem; }
.legend i { display: inline-block; width: 12px; height: 12px; border-radius: 3px; margin-right: 6px;
  vertical-align: -1px; }
.strip { margin: 0 0 10px; } .strip img { width: 100%; height: auto; display: block; border-radius: 4px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; width: 100%; font-variant-numeric: tabular-nums; font-size: 0.92rem; }
th, td { text-align: right; padding: 6px 10px; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, td:first-child { text-align: left; white-space: normal; min-width: 11em; } th { color: var(--soft);
  font-weight: 600; }
tr.ours td { font-weight: 600; }
.bars { display: grid; grid-template-columns: max-content 1fr; gap: 5px 12px; align-items: center;
  font-size: 0.9rem; }
.track { display: flex; align-items: center; gap: 8px; font-variant-numeric: tabular-nums; white-space: nowrap; }
.track i { display: block; height: 16px; background: var(--bar); border-radius: 3px; min-width: 2px; }
.track i.rest { background: var(--bar2); } .track i.gap { background: none; min-width: 0; margin-right: -8px; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: 4px 16px; font-size: 0.9rem; margin: 0; }
dt { color: var(--soft); } dd { margin: 0; overflow-wrap: anywhere; }
code { font: 0.88em ui-monospace, SFMono-Regular, Menlo, Consolas, monospace; }
@media (max-width: 640px) {
  body { padding: 18px 12px 40px; } h1 { font-size: 1.4rem; } .funnel { grid-template-columns: 1fr; gap: 6px; }
  .funnel b { display: inline; font-size: 1.05rem; margin-right: 6px; } .funnel div { padding: 5px 12px; }
  .clip { grid-template-columns: repeat(2, 1fr); gap: 4px; }
  dl { grid-template-columns: 1fr; gap: 0; } dd { margin-bottom: 6px; } th, td { padding: 5px 6px;
  font-size: 0.84rem; }
}
"""

# The report's own test reads data-images; the page shows the same without scripts.
SELF_CHECK = """
addEventListener("load", () => {
  const all = [...document.images];
  document.documentElement.dataset.images = all.filter(image => image.naturalWidth > 0).length + "/" + all.length;
});
"""


def render(figures: dict[str, Any], frames: np.ndarray, groups: np.ndarray, answered: list[Answered]) -> str:
    """The page.

    Args:
        figures: what report.json holds.
        frames: uint8 [B, F, 3, H, W], the clips that the model saw.
        groups: int64 [B, F, h, w], the row of its clip that each token was merged into.
        answered: the held-out questions, where a model was trained.
    """
    source = figures["source"]
    body = [
        _head(figures),
        _funnel(figures),
        _clips(figures, frames, groups),
        _histogram(figures),
        _comparison(figures),
        _waterfall(figures),
        training_report.render(figures["training"], answered) if figures["training"] else "",
        _facts(figures),
    ]
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        '<meta name="color-scheme" content="light dark">\n<link rel="icon" href="data:,">\n'
        f"<title>lrc-kernels: {escape(source['name'])}</title>\n"
        f"<style>{STYLE}{training_report.STYLE}</style>\n</head>\n<body>\n"
        + "\n".join(body)
        + f"\n<script>{SELF_CHECK}</script>\n</body>\n</html>\n"
    )


def _head(figures: dict[str, Any]) -> str:
    source, frames = figures["source"], figures["frames"]
    if source["kind"] == "synthetic":
        what = f"A synthetic video of {source['duration_s']:g} s (discs and boxes drawn by the demo)"
    else:
        what = f"{escape(source['name'])} ({source['width']}×{source['height']}, {source['duration_s']:.1f} s)"
    per_frame = frames["tokens"]["merged"] // frames["count"]
    return (
        f"<header><h1>{frames['tokens']['patches']:,} patches in, {frames['tokens']['merged']:,} tokens out</h1>"
        f"<p>{what}: {frames['count']} frames in {frames['clips']} clips of {frames['clip_frames']}, encoded by a "
        f"small InternViT and compressed by lrc-kernels to {per_frame} tokens per frame. Tokens of one clip that look "
        "alike to the encoder are merged into one. The encoder has random weights, so the groups follow colour and "
        "texture, not meaning.</p></header>"
    )


def _funnel(figures: dict[str, Any]) -> str:
    frames = figures["frames"]
    tokens, per_clip = frames["tokens"], frames["tokens"]["merged"] // frames["clips"]
    grid = figures["encoder"]["grid"]
    steps = (
        (tokens["patches"], f"patches of the ViT: {frames['count']} frames × {grid[0]}×{grid[1]}"),
        (tokens["pixel_shuffle"], "tokens after pixel shuffle: 2×2 patches each"),
        (tokens["merged"], f"tokens after ToMe: {frames['clips']} clips × {per_clip}, {frames['ratio']:g}× fewer"),
    )
    return '<section class="funnel">' + "".join(f"<div><b>{n:,}</b>{text}</div>" for n, text in steps) + "</section>"


def _clips(figures: dict[str, Any], frames: np.ndarray, groups: np.ndarray) -> str:
    source, times = figures["source"], figures["frames"]["timestamps"]
    num_clips = len(groups)
    num_groups = figures["frames"]["tokens"]["merged"] // num_clips
    shown = _spread(range(num_clips), SHOWN_CLIPS)
    others = _spread([clip for clip in range(num_clips) if clip not in shown], STRIPS)
    cell = drawing.cell_size(source["width"], source["height"], groups.shape[2:], SIDE)
    small = drawing.cell_size(source["width"], source["height"], groups.shape[2:], STRIP_SIDE)
    parts = []
    for clip in shown:
        style = drawing.clip_style(groups[clip], num_groups)
        means = drawing.mean_colours(frames[clip], groups[clip], num_groups)
        size = (groups.shape[2] * cell[0], groups.shape[3] * cell[1])
        pictures = []
        for index, (frame, ids) in enumerate(zip(frames[clip], groups[clip], strict=True)):
            t = times[clip * len(groups[clip]) + index]
            label = f"frame at {t:.2f} s"
            drawn = drawing.outlines(ids, style, cell)
            pictures.append(
                f'<figure class="frame"><img width="{size[1]}" height="{size[0]}" alt="{label}" '
                f'src="{jpeg_uri(drawing.photograph(frame, size))}">'
                f'<img class="over outline" alt="merge groups" src="{png_uri(drawn)}">'
                f'<img class="over means" alt="group means" src="{png_uri(means[index])}">'
                f"<time>{t:.2f} s</time></figure>"
            )
        parts.append(
            f"<article><h3>Clip {clip + 1} of {num_clips}</h3>"
            f'<div class="clip">{"".join(pictures)}</div>{_legend(style, groups[clip])}</article>'
        )
    strips = "".join(_strip(clip, frames[clip], groups[clip], num_groups, small, times) for clip in others)
    left = num_clips - len(shown)
    title = "The other clips" if len(others) == left else f"{len(others)} of the other {left} clips"
    more = f"<h3>{title}</h3>{strips}" if others else ""
    credit = f'<p class="note">Pictures: {escape(source["credit"])}.</p>' if source["credit"] else ""
    return (
        '<section><input class="view" type="radio" name="view" id="view-groups" checked>'
        '<input class="view" type="radio" name="view" id="view-frames">'
        '<input class="view" type="radio" name="view" id="view-means">'
        '<div class="tabs"><label for="view-groups">Merge groups</label><label for="view-frames">Frames only</label>'
        '<label for="view-means">Mean colour of each group</label></div>'
        '<p class="soft">Every group of tokens has one outline colour in all frames of its clip; the eight largest are '
        f"lettered and tinted, tokens that stayed alone are thin grey. A token covers {448 // groups.shape[3]}×"
        f"{448 // groups.shape[2]} pixels of the 448×448 frame that the model sees, drawn here in the video's own "
        f'shape.</p><div class="clips">{"".join(parts)}{more}</div>{credit}</section>'
    )


def _spread(items: Any, count: int) -> list[int]:
    items = list(items)
    if len(items) <= count:
        return items
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def _legend(style: drawing.ClipStyle, groups: np.ndarray) -> str:
    rows = []
    for letter, group in zip(drawing.LETTERS, style.named, strict=False):
        inside = int((groups == group).any(axis=(1, 2)).sum())
        colour = "#{:02x}{:02x}{:02x}".format(*style.colour[group])
        share = style.sizes[group] / groups.size
        rows.append(
            f'<li><i style="background:{colour}"></i><b>{letter}</b> {style.sizes[group]} tokens '
            f"({share:.0%}) in {inside} of {len(groups)} frames</li>"
        )
    alone, rest = int((style.sizes == 1).sum()), len(style.sizes) - len(style.named)
    rows.append(f"<li>{rest - alone} smaller groups</li><li>{alone} tokens alone</li>")
    return f'<ul class="legend">{"".join(rows)}</ul>'


def _strip(clip: int, frames: np.ndarray, groups: np.ndarray, num_groups: int, cell: tuple[int, int],
           times: list[float]) -> str:  # fmt: skip
    picture = drawing.strip(frames, groups, drawing.clip_style(groups, num_groups), cell)
    first, last = times[clip * len(groups)], times[(clip + 1) * len(groups) - 1]
    caption = f"Clip {clip + 1}: {first:.2f} to {last:.2f} s"
    return (
        f'<figure class="strip"><img width="{picture.width}" height="{picture.height}" alt="{caption}" '
        f'src="{jpeg_uri(picture, 78)}"><figcaption>{caption}</figcaption></figure>'
    )


def _histogram(figures: dict[str, Any]) -> str:
    facts = figures["groups"]
    most = max(entry["groups"] for entry in facts["histogram"])
    whole = sum(entry["tokens"] for entry in facts["histogram"])
    rows = []
    for entry in facts["histogram"]:
        label = str(entry["from"]) if entry["from"] == entry["to"] else f"{entry['from']}–{entry['to']}"
        width = 55 * entry["groups"] / most
        rows.append(
            f'<span>{label}</span><span class="track"><i style="width:{width:.1f}%"></i>{entry["groups"]} groups '
            f'<span class="soft">{entry["tokens"] / whole:.1%} of tokens</span></span>'
        )
    return (
        f"<section><h2>Group sizes</h2><p>{facts['count']:,} groups in all clips; median {facts['median']:g}, "
        f'largest {facts["largest"]} tokens.</p><div class="bars">{"".join(rows)}</div></section>'
    )


def _comparison(figures: dict[str, Any]) -> str:
    comparison, machine = figures["comparison"], figures["machine"]
    cuda = machine["device_type"] == "cuda"
    rows = []
    for name, entry in comparison["methods"].items():
        ratios = ("1×", "1×") if name == "ours" else (f"{entry['time_ratio']:.2f}×", f"{entry['memory_ratio']:.1f}×")
        rows.append(
            f'<tr class="{name}"><td>{NAMES[name]}</td><td>{_seconds(entry["seconds"])}</td><td>{ratios[0]}</td>'
            f"<td>{entry['memory_bytes'] / 2**20:.1f} MiB</td><td>{ratios[1]}</td>"
            f"<td>{entry['checks']['scatter']:.2%}</td></tr>"
        )
    how = "on the GPU" if cuda else "one CPU thread each"
    memory = (
        "torch.cuda.max_memory_allocated"
        if cuda
        else "growth of the resident set in a fresh process, on random features of this shape"
    )
    equal = comparison["methods"]["ours"]["checks"]["rows_equal_to_torch_best"]
    return (
        "<section><h2>Time and memory, measured in this run</h2>"
        '<div class="scroll"><table><tr><th></th><th>time</th><th>vs ours</th><th>extra memory</th><th>vs ours</th>'
        f"<th>scatter in groups</th></tr>{''.join(rows)}</table></div>"
        f'<p class="note">{comparison["clips"]} clips of these features ({figures["run"]["dtype"]}, '
        f"{comparison['input_bytes'] / 2**20:.1f} MiB), {how}, interleaved, minimum of {comparison['repeats']}. Each "
        "row starts from the ViT output: our kernels read it in place, the other two include the copies of their pixel "
        f"shuffle. Memory: {memory}, output included. Checked before timing: every token is counted once, the mean of "
        "each clip is kept, the scatter inside the groups (share of the features' energy lost by merging, lower is "
        "better) agrees, and our merge equals its own plan in fp64; "
        f"{equal:.1%} of our rows equal torch_best's, the others follow near ties.{_miscount(figures)}</p></section>"
    )


def _miscount(figures: dict[str, Any]) -> str:
    if figures["run"]["dtype"] == "fp32":
        return ""
    lost = figures["comparison"]["methods"]["published"]["checks"]["uncounted_tokens"]
    return (
        " published was checked in fp32; in bf16, which cannot count past 256 one by one, its group sizes miss the "
        f"clip's token count by up to {lost:.0f}."
    )


def _seconds(seconds: float) -> str:
    return f"{seconds:.2f} s" if seconds >= 1 else f"{1e3 * seconds:.{1 if seconds < 0.1 else 0}f} ms"


def _waterfall(figures: dict[str, Any]) -> str:
    stages, machine = figures["stages"], figures["machine"]
    rows, before = [], 0.0
    for stage in stages["list"]:
        name, share = stage["name"], stage["share"]
        kind = "" if name == "compress" else ' class="rest"'
        rows.append(
            f'<span>{name}</span><span class="track"><i class="gap" style="width:{60 * before:.2f}%"></i>'
            f'<i{kind} style="width:{60 * share:.2f}%"></i>{_seconds(stage["seconds"])} '
            f'<span class="soft">{share:.1%}</span></span>'
        )
        before += share
    return (
        "<section><h2>Where the time goes</h2>"
        f'<div class="bars">{"".join(rows)}</div><p class="note">{figures["frames"]["count"]} frames in '
        f"{_seconds(stages['seconds'])} with {machine['threads']} CPU threads"
        f"{' and the GPU' if machine['device_type'] == 'cuda' else ''}. compress is "
        f"{stages['compress_share']:.1%} of it (its first call, {_seconds(stages['compress_first_call_seconds'])}, "
        "loads code and is left out), so a faster kernel saves no more than that here. What merging buys is a language "
        f"model that reads {figures['frames']['ratio']:g}× fewer tokens.</p></section>"
    )


def _facts(figures: dict[str, Any]) -> str:
    source, machine, encoder, run = (figures[key] for key in ("source", "machine", "encoder", "run"))
    ran = ", ".join(
        f"<code>{escape(entry['op'])}</code> on {escape(entry['backend'])}" for entry in figures["backends"]
    )
    black = figures["frames"]["damaged"]
    damaged = f"; {black} frames were damaged and are black" if black else ""
    rows = {
        "Backends": ran,
        "Device": escape(machine["device"]),
        "CPU": f"{escape(machine['cpu'])}, {machine['cores']} cores, CPU kernels: {escape(machine['cpu_kernels'])}",
        "Versions": f"lrc_kernels {machine['lrc_kernels']}, torch {machine['torch']}, Python {machine['python']}, "
        f"{escape(machine['system'])}",
        "Encoder": f"InternViT, small: {encoder['parameters'] / 1e6:.1f} M parameters, random weights from seed "
        f"{encoder['seed']}, computed in {encoder['dtype']}",
        "Sampling": escape(figures["frames"]["rule"]) + damaged,
        "Video": escape(source["credit"] or source["name"]),
        "Command": f"<code>{escape(run['command'])}</code>",
        "Whole demo": f"{_seconds(run['seconds_before_report'])} before this page was drawn",
    }
    return (
        "<section><h2>This run</h2><dl>"
        + "".join(f"<dt>{k}</dt><dd>{v}</dd>" for k, v in rows.items())
        + "</dl></section>"
    )
