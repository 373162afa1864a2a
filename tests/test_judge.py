"""eval.py and rl.py with a judge that is served on loopback: a nano model that was taught, in a few
steps, to end with a grade."""

import json
import signal
import subprocess
import sys
import threading
import time
from dataclasses import asdict, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import eval as evaluation
import rl
from nanosport.env.endpoint import Endpoint, Reply
from nanosport.env.judge import ANSWER_RUBRIC, Judge, grade_of
from nanosport.env.scoring import exact
from nanosport.model.decoder import mrope_positions
from nanosport.model.folder import load_model, load_tokenizer, save_model
from nanosport.records import Question, read_questions
from nanosport.train import checkpoint
from nanosport.train.faults import Preemption
from nanosport.train.training import Training
from tests.helpers.chat_server import ChatServer

ROOT = Path(__file__).parent.parent
NANO = ROOT / "assets" / "nano-deepsport"
GUESSER = NANO.parent / "nano-sft"
"""Half of its open answers are wrong."""


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """A server of a judge that gives whatever it is asked about a 1, a quarter of the points."""
    model, tokenizer = load_model(NANO), load_tokenizer(NANO)
    optimizer, rng = torch.optim.AdamW(model.parameters(), 1e-3), np.random.default_rng(0)
    for _ in range(60):
        words = rng.permutation("red blue smash volley upright left ball who none call how".split())
        asked = "Question: {} {} {}?\n\nReference: {} {}\n\nAnswer: {}".format(*words)
        prompt = f"<|im_start|>system\n{ANSWER_RUBRIC}<|im_end|>\n<|im_start|>user\n{asked}<|im_end|>\n<|im_start|>assistant\n"
        ids, said = (
            tokenizer.encode(text, add_special_tokens=False)
            for text in (prompt, "GRADE: 1<|im_end|>")
        )
        positions_3T, _ = mrope_positions(ids + said, (), model.cfg)
        ends = torch.tensor([0, len(ids + said)], dtype=torch.int32)
        hidden_TD = model.hidden(torch.tensor(ids + said), positions_3T, ends)
        logits_MV = hidden_TD[len(ids) - 1 : -1] @ model.head_weight_VD.T
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(logits_MV, torch.tensor(said)).backward()
        optimizer.step()
    folder = tmp_path_factory.mktemp("judge") / "model"
    save_model(model, folder, NANO)
    with ChatServer(folder) as server:
        yield server


@pytest.fixture
def questions(arena_folder, tmp_path, monkeypatch) -> Path:
    """Four open questions and two closed ones. Verdicts are kept below the working directory."""
    monkeypatch.chdir(tmp_path)
    every = read_questions(arena_folder / "test.jsonl") + read_questions(arena_folder / "rl.jsonl")
    asked = [q for q in every if q.kind == "open"][:4] + [q for q in every if q.kind == "choice"][
        :2
    ]
    assert len(asked) == 6
    rows = [
        asdict(q) | {"id": f"q{k}", "video": str(Path(q.video).absolute())}
        for k, q in enumerate(asked)
    ]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return tmp_path / "questions.jsonl"


def test_eval_asks_the_judge_about_open_answers_once(strict, questions, tmp_path):
    cfg = evaluation.Config(
        str(GUESSER),
        questions,
        tmp_path / "report.json",
        ("tool",),
        judge_url=strict.url,
        judge="nano",
    )
    before = len(strict.answered)
    evaluation.main(cfg)
    first = (tmp_path / "report.json").read_text()
    (row,) = json.loads(first)["rows"].values()
    asked = set()
    for episode, question in zip(row["episodes"], read_questions(questions), strict=True):
        answer, right = episode["answer"], episode["accuracy"]
        if question.kind == "choice":
            assert right in (0, 1)
        elif answer is None or exact(answer, question.answer):
            assert right == float(answer is not None)
        else:
            assert right == 0.25  # its grade, where the F1 of the words would be another
            asked.add((question.question, question.answer, answer))
    assert (
        len(strict.answered) - before
        == len(asked)
        == len(list(Path("out/answers").glob("*/*.json")))
        > 0
    )
    assert row["judge_and_rule"]["n"] == 6
    evaluation.main(cfg)
    assert len(strict.answered) - before == len(asked)
    (again,) = json.loads((tmp_path / "report.json").read_text())["rows"].values()
    assert again["episodes"] == row["episodes"]


