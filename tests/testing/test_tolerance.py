# SPDX-License-Identifier: Apache-2.0
"""The tolerance rule accepts what it should, and refuses the rest with both errors in the message."""

import pytest
import torch

from lrc_kernels.testing import assert_close, assert_equal_index, ulp


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("value", [1.0, 1.5, 0.9, 3e-3, 1024.0])
def test_ulp_is_the_distance_to_the_next_number(dtype, value):
    x = torch.tensor(value, dtype=dtype)
    bits = {8: torch.int64, 4: torch.int32, 2: torch.int16}[x.element_size()]
    following = (x.view(bits) + 1).view(dtype)
    assert ulp(x.double(), dtype).item() == following.double().item() - x.double().item()


def test_ulp_of_zero_is_the_smallest_subnormal():
    assert ulp(0.0, torch.float16).item() == 2.0**-24


def test_bound_is_twice_the_error_of_torch_plus_two_ulp():
    reference = torch.tensor([1.0, 0.5], dtype=torch.float64)
    same = torch.tensor([1.0 + 4 * 2**-23, 0.5])
    bound = 2 * 4 * 2**-23 + 2 * 2**-23
    assert_close(torch.tensor([1.0 + bound, 0.5]), reference, same)
    with pytest.raises(
        AssertionError, match=r"same-dtype torch.*ulp of torch\.float32.*1 of 2 elements, worst at \[0\]"
    ):
        assert_close(torch.tensor([1.0 + bound + 2**-23, 0.5]), reference, same)


def test_dim_holds_each_row_to_its_own_scale():
    reference = torch.tensor([[1e6, 1e6], [1.0, 1.0]], dtype=torch.float64)
    actual = torch.tensor([[1e6, 1e6], [1.0, 1.01]])
    assert_close(actual, reference, reference.float())
    with pytest.raises(AssertionError, match=r"worst at \[1, 1\]"):
        assert_close(actual, reference, reference.float(), dim=-1)


@pytest.mark.parametrize("wrong", [0.0, torch.inf, -torch.inf, torch.nan])
@pytest.mark.parametrize("wanted", [2.0, torch.inf, -torch.inf, torch.nan])
def test_nan_and_infinity_must_agree(wanted, wrong):
    reference = torch.tensor([1.0, wanted], dtype=torch.float64)
    assert_close(reference.float(), reference, reference.float(), name="metric")
    if str(wanted) != str(wrong):
        with pytest.raises(AssertionError, match=r"^metric: "):
            assert_close(torch.tensor([1.0, wrong]), reference, reference.float(), name="metric")


def test_overflow_of_the_output_dtype_is_infinity():
    reference = torch.tensor([1e6, 1.0], dtype=torch.float64)
    assert_close(reference.half(), reference, reference.half())
    with pytest.raises(AssertionError, match=r"got 65504.0, wanted inf"):
        assert_close(torch.tensor([65504.0, 1.0]).half(), reference, reference.half())


def test_scalars_and_empty_tensors():
    assert_close(torch.tensor(1.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0))
    assert_close(torch.empty(0, 3), torch.empty(0, 3, dtype=torch.float64), torch.empty(0, 3))
    with pytest.raises(AssertionError, match=r"worst at \[\]"):
        assert_close(torch.tensor(2.0), torch.tensor(1.0, dtype=torch.float64), torch.tensor(1.0))


def test_refuses_arguments():
    x, y = torch.ones(2), torch.ones(2, dtype=torch.float64)
    with pytest.raises(TypeError, match="reference must be float64, got torch.float32"):
        assert_close(x, x, x)
    with pytest.raises(TypeError, match="same_dtype must have the floating dtype"):
        assert_close(x, y, y)
    with pytest.raises(ValueError, match=r"reference must have shape \[2\], got \[3\]"):
        assert_close(x, torch.ones(3, dtype=torch.float64), x)


def test_equal_index():
    expected = torch.tensor([[0, 1], [2, 3]])
    assert_equal_index(expected.int(), expected)
    with pytest.raises(AssertionError, match=r"assign: 1 of 4 indices differ: \[1, 0\] got 9, wanted 2"):
        assert_equal_index(torch.tensor([[0, 1], [9, 3]]), expected, name="assign")
    with pytest.raises(AssertionError, match=r"shape \[4\] differs from \[2, 2\]"):
        assert_equal_index(expected.flatten(), expected)
    with pytest.raises(TypeError, match="actual must be an integer"):
        assert_equal_index(expected.float(), expected)
