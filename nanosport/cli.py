"""What every script's command line shares: flags from a Config, checked against the bounds that
stand beside them, and errors as one line."""

import atexit
import errno
import io
import json
import os
import re
import select
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager, redirect_stdout, suppress
from pathlib import Path
from typing import TextIO

import nanosport
from nanosport.fields import NAMES, Bound, marks_of
from nanosport.files import commit, is_own_file, named, plain
from nanosport.records import check_whole
from nanosport.report import printable


class Preempted(Exception):
    """Raised when a run has saved and ends because SIGTERM asked for it."""


class Terminal:
    """Standard output as a command prints to it: text from outside cannot act on a terminal."""

    def __init__(self, stream):
        self.stream = stream
        stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str):
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        with named("/dev/stdout"):
            return self.stream.write(printable(text))

    def flush(self) -> None:
        with named("/dev/stdout"):
            self.stream.flush()


def flag(name: str) -> str:
    """The flag of a config's field."""
    return "--" + name.replace("_", "-")


def check(config) -> None:
    """Raise ValueError where a value is outside the bounds that are marked beside its flag, a
    number is not finite, or a text is none.

    `run` calls it for every command, and a `main` for whoever calls it in Python; in
    `__post_init__`, tyro would print it as a parse error.
    """
    for name, its_marks in marks_of(type(config)).items():
        values = getattr(config, name)
        for value in values if isinstance(values, tuple) else (values,):
            if isinstance(value, str) and NAMES not in its_marks:
                check_whole(value, flag(name))
            if not isinstance(value, int | float):
                continue
            if not abs(value) < 2**63:
                raise ValueError(f"{flag(name)} {value}: must be a finite number below 2^63")
            for mark in its_marks:
                if isinstance(mark, Bound) and not mark.holds(value, mark.bound):
                    rule = f"must be {mark.words} {mark.bound}"
                    raise ValueError(f"{flag(name)} {value}: {rule}")


def not_the_input(
    out: Path, *read: Path | str, flag: str = "--out", beside: Path | None = None
) -> None:
    """Raise ValueError where a command would write over a file that it reads, or over one in a
    folder that it reads. beside: what else it writes, so that `out` must be a plain file."""
    if beside and not is_own_file(out):
        rule = f"must be a plain file, for {beside.name} is written beside it"
        raise ValueError(f"{flag} {out}: {rule}")
    if beside:
        not_the_input(beside, *read, flag=flag)
    file = out.resolve()
    for path in map(Path, read) if file.exists() else ():
        if path.exists() and file.samefile(path):
            raise ValueError(f"{flag} {out}: is the file that is read; choose another name")
        if path.is_dir() and file.is_relative_to(path.resolve()):
            raise ValueError(f"{flag} {out}: is a file of {path}, which is read; choose another")


def run(main: Callable, config_type: type, presets: Mapping[str, dict] | None = None) -> None:
    """Parse the flags, check them, call `main`, and end this process as `ending` does.

    presets: by name, fields of the config in place of its defaults; the name may come first on the
    command line.
    """

    def command() -> None:
        import tyro  # not before it is needed: a benchmark's machine may have none

        args, about, default = sys.argv[1:], sys.modules["__main__"].__doc__ or "", {}
        if presets:
            about += f"\nPresets, named before the flags: {', '.join(presets)}."
            name = args.pop(0) if args and args[0] in presets else next(iter(presets))
            default = {"default": config_type(**presets[name])}
        script = Path((sys.orig_argv + [""])[1]).name
        prog = {"prog": script} if script.startswith("nanosport-") else {}  # as pip names it
        with tyro_prints(args, sys.stdout.stream):
            config = tyro.cli(config_type, description=about, args=args, **default, **prog)
        check(config)
        try:
            main(config)
        except KeyboardInterrupt:
            if getattr(config, "resumable", False):
                raise KeyboardInterrupt("--resume goes on from what is saved") from None
            raise

    ending(command)


@contextmanager
def tyro_prints(args: Sequence[str], stream: TextIO):
    """Let tyro print to the terminal: --help in colour; a completion script with the help of each
    flag on one line, for shells take a second one for another flag, and with file names where no
    flag is meant. Raises ValueError for a shell of which tyro knows none."""
    is_script = "--tyro-print-completion" in args
    printed = io.StringIO() if is_script else stream
    try:
        with redirect_stdout(printed):
            yield
    except ImportError:
        if not is_script:
            raise
        raise ValueError("--tyro-print-completion: bash, zsh or fish") from None
    finally:
        if is_script:
            flags = re.compile("^COMPLETION_SPEC = .*", re.MULTILINE)
            script = flags.sub(lambda line: line[0].replace(r"\n", " "), printed.getvalue())
            script = script.replace("complete -F ", "complete -o default -F ")
            is_file = '"$completions" == "__TYRO_COMPLETE_FILES__"'
            stream.write(script.replace(is_file, f'{is_file} || -z "$completions"'))


def ending(command: Callable[[], None]) -> None:
    """Call a command, and end this process after it.

    A ValueError (a user's mistake, a bad file), an OSError or Ctrl-C ends it with one line and exit
    code 1; a standard output that nobody reads, without a word.
    """
    for name in ("stdout", "stderr"):
        if getattr(sys, name) is None:  # closed by whoever has started this
            setattr(sys, name, open(os.devnull, "w"))
    sys.stdout = Terminal(sys.stdout)
    atexit.register(let_go)
    try:
        if signal.getsignal(signal.SIGINT) is nanosport.stop:
            signal.signal(signal.SIGINT, signal.default_int_handler)
        if sys.argv[1:] == ["--version"]:
            print(f"nanosport {nanosport.__version__}, commit {commit()}")
        else:
            command()
        sys.stdout.flush()
    except ValueError as error:
        leave(f"error: {error}", 1)
    except OSError as error:  # a full disk, a missing folder, a file that may not be written
        if isinstance(error, BrokenPipeError) and unread():
            leave("", 141)  # as a shell says it of a command that SIGPIPE has ended
        leave(f"error: {why(error)}", 1)
    except Preempted as stop:
        leave(str(stop), 143)
    except KeyboardInterrupt as stop:
        leave("\nstopped" + (f"; {stop}" if str(stop) else ""), 130)
    except Exception:
        if num_processes() == 1:
            raise
        leave(traceback.format_exc(), 1)
    if num_processes() > 1:  # gloo's threads now and then abort a process that tears them down
        let_go()
        os._exit(0)
    leave_group()


def why(error: OSError) -> str:
    """What the system could not do, and with which file."""
    if not error.filename:
        return str(error)
    path, full = Path(str(error.filename)), ""
    if error.errno == errno.ENOSPC and plain(path):
        free = shutil.disk_usage(path if path.exists() else path.parent).free
        full = f"; {free / 1e6:,.1f} MB are free there"
    return f"{path}: {error.strerror}{full}"


def unread() -> bool:
    """Whether standard output is a pipe that nobody reads any more."""
    poll = select.poll()
    poll.register(sys.stdout, 0)
    return bool(poll.poll(0))


def let_go() -> None:
    """Write out what was printed; what cannot be written goes, without another word."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


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
    """Print `message`, where there is one, and end this process.

    One of several processes ends at once: it must not wait for the others, which wait for it.
    torchrun then ends them too.
    """
    several = num_processes() > 1
    line = f"[rank {os.environ['RANK']}] {message}" if several else message
    if message:
        print(printable(line), file=sys.stderr, flush=True)
    if several:
        tell_torchrun(line)
        let_go()
        os._exit(code)
    leave_group()
    sys.exit(code)
