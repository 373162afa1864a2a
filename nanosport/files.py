"""Files that appear whole or not at all, and what a number needs beside it."""

import os
import shlex
import subprocess
import sys
import time
import zlib
from contextlib import contextmanager
from pathlib import Path

import torch

ASSETS = Path(__file__).parents[1] / "assets"
"""The models and shapes that come with the code."""


@contextmanager
def named(file: Path | str, partial: Path | None = None):
    """Name the file in an error of the system that names none, as that of a full disk, or its
    partial one."""
    try:
        yield
    except OSError as error:
        if error.filename not in (None, str(partial)):
            raise
        # a new one: FFmpeg's keeps the name that it has
        raise OSError(error.errno, error.strerror or str(error), str(file)) from error


def plain(path: Path) -> bool:
    """Whether a file is, or can be made, at this path: no folder, no device, no pipe is there."""
    return path.is_file() or not path.exists()


def is_own_file(path: Path) -> bool:
    """Whether other files may lie beside a plain file: not where it only is what a shell has
    redirected /dev/stdout or /proc/self/fd/1 to."""
    folder = path.parent.resolve()
    return plain(path) and folder != Path("/dev") and not folder.is_relative_to("/proc")


@contextmanager
def replacing(path: Path):
    """The path of a new file, which takes the place of what lies under a name when all of it is
    written; after an error it is removed.

    A link stays, and its file is replaced. What is no plain file, a device or a pipe, is written
    to.
    """
    if not plain(path):
        with named(path):
            yield path
        return
    path = path.resolve() if path.is_symlink() else path
    new = path.with_name(f".partial.{os.getpid()}.{path.name}")
    try:
        with named(path, new):
            yield new
            new.replace(path)
    finally:
        new.unlink(missing_ok=True)


@contextmanager
def writing(path: Path):
    """A text file that takes its name, or the old file's place, when all of it is written."""
    with replacing(path) as new, open(new, "w", encoding="utf-8") as file:
        yield file


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text, or leave the old file as it is."""
    with writing(path) as file:
        file.write(text)


def checksum(path: Path) -> int:
    """The CRC-32 of a file's bytes."""
    total, block = 0, memoryview(bytearray(1 << 22))
    with open(path, "rb", buffering=0) as file:
        while size := file.readinto(block):
            total = zlib.crc32(block[:size], total)
    return total


def append(path: Path, text: str) -> None:
    """Write a text behind what is in a file."""
    with named(path), open(path, "a", encoding="utf-8") as file:
        file.write(text)


def mend(path: Path) -> None:
    """Remove the last line of a file that grows line by line, where a kill has cut it short."""
    with open(path, "rb+") as file:
        file.truncate(sum(len(line) for line in file if line.endswith(b"\n")))


def commit() -> str:
    """The commit of this code, "unknown" where it lies in no repository of its own."""
    root, git = Path(__file__).parent.parent, ["git", "describe", "--always", "--dirty"]
    if not (root / ".git").exists():
        return "unknown"
    try:
        said = subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        said = ""
    return said or "unknown"


def provenance() -> dict:
    """Command, commit, versions and hardware: what a number needs beside it."""
    root, module = Path(__file__).parent.parent, sys.modules["__main__"].__spec__
    script = ["-m", module.name] if module else [os.path.relpath(sys.argv[0], root)]
    on_gpu = torch.cuda.is_available()
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": commit(),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
