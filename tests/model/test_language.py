# SPDX-License-Identifier: Apache-2.0
"""The language model against transformers' Llama, packs against single sequences, and caches against recomputation."""

import dataclasses
import warnings

import pytest
import torch

from lrc_kernels import VarlenLayout
from lrc_kernels.backend import record
from lrc_kernels.token_dropout import DropoutSchedule
from lrc_model.cache import KVCache
from lrc_model.config import TextConfig
from lrc_model.generate import decode_step, prefill
from lrc_model.language import Drop, LanguageModel, PackedRows

# The trained range is short here on purpose; one test asks for the warning.
pytestmark = pytest.mark.filterwarnings("ignore:a sequence is longer than")

TEXT = TextConfig(
    hidden_size=32,
    intermediate_size=48,
    num_layers=4,
    num_heads=4,
    num_kv_heads=2,
    vocab_size=61,
    max_position=24,
    rope_factor=2.0,
)
SCHEDULES = {
    "none": DropoutSchedule.none(),
    "first layer": DropoutSchedule((0,), (0.5,), ("linspace",)),
    "uniform": DropoutSchedule((1, 3), (0.6, 0.3), ("random", "linspace")),
    "attention": DropoutSchedule((1, 2), (0.5, 0.25), ("random", "attention")),
    "renumber": DropoutSchedule((1, 3), (0.5, 0.25), ("attention", "attention"), "renumber"),
}


def make_model(text=TEXT, dtype=torch.float32):
    torch.manual_seed(0)
    model = LanguageModel(text)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=1.0 if "norm" in name else 0.0, std=0.2)
    return model.to(dtype)


def make_rows(lengths, seed=0):
    """Rows of which a stretch in the middle of each sequence is visual."""
    random = torch.Generator().manual_seed(seed)
    layout = VarlenLayout(lengths)
    droppable = torch.zeros(layout.num_tokens, dtype=torch.bool)
    for start, n in zip(layout.cu_seqlens.tolist(), lengths, strict=False):
        droppable[start + 2 : start + n - 2] = n > 6
    targets = torch.full((layout.num_tokens,), -100)
    targets[(layout.cu_seqlens[1:] - 2).long()] = 1
    ids = torch.arange(len(lengths)) * 1000 + 7
    rows = PackedRows.of(layout, droppable=droppable, targets=targets, sequence_ids=ids)
    return torch.randint(0, TEXT.vocab_size, (layout.num_tokens,), generator=random), rows


def plan(schedule, rows, seed=3):
    counts = [int(part.sum()) for part in rows.droppable.split(rows.layout.lengths)]
    budgets = schedule.plan(rows.layout, counts)
    return tuple(Drop(budget, mode, seed) for budget, mode in zip(budgets, schedule.modes, strict=True))


def sequence_rows(rows, index):
    start, end = rows.layout.cu_seqlens[index : index + 2].tolist()
    part = {name: getattr(rows, name)[start:end] for name in ("droppable", "targets")}
    return slice(start, end), PackedRows.of(
        VarlenLayout([end - start]), **part, sequence_ids=rows.sequence_ids[index : index + 1]
    )


@pytest.mark.parametrize("length", [20, 57])
def test_logits_of_transformers_llama(length):
    """57 rows lie past the trained 24, where the rotary base grows."""
    transformers = pytest.importorskip("transformers", reason="transformers is the specification (pip install [model])")
    config = transformers.LlamaConfig(
        hidden_size=TEXT.hidden_size,
        intermediate_size=TEXT.intermediate_size,
        num_hidden_layers=TEXT.num_layers,
        num_attention_heads=TEXT.num_heads,
        num_key_value_heads=TEXT.num_kv_heads,
        vocab_size=TEXT.vocab_size,
        max_position_embeddings=TEXT.max_position,
        rms_norm_eps=TEXT.rms_norm_eps,
        rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": TEXT.rope_theta},
        attn_implementation="eager",
        tie_word_embeddings=False,
    )
    ours = make_model()
    theirs = transformers.LlamaForCausalLM(config).eval()
    theirs.load_state_dict(ours.state_dict(), strict=True)
    ids, rows = make_rows([length])
    with torch.no_grad(), record() as ran:
        hidden, _ = ours(ours.embed(ids), rows)
        logits = ours.logits(hidden)
        wanted = theirs(ids[None]).logits[0]
    assert {name for name, _ in ran} == {"attention_fwd"}
    assert (logits - wanted).abs().max() <= 2e-5 * wanted.abs().max()


