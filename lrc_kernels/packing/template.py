# SPDX-License-Identifier: Apache-2.0
"""A conversation about a video in, token ids out: which of them are learnt, and where each frame's tokens stand."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Protocol

import numpy as np
import numpy.typing as npt

VISUAL_TOKEN = "<IMG_CONTEXT>"
SUPERVISED, VISUAL = 1, 2
_TAG = re.compile("<video>|<image>")


class Tokenizer(Protocol):
    """What an index needs of a tokenizer.

    Attributes:
        special_tokens: text -> id, "<IMG_CONTEXT>" among them: the placeholder that features of frames replace.
    """

    @property
    def special_tokens(self) -> Mapping[str, int]: ...

    def encode(self, text: str) -> list[int]:
        """Ids of plain text; the spelling of a special token in it is text too."""


class MediaTokenMismatch(ValueError):  # noqa: N818
    """The places for frames in a text are not those that its video needs.

    Args:
        sample_id: file and line of the sample. found, expected: places.
    """

    def __init__(self, sample_id: str, found: int, expected: int, what: str):
        super().__init__(f"{sample_id}: {what} must be {expected}, got {found}")
        self.sample_id, self.found, self.expected = sample_id, found, expected


@dataclass(frozen=True)
class ChatTemplate:
    """How a conversation is written; the defaults are those of the public InternVideo2.5 training code.

    Names of special tokens are looked for in these strings only, never in the text of an annotation, where they would
    let the text pose as another speaker.

    Args:
        turn: one turn, with {role} and {text}.
        begin: what stands before the first turn.
        intro: what stands before the frames, with {duration} in seconds and {num_frames}.
        frame: one frame, with {number} from 1 on and {visual}, where the tokens of the frame stand.
        between: what stands between two frames.

    Raises:
        ValueError: a string without the field that it needs exactly once.
    """

    turn: str = "<|im_start|>{role}\n{text}<|im_end|>\n"
    begin: str = ""
    intro: str = "The video lasts for {duration:.2f} seconds, and {num_frames} frames are uniformly sampled from it.\n"
    frame: str = "Frame{number}: <img>{visual}</img>"
    between: str = "\n"

    def __post_init__(self) -> None:
        for name, wanted in (("turn", "{text}"), ("frame", "{visual}")):
            if getattr(self, name).count(wanted) != 1:
                raise ValueError(f"{name} must hold {wanted} exactly once, got {getattr(self, name)!r}")


@dataclass
class Encoder:
    """Tokenises conversations by one template.

    Raises:
        TypeError: what is no Tokenizer. ValueError: a tokenizer without "<IMG_CONTEXT>".
    """

    tokenizer: Tokenizer
    template: ChatTemplate = field(default_factory=ChatTemplate)

    def __post_init__(self) -> None:
        if missing := [name for name in ("special_tokens", "encode") if not hasattr(self.tokenizer, name)]:
            raise TypeError(f"tokenizer must have {missing[0]}, got {type(self.tokenizer).__name__}")
        special = self.tokenizer.special_tokens
        if VISUAL_TOKEN not in special:
            raise ValueError(f"tokenizer must have {VISUAL_TOKEN} among its special_tokens, got {', '.join(special)}")
        self.visual_id = special[VISUAL_TOKEN]
        names = sorted(special, key=len, reverse=True)
        self._special = re.compile(f"({'|'.join(map(re.escape, names))})")
        self._fixed_ids = lru_cache(maxsize=8192)(self._encode_fixed)

    def encode(
        self, turns: Sequence[tuple[str, str]], *, num_frames: int, duration_s: float, where: str
    ) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.uint8]]:
        """(ids int32 [n], flags uint8 [n] of SUPERVISED and VISUAL) with one placeholder for each frame.

        The frames stand where "<video>" or "<image>" does in the text of a user, or else before the first such text.
        Words of the assistant and the end of its turn are supervised.

        Args:
            turns: (role, text), roles "system", "user" and "assistant".
            num_frames: 0 for a sample of text.
            where: file and line, for errors.

        Raises:
            MediaTokenMismatch: more than one such place, one in a sample without a video, or a placeholder in the text.
        """
        tags = sum(len(_TAG.findall(text)) for role, text in turns if role == "user")
        if tags > (1 if num_frames else 0):
            raise MediaTokenMismatch(where, tags, 1 if num_frames else 0, "places marked by <video> or <image>")
        ids, flags = list(self._fixed_ids(self.template.begin)), [0] * len(self._fixed_ids(self.template.begin))
        pending = num_frames > 0 and tags == 0
        before, after = self.template.turn.split("{text}")
        for role, text in turns:
            head = self._fixed_ids(before.replace("{role}", role))
            body, parts = [], _TAG.split(text) if role == "user" and num_frames else [text]
            if role == "user" and pending:
                parts, pending = ["", "\n" + text], False
            for i, part in enumerate(parts):
                body += self._frames(num_frames, duration_s) if i else []
                body += self.tokenizer.encode(part) if part else []
            tail = self._fixed_ids(after.replace("{role}", role))
            learnt = SUPERVISED if role == "assistant" else 0
            ids += [*head, *body, *tail]
            flags += [0] * len(head) + [learnt] * (len(body) + len(tail))
        array = np.array(ids, dtype=np.int32)
        visual = array == self.visual_id
        if int(visual.sum()) != num_frames:
            raise MediaTokenMismatch(where, int(visual.sum()), num_frames, "placeholders for frames")
        return array, np.where(visual, VISUAL, np.array(flags, dtype=np.uint8)).astype(np.uint8)

    def _frames(self, num_frames: int, duration_s: float) -> list[int]:
        before, after = self.template.frame.split("{visual}")
        ids = self._encode_fixed(self.template.intro.format(duration=duration_s, num_frames=num_frames))
        for i in range(num_frames):
            number = str(i + 1)
            ids += self._fixed_ids(self.template.between) if i else []
            ids += self._fixed_ids(before.replace("{number}", number))
            ids.append(self.visual_id)
            ids += self._fixed_ids(after.replace("{number}", number))
        return ids

    def _encode_fixed(self, text: str) -> list[int]:
        special, ids = self.tokenizer.special_tokens, []
        for part in self._special.split(text):
            ids += [special[part]] if part in special else self.tokenizer.encode(part) if part else []
        return ids
