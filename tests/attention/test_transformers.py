# SPDX-License-Identifier: Apache-2.0
"""`attn_implementation="lrc"` gives what transformers' eager attention gives, on every kind of batch, or raises."""

import copy
import subprocess
import sys

import pytest
import torch

from lrc_kernels.backend import record

transformers = pytest.importorskip(
    "transformers", reason="transformers is not installed (pip install lrc-kernels[model])"
)

from lrc_kernels.integrations.transformers import register_attention  # noqa: E402

TOLERANCE = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture(scope="module", autouse=True)
def _registered():
    register_attention("lrc")


def tiny(cls, **changes):
    config = cls.config_class(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 128,
            "pad_token_id": 0,
            "eos_token_id": None,
            "bos_token_id": 1,
            **changes,
        }
    )
    torch.manual_seed(0)
    return cls(config).eval()


@pytest.fixture
def models():
    """(eager, lrc): the same weights under both attentions."""

    def both(cls=transformers.LlamaForCausalLM, **changes):
        ours = tiny(cls, **changes)
        theirs = copy.deepcopy(ours)
        theirs.set_attn_implementation("eager")
        ours.set_attn_implementation("lrc")
        return theirs, ours

    return both


def tokens(random, *shape):
    return torch.randint(2, 64, shape, generator=random)


def assert_same_logits(models, inputs, real=None):
    theirs, ours = models
    wanted = theirs(**inputs).logits
    with record() as ran:
        logits = ours(**inputs).logits
    assert ran == [("attention_fwd", "cpu")] * 2
    real = torch.ones(logits.shape[:2], dtype=torch.bool) if real is None else real
    torch.testing.assert_close(logits[real], wanted[real], **TOLERANCE)
    assert logits.isfinite().all()


@pytest.mark.parametrize("num_kv_heads", [4, 2, 1])
def test_dense(models, random, num_kv_heads):
    assert_same_logits(models(num_key_value_heads=num_kv_heads), {"input_ids": tokens(random, 3, 17)})


@pytest.mark.parametrize("side", ["left", "right"])
def test_padded(models, random, side):
    mask = torch.arange(11) < torch.tensor([[11], [4], [7]])
    mask = mask.flip(1) if side == "left" else mask
    inputs = {"input_ids": tokens(random, 3, 11), "attention_mask": mask.long()}
    assert_same_logits(models(), inputs, real=mask)
    assert_same_logits(models(), {**inputs, "attention_mask": torch.ones(3, 11).long()})


def test_packed_by_positions(models, random):
    """The positions of each document start at 0; the same documents one by one give the same logits."""
    lengths = [5, 1, 9, 2]
    inputs = {
        "input_ids": tokens(random, 1, 17),
        "position_ids": torch.cat([torch.arange(n) for n in lengths])[None],
        "use_cache": False,
    }
    both = models()
    assert_same_logits(both, inputs)
    alone = [both[1](part).logits for part in inputs["input_ids"].split(lengths, 1)]
    torch.testing.assert_close(both[1](**inputs).logits, torch.cat(alone, 1), **TOLERANCE)
    two_rows = {
        name: value.repeat(2, 1) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()
    }
    assert_same_logits(both, two_rows)


def test_packed_by_lengths(models, random):
    theirs, ours = models()
    offsets = torch.tensor([0, 5, 6, 15, 17], dtype=torch.int32)
    positions = torch.cat([torch.arange(n) for n in offsets.diff().tolist()])[None]
    inputs = {"input_ids": tokens(random, 1, 17), "position_ids": positions, "use_cache": False}
    lengths = {"cu_seq_lens_q": offsets, "cu_seq_lens_k": offsets, "max_length_q": 9, "max_length_k": 9}
    torch.testing.assert_close(ours(**inputs, **lengths).logits, theirs(**inputs).logits, **TOLERANCE)


@pytest.mark.parametrize("packed", [False, True])
def test_sliding_window(models, random, packed):
    both = models(transformers.MistralForCausalLM, sliding_window=4)
    inputs = {"input_ids": tokens(random, 1 if packed else 2, 17), "use_cache": False}
    if packed:
        inputs["position_ids"] = torch.cat([torch.arange(9), torch.arange(8)])[None]
    assert_same_logits(both, inputs)
    wide = models(transformers.MistralForCausalLM, sliding_window=None)[1]
    assert (wide(**inputs).logits - both[1](**inputs).logits).abs().max() > 1e-3


@pytest.mark.parametrize("sliding_window", [None, 5])
@pytest.mark.parametrize("padded", [False, True])
def test_generate(models, random, padded, sliding_window):
    theirs, ours = models(transformers.MistralForCausalLM, sliding_window=sliding_window)
    mask = torch.arange(8).flip(0) < torch.tensor([[8], [5 if padded else 8]])
    options = {"attention_mask": mask.long(), "max_new_tokens": 7, "do_sample": False, "return_dict_in_generate": True}
    ids = tokens(random, 2, 8) * mask
    results = [model.generate(ids, **options, output_logits=True) for model in (theirs, ours)]
    assert torch.equal(results[0].sequences, results[1].sequences) and results[0].sequences.shape == (2, 15)
    for wanted, got in zip(results[0].logits, results[1].logits, strict=True):
        torch.testing.assert_close(got, wanted, **TOLERANCE)


