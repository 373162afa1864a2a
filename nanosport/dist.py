"""torchrun, in the few calls the loops need, and the model laid out over its processes. One process without torchrun is a world of one.

FSDP2: each rank keeps its shard of the float32 weights, gradients and Adam moments. A layer's weights are gathered in the compute
dtype when it runs, its gradients summed in float32 behind it. Over several nodes the shards stay inside a node (HSDP).
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from nanosport.model import Qwen25VL

TIMEOUT = timedelta(hours=2)  # of a collective call; the watchdog (faults.py) ends what hangs, sooner


def start() -> tuple[int, int, torch.device]:
    """(rank, world size, device): joins torchrun's process group; one process on a GPU is a group of its own."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if not dist.is_initialized() and ("RANK" in os.environ or device.type == "cuda"):
        alone = {} if "RANK" in os.environ else {"store": dist.HashStore(), "rank": 0, "world_size": 1}
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=TIMEOUT, **alone)
    return rank, world, device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


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


def gather(mine: Any) -> list[Any]:
    """Every rank's object, on every rank."""
    if not dist.is_initialized():
        return [mine]
    everyones = [None] * dist.get_world_size()
    dist.all_gather_object(everyones, mine)
    return everyones


def check_shared(path: Path) -> None:
    """Raise ValueError unless all ranks read in `path` what rank 0 has written: each puts its part of a checkpoint beside it."""
    barrier()
    found = gather(path.read_bytes() if path.is_file() else None)
    if len(set(found)) > 1:
        raise ValueError(f"{path.parent}: not the same folder for all ranks; give --out on a file system that all nodes share")


def dtype_of(name: str | None, device: torch.device) -> torch.dtype:
    """The compute dtype asked for; None: bfloat16 on a GPU, float32 on a CPU."""
    dtype = getattr(torch, name) if name else torch.bfloat16 if device.type == "cuda" else torch.float32
    if dtype != torch.float32 and not dist.is_initialized():
        raise ValueError(f"--dtype {name}: a CPU computes in float32, unless torchrun --nproc-per-node 1 starts it")
    return dtype


def shard(model: Qwen25VL, dtype: torch.dtype, device: torch.device) -> Qwen25VL:
    """Lay `model` out over the ranks; without a process group it stays as it is. Choose what is trained before.

    Sharded are the decoder's layers, head and embedding, and the blocks of a vision tower that is trained. A frozen tower is whole on
    every rank, in the compute dtype: a rank may then encode a frame when it likes, without waiting for the others.
    """
    if not dist.is_initialized():
        return model
    from torch.distributed.device_mesh import init_device_mesh  # slow to import
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method

    world, local = dist.get_world_size(), int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    nodes = world // local
    shape, names = ((nodes, local), ("node", "gpu")) if nodes > 1 and local > 1 else ((world,), ("gpu",))
    mesh = init_device_mesh(device.type, shape, mesh_dim_names=names)
    for group in mesh.get_all_groups():  # a mesh makes its own with a shorter one
        dist.distributed_c10d._set_pg_timeout(TIMEOUT, group)
    how = {
        "mesh": mesh,
        "mp_policy": MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False),
    }
    tower_learns = any(p.requires_grad for p in model.visual.parameters())
    if tower_learns:
        for block in [*model.visual.blocks, model.visual]:
            fully_shard(block, **how)
    else:
        model.visual.to(dtype)
    for layer in model.model.layers:
        fully_shard(layer, **how)
    if not model.cfg.tie_word_embeddings:
        fully_shard(model.lm_head, **how)  # on its own: the loss gathers it, no forward pass does
    # the embedding is a shard again behind the forward pass: where it is the head too, the loss gathers it as it gathers lm_head
    ignored = set() if tower_learns else set(model.visual.parameters())
    fully_shard(model, **how, reshard_after_forward=True, ignored_params=ignored)
    for name in ("hidden", "encode") if tower_learns else ("hidden",):
        register_fsdp_forward_method(model, name)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already …
            module.set_force_sum_reduction_for_comms(True)  # … and gloo can only sum
    return model


def sharded(model: nn.Module) -> bool:
    return any(hasattr(weight, "full_tensor") for weight in model.parameters())


def full(weight: torch.Tensor) -> torch.Tensor:
    """A weight in one piece, on every rank. All ranks must call it."""
    weight = weight.detach()
    return weight.full_tensor() if hasattr(weight, "full_tensor") else weight


def copy_weights(model: nn.Module, into: nn.Module) -> None:
    """Write a sharded model's trained weights into a whole copy, weight by weight; nothing to do where they are one model."""
    if model is into:
        return
    theirs = dict(into.named_parameters())
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            theirs[name].data.copy_(full(weight))
