"""The adapters: synthetic entries in each data set's shape, with every quirk; what is malformed is
named, and nothing of it runs."""

import json
import re
import unicodedata
from collections import Counter
from dataclasses import asdict
from functools import partial
from importlib import import_module
from pathlib import Path

import numpy as np
import pytest

from data_prep import convert
from data_prep.sources.events import group_of
from data_prep.sources.finebadminton import _window
from data_prep.sources.finediving import _steps
from nanosport.env.scoring import accuracy
from nanosport.records import parse_question, read_questions
from nanosport.video import Video
from tests.helpers.clips import write
from tests.helpers.source_folders import (
    LATER_MATCH,
    MATCH,
    WRITE,
    by_id,
    events,
    facts_boxing,
    facts_fencing,
    finebadminton,
    finediving,
    osl,
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
        "qa-q10/0": "Goal",
        "qa-q10/1": "Foul",
        "qa-q10/2": "The keeper saves it",
        "qa-q12/0": "Corner",
        "qa-q14/0": "Foul",
    }
    assert found["qa-q14/0"].group == "mvfoul/test/action_1"
    assert (
        found["qa-q10/0"].group
        == f"soccer/england-epl-2014-2015/{'2015-02-21-18-00-chelsea-1-1-burnley'}"
    )
    assert found["qa-q12/0"].dimension == "commentary" and set(found["qa-q10/1"].options) == {
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
    assert all(len(q.options) == 8 for q in questions)
    assert ["class 'bow'", "class 'coun"] == [skip.why[:11] for skip in skips]
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
        "labels.csv line 7",
    ]
    for sign in ";\t":  # as spreadsheets write them too
        (tmp_path / "labels.csv").write_text(
            f"clip{sign}label\r\n0.mp4{sign}jab\r\n1.mp4{sign}left hook"
        )
        assert [right(q) for q in run("facts_boxing", tmp_path)[0]] == ["jab", "left hook"]
    (tmp_path / "labels.csv").write_text("clip|label\n0.mp4|jab\n")
    with pytest.raises(ValueError, match=r"labels.csv.*clip|label"):
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
    assert found["P01/short/round_01/suggestion/0/advice"].answer == "mind the waist"
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
        "not called after comments",
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
    assert [(q.kind, right(q), q.sport, q.group) for q in questions if "-train/" in q.id] == [
        ("choice", "yes", "volleyball", "sports_qa/-6Os86HzwCs"),
        ("choice", "no", "soccer", "sports_qa/-6Os86HzwCs"),
        ("number", "2", "gymnastics", "sports_qa/0LtLS9wROrk"),
        ("open", "a leap forward", "gymnastics", "sports_qa/0LtLS9wROrk"),
        ("number", "1", "gymnastics", "sports_qa/v_abcdefghi"),
    ]
    assert found["meta-train/0"].video.startswith("videos/volleyball/volleyball/") and found[
        "meta-train/2"
    ].video.startswith("videos/finegym_03/")
    assert (
        "meta-test/0" in found
        and "causal" in found["meta-train/1"].provenance
        and found["meta-train/1"].dimension == "rules"
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


# What real files have taught.


def test_sportu_as_it_is(tmp_path):
    touch(tmp_path, "hockey_16_1.mp4", "soccer_1.mp4")
    row = {"id": "hockey_16_1", "question": "How many?", "options": {"A": 4, "B": 6}, "answer": "B"}
    same = {"A": "red", "B": "blue", "C": "blue", "D": "green"}
    rows = [
        row,
        *(
            row | {"id": "soccer_1", "options": same, "answer": each, "question": each}
            for each in "ABCD"
        ),
    ]
    put(tmp_path, "SportU_Video_mc.json", rows)
    put(tmp_path, "SportU_text.json", [{"question": "Q", "Answer": "C", "Explanation": "E"}] * 3)
    questions, skips = run("sportu", tmp_path)
    assert [(q.sport, right(q), sorted(q.options)) for q in questions] == [
        ("ice hockey", "6", ["4", "6"]),
        ("soccer", "red", ["blue", "green", "red"]),
        ("soccer", "green", ["blue", "green", "red"]),
    ]
    whys = Counter(skip.why for skip in skips)
    assert whys == {
        "the question is about no video": 3,
        "options: another one says the same as the right one": 2,
    }


def test_soccerbenchs_form_with_objects(tmp_path):
    clip = "Dataset/video/SoccerNet/mvfouls/train/action_620/clip_1.mp4"
    touch(tmp_path, clip)
    four = {"O1": "No offence", "O2": "No card", "O3": "Yellow card", "O4": 4}
    row = {"Q": "Which decision?", "openA": "x", "closeA": "O2", **four}
    match = f"england_epl\\2014-2015\\{MATCH}"
    materials = [
        [{"path": clip, "context": match}], [{"path": clip, "context": None}], ["none"], [{"path": 3}], [{}], {},
        [clip, clip.replace("620", "621")], [{"path": "gone.mp4", "context": match}],
    ]  # fmt: skip
    put(
        tmp_path, "Database/Video/video_600.json", [row | {"materials": each} for each in materials]
    )
    questions, skips = run("soccerbench", tmp_path)
    group = "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    assert [q.group for q in questions] == [group, "mvfoul/train/action_620"]
    assert all(
        right(q) == "No card" and q.dimension == "rules" and "4" in q.options for q in questions
    )
    whys = [skip.why for skip in skips]
    assert len(whys) == 6 and sum("no video" in why for why in whys) == 2


def test_soccerbench_as_others_pack_it(tmp_path):
    """With the paths of the machine that it was packed on, and several views of one foul, which are
    MVFoul's test split; a challenge without its answers, pictures, and replays to compare."""
    clip = f"materials/q8/england_epl/2014-2015/{MATCH}/1_230.mp4"
    views = [f"materials/q14/action_105/clip_{k}.mp4" for k in range(3)]
    touch(tmp_path, clip, *views)
    row = {"Q": "Which?", "openA": "Goal", "closeA": "O2", "O1": "Corner", "O2": "Goal"}
    home = "/home/somebody/database/SoccerBench/"
    put(tmp_path, "qa/q8.json", [
        row | {"materials": [home + clip]}, row | {"materials": clip},
        row | {"materials": [home + clip], "closeA": "O8"},
        row | {"materials": [clip], "closeA": None}, row | {"materials": ["materials/q4/48/1.JPG"]},
    ])  # fmt: skip
    put(tmp_path, "qa/q9.json", [row | {"materials": [clip, clip.replace("230", "408")]}])
    put(tmp_path, "qa/q14.json", [row | {"materials": [home + view for view in views]}])
    questions, skips = run("soccerbench", tmp_path)
    match = "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    assert {q.id.removeprefix("soccerbench/"): (q.video, q.group) for q in questions} == {
        "qa-q8/0": (clip, match), "qa-q8/1": (clip, match),
        "qa-q14/0": (views[1], "mvfoul/test/action_105"),
    }  # fmt: skip
    wanted = ("'O8': must be one of", "closeA None", "a picture", "must name one video")
    assert all(words in skip.why for words, skip in zip(wanted, skips, strict=True))


