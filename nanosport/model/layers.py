"""The layers that the decoder and the vision tower share."""

from collections.abc import Sequence
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from kernels.elementwise import add_norm, swiglu
from kernels.policy_loss import add_outer


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


class LayerNorm(nn.LayerNorm):
    def residual(self, x, delta=None):
        """(x + delta, its norm), as in RMSNorm."""
        x = x if delta is None else x + delta
        return x, self(x)


class Linear(nn.Linear):
    """nn.Linear. Where its weight is a cast of one that learns (`weight.master`), the gradient is
    multiplied into that one's `.grad`, in float32: no pass adds it up afterwards."""

    def __init__(self, *shape, **how):
        super().__init__(*shape, **how)
        self.lora: nn.Module | None = None  # see lora.py

    def forward(self, x):
        if not learns(self):
            return self.adapted(x, super().forward(x))
        return learning_product(x, (self,), self.weight, self.bias)

    def adapted(self, x, y):
        """The layer's product y, with what its adapter adds."""
        return y if self.lora is None else self.lora(x, y)


def learns(layer: nn.Module) -> bool:
    return torch.is_grad_enabled() and hasattr(layer.weight, "master")


def learning_product(x, linears: Sequence[Linear], weight, bias):
    """x · weightᵀ + bias, where `weight` is that of `linears` side by side."""
    product = SimpleNamespace(masters=[linear.weight.master for linear in linears])
    x = KeepInput.apply(x, linears[0].weight, product)
    return TakeGradient.apply(F.linear(x, weight.detach(), bias), product)


class Embedding(nn.Embedding):
    """nn.Embedding, with the gradient of a cast as in Linear: only the rows that are read are
    added to."""

    def reset_parameters(self):
        if not self.weight.is_meta:  # to draw nothing, torch imports its compiler: seconds
            super().reset_parameters()

    def forward(self, ids):
        if not learns(self):
            return super().forward(ids)
        return ReadRows.apply(ids, self.weight, self.weight.master)


class ReadRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, ids, weight, master):
        ctx.save_for_backward(ids)
        ctx.master = master
        return F.embedding(ids, weight)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (ids,), master = ctx.saved_tensors, ctx.master
        if master.grad is None:
            master.grad = torch.zeros_like(master)
        master.grad.index_add_(0, ids.flatten(), grad.flatten(0, -2).to(master.dtype))
        return None, None, None


class KeepInput(torch.autograd.Function):
    """x, kept before the product is computed: recomputation, which ends with the last tensor that
    is kept, then leaves the last product out."""

    @staticmethod
    def forward(ctx, x, weight, product):
        ctx.save_for_backward(x)
        ctx.product = product
        return x.view_as(x)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_x):
        (x,), product = ctx.saved_tensors, ctx.product
        grads = product.grad.split([len(master) for master in product.masters], dim=-1)
        del product.grad  # else it stays as long as the loss does
        for master, grad in zip(product.masters, grads):
            master.grad = add_outer(master.grad, grad, x, master.dtype)
        return grad_x, None, None


class TakeGradient(torch.autograd.Function):
    """y; in the backward pass its gradient is there before that of x."""

    @staticmethod
    def forward(ctx, y, product):
        ctx.product = product
        return y.view_as(y)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_y):
        ctx.product.grad = grad_y
        return grad_y, None


class MLP(nn.Module):
    def __init__(self, width: int, inner: int, bias: bool):
        super().__init__()
        self.gate_proj = Linear(width, inner, bias)
        self.up_proj = Linear(width, inner, bias)
        self.down_proj = Linear(inner, width, bias)
        self.joined = None

    def forward(self, x):
        # with gradients, one for both would have to be put together first
        joined = None if torch.is_grad_enabled() else self.joined
        gate, up = apply((self.gate_proj, self.up_proj), x, joined)
        return self.down_proj(swiglu(gate, up))


def apply(linears: Sequence[Linear], x, joined=None):
    """Each layer's product with x; joined: what `join` has made of them, for one product."""
    if joined is None:
        return [linear(x) for linear in linears]
    if learns(linears[0]):
        biases = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        product = learning_product(x, linears, joined[0], bias)
    else:
        product = F.linear(x, *joined)
    parts = product.split([linear.out_features for linear in linears], dim=-1)
    return [linear.adapted(x, part) for linear, part in zip(linears, parts)]


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


def run_layer(layer: nn.Module, x, attend, recompute: str):
    """layer(x, attend). What of it the backward pass computes again, instead of keeping what it
    needs: "all"; "mlp", which is all but the attention; or "none"."""
    if recompute == "none" or not torch.is_grad_enabled():
        return layer(x, attend)
    if recompute == "all":
        return checkpoint(layer, x, attend, use_reentrant=False)
    return layer(x, attend, partial(checkpoint, use_reentrant=False))
