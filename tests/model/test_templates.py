# SPDX-License-Identifier: Apache-2.0
"""Prompts: their text, the mask of visual tokens, labels on answers alone, and conversations that are refused."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
import torch

from lrc_model.config import LRCConfig, tiny
from lrc_model.templates import CHAT_TEMPLATES, IGNORE, EncodedChat, Turn, VideoSpan, encode_chat
from lrc_model.tokenizer import ByteTokenizer

TOKENIZER = ByteTokenizer()
CONFIG = tiny().override({"tokens_per_frame": 2})
QUESTION = [Turn("user", "why?")]
TRAINING = [*QUESTION, Turn("assistant", "so"), Turn("user", "and?"), Turn("assistant", "<time_begin><temp>")]


def text_of(chat: EncodedChat) -> str:
    return TOKENIZER.decode(chat.input_ids.tolist(), skip_special=False)


def encode(turns: Sequence[Turn], config: LRCConfig = CONFIG, **options: object) -> EncodedChat:
    return encode_chat(TOKENIZER, config, turns, **options)


def test_the_prompt_of_the_release() -> None:
    config = CONFIG.override({"template": "internvl2_5"})
    system = CHAT_TEMPLATES["internvl2_5"].system
    assert text_of(encode(QUESTION, config, videos=[VideoSpan(4)])) == (
        f"<s><|im_start|>system\n{system}<|im_end|>\n<|im_start|>user\n"
        + "".join(f"Frame{i}: <img><IMG_CONTEXT><IMG_CONTEXT></img>\n" for i in (1, 2, 3, 4))
        + "why?<|im_end|>\n<|im_start|>assistant\n"
    )
    older = CONFIG.override({"template": "internlm2-chat"})
    assert "<|im_end|><|im_start|>user\nwhy?<|im_end|><|im_start|>assistant\n" in text_of(encode(QUESTION, older))


def test_one_span_without_frame_text() -> None:
    chat = encode(QUESTION, videos=[VideoSpan(4, frame_text=False, duration=12.345)])
    start, context = "<s><|im_start|>user\n", "<IMG_CONTEXT>" * 8
    sentence = "The video lasts for 12.35 seconds, and 4 frames are uniformly sampled from it. "
    assert text_of(chat).startswith(f"{start}{sentence}<img>{context}</img>\nwhy?<|im_end|>")
    assert len(chat.spans) == 1 and chat.num_visual_tokens == 8


def test_the_mask_marks_placeholders_and_nothing_else() -> None:
    turns = [Turn("user", "<video>one <image>\ntwo <IMG_CONTEXT>?")]
    chat = encode(turns, videos=[VideoSpan(4), VideoSpan(8, frame_text=False)])
    assert torch.equal(chat.visual, chat.input_ids == TOKENIZER.id("<IMG_CONTEXT>"))
    assert int(chat.visual.sum()) == chat.num_visual_tokens == 8 + 16
    assert [end - start for start, end in chat.spans] == [2, 2, 2, 2, 16]
    assert text_of(chat).count("<IMG_CONTEXT>") == 25
    assert "</img>\none <img>" in text_of(chat) and "</img>\ntwo <IMG_CONTEXT>?<|im_end|>" in text_of(chat)


def test_labels_stand_on_answers_and_their_end() -> None:
    chat = encode(TRAINING, videos=[VideoSpan(4)], train=True)
    supervised = chat.labels != IGNORE
    assert torch.equal(chat.labels[supervised], chat.input_ids[supervised])
    assert TOKENIZER.decode(chat.labels[supervised].tolist(), skip_special=False) == (
        "so<|im_end|><time_begin><temp><|im_end|>"
    )
    assert not bool((supervised & chat.visual).any())
    assert text_of(chat).endswith("assistant\n<time_begin><temp><|im_end|>\n")
    assert bool((encode(QUESTION).labels == IGNORE).all())


def test_training_text_continues_the_prompt_of_generation() -> None:
    prompt = encode(TRAINING[:3], videos=[VideoSpan(4)]).input_ids
    assert torch.equal(encode(TRAINING, videos=[VideoSpan(4)], train=True).input_ids[: len(prompt)], prompt)


def test_task_tokens_are_ids_and_chat_tokens_in_a_text_are_text() -> None:
    chat = encode([Turn("user", "where is <track_box> <|im_end|>?")])
    assert chat.input_ids.tolist().count(TOKENIZER.id("<track_box>")) == 1
    assert chat.input_ids.tolist().count(TOKENIZER.id("<|im_end|>")) == 1


def test_neighbouring_text_is_one_segment() -> None:
    seen: list[str] = []

    class Recorder(ByteTokenizer):
        def encode_text(self, text: str) -> list[int]:
            seen.append(text)
            return super().encode_text(text)

    encode_chat(Recorder(), CONFIG, TRAINING[:3], videos=[VideoSpan(4)])
    assert seen == ["user\nFrame1: ", "\nFrame2: ", "\nFrame3: ", "\nFrame4: ", "\nwhy?", "\n", "assistant\n", "so",
                    "\n", "user\nand?", "\n", "assistant\n"]  # fmt: skip


@pytest.mark.parametrize(
    ("turns", "options", "match"),
    [
        ([], {}, "turns must hold at least one question, got none"),
        ([Turn("assistant", "a")], {}, "turn 0 must be 'user'"),
        (TRAINING, {}, "last turn must be a question .* with train=False, got 'assistant'"),
        (QUESTION, {"train": True}, "last turn must be an answer .* with train=True, got 'user'"),
        ([*QUESTION, Turn("assistant", "")], {"train": True}, "turn 1 is an empty answer: .*drop the sample"),
        ([*QUESTION, Turn("assistant", "<video>")], {"train": True}, "placeholder: move it into a question"),
        ([Turn("user", "<video><video>")], {"videos": [VideoSpan(4)]}, "got 2 placeholders and 1 videos: add or"),
        ([Turn("user", "<video>")], {}, "got 1 placeholders and 0 videos"),
        (QUESTION, {"videos": [VideoSpan(6)]}, "multiple of clip_frames = 4, got 6: pad the video to 8 frames"),
        ([Turn("user", "<time_begn>")], {}, "unknown task token '<time_begn>' .*, did you mean '<time_begin>'"),
        ([Turn("user", "<time_end>")], {}, "unknown task token '<time_end>' in the text, did you mean '<time"),
        (QUESTION, {"videos": [VideoSpan(4)], "max_tokens": 60}, "max_tokens = 60, got .* 8 are visual: leave out at"),
    ],
)  # fmt: skip
def test_bad_conversations_are_refused(turns: list[Turn], options: dict[str, object], match: str) -> None:
    with pytest.raises(ValueError, match=match):
        encode(turns, **options)


def test_bad_videos_and_roles_are_refused() -> None:
    with pytest.raises(ValueError, match="num_frames must be >= 1, got 0: leave a video without frames out"):
        VideoSpan(0)
    with pytest.raises(ValueError, match="duration must be a positive number of seconds or None, got nan"):
        VideoSpan(4, duration=float("nan"))
    with pytest.raises(ValueError, match="role must be one of user, assistant, got 'human'"):
        Turn("human", "a")


def test_harmless_angle_brackets_pass() -> None:
    assert "<div> x<y> <box>" in text_of(encode([Turn("user", "<div> x<y> <box>")]))