def test_finediving_as_it_is(tmp_path):
    touch(tmp_path, "Trimmed/01/1/00001.jpg", "Trimmed/01/2/00001.jpg")
    failed = ["407c", 0.0, 3.2, np.array([2, 34]), np.array([4, 4, 25, 36])]
    zero = [failed[0], 50.0, 0.0, *failed[3:]]
    put(
        tmp_path,
        "fine-grained_annotation_aqa.pkl",
        {("01", 1): failed, ("01", 2): ["107b", *zero[1:]]},
    )
    tasks = {q.id.split("/")[-2] + q.id.split("/")[-1] for q in run("finediving", tmp_path)[0]}
    assert tasks == {"1code", "1difficulty", "1score", "2code", "2score"}
    put(tmp_path, "Sub_action_Types_Table.pkl", {4: "Inward", 25: "3.5 Soms.Tuck", 36: "Entry"})
    found = by_id(run("finediving", tmp_path)[0])
    assert found["01/1/score"].answer == "0.00"
    assert right(found["01/1/steps"]) == "Inward, then 3.5 Soms.Tuck, then Entry"


def test_finedivings_coarse_form(tmp_path):
    write(tmp_path / "final_1.mp4", 50)
    dive = {
        "action_type": "207c",
        "start_frame": np.int64(10),
        "end_frame": np.float32(35),
        "dive_score": 81.2,
        "difficulty": 3.3,
    }
    late = dive | {"action_type": "5253b", "end_frame": 99}
    dives = {("final_1", 1): dive, ("final_1", 2): late, ("gone", 1): dive}
    put(tmp_path, "FineDiving_coarse_annotation.pkl", dives)
    questions, skips = run("finediving", tmp_path)
    assert {q.id.split("/")[-1] for q in questions} == {"code", "difficulty", "score"}
    assert {q.span_s for q in questions} == {(1.0, 3.5)}
    assert len(skips) == 3 and any("frames 10 to 99" in skip.why for skip in skips)


