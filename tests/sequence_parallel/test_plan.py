# SPDX-License-Identifier: Apache-2.0
"""The plan alone: every allowed pair in exactly one block and one call, who holds what, balance and bytes."""

import random
from itertools import pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout, sequence_parallel
from lrc_kernels.sequence_parallel import Mask, plan_sequence
from lrc_kernels.sequence_parallel.encoding import decode
from lrc_kernels.sequence_parallel.heads import head_layout
from lrc_kernels.sequence_parallel.stripe import stripe_sequence
from lrc_kernels.testing.inputs import segment_lengths

ARRANGEMENTS = ("contiguous", "zigzag", "zigzag_per_seq", "balanced")
HEADS = {"num_heads": 4, "num_kv_heads": 2, "head_dim": 8}
CPU = torch.device("cpu")


def plan_of(lengths, ring, **options):
    return plan_sequence(VarlenLayout(lengths), ring=ring, **{**HEADS, **options})


def allowed_pairs(lengths, causal):
    document = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths, dtype=torch.int64))
    seen = document[:, None] == document
    return seen.tril() if causal else seen


def shard_index(plan, rank):
    index = torch.cat([plan.local_indices(rank, u) for u in range(plan.ulysses)])
    assert bool((index[: plan.shard_rows[rank]] >= 0).all()) and bool((index[plan.shard_rows[rank] :] == -1).all())
    return index[: plan.shard_rows[rank]]


def pairs_of_blocks(plan):
    count = torch.zeros(plan.layout.num_tokens, plan.layout.num_tokens, dtype=torch.int64)
    for rank in range(plan.ring):
        for peer, q, k, mask in plan.blocks(rank):
            rows, keys = shard_index(plan, rank)[q.start : q.stop], shard_index(plan, peer)[k.start : k.stop]
            seen = torch.ones(len(rows), len(keys), dtype=torch.int64)
            count[rows[:, None], keys] += seen.tril() if mask is Mask.CAUSAL else seen
    return count


def add_call(count, call, rows, keys):
    q_at, k_at = call.q.start, call.k.start
    for num_q, num_k in zip(call.layout_q.lengths, call.layout_k.lengths, strict=True):
        seen = torch.ones(num_q, num_k, dtype=torch.int64)
        q, k = rows[q_at : q_at + num_q], keys[k_at : k_at + num_k]
        count[q[:, None], k] += seen.tril(num_k - num_q) if call.causal else seen
        q_at, k_at = q_at + num_q, k_at + num_k
    assert (q_at, k_at) == (call.q.stop, call.k.stop)


def pairs_of_calls(plan, exchanged):
    count = torch.zeros(plan.layout.num_tokens, plan.layout.num_tokens, dtype=torch.int64)
    index = [shard_index(plan, rank) for rank in range(plan.ring)]
    longest = max(plan.shard_rows)
    everything = torch.cat([torch.nn.functional.pad(rows, (0, longest - len(rows)), value=-1) for rows in index])
    exchanges = [plan.exchange(rank, CPU) for rank in range(plan.ring)] if exchanged else []
    for rank in range(plan.ring):
        sources = {peer: index[peer] for peer in range(plan.ring)}
        if exchanged:
            arriving = [index[s][exchanges[s].send].split(exchanges[s].send_counts)[rank] for s in range(plan.ring)]
            assert [len(rows) for rows in arriving] == exchanges[rank].receive_counts
            remote = torch.cat(arriving)[exchanges[rank].order]
            assert torch.equal(remote[exchanges[rank].inverse], torch.cat(arriving))
            assert torch.equal(everything[exchanges[rank].gathered], remote)
            assert len(remote) == plan.remote_rows(rank)
            sources = {rank: index[rank], None: remote}
        for peer, keys in sources.items():
            for call in plan.calls(rank, peer, CPU):
                add_call(count, call, index[rank], keys)
    return count


@pytest.mark.parametrize("arrangement", ARRANGEMENTS)
@settings(max_examples=25, deadline=None)
@given(lengths=segment_lengths(5, 40), ring=st.integers(1, 6), causal=st.booleans())
def test_every_allowed_pair_is_covered_exactly_once(arrangement, lengths, ring, causal):
    plan = plan_of(lengths, ring, arrangement=arrangement, causal=causal)
    allowed = allowed_pairs(lengths, causal).long()
    assert torch.equal(pairs_of_blocks(plan), allowed)
    assert torch.equal(pairs_of_calls(plan, exchanged=False), allowed)
    assert torch.equal(pairs_of_calls(plan, exchanged=True), allowed)


@settings(max_examples=25, deadline=None)
@given(rows=segment_lengths(4, 12), ring=st.integers(1, 6), ulysses=st.integers(1, 3), causal=st.booleans())
def test_stripes_cover_every_allowed_pair_exactly_once(rows, ring, ulysses, causal):
    lengths = [n * ring for n in rows]
    plan = stripe_sequence(VarlenLayout(lengths), ring=ring, ulysses=ulysses, causal=causal, **HEADS)
    allowed = allowed_pairs(lengths, causal).long()
    assert torch.equal(pairs_of_blocks(plan), allowed)
    assert torch.equal(pairs_of_calls(plan, exchanged=False), allowed)
    for rank in range(ring):
        assert torch.equal(shard_index(plan, rank) % ring, torch.full((sum(rows),), rank))
        assert sum(plan.areas(rank)) == int(allowed[shard_index(plan, rank)].sum())


