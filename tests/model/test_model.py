# SPDX-License-Identifier: Apache-2.0
"""The whole model: a pack against its samples, steps that learn, generation with and without a cache, bad input."""

import dataclasses

import pytest
import torch

from lrc_kernels.backend import record
from lrc_kernels.packing import Sample, pack_samples
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.ablation import run_form
from lrc_model.cache import KVCache
from lrc_model.checkpoint import convert_checkpoint
from lrc_model.config import tiny
from lrc_model.model import LRCModel, draw_weights
from lrc_model.vision import VisionEncoder
from lrc_model.waterfall import run_prefill
from tests.model.samples import make_sample

DROPOUTS = {
    "none": None,
    "paper": DropoutSchedule((1, 2, 3), (0.5, 0.25, 0.125), ("bernoulli", "attention", "attention")),
    "videochat_flash": DropoutSchedule((1, 3), (0.75, 0.25), ("linspace", "attention"), "renumber"),
}


def make_model(dropout="none", dtype=torch.float32, **changed):
    config = tiny().override({"dropout": DROPOUTS[dropout], **changed})
    model = LRCModel.from_config(config, dtype=dtype)
    with torch.no_grad():
        for parameter in model.language_model.parameters():
            if parameter.dim() == 2:
                parameter.mul_(6)
    return model


def pack(*sizes, **options):
    return pack_samples([make_sample(n, 11 + i, **options) for i, n in enumerate(sizes)], clip_frames=4)


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_a_pack_is_its_samples(dropout):
    model = make_model(dropout)
    whole = model(pack(8, 0, 24, 16))
    weights = [4 / 16] * 4
    parts = [
        model(pack_samples([make_sample(n, 11 + i)], clip_frames=4)).loss * w
        for i, (n, w) in enumerate(zip((8, 0, 24, 16), weights, strict=True))
    ]
    assert abs(whole.loss - sum(parts)) <= 1e-6 * abs(whole.loss)
    assert whole.loss_parts["text"] == whole.loss
    fewer = whole.rows.layout.num_tokens < 4 * 14 + 48
    assert fewer == (dropout != "none")


def test_the_kernels_are_in_the_path():
    model = make_model("paper")
    with record() as ran:
        model(pack(8, 16)).loss.backward()
    names = {name for name, _ in ran}
    assert names >= {"tome_compress_fwd", "tome_gather_fwd", "attention_fwd", "attention_bwd"}
    assert names >= {"attention_scores_fwd", "select_tokens_fwd", "drop_tokens_fwd"}
    assert {backend for name, backend in ran if name.startswith(("tome_", "attention_"))} == {"cpu"}


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_recomputation_changes_no_gradient(dropout):
    model = make_model(dropout)
    gradients, decided = [], []
    for recompute in (False, True):
        model.zero_grad()
        with record() as ran:
            model(pack(8, 16), recompute=recompute).loss.backward()
        decided.append([name for name, _ in ran if name in ("attention_scores_fwd", "select_tokens_fwd")])
        gradients.append({name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None})
    # A layer that is computed again does not choose again, as it might choose others.
    assert decided[0] == decided[1] and len(decided[0]) == {"none": 0, "paper": 5, "videochat_flash": 3}[dropout]
    assert gradients[0].keys() == gradients[1].keys()
    assert {name.split(".")[0] for name in gradients[0]} == {"vision_model", "connector", "language_model"}
    for name, gradient in gradients[0].items():
        assert torch.equal(gradient, gradients[1][name]) and gradient.isfinite().all(), name


def test_how_many_clips_are_encoded_at_a_time_changes_nothing():
    model = make_model(dtype=torch.float64)
    gradients = []
    for chunk_clips in (1, 100):
        model.zero_grad()
        model(pack(8, 16), chunk_clips=chunk_clips).loss.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None]))
    assert (gradients[0] - gradients[1]).norm() < 1e-12 * gradients[0].norm()
    with pytest.raises(ValueError, match="chunk_clips must be >= 1, got 0"):
        model(pack(8), chunk_clips=0)


def test_a_few_steps_learn():
    model = make_model("paper")
    batch = pack(8, 16)
    optimizer = torch.optim.Adam(model.parameters(), lr=2e-3)
    losses = []
    for _ in range(8):
        optimizer.zero_grad()
        output = model(batch)
        output.loss.backward()
        optimizer.step()
        losses.append(output.loss.item())
    assert losses[-1] < 0.5 * losses[0]


