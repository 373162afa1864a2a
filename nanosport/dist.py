"""torchrun, in the few calls the loops need. One process without torchrun is a world of one."""

import os

import torch
import torch.distributed as dist


def start() -> tuple[int, int, torch.device]:
    """(rank, world size, device): joins torchrun's process group where there is one."""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0))) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    if "RANK" in os.environ and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return rank, world, device


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def barrier() -> None:
    if dist.is_initialized():
        dist.barrier()


def total(values: list[float], device="cpu") -> list[float]:
    """Sums over all ranks, in float64."""
    sums = torch.tensor(values, dtype=torch.float64, device=device)
    if dist.is_initialized():
        dist.all_reduce(sums)
    return sums.tolist()


def sum_gradients(model: torch.nn.Module) -> None:
    """Add up every rank's gradients; the losses are already divided by global counts."""
    if not dist.is_initialized():
        return
    trained = [p for p in model.parameters() if p.requires_grad]
    for p in trained:
        if p.grad is None:  # a rank without a frame still takes part
            p.grad = torch.zeros_like(p)
    flat = torch.cat([p.grad.flatten() for p in trained])
    dist.all_reduce(flat)
    for p, part in zip(trained, flat.split([p.numel() for p in trained])):
        p.grad.copy_(part.view_as(p))
