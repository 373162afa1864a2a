"""Many questions at once through one sampler, on a thread of its own.

Those that wait join the batch when a turn ends. A question is a Job; what comes of it is told as it
comes.
"""

import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Generated
from nanosport.env.env import Limits
from nanosport.env.printing import Stream
from nanosport.env.rollout import Conversation
from nanosport.model.frames import FrameEncoder
from nanosport.records import Question
from nanosport.video import VideoError


@dataclass(eq=False)
class Job:
    question: Question
    tell: Callable[[str, object], None]
    """Called on the desk's thread: ("text", the next piece of a turn), ("turn", a Turn), and last
    ("end", the Episode) or ("error", a line)."""
    is_watched: bool = True
    """Whether the pieces are told: each costs as much as a row's part of a step."""
    given_up: bool = False
    """Set by whoever does not wait any more: its conversation ends with its turn."""
    conversation: Conversation | None = None
    stream: Stream | None = field(default=None, repr=False)


class Desk:
    """Takes jobs from any thread, and plays them."""

    def __init__(
        self, encoder: FrameEncoder, sampler: OwnSampler, limits: Limits, rows: int, most: int
    ):
        """rows: conversations at a time. most: jobs that may wait."""
        self.encoder, self.sampler, self.limits, self.rows = encoder, sampler, limits, rows
        self.waiting: queue.Queue[Job | None] = queue.Queue(most)
        self.playing: dict[int, Job] = {}
        self.num_played = self.most_at_once = 0
        sampler.on_token = self._say
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def put(self, job: Job) -> None:
        """Take a job. Raises queue.Full where so many wait that no more are taken."""
        self.waiting.put_nowait(job)

    def close(self) -> None:
        """Play what is under way to its end, and no more."""
        self.waiting.put(None)
        self.thread.join()

    @torch.no_grad()
    def _run(self) -> None:
        while (job := self.waiting.get()) is not None:
            self._open(job)
            while self.playing:
                try:
                    for number, said in self.sampler.turns():
                        self._take(number, said)
                        self._open_waiting()
                except Exception as error:
                    self._fail(error)
            self.encoder.expect_no_more()

    def _open_waiting(self) -> None:
        """Let those that wait join, as far as there is room."""
        while len(self.playing) < self.rows and not self.waiting.empty():
            if self.waiting.queue[0] is None:
                return
            self._open(self.waiting.get())

    def _open(self, job: Job) -> None:
        if job.given_up:
            return
        try:
            tokenizer = self.sampler.tokenizer
            job.conversation = Conversation(job.question, self.encoder, tokenizer, self.limits)
            job.stream, streams = Stream(tokenizer), [np.random.default_rng(self.num_played)]
            (number,) = self.sampler.open(job.conversation.open(), streams)
        except ValueError as error:
            job.tell("error", str(error))
            return
        self.playing[number] = job
        self.num_played += 1
        self.most_at_once = max(self.most_at_once, len(self.playing))

    def _say(self, number: int, token: int) -> None:
        job = self.playing[number]
        if job.is_watched and (text := job.stream.add(token)):
            job.tell("text", text)

    def _take(self, number: int, said: Generated) -> None:
        """Read a turn that has ended; the conversation goes on, or is over."""
        job = self.playing[number]
        talk, piece = job.conversation, None
        if not job.given_up:
            piece = talk.take(said)
            job.stream.end()
            job.tell("turn", talk.env.turns[-1])
        if piece is not None:
            self.sampler.say(number, piece)
            return
        self._leave(number)
        if not job.given_up:
            job.tell("end", talk.episode())

    def _leave(self, number: int) -> Job:
        self.sampler.close(number)
        return self.playing.pop(number)

    def _fail(self, error: Exception) -> None:
        """End the conversations whose video cannot be used any more; all, where that is not it."""
        unusable = self.encoder.unusable  # the video of one that is given up may be forgotten
        jobs = self.playing.items()
        lost = [n for n, job in jobs if job.given_up or job.question.video in unusable]
        for number in lost if lost and isinstance(error, VideoError) else [*self.playing]:
            self._leave(number).tell("error", str(error))
