# SPDX-License-Identifier: Apache-2.0
"""`drop_tokens`, `restore_tokens` and `drop_tokens_rmsnorm`: values, alignment, gradients and bad input."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.token_dropout import (
    drop_tokens,
    drop_tokens_rmsnorm,
    native,
    reference,
    restore_tokens,
    select_tokens,
)
from lrc_kernels.token_dropout.op import rmsnorm_op

BACKENDS = ["cpu", "reference"]
LENGTHS = [9, 0, 6, 4]


def make_selection(random, capacity=None):
    layout = VarlenLayout(LENGTHS)
    flags = torch.rand(19, generator=random) < 0.7
    return select_tokens(layout, flags, keep=0.4, mode="bernoulli", seed=5, capacity=capacity)


@pytest.mark.parametrize("backend", BACKENDS)
def test_labels_and_positions_stay_aligned(random, backend):
    """Against a loop over samples that builds each sample's rows by itself, as a trainer without packing would."""
    layout, flags = VarlenLayout(LENGTHS), torch.rand(19, generator=random) < 0.7
    flags[[0, 9, 15]] = False
    scores = torch.randn(19, generator=random)
    hidden = torch.randn(19, 8, generator=random)
    labels = torch.randint(0, 100, (19,), generator=random)
    position_ids = torch.randint(0, 100, (3, 19), generator=random)
    cos = torch.randn(1, 19, 4, generator=random).bfloat16()
    selection = select_tokens(layout, flags, keep=0.5, mode="topk", scores=scores)
    with use_backend(backend), record() as ran:
        moved = drop_tokens((hidden, labels, position_ids, cos), selection, dims=(0, 0, 1, -2))
    assert ran == [("drop_tokens_fwd", backend)]
    rows, start = [], 0
    for length, kept in zip(LENGTHS, selection.layout.lengths, strict=True):
        visual = [i for i in range(start, start + length) if flags[i]]
        best = sorted(visual, key=lambda i: -float(scores[i]))[: len(visual) // 2]
        sample = [i for i in range(start, start + length) if not flags[i] or i in best]
        assert len(sample) == kept
        rows += sample
        start += length
    wanted = (hidden[rows], labels[rows], position_ids[:, rows], cos[:, rows])
    for got, expected in zip(moved, wanted, strict=True):
        assert got.dtype == expected.dtype and got.is_contiguous() and torch.equal(got, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64, torch.int64, torch.int32, torch.int8,
              torch.bool, torch.complex64],
)  # fmt: skip
def test_padding_rows_get_the_fill(random, backend, dtype):
    selection = make_selection(random, capacity=19)
    x = torch.randint(0, 2, (19, 3), generator=random).to(dtype)
    n = int(selection.layout.cu_seqlens[-2])
    with use_backend(backend):
        (y,) = drop_tokens([x], selection, fill=[1])
        zeros = drop_tokens(x, selection)
    kept = selection.indices[:n].long()
    assert torch.equal(y[:n], x[kept]) and (y[n:] == 1).all() and y.dtype == dtype and n < 19
    assert torch.equal(zeros[:n], x[kept]) and (zeros[n:] == 0).all()


@pytest.mark.parametrize("backend", BACKENDS)
def test_strides_and_any_dimension(random, backend):
    selection = make_selection(random)
    kept = selection.indices.long()
    x = torch.randn(4, 19, 10, generator=random)
    cases = [(x, 1), (x[:, :, 3:7], 1), (x[::2], 1), (x.transpose(0, 1), 0), (x.transpose(1, 2), 2), (x[0, :, 0], 0)]
    with use_backend(backend):
        moved = drop_tokens([case for case, _ in cases], selection, dims=[dim for _, dim in cases])
    for (case, dim), y in zip(cases, moved, strict=True):
        assert torch.equal(y, case.index_select(dim, kept))
    assert drop_tokens([], selection) == ()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [None, 19])
def test_restore_is_the_transpose(random, backend, capacity):
    selection = make_selection(random, capacity)
    y = torch.randn(selection.num_kept, 3, 2, generator=random)
    with use_backend(backend), record() as ran:
        x = restore_tokens(y, selection, fill=-7.0)
    assert ran == [("restore_tokens_fwd", backend)]
    dropped = selection.inverse < 0
    assert x.shape == (19, 3, 2) and (x[dropped] == -7).all()
    assert torch.equal(x[~dropped], y[selection.inverse[~dropped].long()])
    back = drop_tokens(x, selection)
    real = selection.indices >= 0
    assert torch.equal(back[real], y[real])


def test_ratio_one_changes_nothing(random):
    layout, flags = VarlenLayout(LENGTHS), torch.rand(19, generator=random) < 0.7
    selection = select_tokens(layout, flags, keep=1.0, mode="random")
    x, weight = torch.randn(19, 8, generator=random), torch.randn(8, generator=random)
    assert torch.equal(drop_tokens(x, selection), x) and torch.equal(restore_tokens(x, selection), x)
    assert torch.equal(drop_tokens_rmsnorm(x, weight, 1e-6, selection)[0], x)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("capacity", [None, 19])