@pytest.mark.parametrize("name", SCHEDULES)
def test_packed_equals_separate(name):
    model = make_model(dtype=torch.float64)
    ids, rows = make_rows([13, 1, 22, 30])
    packed, left = model(model.embed(ids), rows, plan(SCHEDULES[name], rows))
    parts = packed.split(left.layout.lengths)
    for index, part in enumerate(parts):
        where, alone = sequence_rows(rows, index)
        wanted, _ = model(model.embed(ids[where]), alone, plan(SCHEDULES[name], alone))
        torch.testing.assert_close(part, wanted, rtol=0, atol=1e-12)
    assert (left.layout.num_tokens < rows.layout.num_tokens) == (name != "none")


@pytest.mark.parametrize("name", SCHEDULES)
def test_gradients_with_recomputation(name):
    model = make_model(dtype=torch.float64)
    ids, rows = make_rows([13, 22])
    gradients = []
    for recompute in (False, True):
        model.zero_grad()
        hidden, _ = model(model.embed(ids), rows, plan(SCHEDULES[name], rows), recompute=recompute)
        hidden.square().sum().backward()
        gradients.append([p.grad.clone() for n, p in model.named_parameters() if n != "lm_head.weight"])
    for once, again in zip(*gradients, strict=True):
        assert torch.equal(once, again) and once.isfinite().all()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("chunk", [5, 64])
def test_chunked_prefill_equals_one_shot(name, chunk):
    model = make_model()
    ids, rows = make_rows([40])
    rows = dataclasses.replace(rows, targets=None)
    drops = plan(SCHEDULES[name], rows)
    with torch.no_grad():
        wanted, left = model(model.embed(ids), rows, drops)
    cache = KVCache(TEXT.num_layers)
    x = model.embed(ids).detach().clone()
    last = prefill(model, x, rows, drops, cache, sequence=cache.add_sequence(), chunk=chunk)
    assert (last - wanted[-1:]).abs().max() <= 1e-5
    assert cache.length(TEXT.num_layers - 1, 0) == left.layout.num_tokens


@pytest.mark.parametrize("name", SCHEDULES)
def test_cached_decode_equals_recomputation(name):
    """Every new word computed again from all words, with the same selection, which the last row of the prompt makes."""
    model, schedule = make_model(), SCHEDULES[name]
    prompts = [torch.randint(0, 61, (n,)) for n in (17, 29)]
    cache = KVCache(TEXT.num_layers)
    lengths = torch.tensor([17, 29])
    cached = []
    for prompt in prompts:
        _, rows = make_rows([len(prompt)])
        rows = dataclasses.replace(rows, targets=None)
        x = model.embed(prompt).detach().clone()
        cached.append(prefill(model, x, rows, plan(schedule, rows), cache, sequence=cache.add_sequence(), chunk=7))
    hidden = torch.cat(cached)
    first_renumbered = schedule.layers[0] if schedule.positions == "renumber" and schedule.layers else None
    for step in range(4):
        words = model.logits(hidden).argmax(1)
        for index in range(2):
            prompts[index] = torch.cat([prompts[index], words[index : index + 1]])
        hidden = decode_step(
            model,
            model.embed(words),
            cache,
            position=lengths + step,
            prefill_length=lengths,
            renumbered_from=first_renumbered,
        )
        for index, words_so_far in enumerate(prompts):
            n, total = int(lengths[index]), len(words_so_far)
            _, prompt_rows = make_rows([n])
            rows = PackedRows.of(
                VarlenLayout([total]),
                droppable=torch.cat([prompt_rows.droppable, torch.zeros(total - n, dtype=torch.bool)]),
                targets=torch.where(torch.arange(total) < n - 1, -100, 0),
                sequence_ids=prompt_rows.sequence_ids,
            )
            rows = dataclasses.replace(rows, prefill_length=torch.tensor([n]))
            with torch.no_grad():
                wanted, _ = model(model.embed(words_so_far), rows, plan(schedule, rows))
            assert (hidden[index] - wanted[-1]).abs().max() <= 1e-5


def test_a_long_prompt_leaves_nothing_behind():
    model = make_model()
    ids, rows = make_rows([12])
    before, _ = model(model.embed(ids), rows)
    long_ids, long_rows = make_rows([60])
    model(model.embed(long_ids), long_rows)
    assert torch.equal(model(model.embed(ids), rows)[0], before)


def test_past_the_trained_positions_it_warns():
    model = make_model()
    ids, rows = make_rows([25])
    with pytest.warns(UserWarning, match="longer than the 24 trained positions .dynamic NTK, factor 2.0, is on."):
        model(model.embed(ids), rows)
    ids, rows = make_rows([24])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        model(model.embed(ids), rows)
