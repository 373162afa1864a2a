"""Ablations make what is missing and no more, and put figures beside each other by row."""

import json
import os
import shlex
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import tyro

import rl
from nanosport.bench import ablate
from nanosport.bench.ablate import ROWS, Config, Stage, demos_record, ensure, stages_of
from nanosport.cli import Preempted
from nanosport.engine.players import load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Env, Limits
from nanosport.env.reward import Reward
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.records import Episode, read_questions
from nanosport.train.metrics import rollout_stats
from nanosport.video import Video


def row_of(report: Path, **figures: float) -> None:
    report.parent.mkdir(parents=True, exist_ok=True)
    score = figures["accuracy"] / 100
    episodes = [{"id": f"q{k}", "video": f"v{k}", "accuracy": score} for k in range(9)]
    report.write_text(json.dumps({"rows": {"x": figures | {"episodes": episodes}}, "command": "c"}))


def made(cfg: Config, seed: int, row: str, **figures: float) -> None:
    """A row's report as if its stages had run."""
    stages = stages_of(cfg, seed, row)
    row_of(stages[-1].made, **figures)
    stages[-2].made.mkdir(exist_ok=True)
    line = dict.fromkeys(ablate.CURVES, 0.5 + seed) | {"step": 0}
    (stages[-2].made / "metrics.jsonl").write_text(json.dumps(line) + "\n")
    about = {"commands": [shlex.join(stage.args) for stage in stages], "seconds": 1}
    ablate.record(stages[-1], cfg.out / f"seed{seed}", about)


def test_every_row_is_rl_with_one_thing_changed(tmp_path):
    made = {}
    for row in ROWS:
        *_, learn, _ = stages_of(Config(out=tmp_path), 3, row)
        made[row] = tyro.cli(rl.Config, args=learn.args[1:])
        made[row].check()
        assert made[row].seed == 3 and made[row].model == f"{tmp_path}/seed3/sft/model"
    plain = made.pop("v1")
    for row, cfg in made.items():
        same = replace(cfg, out=plain.out, data=plain.data)
        changed = [k for k in vars(same) if getattr(same, k) != getattr(plain, k)]
        assert len(changed) == 1, (row, changed)
        assert (cfg.data != plain.data) == (row in rl.BY_CLASS)


def test_a_stage_is_made_once_and_again_when_any_command_before_it_changes(tmp_path):
    script = "import sys; open(sys.argv[1], 'a').write('x')"
    stage = Stage("one", ("-c", script, str(tmp_path / "result")), tmp_path / "result")

    def times(commands: list[str]) -> int:
        ensure(stage, commands, tmp_path, None, 0)
        return len(stage.made.read_text())

    assert times(["a", "b"]) == times(["a", "b"]) == 1
    assert times(["a", "c"]) == 1, "begun anew, not added to"
    assert json.loads((tmp_path / "one.made.json").read_text())["commands"] == ["a", "c"]
    stage.made.unlink()
    assert times(["a", "c"]) == 1


def test_a_run_that_was_cut_goes_on_and_one_of_other_flags_is_replaced(tmp_path, monkeypatch):
    said = []
    monkeypatch.setattr(ablate, "run", lambda args, log: said.append(args[-1]))
    stage = Stage("rl", ("rl.py",), tmp_path / "rl")
    for commands in (["a"], ["a"], ["b"]):  # its folder never comes, as after a kill
        ensure(stage, commands, tmp_path, None, 0)
    assert said == ["--overwrite", "--resume", "--overwrite"]


def test_a_command_that_fails_ends_the_ablation_in_one_line(tmp_path):
    stage = Stage("one", ("-c", "raise SystemExit('error: no such clip')"), tmp_path / "result")
    with pytest.raises(ValueError, match=r"ended with 1: error: no such clip \(see .*one.log\)"):
        ensure(stage, ["a"], tmp_path, None, 0)


