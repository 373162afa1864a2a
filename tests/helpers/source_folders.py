"""Folders in each data set's shape, of synthetic entries with every quirk: WRITE[source](root)."""

import json
import pickle
from pathlib import Path

import numpy as np

from data_prep.sources import Skip, records_of
from nanosport.records import Question

MATCH = "2015-02-21 - 18-00 Chelsea 1 - 1 Burnley"
LATER_MATCH = "2021-02-06_genoa-cfc-ssc-napoli-serie-a-2020-2021"


def touch(root: Path, *paths: str) -> None:
    for path in paths:
        (root / path).parent.mkdir(parents=True, exist_ok=True)
        (root / path).touch()


def put(root: Path, path: str, data) -> None:
    touch(root, path)
    (root / path).write_bytes(
        pickle.dumps(data)
        if path.endswith(".pkl")
        else json.dumps(data, ensure_ascii=False).encode()
    )


def run(source: str, root: Path, seed: int = 0) -> tuple[list[Question], list[Skip]]:
    items = list(records_of(source, root, seed))
    assert all(isinstance(item, Question | Skip) for item in items)
    return [i for i in items if isinstance(i, Question)], [i for i in items if isinstance(i, Skip)]


def right(question: Question) -> str:
    return (
        question.options["ABCDEFGHIJ".index(question.answer)]
        if question.options
        else question.answer
    )


def by_id(questions: list[Question]) -> dict[str, Question]:
    assert len({q.id for q in questions}) == len(questions)
    return {q.id.split("/", 1)[1]: q for q in questions}


# fmt: off
def soccerbench(root: Path) -> None:
    clip = f"materials/q10/SoccerNet-v2/england_epl_2014-2015/{MATCH}/1_05_32.mp4"
    other = f"materials/q12/SoccerReplay-1988/italy_serie-a_2020-2021/{LATER_MATCH}/2_19_01.mp4"
    foul = "materials/q14/MVFouls/test/action_1/clip_0.mp4"
    touch(root, clip, other, foul, "materials/q14/somewhere/clip_0.mp4")
    four = {"O1": "Corner", "O2": "Goal", "O3": "Foul", "O4": "Offside"}
    entries = [
        {"Q": "Which event is shown?", "materials": [clip], "openA": "A goal.", "closeA": "O2", **four},
        {"Q": "With gaps?", "materials": [clip], "openA": "", "closeA": "O7", "O1": "Corner", "O4": "Goal", "O7": "Foul",
            "O9": None},
        {"Q": "In a sentence?", "materials": [clip], "openA": "", "closeA": "The keeper saves it.", "O1": "It is a goal.",
            "O2": "The keeper saves it"},
        {"Q": "An unknown sentence?", "materials": [clip], "openA": "", "closeA": "Nobody knows.", **four},
        {"Q": "No video?", "materials": None, "openA": "", "closeA": "O1", **four},
        {"Q": "Which of these is the replay?", "materials": [clip, other], "openA": "", "closeA": "O1", **four},
        {"Q": "Out?", "materials": ["../../etc/passwd"], "openA": "", "closeA": "O1", **four},
        {"Q": "Whose match?", "materials": ["materials/q14/somewhere/clip_0.mp4"], "closeA": "O1", **four},
        "not an object",
    ]
    put(root, "qa/q10.json", entries)
    put(root, "qa/q12.json", [{"Q": "Who scores?", "materials": [other], "openA": "x", "closeA": "O1", **four}])
    put(root, "qa/q14.json", [{"Q": "Is it a foul?", "materials": [foul], "openA": "x", "closeA": "O3", **four}])
    put(root, "qa/q2.json", [{"Q": "Not about a video", "materials": None, "closeA": "O3", **four}])


def soccerreplay(root: Path) -> None:
    place = f"italy_serie-a_2020-2021/{LATER_MATCH}"
    touch(root, f"{place}/1-half.mkv", f"{place}/2-half.mkv", f"england_epl_2014-2015/{MATCH}/1-half.mkv")

    def comment(half, time, kind, text="[PLAYER] ([TEAM]) shoots.") -> dict:
        return {"half": half, "time_stamp": time, "comments_type": kind, "comments_text": "Smith", "comments_text_anonymized": text}

    comments = [
        comment(1, "00:05", "off side"),
        comment(1, "12:30", "off-side"),
        comment("2", "45:00", "foul with no card"),
        comment(2, "46:10", "foul (no card)"),
        comment(2, "00:00", "start of half game"),
        comment(2, "00:01", "start of game (half)"),
        comment(2, "10:00", "statistics and summary"),
        comment(2, "11:00", "moon landing"),
        comment(2, "12:00", "goal", ""),
        comment(3, "12:00", "goal"),
        comment(1, "half past", "goal"),
        17,
    ]
    put(root, f"{place}/match.json", {"match_info": {}, "referee_data": {}, "players_data": {}, "comments": comments})
    older = {"match_information": {}, "event_descriptions": [comment(1, "01:00", "saved by goal-keeper")]}
    put(root, f"annotations/england_epl_2014-2015/{MATCH}.json", older)


