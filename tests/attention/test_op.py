# SPDX-License-Identifier: Apache-2.0
"""The public attention functions as PyTorch sees them: gradients, opcheck, compile, autocast, checkpoint, bad input."""

import dataclasses

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.checkpoint import checkpoint

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import (
    AttentionState,
    arguments,
    merge_partials,
    varlen_attention,
    varlen_attention_backward,
    varlen_attention_forward,
)
from lrc_kernels.backend import record, use_backend

BACKENDS = ["cpu", "reference"]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(("causal", "window"), [(True, None), (False, (2, 1))])
def test_gradients(make_problem, backend, causal, window):
    problem = make_problem(([2, 0, 3, 1], [4, 1, 2, 0]), torch.float64, heads=(4, 2), head_dim=3, bias=True)
    inputs = tuple(x.requires_grad_() for x in (problem.q, problem.k, problem.v))
    options = {**problem.options, "causal": causal, "window": window}
    with use_backend(backend), record() as ran:
        assert torch.autograd.gradcheck(lambda *qkv: varlen_attention(*qkv, **options), inputs)
    assert set(ran) == {("attention_fwd", backend), ("attention_bwd", backend)}


def test_gradient_of_the_lse_reaches_a_backend_that_takes_it(make_problem):
    problem = make_problem("cross", torch.float64, head_dim=3)
    inputs = tuple(x.requires_grad_() for x in (problem.q, problem.k, problem.v))

    def lse_of(*qkv):
        lse = varlen_attention(*qkv, **problem.options, return_lse=True)[1]
        return lse.masked_fill(lse == -torch.inf, 0)

    with record() as ran:
        assert torch.autograd.gradcheck(lse_of, inputs)
    assert ("attention_bwd", "reference") in ran and ("attention_fwd", "cpu") in ran
    with record() as ran:
        varlen_attention(*inputs, **problem.options, return_lse=True)[0].sum().backward()
    assert ran[-1] == ("attention_bwd", "cpu")


def test_gradient_of_a_gradient_raises(make_problem):
    problem = make_problem("self")
    q = problem.q.requires_grad_()
    out = varlen_attention(q, problem.k, problem.v, **problem.options)
    (dq,) = torch.autograd.grad(out.square().sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="no second-order gradient"):
        dq.sum().backward()


def test_merge_gradients(random):
    out, out_block = (torch.randn(3, 2, 4, generator=random, dtype=torch.float64) for _ in range(2))
    lse, lse_block = (torch.randn(2, 3, generator=random, dtype=torch.float64) for _ in range(2))
    inputs = tuple(x.requires_grad_() for x in (out, lse, out_block, lse_block))
    assert torch.autograd.gradcheck(merge_partials, inputs)
    assert torch.autograd.gradgradcheck(merge_partials, inputs)


def test_merge_gives_an_empty_row_no_gradient(random):
    out, out_block = (torch.randn(2, 1, 4, generator=random) for _ in range(2))
    out_block[0] = torch.nan
    lse, lse_block = torch.tensor([[0.5, 0.25]]), torch.tensor([[-torch.inf, 0.75]])
    inputs = tuple(x.requires_grad_() for x in (out, lse, out_block, lse_block))
    merged, merged_lse = merge_partials(*inputs)
    (merged.sum() + merged_lse.sum()).backward()
    assert torch.equal(out.grad[0], torch.ones(1, 4)) and lse.grad[0, 0] == 1
    assert not out_block.grad[0].any() and lse_block.grad[0, 0] == 0
    assert all(x.grad.isfinite().all() for x in inputs)