def test_a_second_chunk_sees_the_cache(models, random):
    """Five queries after seven cached keys: the diagonal ends at the last key."""
    ids = tokens(random, 2, 12)
    _, ours = models()
    first = ours(ids[:, :7], use_cache=True)
    second = ours(ids[:, 7:], past_key_values=first.past_key_values)
    torch.testing.assert_close(torch.cat([first.logits, second.logits], 1), ours(ids).logits, **TOLERANCE)


def test_gradients(models, random):
    mask = torch.arange(11).flip(0) < torch.tensor([[11], [4], [7]])
    ids = tokens(random, 3, 11)
    # The row before the first real token is padding, and predicts that token.
    labels = ids.masked_fill(~(mask & mask.roll(1, 1)), -100)
    for model in (both := models()):
        model.train()
        model(input_ids=ids, attention_mask=mask.long(), labels=labels, use_cache=False).loss.backward()
    for (name, wanted), (_, got) in zip(both[0].named_parameters(), both[1].named_parameters(), strict=True):
        torch.testing.assert_close(got.grad, wanted.grad, msg=lambda m, name=name: f"{name}: {m}", **TOLERANCE)


@pytest.mark.slow
@pytest.mark.no_poison
@pytest.mark.parametrize("kind", ["padded", "packed"])
def test_compiled_model(models, random, kind):
    """With graph breaks: the pattern of the mask and the starts of packed documents are read from Python."""
    torch._dynamo.reset()
    _, ours = models()
    inputs = {"input_ids": tokens(random, 1, 9), "use_cache": False}
    if kind == "padded":
        inputs["attention_mask"] = torch.tensor([[0] * 3 + [1] * 6])
    else:
        inputs["position_ids"] = torch.cat([torch.arange(5), torch.arange(4)])[None]
    with torch.no_grad():
        wanted = ours(**inputs).logits
        got = torch.compile(ours, backend="aot_eager")(**inputs).logits
    torch.testing.assert_close(got[:, 3:], wanted[:, 3:], **TOLERANCE)


def test_bidirectional_model(models, random):
    """config.is_causal = False turns a decoder into an encoder."""
    theirs, ours = models(is_causal=False)
    inputs = {"input_ids": tokens(random, 2, 9), "attention_mask": torch.ones(2, 9).long()}
    inputs["attention_mask"][1, 6:] = 0
    real = inputs["attention_mask"].bool()
    assert_same_logits((theirs, ours), inputs, real=real)
    causal = models()[1](**inputs).logits
    assert (ours(**inputs).logits - causal)[real].abs().max() > 1e-3


def test_what_it_cannot_do_raises(models, random):
    ours = models(attention_dropout=0.1)[1]
    ids = tokens(random, 2, 6)
    with pytest.raises(ValueError, match="dropout must be 0, got 0.1"):
        ours.train()(ids)
    ours.eval()
    for options, message in (
        ({"attention_mask": torch.zeros(2, 1, 6, 6)}, r"bool padding mask \[2, 6\] or None, got .*\[2, 1, 6, 6\]"),
        ({"softcap": 30.0}, "softcap must be None"),
        ({"s_aux": torch.ones(4)}, "s_aux must be None"),
        ({"cu_seq_lens_q": torch.tensor([0, 6, 12])}, "must come together"),
    ):
        with pytest.raises(ValueError, match=message):
            ours(ids, **options)
    with pytest.raises(ValueError, match="a static cache"):
        ours.generate(ids, attention_mask=torch.ones(2, 6).long(), max_new_tokens=3, cache_implementation="static")


def test_other_mask_patterns_raise(models, random):
    from transformers.masking_utils import create_causal_mask, create_chunked_causal_mask

    ours = models()[1]
    config, embeds = ours.config, torch.zeros(2, 6, 32)
    common = {"config": config, "inputs_embeds": embeds, "attention_mask": None, "past_key_values": None}
    assert create_causal_mask(**common) is None
    with pytest.raises(ValueError, match="blockwise_overlay"):
        create_causal_mask(**common, block_sequence_ids=torch.zeros(2, 6).long())
    with pytest.raises(ValueError, match="or_masks"):
        create_causal_mask(**common, or_mask_function=lambda b, h, q, k: k == 0)
    config.attention_chunk_size = 4
    with pytest.raises(ValueError, match="chunked_overlay"):
        create_chunked_causal_mask(**common)


def test_the_package_does_not_import_transformers():
    code = "import sys, lrc_kernels; assert 'transformers' not in sys.modules, 'imported'"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)
