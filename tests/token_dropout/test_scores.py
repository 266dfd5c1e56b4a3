# SPDX-License-Identifier: Apache-2.0
"""The public score functions: against eager softmax in fp64, invariants, arguments, torch.compile."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._dynamo.testing import CompileCounterWithBackend

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close
from lrc_kernels.token_dropout import attention_column_sums, attention_scores, native, scores
from tests.token_dropout.score_inputs import eager_scores, into_pages, make_pack

BACKENDS = ["reference"] + (["cpu"] if native.cpu_unavailable() is None else [])
LENGTHS, ROWS = [300, 0, 5, 129, 128], [(0, 299), (3, 50), (3, -1), (0, 10), (4, 127), (3, 50)]


@pytest.fixture(params=BACKENDS)
def backend(request):
    with use_backend(request.param), record() as ran:
        yield request.param
    assert {name for _, name in ran} <= {request.param}


@settings(max_examples=60, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 2, 16, 127, 128, 129, 300]), min_size=1, max_size=4),
    positions=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 320)), max_size=5),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 6), (10, 2)]),
    head_dim=st.sampled_from([1, 8, 40, 88]),
    options=st.tuples(st.sampled_from(scores.HEAD_REDUCTIONS), st.sampled_from(scores.QUERY_REDUCTIONS)),
    scale=st.sampled_from([None, 0.7]),
    seed=st.integers(0, 2**31),
)
def test_reference_equals_eager_softmax(lengths, positions, heads, head_dim, options, scale, seed):
    rows = [(s % len(lengths), p) for s, p in positions]
    q, k, where = make_pack(
        lengths, rows, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=torch.float64, seed=seed
    )
    named = {"head_reduce": options[0], "query_reduce": options[1], "softmax_scale": scale}
    with use_backend("reference"):
        result = attention_scores(q, k, **where, **named)
    torch.testing.assert_close(result, eager_scores(q, k, **where, **named), rtol=1e-11, atol=1e-14)


def test_scores_of_each_row_sum_to_one(backend):
    q, k, where = make_pack(LENGTHS, ROWS)
    for reduce in scores.QUERY_REDUCTIONS:
        result = attention_scores(q, k, query_reduce=reduce, **where)
        sums = torch.stack([part.sum() for part in result.split(LENGTHS)])
        torch.testing.assert_close(sums, torch.tensor([1.0, 0, 0, 1, 1]))
    # "first" of sequence 0 is the row at position 10, which sees 11 keys.
    assert (attention_scores(q, k, **where)[:300] > 0).sum() == 11


def test_ties_of_the_first_row_go_to_the_lowest_index(backend):
    q, k, where = make_pack([40], [(0, 30), (0, 20), (0, 20)])
    alone = {**where, "query_sequence": where["query_sequence"][1:2], "query_position": where["query_position"][1:2]}
    assert torch.equal(attention_scores(q, k, **where), attention_scores(q[1:2], k, **alone))


def test_same_bits_under_any_packing_and_paging(backend):
    q, k, where = make_pack(LENGTHS, ROWS, head_dim=88, heads=6)
    for named in ({"query_reduce": "first"}, {"query_reduce": "mean", "head_reduce": "max"}):
        packed = attention_scores(q, k, **where, **named)
        for s, keys in enumerate(torch.arange(len(k)).split(LENGTHS)):
            rows = where["query_sequence"] == s
            alone = attention_scores(
                q[rows], k[keys], cu_seqlens_k=VarlenLayout([len(keys)]),
                query_sequence=where["query_sequence"][rows] * 0, query_position=where["query_position"][rows], **named,
            )  # fmt: skip
            assert torch.equal(packed[keys], alone)
        for block_size in (1, 16, 100):
            paged, table = into_pages(k, where["cu_seqlens_k"], block_size)
            assert torch.equal(attention_scores(q, paged, block_table=table, **where, **named), packed)


def test_nan_stays_in_its_sequence(backend):
    q, k, where = make_pack(LENGTHS, [(0, 200), (3, 128)])
    clean = attention_scores(q, k, **where)
    k[150, 0, 3] = torch.nan
    result = attention_scores(q, k, **where)
    assert result[:201].isnan().all() and (result[201:300] == 0).all()
    assert torch.equal(result[300:], clean[300:])
    # A key that no row sees reaches nothing.
    q, k, where = make_pack(LENGTHS, [(0, 100), (3, 128)])
    clean = attention_scores(q, k, **where)
    k[150, 0, 3] = torch.nan
    assert torch.equal(attention_scores(q, k, **where), clean)


@pytest.mark.parametrize("query_reduce", scores.QUERY_REDUCTIONS)
def test_lse_reuse(backend, query_reduce):
    q, k, where = make_pack(LENGTHS, ROWS, heads=4, kv_heads=2)
    lse = torch.zeros(4, len(ROWS))
    starts = where["cu_seqlens_k"].cu_seqlens.tolist()
    for r, (s, position) in enumerate(ROWS):
        seen = k[starts[s] : min(starts[s + 1], starts[s] + position + 1)].repeat_interleave(2, dim=1)
        lse[:, r] = (torch.einsum("hd,thd->ht", q[r], seen) * 16**-0.5).logsumexp(-1)
    result = attention_scores(q, k, lse=lse, query_reduce=query_reduce, **where)
    torch.testing.assert_close(result, attention_scores(q, k, query_reduce=query_reduce, **where), rtol=1e-5, atol=1e-8)
    empty = attention_scores(q, k, lse=torch.full_like(lse, -torch.inf), query_reduce=query_reduce, **where)
    assert torch.equal(empty, torch.zeros_like(empty))


def test_empty_inputs(backend):
    q, k, where = make_pack([], [])
    assert attention_scores(q, k, **where).shape == (0,)
    q, k, where = make_pack([0, 3], [])
    assert attention_scores(q, k, **where).tolist() == [0, 0, 0]
    q, k, where = make_pack([0, 3], [(0, 4), (1, -1)])
    assert attention_scores(q, k, **where).tolist() == [0, 0, 0]


def test_no_gradient_and_autocast_changes_nothing(backend):
    q, k, where = make_pack(LENGTHS, ROWS)
    wanted = attention_scores(q, k, **where)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = attention_scores(q.requires_grad_(), k.requires_grad_(), **where)
    assert torch.equal(result, wanted) and not result.requires_grad


def column_pack(dtype=torch.float32, seed=0):
    """Self-attention of three sequences, the second with more keys than rows, and its true lse."""
    lengths_q, lengths_k = [37, 9, 0], [37, 20, 4]
    random = torch.Generator().manual_seed(seed)
    q = torch.randn(sum(lengths_q), 6, 24, generator=random).to(dtype)
    k = torch.randn(sum(lengths_k), 2, 24, generator=random).to(dtype)
    return q, k, VarlenLayout(lengths_q), VarlenLayout(lengths_k)


def eager_probabilities(q, k, layout_q, layout_k, causal):
    """Per sequence P [Hq, Lq, Lk] and the lse [Hq, Tq] of all."""
    parts, lses = [], []
    for rows, keys in zip(q.split(layout_q.lengths), k.split(layout_k.lengths), strict=True):
        s = torch.einsum("ihd,jhd->hij", rows, keys.repeat_interleave(q.shape[1] // k.shape[1], dim=1)) * 24**-0.5
        if causal:
            s = s.masked_fill(torch.ones_like(s[0]).triu(1 + len(keys) - len(rows)).bool(), -torch.inf)
        parts.append(s.softmax(-1))
        lses.append(s.logsumexp(-1))
    return parts, torch.cat(lses, dim=1)


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("reduce", scores.COLUMN_REDUCTIONS)
@pytest.mark.parametrize("head_reduce", scores.HEAD_REDUCTIONS)
def test_column_sums_equal_eager_attention(causal, reduce, head_reduce):
    q, k, layout_q, layout_k = column_pack(torch.float64)
    parts, lse = eager_probabilities(q, k, layout_q, layout_k, causal)
    mask = torch.rand(q.shape[0]) < 0.6
    with record() as ran:
        result = attention_column_sums(
            q, k, lse, cu_seqlens_q=layout_q, cu_seqlens_k=layout_k, causal=causal, query_mask=mask, reduce=reduce,
            head_reduce=head_reduce,
        )  # fmt: skip
    assert ran == [("attention_column_sums_fwd", "reference")]
    wanted = []
    for p, chosen in zip(parts, mask.split(layout_q.lengths), strict=True):
        p, (_, rows, keys) = p[:, chosen], p.shape
        seen = torch.ones(rows, keys, dtype=torch.float64)
        seen = (seen.tril(keys - rows) if causal else seen)[chosen]
        columns = p.sum(1) if reduce != "max" else torch.cat([p, p.new_zeros(len(p), 1, keys)], 1).amax(1)
        columns = columns / seen.sum(0).clamp(min=1) if reduce == "mean" else columns
        wanted.append({"mean": columns.mean(0), "sum": columns.sum(0), "max": columns.amax(0)}[head_reduce])
    torch.testing.assert_close(result, torch.cat(wanted), rtol=1e-11, atol=1e-14)


def test_column_sums_total_the_number_of_rows_whatever_the_tile(monkeypatch):
    q, k, layout_q, layout_k = column_pack()
    _, lse = eager_probabilities(q.double(), k.double(), layout_q, layout_k, True)
    named = {"cu_seqlens_q": layout_q, "cu_seqlens_k": layout_k}
    result = attention_column_sums(q, k, lse.float(), **named)
    sums = torch.stack([part.sum() for part in result.split(layout_k.lengths)])
    torch.testing.assert_close(sums, torch.tensor([37.0, 9, 0]))
    assert attention_column_sums(q, k, lse.float(), reduce="max", **named).max() <= 1 + 1e-5
    monkeypatch.setattr(scores.reference_scores, "_TILE_ELEMENTS", 5 * 6 * 37)
    torch.testing.assert_close(attention_column_sums(q, k, lse.float(), **named), result)
    lse[:, 3] = -torch.inf
    one_less = attention_column_sums(q, k, lse.float(), **named)
    torch.testing.assert_close(one_less.sum(), torch.tensor(45.0))


@pytest.mark.parametrize("name", ["attention_scores_fwd", "attention_column_sums_fwd"])
def test_opcheck(name):
    q, k, where = make_pack([40, 3], [(0, 39), (1, 2)])
    cu = where["cu_seqlens_k"].cu_seqlens
    if name == "attention_scores_fwd":
        args = (q, k, cu, where["query_sequence"], where["query_position"], None, None, 43, 40, "mean", True, 0.25)
    else:
        args = (torch.randn(43, 4, 16), k, torch.zeros(4, 43), cu, cu, None, 40, 40, True, "sum", "mean", 0.25)
    torch.library.opcheck(getattr(torch.ops.lrc, name), args)


@pytest.mark.no_poison
@pytest.mark.parametrize(("function", "name"), [*(("scores", name) for name in BACKENDS), ("columns", "reference")])
def test_compiles_at_most_twice_over_20_packs(function, name):
    def score(q, k, where):
        return attention_scores(q, k, **where)

    def columns(q, k, where):
        layout = where["cu_seqlens_k"]
        return attention_column_sums(k, k, k[..., 0].T.contiguous(), cu_seqlens_q=layout, cu_seqlens_k=layout)

    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    eager = score if function == "scores" else columns
    compiled = torch.compile(eager, fullgraph=True, backend=counter)
    for i in range(20):
        lengths = [5 + 3 * j + i for j in range(2 + i % 5)]
        q, k, where = make_pack(lengths, [(s, lengths[s] - 1) for s in range(len(lengths))], seed=i)
        with use_backend(name):
            assert torch.equal(compiled(q, k, where), eager(q, k, where))
    assert counter.frame_count <= 2


def call(**changed):
    q, k, where = make_pack([4, 2], [(0, 3), (1, 1)])
    arguments = {"q": q, "k": k, **where, **changed}
    return attention_scores(arguments.pop("q"), arguments.pop("k"), **arguments)


def call_columns(**changed):
    layout = VarlenLayout([4, 2])
    named = {"q": torch.ones(6, 4, 8), "k": torch.ones(6, 2, 8), "lse": torch.zeros(4, 6), **changed}
    named = {"cu_seqlens_q": layout, "cu_seqlens_k": layout, **named}
    return attention_column_sums(named.pop("q"), named.pop("k"), named.pop("lse"), **named)


def ints(*values):
    return torch.tensor(values, dtype=torch.int32)


BAD_CALLS = {
    "q is no tensor": ({"q": [1.0]}, TypeError, "q must be a tensor, got list"),
    "q is flat": ({"q": torch.ones(2, 16)}, ValueError, r"q must have 3 dimensions, got shape \[2, 16\]"),
    "dtypes": ({"q": torch.ones(2, 4, 16).half()}, TypeError, "k must be one of float16, got float32"),
    "heads": ({"q": torch.ones(2, 3, 16)}, ValueError, r"q must have a multiple of k's heads \(2\), got 3"),
    "head_dim": ({"q": torch.ones(2, 4, 8)}, ValueError, r"head dimension of q \(8, > 0\), got 16"),
    "rows": ({"query_position": ints(1)}, ValueError, r"query_position must hold one value per row of q \(2\), got 1"),
    "int64": ({"query_sequence": torch.tensor([0, 1])}, TypeError, "query_sequence must be one of int32, got int64"),
    "sequence": ({"query_sequence": ints(0, 2)}, ValueError, r"query_sequence must be in \[0, 2\), got 2 at index 1"),
    "position": ({"query_position": ints(-2, 0)}, ValueError, "query_position must be >= -1, got -2 at index 0"),
    "tokens": ({"k": torch.ones(5, 2, 16)}, ValueError, "k must hold the 6 tokens of cu_seqlens_k, got 5"),
    "cu_seqlens": ({"cu_seqlens_k": ints(0, 4, 3, 6)}, ValueError, "cu_seqlens_k must not decrease"),
    "head_reduce": ({"head_reduce": "min"}, ValueError, "head_reduce must be one of mean, sum, max, got 'min'"),
    "query_reduce": ({"query_reduce": "last"}, ValueError, "query_reduce must be one of first, mean, got 'last'"),
    "scale type": ({"softmax_scale": "1"}, TypeError, "softmax_scale must be a float, got str"),
    "scale": ({"softmax_scale": float("nan")}, ValueError, "softmax_scale must be finite, got nan"),
    "lse shape": ({"lse": torch.zeros(2, 4)}, ValueError, r"lse must have shape.*= \[4, 2\], got \[2, 4\]"),
    "lse dtype": ({"lse": torch.zeros(4, 2).double()}, TypeError, "lse must be one of float32, got float64"),
    "device": ({"query_position": torch.ones(2, dtype=torch.int32, device="meta")}, ValueError, "on cpu.*got meta"),
    "unpaged": ({"block_table": ints(0, 0)[:, None]}, ValueError, "k must have 4 dimensions"),
    "few pages": (
        {"k": torch.ones(3, 2, 2, 16), "block_table": ints(0, 1)[:, None]},
        ValueError,
        "block_table must have at least 2 blocks for 4 keys, got 1",
    ),
    "page": (
        {"k": torch.ones(3, 2, 2, 16), "block_table": ints(0, 3, 1, -1).view(2, 2)},
        ValueError,
        r"block_table must be in \[0, 3\), got 3 at index 1",
    ),
    "page rows": (
        {"k": torch.ones(3, 2, 2, 16), "block_table": ints(0, 1, 1).view(1, 3)},
        ValueError,
        r"block_table must have one row per sequence \(2\), got 1",
    ),
}
BAD_COLUMN_CALLS = {
    "rows": ({"q": torch.ones(5, 4, 8)}, ValueError, "q must hold the 6 tokens of cu_seqlens_q, got 5"),
    "sequences": ({"cu_seqlens_q": VarlenLayout([6])}, ValueError, "must hold the 2 sequences of cu_seqlens_k, got 1"),
    "lse": ({"lse": torch.zeros(6, 4)}, ValueError, r"= \[4, 6\], got \[6, 4\]"),
    "mask": ({"query_mask": torch.ones(6)}, TypeError, "query_mask must be one of bool, got float32"),
    "mask length": ({"query_mask": torch.ones(5) > 0}, ValueError, r"query_mask must hold.*\(6\), got shape \[5\]"),
    "reduce": ({"reduce": "first"}, ValueError, "reduce must be one of sum, mean, max, got 'first'"),
}


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_input(case):
    changed, error, message = BAD_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call(**changed)
    assert not ran


@pytest.mark.parametrize("case", BAD_COLUMN_CALLS)
def test_bad_input_of_column_sums(case):
    changed, error, message = BAD_COLUMN_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call_columns(**changed)
    assert not ran


def test_good_calls_of_the_bad_ones(backend):
    assert_close(call(), call(q=make_pack([4, 2], [(0, 3), (1, 1)])[0]).double(), call())
    if backend == "reference":
        assert call_columns().shape == (6,)
