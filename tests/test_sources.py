"""The adapters: synthetic entries in each data set's shape, with every quirk; what is malformed is
named, and nothing of it runs."""

import json
import re
from collections import Counter
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

import pytest

from data_prep import convert
from data_prep.sources.finebadminton import _window
from data_prep.sources.finediving import _steps
from nanosport.records import parse_question, read_questions
from nanosport.video import Video
from tests.helpers.source_folders import (
    MATCH,
    WRITE,
    by_id,
    facts_boxing,
    facts_fencing,
    finebadminton,
    finediving,
    put,
    right,
    run,
    soccerbench,
    soccerreplay,
    sportr,
    sports_qa,
    sportu,
    t3set,
    touch,
    xfoul,
)

ROOT = Path(__file__).parents[1]
FINEBADMINTON = ROOT.parent / "shared" / "data" / "finebadminton"


@pytest.fixture(params=convert.source_names())
def source(request, tmp_path) -> tuple[str, Path]:
    WRITE[request.param](tmp_path / "data")
    return request.param, tmp_path / "data"


def test_every_record_of_every_source_survives_a_round_trip(source):
    name, root = source
    questions, skips = run(name, root)
    module = import_module(f"data_prep.sources.{name}")
    assert questions and module.SOURCE == name and module.LICENCE
    assert len({q.id for q in questions}) == len(questions)
    for question in questions:
        assert parse_question(json.loads(json.dumps(asdict(question)))) == question
        assert (
            question.id.startswith(f"{name}/")
            and question.source == name
            and question.licence == module.LICENCE
            and question.provenance
        )
        assert (
            question.answer
            and question.question
            and (root / question.video).exists()
            and not question.video.startswith("/")
        )
        assert question.options == () or right(question)
    assert all(skip.where and skip.why for skip in skips)
    assert not any("passwd" in q.video for q in questions)


def test_the_seed_decides_and_nothing_else(source):
    name, root = source
    first, again, other = (
        run(name, root),
        run(name, root),
        [run(name, root, seed)[0] for seed in range(1, 5)],
    )
    assert first == again
    for questions in other:
        assert [(q.id, q.video, q.group) for q in questions] == [
            (q.id, q.video, q.group) for q in first[0]
        ]
    if any(q.options for q in first[0]):
        assert any(
            [q.options for q in questions] != [q.options for q in first[0]] for questions in other
        )


def test_each_source_has_a_fixture():
    assert set(WRITE) == set(convert.source_names())


def test_soccerbench(tmp_path):
    soccerbench(tmp_path)
    questions, skips = run("soccerbench", tmp_path)
    found = by_id(questions)
    assert {id: right(q) for id, q in found.items()} == {
        "q10/0": "Goal",
        "q10/1": "Foul",
        "q10/2": "The keeper saves it",
        "q12/0": "Corner",
        "q14/0": "Foul",
    }
    assert found["q14/0"].group == "mvfoul/test/action_1"
    assert (
        found["q10/0"].group
        == f"soccer/england-epl-2014-2015/{'2015-02-21-18-00-chelsea-1-1-burnley'}"
    )
    assert found["q12/0"].dimension == "commentary" and set(found["q10/1"].options) == {
        "Corner",
        "Goal",
        "Foul",
    }
    reasons = {skip.where.split()[-1]: skip.why for skip in skips}
    assert set(reasons) == {"3", "4", "5", "6", "7", "8"}
    assert (
        "Nobody knows" in reasons["3"]
        and "no video" in reasons["4"]
        and "one video" in reasons["5"]
        and "match" in reasons["7"]
    )


def test_soccerbench_and_soccerreplay_name_a_match_alike(tmp_path):
    soccerbench(tmp_path / "a")
    soccerreplay(tmp_path / "b")
    train, test = (
        {q.group for q in run(name, tmp_path / place)[0]}
        for name, place in (("soccerreplay", "b"), ("soccerbench", "a"))
    )
    assert train == test - {"mvfoul/test/action_1"} and len(train) == 2


def test_a_position_that_is_always_right_is_no_longer(tmp_path):
    clip = f"materials/q10/x/england_epl_2014-2015/{MATCH}/1_05_32.mp4"
    touch(tmp_path, clip)
    entries = [
        {
            "Q": f"Q{n}?",
            "materials": [clip],
            "closeA": "O3",
            "O1": "a",
            "O2": "b",
            "O3": "c",
            "O4": "d",
        }
        for n in range(400)
    ]
    put(tmp_path, "qa/q10.json", entries)
    questions, _ = run("soccerbench", tmp_path)
    counts = Counter(q.answer for q in questions)
    assert len(questions) == 400 and all(right(q) == "c" for q in questions)
    assert set(counts) == set("ABCD") and all(
        65 <= count <= 135 for count in counts.values()
    )  # 100 ± 4 standard deviations


