"""A run is measured as it trains: what is best stays apart, a run that has worn out ends, and
trackers get what the log gets."""

import json
import os
import shutil
import signal
import struct
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

import rl
import train
from data_prep import draw
from nanosport.cli import Preempted
from nanosport.records import Episode, Turn, read_questions, record_row
from nanosport.report import THUMBNAIL
from nanosport.strip import strip
from nanosport.train import heldout, track
from nanosport.train.inputs import Records
from nanosport.video import Video
from tests.helpers.runs import ROOT, flags, killed, log, torchrun


@pytest.fixture(scope="module")
def held_out(arena_folder, tmp_path_factory) -> Path:
    """Three questions about a clip that nobody trains on."""
    path = tmp_path_factory.mktemp("held") / "held_out.jsonl"
    rows = [record_row(q, path.parent) for q in read_questions(arena_folder / "test.jsonl")[:3]]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def sft(arena_folder, held_out, tmp_path_factory) -> train.Config:
    """A finished SFT run that was measured before, in and after its four steps."""
    cfg = train.Config(
        str(ROOT / "assets/nano-sft"), arena_folder / "trajectories.jsonl",
        tmp_path_factory.mktemp("sft") / "run", steps=4, batch_size=2, warmup=1,
        eval_every=2, eval_data=held_out, max_new_tokens=60,
    )  # fmt: skip
    train.main(cfg)
    return cfg


def evaluations(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "heldout.jsonl").read_text().splitlines()]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(folder / "model.safetensors")


def same(one: dict, other: dict) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_a_run_is_measured_before_its_first_step_and_after_the_last(sft):
    rows = evaluations(sft.out)
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert all(row["questions"] == 3 and "intervals" in row for row in rows)
    seen = [row["accuracy"] for row in rows]
    assert [row["best"] for row in rows] == [max([-1, *seen[:k]]) < seen[k] for k in range(3)]
    lines = (sft.out / "metrics.jsonl").read_text().splitlines()
    assert ["seconds_held_out" in line for line in lines] == [True, False, True, False]


def test_evaluations_change_nothing_of_the_training(sft, tmp_path):
    cfg = replace(sft, out=tmp_path / "run", eval_every=0, eval_data=None)
    train.main(cfg)
    assert same(weights(cfg.out / "model"), weights(sft.out / "model"))
    assert not (cfg.out / "best").exists()


def test_the_best_model_is_kept_apart_and_a_run_that_wears_out_ends(sft, tmp_path, monkeypatch):
    accuracies = iter([10.0, 30.0, 20.0, 30.0])
    measured = []

    def measure(self, step: int) -> dict:
        measured.append({name: w.clone() for name, w in self.training.model.named_parameters()})
        return {"accuracy": next(accuracies), "intervals": {}}

    monkeypatch.setattr(heldout.HeldOut, "_measure", measure)
    cfg = replace(sft, out=tmp_path / "run", eval_every=1, patience=2, steps=9)
    train.main(cfg)
    rows = evaluations(cfg.out)
    assert [row["best"] for row in rows] == [True, True, False, False], "an equal one is not better"
    assert len(log(cfg.out)) == 3, "it has ended before its fourth step"
    best = weights(cfg.out / "best")
    assert all(torch.equal(best[name], measured[1][name]) for name in best)
    assert not same(best, weights(cfg.out / "model")) and not list(cfg.out.glob(".best*"))
    assert same(weights(cfg.out / "model"), {name: measured[3][name] for name in best})


def test_a_run_that_goes_on_measures_what_it_would_have_measured(sft, tmp_path, monkeypatch):
    cfg = replace(sft, out=tmp_path / "run", save_every=2)
    killed(train.main, cfg, monkeypatch, step=3)
    assert [row["step"] for row in evaluations(cfg.out)] == [0, 2]
    train.main(replace(cfg, resume=True))
    assert evaluations(cfg.out) == evaluations(sft.out)


def test_the_best_model_is_its_checkpoints_and_not_a_later_one(sft, tmp_path, monkeypatch):
    """After a later checkpoint was lost, RUN/model is that one's still."""
    accuracies = iter([10.0, 20.0, 90.0, 80.0])
    monkeypatch.setattr(
        heldout.HeldOut, "_measure", lambda *_: {"accuracy": next(accuracies), "intervals": {}}
    )
    cfg = replace(sft, out=tmp_path / "run", save_every=2, steps=2)
    train.main(cfg)
    wanted = weights(cfg.out / "best")
    shutil.rmtree(cfg.out / "model")
    shutil.copytree(ROOT / "assets/nano-sft", cfg.out / "model")
    train.main(replace(cfg, resume=True, steps=4))
    assert [row["best"] for row in evaluations(cfg.out)] == [True, True, False]
    assert same(weights(cfg.out / "best"), wanted)


