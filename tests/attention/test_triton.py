# SPDX-License-Identifier: Apache-2.0
"""The Triton kernels of attention against the fp64 reference: small tiles in the interpreter, on a GPU as shipped."""

from itertools import accumulate

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from lrc_kernels.attention import reference
from lrc_kernels.attention.op import accumulate_op, backward_op, forward_op, merge_op
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close, segment_lengths

# numpy warns in the interpreter where NaN and inf - inf are computed and then masked.
pytestmark = [
    pytest.mark.triton,
    pytest.mark.filterwarnings("ignore:(invalid value|divide by zero|overflow) encountered:RuntimeWarning"),
    pytest.mark.filterwarnings("ignore:All-NaN slice:RuntimeWarning"),
]
FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = [FP32, BF16, FP16]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    """Tiles of 16 in the interpreter, so that every loop runs three times or more; the shipped ones on a GPU."""
    if device.type == "cuda":
        return
    from lrc_kernels.attention import triton_backward, triton_kernels
    from lrc_kernels.attention.triton_tiles import Blocks

    small = Blocks(16, 16, 4, 1)
    monkeypatch.setattr(triton_kernels, "forward_blocks", lambda K, dtype, capability: small)
    monkeypatch.setattr(triton_backward, "backward_blocks", lambda K, dtype, capability: (small, small))


def on_triton(function, *args):
    """Run on the Triton backend, and see that nothing else ran."""
    with use_backend("triton"), record() as ran:
        result = function(*args)
    assert [backend for _, backend in ran] == ["triton"]
    return result


def offsets(lengths, device):
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32, device=device)


def make_pack(lengths_q, lengths_k, device, bias=None, causal=True, window=(-1, -1), scale=0.3):
    longest = (max([0, *lengths_q]), max([0, *lengths_k]))
    return (offsets(lengths_q, device), offsets(lengths_k, device), bias, *longest, causal, scale, *window)


def draw(shape, dtype, device, layout="contiguous"):
    """Random numbers; "strided" rows of a packed projection, "heads_first" a transposed [H, T, K], "channels" apart."""
    rows, heads, K = shape
    if layout == "strided":
        return torch.randn(rows, heads, 3 * K).to(device, dtype)[..., K : 2 * K]
    if layout == "heads_first":
        return torch.randn(heads, rows, K).to(device, dtype).transpose(0, 1)
    if layout == "channels":
        return torch.randn(rows, heads, K, 2).to(device, dtype)[..., 0]
    return torch.randn(shape).to(device, dtype)


def draw_bias(rows, device):
    return torch.randn(rows).masked_fill(torch.rand(rows) < 0.2, -torch.inf).to(device)


def check_forward(q, k, v, pack):
    """(out, lse) by Triton, which are within the tolerance of fp64."""
    out, lse = on_triton(forward_op, q, k, v, *pack)
    exact = reference.forward(q.double(), k.double(), v.double(), *pack)
    same = reference.forward(q, k, v, *pack)
    assert_close(out, exact[0], same[0], name="out")
    assert_close(lse, exact[1], same[1], name="lse")
    return out, lse


def check_backward(dout, q, k, v, out, lse, dlse, pack):
    gradients = on_triton(backward_op, dout, q, k, v, out, lse, dlse, *pack)
    wide = [None if x is None else x.double() for x in (dout, q, k, v, out, lse, dlse)]
    exact = reference.backward(*wide, *pack)
    same = reference.backward(dout, q, k, v, out, lse, dlse, *pack)
    for name, *three in zip(("dq", "dk", "dv"), gradients, exact, same, strict=True):
        assert_close(*three, name=name)
    return gradients


