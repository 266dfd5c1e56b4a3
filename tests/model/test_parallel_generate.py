# SPDX-License-Identifier: Apache-2.0
"""Generation over real gloo processes against one process in fp64: words, hidden states and the keys of each rank."""

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.attention import varlen_attention
from lrc_kernels.packing import pack_samples
from lrc_kernels.sequence_parallel import make_mesh, sequence_parallel_decode_attention
from lrc_kernels.sequence_parallel.mesh import ranks_of
from lrc_model.parallel import SequenceParallel
from tests.model.samples import make_sample
from tests.model.test_parallel import make_model

NEW = 5


def prompts():
    """A video, words alone, as few rows as ranks, and a short video."""
    sizes = ((24, 17), (0, 9), (0, 4), (8, 14))
    samples = [make_sample(frames, 40 + i, words, labelled=False) for i, (frames, words) in enumerate(sizes)]
    return pack_samples(samples, clip_frames=4)


def generated(schedule, **options):
    """Words, the hidden states that chose them, and per layer and sequence the rows whose keys are held here."""
    model, hidden, readers = make_model(schedule), [], []
    choose = model._choose

    def watch(x, reader):
        hidden.append(x)
        readers.append(reader)
        return choose(x, reader)

    model._choose = watch
    words = model.generate(prompts(), max_new_tokens=NEW, seed=5, **options)
    cache = readers[0].cache
    held = [[cache.length(layer, s) for s in range(cache.num_sequences)] for layer in range(cache.num_layers)]
    return [x.tolist() for x in words], torch.stack(hidden), torch.tensor(held), cache.num_bytes


def many_processes(schedule, ring, ulysses):
    mesh = make_mesh("cpu", dp=4 // (ring * ulysses), ring=ring, ulysses=ulysses)
    words, hidden, held, size = generated(schedule)
    parallel = SequenceParallel(make_model("none").config.text, mesh)
    found, found_hidden, found_held, found_size = generated(schedule, parallel=parallel)
    error = (found_hidden - hidden).abs().max() / hidden.abs().max()
    return words, found, float(error), held, found_held, found_hidden.flatten().tolist(), found_size / size


@pytest.mark.parametrize(
    ("schedule", "ring", "ulysses"),
    [("attention", 2, 2), ("bernoulli then attention", 4, 1), ("none", 1, 4), ("linspace", 2, 1)],
)
def test_words_and_hidden_states_of_one_process(rank_pools, schedule, ring, ulysses):
    results = rank_pools(4).run(many_processes, schedule, ring, ulysses)
    for wanted, words, error, _, _, hidden, share in results:
        assert words == wanted and all(len(sequence) == NEW for sequence in words)
        assert error <= 1e-12 and hidden == results[0][5]
        # Its part of the keys, save that borders of ranks are no borders of prompts and short prompts have room.
        assert share <= 1.5 / (ring * ulysses) + 0.05
    size = ring * ulysses
    assert torch.equal(sum(held for *_, held, _, _ in results[:size]), results[0][3])


def decode_in_16_bits():
    """Errors of ranks and of one process against fp64, in bf16, the bytes sent, and refusals."""
    mesh, random = make_mesh("cpu", ring=2, ulysses=2), torch.Generator().manual_seed(0)
    rank, lengths = torch.distributed.get_rank(), (300, 1, 64)
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
    spoiled = [x.clone() for x in mine[0]]
    if rank == 1:
        spoiled[0][5, 1] = torch.nan
    nan = sequence_parallel_decode_attention(q, spoiled, mine[1], mesh).isnan().all(2).tolist()
    none = sequence_parallel_decode_attention(q[:0], [], [], mesh)
    messages = []
    for arguments in ((q[0], *mine), (q, mine[0][1:], mine[1]), (q, mine[0], [x.double() for x in mine[1]]),
                      (q, mine[0], [x[1:] for x in mine[1]])):  # fmt: skip
        with pytest.raises((TypeError, ValueError)) as caught:
            sequence_parallel_decode_attention(*arguments, mesh)
        messages.append(str(caught.value))
    with pytest.raises(TypeError, match="mesh must be a DeviceMesh, got NoneType"):
        sequence_parallel_decode_attention(q, *mine, None)
    parallel = SequenceParallel(make_model("none").config.text, mesh)
    with pytest.raises(ValueError, match="use_cache must be True with parallel, got False"):
        make_model("none").generate(prompts(), max_new_tokens=1, use_cache=False, parallel=parallel)
    return errors, sent, nan, list(none.shape), messages


def test_partial_results_are_not_rounded_and_bad_ones_are_named(rank_pools):
    wanted = ("q must have 3 dimensions", "keys must hold one tensor for each of 3 sequences, got 2",
              "values[0] must be one of bfloat16, got float64", "values[0] must have the shape of keys[0]")  # fmt: skip
    for (error, one), sent, nan, none, messages in rank_pools(4).run(decode_in_16_bits):
        assert error <= 1.5 * one + 5e-4 and none == [0, 4, 16]
        # To one rank 3 sequences of 4 heads, then what both have to another one.
        assert sent == 3 * 3 * 4 * (16 + 1) * 4
        # Where one key of one rank is NaN, the heads that see it are, and no others.
        assert nan == [[False, False, True, True], [False] * 4, [False] * 4]
        assert all(part in message for part, message in zip(wanted, messages, strict=True)), messages


def disagree():
    """Ranks whose arithmetic differs choose the words of the first."""
    mesh, rank = make_mesh("cpu", ring=2, ulysses=2), torch.distributed.get_rank()
    model = make_model("none")
    logits = model.language_model.logits
    model.language_model.logits = lambda x: logits(x).roll(rank, 1)
    parallel = SequenceParallel(model.config.text, mesh)
    return [x.tolist() for x in model.generate(prompts(), max_new_tokens=2, parallel=parallel)]


def test_ranks_go_on_with_the_same_words(rank_pools):
    results = rank_pools(4).run(disagree)
    assert all(words == results[0] for words in results)
