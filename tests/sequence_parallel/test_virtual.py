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
    "tiny": [1 + i % 3 for i in range(240)],
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
    shapes = (
        (rows, heads[0], head_dim),
        (rows, heads[1], head_dim),
        (rows, heads[1], head_dim),
        (rows, heads[0], head_dim),
    )
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


@pytest.mark.parametrize("arrangement", AXES["arrangement"])
def test_the_error_does_not_grow_with_the_ring(arrangement):
    lengths, errors = [300, 90, 121], {}
    layout, tensors = VarlenLayout(lengths), inputs(lengths, (4, 2), torch.bfloat16)
    exact = truth(layout, True, tensors)
    for ring in (2, 16):
        plan = plan_sequence(layout, ring=ring, num_heads=4, num_kv_heads=2, head_dim=16, arrangement=arrangement)
        actual = results(lambda q, k, v, plan=plan: virtual_attention(q, k, v, plan), *tensors)
        errors[ring] = {name: error(value, exact[name]) for name, value in actual.items()}
    for name in errors[2]:
        assert errors[16][name] <= 1.1 * errors[2][name] + 1e-4, (name, errors)


@pytest.mark.parametrize("transport", AXES["transport"])
def test_thirty_two_ranks(transport):
    lengths = [61, 0, 300, 2, 90]
    layout, tensors = VarlenLayout(lengths), inputs(lengths, (8, 2), torch.float64)
    plan = plan_sequence(layout, ring=8, ulysses=4, num_heads=8, num_kv_heads=2, head_dim=16, transport=transport)
    actual = results(lambda q, k, v: virtual_attention(q, k, v, plan), *tensors)
    check(actual, truth(layout, True, tensors), torch.float64)


@pytest.mark.parametrize(("ring", "ulysses", "transport"), [(3, 1, "ring"), (2, 3, "sparse"), (3, 2, "gather")])
def test_key_bias_and_lse(ring, ulysses, transport):
    lengths = [40, 1, 77]
    layout = VarlenLayout(lengths)
    plan = plan_sequence(layout, ring=ring, ulysses=ulysses, num_heads=6, num_kv_heads=2, head_dim=16,
                         transport=transport)  # fmt: skip
    bias = torch.randn(118, generator=torch.Generator().manual_seed(1))
    bias[3], bias[40] = -torch.inf, -torch.inf
    for dtype in (torch.float32, torch.bfloat16, torch.float64):
        tensors, own = inputs(lengths, (6, 2), dtype), bias.double() if dtype == torch.float64 else bias
        actual = results(lambda q, k, v, own=own: virtual_attention(q, k, v, plan, key_bias=own), *tensors)
        check(actual, truth(layout, True, tensors, bias), dtype, results(full(layout, True, own), *tensors))
        with torch.no_grad():
            out, lse = virtual_attention(*tensors[:3], plan, key_bias=own, return_lse=True)
            with backend.use_backend("reference"):
                wide = (x.double() for x in tensors[:3])
                _, wanted = varlen_attention(*wide, cu_seqlens_q=layout, key_bias=bias.double(), return_lse=True)
        assert lse.dtype == own.dtype and lse.shape == (6, 118)
        # The only key of the document of one row is hidden: nothing is left to see.
        assert bool((lse[:, 40] == -torch.inf).all()) and bool((out[40] == 0).all())
        torch.testing.assert_close(lse.double(), wanted, rtol=1e-6, atol=2e-6)


@pytest.mark.parametrize("transport", AXES["transport"])
@pytest.mark.parametrize("ulysses", [1, 2])
def test_gradients_through_two_ranks(transport, ulysses):
    layout = VarlenLayout([3, 1, 2])
    plan = plan_sequence(layout, ring=2, ulysses=ulysses, num_heads=2, num_kv_heads=1, head_dim=2, transport=transport,
                         arrangement="balanced", chunk=1)  # fmt: skip
    q, k, v, _ = (x.requires_grad_() for x in inputs([6], (2, 1), torch.float64, head_dim=2))
    assert torch.autograd.gradcheck(lambda *x: virtual_attention(*x, plan, return_lse=True), (q, k, v))


