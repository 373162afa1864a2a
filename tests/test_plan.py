"""The planner: its memory against what torch's allocator counts, its shapes against published ones, its verdicts."""

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from nanosport import memory, plan, train_bench
from nanosport.batch import pack
from nanosport.cost import num_weights
from nanosport.load import load_config
from nanosport.memory import GIB, Lengths, Micro, micro_batch
from nanosport.plan import Config, peak, report, stages
from nanosport.train_bench import Ours, Work, held_bytes, make_episodes, peak_bytes, planned_bytes

ROOT = Path(__file__).parent.parent
QWEN = ROOT.parent / "shared" / "data" / "qwen"
SHORT = Lengths(frame_tokens=12, prompt_text=60, turn_text=40)


@pytest.fixture(scope="module")
def nano(nano_folder):
    return load_config(nano_folder)


@pytest.mark.parametrize("recompute_every, micro_tokens", [(0, 700), (0, 1200), (1, 700), (1, 1200), (2, 1200)])
@pytest.mark.parametrize("policy", [False, True], ids=["SFT step", "policy update"])
def test_planned_memory_is_the_measured_peak(policy, recompute_every, micro_tokens, nano):
    """A real step, every allocation of it counted: weights, gradients, Adam's moments, activations, the loss, frames."""
    members = 4 if policy else 1
    work = Work(make_episodes(nano, SHORT, 8 // members, members), members, micro_tokens)
    trainer = Ours(nano, (2, 6), torch.float32, torch.device("cpu"), recompute_every, policy)
    trainer.step(work)  # makes Adam's moments
    assert len(work.dealt(nano)) > 1, "gradients of the first micro-batch must be there in the second"
    held = held_bytes(trainer)
    measured = held + peak_bytes(lambda: trainer.step(work))
    assert 0.95 < planned_bytes(trainer, work) / measured < 1.1, "too little planned ends a run, too much only wastes memory"
    assert measured > 1.5 * held, "else the weights alone would decide"


SHARDED = """
import torch
from dataclasses import replace
from nanosport import dist
from nanosport.load import load_config
from nanosport.train_bench import NANO, Ours, Work, held_bytes, make_episodes, peak_bytes, planned_bytes
torch.set_num_threads(1)
dist.start()
nano = load_config("assets/nano-backbone")
wide = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 6, "num_attention_heads": 8, "mrope_section": (8, 12, 12)}
for vocab, tied, recompute_every in ((8000, True, 1), (1023, False, 0)):
    cfg = replace(nano, **wide, vocab_size=vocab, tie_word_embeddings=tied, vision=replace(nano.vision, out_hidden_size=512))
    trainer = Ours(cfg, (3, 3), torch.float32, torch.device("cpu"), recompute_every, policy=False)
    work = Work(make_episodes(cfg, NANO, 4, 1), 1, 300)
    trainer.step(work)
    held = held_bytes(trainer)
    print(planned_bytes(trainer, work) / (held + peak_bytes(lambda: trainer.step(work))))
dist.stop()
"""


def test_planned_memory_of_a_sharded_model_is_the_measured_peak():
    """FSDP2 on one rank, a model whose weights outweigh its tokens: gathered layers and head show."""
    env = {**os.environ, "RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "0", "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", SHARDED], cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    found = [float(line) for line in done.stdout.split()]
    assert len(found) == 2 and 0.95 < min(found) and max(found) < 1.1, found


@pytest.mark.parametrize("together", [1, 8])
def test_a_planned_micro_batch_is_like_a_packed_one(together, nano):
    work = Work(make_episodes(nano, SHORT, 40 // together, together), together, 4000)
    encoder = train_bench.SeenFrames(nano, (2, 6), "cpu", torch.float32)
    batches = [pack([work.episodes[k] for k in part], encoder, nano) for part in work.dealt(nano)]
    wanted = micro_batch(SHORT, 4000, together, 40)
    assert max(len(b.ids_T) for b in batches) <= 4000

    def mean(values):
        return sum(values) / len(batches)

    keys = mean([len(b.ids_T if b.keys is None else b.keys.index_S) for b in batches]) / mean([len(b.ids_T) for b in batches])
    rows = mean([len(b.rows_M) for b in batches]) / mean([len(b.ids_T) for b in batches])
    features = mean([len(b.features_ND) for b in batches]) / mean([len(b.ids_T) for b in batches])
    assert wanted.keys / wanted.tokens == pytest.approx(keys, rel=0.1)
    assert wanted.rows / wanted.tokens == pytest.approx(rows, rel=0.1)
    assert wanted.features / wanted.tokens == pytest.approx(features, rel=0.1)
    assert wanted.tokens == pytest.approx(4000, rel=0.15)


@pytest.mark.parametrize("name, weights", [("3b", 3_754_622_976), ("7b", 8_292_166_656)])
def test_shapes_are_the_published_ones(name, weights):
    assert sum(num_weights(memory.MODELS[name]).values()) == weights
    folder = QWEN / f"Qwen2.5-VL-{name.upper()}-Instruct"
    if not folder.exists():
        pytest.skip("the published config.json is not here")
    assert replace(load_config(folder), eos_token_ids=()) == replace(memory.MODELS[name], eos_token_ids=())


def test_lengths_are_the_papers():
    lengths = Lengths()
    assert lengths.overview + lengths.calls * lengths.frames_per_call == pytest.approx(14.39, abs=0.05)
    assert lengths.frame_tokens == stages(Config())["RL"].lengths.frame_tokens == 299
    for calls in (0.3, 0.8, 2.0):
        again = sum(replace(lengths, calls=calls).still_going(turn, 5) for turn in range(1, 5))
        assert again == pytest.approx(calls, abs=1e-3)
    episodes = make_episodes(memory.MODELS["7b"], lengths, 5, 8)
    assert sum(len(e.ids) for e in episodes) / 40 == pytest.approx(lengths.prompt + lengths.response, rel=0.01)
    assert sum(sum(e.mask) for e in episodes) / 40 == pytest.approx(lengths.trained, rel=0.01)


def test_the_papers_recipe_fits_one_node_and_not_one_gpu():
    found = report(Config("7b", gpus=8, gpu_memory=80))
    assert found["fits"] and found["advice"] is None
    assert 20 * GIB < max(found["SFT"]["total"].values()) < max(found["RL"]["total"].values()) < 80 * GIB
    one = report(Config("7b", gpus=1, gpu_memory=80))
    assert not one["fits"] and one["advice"].startswith("--gpus")
    assert report(Config("7b", gpus=int(one["advice"].split()[1])))["fits"]


def test_advice_is_the_least_that_helps():
    """Where keeping all activations is what does not fit, recomputing is enough."""
    wasteful = Config("7b", recompute_every=0)
    assert report(wasteful)["advice"] == "--recompute-every 1"
    sft = [peak(stages(Config("3b", gpus=4, recompute_every=0, micro_tokens=t))["SFT"]) for t in (16_384, 8192)]
    assert sft[1] < 0.7 * sft[0], "activations decide"
    assert report(replace(wasteful, gpu_memory=10.0))["advice"] is None


def test_two_gpus_hold_7b_with_moments_elsewhere_and_few_rollouts_at_a_time():
    two = report(Config("7b", gpus=2))
    assert not two["fits"] and two["advice"] == "--offload-adam --rollout-batch 8"
    assert report(Config("7b", gpus=2, offload_adam=True, rollout_batch=8))["fits"]


@pytest.mark.parametrize("preset", ["nano", "3b", "7b", "7b-scaled"])
def test_more_gpus_never_need_more_of_each(preset):
    peaks = [max(peak(stage) for stage in stages(Config(preset, gpus=n)).values()) for n in (1, 2, 3, 4, 6, 8, 16)]
    assert peaks == sorted(peaks, reverse=True)


def test_memory_grows_with_what_it_should():
    layout, micro = memory.Layout(), Micro(8192, 8192, 600, 5000)
    cfg = memory.MODELS["7b"]
    assert memory.layer_bytes(cfg, micro, layout) == pytest.approx(8192 * 2 * (8 * 3584 + 4 * 18944 + 2 * 512) + 4 * 8192 * 28)
    kept = [memory.activation_bytes(cfg, micro, replace(layout, recompute_every=k)) for k in (1, 2, 0)]
    assert kept == sorted(kept) and kept[0] < 0.1 * kept[2]
    rows = [memory.cache_bytes(cfg, Lengths(), n, 2048, 5) for n in (8, 16)]
    assert rows[1] == pytest.approx(2 * rows[0])


def test_hours_follow_the_card_and_the_assumptions():
    hours = {gpu: report(Config("7b", gpu=gpu))["gpu_hours"] for gpu in plan.CARDS}
    assert hours["H20"] > hours["A100"] > hours["H100"] >= hours["H200"]
    usual, slow, half, plain = (report(c)["RL"] for c in (Config(), Config(mfu=0.2), Config(steps=150), Config(share_prefix=False)))
    assert slow["seconds"]["train"] == pytest.approx(2 * usual["seconds"]["train"])
    assert half["gpu_hours"] == pytest.approx(usual["gpu_hours"] / 2)
    assert usual["seconds"]["train"] < 0.75 * plain["seconds"]["train"]


def test_what_is_printed(capsys):
    plan.main(Config("7b"))
    said = capsys.readouterr().out
    for part in (
        "weights",
        "gradients",
        "Adam moments",
        "rollout copy",
        "KV cache",
        "activations",
        "reference",
        "frames seen",
        "796",
        "--mfu 0.4",
    ):
        assert part in said
    assert "80 GiB: it fits." in said
    plan.main(Config("7b", gpus=1))
    assert "80 GiB: it does not fit: turn --gpus" in capsys.readouterr().out
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
        report(cfg)