def test_soccerreplay(tmp_path):
    soccerreplay(tmp_path)
    questions, skips = run("soccerreplay", tmp_path)
    found = {
        re.sub(r".*/(\d+/\w+)$", r"\1", id): q
        for id, q in by_id(questions).items()
        if "italy" in id
    }
    events = [right(found[f"{n}/event"]) for n in range(6)]
    assert events == ["offside"] * 2 + ["foul without card"] * 2 + ["start of half"] * 2
    assert [found[f"{n}/event"].span_s for n in (0, 1, 2)] == [
        (0.0, 20.0),
        (735.0, 765.0),
        (2685.0, 2715.0),
    ]
    assert found["0/event"].video.endswith("1-half.mkv") and found["2/event"].video.endswith(
        "2-half.mkv"
    )
    assert (
        found["6/commentary"].answer == "[PLAYER] ([TEAM]) shoots."
        and found["6/commentary"].dimension == "commentary"
    )
    assert (
        "6/event" not in found
        and "7/event" not in found
        and "8/commentary" not in found
        and "8/event" in found
    )
    assert [q for q in questions if "england" in q.group and right(q) == "saved by goalkeeper"]
    assert (
        len(skips) == 6 and len({q.question for q in questions if q.dimension == "commentary"}) > 1
    )


