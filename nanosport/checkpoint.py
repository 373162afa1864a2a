"""Exact resume: one folder that is a model folder as it stands (load it, ship it) and holds the trainer's state beside it.

    model.safetensors, config.json, tokenizer…    as load.py writes them
    optimizer.safetensors                          AdamW's moments under their parameters' names
    trainer.json                                   the step to do next, and the settings that must not change on the way
Batches, rollouts and learning rates are functions of (seed, step): there is no other state to lose.
"""

import json
import shutil
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from nanosport.load import check_replaceable, load_model, move_into_place, save_model, sync
from nanosport.log import write_atomically


def save(folder: Path, model, optimizer: torch.optim.Optimizer, source: Path, state: dict) -> None:
    """Replace `folder` in one step; raises ValueError where it cannot be written, and leaves the old one whole."""
    folder = Path(folder).absolute()
    check_replaceable(folder)
    unfinished = folder.with_name(f".{folder.name}.next")
    shutil.rmtree(unfinished, ignore_errors=True)
    try:
        save_model(model, unfinished, source)
        names = {p: n for n, p in model.named_parameters()}
        moments = {
            f"{names[p]}.{key}": value.detach().cpu().contiguous()
            for p, entry in optimizer.state.items()
            for key, value in entry.items()
        }
        save_file(moments, unfinished / "optimizer.safetensors")
        (unfinished / "trainer.json").write_text(json.dumps(state, indent=2) + "\n")
        for path in (unfinished / "optimizer.safetensors", unfinished / "trainer.json", unfinished):
            sync(path)
        move_into_place(unfinished, folder)
    except (OSError, SafetensorError) as error:
        raise ValueError(f"{folder}: the checkpoint could not be saved ({error})") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)


def load(folder: Path, model, optimizer: torch.optim.Optimizer, settings: dict) -> dict:
    """Fill `optimizer` and return the saved state (`step`: the one to do next); `model` already holds the folder's weights.

    Raises ValueError where the run was made with other `settings`, naming the first that differs.
    """
    try:
        state = json.loads((folder / "trainer.json").read_text())
        moments = load_file(folder / "optimizer.safetensors")
    except (OSError, ValueError, SafetensorError) as error:
        raise ValueError(f"{folder}: no checkpoint to resume from ({error})") from error
    for key, value in settings.items():
        if state["settings"].get(key) != value:
            flag = key.replace("_", "-")
            raise ValueError(f"--{flag} {value}: the run in {folder} has {state['settings'].get(key)}; resume with the same")
    for name, parameter in model.named_parameters():
        entry = {key: moments.pop(f"{name}.{key}") for key in ("step", "exp_avg", "exp_avg_sq") if f"{name}.{key}" in moments}
        if entry:
            step = entry.pop("step")
            optimizer.state[parameter] = {"step": step, **{k: v.to(parameter.device) for k, v in entry.items()}}
    if moments:
        raise ValueError(f"{folder}: the optimizer's state names weights the model has not: {next(iter(moments))}")
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