def xfoul(root: Path) -> None:
    touch(root, "train/action_0/clip_0.mp4", "train/action_0/clip_1.mp4", "train/action_1/clip_0.mp4", "train/action_7/clip_0.mp4")
    action = {
        "UrlLocal": f"england_epl\\2014-2015\\{MATCH}",
        "Offence": "Offence",
        "Contact": "With contact",
        "Bodypart": "Under body",
        "Upper body part": "",
        "Action class": "Standing tackling",
        "Severity": "3.0",
        "Multiple fouls": "no",
        "Try to play": "Yes",
        "Touch ball": "Maybe",
        "Handball": "No handball",
        "Handball offence": "",
        "Clips": [{"Url": f"Dataset/Train/action_0/clip_{k}", "Camera type": "x", "Timestamp": 1, "Replay speed": 1.0} for k in "01"],
    }
    alone = action | {"Clips": [{"Url": "Dataset/Train/action_1/clip_0"}], "Offence": "No Offence", "Severity": "",
        "Action class": "Ballet"}
    hostile = action | {"Clips": [{"Url": "../../../etc/passwd"}]}
    nowhere = action | {"UrlLocal": "somewhere"}
    actions = {"0": action, "1": alone, "2": hostile, "3": nowhere, "4": "?"}
    put(root, "train/annotations.json", {"Set": "train", "Number of actions": "5", "Actions": actions})
    asked = [
        {"path": "train/action_0", "question": "Is it a foul?", "answer": "Yes, he trips him."},
        {"path": "Train/action_1", "question": "Which card?", "answer": "None."},
        {"path": "valid/action_0", "question": "Which card?", "answer": "Red."},
        {"path": "../../etc/passwd", "question": "Which card?", "answer": "Red."},
        {"path": "train/action_0", "question": "No answer?", "answer": None},
    ]
    put(root, "xfoul_train.json", asked)


def finediving(root: Path) -> None:
    touch(root, "Trimmed/Rome_10m/0/00001.jpg", "Trimmed/Rome_10m/1/00001.jpg", "Trimmed/Rome_10m/2/00001.jpg")
    fine = {
        ("Rome_10m", 0): {"action_type": "407c", "dive_score": np.float64(76.8), "difficulty": np.float32(3.2),
            "judge_scores": [8.0, 8.5], "sub-action_types": {1: "Back", 2: "2 Soms.Tuck", 3: "Entry"},
            "frames_labels": np.array([1, 1, 2, 2, 2, 3]), "steps_transit_frames": np.array([3.0, 6.0])},
        ("Rome_10m", np.int64(1)): ["5253b", 80.0, 3.0, None, [1, 2, 3]],
        ("Rome_10m", 2): {"action_type": 7, "dive_score": float("nan"), "difficulty": 0, "frames_labels": [1, 9],
            "sub-action_types": {1: "x"}},
        ("Rome_10m", 8): ["107b", 80.0, 3.0, None, []],
        ("../../etc", 8): ["107b", 80.0, 3.0, None, []],
        "not a key": ["107b", 80.0, 3.0, None, []],
    }
    put(root, "Annotations/FineDiving_fine-grained_annotation.pkl", fine)
    put(root, "Annotations/fine-grained_annotation_aqa.pkl", {("Rome_10m", 0): ["000x", 1.0, 1.0, None, []]})
    put(root, "Annotations/train_split.pkl", [("Rome_10m", 0)])
    put(root, "Annotations/test_split.pkl", [("Rome_10m", 1)])


def facts_fencing(root: Path) -> None:
    touch(root, "clips/left_attack/001.mp4", "clips/Counter-Attack Right/001.mp4", "clips/riposte_LEFT/002.avi", "clips/bow/3.mp4",
        "clips/counter-riposte_left/4.mp4")


