"""nanosport: DeepSport (arXiv 2511.12908) in plain PyTorch, from video to gated tool-use RL."""

import os
import signal
import sys
from pathlib import Path

__version__ = "0.1.0"
SCRIPTS = [Path(__file__).parents[1] / f"{name}.py" for name in ("train", "rl", "eval", "infer")]


def stop(*_) -> None:
    """End a command that Ctrl-C reaches while it imports: what is half imported cannot say more."""
    os.write(2, b"\nstopped\n")
    os._exit(130)


def starts_us() -> bool:
    """Whether Python is starting one of our commands, which imports this package first."""
    if sys.argv[:1] == ["-m"]:
        after = [name for m, name in zip(sys.orig_argv, sys.orig_argv[1:]) if m == "-m"]
        return bool(after) and after[0].partition(".")[0] in ("nanosport", "data_prep")
    script = Path(sys.argv[0] if sys.argv else "")
    return script.name.startswith("nanosport-") or script.resolve() in SCRIPTS


if starts_us() and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, stop)  # until cli.ending listens
