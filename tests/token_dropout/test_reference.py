# SPDX-License-Identifier: Apache-2.0
"""The specification of selecting and moving rows against loops in Python that restate each rule by itself."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_kernels import VarlenLayout
from lrc_kernels.testing import segment_lengths
from lrc_kernels.token_dropout import drop_budget, reference

KNOWN_ANSWERS = [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([2**32 - 1] * 4, [2**32 - 1] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    (
        [0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344],
        [0xA4093822, 0x299F31D0],
        [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1],
    ),
]


def philox_of_ints(counter, key):
    """Philox-4x32-10 in Python's unbounded integers."""
    (a, b, c, d), (k0, k1) = counter, key
    for _ in range(10):
        first, second = a * 0xD2511F53, c * 0xCD9E8D57
        a, b, c, d = (second >> 32) ^ b ^ k0, second % 2**32, (first >> 32) ^ d ^ k1, first % 2**32
        k0, k1 = (k0 + 0x9E3779B9) % 2**32, (k1 + 0xBB67AE85) % 2**32
    return [a, b, c, d]


@pytest.mark.parametrize(("counter", "key", "wanted"), KNOWN_ANSWERS, ids=["zeros", "ones", "pi"])
def test_philox_known_answers(counter, key, wanted):
    words = reference.philox(tuple(map(torch.tensor, counter)), tuple(map(torch.tensor, key)))
    assert [int(word) for word in words] == wanted == philox_of_ints(counter, key)


@settings(max_examples=30, deadline=None)
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox_equals_integers(words):
    got = reference.philox(tuple(map(torch.tensor, words[:4])), tuple(map(torch.tensor, words[4:])))
    assert [int(word) for word in got] == philox_of_ints(words[:4], words[4:])


def test_counter_and_key_are_laid_out_as_documented():
    seed, layer, identity = 0x1234567890ABCDEF, 18, 0x0FEDCBA987654321
    cu = torch.tensor([0, 3], dtype=torch.int32)
    options = (torch.tensor(seed), layer, torch.tensor([identity]), torch.tensor([0, 5, 2**32 + 1]))
    words = reference.random_words(cu, 3, *options)
    for word, position in zip(words.tolist(), (0, 5, 1), strict=True):
        counter = [position, layer, identity % 2**32, identity >> 32]
        assert word == philox_of_ints(counter, [seed % 2**32, seed >> 32])[0]


def kept_by_loop(mode, flags, scores, words, k):
    """Rows of one sequence that stay."""
    rows = [i for i, flag in enumerate(flags) if flag]
    n = len(rows)
    if mode == "topk":
        by_score = lambda i: (math.isnan(scores[i]), -scores[i] if not math.isnan(scores[i]) else 0, i)  # noqa: E731
        chosen = sorted(rows, key=by_score)[:k]
    elif mode == "random":
        chosen = sorted(rows, key=lambda i: (words[i], i))[:k]
    else:
        chosen = [rows[i * (n - 1) // (k - 1) if k > 1 else 0] for i in range(k)]
    return sorted({i for i, flag in enumerate(flags) if not flag} | set(chosen))


@settings(max_examples=60, deadline=None)
@given(
    segment_lengths(max_length=20),
    st.sampled_from(["topk", "linspace", "random"]),
    st.sampled_from(["gaussian", "ties", "equal", "broken"]),
    st.integers(0, 2**62),
)
def test_select_equals_a_loop(lengths, mode, kind, seed):
    random = torch.Generator().manual_seed(seed % 2**31)
    layout = VarlenLayout(lengths)
    total = layout.num_tokens
    flags = torch.rand(total, generator=random) < 0.7
    scores = torch.randn(total, generator=random)
    if kind == "ties":
        scores = torch.randint(-1, 2, (total,), generator=random).float() * -1.0
    elif kind == "equal":
        scores = torch.full((total,), -2.0)
    elif kind == "broken":
        scores[::3], scores[1::4], scores[2::5] = torch.nan, -torch.inf, torch.inf
    pieces = flags.split(lengths)
    counts = [int(piece.sum()) for piece in pieces]
    lowest = [int(n == length > 0) for n, length in zip(counts, lengths, strict=True)]
    keep = [int(torch.randint(low, n + 1, (), generator=random)) for low, n in zip(lowest, counts, strict=True)]
    budget = drop_budget(layout, counts, keep=keep)
    options = (torch.tensor(seed), 3, None, None)
    cu = layout.cu_seqlens
    indices, inverse = reference.select(
        flags, cu, budget.layout_out.cu_seqlens, budget.keep, scores, *options, budget.num_kept, layout.max_seqlen, mode
    )
    words = reference.random_words(cu, total, *options).split(lengths)
    wanted, start = [], 0
    for piece, score, word, k, length in zip(pieces, scores.split(lengths), words, keep, lengths, strict=True):
        wanted += [start + i for i in kept_by_loop(mode, piece.tolist(), score.tolist(), word.tolist(), k)]
        start += length
    assert indices.tolist() == wanted
    assert inverse.tolist() == [wanted.index(row) if row in wanted else -1 for row in range(total)]


def linspace_ranks(n, k):
    flags = torch.ones(n + 1, dtype=torch.bool)
    flags[-1] = False
    budget = drop_budget(VarlenLayout([n + 1]), [n], keep=k)
    options = (None, torch.tensor(0), 0, None, None, k + 1, n + 1, "linspace")
    cu = (budget.layout_in.cu_seqlens, budget.layout_out.cu_seqlens)
    return reference.select(flags, *cu, budget.keep, *options)[0][:-1].tolist()


def test_linspace_is_truncated_torch_linspace_in_exact_integers():
    different = []
    for n in range(1, 60):
        for k in range(1, n + 1):
            ranks = linspace_ranks(n, k)
            assert ranks == [i * (n - 1) // max(1, k - 1) for i in range(k)]
            if ranks != torch.linspace(0, n - 1, k, dtype=torch.long).tolist():
                different.append((n, k))
    # The first pair for which torch rounds a value just below an integer down.
    assert different[0] == (43, 39) and len(different) < 0.03 * 59 * 60 / 2
    assert linspace_ranks(7, 0) == []


def test_linspace_of_a_long_video_needs_64_bits():
    n, k = 160_000, 120_000
    assert linspace_ranks(n, k) == [i * (n - 1) // (k - 1) for i in range(k)]


def test_sort_key_orders_floats():
    values = [torch.nan, -torch.inf, -3.4e38, -1.0, -1e-45, -0.0, 0.0, 1e-45, 1.0, 3.4e38, torch.inf]
    keys = reference.sort_key(torch.tensor(values)).tolist()
    assert keys[5] == keys[6] and keys == sorted(keys) and len(set(keys)) == len(keys) - 1
    assert keys[0] == 0 and keys[-1] < 2**32
