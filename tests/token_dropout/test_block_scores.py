# SPDX-License-Identifier: Apache-2.0
"""The three steps of scores whose keys lie on many ranks; sequence_parallel/test_dropout.py puts them together."""

import re

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import use_backend
from lrc_kernels.token_dropout import attention_scores, block_factors, block_scores, block_statistics


def make_blocks(dtype=torch.float32):
    """A sequence of 300 keys as blocks of 128, 128 and 44, its row at position 200; the last block is not seen."""
    draw = torch.Generator().manual_seed(0)
    q, k = torch.randn(1, 4, 24, generator=draw), torch.randn(300, 2, 24, generator=draw)
    position = torch.tensor([200, 72, -1], dtype=torch.int32).clamp(max=127)
    return q.to(dtype).expand(3, 4, 24).contiguous(), k.to(dtype), VarlenLayout([128, 128, 44]), position


@pytest.mark.parametrize("backend", ["reference", "cpu"])
@pytest.mark.parametrize("head_reduce", ["mean", "max"])
def test_three_steps_are_the_whole(backend, head_reduce):
    q, k, blocks, position = make_blocks()
    layout, row = VarlenLayout([300]), torch.tensor([200], dtype=torch.int32)
    with use_backend(backend):
        whole = attention_scores(q[:1], k, cu_seqlens_k=layout, query_sequence=torch.zeros(1, dtype=torch.int32),
                                 query_position=row, head_reduce=head_reduce)  # fmt: skip
        statistics = block_statistics(q, k, blocks, position)
        factors = block_factors(statistics.transpose(1, 2).unsqueeze(1), layout, row)
        parts = block_scores(q, k, blocks, position, factors[0].T, head_reduce=head_reduce)
    assert torch.equal(parts, whole)
    assert statistics[0, 2].isneginf().all() and statistics[1, 2].eq(0).all() and factors[0, :, 2].eq(0).all()


def test_statistics_are_those_of_a_softmax():
    q, k, blocks, position = make_blocks(torch.float64)
    maximum, total = block_statistics(q, k, blocks, position, softmax_scale=0.3)
    for block, keys in ((0, k[:128]), (1, k[128:201])):
        logits = torch.einsum("hk,jhk->hj", q[block], keys.repeat_interleave(2, 1)) * 0.3
        torch.testing.assert_close(maximum[block] + total[block].log(), logits.logsumexp(1))


@pytest.mark.parametrize("name", ["statistics", "factors", "scores"])
def test_opcheck(name):
    q, k, blocks, position = make_blocks()
    statistics, cu = block_statistics(q, k, blocks, position), blocks.cu_seqlens
    padded = statistics.transpose(1, 2).unsqueeze(1).contiguous()
    row, layout = torch.tensor([200], dtype=torch.int32), torch.tensor([0, 300], dtype=torch.int32)
    ops = {
        "statistics": (torch.ops.lrc.attention_score_statistics_fwd, (q, k, cu, position, 0.25)),
        "factors": (torch.ops.lrc.attention_score_factors_fwd, (padded, layout, row)),
        "scores": (
            torch.ops.lrc.attention_block_scores_fwd,
            (q, k, cu, position, torch.ones(3, 4), "mean", 0.25),
        ),
    }
    torch.library.opcheck(*ops[name])


def test_bad_arguments_are_named():
    q, k, blocks, position = make_blocks()
    statistics = block_statistics(q, k, blocks, position)
    layout, row = VarlenLayout([300]), torch.tensor([200], dtype=torch.int32)
    for call, message in (
        (lambda: block_statistics(q, k, VarlenLayout([129, 127, 44]), position), "blocks must have at most 128 rows"),
        (lambda: block_statistics(q, k[1:], blocks, position), "k must hold the 300 keys of blocks, got 299"),
        (lambda: block_statistics(q[1:], k, blocks, position), "q must hold one row per block (3), got 2"),
        (lambda: block_statistics(q, k, [128], position), "blocks must be a VarlenLayout, got list"),
        (lambda: block_statistics(q, k, blocks, position[1:]), "query_position must hold one value per token (3)"),
        (lambda: block_factors(statistics, layout, row), "statistics must have 4 dimensions"),
        (lambda: block_factors(statistics[None], layout, row), "statistics must have shape [2, 1, Hq, 3]"),
        (lambda: block_scores(q, k, blocks, position, torch.ones(3, 3)), "factor must have shape [3, 4]"),
        (lambda: block_scores(q, k, blocks, position, torch.ones(3, 4), head_reduce="min"), "head_reduce"),
    ):
        with pytest.raises((TypeError, ValueError), match=re.escape(message)):
            call()