def facts_boxing(root: Path) -> None:
    touch(root, *(f"videos/{n}.mp4" for n in range(4)))
    lines = ["\ufeffVideo,Label,fps", "0.mp4,left_jab,25", "1.mp4,Right-Hook,25", "9.mp4,left_jab,25",
        "../../etc/passwd,left_jab,25", "2.mp4,", "3.mp4,-,25"]
    (root / "labels.csv").write_text("\n".join(lines))


def t3set(root: Path) -> None:
    first, second = "P01/topspin/round_00", "P01/short/round_01"
    touch(root, f"{first}/video/right/a.mp4", f"{first}/video/remote/b.mp4", f"{second}/video/right/c.mp4")

    def comment(key, kind="position", **more) -> dict:
        return {"start": "00:00:12,500", "end": "00:00:14,250", "text": "手腕", "comment_zh": "手腕", "comment_en": f"mind the {key}",
            "suggestion_key": key, "suggestion_type": kind, "stroke_index": 3, "index": 1, "type": "realtime"} | more

    live = [
        comment("right_wrist"),
        comment("backswing of racket", "racket", start="00:00:02,000"),
        comment("waist", "strength", comment_index=7),
        comment("waist", "stability"),
        comment("others", "others"),
        comment("tail"),
        comment("left_foot", comment_en=""),
        comment("left_knee", start="noon"),
        comment("left_leg", end="00:00:01,000"),
        comment("left_hand", type="whispered"),
        None,
    ]
    live[2].pop("index")
    put(root, f"{first}/coach_suggestions/live_comments/coach_comment_1.json", live)
    put(root, f"{first}/coach_suggestions/summary_suggestions/coach_comment_2.json", [comment("right wrist", type="global")])
    put(root, f"{first}/sensor/aligned.json", {"not": "comments"})
    put(root, f"{second}/comments/global/coach_comment_1.json", [comment("grip_of_racket", "others", type="global")])
    put(root, f"{second}/suggestion.json", [comment("waist", None)])
    put(root, "P02/push/round 00/comments/global/coach_comment_1.json", [comment("waist", type="global")])


def sportu(root: Path) -> None:
    touch(root, "soccer/soccer_3_0.mp4", "soccer/soccer_3_1.mp4", "Badminton/badminton_1.MP4", "x/american_football_8.mov")
    sport = {"A": "Field Hockey", "B": "Soccer", "C": "Basketball", "D": "None of the above"}
    mc = [
        {"id": "soccer_3_0", "question": "What sport does this video show?", "options": sport, "answer": "B",
            "difficulty level": "easy"},
        {"id": "soccer_3_0", "question": "Is there a foul?", "options": {"A": "No", "B": "Yes"}, "answer": "A",
            "difficulty level": "hard"},
        {"id": "soccer_3_1", "question": "Is there a foul?", "options": {"A": "No", "B": "Yes"}, "answer": "B",
            "difficulty level": "hard"},
        {"id": "Badminton_1", "question": "Does any player make an error?", "options": {"A": "No", "B": "Yes"}, "answer": "Yes"},
        {"id": "Badminton_1", "question": "Is it in?", "options": {"A": "No", "B": "Yes"}, "answer": "E"},
        {"id": "Badminton_1", "question": "Same?", "options": {"A": "No", "B": "no"}, "answer": "A"},
        {"id": "Badminton_1", "question": "By letter?", "options": {"A": "No", "B": "Yes", "C": "Both A and B"}, "answer": "A"},
        {"id": "curling_1", "question": "Is it in?", "options": {"A": "No", "B": "Yes"}, "answer": "A"},
        {"id": "soccer_99", "question": "Is it in?", "options": {"A": "No", "B": "Yes"}, "answer": "A"},
        {"id": "soccer_3_0", "question": "No options?", "options": None, "answer": "A"},
    ]
    put(root, "data/SportU_Video_mc.json", mc)
    hard = {"id": "american_football_8", "question": "Why is it a fault?", "answer": "He moves too early.",
        "difficulty level": "hard"}
    put(root, "data/SportU_video_oe.json", [hard, hard | {"question": "Why?", "answer": " "}])


