# SPDX-License-Identifier: Apache-2.0
"""Token dropout of a pack on many ranks, all of them in this process: scores have the bits of one rank, rows that a
selection keeps reach their new holders and their gradients come back, and the plan after a drop is even."""

import random
import re

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record, use_backend
from lrc_kernels.sequence_parallel import plan_after_drop, plan_exchange, plan_sequence
from lrc_kernels.sequence_parallel.comm import AllReduce, VirtualRanks
from lrc_kernels.sequence_parallel.dropout import score_blocks, scores_of_pack
from lrc_kernels.sequence_parallel.exchange import return_rows, send_rows
from lrc_kernels.sequence_parallel.shard import take_rows
from lrc_kernels.sequence_parallel.stripe import stripe_sequence
from lrc_kernels.token_dropout import attention_scores, select_tokens

HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 16}
# Longer than a block of 128 keys, shorter, one row, none.
LENGTHS = [300, 0, 1, 40, 129, 255]
ARRANGEMENTS = ("contiguous", "zigzag", "zigzag_per_seq", "balanced")


def make_plan(arrangement, ring, ulysses, lengths=LENGTHS, device="cpu", **options):
    layout = VarlenLayout(lengths, device)
    return plan_sequence(layout, ring=ring, ulysses=ulysses, arrangement=arrangement, **HEADS, **options)


def inputs(dtype, lengths=LENGTHS):
    draw = torch.Generator().manual_seed(1)
    q = torch.randn(len(lengths), 4, 16, generator=draw, dtype=torch.float64).to(dtype)
    k = torch.randn(sum(lengths), 2, 16, generator=draw, dtype=torch.float64).to(dtype)
    # Most ask in the middle, so that some blocks are not seen at all; one has no row that asks.
    position = torch.tensor([max(n - 1 - 40 * (n > 200), -1) for n in lengths], dtype=torch.int32)
    position[3:4] = -1
    return q, k, position


def scores_on_all_ranks(plan, q, k, position, head_reduce):
    ranks = VirtualRanks(plan.ring, plan.ulysses)
    found = ranks.run(lambda r, u: scores_of_pack(plan, (r, u), q, take_rows(k, plan, (r, u)), position,
                                                  head_reduce, None))  # fmt: skip
    return found, ranks


@pytest.mark.parametrize(
    ("backend", "dtype"),
    [("reference", torch.float64), ("reference", torch.bfloat16), ("cpu", torch.float32), ("cpu", torch.bfloat16)],
    ids=str,
)
@pytest.mark.parametrize(("ring", "ulysses"), [(1, 1), (1, 3), (4, 1), (3, 2)])
def test_scores_have_the_bits_of_one_rank(backend, dtype, ring, ulysses):
    q, k, position = inputs(dtype)
    for arrangement, head_reduce in zip(ARRANGEMENTS, ("mean", "max", "sum", "mean"), strict=True):
        plan = make_plan(arrangement, ring, ulysses)
        with use_backend(backend), record() as ran:
            one = attention_scores(q, k, cu_seqlens_k=plan.layout, query_sequence=torch.arange(6, dtype=torch.int32),
                                   query_position=position, head_reduce=head_reduce)  # fmt: skip
            found, _ = scores_on_all_ranks(plan, q, k, position, head_reduce)
        assert {used for _, used in ran} == {backend}
        assert {name for name, _ in ran} >= {"attention_score_statistics_fwd", "attention_score_factors_fwd",
                                             "attention_block_scores_fwd"}  # fmt: skip
        for scores in found:
            assert torch.equal(scores, one), arrangement


def test_fewer_rows_than_ranks():
    q, k, position = inputs(torch.float32, [3, 0, 2])
    plan = make_plan("balanced", 4, 2, [3, 0, 2])
    one = attention_scores(q, k, cu_seqlens_k=plan.layout, query_sequence=torch.arange(3, dtype=torch.int32),
                           query_position=position)  # fmt: skip
    found, _ = scores_on_all_ranks(plan, q, k, position, "mean")
    assert all(torch.equal(scores, one) for scores in found)


