"""Runs that are killed go on as if nothing had happened."""

import json
import os
import shutil
import subprocess
import sys
from dataclasses import fields, replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
import train
from nanosport.engine.own import OwnSampler, banned_ids
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.image import ImageConfig, preprocess
from nanosport.model import folder, shards
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import read_questions
from nanosport.train import checkpoint, optim
from nanosport.train.config import settings
from nanosport.train.run import Run
from tests.helpers.runs import killed, log

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def sft(nano_folder, arena_folder, tmp_path_factory) -> train.Config:
    out = tmp_path_factory.mktemp("sft")
    data = arena_folder / "trajectories.jsonl"
    return train.Config(
        str(nano_folder),
        data,
        out / "run",
        steps=4,
        batch_size=3,
        warmup=2,
        save_every=2,
        micro_tokens=800,
    )


@pytest.fixture(scope="module")
def grpo(taught_folder, arena_folder, tmp_path_factory) -> rl.Config:
    """From the taught model, which answers and calls the tool at random. With this seed, rewards
    differ inside a group of the first step."""
    out = tmp_path_factory.mktemp("rl")
    return rl.Config(
        str(taught_folder), arena_folder / "rl.jsonl", out / "run", steps=4, num_prompts=2, group_size=4, updates=2, kl=0.05, lr=5e-4,
        adam_eps=1e-8, warmup=1, temperature=0.8, max_new_tokens=60, micro_tokens=1500, min_format_rate=0, min_tool_rate=0, save_every=2, seed=1,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(sft, grpo):
    """{script: (its main, its Config, the log of the undisturbed run)}"""
    made = {}
    for script, cfg in ((train, sft), (rl, grpo)):
        script.main(cfg)
        made[script.__name__] = script.main, cfg, log(cfg.out)
    return made


def weights(run: Path) -> dict[str, torch.Tensor]:
    return load_file((run / "model" if (run / "model").exists() else run) / "model.safetensors")


def same(a: Path, b: Path) -> bool:
    """Weights and optimizer state of two runs, bit for bit."""
    pairs = [(weights(a), weights(b)), (shard(a), shard(b))]
    return all(x.keys() == y.keys() and all(torch.equal(x[k], y[k]) for k in x) for x, y in pairs)


def shard(run: Path) -> dict[str, torch.Tensor]:
    """The newest checkpoint of a run on one rank."""
    (path,) = checkpoint.latest(run).glob("*.safetensors")
    return load_file(path)


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_killed_run_goes_on_bit_for_bit(script, runs, monkeypatch, tmp_path):
    main, cfg, straight = runs[script]
    cut = replace(cfg, out=tmp_path / "cut")
    killed(main, cut, monkeypatch, step=3)
    assert [row["step"] for row in log(cut.out)] == [0, 1, 2]  # step 2 was logged, but not saved
    main(replace(cut, resume=True))
    assert log(cut.out) == straight
    assert same(cut.out, cfg.out)
    assert [row["step"] for row in straight] == [0, 1, 2, 3]


def test_a_checkpoint_is_named_after_its_model_is_written(runs, monkeypatch, tmp_path):
    """Else a run that ends between the two, at its last step, would be resumed as finished with the
    model of an earlier step."""
    main, cfg, straight = runs["train"]
    cut, saves, write_weights = replace(cfg, out=tmp_path / "cut"), [], folder.write_weights

    def full(*args):
        saves.append(1)
        if len(saves) == 2:
            for name in (".model.1", ".best.1"):  # as a killed process leaves it
                (cut.out / name).mkdir()
            raise OSError("the disk is full")
        write_weights(*args)

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="could not be saved.*the disk is full"),
    ):
        patch.setattr(folder, "write_weights", full)
        main(cut)
    assert checkpoint.latest(cut.out).name == "step_000002"
    main(replace(cut, resume=True))
    assert log(cut.out) == straight and same(cut.out, cfg.out)
    assert not list(cut.out.glob(".*")) and not list((cut.out / "checkpoints").glob(".*"))


