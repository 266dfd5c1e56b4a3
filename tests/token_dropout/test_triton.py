# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of selecting and moving rows: in the interpreter with small tiles, on a GPU as shipped."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.token_dropout import (
    Selection,
    drop_budget,
    drop_tokens,
    drop_tokens_rmsnorm,
    reference,
    restore_tokens,
    select_tokens,
)
from lrc_kernels.token_dropout.op import bernoulli_op, select_op

pytestmark = pytest.mark.triton

LENGTHS = [70, 0, 33, 1, 16]
KINDS = ["gaussian", "ties", "equal", "broken"]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    """Small tiles in the interpreter, so that every loop runs three times or more; the shipped ones on a GPU."""
    if device.type == "cuda":
        return
    from lrc_kernels.token_dropout import triton_kernels, triton_select

    monkeypatch.setattr(triton_select, "select_block", lambda: 16)
    monkeypatch.setattr(triton_kernels, "TILE", 64)
    monkeypatch.setattr(triton_kernels, "BACKWARD_PROGRAMS", 5)


def on_triton(function, *args, **options):
    """Run on the Triton backend, and see that nothing else ran."""
    with use_backend("triton"), record() as ran:
        result = function(*args, **options)
    assert ran and {backend for _, backend in ran} == {"triton"}
    return result


def make_pack(kind, device, lengths=LENGTHS):
    random = torch.Generator().manual_seed(7)
    layout = VarlenLayout(lengths)
    total = layout.num_tokens
    flags = torch.rand(total, generator=random) < 0.7
    flags[[row for row in layout.cu_seqlens[:-1].tolist() if row < total]] = False
    scores = torch.randn(total, generator=random)
    if kind == "ties":
        scores = torch.randint(-1, 2, (total,), generator=random) * -1.0
    elif kind == "equal":
        scores = torch.full((total,), -1.5)
    elif kind == "broken":
        scores[::4], scores[1::5], scores[2::7] = torch.nan, -torch.inf, torch.inf
    return layout.to(device), flags.to(device), scores.to(device)


def assert_same(got, wanted):
    assert torch.equal(got.indices, wanted.indices) and torch.equal(got.inverse, wanted.inverse)
    assert torch.equal(got.layout.cu_seqlens, wanted.layout.cu_seqlens)


@pytest.mark.parametrize(
    ("mode", "kind", "keep"),
    [
        *(("topk", kind, 0.4) for kind in KINDS),
        ("topk", "gaussian", 1.0),
        ("topk", "broken", 0),
        ("linspace", "gaussian", 0.4),
        ("linspace", "gaussian", 0.02),
        ("linspace", "gaussian", 1.0),
        ("random", "gaussian", 0.4),
    ],
)
def test_select_equals_the_reference(device, mode, kind, keep):
    layout, flags, scores = make_pack(kind, device)
    options = {"keep": keep, "mode": mode, "seed": -3, "layer": 2**31 + 5}
    if mode == "topk":
        options["scores"] = scores
    if mode == "random":
        options["sequence_ids"] = torch.tensor([7, 2**35 + 1, -3, 0, 4], device=device)
        options["positions"] = torch.arange(layout.num_tokens, device=device) * 2**33 + 5
    with use_backend("reference"):
        wanted = select_tokens(layout, flags, **options)
    got = on_triton(select_tokens, layout, flags, **options)
    assert_same(got, wanted)
    if keep == 0.4 and kind in ("ties", "gaussian"):
        assert_same(on_triton(select_tokens, layout, flags, **options), wanted)


@pytest.mark.parametrize("capacity", [None, 120, 150])
def test_bernoulli_equals_the_reference(device, capacity):
    layout, flags, _ = make_pack("gaussian", device)
    options = {"keep": 0.6, "mode": "bernoulli", "seed": torch.tensor(2**40 + 1, device=device), "layer": 3}
    options["positions"] = torch.arange(120, device=device, dtype=torch.int32) if capacity == 150 else None
    with use_backend("reference"):
        wanted = select_tokens(layout, flags, capacity=capacity, **options)
    assert_same(on_triton(select_tokens, layout, flags, capacity=capacity, **options), wanted)


