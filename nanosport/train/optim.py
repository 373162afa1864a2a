"""One optimizer for both stages: AdamW, linear warm-up, cosine decay."""

import math

import torch

from nanosport.model import lora
from nanosport.train import dist


def trainable(model: torch.nn.Module, freeze_vision: bool, freeze_projector: bool) -> None:
    """Choose what is trained: adapters alone where there are some; else the language model, and the
    vision tower and the projector after it (`merger`, and what of DeepStack is like it) unless they
    are frozen."""
    adapted = bool(lora.adapters(model))
    for name, weight in model.named_parameters():
        frozen = name.startswith("visual.") and freeze_vision
        if name.startswith(("visual.merger.", "visual.deepstack_merger_list.")):
            frozen = freeze_projector
        weight.requires_grad_(".lora." in name if adapted else not frozen)


class OffloadedAdamW(torch.optim.AdamW):
    """AdamW whose moments rest in the CPU's memory and visit the GPU one weight at a time: 8 bytes
    a weight less there, for a trip over the bus each step."""

    def step(self) -> None:
        groups = self.param_groups
        try:
            for group in groups:
                for weight in (w for w in group["params"] if w.grad is not None):
                    self.param_groups = [{**group, "params": [weight]}]
                    self._move(weight, weight.device)
                    super().step()
                    self._move(weight, "cpu")
        finally:
            self.param_groups = groups

    def _move(self, weight: torch.Tensor, device) -> None:
        state = self.state[weight]
        for key in ("exp_avg", "exp_avg_sq"):
            if key in state:
                state[key] = state[key].to(device)


def build(
    model: torch.nn.Module, weight_decay: float, eps: float = 1e-8, offload: bool = False
) -> torch.optim.AdamW:
    """AdamW over the trained weights; matrices decay, vectors do not. offload: keep its moments in
    the CPU's memory."""
    trained = [weight for weight in model.parameters() if weight.requires_grad]
    groups = [
        {"params": [w for w in trained if w.ndim >= 2], "weight_decay": weight_decay},
        {"params": [w for w in trained if w.ndim < 2], "weight_decay": 0.0},
    ]
    kind = OffloadedAdamW if offload else torch.optim.AdamW
    on_gpu = any(weight.is_cuda for weight in trained)  # there one kernel does all, in one pass
    return kind(groups, lr=0.0, betas=(0.9, 0.98), eps=eps, fused=on_gpu or None)


def start_moments(optimizer: torch.optim.AdamW) -> None:
    """Give zeros to the weights that were never updated, as AdamW's first step does: sharded as the
    weights are, and where the moments rest."""
    weights = [weight for group in optimizer.param_groups for weight in group["params"]]
    for weight in weights:
        if not optimizer.state[weight]:
            place = "cpu" if isinstance(optimizer, OffloadedAdamW) else weight.device
            zeros = {k: torch.zeros_like(weight, device=place) for k in ("exp_avg", "exp_avg_sq")}
            fused = optimizer.param_groups[0]["fused"]
            step = torch.zeros((), device=weight.device if fused else "cpu")
            optimizer.state[weight] = {"step": step, **zeros}


def clip(model: torch.nn.Module, max_norm: float) -> float:
    """Scale the gradients down to `max_norm`, over all ranks; returns their norm before, which may
    be non-finite."""
    weights = [weight for weight in model.parameters() if weight.grad is not None]
    return float(dist.full(torch.nn.utils.clip_grad_norm_(weights, max_norm)))


def set_lr(
    optimizer: torch.optim.Optimizer, step: int, peak: float, warmup: int, total: int
) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then cosine down to a tenth at `total`."""
    lr = peak * min(1.0, (step + 1) / max(1, warmup))
    if step >= warmup:
        done = (step - warmup) / max(1, total - warmup)
        lr = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
