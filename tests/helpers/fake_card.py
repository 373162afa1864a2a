"""Tensors that say they lie on a card, and count what that would cost.

They carry the label "meta", hold their values on the CPU, and refuse what CUDA refuses: an operation
on tensors of the card and of the host. Counted are launches, copies to the card and to the host, and
the moments at which the host waits for the card.
"""

from collections import Counter

import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

CARD = torch.device("meta")
ASKS = ("_local_scalar_dense", "nonzero", "masked_select", "equal", "is_nonzero", "_unique2")
"""Operations that the host waits for."""
VIEWS = (
    "view _unsafe_view reshape expand permute transpose t select slice unsqueeze squeeze unbind "
    "split split_with_sizes as_strided alias detach unfold empty new_empty empty_like"
).split()


class OnCard(torch.Tensor):
    @staticmethod
    def __new__(cls, held: torch.Tensor):
        one = torch.Tensor._make_wrapper_subclass(
            cls, held.shape, strides=held.stride(), storage_offset=held.storage_offset(),
            dtype=held.dtype, device=CARD,
        )  # fmt: skip
        one.held = held
        return one

    def __repr__(self):
        return f"OnCard({self.held})"

    def tolist(self):
        return self.cpu().tolist()

    @classmethod
    def __torch_dispatch__(cls, func, types, args=(), kwargs=None):
        raise RuntimeError(f"{func}: no card is there")


class FakeCard(TorchDispatchMode):
    """While it is entered, a card is there."""

    def __init__(self):
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs, name = dict(kwargs or {}), func._schema.name.split("::")[1]
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        there = [x for x in tensors if isinstance(x, OnCard)]
        here = [x for x in tensors if not isinstance(x, OnCard) and x.dim()]
        goes_there = bool(there)
        if kwargs.get("device") is not None:
            goes_there, kwargs["device"] = torch.device(kwargs["device"]) == CARD, "cpu"

        if name in ("_to_copy", "copy_"):
            to_card = goes_there if name == "_to_copy" else isinstance(args[0], OnCard)
            if there and not (to_card and len(there) == len(tensors)):
                self.counts["to card" if to_card else "to host"] += 1
                waits = not (kwargs.get("non_blocking") or args[2:3] == (True,))
                self.counts["waits"] += waits and not to_card
            elif to_card and here:
                self.counts["to card"] += 1
            else:
                self.counts["launches"] += bool(there)
        elif there and here:
            shapes = [(type(x).__name__, tuple(x.shape)) for x in tensors]
            raise RuntimeError(f"{func}: tensors of the card and of the host: {shapes}")
        elif there:
            self.counts["waits" if name in ASKS else "launches"] += name not in VIEWS

        def held(x):
            return x.held if isinstance(x, OnCard) else x

        out = func(*tree_map(held, args), **tree_map(held, kwargs))
        if func._schema.is_mutable:
            for argument, given in zip(func._schema.arguments, args):
                if argument.alias_info is not None and argument.alias_info.is_write:
                    return given
        if not goes_there:
            return out
        return tree_map(lambda x: OnCard(x) if isinstance(x, torch.Tensor) else x, out)


def move(module: nn.Module) -> None:
    """Put a module's weights on the card."""
    for part in module.modules():
        for name, weight in part._parameters.items():
            if weight is not None:
                part._parameters[name] = nn.Parameter(OnCard(weight.data), requires_grad=False)