def sports_qa(root: Path) -> None:
    ball, beam = "v_-6Os86HzwCs_c001_00", "v_0LtLS9wROrk_c003_01"
    touch(root, f"videos/volleyball/volleyball/{ball}.avi", f"videos/finegym_03/{beam}.mp4",
        "videos/finegym_01/v_abcdefghi_E_000012_000034.mp4")

    def row(n, video, kind, answer, question="How many?") -> dict:
        return {"qa_id": n, "video": video, "type": kind, "question": question, "answer": answer, "ans_cls": 3}

    train = [
        row(0, f"volleyball/{ball}", "Descriptive", "yes"),
        row(1, f"football/{ball}", "Causal", "No"),
        row(2, f"fg/{beam}", "Temporal", "2"),
        row(3, f"fg/{beam}", "counterfactual", "a leap forward"),
        row(4, "fg/v_abcdefghi_E_000012_000034", "Descriptive", 1),
        row(5, "../../etc/passwd", "Descriptive", "yes"),
        row(6, "fg/..", "Descriptive", "yes"),
        row(7, f"chess/{ball}", "Descriptive", "yes"),
        row(8, f"fg/{beam}", "Rhetorical", "yes"),
        row(9, f"fg/{beam}", "Temporal", None),
        row(None, f"fg/{beam}", "Temporal", "2"),
        row(11, "fg/v_missing_____c003_01", "Temporal", "2"),
    ]
    put(root, "meta/train.json", train)
    put(root, "meta/test.json", [row(0, f"fg/{beam}", "Temporal", "2")])
    put(root, "meta/ans2cls.json", {"yes": 0})


def sportr(root: Path) -> None:
    touch(root, "videos/a.mp4", "videos/b.mp4")
    rows = [
        {"Video_ID": "a", "Sport": "Ice_Hockey", "Question": "Which infraction?", "Choices": ["A. Tripping", "B. Hooking"],
            "Answer": "B", "Task": "penalty"},
        {"Video_ID": "b", "Sport": "badminton", "Question": "When?", "Answer": [1.5, 3], "Task": "grounding"},
        {"Video_ID": "b", "Sport": "badminton", "Question": "Where?", "Answer": [1, 2, 3, 4], "Task": "grounding"},
        {"Video_ID": "b", "Sport": "badminton", "Question": "What should he do?", "Answer": "Go to the net.", "Task": None},
        {"Video_ID": "/etc/passwd", "Sport": "badminton", "Question": "What?", "Answer": "That.", "Task": "tactics"},
        {"Video_ID": "b", "Sport": "badminton", "Question": "What?", "Task": "tactics"},
    ]
    touch(root, "sportr.jsonl")
    (root / "sportr.jsonl").write_text("\n".join(map(json.dumps, rows)) + "\n")


def finebadminton(root: Path) -> None:
    def row(task, number, start=1000, end=1099, options=("A. 1", "B. 2", "C. 3", "D. 4"), answer="B", asked="What is the last hit?",
        **more) -> dict:
        return {
            "video_id": "0011.mp4",
            "start_frame": start,
            "end_frame": end,
            "duration": "short",
            "spatial": "action",
            "temporal": task,
            "question": {"question_zh": "?", "question_en": asked},
            "options_en": list(options),
            "options_zh": [],
            "answer": answer,
            "question_id": f"{task.upper()}_0011.mp4_{start}_{end}_{number}",
        } | more

    rows = [
        row("action classification", 1, asked="What does the player (at the top) hit last?", duration=100),
        row("action prediction", 2, asked="After the player at the bottom hits last, how does the one at the top return it?"),
        row("action localization", 3),
        row("round comment", 4, asked="Which comment is right?"),
        row("hitting comment", 5, start=1030),
        row("hitting comment", 6, video_id="0099.mp4"),
        row("juggling", 7),
        row("hitting count", 8, start=1099),
        row("hitting count", 9, options=("one", "two")),
        row("hitting count", 10, local_video="../../etc/passwd"),
        row("hitting count", 11, question="?"),
        row("hitting count", 12),
    ]
    for entry in rows[:11]:
        touch(root, f"video/{entry['question_id'].replace(' ', '_')}.mp4")
    put(root, "questions.json", rows)
    names = ("start_frame", "hit_frame", "end_frame", "hitter")
    strokes = [(990, 1002, 1020, "top"), (1020, 1031, 1050, "bottom"), (1050, 1060, 1080, "top"), (1080, 1090, 1120, "bottom"),
        (1120, 1130, 1150, "top")]
    hitting = [dict(zip(names, stroke)) | {"quality": stroke[0] % 20 or "4", "subtype": []} for stroke in strokes]
    rounds = [{"video": "0011_001.mp4", "fps": 25.0, "hitting": hitting}, {"video": "0011_002.mp4", "hitting": [{}]}]
    put(root, "rounds.json", rounds)


