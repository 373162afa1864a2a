"""What every script's command line shares: flags from a Config, their bounds, and errors as one
line.

A bound stands beside its flag, and a mark says what may differ when a run is resumed:

    steps: Annotated[int, AtLeast(1), MAY_GROW] = 40
"""

import json
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from contextlib import suppress
from inspect import get_annotations
from pathlib import Path
from typing import NamedTuple

MAY_CHANGE = "a resumed run may have another value of this flag"
MAY_GROW = "a resumed run may have a larger value of this flag"


class AtLeast(NamedTuple):
    """Marks a flag whose value must not be smaller."""

    bound: float


class Above(NamedTuple):
    """Marks a flag whose value must be larger."""

    bound: float


class Preempted(Exception):
    """Raised when a run has saved and ends because SIGTERM asked for it."""


def flag(name: str) -> str:
    """The flag of a config's field."""
    return "--" + name.replace("_", "-")


def marks(config_type: type) -> dict[str, tuple]:
    """The marks of each field of a config, by the field's name.

    A config that extends another may give a field a new default: the marks stand where it was born.
    """
    marks_by_name: dict[str, tuple] = {}
    for base in reversed(config_type.__mro__):
        for name, hint in get_annotations(base).items():
            marks_by_name.setdefault(name, getattr(hint, "__metadata__", ()))
    return marks_by_name


def check(config) -> None:
    """Raise ValueError where a value is outside the bound that is marked beside its flag.

    Each `main` calls it; in `__post_init__`, tyro would print it as a parse error.
    """
    for name, its_marks in marks(type(config)).items():
        value = getattr(config, name)
        for mark in its_marks if value is not None else ():
            if isinstance(mark, AtLeast) and not value >= mark.bound:
                raise ValueError(f"{flag(name)} {value}: must be at least {mark.bound}")
            if isinstance(mark, Above) and not value > mark.bound:
                raise ValueError(f"{flag(name)} {value}: must be above {mark.bound}")


def not_the_input(out: Path, data: Path, flag: str = "--out") -> None:
    """Raise ValueError where a command would write over the file that it reads."""
    if out.resolve() == data.resolve():
        raise ValueError(f"{flag} {out}: is the file that is read; choose another name")


def run(main: Callable, config_type: type, presets: Mapping[str, dict] | None = None) -> None:
    """Parse the flags and call `main`.

    A ValueError (a user's mistake, a bad file), an OSError or Ctrl-C ends the process with one line
    and exit code 1. presets: by name, fields of the config in place of its defaults; the name may
    come first on the command line.
    """
    import tyro  # not before it is needed: a benchmark's machine may have none

    args, about, default = sys.argv[1:], sys.modules["__main__"].__doc__, {}
    if presets:
        about += f"\nPresets, named before the flags: {', '.join(presets)}."
        name = args.pop(0) if args and args[0] in presets else next(iter(presets))
        default = {"default": config_type(**presets[name])}
    config = tyro.cli(config_type, description=about, args=args, **default)

    if torch := sys.modules.get("torch"):  # a command that computes has imported it
        torch.set_float32_matmul_precision("high")
    try:
        main(config)
    except ValueError as error:
        leave(f"error: {error}", 1)
    except OSError as error:  # a full disk, a missing folder, a file that may not be written
        named = f"{error.filename}: {error.strerror}" if error.filename else str(error)
        leave(f"error: {named}", 1)
    except Preempted as stop:
        leave(str(stop), 143)
    except KeyboardInterrupt:
        resumable = hasattr(config_type, "resume")
        leave("\nstopped" + ("; --resume goes on from what is saved" if resumable else ""), 130)
    except Exception:
        if num_processes() == 1:
            raise
        leave(traceback.format_exc(), 1)
    if num_processes() > 1:  # gloo's threads now and then abort a process that tears them down
        sys.stdout.flush()
        os._exit(0)
    leave_group()


def num_processes() -> int:
    """How many processes torchrun has started; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", 1))


def leave_group() -> None:
    """Leave torchrun's process group, where this process has joined it."""
    group = sys.modules.get("torch.distributed")
    if group and group.is_available() and group.is_initialized():
        group.destroy_process_group()


def tell_torchrun(line: str) -> None:
    """Leave `line` for torchrun, which ends its report with it: below its own tracebacks it is
    read."""
    path = os.environ.get("TORCHELASTIC_ERROR_FILE")
    if path and "\n" not in line:
        # the earliest is taken for the cause: not a rank that fails since this one is gone
        more = {"py_callstack": line, "timestamp": str(int(time.time()) - 1)}
        with suppress(OSError):
            Path(path).write_text(json.dumps({"message": {"message": line, "extraInfo": more}}))


def leave(message: str, code: int) -> None:
    """Print `message` and end this process.

    One of several processes ends at once: it must not wait for the others, which wait for it.
    torchrun then ends them too.
    """
    several = num_processes() > 1
    line = f"[rank {os.environ['RANK']}] {message}" if several else message
    print(line, file=sys.stderr, flush=True)
    if several:
        tell_torchrun(line)
        sys.stdout.flush()
        os._exit(code)
    leave_group()
    sys.exit(code)
