"""A vLLM server that samples for rl.py, on another GPU or node.

    python -m nanosport.engine.serve out/sft/model --port 8001
    python rl.py --sampler http://127.0.0.1:8001

It is vLLM's own server, told what `engine_flags` says, with its routes for new weights. Whoever can
reach it can change its weights and have it read files: bind it to a network of your own.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import json
import os
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import torch
import tyro
from safetensors import safe_open

from nanosport.engine.vllm import engine_flags, import_vllm, renew_packed_head
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.model.folder import resolve


@dataclass(frozen=True)
class Config:
    model: Annotated[str, tyro.conf.Positional]
    """A model folder, or a Hugging Face hub id: the one that RL begins with."""
    host: str = "127.0.0.1"
    """The address it listens at."""
    port: Annotated[int, AtLeast(1), AtMost(65_535)] = 8001
    max_tokens: Annotated[int, AtLeast(1)] = 18_432
    """Of a whole conversation: at least rl.py's --episode-tokens and --max-new-tokens together."""
    rows: Annotated[int, AtLeast(1)] = 256
    """Conversations at a time."""
    gpus: Annotated[int, AtLeast(1)] = 1
    """The model is split over so many GPUs."""
    gpu_memory: Annotated[float, Above(0), AtMost(1)] = 0.9
    """The share of a GPU's memory that it takes."""
    weights_over: Literal["files", "nccl"] = "files"
    """As rl.py's."""


class Updates:
    """What vLLM's worker learns beside its own: to take weights from files."""

    def take_files(self, folder: str) -> None:
        """Take all weights in a folder's safetensors files."""
        self.reload_weights(weights_iterator=read_files(Path(folder)))
        renew_packed_head(self.get_model())


def read_files(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, weight) of all safetensors files of a folder. Raises FileNotFoundError where there is
    none."""
    paths = sorted(folder.glob("*.safetensors"))
    if not paths:
        raise FileNotFoundError(f"{folder}: no weights there: is the disk shared with the trainer?")
    for path in paths:
        with safe_open(path, framework="pt") as file:
            for name in file.keys():
                yield name, file.get_tensor(name)


def arguments(cfg: Config) -> list[str]:
    """What the server's command line says."""
    flags = engine_flags(resolve(cfg.model), cfg.max_tokens, cfg.rows)
    flags |= {"host": cfg.host, "port": cfg.port}
    flags |= {"worker_extension_cls": f"{Updates.__module__}.{Updates.__qualname__}"}
    flags |= {"enable_scale_out": True}  # the route of ids in, ids out
    if torch.cuda.is_available():
        flags |= {"tensor_parallel_size": cfg.gpus, "gpu_memory_utilization": cfg.gpu_memory}
    if cfg.weights_over == "nccl":
        flags |= {"weight_transfer_config": {"backend": "nccl"}}
    words = []
    for name, value in flags.items():
        flag = cli.flag(name)
        if isinstance(value, bool):
            words.append(flag if value else flag.replace("--", "--no-", 1))
        else:
            words += [flag, json.dumps(value) if isinstance(value, dict) else str(value)]
    return words


def main(cfg: Config) -> None:
    os.environ["VLLM_SERVER_DEV_MODE"] = "1"  # its routes for new weights
    os.environ.setdefault("VLLM_LOGGING_LEVEL", "WARNING")
    import_vllm()
    from vllm.entrypoints.launchers.api_server.entry import main as serve

    sys.argv[1:] = arguments(cfg)
    serve()


if __name__ == "__main__":
    cli.run(main, Config)
