"""One optimizer for both stages: AdamW, linear warm-up, then constant or cosine."""

import math

import torch


def trainable(model: torch.nn.Module, freeze_vision: bool) -> None:
    """Choose what is trained: everything, or everything but the vision tower."""
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not (freeze_vision and name.startswith("visual.")))


def build(model: torch.nn.Module, weight_decay: float, eps: float = 1e-8) -> torch.optim.AdamW:
    """AdamW over the trained parameters; matrices decay, vectors do not."""
    named = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    groups = [
        {"params": [p for _, p in named if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in named if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.98), eps=eps)


def set_lr(optimizer: torch.optim.Optimizer, step: int, peak: float, warmup: int, total: int, cosine: bool) -> float:
    """Learning rate of step 0, 1, …: linear warm-up, then constant, or cosine down to a tenth at `total`."""
    lr = peak * min(1.0, (step + 1) / max(1, warmup))
    if cosine and step >= warmup:
        done = (step - warmup) / max(1, total - warmup)
        lr = peak * (0.1 + 0.45 * (1 + math.cos(math.pi * min(1.0, done))))
    for group in optimizer.param_groups:
        group["lr"] = lr
    return lr
