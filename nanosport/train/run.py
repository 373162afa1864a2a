"""A run's folder: what was run (run.json), one JSON line a step (metrics.jsonl), the model
(model/), checkpoints/ to go on from, rollouts/ of RL for its page, and run.lock, which one run at a
time holds. With held-out questions also a line for each evaluation (heldout.jsonl), and the best
model (best/)."""

import fcntl
import json
import math
import os
import re
import shutil
import socket
import sys
import time
from dataclasses import asdict
from pathlib import Path

from nanosport.files import append, named, provenance, write_atomically
from nanosport.model.folder import aside, check_replaceable
from nanosport.train.checkpoint import latest


class Run:
    """A run's folder, held against other runs. Nothing in it is replaced before `begin`."""

    def __init__(self, folder: Path, config, resume: bool, overwrite: bool):
        """Raises ValueError where another run is at work, or what is there may not be replaced."""
        self.folder, self.model = Path(folder), Path(folder) / "model"
        self.log, self.json = self.folder / "metrics.jsonl", self.folder / "run.json"
        self.checkpoints, self.rollouts = self.folder / "checkpoints", self.folder / "rollouts"
        self.best, self.held_out = self.folder / "best", self.folder / "heldout.jsonl"
        config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self.about, self.opened = {**provenance(), "config": config}, time.time()

        self.folder.mkdir(parents=True, exist_ok=True)
        self._lock()
        self.resumed = resume and latest(self.folder) is not None
        self.seconds_before = self._seconds() if self.resumed else 0.0
        if not self.resumed:
            self._ask(resume, overwrite)
        check_replaceable(self.model)

    def _ask(self, resume: bool, overwrite: bool) -> None:
        """Raise ValueError unless a run may begin here."""
        whole, model = latest(self.folder), self.model.exists()
        # from `begin` to its first whole checkpoint a run has an unfinished one: what else is there
        # is then its own, or was to be replaced
        begun = not whole and any(self.checkpoints.glob(".step_*")) and (resume or not model)
        others = whole or model or self.log.exists() or self.json.exists()
        if others and not (begun or overwrite):
            what = "holds a run already; go on with --resume,"
            if resume:
                what = "no run to resume there, for it has no checkpoint;"
            fix = "replace it with --overwrite, or choose another --out"
            raise ValueError(f"{self.folder}: {what} {fix}")
        if resume:
            print(f"{self.folder}: nothing was saved there yet: the run begins anew")

    def _lock(self) -> None:
        """Hold the folder until this process ends, however it does."""
        self.lock = open(self.folder / "run.lock", "a+")
        try:
            fcntl.flock(self.lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            self.lock.seek(0)
            holder = f"another run is at work there ({self.lock.read().strip()})"
            advice = "wait until it has ended, or choose another --out"
            raise ValueError(f"{self.folder}: {holder}; {advice}") from None
        except OSError as error:
            why = f"its disk has no locks ({error.strerror})"
            print(f"{self.folder}: {why}: start no second run there", file=sys.stderr)
        self.lock.truncate(0)
        with named(self.lock.name):
            self.lock.write(f"process {os.getpid()} on {socket.gethostname()}\n")
            self.lock.flush()

    def begin(self, step: int) -> None:
        """Go on with the folder's run from `step`, which it writes again, or begin a new one: what
        another has left is then deleted. Raises ValueError where no checkpoint can be saved."""
        if not self.resumed:
            unfinished = self.checkpoints / ".step_000000"
            try:
                unfinished.mkdir(parents=True, exist_ok=True)
            except OSError as error:
                why = f"no checkpoint can be saved there ({error.strerror}); is its disk there?"
                raise ValueError(f"{self.checkpoints}: {why}") from error
            # else --resume would go on with the run that is replaced; a link to another disk stays
            for old in self.checkpoints.iterdir():
                if re.fullmatch(r"(\.|damaged_)?step_\d+", old.name) and old != unfinished:
                    shutil.rmtree(old)
            self.log.unlink(missing_ok=True)
            self.held_out.unlink(missing_ok=True)
            for best in (self.best, aside(self.best)):
                shutil.rmtree(best, ignore_errors=True)
        for old in self.rollouts.glob("step_*.jsonl"):
            if old.name >= self.rollouts_of(step).name:
                old.unlink()
        self.describe()
        self._mend_log(step)

    def _mend_log(self, step: int) -> None:
        """Keep the log's lines before `step`, as far as they are there and can be read."""
        text = self.log.read_text(errors="replace") if self.log.exists() else ""
        lines, unreadable = {}, 0
        for line in text.splitlines():
            try:
                lines[json.loads(line)["step"]] = line + "\n"
            except (ValueError, TypeError, LookupError):
                unreadable += 1
        kept = [lines[k] for k in range(step) if k in lines]
        if unreadable or len(kept) < step:
            lost = f"{unreadable} lines cannot be read, {step - len(kept)} of {step} steps are lost"
            print(f"{self.log}: mended: {lost}; the checkpoint is whole")
        write_atomically(self.log, "".join(kept))

    def rollouts_of(self, step: int) -> Path:
        """Where the episodes of a step are kept."""
        return self.rollouts / f"step_{step:06}.jsonl"

    def write(self, row: dict) -> None:
        """Add a step's line to the log: floats but the loss are rounded to six digits, and those
        that are not finite are null."""
        rounded = {}
        for name, value in row.items():
            if isinstance(value, float):
                value = value if name == "loss" else float(f"{value:.6g}")
                value = value if math.isfinite(value) else None
            rounded[name] = value
        append(self.log, json.dumps(rounded) + "\n")

    def describe(self) -> None:
        """Write down what is run, and for how long until now, with all that it was resumed from."""
        seconds = round(self.seconds_before + time.time() - self.opened, 1)
        text = json.dumps({**self.about, "seconds": seconds}, indent=2)
        write_atomically(self.json, text + "\n")

    def _seconds(self) -> float:
        """What run.json says of the parts before this one; 0 where it does not."""
        try:
            return float(json.loads(self.json.read_text())["seconds"])
        except (OSError, ValueError, TypeError, LookupError):
            return 0.0
