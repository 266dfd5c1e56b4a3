# SPDX-License-Identifier: Apache-2.0
"""The CUDA kernel of the matching schedule, executed on the host with emulated matrix instructions and clusters."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.testing import make_input
from lrc_kernels.tome import merge_budget, reference

MARGIN = 1e-5


def plan(host_kernels, metric, budget, *, size=None, protected=None, destination=None, threshold=None,
         precision="fp32", order="reference", zero_policy="isolate", team=1, reverse=False):  # fmt: skip
    """(assign, size, weight, anchor, valid) of the kernel."""
    layout_out = budget.layout_out if threshold is None else budget.layout_in
    total, num_out = metric.shape[0], layout_out.num_tokens
    assign, anchor = torch.full((total,), -7, dtype=torch.int32), torch.full((num_out,), -7, dtype=torch.int32)
    weight, size_out = torch.empty(total), torch.empty(num_out)
    valid = torch.full((num_out,), 7, dtype=torch.uint8)
    host_kernels.call(
        "plan_merge",
        *(metric, total, metric.shape[1], budget.layout_in.cu_seqlens, layout_out.cu_seqlens),
        *(budget.layout_in.num_sequences, budget.layout_in.max_seqlen, budget.r, budget.num_iterations),
        *(size, protected, destination, None if threshold is None else torch.tensor([threshold])),
        *(precision == "bf16", order == "position", zero_policy == "isolate", team),
        *(assign, weight, size_out, anchor, valid),
        reverse=reverse,
    )
    assert bool((valid <= 1).all())
    return assign, size_out, weight, anchor, valid.bool()


def reference_plan(metric, budget, *, size=None, protected=None, destination=None, threshold=None, precision="fp32",
                   order="reference", zero_policy="isolate"):  # fmt: skip
    layout_out = budget.layout_out if threshold is None else budget.layout_in
    return reference.plan(
        metric, budget.layout_in.cu_seqlens, layout_out.cu_seqlens, budget.r, size, protected, destination,
        layout_out.num_tokens, budget.layout_in.max_seqlen, threshold, precision, order, zero_policy, 1,
    )  # fmt: skip


def assert_same_plan(got, wanted):
    for name, mine, theirs in zip(("assign", "size", "weight", "anchor", "valid"), got, wanted, strict=True):
        if name == "size":
            torch.testing.assert_close(mine, theirs, rtol=1e-6, atol=0)
        else:
            assert torch.equal(mine, theirs), name


def check(host_kernels, metric, budget, **options):
    kernel = {name: options.pop(name) for name in ("team", "reverse") if name in options}
    got = plan(host_kernels, metric, budget, **options, **kernel)
    assert_same_plan(got, reference_plan(metric.double(), budget, **options))
    return got


@pytest.mark.parametrize("team", [1, 2, 8])
@pytest.mark.parametrize(
    ("lengths", "width", "budget_of"),
    [
        ([96], 64, {"target": 6}),
        ([70, 0, 33, 1], 20, {"target": [9, 0, 5, 1]}),
        ([33, 57, 2], 88, {"r": [8, 9]}),
        ([49, 7], 1, {"r": 0}),
        ([40], 200, {"target": 12}),
        ([98], 128, {"target": 64}),
        ([300], 16, {"target": 30}),
    ],
)
def test_plan_equals_the_reference(host_kernels, lengths, width, budget_of, team):
    layout = VarlenLayout(lengths)
    metric = make_input("gaussian", (layout.num_tokens, width), seed=1)
    for order in ("reference", "position"):
        check(host_kernels, metric, merge_budget(layout, **budget_of), order=order, team=team)
