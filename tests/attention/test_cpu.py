# SPDX-License-Identifier: Apache-2.0
"""The CPU flash kernel behind its adapter: as exact as its dtype allows, whatever the alignment, window or bias."""

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import aten_cpu, merge_partials, varlen_attention_backward, varlen_attention_forward
from lrc_kernels.attention.reference import accumulation_dtype
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, segment_lengths

NAMES = ("out", "lse", "dq", "dk", "dv")
WINDOWS = [None, (3, -1), (-1, 2), (0, 0), (4, 3)]
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# Relative to the largest element. torch's kernel takes an exponential that is exact to 2^-19 in fp32; in fp64 eager
# torch is the reference itself, whose error of 0 measures nothing.
EXACT_TO = {torch.float32: 2**-18, torch.float64: 2**-46}


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(aten_cpu, "TILE_ROWS", 4)


def run(problem, **changes):
    tensors = {name: changes.pop(name, getattr(problem, name)) for name in ("q", "k", "v", "dout")}
    options = {**problem.options, **changes}
    q, k, v = tensors["q"], tensors["k"], tensors["v"]
    with record() as ran, use_backend("cpu"):
        out, lse = varlen_attention_forward(q, k, v, **options)
        gradients = varlen_attention_backward(tensors["dout"], q, k, v, out, lse, **options)
    assert ran == [("attention_fwd", "cpu"), ("attention_bwd", "cpu")]
    return out, lse, *gradients


def assert_as_exact(problem, eager, dtype):
    exact, same_dtype = eager(problem, torch.float64), eager(problem, dtype)
    for name, got, wanted, same in zip(NAMES, run(problem), exact, same_dtype, strict=True):
        assert got.is_contiguous() and got.dtype == (dtype if name != "lse" else accumulation_dtype(problem.q))
        if dtype in EXACT_TO:
            scale = wanted.masked_fill(wanted == -torch.inf, 0).abs().amax()
            torch.testing.assert_close(
                got.double(), wanted, rtol=0, atol=EXACT_TO[dtype] * scale, msg=lambda m, name=name: f"{name}: {m}"
            )
        else:
            assert_close(got, wanted, same.to(got.dtype), name=name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("layout", ["self", "cross", "one", "decode"])
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, None), (True, (3, -1)), (False, (4, 3))])
def test_is_as_exact_as_its_dtype(make_problem, eager, dtype, layout, causal, window):
    assert_as_exact(make_problem(layout, dtype, causal=causal, window=window, head_dim=16), eager, dtype)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [True, False])
def test_bias_is_not_rounded_to_16_bits(make_problem, eager, dtype, causal):
    """A bias of 100 + x has no digits left for x in bf16, though the kernel's mask could be in that dtype."""
    problem = make_problem("cross", dtype, causal=causal, bias=True, head_dim=16)
    problem.options["key_bias"] = problem.options["key_bias"] + 100
    out, lse = run(problem)[:2]
    exact = eager(problem, torch.float64)
    plain = make_problem("cross", dtype, causal=causal, head_dim=16)
    bound = 3 * (run(plain)[0].double() - eager(plain, torch.float64)[0]).abs().max() + 3e-5
    assert (out.double() - exact[0]).abs().max() <= bound
    finite = exact[1].isfinite()
    assert torch.equal(lse.isfinite(), finite)
    assert (lse.double() - exact[1])[finite].abs().max() <= (0.05 if dtype in (torch.bfloat16, torch.float16) else 1e-4)


@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    lengths_q=segment_lengths(4, 14),
    extra=st.lists(st.integers(-6, 9), min_size=4, max_size=4),
    causal=st.booleans(),
    window=st.sampled_from(WINDOWS),
    bias=st.booleans(),
)
def test_any_layout(make_problem, eager, lengths_q, extra, causal, window, bias):
    lengths_k = [max(0, length + more) for length, more in zip(lengths_q, extra, strict=False)]
    problem = make_problem((lengths_q, lengths_k), torch.float64, causal=causal, window=window, bias=bias)
    for name, got, wanted in zip(NAMES, run(problem), eager(problem, torch.float64), strict=True):
        torch.testing.assert_close(got, wanted, rtol=1e-12, atol=1e-13, msg=lambda m, name=name: f"{name}: {m}")


@pytest.mark.parametrize("layout", ["self", ([3, 6], [3, 29])])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_a_row_of_nan_is_nan_and_no_empty_row(make_problem, dtype, layout):
    """The kernel takes a row whose logits are all NaN for one without keys, in every dtype but fp64. More keys than
    queries are read in two parts, of which one alone may hold the NaN."""
    problem = make_problem(layout, dtype, head_dim=16)
    q, k = problem.q.clone(), problem.k.clone()
    q[8, 0, 3], k[8, 1, 0] = torch.nan, torch.nan
    out, lse, *_ = run(problem, q=q, k=k)
    with use_backend("reference"):
        wanted, wanted_lse = varlen_attention_forward(q, k, problem.v, **problem.options)
    assert torch.equal(out.isnan(), wanted.isnan()) and torch.equal(lse.isnan(), wanted_lse.isnan())
    assert torch.equal(lse == -torch.inf, wanted_lse == -torch.inf)
    assert wanted.isnan().any() and out[8, 0].isnan().all() and not out[8, 1].isnan().any()


def test_a_zero_row_has_lse_zero_and_stays(make_problem):
    """lse = 0 is also what one key with the logit 0 gives: no reason to call the row spoiled, or empty."""
    problem = make_problem("self")
    out, lse, *_ = run(problem, q=torch.zeros_like(problem.q), k=problem.k.masked_fill(problem.k > 9, 0))
    assert lse[0, 0] == 0 and torch.equal(out[0], problem.v[0].repeat_interleave(2, 0))


