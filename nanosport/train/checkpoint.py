"""Exact resume on any number of ranks, and beside it a folder that transformers loads.

    RUN/checkpoints/step_000100/    each rank's shard of weights and Adam moments (safetensors, laid
                                    out as torch.distributed.checkpoint reads it; nothing is
                                    unpickled), and trainer.json: the step to do next, the flags
                                    that must not change, and checksums
    RUN/model/                      config, tokenizer and whole weights of the same step, made of
                                    the shards; with --lora-rank the adapter, as peft has it

A checkpoint gets its name when all of it, and the model beside it, is on disk: a run that is killed
while it saves goes on from the one before. Batches, rollouts and learning rates are functions of
(seed, step): there is no other state to lose.
"""

import json
import re
import shutil
import sys
import threading
import warnings
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import NamedTuple

import torch
from safetensors import safe_open

from nanosport.cli import ending
from nanosport.files import ASSETS, checksum, write_atomically
from nanosport.model import lora, shards
from nanosport.model.decoder import VLModel
from nanosport.model.folder import first_line, load_model, save_model, sync
from nanosport.train import dist, optim

# one process alone is said to be unusual, from the thread that writes
warnings.filterwarnings("ignore", "torch.distributed is ")


def tensors(model: VLModel, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    """Every weight, but those that adapters stand beside, and the moments of what is trained, by
    name: zeros before the first update."""
    optim.start_moments(optimizer)
    by_name = {}
    for name, weight in saved_weights(model).values():
        by_name[f"model.{name}"] = weight.detach()
        for key, value in optimizer.state.get(weight, {}).items():
            by_name[f"adam.{name}.{key}"] = value
    return by_name


def saved_weights(model: VLModel) -> dict[str, tuple[str, torch.nn.Parameter]]:
    """{name in the model's folder: (name in the checkpoint, weight)}."""
    named = dict(model.named_parameters())
    return {saved: (name, named[name]) for saved, name in lora.saved_names(model).items()}


def step_of(checkpoint: Path) -> int:
    """The step to do next after a checkpoint, by its name."""
    return int(checkpoint.name.removeprefix("step_"))


def checkpoints_of(run: Path) -> list[Path]:
    """The checkpoints of a run's folder, the newest first."""
    named = [p for p in (run / "checkpoints").glob("step_*") if re.fullmatch(r"step_\d+", p.name)]
    return sorted(named, key=step_of, reverse=True)


def latest(run: Path) -> Path | None:
    """The newest checkpoint of a run's folder."""
    return next(iter(checkpoints_of(run)), None)


def reason(error: BaseException) -> str:
    """Why a save or a load failed, in one line. What torch met on a rank it wraps, and not in an
    Exception."""
    dcp = sys.modules.get("torch.distributed.checkpoint")  # slow to import
    while dcp is not None and isinstance(error, dcp.CheckpointException):
        error, _ = next(iter(error.failures.values()))
    return first_line(error)


class Part(NamedTuple):
    """What a rank saves of a tensor, and where in the whole it begins."""

    tensor: torch.Tensor
    offsets: list[int]


def parts_of(named: dict[str, torch.Tensor], rank: int) -> dict[str, Part]:
    """This rank's parts of tensors: its shard of those that are sharded, once where several nodes
    hold the same; rank 0 has the others."""
    parts = {}
    for name, tensor in named.items():
        if not hasattr(tensor, "device_mesh"):
            if rank == 0:
                parts[name] = Part(tensor, [0] * tensor.ndim)
            continue
        first = not any(
            place
            for place, kind in zip(tensor.device_mesh.get_coordinate(), tensor.placements)
            if kind.is_replicate()
        )
        if first and (shard := tensor.to_local()).numel():
            (chunk,) = tensor.__create_chunk_list__()
            parts[name] = Part(shard, list(chunk.offsets))
    return parts


class Checkpoints:
    """Saves in the background. `save` returns at once; the optimizer's next step waits until all
    that is written has been copied out of the model."""

    def __init__(self, run: Path, source: Path, rank: int, keep: int, **saved_as):
        """source: where config and tokenizer of the model's folder come from; keep: how many
        checkpoints stay; saved_as: what save_model is told of the folder."""
        self.run, self.source, self.rank, self.keep = run, source, rank, keep
        self.saved_as = saved_as
        self.folder = run.absolute() / "checkpoints"
        self.at: int | None = None
        """The step of this run's newest checkpoint, saved or resumed from."""
        self.writer, self.writing = ThreadPoolExecutor(1), None
        self.copied, self.guarded = threading.Event(), None
        self.group = None  # of its own: the thread that writes must not meet the loop's collectives
        if torch.distributed.is_initialized():
            self.group = torch.distributed.new_group(backend="gloo", timeout=dist.TIMEOUT)

    def save(self, model: VLModel, optimizer: torch.optim.Optimizer, state: dict) -> None:
        """Save weights, moments and `state` for the step that it names. All ranks must call this.

        Raises ValueError where the save before this one could not be written, or there is a
        checkpoint of this name that is not this run's; the older ones stay.
        """
        self.finish()
        named = self.folder / f"step_{state['step']:06d}"
        unfinished = named.with_name(f".{named.name}")
        if state["step"] == self.at:
            return
        self.at = state["step"]
        dist.once(lambda: self._make_folder(unfinished, named))
        parts = parts_of(tensors(model, optimizer), self.rank)
        if self.guarded is not optimizer:
            self.guarded = optimizer
            optimizer.register_step_pre_hook(self._wait_for_copies)
        self.copied.clear()
        ready = None
        if any(part.tensor.is_cuda for part in parts.values()):
            ready = torch.cuda.current_device(), torch.cuda.current_stream().record_event()
        args = (model, parts, ready, unfinished, named, state)
        self.writing = self.writer.submit(self._write, *args)

    def _wait_for_copies(self, *_) -> None:
        self.copied.wait()

    def _make_folder(self, unfinished: Path, named: Path) -> None:
        """Make room for a new checkpoint; what a killed run has left is removed."""
        if named.exists():
            raise ValueError(f"{named}: is there already, and not of this run; remove it")
        models = (left for name in ("model", "best") for left in self.run.glob(f".{name}.[0-9]*"))
        for left in (*self.folder.glob(".step_*"), *models):
            shutil.rmtree(left, ignore_errors=True)
        try:
            unfinished.mkdir(parents=True)
        except OSError as error:
            raise self._not_saved(error) from error

    def _write(
        self, model: VLModel, parts: dict, ready, unfinished: Path, named: Path, state: dict
    ) -> None:
        """Copy, write and name a checkpoint, in a thread of its own."""
        fault = None
        try:
            self._write_shard(parts, ready, unfinished)
        except Exception as error:  # the others must hear of it
            fault = reason(error)
        written = unfinished.glob(f"shard-{self.rank + 1:05d}-*")
        mine = {} if fault else {path.name: checksum(path) for path in written}
        everyones = dist.gather((fault, mine), self.group)
        if fault := next((other for other, _ in everyones if other), None):
            raise OSError(fault)
        if self.rank > 0:
            return
        crc32 = {name: value for _, part in everyones for name, value in part.items()}
        text = json.dumps({**state, "crc32": crc32}, indent=2) + "\n"
        write_atomically(unfinished / "trainer.json", text)
        for path in (*unfinished.iterdir(), unfinished):
            sync(path)

        # before the checkpoint has its name: a run that goes on from a named one may have no step
        # left to do that would write the model again
        self.write_model(model, unfinished, self.run / "model")
        unfinished.rename(named)
        sync(self.folder)
        for old in checkpoints_of(self.run)[self.keep :]:
            shutil.rmtree(old, ignore_errors=True)

    def _write_shard(self, parts: dict[str, Part], ready, unfinished: Path) -> None:
        """Copy this rank's parts to the host, and write them from there."""
        try:
            stream = None
            if ready:
                device, event = ready
                torch.cuda.set_device(device)  # a thread begins with GPU 0
                stream = torch.cuda.Stream()  # beside the loop's own kernels
                stream.wait_event(event)
            with torch.cuda.stream(stream):  # None: does nothing
                held = {name: part.tensor.to("cpu", copy=True) for name, part in parts.items()}
        finally:
            self.copied.set()
        if not held:
            return
        offsets = {name: {"saved_offsets": part.offsets} for name, part in parts.items()}
        shapes = {name: (tensor.shape, tensor.dtype) for name, tensor in held.items()}
        path = unfinished / f"shard-{self.rank + 1:05d}-of-{dist.world_size():05d}.safetensors"
        metadata = {"DCP_VERSION": "1.0", "DCP_SHARDING_INFO": json.dumps(offsets)}
        shards.write(path, shapes, held.pop, metadata)

    def write_model(self, model: VLModel, checkpoint: Path, folder: Path) -> None:
        """Write the folder of a checkpoint's model. `model` may be computing: its config is read,
        and the shapes of its weights. Raises ValueError where weights are not finite."""
        saved, whole = saved_weights(model), WholeTensors(checkpoint)
        shapes = {published: (w.shape, w.dtype) for published, (_, w) in saved.items()}

        def load(published: str) -> torch.Tensor:
            weight = whole(f"model.{saved[published][0]}")
            if not weight.isfinite().all():
                good = latest(self.run)
                before = f"the last good one is {good}" if good else "none was saved before"
                raise ValueError(f"weights are not finite; {before}")
            return weight

        save_model(model, folder, self.source, shapes=shapes, load=load, **self.saved_as)

    def finish(self) -> None:
        """Wait until all is on disk, on all ranks: rank 0 still writes the model when the shards of
        the others are there."""
        if self.writing is not None:
            # not result(): its error would hold the loop's frames, and with them the run's lock
            error, self.writing = self.writing.exception(), None
            if error is not None:
                raise self._not_saved(error) from error
        dist.barrier()

    def _not_saved(self, error: BaseException) -> ValueError:
        return ValueError(f"{self.folder}: the checkpoint could not be saved ({reason(error)})")


class WholeTensors:
    """The tensors of a checkpoint's shards, put together one by one."""

    def __init__(self, folder: Path):
        self.pieces: dict[str, list[tuple]] = {}
        for path in sorted(folder.glob("*.safetensors")):
            file = safe_open(path, framework="pt")
            places = json.loads(file.metadata()["DCP_SHARDING_INFO"])
            for name in file.keys():
                self.pieces.setdefault(name, []).append((file, places[name]["saved_offsets"]))

    def __call__(self, name: str) -> torch.Tensor:
        pieces = [(file.get_tensor(name), offsets) for file, offsets in self.pieces[name]]
        ends = [[b + n for b, n in zip(begin, x.shape)] for x, begin in pieces]
        whole = pieces[0][0].new_empty([max(sizes) for sizes in zip(*ends)])
        for piece, begin in pieces:
            whole[tuple(slice(b, b + n) for b, n in zip(begin, piece.shape))] = piece
        return whole


def newest(run: Path, rank: int = 0) -> tuple[Path, dict]:
    """(folder, state) of a run's newest whole checkpoint, and set damaged ones that are newer
    aside, with a line. All ranks must call this.

    Raises ValueError where there is none.
    """
    faults: dict[Path, str] = {}
    for folder in checkpoints_of(run):
        fault = next(filter(None, dist.gather(_fault(folder, rank))), None)
        if fault is None:
            dist.once(partial(_set_aside, faults, folder))
            return folder, _state(folder)
        faults[folder] = fault
    why = next(iter(faults.values()), "there is none")
    raise ValueError(f"{run}: no whole checkpoint to resume from: {why}; --overwrite begins anew")


def _fault(folder: Path, rank: int) -> str | None:
    """What is damaged of a checkpoint, as far as this rank looks: they share its files."""
    try:
        for name, wanted in dist.share([*_state(folder)["crc32"].items()], rank):
            if checksum(folder / name) != wanted:
                return f"{folder / name} is damaged (its checksum is another)"
    except (OSError, ValueError) as error:
        return f"{folder} is damaged ({error})"
    return None


def _state(folder: Path) -> dict:
    """What a checkpoint remembers beside weights and moments. Raises ValueError where trainer.json
    is not as it was written."""
    try:
        state = json.loads((folder / "trainer.json").read_text())
        state = {"began_with": {}, "crc32": {}, **state}  # an older one has neither
        kinds = {"settings": str, "began_with": int, "crc32": int}
        values = [(v, kind) for name, kind in kinds.items() for v in state[name].values()]
        values += [(v, int) for name, v in state.items() if name not in kinds]
        right = state["step"] == step_of(folder) and all(isinstance(v, kind) for v, kind in values)
    except (ValueError, TypeError, LookupError, AttributeError) as error:
        raise ValueError(f"trainer.json: {reason(error)}") from error
    if not right:
        raise ValueError("trainer.json: not as it was written")
    return state


def _set_aside(faults: dict[Path, str], taken: Path) -> None:
    for folder, fault in faults.items():
        aside = folder.with_name(f"damaged_{folder.name}")
        shutil.rmtree(aside, ignore_errors=True)
        folder.rename(aside)
        print(f"{fault}; it is set aside as {aside.name}, and the run goes on from {taken.name}")


def load(folder: Path, model: VLModel, optimizer: torch.optim.Optimizer) -> None:
    """Fill `model` and `optimizer` from a checkpoint, on however many ranks it was saved.

    Raises ValueError where it is damaged, or is another model's.
    """
    import torch.distributed.checkpoint as dcp  # slow to import

    alone = not torch.distributed.is_initialized()
    try:
        reader = dcp.HuggingFaceStorageReader(str(folder))
        dcp.load(tensors(model, optimizer), storage_reader=reader, no_dist=alone)
    except (Exception, dcp.CheckpointException) as error:  # torch names no type for such a file
        raise ValueError(
            f"{folder}: the checkpoint does not fit this model or is damaged ({reason(error)})"
        ) from error


def export(folder: Path, out: Path) -> None:
    """A model alone, in bfloat16, an adapter merged into its base, with how its run has made it
    (made.json): what assets/ holds."""
    save_model(load_model(folder), out, source=folder, dtype=torch.bfloat16)
    if (run := folder.parent / "run.json").is_file():
        # paths of our own folder as everybody has them
        made = run.read_text().replace(f"{ASSETS.parent}/", "")
        write_atomically(out / "made.json", made)


if __name__ == "__main__":  # python -m nanosport.train.checkpoint out/rl/model out/nano
    if len(sys.argv) != 3:
        sys.exit("usage: python -m nanosport.train.checkpoint RUN/model OUT")
    ending(lambda: export(Path(sys.argv[1]), Path(sys.argv[2])))
