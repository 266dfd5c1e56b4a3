# SPDX-License-Identifier: Apache-2.0
"""The commands of `lrc-model`: a prefill whose memory does not grow, its ablations, a chat, conversion, bad input."""

import importlib.util
import json
import subprocess
import sys
import time
import weakref

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lrc_kernels.backend import forced_backend
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model import ablation, waterfall
from lrc_model.ablation import ABLATIONS, run_form
from lrc_model.chat import chat
from lrc_model.cli import main
from lrc_model.config import internvideo2_5_8b, preset, tiny
from lrc_model.model import LRCModel
from lrc_model.plan import GIB, GPUS, check_fits, most_frames, peak_rates, prefill_cost
from lrc_model.templates import Turn
from lrc_model.waterfall import STAGES, run_prefill

av = pytest.importorskip("av", reason="PyAV is not installed (pip install lrc-kernels[video])")
DROPOUT = 'dropout={"layers": [1, 2], "keep_ratios": [0.5, 0.25], "kinds": ["bernoulli", "attention"]}'

PEAK = """
import resource, sys
import torch
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.config import tiny
from lrc_model.model import LRCModel
from lrc_model.waterfall import run_prefill
torch.set_num_threads(1)
dropout = DropoutSchedule((1, 2), (0.5, 0.25), ("random", "attention"))
model = LRCModel.from_config(tiny().override({"dropout": dropout}))
run_prefill(model, 4, chunk=256)
before = int(open("/proc/self/statm").read().split()[1]) * resource.getpagesize()
fall = run_prefill(model, int(sys.argv[1]), chunk=256)
print(fall.peak - before - fall.cache_bytes - fall.visual_bytes)
"""


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    path = tmp_path_factory.mktemp("video") / "moving.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=10)
        stream.width = stream.height = 64
        stream.pix_fmt = "yuv420p"
        for index in range(30):
            picture = torch.zeros(64, 64, 3, dtype=torch.uint8)
            picture[index : index + 16, 20:40] = 200
            frame = av.VideoFrame.from_ndarray(picture.numpy(), format="rgb24")
            for packet in stream.encode(frame):
                container.mux(packet)
        for packet in stream.encode():
            container.mux(packet)
    return path


@pytest.mark.skipif(sys.platform != "linux", reason="reads the memory of a process from /proc")
def test_four_times_the_frames_need_no_more_memory():
    """Beyond keys, values and embeddings the peak is at most 1.2 times that of 512, and what PyTorch loads late."""
    peaks = []
    for frames in (512, 2048):
        run = subprocess.run([sys.executable, "-c", PEAK, str(frames)], capture_output=True, text=True, timeout=240)
        assert run.returncode == 0, run.stderr
        peaks.append(int(run.stdout))
    assert 0 < peaks[1] <= 1.2 * peaks[0] + 2**21, peaks


def test_prefill_shows_every_form(tmp_path, capsys, video):
    options = ["--preset", "tiny", "--device", "cpu", "--frames", "42", "--video", str(video), "--frame-text"]
    assert main(["prefill", *options, "--ablate", "--curve", "--out", str(tmp_path), DROPOUT]) == 0
    printed, said = capsys.readouterr()
    if importlib.util.find_spec("matplotlib") is None:
        assert "no picture was drawn: the picture needs matplotlib" in said
    else:
        assert all((tmp_path / f"{name}.png").stat().st_size > 5000 for name in ("waterfall", "memory"))
    assert "44 frames -> 442 tokens, 409 of them in the last layer, on cpu" in printed
    falls = json.loads((tmp_path / "waterfall.json").read_text())
    assert set(falls) == {"ours", *ABLATIONS}
    curve = json.loads((tmp_path / "memory.json").read_text())
    assert set(curve) == set(falls) and all(points[0][0] == 44 and points[0][1] > 1e8 for points in curve.values())
    for name, fall in falls.items():
        assert set(fall["seconds"]) == set(STAGES) and fall["seconds"]["vision"] > 0, name
    assert falls["no merging"]["num_tokens"] == 2 + 44 * 13 and falls["no token dropout"]["num_rows"] == 442
    assert falls["one shot"]["next_word"] == falls["ours"]["next_word"] == falls["eager PyTorch"]["next_word"]


