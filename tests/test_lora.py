"""Adapters compute, learn and are saved as peft's; a run of them is as exact as any other."""

import json
import shutil
import warnings
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
import train
from kernels import policy_loss
from nanosport.engine.players import load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.engine.vllm import start_engine
from nanosport.files import ASSETS
from nanosport.model import lora
from nanosport.model.decoder import join_projections
from nanosport.model.folder import chain, load_model, own_name, resolve, version
from nanosport.plan.synthetic import Lengths, bare_actors, bare_training, make_episodes, take_step
from nanosport.train import checkpoint, dist
from nanosport.train.training import Training
from tests.helpers import families
from tests.helpers.runs import assert_same, flags, killed, log, torchrun
from tests.test_model import (
    GRIDS,
    our_hidden,
    patches,
    relative_error,
    sequence,
    their_logits,
)

BASE = ASSETS / "nano-sft"
ALL = (*lora.DECODER, "merger")
CPU = torch.device("cpu")


@pytest.fixture(params=families.FAMILIES)
def tiny_pair(request):
    return partial(families.tiny_pair, request.param)


def adapted(model, targets=ALL, rank=4, alpha=8):
    """`model` with adapters none of which is zero."""
    lora.attach(model, rank, alpha, targets, seed=0)
    generator = torch.Generator().manual_seed(1)
    for adapter in lora.adapters(model).values():
        adapter.B.data.normal_(0.0, 0.3 / rank, generator=generator)
    return model


def hidden(model) -> torch.Tensor:
    """Of a sequence with images."""
    return our_hidden(model, sequence(GRIDS), patches(GRIDS, model.cfg), GRIDS)


# The layer.


@pytest.mark.parametrize("targets", [ALL, ("q_proj", "down_proj")])
def test_outputs_and_every_gradient_equal_pefts(targets, tiny_pair):
    theirs, ours = tiny_pair()
    adapted(ours, targets)
    for name, weight in ours.named_parameters():
        weight.requires_grad_(".lora." in name)
    names = [lora.peft_name(name) for name in lora.adapters(ours)]
    theirs = get_peft_model(theirs, LoraConfig(r=4, lora_alpha=8, target_modules=names))
    mine = {f"{name.removesuffix('.weight')}": w for name, w in saved_state(ours).items()}
    learns = {n: w for n, w in theirs.named_parameters() if w.requires_grad}
    assert {n.replace(".default.weight", "") for n in learns} == mine.keys()
    for name, weight in learns.items():
        weight.data.copy_(mine[name.replace(".default.weight", "")])

    ids, patches_PC = sequence(GRIDS), patches(GRIDS, ours.cfg)
    expected = their_logits(theirs, ids, patches_PC, GRIDS)
    logits = our_hidden(ours, ids, patches_PC, GRIDS) @ ours.head_weight_VD.T
    assert relative_error(logits, expected) < 1e-5
    weight = torch.randn(expected.shape)
    (expected * weight).mean().backward()
    (logits * weight).mean().backward()
    for name, w in learns.items():
        ours_w = mine[name.replace(".default.weight", "")]
        assert w.grad.abs().max() > 0 and relative_error(ours_w.grad, w.grad) < 2e-5, name
    assert all(w.grad is None for n, w in ours.named_parameters() if ".lora." not in n)


def saved_state(model) -> dict[str, torch.Tensor]:
    return {saved: w for saved, (_, w) in checkpoint.saved_weights(model).items()}