def test_a_shard_that_cannot_be_written_is_no_checkpoint(runs, monkeypatch, tmp_path):
    """One thread writes, another must hear of it."""
    main, cfg, _ = runs["train"]
    cut = replace(cfg, out=tmp_path / "cut")

    def full(*_):
        raise OSError(28, "No space left on device")

    with (
        monkeypatch.context() as patch,
        pytest.raises(ValueError, match="could not be saved.*No space left"),
    ):
        patch.setattr(shards, "write", full)
        main(cut)
    assert checkpoint.latest(cut.out) is None and not cut.out.joinpath("model").exists()


def test_a_damaged_checkpoint_without_checksums_is_refused_in_one_line(runs, tmp_path):
    main, cfg, _ = runs["train"]
    cut = replace(cfg, out=tmp_path / "cut")
    shutil.copytree(cfg.out, cut.out)
    newest = checkpoint.latest(cut.out)
    state = json.loads((newest / "trainer.json").read_text()) | {"crc32": {}}
    (newest / "trainer.json").write_text(json.dumps(state))
    (shard,) = newest.glob("*.safetensors")
    shard.write_bytes(shard.read_bytes()[:5000])
    with pytest.raises(
        ValueError, match=r"step_000004: the checkpoint does not fit this model or is damaged"
    ) as refused:
        main(replace(cut, resume=True))
    assert "\n" not in str(refused.value)


def test_what_was_saved_before_the_first_update_is_gone_on_from(runs, monkeypatch, tmp_path):
    """As when SIGTERM comes in the first rollout, or the first updates are skipped: there are no
    moments yet."""
    _, cfg, _ = runs["train"]
    source = Path(cfg.model)
    monkeypatch.chdir(tmp_path)
    for offload in (False, True):
        model = load_model(source)
        optim.trainable(model, True, True)
        saved = optim.build(model, 0.0, offload=offload)
        out = Path(str(offload))  # a relative one, as users give it
        checkpoints = checkpoint.Checkpoints(out, source, 0, keep=1, dtype=torch.float32)
        first = {}
        # what is there already is left alone: replacing it would leave a moment without it
        for _ in range(2):
            checkpoints.save(model, saved, {"step": 0, "settings": {}})
            checkpoints.finish()
            now = checkpoint.latest(out).stat()
            first = first or now
            assert first.st_ino == now.st_ino
        loaded = optim.build(model, 0.0, offload=offload)
        newest, state = checkpoint.newest(out)
        checkpoint.load(newest, model, loaded)
        assert state["step"] == 0
        assert len(loaded.state) == len(saved.state) > 40 and not any(
            s["exp_avg"].any() for s in loaded.state.values()
        )


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_may_be_calmed_when_it_is_resumed(script, runs, monkeypatch, tmp_path):
    main, cfg, straight = runs[script]
    cut = replace(cfg, out=tmp_path / "cut")
    killed(main, cut, monkeypatch, step=3)
    main(replace(cut, resume=True, lr=cfg.lr / 10))
    calmed = log(cut.out)
    assert calmed[:2] == straight[:2] and [row["lr"] for row in calmed[2:]] == pytest.approx(
        [r["lr"] / 10 for r in straight[2:]], rel=1e-5
    )
    assert json.loads((cut.out / "run.json").read_text())["config"]["lr"] == cfg.lr / 10


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_may_grow_when_it_is_resumed(script, runs, capsys, tmp_path):
    """The schedule goes on over the new horizon, and the message says so; it may not shrink."""
    main, cfg, straight = runs[script]
    longer = replace(cfg, out=tmp_path / "longer", resume=True, steps=6)
    shutil.copytree(cfg.out, longer.out)
    main(longer)
    rows = log(longer.out)
    assert rows[:4] == straight and [row["step"] for row in rows] == list(range(6))
    assert (
        "--steps grows from 4 to 6: the learning rate's schedule goes on" in capsys.readouterr().out
    )
    schedule = [
        optim.set_lr(torch.optim.SGD([torch.zeros(1)]), step, cfg.lr, cfg.warmup, 6)
        for step in (4, 5)
    ]
    assert [row["lr"] for row in rows[4:]] == pytest.approx(schedule, rel=1e-5)
    assert json.loads((longer.out / "run.json").read_text())["config"]["steps"] == 6
    with pytest.raises(ValueError, match="--steps 5: the run in .* has 6; it may grow, not shrink"):
        main(replace(longer, steps=5))


