"""Intervals hold what they promise, and what is compared, counted and printed is right."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from nanosport.env.figures import compared, figures, latex, published, row_named, table
from nanosport.env.intervals import intervals, pass_at, sign_flip
from nanosport.records import Episode, Question, Turn


def answers(rng, num_videos: int, per_video: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Right and wrong answers to questions about videos, some of which are harder."""
    video_E = np.repeat(np.arange(num_videos), per_video)
    ease_V = rng.beta(4, 2, num_videos)
    return (rng.random(len(video_E)) < ease_V[video_E]).astype(float), video_E


def test_the_intervals_hold_the_truth_in_95_of_100_cases(monkeypatch):
    """93 to 97 %, with few videos and with more, some of which have more questions."""
    monkeypatch.setattr("nanosport.env.intervals.DRAWS", 1000)
    rng = np.random.default_rng(0)
    for num_videos in (12, 50):
        per_video = 2 + np.arange(num_videos) % 9
        values = np.stack([answers(rng, num_videos, per_video)[0] for _ in range(3000)], 1)
        video_E = np.repeat(np.arange(num_videos), per_video)
        low, high = intervals(values, video_E).T
        coverage = ((low <= 4 / 6) & (4 / 6 <= high)).mean()
        assert 0.93 <= coverage <= 0.97, (num_videos, coverage)
        # near the end of the scale it is too narrow
        sure = rng.random((12 * 6, 1000)) < 0.98
        low, high = intervals(sure.astype(float), np.repeat(np.arange(12), 6)).T
        assert 0.7 < ((low <= 0.98) & (0.98 <= high)).mean() < 0.9
        # questions drawn one by one, as if videos did not matter, promise too much
        alone = intervals(values[:, :500], np.arange(len(values))).T
        assert ((alone[0] <= 4 / 6) & (4 / 6 <= alone[1])).mean() < 0.9


def test_the_paired_test_has_five_false_alarms_in_a_hundred():
    """5 ± 1 %, for two models that are equally good on average and differ on every video."""
    rng, alarms = np.random.default_rng(1), []
    for _ in range(3000):
        favour_V = rng.normal(0, 0.2, 40)
        difference_V = (rng.integers(-3, 4, (40, 6)) / 3 + favour_V[:, None]).sum(1)
        alarms.append(sign_flip(difference_V) <= 0.05)
    assert 0.04 <= np.mean(alarms) <= 0.06, np.mean(alarms)
    assert sign_flip(np.full(40, 1.0)) < 0.001 and sign_flip(np.zeros(40)) == 1.0
    assert sign_flip(np.tile([1.0, -1.0], 20)) == 1.0


