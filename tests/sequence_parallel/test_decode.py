# SPDX-License-Identifier: Apache-2.0
"""Attention of one new row per sequence over keys on many ranks: precision, what travels, NaN, and bad input."""

import pytest
import torch
from torch import distributed

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.sequence_parallel import make_mesh, sequence_parallel_decode_attention
from lrc_kernels.sequence_parallel.mesh import ranks_of


def decode_in_16_bits():
    """Errors of ranks and of one process against fp64, in bf16, the bytes sent, and refusals."""
    mesh, random = make_mesh("cpu", ring=2, ulysses=2), torch.Generator().manual_seed(0)
    rank, lengths = distributed.get_rank(), (300, 1, 64)
    q = torch.randn(3, 4, 16, generator=random).bfloat16()
    k, v = (torch.randn(sum(lengths), 2, 16, generator=random).bfloat16() for _ in range(2))
    mine = [[x[rank::4] for x in whole.split(lengths)] for whole in (k, v)]
    before = ranks_of(mesh).bytes_sent
    out = sequence_parallel_decode_attention(q, *mine, mesh)
    sent = ranks_of(mesh).bytes_sent - before
    options = {"cu_seqlens_q": VarlenLayout([1] * 3), "cu_seqlens_k": VarlenLayout(lengths)}
    exact = varlen_attention(*(x.double() for x in (q, k, v)), **options)
    one = varlen_attention(q, k, v, **options)
    errors = [float((x.double() - exact).norm() / exact.norm()) for x in (out, one)]
    nan = []
    for dtype, value in ((torch.bfloat16, torch.nan), (torch.float32, torch.nan), (torch.float32, torch.inf)):
        queries, keys, values = q.abs().to(dtype), *([x.to(dtype, copy=True) for x in held] for held in mine)
        if rank == 1:
            keys[0][5, 1] = value
        nan.append(sequence_parallel_decode_attention(queries, keys, values, mesh).isnan().all(2).tolist())
    none = sequence_parallel_decode_attention(q[:0], [], [], mesh)
    messages = []
    for arguments in ((q[0], *mine), (q, None, mine[1]), (q, mine[0][1:], mine[1]),
                      (q, mine[0], [x.double() for x in mine[1]]),
                      (q, mine[0], [x[1:] for x in mine[1]])):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as caught:
            sequence_parallel_decode_attention(*arguments, mesh)
        messages.append(str(caught.value))
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got NoneType"):
        sequence_parallel_decode_attention(q, *mine, None)
    return errors, sent, nan, list(none.shape), messages


def test_partial_results_are_not_rounded_and_bad_ones_are_named(rank_pools):
    wanted = (
        "q must have 3 dimensions",
        "keys must be a list or tuple of tensors, got NoneType",
        "keys must hold one tensor for each of 3 sequences, got 2",
        "values[0] must be one of bfloat16, got float64",
        "values[0] must have the shape of keys[0]",
    )
    for (error, one), sent, nan, none, messages in rank_pools(4).run(decode_in_16_bits):
        assert error <= 1.5 * one + 5e-4 and none == [0, 4, 16]
        # To one rank 3 sequences of 4 heads, then what both have to another one.
        assert sent == 3 * 3 * 4 * (16 + 1) * 4
        # Where one key of one rank is not finite, the heads that see it are NaN, and no others.
        assert nan == [[[False, False, True, True], [False] * 4, [False] * 4]] * 3
        assert all(part in message for part, message in zip(wanted, messages, strict=True)), messages