def test_every_flag_is_compared_unless_it_is_marked():
    """A flag that is added tomorrow is compared without being listed anywhere."""
    may_change = {
        "out", "lr", "save_every", "max_grad_norm", "micro_tokens", "share_prefix",
        "recompute", "offload_adam", "keep", "stuck_after_s", "resume", "overwrite",
        "max_unusable", "model", "data", "allow_changed", "eval_data", "eval_every", "patience", "track",
    }  # fmt: skip
    more = {
        "rollout_batch",
        "keep_rollouts",
        "sampler",
        "sampler_wait_s",
        "weights_over",
        "ahead",
        "judge_url",
        "judge_wait_s",
        "max_ungraded",
        "min_format_rate",
        "min_tool_rate",
        "max_logprob_gap",
    }
    sft = may_change | {"max_new_tokens"}  # only its held-out questions are played
    for config, unmarked in ((train.Config, sft), (rl.Config, may_change | more)):
        assert {f.name for f in fields(config)} - settings(config()).keys() == unmarked


@pytest.mark.parametrize("script", ["train", "rl"])
def test_there_was_something_to_learn(script, runs):
    """Else the tests above compare nothing with nothing."""
    _, cfg, straight = runs[script]
    assert (
        all(row["grad_norm"] > 0 for row in straight)
        and len({row["loss"] for row in straight}) == 4
    )
    before, after = weights(Path(cfg.model)), weights(cfg.out)
    assert any(not torch.equal(before[k], after[k]) for k in before)
    if script == "train":
        assert straight[-1]["loss"] < straight[0]["loss"]
    else:
        assert all(0 < row["kl"] < 5 for row in straight[1:]) and any(
            row["clip_fraction"] > 0 for row in straight
        )
        assert any(0 < row["tool_rate"] for row in straight) and any(
            0 < row["format_rate"] < 1 for row in straight
        )
        assert all(
            max(row["logprob_gap_text"], row["logprob_gap_after_image"]) < 1e-4 for row in straight
        )


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_finished_run_resumed_changes_nothing(script, runs):
    main, cfg, straight = runs[script]
    before = weights(cfg.out)
    main(replace(cfg, resume=True))
    assert log(cfg.out) == straight
    assert all(torch.equal(before[k], w) for k, w in weights(cfg.out).items())


@pytest.mark.parametrize(
    "script, change",
    [
        ("train", {"warmup": 3}),
        ("train", {"batch_size": 2}),
        ("rl", {"kl": 0.0}),
        ("rl", {"group_size": 8}),
        ("rl", {"seed": 2}),
    ],
)
def test_changed_settings_are_refused(script, change, runs):
    main, cfg, straight = runs[script]
    (name, value), *_ = change.items()
    with pytest.raises(
        ValueError, match=rf"--{name.replace('_', '-')} {value}.*resume with the same"
    ):
        main(replace(cfg, resume=True, **change))
    assert log(cfg.out) == straight
    assert json.loads((cfg.out / "run.json").read_text())["config"][name] == getattr(
        cfg, name
    )  # not the refused one


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_is_not_overwritten_unless_told_to(script, runs):
    main, cfg, straight = runs[script]
    with pytest.raises(ValueError, match="holds a run already.*--resume.*--overwrite"):
        main(cfg)
    assert log(cfg.out) == straight


def test_a_replaced_run_is_not_resumed(runs, monkeypatch, tmp_path, capsys):
    """--overwrite, killed before the first save: the old model is still there, but not as this
    run's checkpoint. The new run begins anew."""
    main, cfg, _ = runs["train"]
    cfg = replace(cfg, out=tmp_path / "twice", steps=1)
    main(cfg)
    straight, old = log(cfg.out), weights(cfg.out)
    other = replace(cfg, seed=1)
    killed(main, replace(other, overwrite=True), monkeypatch, step=0)
    assert all(torch.equal(old[k], w) for k, w in weights(cfg.out).items())
    main(replace(other, resume=True))
    assert "nothing was saved there yet: the run begins anew" in capsys.readouterr().out
    assert len(log(cfg.out)) == 1 and log(cfg.out) != straight
    assert any(not torch.equal(old[k], w) for k, w in weights(cfg.out).items())


