"""torchrun, in the few calls the loops need, and the model laid out over its processes. One process
without torchrun is a world of one.

FSDP2: each rank keeps its shard of the float32 weights, gradients and Adam moments. A layer's
weights are gathered in the compute dtype when it runs, and its gradients summed in float32 after
it. Over several nodes the shards stay inside a node (HSDP).
"""

import ctypes
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nanosport.model import lora
from nanosport.model.decoder import VLModel

TIMEOUT = timedelta(hours=2)
"""A collective call may take so long; the watchdog (faults.py) ends what hangs sooner."""


def start() -> tuple[int, int, torch.device]:
    """Join torchrun's process group, and return (rank, world size, device).

    Raises ValueError where torchrun starts more processes than there are GPUs.
    """
    under_torchrun, world = "RANK" in os.environ, int(os.environ.get("WORLD_SIZE", 1))
    rank, local_rank = (int(os.environ.get(name, 0)) for name in ("RANK", "LOCAL_RANK"))
    on_gpu = torch.cuda.is_available()
    if "TORCHELASTIC_RUN_ID" in os.environ:  # SIGTERM when torchrun is gone: PR_SET_PDEATHSIG is 1
        ctypes.CDLL(None).prctl(1, signal.SIGTERM)
    if on_gpu and local_rank >= (num_gpus := torch.cuda.device_count()):
        several = f"--nproc-per-node {os.environ.get('LOCAL_WORLD_SIZE', local_rank + 1)}"
        raise ValueError(f"{several}: GPUs here: {num_gpus}; start one process on each at most")
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    if under_torchrun and not dist.is_initialized():
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=TIMEOUT)
    return rank, world, device


def expand_segments(device: torch.device) -> None:
    """Let a GPU's allocator extend what it holds: micro-batches of ever new sizes else leave gaps
    that nothing fits in. What the user has told the allocator stands."""
    told = {"PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF"} & os.environ.keys()
    if device.type == "cuda" and not told:
        torch._C._accelerator_setAllocatorSettings("expandable_segments:True")


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    """Wait for all ranks."""
    if dist.is_initialized():
        dist.barrier()


def once(action: Callable[[], None]) -> None:
    """Let rank 0 act, while the others wait. What is wrong there is raised on all."""
    if not dist.is_initialized():
        action()
        return
    problem = None
    try:
        if dist.get_rank() == 0:
            action()
    except (ValueError, OSError) as error:
        problem = error
    if problem := gather(problem)[0]:
        raise problem


def total(values: list[float], device="cpu") -> list[float]:
    """Sums over all ranks, in float64."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def share(items: Sequence, rank: int) -> Sequence:
    """The items of one rank: neighbours, as evenly as they go."""
    world = world_size()
    return items[rank * len(items) // world : (rank + 1) * len(items) // world]


def gather(mine: Any, group=None) -> list[Any]:
    """Every rank's object, on every rank. group: one of all ranks, for another thread's calls."""
    if not dist.is_initialized():
        return [mine]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine, group)
    return everyones


def gather_items(mine: list) -> tuple[list, list[int]]:
    """(every rank's items, the rank that each comes from), on every rank."""
    shares = gather(mine)
    homes = [rank for rank, share in enumerate(shares) for _ in share]
    return [item for share in shares for item in share], homes


def check_shared(path: Path) -> None:
    """Raise ValueError unless all ranks read in `path` what rank 0 has written: each puts its part
    of a checkpoint beside it."""
    barrier()
    contents = gather(path.read_bytes() if path.is_file() else None)
    if len(set(contents)) > 1:
        raise ValueError(
            f"{path.parent}: not the same folder for all ranks; give an --out that all nodes share"
        )


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The compute dtype of a --dtype; None: bfloat16 on a GPU, float32 on a CPU."""
    return getattr(torch, name or ("bfloat16" if device.type == "cuda" else "float32"))


def device_mesh(device: torch.device):
    """The ranks among which a model is sharded: all, or on several nodes those of each node."""
    from torch.distributed.device_mesh import init_device_mesh  # slow to import

    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    shape, names = (world,), ("gpu",)
    if world > local > 1:
        shape, names = (world // local, local), ("node", "gpu")
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # a mesh makes its own groups with a shorter time-out
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
    return mesh


def shard(model: VLModel, dtype: torch.dtype, device: torch.device) -> VLModel:
    """Lay `model` out over the ranks; in a world of one it stays as it is.

    What is trained must be chosen before. Sharded are the decoder's layers, head and embedding, and
    the blocks of a vision tower that is trained. A frozen tower is whole on every rank, in the
    compute dtype: a rank may then encode a frame when it likes, without waiting for the others.
    """
    if world_size() == 1:
        return model
    from torch.distributed import fsdp  # slow to import

    policy = fsdp.MixedPrecisionPolicy(dtype, torch.float32, cast_forward_inputs=False)
    how = {"mesh": device_mesh(device), "mp_policy": policy}
    entrances, ignored = ["hidden"], set()
    if any(weight.requires_grad for weight in model.visual.parameters()):
        entrances.append("encode")
        for block in [*model.visual.blocks, model.visual]:
            fsdp.fully_shard(block, **how)
    else:
        ignored = set(model.visual.to(dtype).parameters())
    for layer in model.model.layers:
        fsdp.fully_shard(layer, **how)
    if not model.cfg.tie_word_embeddings:
        fsdp.fully_shard(model.lm_head, **how)  # the loss gathers it, no forward pass does

    # the embedding is a shard again after the forward pass: where it is the head too, the loss
    # gathers it as it gathers lm_head
    fsdp.fully_shard(model, **how, reshard_after_forward=True, ignored_params=ignored)
    for name in entrances:
        fsdp.register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, fsdp.FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already …
            module.set_force_sum_reduction_for_comms(True)  # … and gloo can only sum
    return model


def sharded(model: nn.Module) -> bool:
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def full(weight: torch.Tensor) -> torch.Tensor:
    """A weight in one piece, on every rank. All ranks must call it."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def local(weight: torch.Tensor) -> torch.Tensor:
    """This rank's part of a weight."""
    return weight.to_local() if hasattr(weight, "to_local") else weight


class TrainedWeights:
    """(published name, weight in one piece) of what is trained, one after the other. All ranks must
    go through all of them, each time that one does. merged: adapters are added to the language
    model's weights, of which then all come. dtype: what they come in, and travel in."""

    def __init__(self, model: VLModel, dtype: torch.dtype, merged: bool = False):
        self.published, self.dtype = model.cfg.published_name, dtype
        found = lora.adapters(model) if merged else {}
        self.beside = {f"{name}.weight": adapter for name, adapter in found.items()}
        self.chosen = [(n, w) for n, w in model.named_parameters() if w.requires_grad]
        if self.beside:
            named = model.named_parameters()
            others = ("visual.", ".lora.")
            self.chosen = [(n, w) for n, w in named if not any(o in n for o in others)]

    @property
    def announced(self) -> list[tuple[str, torch.dtype, tuple[int, ...]]]:
        """(published name, dtype, shape) of what will come."""
        return [(self.published(name), self.dtype, tuple(w.shape)) for name, w in self.chosen]

    def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
        for name, weight in self.chosen:
            weight, adapter = full(weight.to(self.dtype)), self.beside.get(name)
            if adapter:
                weight = lora.merged(weight, adapter.scale, full(adapter.A), full(adapter.B))
            yield self.published(name), weight
