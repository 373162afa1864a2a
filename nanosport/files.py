"""Files that appear whole or not at all, and what a number needs beside it."""

import os
import shlex
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import torch

ASSETS = Path(__file__).parents[1] / "assets"
"""The models and shapes that come with the code."""


@contextmanager
def writing(path: Path):
    """A text file that takes its name, or the old file's place, when all of it is written; after an
    error it does not."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text, or leave the old file as it is."""
    with writing(path) as file:
        file.write(text)


def provenance() -> dict:
    """Command, commit, versions and hardware: what a number needs beside it."""
    root, module = Path(__file__).parent.parent, sys.modules["__main__"].__spec__
    script = ["-m", module.name] if module else [os.path.relpath(sys.argv[0], root)]
    git = ["git", "describe", "--always", "--dirty"]
    try:
        commit = subprocess.run(git, cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    on_gpu = torch.cuda.is_available()
    cpu = f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if on_gpu else cpu,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }
