# SPDX-License-Identifier: Apache-2.0
"""The command `lrc-model prefill|chat|convert|plan`: arguments in, text on standard output, one line of error out."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.ablation import ABLATIONS, memory_curve, run_form
from lrc_model.chat import MAX_NEW_TOKENS, chat
from lrc_model.checkpoint import convert_checkpoint, read_config, read_dtype
from lrc_model.config import PRESETS, LRCConfig, preset
from lrc_model.generate import PREFILL_CHUNK
from lrc_model.memory import total_memory
from lrc_model.model import LRCModel
from lrc_model.plan import GIB, GPUS, USABLE, check_fits, most_frames, prefill_cost
from lrc_model.waterfall import Waterfall, draw, draw_curve

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _add_model(parser: argparse.ArgumentParser, default_preset: str) -> None:
    parser.add_argument("--preset", choices=sorted(PRESETS), help=f"random weights of this size ({default_preset})")
    parser.add_argument(
        "--checkpoint", type=Path, metavar="DIR", help="weights: ours, the public shards, or transformers'"
    )
    parser.add_argument("--device", help="cuda or cpu (cuda where there is one)")
    parser.add_argument("--dtype", choices=sorted(DTYPES), help="bfloat16 on cuda, else float32")
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="fields of the configuration, values in JSON")
    parser.set_defaults(default_preset=default_preset)


def _overrides(pairs: Sequence[str]) -> dict[str, Any]:
    values: dict[str, Any] = {}
    for pair in pairs:
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ValueError(f"an override must read key=value, got {pair!r}")
        try:
            values[key] = json.loads(value)
        except json.JSONDecodeError:
            values[key] = value
    return values


def _config(args: argparse.Namespace) -> LRCConfig:
    if args.checkpoint is not None and args.preset is not None:
        raise ValueError("give --preset (random weights) or --checkpoint DIR, got both")
    config = read_config(args.checkpoint) if args.checkpoint else preset(args.preset or args.default_preset)
    values = _overrides(args.overrides)
    if getattr(args, "dropout", None) == "paper":
        values["dropout"] = DropoutSchedule.paper()
    return config.override(values) if values else config


def _device(args: argparse.Namespace) -> str:
    if args.device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    if torch.device(args.device).type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device} needs a GPU that torch can use, got none")
    return str(args.device)


def _dtype(args: argparse.Namespace) -> torch.dtype | None:
    """The dtype asked for; of random weights bf16 on a GPU and fp32 else; None = that of the checkpoint."""
    if args.dtype is not None:
        return DTYPES[args.dtype]
    if args.checkpoint is not None:
        return None
    return torch.bfloat16 if _device(args).startswith("cuda") else torch.float32


def _model(args: argparse.Namespace, config: LRCConfig) -> LRCModel:
    device, dtype = _device(args), _dtype(args)
    if args.checkpoint is not None:
        return LRCModel.from_pretrained(args.checkpoint, device=device, dtype=dtype, config=config)
    return LRCModel.from_config(config, device=device, dtype=dtype or torch.float32)


def _lengths(text: str) -> tuple[int, ...]:
    try:
        return tuple(int(length) for length in text.split(","))
    except ValueError:
        raise argparse.ArgumentTypeError(f"must be whole numbers with commas between them, got {text!r}") from None


def _prefill(args: argparse.Namespace) -> int:
    config, most = _config(args), max(args.frames)
    if args.out is not None:
        args.out.mkdir(parents=True, exist_ok=True)
    total, dtype = total_memory(_device(args)), _dtype(args) or read_dtype(args.checkpoint, config)
    options: dict[str, Any] = {"frame_text": args.frame_text, "chunk": args.chunk, "chunk_clips": args.chunk_clips}
    cost = check_fits(config, most, total, bytes_per_value=dtype.itemsize, **options)
    print(f"planned: {cost.memory / GIB:.1f} GiB of {total * USABLE / GIB:.1f} GiB usable", flush=True)
    model = _model(args, config)
    options["video"] = args.video
    falls: dict[str, Waterfall] = {}
    for frames in args.frames:
        for name in ("ours", *ABLATIONS) if args.ablate else ("ours",):
            fall = run_form(model, name, frames, **options)
            print(f"{name}: {fall}\n", flush=True)
            falls[name if len(args.frames) == 1 else f"{name}, {frames} frames"] = fall
            _write(args.out, "waterfall", {key: value.to_dict() for key, value in falls.items()})
    curve: dict[str, list[tuple[int, int]]] = {}
    for name, points in memory_curve(model, most, **options) if args.curve else ():
        print(f"{name:<18}", *(f"{frames}: {peak / GIB:.2f} GiB" for frames, peak in points), sep="  ", flush=True)
        curve[name] = points
        _write(args.out, "memory", curve)
    whole = {name: fall for name, fall in falls.items() if not fall.error}
    if args.out is not None:
        _draw(args.out, whole, curve)
    if failed := [name for name, fall in falls.items() if fall.failed]:
        print(f"lrc-model: failed: {'; '.join(failed)}", file=sys.stderr)
        return 1
    if not whole:
        raise ValueError(f"--frames {most} must fit the memory: see `lrc-model plan`")
    return 0


def _write(out: Path | None, name: str, figures: dict[str, Any]) -> None:
    """After every figure, so that a run that is cut off leaves those before."""
    if out is not None:
        (out / f"{name}.json").write_text(json.dumps(figures, indent=1), encoding="utf-8")


def _draw(out: Path, whole: dict[str, Waterfall], curve: dict[str, list[tuple[int, int]]]) -> None:
    """Pictures, where matplotlib is installed."""
    try:
        if whole:
            draw(whole, out / "waterfall.png")
        if curve:
            draw_curve(curve, out / "memory.png")
    except ImportError as error:
        print(f"lrc-model: no picture was drawn: {error}", file=sys.stderr)
    print(f"wrote {out}")


def _chat(args: argparse.Namespace) -> int:
    model = _model(args, _config(args))

    def show(text: str) -> None:
        print(text, end="", flush=True)

    chat(model, args.video, args.question, num_frames=args.frames, max_new_tokens=args.max_new_tokens, on_text=show)
    print()
    if args.checkpoint is None:
        print("these weights are random, so the answer is noise: --checkpoint DIR reads trained ones", file=sys.stderr)
    return 0


def _convert(args: argparse.Namespace) -> int:
    dtype = DTYPES[args.dtype] if args.dtype else None
    if args.source in PRESETS and args.layout != "own":
        raise ValueError(
            f"--layout {args.layout} needs a checkpoint: write {args.source} first, then convert the folder"
        )
    if args.source in PRESETS:
        model = LRCModel.from_config(preset(args.source), dtype=dtype or torch.float32, seed=args.seed)
        model.save_pretrained(args.target)
        print(f"wrote random weights of {args.source} to {args.target}")
        return 0
    print(convert_checkpoint(args.source, args.target, layout=args.layout, dtype=dtype))
    return 0


def _plan(args: argparse.Namespace) -> int:
    config = _config(args)
    memory = args.memory_gib * GIB if args.memory_gib is not None else GPUS[args.gpu][1]
    cost = prefill_cost(config, args.frames, frame_text=args.frame_text)
    print(f"{cost.num_frames} frames -> {cost.num_tokens} tokens")
    for name in ("weights", "cache", "visual", "work", "memory"):
        print(f"  {name:<8} {getattr(cost, name) / GIB:8.2f} GiB")
    print(f"  vision   {cost.flops_vision / 1e15:8.2f} PFLOP\n  text     {cost.flops_text / 1e15:8.2f} PFLOP")
    most = most_frames(config, memory * USABLE, frame_text=args.frame_text)
    print(f"about {cost.seconds(args.gpu):.1f} s on {args.gpu} (arithmetic at 45 % of its peak); {most} frames fit it")
    check_fits(config, args.frames, memory, frame_text=args.frame_text)
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="lrc-model", description="InternVideo2.5 on lrc_kernels")
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str) -> argparse.ArgumentParser:
        added = commands.add_parser(name, help=text, description=text)
        added.set_defaults(run=run)
        return added

    one = command("prefill", _prefill, "read a video of any length, and show where time and memory go")
    one.add_argument("--frames", type=_lengths, default=(10000,), help="or several lengths: 1000,3000 (10000)")
    one.add_argument("--video", type=Path, help="sample the frames from this file (default: noise)")
    one.add_argument("--frame-text", action="store_true", help="with nine words per frame, as in the public template")
    one.add_argument("--dropout", choices=["config", "paper"], default="config", help="token dropout inside the LLM")
    one.add_argument("--chunk", type=int, default=PREFILL_CHUNK, help="rows of the prompt in flight")
    one.add_argument("--chunk-clips", type=int, default=4, help="clips in flight in the ViT")
    one.add_argument("--ablate", action="store_true", help="also replace each of our parts by its public form")
    one.add_argument("--curve", action="store_true", help="also the memory of every form over 64, 128, ... frames")
    one.add_argument("--out", type=Path, help="folder for the figures, as JSON and PNG")
    _add_model(one, "internvideo2_5_8b")

    two = command("chat", _chat, "ask a question about a video")
    two.add_argument("video", type=Path)
    two.add_argument("question")
    two.add_argument("--frames", type=int, help="frames to sample (default: as the released model does)")
    two.add_argument("--max-new-tokens", type=int, default=MAX_NEW_TOKENS)
    _add_model(two, "tiny")

    three = command("convert", _convert, "rewrite a checkpoint, or write random weights of a preset")
    three.add_argument("source", help="folder of a checkpoint, or the name of a preset")
    three.add_argument("target", type=Path)
    three.add_argument("--layout", choices=["own", "transformers"], default="own")
    three.add_argument("--dtype", choices=sorted(DTYPES))
    three.add_argument("--seed", type=int, default=0)

    four = command("plan", _plan, "memory and time of a prefill on a GPU, by arithmetic")
    four.add_argument("--frames", type=int, default=10000)
    four.add_argument("--frame-text", action="store_true")
    four.add_argument("--dropout", choices=["config", "paper"], default="config")
    four.add_argument("--gpu", choices=sorted(GPUS), default="h100-80")
    four.add_argument("--memory-gib", type=float, help="instead of that GPU's memory")
    _add_model(four, "internvideo2_5_8b")
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; errors of the user become one line and exit code 2."""
    args = _parser().parse_args(argv)
    try:
        return int(args.run(args))
    except (ValueError, TypeError, OSError, ImportError, RuntimeError, MemoryError) as error:
        first_line = str(error).partition("\n")[0]
        print(f"lrc-model: {first_line or type(error).__name__}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
