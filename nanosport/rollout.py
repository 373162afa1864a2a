"""Episodes: the loop of the paper, from the overview frames to an answer.

A Session is one conversation and its environment: it holds the ids with the mask born with each of them, reads each
assistant turn, runs the tool and says what comes back. `rollout` drives many Sessions through the engine; `replay` drives
one with given texts (a teacher's), so SFT data and rollouts are made by the same code.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from nanosport import prompt, tools
from nanosport.engine import Engine, Generated, Piece
from nanosport.episode import Episode, Question, Turn
from nanosport.frames import FrameEncoder
from nanosport.video import Video


@dataclass(frozen=True)
class Loop:
    """The loop's constants; defaults are the paper's, or its nearest ancestor's where the paper is silent."""

    num_frames: int = 8
    """Overview frames."""
    frames_per_call: int = 8
    """Frames a tool call returns."""
    max_turns: int = 5
    max_tokens: int = 16_384
    """Of a whole episode, frames included."""
    use_tool: bool = True
    """False: one answer from the overview, the tool is not offered."""

    def __post_init__(self):
        for name in ("num_frames", "frames_per_call", "max_turns", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} {getattr(self, name)}: must be at least 1")


def act(text: str, turns: Sequence[Turn], video: Video, loop: Loop) -> tuple[Turn, str | None, str | None]:
    """Run the action of one assistant turn that follows `turns`: (the turn with the frames it gets, how the episode ended
    or None, the answer if it gave one)."""
    asked = tuple(t.window for t in turns if t.action == "tool")
    action = tools.parse(text, video.num_frames, asked, loop.use_tool)
    last = len(turns) + 1 >= loop.max_turns
    shown = video.sample(loop.frames_per_call, *action.window) if action.kind == "tool" and not last else ()
    turn = Turn(text, action.kind, action.window, shown, action.error)
    ended = {"answer": "answered", "invalid": "format_error"}.get(action.kind, "out_of_turns" if last else None)
    return turn, ended, action.answer


class Session:
    """One episode in progress."""

    def __init__(self, question: Question, encoder: FrameEncoder, tokenizer, loop: Loop, look: bool = True):
        """look: encode the frames; not needed where nothing is generated."""
        self.question, self.encoder, self.tokenizer, self.loop, self.look = question, encoder, tokenizer, loop, look
        self.video = encoder.open(question.clip)
        self.ids: list[int] = []
        self.mask: list[int] = []
        self.logprobs: list[float] = []
        self.frames: list[int] = []
        self.turns: list[Turn] = []
        self.status: str | None = None
        self.answer: str | None = None
        overview = self.video.sample(loop.num_frames)
        text = prompt.opening(question, overview, self._sizes(overview), self.video.num_frames, loop.use_tool, self.video.fps)
        self.pending = self._say(text, overview)
        """The piece the engine must be fed before the next turn."""

    def _sizes(self, indices: Sequence[int]) -> list[int]:
        return [self.encoder.tokens_per_frame(self.question.clip)] * len(indices)

    def _say(self, text: str, indices: Sequence[int] = ()) -> Piece:
        """Add what the environment says: encoded once, mask 0."""
        ids = self.tokenizer.encode(text, add_special_tokens=False)
        self.ids += ids
        self.mask += [0] * len(ids)
        self.logprobs += [0.0] * len(ids)
        self.frames += indices
        clip = self.question.clip
        features = self.encoder.features([(clip, i) for i in indices]) if indices and self.look else None
        return Piece(ids, [self.encoder.grid(clip)] * len(indices), features)

    def take(self, said: Generated) -> None:
        """Read one assistant turn; afterwards either `pending` holds what comes back, or `status` says how it ended."""
        self.ids += said.ids
        self.mask += [1] * len(said.ids)
        self.logprobs += said.logprobs
        text = self.tokenizer.decode(said.ids, skip_special_tokens=False)
        if not said.stopped:
            self.turns.append(Turn(text, "invalid", error=f"no action within {len(said.ids)} tokens"))
            return self._end("out_of_tokens")
        turn, status, self.answer = act(text, self.turns, self.video, self.loop)
        self.turns.append(turn)
        if status is not None:
            return self._end(status)
        content = prompt.frame_text(turn.frames, self._sizes(turn.frames)) if turn.frames else f"error: {turn.error}"
        self.pending = self._say(prompt.tool_result(content), turn.frames)
        if len(self.ids) >= self.loop.max_tokens:
            self._end("out_of_tokens")

    def _end(self, status: str) -> None:
        self.status, self.pending = status, None

    def episode(self) -> Episode:
        assert self.status is not None, "the episode goes on"
        return Episode(
            question=self.question,
            ids=tuple(self.ids),
            mask=tuple(self.mask),
            logprobs=tuple(self.logprobs),
            frames=tuple(self.frames),
            turns=tuple(self.turns),
            status=self.status,
            answer=self.answer,
        )


@torch.no_grad()
def rollout(
    engine: Engine,
    encoder: FrameEncoder,
    questions: Sequence[Question],
    loop: Loop,
    group_size: int = 1,
    seed: Sequence[int] = (0,),
    first: int = 0,
    on_turn: Callable[[Session], None] | None = None,
) -> list[Episode]:
    """`group_size` episodes of every question, in order, the group's members side by side.

    Question q draws from the streams (seed, first + q, member): the same whatever the batch. `on_turn` sees every session
    after each of its turns. Raises VideoError where a video cannot be used.
    """
    members = [(q, m) for q in range(len(questions)) for m in range(group_size)]
    streams = [np.random.default_rng([*seed, first + q, m]) for q, m in members]
    sessions = [Session(questions[q], encoder, engine.tokenizer, loop) for q in range(len(questions))]
    state = engine.prefill([s.pending for s in sessions]).select([q for q, _ in members])  # the prompt once a group
    sessions = [Session(questions[q], encoder, engine.tokenizer, loop) if m else sessions[q] for q, m in members]
    active = list(range(len(members)))
    while active:
        for row, turn in zip(active, engine.generate(state, [streams[row] for row in active])):
            sessions[row].take(turn)
            if on_turn is not None:
                on_turn(sessions[row])
        keep = [k for k, row in enumerate(active) if sessions[row].status is None]
        active = [active[k] for k in keep]
        if active:
            state = state.select(keep)
            engine.append(state, [sessions[row].pending for row in active])
    return [s.episode() for s in sessions]


def replay(question: Question, messages: Sequence[str], encoder: FrameEncoder, tokenizer, loop: Loop) -> Episode:
    """The episode of given assistant turns; no frame is decoded. Raises ValueError where they are no whole, valid trajectory."""
    session = Session(question, encoder, tokenizer, loop, look=False)
    for k, message in enumerate(messages):
        if session.status is not None:
            raise ValueError(f"{question.id}: the episode ends ({session.status}) before message {k + 1} of {len(messages)}")
        ids = tuple(tokenizer.encode(message, add_special_tokens=False))
        session.take(Generated(ids, (0.0,) * len(ids), stopped=True))
        if (error := session.turns[-1].error) is not None:
            raise ValueError(f"{question.id}, message {k + 1}: {error}")
    if session.status != "answered":
        raise ValueError(f"{question.id}: the trajectory ends without an answer")
    return session.episode()
