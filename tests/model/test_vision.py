# SPDX-License-Identifier: Apache-2.0
"""The vision encoder: shapes, weights from the seed alone, ImageNet normalisation, chunks, and what it refuses."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch
from torch import Tensor

from lrc_model.vision import VisionConfig, VisionEncoder

pytest.importorskip("transformers", reason='transformers is not installed (pip install "lrc-kernels[model]")')

TINY = VisionConfig(hidden_size=32, num_layers=2, num_heads=2, intermediate_size=64, image_size=56)


@pytest.fixture(scope="module")
def encoder() -> VisionEncoder:
    return VisionEncoder(TINY).eval()


def random_frames(num_frames: int, size: int = 56) -> Tensor:
    return torch.randint(0, 256, (num_frames, 3, size, size), dtype=torch.uint8)


def test_tokens_of_448_pixel_frames() -> None:
    encoder = VisionEncoder(VisionConfig.small()).eval()
    assert encoder.grid == (32, 32)
    with torch.no_grad():
        tokens = encoder(random_frames(2, 448))
    assert tokens.shape == (2, 1025, 256)
    assert tokens.dtype == torch.float32
    assert torch.isfinite(tokens).all()


def test_internvit_300m_has_the_tensors_of_the_release() -> None:
    with torch.device("meta"):
        from transformers import InternVLVisionConfig, InternVLVisionModel

        model = InternVLVisionModel(InternVLVisionConfig(attention_bias=True))
    config = VisionConfig.internvit_300m()
    assert (config.hidden_size, config.num_layers, config.num_heads, config.intermediate_size) == (1024, 24, 16, 4096)
    tiny = VisionEncoder(TINY).model.state_dict()
    wanted = {
        name for name in model.state_dict() if ".layer." not in name or ".layer.0." in name or ".layer.1." in name
    }
    assert set(tiny) == wanted
    assert sum(p.numel() for p in model.parameters()) == 304_012_288


def test_weights_depend_on_the_seed_alone() -> None:
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    first = VisionEncoder(TINY, seed=7).state_dict()
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    second, other = VisionEncoder(TINY, seed=7).state_dict(), VisionEncoder(TINY, seed=8).state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert not torch.equal(first["model.embeddings.cls_token"], other["model.embeddings.cls_token"])


def test_equal_patches_become_distinct_tokens(encoder: VisionEncoder) -> None:
    with torch.no_grad():
        tokens = encoder(torch.full((1, 3, 56, 56), 128, dtype=torch.uint8))[0]
    assert len(tokens.unique(dim=0)) == 17


def test_frames_are_normalised_by_imagenet_statistics(encoder: VisionEncoder) -> None:
    frames = random_frames(3)
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    pixels = (frames.double() / 255 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1)
    with torch.no_grad():
        wanted = encoder.model(pixel_values=pixels.float()).last_hidden_state
        torch.testing.assert_close(encoder(frames), wanted, rtol=1e-4, atol=1e-5)


def test_the_last_layer_is_not_normalised(encoder: VisionEncoder) -> None:
    seen = {}
    hook = encoder.model.encoder.layer[-1].register_forward_hook(lambda _, __, output: seen.update(last=output))
    with torch.no_grad():
        tokens = encoder(random_frames(2))
    hook.remove()
    assert torch.equal(tokens, seen["last"])


@pytest.mark.parametrize("chunk_frames", [1, 2, 5, 100])
def test_chunks_change_nothing(encoder: VisionEncoder, chunk_frames: int) -> None:
    frames = random_frames(5)
    calls: list[tuple[int, int]] = []
    with torch.no_grad():
        whole = encoder(frames, chunk_frames=5)
        chunked = encoder(frames, chunk_frames=chunk_frames, progress=lambda done, total: calls.append((done, total)))
    torch.testing.assert_close(chunked, whole, rtol=1e-5, atol=1e-5)
    assert calls == [(min(end, 5), 5) for end in range(chunk_frames, 5 + chunk_frames, chunk_frames)]


def test_gradients_reach_the_patches_of_every_chunk() -> None:
    encoder = VisionEncoder(TINY)
    frames = random_frames(3)
    encoder(frames, chunk_frames=3).square().sum().backward()
    whole = encoder.model.embeddings.patch_embeddings.projection.weight.grad.clone()
    encoder.zero_grad()
    encoder(frames, chunk_frames=1).square().sum().backward()
    chunked = encoder.model.embeddings.patch_embeddings.projection.weight.grad
    assert whole.abs().max() > 0
    torch.testing.assert_close(chunked, whole, rtol=1e-3, atol=1e-3)


def test_bfloat16_has_the_same_weights_and_near_tokens(encoder: VisionEncoder) -> None:
    half = VisionEncoder(TINY, dtype=torch.bfloat16).eval()
    assert all(torch.equal(a.bfloat16(), b) for a, b in zip(encoder.parameters(), half.parameters(), strict=True))
    frames = random_frames(2)
    with torch.no_grad():
        tokens, wanted = half(frames), encoder(frames)
    assert tokens.dtype == torch.bfloat16
    assert (tokens.float() - wanted).abs().max() < 0.05 * wanted.abs().max()


def test_no_frames(encoder: VisionEncoder) -> None:
    assert encoder(random_frames(0)).shape == (0, 17, 32)


@pytest.mark.parametrize(
    ("frames", "error", "match"),
    [
        (torch.zeros(1, 3, 56, 56), ValueError, "frames must be uint8, got float32"),
        (random_frames(1, 42), ValueError, r"frames must have shape \[F, 3, 56, 56\], got \[1, 3, 42, 42\]"),
        (random_frames(1)[0], ValueError, r"frames must have shape \[F, 3, 56, 56\], got \[3, 56, 56\]"),
        (random_frames(1).to("meta"), ValueError, "frames must be on cpu as the weights are, got meta"),
        ([0], TypeError, "frames must be a tensor, got list"),
    ],
)
def test_bad_frames_are_refused(encoder: VisionEncoder, frames: Tensor, error: type[Exception], match: str) -> None:
    with pytest.raises(error, match=match):
        encoder(frames)


def test_an_empty_encoder_takes_the_weights_of_another(encoder: VisionEncoder) -> None:
    empty = VisionEncoder.empty(TINY, dtype=torch.bfloat16)
    assert {p.device.type for p in empty.parameters()} == {"meta"} and empty.grid == encoder.grid
    assert {p.dtype for p in empty.parameters()} == {torch.bfloat16}
    empty.load_state_dict(encoder.state_dict(), strict=True, assign=True)
    frames = random_frames(2)
    with torch.no_grad():
        assert torch.equal(empty.eval()(frames), encoder(frames))


def test_bad_chunks_are_refused(encoder: VisionEncoder) -> None:
    with pytest.raises(ValueError, match="chunk_frames must be >= 1, got 0"):
        encoder(random_frames(1), chunk_frames=0)


@pytest.mark.parametrize(
    ("argument", "value", "match"),
    [
        ("hidden_size", 30, "hidden_size must be a multiple of num_heads = 4, got 30"),
        ("image_size", 450, "image_size must be a multiple of patch_size = 14, got 450"),
        ("num_layers", 0, "num_layers must be >= 1, got 0"),
    ],
)
def test_bad_sizes_are_refused(argument: str, value: int, match: str) -> None:
    sizes = {"hidden_size": 256, "num_layers": 4, "num_heads": 4, "intermediate_size": 1024, argument: value}
    with pytest.raises(ValueError, match=match):
        VisionConfig(**sizes)


def test_importing_the_package_leaves_transformers_alone() -> None:
    code = (
        "import sys, lrc_model.checkpoint, lrc_model.connector, lrc_model.templates, lrc_kernels.packing as _; "
        "print(*({'transformers', 'safetensors', 'sentencepiece', 'av'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert not done.stdout.split()


def test_a_missing_transformers_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    with pytest.raises(ImportError, match=r'pip install "lrc-kernels\[model\]"'):
        VisionEncoder(TINY)
