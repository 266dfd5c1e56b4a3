# SPDX-License-Identifier: Apache-2.0
"""Rows of every dtype over gloo, which by itself knows few: each way that rows travel keeps their bits."""

import re

import pytest
import torch
from torch import distributed

from lrc_kernels import VarlenLayout
from lrc_kernels.sequence_parallel import (
    drop_rows,
    gather_rows,
    make_mesh,
    plan_after_drop,
    plan_sequence,
    rows_at,
    shard,
    sum_over_ranks,
    unshard,
)
from lrc_kernels.sequence_parallel.comm import AllGather, AllToAll, Shift
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_kernels.token_dropout import select_tokens

DTYPES = (
    torch.int16, torch.uint16, torch.uint64, torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e8m0fnu, torch.bool,
    torch.complex64, torch.bfloat16, torch.float64,
)  # fmt: skip
# Bytes per row that 8, 4 and 1 divide, as dtypes allow; rows of no element, and rows that are one.
TRAILING = ((8,), (3, 4), (3,), (0,), ())


def bits(x):
    return x.contiguous().flatten().view(torch.uint8).tolist(), x.dtype, x.shape


def rows_of(dtype, trailing, rows=18):
    draw = torch.Generator().manual_seed(0)
    raw = torch.randint(0, 2, (rows, *trailing, dtype.itemsize), generator=draw).to(torch.uint8)
    # A row away from the start of the memory: words of 8 bytes may begin between its elements.
    return raw.flatten().view(dtype).view(rows, *trailing)[1:]


def every_way(mesh, plan, selection, dtype, trailing):
    """The names of the ways that changed a bit."""
    whole, rank, run = rows_of(dtype, trailing), distributed.get_rank(), ranks_of(mesh).run
    local = shard(whole, plan, mesh)
    asked = torch.tensor([16, 3])
    after = plan_after_drop(plan, selection, slack=0)
    (kept,) = drop_rows([local], selection, plan, after, mesh)
    other = rank ^ 2

    def post(request):
        arriving = yield request
        return (yield arriving)

    counts = [1 + rank // 2, 2 + rank // 2]
    found = {
        "unshard": (unshard(local, plan, mesh), whole),
        "drop_rows": (unshard(kept, after, mesh), whole[selection.indices.long()]),
        "rows_at": (rows_at(local, asked, plan, mesh), whole[asked]),
        "gather_rows": (gather_rows(whole[: rank + 1], [1, 2, 3, 4], plan, mesh),
                        torch.cat([whole[:n] for n in (1, 2, 3, 4)])),
        "shift": (run("a shift", post(Shift("ring", whole[rank : rank + 2], 2, 0))), whole[other : other + 2]),
        "all-gather": (run("a gather", post(AllGather("ring", whole[rank : rank + 2], 0))),
                       torch.cat([whole[at : at + 2] for at in (rank & 1, rank | 2)])),
        # From rank r of the ring r + 1 rows go to the first and r + 2 to the second.
        "all-to-all": (run("an exchange", post(AllToAll("ring", whole[: sum(counts)], counts,
                                                        [1 + rank // 2, 2 + rank // 2], 0))),
                       whole[[0, 0, 1]] if rank < 2 else whole[[1, 2, 2, 3, 4]]),
    }  # fmt: skip
    return [name for name, (x, y) in found.items() if bits(x) != bits(y)]


def every_dtype():
    mesh, layout = make_mesh("cpu", ring=2, ulysses=2), VarlenLayout([9, 8])
    plan = plan_sequence(layout, ring=2, ulysses=2, arrangement="contiguous", num_heads=4, num_kv_heads=2, head_dim=8)
    selection = select_tokens(layout, torch.ones(17, dtype=torch.bool), keep=0.5, mode="linspace")
    return {
        (dtype, trailing): changed
        for index, dtype in enumerate(DTYPES)
        # Every width of a word for every size of an element, and each dtype with rows of several elements and of one.
        for trailing in (TRAILING if dtype.itemsize not in {x.itemsize for x in DTYPES[:index]} else TRAILING[1::3])
        if (changed := every_way(mesh, plan, selection, dtype, trailing))
    }


def test_rows_of_every_dtype_travel_every_way(rank_pools):
    assert rank_pools(4).run(every_dtype) == [{}] * 4


def refused_sums():
    mesh = make_mesh("cpu", ring=2, ulysses=2)
    messages = []
    for x in (torch.ones(2, dtype=torch.int16), torch.ones(2).to(torch.float8_e4m3fn), torch.ones(2).bool(), 3):
        with pytest.raises(TypeError) as caught:
            sum_over_ranks(x, mesh)
        messages.append(str(caught.value))
    summed = torch.int8, torch.uint8, torch.int32, torch.int64, torch.float16, torch.bfloat16
    return messages, [sum_over_ranks(torch.ones(2, dtype=dtype), mesh).tolist() for dtype in summed]


def test_what_no_backend_adds_up_is_named_before_anything_is_sent(rank_pools):
    for messages, sums in rank_pools(4).run(refused_sums):
        for message, seen in zip(messages, ("int16", "float8_e4m3fn", "bool", "int"), strict=True):
            assert re.search(rf"^x must be .*, got {seen}$", message), message
        assert all(total == [4, 4] for total in sums)