def osl(root: Path) -> None:
    touch(root, "train/action_0/clip_0.mp4", "train/action_0/clip_1.mp4", "train/action_1/clip_0.mp4", "gym/beam.mp4")

    def sample(id, *paths, **more) -> dict:
        return {"id": id, "inputs": [{"type": "video", "path": path, "fps": 25.0} for path in paths]} | more

    foul = "train/action_0/clip_0.mp4", "train/action_0/clip_1.mp4"
    other = ("train/action_1/clip_0.mp4",)
    heads = {"severity": {"type": "single_label", "labels": ["no_card", "yellow_card", "red_card"]},
        "attributes": {"type": "multi_label", "labels": ["late", "high"]}}
    data = [
        sample("action_0", *foul, answers=[{"question": "Is it a foul?", "answers": ["Yes, he trips him.", "Yes."]}],
            labels={"severity": {"label": "yellow_card"}, "attributes": {"labels": ["late", "high"]}}),
        sample("action_0__2", *foul, answers=[{"question": "Is it a foul?", "answers": [{"text": "A clear foul.", "confidence_score": 0.9}]}]),
        sample("action_1", *other, metadata={"UrlLocal": f"england_epl\\2014-2015\\{MATCH}"},
            answers=[{"question": "Which card?", "answers": ["None."]}, {"question": "No answer?", "answers": [""]}, 3]),
        sample("action_2", "train/action_2/clip_0.mp4", answers=[{"question": "Gone?", "answers": ["Yes."]}]),
        sample("action_3", "../../etc/passwd", answers=[{"question": "Out?", "answers": ["Yes."]}]),
        {"id": "tracks", "inputs": [{"type": "tracking_parquet", "path": "x.parquet"}], "labels": {"severity": {"label": "red_card"}}},
        sample("nothing", *other),
        "not a sample",
    ]
    top = {"version": "2.0", "dataset_name": "SoccerNet-XFoul", "modalities": ["video"], "metadata": {}}
    put(root, "annotations.json", top | {"labels": heads, "data": data})
    dense = [{"position_ms": 12000, "lang": "en", "text": "She turns."}, {"start_ms": "2000", "end_ms": "4000", "text": "She leaps."},
        {"position_ms": "soon", "text": "She falls."}]
    old = [sample("beam", "gym/beam.mp4", answers=[{"question_id": "q1", "answer": "A leap."}, {"question_id": 1, "answer": "A jump."},
        {"question_id": "q9", "answer": "?"}], captions=[{"lang": "en", "text": "A beam routine."}], dense_captions=dense)]
    asked = [{"id": "q1", "question": "What is it?"}, {"id": 1, "question": "What is it?"}]
    put(root, "old.json", {"data": old, "dataset_name": "gymnastics-localization", "questions": asked})


def events(root: Path) -> None:
    clips = ("20210909-W-US_Open-SF-A_B-C_D_100_400", "01__1", "0LtLS9wROrk_E_000147_000152")
    touch(root, *(f"frames/{clip}/000000.jpg" for clip in clips))
    labels = ("far_ad_serve_-_-_T_-_in", "near_deuce_return_fh_gs_CC_-_in", "far_ad_stroke_bh_gs_CC_-_in",
        "near_deuce_stroke_fh_gs_DL_-_winner", "far_ad_stroke_bh_gs_CC_-_in")
    rally = [{"frame": 20 * k + 10, "label": label} for k, label in enumerate(labels)]
    clip = {"video": clips[0], "fps": 25, "num_frames": 300, "events": rally}
    put(root, "data/f3set-tennis/train.json", [
        clip,
        clip | {"video": "gone_0_10"},
        clip | {"events": [{"frame": 5, "label": labels[0]}, {"frame": 300, "label": labels[1]}]},
        clip | {"events": [{"frame": 5, "label": labels[0]}, {"frame": None, "label": labels[1]}]},
        clip | {"video": "../../etc/passwd"},
        clip | {"num_frames": None},
        "not a clip",
    ])
    dive = [{"comment": "", "frame": 34, "label": "Entry"}, {"comment": "", "frame": 2, "label": "Som(s).Tuck"}]
    source = {"action_type": "407c", "difficulty": 3.2, "dive_score": 88.0}
    put(root, "data/finediving/test.json", [{"_source_info": source, "events": dive, "fps": -1, "num_frames": 85, "video": clips[1]}])
    gym = [{"frame": 36, "label": "VT_0"}, {"frame": 90, "label": "VT_1"}]
    put(root, "data/finegym/val.json", [{"events": gym, "fps": 29.97, "num_frames": 120, "video": clips[2]}])


WRITE = {f.__name__: f for f in (soccerbench, soccerreplay, xfoul, finediving, facts_fencing, facts_boxing, t3set, sportu,
    sports_qa, sportr, finebadminton, osl, events)}
# fmt: on