def test_several_lengths_in_one_run(tmp_path, capsys):
    options = ["--preset", "tiny", "--device", "cpu", "--out", str(tmp_path)]
    assert main(["prefill", *options, "--frames", "8,24"]) == 0
    printed = capsys.readouterr().out
    assert printed.index("8 frames -> 10 tokens") < printed.index("24 frames -> 26 tokens")
    falls = json.loads((tmp_path / "waterfall.json").read_text())
    assert {name: fall["num_frames"] for name, fall in falls.items()} == {"ours, 8 frames": 8, "ours, 24 frames": 24}
    with pytest.raises(SystemExit):
        main(["prefill", *options, "--frames", "8,,24"])
    assert "--frames: must be whole numbers with commas between them, got '8,,24'" in capsys.readouterr().err


@pytest.mark.parametrize("error", [RuntimeError("no kernel"), torch.OutOfMemoryError("CUDA out of memory")])
def test_a_form_that_breaks_leaves_all_other_figures(error, tmp_path, capsys, monkeypatch):
    """The stages before it and the forms beside it; a fault is exit code 1 with its traceback, too little memory 0."""
    whole = waterfall.prefill

    def prefill(*args, **options):
        if forced_backend() == "reference":
            raise error
        return whole(*args, **options)

    monkeypatch.setattr(waterfall, "prefill", prefill)
    is_fault = not isinstance(error, torch.OutOfMemoryError)
    arguments = ["--preset", "tiny", "--device", "cpu", "--frames", "8,16", "--ablate", "--out", str(tmp_path)]
    assert main(["prefill", *arguments]) == is_fault
    said = capsys.readouterr().err
    assert ("Traceback" in said and "failed: eager PyTorch, 8 frames; eager PyTorch, 16" in said) == is_fault
    falls = json.loads((tmp_path / "waterfall.json").read_text())
    assert set(falls) == {f"{name}, {frames} frames" for name in ("ours", *ABLATIONS) for frames in (8, 16)}
    broken = falls["eager PyTorch, 8 frames"]
    assert str(error) in broken["error"] and broken["failed"] == is_fault
    assert broken["seconds"]["vision"] > 0 and broken["num_rows"] == 0 and broken["flops"]["vision"] > 0
    assert falls["no token dropout, 8 frames"]["error"] == "this configuration drops nothing"
    assert falls["no merging, 16 frames"]["num_rows"] == 66 and not falls["no merging, 16 frames"]["error"]


def test_logits_that_are_not_finite_are_no_figure(capsys):
    model = LRCModel.from_config(tiny())
    with torch.no_grad():
        model.language_model.lm_head.weight[3] = torch.nan
    fall = run_form(model, "ours", 8)
    assert fall.failed and "finite" in fall.error and "Traceback" in capsys.readouterr().err
    assert str(fall).startswith("failed: RuntimeError: ") and "vision" in str(fall)


def test_a_waterfall_holds_the_whole_time_and_peak(monkeypatch):
    """What runs between the stages is "other": here half a second and 200 MB before the first of them."""
    model = LRCModel.from_config(tiny())
    embed = model.language_model.embed

    def slow(ids):
        time.sleep(0.5)
        torch.ones(50 << 20)
        return embed(ids)

    monkeypatch.setattr(model.language_model, "embed", slow)
    start = time.perf_counter()
    fall = run_prefill(model, 8)
    assert 0.5 <= fall.seconds["other"] <= sum(fall.seconds.values()) <= time.perf_counter() - start
    if sys.platform == "linux":
        assert fall.peak == fall.peak_bytes["other"] > fall.peak_bytes["vision"] + 1.5e8


def test_the_warm_up_has_the_shapes_of_what_is_measured(monkeypatch):
    seen = []
    monkeypatch.setattr(ablation, "run_prefill", lambda model, frames, **options: seen.append((frames, options)))
    model = LRCModel.from_config(tiny())
    run_form(model, "ours", 400, chunk=64, chunk_clips=3)
    run_form(model, "one shot", 400)
    run_form(model, "ours", 8)
    run_form(model, "ours", 400, warm=False)
    assert [frames for frames, _ in seen] == [64, 400, 100, 400, 8, 8, 400]
    assert all(options["chunk_clips"] == clips for (_, options), clips in zip(seen[:3], (3, 3, 2**31), strict=False))


