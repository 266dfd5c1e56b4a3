# SPDX-License-Identifier: Apache-2.0
"""The one tolerance rule of the project: a kernel may err twice as much as PyTorch does in the same dtype.

In: the kernel's result, the fp64 reference, PyTorch's result in the kernel's dtype. Out: an AssertionError that prints
both errors, or nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor


def ulp(value: Tensor | float, dtype: torch.dtype) -> Tensor:
    """Distance between neighbouring numbers of `dtype` at |value|, in fp64; at least the smallest subnormal.

    >>> float(ulp(1.5, torch.bfloat16))
    0.0078125
    """
    info = torch.finfo(dtype)
    magnitude = torch.as_tensor(value, dtype=torch.float64).abs().clamp(min=info.smallest_normal, max=info.max)
    # frexp's mantissa lies in [0.5, 1), so the leading bit of the value is exponent - 1.
    return torch.ldexp(torch.full_like(magnitude, info.eps), torch.frexp(magnitude).exponent - 1)


def assert_close(
    actual: Tensor, reference: Tensor, same_dtype: Tensor, *, dim: int | tuple[int, ...] | None = None, name: str = ""
) -> None:
    """Assert max|actual - reference| <= 2 * max|same_dtype - reference| + 2 * ulp(max|reference|).

    The maxima run over the elements where the reference, rounded to the result's dtype, is finite; there `actual` must
    be finite too, and elsewhere it must hold the same NaN or infinity. ulp is that of `actual.dtype`. The maxima run
    over the whole tensor, or with `dim` over these dimensions only: `dim=-1` holds every row to its own scale.

    Args:
        actual: the kernel's result, fp64, fp32, bf16 or fp16, any shape.
        reference: fp64, the same shape.
        same_dtype: the result of plain PyTorch computing in `actual.dtype`, the same shape.
        dim: dimensions that the maxima run over (default: all).
        name: printed in front of the message.

    Raises:
        AssertionError: naming both errors, the bound and the worst element.
        TypeError, ValueError: a reference that is not fp64, dtypes or shapes that differ.
    """
    if reference.dtype != torch.float64:
        raise TypeError(f"reference must be float64, got {reference.dtype}")
    if actual.dtype != same_dtype.dtype or not actual.is_floating_point():
        raise TypeError(f"same_dtype must have the floating dtype of actual ({actual.dtype}), got {same_dtype.dtype}")
    for argument, tensor in (("reference", reference), ("same_dtype", same_dtype)):
        if tensor.shape != actual.shape:
            raise ValueError(f"{argument} must have shape {list(actual.shape)}, got {list(tensor.shape)}")
    if actual.numel() == 0:
        return
    actual_, reference, same = (t.detach().to("cpu", torch.float64) for t in (actual, reference, same_dtype))
    prefix = f"{name}: " if name else ""
    rounded = reference.to(actual.dtype).double()
    _assert_same_nonfinite(actual_, rounded, prefix)
    finite = rounded.isfinite()
    scale = torch.where(finite, reference, 0.0).abs()
    error = torch.where(finite, actual_ - reference, 0.0).abs()
    error_same = torch.where(finite & same.isfinite(), same - reference, 0.0).abs()
    dims = tuple(range(actual.dim())) if dim is None else dim
    if actual.dim():
        scale, largest_same = scale.amax(dims, keepdim=True), error_same.amax(dims, keepdim=True)
    else:
        largest_same = error_same
    one_ulp = ulp(scale, actual.dtype)
    bound = (2 * largest_same + 2 * one_ulp).expand_as(error)
    if bool((error <= bound).all()):
        return
    worst = int((error - bound).argmax())
    at = tuple(int(i) for i in torch.unravel_index(torch.tensor(worst), actual.shape)) if actual.dim() else ()
    raise AssertionError(
        f"{prefix}error {error[at]:.4g} exceeds {bound[at]:.4g} = 2 * {largest_same.expand_as(error)[at]:.4g} "
        f"(same-dtype torch) + 2 * {one_ulp.expand_as(error)[at]:.4g} (ulp of {actual.dtype}); "
        f"{int((error > bound).sum())} of {error.numel()} elements, worst at {list(at)}: "
        f"got {actual_[at]:.9g}, reference {reference[at]:.9g}, same-dtype torch {same[at]:.9g}"
    )


def assert_equal_index(actual: Tensor, expected: Tensor, *, name: str = "") -> None:
    """Assert that two integer or bool tensors are equal, element by element; values are compared, not the width.

    Raises:
        AssertionError: the number of differing elements and the first five of them.
        TypeError: a floating-point tensor.
    """
    for argument, tensor in (("actual", actual), ("expected", expected)):
        if tensor.is_floating_point() or tensor.is_complex():
            raise TypeError(f"{argument} must be an integer or bool tensor, got {tensor.dtype}")
    prefix = f"{name}: " if name else ""
    if actual.shape != expected.shape:
        raise AssertionError(f"{prefix}shape {list(actual.shape)} differs from {list(expected.shape)}")
    actual, expected = actual.detach().cpu().long(), expected.detach().cpu().long()
    different = (actual != expected).reshape(actual.shape or (1,)).nonzero()
    if len(different):
        shown = ", ".join(
            f"{row} got {int(actual[tuple(row)] if actual.dim() else actual)}, "
            f"wanted {int(expected[tuple(row)] if actual.dim() else expected)}"
            for row in different[:5].tolist()
        )
        raise AssertionError(f"{prefix}{len(different)} of {actual.numel()} indices differ: {shown}")


def _assert_same_nonfinite(actual: Tensor, expected: Tensor, prefix: str) -> None:
    same = torch.where(expected.isnan(), actual.isnan(), actual == expected)
    wrong = ~(same | (expected.isfinite() & actual.isfinite()))
    if bool(wrong.any()):
        at = tuple(wrong.nonzero()[0].tolist()) if wrong.dim() else ()
        raise AssertionError(
            f"{prefix}NaN or infinity in the wrong place: {int(wrong.sum())} elements, first at {list(at)}: "
            f"got {actual[at].item()}, wanted {expected[at].item()}"
        )
