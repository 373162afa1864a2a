"""Run under torchrun: a head sharded by FSDP2, each rank with rows of its own, gives the loss and
gradients of one process."""

import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from kernels.policy_loss import (
    Objective,
    TokenInputs,
    fused_linear_policy_loss,
    linear_logprobs,
)

VOCAB, WIDTH, ROWS = 101, 24, 30  # the vocabulary does not divide by the ranks


def loss_of(hidden_MD, weight_VD, rows: slice, x) -> torch.Tensor:
    names = ("targets", "advantages", "scale", "old", "ref")
    tokens = TokenInputs(*(x[name][rows] for name in names))
    return fused_linear_policy_loss(hidden_MD[rows], weight_VD, tokens, Objective(beta=0.1))[0]


def main() -> None:
    dist.init_process_group("gloo")
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    embedding = torch.nn.Embedding(
        VOCAB, WIDTH
    )  # tied: the rows go in through it and come out through its weight
    ids = torch.randint(VOCAB, (ROWS,))
    x = {
        "targets": torch.randint(VOCAB, (ROWS,)),
        "advantages": torch.randn(ROWS),
        "scale": torch.full((ROWS,), 1 / ROWS),
    }
    logp, _ = linear_logprobs(embedding(ids).detach(), embedding.weight.detach(), x["targets"])
    x |= {"old": logp + 0.3 * torch.randn(ROWS), "ref": logp + 0.3 * torch.randn(ROWS)}

    whole = torch.nn.Embedding(VOCAB, WIDTH)
    whole.load_state_dict(embedding.state_dict())
    want = loss_of(whole(ids), whole.weight, slice(None), x)
    want.backward()

    fully_shard(embedding, mesh=init_device_mesh("cpu", (world,)), reshard_after_forward=True)
    embedding.set_gradient_divide_factor(1.0)  # the loss is divided by global counts already …
    embedding.set_force_sum_reduction_for_comms(True)  # … and gloo can only sum
    mine = slice(rank * ROWS // world, (rank + 1) * ROWS // world)
    hidden_MD = embedding(ids)
    assert isinstance(embedding.weight, DTensor), "the head is a shard when the loss comes to it"
    loss = loss_of(hidden_MD, embedding.weight, mine, x)
    loss.backward()
    total = loss.detach().clone()
    dist.all_reduce(total)
    torch.testing.assert_close(total, want.detach())
    torch.testing.assert_close(
        embedding.weight.grad.full_tensor(), whole.weight.grad, rtol=1e-5, atol=1e-7
    )
    if rank == 0:
        print("equal", flush=True)
    dist.barrier()
    os._exit(
        0
    )  # about one ordinary exit in six aborted in gloo's threads ("terminate called"), after all was compared


if __name__ == "__main__":
    main()
