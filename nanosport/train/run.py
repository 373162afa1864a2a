"""A run's folder: what was run (run.json), one JSON line a step (log.jsonl), the model (model/),
and checkpoints/ to go on from."""

import json
import shutil
import time
from dataclasses import asdict
from pathlib import Path

from nanosport.files import provenance, write_atomically


class Run:
    """Opens a folder, and refuses to write over another run unless it is told to."""

    def __init__(self, folder: Path, config, resume: bool, overwrite: bool, commit=None):
        """commit: the model's at the hub. Raises ValueError where there is a run already, or none
        to resume."""
        self.folder, self.model = Path(folder), Path(folder) / "model"
        self.began, self.commit = time.time(), commit
        checkpoints = self.folder / "checkpoints"
        if (self.model.exists() or checkpoints.exists()) and not (resume or overwrite):
            raise ValueError(
                f"{folder}: holds a run already; go on with --resume, replace it with --overwrite, "
                "or choose another --out"
            )
        if resume and not checkpoints.exists():
            raise ValueError(f"{folder}: no run to resume there")
        self.folder.mkdir(parents=True, exist_ok=True)
        self.config = {k: str(v) if isinstance(v, Path) else v for k, v in asdict(config).items()}
        self.log = self.folder / "log.jsonl"
        if not resume:
            # else --resume would go on with the run that is replaced; a link to another disk stays
            for old in checkpoints.glob("*step_*"):
                shutil.rmtree(old)
            if checkpoints.exists() and not checkpoints.is_symlink():
                shutil.rmtree(checkpoints)
            self.log.write_text("")
            self._describe()

    def _describe(self, **more) -> None:
        made = {**provenance(), "config": self.config, "model_commit": self.commit, **more}
        write_atomically(self.folder / "run.json", json.dumps(made, indent=2) + "\n")

    def rewind(self, step: int) -> None:
        """Drop the log's lines from `step` on: a resumed run writes them again."""
        self._describe()
        lines = self.log.read_text().splitlines()
        kept = [line + "\n" for line in lines if json.loads(line)["step"] < step]
        write_atomically(self.log, "".join(kept))

    def write(self, row: dict) -> None:
        """Add a step's line to the log; floats but the loss are rounded to six digits."""
        rounded = {
            name: float(f"{value:.6g}") if isinstance(value, float) and name != "loss" else value
            for name, value in row.items()
        }
        with open(self.log, "a") as file:
            file.write(json.dumps(rounded) + "\n")

    def close(self) -> None:
        """Write down how long the run took."""
        self._describe(seconds=round(time.time() - self.began, 1))
