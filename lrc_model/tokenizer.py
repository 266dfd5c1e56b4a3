# SPDX-License-Identifier: Apache-2.0
"""Text to token ids and back: raw bytes for the small presets, InternLM2's `tokenizer.model` for the released weights.

Special tokens are ids only where the caller says so; in any other text their spelling is plain text.
"""

from __future__ import annotations

import codecs
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterable, Mapping
from pathlib import Path
from typing import Any

CHAT_TOKENS = ("<|im_start|>", "<|im_end|>")
IMAGE_TOKENS = ("<img>", "</img>", "<IMG_CONTEXT>")
TASK_TOKENS = ("<box_begin>", "<time_begin>", "<temp>", "<boxes>", "<track_begin>", "<tracking>", "<track_box>")
REPLACEMENT = "\ufffd"
# InternLM2.5's chat tokens take the place of unused pieces; InternVL2.5 and then the task tokens are added behind.
INTERNLM2_TOKENS = {
    **{
        token: 92538 + i
        for i, token in enumerate(
            ("<|plugin|>", "<|interpreter|>", "<|action_end|>", "<|action_start|>", "<|im_end|>", "<|im_start|>")
        )
    },
    **{
        token: 92544 + i
        for i, token in enumerate(
            (
                *IMAGE_TOKENS[:2],
                IMAGE_TOKENS[2],
                "<quad>",
                "</quad>",
                "<ref>",
                "</ref>",
                "<box>",
                "</box>",
                *TASK_TOKENS,
            )
        )
    },
}


class Tokenizer(ABC):
    """What the rest of the model knows of a tokenizer.

    Attributes:
        special_tokens: text -> id of every special token.
        vocab_size: one more than the largest id.
    """

    special_tokens: Mapping[str, int]
    vocab_size: int
    bos_id: int
    eos_id: int
    pad_id: int

    @abstractmethod
    def encode_text(self, text: str) -> list[int]:
        """Ids of text in which no special token is looked for."""

    @abstractmethod
    def token_bytes(self, token_id: int) -> bytes | None:
        """UTF-8 of a token (perhaps a part of a character); None for an id that has no text."""

    @property
    def starts_with_space(self) -> bool:
        """Whether the first piece of a text carries a space that the text does not have."""
        return False

    def id(self, token: str) -> int:
        """The id of a special token; ValueError where this tokenizer has none."""
        if token not in self.special_tokens:
            raise ValueError(
                f"special token {token!r} must be in the tokenizer, it has {', '.join(self.special_tokens)}: use a "
                "checkpoint whose added_tokens.json lists it"
            )
        return self.special_tokens[token]

    def encode(self, text: str, *, special: Collection[str] = ()) -> list[int]:
        """Ids of `text`; the tokens named in `special` become their ids, all other text is plain.

        Raises:
            TypeError: text that is no str. ValueError: an unknown special token, or text that is no valid Unicode.
        """
        if not isinstance(text, str):
            raise TypeError(f"text must be a str, got {type(text).__name__}")
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise ValueError(
                f"text must be valid Unicode, got a lone surrogate at index {error.start}: clean it by "
                'text.encode("utf-8", "replace").decode()'
            ) from None
        ids = {token: self.id(token) for token in special}
        pattern = "|".join(re.escape(token) for token in sorted(ids, key=len, reverse=True))
        encoded: list[int] = []
        for segment in re.split(f"({pattern})", text) if ids else [text]:
            if segment in ids:
                encoded.append(ids[segment])
            elif segment:
                encoded += self.encode_text(segment)
        return encoded

    def decode(self, ids: Iterable[int], *, skip_special: bool = True) -> str:
        """Text of `ids`; bytes that are no UTF-8, and ids without a text, become U+FFFD."""
        stream = self.stream(skip_special=skip_special)
        return "".join([stream.push(token_id) for token_id in ids]) + stream.finish()

    def stream(self, *, skip_special: bool = True) -> StreamDecoder:
        """A decoder that takes one id at a time and never gives half a character."""
        return StreamDecoder(self, skip_special)


