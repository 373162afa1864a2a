"""New weights to a vLLM server from GPU to GPU, as vLLM's WeightTransferConfig has it.

Its classes do the work; here is how they are told. With no GPUs at hand it was tested up to the
communicator alone: what goes over the wire has not been measured.
"""

import socket
from collections.abc import Callable, Iterator
from urllib.parse import urlsplit

import torch

Post = Callable[[str, dict], dict]


class Client:
    """A server's routes, as vLLM's trainer side calls them."""

    def __init__(self, post: Post):
        self.post = post

    def init_weight_transfer_engine(self, init_info: dict) -> None:
        self.post("/init_weight_transfer_engine", {"init_info": init_info})

    def start_weight_update(self) -> None:
        self.post("/start_weight_update", {})

    def update_weights(self, update_info) -> None:
        self.post("/update_weights", {"update_info": update_info})

    def finish_weight_update(self, weight_version: str | None = None) -> None:
        self.post("/finish_weight_update", {})

    def shutdown_weight_transfer_engine(self) -> None:
        self.post("/shutdown_weight_transfer_engine", {})


def connect(
    url: str, post: Post, num_workers: int, announced: list[tuple[str, torch.dtype, tuple]]
):
    """vLLM's trainer engine for one server. Its `send_weights` sends what is left of its
    `source.weights`, an iterator. announced: (name, dtype, shape) of all that comes each time."""
    from vllm.distributed.weight_transfer.base import ParamMeta, WeightSource
    from vllm.distributed.weight_transfer.factory import WeightTransferTrainerFactory
    from vllm.distributed.weight_transfer.nccl_engine import NCCLTrainerInitInfo

    class Source(WeightSource):
        weights: Iterator[tuple[str, torch.Tensor]] = iter(())

        def metadata(self) -> list[ParamMeta]:
            return [ParamMeta(*about) for about in announced]

        def __iter__(self) -> Iterator[tuple[str, torch.Tensor]]:
            return self.weights

    at = urlsplit(url)
    with socket.create_connection((at.hostname, at.port), 10) as way, socket.socket() as free:
        address = way.getsockname()[0]  # ours, as the server sees it
        free.bind((address, 0))
        port = free.getsockname()[1]
    info = NCCLTrainerInitInfo(address, port, 1 + num_workers, rank=0)
    return WeightTransferTrainerFactory.trainer_init(info, client=Client(post), source=Source())
