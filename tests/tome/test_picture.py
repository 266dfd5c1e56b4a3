# SPDX-License-Identifier: Apache-2.0
"""`python -m lrc_kernels.tome`: a video in, a picture of its merge groups out, errors in one line."""

import pytest
import torch

pytest.importorskip("PIL", reason="the picture needs pillow (pip install lrc-kernels[video])")
av = pytest.importorskip("av", reason="decoding needs PyAV (pip install lrc-kernels[video])")

import numpy as np  # noqa: E402
from PIL import Image  # noqa: E402

from lrc_kernels.tome import __main__ as command  # noqa: E402
from lrc_kernels.tome import head_mean  # noqa: E402


@pytest.fixture(scope="module")
def video(tmp_path_factory):
    """Two seconds at 8 frames per second: the left half red, the right half grey."""
    path = tmp_path_factory.mktemp("video") / "halves.mp4"
    with av.open(str(path), "w") as container:
        stream = container.add_stream("mpeg4", rate=8)
        stream.width, stream.height, stream.pix_fmt = 128, 64, "yuv420p"
        for _ in range(16):
            pixels = np.full((64, 128, 3), 60, dtype=np.uint8)
            pixels[:, :64] = (200, 20, 20)
            container.mux(stream.encode(av.VideoFrame.from_ndarray(pixels, format="rgb24")))
        container.mux(stream.encode())
    return path


def test_draws_the_groups_of_a_clip(video, tmp_path, capsys):
    out = tmp_path / "groups.png"
    # 512 tokens halve to 64, anchored in columns 7 and 15 of 16: the last ones of the red and of the grey half.
    assert command.main([str(video), "--out", str(out), "--frames", "2", "--target", "64"]) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{out}: 512 tokens -> 64, ") and "no model" in said
    pixels = np.asarray(Image.open(out).convert("RGB")).astype(int)
    # A line through the group means, which are red in the left half of each frame and grey in the right one.
    means = pixels[pixels.shape[0] * 3 // 4]
    red = (means[:, 0] > means[:, 1] + 100).mean()
    grey = ((means.max(-1) - means.min(-1) < 40) & (means.max(-1) < 220)).mean()
    assert 0.4 < red < 0.5 and 0.4 < grey < 0.5


def test_pixel_features_are_the_patches():
    frames = torch.randint(0, 256, (2, 3, 28, 28), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = command.pixel_features(frames, image_size=28, patch=7)
    assert features.x.shape == (2, 16, 147) and features.layout.tokens_per_clip == 8
    patch = command.normalised(frames)[1, :, 7:14, 21:28]
    assert torch.equal(features.x[1, 7], patch.permute(1, 2, 0).flatten())
    assert head_mean(features.x, features.num_heads, layout=features.layout).shape == (1, 8, 588)


def test_a_checkpoint_is_matched_by_its_output(video, tmp_path, capsys):
    transformers = pytest.importorskip("transformers", reason="needs transformers (pip install lrc-kernels[model])")
    config = transformers.ViTConfig(
        hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, image_size=48, patch_size=8
    )
    transformers.ViTModel(config).save_pretrained(tmp_path / "vit")
    out = tmp_path / "groups.png"
    arguments = [str(video), "--frames", "4", "--target", "6", "--checkpoint", str(tmp_path / "vit"), "--out", str(out)]
    assert command.main(arguments) == 0
    assert "36 tokens -> 6" in capsys.readouterr().out
    assert Image.open(out).size[0] > 1000


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["missing.mp4"], "missing.mp4"),
        (["VIDEO", "--start", "5"], "must end before the video does at 2.00 s"),
        (["VIDEO", "--frames", "0"], "--frames must be >= 1"),
        (["VIDEO", "--target", "9999"], "target must be between 1 and num_tokens = 2048, got 9999"),
        (["VIDEO", "--frames", "2", "--out", "no/such/folder.png"], "no/such/folder.png"),
        (["VIDEO", "--frames", "2", "--out", "picture.unknown"], "unknown file extension"),
        (["VIDEO", "--checkpoint", "nowhere"], "--checkpoint must be a folder with a config.json, got nowhere"),
    ],
)
def test_errors_take_one_line(video, arguments, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert command.main([str(video) if argument == "VIDEO" else argument for argument in arguments]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1 and err.startswith("python -m lrc_kernels.tome: ")