@pytest.mark.triton
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_scores_have_the_bits_of_one_rank_in_triton(device, dtype):
    lengths = [200, 0, 1, 30, 129, 20]
    q, k, position = (x.to(device) for x in inputs(dtype, lengths))
    plan = make_plan("balanced", 2, 1, lengths, device, chunk=50)
    sequence = torch.arange(6, dtype=torch.int32, device=device)
    with use_backend("triton"), record() as ran:
        one = attention_scores(q, k, cu_seqlens_k=plan.layout, query_sequence=sequence, query_position=position)
        found, _ = scores_on_all_ranks(plan, q, k, position, "mean")
    assert {used for _, used in ran} == {"triton"}
    assert all(torch.equal(scores, one) for scores in found)


def test_a_nan_key_spoils_its_own_sequence_alone():
    q, k, position = inputs(torch.float64)
    k[50] = torch.nan
    found, _ = scores_on_all_ranks(make_plan("zigzag", 3, 1), q, k, position, "mean")
    for scores in found:
        assert scores[: 300 - 40].isnan().all() and scores[300 - 40 : 300].eq(0).all() and scores[300:].isfinite().all()


def test_little_beside_scores_travels():
    """Of each row a score and its share of the statistics; of each border of ranks the keys of one cut block."""
    rows, ranks_in_all = 8000, 4
    q, k = torch.randn(1, 4, 16), torch.randn(rows, 2, 16)
    plan = make_plan("zigzag", ranks_in_all, 1, [rows])
    _, ranks = scores_on_all_ranks(plan, q, k, torch.tensor([rows - 1], dtype=torch.int32), "mean")
    most_blocks = max(map(len, score_blocks(plan).blocks))
    most_rows = max(map(len, score_blocks(plan).rows))
    gathered = ranks_in_all * (ranks_in_all - 1) * (most_blocks * 2 * 4 + most_rows) * 4
    borders = ranks.bytes_sent - gathered
    assert 0 < borders <= 7 * 127 * 2 * 16 * 4


def test_every_block_has_one_rank():
    draw = random.Random(3)
    for _ in range(20):
        lengths = [draw.choice((0, 1, 127, 128, 129, draw.randrange(600))) for _ in range(draw.randrange(1, 7))]
        plan = make_plan(draw.choice(ARRANGEMENTS), draw.randrange(1, 5), draw.randrange(1, 4), lengths)
        dealt = score_blocks(plan)
        assert torch.equal(torch.cat(dealt.rows).sort().values, torch.arange(sum(lengths)))
        assert torch.equal(torch.cat(dealt.blocks).sort().values, torch.arange(len(dealt.lengths)))
        assert int(dealt.lengths.sum()) == sum(lengths) and (dealt.lengths <= 128).all()


def exchanged(exchange, parts, send):
    ranks = VirtualRanks(exchange.ring, exchange.ulysses)
    run = send_rows if send else return_rows
    return ranks.run(lambda r, u: run(parts[r * exchange.ulysses + u], exchange, (r, u))), ranks