# Every pair of values of two columns stands in some row.
@pytest.mark.parametrize(
    ("dtype", "lengths", "heads", "K", "causal", "window", "bias", "layout", "dlse", "tail"),
    [
        (FP32, ([53, 0, 1, 18], [53, 0, 1, 18]), (2, 2), 16, True, (-1, -1), False, "contiguous", False, 0),
        (BF16, ([53, 0, 1, 18], [53, 0, 1, 18]), (2, 1), 24, True, (20, -1), True, "strided", True, 3),
        (FP16, ([50, 7], [50, 7]), (3, 1), 40, True, (-1, -1), False, "heads_first", True, 0),
        (FP32, ([35, 5], [50, 21]), (4, 2), 8, True, (-1, -1), True, "channels", True, 2),
        (BF16, ([35, 20], [50, 61]), (2, 2), 5, False, (-1, -1), False, "heads_first", False, 0),
        (FP16, ([60, 33], [20, 50]), (2, 1), 16, True, (-1, 4), True, "contiguous", False, 1),
        (FP32, ([60, 33], [20, 50]), (2, 2), 12, False, (7, 20), False, "strided", True, 0),
        (BF16, ([0, 49, 5], [9, 0, 51]), (2, 1), 16, False, (-1, -1), True, "contiguous", True, 0),
        (FP16, ([1, 1, 1], [50, 1, 33]), (4, 1), 32, True, (25, -1), True, "channels", False, 0),
        (FP32, ([55], [55]), (2, 1), 20, False, (0, 0), True, "heads_first", False, 5),
        (BF16, ([55], [70]), (2, 1), 16, False, (-1, 20), False, "channels", True, 0),
        (FP16, ([51], [40]), (2, 2), 64, False, (17, -1), False, "strided", False, 0),
    ],
)
def test_forward_and_backward(device, dtype, lengths, heads, K, causal, window, bias, layout, dlse, tail):
    rows_q, rows_k = (sum(x) + tail for x in lengths)
    q = draw((rows_q, heads[0], K), dtype, device, layout)
    k, v = (draw((rows_k, heads[1], K), dtype, device, layout) for _ in range(2))
    pack = make_pack(*lengths, device, draw_bias(rows_k, device) if bias else None, causal, window, K**-0.5)
    out, lse = check_forward(q, k, v, pack)
    if tail:
        assert bool((out[-tail:] == 0).all()) and bool((lse[:, -tail:] == -torch.inf).all())
    dout = draw(q.shape, dtype, device, layout)
    dlse = torch.randn(rows_q, heads[0]).to(device).T if dlse else None
    check_backward(dout, q, k, v, out, lse, dlse, pack)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    data=st.data(), dtype=st.sampled_from(DTYPES), causal=st.booleans(), bounded=st.tuples(st.booleans(), st.booleans())
)
def test_random_packs(device, data, dtype, causal, bounded):
    lengths_q = data.draw(segment_lengths(9, 40, min_segments=0))
    lengths_k = data.draw(st.lists(st.integers(0, 40), min_size=len(lengths_q), max_size=len(lengths_q)))
    window = tuple(data.draw(st.integers(0, 40)) if there else -1 for there in bounded)
    torch.manual_seed(len(lengths_q))
    q, k, v = (draw((sum(n), h, 8), dtype, device) for n, h in ((lengths_q, 2), (lengths_k, 1), (lengths_k, 1)))
    check_forward(q, k, v, make_pack(lengths_q, lengths_k, device, None, causal, window))


@pytest.mark.parametrize("scale", [-0.5, 0.0, 30.0])
def test_any_softmax_scale(device, scale):
    q, k, v = (draw((40, 1, 16), FP32, device) for _ in range(3))
    pack = make_pack([40], [40], device, scale=scale)
    out, lse = check_forward(q, k, v, pack)
    check_backward(draw(q.shape, FP32, device), q, k, v, out, lse, None, pack)


@pytest.mark.parametrize(("dtype", "layout"), [(FP32, "contiguous"), (BF16, "strided")])
def test_accumulating_blocks_equals_one_shot(device, dtype, layout):
    """The keys of each sequence come in three blocks, one of them empty, one hidden by its bias; the last is causal."""
    lengths, blocks = [37, 20], ([20, 0], [9, 12], [37, 20])
    q = draw((57, 4, 16), dtype, device, layout)
    state = [torch.zeros(57, 4, 16, device=device), *(torch.full((4, 57), x, device=device) for x in (-torch.inf, 0.0))]
    same, wanted, parts = [x.clone() for x in state], [x.double() for x in state], []
    for number, lengths_k in enumerate(blocks):
        k, v = (draw((sum(lengths_k), 2, 16), dtype, device, layout) for _ in range(2))
        bias = torch.full((sum(lengths_k),), -torch.inf, device=device) if number == 0 else None
        pack = make_pack(lengths, lengths_k, device, bias, causal=number == 2)
        assert on_triton(accumulate_op, *state, q, k, v, *pack) is None
        reference.accumulate_(*same, q, k, v, *pack)
        reference.accumulate_(*wanted, q.double(), k.double(), v.double(), *pack)
        parts.append((k.split(lengths_k), v.split(lengths_k)))
    # On tensor cores P is rounded to q's dtype: acc errs by that, m and l do not.
    for name, *three in list(zip(("acc", "m", "l"), state, wanted, same, strict=True))[dtype != FP32 :]:
        assert_close(*three, name=name)
    # By one call without the hidden block: the causal block stands behind the one before it.
    k, v = (torch.cat([part[kind][s] for s in range(2) for part in parts[1:]]) for kind in range(2))
    pack = make_pack(lengths, [46, 32], device)
    exact, same = reference.forward(q.double(), k.double(), v.double(), *pack), reference.forward(q, k, v, *pack)
    out, lse = reference.finish(*state)
    assert_close(out.to(dtype), exact[0], same[0], name="out")
    assert_close(lse, exact[1], same[1], name="lse")