def test_one_sequence_cannot_touch_another(make_problem):
    problem = make_problem("cross", torch.bfloat16, bias=True, head_dim=16)
    before = run(problem)
    q, k, v = problem.q.clone(), problem.k.clone(), problem.v.clone()
    q[5], k[14], v[15] = torch.nan, 1e4, torch.nan
    after = run(problem, q=q, k=k, v=v)
    for name, old, new in zip(NAMES, before, after, strict=True):
        old, new = (old.T, new.T) if name == "lse" else (old, new)
        inside = torch.zeros(len(old), dtype=torch.bool)
        inside[slice(3, 12) if name in ("out", "lse", "dq") else slice(13, 22)] = True
        assert torch.equal(old[~inside], new[~inside]) and not torch.equal(old[inside], new[inside]), name


def test_strided_inputs_and_two_runs_give_the_same_bits(make_problem):
    problem = make_problem("self", torch.bfloat16, bias=True, head_dim=16)
    first = run(problem)
    strided = {name: getattr(problem, name).mT.contiguous().mT for name in ("q", "k", "v", "dout")}
    assert not strided["q"].is_contiguous()
    for name, one, two, other in zip(NAMES, first, run(problem), run(problem, **strided), strict=True):
        assert torch.equal(one, two) and torch.equal(one, other), name


def test_empty_packs_do_not_reach_the_kernel(make_problem):
    for lengths in (([0, 0], [0, 0]), ([0, 0], [3, 2]), ([3, 2], [0, 0]), ([], [])):
        problem = make_problem(lengths)
        out, lse, dq, dk, dv = run(problem)
        assert out.shape == problem.q.shape and dk.shape == problem.k.shape
        assert torch.equal(lse, torch.full_like(lse, -torch.inf))
        assert not any(x.any() for x in (out, dq, dk, dv))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_blocks_of_keys_with_the_global_lse_sum_to_one_shot(make_problem, dtype):
    """A causal ring over one document of three chunks: the chunk before is seen whole, the chunk itself causally."""
    length, chunk = 36, 12
    problem = make_problem(([length], [length]), dtype, head_dim=16)
    wanted = run(problem)
    layout = VarlenLayout([chunk])
    chunks = [slice(i * chunk, (i + 1) * chunk) for i in range(3)]
    pairs = [(rows, keys, rows == keys) for rows in chunks for keys in chunks if keys.start <= rows.start]
    out = torch.zeros_like(problem.q)
    lse = torch.full_like(wanted[1], -torch.inf)
    dq, dk, dv = torch.zeros_like(problem.q), torch.zeros_like(problem.k), torch.zeros_like(problem.v)
    with use_backend("cpu"):
        for rows, keys, causal in pairs:
            block = varlen_attention_forward(
                problem.q[rows], problem.k[keys], problem.v[keys], cu_seqlens_q=layout, causal=causal
            )
            with use_backend(None):
                out[rows], lse[:, rows] = merge_partials(out[rows], lse[:, rows], *block)
        for rows, keys, causal in pairs:
            gradients = varlen_attention_backward(
                *(problem.dout[rows], problem.q[rows], problem.k[keys], problem.v[keys], out[rows], lse[:, rows]),
                cu_seqlens_q=layout,
                causal=causal,
            )
            for total, part, at in zip((dq, dk, dv), gradients, (rows, keys, keys), strict=True):
                total[at] += part
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    for name, got, expected in zip(NAMES, (out, lse, dq, dk, dv), wanted, strict=True):
        torch.testing.assert_close(
            got, expected, rtol=tolerance, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )


def test_declines_what_it_cannot_do(make_problem):
    problem = make_problem("self", key_bias=torch.zeros(33))
    out, lse, *_ = run(problem)
    arguments = (problem.dout, problem.q, problem.k, problem.v, out, lse)
    with use_backend("cpu"), pytest.raises(RuntimeError, match="takes no gradient of the lse"):
        varlen_attention_backward(*arguments, **problem.options, dlse=lse)
    with record() as ran:
        varlen_attention_backward(*arguments, **problem.options, dlse=lse)
    assert ran == [("attention_bwd", "reference")]


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
def test_logits_that_overflow_are_those_of_the_specification(make_problem, dtype):
    """All logits -inf is a row without keys; -inf beside finite ones counts as nothing."""
    problem = make_problem("self", dtype, head_dim=16)
    large = 1e25 if dtype == torch.float32 else 1e200
    q, k = torch.full_like(problem.q, large), torch.full_like(problem.k, -large)
    k[4] = 0
    out, lse, *_ = run(problem, q=q, k=k)
    with use_backend("reference"):
        wanted, wanted_lse = varlen_attention_forward(q, k, problem.v, **problem.options)
    assert (wanted_lse == -torch.inf).any() and (wanted_lse == 0).any()
    assert torch.equal(lse, wanted_lse) and torch.equal(out, wanted)


@pytest.mark.no_poison
def test_a_zero_row_needs_no_square_of_the_length():
    length = 4096
    q, k = torch.randn(length, 8, 16), torch.randn(length, 8, 16)
    q[0] = 0
    layout = VarlenLayout([length])
    with use_backend("cpu"), torch.profiler.profile(profile_memory=True) as profile:
        varlen_attention_forward(q, k, k, cu_seqlens_q=layout)
    largest = max(event.self_cpu_memory_usage for event in profile.events())
    assert largest <= 2 * q.numel() * q.element_size()
