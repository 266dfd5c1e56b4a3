# SPDX-License-Identifier: Apache-2.0
"""`drop_budget` and `select_tokens`: what is kept, and that no packing, sharding or repetition changes it."""

import math

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record
from lrc_kernels.token_dropout import drop_budget, select_tokens

EXACT = ["topk", "linspace", "random"]
IDS = torch.tensor([11, 2**40 + 3, -5, 0, 77])
LENGTHS = [23, 0, 40, 9, 17]


def make_pack(random, lengths=LENGTHS):
    """Per-sequence flags, scores and global ids; the first row of each sequence is text."""
    sequences = []
    for length, identity in zip(lengths, IDS.tolist(), strict=False):
        flags = torch.rand(length, generator=random) < 0.75
        flags[:1] = False
        sequences.append((flags, torch.randn(length, generator=random), identity))
    return sequences


def kept_of(sequences, mode, keep, **options):
    """{sequence id: kept local rows} of a pack of these sequences in this order."""
    layout = VarlenLayout([flags.shape[0] for flags, _, _ in sequences])
    flags, scores = (torch.cat([sequence[i] for sequence in sequences]) for i in (0, 1))
    ids = torch.tensor([identity for _, _, identity in sequences])
    if mode == "topk":
        options["scores"] = scores
    selection = select_tokens(layout, flags, keep=keep, mode=mode, sequence_ids=ids, **options)
    starts, ends = layout.cu_seqlens[:-1].tolist(), layout.cu_seqlens[1:].tolist()
    rows = [row for row in selection.indices.tolist() if row >= 0]
    return {
        identity: [row - start for row in rows if start <= row < end]
        for (_, _, identity), start, end in zip(sequences, starts, ends, strict=True)
    }


@pytest.mark.parametrize("mode", [*EXACT, "bernoulli"])
def test_invariant_under_repacking_and_recomputation(random, mode):
    sequences = make_pack(random)
    options = {"seed": 2**50 + 1, "layer": 18}
    whole = kept_of(sequences, mode, 0.5, **options)
    assert whole == kept_of(sequences, mode, 0.5, **options)
    assert whole == kept_of([sequences[i] for i in (3, 0, 4, 2, 1)], mode, 0.5, **options)
    halves = kept_of(sequences[:2], mode, 0.5, **options) | kept_of(sequences[2:], mode, 0.5, **options)
    assert whole == halves
    assert any(len(rows) < sequence[0].shape[0] for rows, sequence in zip(whole.values(), sequences, strict=True))


def test_a_shard_decides_as_the_whole_does(random):
    """A rank that holds every third row and passes their positions draws what the whole sequence draws."""
    layout, flags = VarlenLayout([60]), torch.ones(60, dtype=torch.bool)
    whole = select_tokens(layout, flags, keep=0.4, mode="bernoulli", seed=9, sequence_ids=torch.tensor([5]))
    shard = torch.arange(1, 60, 3)
    for positions in (shard, shard.int()):
        part = select_tokens(
            VarlenLayout([20]), flags[:20], keep=0.4, mode="bernoulli", seed=9, sequence_ids=torch.tensor([5]),
            positions=positions,
        )  # fmt: skip
        assert ((part.inverse >= 0) == (whole.inverse[shard] >= 0)).all()


@pytest.mark.parametrize("mode", ["random", "bernoulli"])
def test_seed_layer_and_sequence_change_the_draw(mode):
    layout, flags = VarlenLayout([400]), torch.ones(400, dtype=torch.bool)

    def draw(**options):
        return select_tokens(layout, flags, keep=0.5, mode=mode, **options).inverse >= 0

    base = draw(seed=1, layer=2)
    seeds = [2, 1 + 2**32, 2**63 + 1, -1]
    others = [*(draw(seed=s, layer=2) for s in seeds), draw(seed=1, layer=3)]
    others.append(draw(seed=1, layer=2, sequence_ids=torch.tensor([2**32])))
    for i, other in enumerate(others):
        # Agreement of independent halves is binomial: 200 of 400, standard deviation 10.
        assert abs(int((other == base).sum()) - 200) < 60, i
    assert torch.equal(draw(seed=-1), draw(seed=2**64 - 1))
    assert torch.equal(base, draw(seed=torch.tensor(1), layer=2))


def test_bernoulli_mean_and_independence_over_layers():
    n, layers, p = 2000, 24, 0.3
    layout, flags = VarlenLayout([n]), torch.ones(n, dtype=torch.bool)
    draws = [
        select_tokens(layout, flags, keep=p, mode="bernoulli", seed=4, layer=i).inverse >= 0 for i in range(layers)
    ]
    kept = torch.stack(draws).double()
    # Five standard deviations of the binomial; per layer, over all, per pair of layers.
    assert (kept.sum(1) - n * p).abs().max() < 5 * math.sqrt(n * p * (1 - p))
    assert abs(float(kept.sum()) - layers * n * p) < 5 * math.sqrt(layers * n * p * (1 - p))
    centred = kept - p
    pairs = centred @ centred.T / (n * p * (1 - p))
    assert (pairs - torch.eye(layers) * pairs.diag()).abs().max() < 5 / math.sqrt(n)


