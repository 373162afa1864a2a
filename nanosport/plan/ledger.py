"""Counts the memory of real code that runs on fake tensors: they have a shape, but no values.

Fake tensors lie on the CPU, because autograd knows no GPU where torch has none. Where a GPU is
planned, the code goes a GPU's ways with them all the same.
"""

import weakref
from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest.mock import patch

import torch
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode, unset_fake_temporarily
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map_only

from kernels import attention, elementwise, paged_attention, policy_loss

LARGE = 1 << 20
"""Integers are fake only in such numbers."""


class Ledger(TorchDispatchMode):
    """Knows how many bytes each part of the work holds, and what all held at each moment's peak.

    Floats are fake. Integers are real, since the code decides with them: those that come of floats
    are zeros.
    """

    def __init__(self):
        super().__init__()
        self.fake = FakeTensorMode(allow_non_fake_inputs=True)
        self.storages: dict[int, tuple[str, int]] = {}
        """The part and the bytes of each storage, by its address."""
        self.held: Counter[str] = Counter()
        self.peaks: dict[str, dict[str, int]] = {}

    def enter(self, part: str, moment: str = "") -> None:
        """From now on, new storages are `part`'s, and the peak is the moment's, or else part's."""
        self.part, self.moment = part, moment or part

    def write_down(self, storage: torch.UntypedStorage, num_bytes: int) -> None:
        """Note a storage's size, until it is freed."""
        address = storage._cdata
        if address not in self.storages:
            weakref.finalize(storage, self._free, address)
        part, before = self.storages.get(address, (self.part, 0))
        self.storages[address] = part, num_bytes
        self._hold(part, num_bytes - before)

    def _free(self, address: int) -> None:
        part, num_bytes = self.storages.pop(address)
        self._hold(part, -num_bytes)

    def _hold(self, part: str, num_bytes: int) -> None:
        self.held[part] += num_bytes
        if self.held.total() > sum(self.peaks.get(self.moment, {}).values()):
            self.peaks[self.moment] = dict(self.held)

    def _take(self, tensor: FakeTensor) -> torch.Tensor:
        """A fake tensor that has come out of an operation, written down; or zeros in its place."""
        storage = tensor.untyped_storage()
        if tensor.device.type == "meta" or storage._cdata in self.storages:
            return tensor
        if not stays_fake(tensor):
            with unset_fake_temporarily():
                return torch.zeros(tensor.shape, dtype=tensor.dtype)
        self.write_down(storage, storage.nbytes())
        return tensor

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if DTensor in types:
            return NotImplemented  # it comes back with the tensors that it is made of
        if len(self.fake.enter_stack) > 1:  # DTensor only asks for a shape
            return func(*args, **kwargs)
        if func is torch.ops.aten.addmm.dtype_out:  # the one operation that has no fake
            return kwargs["out"]

        # integers alone are computed, unless they become many
        given = [x for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        if any(isinstance(x, FakeTensor) for x in given):
            if func is torch.ops.aten._local_scalar_dense.default:
                return 1.0  # a float's value: any will do
        elif given or not stays_fake(func(*args, **kwargs)):
            with unset_fake_temporarily():
                out = func(*args, **kwargs)
            if not stays_fake(out):
                return out
        return tree_map_only(FakeTensor, self._take, func(*args, **kwargs))


def stays_fake(x) -> bool:
    return isinstance(x, torch.Tensor) and (x.is_floating_point() or x.numel() >= LARGE)


class NoKernels:
    """Stands in for kernels that fill what they are given: they allocate nothing."""

    def __getattr__(self, name: str):
        return lambda *_, **__: None


@contextmanager
def counting(on_gpu: bool) -> Iterator[Ledger]:
    """Run the code inside on fake tensors and count; on_gpu: as it would run on a GPU."""
    ledger, resize = Ledger(), torch.UntypedStorage.resize_

    def resize_(storage, num_bytes):
        if storage._cdata in ledger.storages:
            ledger.write_down(storage, num_bytes)
        return resize(storage, num_bytes)

    stand_ins = [(torch.UntypedStorage, "resize_", resize_)]  # with it FSDP frees gathered weights
    if on_gpu:
        stand_ins += [
            (FakeTensor, "is_cuda", True),
            (paged_attention, "split_attention", lambda q_RHd, *_: torch.empty_like(q_RHd)),
            # of all flash kernels, torch's own takes fake tensors
            (attention, "choose", lambda *_: ("", attention.torch_varlen)),
            (policy_loss, "PRODUCT_BYTES", {"cpu": policy_loss.PRODUCT_BYTES["cuda"]}),
            (policy_loss, "CHUNK_BYTES", {"cpu": policy_loss.CHUNK_BYTES["cuda"]}),
            (policy_loss, "fill_rows", lambda *_: None),  # the Triton kernel allocates nothing
            (policy_loss, "scaled", lambda gradient, _: gradient),
            (elementwise, "triton_kernels", NoKernels),
        ]
    with ExitStack() as stack:
        for owner, name, stand_in in stand_ins:
            stack.enter_context(patch.object(owner, name, stand_in))
        stack.enter_context(ledger.fake)
        yield stack.enter_context(ledger)