class StreamDecoder:
    """Ids in, one at a time; text out as soon as its characters are whole. `decode` is the same thing."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special
        self._texts = {token_id: text for text, token_id in tokenizer.special_tokens.items()}
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._at_start = True

    def push(self, token_id: int) -> str:
        """The characters that this id completes, perhaps none.

        Raises:
            ValueError: a negative id.
        """
        token_id = int(token_id)
        if token_id < 0:
            raise ValueError(f"token ids must be >= 0, got {token_id}")
        if token_id in self._texts:
            text = self.finish()
            return text if self._skip else text + self._texts[token_id]
        piece = self._tokenizer.token_bytes(token_id)
        if piece is None:
            return self.finish() + REPLACEMENT
        if self._at_start and self._tokenizer.starts_with_space:
            piece = piece.removeprefix(b" ")
        self._at_start = False
        return self._utf8.decode(piece)

    def finish(self) -> str:
        """What is left at the end: U+FFFD where a character was cut."""
        self._at_start = True
        text = self._utf8.decode(b"", final=True)
        self._utf8.reset()
        return text


class ByteTokenizer(Tokenizer):
    """Every byte of UTF-8 is a token (ids 0-255), then the special tokens: nothing to download, nothing unknown."""

    def __init__(self) -> None:
        tokens = ("<s>", "</s>", *CHAT_TOKENS, *IMAGE_TOKENS, *TASK_TOKENS)
        self.special_tokens = {token: 256 + i for i, token in enumerate(tokens)}
        self.vocab_size = 256 + len(tokens)
        self.bos_id, self.eos_id = self.special_tokens["<s>"], self.special_tokens["</s>"]
        self.pad_id = self.eos_id

    def encode_text(self, text: str) -> list[int]:
        return list(text.encode())

    def token_bytes(self, token_id: int) -> bytes | None:
        return bytes([token_id]) if token_id < 256 else None


class InternLM2Tokenizer(Tokenizer):
    """InternLM2's sentencepiece model with the added tokens of a checkpoint. No code of the checkpoint runs.

    SentencePiece writes a space as U+2581, so that a text's own U+2581 comes back as a space.

    Args:
        path: `tokenizer.model`, or the folder that holds it. `added_tokens.json` and the `added_tokens_decoder` of
            `tokenizer_config.json` beside it say which tokens were added; without both, those of InternVideo2.5.

    Raises:
        ImportError: sentencepiece is not installed. FileNotFoundError, ValueError: no or no valid files.
    """

    def __init__(self, path: str | Path) -> None:
        path = Path(path)
        file = path / "tokenizer.model" if path.is_dir() else path
        if not file.is_file():
            raise FileNotFoundError(f"{file} does not exist: copy tokenizer.model of the released checkpoint there")
        try:
            import sentencepiece
        except ImportError as error:
            raise ImportError(
                f'InternLM2Tokenizer needs sentencepiece: pip install "lrc-kernels[model]" ({error})'
            ) from error
        try:
            self._pieces: Any = sentencepiece.SentencePieceProcessor(model_file=str(file))
        except (RuntimeError, OSError) as error:
            raise ValueError(f"{file} is no sentencepiece model ({error}): copy it again") from error
        added = _added_tokens(file.parent)
        self.bos_id, self.eos_id = self._pieces.bos_id(), self._pieces.eos_id()
        self.pad_id = self.eos_id
        self.special_tokens = {"<s>": self.bos_id, "</s>": self.eos_id, **added}
        self._check_special_tokens(file.parent)
        self.vocab_size = max(self._pieces.get_piece_size(), 1 + max(self.special_tokens.values()))
        self._space_first = self._pieces.encode("a", out_type=str)[0].startswith("\u2581")

    def _check_special_tokens(self, folder: Path) -> None:
        for token in (*CHAT_TOKENS, *IMAGE_TOKENS):
            if token not in self.special_tokens:
                raise ValueError(
                    f"{folder}: added_tokens.json must list {token!r}, it lists {list(self.special_tokens)}"
                )
        owners: dict[int, str] = {}
        for token, token_id in self.special_tokens.items():
            if token_id in owners:
                raise ValueError(
                    f"{folder}: {owners[token_id]!r} and {token!r} must have different ids, got {token_id}"
                )
            owners[token_id] = token

    @property
    def starts_with_space(self) -> bool:
        return self._space_first

    def encode_text(self, text: str) -> list[int]:
        ids = self._pieces.encode(text)
        # The chat tokens took the place of unused pieces, whose spelling in a user's text must not end a turn.
        if spelt := set(ids) & set(self.special_tokens.values()):
            piece = self._pieces.id_to_piece(min(spelt))
            raise ValueError(f"text must not spell the reserved piece {piece!r}: remove it")
        return ids

    def token_bytes(self, token_id: int) -> bytes | None:
        pieces = self._pieces
        if token_id >= pieces.get_piece_size() or pieces.is_unknown(token_id) or pieces.is_control(token_id):
            return None
        piece = pieces.id_to_piece(token_id)
        return bytes([int(piece[3:-1], 16)]) if pieces.is_byte(token_id) else piece.replace("\u2581", " ").encode()


def load_tokenizer(kind: str, path: str | Path | None = None) -> Tokenizer:
    """The tokenizer that `LRCConfig.tokenizer` names: "bytes", or "internlm2" from the folder of the checkpoint."""
    if kind == "bytes":
        return ByteTokenizer()
    if kind != "internlm2":
        raise ValueError(f"tokenizer must be one of bytes, internlm2, got {kind!r}")
    if path is None:
        raise ValueError("path must be given: the internlm2 tokenizer is read from the folder of a checkpoint")
    return InternLM2Tokenizer(path)


def _added_tokens(folder: Path) -> dict[str, int]:
    added: dict[str, int] = {}
    if (file := folder / "tokenizer_config.json").is_file():
        decoder = _read_json(file).get("added_tokens_decoder", {})
        added |= {entry["content"]: int(token_id) for token_id, entry in decoder.items()}
        for piece in ("<unk>", "<s>", "</s>"):
            added.pop(piece, None)
    if (file := folder / "added_tokens.json").is_file():
        added |= {str(token): int(token_id) for token, token_id in _read_json(file).items()}
    return added or dict(INTERNLM2_TOKENS)


def _read_json(file: Path) -> dict[str, Any]:
    try:
        values = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{file} is no valid JSON ({error}): copy it again") from error
    if not isinstance(values, dict):
        raise ValueError(f"{file} must hold a JSON object, got {type(values).__name__}")
    return values
