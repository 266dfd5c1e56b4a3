# SPDX-License-Identifier: Apache-2.0
"""The specification of attention against dense eager attention in fp64, and what makes it the block of a ring."""

import itertools

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import (
    AttentionState,
    merge_partials,
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_forward,
)
from lrc_kernels.attention.reference import visible
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, segment_lengths

NAMES = ("out", "lse", "dq", "dk", "dv")
WINDOWS = [None, (3, -1), (-1, 2), (0, 0), (4, 3)]


@pytest.fixture(autouse=True)
def _on_reference():
    with use_backend("reference"):
        yield


def run(problem, q=None, k=None, v=None, **options):
    q, k, v = (problem.q if q is None else q), (problem.k if k is None else k), (problem.v if v is None else v)
    options = {**problem.options, **options}
    out, lse = varlen_attention_forward(q, k, v, **options)
    return out, lse, *varlen_attention_backward(problem.dout.to(q.dtype), q, k, v, out, lse, **options)


@pytest.mark.parametrize("layout", ["self", "cross", "one", "decode"])
@pytest.mark.parametrize(("causal", "bias"), [(True, False), (False, True), (True, True), (False, False)])
@pytest.mark.parametrize("window", WINDOWS)
def test_equals_dense_attention(make_problem, eager, layout, causal, bias, window):
    problem = make_problem(layout, torch.float64, causal=causal, bias=bias, window=window)
    for name, got, wanted in zip(NAMES, run(problem), eager(problem, torch.float64), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("heads", [(4, 4), (6, 2), (3, 1)])
def test_is_as_exact_as_its_dtype(make_problem, eager, dtype, heads):
    problem = make_problem("cross", dtype, heads=heads, bias=True, softmax_scale=0.4)
    exact, same_dtype = eager(problem, torch.float64), eager(problem, dtype)
    for name, got, wanted, same in zip(NAMES, run(problem), exact, same_dtype, strict=True):
        assert got.dtype == (torch.float32 if name == "lse" else dtype) and got.is_contiguous()
        assert_close(got, wanted, same.to(got.dtype), name=name)


@settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths_q=segment_lengths(5, 12),
    extra=st.lists(st.integers(-6, 9), min_size=5, max_size=5),
    causal=st.booleans(),
    window=st.sampled_from(WINDOWS),
    bias=st.booleans(),
)
def test_any_layout(make_problem, eager, lengths_q, extra, causal, window, bias):
    lengths_k = [max(0, length + more) for length, more in zip(lengths_q, extra, strict=False)]
    problem = make_problem((lengths_q, lengths_k), torch.float64, causal=causal, window=window, bias=bias)
    for name, got, wanted in zip(NAMES, run(problem), eager(problem, torch.float64), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


def test_rows_without_a_key_are_zero(make_problem):
    problem = make_problem(([3, 2, 4], [1, 0, 4]), key_bias=torch.tensor([0.0, *[-torch.inf] * 4]))
    out, lse, dq, dk, dv = run(problem)
    empty = torch.tensor([True, True, False, True, True, True, True, True, True])
    assert torch.equal(lse == -torch.inf, empty.expand(4, 9))
    assert not out[empty].any() and not dq[empty].any() and out[2].any()
    assert not dk[1:].any() and not dv[1:].any() and dv[0].any()


def test_diagonal_ends_at_the_last_key():
    distance = torch.arange(4) - (torch.arange(2)[:, None] + 4 - 2)
    assert visible(distance, True, -1, -1).tolist() == [[True, True, True, False], [True, True, True, True]]
    assert visible(distance, False, 1, 0).tolist() == [[False, True, True, False], [False, False, True, True]]


def split_keys(problem, num_blocks):
    """Blocks of keys, dealt out token by token: (k rows, layout of these rows) for each block."""
    lengths = problem.options["cu_seqlens_k"].lengths
    sequence = torch.repeat_interleave(torch.arange(len(lengths)), torch.tensor(lengths))
    for block in range(num_blocks):
        rows = torch.arange(block, len(sequence), num_blocks)
        yield rows, VarlenLayout(torch.bincount(sequence[rows], minlength=len(lengths)).tolist())


@pytest.mark.parametrize("layout", ["self", "cross", "decode"])
@pytest.mark.parametrize("bias", [False, True])
def test_blocks_of_keys_with_the_global_lse_sum_to_one_shot(make_problem, layout, bias):
    problem = make_problem(layout, torch.float64, causal=False, bias=bias)
    wanted = run(problem)
    key_bias = problem.options.get("key_bias")
    blocks = []
    for rows, keys in split_keys(problem, 3):
        options = {**problem.options, "cu_seqlens_k": keys, "key_bias": None if key_bias is None else key_bias[rows]}
        blocks.append((rows, options))
    state = AttentionState.zeros(*problem.q.shape, dtype=torch.float64)
    out, lse = torch.zeros_like(problem.q), torch.full_like(wanted[1], -torch.inf)
    for rows, options in blocks:
        partial = varlen_attention_forward(problem.q, problem.k[rows], problem.v[rows], **options)
        out, lse = merge_partials(out, lse, *partial)
        assert state.accumulate(problem.q, problem.k[rows], problem.v[rows], **options) is state
    dq, dk, dv = torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    for rows, options in blocks:
        gradients = varlen_attention_backward(
            problem.dout, problem.q, problem.k[rows], problem.v[rows], out, lse, **options
        )
        dq, dk[rows], dv[rows] = dq + gradients[0], gradients[1], gradients[2]
    for got, expected in zip((out, lse, dq, dk, dv, *state.finish()), (*wanted, *wanted[:2]), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-11, atol=1e-12)


def test_state_of_16_bit_blocks_is_exact_to_fp32(make_problem, eager):
    """No partial result is rounded to bf16: the error of eight blocks is that of one."""
    problem = make_problem(([16, 16], [64, 40]), torch.bfloat16, causal=False, head_dim=16)
    state = AttentionState.zeros(*problem.q.shape)
    with record() as ran:
        for rows, keys in split_keys(problem, 8):
            options = {**problem.options, "cu_seqlens_k": keys}
            state.accumulate(problem.q, problem.k[rows], problem.v[rows], **options)
    assert ran == [("attention_accumulate_", "reference")] * 8
    out, lse = state.finish()
    exact = eager(problem, torch.float64)
    torch.testing.assert_close(out.double(), exact[0], rtol=2e-6, atol=2e-6)
    torch.testing.assert_close(lse.double(), exact[1], rtol=2e-6, atol=2e-6)


EMPTY, NAN, PLUS = -torch.inf, torch.nan, torch.inf


@pytest.mark.parametrize(
    ("lse", "lse_block"), list(itertools.product([0.7, EMPTY, NAN, PLUS], [200.7, EMPTY, NAN, PLUS]))
)
@pytest.mark.parametrize("garbage", [0.0, NAN, PLUS])
def test_merge_of_every_kind_of_row(lse, lse_block, garbage):
    """The rows of facts 2.1: what an empty block holds is never multiplied, and no merge makes a NaN of its own."""
    finite, finite_block = abs(lse) < 1e9, abs(lse_block) < 1e9
    out = torch.full((1, 1, 2), 3.0 if finite else garbage)
    out_block = torch.full((1, 1, 2), 5.0 if finite_block else garbage)
    merged, merged_lse = merge_partials(out, torch.tensor([[lse]]), out_block, torch.tensor([[lse_block]]))
    if finite_block:
        wanted, wanted_lse = 5.0, lse_block
    elif finite:
        wanted, wanted_lse = 3.0, lse
    elif NAN in (lse, lse_block):
        wanted, wanted_lse = NAN, NAN
    else:
        wanted, wanted_lse = 0.0, EMPTY
    torch.testing.assert_close(merged, torch.full_like(merged, wanted), rtol=0, atol=0, equal_nan=True)
    torch.testing.assert_close(merged_lse, torch.tensor([[wanted_lse]]), rtol=0, atol=0, equal_nan=True)


def test_merge_is_exact_and_never_narrower_than_fp32(random):
    out, out_block = (torch.randn(5, 3, 4, generator=random).bfloat16() for _ in range(2))
    lse, lse_block = (torch.randn(3, 5, generator=random) for _ in range(2))
    merged, merged_lse = merge_partials(out, lse, out_block, lse_block)
    assert merged.dtype == merged_lse.dtype == torch.float32
    weights = torch.stack([lse, lse_block]).double().softmax(0).transpose(1, 2)[..., None]
    wanted = weights[0] * out.double() + weights[1] * out_block.double()
    torch.testing.assert_close(merged.double(), wanted, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(merged_lse, torch.logaddexp(lse, lse_block))
    assert merge_partials(out, lse.double(), out_block, lse_block)[0].dtype == torch.float64


def test_one_sequence_cannot_touch_another(make_problem):
    problem = make_problem("cross", bias=True)
    before = run(problem)
    q, k, v = problem.q.clone(), problem.k.clone(), problem.v.clone()
    # Sequence 2: rows 3..11 of q, 13..21 of k.
    q[5], k[14], v[15] = torch.nan, torch.inf, torch.nan
    after = run(problem, q, k, v)
    others_q, others_k = torch.arange(23), torch.arange(30)
    others_q, others_k = others_q[(others_q < 3) | (others_q >= 12)], others_k[(others_k < 13) | (others_k >= 22)]
    for name, old, new in zip(NAMES, before, after, strict=True):
        rows = others_q if name in ("out", "lse", "dq") else others_k
        old, new = (old.T, new.T) if name == "lse" else (old, new)
        assert torch.equal(old[rows], new[rows]), name
    assert after[0][5].isnan().all() and after[1][:, 5].isnan().all()


def test_gradcheck(make_problem):
    problem = make_problem(([2, 0, 3, 1], [4, 1, 2, 0]), torch.float64, heads=(2, 1), head_dim=3, bias=True)
    inputs = tuple(x.requires_grad_() for x in (problem.q, problem.k, problem.v))

    def attend(q, k, v):
        out, lse = varlen_attention(q, k, v, **problem.options, return_lse=True)
        return out, lse.masked_fill(lse == -torch.inf, 0)

    assert torch.autograd.gradcheck(attend, inputs)
