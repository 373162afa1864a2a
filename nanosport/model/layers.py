"""The layers that the decoder and the vision tower share."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.elementwise import add_norm, swiglu


class RMSNorm(nn.Module):
    """weight · x / √(mean x² + eps): the quotient in float32, rounded before the weight comes in,
    as the checkpoints were trained."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(width)), eps

    def forward(self, x):
        return self.residual(x)[1]

    def residual(self, x, delta=None):
        """(x + delta, its norm): what goes on past the next part of a layer, and what that part
        reads. Both in one, so that a GPU reads them once."""
        return add_norm(x, delta, self.weight, self.eps)


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = nn.Linear(width, inner, bias)
        self.up_proj = nn.Linear(width, inner, bias)
        self.down_proj = nn.Linear(inner, width, bias)
        self.joined = None

    def forward(self, x):
        gate, up = apply((self.gate_proj, self.up_proj), x, self.joined)
        return self.down_proj(swiglu(gate, up))


def apply(linears, x, joined=None):
    """Each layer's product with x; joined: what `join` has made of them, for one product."""
    if joined is None:
        return [linear(x) for linear in linears]
    return F.linear(x, *joined).split([linear.out_features for linear in linears], dim=-1)


@torch.no_grad()
def join(linears):
    """(weight, bias or None) of one layer in place of several with the same input. Their own
    weights become parts of it, so that what is written into them is written there."""
    parts = [[linear.weight for linear in linears]]
    if linears[0].bias is not None:
        parts.append([linear.bias for linear in linears])
    joined = []
    for own in parts:
        joined.append(torch.cat([weight.data for weight in own]))
        for weight, part in zip(own, joined[-1].split([len(weight) for weight in own])):
            weight.data = part
    return tuple(joined)


def inverse_frequencies(theta: float, dim: int, device) -> torch.Tensor:
    """dim/2 rotary frequencies, float32.

    They are never stored: a buffer of a model made on meta is garbage. They come from the CPU: a
    GPU's pow differs in the last bit.
    """
    exponents = torch.arange(0, dim, 2, dtype=torch.float32, device="cpu") / dim
    return (1.0 / theta**exponents).to(device)


def run_layer(layer: nn.Module, x, attend, index: int, recompute_every: int):
    """layer(x, attend). Every so many layers, the backward pass computes the layer again instead of
    keeping its activations; 0: no layer."""
    if recompute_every and index % recompute_every == 0 and torch.is_grad_enabled():
        return checkpoint(layer, x, attend, use_reentrant=False)
    return layer(x, attend)
