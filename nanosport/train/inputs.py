"""What a run reads, tried before its first step: a record that cannot be used is left out by name.

records = Records(path, rows, encoder)
left_out = records.check(trial, 0.5, rank)      # a trial raises ValueError; all ranks agree
records.take(numbers, use)                      # a video that is lost in mid-run is replaced
"""

import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import NamedTuple, TypeVar

from tqdm import tqdm

from nanosport.engine.sampler import Sampler
from nanosport.env import prompt
from nanosport.env.env import Env, Limits
from nanosport.env.rollout import replay, rollout
from nanosport.env.tools import TOOL_NAME, Syntax
from nanosport.model.frames import FrameEncoder
from nanosport.records import Clip, Episode, Question
from nanosport.train import dist
from nanosport.video import VideoError

MAX_UNUSABLE = 0.5
"""Where more than half of the records cannot be used, it is rather their paths that are wrong."""
WORKERS = 8
"""So many files are indexed at a time: a network disk is slow to answer."""
T = TypeVar("T")


class TooLong(ValueError):
    """A prompt or an episode of more tokens than a run takes."""

    def __init__(self, tokens: int, most: int):
        fix = "shorten its texts, show fewer or smaller frames (--max-pixels)"
        super().__init__(f"{tokens:,} tokens, at most {most:,}; {fix}, or raise --episode-tokens")
        self.tokens = tokens


def check_prompt(
    question: Question, encoder: FrameEncoder, tokenizer, limits: Sequence[Limits]
) -> None:
    """Raise ValueError where a question's video cannot be used, or the prompt is too long under one
    of the limits. No frame is decoded."""
    video = encoder.open(question.clip)
    for limit in limits:
        env = Env(question, video, limit)
        text = prompt.opening_of(env, 0)  # a frame's tokens are counted, not written and encoded
        tokens = len(tokenizer.encode(text, add_special_tokens=False))
        tokens += len(env.overview) * encoder.tokens_per_frame(question.clip)
        if tokens > limit.max_tokens:
            raise TooLong(tokens, limit.max_tokens)


class Fault(NamedTuple):
    """Why a record cannot be used."""

    number: int
    why: str
    tokens: int
    """The length of a record that is too long; else 0."""


