"""LoRA (arXiv 2106.09685): y = W x + s·B A x with s = alpha / rank. W is frozen; A and B learn, in
float32. B begins with zeros, so that the first step's model is the base.

An adapter's folder is as peft writes and reads it: adapter_config.json names the base, and
adapter_model.safetensors holds A and B of each layer. What would compute something else than the
line above is refused.

Letters: T tokens, D width of the input, O of the output, R rank.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Literal

import torch
import torch.nn.functional as F
from torch import nn

from nanosport.fields import AtLeast, fits, only, short

Target = Literal[
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "merger"
]
DECODER: tuple[Target, ...] = (
    "q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj",
)  # fmt: skip
"""The matrix products of a decoder's layer."""
CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
HARMLESS = (
    "peft_type", "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "r", "lora_alpha", "lora_dropout", "target_modules", "exclude_modules",
    "layers_to_transform", "layers_pattern", "megatron_core", "qalora_group_size",
)  # fmt: skip
"""What of adapter_config.json is read, or changes nothing of what the saved weights compute."""


class Lora(nn.Module):
    """What stands beside a Linear layer."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float):
        super().__init__()
        how = {"dtype": torch.float32, "device": linear.weight.device}
        self.A = nn.Parameter(torch.empty(rank, linear.in_features, **how))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank, **how))
        self.scale, self.on = alpha / rank, True

    def forward(self, x_TD, y_TO):
        """y + s·B A x, in the dtype of x."""
        if not self.on:
            return y_TO
        low_TR = self.scale * F.linear(x_TD, self.A.to(x_TD.dtype))
        return torch.addmm(y_TO, low_TR, self.B.to(x_TD.dtype).T)


def merged(weight_OD: torch.Tensor, scale: float, a_RD, b_OR) -> torch.Tensor:
    """W + s·B A, summed in float32 and rounded once."""
    return (weight_OD.float() + scale * (b_OR @ a_RD)).to(weight_OD.dtype)


def linears(model: nn.Module, targets: Sequence[str]) -> Iterator[tuple[str, nn.Linear]]:
    """(name, layer) of what `targets` name: products of the decoder's layers, and all of the
    tower's mergers."""
    for name, module in model.named_modules():
        in_tower, last = name.startswith("visual."), name.rpartition(".")[2]
        chosen = "merger" in targets and "merger" in name if in_tower else last in targets
        if chosen and isinstance(module, nn.Linear):
            yield name, module


def attach(model: nn.Module, rank: int, alpha: float, targets: Sequence[str], seed: int) -> None:
    """Put adapters beside layers of `model`. A begins as peft's, uniform in ±1/√D, the same on
    every rank and device."""
    draws = torch.Generator().manual_seed(seed)
    for _, linear in list(linears(model, targets)):
        linear.lora = Lora(linear, rank, alpha)
        bound = linear.in_features**-0.5
        start_RD = torch.empty(linear.lora.A.shape).uniform_(-bound, bound, generator=draws)
        linear.lora.A.data.copy_(start_RD)


def adapters(model: nn.Module) -> dict[str, Lora]:
    """The adapters of a model by the name of the layer that each stands beside."""
    named = model.named_modules()
    return {name.removesuffix(".lora"): part for name, part in named if isinstance(part, Lora)}


@contextmanager
def off(model: nn.Module):
    """A block in which `model` computes what its base does, bit for bit."""
    chosen = adapters(model).values()
    for adapter in chosen:
        adapter.on = False
    try:
        yield
    finally:
        for adapter in chosen:
            adapter.on = True


def saved_names(model: nn.Module) -> dict[str, str]:
    """{name in the model's folder: name of the parameter} of all that a run must save: every
    weight, or the adapters alone where there are some, under the names that peft gives them."""
    found = adapters(model)
    if not found:
        return {name: name for name, _ in model.named_parameters()}
    return {
        f"{PREFIX}{peft_name(name)}.lora_{part}.weight": f"{name}.lora.{part}"
        for name in found
        for part in "AB"
    }


def peft_name(name: str) -> str:
    """A layer's name in transformers' model, which holds tower and decoder one level deeper."""
    part, rest = name.split(".", 1)
    return f"model.language_model.{rest}" if part == "model" else f"model.{name}"


def config_of(model: nn.Module, base: str, rank: int, alpha: int) -> dict:
    """What adapter_config.json says of a model's adapters. base: a folder or a hub id."""
    return {
        "peft_type": "LORA",
        "task_type": None,
        "base_model_name_or_path": base,
        "revision": None,
        "r": rank,
        "lora_alpha": alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "target_modules": [peft_name(name) for name in adapters(model)],
        "inference_mode": True,
    }


def check_config(raw: dict, where) -> tuple[int, float]:
    """(rank, alpha) of an adapter_config.json. Raises ValueError, after `where`, for adapters of
    another kind."""
    only(where, "peft_type", raw.get("peft_type"), "LORA")
    only(where, "bias", raw.get("bias", "none"), "none")
    only(where, "init_lora_weights", raw.get("init_lora_weights", True), True, False, "gaussian")
    for name, value in raw.items():
        if name not in (*HARMLESS, "bias", "init_lora_weights") and value not in (None, False, {}):
            what = "adapters of another kind than plain LoRA; merge them into their base with peft"
            raise ValueError(f"{where}: {name} {short(value)}: {what}")
    rank, alpha = raw.get("r"), raw.get("lora_alpha")
    if not fits(rank, int, (AtLeast(1),)) or not fits(alpha, float, ()):
        rule = "must be a whole number, at least 1, and a finite number"
        raise ValueError(f"{where}: r {short(rank)}, lora_alpha {short(alpha)}: {rule}")
    return rank, alpha


@torch.no_grad()
def merge(model: nn.Module, raw: dict, state: Mapping[str, torch.Tensor], where) -> None:
    """Add an adapter to the weights of its base. raw: its adapter_config.json; state: its weights,
    by the layer's published name. Raises ValueError, after `where`, where the two do not fit the
    model or each other."""
    (rank, alpha), layers = check_config(raw, where), dict(model.named_modules())
    names = sorted({name.rpartition(".lora_")[0] for name in state})
    if not names or len(state) != 2 * len(names):
        raise ValueError(f"{where}: must hold A and B of layers, and nothing else")
    for name in names:
        parts = [state.get(f"{name}.lora_{part}.weight") for part in "AB"]
        shapes = [None if part is None else tuple(part.shape) for part in parts]
        linear = layers.get(name)
        if not isinstance(linear, nn.Linear) or None in shapes:
            raise ValueError(f"{where}: {name}: the model has no such layer, or A or B is missing")
        wanted = [(rank, linear.in_features), (linear.out_features, rank)]
        if shapes != wanted:
            why = f"A and B of {shapes}, where the base and r {rank} ask for {wanted}"
            raise ValueError(f"{where}: {name}: {why}")
        linear.weight.copy_(merged(linear.weight, alpha / rank, *parts))