def test_a_run_says_what_it_was(runs):
    _, cfg, _ = runs["rl"]
    report = json.loads((cfg.out / "run.json").read_text())
    assert report["config"]["kl"] == 0.05 and report["config"]["data"] == str(cfg.data)
    assert {"command", "commit", "torch", "device", "date", "seconds"} <= report.keys()
    new = Run(cfg.out.parent / "new", cfg, resume=False, overwrite=False)
    new.begin(0)
    assert new.log.read_text() == ""
    new.write({"step": 0, "lr": 5e-7, "reward": 1.23456789})
    assert log(new.folder) == [
        {"step": 0, "lr": 5e-7, "reward": 1.23457}
    ]  # the paper's learning rate is not 0


def test_a_checkpoint_is_a_model_folder(runs):
    """For us and for transformers: nothing to merge or convert."""
    for _, cfg, _ in runs.values():
        ours, tokenizer = load_model(cfg.out / "model"), load_tokenizer(cfg.out / "model")
        theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(cfg.out / "model").eval()
        ids = torch.tensor(tokenizer.encode("<|im_start|>user\nWho scored?<|im_end|>\n"))
        positions = torch.arange(len(ids)).expand(3, -1)
        with torch.no_grad():
            hidden = ours.hidden(ids, positions, torch.tensor([0, len(ids)], dtype=torch.int32))
            torch.testing.assert_close(
                hidden @ ours.head_weight_VD.T, theirs(ids[None]).logits[0], atol=1e-4, rtol=1e-4
            )


def test_transformers_says_what_the_engine_says(taught_folder, arena_folder):
    """A folder that train.py wrote, opened by both: the same greedy tokens after the eight frames of
    a real prompt."""
    question = read_questions(arena_folder / "test.jsonl")[0]
    model, tokenizer = load_model(taught_folder), load_tokenizer(taught_folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(taught_folder))
    sampler = OwnSampler(model, tokenizer, Sampling(0.0, max_new_tokens=40, stops=STOPS))
    (episode,) = rollout(sampler, encoder, [question], Limits(max_turns=1))
    prompt = episode.ids[: episode.mask.index(1)]
    said = list(episode.ids[len(prompt) :])

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(taught_folder).eval()
    pictures = encoder.open(question.clip).frames(episode.frames)
    patches_PC, grids = preprocess(pictures, encoder.image)
    ids_1T = torch.tensor([prompt])
    out_1T = theirs.generate(
        input_ids=ids_1T, attention_mask=torch.ones_like(ids_1T), pixel_values=patches_PC, image_grid_thw=torch.tensor(grids),
        mm_token_type_ids=(ids_1T == model.cfg.image_token_id).int(), do_sample=False, max_new_tokens=len(said),
        suppress_tokens=banned_ids(model, tokenizer).tolist(),
    )  # fmt: skip
    assert len(said) >= 10 and out_1T[0, len(prompt) :].tolist() == said


@pytest.mark.parametrize("script", ["train", "rl"])
def test_the_tower_stays_or_learns_as_asked(script, runs, tmp_path):
    main, cfg, _ = runs[script]
    before, frozen = weights(Path(cfg.model)), weights(cfg.out)
    tower = [k for k in before if k.startswith("visual.")]
    assert tower and all(torch.equal(before[k], frozen[k]) for k in tower)
    free = replace(cfg, out=tmp_path / "free", freeze_vision=False, freeze_projector=False, steps=1)
    main(free)
    (row,) = log(free.out)
    assert row["grad_norm"] > 0
    moments = shard(free.out)
    still = [k for k in tower if moments[f"adam.{k}.exp_avg"].abs().max() == 0]
    assert not still, f"no gradient reached {still}"


def test_a_trained_tower_sees_every_frame_where_a_frozen_one_looks_it_up(runs, tmp_path):
    """The first step's loss is the same either way: only what is updated differs."""
    main, cfg, straight = runs["train"]
    free = replace(
        cfg,
        out=tmp_path / "free",
        freeze_vision=False,
        freeze_projector=False,
        steps=1,
        overwrite=True,
    )
    main(free)
    assert log(free.out)[0]["loss"] == pytest.approx(straight[0]["loss"], rel=1e-6)