def test_a_run_that_is_extended_keeps_its_last_evaluation(sft, tmp_path, monkeypatch):
    """Which it does not make again: the best model must not give way to a worse one."""
    accuracies = iter([10.0, 20.0, 90.0, 80.0, 85.0])
    monkeypatch.setattr(
        heldout.HeldOut, "_measure", lambda *_: {"accuracy": next(accuracies), "intervals": {}}
    )
    cfg = replace(sft, out=tmp_path / "run", eval_every=3)
    train.main(cfg)
    best = weights(cfg.out / "best")
    train.main(replace(cfg, resume=True, steps=7))
    rows = evaluations(cfg.out)
    assert [row["step"] for row in rows] == [0, 3, 4, 6, 7]
    assert [row["best"] for row in rows] == [True, True, True, False, False]
    assert same(weights(cfg.out / "best"), best)


def test_other_questions_say_nothing_about_which_model_is_better(sft, tmp_path, monkeypatch):
    accuracies = iter([10.0, 90.0, 95.0, 20.0, 10.0])
    monkeypatch.setattr(
        heldout.HeldOut, "_measure", lambda *_: {"accuracy": next(accuracies), "intervals": {}}
    )
    cfg = replace(sft, out=tmp_path / "run")
    train.main(cfg)
    harder = tmp_path / "harder.jsonl"
    row = json.loads(sft.eval_data.read_text().splitlines()[0])
    row["video"] = str((sft.eval_data.parent / row["video"]).resolve())
    harder.write_text(json.dumps(row) + "\n")
    train.main(replace(cfg, resume=True, steps=6, eval_data=harder))
    rows = evaluations(cfg.out)  # the fourth step is measured anew, on the other questions
    assert [(row["step"], row["best"]) for row in rows] == [
        (0, True),
        (2, True),
        (4, True),
        (6, False),
    ]


def test_sigterm_in_an_evaluation_ends_the_run_where_it_can_go_on(sft, tmp_path, monkeypatch):
    cfg, play, plays = replace(sft, out=tmp_path / "run"), Records.play, []

    def asked(self, *args, **how) -> list[Episode]:
        plays.append(1)
        if len(plays) == 2:  # the first evaluation is before the first step
            os.kill(os.getpid(), signal.SIGTERM)
        return play(self, *args, **how)

    with monkeypatch.context() as patch:
        patch.setattr(Records, "play", asked)
        with pytest.raises(Preempted, match="stopped by SIGTERM in step 2; what was before it"):
            train.main(cfg)
    assert [row["step"] for row in evaluations(cfg.out)] == [0]
    train.main(replace(cfg, resume=True))
    assert evaluations(cfg.out) == evaluations(sft.out) and log(cfg.out) == log(sft.out)


def test_a_run_that_is_replaced_leaves_no_best_model(sft, tmp_path):
    cfg = replace(sft, out=tmp_path / "run", steps=1, eval_every=1)
    train.main(cfg)
    with pytest.raises(ValueError, match="would replace the model that it begins with"):
        train.main(replace(cfg, model=str(cfg.out / "best"), overwrite=True))
    train.main(replace(cfg, eval_every=0, eval_data=None, overwrite=True))
    assert not (cfg.out / "best").exists() and not (cfg.out / "heldout.jsonl").exists()


def test_two_ranks_share_the_questions(sft, tmp_path):
    """The model is sharded there, so that a whole copy plays: it must get the weights."""
    cfg = replace(sft, out=tmp_path / "run", eval_every=4)
    done = torchrun([["train", flags(cfg)]])
    assert done.returncode == 0, done.stderr[-2000:]
    first, last = evaluations(tmp_path / "run")
    assert first == evaluations(sft.out)[0], "before its first step it is the same model"
    assert last["step"] == 4 and last["questions"] == 3
    assert (tmp_path / "run/best/model.safetensors").exists()


def test_rl_measures_with_its_own_sampler(arena_folder, held_out, tmp_path):
    cfg = rl.Config(
        str(ROOT / "assets/nano-sft"), arena_folder / "rl.jsonl", tmp_path / "run", steps=2,
        num_prompts=2, group_size=2, max_new_tokens=60, min_format_rate=0, eval_every=1,
        eval_data=held_out, frames_drawn=(4,),
    )  # fmt: skip
    rl.main(cfg)
    rows = evaluations(cfg.out)
    assert [row["step"] for row in rows] == [0, 1, 2] and (cfg.out / "best/config.json").exists()
    assert min(row["frames"] for row in rows) >= 8, "frames are drawn for rollouts alone"
    plain = replace(cfg, out=tmp_path / "plain", eval_every=0, eval_data=None)
    rl.main(plain)
    assert same(weights(cfg.out / "model"), weights(plain.out / "model"))
    assert log(cfg.out) == log(plain.out)
    work = [(run.out / "metrics.jsonl").read_text().splitlines() for run in (cfg, plain)]
    steps = [[json.loads(line)["decode_steps"] for line in lines] for lines in work]
    assert steps[0] == steps[1], "the log counts what the rollouts have taken, and no more"