def test_stripes_refuse_what_they_cannot_do():
    with pytest.raises(ValueError, match="document 1 must have a number of rows that 3 ranks divide, got 7"):
        stripe_sequence(VarlenLayout([6, 7]), ring=3, **HEADS)
    with pytest.raises(ValueError, match="must use the transport 'ring'"):
        stripe_sequence(VarlenLayout([6]), ring=3, **HEADS).needs(0, 1)


@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, "stripe"])
def test_a_decoded_plan_executes_the_same(arrangement):
    lengths = [36, 0, 120, 4, 60]
    if arrangement == "stripe":
        plan = stripe_sequence(VarlenLayout(lengths), ring=4, ulysses=2, causal=False, **HEADS)
    else:
        plan = plan_of(lengths, 4, ulysses=2, arrangement=arrangement, transport="gather", causal=False)
    again = decode(plan.encoded)
    assert again is decode(plan.encoded.clone()) and torch.equal(again.encoded, plan.encoded)
    for name in ("ring", "ulysses", "num_heads", "num_kv_heads", "head_dim", "transport", "causal", "shards"):
        assert getattr(again, name) == getattr(plan, name), name
    assert again.layout.lengths == plan.layout.lengths and type(again) is type(plan)
    assert [again.blocks(rank) for rank in range(4)] == [plan.blocks(rank) for rank in range(4)]


@pytest.mark.parametrize("arrangement", [*ARRANGEMENTS, "auto"])
@settings(max_examples=25, deadline=None)
@given(lengths=segment_lengths(8, 60), ring=st.integers(1, 9), ulysses=st.integers(1, 4), chunk=st.integers(1, 20))
def test_each_row_lives_on_exactly_one_rank(arrangement, lengths, ring, ulysses, chunk):
    chunk = chunk if arrangement == "balanced" else None
    plan = plan_of(lengths, ring, ulysses=ulysses, arrangement=arrangement, chunk=chunk)
    parts = [plan.local_indices(r, u) for r in range(ring) for u in range(ulysses)]
    held = torch.cat(parts)
    assert torch.equal(held[held >= 0].sort().values, torch.arange(sum(lengths)))
    assert (held < 0).sum() < ring * ulysses
    for rank in range(ring):
        assert bool((shard_index(plan, rank).diff() > 0).all())
        assert {len(plan.local_indices(rank, u)) for u in range(ulysses)} == {plan.local_rows(rank)}
    largest_chunk = {"contiguous": 1, "zigzag": 2, "zigzag_per_seq": 1, "balanced": chunk, "auto": 16}[arrangement]
    assert max(plan.shard_rows) - min(plan.shard_rows) <= largest_chunk
    assert plan.stats().padding == pytest.approx(int((held < 0).sum()) / max(1, sum(lengths)))


def test_what_a_rank_needs_is_what_its_blocks_read():
    plan = plan_of([37, 201, 0, 5, 130, 1, 139], 4, arrangement="balanced", chunk=16)
    for rank in range(4):
        for peer in range(4):
            read = {row for block in plan.blocks(rank) if block.peer == peer != rank for row in block.k}
            needed = plan.needs(rank, peer)
            assert {row for run in needed for row in run} == read
            assert all(first.stop < second.start for first, second in pairwise(needed))


def video_mix(num_tokens, seed):
    """The InternVideo2.5 mix of the facts: videos of 64 to 512 frames at 16 tokens, images of 256 tokens a tile."""
    draw, lengths = random.Random(seed), []
    while sum(lengths) < num_tokens:
        visual = 16 * 8 * draw.randint(8, 64) if draw.random() < 0.5 else 256 * draw.randint(1, 7)
        lengths.append(visual + draw.randint(30, 300))
    lengths[-1] -= sum(lengths) - num_tokens
    return lengths


@pytest.mark.parametrize("seed", range(5))
def test_balanced_chunks_and_sparse_exchange_on_the_mixed_video_pack(seed):
    lengths = video_mix(65536, seed)
    heads = {"num_heads": 32, "num_kv_heads": 8, "head_dim": 128}
    ours = plan_of(lengths, 8, arrangement="balanced", transport="sparse", **heads).stats()
    ring = plan_of(lengths, 8, arrangement="zigzag", transport="ring", **heads).stats()
    assert ours.imbalance <= 1.02
    assert ours.bytes_forward <= 0.35 * ring.bytes_forward and ours.bytes_backward <= 0.35 * ring.bytes_backward
    assert ours.predicted_time < ring.predicted_time
    chosen = plan_of(lengths, 8, **heads)
    assert (chosen.arrangement, chosen.transport) == ("balanced", "sparse")


def test_auto_takes_a_zigzag_for_one_long_document():
    plan = plan_of([1 << 18], 8, num_heads=32, num_kv_heads=8, head_dim=128)
    assert plan.arrangement.startswith("zigzag") and plan.stats().imbalance <= 1.001


