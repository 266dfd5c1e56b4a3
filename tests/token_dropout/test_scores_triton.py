# SPDX-License-Identifier: Apache-2.0
"""The Triton scores against fp64: in the interpreter with small tiles, on a GPU as shipped."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.testing import assert_close
from lrc_kernels.token_dropout import attention_column_sums, attention_scores, scores
from tests.token_dropout.score_inputs import eager_scores, into_pages, make_pack

# numpy warns in the interpreter where NaN and 0/0 are computed and then masked.
pytestmark = [pytest.mark.triton, pytest.mark.filterwarnings("ignore::RuntimeWarning")]

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
LENGTHS, ROWS = [50, 0, 5, 33], [(0, 49), (3, 20), (3, -1), (0, 17), (2, 4), (0, 40)]


@pytest.fixture(autouse=True)
def small_tiles(monkeypatch, device):
    """Tiles of 16 in the interpreter, so that every loop runs three times or more; the shipped ones on a GPU."""
    if device.type != "cuda":
        from lrc_kernels.token_dropout import triton_scores

        small = triton_scores.ScoreBlocks(16, 16, 16, 2, 16, 16)
        small = small._replace(merge=2)
        monkeypatch.setattr(triton_scores, "score_blocks", lambda dtype: small)
    with use_backend("triton"), record() as ran:
        yield
    assert {backend for _, backend in ran} == {"triton"}


CASES = [
    # heads, kv_heads, head_dim, dtype, head_reduce, query_reduce
    (4, 2, 16, torch.float32, "mean", "first"),
    (7, 1, 40, torch.bfloat16, "max", "mean"),
    (6, 2, 33, torch.float16, "sum", "mean"),
    (3, 3, 64, torch.bfloat16, "sum", "first"),
    (17, 1, 8, torch.float32, "max", "first"),
    (8, 2, 24, torch.float32, "mean", "mean"),
]


@pytest.mark.parametrize("case", CASES, ids=str)
def test_scores(device, case):
    heads, kv_heads, head_dim, dtype, head_reduce, query_reduce = case
    q, k, where = make_pack(
        LENGTHS, ROWS, heads=heads, kv_heads=kv_heads, head_dim=head_dim, dtype=dtype, device=device
    )
    named = {"head_reduce": head_reduce, "query_reduce": query_reduce}
    result = attention_scores(q, k, **where, **named)
    same = eager_scores(q, k, **where, **named, dtype=torch.float32)
    assert_close(result, eager_scores(q, k, **where, **named), same)
    # The same bits again, through pages.
    paged, table = into_pages(k, where["cu_seqlens_k"], 7)
    assert torch.equal(attention_scores(q, paged, block_table=table, **where, **named), result)


@pytest.mark.parametrize("query_reduce", scores.QUERY_REDUCTIONS)
def test_same_bits_under_any_packing(device, query_reduce):
    q, k, where = make_pack(LENGTHS, ROWS, heads=6, head_dim=24, device=device)
    packed = attention_scores(q, k, query_reduce=query_reduce, **where)
    for s, keys in enumerate(torch.arange(len(k), device=device).split(LENGTHS)):
        rows = where["query_sequence"] == s
        alone = {"query_sequence": where["query_sequence"][rows] * 0, "query_position": where["query_position"][rows]}
        layout = VarlenLayout([len(keys)], device)
        result = attention_scores(q[rows], k[keys], cu_seqlens_k=layout, query_reduce=query_reduce, **alone)
        assert torch.equal(packed[keys], result)


@pytest.mark.parametrize("query_reduce", scores.QUERY_REDUCTIONS)
@pytest.mark.parametrize("head_reduce", ["mean", "max"])
def test_nan_stays_in_its_sequence(device, query_reduce, head_reduce):
    q, k, where = make_pack(LENGTHS, [(0, 40), (3, 32)], device=device)
    named = {"query_reduce": query_reduce, "head_reduce": head_reduce}
    clean = attention_scores(q, k, **where, **named)
    k[45] = torch.nan
    assert torch.equal(attention_scores(q, k, **where, **named), clean)
    k[30, 0, 3] = torch.nan
    result = attention_scores(q, k, **where, **named)
    assert result[:41].isnan().all() and torch.equal(result[41:], clean[41:])


@pytest.mark.parametrize("dtype", DTYPES)
def test_lse_reuse(device, dtype):
    q, k, where = make_pack(LENGTHS, ROWS, heads=4, kv_heads=2, dtype=dtype, device=device)
    starts = where["cu_seqlens_k"].cu_seqlens.tolist()
    lse = torch.zeros(4, len(ROWS), dtype=torch.float64)
    for r, (s, position) in enumerate(ROWS):
        seen = k[starts[s] : min(starts[s + 1], starts[s] + position + 1)].double().repeat_interleave(2, dim=1)
        lse[:, r] = (torch.einsum("hd,thd->ht", q[r].double(), seen) * 16**-0.5).logsumexp(-1).cpu()
    lse[:, 3] = -torch.inf
    # Row 3 is the first of sequence 0, so that it gets nothing.
    result = attention_scores(q, k, lse=lse.float().to(device), **where)
    wanted = eager_scores(q, k, **where)
    wanted[:50] = 0
    same = eager_scores(q, k, **where, dtype=torch.float32)
    same[:50] = 0
    # Rounding the lse itself to fp32 costs half an ulp of it, which is that of 4.
    assert (result - wanted).abs().max() <= 2 * (same - wanted).abs().max() + 4 * 2**-23 * wanted.max()


@pytest.mark.no_poison
def test_an_lse_past_two_to_the_31(device):
    """Sixteen heads that lie 2^27 elements and more apart. On the CPU only the pages that are touched take memory."""
    q, k, where = make_pack([40], [(0, 38), (0, 39)], heads=16, device=device)
    stride = 2**27 + 2**24
    far = torch.empty(16 * stride, device=device).as_strided((16, 2), (stride, 1)).copy_(torch.randn(16, 2))
    near = attention_scores(q, k, lse=far.contiguous(), query_reduce="mean", **where)
    assert torch.equal(attention_scores(q, k, lse=far, query_reduce="mean", **where), near)


def test_nothing_to_score(device):
    for lengths, rows in (([], []), ([0, 3], []), ([0, 3], [(0, 4), (1, -1)])):
        q, k, where = make_pack(lengths, rows, device=device)
        for query_reduce in scores.QUERY_REDUCTIONS:
            assert attention_scores(q, k, query_reduce=query_reduce, **where).tolist() == [0.0] * sum(lengths)


def row_lse(q, k, causal):
    """fp32 [Hq, Lq] of one sequence."""
    s = torch.einsum("ihd,jhd->hij", q.double(), k.double().repeat_interleave(q.shape[1] // k.shape[1], dim=1))
    if causal:
        s = s.masked_fill(torch.ones_like(s[0]).triu(1 + len(k) - len(q)).bool(), -torch.inf)
    return (s * q.shape[2] ** -0.5).logsumexp(-1).float()


COLUMN_CASES = [
    # heads, kv_heads, head_dim, dtype, causal, reduce, head_reduce, with query_mask
    (4, 2, 16, torch.float32, True, "sum", "mean", False),
    (3, 1, 40, torch.bfloat16, False, "mean", "max", True),
    (2, 2, 24, torch.float16, True, "max", "sum", True),
    (6, 2, 33, torch.bfloat16, True, "mean", "mean", True),
    (2, 1, 8, torch.float32, False, "max", "max", False),
]


@pytest.mark.parametrize("case", COLUMN_CASES, ids=str)
def test_column_sums(device, case):
    heads, kv_heads, head_dim, dtype, causal, reduce, head_reduce, masked = case
    layouts = {"cu_seqlens_q": VarlenLayout([50, 9, 0, 20], device),
               "cu_seqlens_k": VarlenLayout([50, 20, 4, 9], device)}  # fmt: skip
    random = torch.Generator().manual_seed(1)
    q = torch.randn(79, heads, head_dim, generator=random).to(device, dtype)
    k = torch.randn(83, kv_heads, head_dim, generator=random).to(device, dtype)
    lse = torch.cat(
        [row_lse(a, b, causal) for a, b in zip(q.split([50, 9, 0, 20]), k.split([50, 20, 4, 9]), strict=True)], 1
    )
    lse[:, 7] = -torch.inf
    mask = (torch.rand(79, generator=random) < 0.6).to(device) if masked else None
    named = {**layouts, "causal": causal, "reduce": reduce, "head_reduce": head_reduce, "query_mask": mask}
    result = attention_column_sums(q, k, lse, **named)
    cu = (layouts["cu_seqlens_q"].cu_seqlens, layouts["cu_seqlens_k"].cu_seqlens)
    rest = (*cu, mask, 50, 50, causal, reduce, head_reduce, head_dim**-0.5)
    same = scores.reference_scores.column_sums(q.float(), k.float(), lse, *rest)
    assert_close(result, scores.reference_scores.column_sums(q.double(), k.double(), lse.double(), *rest), same)
