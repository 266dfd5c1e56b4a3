# SPDX-License-Identifier: Apache-2.0
"""One prefill, from pixels to the next word, over the frame count: with the kernels, with the references under them,
and in stock transformers without token merging; time, and the peak of the whole process or GPU."""

from __future__ import annotations

import pytest
import torch

from lrc_kernels.backend import use_backend
from lrc_kernels.packing import Sample, pack_samples
from lrc_model.chat import synthetic_frames
from lrc_model.checkpoint import convert_checkpoint
from lrc_model.config import internvideo2_5_8b, tiny
from lrc_model.memory import forget_peak, peak_memory
from lrc_model.model import LRCModel

transformers = pytest.importorskip(
    "transformers", reason="the model needs transformers (pip install lrc-kernels[model])"
)


@pytest.fixture(scope="module")
def models(device, tmp_path_factory):
    """Ours, and stock InternVL with the same weights where its 256 tokens a frame are of a testable size."""
    on_gpu = device.type == "cuda"
    config = internvideo2_5_8b() if on_gpu else tiny()
    ours = LRCModel.from_config(config, device=device, dtype=torch.bfloat16 if on_gpu else torch.float32)
    if on_gpu:
        return ours, None
    folder = tmp_path_factory.mktemp("stock")
    ours.save_pretrained(folder / "ours")
    convert_checkpoint(folder / "ours", folder / "hf", layout="transformers")
    return ours, transformers.InternVLForConditionalGeneration.from_pretrained(folder / "hf").eval()


def prompt(model, num_frames, seed):
    config, device = model.config, next(model.parameters()).device
    count = num_frames * config.tokens_per_frame
    visual = torch.zeros(count + 8, dtype=torch.bool)
    visual[4 : 4 + count] = True
    ids = torch.full((count + 8,), 2)
    frames = synthetic_frames(num_frames, config.image_size, "cpu", seed)
    sample = Sample(input_ids=ids, visual=visual, frames=frames)
    return pack_samples([sample], clip_frames=config.clip_frames).to(device)


@pytest.mark.parametrize("num_frames", [16, 64, 256])
def test_prefill(bench, device, models, num_frames):
    """`published` is stock transformers, whose LLM reads every token that the pixel shuffle leaves."""
    model, stock = models
    if device.type == "cuda":
        num_frames *= 8
    text, vision = model.config.text, model.config.vision

    @torch.no_grad()
    def ours(frames):
        batch = prompts[frames.data_ptr()]
        return model.language_model.logits(model(batch).hidden[-1:])

    @torch.no_grad()
    def references(frames):
        with use_backend("reference"):
            return ours(frames)

    @torch.no_grad()
    def published(frames):
        count = frames.shape[0] * model.config.frame_tokens
        ids = torch.full((1, count + 8), 2, device=frames.device)
        ids[:, 4 : 4 + count] = stock.config.image_token_id
        pixels = frames.float() / 255
        return stock(input_ids=ids, pixel_values=pixels, logits_to_keep=1).logits[0]

    prompts = {}

    def make(i):
        batch = prompt(model, num_frames, i)
        prompts[batch.frames.data_ptr()] = batch
        return (batch.frames,)

    wanted = references(*make(0))

    # Without merging the LLM reads other tokens, so that stock transformers has an answer of its own.
    answers = [wanted] if stock is None else [wanted, published(*make(0))]

    def check(logits):
        bound = 2e-2 * wanted.abs().max()
        assert min((logits - answer).abs().max() for answer in answers) <= bound

    check(ours(*make(0)))
    assert stock is None or (answers[0] - answers[1]).abs().max() > 2e-2 * wanted.abs().max()
    rows = num_frames * model.config.tokens_per_frame + 8
    patches = (vision.image_size // vision.patch_size) ** 2
    flops = 2 * rows * sum(p.numel() for p in model.language_model.parameters())
    flops += 2 * num_frames * patches * sum(p.numel() for p in model.vision_model.parameters())
    peers = {"references": references} | ({} if stock is None else {"published": published})
    peaks = {}
    for name, form in {"ours": ours, **peers}.items():
        inputs = make(0)
        forget_peak(device)
        form(*inputs)
        peaks[f"peak_mib_{name}"] = round(peak_memory(device) / 2**20, 1)
    bench(
        ours,
        peers=peers,
        check=check,
        make_inputs=make,
        bytes_moved=sum(p.numel() * p.element_size() for p in model.parameters()),
        flops=flops,
        frames=num_frames,
        tokens=rows,
        hidden_size=text.hidden_size,
        **peaks,
    )