def test_bytes_are_those_of_the_formulas():
    # Facts, section 2.6, with 2-byte activations and 4-byte gradients; here for all ranks together.
    rows, R, U, D = 960, 4, 2, 16
    plan = plan_sequence(VarlenLayout([rows]), ring=R, ulysses=U, num_heads=8, num_kv_heads=4, head_dim=D,
                         arrangement="zigzag", transport="ring")  # fmt: skip
    per_rank_ring = (R - 1) * 2 * (rows // R) * (4 // U) * D * 2
    per_rank_ulysses = rows // (R * U) * D * 2 * (U - 1) // U * (2 * 8 + 2 * 4)
    stats = plan.stats()
    assert stats.bytes_forward == R * U * (per_rank_ring + per_rank_ulysses)
    assert stats.bytes_backward == R * U * (3 * per_rank_ring + per_rank_ulysses)
    assert stats["bytes_forward"] == stats.bytes_forward
    one = plan_of([100], 1).stats()
    assert (one.bytes_forward, one.bytes_backward, one.imbalance, one.padding) == (0, 0, 1.0, 0.0)


@pytest.mark.parametrize("transport", ["ring", "sparse", "gather"])
def test_an_empty_pack_and_ranks_without_rows(transport):
    for lengths in ([], [0, 0], [1], [2, 0, 1]):
        for arrangement in ARRANGEMENTS:
            plan = plan_of(lengths, 5, arrangement=arrangement, transport=transport)
            assert sum(plan.shard_rows) == sum(lengths)
            assert torch.equal(pairs_of_calls(plan, True), allowed_pairs(lengths, True).long())
            assert plan.stats().imbalance >= 1.0


@settings(max_examples=100, deadline=None)
@given(num_kv=st.integers(1, 9), ratio=st.integers(1, 9), ulysses=st.integers(1, 9))
def test_heads_keep_their_ratio_on_every_rank(num_kv, ratio, ulysses):
    heads = head_layout(num_kv * ratio, num_kv, ulysses)
    assert heads.num_q % heads.num_kv == 0
    seen = []
    for q, kv in zip(heads.q, heads.kv, strict=True):
        assert q.stop - q.start <= heads.num_q and kv.stop - kv.start <= heads.num_kv
        for slot, head in enumerate(range(q.start, q.stop)):
            assert kv.start + slot // (heads.num_q // heads.num_kv) == head // ratio
        seen += range(q.start, q.stop)
    assert sorted(seen) == list(range(num_kv * ratio))
    assert heads.replicated == any(a == b for i, a in enumerate(heads.kv) for b in heads.kv[:i] if a.stop > a.start)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"ring": 0}, "ring must be >= 1, got 0"),
        ({"ulysses": True}, "ulysses must be an int, got bool"),
        ({"num_kv_heads": 3}, r"num_kv_heads must divide num_heads \(4\), got 3"),
        ({"arrangement": "stripe"}, "arrangement must be one of contiguous, .*, got 'stripe'"),
        ({"transport": "p2p"}, "transport must be one of ring, sparse, gather, auto, got 'p2p'"),
        ({"arrangement": "zigzag", "chunk": 8}, "chunk must be None for arrangement 'zigzag', got 8"),
        ({"causal": 1}, "causal must be a bool, got int"),
        ({"layout": [3, 4]}, "layout must be a VarlenLayout, got list"),
    ],
)
def test_bad_arguments_are_named(options, message):
    arguments = {"layout": VarlenLayout([3, 4]), "ring": 2, **HEADS, **options}
    with pytest.raises((TypeError, ValueError), match=message):
        plan_sequence(arguments.pop("layout"), **arguments)


def test_what_is_no_plan_or_no_mesh_is_named():
    plan = plan_sequence(VarlenLayout([5]), ring=1, num_heads=1, num_kv_heads=1, head_dim=8)
    x = torch.zeros(5, 1, 8)
    for call in (
        lambda: sequence_parallel.place(plan, "cpu"),
        lambda: sequence_parallel.degree_of("cpu", "ring"),
        lambda: sequence_parallel.shard(x, plan, None),
        lambda: sequence_parallel.sum_over_ranks(x, None),
        lambda: sequence_parallel.sum_gradients([torch.nn.Parameter(x)], None),
        lambda: sequence_parallel.sequence_parallel_attention(x, x, x, plan, None),
    ):
        with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got"):
            call()
    for call in (lambda: sequence_parallel.place([5], None), lambda: sequence_parallel.rows_of_ranks([5])):
        with pytest.raises(TypeError, match="plan must be a SequencePlan, got list"):
            call()


def test_ranks_outside_the_mesh_are_refused():
    plan = plan_of([8], 2, ulysses=2)
    with pytest.raises(ValueError, match="ring_rank must be below 2, got 2"):
        plan.local_indices(2, 0)
    with pytest.raises(ValueError, match="ulysses_rank must be below 2, got 3"):
        plan.local_indices(0, 3)
    with pytest.raises(ValueError, match="peer must be >= 0, got -1"):
        plan.needs(0, -1)
