"""The record: its fields, its kinds of answers, and the clip inside a longer video."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from nanosport.env.prompt import question_text
from nanosport.image import ImageConfig
from nanosport.model.frames import FrameEncoder
from nanosport.records import (
    Clip,
    Question,
    number,
    parse_question,
    read_questions,
    record_row,
    time_span,
)
from nanosport.video import Video, VideoError

ROW = {
    "id": "q",
    "video": "v.mp4",
    "sport": "diving",
    "dimension": "assessment",
    "question": "Score?",
    "options": [],
    "answer": "85.5",
}


def test_what_is_left_out_has_a_default():
    question = parse_question(ROW)
    assert (question.kind, question.group, question.clip, question.version) == (
        "open",
        "v.mp4",
        Clip("v.mp4"),
        1,
    )
    choice = parse_question(
        ROW | {"options": ["a", "b"], "answer": "B", "group": "match 3", "span_s": [3, 7.5]}
    )
    assert (choice.kind, choice.group, choice.clip) == (
        "choice",
        "match 3",
        Clip("v.mp4", (3, 7.5)),
    )
    assert str(choice.clip) == "v.mp4 from 3 s to 7.5 s"
    assert parse_question(json.loads(json.dumps(asdict(choice)))) == choice


@pytest.mark.parametrize(
    "change, why",
    [
        ({"version": 2}, "reads version 1"),
        ({"kind": "essay"}, "kind 'essay'"),
        ({"kind": "choice"}, "exactly where there are options"),
        ({"kind": "number", "options": ["a"], "answer": "A"}, "exactly where there are options"),
        ({"kind": "number", "answer": "high"}, "must be a number"),
        ({"kind": "number", "tolerance": -1}, "tolerance -1"),
        ({"kind": "number", "tolerance": True}, "tolerance True"),
        ({"kind": "span", "answer": "late"}, "time span"),
        ({"span_s": [5, 3]}, "span_s [5, 3]"),
        ({"span_s": [5]}, "span_s [5]"),
        ({"span_s": [0, float("inf")]}, "span_s"),
        ({"window": [1.5, 3]}, "window [1.5, 3]"),
        ({"window": "all"}, "window 'all'"),
        ({"pass_rate": 1.2}, "pass_rate 1.2"),
        ({"pass_rate": True}, "pass_rate True"),
        ({"needs_tool": "yes"}, "needs_tool 'yes'"),
        ({"group": 7}, "group 7"),
        ({"id": ""}, "id '': must be a text that is not empty"),
        ({"video": ""}, "video '': must be a text that is not empty"),
    ],
)
def test_a_field_that_is_wrong_is_named(change, why):
    with pytest.raises(ValueError) as caught:
        parse_question(ROW | change)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_records_move_between_folders(tmp_path):
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "mine.jsonl").write_text(json.dumps(ROW | {"video": "clips/v.mp4"}) + "\n")
    (question,) = read_questions(tmp_path / "a" / "mine.jsonl")
    row = record_row(question, tmp_path / "b")
    assert row["video"] == "../a/clips/v.mp4"
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "mine.jsonl").write_text(json.dumps(row) + "\n")
    (moved,) = read_questions(tmp_path / "b" / "mine.jsonl")
    assert Path(moved.video).resolve() == tmp_path / "a" / "clips" / "v.mp4" and replace(
        moved, video=""
    ) == replace(question, video="")


def test_a_video_is_found_from_a_folder_behind_links(tmp_path):
    """Both folders are links to others of other depths, and so is the video."""
    for name in ("deep/in/here/clips", "far/away"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "deep" / "store.mp4").write_text("film")
    (tmp_path / "deep" / "in" / "here" / "clips" / "v.mp4").symlink_to(tmp_path / "deep/store.mp4")
    (tmp_path / "clips").symlink_to(tmp_path / "deep" / "in" / "here" / "clips")
    (tmp_path / "out").symlink_to(tmp_path / "far" / "away")
    (tmp_path / "mine.jsonl").write_text(json.dumps(ROW | {"video": "clips/v.mp4"}) + "\n")
    (question,) = read_questions(tmp_path / "mine.jsonl")
    row = record_row(question, tmp_path / "out")
    assert row["video"] == "../../deep/in/here/clips/v.mp4"
    (tmp_path / "out" / "mine.jsonl").write_text(json.dumps(row) + "\n")
    (moved,) = read_questions(tmp_path / "out" / "mine.jsonl")
    assert Path(moved.video).read_text() == "film"


@pytest.mark.parametrize(
    "text, found",
    [
        ("85.5", 85.5),
        ("about 1,200 points", 1200),
        ("-3", -3),
        ("9 or 10", None),
        ("none", None),
        ("v2", None),
        ("3.5.1", None),
        ("score: 7.", 7),
    ],
)
def test_the_one_number_of_a_text(text, found):
    assert number(text) == found


@pytest.mark.parametrize(
    "text, found",
    [
        ("12.5-18", (12.5, 18)),
        ("from 3 s to 7.5 seconds", (3, 7.5)),
        ("00:12 – 01:18", (12, 78)),
        ("7-3", None),
        ("at 5", None),
        ("3-5 and 8-9", None),
    ],
)
def test_the_span_of_a_text(text, found):
    assert time_span(text) == found


def test_the_prompt_says_how_to_answer():
    span = Question("q", "v", "soccer", "recognition", "When?", (), "1-2", kind="span")
    assert (
        question_text(span, 50, 25.0)
        == "The video has 50 frames at 25 a second. When?\nAnswer with the first and the last second, such as 3.5-8."
    )
    assert (
        question_text(replace(span, kind="number", answer="3"), 50, 25.0)
        == "The video has 50 frames. When?\nAnswer with a number."
    )


def test_a_clip_is_a_part_of_its_video_with_frames_counted_from_its_start(arena_folder):
    path = read_questions(arena_folder / "rl.jsonl")[0].video
    whole = Video(path)
    part = Video(path, span_s=(2.0, 5.0))
    first = int(np.flatnonzero(whole.times_s >= 2.0)[0])
    assert (
        part.num_frames
        == int(((whole.times_s >= 2.0) & (whole.times_s <= 5.0)).sum())
        < whole.num_frames
    )
    assert part.times_s[0] == 0 and part.times_s[-1] <= 3.0
    indices = part.sample(4)
    assert torch.equal(part.frames(indices), whole.frames([first + i for i in indices]))
    with pytest.raises(VideoError, match="out of range"):
        part.frames([part.num_frames])
    with pytest.raises(
        VideoError, match="no frame between 900 s and 901 s; it shows frames from 0.00 s to"
    ):
        Video(path, span_s=(900, 901))
    encoder = FrameEncoder(None, ImageConfig())
    assert (
        encoder.open(Clip(path, (2.0, 5.0))).num_frames == part.num_frames
        and encoder.open(Clip(path)).num_frames == whole.num_frames
    )