def test_what_cannot_be_is_said_before_a_model_is_loaded(sft, held_out, tmp_path):
    for changed, said in (
        ({"eval_every": 0}, "--eval-every, --eval-data: give both, or neither"),
        ({"eval_every": 0, "eval_data": None, "patience": 1}, "--patience 1: needs --eval-every"),
        ({"track": "aim"}, "--track aim: is not installed: pip install aim"),
    ):
        with pytest.raises(ValueError, match=said):
            replace(sft, out=tmp_path, **changed).check()
    (tmp_path / "heldout.jsonl").write_text(held_out.read_text())
    with pytest.raises(ValueError, match="heldout.jsonl: is the file that is read"):
        replace(sft, out=tmp_path, eval_data=tmp_path / "heldout.jsonl").check()
    cfg = replace(sft, out=tmp_path / "run", eval_data=sft.data)
    with pytest.raises(ValueError, match="--eval-data .*: the video of .* is trained on"):
        train.main(cfg)


# Trackers: their own files, read back. Each test says what is not installed.


def tracked(name: str, sft: train.Config, out: Path) -> None:
    if name not in sys.modules and track.find_spec(name) is None:
        pytest.skip(f"{name} is not installed")
    train.main(replace(sft, out=out, track=name, steps=2))


def test_tensorboard_has_what_the_log_has(sft, tmp_path):
    tracked("tensorboard", sft, tmp_path / "run")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(tmp_path / "run/tensorboard"))
    events.Reload()
    written = [event.value for event in events.Scalars("loss")]
    assert written == pytest.approx([row["loss"] for row in log(tmp_path / "run")])
    assert [event.step for event in events.Scalars("held_out/accuracy")] == [0, 2]
    (image, *_) = events.Images("held_out/0")
    assert image.encoded_image_string[:4] == b"\x89PNG" and image.width >= 8 * min(
        THUMBNAIL, draw.WIDTH
    )
    text = events.Tensors("held_out/0/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "truth: " in text and "<think>" in text


def wandb_history(path: Path) -> list[dict]:
    """The rows that a .wandb file holds when wandb's own process has ended it: a log of LevelDB's
    form, in blocks of 32 KiB, of records in protobuf."""
    from wandb.proto.wandb_internal_pb2 import Record

    raw, at, whole, rows, has_ended = path.read_bytes(), 7, b"", [], False
    while at + 7 <= len(raw):
        if 2**15 - at % 2**15 < 7:  # too little of the block is left for a head
            at += 2**15 - at % 2**15
            continue
        _, length, part = struct.unpack("<IHB", raw[at : at + 7])
        whole += raw[at + 7 : at + 7 + length]
        at += 7 + length
        if part in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            items, has_ended = record.history.item, has_ended or record.HasField("exit")
            rows += [{i.key or ".".join(i.nested_key): json.loads(i.value_json) for i in items}]
            whole = b""
    if not has_ended:
        time.sleep(0.1)
        return wandb_history(path)
    return [row for row in rows if row]


def test_wandb_has_what_the_log_has_and_a_resumed_run_goes_on_in_it(sft, tmp_path):
    run = tmp_path / "run"
    tracked("wandb", sft, run)
    (written,) = run.glob("wandb/offline-run-*/*.wandb")
    rows = wandb_history(written)
    losses = [row["loss"] for row in rows if "loss" in row]
    assert losses == pytest.approx([row["loss"] for row in log(run)])
    assert [row["_step"] for row in rows if "held_out/accuracy" in row] == [0, 2]
    shown = rows[0]["held_out/0.path"], rows[0]["held_out/0.caption"]
    assert (written.parent / "files" / shown[0]).read_bytes()[:4] == b"\x89PNG"
    assert "<think>" in shown[1]

    train.main(replace(sft, out=run, track="wandb", steps=3, resume=True))
    first, second = sorted(run.glob("wandb/offline-run-*/*.wandb"))
    assert first.name == second.name  # wandb sync makes one run of both
    assert [row["_step"] for row in wandb_history(second) if "loss" in row] == [2]


def test_trackio_leaves_its_files_in_the_run(sft, tmp_path):
    tracked("trackio", sft, tmp_path / "run")
    files = [path for path in (tmp_path / "run/trackio").rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) > 10_000
    assert any(path.suffix == ".db" for path in files)
    assert any(path.suffix == ".png" for path in files)


def test_an_episode_is_shown_with_its_frames_and_words(arena_folder):
    question = read_questions(arena_folder / "test.jsonl")[0]
    turns = (
        Turn("<think>a</think>", "tool", (3, 9), (3, 5, 9)),
        Turn("<b>", "invalid", error="a turn is"),
    )
    episode = Episode(question, (), (), (), (0, 20, 3, 5, 9), turns, "format_error")
    shown, gone = [], replace(episode, question=replace(question, video="/gone.mp4"))
    tracker = SimpleNamespace(show=lambda *told: shown.append(told[1:3]))
    track.show_episodes(tracker, 3, "rollout", [gone, episode], [0.0, 1.0])
    ((name, picture_HWC),) = shown  # a lost video ends no run
    video = Video(question.video, span_s=question.span_s)
    assert name == "rollout/1" and np.array_equal(picture_HWC, strip(episode, video))
    said = track.transcript(episode, 0.25)
    assert question.question in said and "refused: a turn is" in said
    assert said.endswith("format_error, 0.25")
    assert track.numbers_of({"a": 1, "b": float("nan"), "c": {"d": 2}, "e": "x"}) == {"a": 1.0}
