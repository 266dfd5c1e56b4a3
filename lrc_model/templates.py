# SPDX-License-Identifier: Apache-2.0
"""A conversation about videos -> token ids, the mask of visual tokens, and labels on the answers alone."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lrc_kernels.checks import check_choice, check_int
from lrc_model.config import TEMPLATES, LRCConfig
from lrc_model.tokenizer import TASK_TOKENS, Tokenizer

IGNORE = -100
ROLES = ("user", "assistant")
_PLACEHOLDER = re.compile(r"<(?:image|video)>\n?")
_TASK_STEM = re.compile(r"<(?:box|time|temp|track)\w*_\w*>")


@dataclass(frozen=True)
class ChatTemplate:
    """The frame of a conversation in ChatML.

    Args:
        system: the system message; empty = no system turn.
        turn_end: plain text behind every `<|im_end|>`.
    """

    system: str = ""
    turn_end: str = "\n"


# System messages and separators are those that the released weights were trained with (InternVL's conversation.py).
CHAT_TEMPLATES = {
    "internvl2_5": ChatTemplate(
        "你是书生·万象，英文名是InternVL，是由上海人工智能实验室、清华大学及多家合作单位联合开发的多模态大语言模型。"
    ),
    "internlm2-chat": ChatTemplate(
        "你是由上海人工智能实验室联合商汤科技开发的书生多模态大模型，英文名叫InternVL, 是一个有用无害的人工智能助手。",
        turn_end="",
    ),
    "plain": ChatTemplate(),
}
assert tuple(CHAT_TEMPLATES) == TEMPLATES


@dataclass(frozen=True)
class Turn:
    """One message: `role` "user" or "assistant". `<video>` (or `<image>`) in a user's text is where a video stands."""

    role: str
    text: str

    def __post_init__(self) -> None:
        check_choice("role", self.role, ROLES)


@dataclass(frozen=True)
class VideoSpan:
    """What the prompt says of a video.

    Args:
        num_frames: frames that the model sees, padding included: a multiple of `clip_frames`.
        frame_text: write "FrameN: " before the tokens of each frame, as in training; without, all tokens in one span.
        duration: seconds; if given, a sentence with duration and frame count stands before the frames.
    """

    num_frames: int
    frame_text: bool = True
    duration: float | None = None

    def __post_init__(self) -> None:
        check_int("num_frames", self.num_frames, minimum=0)
        if self.num_frames == 0:
            raise ValueError("num_frames must be >= 1, got 0: leave a video without frames out of the conversation")
        if self.duration is not None and not 0 < self.duration < float("inf"):
            raise ValueError(f"duration must be a positive number of seconds or None, got {self.duration}")


@dataclass(frozen=True)
class EncodedChat:
    """A conversation as the model takes it.

    Attributes:
        input_ids: int64 [T].
        visual: bool [T], True where the rows of the connector stand, in order.
        labels: int64 [T], `input_ids` on answers and their `<|im_end|>`, else -100; NOT shifted.
        spans: (start, end) of every run of visual tokens.
    """

    input_ids: Tensor
    visual: Tensor
    labels: Tensor
    spans: tuple[tuple[int, int], ...]

    @property
    def num_visual_tokens(self) -> int:
        return sum(end - start for start, end in self.spans)


def encode_chat(
    tokenizer: Tokenizer,
    config: LRCConfig,
    turns: Sequence[Turn],
    *,
    videos: Sequence[VideoSpan] = (),
    train: bool = False,
    max_tokens: int | None = None,
) -> EncodedChat:
    """The token ids of a conversation: ChatML, with the tokens of each video at its placeholder.

    Where no text holds a placeholder, all videos stand before the first question. Task tokens in the texts become their
    ids; every other special token in a text is plain text. An answer is tokenised by itself, as it is generated.

    Args:
        turns: user and assistant in turn; the last is a question, with `train` an answer.
        videos: one for each placeholder.
        max_tokens: the longest conversation accepted.

    Returns:
        The ids; for generation they end behind "<|im_start|>assistant\\n".

    Raises:
        ValueError: roles out of turn, placeholders != videos, frames that are no whole clips, an unknown task token, an
            empty answer, more than `max_tokens` (nothing is truncated: that would cut the answer).
    """
    _check_turns(turns, train)
    builder = _Builder(tokenizer)
    template = CHAT_TEMPLATES[config.template]
    builder.special("<s>")
    if template.system:
        builder.turn_start("system", template.system).turn_end(template.turn_end)
    pending = _assign_videos(turns, videos)
    for turn in turns:
        builder.turn_start(turn.role)
        if turn.role == "assistant":
            builder.answer(turn.text)
        else:
            for item in next(pending):
                if isinstance(item, VideoSpan):
                    _add_video(builder, config, item)
                else:
                    builder.text(item, task_tokens=True)
        builder.turn_end(template.turn_end)
    if not train:
        builder.turn_start("assistant")
    chat = builder.build()
    if max_tokens is not None and len(chat.input_ids) > max_tokens:
        over, per_frame = len(chat.input_ids) - max_tokens, max(1, config.tokens_per_frame)
        raise ValueError(
            f"the conversation must fit max_tokens = {max_tokens}, got {len(chat.input_ids)} tokens of which "
            f"{chat.num_visual_tokens} are visual: leave out at least {-(-over // per_frame)} frames, raise "
            "max_tokens, or drop the sample; it is not truncated, since that would cut the answer"
        )
    return chat


