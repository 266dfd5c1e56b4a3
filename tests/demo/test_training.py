# SPDX-License-Identifier: Apache-2.0
"""The demo's questions: their answers are true of the files, chance is known, and nothing that is asked was learnt."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

pytest.importorskip("PIL", reason="drawing digits needs pillow (pip install lrc-kernels[video])")
pytest.importorskip("av", reason="clips are encoded with PyAV (pip install lrc-kernels[video])")

from examples import questions as q
from lrc_kernels.packing import DecodedVideo, Index, build_index, decode_frames
from lrc_model.config import preset
from lrc_model.tokenizer import ByteTokenizer

SIZE, PER_KIND = 56, 20


def make_shot(seed: int, num_frames: int = 24, still: bool = False) -> np.ndarray:
    """A textured square that moves over a dark texture, uint8 [N, 3, 112, 112]."""
    random = np.random.default_rng(seed)
    shot = np.repeat(random.integers(20, 60, (1, 3, 112, 112), dtype=np.uint8), num_frames, 0)
    for index, frame in enumerate(shot):
        at = 10 if still else 10 + 2 * index
        frame[:, at : at + 30, 20:50] = 150 + 100 * (np.indices((30, 30)).sum(0) // 3 % 2)
    return shot


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, list[q.Question]]:
    folder = tmp_path_factory.mktemp("questions") / "set"
    shots = [make_shot(seed) for seed in range(2)]
    return folder, q.write_questions(shots, folder, per_kind=PER_KIND, size=SIZE, seed=3, progress=lambda *_: None)


@pytest.fixture(scope="module")
def index(written: tuple[Path, list[q.Question]]) -> Index:
    from examples.training import SAMPLING, TEMPLATE

    folder, _ = written
    return build_index(
        folder / "data.json", SAMPLING, ByteTokenizer(), folder / "index", tokens_per_frame=1, template=TEMPLATE
    )


def frames_seen(index: Index, sample_id: int) -> np.ndarray:
    """What the model sees of a clip: int [F, H, W, 3]."""
    media = index.media(sample_id)
    assert media is not None
    return decode_frames(media, index.timestamps(sample_id)).frames.permute(0, 2, 3, 1).int().numpy()


def test_every_answer_of_a_kind_is_asked_for_equally_often(written: tuple[Path, list[q.Question]]) -> None:
    _, questions = written
    for kind, facts in q.KINDS.items():
        answers = [question.answer for question in questions if question.kind == kind]
        assert {answers.count(answer) for answer in facts.answers} == {PER_KIND // len(facts.answers)}


def test_framed_pictures_come_in_the_order_of_the_answer(written: tuple[Path, list[q.Question]], index: Index) -> None:
    for sample_id, question in enumerate(written[1]):
        if question.kind == "order":
            edges = frames_seen(index, sample_id)[:, :4].mean(axis=(1, 2))
            seen = {}
            for name, colour in (("red", q.RED), ("blue", q.BLUE)):
                near = np.flatnonzero(np.abs(edges - colour).max(axis=1) < 50)
                assert len(near), f"no {name} frame among those that the model sees of {question.video}"
                seen[name] = near.max()
            assert min(seen, key=seen.__getitem__) == question.answer


def test_the_quadrant_of_the_answer_moves_most_in_the_file(written: tuple[Path, list[q.Question]]) -> None:
    folder, questions = written
    for question in questions:
        if question.kind == "quadrant":
            every_frame = (np.arange(q.SHORTEST) + 0.5) / q.FPS
            video = decode_frames(folder / question.video, every_frame).frames.permute(0, 2, 3, 1).numpy()
            assert video.shape[1:] == (SIZE, SIZE, 3)
            moves = q.motion(video)
            assert q.KINDS["quadrant"].answers[int(moves.argmax())] == question.answer


def test_a_card_is_among_the_frames_that_the_model_sees(written: tuple[Path, list[q.Question]], index: Index) -> None:
    for sample_id, question in enumerate(written[1]):
        if question.kind == "digit":
            assert (frames_seen(index, sample_id) > 200).mean(axis=(1, 2, 3)).max() > 0.4


def test_the_same_seed_writes_the_same_clips(written: tuple[Path, list[q.Question]], tmp_path: Path) -> None:
    folder, questions = written
    shots = [make_shot(seed) for seed in range(2)]
    again = q.write_questions(shots, tmp_path / "b", per_kind=PER_KIND, size=SIZE, seed=3, progress=lambda *_: None)
    assert again == questions
    for name in ("questions.jsonl", questions[0].video, questions[-1].video):
        assert (folder / name).read_bytes() == (tmp_path / "b" / name).read_bytes()


def test_in_a_video_that_stands_still_no_quadrant_moves_most(tmp_path: Path) -> None:
    shots = [make_shot(0, still=True)]
    questions = q.write_questions(shots, tmp_path / "a", per_kind=2, size=SIZE, seed=0, progress=lambda *_: None)
    assert [question.kind for question in questions] == ["digit", "digit", "order", "order"]


@pytest.mark.parametrize("duration", [1.7, 5.3, 100.0])
def test_held_out_shots_lie_behind_those_that_are_trained_on(duration: float) -> None:
    def read(times: np.ndarray) -> DecodedVideo:
        # The frame shows its time in hundredths of a second, twice 8 bits.
        at = torch.from_numpy(times * 100).long()
        frames = torch.stack([at // 256, at % 256, 0 * at], 1).to(torch.uint8)[..., None, None]
        return DecodedVideo(frames, torch.from_numpy(times), torch.arange(len(times)) != 2)

    train, held_out = q.read_shots(duration, read)
    times = [[256 * shot[:, 0].astype(int) + shot[:, 1] for shot in part] for part in (train, held_out)]
    learnt, asked = (np.concatenate(part)[..., 0, 0] for part in times)
    assert learnt.max() < 75 * duration < asked.min() and asked.max() < 100 * duration
    # The third frame is damaged.
    assert np.array_equal(train[0][2], train[0][1]) and len(asked) >= q.SHORTEST


def test_no_frame_is_in_both_parts_of_a_slide_show() -> None:
    """What is on show when the last quarter begins was learnt, and a damaged frame shows none of another shot."""

    def read(times: np.ndarray, damaged: int = 0) -> DecodedVideo:
        pts = torch.from_numpy(np.floor(times * 0.4) / 0.4)
        behind = torch.from_numpy(times >= 30).cumsum(0)
        frames = pts.to(torch.uint8)[:, None, None, None].expand(-1, 3, 4, 4).clone()
        return DecodedVideo(frames, pts, (behind == 0) | (behind > damaged))

    for damaged in (0, 20):
        train, held_out = q.read_shots(41.0, lambda times, damaged=damaged: read(times, damaged))
        learnt, asked = ({*np.concatenate(part).ravel().tolist()} for part in (train, held_out))
        assert learnt and asked and not learnt & asked and min(asked) >= 0.75 * 41 - 1
    with pytest.raises(ValueError, match=r"6 frames in a row to learn from .* got at most 30 and 0: --steps 0 skips"):
        q.read_shots(41.0, lambda times: read(times, 1000))


def test_answers_stay_balanced_where_some_clips_cannot_be_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = q.find_motion
    calls = iter(range(1000))
    monkeypatch.setitem(q.MAKERS, "quadrant", lambda *given: None if next(calls) % 4 == 1 else found(*given))
    questions = q.write_questions(
        [make_shot(0)], tmp_path / "a", per_kind=16, size=SIZE, seed=0, progress=lambda *_: None
    )
    answers = [question.answer for question in questions if question.kind == "quadrant"]
    assert [answers.count(answer) for answer in q.KINDS["quadrant"].answers] == [3, 3, 3, 3]


def test_a_video_too_short_to_hold_clips_out_says_what_is_needed() -> None:
    with pytest.raises(ValueError, match=r"at least 1.6 s, got 1.5 s: --steps 0 skips it"):
        q.read_shots(1.5, lambda times: pytest.fail("nothing must be read"))


def test_prompts_end_before_the_answer(written: tuple[Path, list[q.Question]], index: Index) -> None:
    from examples.training import _prompt

    tokenizer = ByteTokenizer()
    for sample_id, question in enumerate(written[1][:: PER_KIND - 1]):
        sample = _prompt(index, sample_id * (PER_KIND - 1), preset("tiny").vision.image_size)
        text = tokenizer.decode(sample.input_ids[~sample.visual].tolist(), skip_special=False)
        assert text.endswith(f"{q.KINDS[question.kind].question}<|im_end|>\n<|im_start|>assistant\n")
        assert sample.frames is not None and len(sample.frames) == int(sample.visual.sum()) and sample.labels is None


def test_luck_is_the_chance_of_guessing_as_well() -> None:
    from examples.training import Answered, accuracy

    frames = np.zeros((1, 3, 2, 2), dtype=np.uint8)
    asked = [Answered(q.Question("order", "a.mp4", "red"), said, frames) for said in ("red", "red", "blue")]
    assert accuracy(asked) == {
        "order": {"questions": 3, "right": 2, "accuracy": 2 / 3, "chance": 0.5, "luck": pytest.approx(4 / 8)}
    }