def test_bernoulli_probability_one_keeps_all():
    layout, flags = VarlenLayout([50]), torch.ones(50, dtype=torch.bool)
    assert select_tokens(layout, flags, keep=1.0, mode="bernoulli").num_kept == 50
    assert select_tokens(layout, flags, keep=1e-12, mode="bernoulli").num_kept == 0


@pytest.mark.parametrize("capacity", [89, 75, 120])
def test_bernoulli_capacity_pads(random, capacity):
    layout = VarlenLayout(LENGTHS)
    flags = torch.rand(89, generator=random) < 0.8
    exact = select_tokens(layout, flags, keep=0.5, mode="bernoulli", seed=3)
    padded = select_tokens(layout, flags, keep=0.5, mode="bernoulli", seed=3, capacity=capacity)
    n = exact.num_kept
    assert padded.num_kept == capacity == padded.indices.shape[0] and n < capacity
    assert torch.equal(padded.indices[:n], exact.indices) and (padded.indices[n:] == -1).all()
    assert torch.equal(padded.inverse, exact.inverse)
    assert padded.layout.num_sequences == 6 and padded.layout.max_seqlen == capacity
    assert padded.layout.cu_seqlens.tolist() == [*exact.layout.cu_seqlens.tolist(), capacity]
    assert not flags[exact.inverse < 0].logical_not().any()


def test_bernoulli_overflow_raises_on_cpu_and_drops_the_last_on_a_device(random):
    layout, flags = VarlenLayout(LENGTHS), torch.rand(89, generator=random) < 0.8
    exact = select_tokens(layout, flags, keep=0.6, mode="bernoulli", seed=3)
    n, fixed = exact.num_kept, int((~flags).sum())
    with pytest.raises(ValueError, match=f"capacity must hold the {n} rows that this draw keeps, got {n - 7}"):
        select_tokens(layout, flags, keep=0.6, mode="bernoulli", seed=3, capacity=n - 7)
    with pytest.raises(ValueError, match=f"capacity must hold the {fixed} tokens that are not droppable, got 3"):
        select_tokens(layout, flags, keep=0.6, mode="bernoulli", seed=3, capacity=3)
    options = (torch.tensor(3), 0, None, None)
    args = (flags, layout.cu_seqlens, *options, n - 7, layout.max_seqlen, int(0.6 * 2**32))
    indices, inverse, cu_seqlens, wanted = torch.ops.lrc.select_tokens_bernoulli_fwd(*args)
    drawn = [row for row in exact.indices.tolist() if flags[row]]
    expected = sorted(set(exact.indices.tolist()) - set(drawn[-7:]))
    assert indices.tolist() == expected and int(wanted) == n and int(cu_seqlens[-2]) == n - 7
    assert (inverse >= 0).nonzero()[:, 0].tolist() == expected


@pytest.mark.parametrize("mode", EXACT)
def test_keep_none_all_and_ratio_one(random, mode):
    layout = VarlenLayout([6, 0, 5])
    flags = torch.tensor([0, 1, 1, 0, 1, 1, 0, 0, 0, 0, 0]).bool()
    scores = torch.randn(11, generator=random) if mode == "topk" else None
    none = select_tokens(layout, flags, keep=0, mode=mode, scores=scores)
    assert none.indices.tolist() == (~flags).nonzero()[:, 0].tolist()
    for everything in (1.0, 4, [4, 0, 0]):
        whole = select_tokens(layout, flags, keep=everything, mode=mode, scores=scores)
        assert whole.indices.tolist() == whole.inverse.tolist() == list(range(11)) and whole.layout == layout


def test_text_only_and_several_spans(random):
    """Two visual spans of one sequence share its budget; a text-only sequence beside it keeps every row."""
    flags = torch.tensor([0, 1, 1, 1, 0, 0, 1, 1, 1, 0, 0, 0, 0]).bool()
    layout = VarlenLayout([10, 3])
    scores = torch.arange(13).float()
    kept = select_tokens(layout, flags, keep=0.5, mode="topk", scores=scores)
    assert kept.indices.tolist() == [0, 4, 5, 6, 7, 8, 9, 10, 11, 12] and kept.layout.lengths == (7, 3)
    spread = select_tokens(layout, flags, keep=3, mode="linspace")
    assert spread.indices.tolist() == [0, 1, 3, 4, 5, 8, 9, 10, 11, 12]