def test_the_wire_of_gradients_is_selectable():
    lengths = [150]
    layout, tensors = VarlenLayout(lengths), inputs(lengths, (4, 2), torch.bfloat16)
    exact, sent, errors = truth(layout, True, tensors), {}, {}
    plan = plan_sequence(layout, ring=5, num_heads=4, num_kv_heads=2, head_dim=16, transport="ring")
    for wire in (torch.float64, None, torch.float32, torch.bfloat16):
        ranks = VirtualRanks(5)
        actual = results(lambda *x, wire=wire, r=ranks: virtual_attention(*x, plan, grad_wire=wire, ranks=r), *tensors)
        sent[wire], errors[wire] = ranks.bytes_sent, error(actual["dk"], exact["dk"])
    keys = (5 - 1) * 150 * 2 * 2 * 16
    assert sent == {wire: keys * (2 + 2 + size) for wire, size in
                    ((torch.float64, 8), (None, 4), (torch.float32, 4), (torch.bfloat16, 2))}  # fmt: skip
    assert errors[None] == errors[torch.float32] < errors[torch.bfloat16] < 0.02


@pytest.mark.parametrize("transport", AXES["transport"])
@pytest.mark.parametrize("arrangement", AXES["arrangement"])
def test_documents_do_not_touch_each_other_and_runs_repeat(transport, arrangement):
    lengths = [50, 70, 3, 80]
    layout, tensors = VarlenLayout(lengths), inputs(lengths, (4, 2), torch.bfloat16)
    plan = plan_sequence(layout, ring=4, ulysses=2, num_heads=4, num_kv_heads=2, head_dim=16, arrangement=arrangement,
                         transport=transport)  # fmt: skip
    attend = lambda q, k, v: virtual_attention(q, k, v, plan)  # noqa: E731
    first, again = results(attend, *tensors), results(attend, *tensors)
    for x in tensors:
        x[50:120] = torch.nan
    perturbed = results(attend, *tensors)
    others = torch.ones(203, dtype=torch.bool)
    others[50:120] = False
    for name, value in first.items():
        assert torch.equal(value, again[name])
        assert torch.equal(value[others], perturbed[name][others]), name


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_a_key_that_is_not_finite_is_seen_wherever_it_lies(dtype, value):
    q, k, v, dout = inputs([60], (2, 2), dtype)
    q, k[20] = q.abs(), value
    for transport in AXES["transport"]:
        plan = plan_sequence(VarlenLayout([60]), ring=4, num_heads=2, num_kv_heads=2, head_dim=16, transport=transport)
        spoiled = results(lambda *x, plan=plan: virtual_attention(*x, plan), q, k, v, dout)["out"].isnan().all(2).all(1)
        assert spoiled.nonzero().flatten().tolist() == list(range(20, 60)), transport


def test_inference_mode():
    layout, tensors = VarlenLayout([20, 13]), inputs([20, 13], (4, 2), torch.float64)
    plan = plan_sequence(layout, ring=3, ulysses=2, num_heads=4, num_kv_heads=2, head_dim=16)
    with torch.inference_mode():
        out = virtual_attention(*tensors[:3], plan)
    assert error(out, truth(layout, True, tensors)["out"]) <= 1e-14


def test_an_unused_result_gives_no_gradient():
    layout = VarlenLayout([9])
    plan = plan_sequence(layout, ring=2, num_heads=2, num_kv_heads=2, head_dim=16)
    q, k, v, _ = (x.requires_grad_() for x in inputs([9], (2, 2), torch.float64))
    _, lse = virtual_attention(q, k, v, plan, return_lse=True)
    lse.sum().backward()
    _, wanted = varlen_attention(q2 := q.detach().requires_grad_(), k, v, cu_seqlens_q=layout, return_lse=True)
    wanted.sum().backward()
    torch.testing.assert_close(q.grad, q2.grad)


def test_virtual_ranks_find_what_a_network_would_hide():
    def writes(r, u):
        sent = torch.zeros(3)
        arriving = yield Shift("ring", sent, 3, 7)
        sent += 1
        yield arriving

    def waits(r, u):
        if r == 0:
            yield (yield AllGather("ring", torch.zeros(1), 4))

    def differs(r, u):
        yield (yield (AllGather("ring", torch.zeros(1), 0) if r else Shift("ring", torch.zeros(1), 1, 0)))

    def expects(r, u):
        yield (yield Shift("ring", torch.zeros(1), 2, 0))

    for schedule, message in (
        (writes, "wrote to what it sent at step 7"),
        (waits, r"deadlock: \(0, 0\) at step 4"),
        (differs, "posted a"),
        (expects, r"expected \[2\] rows at step 0, got \[1\]"),
    ):
        with pytest.raises(RuntimeError, match=message):
            VirtualRanks(2).run(schedule)