def test_sigterm_reaches_the_command_that_is_at_work(tmp_path):
    script = "import signal, sys, time\n"
    script += "signal.signal(signal.SIGTERM, lambda *_: (print('saved'), sys.exit()))\n"
    script += "print('begun', flush=True); time.sleep(60)"
    log, before = tmp_path / "log", signal.signal(signal.SIGTERM, ablate.stop)

    def watch() -> None:
        while not log.exists() or "\nbegun" not in log.read_text():
            time.sleep(0.01)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()
    try:
        with pytest.raises(Preempted, match="the same command goes on"):
            ablate.run(["-c", script], log)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert log.read_text().endswith("saved\n")


def test_what_the_demo_has_made_is_taken_where_its_flags_are_the_same(tmp_path):
    cfg, demo = Config(out=tmp_path / "out"), tmp_path / "demo"
    render, teach, tune, learn, judge = stages_of(cfg, 1, "v1")
    (demo / "arena").mkdir(parents=True)
    (demo / "arena/arena.json").write_text('{"clips": 410, "seed": 1}')
    assert not demos_record(render, demo, 1), "no trajectories yet"
    (demo / "arena/trajectories.jsonl").touch()
    assert demos_record(render, demo, 1) and not demos_record(render, demo, 2)
    for stage, name, steps in ((tune, "sft", 350), (learn, "rl", 40)):
        assert not demos_record(stage, demo, 1)
        (demo / name / "checkpoints/step_000002").mkdir(parents=True)
        config = {"seed": 1, "steps": steps, "out": "elsewhere", "resume": True}
        about = {"config": config, "command": "c", "commit": "e"}
        (demo / name / "run.json").write_text(json.dumps(about))
        assert not demos_record(stage, demo, 1), "not at its end"
        (demo / name / f"checkpoints/step_{steps:06d}").mkdir()
        assert demos_record(stage, demo, 1) == {"command": "c", "commit": "e"}
        (demo / name / "run.json").write_text(json.dumps(about | {"config": config | {"lr": 1}}))
        assert not demos_record(stage, demo, 1)
        (demo / name / "run.json").write_text(json.dumps(about))
    config = {"seed": "0", "modes": "('tool',)"}
    (demo / "eval_rl.json").write_text(json.dumps({"config": config, "command": "", "commit": ""}))
    assert demos_record(judge, demo, 1)
    for k, stage in enumerate((render, teach, tune, learn, judge), 1):
        cfg.out.mkdir(exist_ok=True), stage.made.parent.mkdir(exist_ok=True, parents=True)
        ensure(stage, ["a"] * k, cfg.out, demo, 1)
        assert stage.made.resolve() == (demo / stage.demos).resolve()


def test_the_table_and_the_curves_are_of_what_is_there(tmp_path):
    cfg = Config((0, 1), ("v2", "accuracy"), tmp_path / "out", keep=tmp_path / "kept")
    for seed in (0, 1):
        made(cfg, seed, "v2", **dict.fromkeys(ablate.COLUMNS, 90.0 + seed))
    made(cfg, 1, "accuracy", **dict.fromkeys(ablate.COLUMNS, 80.0))
    made(replace(cfg, smoke=True), 0, "accuracy", **dict.fromkeys(ablate.COLUMNS, 10.0))
    said = ablate.write(cfg)
    assert "| v2 | 0 1 | 90.5 ± 0.7 |" in said and "| accuracy | 1 | 80.0 |" in said
    assert (cfg.keep / "table.md").read_text() == said and "v1" not in said
    kept = json.loads((cfg.keep / "v2_seed1.json").read_text())
    assert "episodes" not in kept["rows"]["x"] and kept["command"] == "c"
    assert (cfg.keep / "v2_seed1.jsonl").exists() and (cfg.keep / "kl.svg").exists()
    scores = (cfg.keep / "v2_seed1.scores.jsonl").read_text().splitlines()
    assert json.loads(scores[8]) == {"id": "q8", "video": "v8", "accuracy": 0.91}
    made(cfg, 1, "v1", **dict.fromkeys(ablate.COLUMNS, 81.0))
    wanted = "- `v2` against `v1` (seeds 1): overall +10.0 points, p = 0.0"
    assert wanted in ablate.sentences(ablate.results(cfg)) and "against" not in said
    assert "polyline" in (cfg.out / "accuracy.svg").read_text()