@torch.no_grad()
def test_switched_off_it_is_the_base_and_merged_it_is_the_same(tiny_pair):
    _, model = tiny_pair()
    base = hidden(model)
    lora.attach(model, 4, 8, ALL, seed=0)
    assert torch.equal(hidden(model), base), "B begins with zeros"
    adapted(model)
    with_adapter = hidden(model)
    assert relative_error(with_adapter, base) > 0.05
    with lora.off(model):
        assert torch.equal(hidden(model), base)
    assert torch.equal(hidden(model), with_adapter)

    _, merged = tiny_pair()
    whole = {own_name(n): w for n, w in dist.TrainedWeights(model, torch.float32, merged=True)}
    assert whole.keys() == {n for n, _ in merged.named_parameters() if not n.startswith("visual.")}
    merged.load_state_dict(whole, strict=False)
    decoder_only = {n: a for n, a in lora.adapters(model).items() if n.startswith("visual.")}
    for name, adapter in decoder_only.items():
        layer = merged.get_submodule(name)
        layer.weight.copy_(lora.merged(layer.weight, adapter.scale, adapter.A, adapter.B))
    assert relative_error(hidden(merged), with_adapter) < 1e-5

    # as generation on a GPU has it: one product of q, k and v, and one of gate and up
    join_projections(model)
    assert relative_error(hidden(model), with_adapter) < 1e-6


def test_the_head_and_the_base_get_no_gradient_at_all(monkeypatch):
    """Not even one that is thrown away: dW of the head costs as much as the loss's other products,
    and 2 GiB."""
    (episode, *_) = episodes = make_episodes(load_model(BASE).cfg, Lengths(9, turn_text=7), 1, 4)
    run = rl.Config(group_size=4, lora_rank=4, dtype="bfloat16")
    training = bare_training(run, load_model(BASE), episode, CPU, torch.bfloat16)

    def refuse(*_):
        raise AssertionError("a gradient of a frozen weight")

    monkeypatch.setattr(policy_loss, "add_outer", refuse)
    monkeypatch.setattr("nanosport.model.layers.add_outer", refuse)
    take_step(training, bare_actors(training, training.computing), episodes)
    assert training.computing is training.model, "no second copy"
    learnt = [name for name, adapter in lora.adapters(training.model).items() if adapter.B.any()]
    assert len(learnt) == 7 * training.model.cfg.num_hidden_layers
    assert set(training.optimizer.state) == {
        w for n, w in training.model.named_parameters() if ".lora." in n
    }


# Folders.


def their_hidden_logits(model, ids) -> torch.Tensor:
    return model(input_ids=torch.tensor(ids)[None], use_cache=False).logits[0]


def our_logits(model, ids) -> torch.Tensor:
    positions_3T = torch.arange(len(ids)).expand(3, -1)
    cu = torch.tensor([0, len(ids)]).int()
    return model.hidden(torch.tensor(ids), positions_3T, cu) @ model.head_weight_VD.T


IDS = [*range(30, 90)]


@pytest.fixture(scope="module")
def sft(arena_folder, tmp_path_factory) -> train.Config:
    out = tmp_path_factory.mktemp("lora") / "sft"
    data = arena_folder / "trajectories.jsonl"
    how = {"steps": 3, "batch_size": 3, "warmup": 1, "save_every": 2, "lr": 0.002, "lora_rank": 4}
    cfg = train.Config(str(BASE), data, out, max_pixels=20_000, **how)
    train.main(cfg)
    return cfg


@pytest.fixture(scope="module")
def grpo(sft, arena_folder) -> rl.Config:
    """From the adapter that SFT has left, with groups that share a prefix and packs of several."""
    cfg = rl.Config(
        str(sft.out / "model"), arena_folder / "rl.jsonl", sft.out.with_name("rl"), steps=3, num_prompts=2, group_size=4,
        kl=0.05, lr=5e-4, adam_eps=1e-8, warmup=1, max_new_tokens=60, micro_tokens=1500, min_format_rate=0, min_tool_rate=0,
        save_every=2, seed=1, lora_rank=3,
    )  # fmt: skip
    rl.main(cfg)
    return cfg


@torch.no_grad()
def test_peft_loads_what_is_saved(sft):
    """Without a warning, as a weight that it does not find would give."""
    folder = sft.out / "model"
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    before = their_hidden_logits(theirs, IDS)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        theirs = PeftModel.from_pretrained(theirs, folder)
    ours, expected = our_logits(load_model(folder), IDS), their_hidden_logits(theirs, IDS)
    assert relative_error(ours, expected) < 1e-5 < 1e-3 < relative_error(before, expected)
    assert (
        load_file(folder / lora.WEIGHTS).keys()
        == saved_state(adapted(load_model(BASE), lora.DECODER)).keys()
    )