@pytest.mark.parametrize("dtype", [FP32, BF16])
def test_blocks_of_keys_share_one_global_lse(device, dtype):
    """Half the keys as an unmasked rectangle, half causal: with the final out and lse each gives its exact share."""
    q, dout = (draw((45, 4, 16), dtype, device) for _ in range(2))
    k, v = (draw((90, 2, 16), dtype, device) for _ in range(2))
    whole = make_pack([45], [90], device)
    out, lse = check_forward(q, k, v, whole)
    dlse = torch.randn(4, 45, device=device)
    args = (dout, q, k, v, out, lse, dlse)
    exact = reference.backward(*(x.double() for x in args), *whole)
    same = reference.backward(*args, *whole)
    shares = []
    for keys, causal in ((slice(0, 45), False), (slice(45, 90), True)):
        pack = make_pack([45], [45], device, causal=causal)
        shares.append(check_backward(dout, q, k[keys], v[keys], out, lse, dlse, pack))
    joined = (
        shares[0][0] + shares[1][0],
        *(torch.cat([a, b]) for a, b in zip(shares[0][1:], shares[1][1:], strict=True)),
    )
    for name, *three in zip(("dq", "dk", "dv"), joined, exact, same, strict=True):
        assert_close(*three, name=name)


def run_all(dout, q, k, v, dlse, pack):
    """Every result of a pack: out, lse, dq, dk, dv, rows first."""
    out, lse = on_triton(forward_op, q, k, v, *pack)
    return out, lse.T, *on_triton(backward_op, dout, q, k, v, out, lse, dlse, *pack)


def test_two_runs_agree_and_a_sequence_alone_is_the_same(device):
    lengths = [35, 0, 19, 17]
    q, dout = (draw((71, 2, 16), BF16, device) for _ in range(2))
    k, v = (draw((71, 1, 16), BF16, device) for _ in range(2))
    dlse = torch.randn(2, 71, device=device)
    first = run_all(dout, q, k, v, dlse, make_pack(lengths, lengths, device))
    again = run_all(dout, q, k, v, dlse, make_pack(lengths, lengths, device))
    alone = slice(35, 54)
    single = run_all(*(x[alone] for x in (dout, q, k, v)), dlse[:, alone], make_pack([19], [19], device))
    for whole, same, part in zip(first, again, single, strict=True):
        assert torch.equal(whole, same) and torch.equal(whole[alone], part)


@pytest.mark.parametrize("spoiled", ["q", "k", "v", "dout"])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_a_nan_stays_in_its_sequence(device, spoiled, value):
    """It reaches the rows that see it, and no row of its sequence that the reference spares."""
    lengths, at = [21, 38, 20], 21 + 17
    tensors = {name: draw((79, 1, 16), BF16, device) for name in ("dout", "q", "k", "v")}
    pack = make_pack(lengths, lengths, device)
    clean = run_all(*tensors.values(), None, pack)
    tensors[spoiled][at, 0, 3] = value
    dirty = run_all(*tensors.values(), None, pack)
    others = torch.tensor([*range(21), *range(59, 79)], device=device)
    for before, after in zip(clean, dirty, strict=True):
        assert torch.equal(before[others], after[others])
    broken = (~dirty[0].isfinite()).flatten(1).any(1)
    wanted = {"q": [at], "k": range(at, 59), "v": range(at, 59), "dout": []}[spoiled]
    if value != value or spoiled == "v":
        assert set(wanted) <= set(broken.nonzero().flatten().tolist())
    if spoiled in ("q", "dout"):
        assert set(broken.nonzero().flatten().tolist()) <= set(wanted)
    spared = reference.forward(*(tensors[x] for x in "qkv"), *pack)[0].isfinite().flatten(1).all(1)
    assert not bool((broken & spared).any())


