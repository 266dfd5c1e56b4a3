# SPDX-License-Identifier: Apache-2.0
"""The C++ kernels of every instruction set of this machine against the fp64 reference, and what must hold bitwise."""

import dataclasses

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout, native
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close
from lrc_kernels.tome import (
    MergeBudget,
    TokenLayout,
    compress_clips,
    head_mean,
    merge_budget,
    merge_tokens,
    op,
    plan_merge,
    reference,
    unmerge_tokens,
)

if native.cpu_unavailable() is not None:
    pytest.skip(native.cpu_unavailable(), allow_module_level=True)

from lrc_kernels import _C
from tests.tome.cpu_cases import DTYPES, FORMS, ISAS, PROPERTY, random_plan, spoil_rows, tokens_in_any_form

pytestmark = pytest.mark.usefixtures("cpu_backend")


@PROPERTY
@given(
    form=FORMS,
    batch=st.integers(1, 3),
    n=st.integers(1, 9),
    heads=st.integers(1, 6),
    head_dim=st.sampled_from([1, 3, 8, 16, 20, 88, 128, 136, 260]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_head_mean(form, batch, n, heads, head_dim, dtype, isa, seed):
    x, layout = tokens_in_any_form(form, batch, n, heads * head_dim, dtype, torch.Generator().manual_seed(seed))
    _C.set_cpu_isa(isa)
    ints = layout.as_ints() if layout else []
    metric = head_mean(x, heads, layout=layout).flatten(0, -2)
    same = reference.head_mean(x, heads, ints)
    assert_close(metric, reference.head_mean(x.double(), heads, ints), same, name=isa)


def test_heads_that_straddle_the_pieces_of_a_token(random, isa):
    layout = TokenLayout(clip_frames=1, grid=(2, 4), shuffle=2, prefix=1)
    x = torch.randn(3, 9, 6, generator=random)
    same = reference.head_mean(x, 6, layout.as_ints())
    metric = head_mean(x, 6, layout=layout).flatten(0, -2)
    assert_close(metric, reference.head_mean(x.double(), 6, layout.as_ints()), same)


@pytest.mark.parametrize("spoil", [0.0, torch.nan, torch.inf, -torch.inf])
def test_spoiled_token_touches_nothing_else(spoil, isa, random):
    x = torch.randn(3, 48, 32, generator=random)
    clean, clean_plan = compress_clips(x, 6, 4, return_plan=True)
    x[1, 10] = spoil
    y, plan = compress_clips(x, 6, 4, return_plan=True)
    for clip in (0, 2):
        assert torch.equal(y[clip], clean[clip])
        rows = slice(48 * clip, 48 * clip + 48)
        assert torch.equal(plan.assign[rows], clean_plan.assign[rows])
    assert plan.weight[48 + 10] == 0 and plan.size.view(3, 6).sum(1).tolist() == [48, 47, 48]
    assert y.isfinite().all()
    # By a fixed plan a value reaches its own row alone, whatever it is.
    spoiled = merge_tokens(x, clean_plan).flatten(0, 1)
    others = torch.arange(18) != clean_plan.assign[48 + 10]
    assert torch.equal(spoiled[others], clean.flatten(0, 1)[others])


@PROPERTY
@given(
    form=st.sampled_from(["dense", "every second", "transposed", "vit"]),
    batch=st.integers(0, 3),
    n=st.integers(1, 40),
    head_dim=st.sampled_from([1, 8, 32, 88]),
    precision=st.sampled_from(["fp32", "bf16"]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    threads=st.integers(1, 2),
    seed=st.integers(0, 2**31),
)
def test_the_whole_has_the_bits_of_its_steps(form, batch, n, head_dim, precision, dtype, isa, threads, seed):
    x, layout = tokens_in_any_form(form, batch, n, 3 * head_dim, dtype, torch.Generator().manual_seed(seed))
    _C.set_cpu_isa(isa)
    metric = head_mean(x, 3, layout=layout)
    target = 1 + seed % metric.shape[1]
    steps = plan_merge(metric, target=target, precision=precision)
    torch.set_num_threads(threads)
    try:
        with record() as ran:
            y, plan = compress_clips(x, target, 3, layout=layout, precision=precision, return_plan=True)
    finally:
        torch.set_num_threads(1)
    assert ran == [("tome_compress_fwd", "cpu")]
    assert torch.equal(y, merge_tokens(x, steps, layout=layout))
    for name in ("assign", "size", "weight", "anchor"):
        assert torch.equal(getattr(plan, name), getattr(steps, name)), name


def test_every_token_spoiled(isa):
    y, plan = compress_clips(torch.zeros(2, 33, 16), 5, 2, return_plan=True)
    with use_backend("reference"), record() as ran:
        expected = compress_clips(torch.zeros(2, 33, 16), 5, 2, return_plan=True)[1]
    assert {backend for _, backend in ran} == {"reference"}
    assert torch.equal(plan.assign, expected.assign) and torch.equal(plan.size, expected.size)
    assert torch.equal(y, torch.zeros(2, 5, 16))


@PROPERTY
@given(
    form=FORMS,
    batch=st.integers(1, 3),
    n=st.integers(1, 17),
    width=st.sampled_from([1, 3, 16, 40, 88, 130, 2050]),
    num_out=st.integers(1, 9),
    weights=st.sampled_from(["none", "binary", "real"]),
    reduce=st.sampled_from(op.REDUCTIONS),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_merge_and_gather(form, batch, n, width, num_out, weights, reduce, dtype, isa, seed):
    generator = torch.Generator().manual_seed(seed)
    x, layout = tokens_in_any_form(form, batch, n, width, dtype, generator)
    ints = layout.as_ints() if layout else []
    num_tokens = reference.tokens_of(x, ints).flatten(0, -2).shape[0]
    assign, size, weight = random_plan(num_tokens, num_out, weights, generator)
    if weights == "binary":
        x = spoil_rows(x, ints, weight == 0)
        size[-1] = 0
    cu = torch.zeros(2, dtype=torch.int64)
    rest = (weight, cu, cu, num_out, num_tokens, reduce, weights != "real", ints)
    _C.set_cpu_isa(isa)
    y = op.merge_op(x, assign, size, *rest)
    assert_close(y, reference.merge(x.double(), assign, size, *rest), reference.merge(x, assign, size, *rest), name=isa)
    if reduce == "max":
        upstream = torch.randn(y.shape, generator=generator).to(dtype)
        dx = op.max_backward_op(upstream, x, y, assign, weight, ints)
        assert torch.equal(dx, reference.max_backward(upstream, x, y, assign, weight, ints))
        return
    for divisor in (None, size):
        back = op.gather_op(y, assign, divisor, weight, ints)
        expected = reference.gather(y.double(), assign, divisor, weight, ints)
        assert_close(back, expected, reference.gather(y, assign, divisor, weight, ints), name=isa)


def test_backward_of_the_merge_runs_on_the_kernels(isa, random, cpu_backend):
    layout = TokenLayout(clip_frames=2, grid=(8, 8), shuffle=2, prefix=1)
    x = torch.randn(4, layout.rows_per_frame, 24, generator=random, requires_grad=True)
    y, plan = compress_clips(x, 4, 8, layout=layout, return_plan=True)
    grad = torch.randn(y.shape, generator=random)
    y.backward(grad)
    assert ("tome_gather_fwd", "cpu") in cpu_backend
    share = (plan.weight / plan.size[plan.assign.long()])[:, None] * grad.flatten(0, 1)[plan.assign.long()]
    torch.testing.assert_close(x.grad, reference.rows_of(share, layout.as_ints()))


@pytest.mark.parametrize("dtype", DTYPES)
def test_conversions_of_every_16_bit_pattern(dtype, isa):
    """A merge of single tokens is load and store: each bit pattern comes back, and sums round to nearest even."""
    if dtype == torch.float32:
        x = torch.tensor([0.0, 1e-45, 1e-38, 3e38, torch.inf, -torch.inf, torch.nan, -1.5] * 8).view(1, 64)
    else:
        x = torch.arange(-(2**15), 2**15, dtype=torch.int16).view(dtype).view(1024, 64)
    n = x.shape[0]
    plan = plan_merge(torch.randn(n, 4), merge_budget(VarlenLayout([n]), r=0))
    assert torch.equal(merge_tokens(x, plan).nan_to_num(7.0), x.nan_to_num(7.0))
    halves = torch.stack([x, x.roll(1, 0).roll(5, 1)], 1).flatten(0, 1)
    cu = torch.zeros(2, dtype=torch.int64)
    assign = torch.arange(2 * n).div(2, rounding_mode="floor").int()
    y = op.merge_op(halves, assign, torch.full((n,), 2.0), None, cu, cu, n, 2 * n, "sum", True, [])
    assert torch.equal(y.nan_to_num(7.0), (halves[0::2].float() + halves[1::2].float()).to(dtype).nan_to_num(7.0))


def test_nan_stays_nan_whatever_its_bits(isa):
    """Rounding to bf16 carries into the exponent: a NaN with all lower bits set must not become -0."""
    nan = torch.tensor([0x7FFFFFFF, -1], dtype=torch.int32).view(torch.float32)
    for dtype in DTYPES:
        y = torch.ones(1, 40, dtype=dtype)
        assert op.gather_op(y, torch.zeros(2, dtype=torch.int32), None, nan, []).isnan().all()


def test_half_of_the_tokens_in_one_group(isa, random):
    x = torch.randn(1, 512, 96, generator=random)
    metric = torch.randn(1, 512, 8, generator=random)
    metric[:, 0::2] = 5 * metric[:, 255:256] + 0.01 * metric[:, 0::2]
    plan = plan_merge(metric, target=256)
    assert plan.size.max() == 257
    y = merge_tokens(x, plan)
    with use_backend("reference"):
        assert_close(y, merge_tokens(x.double(), plan), merge_tokens(x, plan))


@pytest.mark.parametrize("dtype", DTYPES)
def test_same_bits_alone_in_a_batch_again_and_on_two_threads(dtype, isa, random):
    x = torch.randn(3, 130, 88 * 2, generator=random).to(dtype)
    y, plan = compress_clips(x, 17, 2, return_plan=True)
    assert torch.equal(compress_clips(x, 17, 2), y)
    for clip in range(3):
        assert torch.equal(compress_clips(x[clip : clip + 1], 17, 2)[0], y[clip])
    torch.set_num_threads(2)
    try:
        assert torch.equal(compress_clips(x, 17, 2), y)
        assert torch.equal(unmerge_tokens(y, plan), y.flatten(0, 1)[plan.assign.long()].view(x.shape))
        # One clip on two threads shares its matching, several clips share the clips.
        assert torch.equal(compress_clips(x[:1], 17, 2)[0], y[0])
    finally:
        torch.set_num_threads(1)


@pytest.mark.no_poison
def test_offsets_past_two_billion_elements(isa, random):
    """The pages between the two clips are never touched, so that 4 GiB of addresses cost no memory."""
    far = torch.empty(2**31 + 2**12, dtype=torch.bfloat16).as_strided((2, 16, 64), (2**31, 64, 1))
    x = torch.randn(2, 16, 64, generator=random).bfloat16()
    far.copy_(x)
    assert torch.equal(compress_clips(far, 4, 4), compress_clips(x, 4, 4))


def test_empty_inputs(isa):
    y, plan = compress_clips(torch.zeros(0, 16, 8), 4, 2, return_plan=True)
    assert y.shape == (0, 4, 8) and plan.assign.shape == (0,)
    empty = plan_merge(torch.zeros(0, 4), merge_budget(VarlenLayout([0, 0]), r=[3, 1]))
    assert merge_tokens(torch.zeros(0, 9), empty).shape == (0, 9)


def test_declines_fp64(random):
    x = torch.randn(1, 8, 4, generator=random)
    plan = plan_merge(x, target=4)
    for call in (
        lambda: head_mean(x.double(), 2),
        lambda: plan_merge(x.double(), target=4),
        lambda: merge_tokens(x.double(), plan),
        lambda: unmerge_tokens(x[:, :4].double(), plan),
    ):
        with pytest.raises(RuntimeError, match="fp32"):
            call()


def test_a_plan_that_does_not_fit_is_refused(random):
    x = torch.randn(1, 8, 4, generator=random)
    plan = plan_merge(x, target=4)
    with pytest.raises(ValueError, match=r"assign must lie in \[0, 4\), got 4 for token 7"):
        merge_tokens(x, dataclasses.replace(plan, assign=torch.tensor([0] * 7 + [4], dtype=torch.int32)))
    short = MergeBudget(VarlenLayout([8]), VarlenLayout([3]), torch.tensor([[4]], dtype=torch.int32))
    with pytest.raises(ValueError, match="room"):
        plan_merge(x.flatten(0, 1), short)


def test_instruction_set_is_checked():
    with pytest.raises(ValueError, match="baseline, avx2, avx512 or avx512_bf16, got sse9"):
        _C.set_cpu_isa("sse9")
    assert native.cpu_isa() == _C.cpu_isa() and native.cpu_isa() in ISAS


def test_a_declined_dtype_is_named_by_its_argument():
    plan = plan_merge(torch.randn(2, 8, 4), target=4)
    with use_backend("cpu"):
        with pytest.raises(RuntimeError, match="x must be fp32, bf16 or fp16, got float64"):
            merge_tokens(torch.zeros(2, 8, 3, dtype=torch.float64), plan)
        with pytest.raises(RuntimeError, match="y must be fp32, bf16 or fp16, got float64"):
            unmerge_tokens(torch.zeros(2, 4, 3, dtype=torch.float64), plan)