@torch.no_grad()
def test_what_peft_saves_is_a_model_to_us(tmp_path):
    """A folder without config or tokenizer, which the base has."""
    base = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    how = LoraConfig(r=3, lora_alpha=5, target_modules=r".*language_model.*\.(q_proj|up_proj)")
    theirs = get_peft_model(base, how)
    for name, weight in theirs.named_parameters():
        if "lora_B" in name:
            weight.normal_(0.0, 0.3)
    theirs.save_pretrained(tmp_path / "adapter")
    folder = resolve(str(tmp_path / "adapter"))
    assert not (folder / "config.json").exists()
    expected = their_hidden_logits(theirs, IDS)
    assert relative_error(our_logits(load_model(folder), IDS), expected) < 1e-5
    encoder, sampler = load_sampler(folder, Sampling())
    assert torch.equal(our_logits(sampler.model, IDS), our_logits(load_model(folder), IDS))
    assert version(folder).endswith(version(BASE)) and version(folder) != version(BASE)


@torch.no_grad()
def test_an_adapter_is_merged_on_request_and_taken_wherever_a_model_is(sft, grpo, tmp_path):
    """RL from SFT's adapter: its own stands on that one, as peft has it too."""
    folder = grpo.out / "model"
    assert chain(folder) == [folder, sft.out / "model", BASE]
    checkpoint.export(folder, tmp_path / "merged")
    merged = load_model(tmp_path / "merged")
    logits = our_logits(load_model(folder), IDS)
    assert relative_error(our_logits(merged, IDS), logits) < 0.05  # saved in bfloat16
    settings = json.loads((tmp_path / "merged" / "preprocessor_config.json").read_text())
    assert settings["max_pixels"] == sft.max_pixels, "as SFT's folder says"

    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(BASE, dtype=torch.float32)
    for adapter in (sft.out / "model", folder):
        theirs = PeftModel.from_pretrained(theirs, adapter).merge_and_unload()
    assert relative_error(logits, their_hidden_logits(theirs, IDS)) < 1e-5
    with pytest.raises(ValueError, match=r"vLLM takes no adapter; merge it: python -m nanosport"):
        start_engine(folder, 100, 1)


def test_a_run_that_would_replace_its_base_is_refused(sft, grpo):
    with pytest.raises(ValueError, match="would replace the model that it begins with"):
        train.main(replace(sft, model=str(grpo.out / "model"), overwrite=True))


def broken(**settings):
    def write(folder: Path) -> None:
        file = folder / lora.CONFIG
        file.write_text(json.dumps(json.loads(file.read_text()) | settings))

    return write


def weights(change):
    def write(folder: Path) -> None:
        state = load_file(folder / lora.WEIGHTS)
        change(state)
        save_file(state, folder / lora.WEIGHTS)

    return write


def drop_one(state):
    del state[next(iter(state))]


def rename_one(state):
    for part in "AB":
        name = f"base_model.model.model.language_model.layers.0.mlp.up_proj.lora_{part}.weight"
        state[name.replace("up_proj", "sideways_proj")] = state.pop(name)


