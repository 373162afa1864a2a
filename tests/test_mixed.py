"""float32 weights with a computing copy in bfloat16, and what the backward pass computes again."""

from dataclasses import replace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import train
from nanosport.model.decoder import VLModel, join_projections
from nanosport.model.folder import load_config, load_model
from nanosport.model.layers import Embedding, Linear
from nanosport.plan.synthetic import Lengths, bare_training, make_episodes
from nanosport.train import mixed, optim, recompute
from tests.helpers.runs import ROOT, log

NANO = load_config(ROOT / "assets" / "nano-backbone")
CPU = torch.device("cpu")
(EPISODE,) = make_episodes(NANO, Lengths(frame_tokens=9, turn_text=7), 1, 1)
SEVEN = load_config(ROOT / "assets" / "qwen2.5-vl-7b")


def model_and_copy(freeze_vision=True, freeze_projector=True):
    torch.manual_seed(0)
    model = VLModel(NANO).init_weights(0.05)
    optim.trainable(model, freeze_vision, freeze_projector)
    return model, mixed.computing_copy(model, torch.bfloat16)


def hidden(model: VLModel, ids: torch.Tensor, recompute="none") -> torch.Tensor:
    model.recompute = (recompute,) * model.cfg.num_hidden_layers
    positions_3T = torch.arange(len(ids)).expand(3, -1)
    return model.hidden(ids, positions_3T, torch.tensor([0, len(ids)]).int())


def loss(model: VLModel, ids: torch.Tensor, recompute="none") -> torch.Tensor:
    hidden_TD = hidden(model, ids, recompute).float()
    return (hidden_TD * torch.arange(hidden_TD.numel()).view_as(hidden_TD).sin()).mean()


def batches(count: int) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(1)
    return [torch.randint(7, 500, (97,), generator=generator) for _ in range(count)]


def test_gradients_of_many_micro_batches_add_up_in_float32():
    """Four micro-batches: the sum of each one's products in float32, where bfloat16 sums lose three
    digits."""
    model, copy = model_and_copy()
    exact = VLModel(NANO).to(torch.float32)
    exact.load_state_dict({k: w.to(torch.bfloat16).float() for k, w in model.state_dict().items()})
    single, name = {}, "model.layers.1.mlp.down_proj.weight"
    for ids in batches(4):
        loss(copy, ids).backward()
        loss(exact, ids).backward()
        alone, alone_copy = model_and_copy()
        loss(alone_copy, ids).backward()
        for key, weight in alone.named_parameters():
            if weight.grad is not None:
                single[key] = single.get(key, 0) + weight.grad
    assert all(weight.grad is None for weight in copy.parameters())
    for key, weight in model.named_parameters():
        if weight.requires_grad and weight.grad is not None:
            assert weight.grad.dtype == torch.float32
            torch.testing.assert_close(weight.grad, single[key], rtol=1e-5, atol=1e-9)
            if weight.grad.norm() > 1e-6:  # the keys' biases have no gradient
                wanted = exact.get_parameter(key).grad
                assert (weight.grad - wanted).norm() < 0.05 * wanted.norm(), key
    grad = model.get_parameter(name).grad
    assert not torch.equal(grad, grad.bfloat16().float()), "a product in float32, not rounded"


def test_a_large_product_never_has_a_gradient_of_its_own():
    """It is multiplied into the weight's, whether the layer is computed again or not; biases and
    norms are added."""
    model, copy = model_and_copy()
    seen = []
    for name, cast in copy.named_parameters():
        if cast.requires_grad:
            cast.register_hook(
                lambda grad, name=name: seen.append(name) if grad is not None else None
            )
    loss(copy, batches(1)[0], "all").backward()
    large, modules = (Linear, Embedding), copy.model.named_modules()
    products = {f"{name}.weight" for name, part in modules if isinstance(part, large)}
    assert len(products) == 7 * NANO.num_hidden_layers + 1
    assert seen and not {name for name in seen if name.removeprefix("model.") in products}
    assert all(model.get_parameter(f"model.{name}").grad is not None for name in products)


def test_a_model_that_plays_itself_learns_all_of_its_products():
    """In float32 no copy computes, and generation joins the model's own projections."""
    gradients = []
    for joined in (False, True):
        torch.manual_seed(0)
        model = VLModel(NANO).init_weights(0.05)
        if joined:
            join_projections(model)
        loss(model, batches(1)[0]).backward()
        learnt = {n: w.grad for n, w in model.named_parameters() if not n.startswith("visual.")}
        gradients.append(learnt)
    for name, grad in gradients[0].items():
        assert torch.equal(gradients[1][name], grad) and grad.abs().max() > 0, name


def test_the_copy_follows_what_learns_and_shares_what_is_frozen():
    model, copy = model_and_copy()
    assert copy.visual.patch_embed.proj.weight is model.visual.patch_embed.proj.weight
    assert {w.dtype for w in copy.parameters()} == {torch.bfloat16}
    assert {w.dtype for w in model.model.parameters()} == {torch.float32}
    before = {name: w.clone() for name, w in copy.named_parameters()}
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(1.0 if weight.requires_grad else 0.0)
    mixed.renew(copy)
    for name, weight in copy.named_parameters():
        assert torch.equal(weight, model.get_parameter(name).to(torch.bfloat16))
        assert torch.equal(weight, before[name]) == name.startswith("visual.")
    _, learns = model_and_copy(freeze_vision=False, freeze_projector=False)
    assert all(hasattr(weight, "master") for weight in learns.parameters())