def test_xfoul(tmp_path):
    xfoul(tmp_path)
    questions, skips = run("xfoul", tmp_path)
    found = by_id(questions)
    assert {id.split("/")[-1]: right(q) for id, q in found.items() if id.startswith("train/action_0/")} == {
        "offence": "a foul", "severity": "a yellow card", "action_class": "standing tackling", "contact": "yes",
        "bodypart": "the lower body", "try_to_play": "yes", "touch_ball": "it cannot be told", "handball": "no",
    }  # fmt: skip
    assert (
        found["train/action_0/severity"].video == "train/action_0/clip_1.mp4"
        and len(found["train/action_0/severity"].options) == 5
    )
    assert (
        found["train/action_1/offence"].video == "train/action_1/clip_0.mp4"
        and right(found["train/action_1/offence"]) == "no foul"
    )
    assert {q.group for q in questions} == {
        "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    }
    assert [id for id in found if id.startswith("xfoul_train")] == [
        "xfoul_train/0",
        "xfoul_train/1",
    ]
    assert (
        found["xfoul_train/0"].kind == "open"
        and found["xfoul_train/1"].video == "train/action_1/clip_0.mp4"
    )
    whys = " | ".join(skip.why for skip in skips)
    assert (
        len(skips) == 8
        and "Severity: not annotated" in whys
        and "'ballet'" in whys
        and "somewhere" in whys
        and "valid" in whys
    )


def test_finediving(tmp_path):
    finediving(tmp_path)
    questions, skips = run("finediving", tmp_path)
    found = by_id(questions)
    assert right(found["Rome_10m/0/code"]) == "407c" and right(found["Rome_10m/1/code"]) == "5253b"
    assert (
        right(found["Rome_10m/0/steps"]) == "Back, then 2 Soms.Tuck, then Entry"
        and len(found["Rome_10m/0/steps"].options) == 4
    )
    score, difficulty = found["Rome_10m/0/score"], found["Rome_10m/0/difficulty"]
    assert (score.kind, score.answer, score.tolerance) == (
        "number",
        "76.80",
        5.0,
    ) and "5" in score.question
    assert (difficulty.kind, difficulty.answer, difficulty.tolerance) == (
        "number",
        "3.20",
        0.2,
    ) and "0.2" in difficulty.question
    assert found["Rome_10m/0/code"].video == "Trimmed/Rome_10m/0" and {
        q.group for q in questions
    } == {"finediving/Rome_10m"}
    assert (
        "official train" in score.provenance
        and "official test" in found["Rome_10m/1/score"].provenance
    )
    assert not any("/2/" in id or "/8/" in id or "000x" in q.options for id, q in found.items())
    assert (
        len(skips) == 1 + 4 + 1 + 1 + 1
    )  # no names of steps; all of entry 2; no frames; a path; a key


def test_a_part_of_a_dive_may_come_again():
    names = {"1": "Forward", "2": "1.5 Soms.Pike", "9": "Entry"}
    assert _steps([1, 1, 2, 2, 1, 9], names) == ["Forward", "1.5 Soms.Pike", "Forward", "Entry"]


def test_facts_fencing(tmp_path):
    facts_fencing(tmp_path)
    questions, skips = run("facts_fencing", tmp_path)
    found = {id.split("/", 1)[1]: right(q) for id, q in by_id(questions).items()}
    assert found == {
        "left_attack/001.mp4": "attack by the left fencer",
        "Counter-Attack Right/001.mp4": "counter-attack by the right fencer",
        "riposte_LEFT/002.avi": "riposte by the left fencer",
    }
    assert (
        all(len(q.options) == 8 for q in questions) and len(skips) == 1 and "'bow'" in skips[0].why
    )
    (tmp_path / "labels.csv").write_text("video,label\nclips/bow/3.mp4,remise right\n")
    assert [right(q) for q in run("facts_fencing", tmp_path)[0]] == ["remise by the right fencer"]


def test_facts_boxing(tmp_path):
    facts_boxing(tmp_path)
    questions, skips = run("facts_boxing", tmp_path)
    assert [(q.video, right(q)) for q in questions] == [
        ("videos/0.mp4", "left jab"),
        ("videos/1.mp4", "right hook"),
    ]
    assert [skip.where for skip in skips] == [
        "labels.csv line 4",
        "labels.csv line 5",
        "labels.csv line 6",
    ]
    (tmp_path / "labels.csv").write_text("clip;label\n0.mp4;jab\n")
    with pytest.raises(ValueError, match=r"labels.csv.*clip;label"):
        run("facts_boxing", tmp_path)


def test_t3set(tmp_path):
    t3set(tmp_path)
    questions, skips = run("t3set", tmp_path)
    found = by_id(questions)
    live = "P01/topspin/round_00/coach_suggestions/live_comments/coach_comment_1"
    assert found[f"{live}/0/advice"].span_s == (7.5, 14.25) and found[
        f"{live}/1/advice"
    ].span_s == (0.0, 14.25)
    assert (
        found[f"{live}/0/advice"].answer == "mind the right_wrist"
        and "topspin" in found[f"{live}/0/advice"].question
    )
    assert found[f"{live}/2/advice"].provenance.endswith("index 7") and found[
        f"{live}/0/advice"
    ].provenance.endswith("index 1")
    summary = found[
        "P01/topspin/round_00/coach_suggestions/summary_suggestions/coach_comment_2/0/advice"
    ]
    assert summary.span_s is None and summary.video.endswith("remote/b.mp4")
    wrist = found["P01/topspin/round_00/right_wrist/key"]
    assert right(wrist) == "right wrist" and not {
        "waist",
        "backswing of racket",
        "left foot",
    } & set(wrist.options)
    assert right(found["P01/topspin/round_00/right_wrist/type"]) == "where it is or how it moves"
    assert "P01/topspin/round_00/waist/type" not in found, "two faults were named: neither is wrong"
    assert found["P01/short/round_01/grip_of_racket/key"].video.endswith("right/c.mp4")
    assert {q.group for q in questions} == {"t3set/P01"} and {q.dimension for q in questions} == {
        "assessment"
    }
    whys = " | ".join(skip.why for skip in skips)
    for word in (
        "'tail'",
        "comment_en",
        "'noon'",
        "before start",
        "'whispered'",
        "NoneType",
        "no video",
    ):
        assert word in whys


def test_sportu(tmp_path):
    sportu(tmp_path)
    questions, skips = run("sportu", tmp_path)
    assert [(q.sport, q.dimension, q.group, right(q)) for q in questions] == [
        ("soccer", "recognition", "sportu/soccer_3", "Soccer"),
        ("soccer", "rules", "sportu/soccer_3", "No"),
        ("soccer", "rules", "sportu/soccer_3", "Yes"),
        ("badminton", "assessment", "sportu/badminton_1", "Yes"),
        ("american football", "rules", "sportu/american_football_8", "He moves too early."),
    ]
    assert (
        questions[0].options[3] == "None of the above"
        and questions[3].video == "Badminton/badminton_1.MP4"
    )
    assert len(skips) == 7 and questions[4].kind == "open"
    assert (
        len({q.id for q in questions}) == len(questions)
        and "/mc/" in questions[0].id
        and "/oe/" in questions[4].id
    )


def test_sports_qa(tmp_path):
    sports_qa(tmp_path)
    questions, skips = run("sports_qa", tmp_path)
    found = by_id(questions)
    assert [(q.kind, right(q), q.sport, q.group) for q in questions if "/train/" in q.id] == [
        ("choice", "yes", "volleyball", "sports_qa/-6Os86HzwCs"),
        ("choice", "no", "soccer", "sports_qa/-6Os86HzwCs"),
        ("number", "2", "gymnastics", "sports_qa/0LtLS9wROrk"),
        ("open", "a leap forward", "gymnastics", "sports_qa/0LtLS9wROrk"),
        ("number", "1", "gymnastics", "sports_qa/v_abcdefghi"),
    ]
    assert found["train/0"].video.startswith("videos/volleyball/volleyball/") and found[
        "train/2"
    ].video.startswith("videos/finegym_03/")
    assert (
        "test/0" in found
        and "causal" in found["train/1"].provenance
        and found["train/1"].dimension == "rules"
    )
    assert len(skips) == 7


def test_sportr(tmp_path):
    sportr(tmp_path)
    questions, skips = run("sportr", tmp_path)
    assert [(q.kind, right(q), q.sport, q.dimension) for q in questions] == [
        ("choice", "Hooking", "ice hockey", "rules"),
        ("span", "1.5-3", "badminton", "recognition"),
        ("open", "Go to the net.", "badminton", "assessment"),
    ]
    assert len(skips) == 3
    put(tmp_path, "other.json", [{"clip": "a", "inquiry": "Who?", "reply": "He."}])
    with pytest.raises(ValueError, match=r"other.json.*question among clip, inquiry, reply.*NAMES"):
        run("sportr", tmp_path)


def test_finebadminton(tmp_path):
    finebadminton(tmp_path)
    questions, skips = run("finebadminton", tmp_path)
    windows = [(q.provenance.split(": ")[1].split(",")[0], q.window) for q in questions]
    assert windows == [
        ("action classification", (50, 80)),  # the last of the player at the top
        ("action prediction", (80, 99)),  # of the one at the bottom, cut at the clip's end
        ("action localization", (20, 50)),  # the second, as the answer says
        ("round comment", None),
        ("hitting comment", (50, 69)),  # of a later clip: whoever's it is
        ("hitting comment", None),  # a match without rounds
    ]
    assert {right(q) for q in questions} == {"2"} and {q.group for q in questions} == {
        "finebadminton/0011",
        "finebadminton/0099",
    }
    assert {q.video for q in questions} <= {
        p.relative_to(tmp_path).as_posix() for p in tmp_path.glob("video/*.mp4")
    }
    assert len(skips) == 7  # six questions and a round


def test_a_stroke_that_cannot_be_read_leaves_no_window(tmp_path):
    """The others would be counted as if it were not there."""
    finebadminton(tmp_path)
    whole = [q.window for q in run("finebadminton", tmp_path)[0]]
    for path in tmp_path.glob("*.json"):
        entries = json.loads(path.read_text())
        for entry in entries if isinstance(entries, list) else []:
            if (
                isinstance(entry, dict)
                and isinstance(entry.get("hitting"), list)
                and len(entry["hitting"]) > 1
            ):
                entry["hitting"][-1]["hit_frame"] = None
        path.write_text(json.dumps(entries))
    damaged, _ = run("finebadminton", tmp_path)
    assert any(whole) and not any(q.window for q in damaged) and len(damaged) == len(whole)


def test_the_players_stroke_or_none():
    strokes = {(10, 12, 20): "top", (20, 25, 30): "bottom"}
    ask = partial(_window, strokes, 0, 40, "hitting comment")
    assert ask("What does the top player do?", "A") == (10, 20) and ask("What happens?", "A") == (
        20,
        30,
    )
    assert (
        _window(
            {(10, 12, 20): "top"}, 0, 40, "hitting comment", "What does the bottom player do?", "A"
        )
        is None
    )


@pytest.mark.skipif(not FINEBADMINTON.exists(), reason="needs the shared FineBadminton sample")
def test_finebadminton_as_it_is(tmp_path):
    convert.main(convert.Config("finebadminton", FINEBADMINTON, tmp_path / "out.jsonl"))
    questions = read_questions(tmp_path / "out.jsonl")
    entries = json.loads((FINEBADMINTON / "questions.json").read_bytes())
    assert len(questions) == len(entries) == 17
    for question, entry in zip(questions, entries):
        assert (
            right(question) == next(o for o in entry["options_en"] if o[0] == entry["answer"])[3:]
        )
        assert question.window is None, "its rounds are not in the sample"
    assert (
        Video(questions[0].video).num_frames
        == entries[0]["end_frame"] - entries[0]["start_frame"] + 1
    )

    match = json.loads((FINEBADMINTON / "rounds_en.first10.json").read_bytes())[0]
    asked = entries[0] | {
        "video_id": "0011.mp4",
        "start_frame": match["start_frame"],
        "end_frame": match["end_frame"],
    }
    put(tmp_path, "data/rounds.json", [match])
    put(tmp_path, "data/questions.json", [asked])
    touch(tmp_path, f"data/{asked['local_video']}")
    (question,), _ = run("finebadminton", tmp_path / "data")
    last = [stroke for stroke in match["hitting"] if stroke["hitter"] == "top"][-1]
    assert question.window == (
        last["start_frame"] - match["start_frame"],
        last["end_frame"] - match["start_frame"],
    )
