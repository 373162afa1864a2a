"""The arena keeps its promises: known answers, clean splits, an event between the overview frames,
a teacher as stated."""

import json
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep import arena, draw, pretrain, teacher
from nanosport.env.env import Limits
from nanosport.env.rollout import replay
from nanosport.env.tools import parse
from nanosport.fields import read_json
from nanosport.image import ImageConfig
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import DIMENSIONS, Question, read_questions, read_records
from nanosport.video import Video

SPLITS = ("sft", "rl", "test")


def plans(num: int, split: str = "rl", seed: int = 0) -> list[arena.Plan]:
    layouts = arena.TEST_LAYOUTS if split == "test" else arena.TRAIN_LAYOUTS
    return [arena.make_plan(arena.clip_rng(seed, split, k), layouts) for k in range(num)]


def overview(plan: arena.Plan) -> list[int]:
    return [int(i) for i in np.rint(np.linspace(0, plan.num_frames - 1, 8))]


def test_a_seed_is_a_clip_bit_for_bit():
    one, two, other = plans(20), plans(20), plans(20, seed=1)
    assert one == two and not set(map(str, one)) & set(map(str, other))
    for frame in (0, one[0].start, one[0].num_frames - 1):
        assert arena.render(one[0], frame).tobytes() == arena.render(two[0], frame).tobytes()
    rng = [arena.clip_rng(0, "rl", 3) for _ in range(2)]
    assert arena.make_questions(one[3], rng[0], "c", "v") == arena.make_questions(
        one[3], rng[1], "c", "v"
    )
    assert plans(5) == plans(20)[:5]  # more clips leave the first ones as they are


def test_written_files_are_the_same_again(arena_folder, tmp_path):
    arena.main(arena.Config(out=tmp_path, sft_clips=1, rl_clips=1, test_clips=1, workers=1))
    for split in SPLITS:
        name = f"clips/{split}_00000.mp4"
        assert (tmp_path / name).read_bytes() == (arena_folder / name).read_bytes()
        first = (arena_folder / f"{split}.jsonl").read_text().splitlines()[:6]
        assert (tmp_path / f"{split}.jsonl").read_text().splitlines() == first


def test_splits_share_no_clip_no_plan_and_test_layouts_are_new(arena_folder):
    made = {split: plans(300, split) for split in SPLITS}
    assert len({json.dumps(asdict(p)) for some in made.values() for p in some}) == 900
    assert len({p.motion for some in made.values() for p in some}) == 900
    assert not {p.layout for p in made["test"]} & {p.layout for s in ("sft", "rl") for p in made[s]}
    assert {p.layout for p in made["test"]} == set(arena.TEST_LAYOUTS)
    videos = [
        {q.video for q in read_questions(arena_folder / f"{split}.jsonl")} for split in SPLITS
    ]
    assert [len(v) for v in videos] == [2, 2, 2] and len(set.union(*videos)) == 6


def test_the_event_lies_strictly_between_two_overview_frames():
    gaps = set()
    for plan in plans(1000):
        shown = overview(plan)
        (inside,) = [k for k in range(7) if shown[k] < plan.start and plan.end < shown[k + 1]]
        gaps.add(inside)
        assert not any(plan.in_event(t) for t in shown) and teacher.change(plan, shown) == inside
        assert plan.score_at(shown[inside]) == plan.score != plan.score_at(shown[inside + 1])
        closer = np.rint(np.linspace(shown[inside], shown[inside + 1], 8)).astype(int)
        assert any(plan.in_event(t) for t in closer), (
            "the tool's eight frames would miss the close-up"
        )
        assert shown[inside + 1] - shown[inside] + 1 >= 9
    assert gaps == set(range(7))


def test_the_score_changes_with_the_last_frame_of_the_event():
    for plan in plans(50):
        before, after = list(plan.score), list(plan.score)
        after[plan.scorer] += 1
        assert [plan.score_at(t) for t in (0, plan.start, plan.end)] == [tuple(before)] * 3
        assert [plan.score_at(t) for t in (plan.end + 1, plan.num_frames - 1)] == [tuple(after)] * 2