def test_gradients(random, backend, capacity):
    selection = make_selection(random, capacity)
    x = torch.randn(19, 3, generator=random, dtype=torch.float64, requires_grad=True)
    q = torch.randn(2, 19, generator=random, dtype=torch.float64, requires_grad=True)
    y = torch.randn(selection.num_kept, 3, generator=random, dtype=torch.float64, requires_grad=True)

    def drop(x, q):
        moved = drop_tokens((x, torch.arange(19), q), selection, dims=(0, 0, 1), fill=(2, 3, 4))
        assert not moved[1].requires_grad
        return moved[0], moved[2]

    def restore(t):
        return restore_tokens(t, selection, fill=2.0)

    with use_backend(backend):
        for function, inputs in ((drop, (x, q)), (restore, (y,))):
            torch.autograd.gradcheck(function, inputs)
            torch.autograd.gradgradcheck(function, inputs)


def test_one_launch_moves_all_gradients(random):
    selection = make_selection(random)
    tensors = [torch.randn(19, 3, generator=random, requires_grad=True) for _ in range(3)]
    with record() as ran:
        moved = drop_tokens((*tensors, torch.arange(19)), selection)
        torch.autograd.backward(moved[:3], [torch.ones_like(y) for y in moved[:3]])
    assert ran == [("drop_tokens_fwd", "cpu"), ("restore_tokens_fwd", "cpu")]
    for x in tensors:
        assert torch.equal(x.grad, (selection.inverse >= 0).float()[:, None].expand(19, 3))


