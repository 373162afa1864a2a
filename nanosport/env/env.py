"""The rules of an episode, without tokens and without a model.

    env = Env(question, video, Limits())
    while env.status is None:
        turn = env.step(text)        # a policy's text, a teacher's, or one from a file

Rollouts, replayed trajectories, a teacher behind an endpoint and the pages all step through this
class.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from nanosport.env import tools
from nanosport.records import Episode, Question, Turn
from nanosport.video import Video


@dataclass(frozen=True)
class Limits:
    """What an episode is given; the defaults are the paper's, or its nearest ancestor's where the
    paper is silent."""

    num_frames: int = 8
    """The overview has this many frames."""
    frames_per_call: int = 8
    """A tool call returns this many frames."""
    max_turns: int = 5
    max_tokens: int = 16_384
    """A whole episode may have this many tokens, frames included."""
    use_tool: bool = True
    """False: the tool is not offered, so the answer comes from the overview alone."""
    syntax: tools.Syntax = tools.TOOL_NAME
    """How a call is written."""
    min_window: int = tools.MIN_WINDOW
    """A window must have so many frames."""
    near: int = 0
    """A window off by so many frames from one that was shown repeats it; -1: none does."""
    frames_drawn: tuple[int, ...] = ()
    """The overview's number of frames is drawn from these for each question (as in ParaVT), with
    `num_frames` the most; where there are none it is `num_frames`."""

    def __post_init__(self):
        for name in ("num_frames", "frames_per_call", "max_turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")

    def drawn(self, stream: Sequence[int]) -> "Limits":
        """These for one question, the number of its frames being drawn by the seeds `stream`."""
        if not self.frames_drawn:
            return self
        num_frames = int(np.random.default_rng(stream).choice(self.frames_drawn))
        return replace(self, num_frames=num_frames, frames_drawn=())


class Env:
    """One episode: it reads the assistant's turns, runs the tool, and names how the episode
    ends."""

    def __init__(self, question: Question, video: Video, limits: Limits):
        self.question, self.video, self.limits = question, video, limits
        self.overview = video.sample(limits.num_frames)
        is_timed = question.kind == "span" and not video.is_steady
        self.times_s = video.times_s if is_timed else None
        """Stand beside the frames where an answer is in seconds and no one rate gives them."""
        self.fps = None if is_timed else video.fps
        self.turns: list[Turn] = []
        self.answer: str | None = None
        self.status: str | None = None
        """None while the episode goes on; then answered, format_error, out_of_turns or
        out_of_tokens."""

    def step(self, text: str, cut: int | None = None) -> Turn:
        """Take one assistant turn and return it with the frames that it gets.

        cut: the number of tokens after which the turn was cut off; None where it ended by itself.
        """
        assert self.status is None, f"the episode has ended: {self.status}"
        if cut is not None:
            turn = Turn(text, "invalid", error=f"no action within {cut} tokens")
            self.status = "out_of_tokens"
        else:
            turn = self._act(text)
        self.turns.append(turn)
        return turn

    def _act(self, text: str) -> Turn:
        """Run the action of a turn."""
        asked = tuple(turn.window for turn in self.turns if turn.action == "tool")
        limits = self.limits
        action = tools.parse(
            text,
            self.video.num_frames,
            asked,
            limits.use_tool,
            syntax=limits.syntax,
            min_window=limits.min_window,
            near=limits.near,
        )
        is_last = len(self.turns) + 1 >= limits.max_turns
        frames: Sequence[int] = ()
        if action.kind == "answer":
            self.status, self.answer = "answered", action.answer
        elif action.kind == "invalid":
            self.status = "format_error"
        elif is_last:
            self.status = "out_of_turns"
        elif action.kind == "tool":
            frames = self.video.sample(limits.frames_per_call, *action.window)
        return Turn(text, action.kind, action.window, frames, action.error)

    def end(self, status: str) -> None:
        """End the episode from outside: its tokens are used up, or its player has left."""
        self.status = status

    @property
    def frames(self) -> tuple[int, ...]:
        """The frame indices that were shown, in order: the overview, then those of every call."""
        return (*self.overview, *(index for turn in self.turns for index in turn.frames))

    def episode(self) -> Episode:
        """Return the episode that has ended, without tokens."""
        assert self.status is not None, "the episode goes on"
        empty = ((), (), ())
        turns = tuple(self.turns)
        return Episode(self.question, *empty, self.frames, turns, self.status, self.answer)
