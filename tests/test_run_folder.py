"""A run's folder: who may write there, what a resumed run trusts, and what it began with."""

import ctypes
import errno
import fcntl
import gc
import json
import os
import shutil
import subprocess
import sys
import threading
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import rl
import train
from nanosport.bench.demo import CURVES, curve
from nanosport.model.folder import load_model
from nanosport.train import checkpoint, dist, optim
from nanosport.train.run import Run
from tests.helpers.runs import ROOT, killed, log


@pytest.fixture(scope="module")
def straight(nano_folder, arena_folder, tmp_path_factory) -> train.Config:
    """The config of a finished run of four steps, which nobody has disturbed."""
    data, out = arena_folder / "trajectories.jsonl", tmp_path_factory.mktemp("straight") / "run"
    cfg = train.Config(str(nano_folder), data, out, steps=4, batch_size=2, warmup=1, save_every=2)
    train.main(cfg)
    return cfg


@pytest.fixture
def cut(straight, tmp_path) -> train.Config:
    """The run as it was after its second step was saved, with the third and fourth in the log."""
    shutil.copytree(straight.out, tmp_path / "run")
    shutil.rmtree(tmp_path / "run/checkpoints/step_000004")
    return replace(straight, out=tmp_path / "run", resume=True)


@pytest.fixture
def whole(straight, tmp_path) -> train.Config:
    """The finished run, with both of its checkpoints."""
    shutil.copytree(straight.out, tmp_path / "run")
    return replace(straight, out=tmp_path / "run", resume=True)


def bytes_of(folder: Path) -> dict[str, bytes]:
    """Every file of a run's folder but the lock."""
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "run.lock"]
    return {str(p.relative_to(folder)): p.read_bytes() for p in files}


def assert_ends_alike(one: train.Config, other: train.Config) -> None:
    weights = [load_file(cfg.out / "model/model.safetensors") for cfg in (one, other)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])
    for name in ("step_000002", "step_000004"):
        pair = [cfg.out / "checkpoints" / name for cfg in (one, other)]
        moments = [load_file(next(folder.glob("*.safetensors"))) for folder in pair]
        assert all(torch.equal(moments[0][name], moments[1][name]) for name in moments[0])


# The log.


@pytest.mark.parametrize(
    "harm, left",
    [
        (lambda log: log.write_bytes(log.read_bytes()[:-40]), {0, 1}),
        (lambda log: log.unlink(), set()),
        (lambda log: log.write_bytes(b""), set()),
        (lambda log: log.write_bytes(b"\0" * 4096), set()),
        (lambda log: log.write_bytes(log.read_bytes()[7:]), {1}),
        (lambda log: log.write_bytes(b"[1]\n3\nnull\n{}\n\xff\n" + log.read_bytes()), {0, 1}),
        (lambda log: log.write_bytes(log.read_bytes() * 2 + b'{"step": ["x"]}\n'), {0, 1}),
    ],
)
def test_the_checkpoint_decides_and_the_log_is_mended(harm, left, cut, straight, capsys):
    harm(cut.out / "metrics.jsonl")
    train.main(cut)
    assert log(cut.out) == [row for row in log(straight.out) if row["step"] in left | {2, 3}]
    assert_ends_alike(cut, straight)
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "mended" in s]
    assert f"{2 - len(left)} of 2 steps are lost" in line


def test_a_log_that_is_whole_is_not_mended(cut, capsys):
    train.main(cut)
    assert "mended" not in capsys.readouterr().out


def test_what_happens_between_two_steps_is_timed_in_the_second(straight):
    """The look through the videos, and the save that each second step ends with."""
    rows = [json.loads(line) for line in (straight.out / "metrics.jsonl").open()]
    assert ["seconds_check" in row for row in rows] == [True, False, False, False]
    assert ["seconds_save" in row for row in rows] == [False, False, True, False]
    assert all(row["seconds_train"] > 0 for row in rows)