def test_rows_reach_their_ranks_and_the_gradient_is_the_adjoint():
    draw = random.Random(0)
    for _ in range(30):
        ring, ulysses, total = draw.randrange(1, 5), draw.randrange(1, 4), draw.randrange(0, 40)
        before, after = [], []
        for side, dropped in ((before, 0), (after, total // 3)):
            rows = list(range(total))
            draw.shuffle(rows)
            rows = rows[: total - dropped] + [-1] * draw.randrange(4)
            draw.shuffle(rows)
            cuts = sorted(draw.randrange(len(rows) + 1) for _ in range(ring * ulysses - 1))
            side += [
                torch.tensor(rows[a:b], dtype=torch.int64) for a, b in zip([0, *cuts], [*cuts, len(rows)], strict=True)
            ]
        exchange = plan_exchange(before, after, ring=ring, ulysses=ulysses)
        x = [torch.randn(len(rows), 2, dtype=torch.float64) for rows in before]
        y, _ = exchanged(exchange, x, True)
        value = {int(row): part[at] for rows, part in zip(before, x, strict=True) for at, row in enumerate(rows)}
        for rows, part in zip(after, y, strict=True):
            wanted = [value[int(row)] if row >= 0 else torch.zeros(2, dtype=torch.float64) for row in rows]
            assert torch.equal(part, torch.stack(wanted) if wanted else part.new_zeros(0, 2))
        g = [torch.randn_like(part) for part in y]
        back, _ = exchanged(exchange, g, False)
        inner = [sum(float((a * b).sum()) for a, b in zip(*pair, strict=True)) for pair in ((y, g), (x, back))]
        assert inner[0] == pytest.approx(inner[1], abs=1e-9)


def test_sums_in_one_process():
    def schedule(ring_rank, ulysses_rank):
        total = torch.tensor([1.0 + ring_rank, 10.0 * ulysses_rank])
        for step, axis in enumerate(("ring", "ulysses")):
            arriving = yield AllReduce(axis, total, step)
            total = yield arriving
        return total.tolist()

    assert VirtualRanks(3, 2).run(schedule) == [[12.0, 30.0]] * 6


def test_what_stays_on_its_rank_is_not_sent():
    rows = [torch.arange(4), torch.arange(4, 8)]
    exchange = plan_exchange(rows, [part.flip(0)[:2] for part in rows], ring=2, ulysses=1)
    _, ranks = exchanged(exchange, [torch.randn(4, 3) for _ in rows], True)
    assert ranks.bytes_sent == 0


def test_bad_exchanges_are_named():
    one, two = torch.arange(2), torch.arange(1, 3)
    for arguments, message in (
        (([one, two], [one, -torch.ones(1).long()]), "before must name every row once, got row 1 more than once"),
        (([one, one + 2], [two + 2, one[:0]]), "before must hold every row of after, got none that holds row 4"),
        (([one], [one]), "before must hold one list for each of 2 * 1 ranks, got 1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)):
            plan_exchange(*arguments, ring=2, ulysses=1)
    with pytest.raises(TypeError, match=r"after must hold int64 tensors .* got torch.float32 \[2\] on cpu"):
        plan_exchange([one, two + 2], [one.float(), two], ring=2, ulysses=1)


def selection_of(layout, droppable, keep, mode="linspace", scores=None):
    return select_tokens(layout, droppable, keep=keep, mode=mode, scores=scores)


def test_the_plan_after_a_drop_is_even():
    """Videos and text: an even drop leaves rows where they are, one of one stretch makes them change ranks."""
    lengths = [2048, 512, 1024, 512]
    plan = make_plan("balanced", 4, 2, lengths)
    droppable = torch.ones(sum(lengths), dtype=torch.bool)
    even = selection_of(plan.layout, droppable, 0.5)
    stretch = selection_of(plan.layout, droppable, 0.5, "topk", -torch.arange(sum(lengths)).float())
    moved = []
    for selection in (even, stretch):
        after = plan_after_drop(plan, selection)
        assert after.layout == selection.layout and after.arrangement == "balanced"
        held = torch.cat([after.local_indices(r, u) for r in range(4) for u in range(2)])
        assert torch.equal(held[held >= 0].sort().values, torch.arange(selection.num_kept))
        assert max(after.shard_rows) <= 1.05 * sum(after.shard_rows) / 4 and after.stats().imbalance <= 1.06
        # A layer that is computed again plans once.
        assert plan_after_drop(plan, selection) is after
        stays = plan_after_drop(plan, selection, slack=float("inf"))
        moved.append(after.shards != stays.shards)
    assert moved == [False, True]


def test_bad_selections_are_named():
    plan = make_plan("contiguous", 2, 1, [8, 4])
    other = selection_of(VarlenLayout([9]), torch.ones(9, dtype=torch.bool), 0.5)
    with pytest.raises(ValueError, match="selection must be one of the 12 rows of the plan, got 9"):
        plan_after_drop(plan, other)
    with pytest.raises(TypeError, match="selection must be a Selection, got int"):
        plan_after_drop(plan, 3)
    striped = stripe_sequence(plan.layout, ring=2, **HEADS)
    with pytest.raises(ValueError, match="arrangement of plan must be one of contiguous, .*, got 'stripe'"):
        plan_after_drop(striped, selection_of(plan.layout, torch.ones(12, dtype=torch.bool), 0.5))
    padded = select_tokens(plan.layout, torch.ones(12, dtype=torch.bool), keep=0.5, mode="bernoulli", capacity=12)
    with pytest.raises(ValueError, match="selection must have lengths that the host knows"):
        plan_after_drop(plan, padded)
