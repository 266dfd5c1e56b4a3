# SPDX-License-Identifier: Apache-2.0
"""The copies of the head exchange: the tables against the head layout, Triton against the specification."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout, backend
from lrc_kernels.sequence_parallel import plan_sequence
from lrc_kernels.sequence_parallel.heads import head_layout, head_tables
from lrc_kernels.sequence_parallel.op import gather_heads_op, scatter_heads_op
from lrc_kernels.sequence_parallel.virtual import virtual_attention

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def tensors(num_heads, num_kv_heads, rows, width, dtype, device="cpu", seed=0):
    """q, k, v with NaN, infinities and negative zeros, none of them contiguous."""
    draw = torch.Generator().manual_seed(seed)
    made = []
    for heads in (num_heads, num_kv_heads, num_kv_heads):
        x = torch.randn(heads + 1, width, rows, generator=draw).to(device, dtype)[1:].permute(2, 0, 1)
        if x.numel() > 3:
            x[0, 0, 0], x[-1, -1, -1], x[rows // 2, 0, 0] = torch.nan, torch.inf, -0.0
        made.append(x)
    return made


@settings(max_examples=60, deadline=None)
@given(num_kv=st.integers(1, 6), ratio=st.integers(1, 5), ulysses=st.integers(1, 7), rows=st.integers(0, 5))
def test_messages_hold_the_heads_of_the_layout(num_kv, ratio, ulysses, rows):
    num_heads, layout = num_kv * ratio, head_layout(num_kv * ratio, num_kv, ulysses)
    q, k, v = tensors(num_heads, num_kv, rows, 3, torch.float64)
    tables = head_tables(num_heads, num_kv, ulysses, 1, 2, torch.device("cpu"))
    with backend.use_backend("reference"):
        message = scatter_heads_op([q, k, v], tables.scatter)
    assert message.shape == (ulysses, rows, layout.num_q + 2 * layout.num_kv, 3)
    for rank, parts in enumerate(message):
        q_part, k_part, v_part = parts.split([layout.num_q, layout.num_kv, layout.num_kv], 1)
        for part, x, held in ((q_part, q, layout.q), (k_part, k, layout.kv), (v_part, v, layout.kv)):
            own = x[:, held[rank]]
            torch.testing.assert_close(part[:, : own.shape[1]], own, rtol=0, atol=0, equal_nan=True)
            assert bool((part[:, own.shape[1] :] == 0).all())


@settings(max_examples=40, deadline=None)
@given(num_kv=st.integers(1, 5), ratio=st.integers(1, 4), ulysses=st.integers(1, 6), seed=st.integers(0, 9))
def test_gathering_is_the_adjoint_of_scattering(num_kv, ratio, ulysses, seed):
    draw = torch.Generator().manual_seed(seed)
    tables = head_tables(num_kv * ratio, num_kv, ulysses, 1, 2, torch.device("cpu"))
    xs = [torch.randn(4, heads, 3, generator=draw, dtype=torch.float64) for heads in (num_kv * ratio, num_kv, num_kv)]
    with backend.use_backend("reference"):
        message = scatter_heads_op(xs, tables.scatter)
        y = torch.randn(message.shape, generator=draw, dtype=torch.float64)
        back = gather_heads_op(y, tables.gather, [x.shape[1] for x in xs], torch.float64)
    wanted = sum((x * z).sum() for x, z in zip(xs, back, strict=True))
    torch.testing.assert_close((message * y).sum(), wanted)


@pytest.mark.triton
@settings(max_examples=12, deadline=None)
@given(
    num_kv=st.integers(1, 4),
    ratio=st.integers(1, 4),
    ulysses=st.integers(1, 5),
    rows=st.sampled_from((0, 1, 7, 70)),
    width=st.sampled_from((1, 16, 40, 128)),
    dtype=st.sampled_from(DTYPES),
)
def test_triton_moves_what_the_specification_moves(device, num_kv, ratio, ulysses, rows, width, dtype):
    tables = head_tables(num_kv * ratio, num_kv, ulysses, 1, 2, device)
    xs = tensors(num_kv * ratio, num_kv, rows, width, dtype, device)
    message = torch.randn(ulysses, rows, tables.scatter.shape[1], width, device=device).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    results = []
    for name in ("triton", "reference"):
        with backend.use_backend(name), backend.record() as ran:
            scattered = scatter_heads_op(xs, tables.scatter)
            gathered = [y for kind in (dtype, wide) for y in
                        gather_heads_op(message, tables.gather, [x.shape[1] for x in xs], kind)]  # fmt: skip
        assert {used for _, used in ran} == {name} and all(x.is_contiguous() for x in (scattered, *gathered))
        results.append((scattered, *gathered))
    for got, wanted in zip(*results, strict=True):
        assert got.dtype == wanted.dtype
        torch.testing.assert_close(got, wanted, rtol=0, atol=0, equal_nan=True)


@pytest.mark.triton
@pytest.mark.no_poison
def test_channels_past_two_to_the_31(device):
    """Channels 2^30 elements apart: only their pages are touched."""
    x = torch.empty(2**31 + 1, dtype=torch.float16, device=device).as_strided((1, 1, 3), (1, 1, 2**30))
    x.copy_(torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 3))
    with backend.use_backend("triton"):
        assert scatter_heads_op([x], head_tables(1, 1, 1, 1, 0, device).scatter).flatten().tolist() == [1, 2, 3]


@pytest.mark.triton
def test_triton_says_what_it_cannot_take(device):
    x = torch.zeros(2, 1, 4096, device=device)
    tables = head_tables(1, 1, 2, 1, 0, device)
    with (
        backend.use_backend("triton"),
        pytest.raises(RuntimeError, match="a head must have up to 2048 elements, got 4096"),
    ):
        scatter_heads_op([x], tables.scatter)
    with backend.use_backend("triton"), pytest.raises(RuntimeError, match="it moves up to 4 tensors, got 5"):
        scatter_heads_op([x[..., :8]] * 5, head_tables(1, 1, 2, 5, 0, device).scatter)


@pytest.mark.triton
@pytest.mark.parametrize("transport", ["ring", "sparse"])
def test_every_op_of_a_2d_pass_runs_in_triton(device, transport):
    plan = plan_sequence(VarlenLayout([20, 1, 13], device), ring=2, ulysses=2, num_heads=2, num_kv_heads=1, head_dim=16,
                         transport=transport)  # fmt: skip
    draw, results = torch.Generator().manual_seed(0), []
    q, k, v, dout = (torch.randn(34, n, 16, generator=draw).to(device, torch.bfloat16) for n in (2, 1, 1, 2))
    for name in ("triton", "reference"):
        inputs = [x.clone().requires_grad_() for x in (q, k, v)]
        with backend.use_backend(name), backend.record() as ran:
            out = virtual_attention(*inputs, plan)
            out.backward(dout)
        assert {used for _, used in ran} == {name}
        assert {"scatter_heads_fwd", "gather_heads_fwd", "attention_accumulate_", "attention_bwd"} <= {
            op for op, _ in ran
        }
        results.append([out.detach(), *(x.grad for x in inputs)])
    for got, wanted in zip(*results, strict=True):
        assert (got.double() - wanted.double()).norm() <= 1e-2 * wanted.double().norm()
