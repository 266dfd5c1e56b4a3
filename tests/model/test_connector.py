# SPDX-License-Identifier: Apache-2.0
"""The connector against a plain fp64 restatement, clips in chunks with recomputation, and remainders of frames."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from lrc_kernels.testing import assert_close
from lrc_model.config import LRCConfig, tiny
from lrc_model.connector import Connector, encode_clips, pad_frames, place_visual_tokens
from lrc_model.vision import VisionEncoder

pytest.importorskip("transformers", reason='transformers is not installed (pip install "lrc-kernels[model]")')

# 16 tokens a frame before the merge, so that a clip of four goes 64 -> 32 -> 16 -> 8 and tests all iterations.
CONFIG = tiny().override({"image_size": 112, "tokens_per_frame": 2})
DOUBLE = torch.float64


@pytest.fixture(scope="module")
def vision() -> VisionEncoder:
    return VisionEncoder(CONFIG.vision).eval()


def random_connector(config: LRCConfig = CONFIG, seed: int = 0) -> Connector:
    connector = Connector(config, seed=seed)
    for norm in (connector.layer_norm.weight, connector.layer_norm.bias):
        nn.init.normal_(norm, mean=1.0, std=0.3)
    return connector


def random_frames(num_frames: int, size: int = 112) -> Tensor:
    return torch.randint(0, 256, (num_frames, 3, size, size), dtype=torch.uint8)


def shuffled(tokens: Tensor, h: int, w: int) -> Tensor:
    """Pixel shuffle v2 token by token: [F, 1 + h*w, D] -> [F, h*w/4, 4D]."""
    patches = tokens[:, 1:].view(-1, h, w, tokens.shape[-1])
    rows = [
        torch.cat([patches[:, i, j], patches[:, i, j + 1], patches[:, i + 1, j], patches[:, i + 1, j + 1]], dim=-1)
        for i in range(0, h, 2)
        for j in range(0, w, 2)
    ]
    return torch.stack(rows, dim=1)


def merged(x: Tensor, target: int, heads: int) -> Tensor:
    """Bipartite merging of one clip [N, D] by a loop over tokens: even tokens look for their best odd one."""
    metric = x.view(x.shape[0], heads, -1).mean(1)
    size = torch.ones(x.shape[0], dtype=x.dtype)
    while x.shape[0] > target:
        r = min(x.shape[0] - target, x.shape[0] // 2)
        unit = metric / metric.norm(dim=-1, keepdim=True)
        best, partner = (unit[::2] @ unit[1::2].T).max(-1)
        ranked = best.argsort(descending=True, stable=True).tolist()
        weighted = [(t[::2] * size[::2, None], t[1::2] * size[1::2, None]) for t in (x, metric)]
        sizes = size[1::2].clone()
        for source in ranked[:r]:
            into = int(partner[source])
            sizes[into] += size[::2][source]
            for from_, to in weighted:
                to[into] += from_[source]
        left = ranked[r:]
        x, metric = (torch.cat([even[left] / size[::2][left, None], odd / sizes[:, None]]) for even, odd in weighted)
        size = torch.cat([size[::2][left], sizes])
    return x


def oracle(connector: Connector, config: LRCConfig, tokens: Tensor, dtype: torch.dtype) -> Tensor:
    """The whole connector in `dtype`, one clip at a time."""
    side = config.vision.image_size // config.vision.patch_size
    target = config.clip_frames * config.tokens_per_frame
    clips = shuffled(tokens.to(dtype), side, side).reshape(
        -1, config.clip_frames * config.frame_tokens, config.token_width
    )
    if target < clips.shape[1]:
        clips = torch.stack([merged(clip, target, config.connector.num_metric_heads) for clip in clips])
    w = {name: value.detach().to(dtype) for name, value in connector.named_parameters()}
    mean, var = clips.mean(-1, keepdim=True), clips.var(-1, keepdim=True, unbiased=False)
    x = (clips - mean) / (var + 1e-5).sqrt() * w["layer_norm.weight"] + w["layer_norm.bias"]
    x = x @ w["linear_1.weight"].T + w["linear_1.bias"]
    x = x * 0.5 * (1 + torch.erf(x / 2**0.5))
    return x @ w["linear_2.weight"].T + w["linear_2.bias"]


@pytest.mark.parametrize(
    "override",
    [
        {},
        {"clip_frames": 8},
        {"clip_frames": 1, "tokens_per_frame": 5},
        {"tokens_per_frame": 12},
        {"tokens_per_frame": 16},
    ],
    ids=str,
)
def test_against_a_plain_fp64_restatement(override: dict[str, int]) -> None:
    config = CONFIG.override(override)
    connector = random_connector(config)
    tokens = torch.randn(16, 65, config.vision.hidden_size)
    with torch.no_grad():
        actual = connector(tokens)
    assert actual.shape == (16 // config.clip_frames, config.clip_frames * config.tokens_per_frame, 64)
    assert_close(actual, oracle(connector, config, tokens, DOUBLE), oracle(connector, config, tokens, torch.float32))


def test_nothing_is_merged_at_full_count() -> None:
    config = CONFIG.override({"tokens_per_frame": 16, "connector.num_metric_heads": 7})
    tokens = torch.randn(4, 65, 32)
    assert not config.merges
    compressed = random_connector(config).compress(tokens)
    assert torch.equal(compressed, shuffled(tokens, 8, 8).reshape(1, 64, 128))


def test_a_clip_alone_equals_the_clip_in_a_video(vision: VisionEncoder) -> None:
    connector, frames = random_connector(), random_frames(12)
    with torch.no_grad():
        whole = encode_clips(vision, connector, frames, chunk_clips=1)
        for clip in range(3):
            alone = encode_clips(vision, connector, frames[4 * clip : 4 * clip + 4], chunk_clips=1)
            assert torch.equal(alone.tokens[0], whole.tokens[clip])
    assert (whole.num_frames, whole.num_padded, whole.tokens.shape) == (12, 0, (3, 8, 64))


@pytest.mark.parametrize("chunk_clips", [1, 2, 10])
def test_chunks_and_recomputation_change_neither_values_nor_gradients(chunk_clips: int) -> None:
    vision, connector, frames = (
        VisionEncoder(CONFIG.vision, dtype=DOUBLE),
        random_connector().double(),
        random_frames(12),
    )
    calls: list[tuple[int, int]] = []
    direct = connector(vision(frames, chunk_frames=12))
    weight = torch.randn_like(direct)
    parameters = [*vision.parameters(), *connector.parameters()]
    wanted = torch.autograd.grad((direct * weight).sum(), parameters)
    clips = encode_clips(vision, connector, frames, chunk_clips=chunk_clips, progress=lambda *a: calls.append(a))
    torch.testing.assert_close(clips.tokens, direct, rtol=1e-10, atol=1e-10)
    # The gradient of the key biases is zero but for rounding, so the least scale is that of the others.
    scale = min(float(want.abs().max()) for want in wanted if float(want.abs().max()) > 1e-14)
    for got, want in zip(torch.autograd.grad((clips.tokens * weight).sum(), parameters), wanted, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-8, atol=1e-8 * scale)
    assert calls == [(min(done, 3), 3) for done in range(chunk_clips, 3 + chunk_clips, chunk_clips)]


def test_only_a_chunk_is_in_flight_and_only_outputs_are_kept(vision: VisionEncoder) -> None:
    connector, frames = random_connector(), random_frames(16)
    seen: list[int] = []
    hook = vision.model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"].shape[0]), with_kwargs=True
    )
    kept = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal kept
        kept += tensor.nbytes
        return tensor

    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            tokens = encode_clips(vision, connector, frames, chunk_clips=1).tokens
        forward = list(seen)
        tokens.sum().backward()
    finally:
        hook.remove()
        vision.zero_grad()
    # Each chunk passes once forward and once more in backward; between them no more is kept than its uint8 pixels.
    assert forward == [4] * 4 and seen == [4] * 8
    assert kept <= frames.nbytes


def test_a_frozen_vit_is_not_recomputed() -> None:
    frozen, frames = VisionEncoder(CONFIG.vision).eval().requires_grad_(False), random_frames(8)
    connector, seen = random_connector(), []
    wanted = torch.autograd.grad(connector(frozen(frames)).square().sum(), connector.linear_1.weight)[0]
    hook = frozen.model.register_forward_pre_hook(lambda *_: seen.append(1))
    tokens = encode_clips(frozen, connector, frames, chunk_clips=1).tokens
    actual = torch.autograd.grad(tokens.square().sum(), connector.linear_1.weight)[0]
    hook.remove()
    assert len(seen) == 2
    torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5 * float(wanted.abs().max()))
    connector.requires_grad_(False)
    assert not encode_clips(frozen, connector, frames).tokens.requires_grad


@pytest.mark.parametrize("num_frames", [1, 3, 5, 6, 7])
def test_a_remainder_repeats_the_last_frame_and_says_so(vision: VisionEncoder, num_frames: int) -> None:
    connector, frames = random_connector(), random_frames(num_frames)
    missing = -num_frames % 4
    with torch.no_grad():
        clips = encode_clips(vision, connector, frames, remainder="repeat", chunk_clips=1)
        padded, num_padded = pad_frames(frames, 4, remainder="repeat")
        wanted = encode_clips(vision, connector, padded, chunk_clips=1)
    assert (clips.num_frames, clips.num_padded, num_padded) == (num_frames, missing, missing)
    assert torch.equal(padded[num_frames:], frames[-1:].expand(missing, -1, -1, -1))
    assert torch.equal(clips.tokens, wanted.tokens)


def test_weights_depend_on_the_seed_alone() -> None:
    state = torch.random.get_rng_state()
    first, second, other = (Connector(CONFIG, seed=seed).linear_1.weight for seed in (1, 1, 2))
    assert torch.equal(torch.random.get_rng_state(), state)
    assert torch.equal(first, second) and not torch.equal(first, other)
    half = Connector(CONFIG, seed=1, dtype=torch.bfloat16)
    assert torch.equal(half.linear_1.weight, first.bfloat16()) and half.layer_norm.weight.dtype == torch.bfloat16


def test_whole_clips_are_not_copied() -> None:
    frames = random_frames(8)
    assert pad_frames(frames, 4) == (frames, 0)


@pytest.mark.parametrize(
    ("num_frames", "options", "match"),
    [
        (6, {}, r"whole clips of clip_frames = 4, got 6: sample 8 frames, or pass remainder='repeat' .* 2 times"),
        (0, {}, "frames must hold at least one frame, got 0: check that the video could be decoded"),
        (0, {"remainder": "repeat"}, "frames must hold at least one frame, got 0"),
        (4, {"remainder": "drop"}, "remainder must be one of error, repeat, got 'drop'"),
        (4, {"chunk_clips": 0}, "chunk_clips must be >= 1, got 0"),
    ],
)
def test_bad_frames_are_refused(vision: VisionEncoder, num_frames: int, options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode_clips(vision, random_connector(), random_frames(num_frames), **options)


def test_frames_of_another_kind_are_refused(vision: VisionEncoder) -> None:
    connector = random_connector()
    with pytest.raises(TypeError, match="frames must be a tensor, got list"):
        encode_clips(vision, connector, [0])
    with pytest.raises(ValueError, match="frames must be uint8, got float32"):
        encode_clips(vision, connector, random_frames(4).float())
    with pytest.raises(ValueError, match=r"frames must have shape \[F, 3, 112, 112\], got \[4, 3, 56, 56\]"):
        encode_clips(vision, connector, random_frames(4, 56))
    with pytest.raises(
        ValueError, match=r"one dtype, got torch.float32 and torch.bfloat16: call model.to\(torch.float32"
    ):
        encode_clips(vision, connector.bfloat16(), random_frames(4))
    with pytest.raises(ValueError, match=r"x must have shape \[F, 1 \+ 8\*8, D\]"):
        random_connector()(torch.randn(4, 64, 32))


def test_visual_tokens_take_their_places() -> None:
    embeddings, tokens = torch.randn(6, 4, requires_grad=True), torch.randn(1, 3, 4, requires_grad=True)
    visual = torch.tensor([False, True, True, False, True, False])
    placed = place_visual_tokens(embeddings, visual, tokens, num_visual_tokens=3)
    assert torch.equal(placed[visual], tokens[0]) and torch.equal(placed[~visual], embeddings[~visual])
    placed.square().sum().backward()
    assert torch.equal(tokens.grad, 2 * tokens) and not embeddings.grad[visual].any()
    with pytest.raises(ValueError, match="got 2 placeholders and 3 rows of width 4: build the prompt with the frames"):
        place_visual_tokens(embeddings, visual, tokens, num_visual_tokens=2)
    with pytest.raises(
        ValueError, match="one row of width 4 per placeholder, got 3 placeholders and 3 rows of width 5"
    ):
        place_visual_tokens(embeddings, visual, torch.randn(3, 5), num_visual_tokens=3)
