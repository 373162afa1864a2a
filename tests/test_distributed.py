"""Several ranks compute what one does, save what any number can resume, and end together when one
fails."""

import json
import math
import multiprocessing
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import rl
import train
from nanosport.env.env import Limits
from nanosport.env.rollout import replay
from nanosport.image import ImageConfig
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_config, load_model, load_tokenizer, save_model
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode, Question, read_records
from nanosport.train import checkpoint, optim
from nanosport.train.deal import data_order, deal, make_units
from nanosport.train.faults import MAX_SKIPPED
from tests.helpers.runs import ROOT, assert_same, flags, killed, log, torchrun, wait_for_log


@pytest.fixture(scope="module")
def sft(nano_folder, arena_folder, tmp_path_factory) -> train.Config:
    """Everything on: packing, shared prefixes, recomputation, moments kept apart, a tower that
    learns."""
    out = tmp_path_factory.mktemp("sft") / "one"
    data = arena_folder / "trajectories.jsonl"
    return train.Config(
        str(nano_folder), data, out, steps=10, batch_size=3, warmup=2, save_every=5, micro_tokens=800, recompute="mlp",
        offload_adam=True, freeze_vision=False, freeze_projector=False, keep=9,
    )  # fmt: skip


@pytest.fixture(scope="module")
def grpo(taught_folder, arena_folder, tmp_path_factory) -> rl.Config:
    out = tmp_path_factory.mktemp("rl") / "one"
    # of this seed's draws none falls between two roundings
    return rl.Config(
        str(taught_folder), arena_folder / "rl.jsonl", out, steps=10, num_prompts=3, group_size=4, kl=0.05, lr=3e-4, adam_eps=1e-8, warmup=1,
        temperature=0.8, max_new_tokens=60, micro_tokens=1500, recompute="all", min_format_rate=0, min_tool_rate=0, save_every=5, keep=9, seed=3,
    )  # fmt: skip