def test_what_is_kept_is_not_made_again_where_its_commands_are_the_same(tmp_path, monkeypatch):
    """So that rows made on several machines come together in one table."""
    here = Config((0,), ("v1",), Path("out"), keep=tmp_path / "kept")
    (tmp_path / "one").mkdir()
    monkeypatch.chdir(tmp_path / "one")
    made(here, 0, "v1", **dict.fromkeys((*ablate.COLUMNS, "tool_rate"), 90.0))
    said = ablate.write(here)

    # elsewhere nothing is there, and nothing is run
    (tmp_path / "two").mkdir()
    monkeypatch.chdir(tmp_path / "two")
    monkeypatch.setattr(ablate, "ensure", lambda *_: pytest.fail("it is made again"))
    ablate.main(here)
    assert ablate.write(here) == said and "| v1 | 0 | 90.0 |" in said
    assert len(ablate.results(here)["v1"][0][0]["rows"]["x"]["episodes"]) == 9
    made(replace(here, smoke=True), 0, "v1", **dict.fromkeys(ablate.COLUMNS, 10.0))
    assert ablate.write(here) == said, "what was made otherwise takes nobody's place"
    other = json.loads((here.keep / "v1_seed0.json").read_text())
    other["made"][-1]["commands"][0] += " --seed 3"
    (here.keep / "v1_seed0.json").write_text(json.dumps(other))
    assert not ablate.results(here)


def test_a_demo_of_another_seed_is_refused(tmp_path):
    (tmp_path / "arena").mkdir()
    (tmp_path / "arena/arena.json").write_text('{"clips": 410, "seed": 7}')
    with pytest.raises(ValueError, match="--from-demo .*: its seed is not among --seeds"):
        ablate.main(Config(out=tmp_path / "out", from_demo=(tmp_path,)))


# What the rows need of the rules.


def test_a_repeated_window_is_shown_again_where_it_is_allowed_and_counted_anyhow(arena_folder):
    (question, *_) = read_questions(arena_folder / "test.jsonl")
    call = '<think>i look.</think><tool_call>{"name": "frame_extraction_tool", '
    call += '"arguments": {"idx_start": 0, "idx_end": 20}}</tool_call>'
    empty, earned = Episode(question, (), (), (), (), (), ""), Reward(1.0, 1.0, 0.0, 1.0, 0.0, 0.0)
    for near, error in ((0, True), (-1, False)):
        env = Env(question, Video(question.video), Limits(near=near))
        for is_second in (False, True):
            assert bool(env.step(call).error) == (is_second and error)
            so_far = replace(empty, turns=tuple(env.turns))
            assert rollout_stats([so_far], [earned], 0)["repeat_rate"] == is_second


def test_the_first_frames_are_drawn_for_each_prompt_and_by_the_seed(nano_folder, arena_folder):
    asked = read_questions(arena_folder / "test.jsonl")
    encoder, sampler = load_sampler(nano_folder, Sampling(max_new_tokens=2, stops=STOPS))

    def seen(seed: int, first: int, number: int) -> list[int]:
        limits = Limits(num_frames=16, frames_drawn=(4, 8, 16))
        questions = asked[first : first + number]
        episodes = rollout(
            sampler, encoder, questions, limits, 2, (seed, 0), range(first, first + number)
        )
        return [len(episode.frames) for episode in episodes]

    whole = seen(0, 0, 12)
    assert set(whole) == {4, 8, 16} and whole[::2] == whole[1::2], "a group has one budget"
    assert seen(0, 4, 2) == whole[8:12], "whatever is played beside it"
    assert seen(1, 0, 12) != whole