def op_samples(make_problem, dtype):
    problem = make_problem("cross", dtype, bias=True)
    q, k, v, options = problem.q, problem.k, problem.v, problem.options
    offsets = (options["cu_seqlens_q"].cu_seqlens, options["cu_seqlens_k"].cu_seqlens)
    pack = (*offsets, options["key_bias"], 9, 9, True, 0.3, -1, -1)
    out, lse = varlen_attention_forward(q, k, v, **options, softmax_scale=0.3)
    state = AttentionState.zeros(*q.shape, dtype=lse.dtype)
    yield "attention_fwd", (q, k, v, *pack)
    yield "attention_bwd", (problem.dout, q, k, v, out, lse, None, *pack)
    yield "attention_accumulate_", (state.acc, state.m, state.l, q, k, v, *pack)
    yield "attention_merge_partials", (out, lse, out.flip(0).float(), lse.flip(1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_opcheck(make_problem, dtype):
    """With the backend that each op takes by itself on this machine, and again on the specification."""
    seen = set()
    for backend in (None, "reference"):
        with use_backend(backend):
            for name, args in op_samples(make_problem, dtype):
                torch.library.opcheck(getattr(torch.ops.lrc, name).default, args)
                seen.add(name)
    assert seen == {"attention_fwd", "attention_bwd", "attention_accumulate_", "attention_merge_partials"}


def packs(random, count):
    for _ in range(count):
        num_sequences = int(torch.randint(2, 12, (), generator=random))
        lengths = [torch.randint(1, 9, (num_sequences,), generator=random).tolist() for _ in range(2)]
        layouts = VarlenLayout(lengths[0]), VarlenLayout(lengths[1])
        rows = (layouts[0].num_tokens, 4), (layouts[1].num_tokens, 2), (layouts[1].num_tokens, 2)
        yield (*(torch.randn(*shape, 8, generator=random) for shape in rows), *layouts)


def attend(q, k, v, layout_q, layout_k):
    return varlen_attention(q, k, v, cu_seqlens_q=layout_q, cu_seqlens_k=layout_k)


def attend_to_itself(q, k, v, layout_q, layout_k):
    """Offsets of the keys that are those of the queries: one tensor twice."""
    return varlen_attention(q, q[:, :2].sin(), q[:, 2:].cos(), cu_seqlens_q=layout_q) + 0 * (k.sum() + v.sum())


def attend_tensors(q, k, v, layout_q, layout_k):
    lengths = {"max_seqlen_q": layout_q.max_seqlen, "max_seqlen_k": layout_k.max_seqlen}
    offsets = {"cu_seqlens_q": layout_q.cu_seqlens, "cu_seqlens_k": layout_k.cu_seqlens}
    return varlen_attention(q, k, v, **offsets, **lengths, causal=False, return_lse=True)[0]


def attend_in_blocks(q, k, v, layout_q, layout_k):
    options = {"cu_seqlens_q": layout_q, "cu_seqlens_k": layout_k}
    state = AttentionState.zeros(*q.shape)
    with torch.no_grad():
        state.accumulate(q, k, v, **options).accumulate(q, k + 1, v, **options, causal=False)
    merged = merge_partials(*state.finish(), *varlen_attention_forward(q, k, v, **options))
    return merged[0]


@pytest.mark.no_poison
@pytest.mark.parametrize("function", [attend, attend_to_itself, attend_tensors, attend_in_blocks])
def test_twenty_packs_need_two_compiles(random, function):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(function, fullgraph=True, backend=counter)
    for q, k, v, layout_q, layout_k in packs(random, 20):
        gradients, backends = [], []
        for run in (compiled, function):
            inputs = [x.clone().requires_grad_() for x in (q, k, v)]
            with record() as ran:
                out = run(*inputs, layout_q, layout_k)
                out.square().sum().backward()
            gradients.append([out.detach(), *(x.grad for x in inputs)])
            backends.append(ran)
        # A compiled graph passes zeros for the gradient of an lse that nothing uses, which the CPU kernel cannot take.
        exact = function in (attend, attend_to_itself)
        assert backends[0] == backends[1] or not exact
        for got, wanted in zip(*gradients, strict=True):
            torch.testing.assert_close(got, wanted, rtol=0 if exact else 1e-5, atol=0 if exact else 1e-5)
    assert counter.frame_count <= 2


def test_compile_asks_for_the_length_it_would_have_to_read(random):
    q, k, v, layout_q, layout_k = next(packs(random, 1))
    compiled = torch.compile(
        lambda starts: varlen_attention(q, k, v, cu_seqlens_q=starts, cu_seqlens_k=layout_k),
        backend="eager",
        fullgraph=True,
    )
    with pytest.raises(Exception, match="max_seqlen_q must be given inside torch.compile"):
        compiled(layout_q.cu_seqlens)


@pytest.mark.parametrize("backend", BACKENDS)
def test_autocast_casts_q_k_v_and_nothing_else(make_problem, backend):
    problem = make_problem("cross", bias=True)
    inputs = [x.requires_grad_() for x in (problem.q, problem.k, problem.v)]
    with use_backend(backend):
        with torch.autocast("cpu", dtype=torch.bfloat16):
            out, lse = varlen_attention(*inputs, **problem.options, return_lse=True)
            direct = torch.ops.lrc.attention_fwd(
                *(x.detach() for x in inputs),
                *(problem.options[f"cu_seqlens_{name}"].cu_seqlens for name in "qk"),
                *(problem.options["key_bias"], 9, 9, True, 8**-0.5, -1, -1),
            )
        out.float().square().sum().backward()
        half = [x.detach().bfloat16().requires_grad_() for x in inputs]
        wanted, wanted_lse = varlen_attention(*half, **problem.options, return_lse=True)
        wanted.float().square().sum().backward()
    assert out.dtype == torch.bfloat16 and lse.dtype == torch.float32
    assert torch.equal(out, wanted) and torch.equal(lse, wanted_lse)
    assert torch.equal(direct[0], wanted) and torch.equal(direct[1], wanted_lse)
    for given, cast in zip(inputs, half, strict=True):
        assert given.grad.dtype == torch.float32 and torch.equal(given.grad, cast.grad.float())


def test_autocast_leaves_the_state_and_fp64_alone(make_problem):
    problem = make_problem("self", bias=True)
    state = AttentionState.zeros(*problem.q.shape)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        state.accumulate(problem.q, problem.k, problem.v, **problem.options)
        out, lse = state.finish()
        merged, _ = merge_partials(out, lse, out, lse)
        wide = make_problem("self", torch.float64)
        assert varlen_attention(wide.q, wide.k, wide.v, **wide.options).dtype == torch.float64
    half = varlen_attention(*(x.bfloat16() for x in (problem.q, problem.k, problem.v)), **problem.options)
    torch.testing.assert_close(out, half.float(), rtol=1e-2, atol=1e-2)
    torch.testing.assert_close(merged, out)


@pytest.mark.parametrize("backend", BACKENDS)
def test_checkpoint_gives_the_same_gradient(make_problem, backend):
    problem = make_problem("self")
    q = problem.q.requires_grad_()
    run = lambda q: varlen_attention(q, problem.k, problem.v, **problem.options)  # noqa: E731
    with use_backend(backend):
        run(q).square().sum().backward()
        wanted, q.grad = q.grad, None
        checkpoint(run, q, use_reentrant=False).square().sum().backward()
    assert torch.equal(q.grad, wanted)


def test_a_changed_state_is_noticed_by_autograd(make_problem):
    """What kernels write through pointers must count as a write, or a saved tensor would be stale in silence."""
    problem = make_problem("self")
    state = AttentionState.zeros(*problem.q.shape)
    weight = torch.ones_like(state.acc).requires_grad_()
    product = (weight * state.acc).sum()
    state.accumulate(problem.q, problem.k, problem.v, **problem.options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_state_refuses_gradients_and_other_shapes(make_problem):
    problem = make_problem("self")
    state = AttentionState.zeros(*problem.q.shape)
    with pytest.raises(ValueError, match="must not require a gradient"):
        state.accumulate(problem.q.clone().requires_grad_(), problem.k, problem.v, **problem.options)
    other = make_problem("cross")
    with pytest.raises(ValueError, match=r"q must have the state's shape \[33, 4, 8\], got \[23, 4, 8\]"):
        state.accumulate(other.q, other.k, other.v, **other.options)
    wide = make_problem("self", torch.float64)
    with pytest.raises(TypeError, match=r"state's dtype \(torch.float32\), got torch.float64"):
        state.accumulate(wide.q, wide.k, wide.v, **wide.options)
    with pytest.raises(TypeError, match="dtype must be torch.float32 or torch.float64, got torch.bfloat16"):
        AttentionState.zeros(1, 1, 1, dtype=torch.bfloat16)
    with pytest.raises(ValueError, match="num_rows must be >= 0, got -1"):
        AttentionState.zeros(-1, 1, 1)


@pytest.mark.parametrize("backend", BACKENDS)
def test_offsets_of_every_kind_are_the_same(make_problem, backend):
    problem = make_problem("self")
    layout = problem.options["cu_seqlens_q"]
    with use_backend(backend):
        wanted = varlen_attention(problem.q, problem.k, problem.v, **problem.options)
        for offsets, longest in (
            (layout, None),
            (layout.cu_seqlens, None),
            (layout.cu_seqlens.long(), 20),
            (layout, 64),
        ):
            out = varlen_attention(problem.q, problem.k, problem.v, cu_seqlens_q=offsets, max_seqlen_q=longest)
            assert torch.equal(out, wanted)


def test_strided_offsets_reach_kernels_contiguous(make_problem, monkeypatch):
    """Kernels read them as they lie; where values are not read, no layout is made of them."""
    problem = make_problem("self")
    offsets = problem.options["cu_seqlens_q"].cu_seqlens
    strided = torch.stack((offsets, offsets.flip(0)), 1)[:, 0]
    monkeypatch.setattr(arguments, "values_are_checked", lambda value: False)
    pack = arguments.check_pack(
        problem.q, problem.k, problem.v, strided, None, 64, None, causal=True, softmax_scale=None, key_bias=None,
        window=None,
    )  # fmt: skip
    assert pack.cu_seqlens_q.is_contiguous() and torch.equal(pack.cu_seqlens_q, offsets)
    assert VarlenLayout.on_device(strided, 64, problem.q.shape[0]).cu_seqlens.is_contiguous()


def bad(**changes):
    """A good call of four queries and four keys in two sequences, with some arguments changed."""
    layout = VarlenLayout([2, 2])
    arguments = {"q": torch.ones(4, 4, 8), "k": torch.ones(4, 2, 8), "v": torch.ones(4, 2, 8), "cu_seqlens_q": layout}
    return lambda: varlen_attention(**{**arguments, **changes})


def bad_backward(**changes):
    q, layout = torch.ones(4, 2, 8), VarlenLayout([2, 2])
    arguments = {"dout": q, "q": q, "k": q, "v": q, "out": q, "lse": torch.ones(2, 4), "cu_seqlens_q": layout}
    return lambda: varlen_attention_backward(**{**arguments, **changes})


def bad_merge(**changes):
    arguments = {"out": torch.ones(4, 2, 8), "lse": torch.ones(2, 4), "out_block": torch.ones(4, 2, 8)}
    return lambda: merge_partials(**{**arguments, "lse_block": torch.ones(2, 4), **changes})


ONES = torch.ones
BAD_CALLS = {
    "q is no tensor": (bad(q=[1.0]), TypeError, "q must be a tensor, got list"),
    "q is integer": (bad(q=ONES(4, 4, 8).long()), TypeError, "q must be one of.*int64"),
    "q is flat": (bad(q=ONES(4, 32)), ValueError, r"q must have 3 dimensions, got shape \[4, 32\]"),
    "two dtypes": (bad(k=ONES(4, 2, 8).bfloat16()), TypeError, "k must have the dtype of q.*got torch.bfloat16"),
    "two devices": (bad(v=ONES(4, 2, 8, device="meta")), ValueError, "v must be on cpu.*got meta"),
    "k and v": (bad(v=ONES(4, 1, 8)), ValueError, r"v must have the shape of k \[4, 2, 8\], got \[4, 1, 8\]"),
    "head dim": (bad(q=ONES(4, 4, 6)), ValueError, r"head dim of q \(6\).*got 8"),
    "heads": (bad(q=ONES(4, 3, 8)), ValueError, r"divides that of q \(3\), got 2"),
    "no heads": (bad(k=ONES(4, 0, 8), v=ONES(4, 0, 8)), ValueError, r"divides that of q \(4\), got 0"),
    "rows of q": (bad(cu_seqlens_q=VarlenLayout([2, 1])), ValueError, "cover exactly the 4 rows of q, got 3"),
    "rows of k": (bad(cu_seqlens_k=VarlenLayout([2, 4])), ValueError, "cover exactly the 4 rows of k, got 6"),
    "rows of a tensor": (bad(cu_seqlens_q=torch.tensor([0, 2, 3])), ValueError, "exactly the 4 rows of q, got 3"),
    "rows without layout": (bad(k=ONES(6, 2, 8), v=ONES(6, 2, 8)), ValueError, "cu_seqlens_k must be given.*got 6, 4"),
    "sequences": (bad(cu_seqlens_k=VarlenLayout([4])), ValueError, r"as many sequences as cu_seqlens_q \(2\), got 1"),
    "offsets fall": (bad(cu_seqlens_q=torch.tensor([0, 5, 4])), ValueError, "cu_seqlens_q: .*must not decrease"),
    "offsets are float": (bad(cu_seqlens_q=ONES(3)), TypeError, "cu_seqlens_q must be a VarlenLayout or.*float32"),
    "offsets are 2-d": (bad(cu_seqlens_q=torch.zeros(1, 2).int()), ValueError, r"shape \[S \+ 1\], got \[1, 2\]"),
    "offsets are a list": (bad(cu_seqlens_q=[0, 4]), TypeError, "cu_seqlens_q must be a VarlenLayout or.*list"),
    "max_seqlen": (bad(max_seqlen_q=1), ValueError, r"at least the longest sequence \(2 rows\), got 1"),
    "max_seqlen is float": (bad(max_seqlen_q=2.0), TypeError, "max_seqlen_q must be an int, got float"),
    "max_seqlen_k alone": (bad(max_seqlen_k=2), ValueError, "max_seqlen_k must be None where cu_seqlens_k is, got 2"),
    "causal": (bad(causal=1), TypeError, "causal must be a bool, got int"),
    "scale": (bad(softmax_scale=float("nan")), ValueError, "softmax_scale must be finite, got nan"),
    "bias shape": (bad(key_bias=ONES(5)), ValueError, r"key_bias must have shape \[4\], got \[5\]"),
    "bias dtype": (bad(key_bias=ONES(4).double()), TypeError, "key_bias must be one of float32, got float64"),
    "bias with gradient": (bad(key_bias=ONES(4).requires_grad_()), ValueError, "key_bias must not require a gradient"),
    "bias of nan": (
        bad(key_bias=ONES(4) * torch.nan),
        ValueError,
        "key_bias must be finite or -inf, got nan at index 0",
    ),
    "window": (bad(window=(1, 2, 3)), ValueError, r"window must be \(left, right\).*got \(1, 2, 3\)"),
    "window side": (bad(window=(-2, 0)), ValueError, "window left must be >= -1, got -2"),
    "dout shape": (bad_backward(dout=ONES(4, 2, 4)), ValueError, r"dout must have shape \[4, 2, 8\], got \[4, 2, 4\]"),
    "out dtype": (bad_backward(out=ONES(4, 2, 8).half()), TypeError, "out must be one of float32.*got float16"),
    "lse shape": (bad_backward(lse=ONES(4, 2)), ValueError, r"lse must have shape \[2, 4\], got \[4, 2\]"),
    "lse dtype": (bad_backward(lse=ONES(2, 4).half()), TypeError, "lse must be one of float32, got float16"),
    "dlse shape": (bad_backward(dlse=ONES(4, 2)), ValueError, r"dlse must have shape \[2, 4\], got \[4, 2\]"),
    "merge shapes": (bad_merge(out_block=ONES(4, 2, 4)), ValueError, r"shape of out \[4, 2, 8\], got \[4, 2, 4\]"),
    "merge lse": (bad_merge(lse=ONES(4, 2)), ValueError, r"lse must have shape \[2, 4\], got \[4, 2\]"),
    "merge lse dtype": (
        bad_merge(lse_block=ONES(2, 4).bfloat16()),
        TypeError,
        "lse_block must be one of float32, float64",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case):
    call, error, message = BAD_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call()
    assert ran == []


@pytest.mark.parametrize("backend", ["cpu", "reference", pytest.param("triton", marks=pytest.mark.triton)])
def test_a_bound_longer_than_any_sequence_is_none(make_problem, device, backend):
    problem, where = make_problem("self", head_dim=16), device if backend == "triton" else "cpu"
    q, k, v = (x.to(where) for x in (problem.q, problem.k, problem.v))
    options = {**{name: layout.to(where) for name, layout in problem.options.items()}, "causal": False}
    with use_backend(backend):
        wanted = varlen_attention(q, k, v, **options)
        for far in (2**31 - 1, 2**31 - 20, 2**70):
            assert torch.equal(varlen_attention(q, k, v, **options, window=(far, far)), wanted)


def test_a_state_of_other_sizes_or_devices_is_refused(make_problem):
    problem = make_problem("one")
    state = AttentionState.zeros(33, 4, 8)
    with pytest.raises(ValueError, match="q must be on cpu"):
        state.accumulate(
            *(x.to("meta") for x in (problem.q, problem.k, problem.v)), cu_seqlens_q=VarlenLayout([33], "meta")
        )
    with pytest.raises(ValueError, match="m must have shape \\[4, 33\\]"):
        dataclasses.replace(state, m=state.m[:, :3]).accumulate(
            problem.q, problem.k, problem.v, cu_seqlens_q=VarlenLayout([33])
        )
