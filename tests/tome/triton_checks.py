# SPDX-License-Identifier: Apache-2.0
"""What the tests of ToMe's Triton kernels share."""

import torch

from lrc_kernels.backend import record, use_backend


def on_triton(function, *args, **options):
    """Run on the Triton backend, and see that nothing else ran."""
    with use_backend("triton"), record() as ran:
        result = function(*args, **options)
    assert ran and {backend for _, backend in ran} == {"triton"}
    return result


def on_reference(function, *args, **options):
    with use_backend("reference"):
        return function(*args, **options)


def assert_same_plan(plan, wanted):
    assert torch.equal(plan.assign, wanted.assign)
    assert torch.equal(plan.anchor, wanted.anchor)
    torch.testing.assert_close(plan.size, wanted.size, rtol=1e-6, atol=0)
    assert torch.equal(plan.weight, wanted.weight)
    assert (plan.valid is None) == (wanted.valid is None)
    assert plan.valid is None or torch.equal(plan.valid, wanted.valid)