def test_figures_that_are_not_finite_are_null(tmp_path):
    nan, inf = float("nan"), float("inf")
    run = Run(tmp_path / "run", train.Config(), resume=False, overwrite=False)
    run.write({"step": 0, "loss": nan, "grad_norm": inf, "kl": -inf, "lr": 1e-3, "tokens": 7})
    text = run.log.read_text()
    assert json.loads(text) == {
        "step": 0, "loss": None, "grad_norm": None, "kl": None, "lr": 1e-3, "tokens": 7,
    }  # fmt: skip
    rows = [{"step": k, **dict.fromkeys(CURVES, 0.5 if k else None)} for k in range(3)]
    assert "nan" not in curve(rows) and curve(rows).count("polyline") == len(CURVES)


def test_the_seconds_of_all_parts_add_up(cut):
    path = cut.out / "run.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"seconds": 1000.0}))
    train.main(cut)
    first = json.loads(path.read_text())["seconds"]
    train.main(cut)  # nothing is left to do
    assert 1000 < first <= json.loads(path.read_text())["seconds"] < 1100
    for lost in ("", "[]", '{"seconds": "long"}', '{"seconds": null}'):
        path.write_text(lost)
        train.main(cut)
        assert 0 <= json.loads(path.read_text())["seconds"] < 100


def test_a_killed_run_has_counted_its_time_until_it_was_saved(straight, monkeypatch, tmp_path):
    cfg, began = replace(straight, out=tmp_path / "run"), time.time()
    killed(train.main, cfg, monkeypatch, step=3)
    assert 0 < json.loads((cfg.out / "run.json").read_text())["seconds"] <= time.time() - began + 1


# What a run began with.


def harm_weights(folder: Path, _) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][3] += 1e-3
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


