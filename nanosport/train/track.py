"""A run's figures, and rollouts with their frames, for a tracker that people watch: TensorBoard,
Weights & Biases or trackio, where it is installed. `metrics.jsonl` is written always.

Nothing leaves the machine: wandb writes as offline, for `wandb sync`, trackio beside the run.
"""

import importlib
import os
from collections.abc import Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Literal

import numpy as np

from nanosport.records import Episode
from nanosport.strip import strip
from nanosport.video import Video, VideoError

Tracker = Literal["none", "tensorboard", "wandb", "trackio"]
SHOW_EVERY = 10
"""Rollouts are shown after so many steps."""
SHOWN = 2
"""So many of them."""


def check_installed(name: Tracker) -> None:
    """Raise ValueError where a tracker is not there."""
    if name != "none" and find_spec(name) is None:
        raise ValueError(f"--track {name}: is not installed: pip install {name}")


def open_tracker(name: Tracker, folder: Path, config: dict, step: int):
    """The tracker of a run that begins, or goes on, with `step`; None where there is to be none."""
    if name == "none":
        return None
    if name == "tensorboard":
        return TensorBoard(folder, step)
    return Logged(name, folder, config, step)


def numbers_of(row: dict, prefix: str = "") -> dict[str, float]:
    """The numbers of a row, by their names; what is no number, or not finite, stays out."""
    numbers = {k: float(v) for k, v in row.items() if isinstance(v, int | float)}
    return {f"{prefix}{k}": v for k, v in numbers.items() if np.isfinite(v)}


class TensorBoard:
    """Event files in `folder`/tensorboard."""

    def __init__(self, folder: Path, step: int):
        from torch.utils.tensorboard import SummaryWriter  # not before it is asked for

        # what a run that was cut has written after its last checkpoint is done again
        self.writer = SummaryWriter(folder / "tensorboard", purge_step=step)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        for name, value in numbers.items():
            self.writer.add_scalar(name, value, step)
        self.writer.flush()

    def show(self, step: int, name: str, frames_HWC: np.ndarray, text: str) -> None:
        self.writer.add_image(name, frames_HWC, step, dataformats="HWC")
        quoted = "\n".join(f"    {line}" for line in text.splitlines())  # Markdown's code
        self.writer.add_text(name, quoted, step)
        self.writer.flush()

    def close(self) -> None:
        self.writer.close()


class Logged:
    """Weights & Biases, and trackio, which has its interface."""

    def __init__(self, name: Tracker, folder: Path, config: dict, step: int):
        os.environ.setdefault("TRACKIO_DIR", str(folder.absolute() / "trackio"))  # read on import
        self.module = importlib.import_module(name)
        how = {} if name == "trackio" else {"mode": "offline", "dir": str(folder)}
        if name == "wandb" and step and (before := sorted(folder.glob("wandb/offline-run-*"))):
            how["id"] = before[-1].name.rpartition("-")[2]  # `wandb sync` makes one run of both
        config = {key: str(value) for key, value in config.items()}
        self.module.init(project="nanosport", name=folder.name, config=config, **how)

    def log(self, step: int, numbers: dict[str, float]) -> None:
        self.module.log(numbers, step=step)

    def show(self, step: int, name: str, frames_HWC: np.ndarray, text: str) -> None:
        self.module.log({name: self.module.Image(frames_HWC, caption=text)}, step=step)

    def close(self) -> None:
        self.module.finish()


def show_episodes(
    tracker, step: int, kind: str, episodes: Sequence[Episode], scores: Sequence[float]
) -> None:
    """Show the first of some episodes: what was said, and the frames that were seen."""
    for k, (episode, score) in enumerate(zip(episodes[:SHOWN], scores)):
        try:
            video = Video(episode.question.video, span_s=episode.question.span_s)
            frames_HWC = strip(episode, video)
        except VideoError:  # it has gone since, and training goes on without it
            continue
        tracker.show(step, f"{kind}/{k}", frames_HWC, transcript(episode, score))


def transcript(episode: Episode, score: float) -> str:
    """An episode in words."""
    question = episode.question
    lines = [f"{question.id}: {question.question}", *question.options]
    for turn in episode.turns:
        lines += [turn.text, *([f"refused: {turn.error}"] if turn.error else [])]
    return "\n".join([*lines, f"truth: {question.answer}", f"{episode.status}, {score:.3g}"])