def test_nothing_is_said_of_answers_that_are_all_alike():
    """What is drawn again from them is as alike, which is no certainty."""
    values = np.stack([np.full(60, 1.0), np.arange(60) % 2], 1)
    sure, open_ = intervals(values, np.arange(60) // 5)
    assert np.isnan(sure).all() and open_[0] < 0.5 < open_[1]
    each = np.tile([1.0, 1.0, 0.0], 20)[:, None]  # two of three in every video
    assert np.isnan(intervals(each, np.arange(60) // 3)).all()


def test_the_parts_of_a_video_stand_or_fall_together():
    made = [played(k, "red") for k in range(20)]
    parts = [
        replace(e, question=replace(e.question, video="match.mp4", span_s=(k, k + 1)))
        for k, e in enumerate(made)
    ]
    scores = [float(k % 3 > 0) for k in range(20)]
    assert "accuracy" in figures(made, scores)["intervals"]
    assert "accuracy" not in figures(parts, scores)["intervals"]


def test_questions_of_other_data_are_not_compared(tmp_path):
    """Their ids may be the same, as those of the arena's seeds are."""
    mine = Question("q0", "v", "s", "rules", "Who?", (), "red")
    rows = [{"id": "q0", "video": "v", "truth": "red", "question": "Who?", "accuracy": 1.0}]

    def against(**changed) -> str:
        episodes = [rows[0] | changed]
        (tmp_path / "r.json").write_text(json.dumps({"rows": {"a": {"episodes": episodes}}}))
        return str(tmp_path / "r.json")

    assert row_named(against(), [mine])[0] == "a"
    for changed in ({"question": "When?"}, {"truth": "blue"}):
        with pytest.raises(ValueError, match="none of its questions are asked here"):
            row_named(against(**changed), [mine])
    with pytest.raises(ValueError, match="must be tool, no-tool, or a report"):
        row_named(against(accuracy=None), [mine])


def test_nothing_is_said_of_fewer_than_five_videos():
    values = np.arange(8.0)[:, None]
    assert np.isnan(intervals(values, np.arange(8) % 4)).all()
    few = np.where(np.arange(8) < 4, np.nan, values[:, 0])[:, None]
    assert np.isnan(intervals(few, np.arange(8))).all(), "four of eight have a value"
    low, high = intervals(values, np.arange(8))[0]
    assert 0 < low < 3.5 < high < 7


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    assert [pass_at(k, 1, 4) for k in (1, 2, 4)] == [0.25, 0.5, 1.0]
    assert pass_at(3, 0, 4) == 0.0 and pass_at(3, 2, 4) == 1.0


def played(number: int, answer: str, source: str = "a", tokens: int = 10) -> Episode:
    asked = Question(f"q{number}", f"v{number}", "tennis", "rules", "?", (), "red", source=source)
    turn = Turn("", "answer", tokens=(5, 5 + tokens))
    return Episode(asked, (), (), (), (0, 1), (turn,), "answered", answer)


def test_several_answers_to_a_question_come_to_pass_at_k_and_the_most_frequent():
    said = ["red", "Red ", "blue", "blue", "blue", "red"]
    made = [played(k // 3, text) for k, text in enumerate(said)]
    row = figures(made, [1.0, 1.0, 0.0, 0.0, 0.0, 1.0])
    assert row["questions"] == 2 and row["accuracy"] == 50.0
    assert row["pass_at"] == {
        "1": 50.0,
        "2": pytest.approx(100 * (1 + 2 / 3) / 2, abs=0.01),
        "3": 100.0,
    }
    assert row["majority"] == 50.0 and row["tokens"] == 10 and row["turns"] == 1
    assert "pass_at" not in figures(made[::3], [1.0, 0.0])


def test_every_figure_has_its_interval_by_source_too():
    made = [played(k, "red", "ab"[k % 2], 10 + k) for k in range(20)]
    row = figures(made, [float(k % 3 > 0) for k in range(20)])
    low, high = row["intervals"]["by_source"]["a"]
    assert low < row["by_source"]["a"] < high
    assert row["intervals"]["tokens"][0] < row["tokens"] < row["intervals"]["tokens"][1]
    assert "window_iou" not in row["intervals"] and row["window_iou"] is None


def report(tmp_path: Path, scores: list[float], name: str = "r.json") -> Path:
    episodes = [
        {"id": f"q{k}", "video": f"v{k // 2}", "accuracy": score} for k, score in enumerate(scores)
    ]
    (tmp_path / name).write_text(json.dumps({"rows": {"a: b": {"episodes": episodes}}}))
    return tmp_path / name


def test_two_rows_are_compared_question_by_question(tmp_path):
    ids = [Question(f"q{k}", "v", "s", "rules", "?", (), "a") for k in range(40)]
    mine = row_named(str(report(tmp_path, [1.0] * 40)), ids)[1]
    label, other = row_named(f"{report(tmp_path, [0.0, 1.0] * 15, 's.json')}:a: b", ids)
    found = compared(mine, label, other)
    assert label == "a: b" and found["questions"] == 30 and found["difference"] == 50.0
    assert found["interval"] is None and found["p"] < 0.001  # each video differs by 50 points
    assert compared(mine, label, mine)["p"] == 1.0
    for name in ("gone.json", f"{tmp_path}/r.json:c", f"{tmp_path}"):
        with pytest.raises(ValueError, match="--against .*: must be tool, no-tool, or a report"):
            row_named(name, ids)
    with pytest.raises(ValueError, match="none of its questions are asked here"):
        row_named(f"{tmp_path}/r.json", [replace(ids[0], id="other")])


def test_the_table_is_printed_as_markdown_and_as_latex():
    row = figures([played(k, "red") for k in range(9)], [1.0] * 8 + [0.5])
    row["against"] = {"row": "b", "difference": 1.5, "interval": [-1.0, 4.0], "p": 0.25}
    said = table({"50% & more": row} | published())
    first, rule, overall, *_ = said.splitlines()
    assert len({len(line) for line in said.splitlines()}) == 1 and set(rule) <= set("|- ")
    assert (
        "94.4 [77.8, 100.0]" in overall
        and "40.1" in overall
        and "DeepSport, published, v1" in first
    )
    assert "| difference to b" in said and "+1.5 [-1.0, +4.0], p = 0.25" in said
    tex = table({"50% & more_": row}, "latex")
    assert r"figure & 50\% \& more\_ \\" in tex and r"\bottomrule" in tex
    assert latex("a\\b–{") == r"a\textbackslash{}b--\{"