class _Builder:
    """Collects segments; neighbouring plain text is tokenised as one, as the public tokenizer does."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self.tokenizer = tokenizer
        self.task_tokens = [token for token in TASK_TOKENS if token in tokenizer.special_tokens]
        self.ids: list[int] = []
        self.labels: list[int] = []
        self.spans: list[tuple[int, int]] = []
        self.supervised = False
        self.pending = ""

    def text(self, text: str, *, task_tokens: bool = False) -> None:
        if not task_tokens:
            self.pending += text
            return
        _check_task_tokens(text, self.tokenizer)
        for segment in re.split(f"({'|'.join(map(re.escape, TASK_TOKENS))})", text):
            if segment in TASK_TOKENS:
                self.special(segment)
            else:
                self.pending += segment

    def flush(self) -> None:
        self.append(self.tokenizer.encode(self.pending))
        self.pending = ""

    def append(self, ids: list[int], *, supervised: bool = False) -> None:
        self.ids += ids
        self.labels += ids if supervised else [IGNORE] * len(ids)

    def special(self, token: str, *, supervised: bool = False) -> None:
        self.flush()
        self.append([self.tokenizer.id(token)], supervised=supervised)

    def turn_start(self, role: str, text: str = "") -> _Builder:
        self.special("<|im_start|>")
        self.supervised = False
        self.text(f"{role}\n{text}")
        return self

    def turn_end(self, text: str) -> None:
        self.special("<|im_end|>", supervised=self.supervised)
        self.text(text)

    def answer(self, text: str) -> None:
        self.flush()
        _check_task_tokens(text, self.tokenizer)
        self.append(self.tokenizer.encode(text, special=self.task_tokens), supervised=True)
        self.supervised = True

    def visual(self, count: int) -> None:
        self.special("<img>")
        self.spans.append((len(self.ids), len(self.ids) + count))
        self.append([self.tokenizer.id("<IMG_CONTEXT>")] * count)
        self.special("</img>")

    def build(self) -> EncodedChat:
        self.flush()
        visual = torch.zeros(len(self.ids), dtype=torch.bool)
        for start, end in self.spans:
            visual[start:end] = True
        return EncodedChat(torch.tensor(self.ids), visual, torch.tensor(self.labels), tuple(self.spans))


def _add_video(builder: _Builder, config: LRCConfig, video: VideoSpan) -> None:
    total = config.num_visual_tokens(video.num_frames)
    if video.duration is not None:
        builder.text(
            f"The video lasts for {video.duration:.2f} seconds, and {video.num_frames} frames are uniformly sampled "
            "from it. "
        )
    if not video.frame_text:
        builder.visual(total)
        builder.text("\n")
        return
    for frame in range(video.num_frames):
        builder.text(f"Frame{frame + 1}: ")
        builder.visual(config.tokens_per_frame)
        builder.text("\n")


def _assign_videos(turns: Sequence[Turn], videos: Sequence[VideoSpan]) -> Iterator[list[str | VideoSpan]]:
    texts = [turn.text for turn in turns if turn.role == "user"]
    found = sum(len(_PLACEHOLDER.findall(text)) for text in texts)
    if found == 0:
        texts[0] = "<video>\n" * len(videos) + texts[0]
    elif found != len(videos):
        raise ValueError(
            f"the texts must hold one <video> placeholder per video, got {found} placeholders and {len(videos)} "
            "videos: add or remove placeholders (without any, the videos stand before the first question)"
        )
    left = iter(videos)
    for text in texts:
        items: list[str | VideoSpan] = []
        for index, segment in enumerate(_PLACEHOLDER.split(text)):
            items += [next(left), segment] if index else [segment]
        yield items


def _check_turns(turns: Sequence[Turn], train: bool) -> None:
    if not turns:
        raise ValueError("turns must hold at least one question, got none")
    for index, turn in enumerate(turns):
        if turn.role != ROLES[index % 2]:
            raise ValueError(f"turns must alternate user, assistant, ...: turn {index} must be {ROLES[index % 2]!r}")
        if turn.role == "assistant":
            if not turn.text:
                raise ValueError(f"turn {index} is an empty answer: there is nothing to learn from, drop the sample")
            if _PLACEHOLDER.search(turn.text):
                raise ValueError(f"turn {index} is an answer with a <video> placeholder: move it into a question")
    if train != (turns[-1].role == "assistant"):
        wanted = "an answer (role assistant)" if train else "a question (role user)"
        raise ValueError(f"the last turn must be {wanted} with train={train}, got {turns[-1].role!r}")


def _check_task_tokens(text: str, tokenizer: Tokenizer) -> None:
    for word in re.findall(r"<\w+>", text):
        if word in TASK_TOKENS:
            tokenizer.id(word)
        elif word not in tokenizer.special_tokens and word not in ("<box>", "<image>", "<video>"):
            near = difflib.get_close_matches(word, TASK_TOKENS, 1, 0.85)
            if near or _TASK_STEM.fullmatch(word):
                near = near or difflib.get_close_matches(word, TASK_TOKENS, 1, 0)
                raise ValueError(f"unknown task token {word!r} in the text, did you mean {near[0]!r}?")