def test_the_picture_shows_the_score_and_the_close_up():
    """The scoreboard in a rendered frame is the scoreboard of that frame's score, and of no
    other."""
    for plan in plans(6):
        for frame in (0, plan.start, plan.end, plan.end + 1, plan.num_frames - 1):
            picture, score = arena.render(plan, frame), plan.score_at(frame)
            assert picture.shape == (draw.HEIGHT, draw.WIDTH, 3) and picture.dtype == np.uint8

            def stamped(score, picture=picture, plan=plan):
                again = picture.copy()
                draw.scoreboard(again, plan.kits, score)
                return np.array_equal(again, picture)

            assert (
                stamped(score)
                and not stamped((score[0] + 1, score[1]))
                and not stamped((score[0], score[1] + 1))
            )
        close, wide = arena.render(plan, plan.start + 1), arena.render(plan, plan.start - 1)
        assert (close != wide).any(-1).mean() > 0.1


def test_the_close_up_tells_number_shot_balance_and_card_apart():
    base = plans(1)[0]
    pictures = set()
    changes = [{"number": n} for n in range(1, 10)] + [{"shot": s} for s in range(3)]
    changes += [{"lean": k} for k in (-1, 0, 1)] + [{"card": c} for c in arena.SANCTION]
    for change in changes:
        pictures.add(arena.render(arena.Plan(**(asdict(base) | change)), base.start + 1).tobytes())
    assert len(pictures) == 9 + 3 + 3 + 3 - 3  # each list holds the base once
    wide = {
        arena.render(arena.Plan(**(asdict(base) | change)), base.start - 20).tobytes()
        for change in changes
    }
    assert len(wide) == 1, "a wide frame gives the answer away"


def true_answer(plan: arena.Plan, question: Question) -> str:
    """Worked out from the plan alone."""
    kit, shot = plan.kits[plan.scorer], arena.SHOTS[plan.sport][plan.shot]
    score = [plan.score[0] + (plan.scorer == 0), plan.score[1] + (plan.scorer == 1)]
    left, right = plan.kits
    return {
        "Which shirt number scored?": str(plan.number),
        "How was the point scored?": shot,
        "What do the rules impose on the scorer?": {
            "none": "no sanction",
            "yellow": "a warning",
            "red": "sent off",
        }[plan.card],
        "Which card did the official show?": plan.card,
        "How is the balance of the scorer?": ["leans left", "upright", "leans right"][
            plan.lean + 1
        ],
        "Call the decisive play.": f"{kit} {plan.number} {shot}",
        "Which sport is this?": plan.sport,
        "Who leads at the end?": left
        if score[0] > score[1]
        else right
        if score[1] > score[0]
        else "level",
        "Which team must score more?": "neither"
        if score[0] == score[1]
        else (left if score[0] < score[1] else right),
        "Give the final score.": f"{left} {score[0]} {right} {score[1]}",
    }[question.question]


def test_answers_agree_with_the_plan():
    asked, letters = set(), []
    for k, plan in enumerate(plans(300)):
        questions = arena.make_questions(plan, np.random.default_rng(k), f"c{k}", "v")
        assert len(questions) == 6 and [q.needs_tool for q in questions] == [True] * 4 + [False] * 2
        assert {q.dimension for q in questions[:4]} == set(DIMENSIONS) and len(
            {q.id for q in questions}
        ) == 6
        for q in questions:
            asked.add((q.question, bool(q.options)))
            said = q.options["ABCD".index(q.answer)] if q.options else q.answer
            assert said == true_answer(plan, q)
            assert len(set(q.options)) == len(q.options) and q.window == (
                plan.start,
                plan.start + 3,
            )
            letters += q.answer if q.options else ""
    assert len(asked) == 13
    assert all(letters.count(c) > len(letters) / 6 for c in "ABC"), (
        "the right option's place gives it away"
    )


def test_descriptions_say_what_a_frame_shows():
    plan = arena.Plan(
        "soccer", 0, ("red", "blue"), (True, False), 150, (1, 2), 1, 7, 0, -1, "yellow", 50, 3
    )
    assert [arena.describe(plan, t) for t in (0, 49, 54, 149)] == ["1-2", "1-2", "1-3", "1-3"]
    assert {arena.describe(plan, t) for t in range(50, 54)} == {
        "blue 7, header, leans left, a warning"
    }
    assert arena.scene(plan) == "soccer, red left, blue right"
    needs = Question(
        "q", "v", "soccer", "rules", "Which card did the official show?", (), "yellow", True
    )
    assert teacher.evidence(plan, needs, (40, 51, 60)).startswith(
        "frame 51 shows blue 7, header, leans left, a warning."
    )
    assert teacher.evidence(plan, needs, (40, 60)) == "no frame shows the play."
    other = Question("q", "v", "soccer", "rules", "Who leads at the end?", (), "blue", False)
    assert teacher.evidence(plan, other, (0, 149)).startswith(
        "soccer, red left, blue right, 1-3 at the end."
    )
    assert teacher.listing(plan, (0, 149)) == "0 1-2, 149 1-3"


