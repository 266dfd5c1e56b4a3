# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernels of selecting and moving rows, executed on the host: every branch against the reference."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.testing import assert_close, make_input
from lrc_kernels.token_dropout import drop_budget, native, reference

CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
MODES = {"topk": 0, "linspace": 1, "random": 2}


@pytest.mark.parametrize(
    ("counter", "key", "wanted"),
    [
        ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
        ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
        (
            [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
            [0xA4093822, 0x299F31D0],
            [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
        ),
    ],
    ids=["zeros", "ones", "pi"],
)
def test_philox_known_answers(host_kernels, counter, key, wanted):
    words = torch.zeros(4, dtype=torch.int64)
    host_kernels.call("philox", counter, key, words)
    assert words.tolist() == wanted


def move(host_kernels, tensors, index, fill, reverse=False):
    moved = [x.new_empty(x.shape[0], index.shape[0], x.shape[2]) for x in tensors]
    fields = [v - 2**64 if v >= 2**63 else v for row in native.row_moves(tensors, moved, fill) for v in row]
    host_kernels.call("move_rows", fields, len(tensors), index, index.shape[0], reverse=reverse)
    return moved


def test_moves_tensors_of_any_dtype_in_one_launch(host_kernels):
    rows, index = 37, torch.tensor([5, -1, 0, 36, 36, -1, 7] * 9, dtype=torch.int32)
    tensors = [
        torch.randn(1, rows, 2056).bfloat16(),
        torch.arange(rows)[None, :, None],
        torch.arange(3 * rows).view(3, rows, 1),
        torch.randn(1, rows, 9, 1)[..., 0],
        torch.randn(2, rows, 5).half(),
        torch.rand(1, rows, 3) < 0.5,
        torch.randn(1, rows, 4, dtype=torch.float64),
        torch.randn(1, rows, 1026),
    ]
    fill = [1.5, -100, 7, torch.nan, -2.0, 1, 0.5, 0]
    wanted = reference.move_rows(tensors, index, fill)
    moved, reversed_ = (move(host_kernels, tensors, index, fill, reverse=r) for r in (False, True))
    for got, again, expected in zip(moved, reversed_, wanted, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=0, equal_nan=True)
        torch.testing.assert_close(again, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("offset", [1, 2, 4, 8])
def test_moves_unaligned_and_strided_rows(host_kernels, offset):
    whole = torch.arange(40 * 64, dtype=torch.int16).view(1, 40, 64)
    x = whole[:, ::2, offset : offset + 16]
    index = torch.tensor([19, 3, -1, 0], dtype=torch.int32)
    (y,) = move(host_kernels, [x], index, [9])
    assert torch.equal(y, reference.move_rows([x], index, [9])[0])


def test_a_fill_value_is_encoded_on_the_host_whatever_the_default_device():
    x, y = torch.ones(1, 3, 4), torch.empty(1, 2, 4)
    with torch.device("meta"):
        ((*_, pattern),) = native.row_moves([x], [y], [1.5])
    assert pattern == 0x3FC000003FC00000


def test_moves_nothing(host_kernels):
    empty = torch.empty(0, dtype=torch.int32)
    assert move(host_kernels, [torch.ones(1, 3, 4)], empty, [0])[0].shape == (1, 0, 4)
    assert move(host_kernels, [torch.ones(1, 3, 0)], torch.zeros(2, dtype=torch.int32), [0])[0].shape == (1, 2, 0)
    with pytest.raises(RuntimeError, match="count must be between 0 and 8, got 9"):
        host_kernels.call("move_rows", [0] * 63, 9, empty, 0)


def rmsnorm(host_kernels, residual, weight, eps, indices, reverse=False):
    dropped = residual.new_empty(indices.shape[0], residual.shape[1])
    normed, rstd = torch.empty_like(dropped), torch.empty(indices.shape[0])
    args = (residual, CODES[residual.dtype], residual.stride(0), weight, torch.tensor([eps]), indices)
    host_kernels.call("drop_tokens_rmsnorm", *args, *dropped.shape, dropped, normed, rstd, reverse=reverse)
    return dropped, normed, rstd


@pytest.mark.parametrize("dtype", CODES)
@pytest.mark.parametrize("width", [64, 13, 2056, 1], ids=["vectors", "odd", "two_steps", "one"])
def test_rmsnorm(host_kernels, dtype, width):
    residual = make_input("gaussian", (11, 2 * width), dtype=dtype)[:, :width]
    weight = make_input("gaussian", (1, width), dtype=dtype, seed=1)[0]
    indices = torch.tensor([10, 0, -1, 4, 5], dtype=torch.int32)
    got = rmsnorm(host_kernels, residual, weight, 1e-6, indices)
    same = reference.drop_tokens_rmsnorm(residual, weight, 1e-6, indices)
    exact = reference.drop_tokens_rmsnorm(residual.double(), weight.double(), 1e-6, indices)
    assert torch.equal(got[0], same[0])
    assert_close(got[1], exact[1], same[1])
    assert_close(got[2], exact[2], same[2])
    for first, second in zip(got, rmsnorm(host_kernels, residual, weight, 1e-6, indices, reverse=True), strict=True):
        assert torch.equal(first, second)


def test_rmsnorm_of_padding_and_bad_width(host_kernels):
    padding = torch.tensor([-1], dtype=torch.int32)
    for part in rmsnorm(host_kernels, torch.full((2, 8), torch.nan), torch.ones(8), 0.0, padding):
        assert (part == 0).all()
    with pytest.raises(RuntimeError, match="width must be at most 4096 for these addresses, got 4097"):
        rmsnorm(host_kernels, torch.ones(2, 4097), torch.ones(4097), 0.0, padding)
    with pytest.raises(RuntimeError, match="width must be >= 1, got 0"):
        rmsnorm(host_kernels, torch.ones(2, 0), torch.ones(0), 0.0, padding)


def select(host_kernels, mode, budget, droppable, scores, seed, layer, ids, positions, reverse=False):
    indices = torch.full((budget.num_kept,), -1, dtype=torch.int32)
    inverse = torch.empty(droppable.shape[0], dtype=torch.int32)
    is_64_bit = int(positions is not None and positions.dtype == torch.int64)
    layouts = (budget.layout_in.cu_seqlens, budget.layout_out.cu_seqlens)
    sizes = (budget.layout_in.num_sequences, budget.layout_in.max_seqlen)
    args = (MODES[mode], droppable, *layouts, budget.keep, scores, seed, layer, ids, positions, is_64_bit, *sizes)
    host_kernels.call("select_tokens", *args, indices, inverse, reverse=reverse)
    return indices, inverse


@pytest.mark.parametrize(
    ("mode", "scores"),
    [*(("topk", scores) for scores in ("gaussian", "ties", "equal", "broken")), ("linspace", ""), ("random", "")],
)
@pytest.mark.parametrize("keep", [0.4, 1.0, 1], ids=["ratio", "all", "one"])
def test_select(host_kernels, mode, scores, keep):
    layout = VarlenLayout([2600, 0, 70, 1, 5])
    total = layout.num_tokens
    droppable = torch.rand(total) < 0.7
    droppable[[0, 2600, 2670, 2671]] = False
    values = torch.randn(total)
    if scores == "ties":
        values = torch.randint(-2, 3, (total,)).float()
        values[::3] *= -0.0
    elif scores == "equal":
        values = torch.full((total,), -1.5)
    elif scores == "broken":
        values[::4], values[1::5], values[2::7] = torch.nan, -torch.inf, torch.inf
    counts = [int(flags.sum()) for flags in droppable.split(list(layout.lengths))]
    budget = drop_budget(layout, counts, keep=keep)
    seed, layer = torch.tensor(2**40 + 17), 5
    ids = torch.tensor([7, 2**35 + 1, -3, 0, 4]) if keep == 0.4 else None
    positions = torch.arange(total) * 3 if keep == 0.4 else torch.arange(total).int() if keep == 1.0 else None
    args = (budget, droppable, values, seed, layer, ids, positions)
    wanted = reference.select(
        droppable, layout.cu_seqlens, budget.layout_out.cu_seqlens, budget.keep, values, *args[3:], budget.num_kept,
        layout.max_seqlen, mode,
    )  # fmt: skip
    for reverse in (False, True):
        indices, inverse = select(host_kernels, mode, *args, reverse=reverse)
        assert torch.equal(indices, wanted[0]) and torch.equal(inverse, wanted[1])


@pytest.mark.parametrize("mode", MODES)
def test_a_wrong_budget_stays_in_bounds(host_kernels, mode):
    """Nothing checks a device tensor's flags against the budget: missing rows are -1 and excess ones are dropped."""
    layout = VarlenLayout([40])
    for marked, promised in ((5, 20), (20, 5)):
        droppable = torch.arange(40) < marked
        budget = drop_budget(layout, [promised], keep=promised // 2)
        args = (budget, droppable, torch.randn(40), torch.tensor(1), 0, None, None)
        wanted = reference.select(
            droppable,
            layout.cu_seqlens,
            budget.layout_out.cu_seqlens,
            budget.keep,
            *args[2:],
            budget.num_kept,
            40,
            mode,
        )
        indices, inverse = select(host_kernels, mode, *args)
        assert torch.equal(indices, wanted[0]) and torch.equal(inverse, wanted[1])


def test_select_names_what_is_missing(host_kernels):
    budget = drop_budget(VarlenLayout([4]), [2], keep=1)
    flags = torch.tensor([True, True, False, False])
    with pytest.raises(RuntimeError, match="scores must be given for mode topk, got null"):
        select(host_kernels, "topk", budget, flags, None, None, 0, None, None)
    with pytest.raises(RuntimeError, match="seed must be given for mode random, got null"):
        select(host_kernels, "random", budget, flags, None, None, 0, None, None)