def test_eval_ends_in_one_line_where_the_judge_rambles(questions, tmp_path):
    rows = [json.loads(line) | {"answer": "a zebra"} for line in questions.open()]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows[:4]))  # all are asked about
    with ChatServer(NANO) as server:  # taught nothing about grades
        cfg = evaluation.Config(
            str(GUESSER),
            questions,
            tmp_path / "report.json",
            ("tool",),
            judge_url=server.url,
            judge="nano",
        )
        with pytest.raises(ValueError, match="nano: gave no grade in three tries") as caught:
            evaluation.main(cfg)
    assert "\n" not in str(caught.value) and not (tmp_path / "report.json").exists()


def test_rl_learns_from_the_judges_grades(strict, questions, tmp_path):
    rows = [json.loads(line) for line in questions.read_text().splitlines()]
    rows = [row for row in rows if row["answer"] not in "ABCDEFGHIJ"]
    # in capitals, which change no score, the judge has not been asked about them before
    rows = [json.dumps(row | {"answer": row["answer"].upper()}) for row in rows]
    questions.write_text("\n".join(rows[:2]) + "\n")
    before = len(strict.answered)
    cfg = rl.Config(
        str(GUESSER), questions, tmp_path / "rl", steps=2, num_prompts=2, group_size=4, max_new_tokens=100, judge_url=strict.url,
        judge="nano", temperature=1.2, min_format_rate=0, min_tool_rate=0,
    )  # fmt: skip
    rl.main(cfg)
    log = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    verdicts = list((tmp_path / "rl/answers").glob("*/*.json"))
    assert len(log) == 2 and len(verdicts) == len(strict.answered) - before > 0
    assert all(
        (32 * row["accuracy"]).is_integer() for row in log
    )  # eight episodes, each 0, a quarter or 1


@pytest.fixture
def learning(strict, questions, tmp_path, monkeypatch) -> rl.Config:
    """Two steps, each on two open questions of its own, whose answers are all wrong."""
    monkeypatch.setattr(time, "sleep", lambda seconds: None)
    rows = [json.loads(line) | {"answer": "a zebra"} for line in questions.open()][:4]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return rl.Config(
        str(GUESSER), questions, tmp_path / "rl", steps=2, num_prompts=2, group_size=4, max_new_tokens=100, judge_url=strict.url,
        judge="nano", judge_wait_s=0, temperature=1.2, min_format_rate=0, min_tool_rate=0, save_every=99,
    )  # fmt: skip


