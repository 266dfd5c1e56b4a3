# SPDX-License-Identifier: Apache-2.0
"""The repaired interpreter: right bf16 dots, no silent bf16 arithmetic, autotune without a driver, no order of
programs to rely on."""

import pytest
import torch

triton = pytest.importorskip("triton", reason="triton is not installed (pip install lrc-kernels[triton])")
import triton.language as tl

from lrc_kernels.testing import Bfloat16ArithmeticError, assert_close, make_input

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(torch.cuda.is_available(), reason="the interpreter is used only where there is no CUDA device"),
]


@triton.jit
def matmul_kernel(a_ptr, b_ptr, c_ptr, N: tl.constexpr):
    """One program: c [N, N] = a @ b."""
    o_n = tl.arange(0, N)
    offsets = o_n[:, None] * N + o_n[None, :]
    tl.store(c_ptr + offsets, tl.dot(tl.load(a_ptr + offsets), tl.load(b_ptr + offsets)))


@triton.jit
def arithmetic_kernel(x_ptr, y_ptr, OPERATION: tl.constexpr, N: tl.constexpr):
    """One program: one operation on x [N] in its own dtype."""
    o_n = tl.arange(0, N)
    x = tl.load(x_ptr + o_n)
    if OPERATION == "add":
        y = x + x
    elif OPERATION == "negate":
        y = -x
    elif OPERATION == "scale":
        y = x * 2
    elif OPERATION == "argmax":
        y = tl.argmax(x, 0) + tl.zeros((N,), tl.float32)
    elif OPERATION == "compare":
        y = (x > x).to(tl.float32)
    elif OPERATION == "exp2":
        y = tl.exp2(x)
    elif OPERATION == "fma":
        y = tl.fma(x, x, x)
    elif OPERATION == "sum":
        y = tl.sum(x, 0) + tl.zeros((N,), tl.float32)
    elif OPERATION == "max":
        y = tl.max(x, 0) + tl.zeros((N,), tl.float32)
    elif OPERATION == "cumsum":
        y = tl.cumsum(x, 0)
    elif OPERATION == "atomic":
        y = tl.atomic_add(y_ptr + o_n, x)
    elif OPERATION == "where":
        y = tl.where(o_n > 2, x, x)
    else:
        y = x.to(tl.float32) * 2
    tl.store(y_ptr + o_n, y.to(y_ptr.dtype.element_ty))


@triton.jit
def chain_kernel(y_ptr, count_ptr):
    """Grid (programs + 1). A race: every program adds 1 to what its left neighbour may have left."""
    i = tl.program_id(0)
    tl.store(count_ptr + i, tl.load(count_ptr + i) + 1)
    tl.store(y_ptr + i + 1, tl.load(y_ptr + i) + 1)


@triton.autotune([triton.Config({"FACTOR": 3}), triton.Config({"FACTOR": 5})], key=[])
@triton.jit
def tuned_kernel(x_ptr, y_ptr, FACTOR: tl.constexpr, N: tl.constexpr):
    """One program: y [N] = FACTOR * x."""
    o_n = tl.arange(0, N)
    tl.store(y_ptr + o_n, tl.load(x_ptr + o_n) * FACTOR)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_dot(dtype):
    a, b = (make_input("gaussian", (32, 32), dtype=dtype, seed=seed) for seed in (1, 2))
    c = torch.empty(32, 32)
    matmul_kernel[(1,)](a, b, c, 32)
    assert_close(c, a.double() @ b.double(), a.float() @ b.float())


@pytest.mark.parametrize("operation", ["add", "negate", "scale", "compare", "fma", "sum", "atomic"])
def test_bfloat16_arithmetic_is_refused(operation):
    x = torch.arange(16).bfloat16()
    y = torch.zeros(16, dtype=torch.bfloat16 if operation == "atomic" else torch.float32)
    with pytest.raises(Bfloat16ArithmeticError, match="cast to tl.float32 first"):
        arithmetic_kernel[(1,)](x, y, operation, 16)


@pytest.mark.parametrize(("operation", "factor"), [("where", 1), ("cast", 2)])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_bfloat16_moves_and_casts_are_right(operation, factor, dtype):
    x = torch.arange(-8, 8).bfloat16()
    y = torch.empty(16, dtype=dtype)
    arithmetic_kernel[(1,)](x, y, operation, 16)
    assert torch.equal(y.float(), factor * x.float())


def test_casts_to_bfloat16_round_to_nearest_even():
    x = torch.tensor([0.99999, 1.00390625, 1.01171875, -0.99999, 1e-40, 3.4e38, 65504.0, torch.inf] * 2) / 2
    x[8:] *= -1
    x[3] = torch.nan
    y = torch.empty(16, dtype=torch.bfloat16)
    arithmetic_kernel[(1,)](x, y, "cast", 16)
    torch.testing.assert_close(y, (2 * x).bfloat16(), rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("operation", ["max", "argmax", "cumsum"])
def test_bfloat16_is_right_or_refused_where_triton_promotes_it(operation):
    x = torch.tensor([-3.0, 1.5, 2.5, -0.5] * 4).bfloat16()
    y = torch.empty(16)
    try:
        arithmetic_kernel[(1,)](x, y, operation, 16)
    except Bfloat16ArithmeticError:
        return
    wanted = {"max": x.max().expand(16), "argmax": x.argmax().expand(16), "cumsum": x.float().cumsum(0)}[operation]
    assert torch.equal(y, wanted.float())


@pytest.mark.parametrize("operation", ["add", "negate", "scale", "exp2", "fma", "sum", "max", "cumsum"])
def test_float32_arithmetic_is_untouched(operation):
    x = torch.linspace(-2, 2, 16)
    y = torch.empty(16)
    arithmetic_kernel[(1,)](x, y, operation, 16)
    wanted = {
        "add": 2 * x, "negate": -x, "scale": 2 * x, "exp2": x.exp2(), "fma": x * x + x,
        "sum": x.sum().expand(16), "max": x.max().expand(16), "cumsum": x.cumsum(0),
    }[operation]  # fmt: skip
    torch.testing.assert_close(y, wanted)


def test_autotune_takes_the_first_configuration():
    x, y = torch.arange(16.0), torch.empty(16)
    tuned_kernel[(1,)](x, y, N=16)
    assert torch.equal(y, 3 * x)


def test_programs_run_once_each_and_not_in_order():
    orders = []
    for _ in range(2):
        y, count = torch.zeros(65, dtype=torch.int32), torch.zeros(64, dtype=torch.int32)
        chain_kernel[(64,)](y, count)
        assert torch.equal(count, torch.ones_like(count))
        assert not torch.equal(y, torch.arange(65, dtype=torch.int32))
        orders.append(y)
    assert not torch.equal(*orders)