def test_ties_go_to_the_lowest_row_and_nan_ranks_last():
    layout, flags = VarlenLayout([8]), torch.ones(8, dtype=torch.bool)

    def topk(scores, k):
        return select_tokens(layout, flags, keep=k, mode="topk", scores=torch.tensor(scores)).indices.tolist()

    nan, inf = torch.nan, torch.inf
    assert topk([1.0] * 8, 3) == [0, 1, 2]
    assert topk([0.0, -0.0, 0.0, -0.0, 1.0, 0.0, 0.0, 0.0], 3) == [0, 1, 4]
    assert topk([nan, -inf, nan, 2.0, -inf, nan, -inf, inf], 5) == [1, 3, 4, 6, 7]
    assert topk([nan] * 8, 2) == [0, 1]


def test_budget_counts():
    layout = VarlenLayout([100, 0, 7])
    assert drop_budget(layout, [80, 0, 7], keep=0.25).keep.tolist() == [20, 0, 1]
    assert drop_budget(layout, [80, 0, 7], keep=5).keep.tolist() == [5, 0, 5]
    budget = drop_budget(layout, [80, 0, 7], keep=[80, 0, 3], positions="renumber", layer=4)
    assert budget.num_kept == 103 and budget.max_seqlen == 100 and budget.layout_out.lengths == (100, 0, 3)
    assert budget.num_droppable == (80, 0, 7) and budget.positions == "renumber" and budget.layer == 4
    assert drop_budget(VarlenLayout([]), [], keep=0.5).num_kept == 0


LAYOUT, FLAGS = VarlenLayout([4, 2]), torch.tensor([False, True, True, True, False, True])
SCORES = torch.zeros(6)
BAD_BUDGETS = {
    "ratio zero": (lambda: drop_budget(LAYOUT, [3, 1], keep=0.0), ValueError, r"keep must be a ratio in \(0, 1\].*0.0"),
    "ratio above one": (lambda: drop_budget(LAYOUT, [3, 1], keep=1.5), ValueError, r"\(0, 1\].*1.5"),
    "ratio nan": (lambda: drop_budget(LAYOUT, [3, 1], keep=math.nan), ValueError, "nan"),
    "keep too many": (
        lambda: drop_budget(LAYOUT, [3, 1], keep=2),
        ValueError,
        r"keep\[1\].*at most the 1 droppable.*2",
    ),
    "keep negative": (lambda: drop_budget(LAYOUT, [3, 1], keep=-1), ValueError, r"keep\[0\] must be >= 0, got -1"),
    "keep float list": (lambda: drop_budget(LAYOUT, [3, 1], keep=[0.5, 0.5]), TypeError, r"keep\[0\] must be an int"),
    "keep tensor": (lambda: drop_budget(LAYOUT, [3, 1], keep=torch.ones(2)), TypeError, "keep must be.*got Tensor"),
    "keep length": (lambda: drop_budget(LAYOUT, [3, 1], keep=[1]), ValueError, r"one entry per sequence \(2\), got 1"),
    "droppable length": (lambda: drop_budget(LAYOUT, [3], keep=1), ValueError, "num_droppable must have one.*got 1"),
    "droppable too many": (lambda: drop_budget(LAYOUT, [5, 1], keep=1), ValueError, r"num_droppable\[0\].*4 rows.*5"),
    "left empty": (lambda: drop_budget(LAYOUT, [4, 1], keep=[0, 1]), ValueError, "leave every sequence a row.*0"),
    "left empty by ratio": (lambda: drop_budget(LAYOUT, [3, 2], keep=0.4), ValueError, "the 2 of sequence 1"),
    "layout": (lambda: drop_budget([4, 2], [3, 1], keep=1), TypeError, "layout must be a VarlenLayout, got list"),
    "positions": (lambda: drop_budget(LAYOUT, [3, 1], keep=1, positions="x"), ValueError, "keep, renumber, got 'x'"),
    "layer": (lambda: drop_budget(LAYOUT, [3, 1], keep=1, layer=-1), ValueError, "layer must be >= 0, got -1"),
}


def select(**options):
    return select_tokens(LAYOUT, FLAGS, **{"keep": 1, "mode": "random", **options})


