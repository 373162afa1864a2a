"""Exact resume on any number of ranks, and beside it a folder that transformers loads.

    RUN/checkpoints/step_000100/    each rank's shard of weights and Adam moments (torch.distributed.checkpoint in safetensors, so
                                    that nothing is unpickled), and trainer.json: the step to do next, and what must not change
    RUN/model/                      config, tokenizer and whole weights of the same step, as load.py writes them

A checkpoint gets its name when all of it, and the model beside it, is on disk: a run that is killed while it saves goes on from the
one before. Batches, rollouts and learning rates are functions of (seed, step): there is no other state to lose.
"""

import json
import re
import shutil
import sys
import threading
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
import torch.distributed.checkpoint as dcp

from nanosport import dist, optim
from nanosport.load import load_model, save_model, sync
from nanosport.log import write_atomically
from nanosport.model import Qwen25VL

warnings.filterwarnings("ignore", "torch.distributed is ")  # one process alone is said to be unusual, from the thread that writes


def tensors(model: Qwen25VL, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every weight, and the moments of those that are trained, by name: zeros before the first update."""
    optim.start_moments(optimizer)
    found = {}
    for name, weight in model.named_parameters():
        found[f"model.{name}"] = weight.detach()
        found |= {f"adam.{name}.{key}": value for key, value in optimizer.state.get(weight, {}).items()}
    return found


def latest(run: Path) -> Path | None:
    """The newest whole checkpoint of a run folder."""
    found = [
        p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name) and (p / "trainer.json").is_file()
    ]
    return max(found, key=lambda p: int(p.name[5:]), default=None)


def reason(error: BaseException) -> str:
    """Of a failed save or load, in one line. What torch met on any rank it wraps, and not in an Exception."""
    while isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return f"{type(error).__name__}: {error}".splitlines()[0]


class Checkpoints:
    """Saves in the background: `save` returns when everything to be written is copied out of the model."""

    def __init__(self, run: Path, source: Path, rank: int, dtype: torch.dtype, keep: int, max_pixels: int | None = None):
        """source: where config and tokenizer of the model folder come from; dtype: of its weights; keep: checkpoints."""
        self.run, self.source, self.rank, self.dtype, self.keep, self.max_pixels = run, source, rank, dtype, keep, max_pixels
        self.folder = run.absolute() / "checkpoints"
        self.writing: threading.Thread | None = None
        self.failed: BaseException | None = None
        self.group = None  # of its own: the thread that writes must not meet the loop's collectives
        if torch.distributed.is_initialized():
            self.group = torch.distributed.new_group(backend="gloo", timeout=dist.TIMEOUT)

    def save(self, model: Qwen25VL, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Called by all ranks. Raises ValueError where the save before this one could not be written; the older ones stay."""
        self.finish()
        whole, unfinished = self.folder / f"step_{state['step']:06d}", self.folder / f".step_{state['step']:06d}"
        if whole.exists():  # of the same seed and step, and so the same
            return
        if self.rank == 0:
            for left in (*self.folder.glob(".step_*"), *self.run.glob(".model.*")):  # by a run that was killed
                shutil.rmtree(left, ignore_errors=True)
            try:
                unfinished.mkdir(parents=True)
            except OSError as error:
                raise ValueError(f"{unfinished}: the checkpoint could not be saved ({error})") from error
        dist.barrier()
        weights = {}
        for name, weight in model.named_parameters():
            weight = dist.full(weight)  # of all ranks, one weight at a time
            if self.rank == 0:
                weights[name] = weight.to("cpu", self.dtype, copy=True)
        writer = dcp.HuggingFaceStorageWriter(str(unfinished), save_distributed=True)
        writer.per_thread_copy_ahead = 0  # all is in the CPU's memory by then: the thread that writes needs no stream on GPU 0
        saved = dcp.async_save(
            tensors(model, optimizer),
            storage_writer=writer,
            process_group=self.group,
            no_dist=self.group is None,
        )
        self.writing = threading.Thread(target=self._write, args=(saved.result, unfinished, whole, model, weights, state))
        self.writing.start()

    def _write(self, saved: Callable, unfinished: Path, whole: Path, model: Qwen25VL, weights: dict, state: dict) -> None:
        try:
            saved()  # on rank 0 this means: every rank's shards are written
            if self.rank == 0:
                write_atomically(unfinished / "trainer.json", json.dumps(state, indent=2) + "\n")
                for path in (*unfinished.iterdir(), unfinished):
                    sync(path)
                # before the name: what goes on from a named checkpoint may have no step left to do that would write the model again
                save_model(model, self.run / "model", self.source, dtype=self.dtype, state=weights, max_pixels=self.max_pixels)
                shutil.rmtree(whole, ignore_errors=True)
                unfinished.rename(whole)
                sync(self.folder)
                for old in sorted(self.folder.glob("step_*"), key=lambda p: int(p.name[5:]))[: -self.keep]:
                    shutil.rmtree(old, ignore_errors=True)
        except (Exception, dcp.CheckpointException) as error:  # raised where somebody waits for it
            self.failed = error

    def finish(self) -> None:
        """Wait until all is on disk, on all ranks: rank 0 still writes the model when the shards of the others are there."""
        if self.writing is not None:
            self.writing.join()
            self.writing = None
        if self.failed is not None:
            error, self.failed = self.failed, None
            raise ValueError(f"{self.folder}: the checkpoint could not be saved ({reason(error)})") from error
        dist.barrier()


def load(run: Path, model: Qwen25VL, optimizer: torch.optim.Optimizer, settings: dict) -> dict:
    """Fill `model` and `optimizer` from a run's newest checkpoint, on whatever ranks; returns its state (`step`: the one to do next).

    Raises ValueError where there is none, and where the run was made with other `settings`, naming the first that differs.
    """
    folder = latest(run)
    if folder is None:
        raise ValueError(f"{run}: no checkpoint to resume from")
    try:
        state = json.loads((folder / "trainer.json").read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{folder}: no checkpoint to resume from ({error})") from error
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} {value}: the run in {run} has {state['settings'].get(key)}; resume with the same")
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors(model, optimizer), storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    except (Exception, dcp.CheckpointException) as error:  # torch names no type for a file that is damaged or of another model
        raise ValueError(f"{folder}: the checkpoint does not fit this model or is damaged ({reason(error)})") from error
    return state


def export(folder: Path, out: Path) -> None:
    """A run's model alone, in bfloat16, with how it was made (made.json): what assets/ holds."""
    save_model(load_model(folder), out, source=folder, dtype=torch.bfloat16)
    write_atomically(out / "made.json", (folder.parent / "run.json").read_text())


if __name__ == "__main__":  # python -m nanosport.checkpoint out/rl/model out/nano
    try:
        export(Path(sys.argv[1]), Path(sys.argv[2]))
    except (ValueError, OSError, IndexError) as error:
        sys.exit(f"error: {error}; usage: python -m nanosport.checkpoint RUN/model OUT")