def test_finebadmintons_strokes_without_a_start(tmp_path):
    finebadminton(tmp_path)
    rounds = json.loads((tmp_path / "rounds.json").read_text())
    strokes = rounds[0]["hitting"]
    strokes.append(
        {"start_frame": None, "hit_frame": 1095, "end_frame": None, "hitter": None, "hit_type": ""}
    )
    put(tmp_path, "rounds.json", rounds)
    before = [q.window for q in run("finebadminton", tmp_path)[0]]
    assert (50, 80) in before  # an annotator's mark is no stroke
    strokes[2] |= {"start_frame": None, "end_frame": None}
    put(tmp_path, "rounds.json", rounds)
    after = [q.window for q in run("finebadminton", tmp_path)[0]]
    # where only the hit of a stroke is known, it is the window
    assert after == [(60, 60) if window == (50, 80) else window for window in before]
    questions = json.loads((tmp_path / "questions.json").read_text())
    questions[0] |= {"temporal": "round count", "start_score": "6:14", "end_score": "8:15"}
    put(tmp_path, "questions.json", questions)
    found = run("finebadminton", tmp_path)[0]
    assert (
        found[0].dimension == "recognition"
        and found[0].window is None
        and len(found) == len(before)
    )


def test_ai4soccers_questions(tmp_path):
    match = "2017-08-12_watford-fc-liverpool-fc"
    place = f"england_epl_2017-2018/{match}"
    touch(tmp_path, f"{place}/1-half.mkv", f"{place}/2-half.mkv")
    comment = {"comments_type": "goal", "comments_text_anonymized": "[PLAYER] scores."}
    times = [(0.0, 1, "10:00"), (1, 1, "44:50"), ("2", 2, "12:00"), ([1], 1, "13:00")]
    comments = [comment | {"index": k, "half": h, "time_stamp": t} for k, h, t in times]
    put(
        tmp_path,
        f"Data/{match}/2017-08-12_Watford_3-3_Liverpool_x.json",
        {"match_info": {}, "comments": comments},
    )

    def asked(about, event, **more) -> dict:
        return {
            "question": "Who scored?", "choices": ["A. Okaka", "B. Mane"], "answer": "B", "type": about,
            "question_level": "player", "related_event_index": [1], "current_event_index": event,
        } | more  # fmt: skip

    rows = [
        asked("past", 1.0),
        asked("past", 2),
        asked("full", None),
        asked("future", 0),
        asked("past", 9),
    ]
    put(tmp_path, f"Full_QA/{match}.json", rows + [asked("past", 0, choices=["Okaka", "Mane"])])
    put(tmp_path, f"First_Half_QA/{match}.json", [asked("half", None)])
    put(tmp_path, "Full_QA/questions.json", [asked("past", 1)])
    put(tmp_path, "Demo/model_answers.json", {"corner": ["x"]})
    questions, skips = run("soccerreplay", tmp_path)
    found = {q.id.removeprefix("soccerreplay/").replace(f"-{match}", ""): q for q in questions}
    first, half = found["Full_QA/0"], found["First_Half_QA/0"]
    assert len(found) == 2 + 8 and right(first) == right(half) == "Mane"
    assert first.span_s == (0.0, 44 * 60 + 50 + 15) and half.span_s is None
    assert (
        first.video.endswith("1-half.mkv")
        and first.group == f"soccer/england-epl-2017-2018/{match.replace('_', '-')}"
    )
    whys = " | ".join(skip.why for skip in skips)
    assert len(skips) == 7 and "what will come" in whys and whys.count("both halves") == 2
    assert "no match" in whys and "choices" in whys and "no comments" in whys


