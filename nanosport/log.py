"""A run's folder: what was run (run.json), one JSON line a step (log.jsonl), the model (model/), checkpoints/ to go on from."""

import json
import os
import shlex
import shutil
import subprocess
import sys
import time
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

import torch


def write_atomically(path: Path, text: str) -> None:
    """The whole text or the old file, never half of it."""
    partial = path.with_name(path.name + ".partial")
    partial.write_text(text)
    partial.replace(path)


def provenance() -> dict:
    """Command, commit, versions and hardware: what a number needs beside it."""
    root, module = Path(__file__).parent.parent, sys.modules["__main__"].__spec__  # a module where python -m ran one
    script = ["-m", module.name] if module else [os.path.relpath(sys.argv[0], root)]
    try:
        commit = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=root, capture_output=True, text=True).stdout.strip()
    except OSError:
        commit = ""
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else f"CPU, {torch.get_num_threads()} threads"
    return {
        "command": shlex.join(["python", *script, *sys.argv[1:]]),
        "commit": commit or "unknown",
        "torch": torch.__version__,
        "device": device,
        "date": time.strftime("%Y-%m-%d", time.gmtime()),
    }


class Run:
    """Opens `folder`; refuses to write over another run unless told to."""

    def __init__(self, folder: Path, config, resume: bool, overwrite: bool):
        self.folder, self.model = Path(folder), Path(folder) / "model"
        self.began = time.time()
        checkpoints = self.folder / "checkpoints"
        if (self.model.exists() or checkpoints.exists()) and not (resume or overwrite):
            raise ValueError(
                f"{folder}: holds a run already; go on with --resume, replace it with --overwrite, or choose another --out"
            )
        if resume and not checkpoints.exists():
            raise ValueError(f"{folder}: no run to resume there")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self.log = self.folder / "log.jsonl"
        if not resume:
            self.log.write_text("")
            shutil.rmtree(checkpoints, ignore_errors=True)  # else --resume would go on with the run replaced here
            self._describe()

    def _describe(self, **more) -> None:
        text = json.dumps({**provenance(), "config": self.config, **more}, indent=2)
        write_atomically(self.folder / "run.json", text + "\n")

    def rewind(self, step: int) -> None:
        """A resume was accepted: drop the log's lines from `step` on, they are about to be written again."""
        self._describe()
        rows = [line for line in self.log.read_text().splitlines() if json.loads(line)["step"] < step]
        write_atomically(self.log, "".join(row + "\n" for row in rows))

    def write(self, row: dict) -> None:
        with open(self.log, "a") as file:
            file.write(
                json.dumps({k: float(f"{v:.6g}") if isinstance(v, float) and k != "loss" else v for k, v in row.items()}) + "\n"
            )

    def close(self) -> None:
        self._describe(seconds=round(time.time() - self.began, 1))


@contextmanager
def writing(path: Path):
    """A text file that appears under its name, or takes the old one's place, when all of it is written: not after an error."""
    partial = path.with_name(path.name + ".partial")
    try:
        with open(partial, "w", encoding="utf-8") as file:
            yield file
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