@pytest.mark.parametrize("dropout", DROPOUTS)
def test_generation_with_a_cache_equals_recomputation(dropout):
    model = make_model(dropout)
    batch = pack(24, 8, 0, labelled=False)
    steps = []
    cached = model.generate(batch, max_new_tokens=6, chunk=5, on_token=steps.append)
    again = model.generate(batch, max_new_tokens=6, use_cache=False)
    for a, b in zip(cached, again, strict=True):
        assert torch.equal(a, b) and a.shape == (6,)
    assert torch.tensor(steps).T.tolist() == [sequence.tolist() for sequence in cached]
    alone = model.generate(pack(24, labelled=False), max_new_tokens=6)
    assert torch.equal(alone[0], cached[0])


def test_a_stop_word_ends_a_sequence():
    model = make_model()
    batch = pack(8, 16, labelled=False)
    first, second = model.generate(batch, max_new_tokens=5)
    stop = int(first[2])
    ended, _ = model.generate(batch, max_new_tokens=5, stop_ids={stop})
    assert ended.tolist() == first[: first.tolist().index(stop)].tolist()
    assert [len(words) for words in model.generate(batch, max_new_tokens=0)] == [0, 0] and second.shape == (5,)


def test_what_a_model_refuses():
    model = make_model()
    batch = pack(8, labelled=False)
    with pytest.raises(ValueError, match="one row of width 64 per placeholder"):
        model(dataclasses.replace(batch, visual_index=batch.visual_index[:-1]))
    with torch.no_grad():
        model.language_model.lm_head.weight[3] = torch.nan
    with pytest.raises(RuntimeError, match="logits of sequence 0 are not finite"):
        model.generate(batch, max_new_tokens=1)
    with pytest.raises(ValueError, match="layers must be < num_layers = 4"):
        tiny().override({"dropout": DropoutSchedule((4,), (0.5,), ("random",))})


def test_without_merging_the_logits_are_those_of_stock_internvl(tmp_path):
    transformers = pytest.importorskip("transformers", reason="transformers is the specification (pip install [model])")
    config = tiny().override({"tokens_per_frame": tiny().frame_tokens, "text.rope_theta": 1e4})
    model = LRCModel.from_config(config, seed=2)
    model.save_pretrained(tmp_path / "ours")
    convert_checkpoint(tmp_path / "ours", tmp_path / "hf", layout="transformers")
    stock = transformers.InternVLForConditionalGeneration.from_pretrained(tmp_path / "hf", dtype=torch.float32).eval()
    random = torch.Generator().manual_seed(0)
    num_visual = 8 * config.tokens_per_frame
    visual = torch.zeros(num_visual + 12, dtype=torch.bool)
    visual[5 : 5 + num_visual] = True
    ids = torch.randint(0, 250, (len(visual),), generator=random)
    frames = torch.randint(0, 256, (8, 3, 56, 56), generator=random).to(torch.uint8)
    batch = pack_samples([Sample(input_ids=ids, visual=visual, frames=frames)], clip_frames=4)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (frames / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        ours = model(batch, return_logits=True).logits
        placed = torch.where(visual, stock.config.image_token_id, ids)
        wanted = stock(input_ids=placed[None], pixel_values=pixels).logits[0]
    assert wanted.abs().max() > 0.1
    assert (ours - wanted).abs().max() <= 2e-5 * max(1.0, wanted.abs().max().item())


def test_what_is_no_batch_or_no_place_in_a_cache():
    model = make_model()
    for call in (model, lambda batch: model.generate(batch, max_new_tokens=1)):
        with pytest.raises(TypeError, match="batch must be a PackedBatch, got int"):
            call(3)
    with pytest.raises(ValueError, match="layer and sequence must be within the 2 layers and 0 sequences held"):
        KVCache(2).rows(0, 0, 1)
    with pytest.raises(ValueError, match="chunk must be >= 1, got 0"):
        run_prefill(model, 8, chunk=0)
    with pytest.raises(ValueError, match="name must be one of ours, published merge"):
        run_form(model, "nonsense", 8)


def test_weights_drawn_on_a_device_are_those_of_transformers():
    """What `from_config` draws on a GPU, without a detour over fp32 on the CPU."""
    config = dataclasses.replace(tiny().vision, hidden_size=64, intermediate_size=256)
    drawn = VisionEncoder.empty(config).to_empty(device="cpu")
    draw_weights(drawn, torch.Generator().manual_seed(0))
    wanted = VisionEncoder(config).state_dict()
    for name, weight in drawn.state_dict().items():
        if wanted[name].unique().numel() == 1:
            assert torch.equal(weight, wanted[name]), name
        else:
            assert weight.mean().abs() < 0.01 and abs(weight.std() / wanted[name].std() - 1) < 0.3, name
    again = VisionEncoder.empty(config).to_empty(device="cpu")
    draw_weights(again, torch.Generator().manual_seed(0))
    assert all(torch.equal(a, b) for a, b in zip(again.parameters(), drawn.parameters(), strict=True))
