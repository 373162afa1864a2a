"""The whole loop on the second family: SFT with a tower that learns, RL from what it leaves, two
ranks, resume, and the folder that comes out. The first family's is in the files beside this one."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen3VLForConditionalGeneration

import rl
import train
from data_prep import pretrain
from nanosport.fields import read_json
from nanosport.image import ImageConfig
from nanosport.model import lora
from nanosport.model.decoder import mrope_positions
from nanosport.model.folder import load_model
from nanosport.model.frames import FrameEncoder
from nanosport.records import read_questions
from nanosport.train import dist, mixed
from tests.helpers.runs import assert_same, flags, killed, log, torchrun


@pytest.fixture(scope="module")
def runs(nano_qwen3_folder, arena_folder, tmp_path_factory) -> dict:
    """{script: (main, Config of a run of one process)}: packs of several episodes, shared prefixes,
    recomputation, a tower that learns in SFT."""
    out = tmp_path_factory.mktemp("runs")
    reward = out / "reward.py"  # random weights earn nothing else
    reward.write_text("def odd(episode):\n    return sum(i % 2 for i in episode.ids[-16:]) / 16\n")
    sft = train.Config(
        str(nano_qwen3_folder), arena_folder / "trajectories.jsonl", out / "sft", steps=3, batch_size=2, warmup=1,
        save_every=2, micro_tokens=800, recompute="mlp", freeze_vision=False, freeze_projector=False, keep=9,
    )  # fmt: skip
    grpo = rl.Config(
        str(sft.out / "model"), arena_folder / "rl.jsonl", out / "rl", steps=3, num_prompts=2, group_size=3, kl=0.05,
        lr=3e-4, warmup=1, temperature=1.0, max_new_tokens=16, micro_tokens=1000, recompute="all", min_format_rate=0,
        min_tool_rate=0, save_every=2, keep=9, seed=1, reward=f"{reward}:odd",
    )  # fmt: skip
    train.main(sft)
    rl.main(grpo)
    return {"train": (train.main, sft), "rl": (rl.main, grpo)}


def test_sft_teaches_every_part_and_rl_replays_what_it_sampled(runs, nano_qwen3_folder):
    (_, sft), (_, grpo) = runs["train"], runs["rl"]
    before, after = load_model(nano_qwen3_folder), load_model(sft.out / "model")
    learnt = {
        name.split(".")[1] if name.startswith("visual.") else name.split(".")[-2]
        for name, weight in after.named_parameters()
        if not torch.equal(weight, before.get_parameter(name))
    }
    assert {"q_norm", "k_norm", "pos_embed", "deepstack_merger_list", "merger"} <= learnt
    rows = log(grpo.out)
    assert len(rows) == 3 and all(row["grad_norm"] > 0 and not row["skipped"] for row in rows)
    assert max(row["logprob_gap_text"] for row in rows) < 1e-4


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_run_goes_on_exactly(script, runs, tmp_path):
    main, cfg = runs[script]
    half = tmp_path / "half"
    shutil.copytree(cfg.out, half)
    shutil.rmtree(max((half / "checkpoints").glob("step_*")))
    main(replace(cfg, out=half, resume=True))
    assert log(half) == log(cfg.out)


@pytest.mark.parametrize("script", ["train", "rl"])
def test_memory_flags_change_no_gradient(script, runs, monkeypatch, tmp_path):
    main, cfg = runs[script]
    change = {"micro_tokens": 300, "share_prefix": False, "recompute": "none"}
    other = replace(cfg, out=tmp_path / "other", save_every=99, **change)
    killed(main, other, monkeypatch, step=2)
    assert_same(log(other.out), log(cfg.out)[:2])


def test_two_ranks_compute_what_one_does(runs, tmp_path):
    jobs = [[script, flags(cfg, out=tmp_path / script)] for script, (_, cfg) in runs.items()]
    done = torchrun(jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    for script, (_, cfg) in runs.items():
        assert_same(log(tmp_path / script), log(cfg.out))


@pytest.mark.parametrize("family, preset", pretrain.PRESETS.items())
def test_the_shipped_backbone_of_each_family_sees(family, preset):
    """Two replies of three about a close-up are right to the last token; what no frame shows it
    cannot know."""
    folder = pretrain.Config(**preset).out
    model = load_model(folder).requires_grad_(False)
    assert read_json(folder / "config.json")["model_type"] == family
    assert (folder / "model.safetensors").stat().st_size < 5.1e6
    right = pretrain.perception(model, folder, ImageConfig.from_folder(folder), 4, batches=1)
    assert right["close-up answers"] > 0.66 and right["JSON"] > 0.66


def test_transformers_loads_what_rl_leaves(runs, arena_folder):
    """Without a warning, and its features of a frame are ours."""
    folder = Path(runs["rl"][1].out / "model")
    theirs, info = Qwen3VLForConditionalGeneration.from_pretrained(
        folder, output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values()), info
    model = load_model(folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder))
    clip = read_questions(arena_folder / "test.jsonl")[0].clip
    features_ND = encoder.features([(clip, 0), (clip, 9)])
    patches = []
    model.encode = lambda patches_PC, grids: patches.append((patches_PC, grids))
    encoder._encode([(clip, 0), (clip, 9)])
    ((patches_PC, grids),) = patches
    with torch.no_grad():
        out = theirs.model.visual(patches_PC, torch.tensor(grids))
    wanted_ND = torch.cat([out.pooler_output, *out.deepstack_features], dim=-1)
    torch.testing.assert_close(features_ND, wanted_ND, rtol=1e-4, atol=1e-4)


def test_weights_are_announced_as_they_come(nano_qwen3_folder):
    """A server that takes them from GPU to GPU makes room for what is announced."""
    model = load_model(nano_qwen3_folder)
    lora.attach(model, 2, 4, lora.DECODER, seed=0)
    for merged in (False, True):
        weights = dist.TrainedWeights(model, torch.bfloat16, merged)
        sent = [(name, weight.dtype, tuple(weight.shape)) for name, weight in weights]
        assert sent == weights.announced and {dtype for _, dtype, _ in sent} == {torch.bfloat16}
        assert any(name.startswith("model.language_model.") for name, *_ in sent)


def test_a_copy_that_computes_hands_on_every_gradient(nano_qwen3_folder):
    """Joined products without a bias, norms of queries and keys, a tower that learns."""
    grids = [(1, 4, 6), (1, 2, 2)]
    gradients = []
    for copied in (False, True):
        model = load_model(nano_qwen3_folder)
        computes, cfg = mixed.computing_copy(model, torch.float32) if copied else model, model.cfg
        torch.manual_seed(0)
        features_ND = computes.encode(torch.randn(28, cfg.vision.patch_width), grids)
        ids_T = torch.tensor([20, 3, *[5] * 6, 4, 21, 3, 5, 4, 22])
        positions_3T, _ = mrope_positions(ids_T, grids, cfg)
        bounds = torch.tensor([0, len(ids_T)], dtype=torch.int32)
        computes.hidden(ids_T, positions_3T, bounds, features_ND).square().mean().backward()
        gradients.append({name: weight.grad for name, weight in model.named_parameters()})
    for name, gradient in gradients[0].items():
        error = (gradients[1][name] - gradient).abs().max()
        assert error <= 1e-5 * gradient.abs().max(), name
        assert gradient.abs().max() > 0, name