def cut_one(state):
    name = next(iter(state))
    state[name] = state[name][:, :-1].contiguous()


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (broken(base_model_name_or_path="/no/such/base"), "base_model_name_or_path.*no such folder"),
        (broken(base_model_name_or_path=None), "names no base_model_name_or_path"),
        (broken(base_model_name_or_path="."), "an adapter of itself|no config.json"),
        (broken(peft_type="LOHA"), "peft_type 'LOHA': this code has only 'LORA'"),
        (broken(use_dora=True), "use_dora True: adapters of another kind"),
        (broken(use_rslora=True), "use_rslora True: adapters of another kind"),
        (broken(bias="all"), "bias 'all': this code has only 'none'"),
        (broken(modules_to_save=["lm_head"]), "modules_to_save .*adapters of another kind"),
        (broken(rank_pattern={"q_proj": 2}), "rank_pattern .*adapters of another kind"),
        (broken(of_the_future={"a": 1}), "of_the_future .*adapters of another kind"),
        (broken(init_lora_weights="pissa"), "init_lora_weights 'pissa'"),
        (broken(r=5), "where the base and r 5 ask for"),
        (broken(r="4"), "r '4', lora_alpha 32: must be a whole number"),
        (weights(drop_one), "must hold A and B of layers, and nothing else"),
        (weights(rename_one), "sideways_proj: the model has no such layer"),
        (weights(cut_one), "where the base and r 4 ask for"),
        (lambda folder: (folder / lora.WEIGHTS).unlink(), "adapter_model.safetensors"),
        (lambda folder: (folder / lora.CONFIG).write_text("[]"), "cannot be read as a JSON object"),
    ],
)  # fmt: skip
def test_an_adapter_that_would_compute_something_else_is_refused_in_one_line(
    spoil, why, sft, tmp_path
):
    folder = tmp_path / "adapter"
    shutil.copytree(sft.out / "model", folder)
    spoil(folder)
    with pytest.raises(ValueError, match=why) as refused:
        load_model(resolve(str(folder)))
    assert "\n" not in str(refused.value) and str(folder) in str(refused.value)


# Runs.


def test_the_reference_is_what_rl_began_with_and_the_sampler_has_the_adapter(grpo):
    """The rollout's log-probs, by our own engine with a cache, are the trainer's at every step, and
    the KL to the merged SFT model grows from exactly nothing."""
    rows = log(grpo.out)
    assert rows[0]["kl"] == 0.0
    assert rows[-1]["kl"] > 1e-5 and all(row["grad_norm"] > 0 for row in rows)
    gaps = [row[f"logprob_gap_{where}"] for row in rows for where in ("text", "after_image")]
    assert all(gap < 1e-5 for gap in gaps)
    state = load_file(grpo.out / "model" / lora.WEIGHTS)
    assert all(state[name].any() for name in state) and len(state) % 14 == 0
    begun = load_model(grpo.out / "model").state_dict()
    base = load_model(grpo.model).state_dict()
    changed = {name for name in base if not torch.equal(begun[name], base[name])}
    assert changed == {
        f"{n}.weight" for n in lora.adapters(adapted(load_model(BASE), lora.DECODER))
    }


def test_the_mergers_adapter_learns_and_is_switched_off_for_the_references_frames(grpo, tmp_path):
    how = {"steps": 2, "warmup": 0, "lora_targets": ("merger",)}
    cfg = replace(grpo, model=str(BASE), out=tmp_path / "run", **how)
    rl.main(cfg)
    first, second = log(cfg.out)
    assert first["kl"] == 0.0 and second["kl"] > 0 and first["grad_norm"] > 0
    gaps = [
        row[f"logprob_gap_{where}"] for row in (first, second) for where in ("text", "after_image")
    ]
    assert all(gap < 1e-5 for gap in gaps)
    assert len(load_file(cfg.out / "model" / lora.WEIGHTS)) == 4


@pytest.mark.parametrize("script", ["train", "rl"])
def test_a_killed_run_goes_on_bit_for_bit(script, sft, grpo, monkeypatch, tmp_path):
    main, cfg = {"train": (train.main, sft), "rl": (rl.main, grpo)}[script]
    cut = replace(cfg, out=tmp_path / "cut")
    killed(main, cut, monkeypatch, step=2)
    main(replace(cut, resume=True))
    assert log(cut.out) == log(cfg.out)
    one, other = (load_file(run / "model" / lora.WEIGHTS) for run in (cut.out, cfg.out))
    assert one.keys() == other.keys() and all(torch.equal(one[k], other[k]) for k in one)
    (shard,) = checkpoint.latest(cut.out).glob("*.safetensors")
    names = load_file(shard).keys()
    assert names and all(".lora." in name for name in names), "the base is not saved again"


