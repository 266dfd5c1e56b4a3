# SPDX-License-Identifier: Apache-2.0
"""Tokenizers: what goes in comes out, special tokens only where asked for, and no half character in a stream."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lrc_model.tokenizer import (
    INTERNLM2_TOKENS,
    TASK_TOKENS,
    ByteTokenizer,
    InternLM2Tokenizer,
    Tokenizer,
    load_tokenizer,
)

TEXTS = [
    "a video of a dog",
    "Frame1: a cat",
    "user\nWhat happens?",
    "你好，世界",
    "naïve café",
    "  two  spaces\n\ttab ",
]
CHAT = {"<|im_end|>": 400, "<|im_start|>": 401}
IMAGE = {"<img>": 402, "</img>": 403, "<IMG_CONTEXT>": 404}


def write_model(folder: Path, *, dummy_prefix: bool = False) -> Path:
    sentencepiece = pytest.importorskip("sentencepiece", reason='pip install "lrc-kernels[model]"')
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXTS * 20),
        model_writer=model,
        vocab_size=330,
        model_type="bpe",
        byte_fallback=True,
        hard_vocab_limit=False,
        normalization_rule_name="identity",
        add_dummy_prefix=dummy_prefix,
        remove_extra_whitespaces=False,
        user_defined_symbols=["[UNUSED_TOKEN_145]"],
        minloglevel=2,
    )
    folder.mkdir(exist_ok=True)
    (folder / "tokenizer.model").write_bytes(model.getvalue())
    (folder / "added_tokens.json").write_text(json.dumps(CHAT | IMAGE))
    return folder


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_model(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="module", params=["bytes", "internlm2", "dummy_prefix"])
def tokenizer(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Tokenizer:
    if request.param == "bytes":
        return ByteTokenizer()
    dummy = request.param == "dummy_prefix"
    return InternLM2Tokenizer(write_model(tmp_path_factory.mktemp(request.param), dummy_prefix=dummy))


@settings(max_examples=60, deadline=None)
@given(text=st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0\u2581"), max_size=20))
def test_text_comes_back_whole_and_in_a_stream(tokenizer: Tokenizer, text: str) -> None:
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    stream, pieces = tokenizer.stream(), []
    for token_id in ids:
        pieces.append(stream.push(token_id))
        # A piece may be empty, but what has come out is always a beginning of the text.
        assert text.startswith("".join(pieces))
    assert "".join(pieces) + stream.finish() == text


def test_sentencepiece_takes_its_own_sign_for_a_space(folder: Path) -> None:
    tokenizer = InternLM2Tokenizer(folder)
    assert tokenizer.decode(tokenizer.encode("a\u2581b")) == "a b"
    assert ByteTokenizer().decode(ByteTokenizer().encode("a\u2581b")) == "a\u2581b"


def test_a_character_of_several_tokens_comes_out_at_once(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("\U0001f600")
    assert len(ids) >= 4
    stream = tokenizer.stream()
    assert [stream.push(token_id) for token_id in ids] == [""] * (len(ids) - 1) + ["\U0001f600"]


def test_a_cut_character_becomes_one_replacement(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("ok\U0001f600")[:-1]
    assert tokenizer.decode(ids) == "ok\ufffd"
    assert tokenizer.decode([*ids, tokenizer.id("<|im_end|>"), *tokenizer.encode("z")]) == "ok\ufffdz"


def test_special_tokens_are_ids_only_where_asked_for(tokenizer: Tokenizer) -> None:
    text = "a<IMG_CONTEXT>b<img>"
    plain = tokenizer.encode(text)
    assert not set(plain) & set(tokenizer.special_tokens.values())
    ids = tokenizer.encode(text, special=["<IMG_CONTEXT>"])
    assert ids.count(tokenizer.id("<IMG_CONTEXT>")) == 1
    assert tokenizer.id("<img>") not in ids
    assert tokenizer.decode(ids, skip_special=False) == text
    assert tokenizer.decode(ids) == "ab<img>"
    assert tokenizer.encode("") == [] and tokenizer.decode([]) == ""


def test_ids_without_text_decode_as_replacement(tokenizer: Tokenizer) -> None:
    assert tokenizer.decode([tokenizer.vocab_size + 3]) == "\ufffd"
    with pytest.raises(ValueError, match="token ids must be >= 0, got -1"):
        tokenizer.decode([-1])


def test_bad_text_is_refused(tokenizer: Tokenizer) -> None:
    with pytest.raises(ValueError, match=r'lone surrogate at index 1: clean it by text.encode\("utf-8", "replace"\)'):
        tokenizer.encode("a\ud800")
    with pytest.raises(TypeError, match="text must be a str, got bytes"):
        tokenizer.encode(b"a")
    with pytest.raises(ValueError, match="special token '<nothing>' must be in the tokenizer"):
        tokenizer.encode("a", special=["<nothing>"])


def test_bytes_are_ids_and_special_tokens_follow() -> None:
    tokenizer = ByteTokenizer()
    assert tokenizer.encode("é") == [0xC3, 0xA9]
    assert (tokenizer.vocab_size, tokenizer.bos_id, tokenizer.eos_id) == (270, 256, 257)
    assert [tokenizer.id(token) for token in TASK_TOKENS] == list(range(263, 270))


def test_released_ids() -> None:
    assert INTERNLM2_TOKENS["<|im_end|>"] == 92542 and INTERNLM2_TOKENS["<|im_start|>"] == 92543
    assert [INTERNLM2_TOKENS[t] for t in ("<img>", "</img>", "<IMG_CONTEXT>", "</box>")] == [92544, 92545, 92546, 92552]
    assert [INTERNLM2_TOKENS[token] for token in TASK_TOKENS] == list(range(92553, 92560))
    assert len(set(INTERNLM2_TOKENS.values())) == len(INTERNLM2_TOKENS) == 22


def test_pieces_are_those_of_sentencepiece(folder: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    tokenizer = load_tokenizer("internlm2", folder)
    assert (tokenizer.bos_id, tokenizer.eos_id, tokenizer.vocab_size) == (1, 2, 405)
    for text in TEXTS:
        assert tokenizer.encode(text) == model.encode(text)
        assert tokenizer.decode(model.encode(text)) == model.decode(model.encode(text)) == text


def test_added_tokens_come_from_the_checkpoint(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    assert InternLM2Tokenizer(tmp_path).id("<temp>") == INTERNLM2_TOKENS["<temp>"]
    decoder = {str(i): {"content": token} for token, i in CHAT.items()} | {"0": {"content": "<unk>"}}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"added_tokens_decoder": decoder}))
    with pytest.raises(ValueError, match="added_tokens.json must list '<img>'"):
        InternLM2Tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text(json.dumps(IMAGE))
    assert InternLM2Tokenizer(tmp_path / "tokenizer.model").special_tokens == {"<s>": 1, "</s>": 2, **CHAT, **IMAGE}
    with pytest.raises(ValueError, match="'<temp>' must be in the tokenizer.*whose added_tokens.json lists it"):
        InternLM2Tokenizer(tmp_path).id("<temp>")
    (tmp_path / "added_tokens.json").write_text(json.dumps(IMAGE | {"<img>": 400}))
    with pytest.raises(ValueError, match="'<|im_end|>' and '<img>' must have different ids, got 400"):
        InternLM2Tokenizer(tmp_path)
    (tmp_path / "added_tokens.json").write_text("{")
    with pytest.raises(ValueError, match=r"added_tokens.json is no valid JSON .*: copy it again"):
        InternLM2Tokenizer(tmp_path)


def test_text_that_spells_a_reserved_piece_is_refused(folder: Path, tmp_path: Path) -> None:
    import sentencepiece

    model = sentencepiece.SentencePieceProcessor(model_file=str(folder / "tokenizer.model"))
    end = model.piece_to_id("[UNUSED_TOKEN_145]")
    (tmp_path / "tokenizer.model").write_bytes((folder / "tokenizer.model").read_bytes())
    (tmp_path / "added_tokens.json").write_text(json.dumps(CHAT | IMAGE | {"<|im_end|>": end}))
    tokenizer = InternLM2Tokenizer(tmp_path)
    assert tokenizer.encode("<|im_end|>", special=["<|im_end|>"]) == [end]
    with pytest.raises(ValueError, match=r"must not spell the reserved piece '\[UNUSED_TOKEN_145\]': remove it"):
        tokenizer.encode("x [UNUSED_TOKEN_145]")


def test_missing_or_damaged_models_are_named(tmp_path: Path) -> None:
    pytest.importorskip("sentencepiece", reason='pip install "lrc-kernels[model]"')
    with pytest.raises(FileNotFoundError, match="tokenizer.model does not exist: copy tokenizer.model"):
        InternLM2Tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").write_bytes(b"nothing of the kind")
    with pytest.raises(ValueError, match="tokenizer.model is no sentencepiece model"):
        InternLM2Tokenizer(tmp_path)
    with pytest.raises(ValueError, match="path must be given"):
        load_tokenizer("internlm2")
    with pytest.raises(ValueError, match="must be one of bytes, internlm2, got 'x'"):
        load_tokenizer("x")


def test_a_missing_sentencepiece_names_the_extra(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "tokenizer.model").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "sentencepiece", None)
    with pytest.raises(ImportError, match=r'pip install "lrc-kernels\[model\]"'):
        InternLM2Tokenizer(tmp_path)
    assert load_tokenizer("bytes").vocab_size == 270
