"""What every script's command line shares: flags from a Config, and user errors as one line instead of a traceback."""

import os
import sys
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path

import torch
import tyro

from nanosport import dist
from nanosport.faults import Preempted


def run(main: Callable, config_type: type, presets: Mapping[str, dict] | None = None) -> None:
    """Parse the flags and run; a ValueError (a user's mistake, a bad file), an OSError or Ctrl-C ends with one line and exit code 1.

    presets: by name, fields of the config in the place of its defaults; the name may come first on the command line.
    """
    torch.set_float32_matmul_precision("high")
    args, defaults = sys.argv[1:], config_type
    about = sys.modules["__main__"].__doc__
    if presets:
        about += f"\nPresets, named before the flags: {', '.join(presets)}."
        name = args.pop(0) if args and args[0] in presets else next(iter(presets))
        defaults = config_type(**presets[name])
    try:
        main(
            tyro.cli(config_type, description=about, args=args, default=defaults)
            if presets
            else tyro.cli(config_type, description=about)
        )
    except ValueError as error:
        leave(f"error: {error}", 1)
    except OSError as error:  # a disk that is full, a folder that is none, a file that may not be written
        leave(f"error: {error.filename}: {error.strerror}" if error.filename else f"error: {error}", 1)
    except Preempted as stop:
        leave(str(stop), 143)
    except KeyboardInterrupt:
        leave("\nstopped; --resume goes on from what is saved" if hasattr(config_type, "resume") else "\nstopped", 130)
    except Exception:
        if dist.world_size() == 1:
            raise
        leave(traceback.format_exc(), 1)
    dist.stop()


def leave(message: str, code: int) -> None:
    """End this process now: one of several must not wait for the others, who wait for it, and torchrun then ends them too."""
    several = dist.world_size() > 1
    print(f"[rank {os.environ['RANK']}] {message}" if several else message, file=sys.stderr, flush=True)
    if several:
        sys.stdout.flush()
        os._exit(code)
    dist.stop()
    sys.exit(code)


def at_least(minimum: int, **flags: int) -> None:
    for name, value in flags.items():
        if value < minimum:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be at least {minimum}")


def not_the_input(out: Path, data: Path) -> None:
    if out.resolve() == data.resolve():
        raise ValueError(f"--out {out}: is the file that is read")


def above(bound: float, **flags: float) -> None:
    for name, value in flags.items():
        if not value > bound:
            raise ValueError(f"--{name.replace('_', '-')} {value}: must be above {bound}")
