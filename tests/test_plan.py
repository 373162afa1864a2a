"""The planner: its memory against what torch's allocator counts, here and on an H100, its shapes
against published ones, its verdicts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from functools import cache
from pathlib import Path

import pytest
import torch

import rl
import train
from nanosport.bench.device import peak_bytes
from nanosport.bench.theirs import Work
from nanosport.bench.train import Ours, held_bytes
from nanosport.model.cost import CARDS, num_weights
from nanosport.model.folder import load_config
from nanosport.plan import __main__ as plan
from nanosport.plan import memory
from nanosport.plan.__main__ import Config, stages
from nanosport.plan.memory import (
    GIB,
    Stage,
    at_depth,
    sampler_moments,
    step_peak,
    totals,
    training_moments,
)
from nanosport.plan.synthetic import Lengths, make_episodes
from nanosport.train import dist, recompute

ROOT = Path(__file__).parent.parent
QWEN = ROOT.parent / "shared" / "data" / "qwen"
SHORT = Lengths(frame_tokens=12, prompt_text=60, turn_text=40)
SEVEN = load_config(ROOT / "assets" / "qwen2.5-vl-7b")


@cache
def report(cfg: Config) -> dict:
    return plan.report(cfg)


@pytest.fixture(scope="module")
def nano(nano_folder):
    return load_config(nano_folder)


@pytest.mark.parametrize(
    "recompute, micro_tokens, dtype, lora_rank",
    [
        ("none", 700, "float32", 0),
        ("none", 1200, "float32", 0),
        ("all", 700, "float32", 0),
        ("mlp", 1200, "float32", 0),
        ("all", 1200, "bfloat16", 0),
        ("none", 700, "bfloat16", 0),
        ("none", 700, "bfloat16", 8),
        ("all", 1200, "float32", 64),
    ],
)
@pytest.mark.parametrize("policy", [False, True], ids=["SFT step", "policy update"])
def test_planned_memory_is_the_measured_peak(
    policy, recompute, micro_tokens, dtype, lora_rank, nano
):
    """A real step, every allocation of it counted: weights, their copies in bfloat16, adapters,
    gradients, Adam's moments, activations, the loss, frames."""
    members = 4 if policy else 1
    flags = {"micro_tokens": micro_tokens, "recompute": recompute, "dtype": dtype}
    flags["lora_rank"] = lora_rank
    num_episodes = 8 if policy or micro_tokens > 700 else 4  # several micro-batches of each
    work = Work.of(nano, SHORT, num_episodes // members, members, **flags)
    trainer = Ours(nano, work, getattr(torch, dtype))
    trainer.step(work)  # makes Adam's moments
    packs, _ = trainer.training.deal(work.episodes, members, [0] * num_episodes)
    assert len(packs) > 1, "gradients of the first micro-batch must be there in the second"
    held = held_bytes(trainer)
    measured = held + peak_bytes(lambda: trainer.step(work))
    planned = step_peak(nano, work.run, work.episodes, gpus=0, on_gpu=False)
    assert 0.98 < planned / measured < 1.02
    assert measured > 1.5 * held, "else the weights alone would decide"


SHARDED = """
import torch
from dataclasses import replace
from pathlib import Path
from nanosport.plan.memory import step_peak
from nanosport.bench.device import peak_bytes
from nanosport.bench.theirs import Work
from nanosport.bench.train import NANO, Ours, held_bytes
from nanosport.cli import leave_group
from nanosport.model.folder import load_config
from nanosport.train import dist
torch.set_num_threads(1)
nano = load_config(Path("assets/nano-backbone"))
wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6,
        "num_attention_heads": 8, "mrope_section": (8, 12, 12)}
tower = replace(nano.vision, out_hidden_size=512)
dist.world_size = lambda: 2  # one process alone would shard nothing
for vocab, tied, recompute in ((8000, True, "all"), (1023, False, "none")):
    cfg = replace(nano, **wide, vocab_size=vocab, tie_word_embeddings=tied, vision=tower)
    work = Work.of(cfg, NANO, 4, 1, micro_tokens=300, recompute=recompute)
    planned = step_peak(cfg, work.run, work.episodes, gpus=1, on_gpu=False)
    dist.start()
    trainer = Ours(cfg, work, torch.float32)
    trainer.step(work)
    held = held_bytes(trainer)
    print(planned / (held + peak_bytes(lambda: trainer.step(work))))
    leave_group()
"""


def test_planned_memory_of_a_sharded_model_is_the_measured_peak():
    """FSDP2 on one rank, a model whose weights outweigh its tokens: gathered layers and head
    show."""
    group = {"RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0"}
    command = [sys.executable, "-c", SHARDED]
    env = {**os.environ, **group, "PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    ratios = [float(line) for line in done.stdout.split()]
    assert len(ratios) == 2 and 0.96 < min(ratios) and max(ratios) < 1.04, ratios


MEASURED_GIB = {
    "SFT step": 61.08,
    "policy update": 68.25,
}
"""torch's own count on an H100 80GB: 9 layers of the 7B, one GPU, 39,816 tokens, packs of 8,192,
with FSDP2 over that one GPU and an Adam that took the roots of all second moments at once."""


@pytest.mark.parametrize("name, groups, size", [("SFT step", 8, 1), ("policy update", 1, 8)])
def test_planned_memory_is_what_an_h100_has_measured(name, groups, size, monkeypatch):
    nine = replace(SEVEN, num_hidden_layers=9)
    work = Work.of(nine, Lengths(), groups, size, micro_tokens=8192, recompute="all")
    assert sum(len(episode.ids) for episode in work.episodes) == 39_816
    alone = step_peak(nine, work.run, work.episodes, gpus=1, on_gpu=True)
    training_moments.cache_clear()
    monkeypatch.setattr(dist, "world_size", lambda: 2)  # one process alone would shard nothing
    held = at_depth(training_moments, 3, nine, work.run, work.episodes, 1)
    training_moments.cache_clear()
    roots = held["update"]["gradients"]  # as many, in float32
    towers = (1 + (size > 1)) * 2 * num_weights(nine)["vision"]
    planned = sum(held["update"].values()) + roots + towers
    assert planned / GIB == pytest.approx(MEASURED_GIB[name], rel=0.03)
    assert alone < planned, "the copies that compute take less than these roots"


def test_a_deep_model_is_planned_from_shallow_ones_exactly():
    run = rl.Config(micro_tokens=4096, recompute="mlp", group_size=2)
    episodes = tuple(make_episodes(SEVEN, Lengths(), 1, 2))
    deep = replace(SEVEN, num_hidden_layers=8)

    def count(cfg):
        moments = training_moments(cfg, run, episodes, 8)
        return {name: moments[name] for name in ("loss", "backward pass", "embedding", "update")}

    assert at_depth(count, 3, deep) == count(deep)


def test_the_samplers_cache_is_the_pages_that_its_rows_fill():
    """A group's prompt once; no row is padded to the longest."""
    two, run = replace(SEVEN, num_hidden_layers=2), rl.Config(max_new_tokens=2048, group_size=8)
    shape = replace(Lengths(), calls=2.0), 2048, 1, 80e9
    stage, again = (Stage(two, replace(run, num_prompts=n), *shape) for n in (2, 4))
    lengths, page = stage.longest, 64 * 4 * 2 * SEVEN.num_key_value_heads * SEVEN.head_dim
    prompt, most = lengths.prompt // 64, 0
    for turn in range(5):
        rows = -(-16 * lengths.still_going(turn, 5) // 1)
        tokens = lengths.prompt + turn * lengths.result + (turn + 1) * 2048
        most = max(most, rows * (-(-min(tokens, 16_384) // 64) - prompt) + 2 * prompt)
    assert stage.rollout["KV cache"] == most * page
    moments = sampler_moments(two, lengths, 16, 2048, 16_384)
    logits = 16 * SEVEN.vocab_size * 4
    assert 3 * logits < moments["decode"]["decode"] < 12 * logits  # float64 sums among them
    assert moments["prefill"]["prefill"] > 8192 * SEVEN.intermediate_size * 2 * 2
    assert stage.rollout["prefill"] == moments["prefill"]["prefill"]
    assert again.rollout["KV cache"] == pytest.approx(2 * most * page, rel=0.02)


@pytest.mark.parametrize("together", [1, 8])
def test_the_fullest_micro_batch_is_full(together, nano):
    """No turn is longer, and not one token more goes in."""
    run = rl.Config(group_size=together, micro_tokens=4000) if together > 1 else train.Config()
    run = replace(run, micro_tokens=4000)
    episodes, counted = memory.fullest(nano, run, replace(SHORT, turn_text=160))
    size = getattr(counted, "group_size", 1)
    shared = SHORT.prompt * (size - 1) * (len(episodes) // size)
    assert sum(len(episode.ids) for episode in episodes) - shared == 4000
    assert (size > 1) == (together > 1)


def test_shapes_of_8b_are_the_published_ones():
    """By the total_size in the index file of Qwen/Qwen3-VL-8B-Instruct."""
    eight = stages(Config("8b"))["RL"]
    assert 2 * sum(num_weights(eight.model).values()) == 17_534_247_392
    assert eight.lengths.frame_tokens == 220 and eight.model.vision.feature_size == 4 * 4096


def test_what_a_layer_of_8b_keeps_on_a_gpu_is_known_before_it_runs():
    """Queries and keys before their norms too."""
    sizes, eight = [], load_config(ROOT / "assets" / "qwen3-vl-8b")
    for layers in (3, 4):
        cfg = replace(eight, num_hidden_layers=layers)
        episodes, run = memory.fullest(cfg, train.Config(recompute="none"), Lengths())
        sizes.append(training_moments(cfg, run, episodes, 8)["loss"]["activations"])
    assert sizes[1] - sizes[0] == recompute.Kept(cfg, run.micro_tokens).layer("none")


def test_8b_fits_one_node_and_not_one_gpu():
    assert not plan.fits(Config("8b", gpus=1))
    assert plan.fits(Config("8b", recompute="all"))


@pytest.mark.parametrize("name, weights", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_are_the_published_ones(name, weights):
    ours = load_config(ROOT / "assets" / f"qwen2.5-vl-{name}")
    assert sum(num_weights(ours).values()) == weights
    folder = QWEN / f"Qwen2.5-VL-{name.upper()}-Instruct"
    if not folder.exists():
        pytest.skip("the published config.json is not here")
    published = load_config(folder)
    assert replace(published, eos_token_ids=()) == replace(ours, eos_token_ids=())


def test_lengths_are_the_papers():
    lengths = Lengths()
    shown = lengths.overview + lengths.calls * lengths.frames_per_call
    assert shown == pytest.approx(14.39, abs=0.05)
    assert lengths.frame_tokens == stages(Config())["RL"].lengths.frame_tokens == 299
    for calls in (0.3, 0.8, 2.0):
        more = [replace(lengths, calls=calls).still_going(turn, 5) for turn in range(1, 5)]
        assert sum(more) == pytest.approx(calls, abs=1e-3)
    episodes = make_episodes(SEVEN, lengths, 5, 8)
    length = sum(len(episode.ids) for episode in episodes) / 40
    assert length == pytest.approx(lengths.prompt + lengths.response, rel=0.01)
    trained = sum(sum(episode.mask) for episode in episodes) / 40
    assert trained == pytest.approx(lengths.trained, rel=0.01)


def test_the_papers_recipe_fits_one_node_and_not_one_gpu():
    paper = report(Config("7b", gpus=8, gpu_memory=80, recompute="all"))
    assert paper["fits"] and paper["advice"] is None
    sft, policy = (max(paper[name]["total"].values()) for name in ("SFT", "RL"))
    assert 20 * GIB < sft < policy < 79 * GIB
    one = report(Config("7b", gpus=1, gpu_memory=80))
    assert not one["fits"] and one["advice"].startswith("--gpus")
    assert report(Config("7b", gpus=int(one["advice"].split()[1])))["fits"]


def test_rl_with_many_calls_fits_one_node():
    """2.5 calls an episode: the cache grows with every turn, in pages."""
    many = report(Config("7b", gpus=8, gpu_memory=80, calls=2.5, recompute="all"))
    assert many["fits"] and max(many["RL"]["total"].values()) < 70 * GIB
    usual = report(Config("7b", gpus=8, gpu_memory=80, recompute="all"))
    assert many["RL"]["total"]["rollout"] > usual["RL"]["total"]["rollout"]


def test_a_card_of_80_gb_has_79_gib():
    """What an H100 80GB reports."""
    assert 79.0 < plan.USABLE * 80 < 79.2
    needed = 80.0
    for _ in range(4):  # a smaller card keeps fewer frames
        plan_of_it = report(Config(recompute="all", gpu_memory=needed))
        needed = max(plan_of_it["RL"]["total"].values()) / GIB
    assert not plan.fits(Config(gpu_memory=needed)) and plan.fits(Config(gpu_memory=needed / 0.98))


def test_what_memory_is_left_saves_recomputation():
    """The 7B on eight cards: SFT keeps more than its layers' inputs where they fit, and no card is
    fuller than it may be; a larger card computes less again."""
    shares = {}
    for memory_gb in (48, 80, 141):
        for name, stage in stages(Config(gpu_memory=memory_gb)).items():
            shares[name, memory_gb] = plan.recomputed_share(stage)
            used = memory.totals(stage.memory)["train"]
            least = memory.totals(stages(Config(recompute="all"))[name].memory)["train"]
            assert used <= max(least, plan.USABLE * memory_gb * GIB)
    for name in ("SFT", "RL"):
        assert 1.0 >= shares[name, 48] > shares[name, 80] > shares[name, 141]
    times = {r: report(Config(recompute=r))["SFT"]["seconds"]["train"] for r in ("all", "auto")}
    assert times["auto"] < 0.95 * times["all"]


def test_what_layers_keep_is_counted_once():
    """Where --recompute is given, the step that is counted keeps it already."""
    none, everything = (stages(Config(recompute=mode))["SFT"] for mode in ("none", "all"))
    more = totals(none.memory)["train"] - totals(everything.memory)["train"]
    layers = len(none.modes)
    kept = none.kept.layers(none.modes) - none.kept.layers(["all"] * layers)
    assert more == pytest.approx(kept, rel=0.03)


def test_servers_leave_the_room_that_a_copy_would_take():
    cfg = Config(gpus=2, recompute="all", micro_tokens=4096, sampler="http://h:1")
    needed = max(memory.peak(stage.memory) for stage in stages(cfg).values()) / GIB
    assert plan.fits(replace(cfg, gpu_memory=needed / 0.98))
    assert not plan.fits(replace(cfg, gpu_memory=needed / 0.98, sampler="own"))


def test_checkpoints_are_planned():
    """7B on 8 ranks: a rank's shards on the host once, all of them on disk."""
    saving = report(Config("7b", gpus=8))["saving"]
    assert saving["host, a rank"] == pytest.approx(11.4e9, rel=0.03)
    assert saving["disk, a checkpoint"] == pytest.approx(91e9, rel=0.03)
    assert saving["disk, the model"] == 2 * 8_292_166_656


def test_advice_is_the_least_that_helps():
    """Where keeping all activations is what does not fit, recomputing is enough."""
    wasteful = Config("7b", recompute="none")
    assert report(wasteful)["advice"] == "--recompute auto"
    sft = [
        stages(Config("3b", gpus=4, recompute="none", micro_tokens=tokens))["SFT"].memory
        for tokens in (16_384, 8192)
    ]
    large, small = map(memory.peak, sft)
    assert small < 0.7 * large, "activations decide"
    assert report(replace(wasteful, gpu_memory=10.0))["advice"] is None


def test_two_gpus_hold_7b_with_moments_elsewhere():
    two = report(Config("7b", gpus=2))
    assert not two["fits"] and two["advice"] == "--offload-adam"
    assert report(Config("7b", gpus=2, offload_adam=True, rollout_batch=8))["fits"]


@pytest.mark.parametrize("preset", ["nano", "3b", "7b", "7b-scaled"])
def test_more_gpus_never_need_more_of_each(preset):
    plans = [stages(Config(preset, gpus=n, recompute="all")).values() for n in (1, 3, 8)]
    peaks = [max(memory.peak(stage.memory) for stage in both) for both in plans]
    assert peaks == sorted(peaks, reverse=True)


def test_memory_grows_with_what_it_should():
    three = replace(SEVEN, num_hidden_layers=3)
    sizes = []
    for mode in recompute.LESS:
        run = train.Config(micro_tokens=8192, recompute=mode)
        episodes, run = memory.fullest(three, run, Lengths())
        sizes.append(training_moments(three, run, episodes, 8)["loss"]["activations"])
    # inputs and outputs of the products, the sums of the stream; two norms' and 28 heads' floats
    per_layer = 8192 * 2 * (6 * 3584 + 3 * 18944 + 2 * 512) + 4 * 8192 * (2 + 28)
    assert sizes[2] - sizes[0] == pytest.approx(3 * (per_layer - 8192 * 2 * 3584), rel=0.02)
    assert sizes == sorted(sizes) and sizes[0] < 0.1 * sizes[2]


@pytest.mark.parametrize("mode", recompute.LESS)
def test_what_a_layer_keeps_on_a_gpu_is_known_before_it_runs(mode):
    sizes = []
    for layers in (3, 4):
        cfg = replace(SEVEN, num_hidden_layers=layers)
        episodes, run = memory.fullest(cfg, train.Config(recompute=mode), Lengths())
        sizes.append(training_moments(cfg, run, episodes, 8)["loss"]["activations"])
    assert sizes[1] - sizes[0] == recompute.Kept(cfg, run.micro_tokens).layer(mode)


def test_hours_follow_the_card_and_the_assumptions():
    hours = {gpu: report(Config("7b", gpu=gpu))["gpu_hours"] for gpu in CARDS}
    assert hours["H20"] > hours["A100"] > hours["H100"] >= hours["H200"]
    configs = Config(), Config(mfu=0.2), Config(steps=150), Config(share_prefix=False)
    usual, slow, half, plain = (report(cfg)["RL"] for cfg in configs)
    assert slow["seconds"]["train"] == pytest.approx(2 * usual["seconds"]["train"])
    assert half["gpu_hours"] == pytest.approx(usual["gpu_hours"] / 2)
    assert usual["seconds"]["train"] < 0.75 * plain["seconds"]["train"]


def test_what_is_printed(capsys):
    plan.main(Config("7b"))
    printed = capsys.readouterr().out
    parts = ("weights", "gradients", "Adam moments", "rollout copy", "KV cache", "activations")
    for part in (*parts, "reference", "frames seen", "796", "--mfu 0.4", "disk, a checkpoint"):
        assert part in printed
    assert "80 GB, 79 GiB of them usable: it fits." in printed
    plan.main(Config("7b", gpus=1))
    assert "usable: it does not fit: turn --gpus" in capsys.readouterr().out
    plan.main(Config("3b", gpus=4, json=True))
    assert json.loads(capsys.readouterr().out)["fits"] is True


def test_a_folder_of_ones_own_is_read(nano_folder):
    assert stages(Config("7b", model=str(nano_folder)))["RL"].model == load_config(nano_folder)


@pytest.mark.parametrize(
    "cfg, reason",
    [
        (Config("9b"), "--preset 9b: must be one of"),
        (Config(gpus=0), "--gpus 0: must be above 0"),
        (Config(gpus=64), "--num-prompts 32"),
        (Config(calls=4.0), "--calls 4.0: must be below 4"),
        (Config(micro_tokens=0), "--micro-tokens 0"),
    ],
)
def test_what_no_run_can_be_is_said(cfg, reason):
    with pytest.raises(ValueError, match=reason):
        plan.report(cfg)


def test_what_samples_elsewhere_needs_no_memory_here():
    """vLLM's copy of the weights is away while the policy learns; servers have it all."""
    own, vllm, servers = (
        stages(Config("7b", sampler=name, recompute="all"))["RL"].memory
        for name in ("own", "vllm", "http://h:1")
    )
    copy = own["always"]["rollout copy"]
    assert copy > 14e9 and vllm["rollout"]["rollout copy"] == copy
    assert totals(own)["rollout"] == totals(vllm)["rollout"]
    assert totals(own)["train"] - copy == totals(vllm)["train"] == totals(servers)["train"]
    assert "rollout" not in servers and "rollout copy" not in servers["always"]


CARDS_OF = {"one 24 GB": (1, 24), "one 80 GB": (1, 80), "eight 80 GB": (8, 80)}


def rows_of_the_page() -> list[list[str]]:
    lines = (ROOT / "docs" / "lora.md").read_text().splitlines()
    rows = [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]
    return [row for row in rows if row[0] in CARDS_OF]


@pytest.mark.parametrize("cards, model, learns, flags", rows_of_the_page())
def test_what_fits_on_which_cards_is_what_the_page_says(cards, model, learns, flags):
    """With the flags of the table it fits, and it does not without."""
    gpus, gpu_memory = CARDS_OF[cards]
    cfg = Config(model, gpus=gpus, gpu_memory=gpu_memory)
    words = learns.removeprefix("all weights").split()
    cfg = replace(cfg, lora_rank=int(words[1]) if words else 0)
    if flags.startswith("--"):
        assert not plan.fits(cfg) and plan.advice(cfg) == flags
    else:
        assert plan.fits(cfg) == (flags == "none")


def test_the_table_of_the_page_is_there():
    assert len(rows_of_the_page()) == 8


def test_adapters_are_planned():
    """A step of them computes two thirds, moves and saves little, and has no second model."""
    whole, small = (report(Config("3b", gpus=1, lora_rank=rank)) for rank in (0, 64))
    assert small["RL"]["memory"]["always"]["reference"] < GIB / 8
    assert small["RL"]["memory"]["always"]["rollout copy"] == 0
    assert small["RL"]["total"]["update"] < whole["RL"]["total"]["update"] - 40 * GIB
    assert small["RL"]["seconds"]["train"] < whole["RL"]["seconds"]["train"]
    assert small["RL"]["seconds"]["update"] < 0.1 * whole["RL"]["seconds"]["update"]
    assert small["saving"]["disk, a checkpoint"] < 0.05 * whole["saving"]["disk, a checkpoint"]
    three = load_config(ROOT / "assets" / "qwen2.5-vl-3b")
    width, inner, keys = three.hidden_size, three.intermediate_size, 2 * three.head_dim
    layer = 4 * width + 2 * (width + keys) + 3 * (width + inner)
    assert small["saving"]["disk, the model"] == 4 * 64 * layer * three.num_hidden_layers
