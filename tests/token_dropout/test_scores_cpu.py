# SPDX-License-Identifier: Apache-2.0
"""The C++ scores of every instruction set of this machine against fp64, and what must hold bitwise."""

import os
import subprocess
import sys

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close
from lrc_kernels.token_dropout import attention_scores, native, scores
from tests.token_dropout.score_inputs import eager_scores, into_pages, make_pack

if native.cpu_unavailable() is not None:
    pytest.skip(native.cpu_unavailable(), allow_module_level=True)

from lrc_kernels import _C

ISAS = _C.cpu_isas()
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
LENGTHS, ROWS = [700, 0, 5, 129, 128], [(0, 699), (3, 50), (3, -1), (0, 300), (4, 127), (0, 600)]


@pytest.fixture(autouse=True)
def cpu_backend():
    best = _C.cpu_isa()
    with use_backend("cpu"), record() as ran:
        yield
    _C.set_cpu_isa(best)
    assert {backend for _, backend in ran} <= {"cpu"}


@pytest.fixture(params=ISAS)
def isa(request):
    _C.set_cpu_isa(request.param)
    return request.param


@settings(max_examples=150, deadline=None)
@given(
    lengths=st.lists(st.sampled_from([0, 1, 3, 127, 128, 130, 400]), min_size=1, max_size=4),
    positions=st.lists(st.tuples(st.integers(0, 3), st.integers(-1, 420)), max_size=6),
    heads=st.sampled_from([(1, 1), (4, 2), (7, 1), (6, 3), (28, 4), (13, 1), (32, 8)]),
    head_dim=st.sampled_from([1, 8, 16, 33, 88, 128, 144]),
    options=st.tuples(st.sampled_from(scores.HEAD_REDUCTIONS), st.sampled_from(scores.QUERY_REDUCTIONS)),
    block_size=st.sampled_from([0, 1, 16]),
    dtype=st.sampled_from(DTYPES),
    isa=st.sampled_from(ISAS),
    seed=st.integers(0, 2**31),
)
def test_scores(lengths, positions, heads, head_dim, options, block_size, dtype, isa, seed):
    rows = [(s % len(lengths), p) for s, p in positions]
    q, k, where = make_pack(lengths, rows, heads=heads[0], kv_heads=heads[1], head_dim=head_dim, dtype=dtype, seed=seed)
    named = {"head_reduce": options[0], "query_reduce": options[1]}
    _C.set_cpu_isa(isa)
    result = attention_scores(q, k, **where, **named)
    reference = eager_scores(q, k, **where, **named)
    # A score or two hold most of the weight: PyTorch's error is the worse one of two orders of the channels.
    orders = [eager_scores(*pair, **where, **named, dtype=torch.float32) for pair in ((q, k), (q.flip(-1), k.flip(-1)))]
    errors = [(order - reference).abs() for order in orders]
    same = torch.where(errors[0] > errors[1], orders[0], orders[1])
    assert_close(result, reference, same, name=isa)
    if block_size:
        paged, table = into_pages(k, where["cu_seqlens_k"], block_size, seed)
        assert torch.equal(attention_scores(q, paged, block_table=table, **where, **named), result)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("query_reduce", scores.QUERY_REDUCTIONS)
def test_same_bits_alone_again_and_on_two_threads(isa, dtype, query_reduce):
    q, k, where = make_pack(LENGTHS, ROWS, heads=14, kv_heads=2, head_dim=88, dtype=dtype)
    result = attention_scores(q, k, query_reduce=query_reduce, **where)
    for s, keys in enumerate(torch.arange(len(k)).split(LENGTHS)):
        rows = where["query_sequence"] == s
        alone = {"query_sequence": where["query_sequence"][rows] * 0, "query_position": where["query_position"][rows]}
        layout = VarlenLayout([len(keys)])
        assert torch.equal(
            attention_scores(q[rows], k[keys], cu_seqlens_k=layout, query_reduce=query_reduce, **alone), result[keys]
        )
    torch.set_num_threads(2)
    try:
        assert torch.equal(attention_scores(q, k, query_reduce=query_reduce, **where), result)
    finally:
        torch.set_num_threads(1)


@pytest.mark.parametrize("head_reduce", ["mean", "max"])
def test_heads_and_rows_that_do_not_fit_into_the_scratch_at_once(isa, head_reduce):
    """20,000 keys, 4 x 8 heads and 4 rows need twice the scratch: rows, then heads, are cut, and the bits stay."""
    rows = [(0, 19_999), (0, 12_345), (0, 15_000), (0, 19_000)]
    q, k, where = make_pack([20_000], rows, heads=32, kv_heads=8, head_dim=8, dtype=torch.bfloat16)
    named = {"head_reduce": head_reduce, "query_reduce": "mean"}
    result = attention_scores(q, k, **where, **named)
    same = eager_scores(q, k, **where, **named, dtype=torch.float32)
    assert_close(result, eager_scores(q, k, **where, **named), same)
    # Three rows that see nothing of the first keys leave what the first row gives alone, which needs one span.
    alone = attention_scores(q[:1], k, **{**where, **{n: where[n][:1] for n in ("query_sequence", "query_position")}})
    first = attention_scores(q, k, **{**where, "query_position": torch.tensor([19_999, -1, -1, -1], dtype=torch.int32)})
    assert torch.equal(first, alone)