@pytest.mark.parametrize("capacity", [None, 19])
@pytest.mark.parametrize("eps", [1e-5, 0.0])
def test_rmsnorm_gradient(random, capacity, eps):
    selection = make_selection(random, capacity)
    x = torch.randn(19, 4, generator=random, dtype=torch.float64, requires_grad=True)
    weight = torch.randn(4, generator=random, dtype=torch.float64, requires_grad=True)
    torch.autograd.gradcheck(lambda t, w: drop_tokens_rmsnorm(t, w, eps, selection), (x, weight))
    normed = drop_tokens_rmsnorm(x, weight, eps, selection)[1]
    (gradient,) = torch.autograd.grad(normed.square().sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()


def llama_rms_norm(x, weight, eps):
    """transformers' LlamaRMSNorm."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    return weight * wide.to(x.dtype)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [1, 13, 96])
def test_rmsnorm_rounds_as_llama_does(random, dtype, width):
    selection = make_selection(random)
    kept = selection.indices.long()
    leaves = [make_input("gaussian", (19, width), dtype=dtype), make_input("gaussian", (1, width), dtype=dtype)[0]]
    upstream = [torch.randn(selection.num_kept, width, generator=random).to(dtype) for _ in range(2)]
    results = []
    for cast in (dtype, torch.float64):
        x, weight = (leaf.to(cast, copy=True).requires_grad_() for leaf in leaves)
        # In fp64 the composition needs LlamaRMSNorm without its own casts.
        plain = x[kept]
        normed = weight * (plain * torch.rsqrt(plain.pow(2).mean(-1, keepdim=True) + 1e-6))
        outputs = (plain, llama_rms_norm(plain, weight, 1e-6) if cast == dtype else normed)
        torch.autograd.backward(outputs, [u.to(cast) for u in upstream])
        results.append((*outputs, x.grad, weight.grad))
    x, weight = (leaf.clone().requires_grad_() for leaf in leaves)
    outputs = drop_tokens_rmsnorm(x, weight, 1e-6, selection)
    torch.autograd.backward(outputs, upstream)
    ours = (*outputs, x.grad, weight.grad)
    for name, got, same, exact in zip(("h", "normed", "dx", "dweight"), ours, *results, strict=True):
        assert_close(got, exact, same, name=name)
    assert torch.equal(ours[0], results[0][0]) and torch.equal(ours[1], results[0][1])
    assert (x.grad[selection.inverse < 0] == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize(("tile", "eps", "capacity"), [(30, 1e-6, None), (30, 0.0, 19), (1000, 1e-6, 19)])
def test_rmsnorm_in_tiles_equals_the_reference(random, monkeypatch, dtype, tile, eps, capacity):
    monkeypatch.setattr(native, "_TILE", tile)
    selection = make_selection(random, capacity)
    x, weight = torch.randn(19, 24, generator=random).to(dtype)[:, ::2], torch.randn(12, generator=random)
    with use_backend("cpu"), record() as ran:
        got = rmsnorm_op(x, weight, eps, selection.indices)
    assert ran == [("drop_tokens_rmsnorm_fwd", "cpu")]
    for part, wanted in zip(got, reference.drop_tokens_rmsnorm(x, weight, eps, selection.indices), strict=True):
        assert part.dtype == wanted.dtype and torch.equal(part, wanted)


def test_rmsnorm_reads_strided_rows_and_a_wide_weight(random):
    selection = make_selection(random)
    x, weight = torch.randn(19, 12, generator=random).bfloat16()[:, 2:10], torch.randn(8, generator=random)
    weight.requires_grad_()
    dropped, normed = drop_tokens_rmsnorm(x, weight, 1e-6, selection)
    assert normed.dtype == torch.bfloat16 and torch.equal(dropped, x[selection.indices.long()])
    assert torch.equal(normed, llama_rms_norm(dropped, weight.bfloat16(), 1e-6))
    normed.float().sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.isfinite().all()


@pytest.mark.parametrize("lengths", [[], [0, 0], [3]])
def test_empty_packs(lengths):
    layout = VarlenLayout(lengths)
    total = layout.num_tokens
    flags = torch.zeros(total, dtype=torch.bool)
    for mode in ("linspace", "random", "bernoulli"):
        selection = select_tokens(layout, flags, keep=0.5, mode=mode)
        assert selection.num_kept == total
        x = torch.ones(total, 4, requires_grad=True)
        dropped, normed = drop_tokens_rmsnorm(x, torch.ones(4), 1e-6, selection)
        (dropped + normed + drop_tokens(x, selection)).sum().backward()
        assert x.grad.shape == (total, 4) and restore_tokens(dropped, selection).shape == (total, 4)
    empty = select_tokens(VarlenLayout([0]), torch.zeros(0, dtype=torch.bool), keep=0.5, mode="bernoulli", capacity=2)
    assert drop_tokens(torch.zeros(0, 3), empty, fill=4).tolist() == [[4.0] * 3] * 2


SELECTION = select_tokens(VarlenLayout([4]), torch.tensor([False, True, True, True]), keep=1, mode="linspace")
X = torch.ones(4, 3)
BAD_CALLS = {
    "rows": (
        lambda: drop_tokens(X[:3], SELECTION),
        ValueError,
        r"tensors\[0\] must have 4 rows in dimension 0.*\[3, 3\]",
    ),
    "second": (lambda: drop_tokens((X, X.T), SELECTION), ValueError, r"tensors\[1\] must have 4 rows.*\[3, 4\]"),
    "no tensor": (lambda: drop_tokens([[1.0]], SELECTION), TypeError, r"tensors\[0\] must be a tensor, got list"),
    "dims": (lambda: drop_tokens((X, X), SELECTION, dims=(0,)), ValueError, r"dims must have one entry.*\(2\), got 1"),
    "dims range": (lambda: drop_tokens(X, SELECTION, dims=2), ValueError, "must have dimension 2"),
    "dims type": (lambda: drop_tokens(X, SELECTION, dims=0.0), TypeError, "dims must be ints, got float"),
    "fill": (lambda: drop_tokens(X, SELECTION, fill=(0, 1)), ValueError, r"fill must have one entry.*\(1\), got 2"),
    "fill integer": (
        lambda: drop_tokens(X.long(), SELECTION, fill=0.5),
        ValueError,
        "an integer for int64 rows, got 0.5",
    ),
    "device": (lambda: drop_tokens(X.to("meta"), SELECTION), ValueError, "must be on cpu.*got meta"),
    "selection": (lambda: drop_tokens(X, SELECTION.indices), TypeError, "selection must be a Selection, got Tensor"),
    "restore rows": (lambda: restore_tokens(X, SELECTION), ValueError, r"y must have 2 rows in dimension 0.*\[4, 3\]"),
    "restore type": (lambda: restore_tokens(X[:2], None), TypeError, "selection must be a Selection, got NoneType"),
    "restore fill": (lambda: restore_tokens(X[:2].int(), SELECTION, fill=0.5), ValueError, "int32 rows, got 0.5"),
    "norm width": (
        lambda: drop_tokens_rmsnorm(X, torch.ones(4), 1e-6, SELECTION),
        ValueError,
        "weight must have the residual's width 3, got 4",
    ),
    "norm dtype": (lambda: drop_tokens_rmsnorm(X.int(), X[0], 1e-6, SELECTION), TypeError, "residual must be.*int32"),
    "norm shape": (lambda: drop_tokens_rmsnorm(X[None], X[0], 1e-6, SELECTION), ValueError, "residual.*2 dimensions"),
    "norm rows": (lambda: drop_tokens_rmsnorm(X[1:], X[0], 1e-6, SELECTION), ValueError, "residual must have 4 rows"),
    "norm eps": (lambda: drop_tokens_rmsnorm(X, X[0], -1.0, SELECTION), ValueError, "eps must be >= 0, got -1.0"),
    "norm device": (
        lambda: drop_tokens_rmsnorm(X, X[0].to("meta"), 0.0, SELECTION),
        ValueError,
        "weight must be on cpu",
    ),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case):
    call, error, message = BAD_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call()
    assert not ran
