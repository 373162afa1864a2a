"""Which sampler plays, by its name: own, vllm, or the addresses of vLLM servers."""

from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlsplit

import torch
from torch import nn

from nanosport.engine.own import OwnSampler, banned_ids
from nanosport.engine.sampler import Sampler, Sampling
from nanosport.engine.servers import Servers, ServerSampler
from nanosport.engine.vllm import VllmSampler, start_engine
from nanosport.image import ImageConfig
from nanosport.model.decoder import VLModel
from nanosport.model.folder import load_model, load_tokenizer, settings_folder
from nanosport.model.frames import FrameEncoder


@dataclass(frozen=True)
class Room:
    """What vLLM makes room for; our own sampler needs not be told."""

    tokens: int
    """Of a whole conversation, the turn that is being said included."""
    rows: int
    """Conversations at a time."""


def server_urls(name: str) -> list[str]:
    """The addresses that --sampler names; none for own and vllm. Raises ValueError for what is
    neither."""
    if name in ("own", "vllm"):
        return []
    urls = [url.strip().rstrip("/") for url in name.split(",")]
    for url in urls:
        parts = urlsplit(url)
        try:
            whole = parts.scheme in ("http", "https") and parts.hostname and parts.port
        except ValueError:
            whole = False
        if not whole or parts.path or parts.query or "@" in url:
            rule = "must be own, vllm, or servers: http://HOST:PORT, several with commas"
            raise ValueError(f"--sampler {name}: {rule}")
    if len(set(urls)) < len(urls):
        raise ValueError(f"--sampler {name}: names a server twice")
    return urls


def make_sampler(
    name: str,
    folder: Path,
    model: VLModel,
    sampling: Sampling,
    room: Room,
    servers: Servers | None = None,
) -> Sampler:
    """The sampler of this name. model: what our own plays with; of others, the one they stand in
    for. Raises ValueError where it cannot play."""
    tokenizer, urls = load_tokenizer(folder), server_urls(name)
    if name == "own":
        return OwnSampler(model, tokenizer, sampling)
    about = tokenizer, model.cfg, banned_ids(model, tokenizer).to(model.head_weight_VD.device)
    if urls:
        return ServerSampler(urls, servers, room.tokens, *about, sampling)
    return VllmSampler(start_engine(folder, room.tokens, room.rows), *about, sampling)


def load_sampler(
    folder: Path,
    sampling: Sampling,
    max_pixels: int | None = None,
    name: str = "own",
    room: Room | None = None,
) -> tuple[FrameEncoder, Sampler]:
    """Load what plays episodes from a model folder: on a GPU, in bfloat16, if there is one.
    max_pixels: a frame's bound, where it is not the folder's. Raises ValueError where it cannot."""
    if name not in ("own", "vllm"):
        rule = "must be own or vllm here: servers play what rl.py trains"
        raise ValueError(f"--sampler {name}: {rule}")
    where = ("cuda", torch.bfloat16) if torch.cuda.is_available() else ("cpu", torch.float32)
    model = load_model(folder, *(where if name == "own" else ()))
    if name == "vllm":
        model.model.layers = nn.ModuleList()  # vLLM has them; this one sees
        model = model.to(*where)
    encoder = FrameEncoder(model, ImageConfig.from_folder(settings_folder(folder), max_pixels))
    return encoder, make_sampler(name, folder, model, sampling, room)