BUDGET = drop_budget(LAYOUT, [3, 1], keep=1, layer=4)
BAD_CALLS = {
    "mode": (
        lambda: select(mode="best"),
        ValueError,
        "mode must be one of topk, linspace, random, bernoulli, got 'best'",
    ),
    "no scores": (lambda: select(mode="topk"), ValueError, 'scores must be given for mode "topk"'),
    "scores unused": (lambda: select(scores=SCORES), ValueError, "for no other, got 'random'"),
    "scores short": (lambda: select(mode="topk", scores=SCORES[1:]), ValueError, r"scores.*\(6\), got shape \[5\]"),
    "scores dtype": (lambda: select(mode="topk", scores=SCORES.double()), TypeError, "scores must be one of float32"),
    "droppable dtype": (lambda: select_tokens(LAYOUT, SCORES, keep=1, mode="random"), TypeError, "one of bool"),
    "droppable short": (lambda: select_tokens(LAYOUT, FLAGS[1:], keep=1, mode="random"), ValueError, r"\(6\).*\[5\]"),
    "no keep": (lambda: select(keep=None), ValueError, "a budget or keep must be given, got neither"),
    "both": (lambda: select(budget=BUDGET), ValueError, "budget already fixes what is kept, got keep=1"),
    "other budget": (
        lambda: select(keep=None, budget=drop_budget(VarlenLayout([6]), [3], keep=1)),
        ValueError,
        "budget must be made for",
    ),
    "other flags": (
        lambda: select_tokens(LAYOUT, ~FLAGS, BUDGET, mode="random"),
        ValueError,
        "droppable must mark the budget's 3 tokens of sequence 0, got 1",
    ),
    "budget type": (lambda: select(keep=None, budget=3), TypeError, "budget must be a DropBudget, got int"),
    "budget layer": (lambda: select(keep=None, budget=BUDGET, layer=3), ValueError, "the budget's 4.*got 3"),
    "ratio": (lambda: select(keep=1.5), ValueError, r"\(0, 1\]"),
    "probability": (lambda: select(mode="bernoulli", keep=1.5), ValueError, r"probability in \(0, 1\].*1.5"),
    "probability int": (lambda: select(mode="bernoulli", keep=1), ValueError, "as a float.*got 1"),
    "bernoulli budget": (lambda: select(mode="bernoulli", budget=BUDGET), ValueError, "takes keep=<probability>"),
    "capacity": (lambda: select(capacity=5), ValueError, 'capacity is for mode "bernoulli", got capacity=5'),
    "left empty": (
        lambda: select_tokens(VarlenLayout([3]), FLAGS[1:4], keep=0, mode="linspace"),
        ValueError,
        "leave every sequence a row, got 0",
    ),
    "ids twice": (
        lambda: select(sequence_ids=torch.tensor([7, 7])),
        ValueError,
        "sequence_ids must be distinct, got 7 more than once",
    ),
    "ids short": (lambda: select(sequence_ids=torch.tensor([7])), ValueError, r"one id per sequence \(2\).*\[1\]"),
    "ids dtype": (lambda: select(sequence_ids=torch.tensor([7, 8]).int()), TypeError, "sequence_ids.*int64, got int32"),
    "positions short": (lambda: select(positions=torch.arange(5)), ValueError, r"positions.*\(6\), got shape \[5\]"),
    "positions dtype": (lambda: select(positions=SCORES), TypeError, "positions must be one of int32, int64"),
    "seed dtype": (lambda: select(seed=torch.tensor(1.0)), TypeError, "seed must be one of int64, got float32"),
    "seed shape": (lambda: select(seed=torch.tensor([1])), ValueError, "seed must have 0 dimensions"),
    "seed range": (lambda: select(seed=2**64), ValueError, r"seed must be below 2\^64"),
    "layer": (lambda: select(layer=-1), ValueError, "layer must be >= 0, got -1"),
    "layer range": (lambda: select(layer=2**32), ValueError, r"layer must be below 2\^32, got 4294967296"),
    "devices": (
        lambda: select(mode="topk", scores=SCORES.to("meta")),
        ValueError,
        "scores must be on cpu as the other arguments are, got meta",
    ),
    "seed device": (lambda: select(seed=torch.tensor(1, device="meta")), ValueError, "seed must be on cpu.*meta"),
}


@pytest.mark.parametrize("case", BAD_BUDGETS)
def test_bad_budget(case):
    call, error, message = BAD_BUDGETS[case]
    with pytest.raises(error, match=message):
        call()


@pytest.mark.parametrize("case", BAD_CALLS)
def test_bad_call(case):
    call, error, message = BAD_CALLS[case]
    with record() as ran, pytest.raises(error, match=message):
        call()
    assert not ran


def test_a_budget_for_other_lengths_of_the_same_sum_is_refused():
    budget = drop_budget(VarlenLayout([3, 5]), [2, 2], keep=[1, 1])
    droppable = torch.tensor([1, 0, 0, 1, 1, 1, 0, 0]).bool()
    with pytest.raises(ValueError, match="budget must be made for"):
        select_tokens(VarlenLayout([4, 4]), droppable, budget, mode="linspace")
    with pytest.raises(ValueError, match="layer must be below 2\\^32"):
        drop_budget(VarlenLayout([3]), [2], keep=1, layer=2**32)
    with pytest.raises(ValueError, match="capacity must be below 2\\^31"):
        select_tokens(VarlenLayout([8]), droppable, keep=0.5, mode="bernoulli", capacity=2**31)