@pytest.mark.no_poison
def test_offsets_past_two_to_the_31(device):
    """Twelve rows that lie 2^28 elements apart. On the CPU only the pages that are touched take memory."""
    rows, stride = 12, 2**28
    store = torch.empty(rows * stride, dtype=BF16, device=device)
    k = store.as_strided((rows, 1, 16), (stride, 16, 1)).copy_(torch.randn(rows, 1, 16))
    v = store.as_strided((rows, 1, 16), (stride, 16, 1), 64).copy_(torch.randn(rows, 1, 16))
    q, dout = (draw((20, 1, 16), BF16, device) for _ in range(2))
    pack = make_pack([20], [rows], device, causal=False)
    out, lse = on_triton(forward_op, q, k, v, *pack)
    dense = on_triton(forward_op, q, k.contiguous(), v.contiguous(), *pack)
    assert torch.equal(out, dense[0]) and torch.equal(lse, dense[1])
    near = on_triton(backward_op, dout, q, k.contiguous(), v.contiguous(), out, lse, None, *pack)
    far = on_triton(backward_op, dout, q, k, v, out, lse, None, *pack)
    assert all(torch.equal(a, b) for a, b in zip(near, far, strict=True))


INF, NAN = torch.inf, torch.nan
LSE_PAIRS = [
    *((1.5, -0.5), (200.0, 0.0), (0.0, 200.0), (-INF, 1.0), (1.0, -INF), (-INF, -INF), (INF, 1.0), (1.0, INF)),
    *((INF, -INF), (NAN, 1.0), (1.0, NAN), (NAN, -INF), (INF, NAN), (NAN, NAN)),
]


@pytest.mark.parametrize("dtypes", [(FP32, FP32), (FP32, BF16), (FP16, FP16)])
def test_merge_table(device, dtypes):
    """Finite, far apart, empty by either convention and NaN; a row of weight 0 holds NaN, which must not spread."""
    out, out_block = (torch.randn(len(LSE_PAIRS), 3, 20).to(device, dtype) for dtype in dtypes)
    lse, lse_block = torch.tensor(LSE_PAIRS, device=device).T.unsqueeze(1).expand(2, 3, -1)
    for partial, values in ((out, lse), (out_block, lse_block)):
        partial[~values[0].isfinite()] = torch.nan
    args = (out, lse, out_block, lse_block)
    merged, merged_lse = on_triton(merge_op, *args)
    exact, same = reference.merge_partials(*(x.double() for x in args)), reference.merge_partials(*args)
    assert_close(merged, exact[0], same[0], dim=-1, name="out")
    assert_close(merged_lse, exact[1], same[1], name="lse")
    assert merged[5].eq(0).all() and merged_lse[:, 5].eq(-torch.inf).all() and merged[3].isfinite().all()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.integers(0, 70),
    heads=st.integers(1, 3),
    K=st.sampled_from([1, 5, 16, 80]),
    layout=st.sampled_from(["contiguous", "strided", "heads_first", "channels"]),
)
def test_merge_takes_any_shape(device, rows, heads, K, layout):
    out, out_block = draw((rows, heads, K), BF16, device, layout), draw((rows, heads, K), FP32, device)
    lse, lse_block = torch.randn(rows, heads, device=device).T, torch.randn(heads, 1, device=device, dtype=FP16)
    lse_block = lse_block.expand(heads, rows)
    args = (out, lse, out_block, lse_block)
    merged = on_triton(merge_op, *args)
    exact, same = reference.merge_partials(*(x.double() for x in args)), reference.merge_partials(*args)
    for name, *three in zip(("out", "lse"), merged, exact, same, strict=True):
        assert three[0].is_contiguous()
        assert_close(*three, name=name)


def test_what_it_declines(device):
    q = draw((4, 1, 8), FP32, device)
    pack = make_pack([4], [4], device)
    wide = draw((4, 1, 264), FP32, device)
    lse = torch.zeros(1, 4, device=device)
    with use_backend("triton"):
        for x, reason in ((q.double(), "float64"), (wide, "264")):
            with pytest.raises(RuntimeError, match=reason):
                forward_op(x, x, x, *pack)
            with pytest.raises(RuntimeError, match=reason):
                backward_op(x, x, x, x, x, lse, None, *pack)
        with pytest.raises(RuntimeError, match="strides"):
            accumulate_op(q.transpose(0, 2).contiguous().transpose(0, 2), lse, lse.clone(), q, q, q, *pack)
        with pytest.raises(RuntimeError, match="float64"):
            accumulate_op(q.double(), lse, lse.clone(), q, q, q, *pack)
        with pytest.raises(RuntimeError, match="lse is torch.float64"):
            merge_op(q, lse.double(), q, lse)
