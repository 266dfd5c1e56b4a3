# SPDX-License-Identifier: Apache-2.0
"""The CUDA merge, executed on the host: sums, means and maxima of the rows of a plan against the fp64 reference."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.tome import native, reference

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
DTYPES = list(CODES)
REDUCTIONS = ["sum", "mean", "max"]
# clip_frames, height, width, shuffle, prefix
VIT = [2, 4, 6, 2, 1]


def merge(host_kernels, x, assign, size, weight, layouts, reduce, layout=(), reverse=False):
    num_tokens, rows = native._token_rows(x, list(layout))
    y = torch.empty(size.numel(), rows[0] * rows[1] ** 2, dtype=x.dtype)
    host_kernels.call(
        "merge_rows",
        *(x, CODES[x.dtype], rows, num_tokens, assign, size, weight),
        *(layouts[0].cu_seqlens, layouts[1].cu_seqlens, layouts[0].num_sequences, size.numel()),
        *(REDUCTIONS.index(reduce), y),
        reverse=reverse,
    )
    return y


def plan_of(lengths, rows, weights="none", seed=0):
    """A random assignment of packed segments: (assign, size, weight, (layout in, layout out))."""
    generator = torch.Generator().manual_seed(seed)
    layout_in, layout_out = VarlenLayout(lengths), VarlenLayout(rows)
    assign = torch.cat(
        [
            int(first) + torch.randint(0, max(1, kept), (n,), generator=generator)
            for n, kept, first in zip(lengths, rows, layout_out.cu_seqlens[:-1], strict=True)
        ]
    )
    total = sum(lengths)
    weight = {
        "none": None,
        "binary": (torch.rand(total, generator=generator) > 0.3).float(),
        "real": torch.rand(total, generator=generator) + 0.5,
    }[weights]
    ones = torch.ones(total) if weight is None else weight
    size = torch.zeros(sum(rows)).index_add(0, assign, ones)
    return assign.int(), size, weight, (layout_in, layout_out)


def check(host_kernels, x, plan, reduce, layout=()):
    assign, size, weight, layouts = plan
    y = merge(host_kernels, x, assign, size, weight, layouts, reduce, layout)
    options = (layouts[0].cu_seqlens, layouts[1].cu_seqlens, size.numel(), layouts[0].max_seqlen)
    exact, same = (
        reference.merge(v, assign, size, weight, *options, reduce, False, list(layout)) for v in (x.double(), x)
    )
    assert_close(y, exact, same)
    assert bool((y[size == 0] == 0).all())
    again = merge(host_kernels, x, assign, size, weight, layouts, reduce, layout, reverse=True)
    assert torch.equal(y.view(torch.uint8), again.view(torch.uint8))
    return y


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("width", [200, 37, 1], ids=["two_slices", "odd", "one"])
@pytest.mark.parametrize("weights", ["none", "binary", "real"])
def test_merge(host_kernels, dtype, reduce, width, weights):
    x = make_input("gaussian", (91, width), dtype=dtype)
    check(host_kernels, x, plan_of([60, 0, 31], [9, 0, 4], weights), reduce)


@settings(max_examples=40, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 17, 255, 256, 257, 700]), min_size=1, max_size=3),
    share=st.sampled_from([1, 2, 16]),
    width=st.sampled_from([2, 30, 64, 130]),
    dtype=st.sampled_from(DTYPES),
    reduce=st.sampled_from(REDUCTIONS),
    seed=st.integers(0, 2**31),
)
def test_any_merge(host_kernels, lengths, share, width, dtype, reduce, seed):
    rows = [-(-n // share) for n in lengths]
    x = make_input("gaussian", (sum(lengths), width), dtype=dtype, seed=seed)
    check(host_kernels, x, plan_of(lengths, rows, "binary", seed), reduce)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("reduce", REDUCTIONS)
@pytest.mark.parametrize("channels", [16, 5])
def test_merge_reads_a_vit_output_in_place(host_kernels, dtype, reduce, channels):
    x = make_input("gaussian", (4, 25, channels), dtype=dtype)
    x[:, 0] = torch.nan
    check(host_kernels, x, plan_of([12, 12], [5, 3]), reduce, VIT)


@pytest.mark.parametrize("cut", ["token", "batch", "offset"])
def test_merge_reads_strided_input_in_place(host_kernels, cut):
    whole = make_input("gaussian", (4, 9, 48), dtype=torch.bfloat16)
    x = {"token": whole[:, ::2, :32], "batch": whole[::2, 1:, 8:40], "offset": whole[:, :, 3:35]}[cut]
    assert not x.is_contiguous()
    check(host_kernels, x, plan_of([x.shape[1]] * x.shape[0], [3] * x.shape[0]), "mean")


@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_hub_and_many_windows(host_kernels, reduce):
    """Half of the tokens in one row, its neighbours in turns; 400 rows are more than a window holds."""
    assign, size, weight, layouts = plan_of([1500, 20], [400, 2], "real")
    assign[100:1200] = 7
    assign[200:1200:3] = 8
    size = torch.zeros(402).index_add(0, assign.long(), weight)
    check(host_kernels, make_input("gaussian", (1520, 64)), (assign, size, weight, layouts), reduce)


def test_a_segment_longer_than_the_average_takes_more_rounds(host_kernels):
    plan = plan_of([900, 5, 5, 5], [500, 1, 1, 1])
    check(host_kernels, make_input("gaussian", (915, 64), dtype=torch.float16), plan, "mean")


def test_sums_run_in_ascending_token_order(host_kernels):
    assign, size, _, layouts = plan_of([600], [3])
    x = make_input("gaussian", (600, 4))
    wanted = torch.zeros(3, 4)
    for row, token in zip(assign.tolist(), x, strict=True):
        wanted[row] += token
    assert torch.equal(merge(host_kernels, x, assign, size, None, layouts, "sum"), wanted)


def test_a_segment_alone_equals_it_in_a_batch(host_kernels):
    lengths, rows = [300, 41, 7], [40, 2, 7]
    assign, size, weight, layouts = plan_of(lengths, rows, "real")
    x = make_input("gaussian", (348, 66), dtype=torch.bfloat16)
    whole = merge(host_kernels, x, assign, size, weight, layouts, "mean")
    start = first = 0
    for n, kept in zip(lengths, rows, strict=True):
        tokens, out = slice(start, start + n), slice(first, first + kept)
        alone = merge(
            *(host_kernels, x[tokens].clone(), assign[tokens] - first, size[out].clone(), weight[tokens].clone()),
            *((VarlenLayout([n]), VarlenLayout([kept])), "mean"),
        )
        assert torch.equal(alone, whole[out])
        start, first = start + n, first + kept


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("reduce", REDUCTIONS)
def test_a_token_of_weight_zero_reaches_nothing(host_kernels, value, reduce):
    assign, size, _, layouts = plan_of([60, 31], [9, 4])
    weight = torch.ones(91)
    weight[[3, 70]] = 0
    x = make_input("gaussian", (91, 12))
    x[[3, 70]] = value
    size = torch.zeros(13).index_add(0, assign.long(), weight)
    assert bool(check(host_kernels, x, (assign, size, weight, layouts), reduce).isfinite().all())
    x[5, 2] = value
    y = check(host_kernels, x, (assign, size, weight, layouts), reduce)
    assert int((~y.isfinite()).sum()) == (0 if reduce == "max" and value == -torch.inf else 1)


def test_unaligned_pointers_take_the_scalar_path(host_kernels):
    plan = plan_of([20], [4])
    x = torch.randn(161)[1:].view(20, 8)
    assert x.data_ptr() % 8
    check(host_kernels, x, plan, "mean")


@pytest.mark.parametrize(
    ("reduction", "num_out", "message"),
    [(3, 2, r"reduction must be 0 \(sum\), 1 \(mean\) or 2 \(max\), got 3"), (0, -1, "num_out must be >= 0, got -1")],
)
def test_bad_arguments(host_kernels, reduction, num_out, message):
    x, rows = torch.empty(64), [4, 1, 6, 6, 0, 0, 4]
    with pytest.raises(RuntimeError, match=message):
        host_kernels.call("merge_rows", x, 0, rows, 6, x, x, None, x, x, 1, num_out, reduction, x)


def max_backward(host_kernels, grad, x, y, assign, weight, layout=(), reverse=False):
    num_tokens, rows = native._token_rows(x, list(layout))
    first = torch.zeros(y.shape, dtype=torch.int32)
    code = CODES[x.dtype]
    host_kernels.call("first_tokens", x, code, rows, num_tokens, y, y.shape[0], assign, weight, first, reverse=reverse)
    dx = torch.full(x.shape if layout else (num_tokens, x.shape[-1]), torch.nan, dtype=x.dtype)
    rows = native._token_rows(dx, list(layout))[1]
    host_kernels.call("gather_rows", grad, code, assign, None, None, first, rows, num_tokens, dx, reverse=reverse)
    return dx


@settings(max_examples=40, deadline=None)
@given(
    shape=st.sampled_from(["packed", "vit", "strided"]),
    width=st.sampled_from([1, 13, 64, 2056]),
    kind=st.sampled_from(["gaussian", "ties", "equal"]),
    weights=st.sampled_from(["none", "binary", "real"]),
    dtype=st.sampled_from(DTYPES),
    seed=st.integers(0, 2**31),
)
def test_the_gradient_of_a_maximum(host_kernels, shape, width, kind, weights, dtype, seed):
    """It goes to the first token that holds the maximum, NaN included, and to no token of weight 0."""
    layout = VIT if shape == "vit" else []
    lengths, rows = ([12, 12], [5, 3]) if layout else ([30, 0, 11], [4, 0, 11])
    whole = (4, 25, width) if layout else (sum(lengths), 2 * width if shape == "strided" else width)
    x = make_input("gaussian", whole, dtype=dtype, seed=seed)[..., :width]
    if kind != "gaussian":
        x = x.clamp(-0.5, 0.5) if kind == "ties" else torch.zeros_like(x)
    if seed % 2:
        x[1, ..., 0], x[-2:, ..., 0], x[3:5, ..., 0] = torch.nan, torch.nan, -torch.inf
    assign, size, weight, layouts = plan_of(lengths, rows, weights, seed)
    y = merge(host_kernels, x, assign, size, weight, layouts, "max", layout)
    grad = make_input("gaussian", y.shape, dtype=dtype, seed=seed + 1)
    wanted = reference.max_backward(grad, x, y, assign, weight, layout)
    for reverse in (False, True):
        assert torch.equal(max_backward(host_kernels, grad, x, y, assign, weight, layout, reverse), wanted)


def test_bad_arguments_of_the_gradient(host_kernels):
    x, rows = torch.empty(64), [4, 1, 6, 6, 0, 0, 4]
    with pytest.raises(RuntimeError, match="num_out must be >= 0, got -1"):
        host_kernels.call("first_tokens", x, 0, rows, 6, x, -1, x, None, x)
    with pytest.raises(RuntimeError, match=r"num_tokens must be < 2\^32 - 1, got 4294967298"):
        host_kernels.call("first_tokens", x, 0, rows, 2**32 + 2, x, 2, x, None, x)


def test_segments_of_many_rows_go_to_the_merge_by_groups():
    """tomesd's 65,536 -> 32,768, in which every block would look at all tokens for its 128 rows."""
    x, rest = torch.zeros(8, 4), (None, None, None, None, None)
    for num_out, max_seqlen_out in ((65536, 32768), (4097, 4097)):
        reason = native.cuda_supports_merge(x, *rest, num_out, max_seqlen_out, "mean", True, [])
        assert f"keeps up to {max_seqlen_out} rows" in reason
    few = native.cuda_supports_merge(x.double(), *rest, 65536, 4096, "mean", True, [])
    assert few == "x must be fp32, bf16 or fp16, got float64"