@pytest.mark.parametrize(
    ("name", "gpu"),
    [
        ("NVIDIA H100 80GB HBM3", "h100-80"),
        ("NVIDIA H200", "h200-141"),
        ("NVIDIA A100-SXM4-40GB", "a100-40"),
        ("NVIDIA A100-SXM4-80GB", "a100-80"),
        ("NVIDIA GeForce RTX 4090", "rtx4090-24"),
        ("NVIDIA H100 PCIe", None),
        ("NVIDIA H100 NVL", None),
        ("AMD Instinct MI300X", None),
        ("", None),
    ],
)
def test_the_peak_is_that_of_the_very_gpu(name, gpu):
    assert peak_rates(name) == (None if gpu is None else (GPUS[gpu][0], GPUS[gpu][2]))


def test_a_rate_is_work_over_time():
    fall = waterfall.Waterfall(gpu="NVIDIA H100 80GB HBM3")
    fall.seconds.update(vision=2.0, merge=0.5, decode=1.0)
    fall.flops, fall.traffic = {"vision": 989e12}, {"merge": 3.35e12 / 4}
    assert fall.rate("vision") == "494 TFLOP/s = 50% of peak" and fall.rate("merge") == "1.68 TB/s = 50% of peak"
    assert fall.rate("decode") == fall.rate("language") == ""
    model = LRCModel.from_config(tiny())
    fall = run_prefill(model, 16)
    width, kept = 32 * 4, 16
    assert fall.traffic == {"merge": (2 * 16 * 4 + kept) * width * 4}
    assert fall.flops["connector"] == 2 * kept * (width * 64 + 64 * 64)


class LiveBytes(TorchDispatchMode):
    """The most bytes of tensors that were alive at once, whatever the allocator makes of them."""

    def __init__(self, held):
        super().__init__()
        self.now = self.peak = held

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        arguments = {id(x.untyped_storage()) for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        for x in tree_leaves(result):
            if isinstance(x, torch.Tensor) and id(storage := x.untyped_storage()) not in arguments:
                self.now += storage.nbytes()
                weakref.finalize(storage, self._free, storage.nbytes())
        self.peak = max(self.peak, self.now)
        return result

    def _free(self, size):
        self.now -= size


@pytest.mark.parametrize("dropout", [None, DropoutSchedule((2,), (0.5,), ("linspace",))])
@pytest.mark.parametrize("frames", [64, 512])
def test_no_more_is_alive_than_planned(dropout, frames):
    """No second copy of rows, keys or values, no logits of all rows, no table of rows x rows: within 10 %."""
    config = tiny().override(
        {"hidden_size": 256, "text.intermediate_size": 1024, "tokens_per_frame": 3, "dropout": dropout}
    )
    model = LRCModel.from_config(config)
    options = {"chunk": 256, "chunk_clips": 2}
    cost = prefill_cost(config, frames, bytes_per_value=4, **options)
    with LiveBytes(cost.weights) as live:
        run_prefill(model, frames, **options)
    assert 0.9 * cost.memory < live.peak < 1.1 * cost.memory, (live.peak, cost)


def test_a_prefill_reads_what_forward_reads():
    """Frame by frame through the chunks, or all at once through `LRCModel.forward`: the same next word."""
    dropout = DropoutSchedule((1, 3), (0.5, 0.25), ("linspace", "attention"))
    model = LRCModel.from_config(tiny().override({"dropout": dropout}), seed=3)
    words = {run_prefill(model, 24, chunk=chunk, chunk_clips=clips).next_word for chunk, clips in ((7, 1), (99, 9))}
    assert len(words) == 1


def test_convert_and_chat(tmp_path, capsys, video):
    assert main(["convert", "tiny", str(tmp_path / "tiny")]) == 0
    options = ["--checkpoint", str(tmp_path / "tiny"), "--device", "cpu", "--max-new-tokens", "8", "--frames", "6"]
    assert main(["chat", str(video), "What moves?", *options]) == 0
    first = capsys.readouterr()
    assert main(["chat", str(video), "What moves?", *options]) == 0
    assert capsys.readouterr().out.splitlines()[-1:] == first.out.splitlines()[-1:] and "random" not in first.err
    assert main(["chat", str(video), "What moves?", "--device", "cpu", "--max-new-tokens", "1"]) == 0
    assert "these weights are random" in capsys.readouterr().err


def test_a_saved_model_is_the_model(tmp_path, video):
    model = LRCModel.from_config(preset("tiny"), seed=5)
    model.save_pretrained(tmp_path)
    again = LRCModel.from_pretrained(tmp_path)
    assert again.state_dict().keys() == model.state_dict().keys()
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, again.state_dict()[name]), name
    pieces = []
    history = [Turn("user", "Hello"), Turn("assistant", "Hi")]
    answer = chat(again, video, "And now?", history=history, num_frames=5, max_new_tokens=5, on_text=pieces.append)
    assert "".join(pieces) == answer == chat(model, video, "And now?", history=history, num_frames=5, max_new_tokens=5)
    assert LRCModel.from_pretrained(tmp_path, dtype=torch.bfloat16).connector.linear_1.weight.dtype == torch.bfloat16


