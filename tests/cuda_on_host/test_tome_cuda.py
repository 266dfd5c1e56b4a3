# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of token merging, executed on the host: every branch against the fp64 reference."""

import pytest
import torch

from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.tome import reference

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
# clip_frames, height, width, shuffle, prefix
LAYOUTS = [[2, 4, 6, 2, 1], [1, 4, 4, 1, 0], [3, 3, 6, 3, 2]]


def token_rows(x, layout=()):
    """The seven fields of lrc::TokenRows for x [B, N, D], packed [T, D] or a ViT output [F, prefix + h*w, C]."""
    if layout:
        _, h, w, shuffle, prefix = layout
        return [x.shape[2], shuffle, h * w // shuffle**2, w // shuffle, prefix, x.stride(0), x.stride(1)]
    tokens = x.shape[-2]
    return [x.shape[-1], 1, tokens, tokens, 0, x.stride(0) if x.dim() == 3 else 0, x.stride(-2)]


def head_mean(host_kernels, x, num_heads, layout=(), reverse=False):
    """The kernel on x [B, N, D] with any strides, or on a ViT output."""
    metric = torch.empty(reference.head_mean(x.float(), num_heads, list(layout)).shape)
    args = (x, CODES[x.dtype], token_rows(x, layout), metric.shape[0], num_heads, metric)
    host_kernels.call("head_mean", *args, reverse=reverse)
    return metric


def gather(host_kernels, y, assign, size, weight, layout=(), x=None, reverse=False, first=None):
    if layout:
        _, h, w, shuffle, prefix = layout
        frames = assign.numel() // (h * w // shuffle**2)
        x = torch.empty(frames, prefix + h * w, y.shape[1] // shuffle**2, dtype=y.dtype)
    elif x is None:
        x = torch.empty(assign.numel(), y.shape[1], dtype=y.dtype)
    args = (y, CODES[y.dtype], assign, size, weight, first, token_rows(x, layout), assign.numel(), x)
    host_kernels.call("gather_rows", *args, reverse=reverse)
    return x


def check_head_mean(metric, x, num_heads, layout=()):
    same = reference.head_mean(x.float(), num_heads, list(layout))
    assert_close(metric, reference.head_mean(x.double(), num_heads, list(layout)), same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("shape", "num_heads"),
    [
        ((2, 5, 64), 4),
        ((1, 7, 352), 4),
        ((3, 4, 12), 12),
        ((2, 3, 30), 2),
        ((1, 300, 16), 2),
        ((2, 1, 24), 1),
        ((0, 4, 8), 2),
    ],
    ids=["k16", "k88", "k1", "k15", "two_blocks", "one_head", "empty"],
)
def test_head_mean(host_kernels, dtype, shape, num_heads):
    x = make_input("gaussian", shape, dtype=dtype)
    check_head_mean(head_mean(host_kernels, x, num_heads), x, num_heads)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", ["token", "batch", "offset"])
def test_head_mean_reads_strided_input_in_place(host_kernels, dtype, cut):
    whole = make_input("gaussian", (4, 9, 48), dtype=dtype)
    x = {"token": whole[:, ::2, :32], "batch": whole[::2, 1:, 8:40], "offset": whole[:, :, 3:35]}[cut]
    assert not x.is_contiguous()
    check_head_mean(head_mean(host_kernels, x, 4), x, 4)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize(
    ("channels", "num_heads"), [(16, 4), (36, 6), (8, 1), (24, 36)], ids=["k16", "k_odd", "one_head", "straddles"]
)
def test_head_mean_reads_a_vit_output_in_place(host_kernels, dtype, layout, channels, num_heads):
    clip_frames, h, w, shuffle, prefix = layout
    if channels * shuffle**2 % num_heads:
        num_heads = shuffle**2 * 2
    x = make_input("gaussian", (2 * clip_frames, prefix + h * w, channels), dtype=dtype)
    x[:, :prefix] = torch.nan
    check_head_mean(head_mean(host_kernels, x, num_heads, layout), x, num_heads, layout)


def test_head_mean_sums_heads_in_ascending_order(host_kernels):
    x = make_input("gaussian", (1, 3, 64))
    sums = torch.zeros(3, 16)
    for head in x[0].unflatten(-1, (4, 16)).unbind(1):
        sums += head
    assert torch.equal(head_mean(host_kernels, x, 4), sums / 4)
    assert torch.equal(head_mean(host_kernels, x, 4), head_mean(host_kernels, x, 4, reverse=True))


def check_gather(out, y, assign, size, weight, layout=()):
    layout = list(layout)
    exact, same = (reference.gather(v, assign, size, weight, layout) for v in (y.double(), y))
    assert_close(out, exact, same)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("dim", [64, 1, 13, 2056], ids=["vectors", "one", "odd", "two_steps"])
@pytest.mark.parametrize("scaled", [(True, True), (True, False), (False, True), (False, False)], ids=str)
def test_gather_rows(host_kernels, dtype, dim, scaled):
    y = make_input("gaussian", (6, dim), dtype=dtype)
    assign = torch.randint(0, 6, (41,), dtype=torch.int32)
    size = torch.rand(6) * 9 + 0.1 if scaled[0] else None
    weight = torch.rand(41) * 3 if scaled[1] else None
    out = gather(host_kernels, y, assign, size, weight)
    check_gather(out, y, assign, size, weight)
    assert torch.equal(out, gather(host_kernels, y, assign, size, weight, reverse=True))
    if scaled == (False, False):
        assert torch.equal(out, y[assign.long()])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("channels", [16, 5])
def test_gather_rows_scatters_to_a_vit_output(host_kernels, dtype, layout, channels):
    clip_frames, h, w, shuffle, prefix = layout
    tokens = 2 * clip_frames * h * w // shuffle**2
    y = make_input("gaussian", (7, channels * shuffle**2), dtype=dtype)
    assign = torch.randint(0, 7, (tokens,), dtype=torch.int32)
    weight, size = torch.rand(tokens), torch.rand(7) + 0.5
    out = gather(host_kernels, y, assign, size, weight, layout)
    check_gather(out, y, assign, size, weight, layout)
    assert (out[:, :prefix] == 0).all()


@pytest.mark.parametrize("dim", [16, 3])
def test_weight_zero_and_size_zero_mask_nan(host_kernels, dim):
    y = make_input("gaussian", (3, dim))
    y[0], y[1] = torch.nan, torch.inf
    assign = torch.tensor([0, 0, 1, 2, 1, 2], dtype=torch.int32)
    weight, size = torch.tensor([0.0, -0.0, 0.0, 1.0, 2.0, 0.0]), torch.tensor([2.0, 0.0, 4.0])
    out = gather(host_kernels, y, assign, size, weight)
    assert torch.equal(out[[0, 1, 2, 4, 5]], torch.zeros(5, dim))
    assert not out.signbit()[[0, 1, 2, 4, 5]].any()
    assert torch.equal(out[3], y[2] * 0.25)


def test_unaligned_pointers_take_the_scalar_path(host_kernels):
    y = make_input("gaussian", (5, 8))
    assign = torch.randint(0, 5, (10,), dtype=torch.int32)
    x = torch.empty(81)[1:].view(10, 8)
    assert x.data_ptr() % 16 and torch.equal(gather(host_kernels, y, assign, None, None, x=x), y[assign.long()])


def test_gather_writes_strided_rows_and_nothing_between(host_kernels):
    y = make_input("gaussian", (5, 8))
    assign = torch.randint(0, 5, (12,), dtype=torch.int32)
    whole = torch.full((3, 4, 24), 7.0)
    x = gather(host_kernels, y, assign, None, None, x=whole[:, :, 8:16])
    assert torch.equal(x.reshape(12, 8), y[assign.long()])
    assert (whole[:, :, :8] == 7).all() and (whole[:, :, 16:] == 7).all()


@pytest.mark.parametrize(
    ("change", "tokens", "num_heads", "message"),
    [
        ({}, 12, 3, "num_heads must divide the token width 16, got 3"),
        ({}, 12, 0, "num_heads must be >= 1, got 0"),
        ({0: 2**30}, 12, 1, r"rows.width must be < 2\^30, got 1073741824"),
        ({0: 2**28}, 12, 1, r"rows.shuffle\^2 \* rows.width must be < 2\^30, got 1073741824"),
        ({1: 0}, 12, 1, "rows.shuffle must be >= 1, got 0"),
        ({4: -1}, 12, 1, "rows.prefix must be >= 0, got -1"),
        ({}, 7, 1, "num_tokens must be whole frames of 6 tokens, got 7"),
        ({}, -6, 1, "num_tokens must be >= 0, got -6"),
    ],
)
def test_bad_arguments(host_kernels, change, tokens, num_heads, message):
    rows = [change.get(i, v) for i, v in enumerate([4, 2, 6, 3, 1, 100, 4])]
    x = torch.empty(1000)
    with pytest.raises(RuntimeError, match=message):
        host_kernels.call("head_mean", x, 0, rows, tokens, num_heads, x)
    if "num_heads" not in message:
        with pytest.raises(RuntimeError, match=message):
            host_kernels.call("gather_rows", x, 0, x, None, None, None, rows, tokens, x)
