"""A local page, and beside it a server with OpenAI's interface: drop a video, ask, and watch where
the model looks.

    pip install -r requirements-serve.txt
    python -m nanosport.serve --model out/rl/model        # then open http://127.0.0.1:8000

Questions that come together are played together. docs/serving.md has the interface and the limits.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import secrets
import signal
import socket
from dataclasses import dataclass
from typing import Annotated

from nanosport.engine.players import load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.files import ASSETS
from nanosport.model.folder import resolve
from nanosport.serve.desk import Desk
from nanosport.serve.uploads import Uploads


@dataclass(frozen=True)
class Config:
    model: str = str(ASSETS / "nano-deepsport")
    """A model folder, or a Hugging Face hub id, of a revision if it ends in @REVISION."""
    host: str = "127.0.0.1"
    """The address it listens at; 0.0.0.0 is every network of this machine."""
    port: Annotated[int, AtLeast(1), AtMost(65_535)] = 8000
    token: str | None = None
    """What each request must bring. None: none on 127.0.0.1; elsewhere one is made, and printed."""
    rows: Annotated[int, AtLeast(1)] = 64
    """Questions that are played together."""
    max_waiting: Annotated[int, AtLeast(1)] = 256
    """Questions that may wait; further ones are refused."""
    timeout_s: Annotated[float, Above(0)] = 300.0
    """A question is given up after so long, its wait included."""
    max_upload_mb: Annotated[float, Above(0)] = 2000.0
    """Of one video."""
    max_videos: Annotated[int, AtLeast(1)] = 16
    """Videos that are here at a time."""
    keep_s: Annotated[float, Above(0)] = 900.0
    """A video that nobody asks about any more is removed after so long."""
    pause_s: Annotated[float, Above(0)] = 30.0
    """A sender that is silent for so long is cut off."""
    temperature: Annotated[float, AtLeast(0)] = 0.0
    """0 takes the most likely token."""
    max_turns: Annotated[int, AtLeast(1)] = 5
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    """One turn is cut after so many tokens."""
    max_pixels: Annotated[int | None, AtLeast(1)] = None
    """Larger frames are scaled down to this. None: as the model's preprocessor_config.json says."""
    episode_tokens: Annotated[int, AtLeast(1)] = 16_384
    """A whole episode, frames included, is ended when it reaches so many tokens."""
    call_syntax: Syntax = TOOL_NAME
    """How the model was taught to call the tool."""


def main(cfg: Config) -> None:
    cli.check(cfg)
    try:
        import uvicorn

        from nanosport.serve.app import LOCAL, Server, application
    except ImportError as error:
        fix = "pip install -r requirements-serve.txt"
        raise ValueError(f"the server needs {error.name}: {fix}") from None
    token = cfg.token or ""
    if cfg.host not in LOCAL and not token:
        token = secrets.token_urlsafe(16)
        print(f"token   {token}")
    family = socket.AF_INET6 if ":" in cfg.host else socket.AF_INET
    try:
        listening = socket.create_server((cfg.host, cfg.port), family=family)
    except OSError as error:
        why = (error.strerror or str(error)).partition(" (")[0]
        raise ValueError(f"--host {cfg.host} --port {cfg.port}: {why}") from None
    sampling = Sampling(cfg.temperature, 1.0, cfg.max_new_tokens, STOPS)
    encoder, sampler = load_sampler(resolve(cfg.model), sampling, cfg.max_pixels)
    limits = Limits(max_turns=cfg.max_turns, max_tokens=cfg.episode_tokens, syntax=cfg.call_syntax)
    desk = Desk(encoder, sampler, limits, cfg.rows, cfg.max_waiting)
    uploads = Uploads(cfg.max_videos, cfg.max_upload_mb, cfg.keep_s, cfg.pause_s)
    app = application(Server(desk, uploads, cfg.model, token, cfg.timeout_s))
    print(f"http://{cfg.host}:{cfg.port}   Ctrl-C ends it", flush=True)
    if signal.getsignal(signal.SIGHUP) == signal.SIG_DFL:  # a terminal that closes; not nohup's
        signal.signal(signal.SIGHUP, lambda *_: signal.raise_signal(signal.SIGTERM))
    how = {"log_level": "warning", "timeout_graceful_shutdown": 3, "timeout_keep_alive": 10}
    uvicorn.Server(uvicorn.Config(app, **how)).run(sockets=[listening])


if __name__ == "__main__":
    cli.run(main, Config)