def test_plan_counts_what_the_model_holds():
    for dropout in (None, DropoutSchedule((1, 2), (0.5, 0.25), ("linspace", "attention"))):
        config = tiny().override({"dropout": dropout})
        model = LRCModel.from_config(config)
        cost = prefill_cost(config, 64, bytes_per_value=4)
        assert cost.weights == sum(p.numel() * p.element_size() for p in model.parameters())
        fall = run_prefill(model, 64)
        words = 2 * config.text.num_layers * 2 * config.text.num_kv_heads * config.text.head_dim * 4
        assert fall.cache_bytes == cost.cache + words and fall.num_tokens == cost.num_tokens + 2
    config = internvideo2_5_8b()
    assert prefill_cost(config, 10000).cache / GIB == pytest.approx(19.53, abs=0.01)
    most = most_frames(config, 70 * GIB)
    assert prefill_cost(config, most).memory <= 70 * GIB < prefill_cost(config, most + 4).memory
    with pytest.raises(ValueError, match="100000 frames need 223.5 GiB .* at most 26420 frames do"):
        check_fits(config, 100000, 80e9)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["prefill", "--preset", "tiny", "--frames", "0"], "num_frames must be >= 1, got 0"),
        (["prefill", "--preset", "tiny", "--frames", "8", "--video", "/nope.mp4"], "/nope.mp4"),
        (["prefill", "--preset", "tiny", "clip_fames=8"], "did you mean 'clip_frames'"),
        (["prefill", "--preset", "tiny", "clip_frames"], "an override must read key=value, got 'clip_frames'"),
        (["prefill", "--preset", "tiny", "--checkpoint", "/nope"], "got both"),
        (["chat", "/nope.mp4", "What?", "--checkpoint", "/nope"], "/nope"),
        (["chat", "/nope.mp4", "What?"], "/nope.mp4"),
        (["chat", "/nope.mp4", " "], "question must hold some text"),
        (["convert", "/nope", "/tmp/never"], "/nope"),
        (["prefill", "--device", "cpu", "--frames", "9000000"], "9000000 frames need"),
        (["plan", "--frames", "100000"], "fewer frames, dropout, or a larger GPU"),
        (["convert", "tiny", "/tmp/never", "--layout", "transformers"], "--layout transformers needs a checkpoint"),
        (["prefill", "--preset", "tiny", "--device", "foo"], "foo"),
        (["prefill", "--preset", "tiny", "--out", "/dev/null"], "/dev/null"),
        (["plan", "num_layers=4", "--dropout", "paper"], "layers must be < num_layers = 4"),
    ],
)
def test_errors_are_one_line(arguments, message, capsys):
    assert main(arguments) == 2
    error = capsys.readouterr().err
    assert message in error and error.startswith("lrc-model: ") and error.count("\n") == 1