def test_clips_decode_to_what_was_drawn(arena_folder):
    for split in SPLITS:
        for row in map(
            json.loads, (arena_folder / f"{split}_plans.jsonl").read_text().splitlines()
        ):
            plan = teacher.read_plans(arena_folder / f"{split}_plans.jsonl")[row["video"]]
            with av.open(str(arena_folder / row["video"])) as container:
                frames = [(f.key_frame, f) for f in container.decode(video=0)]
            assert len(frames) == plan.num_frames == Video(arena_folder / row["video"]).num_frames
            keys = [n for n, (key, _) in enumerate(frames) if key]
            assert keys[0] == 0 and max(np.diff([*keys, len(frames)])) <= 30
            for t in (0, plan.start + 1, plan.num_frames - 1):
                seen = frames[t][1].to_ndarray(format="rgb24").astype(int)
                assert np.abs(seen - arena.render(plan, t)).mean() < 8, (row["video"], t)


@pytest.fixture(scope="module")
def taught(arena_folder):
    """(plan, question, video) of the split the teacher writes for."""
    by_clip = teacher.read_plans(arena_folder / "sft_plans.jsonl")
    videos = {name: Video(arena_folder / name) for name in by_clip}
    questions = read_questions(arena_folder / "sft.jsonl")
    names = [str(Path(q.video).relative_to(arena_folder)) for q in questions]
    return [(by_clip[n], q, videos[n]) for n, q in zip(names, questions)]


def test_the_teachers_error_rates_are_as_stated(taught):
    cfg, rng = teacher.Config(), np.random.default_rng(0)
    guessed, wrong, retried, needless, needed, other = [0] * 6
    for _ in range(250):
        for plan, question, video in taught:
            turns = teacher.trajectory(plan, question, video, cfg, rng)
            actions = [parse(t, plan.num_frames) for t in turns]
            assert [a.kind for a in actions] == ["tool"] * (len(turns) - 1) + ["answer"]
            windows = [a.window for a in actions[:-1]]
            found = [first < plan.start and plan.end < last for first, last in windows]
            if not question.needs_tool:
                other += 1
                needless += len(windows)
                assert len(windows) <= 1 and actions[-1].answer == teacher.truth(question)
                continue
            needed += 1
            guessed += not windows
            if windows:  # right or misread, the reasoning stops at the first other score
                scores = [
                    seen.split()[1] for seen in actions[0].think.split(". the score")[0].split(", ")
                ]
                assert len(set(scores[:-1])) == 1 and scores[-1] != scores[-2]
            wrong += found[:1] == [False]
            retried += found == [False, True]
            assert found in ([], [True], [False], [False, True])
            if True in found:
                assert (
                    actions[-1].answer == teacher.truth(question) and "shows" in actions[-1].think
                )

    def near(count, out_of, share):
        return abs(count / out_of - share) < 4 * (share * (1 - share) / out_of) ** 0.5

    assert near(guessed, needed, cfg.guess) and near(wrong, needed, cfg.wrong_window)
    assert near(retried, wrong, cfg.retry) and near(needless, other, cfg.needless)


def test_trajectories_replay_without_an_error(arena_folder, nano_folder, taught):
    model, tokenizer = load_model(nano_folder), load_tokenizer(nano_folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(nano_folder))
    records = read_records(arena_folder / "trajectories.jsonl")
    assert [q for q, _ in records] == read_questions(
        arena_folder / "sft.jsonl"
    ) * teacher.Config().draws
    rng = np.random.default_rng(1)
    records += [
        (q, teacher.trajectory(plan, q, video, teacher.Config(), rng))
        for plan, q, video in taught * 3
    ]
    for question, messages in records:
        episode = replay(question, messages, encoder, tokenizer, Limits())
        assert episode.status == "answered" and len(episode.turns) == len(messages)
        assert [t.text for t in episode.turns] == messages


@pytest.mark.parametrize(
    "wrong", [{"guess": 1.5}, {"retry": -0.1}, {"guess": 0.7, "wrong_window": 0.7}, {"draws": 0}]
)
def test_teacher_settings_out_of_range(wrong, arena_folder):
    with pytest.raises(ValueError, match="--"):
        teacher.main(teacher.Config(data=arena_folder, **wrong))