CHANGES = {
    "weights": (harm_weights, "--model, model.safetensors"),
    "tokenizer": (
        lambda folder, _: (folder / "tokenizer_config.json").write_text("{}"),
        "--model, tokenizer_config.json",
    ),
    "new settings": (
        lambda folder, _: (folder / "generation_config.json").write_text("{}"),
        "--model, generation_config.json",
    ),
    "data": (
        lambda _, data: data.write_text("".join(data.read_text().splitlines(True)[::-1])),
        "--data",
    ),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_a_run_began_with_must_not_change_unless_allowed(change, cut, tmp_path, capsys):
    """Nothing of the run is touched where it is refused."""
    harm, named = CHANGES[change]
    model, data = tmp_path / "model", tmp_path / "arena" / cut.data.name
    shutil.copytree(cut.model, model)
    shutil.copytree(cut.data.parent, data.parent)
    cut, before = replace(cut, model=str(model), data=data), bytes_of(cut.out)
    harm(model, data)
    with pytest.raises(
        ValueError, match="not what the run in .* began with; .*--allow-changed"
    ) as no:
        train.main(cut)
    assert str(no.value).startswith(named + ":") and "\n" not in str(no.value)
    del no
    assert bytes_of(cut.out) == before
    train.main(replace(cut, allow_changed=True))
    assert f"{named}: not what the run in" in capsys.readouterr().out
    assert [row["step"] for row in log(cut.out)] == [0, 1, 2, 3]
    train.main(cut)  # what it goes on with is what it now has


def test_run_model_and_data_may_move_together(cut, straight, tmp_path):
    """Copied, so that their times are others too."""
    new = tmp_path / "another" / "disk"
    shutil.copytree(cut.model, new / "model", copy_function=shutil.copyfile)
    shutil.copytree(cut.data.parent, new / "data", copy_function=shutil.copyfile)
    shutil.copytree(cut.out, new / "run", copy_function=shutil.copyfile)
    data = new / "data" / cut.data.name
    moved = replace(cut, model=str(new / "model"), data=data, out=new / "run")
    train.main(moved)
    assert log(moved.out) == log(straight.out)
    assert_ends_alike(moved, straight)


def test_what_a_run_began_with_is_written_down(straight):
    began = json.loads((straight.out / "run.json").read_text())["began_with"]
    files = {"model.safetensors", "config.json", "tokenizer.json"}
    assert {"--data", *(f"--model, {name}" for name in files)} <= began.keys()


@pytest.mark.parametrize("way", ["itself", "a link"])
@pytest.mark.parametrize("how", [{"resume": True}, {"resume": False, "overwrite": True}])
def test_a_run_does_not_begin_with_the_model_it_replaces(way, how, cut, tmp_path):
    model, before = cut.out / "model", bytes_of(cut.out)
    if way == "a link":
        (tmp_path / "link").symlink_to(model)
        model = tmp_path / "link"
    with pytest.raises(ValueError, match="--model .* would replace the model that it begins with"):
        train.main(replace(cut, model=str(model), **how))
    with pytest.raises(ValueError, match="--model .* would replace the model that it begins with"):
        rl.main(rl.Config(str(model), cut.data.parent / "rl.jsonl", cut.out, **how))
    assert bytes_of(cut.out) == before


# Damage.


def edit(checkpoint_folder: Path, **fields) -> None:
    path = checkpoint_folder / "trainer.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


def shard_of(folder: Path) -> Path:
    return next(folder.glob("*.safetensors"))


def zeros(folder: Path) -> None:
    with open(shard_of(folder), "r+b") as file:
        file.seek(shard_of(folder).stat().st_size // 2)
        file.write(b"\0" * 4096)


DAMAGE = {
    "cut": lambda folder: os.truncate(shard_of(folder), 1000),
    "zeros": zeros,
    "a shard is lost": lambda folder: shard_of(folder).unlink(),
    "no trainer.json": lambda folder: (folder / "trainer.json").unlink(),
    "no JSON": lambda folder: (folder / "trainer.json").write_bytes(b"\xff{"),
    "no object": lambda folder: (folder / "trainer.json").write_text("[]"),
    "empty object": lambda folder: (folder / "trainer.json").write_text("{}"),
    "a step in words": lambda folder: edit(folder, step="x"),
    "another step": lambda folder: edit(folder, step=3),
    "settings as a list": lambda folder: edit(folder, settings=["seed"]),
    "a setting that is null": lambda folder: edit(folder, settings={"seed": None}),
    "checksums in words": lambda folder: edit(folder, crc32={"a": "b"}),
    "a count in words": lambda folder: edit(folder, starved="x"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_checkpoint_is_set_aside_and_the_one_before_taken(
    damage, whole, straight, capsys
):
    harmed = whole.out / "checkpoints/step_000004"
    DAMAGE[damage](harmed)
    train.main(whole)
    (line,) = [s for s in capsys.readouterr().out.splitlines() if "set aside" in s]
    assert str(harmed) in line and line.endswith(
        "damaged_step_000004, and the run goes on from step_000002"
    )
    assert harmed.with_name("damaged_step_000004").is_dir()
    assert log(whole.out) == log(straight.out)
    assert_ends_alike(whole, straight)


@pytest.mark.parametrize("damage", ["zeros", "no object"])
def test_where_no_checkpoint_is_whole_nothing_is_touched(damage, cut):
    DAMAGE[damage](cut.out / "checkpoints/step_000002")
    before = bytes_of(cut.out)
    with pytest.raises(ValueError, match="no whole checkpoint to resume from: .*step_000002") as no:
        train.main(cut)
    assert "\n" not in str(no.value) and bytes_of(cut.out) == before


def test_a_checkpoint_of_an_older_version_is_gone_on_from(cut, straight):
    """It has no checksums, and the paths of model and data among its flags."""
    path = cut.out / "checkpoints/step_000002/trainer.json"
    state = json.loads(path.read_text())
    del state["crc32"], state["began_with"]
    state["settings"] |= {"model": "somewhere", "data": "else.jsonl"}
    path.write_text(json.dumps(state))
    train.main(cut)
    assert log(cut.out) == log(straight.out)
    assert_ends_alike(cut, straight)


def test_other_folders_among_the_checkpoints_are_let_be(cut):
    folder = cut.out / "checkpoints"
    for name in ("step_000002_backup", "step_best", "damaged_step_000001"):
        shutil.copytree(folder / "step_000002", folder / name)
    train.main(replace(cut, keep=1))
    names = {"step_000004", "step_000002_backup", "step_best", "damaged_step_000001"}
    assert {path.name for path in folder.iterdir()} == names


def test_a_save_that_finds_its_name_taken_is_an_error(nano_folder, tmp_path):
    """It is not silently taken for this run's."""
    model = load_model(nano_folder)
    optimizer = optim.build(model, 0.0)
    checkpoints = checkpoint.Checkpoints(tmp_path, nano_folder, 0, keep=9, dtype=torch.float32)
    checkpoints.save(model, optimizer, {"step": 1})
    checkpoints.finish()
    (tmp_path / "checkpoints/step_000002").mkdir()
    with pytest.raises(ValueError, match="step_000002: is there already, and not of this run"):
        checkpoints.save(model, optimizer, {"step": 2})
    assert not list((tmp_path / "checkpoints").glob(".step_*"))


# Beginning.


@pytest.mark.parametrize("left", ["nothing", "an unfinished checkpoint", "the model beside it"])
def test_resume_begins_anew_where_nothing_was_saved(left, straight, tmp_path, capsys):
    """A scheduler restarts what died early with the same command."""
    cfg = replace(straight, out=tmp_path / "run", resume=True)
    if left != "nothing":
        (cfg.out / "checkpoints/.step_000002").mkdir(parents=True)
        (cfg.out / "checkpoints/.step_000002/shard").write_text("half")
        for name in ("metrics.jsonl", "run.json"):
            (cfg.out / name).write_text('{"step": 0}\n')
    if left == "the model beside it":
        shutil.copytree(straight.out / "model", cfg.out / "model")
        with pytest.raises(ValueError, match="holds a run already"):
            train.main(replace(cfg, resume=False))
    train.main(cfg)
    assert "nothing was saved there yet: the run begins anew" in capsys.readouterr().out
    assert log(cfg.out) == log(straight.out)
    assert_ends_alike(cfg, straight)


def test_what_died_early_may_be_started_again(straight, monkeypatch, tmp_path):
    """With --resume and without it."""
    cfg = replace(straight, out=tmp_path / "run")
    for again in (cfg, replace(cfg, resume=True)):
        killed(train.main, again, monkeypatch, step=1)
        assert len(log(cfg.out)) == 1
    train.main(cfg)
    assert log(cfg.out) == log(straight.out)


def test_a_finished_model_without_checkpoints_is_not_begun_anew(cut):
    shutil.rmtree(cut.out / "checkpoints")
    before = bytes_of(cut.out)
    with pytest.raises(ValueError, match="no run to resume there.*--overwrite"):
        train.main(cut)
    assert bytes_of(cut.out) == before


@pytest.mark.parametrize("name", ["metrics.jsonl", "run.json"])
@pytest.mark.parametrize("resume", [True, False])
def test_a_file_of_somebody_else_is_asked_for_first(name, resume, straight, tmp_path):
    cfg = replace(straight, out=tmp_path, resume=resume)
    (tmp_path / name).write_text("mine")
    with pytest.raises(ValueError, match="--overwrite, or choose another --out"):
        train.main(cfg)
    assert bytes_of(tmp_path) == {name: b"mine"}
    train.main(replace(cfg, overwrite=True))
    assert log(cfg.out) == log(straight.out)


def test_what_is_no_model_is_refused_before_the_first_step(straight, tmp_path):
    (tmp_path / "model").mkdir()
    (tmp_path / "model/thesis.tex").write_text("mine")
    with pytest.raises(ValueError, match="holds other things than a model"):
        train.main(replace(straight, out=tmp_path, overwrite=True))
    assert bytes_of(tmp_path) == {"model/thesis.tex": b"mine"}


def test_the_data_is_not_written_over(straight, tmp_path):
    data = tmp_path / "metrics.jsonl"
    shutil.copy(straight.data, data)
    with pytest.raises(ValueError, match="metrics.jsonl: is the file that is read"):
        train.main(replace(straight, data=data, out=tmp_path, overwrite=True))
    assert data.read_bytes() == straight.data.read_bytes()


def test_checkpoints_that_link_nowhere_are_refused_before_the_first_step(straight, tmp_path):
    (tmp_path / "checkpoints").symlink_to(tmp_path / "unmounted")
    with pytest.raises(ValueError, match="no checkpoint can be saved there"):
        train.main(replace(straight, out=tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()


def broken_model(cfg: train.Config, folder: Path) -> train.Config:
    shutil.copytree(cfg.model, folder / "broken")
    os.truncate(folder / "broken/model.safetensors", 5000)
    return replace(cfg, model=str(folder / "broken"))


def broken_tokenizer(cfg: train.Config, folder: Path) -> train.Config:
    shutil.copytree(cfg.model, folder / "broken")
    (folder / "broken/tokenizer.json").write_text("{}")
    return replace(cfg, model=str(folder / "broken"))


def lost_videos(cfg: train.Config, folder: Path) -> train.Config:
    shutil.copy(cfg.data, folder / "alone.jsonl")
    return replace(cfg, data=folder / "alone.jsonl")


@pytest.mark.parametrize("broken", [broken_model, broken_tokenizer, lost_videos])
def test_nothing_is_replaced_before_the_new_run_can_start(broken, whole, tmp_path):
    before = bytes_of(whole.out)
    with pytest.raises(ValueError):
        train.main(broken(replace(whole, resume=False, overwrite=True), tmp_path))
    assert bytes_of(whole.out) == before


# Two at a time.


def test_a_second_run_is_refused_while_the_first_is_at_work(tmp_path):
    """Whatever it asks for; until the first one ends, or its process does."""
    first = Run(tmp_path / "run", train.Config(), resume=False, overwrite=False)
    first.begin(0)
    for how in ((False, False), (True, False), (False, True)):
        with pytest.raises(ValueError, match=rf"another run is at work .*process {os.getpid()} on"):
            Run(tmp_path / "run", train.Config(), *how)
    first.lock.close()
    Run(tmp_path / "run", train.Config(), resume=False, overwrite=False)


def test_a_killed_process_holds_nothing(tmp_path):
    hold = "import time, train; from nanosport.train.run import Run\n"
    hold += (
        f"run = Run({str(tmp_path)!r}, train.Config(), False, False); print('held', flush=True)\n"
    )
    command = [sys.executable, "-c", hold + "time.sleep(60)"]
    with subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(ValueError, match=f"process {process.pid} on"):
            Run(tmp_path, train.Config(), resume=True, overwrite=False)
        process.kill()
    Run(tmp_path, train.Config(), resume=False, overwrite=False)


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.ENOSYS])
def test_a_disk_without_locks_is_said_and_used(code, monkeypatch, tmp_path, capsys):
    def flock(*_):
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    Run(tmp_path, train.Config(), resume=False, overwrite=False).begin(0)
    assert "has no locks" in capsys.readouterr().err and (tmp_path / "metrics.jsonl").exists()


def test_more_processes_than_gpus_are_refused_in_one_line(monkeypatch):
    """Before torch is asked for a card that is not there."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    for name, value in {"RANK": 1, "LOCAL_RANK": 1, "WORLD_SIZE": 2, "LOCAL_WORLD_SIZE": 2}.items():
        monkeypatch.setenv(name, str(value))
    with pytest.raises(ValueError, match="--nproc-per-node 2: GPUs here: 1"):
        dist.start()


def test_the_allocator_is_told_to_grow_unless_the_user_has_told_it(monkeypatch):
    told = []
    monkeypatch.setattr(torch._C, "_accelerator_setAllocatorSettings", told.append)
    for name in ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"):
        monkeypatch.delenv(name, raising=False)
    dist.expand_segments(torch.device("cpu"))
    assert told == []
    dist.expand_segments(torch.device("cuda"))
    assert told == ["expandable_segments:True"]
    monkeypatch.setenv("PYTORCH_CUDA_ALLOC_CONF", "max_split_size_mb:512")
    dist.expand_segments(torch.device("cuda"))
    assert len(told) == 1
    assert train.Config().may_expand and rl.Config().may_expand
    assert not rl.Config(sampler="vllm").may_expand


def test_a_plain_run_outlives_its_shell():
    """Only torchrun's end is heard of: nohup keeps a script that was started without it."""
    dist.start()
    end_with_parent = ctypes.c_int(-1)
    ctypes.CDLL(None).prctl(2, ctypes.byref(end_with_parent))  # PR_GET_PDEATHSIG
    assert end_with_parent.value == 0


def test_nothing_ends_the_process_of_a_run_that_an_error_has_ended(straight, tmp_path, monkeypatch):
    def fails(*_):
        raise ValueError("a loss that cannot be computed")

    monkeypatch.setattr(train, "sft_loss", fails)
    before = {*threading.enumerate()}
    with pytest.raises(ValueError, match="a loss that cannot be computed"):
        train.main(replace(straight, out=tmp_path / "run"))
    gc.collect()
    until = time.monotonic() + 20
    while watching := [
        thread for thread in {*threading.enumerate()} - before if "(watch)" in thread.name
    ]:
        assert time.monotonic() < until, watching
        time.sleep(0.05)