def test_the_base_of_a_hub_id_is_named_with_its_commit(tiny_pair):
    training = Training.__new__(Training)
    training.model = tiny_pair()[1]
    training.source = Path("/cache/models--owner--name/snapshots/0123abc")
    for model, base, revision in (
        ("owner/name@main", "owner/name", "0123abc"),
        (str(BASE), "/cache/models--owner--name/snapshots/0123abc", None),
    ):
        training.cfg = train.Config(model, lora_rank=4)
        about = training._about_adapter()
        assert (about["base_model_name_or_path"], about["revision"]) == (base, revision)


def test_a_run_goes_on_with_its_own_base_and_flags_alone(sft, grpo, tmp_path):
    cut = replace(sft, out=tmp_path / "cut", resume=True)
    shutil.copytree(sft.out, cut.out)
    shutil.copytree(BASE, tmp_path / "other")
    state = load_file(BASE / "model.safetensors")
    state["model.norm.weight"] = state["model.norm.weight"] * 1.5
    save_file(state, tmp_path / "other" / "model.safetensors")
    with pytest.raises(ValueError, match="--model, model.safetensors: not what the run .* began"):
        train.main(replace(cut, model=str(tmp_path / "other")))
    with pytest.raises(ValueError, match="--lora-rank 8: the run in .* has 4"):
        train.main(replace(cut, lora_rank=8))
    begun = json.loads((checkpoint.latest(grpo.out) / "trainer.json").read_text())["began_with"]
    names = {name for name in begun if name.endswith(".safetensors")}
    assert names == {"--model, adapter_model.safetensors", "--model's base, model.safetensors"}


def test_two_ranks_compute_what_one_does(sft, grpo, tmp_path):
    """FSDP2 over gloo; SFT in bfloat16 too, whose base is sharded in bfloat16, its adapters in
    float32; and with the merger's adapter, which learns through a sharded tower."""
    one = replace(sft, out=tmp_path / "one", lora_targets=ALL, dtype="bfloat16", freeze_vision=True)
    train.main(one)
    two, policy = tmp_path / "two", tmp_path / "policy"
    jobs = [["train", flags(one, out=two)], ["rl", flags(grpo, out=policy)]]
    # a sharded tower, which all ranks must go through as often, whatever frames each has seen
    merger = replace(grpo, out=tmp_path / "merger", lora_targets=ALL, micro_tokens=600)
    rl.main(merger)
    jobs.append(["rl", flags(merger, out=tmp_path / "mergers")])
    done = torchrun(jobs)
    assert done.returncode == 0, done.stderr[-3000:]
    assert_same(log(tmp_path / "mergers"), log(merger.out))
    for ours, theirs in zip(log(two), log(one.out), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=0.01)
        assert ours["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=0.05)
    assert_same(log(policy), log(grpo.out))
    mine, whole = (load_file(run / "model" / lora.WEIGHTS) for run in (policy, grpo.out))
    assert mine.keys() == whole.keys()
    assert max((mine[k] - whole[k]).abs().max().item() for k in mine) < 2e-3


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"freeze_vision": False}, "--lora-rank 4: adapters alone learn"),
        ({"lora_targets": ()}, "--lora-targets: name at least one"),
        ({"lora_rank": -1}, "--lora-rank -1: must be at least 0"),
    ],
)
def test_flags_that_do_not_go_together_are_refused(given, why):
    with pytest.raises(ValueError, match=why):
        train.Config(**{"lora_rank": 4, **given}).check()
    assert not train.Config(lora_rank=4, lora_targets=ALL).frozen
    assert train.Config(lora_rank=4).frozen and train.Config(lora_targets=ALL).frozen


def test_names_are_mapped_to_pefts_and_back(tiny_pair):
    _, model = tiny_pair()
    for name, _ in lora.linears(model, ALL):
        assert own_name(f"{lora.PREFIX}{lora.peft_name(name)}") == name
    num_mergers = model.cfg.vision.feature_size // model.cfg.hidden_size
    assert len(list(lora.linears(model, ALL))) == 7 * 3 + 2 * num_mergers
