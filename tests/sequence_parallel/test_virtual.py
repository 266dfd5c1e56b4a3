# SPDX-License-Identifier: Apache-2.0
"""All ranks of a schedule in one process against full attention in fp64: a grid that covers every pair of options."""

import itertools
import random

import pytest
import torch

from lrc_kernels import VarlenLayout, backend
from lrc_kernels.attention import varlen_attention
from lrc_kernels.sequence_parallel import plan_sequence
from lrc_kernels.sequence_parallel.comm import AllGather, Shift, VirtualRanks
from lrc_kernels.sequence_parallel.virtual import virtual_attention

AXES = {
    "arrangement": ("contiguous", "zigzag", "zigzag_per_seq", "balanced"),
    "ring": (1, 2, 3, 5, 8),
    "ulysses": (1, 2, 3, 4),
    "transport": ("ring", "sparse", "gather"),
    "dtype": (torch.float64, torch.float32, torch.bfloat16),
    "heads": ((4, 4), (8, 2), (6, 3), (5, 1), (10, 5)),
    "causal": (True, False),
    "lengths": ("ragged", "tiny", "one", "short"),
}
LENGTHS = {
    "ragged": [37, 0, 1, 120, 5, 60],
    "tiny": [1 + i % 3 for i in range(120)],
    "one": [190],
    "short": [3, 0, 2],
}
BOUND = {torch.float64: 1e-14, torch.float32: 2e-6}


def pairwise_cover(axes, seed=0):
    """Few cases in which every two values of different axes meet: greedily, the best of random candidates."""
    draw, names = random.Random(seed), list(axes)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(axes[names[a]]))
        for j in range(len(axes[names[b]]))
    }
    cases = []
    while missing:
        a, i, b, j = min(missing)
        best = None
        for _ in range(30):
            case = [draw.randrange(len(axes[name])) for name in names]
            case[a], case[b] = i, j
            covered = {(x, case[x], y, case[y]) for x, y in itertools.combinations(range(len(names)), 2)} & missing
            if best is None or len(covered) > len(best[1]):
                best = case, covered
        cases.append({name: axes[name][at] for name, at in zip(names, best[0], strict=True)})
        missing -= best[1]
    return cases


def inputs(lengths, heads, dtype, head_dim=16, seed=0):
    draw = torch.Generator().manual_seed(seed)
    rows = sum(lengths)
    shapes = ((rows, heads[0], head_dim), (rows, heads[1], head_dim), (rows, heads[1], head_dim), (rows, heads[0], head_dim))
    return [torch.randn(shape, generator=draw, dtype=torch.float64).to(dtype) for shape in shapes]


def results(attention, q, k, v, dout):
    q, k, v = (x.detach().clone().requires_grad_() for x in (q, k, v))
    out = attention(q, k, v)
    out = out[0] if isinstance(out, tuple) else out
    out.backward(dout)
    return {"out": out.detach(), "dq": q.grad, "dk": k.grad, "dv": v.grad}


def full(layout, causal, key_bias=None):
    return lambda q, k, v: varlen_attention(q, k, v, cu_seqlens_q=layout, causal=causal, key_bias=key_bias)


def truth(layout, causal, tensors, key_bias=None):
    bias = None if key_bias is None else key_bias.double()
    with backend.use_backend("reference"):
        return results(full(layout, causal, bias), *(x.double() for x in tensors))


def error(actual, exact):
    return ((actual.double() - exact).norm() / exact.norm().clamp(min=1e-300)).item()


def check(actual, exact, dtype, one_process=None):
    for name, value in actual.items():
        assert value.dtype == dtype
        bound = BOUND.get(dtype)
        if bound is None:
            bound = 1.5 * error(one_process[name], exact[name]) + 5e-4
        assert error(value, exact[name]) <= bound, (name, error(value, exact[name]), bound)


def case_id(case):
    return "-".join(str(value).removeprefix("torch.").replace(" ", "") for value in case.values())


CASES = pairwise_cover(AXES)


@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_equals_full_attention(case):
    lengths, (num_heads, num_kv_heads), dtype = LENGTHS[case["lengths"]], case["heads"], case["dtype"]
    layout = VarlenLayout(lengths)
    plan = plan_sequence(layout, ring=case["ring"], ulysses=case["ulysses"], num_heads=num_heads,
                         num_kv_heads=num_kv_heads, head_dim=16, arrangement=case["arrangement"],
                         causal=case["causal"], transport=case["transport"])  # fmt: skip
    tensors = inputs(lengths, case["heads"], dtype)
    ranks = VirtualRanks(plan.ring, plan.ulysses)
    actual = results(lambda q, k, v: virtual_attention(q, k, v, plan, ranks=ranks), *tensors)
    exact = truth(layout, case["causal"], tensors)
    check(actual, exact, dtype, results(full(layout, case["causal"]), *tensors))
    if dtype == torch.bfloat16 and plan.ulysses == 1:
        stats = plan.stats()
        assert ranks.bytes_sent == stats.bytes_forward + stats.bytes_backward


def test_the_grid_covers_every_pair_and_stays_small():
    assert len(CASES) <= 250
    for a, b in itertools.combinations(AXES, 2):
        assert {(case[a], case[b]) for case in CASES} == set(itertools.product(AXES[a], AXES[b]))
