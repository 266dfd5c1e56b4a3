# SPDX-License-Identifier: Apache-2.0
"""Generation over real gloo processes against one process in fp64: words, hidden states and the keys of each rank."""

import pytest
import torch

from lrc_kernels.packing import pack_samples
from lrc_kernels.sequence_parallel import make_mesh
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


def refusals():
    mesh = make_mesh("cpu", ring=2, ulysses=2)
    parallel = SequenceParallel(make_model("none").config.text, mesh)
    for batch, options, message in (
        (prompts(), {"use_cache": False, "parallel": parallel}, "use_cache must be True with parallel, got False"),
        (prompts(), {"parallel": mesh}, "parallel must be a SequenceParallel, got DeviceMesh"),
        (3, {"parallel": parallel}, "batch must be a PackedBatch, got int"),
    ):
        with pytest.raises((TypeError, ValueError), match=message):
            make_model("none").generate(batch, max_new_tokens=1, **options)


def test_what_cannot_be_generated_from_is_named(rank_pools):
    rank_pools(4).run(refusals)


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
