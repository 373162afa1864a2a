"""float32 weights that learn, and the copy of the model that computes, for a process that shards
nothing (FSDP2 does the same for several).

The copy's weights are cast once an update, and serve the sampler too. Gradients add up in float32
in the `.grad` of the weights that learn: those of the large products are multiplied into it, all
others are added when the backward pass has them.
"""

import torch
from torch import nn

from nanosport.model.decoder import VLModel, join_projections


def computing_copy(model: VLModel, dtype: torch.dtype) -> VLModel:
    """A copy of `model` in `dtype`. What is frozen, both have in `dtype`, once."""
    with torch.device("meta"):
        copy = VLModel(model.cfg)
    for name, weight in model.named_parameters():
        if not weight.requires_grad:
            weight.data = weight.data.to(dtype)
        path, _, last = name.rpartition(".")
        setattr(copy.get_submodule(path), last, follower(weight, dtype))
    join_projections(copy)
    return copy


def follower(weight: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    """`weight` in `dtype`, whose gradient goes to `weight`; a frozen one follows nothing."""
    if not weight.requires_grad:
        return weight
    cast = nn.Parameter(weight.detach().to(dtype))
    cast.master = weight
    cast.register_post_accumulate_grad_hook(hand_over)
    return cast


def hand_over(cast: nn.Parameter) -> None:
    weight, grad = cast.master, cast.grad
    cast.grad = None
    if grad is None:  # a Linear has multiplied it into the weight's already
        return
    if weight.grad is None:
        weight.grad = grad.to(weight.dtype)
    else:
        weight.grad.add_(grad)


@torch.no_grad()
def renew(copy: VLModel) -> None:
    """Cast anew the weights that have learnt; a model that is no copy stays as it is."""
    if casts := [weight for weight in copy.parameters() if hasattr(weight, "master")]:
        torch._foreach_copy_(casts, [cast.master for cast in casts])