@pytest.mark.parametrize("room", [5, 0, -4])
def test_bernoulli_overflow_equals_the_reference(device, room):
    """With too little room the last droppable tokens go; with too little for the others, which nothing checks on a
    device, rows still stay in bounds."""
    layout, flags, _ = make_pack("gaussian", device)
    capacity = int((~flags).sum()) + room
    args = (flags, layout.cu_seqlens, torch.tensor(1, device=device), 0, None, None, capacity, 70, 2**31)
    wanted = reference.select_bernoulli(*args)
    for got, expected in zip(on_triton(bernoulli_op, *args), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("mode", ["topk", "linspace", "random"])
@pytest.mark.parametrize(("marked", "promised"), [(5, 20), (20, 5)])
def test_a_wrong_budget_stays_in_bounds(device, mode, marked, promised):
    layout = VarlenLayout([40], device)
    flags = torch.arange(40, device=device) < marked
    budget = drop_budget(layout, [promised], keep=promised // 2)
    scores, seed = torch.linspace(1, 2, 40, device=device), torch.tensor(1, device=device)
    layouts = (layout.cu_seqlens, budget.layout_out.cu_seqlens)
    args = (flags, *layouts, budget.keep, scores, seed, 0, None, None, budget.num_kept, 40, mode)
    wanted = reference.select(*args)
    for got, expected in zip(on_triton(select_op, *args), wanted, strict=True):
        assert torch.equal(got, expected)


@pytest.mark.parametrize("lengths", [[], [0, 0], [1]])
def test_empty_packs(device, lengths):
    layout = VarlenLayout(lengths, device)
    flags = torch.zeros(layout.num_tokens, dtype=torch.bool, device=device)
    for mode in ("linspace", "random", "bernoulli"):
        selection = on_triton(select_tokens, layout, flags, keep=0.5, mode=mode)
        assert selection.num_kept == layout.num_tokens
        x = torch.ones(layout.num_tokens, 8, device=device)
        assert torch.equal(on_triton(drop_tokens, x, selection), x)
        assert torch.equal(on_triton(restore_tokens, x, selection), x)
        assert on_triton(drop_tokens_rmsnorm, x, x.new_ones(8), 0.0, selection)[1].shape == x.shape


def padded_selection(device, total=35):
    layout, flags, _ = make_pack("gaussian", device, [20, 0, 13, 2])
    with use_backend("reference"):
        return select_tokens(layout, flags, keep=0.4, mode="bernoulli", capacity=total)


def test_rows_of_any_dtype_move_in_one_launch(device):
    selection, total = padded_selection(device), 35
    tensors = (
        torch.randn(total, 150), torch.arange(total), torch.arange(3 * total).view(3, total), torch.rand(total) < 0.5,
        torch.randn(total, 5).bfloat16(), torch.randn(1, total, 8).half(), torch.randn(9, total).t(),
        torch.randn(2, total, 3, dtype=torch.float64), torch.randn(total, 50)[:, 3:20], torch.randn(total).int(),
    )  # fmt: skip
    tensors = tuple(x.to(device) for x in tensors)
    options = {"dims": (0, 0, 1, 0, 0, 1, 0, 1, 0, 0), "fill": (torch.nan, -100, 1, 1, -2, 1.5, 0, 0.1, 0, -1)}
    with use_backend("reference"):
        wanted = drop_tokens(tensors, selection, **options)
        restored = restore_tokens(wanted[4], selection, fill=9.0)
    for got, expected in zip(on_triton(drop_tokens, tensors, selection, **options), wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
    assert torch.equal(on_triton(restore_tokens, wanted[4], selection, fill=9.0), restored)


def test_gradients_of_rows(device):
    selection = padded_selection(device)
    x = torch.randn(35, 6, device=device, dtype=torch.float64, requires_grad=True)
    y = on_triton(drop_tokens, x, selection, fill=3.0)
    upstream = torch.randn_like(y)
    (gradient,) = on_triton(torch.autograd.grad, y, x, upstream)
    wanted = torch.zeros_like(x)
    real = selection.indices >= 0
    wanted[selection.indices[real].long()] = upstream[real]
    assert torch.equal(gradient, wanted)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("width", "eps"), [(70, 1e-6), (16, 0.0), (1, 1e-5)])
def test_rmsnorm(device, dtype, width, eps):
    selection = padded_selection(device)
    x = make_input("gaussian", (35, 2 * width), dtype=dtype, device=device)[:, :width]
    weight = make_input("gaussian", (1, width), dtype=dtype if width > 16 else torch.float32, device=device, seed=1)[0]
    upstream = [make_input("gaussian", (35, width), dtype=dtype, device=device, seed=seed) for seed in (2, 3)]

    def step(cast):
        leaves = [cast(leaf).clone().requires_grad_() for leaf in (x, weight)]
        outputs = drop_tokens_rmsnorm(*leaves, eps, selection)
        torch.autograd.backward(outputs, [cast(u) for u in upstream])
        return *outputs, *(leaf.grad for leaf in leaves)

    with use_backend("reference"):
        same, exact = step(lambda t: t), step(lambda t: t.double())
    first, second = (on_triton(step, lambda t: t) for _ in range(2))
    for name, got, again, wanted, torch_ in zip(
        ("h", "normed", "dx", "dweight"), first, second, exact, same, strict=True
    ):
        assert got.dtype == torch_.dtype and torch.equal(got, again)
        assert_close(got, wanted, torch_, name=name)
    assert torch.equal(first[0], same[0]) and (first[2][selection.inverse < 0] == 0).all()


def test_what_triton_declines(device):
    selection = padded_selection(device)
    with use_backend("triton"):
        with pytest.raises(RuntimeError, match="a tensor is torch.complex64"):
            drop_tokens(torch.zeros(35, 2, dtype=torch.complex64, device=device), selection)
        x = torch.zeros(35, 2, dtype=torch.float64, device=device)
        with pytest.raises(RuntimeError, match="residual is torch.float64"):
            drop_tokens_rmsnorm(x, x[0], 1e-6, selection)
        with pytest.raises(RuntimeError, match="width is 16385"):
            drop_tokens_rmsnorm(
                torch.zeros(35, 16385, device=device), torch.zeros(16385, device=device), 0.0, selection
            )


def test_selection_of_device_indices_needs_no_host(device):
    """A Selection is three tensors and two ints: one that another backend made serves the kernels as well."""
    indices = torch.tensor([0, 2, 3], dtype=torch.int32, device=device)
    inverse = torch.tensor([0, -1, 1, 2], dtype=torch.int32, device=device)
    layout = VarlenLayout.on_device(torch.tensor([0, 3], dtype=torch.int32, device=device), 3, 3)
    x = torch.randn(4, 5, device=device)
    assert torch.equal(on_triton(drop_tokens, x, Selection(indices, inverse, layout)), x[[0, 2, 3]])
