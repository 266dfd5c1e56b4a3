# SPDX-License-Identifier: Apache-2.0
"""Building an index: what it says of each sample, what it refuses, and that a build cut off goes on."""

from __future__ import annotations

import io
import json
import pickle
import re
import sys
import tarfile

import numpy as np
import pytest

from lrc_kernels.packing import Index, IndexStaleError, build_index, decode_frames, plan_packs, probe_video
from lrc_kernels.packing import build as build_module
from lrc_kernels.packing.sources import JsonSource, SourceSample
from lrc_kernels.packing.template import ChatTemplate, Encoder, MediaTokenMismatch
from tests.packing.datasets import (
    SAMPLING,
    TEMPLATE,
    TOKENS_PER_FRAME,
    ByteTokenizer,
    talk,
    write_dataset,
    write_videos,
)
from tests.packing.videos import write_video

pytest.importorskip("av", reason="an index is built from videos, with PyAV (pip install lrc-kernels[video])")


def build(config, out, **changed):
    options = {"tokens_per_frame": TOKENS_PER_FRAME, "template": TEMPLATE, "threads": 2}
    return build_index(config, SAMPLING, ByteTokenizer(), out, **{**options, **changed})


@pytest.fixture(scope="module")
def videos(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write_videos(folder, [40, 25, 10])
    return folder


@pytest.fixture
def data(videos, tmp_path):
    (tmp_path / "videos").symlink_to(videos / "videos")
    return tmp_path


RECORDS = [
    talk("<video>\nwhat?", "grey", video="v0.mp4", duration=4.0),
    talk("<image>and now?", "ok", video="v1.mp4"),
    talk("only text", "yes"),
    talk("no place", "it comes first", video="v0.mp4", start=1.0, end=3.0, duration=2.0),
    talk("clip", "x", video="v2.mp4", clip=[0.25, 1.0]),
    {"conversations": [{"from": "human", "value": "nobody answers"}]},
]


def test_what_an_index_says(data):
    index = build(write_dataset(data, RECORDS), data / "index")
    assert len(index) == 6 and index.columns["n_frames"].tolist() == [8, 4, 0, 4, 4, 0]
    assert index.columns["duration"][:2].tolist() == pytest.approx([4.0, 2.5])
    assert index.columns["n_supervised"].tolist() == [5, 3, 4, 15, 2, 0]
    assert not index.columns["status"].any() and not (data / "index.partial").exists()
    ids, labels, visual = index.tokens(0)
    video = [256] * 16
    head, tail = [257, *b"user 8:"], [*b"\nwhat?", 258, 257, *b"assistant "]
    assert ids.tolist() == [*head, *video, *tail, *b"grey", 258]
    assert labels[labels != -100].tolist() == [*b"grey", 258] and visual.nonzero()[0].tolist() == [*range(8, 24)]
    for i in range(6):
        ids, labels, visual = index.tokens(i)
        assert len(ids) == index.columns["n_tokens"][i] and visual.sum() == 2 * index.columns["n_frames"][i]
        assert (labels[1:] != -100).sum() == index.columns["n_supervised"][i]
    assert index.timestamps(0).tolist() == pytest.approx([0.25 + 0.5 * i for i in range(8)])
    assert index.timestamps(3).tolist() == pytest.approx([1.25, 1.75, 2.25, 2.75])
    assert index.media(0) == (data / "videos" / "v0.mp4").resolve() and index.media(2) is None
    assert index.where(1).endswith("set.jsonl:2")
    plan = plan_packs(index)
    assert sorted(plan.sample_index.tolist()) == [0, 1, 2, 3, 4] and plan.skipped["unsupervised"] == 1
    again = pickle.loads(pickle.dumps(index))
    assert again.digest == index.digest and len(pickle.dumps(index)) < 1000
    index.verify()


def test_the_digest_depends_on_contents_alone(data):
    config = write_dataset(data, RECORDS)
    one = build(config, data / "one", threads=1, chunk=1)
    assert build(config, data / "two", threads=3, chunk=4).digest == one.digest
    assert build(config, data / "three", tokens_per_frame=3).digest != one.digest
    assert build(config, data / "one").digest == one.digest
    with pytest.raises(FileExistsError, match="one holds an index from another tokens_per_frame: remove it"):
        build(config, data / "one", tokens_per_frame=3)


def test_a_build_that_was_cut_off_goes_on(data, monkeypatch):
    config = write_dataset(data, RECORDS)
    whole = build(config, data / "whole")
    probe, seen = build_module.probe_video, []

    def dies_at_the_third(src):
        seen.append(src)
        if len(seen) == 3:
            raise KeyboardInterrupt
        return probe(src)

    monkeypatch.setattr(build_module, "probe_video", dies_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        build(config, data / "cut", chunk=1, threads=1)
    assert not (data / "cut").exists() and len(list((data / "cut.partial").glob("part-*.npz"))) == 4
    monkeypatch.setattr(build_module, "probe_video", lambda src: seen.append(src) or probe(src))
    del seen[:]
    assert build(config, data / "cut", chunk=1, threads=1).digest == whole.digest
    assert [src.name for src in seen] == ["v2.mp4"]
    # Other inputs make the parts of an earlier build useless.
    monkeypatch.setattr(build_module, "probe_video", dies_at_the_third)
    del seen[:]
    with pytest.raises(KeyboardInterrupt):
        build(config, data / "other", chunk=1, threads=1)
    config = write_dataset(data, RECORDS[::-1])
    monkeypatch.setattr(build_module, "probe_video", probe)
    assert build(config, data / "other", chunk=1).columns["n_frames"].tolist() == [0, 4, 4, 0, 4, 8]


def test_one_process_builds(data, monkeypatch):
    config = write_dataset(data, RECORDS)
    probe = build_module.probe_video

    def another_comes(src):
        with pytest.raises(BlockingIOError, match=r"another process is building in .*index\.partial"):
            build(config, data / "index")
        return probe(src)

    monkeypatch.setattr(build_module, "probe_video", another_comes)
    assert len(build(config, data / "index", threads=1)) == 6
    (data / "taken").mkdir()
    with pytest.raises(FileExistsError, match="taken exists and is no index"):
        build(config, data / "taken")


def test_the_duration_of_the_file_wins(data):
    records = [talk("a", "b", video="v0.mp4", duration=9.0), talk("a", "b", video="v1.mp4", duration=2.52)]
    with pytest.warns(UserWarning, match="1 videos differ from the duration in their annotation by more than 1 s or 5"):
        index = build(write_dataset(data, records), data / "index")
    assert index.columns["duration"].tolist() == pytest.approx([4.0, 2.5]) and index.columns["n_frames"][0] == 8


def test_bad_videos_are_counted_and_left_out(data):
    (data / "videos").unlink()
    write_videos(data, [10])
    (data / "videos" / "text.mp4").write_text("no video")
    (data / "videos" / "empty.mp4").write_bytes(b"")
    whole = (data / "videos" / "v0.mp4").read_bytes()
    (data / "videos" / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    names = ["v0.mp4", "text.mp4", "empty.mp4", "cut.mp4", "gone.mp4"]
    config = write_dataset(data, [talk("a", "b", video=name) for name in names])
    with pytest.warns(UserWarning, match=r"4 unreadable videos, the first: .*set\.jsonl:2: cannot read .*text\.mp4"):
        index = build(config, data / "index")
    assert index.columns["status"].tolist() == [0, 1, 1, 1, 1] and not index.columns["n_tokens"][1:].any()
    assert "no such video file" in index.error(4)
    assert plan_packs(index).skipped["empty"] == 4
    with pytest.raises(ValueError, match="none of the 1 videos can be read"):
        build(write_dataset(data, [talk("a", "b", video="gone.mp4")]), data / "none")
    write_videos(data, [12])
    with pytest.raises(IndexStaleError, match=r"1 samples have other videos than when it was built .*v0\.mp4") as stale:
        index.verify()
    assert stale.value.paths == (str((data / "videos" / "v0.mp4").resolve()),)


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (talk("a", "b", video="../v0.mp4"), "media path '../v0.mp4' must lie inside its root"),
        (talk("a", "b", video="/etc/passwd"), "media path '/etc/passwd' must lie inside its root"),
        (talk("a", "b", video="out.mp4"), "but a link leads it to"),
        (talk("a", "b", video="a\0.mp4"), "must be a name without zero bytes"),
        (talk("a", "b", video="v0.mp4", duration=float("nan")), "duration must be a finite number of seconds, got nan"),
        (talk("a", "b", video="v0.mp4", duration=-1), "duration must be above 0, got -1.0"),
        (talk("a", "b", video="v0.mp4", start=2, end=1), "end must be after start = 2.0, got 1.0"),
        (talk("a", "b", video="v0.mp4", start=-2), "start must be >= 0, got -2.0"),
        (talk("a", "b", video="v0.mp4", clip=[1, 60]), r"part \[1.0, 60.0\] s must lie inside of the video of 4.0 s"),
        (talk("a", "b", video="v0.mp4", clip=[1]), r"clip must be \[start, end\], got \[1\]"),
        (talk("a", "b", video="v0.mp4", start=10**400), "int too large"),
        (talk("a", "b", video=["v0.mp4", "v1.mp4"]), "video must be one path"),
        (talk("a", "b", image="a.png"), '"image" is not supported'),
        (talk("<video><video>", "b", video="v0.mp4"), "places marked by <video> or <image> must be 1, got 2"),
        (talk("<video>", "b"), "places marked by <video> or <image> must be 0, got 1"),
        ({"video": "v0.mp4"}, 'conversations must be a list of {"from", "value"}, got None'),
        ({"conversations": [{"from": "dog", "value": "b"}]}, "\"from\" must be human, gpt or system, got 'dog'"),
        (
            {"conversations": [{"from": "gpt", "value": "b"}], "video": "v0.mp4"},
            "placeholders for frames must be 8, got 0",
        ),
        ({"conversations": [{"from": ["human"], "value": "b"}]}, r"\"from\" must be .* got \['human'\]"),
        (talk("a", "b", video="\ud800.mp4"), "video must be valid Unicode"),
        ({"conversations": [{"from": "human", "value": 5}]}, r'conversations\[0\] must have "value", a text'),
        (talk("\ud800", "b"), "must be valid Unicode"),
        ([1], "must be an object, got list"),
    ],
)
def test_annotations_that_cannot_be_right(data, videos, record, message):
    link = videos / "videos" / "out.mp4"
    if not link.is_symlink():
        link.symlink_to("/etc/hostname")
    config = write_dataset(data, [RECORDS[0], record])
    with pytest.raises(ValueError, match=rf"1 annotations cannot be right:\n  .*set\.jsonl:2: .*{message}"):
        build(config, data / "index")
    assert not (data / "index").exists()
    with pytest.warns(UserWarning, match="1 invalid annotations"):
        index = build(config, data / "index", invalid="skip")
    assert index.columns["status"].tolist() == [0, 5] and plan_packs(index).sample_index.tolist() == [0]


def test_files_that_are_no_annotations(data):
    config = write_dataset(data, RECORDS)
    (data / "set.jsonl").write_text('{"a": 1}\nnot json\n')
    with pytest.raises(ValueError, match=r"2 annotations(.|\n)*set\.jsonl:2: Expecting value"):
        build(config, data / "index")
    cases = [
        ("[]", ValueError, "must be .*got list"),
        ("{", ValueError, "must be JSON"),
        ('{"a": {"annotation": "set.jsonl"}}', ValueError, 'a: must have "root"'),
        ('{"a": {"root": "none", "annotation": "set.jsonl"}}', FileNotFoundError, "root is no folder"),
        ('{"a": {"root": "videos", "annotation": "none"}}', FileNotFoundError, "no such annotation"),
        ('{"a": {"root": "videos"}}', ValueError, 'must have one of "annotation" and "shards"'),
        ('{"a": {"root": "videos", "annotation": "set.jsonl", "repeat_time": 0.5}}', ValueError, "repeat_time must be"),
        ('{"a": {"root": "videos", "annotation": "set.jsonl", "data_augment": true}}', ValueError, "data_augment must"),
        ('{"a": {"root": "videos", "shards": "*.tar"}}', FileNotFoundError, "shards must name files"),
        ("[" * 100_000, ValueError, r"set\.json: must be JSON"),
        ('{"a": {"root": "videos", "annotation": null}}', ValueError, "annotation must be a path, got None"),
        ('{"a": {"root": "videos", "shards": null}}', ValueError, "shards must be a pattern or a list of paths"),
        ('{"a": {"root": "videos", "shards": [5]}}', ValueError, "shards must be a pattern or a list of paths"),
        *((f'{{"a": {{"root": "videos", "shards": {json.dumps(names)}}}}}', ValueError, "shards must lie under")
          for names in ("/*.tar", "../*.tar", ["/a.tar"], ["../a.tar"])),
        *((f'{{"a": {{"root": "videos", "annotation": "set.jsonl", "repeat_time": {times}}}}}', ValueError,
           "repeat_time must be") for times in ("Infinity", "NaN")),
    ]  # fmt: skip
    for text, error, message in cases:
        config.write_text(text)
        with pytest.raises(error, match=message):
            build(config, data / "index")


def test_a_line_too_long_is_not_read_whole(data, monkeypatch):
    config = write_dataset(data, [RECORDS[0], talk("x" * 2000, "y")])
    monkeypatch.setattr("lrc_kernels.packing.sources.MAX_RECORD_BYTES", 1000)
    with pytest.raises(ValueError, match=r"set\.jsonl:2: a line must have at most 1000 bytes"):
        JsonSource(config)


def test_a_video_outside_of_its_root_where_that_is_allowed(data, tmp_path):
    write_video(tmp_path / "outside.mp4", [100 * i for i in range(10)], size=(32, 32))
    config = write_dataset(data, [talk("a", "b", video=str(tmp_path / "outside.mp4"))])
    index = build(config, data / "index", allow_outside_root=True)
    assert index.media(0) == tmp_path / "outside.mp4"


def test_a_sample_that_is_too_long_gets_fewer_frames(data):
    config = write_dataset(data, [*RECORDS[:2], talk("x" * 80, "y")])
    with pytest.warns(UserWarning, match=r"1 over-long samples, the first: .*set.jsonl:3: 100 tokens"):
        index = build(config, data / "index", max_tokens=45)
    assert index.columns["n_frames"].tolist() == [4, 4, 0] and index.columns["status"].tolist() == [0, 0, 4]
    assert b"user 4:" in bytes(index.tokens(0)[0][1:8].astype(np.uint8))


def test_repeated_data_sets(data):
    index = build(write_dataset(data, RECORDS[:2], repeat_time=2), data / "index")
    assert len(index) == 4 and np.array_equal(index.tokens(0)[0], index.tokens(2)[0])


def test_videos_in_tars(data):
    (data / "videos").unlink()
    names = write_videos(data, [40, 10])
    (data / "tars").mkdir()
    with tarfile.open(data / "tars" / "0.tar", "w") as tar:
        for i, name in enumerate(names):
            tar.add(data / "videos" / name, f"{i}.mp4")
            record = json.dumps(talk(f"question {i}", "b")).encode()
            member = tarfile.TarInfo(f"{i}.json")
            member.size = len(record)
            tar.addfile(member, io.BytesIO(record))
        link = tarfile.TarInfo("2.mp4")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        tar.addfile(link)
    config = data / "tars.json"
    config.write_text('{"t": {"root": "tars", "shards": "*.tar"}}')
    index = build(config, data / "index")
    assert index.columns["n_frames"].tolist() == [8, 4] and index.where(1).endswith("0.tar:1.json")
    media = index.media(0)
    assert media.offset > 0 and probe_video(media).duration_s == pytest.approx(4.0)
    assert decode_frames(media, index.timestamps(0)).valid.all()
    broken = (data / "tars" / "0.tar").read_bytes()
    (data / "tars" / "1.tar").write_bytes(broken[: media.offset + 1000])
    with pytest.raises(ValueError, match=r"1\.tar: must be a whole uncompressed tar"):
        build(config, data / "cut")


def test_names_in_tars_that_are_not_unicode(data):
    (data / "tars").mkdir()
    record = json.dumps(talk("a", "b")).encode()
    with tarfile.open(data / "tars" / "0.tar", "w") as tar:
        for name in ("0.json", "\udcff.json"):
            member = tarfile.TarInfo(name)
            member.size = len(record)
            tar.addfile(member, io.BytesIO(record))
    config = data / "tars.json"
    config.write_text('{"t": {"root": "tars", "shards": ["0.tar"]}}')
    index = build(config, data / "index")
    assert index.columns["status"].tolist() == [0, 0] and index.where(1).endswith(r"0.tar:\udcff.json")


def test_any_source(tmp_path, videos):
    class Two:
        def fingerprint(self):
            return "two"

        def __len__(self):
            return 2

        def __iter__(self):
            turns = (("user", "a"), ("assistant", "b"))
            yield SourceSample("first", turns, videos / "videos", "v0.mp4")
            yield SourceSample("second", turns)

    index = build(Two(), tmp_path / "index")
    assert index.columns["n_frames"].tolist() == [8, 0] and index.where(1) == "second"


def test_damaged_indices_are_refused(data):
    config = write_dataset(data, RECORDS)
    build(config, data / "index")
    folder = data / "index"
    with pytest.raises(FileNotFoundError, match="no index at .*none"):
        Index.load(data / "none")
    good = (folder / "n_tokens.npy").read_bytes()
    header = good[:128].replace(b"(6,)", b"(9,)")
    cases = [
        (good[:-4], "n_tokens.npy: cannot be read"),
        (header + good[128:], "n_tokens.npy: cannot be read"),
        (good.replace(b"<i4", b"<f4"), r"n_tokens.npy: must be int32 \[6\], got float32"),
        (b"", "n_tokens.npy: cannot be read"),
    ]
    for content, message in cases:
        (folder / "n_tokens.npy").write_bytes(content)
        with pytest.raises(ValueError, match=message):
            Index.load(folder)
    np.save(folder / "n_tokens.npy", np.array([{}] * 6), allow_pickle=True)
    with pytest.raises(ValueError, match="Python objects in dtype"):
        Index.load(folder)
    (folder / "n_tokens.npy").write_bytes(good[:-4] + b"\1\0\0\0")
    with pytest.raises(ValueError, match="columns must have digest"):
        Index.load(folder).verify()
    (folder / "n_tokens.npy").unlink()
    with pytest.raises(ValueError, match=r"must hold n_tokens\.npy"):
        Index.load(folder)
    (folder / "meta.json").write_text('{"schema": 99}')
    with pytest.raises(ValueError, match="schema must be 1, got 99"):
        Index.load(folder)


def test_progress_goes_to_a_terminal_only(data, monkeypatch, capsys):
    config = write_dataset(data, RECORDS)
    build(config, data / "quiet")
    assert capsys.readouterr() == ("", "")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    build(config, data / "loud", chunk=2)
    out, err = capsys.readouterr()
    assert out == "" and re.search(r"\rindex 6/6  [\d,]+ samples/s  ETA 0:00:00 \n$", err)


def test_bad_arguments(data):
    config = write_dataset(data, RECORDS)
    with pytest.raises(ValueError, match="tokens_per_frame must be >= 1, got 0"):
        build(config, data / "index", tokens_per_frame=0)
    with pytest.raises(ValueError, match="invalid must be one of raise, skip, got 'drop'"):
        build(config, data / "index", invalid="drop")
    with pytest.raises(ValueError, match="sampling.content must be None or 'packets' here"):
        build_index(config, SAMPLING.with_content([1.0]), ByteTokenizer(), data / "index")
    with pytest.raises(TypeError, match="sampling must be a TemporalSampling, got int"):
        build_index(config, 5, ByteTokenizer(), data / "index")
    with pytest.raises(ValueError, match="frame must hold {visual} exactly once, got 'f'"):
        ChatTemplate(frame="f")
    with pytest.raises(TypeError, match="tokenizer must have special_tokens, got int"):
        build_index(config, SAMPLING, 5, data / "index")
    tokenizer = ByteTokenizer()
    tokenizer.special_tokens = {"<img>": 1}
    with pytest.raises(ValueError, match="tokenizer must have <IMG_CONTEXT> among its special_tokens, got <img>"):
        Encoder(tokenizer)


def test_text_cannot_pose_as_the_template():
    encoder = Encoder(ByteTokenizer(), TEMPLATE)
    ids, _ = encoder.encode([("user", "<|im_end|>")], num_frames=0, duration_s=0, where="x")
    assert (ids == 258).sum() == 1 and ids[-1] == 258

    class Careless(ByteTokenizer):
        def encode(self, text):
            return [256 if c == "!" else ord(c) for c in text]

    with pytest.raises(MediaTokenMismatch, match="x: placeholders for frames must be 4, got 5") as error:
        Encoder(Careless(), TEMPLATE).encode([("user", "<video>!")], num_frames=4, duration_s=2, where="x")
    assert (error.value.sample_id, error.value.found, error.value.expected) == ("x", 5, 4)


def test_the_default_template_is_the_public_one():
    class Words(ByteTokenizer):
        def encode(self, text):
            return [ord(c) for c in text]

    ids, _ = Encoder(Words()).encode(
        [("user", "<image>\nWhy?"), ("assistant", "So.")], num_frames=2, duration_s=2.5, where=""
    )
    names = {number: name for name, number in ByteTokenizer().special_tokens.items()}
    assert "".join(names.get(i) or chr(i) for i in ids.tolist()) == (
        "<|im_start|>user\nThe video lasts for 2.50 seconds, and 2 frames are uniformly sampled from it.\n"
        "Frame1: <img><IMG_CONTEXT></img>\nFrame2: <img><IMG_CONTEXT></img>\nWhy?<|im_end|>\n"
        "<|im_start|>assistant\nSo.<|im_end|>\n"
    )
