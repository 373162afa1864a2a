"""What may go wrong in a long run: a stage that hangs, a cluster that wants its node back, a batch
whose gradient is non-finite."""

import faulthandler
import json
import math
import os
import signal
import sys
import threading
import time
import weakref
from collections.abc import Callable, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch

from nanosport.files import write_atomically
from nanosport.records import Episode

MAX_SKIPPED = 5
"""A run ends after so many skipped updates in a row."""


class Stages:
    """Names what this rank is doing, takes the time, and ends a process that is stuck in a stage.

    Collective calls wait for the slowest rank without a word. Each rank then says where it stands,
    and the one that stands elsewhere is the one to look at.
    """

    def __init__(self, rank: int, stuck_after_s: float):
        """stuck_after_s: what a stage may take; 0 switches the watchdog off."""
        self.rank, self.stuck_after_s = rank, stuck_after_s
        self.step, self.stage, self.began = 0, "set-up", time.monotonic()
        self.seconds: dict[str, float] = {}
        self.closed = threading.Event()
        if stuck_after_s:  # a run that an error has ended is no longer held: nothing is stuck then
            weakref.finalize(self, self.closed.set)
            watched = weakref.ref(self), self.closed, min(10.0, stuck_after_s / 4)
            threading.Thread(target=watch, args=watched, daemon=True).start()

    def new_step(self, step: int) -> None:
        self.step = step
        self._enter("between stages")

    @contextmanager
    def __call__(self, stage: str):
        self._enter(stage)
        yield
        if torch.cuda.is_available():  # else the work of this stage is billed to the next
            torch.cuda.synchronize()
        self.seconds[stage] = self.seconds.get(stage, 0.0) + time.monotonic() - self.began
        self._enter("between stages")

    def close(self) -> None:
        self.closed.set()

    def _enter(self, stage: str) -> None:
        self.stage, self.began = stage, time.monotonic()

    def end_if_stuck(self) -> None:
        """End the process where a stage takes too long."""
        spent = time.monotonic() - self.began
        if spent <= self.stuck_after_s:
            return
        print(
            f"error: rank {self.rank} is stuck in step {self.step}, {self.stage}, for "
            f"{spent:.0f} s (--stuck-after-s {self.stuck_after_s:g}); below is where. "
            "--resume goes on from the last checkpoint, if there is one",
            file=sys.stderr,
        )
        # the real stderr: a test's stand-in has no file behind it
        faulthandler.dump_traceback(file=sys.__stderr__)
        sys.stderr.flush()
        os._exit(1)  # a collective call that hangs, or C code, hears no exception


def watch(stages: Callable[[], Stages | None], closed: threading.Event, every_s: float) -> None:
    """Look at a run's stages until it is closed. stages: a weak reference."""
    while not closed.wait(every_s):
        if (run := stages()) is not None:
            run.end_if_stuck()
            del run  # to wait must not keep it


class Preemption:
    """SIGTERM, as a cluster sends it before it takes a node, becomes `asked`, for the loop to see;
    `service` is asked no more, so that nobody waits for it.

    torchrun passes it on, and kills what is still there 30 s later (--shutdown-timeout changes
    that, in torch 2.13).
    """

    def __init__(self):
        self.asked, self.service = False, None
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, self.hear)

    def hear(self, *_) -> None:
        self.asked = True
        if self.service:
            self.service.close(drop=True)


class Skips:
    """Decides whether an update may be made: not where loss or gradient is non-finite."""

    def __init__(self, folder: Path, rank: int):
        self.folder, self.rank, self.in_a_row = folder, rank, 0

    def bad(self, step: int, loss: float, grad_norm: float, batch: Sequence[Episode]) -> bool:
        """Whether to skip the update of `step`; all ranks decide alike, since both numbers are
        global. Raises ValueError after MAX_SKIPPED in a row."""
        if math.isfinite(loss) and math.isfinite(grad_norm):
            self.in_a_row = 0
            return False
        self.in_a_row += 1
        path = self.folder / f"bad_batch_{step}_rank_{self.rank}.json"
        write_atomically(path, json.dumps([dump(episode) for episode in batch]) + "\n")
        if self.in_a_row == MAX_SKIPPED:
            raise ValueError(
                f"step {step}: loss {loss}, gradient {grad_norm}, for the {MAX_SKIPPED}th update "
                f"in a row; nothing was learnt from them. The batch is in {path}. Lower --lr, then "
                "go on with --resume from the last checkpoint"
            )
        return True


def dump(episode: Episode) -> dict:
    """An episode for people who look for what broke a step."""
    question = episode.question
    return {
        "id": question.id,
        "video": str(question.clip),
        "frames": episode.frames,
        "turns": [turn.text for turn in episode.turns],
        "status": episode.status,
        "tokens": len(episode.ids),
        "trained_tokens": sum(episode.mask),
        "lowest_logprob": min(episode.sampled_logp, default=0.0),
    }