def test_strided_keys_and_queries(isa):
    q, k, where = make_pack(LENGTHS, ROWS, head_dim=24)
    wanted = attention_scores(q, k, **where)
    wide = torch.randn(len(k), 3, 2, 24)
    wide[:, 1] = k
    for view in (wide[:, 1], k.permute(2, 1, 0).contiguous().permute(2, 1, 0), k.transpose(0, 1).contiguous().mT.mT):
        view = view if view.shape == k.shape else view.transpose(0, 1)
        assert torch.equal(attention_scores(q.permute(2, 0, 1).contiguous().permute(1, 2, 0), view, **where), wanted)


@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
def test_a_spoiled_key_stays_in_its_sequence(isa, value):
    q, k, where = make_pack(LENGTHS, [(0, 690), (3, 128)], head_dim=40)
    clean = attention_scores(q, k, **where)
    k[650, 0, 3] = value
    result = attention_scores(q, k, **where)
    assert torch.equal(result.isnan(), eager_scores(q, k, **where).isnan())
    assert torch.equal(result[700:], clean[700:]) and (result[691:700] == 0).all()
    k[650] = torch.nan
    assert attention_scores(q, k, head_reduce="max", **where)[:691].isnan().all()


def test_large_logits_and_an_lse_of_any_size(isa):
    q, k, where = make_pack([300], [(0, 299)])
    result = attention_scores(q * 1000, k, **where)
    assert_close(result, eager_scores(q * 1000, k, **where), eager_scores(q * 1000, k, **where, dtype=torch.float32))
    shifted = attention_scores(q * 0, k, lse=torch.tensor([[80.0], [-80.0], [-torch.inf], [torch.inf]]), **where)
    assert_close(
        shifted,
        torch.full((300,), (torch.e**80 + torch.e**-80) / 4, dtype=torch.float64),
        torch.full((300,), 5.54062238439351e34 / 4),
    )


def test_declines_fp64():
    q, k, where = make_pack([3], [(0, 2)], dtype=torch.float64)
    with pytest.raises(RuntimeError, match="k must be fp32, bf16 or fp16, got float64"):
        attention_scores(q, k, **where)


@pytest.mark.no_poison
def test_offsets_past_two_billion_elements(isa):
    """The pages between the blocks are never touched, so that 4 GiB of addresses cost no memory."""
    q, k, where = make_pack([32], [(0, 31)], dtype=torch.bfloat16)
    far = torch.empty(2**31 + 2**12, dtype=torch.bfloat16).as_strided((2, 16, 2, 16), (2**31, 32, 16, 1))
    far.copy_(k.view(2, 16, 2, 16))
    table = torch.tensor([[0, 1]], dtype=torch.int32)
    assert torch.equal(attention_scores(q, far, block_table=table, **where), attention_scores(q, k, **where))


def test_native_refuses_what_does_not_fit():
    rows, cu = torch.ones(1, dtype=torch.int32), torch.zeros(1, dtype=torch.int64)
    where = (rows.data_ptr(), rows.data_ptr(), 0, False, 1.0, 1.0, 0, 0)
    with pytest.raises(ValueError, match=r"row_sequence must lie in \[-1, 0\), got 1"):
        _C.attention_scores(0, 1, 1, 0, 0, 1, 1, (0, 0, 0), 0, (0, 0, 0, 0), cu.data_ptr(), 0, *where)
    with pytest.raises(ValueError, match="num_heads must be a multiple of num_kv_heads, got 3 and 2"):
        _C.attention_scores(0, 0, 3, 0, 0, 2, 1, (0, 0, 0), 0, (0, 0, 0, 0), 0, 0, 0, 0, 0, False, 1.0, 1.0, 0, 0)


PROGRAM = """
import resource, torch
from lrc_kernels import VarlenLayout, backend
from lrc_kernels.token_dropout import attention_scores
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
tokens, heads, kv_heads = 131072, 32, 8
k = torch.empty(tokens, kv_heads, 128, dtype=torch.bfloat16)
some = torch.randn(1024, kv_heads, 128)
for rows in k.split(1024):
    rows.copy_(some)
q, zero = torch.randn(1, heads, 128).bfloat16(), torch.zeros(1, dtype=torch.int32)
attention_scores(q, k[:256], cu_seqlens_k=VarlenLayout([256]), query_sequence=zero, query_position=zero + 255)
layout, before = VarlenLayout([tokens]), peak()
with backend.record() as ran:
    attention_scores(q, k, cu_seqlens_k=layout, query_sequence=zero, query_position=zero + tokens - 1)
assert ran == [("attention_scores_fwd", "cpu")], ran
print(peak() - before)
"""


def test_peak_memory_is_a_few_megabytes_over_the_keys():
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "TRITON_INTERPRET": "0"}
    run = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr
    assert int(run.stdout) <= 8 * 2**20