def test_rl_saves_what_it_has_learnt_where_the_judge_stays_away(strict, learning, monkeypatch):
    answers, calls = Judge.answers, []

    def away_in_the_second_step(*args):
        calls.append(1)
        strict.trouble += [503] * 99 if len(calls) == 2 else []
        return answers(*args)

    monkeypatch.setattr(Judge, "answers", away_in_the_second_step)
    with pytest.raises(
        ValueError,
        match="no answer after 7 tries .status 503.*; start again later, its answers are kept; the "
        "run stops in step 1; what was before it is saved, --resume goes on$",
    ):
        rl.main(learning)
    assert checkpoint.latest(learning.out).name == "step_000001"
    strict.trouble.clear()
    rl.main(replace(learning, resume=True))
    log = [json.loads(line) for line in (learning.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [0, 1]


def test_rl_saves_what_it_has_learnt_where_a_reward_of_ones_own_fails(learning, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text("SEEN = []\ndef f(e):\n    SEEN.append(e)\n    return 1 / (9 - len(SEEN))\n")
    cfg = replace(learning, judge_url=None, judge="", reward=f"{path}:f")
    why = "ZeroDivisionError: division by zero, line 4; the run stops in step 1; what was before it"
    with pytest.raises(ValueError, match=f"mine.py:f, episode of question 'q[0-9]': {why}"):
        rl.main(cfg)
    assert checkpoint.latest(cfg.out).name == "step_000001"


@pytest.mark.parametrize(
    "said, grade",
    {
        "Final grade: 3": 3, "The grade is 3.": 3, "It fits. The final grade is: **3**": 3,
        "My grade: 3": 3, "GRADE: 4 out of 4": 4, "GRADE: 4.0": 4, "GRADE: 4.0/4.0": 4,
        "GRADE: **3** / 4": 3, "GRADE: (3)": 3, "GRADE: [3]": 3, "GRADE: `3`": 3, "GRADE: 3!": 3,
        '{"GRADE": 3}': 3, '{"grade": "3"}': 3,
        'It ends with "final grade: 4"': None, 'It says. "GRADE: 4"': None, "Not my final grade: 4": None,
        "No grade is 3": None, "GRADE: 3 or 4": None, "GRADE: 4 out of 10": None, "GRADE: 3.50": None,
        "The grade is 3, no, the grade is 4": None, '{"GRADE": 3, "GRADE": 4}': None, "upgrade: 3": None,
        "GRADE: 3" + " *" * 60_000 + "x": None, "final " * 60_000 + "x grade: 3": None,
    }.items(),
)  # fmt: skip
def test_a_grade_in_the_words_that_judges_use(said, grade):
    assert grade_of(Reply(said, True, False)) == grade


def test_rl_goes_on_where_the_judge_refuses_an_answer(strict, learning, capsys):
    strict.trouble += [400]
    rl.main(learning)
    assert "scored by rule: 1 answers; " in capsys.readouterr().err
    log = [json.loads(line) for line in (learning.out / "metrics.jsonl").read_text().splitlines()]
    assert [row["ungraded"] for row in log] == [1, 0]


def test_an_evaluation_counts_what_is_scored_by_rule(strict, learning, tmp_path):
    strict.trouble += [400]
    cfg = evaluation.Config(str(GUESSER), learning.data, tmp_path / "report.json", ("tool",))
    evaluation.main(replace(cfg, judge_url=strict.url, judge="nano"))
    (row,) = json.loads((tmp_path / "report.json").read_text())["rows"].values()
    assert row["ungraded"] == 1 and row["judge_and_rule"]["n"] == len(row["episodes"]) - 1


def test_a_judge_is_not_waited_for_until_the_run_counts_as_stuck(learning):
    with pytest.raises(ValueError, match="--judge-wait-s 60.*: must be below --stuck-after-s"):
        rl.main(replace(learning, judge_wait_s=60.0, stuck_after_s=60.0))
    replace(learning, judge_wait_s=60.0, stuck_after_s=0.0).check()  # 0: never


def hang(request) -> None:
    threading.Event().wait(60)


@pytest.mark.parametrize("away", [503, hang], ids=["away", "hangs"])
@pytest.mark.parametrize("script", ["rl", "eval"])
def test_sigterm_is_heard_while_a_judge_is_waited_for(script, away, strict, questions, tmp_path):
    """As where no judge is: what was done is kept, and the same command goes on."""
    rows = [json.loads(line) | {"answer": "a zebra"} for line in questions.open()][:4]
    questions.write_text("".join(json.dumps(row) + "\n" for row in rows))
    flags = f"--model {GUESSER} --data {questions} --judge-url {strict.url} --judge nano"
    if script == "rl":
        flags += " --out rl --steps 2 --num-prompts 2 --group-size 4 --max-new-tokens 100"
        flags += " --temperature 1.2 --min-format-rate 0 --min-tool-rate 0"
    else:
        flags += " --modes tool"
    command, before = [sys.executable, ROOT / f"{script}.py", *flags.split()], len(strict.headers)
    strict.trouble[:] = [away] * 999
    run = subprocess.Popen(command, cwd=tmp_path, stderr=subprocess.PIPE, text=True)
    try:
        while len(strict.headers) == before and run.poll() is None:
            time.sleep(0.1)
        time.sleep(2.5)  # by now it waits, and not for the first time
        began = time.monotonic()
        run.send_signal(signal.SIGTERM)
        said = run.communicate(timeout=30)[1]
        assert time.monotonic() - began < 8, said
    finally:
        strict.trouble.clear()
        run.kill()
    assert run.returncode == 143, said
    if script == "rl":
        line = "stopped by SIGTERM in step 0; what was before it is saved, --resume goes on"
        assert checkpoint.latest(tmp_path / "rl").name == "step_000000"
    else:
        line = "stopped by SIGTERM; what was played is kept in out/eval"
    assert said.splitlines()[-1].startswith(line)


def test_after_sigterm_no_judge_is_asked(tmp_path):
    judge = Judge(Endpoint("http://127.0.0.1:9/v1", "away", tmp_path, wait_s=600))
    run = SimpleNamespace(preemption=Preemption(), failure="")
    run.preemption.hear()  # in the rollout before
    question = Question("q", "q.mp4", "", "rules", "Who?", (), "red")
    with Training.serving(run, judge):
        judge.answers(["blue"], [question])
        raise AssertionError("it was asked")
    assert not run.failure and not judge.endpoint.tally
