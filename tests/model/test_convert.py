# SPDX-License-Identifier: Apache-2.0
"""Names and shapes of the public tensors, and the same numbers from the public forward pass and from ours."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from torch import Tensor, nn

from lrc_kernels import VarlenLayout
from lrc_model import convert
from lrc_model.config import LRCConfig, TextConfig, internvideo2_5_8b, tiny
from lrc_model.connector import Connector
from lrc_model.language import LanguageModel, PackedRows
from lrc_model.public_config import to_transformers
from lrc_model.vision import VisionConfig, VisionEncoder

pytest.importorskip("transformers", reason='transformers is not installed (pip install "lrc-kernels[model]")')

pytestmark = pytest.mark.filterwarnings("ignore:a sequence is longer than")

VISION = VisionConfig(hidden_size=48, num_layers=3, num_heads=3, intermediate_size=96, image_size=56)
TEXT = TextConfig(
    vocab_size=80, hidden_size=48, num_layers=3, num_heads=6, num_kv_heads=2, intermediate_size=64, max_position=24,
    rope_theta=1e4,
)  # fmt: skip


def random_like(layout: list[convert.Stored]) -> dict[str, Tensor]:
    """Random tensors by stored name: norms near one, matrices that keep the scale of what passes them."""
    tensors = {}
    for s in layout:
        scale = 0.2 if len(s.shape) == 1 else torch.Size(s.shape[1:]).numel() ** -0.5
        tensors[s.name] = torch.randn(s.shape) * scale + ("norm" in s.name and "weight" in s.name)
    return tensors


def llama(text: TextConfig) -> nn.Module:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LRCConfig(tiny().vision, tiny().connector, text)
    settings = to_transformers(config, dtype="float32", image_token_id=0)["text_config"]
    return LlamaForCausalLM(LlamaConfig(**settings, attn_implementation="eager"))


def test_all_573_public_tensors_have_a_place() -> None:
    config = internvideo2_5_8b()
    layout = convert.public_layout(config)
    names = [stored.name for stored in layout]
    assert len(names) == len(set(names)) == 573
    by_part = [
        sum(name.startswith(prefix) for name in names) for prefix in ("vision_model.", "mlp1.", "language_model.")
    ]
    assert by_part == [340, 6, 227]
    targets = [target for stored in layout for target in stored.targets]
    assert sorted(targets) == sorted(convert.state_shapes(config))
    assert sum(torch.Size(stored.shape).numel() for stored in layout) == 8_075_422_720
    shapes = {stored.name: stored.shape for stored in layout}
    assert shapes["language_model.model.layers.31.attention.wqkv.weight"] == (6144, 4096)
    assert shapes["vision_model.encoder.layers.23.attn.qkv.bias"] == (3072,)
    assert shapes["vision_model.embeddings.position_embedding"] == (1, 1025, 1024)
    assert shapes["language_model.output.weight"] == (92560, 4096)


def test_shapes_are_those_of_the_modules() -> None:
    config = internvideo2_5_8b()
    with torch.device("meta"):
        text = llama(config.text)
    modules = {
        "vision_model": VisionEncoder.empty(config.vision),
        "connector": Connector.empty(config),
        "language_model": text,
    }
    real = {f"{part}.{n}": tuple(t.shape) for part, m in modules.items() for n, t in m.state_dict().items()}
    assert real == convert.state_shapes(config)


@pytest.mark.parametrize("part", convert.PARTS)
def test_parts_add_up(part: str) -> None:
    config = tiny()
    shapes = convert.state_shapes(config, (part,))
    assert shapes and all(name.startswith(part + ".") for name in shapes)
    mapped = [target for stored in convert.public_layout(config, (part,)) for target in stored.targets]
    assert sorted(mapped) == sorted(shapes)
    with pytest.raises(ValueError, match="parts must be one of vision_model, connector, language_model, got 'heads'"):
        convert.state_shapes(config, ("heads",))


@pytest.mark.parametrize("layout", list(convert.LAYOUTS))
def test_every_layout_round_trips_exactly(layout: str) -> None:
    entries = convert.LAYOUTS[layout](tiny())
    stored = random_like(entries)
    ours = convert.import_state(stored, entries)
    assert {name: tuple(t.shape) for name, t in ours.items()} == convert.state_shapes(tiny())
    again = convert.export_state(ours, entries)
    assert set(again) == set(stored) and all(torch.equal(again[name], stored[name]) for name in stored)


def test_wqkv_is_grouped_by_kv_head() -> None:
    (entry,) = [s for s in convert.internlm2_layout(TEXT) if s.name == "model.layers.0.attention.wqkv.weight"]
    # Row r of the stored tensor holds the number r in every column: 2 kv heads of 3 queries + k + v, 8 rows each.
    rows = torch.arange(80.0).unsqueeze(1).expand(80, 48)
    q, k, v = entry.split(rows).values()
    assert q[:, 0].tolist() == [*range(24), *range(40, 64)]
    assert k[:, 0].tolist() == [*range(24, 32), *range(64, 72)]
    assert v[:, 0].tolist() == [*range(32, 40), *range(72, 80)]


def test_missing_tensors_are_named() -> None:
    entries = convert.public_layout(tiny())
    ours = convert.import_state(random_like(entries), entries)
    del ours["language_model.model.layers.1.self_attn.k_proj.weight"]
    with pytest.raises(ValueError, match=r"must hold 'language_model.*k_proj.weight', needed for '.*wqkv.weight'"):
        convert.export_state(ours, entries)
    with pytest.raises(ValueError, match=r"tensor 'vision_model.embeddings.class_embedding' of shape \[1, 1, 32\] is"):
        convert.import_state({}, entries)


@pytest.mark.parametrize(
    ("name", "rule"),
    [
        ("sam.memory_encoder.weight", "mask head (SAM 2)"),
        ("cg_model.x", "temporal head (CG-DETR)"),
        ("track_embed_decode2.layers.0.weight", "mask adapter"),
        ("track_embed_decoder.layers.0.weight", "mask adapter"),
        ("loc_encoder.2.weight", "region head and position prompts"),
        ("track_token", "task vectors"),
        ("language_model.model.layers.0.attention.rotary_emb.inv_freq", "RoPE frequencies"),
        ("track_tokens", None),
        ("samba.weight", None),
        ("vision_model.encoder.layers.24.ls1", None),
    ],
)
def test_rules_skip_heads_and_nothing_else(name: str, rule: str | None) -> None:
    assert convert.skip_rule(name) == rule


def internvit(frames: Tensor, w: dict[str, Tensor], config: VisionConfig) -> Tensor:
    """The public InternViT on normalised pixels, with its own names and fused qkv."""
    w = {name.removeprefix("vision_model."): value for name, value in w.items()}

    def norm(x: Tensor, name: str) -> Tensor:
        return nn.functional.layer_norm(x, x.shape[-1:], w[f"{name}.weight"], w[f"{name}.bias"], 1e-6)

    patch = config.patch_size
    patches = nn.functional.unfold(frames, patch, stride=patch).transpose(1, 2)
    x = patches @ w["embeddings.patch_embedding.weight"].flatten(1).T + w["embeddings.patch_embedding.bias"]
    x = torch.cat([w["embeddings.class_embedding"].expand(len(x), 1, -1), x], 1) + w["embeddings.position_embedding"]
    for i in range(config.num_layers):
        name = f"encoder.layers.{i}."
        h = norm(x, name + "norm1")
        qkv = h @ w[name + "attn.qkv.weight"].T + w[name + "attn.qkv.bias"]
        q, k, v = qkv.view(*h.shape[:2], 3, config.num_heads, -1).permute(2, 0, 3, 1, 4)
        attention = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1) @ v
        out = attention.transpose(1, 2).flatten(2) @ w[name + "attn.proj.weight"].T + w[name + "attn.proj.bias"]
        x = x + w[name + "ls1"] * out
        h = norm(x, name + "norm2") @ w[name + "mlp.fc1.weight"].T + w[name + "mlp.fc1.bias"]
        h = nn.functional.gelu(h) @ w[name + "mlp.fc2.weight"].T + w[name + "mlp.fc2.bias"]
        x = x + w[name + "ls2"] * h
    return x


def test_internvit_weights_compute_what_the_public_code_computes() -> None:
    config = LRCConfig(VISION, tiny().override({"connector.num_metric_heads": 4}).connector, tiny().text)
    layout = convert.public_layout(config, ("vision_model",))
    public = random_like(layout)
    encoder = VisionEncoder.empty(VISION)
    state = convert.import_state(public, layout)
    encoder.load_state_dict({n.removeprefix("vision_model."): t for n, t in state.items()}, strict=True, assign=True)
    frames = torch.randint(0, 256, (3, 3, 56, 56), dtype=torch.uint8)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (frames / 255 - mean.view(3, 1, 1)) / std.view(3, 1, 1)
    with torch.no_grad():
        wanted = internvit(pixels.double(), {n: t.double() for n, t in public.items()}, VISION)
        actual = encoder.eval()(frames)
    assert 1 < float(wanted.abs().max()) < 20
    assert float((actual - wanted).abs().max()) <= 1e-5


def internlm2(ids: Tensor, w: dict[str, Tensor], text: TextConfig) -> Tensor:
    """Logits [L, V] of the public InternLM2, with its own names, fused wqkv and dynamic NTK scaling."""
    length, heads, groups = len(ids), text.num_heads // text.num_kv_heads, text.num_kv_heads
    dim, base = text.hidden_size // text.num_heads, text.rope_theta
    if length > text.max_position and text.rope_factor is not None:
        base *= (text.rope_factor * length / text.max_position - (text.rope_factor - 1)) ** (dim / (dim - 2))
    frequencies = 1.0 / base ** (torch.arange(0, dim, 2) / dim)
    angles = torch.arange(length).unsqueeze(1) * torch.cat([frequencies, frequencies])

    def norm(x: Tensor, name: str) -> Tensor:
        return x / (x.square().mean(-1, keepdim=True) + text.rms_norm_eps).sqrt() * w[name + ".weight"]

    def rotate(x: Tensor) -> Tensor:
        half = torch.cat([-x[..., dim // 2 :], x[..., : dim // 2]], -1)
        return x * angles.cos().unsqueeze(1) + half * angles.sin().unsqueeze(1)

    x = w["model.tok_embeddings.weight"][ids]
    mask = torch.ones(length, length, dtype=torch.bool).tril()
    for i in range(text.num_layers):
        name = f"model.layers.{i}."
        qkv = norm(x, name + "attention_norm") @ w[name + "attention.wqkv.weight"].T
        qkv = qkv.view(length, groups, heads + 2, dim)
        q = rotate(qkv[:, :, :heads].flatten(1, 2))
        k = rotate(qkv[:, :, heads]).repeat_interleave(heads, 1)
        v = qkv[:, :, heads + 1].repeat_interleave(heads, 1)
        scores = torch.einsum("qhd,khd->hqk", q, k) / dim**0.5
        attention = scores.masked_fill(~mask, -torch.inf).softmax(-1)
        x = x + torch.einsum("hqk,khd->qhd", attention, v).flatten(1) @ w[name + "attention.wo.weight"].T
        h = norm(x, name + "ffn_norm")
        gate, up = h @ w[name + "feed_forward.w1.weight"].T, h @ w[name + "feed_forward.w3.weight"].T
        x = x + (nn.functional.silu(gate) * up) @ w[name + "feed_forward.w2.weight"].T
    return norm(x, "model.norm") @ w["output.weight"].T


@pytest.mark.parametrize("rope_factor", [2.0, 1.0, None])
def test_internlm2_weights_compute_the_same_logits_in_llama_layout(rope_factor: float | None) -> None:
    text = TextConfig(**{**TEXT.__dict__, "rope_factor": rope_factor})
    layout = convert.internlm2_layout(text)
    public = random_like(layout)
    model, ours = llama(text).eval(), LanguageModel.empty(text)
    state = {n.removeprefix("language_model."): t for n, t in convert.import_state(public, layout).items()}
    model.load_state_dict(state, strict=True)
    ours.load_state_dict(state, strict=True, assign=True)
    double = {name: value.double() for name, value in public.items()}
    # Within the trained range, at its end, past it, and short again after a long prompt.
    for length in (5, 24, 25, 90, 5):
        ids = torch.randint(0, text.vocab_size, (length,))
        with torch.no_grad():
            actual, wanted = model(ids.unsqueeze(0)).logits[0], internlm2(ids, double, text)
            hidden, _ = ours(ours.embed(ids), PackedRows.of(VarlenLayout([length])))
            own = ours.logits(hidden)
        scale = float(wanted.abs().max())
        assert 1 < scale < 20
        for logits in (actual, own):
            assert float((logits - wanted).abs().max()) <= 2e-5, length


def test_rope_base_is_the_public_one_past_the_trained_range() -> None:
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    model = llama(TEXT)
    for length in (10, 24, 25, 90):
        inverse, _ = ROPE_INIT_FUNCTIONS["dynamic"](model.config, torch.device("cpu"), seq_len=length)
        ours = 1.0 / TEXT.rope_base(length) ** (torch.arange(0, TEXT.head_dim, 2) / TEXT.head_dim)
        torch.testing.assert_close(ours, inverse, rtol=1e-6, atol=0)
    bases = [TEXT.rope_base(length) for length in range(20, 60)]
    assert all(a <= b for a, b in pairwise(bases)) and len(set(bases[:5])) == 1 and len(set(bases[5:])) == 35