GOOD = {
    "id": "q",
    "video": "v.mp4",
    "sport": "s",
    "dimension": "rules",
    "question": "Why?",
    "options": ["x", "y"],
    "answer": "B",
}


@pytest.mark.parametrize(
    "bad, why",
    [
        (json.dumps(GOOD | {"colour": "red"}), "unknown field 'colour'"),
        (json.dumps({k: v for k, v in GOOD.items() if k != "answer"}), "answer"),
        (json.dumps(GOOD | {"dimension": "cooking"}), "dimension 'cooking'"),
        (json.dumps(GOOD | {"answer": "C"}), "answer 'C'"),
        (json.dumps(GOOD | {"answer": "y"}), "answer 'y'"),
        (json.dumps(GOOD | {"answer": 3, "options": []}), "answer 3"),
        (json.dumps(GOOD | {"options": "xy"}), "options 'xy'"),
        (json.dumps(GOOD | {"options": [1, 2]}), "at most ten texts"),
        (json.dumps(GOOD | {"options": [str(k) for k in range(11)]}), "at most ten"),
        (json.dumps(GOOD | {"video": None}), "video None"),
        (json.dumps({"question": GOOD, "messages": "text"}), "messages"),
        (json.dumps({"question": GOOD, "messages": [1]}), "expected string"),
        (json.dumps({"question": [], "messages": []}), "JSON object"),
        (json.dumps({"messages": []}), "question"),
        ("{", "not a question"),
        ("[]", "JSON object"),
        ("null", "JSON object"),
        ('""', "JSON object"),
        ("[" * 100_000, "not a question"),
    ],
)
def test_a_line_that_is_no_question_is_named(bad, why, tmp_path):
    file = tmp_path / "mine.jsonl"
    file.write_text(f"{json.dumps(GOOD)}\n{bad}\n{json.dumps(GOOD)}\n")
    with pytest.raises(ValueError, match=r"mine\.jsonl, line 2: not a question: ") as caught:
        read_questions(file)
    assert why in str(caught.value) and "\n" not in str(caught.value)


def test_odd_but_valid_question_files(tmp_path):
    file = tmp_path / "mine.jsonl"
    asked = "Why\u2028not\u0085?"  # ends a line for str.splitlines, not for JSON lines
    row = GOOD | {
        "question": asked,
        "video": "/clips/v.mp4",
        "options": [],
        "answer": "offside",
        "window": [3, 9],
    }
    file.write_bytes(b"\xef\xbb\xbf" + json.dumps(row, ensure_ascii=False).encode() + b"\r\n")
    (question,) = read_questions(file)
    assert (
        question.question == asked
        and question.video == "/clips/v.mp4"
        and question.window == (3, 9)
    )
    file.write_bytes(json.dumps(GOOD).encode() + b"\n\xff\xfe\n")
    with pytest.raises(ValueError, match="line 2"):
        read_questions(file)
    file.write_text("")
    with pytest.raises(ValueError, match="holds no question"):
        read_questions(file)
    with pytest.raises(ValueError, match="no such file"):
        read_questions(tmp_path / "absent.jsonl")


@pytest.mark.parametrize("family", pretrain.PRESETS)
def test_pre_training_goes_through_its_four_stages(family, tmp_path, monkeypatch):
    """One step of each; then it says that there is nothing left to go on with."""
    monkeypatch.setattr(pretrain, "BATCH", dict.fromkeys(pretrain.STAGES, 2))
    monkeypatch.setattr(pretrain, "perception", partial(pretrain.perception, batches=1))
    preset = pretrain.Config(**pretrain.PRESETS[family])
    assert preset.family == family
    cfg = replace(preset, out=tmp_path / "backbone", steps=(1, 1, 1, 1))
    pretrain.main(cfg)
    made = json.loads((cfg.out / "pretrain.json").read_text())["stages"]
    assert [row["stage"] for row in made] == list(pretrain.STAGES.values()) and load_model(
        cfg.out
    ).cfg.hidden_size
    assert read_json(cfg.out / "config.json")["model_type"] == family
    weights = (cfg.out / "model.safetensors").stat().st_size
    assert weights < 5_100_000, "it is committed"
    with pytest.raises(ValueError, match="all stages already"):
        pretrain.main(replace(cfg, start=cfg.out))