def test_unisoccers_clips(tmp_path):
    clip = f"england_epl_2014-2015/{MATCH}/2_43_36.mp4"
    touch(tmp_path, clip)
    row = {"video": clip, "caption": "clearance", "comments_text_anonymized": "[PLAYER] clears."}
    rows = [
        row,
        row | {"caption": "show added time"},
        {"video": clip, "caption": "corner"},
        row | {"caption": "dance"},
    ]
    put(tmp_path, "MatchTime/classification_test.json", rows + [row | {"video": "a/b.mp4"}, 3])
    questions, skips = run("soccerreplay", tmp_path)
    assert [right(q) for q in questions if q.dimension == "recognition"] == [
        "clearance",
        "show added time",
        "corner",
    ]
    assert sum(q.dimension == "commentary" for q in questions) == 3 and len(skips) == 3
    assert {q.group for q in questions} == {
        "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    }
    assert {q.span_s for q in questions} == {None}


def test_osl(tmp_path):
    osl(tmp_path)
    questions, skips = run("osl", tmp_path)
    found = {q.id.removeprefix("osl/"): q for q in questions}
    foul, card = found["annotations/0/0"], found["annotations/0/severity"]
    assert (foul.answer, foul.also) == ("Yes, he trips him.", ("Yes.", "A clear foul."))
    assert accuracy("yes", foul) == accuracy("A clear foul", foul) == 1.0
    assert foul.video == "train/action_0/clip_1.mp4" and foul.group == "mvfoul/train/action_0"
    assert (foul.sport, foul.dimension, foul.kind) == ("soccer", "rules", "open")
    assert right(card) == "yellow card" and len(card.options) == 3
    none = found["annotations/2/0"]
    assert none.group == "soccer/england-epl-2014-2015/2015-02-21-18-00-chelsea-1-1-burnley"
    beam = found["old/0/0"]
    assert (beam.answer, beam.also, beam.sport) == ("A leap.", ("A jump.",), "gymnastics")
    spans = [found[f"old/0/caption{name}"].span_s for name in ("0", "_dense0", "_dense1")]
    assert spans == [None, (7.0, 17.0), (2.0, 4.0)] and len(found) == 7
    whys = " | ".join(skip.why for skip in skips)
    for words in ("one label", "none is given", "not below root", "inside the data set", "no video", "soon",
                  "no question, class", "must be an object", "question None"):  # fmt: skip
        assert words in whys, (words, whys)
    assert len(skips) == 10


def test_xfoul_reads_osl(tmp_path):
    osl(tmp_path)
    xfoul(tmp_path)
    questions, _ = run("xfoul", tmp_path)
    assert {q.source for q in questions} == {"xfoul"}
    assert sum(q.id.startswith("xfoul/annotations/") for q in questions) == 3
    assert sum(q.id.startswith("xfoul/xfoul_train/") for q in questions) == 2


def test_osl_events_have_true_windows(tmp_path):
    write(tmp_path / "clip.mp4", 100)
    heads = {"action": {"type": "single_label", "labels": ["pass", "shot", "save", "VT_0"]}}
    rows = [
        {"head": "action", "label": "pass", "position_ms": "1000"},
        {"head": "action", "label": "shot", "position_ms": 5000},
        {"head": "action", "label": "save", "position_ms": 99_000},
    ]
    sample = {"id": "a", "inputs": [{"type": "video", "path": "clip.mp4"}], "events": rows}
    put(
        tmp_path,
        "a.json",
        {
            "version": "2.0",
            "labels": heads,
            "data": [sample, sample | {"events": [{"label": "x"}]}],
        },
    )
    questions, skips = run("osl", tmp_path)
    assert [(q.kind, q.window) for q in questions] == [
        ("choice", (5, 15)), ("number", (5, 15)), ("choice", (45, 55)), ("number", (45, 55))
    ]  # fmt: skip
    assert [q.answer for q in questions if q.kind == "number"] == ["10", "50"] and len(skips) == 2
    assert "99000: the video ends at 10.00 s" in skips[0].why


def test_osl_classes_that_nobody_could_see_are_skipped(tmp_path):
    """As in SoccerNet's own foul files: not annotated, or a number in the place of a class."""
    touch(tmp_path, "test/action_0/clip_0.mp4")
    heads = {name: {"type": "single_label", "labels": labels} for name, labels in (
        ("handball", ["Handball", "No handball", "Unknown"]), ("offence", ["0", "1", "2"]),
        ("touch_ball", ["No", "Unknown", "Yes"]),
    )}  # fmt: skip
    values = {"handball": "No handball", "offence": "1", "touch_ball": "Unknown"}
    view = {"id": "test_action_0_view00", "inputs": [{"path": "test/action_0/clip_0.mp4"}]}
    labels = {head: {"label": label, "manual": True} for head, label in values.items()}
    put(tmp_path, "mv_foul_test.json", {"labels": heads, "data": [view | {"labels": labels}]})
    (question,), skips = run("osl", tmp_path)
    assert set(question.options) == {"Handball", "No handball"} and question.sport == "soccer"
    assert question.group == "mvfoul/test/action_0" and right(question) == "No handball"
    assert [skip.why for skip in skips] == [
        "offence '1': is a number, and no class that can be seen",
        "touch_ball 'Unknown': is not annotated",
    ]


def test_osl_questions_of_a_moment_show_what_was_before_it(tmp_path):
    touch(tmp_path, "clip.mp4")
    offered = [{"id": "o1", "text": "The red one"}, {"id": "o2", "text": "The blue one"}]
    row = {"id": "q1", "position_ms": 5000, "question": "Who served?", "options": offered,
           "correct_option_id": "o2"}  # fmt: skip
    rows = [row, row | {"correct_option_id": "o3"}, row | {"options": "o1"}]
    sample = {"id": "a", "inputs": [{"type": "video", "path": "clip.mp4"}], "streaming_vqa": rows}
    put(tmp_path, "a.json", {"version": "2.0", "data": [sample]})
    (question,), skips = run("osl", tmp_path)
    assert question.span_s == (0.0, 5.0) and right(question) == "The blue one" and len(skips) == 2


def test_osl_events_of_a_whole_match_are_asked_about_in_parts(tmp_path):
    """Nobody counts the 1,234th pass of a match."""
    write(tmp_path / "224p.mp4", 700)  # 70 s
    heads = {"ball": {"type": "single_label", "labels": ["PASS", "DRIVE", "SHOT"]}}
    rows = [{"head": "ball", "label": label, "position_ms": str(at)} for label, at in (
        ("PASS", 1000), ("DRIVE", 31_000), ("PASS", 32_000), ("SHOT", 69_000),
    )]  # fmt: skip
    sample = {"inputs": [{"type": "video", "path": "224p.mp4", "fps": 10.0}], "events": rows}
    put(tmp_path, "annotations-test.json", {"labels": heads, "data": [sample]})
    questions, skips = run("osl", tmp_path)
    whens = [q for q in questions if q.kind == "number"]
    assert not skips and [q.answer for q in whens] == ["10", "10", "20", "90"]
    assert [q.span_s for q in whens] == [(0.0, 29.9), (30.0, 59.9), (30.0, 59.9), (60.0, 69.9)]
    part = Video(str(tmp_path / "224p.mp4"), span_s=whens[1].span_s)
    assert part.num_frames == 300 and whens[1].window == (5, 15)


def test_events(tmp_path):
    events(tmp_path)
    questions, skips = run("events", tmp_path)
    rally = [q for q in questions if "f3set-tennis-train/0/" in q.id]
    whats = [q for q in rally if q.id.endswith("what")]
    assert [right(q) for q in whats] == [
        "far ad serve down the T in", "near deuce return forehand groundstroke cross-court in",
        "far ad stroke backhand groundstroke cross-court in", "near deuce stroke forehand groundstroke down the line winner",
        "far ad stroke backhand groundstroke cross-court in",
    ]  # fmt: skip
    assert [q.window for q in whats] == [(0, 22), (18, 42), (38, 62), (58, 82), (78, 102)]
    whens = [q for q in rally if q.id.endswith("when")]
    assert [q.answer for q in whens] == ["10", "30", "70"]  # what comes twice has no one time
    assert all(
        accuracy(q.answer, q) == 1.0 and f"{int(q.tolerance)} frames" in q.question for q in whens
    )
    assert accuracy("36", whens[1]) == 1.0 and accuracy("37", whens[1]) == 0.0
    assert {q.sport for q in questions} == {"tennis", "diving", "gymnastics"}
    groups = {
        "events/tennis/20210909-W-US_Open-SF-A_B-C_D",
        "finediving/01",
        "sports_qa/0LtLS9wROrk",
    }
    assert {q.group for q in questions} == groups
    dive = [q for q in questions if q.sport == "diving" and q.kind == "number"]
    assert [q.answer for q in dive] == ["2", "34"]  # in the order of the frames
    assert any(
        q.id.endswith("train/2/1/what") for q in questions
    )  # the one behind the end is left out
    whys = " | ".join(skip.why for skip in skips)
    for words in (
        "not below root",
        "the clip has 300",
        "frame None",
        "inside the data set",
        "num_frames None",
        "object",
    ):
        assert words in whys, (words, whys)


@pytest.mark.parametrize("suffix, fps", [("", 29.0), (".mp4", "29.0")])
def test_events_of_a_part_of_a_whole_video(tmp_path, suffix, fps):
    write(tmp_path / "final.mp4", 100)
    row = {"video": f"final_25_75{suffix}", "fps": fps, "num_frames": 50}
    rows = [{"frame": 10, "label": "serve"}, {"frame": 30, "label": "swing"}]
    put(
        tmp_path,
        "tennis/test.json",
        [
            row | {"events": rows},
            row | {"video": f"final_25_175{suffix}", "events": rows},
            row | {"fps": "fast", "events": rows},
        ],
    )
    questions, skips = run("events", tmp_path)
    assert {q.span_s for q in questions} == {(2.5, 7.4)} and len(questions) == 4
    assert {q.group for q in questions} == {"events/tennis/final"}
    assert group_of("x\\01__1.MP4", "diving") == "finediving/01"
    part = Video(str(tmp_path / "final.mp4"), span_s=questions[0].span_s)
    assert part.num_frames == 50 and questions[0].window == (0, 24)
    assert len(skips) == 2 and "frames 25 to 174" in skips[0].why and "fps 'fast'" in skips[1].why


def test_xfoul_as_it_is(tmp_path):
    """The folders of splits name a resolution too, and each referee has an answer."""
    touch(tmp_path, "mvfouls/train_720p/action_0/clip_0.mp4")
    action = {
        "UrlLocal": f"england_epl\\2014-2015\\{MATCH}", "Severity": 3.0,
        "Clips": [{"Url": "Dataset/Train/action_0/clip_0"}],
    }  # fmt: skip
    put(tmp_path, "mvfouls/train_720p/annotations.json", {"Actions": {"0": action}})
    put(tmp_path, "mvfouls/test_720p/annotations.json", {"Set": "test", "Actions": {}})
    row = {"path": "train\\action_0", "question": "A foul?", "answer": "Yes."}
    asked = [row, row | {"question": "Why?"}, row | {"answer": "A clear foul."}, row]
    put(tmp_path, "xfoul.json", asked)
    questions, skips = run("xfoul", tmp_path)
    found = by_id(questions)
    assert right(found.pop("train/action_0/severity")) == "a yellow card"
    assert {id: (q.answer, q.also) for id, q in found.items()} == {
        "xfoul/0": ("Yes.", ("A clear foul.",)), "xfoul/1": ("Yes.", ())
    }  # fmt: skip
    assert [skip.where for skip in skips if "another entry has both" in skip.why] == [
        "xfoul.json 3"
    ]


def osl_sample(**more) -> dict:
    heads = {"action": {"type": "single_label", "labels": ["Goal", "Foul"]}}
    inputs = [{"type": "video", "path": "München.mp4"}]
    return {"data": [{"id": "a", "inputs": inputs} | more], "labels": heads}


VIEWS = [f"x/train/action_1/clip_{k}.mp4" for k in range(2)]
STROKE = {"video_id": "1.mp4", "start_frame": 0, "end_frame": 9, "temporal": "hitting count",
    "question": {"question_en": "How many?"}, "options_en": ["A. 1", "B. 2"], "question_id": "q"}  # fmt: skip
BENCH = {"Q": "How many?", "materials": VIEWS[1:], "closeA": "O1", "O1": 0, "O2": 1}
PLAY = {"id": "soccer_1_0", "question": "How many?", "options": {"A": 1, "B": 2}, "answer": 2}
BALL, REPORT = "v_abcdefghijk_c001_01", {"video": "a", "question": "How many?", "sport": "soccer"}
THEN = {"question": "Scored?", "position_ms": 1000}
FORMS = {  # source, file, what it holds, the first question's answer
    "a zero": ("soccerbench", "v.json", [BENCH], "0"),
    "two views as objects": ("soccerbench", "v.json",
        [BENCH | {"materials": [{"path": path, "context": ""} for path in VIEWS]}], "0"),
    "backslashes": ("soccerbench", "v.json",
        [BENCH | {"materials": [VIEWS[1].replace("/", "\\")]}], "0"),
    "options that are not there": ("sportu", "SportU_Video_mc.json",
        [PLAY | {"options": PLAY["options"] | {"C": None, "D": " "}}], "2"),
    "numbers with a point": ("sports_qa", "train.json", [{"qa_id": 1.0, "type": "causal",
        "video": f"Football\\{BALL}.mp4", "question": "How many?", "answer": 2.0}], "2"),
    "options of numbers": ("sportr", "a.json", [REPORT | {"options": [1, 2], "answer": 2}], "2"),
    "a first entry without an answer": ("sportr", "a.json", [REPORT, REPORT | {"answer": 3}], "3"),
    "no local video": ("finebadminton", "q.json",
        [STROKE | {"local_video": None, "answer": "(B) 2"}], "2"),
    "a half with a point": ("soccerreplay", f"{LATER_MATCH}.json",
        {"comments": [{"half": 1.0, "time_stamp": "10:00", "comments_type": "corner"}]}, "corner"),
    "ids of numbers": ("osl", "a.json", osl_sample(streaming_vqa=[THEN | {"correct_option_id": 0,
        "options": [{"id": 0, "text": "yes"}, {"id": 1, "text": "no"}]}]), "yes"),
    "options without ids": ("osl", "a.json", osl_sample(streaming_vqa=[
        THEN | {"correct_option_id": "yes", "options": ["yes", "no"]}]), "yes"),
    "a label in small letters": ("osl", "a.json",
        osl_sample(labels={"action": {"label": "goal"}}), "Goal"),
    "no start": ("osl", "a.json", osl_sample(dense_captions=[
        {"text": "He falls.", "start_ms": None, "position_ms": "1000"}]), "He falls."),
}  # fmt: skip


@pytest.mark.parametrize("form", FORMS)
def test_forms_that_other_hands_give_a_file(tmp_path, form):
    source, path, data, answer = FORMS[form]
    half = f"italy_serie-a_2020-2021/{LATER_MATCH}/1-half.mkv"
    touch(tmp_path, VIEWS[1], f"{BALL}.mp4", half, "soccer_1_0.mp4", "a.mp4", "q.mp4")
    touch(tmp_path, unicodedata.normalize("NFD", "München.mp4"))
    put(tmp_path, path, data)
    questions, skips = run(source, tmp_path)
    assert right(questions[0]) == answer, skips


def test_members_that_are_empty_or_come_twice_are_no_fault(tmp_path):
    put(tmp_path, "empty.json", {"data": []})
    touch(tmp_path, "twice.json")
    (tmp_path / "twice.json").write_text(
        '{"questions": null, "questions": [{"id": 1}], "data": []}'
    )
    assert run("osl", tmp_path) == ([], [])