class Records:
    """The records of a run, and which of them can be used."""

    def __init__(
        self, path: Path, rows: Sequence[tuple[Question, list[str]]], encoder: FrameEncoder
    ):
        self.path, self.rows, self.encoder = path, rows, encoder
        self.kept = list(range(len(rows)))

    def __len__(self) -> int:
        return len(self.kept)

    @property
    def questions(self) -> list[Question]:
        """The questions of the usable records."""
        return [self.rows[number][0] for number in self.kept]

    def check_prompts(self, tokenizer, limits: Sequence[Limits], *how) -> list[str]:
        """`check` whether each question's video can be used, and its prompt is short enough."""

        def trial(number: int) -> None:
            check_prompt(self.rows[number][0], self.encoder, tokenizer, limits)

        return self.check(trial, *how)

    def check(
        self, trial: Callable[[int], object], most: float, rank: int, stage: Callable = nullcontext
    ) -> list[str]:
        """Index every video, call `trial` with each record's number, and keep the records for which
        it raises no ValueError; returns a line for each reason why others are left out.

        All ranks share the work, and come to the same. Raises ValueError where more than the share
        `most` of the records cannot be used. stage: what times a run's stages, so that no long
        check is taken for one that hangs.
        """

        def timed(number: int) -> None:
            with stage("check"):
                trial(number)

        mine = self._try(timed, dist.share(range(len(self.rows)), rank), hidden=rank > 0)
        faults, _ = dist.gather_items(mine)
        unusable = {fault.number for fault in faults}
        self.kept = [number for number in self.kept if number not in unusable]
        lines, share = self._describe(faults), f"{len(faults)} of {len(self.rows)} records"
        if faults and rank == 0:
            print("\n".join(f"left out: {line}" for line in lines[:20]))
            print(f"{self.path}: {share} are left out")
        if len(faults) > most * len(self.rows) or not self.kept:
            rule = f"{share} cannot be used, --max-unusable allows {most:.1%}"
            raise ValueError(f"{self.path}: {rule}: {lines[0]}")
        return lines

    def _try(self, trial: Callable, numbers: Sequence[int], hidden: bool) -> list[Fault]:
        numbers_by_video: dict[str, list[int]] = {}
        for number in numbers:
            numbers_by_video.setdefault(self.rows[number][0].video, []).append(number)

        def index(video: str) -> str:
            with suppress(VideoError):  # its trial meets it again
                self.encoder.open(Clip(video))
            return video

        faults, pool = [], ThreadPoolExecutor(WORKERS)
        bar = {"desc": "check", "total": len(numbers_by_video), "unit": "video", "disable": hidden}
        try:
            for video in tqdm(pool.map(index, numbers_by_video), **bar):
                for number in numbers_by_video[video]:
                    try:
                        trial(number)
                    except ValueError as error:
                        tokens = getattr(error, "tokens", 0)
                        faults.append(Fault(number, str(error), tokens))
        finally:
            pool.shutdown(cancel_futures=True)
        return sorted(faults)

    def _describe(self, faults: Sequence[Fault]) -> list[str]:
        """A line for each reason, with the record that it is said of; the too long are one."""
        alike: dict[str, list[Fault]] = {}
        for fault in faults:
            alike.setdefault("too long" if fault.tokens else fault.why, []).append(fault)
        line_numbers = []
        if faults:
            with open(self.path, "rb") as file:  # blank lines hold no record
                line_numbers = [n for n, line in enumerate(file, 1) if line.strip()]
        lines = []
        for group in alike.values():
            worst = max(group, key=lambda fault: fault.tokens)
            name, which = self.rows[worst.number][0].id, "longest" if worst.tokens else "first"
            several = f", the {which} of {len(group)}" if len(group) > 1 else ""
            why = worst.why.removeprefix(name).lstrip(":, ")
            where = f"{self.path}, line {line_numbers[worst.number]} ({name}){several}"
            lines.append(f"{where}: {why}")
        return lines

    def take(self, places: Sequence[int], use: Callable[[list[int]], T]) -> T:
        """What `use` makes of the records at these places among the usable ones, by their numbers.

        A record whose video is lost meanwhile is replaced by the next that has one, with a line,
        and `use` begins again.
        """
        while True:
            num_lost = len(self.encoder.unusable)
            try:
                return use([self._standing_in(place) for place in places])
            except VideoError as error:
                if len(self.encoder.unusable) == num_lost:
                    raise
                tqdm.write(f"replaced by the next record: {error}")

    def play(
        self, places: Sequence[int], sampler: Sampler, limits: Limits, **drawn
    ) -> list[Episode]:
        """Sample episodes of the questions at these places. drawn: group_size, seed and numbers, as
        `rollout` takes them."""

        def use(numbers: list[int]) -> list[Episode]:
            questions = [self.rows[number][0] for number in numbers]
            return rollout(sampler, self.encoder, questions, limits, **drawn)

        return self.take(places, use)

    def _standing_in(self, place: int) -> int:
        """The number of the first record from a place on whose video is not lost."""
        for k in range(len(self.kept)):
            number = self.kept[(place + k) % len(self.kept)]
            if self.rows[number][0].video not in self.encoder.unusable:
                return number
        raise ValueError(f"{self.path}: the videos of all its records are lost; is the disk there?")

    def num_replaced(self, places: Sequence[int], episodes: Sequence[Episode]) -> int:
        """How many of the episodes are of another video than the record at their place."""
        wanted = [self.rows[self.kept[place]][0].video for place in places]
        got = [episode.question.video for episode in episodes]
        return sum(one != other for one, other in zip(wanted, got, strict=True))


class Trajectories:
    """A teacher's trajectories as episodes: made when first needed, then kept."""

    def __init__(self, records: Records, tokenizer, max_tokens: int, syntax: Syntax = TOOL_NAME):
        self.records, self.tokenizer, self.max_tokens = records, tokenizer, max_tokens
        # else an episode would end before its length is known
        self.limits = Limits(max_tokens=sys.maxsize, syntax=syntax)
        self.episodes: dict[int, Episode] = {}

    def __getitem__(self, number: int) -> Episode:
        """The episode of a record. Raises ValueError where its turns are no valid trajectory, or it
        is too long, and VideoError where its video cannot be used or is gone."""
        (question, messages), encoder = self.records.rows[number], self.records.encoder
        if number not in self.episodes:
            episode = replay(question, messages, encoder, self.tokenizer, self.limits)
            if len(episode.ids) > self.max_tokens:
                raise TooLong(len(episode.ids), self.max_tokens)
            self.episodes[number] = episode
        encoder.look_for(question.clip)
        return self.episodes[number]