def test_one_process_learns_in_bfloat16_what_it_learns_in_float32(arena_folder, tmp_path):
    """On the CPU, with a tower that learns; and goes on from a checkpoint bit for bit."""
    flags = {"steps": 4, "batch_size": 3, "warmup": 1, "micro_tokens": 800, "save_every": 2}
    flags |= {"freeze_vision": False, "freeze_projector": False, "lr": 1e-4}
    data, logs = arena_folder / "trajectories.jsonl", {}
    for dtype in ("float32", "bfloat16"):
        out = tmp_path / dtype
        cfg = train.Config(str(ROOT / "assets/nano-backbone"), data, out, dtype=dtype, **flags)
        train.main(cfg)
        logs[dtype] = log(out)
    for row, exact in zip(logs["bfloat16"], logs["float32"]):
        assert (
            row["loss"] == pytest.approx(exact["loss"], rel=0.01) and row["loss"] != exact["loss"]
        )
        assert row["grad_norm"] == pytest.approx(exact["grad_norm"], rel=0.05)
    (tmp_path / "bfloat16" / "checkpoints" / "step_000004").rename(tmp_path / "whole")
    train.main(train.Config(cfg.model, data, out, dtype="bfloat16", resume=True, **flags))
    assert log(out) == logs["bfloat16"]


# What the backward pass computes again.


def flops(recompute: str) -> tuple[int, int]:
    """(forward, backward) of a model's layers."""
    _, copy = model_and_copy()
    with FlopCounterMode(display=False) as forward:
        out = loss(copy, batches(1)[0], recompute)
    with FlopCounterMode(display=False) as backward:
        out.backward()
    return forward.get_total_flops(), backward.get_total_flops()


def test_no_product_is_computed_again_in_vain():
    """A layer's last product is not; with the attention kept, neither are q, k and v."""
    (forward, none), (_, mlp), (_, all_again) = map(flops, ("none", "mlp", "all"))
    width, inner, tokens = NANO.hidden_size, NANO.intermediate_size, 97
    heads, keys = (n * NANO.head_dim for n in (NANO.num_attention_heads, NANO.num_key_value_heads))
    gate_up_o = 2 * tokens * width * (2 * inner + heads) * NANO.num_hidden_layers
    queries = 2 * tokens * width * (heads + 2 * keys) * NANO.num_hidden_layers
    assert mlp - none == gate_up_o
    assert all_again - mlp >= queries  # and the attention, where its operations are counted
    assert all_again - none < forward


@pytest.mark.parametrize("mode", ["all", "mlp"])
def test_a_layer_keeps_what_is_said(mode):
    ids, sums = batches(1)[0], []

    def keep(tensor):
        if tensor.is_floating_point() and tensor.ndim > 1 and tensor.numel() % len(ids) == 0:
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes() // 4
        return tensor

    for layers in (1, 2):
        cfg, kept = replace(NANO, num_hidden_layers=layers), {}
        model = VLModel(cfg).init_weights(0.05)
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            out = hidden(model, ids, mode)
        sums.append(sum(kept.values()))
        del out
    said = recompute.Kept(NANO, len(ids), torch.float32).layer(mode) / 4
    assert 0.75 * said < sums[1] - sums[0] <= said


def test_as_little_is_computed_again_as_memory_allows():
    layers, kept = SEVEN.num_hidden_layers, recompute.Kept(SEVEN, 16_384)
    need = {mode: kept.layers([mode] * layers) for mode in recompute.LESS}
    assert recompute.choose(kept, -1.0) == ["all"] * layers
    for mode, size in need.items():
        assert recompute.choose(kept, size + 1.0) == [mode] * layers
    assert recompute.choose(kept, (need["mlp"] + need["none"]) / 2) == ["mlp"] * 14 + ["none"] * 14
    previous = 0
    for room in range(0, int(1.2 * need["none"]), 1 << 30):
        modes = recompute.choose(kept, room)
        used = kept.layers(modes)
        assert previous <= used and (used <= room or modes == ["all"] * layers)
        previous = used
    assert previous == need["none"]


def test_shared_keys_and_wider_values_count():
    kept = recompute.Kept(SEVEN, 1000)
    shared = replace(kept, num_keys=3000)
    assert shared.layer("mlp") - kept.layer("mlp") == 2000 * 2 * 512 * 2
    assert shared.layer("all") == kept.layer("all") == 1000 * 3584 * 2
    wide = replace(kept, dtype=torch.float32)
    assert wide.layer("all") == 2 * kept.layer("all")


def test_a_learning_tower_computes_again_what_is_asked_from_its_first_frame_on(nano_folder):
    for asked, mode in (("all", "all"), ("auto", "none")):  # auto: on a CPU nothing
        run = train.Config(recompute=asked, freeze_vision=False, freeze_projector=False)
        training = bare_training(run, load_model(nano_folder), EPISODE, CPU, torch.float32)
        assert training.computing.visual.recompute == mode