@pytest.mark.parametrize("linked", ["checkpoints", "out"])
def test_a_replaced_run_behind_a_link_leaves_no_checkpoint(linked, tmp_path):
    disk, out = tmp_path / "disk", tmp_path / "out"
    held = disk if linked == "checkpoints" else disk / "checkpoints"
    (held / "step_000002").mkdir(parents=True)
    (held / ".step_000004").mkdir()
    if linked == "checkpoints":
        out.mkdir()
    (out / "checkpoints" if linked == "checkpoints" else out).symlink_to(disk)
    Run(out, train.Config(), resume=False, overwrite=True).begin(0)
    assert [path.name for path in held.glob("*step_*")] == [".step_000000"]
    assert checkpoint.latest(out) is None


@pytest.mark.parametrize("broken", [float("nan"), float("inf"), -float("inf")])
def test_weights_that_are_not_finite_are_never_saved(broken, nano_folder, tmp_path):
    model = load_model(nano_folder)
    optimizer = torch.optim.AdamW(model.parameters())
    good = tmp_path / "checkpoints" / "step_000001"
    good.mkdir(parents=True)
    (good / "trainer.json").write_text("{}")
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[1, 0] = broken
    checkpoints = checkpoint.Checkpoints(tmp_path, nano_folder, 0, 1, dtype=torch.float32)
    checkpoints.save(model, optimizer, {"step": 2})
    with pytest.raises(ValueError, match="not finite; the last good one is .*step_000001"):
        checkpoints.finish()
    assert checkpoint.latest(tmp_path) == good and not (tmp_path / "model").exists()


def test_a_step_right_after_a_save_changes_nothing_in_it(nano_folder, tmp_path):
    """The loop goes on while the weights are copied; the update waits for the last of them."""
    model = load_model(nano_folder)
    model.state_dict = None  # FSDP2 would shard anew what the loop is computing with
    optimizer = optim.build(model, 0.0)
    checkpoints = checkpoint.Checkpoints(tmp_path, nano_folder, 0, 1, dtype=torch.float32)
    for step in (1, 2):
        optim.set_lr(optimizer, step, 1.0, 1, 9)
        before = {name: w.detach().clone() for name, w in model.named_parameters()}
        checkpoints.save(model, optimizer, {"step": step})
        for weight in model.parameters():
            weight.grad = torch.ones_like(weight)
        optimizer.step()
        checkpoints.finish()
        saved = shard(tmp_path)
        for name, weight in model.named_parameters():
            assert torch.equal(saved[f"model.{name}"], before[name])
            assert not torch.equal(weight, before[name])
        assert saved["adam.model.norm.weight.step"] == step - 1


SAVES = """
import sys, threading, time, torch
from dataclasses import replace
from pathlib import Path
from nanosport.model.folder import load_config
from nanosport.model.decoder import VLModel
from nanosport.train import checkpoint, optim
import nanosport.model.folder as folder
source, out = Path(sys.argv[1]), Path(sys.argv[2])
cfg = replace(load_config(source), hidden_size=1024, num_attention_heads=8, num_hidden_layers=5,
              intermediate_size=4096, mrope_section=(16, 24, 24))
cfg = replace(cfg, vision=replace(cfg.vision, out_hidden_size=1024))
folder.load_config = lambda _: cfg
model = VLModel(cfg).init_weights()
optim.trainable(model, True, True)
optimizer = optim.build(model, 0.0)
optim.start_moments(optimizer)
def held():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon"))
before, most, going = held(), 0, True
def watch():
    global most
    while going:
        most = max(most, held())
        time.sleep(0.002)
watcher = threading.Thread(target=watch)
watcher.start()
checkpoints = checkpoint.Checkpoints(out, source, 0, 1, dtype=torch.bfloat16)
began = time.monotonic()
checkpoints.save(model, optimizer, {"step": 1})
pause = time.monotonic() - began
checkpoints.finish()
going = False
watcher.join()
shard = sum(p.stat().st_size for p in (out / "checkpoints/step_000001").glob("shard*"))
print(shard, most - before, pause)
"""


def test_saving_takes_little_more_than_a_shard_and_no_pause(nano_folder, tmp_path):
    command = [sys.executable, "-c", SAVES, str(nano_folder), str(tmp_path)]
    env = {**os.environ, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    size, most, pause = map(float, done.stdout.split())
    assert size > 800e6 and 0.9 * size < most < 1.3 * size and pause < 0.5