@pytest.fixture(scope="module")
def runs(sft, grpo, tmp_path_factory):
    """{script: (main, Config of the run of one process, folder of the run of two, which goes on
    with one's first half)}"""
    two = tmp_path_factory.mktemp("two")
    jobs = []
    for script, main, cfg in (("train", train.main, sft), ("rl", rl.main, grpo)):
        main(cfg)
        jobs.append([script, flags(cfg, out=two / script)])
        half = two / f"{script}_half"  # one process's run, cut after its first checkpoint
        shutil.copytree(cfg.out, half)
        shutil.rmtree(half / "checkpoints" / "step_000010")
        jobs.append([script, flags(cfg, out=half, resume=True)])
    done = torchrun(jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    return {"train": (train.main, sft, two / "train"), "rl": (rl.main, grpo, two / "rl")}


@pytest.mark.parametrize("script", ["train", "rl"])
def test_two_ranks_compute_what_one_does(script, runs):
    """FSDP2 over gloo, ten steps. Three units on two ranks: unequal shares, and the sums must not
    care."""
    _, cfg, two = runs[script]
    straight = log(cfg.out)
    assert len(straight) == 10 and all(row["grad_norm"] > 0 for row in straight)
    assert_same(log(two), straight)
    # the ranks' weights drift apart by rounding alone
    one, other = (load_file(folder / "model" / "model.safetensors") for folder in (cfg.out, two))
    assert one.keys() == other.keys()
    assert max((one[k] - other[k]).abs().max().item() for k in one) < 2e-3


def test_two_nodes_shard_inside_and_replicate_between(runs, tmp_path):
    """HSDP: four ranks, each node with all weights; what they save, one process goes on from."""
    main, cfg, _ = runs["rl"]
    cfg = replace(cfg, num_prompts=5, out=tmp_path / "one")
    with pytest.MonkeyPatch.context() as patch:
        killed(main, cfg, patch, step=2)
    four = replace(cfg, out=tmp_path / "four", save_every=1)
    done = torchrun([["rl", flags(four)]], nodes=2)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(log(four.out)[:2], log(cfg.out))
    shutil.rmtree(four.out / "checkpoints" / "step_000010")
    main(replace(four, resume=True))
    assert len(log(four.out)) == 10


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_of_one_rank_goes_on_with_two(script, runs):
    _, cfg, two = runs[script]
    assert_same(log(two.with_name(f"{script}_half")), log(cfg.out))
    shards = [
        load_file(path)["model.model.norm.weight"].numel()
        for path in checkpoint.latest(two).glob("*.safetensors")
    ]
    assert (
        len(shards) == 2 and sum(shards) == load_config(cfg.model).hidden_size
    )  # each rank wrote its own


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_of_two_ranks_goes_on_with_one(script, runs, tmp_path):
    main, cfg, two = runs[script]
    half = tmp_path / "half"
    shutil.copytree(two, half)
    shutil.rmtree(half / "checkpoints" / "step_000010")
    main(replace(cfg, out=half, resume=True))
    assert_same(log(half), log(cfg.out))


@pytest.mark.parametrize(
    "change",
    [
        {"micro_tokens": 300, "rollout_batch": 4},
        {"micro_tokens": 99_999},
        {"share_prefix": False},
        {"recompute": "none", "offload_adam": "the other"},
    ],
    ids=str,
)
@pytest.mark.parametrize("script", ["train", "rl"])
def test_memory_flags_change_no_gradient(script, change, runs, monkeypatch, tmp_path):
    """Micro-batches of one episode or of all, prefixes shared or not, recomputed or kept, moments
    here or there: the same."""
    main, cfg, _ = runs[script]
    change = {name: value for name, value in change.items() if hasattr(cfg, name)}
    if "offload_adam" in change:
        change["offload_adam"] = not cfg.offload_adam
    other = replace(cfg, out=tmp_path / "other", save_every=99, **change)
    killed(main, other, monkeypatch, step=2)
    assert_same(log(other.out), log(cfg.out)[:2])


def test_the_7bs_layout_in_bfloat16(taught_folder, sft, grpo, tmp_path):
    """A head of its own, which the loss gathers and no forward pass does, and bfloat16 products:
    close to one process in float32."""
    source, untied = tmp_path / "source", tmp_path / "untied"
    shutil.copytree(taught_folder, source)
    (source / "config.json").write_text(
        json.dumps(
            json.loads((source / "config.json").read_text()) | {"tie_word_embeddings": False}
        )
    )
    model, tied = VLModel(load_config(source)), load_model(taught_folder)
    assert model.load_state_dict(tied.state_dict(), strict=False).missing_keys == ["lm_head.weight"]
    model.lm_head.weight.data.copy_(tied.head_weight_VD.data)
    save_model(model, untied, source)

    frozen = {
        "model": str(untied),
        "freeze_vision": True,
        "freeze_projector": True,
        "recompute": "all",
        "offload_adam": True,
    }
    one = replace(sft, **frozen, steps=3, save_every=3, out=tmp_path / "one")
    train.main(one)
    two, policy = tmp_path / "two", tmp_path / "policy"
    more = {"dtype": "bfloat16", "max_logprob_gap": 0.1}
    jobs = [
        ["train", flags(one, out=two, dtype="bfloat16")],
        ["rl", flags(replace(grpo, **frozen), out=policy, steps=2, **more)],
    ]
    done = torchrun(jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for ours, theirs in zip(log(two), log(one.out), strict=True):
        assert (
            ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
            and ours["loss"] != theirs["loss"]
        )
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    assert len(log(policy)) == 2 and all(
        row["grad_norm"] > 0 and not row["skipped"] for row in log(policy)
    )
    assert load_model(policy / "model").lm_head.weight.shape == model.lm_head.weight.shape


# Dealing.


def unit_of(tokens: int, k: int = 0) -> Episode:
    return Episode(
        Question(str(k), "v", "s", "rules", "?", (), "a"),
        (1,) * tokens,
        (0,) * tokens,
        (0.0,) * tokens,
        (),
        (),
        "answered",
    )


@pytest.mark.parametrize("seed", range(8))
def test_dealing_gives_everything_once_and_every_rank_as_many_micro_batches(seed, nano_folder):
    rng, cfg = random.Random(seed), load_config(nano_folder)
    world, together, limit = rng.choice([1, 2, 3, 8]), rng.choice([1, 4]), 3000
    episodes = [unit_of(rng.randint(100, 2500), k) for k in range(rng.randint(1, 12) * together)]
    units = make_units(
        episodes,
        together,
        [k * world // len(episodes) for k in range(len(episodes))],
        cfg,
        limit,
        share_prefix=False,
    )
    dealt, balance = deal(units, world, limit, frozen_vision=True)
    assert len(dealt) == world and len({len(rank) for rank in dealt}) == 1
    assert sorted(k for rank in dealt for micro in rank for k in micro) == list(
        range(len(episodes))
    )
    lengths = [[sum(len(episodes[k].ids) for k in micro) for micro in rank] for rank in dealt]
    assert all(
        n <= limit or len(micro) == 1
        for rank, held in zip(lengths, dealt)
        for n, micro in zip(rank, held)
    )
    assert 0 < balance <= 1 + 1e-9 and (world > 1 or balance == pytest.approx(1))
    one_each, _ = deal(units, world, 1, frozen_vision=True)
    assert len(one_each[0]) == -(-len(units) // world), "no more micro-batches than units ask for"


def test_a_group_stays_together_and_its_prefix_counts_once(nano_folder):
    cfg = load_config(nano_folder)
    group = [replace(unit_of(0), ids=(7,) * 900 + (k,) * 100) for k in range(4)]
    (unit,) = make_units(group, 4, [0] * 4, cfg, 3000, share_prefix=True)
    assert unit.tokens == 900 + 4 * 100 and unit.episodes == (0, 1, 2, 3)
    assert [u.episodes for u in make_units(group, 4, [0] * 4, cfg, 3000, share_prefix=False)] == [
        (0, 1),
        (2, 3),
    ]
    assert (
        unit.flops
        < sum(u.flops for u in make_units(group, 1, [0] * 4, cfg, 3000, share_prefix=True)) / 2
    )


def test_frames_stay_where_they_were_seen_unless_that_costs_more(nano_folder):
    cfg = load_config(nano_folder)
    seen = [replace(unit_of(400), ids=(cfg.image_token_id,) * 6 + (1,) * 400) for _ in range(4)]
    at_home, _ = deal(
        make_units(seen, 1, [0, 0, 1, 1], cfg, 9999, True), 2, 9999, frozen_vision=True
    )
    assert at_home == [[[0, 1]], [[2, 3]]]
    moved, balance = deal(
        make_units(seen, 1, [0, 0, 0, 0], cfg, 9999, True), 2, 9999, frozen_vision=True
    )
    assert [len(rank[0]) for rank in moved] == [2, 2] and balance > 0.8


@pytest.mark.parametrize("world, least", [(2, 0.95), (4, 0.9)])
def test_ranks_hardly_wait_for_each_other_on_the_arena(world, least, arena_folder):
    """The packing's efficiency on the demo's own trajectories and batch of 24: nothing is padded,
    so what is lost is waiting."""
    folder = ROOT / "assets" / "nano-sft"
    cfg, tokenizer = load_config(folder), load_tokenizer(folder)
    encoder = FrameEncoder(load_model(folder), ImageConfig.from_folder(folder))
    records = read_records(arena_folder / "trajectories.jsonl")
    episodes = [
        replay(question, messages, encoder, tokenizer, Limits()) for question, messages in records
    ]
    found = []
    for step in range(40):
        batch = [episodes[k] for k in data_order(len(episodes), 0, step, train.Config.batch_size)]
        homes = [k * world // len(batch) for k in range(len(batch))]
        units = make_units(batch, 1, homes, cfg, train.Config.micro_tokens, True)
        found.append(deal(units, world, train.Config.micro_tokens, True)[1])
    assert sum(found) / len(found) >= least, found


# Faults.


def test_a_rank_that_fails_ends_all_with_its_message(sft, tmp_path):
    began = time.monotonic()
    done = torchrun([["train", flags(sft, out=tmp_path / "run")]], "error")
    assert done.returncode != 0 and "[rank 1] error: this clip broke" in done.stderr
    # and again at the end, where it is read: torchrun's own report is longer
    *_, last, border = done.stderr.strip().splitlines()
    assert last.endswith("[rank 1] error: this clip broke") and set(border) == {"="}
    done = torchrun([["train", flags(sft, out=tmp_path / "bug")]], "bug")
    assert done.returncode != 0 and "KeyError: 'nobody thought of this'" in done.stderr
    assert time.monotonic() - began < 100


def test_a_save_whose_name_is_taken_ends_all_ranks(sft, tmp_path):
    """As where two runs save into one folder: none goes on as if it had saved."""
    cfg = replace(sft, out=tmp_path / "run", save_every=8)

    def take(run):
        wait_for_log(cfg.out, run)
        (cfg.out / "checkpoints" / "step_000008").mkdir()

    done = torchrun([["train", flags(cfg)]], meanwhile=take)
    assert done.returncode != 0 and not (cfg.out / "model").exists()
    for rank in (0, 1):
        line = rf"\[rank {rank}\] error: .*step_000008: is there already, and not of this run"
        assert re.search(line, done.stderr), done.stderr[-2000:]


def test_ranks_end_with_their_launcher(sft, tmp_path):
    """As when the kernel kills torchrun for want of memory: they save, and do not live on beside
    the run that goes on, which is refused until they have ended."""
    cfg = replace(sft, out=tmp_path / "straight", save_every=99)
    cut = replace(cfg, out=tmp_path / "cut")

    def kill(run):
        wait_for_log(cut.out, run)
        with pytest.raises(ValueError, match="another run is at work there"):
            train.main(replace(cut, resume=True))
        run.kill()

    # this returns when nobody holds its stderr any more: when the ranks have ended, too
    done = torchrun([["train", flags(cut)]], "slow", meanwhile=kill)
    assert done.returncode == -signal.SIGKILL and "NOTHING IS SAVED" not in done.stderr
    stops = [f"[rank {rank}] stopped by SIGTERM" for rank in (0, 1)]
    assert all(stop in done.stderr for stop in stops), done.stderr[-2000:]
    assert 1 <= len(log(cut.out)) < 10
    for ended in (replace(cut, resume=True), cfg):
        train.main(ended)
    assert_same(log(cut.out), log(cfg.out))


def test_nodes_must_share_the_runs_folder(sft, tmp_path):
    """Else each writes its part of a checkpoint where no other finds it."""
    done = torchrun([["train", flags(sft, out=tmp_path / "run")]], "apart")
    assert done.returncode != 0
    problem = "not the same folder for all ranks; give an --out that all nodes share"
    assert re.search(rf"\[rank [01]\] error: .*{problem}", done.stderr), done.stderr[-2000:]


def test_a_rank_that_hangs_is_named_with_its_stage(sft, tmp_path):
    done = torchrun(
        [["train", flags(sft, out=tmp_path / "run", stuck_after_s=25)]], "hang", timeout_s=150
    )
    assert done.returncode != 0
    assert re.search(r"rank [01] is stuck in step \d, train, for \d+ s", done.stderr), done.stderr[
        -2000:
    ]
    assert "in planted" in done.stderr or "in pack" in done.stderr  # where it hangs


def test_a_non_finite_gradient_is_skipped_and_counted(sft, monkeypatch, tmp_path):
    """One bad step leaves no trace in the weights; five in a row end the run, with the batch on
    disk."""
    whole, steps = optim.clip, []

    def clip(bad):
        def poisoned(model, max_norm):
            steps.append(1)
            return math.nan if len(steps) - 1 in bad else whole(model, max_norm)

        return poisoned

    cfg = replace(sft, out=tmp_path / "once", steps=3, freeze_vision=True, freeze_projector=True)
    monkeypatch.setattr(optim, "clip", clip({1}))
    train.main(cfg)
    assert [row["skipped"] for row in log(cfg.out)] == [0, 1, 0] and log(cfg.out)[-1]["loss"] > 0
    batch = json.loads((cfg.out / "bad_batch_1_rank_0.json").read_text())
    assert len(batch) == 3 and all(
        entry["video"].endswith(".mp4") and entry["turns"] for entry in batch
    )

    steps.clear()
    monkeypatch.setattr(optim, "clip", clip(range(99)))
    with pytest.raises(ValueError, match=rf"step {MAX_SKIPPED - 1}.*in a row.*bad_batch.*--resume"):
        train.main(replace(cfg, out=tmp_path / "always", steps=10, save_every=1))
    saved = load_file(tmp_path / "always" / "model" / "model.safetensors")
    before = load_file(Path(cfg.model) / "model.safetensors")
    assert all(torch.equal(saved[k], before[k]) for k in before)


def test_a_rank_without_a_frame_goes_on_with_the_others(sft, tmp_path):
    """Its blank frame goes the same way through the sharded tower: else the other rank would wait
    for this one."""
    done = torchrun([["train", flags(sft, out=tmp_path / "run", steps=3)]], "blind", timeout_s=120)
    assert done.returncode == 0, done.stderr[-2000:]
    rows = log(tmp_path / "run")
    assert (
        len(rows) == 3
        and all(row["grad_norm"] > 0 for row in rows)
        and not any(row["skipped"] for row in rows)
    )


# Ends that nobody chose.


def run_in_child(cfg) -> None:
    torch.set_num_threads(1)
    train.main(cfg)


def test_killed_while_it_saves_a_run_goes_on_from_a_whole_checkpoint(runs, tmp_path):
    """SIGKILL at a random moment of a save, twenty times; what is resumed ends as the run that
    nobody disturbed."""
    _, cfg, _ = runs["train"]
    cfg = replace(
        cfg,
        freeze_vision=True,
        freeze_projector=True,
        steps=3,
        batch_size=1,
        save_every=1,
        keep=2,
        out=tmp_path / "straight",
    )
    train.main(cfg)
    straight, rng = log(cfg.out), random.Random(0)
    context = multiprocessing.get_context("forkserver")
    slow_to_import = ["transformers.models.auto.tokenization_auto", "torch._dynamo"]
    context.set_forkserver_preload(["train", "torchcodec.decoders", *slow_to_import])
    seen = set()
    for trial in range(20):
        cut = replace(cfg, out=tmp_path / f"cut{trial}")
        child = context.Process(target=run_in_child, args=(cut,))
        child.start()
        step, moment = rng.randrange(1, 4), rng.random() * 0.15
        while child.is_alive() and not list((cut.out / "checkpoints").glob(f"*step_00000{step}")):
            time.sleep(0.002)
        time.sleep(moment)
        child.kill()
        child.join()
        there = checkpoint.latest(cut.out)
        left = [p.name for p in (cut.out / "checkpoints").iterdir() if p.name.startswith(".")]
        seen.add((there and there.name, tuple(left)))
        train.main(replace(cut, resume=True))  # anew where the first save was cut
        assert log(cut.out) == straight, f"trial {trial}, from {there}"
        one, other = (
            load_file(folder / "model" / "model.safetensors") for folder in (cfg.out, cut.out)
        )
        assert all(torch.equal(one[k], other[k]) for k in one)
    assert sum(bool(left) for _, left in seen) >= 1, f"no save was cut: {seen}"
    assert {p.name for p in (cfg.out / "checkpoints").iterdir()} == {
        "step_000002",
        "step_000003",
    }  # --keep 2


def test_sigterm_saves_and_ends(runs, tmp_path):
    """What a cluster sends before it takes a node."""
    _, cfg, _ = runs["train"]
    cfg = replace(
        cfg,
        freeze_vision=True,
        freeze_projector=True,
        steps=40,
        save_every=99,
        out=tmp_path / "run",
    )
    argv = [
        part
        for k, v in flags(cfg).items()
        for part in (
            (f"--{'no-' * (v is False)}{k.replace('_', '-')}", str(v))[
                : 1 if isinstance(v, bool) else 2
            ]
        )
    ]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    run = subprocess.Popen(
        [sys.executable, "train.py", *argv], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True
    )
    wait_for_log(cfg.out, run)
    run.send_signal(signal.SIGTERM)
    assert run.wait(60) == 143
    printed = run.stderr.read()
    assert "Warning" not in printed
    message = printed.splitlines()[-1]
    step = int(re.search(r"stopped by SIGTERM after step (\d+)", message)[1])
    assert (
        checkpoint.latest(cfg.out).name == f"step_{step + 1:06d}" and len(log(cfg.out)) == step + 1
    )
    with pytest.raises(ValueError, match="resume with the same"):
        train.main(replace(cfg, resume=True, weight_decay=0.5))


def test_sigterm_to_torchrun_is_heard_by_all_ranks(runs, tmp_path):
    """None leaves before rank 0 has written the model and named the checkpoint: torchrun would then
    kill rank 0."""
    main, cfg, _ = runs["rl"]
    cut = replace(cfg, out=tmp_path / "cut", save_every=99)

    def stop(run):
        wait_for_log(cut.out, run)
        run.send_signal(signal.SIGTERM)

    done = torchrun([["rl", flags(cut)]], "slow", meanwhile=stop)
    assert done.returncode != 0 and "NOTHING IS SAVED" not in done.stderr
    assert all(
        re.search(rf"\[rank {rank}\] stopped by SIGTERM (in|after) step", done.stderr)
        for rank in (0, 1)
    ), done.stderr[-2000:]
    assert (
        1 <= len(log(cut.out)) < 10
        and checkpoint.latest(cut.out).name == f"step_{len(log(cut.out)):06d}"
    )
    main(replace(cut, resume=True))
    assert_same(log(cut.out), log(cfg.out))
