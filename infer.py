"""Ask questions about videos; see each turn as it happens, then the answer.

    python infer.py clip.mp4 "Which shirt number scored?"
    python infer.py clip.mp4 "How was the point scored?" --options header volley tap-in
    python infer.py clips/*.mp4 "Who scored?" --json          # an object a line
    python infer.py clip.mp4 --questions questions.txt        # one a line; the frames are kept
    python infer.py clip.mp4                                  # asks you, until Ctrl-D

It exits with 0 when each question has been put to each video, whether or not an answer came of it;
1 after an error, also where one of several videos could not be used; 2 for wrong flags; 130 after
Ctrl-C; 141 where nobody reads what it prints.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import json
import math
import os
import sys
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep import arena, draw
from nanosport.engine.own import OwnSampler
from nanosport.engine.players import Room, load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Env, Limits
from nanosport.env.printing import Stream, answer_line, as_json, show
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax
from nanosport.fields import NAMES, Above, AtLeast, AtMost
from nanosport.files import ASSETS, replacing, write_atomically
from nanosport.image import encode_png
from nanosport.model.folder import hub_commit, resolve
from nanosport.records import Episode, Question, check_text
from nanosport.report import episode_page, printable
from nanosport.strip import inline, strip
from nanosport.train.inputs import TooLong, check_prompt
from nanosport.video import Video, VideoError

ARENA_ONLY = (
    "this model has two million parameters and knows only the rendered arena; for real video give "
    "--model Qwen/Qwen2.5-VL-7B-Instruct, or a folder that you have trained from it"
)


@dataclass(frozen=True)
class Config:
    words: Annotated[
        tuple[str, ...],
        tyro.conf.Positional,
        tyro.conf.arg(metavar="VIDEO [VIDEO …] [QUESTION]"),
        NAMES,
    ] = ()
    """Video files, or folders of frames; then the question. Without one, each line of standard
    input is a question."""
    questions: Path | None = None
    """A file with a question a line, in place of the one question."""
    options: tuple[str, ...] = ()
    """Options to choose from; they are lettered (A), (B), …"""
    model: str = str(ASSETS / "nano-deepsport")
    """A model folder, or a Hugging Face hub id, of a revision if it ends in @REVISION. The default
    knows the arena and nothing else."""
    tool: bool = True
    """Whether the model may ask for more frames."""
    num_frames: Annotated[int | None, AtLeast(1)] = None
    """Overview frames: 8 with the tool, 16 without, unless given."""
    max_turns: Annotated[int, AtLeast(1)] = 5
    temperature: Annotated[float, AtLeast(0)] = 0.0
    """0 takes the most likely token; FrameThinker samples with 0.6 and top-p 0.9."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 1.0
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    """One turn is cut after so many tokens."""
    max_pixels: Annotated[int | None, AtLeast(1)] = None
    """Larger frames are scaled down to this. None: as the model's preprocessor_config.json says."""
    episode_tokens: Annotated[int, AtLeast(1)] = 16_384
    """A whole episode, frames included, is ended when it reaches so many tokens."""
    sampler: Literal["own", "vllm"] = "own"
    """Who samples: this project's sampler, or vLLM's engine in this process (docs/vllm.md)."""
    call_syntax: Syntax = TOOL_NAME
    """How the model was taught to call the tool."""
    seed: Annotated[int, AtLeast(0)] = 0
    start: Annotated[float, AtLeast(0)] = 0.0
    """Only the video from this second on is shown; its frames are counted from there."""
    end: Annotated[float | None, Above(0)] = None
    """Only the video up to this second is shown. None: to its end."""
    stream: bool = field(default_factory=lambda: sys.stdout.isatty())
    """Print tokens as they come; the default where a person reads. vLLM's turns come whole."""
    json: bool = False
    """Print one JSON object for each answer, and nothing else."""
    page: Path | None = None
    """Write the episodes with their frames as a web page."""
    strip: Path | None = None
    """Write the frames that were looked at as a PNG picture; those of a second answer go to a file
    with _2 in its name."""
    inline: Literal["kitty", "iterm"] | None = None
    """Show that picture in the terminal, by the protocol that it knows."""

    @property
    def videos(self) -> tuple[Path, ...]:
        return tuple(map(Path, self.words if self.question is None else self.words[:-1]))

    @property
    def question(self) -> str | None:
        """The last word, where it is not one more video."""
        return None if self.questions or len(self.words) < 2 else str(self.words[-1])

    def check(self) -> None:
        """Raise ValueError for values that no run can use."""
        cli.check(self)
        if len(self.options) > 10 or len(self.options) == 1:
            rule = "give two to ten, or none for an open question"
            raise ValueError(f"--options: {len(self.options)} given; {rule}")
        if not self.words:
            raise ValueError("no video: give a video file, then the question")
        if self.question is not None and os.path.exists(self.question):
            raise ValueError(
                f"{self.question}: is there as a file; the question comes after the videos"
            )
        if len(self.videos) == 1 and not self.videos[0].exists():
            Video(self.words[0])  # raises, before a model is loaded
        if self.question is not None and not self.question.strip():
            raise ValueError("the question is empty")
        if self.end is not None and self.end <= self.start:
            raise ValueError(f"--end {self.end:g}: must be above --start {self.start:g}")
        for flag in ("page", "strip"):
            if (out := getattr(self, flag)) is not None:
                read = (*self.videos, self.model, *filter(None, [self.questions]))
                cli.not_the_input(out, *read, flag=f"--{flag}")
        for text in (self.question or "", *self.options):
            check_text(text)

    @property
    def span_s(self) -> tuple[float, float] | None:
        """The part of the video that is shown."""
        is_whole = self.start == 0 and self.end is None
        return None if is_whole else (self.start, math.inf if self.end is None else self.end)


def questions_of(cfg: Config) -> Iterator[str]:
    """The questions: the one that is given, those of the file, or lines of standard input."""
    if cfg.question is not None:
        yield cfg.question.strip()
        return
    lines: Iterable[str] = asked()
    if cfg.questions:
        try:
            lines = cfg.questions.read_text("utf-8").split("\n")
        except UnicodeDecodeError as error:
            raise ValueError(f"{cfg.questions}: not a text in UTF-8 ({error})") from None
    is_empty = True
    for line in filter(str.strip, lines):
        yield check_text(line.strip())
        is_empty = False
    if is_empty:
        where = cfg.questions or "standard input"
        raise ValueError(f"{where}: no question; give one after the video")


def asked() -> Iterator[str]:
    """Lines of standard input; a person is asked for each, and again after one that will not do."""
    is_person = sys.stdin.isatty()
    while True:
        if is_person:
            print("question> ", end="", flush=True)
        if not (line := sys.stdin.readline()):
            return
        try:
            yield check_text(line)
        except ValueError as error:
            if not is_person:
                raise
            print(f"error: {error}")


def is_lost(model: Path, video: Video) -> bool:
    """Whether a shipped model is asked about a video that is not the arena's."""
    shipped = model.resolve().parent == ASSETS.resolve()
    rendered = (video.width, video.height) == (draw.WIDTH, draw.HEIGHT)
    return shipped and not (rendered and round(video.fps) == arena.FPS)


class Player:
    """The model, which plays an episode for each question; what it has seen of a video is kept."""

    def __init__(self, cfg: Config):
        self.cfg, self.folder = cfg, resolve(cfg.model)
        sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS)
        room = Room(cfg.episode_tokens + cfg.max_new_tokens, rows=1)
        loaded = load_sampler(self.folder, sampling, cfg.max_pixels, cfg.sampler, room)
        self.encoder, self.sampler = loaded
        num_frames = (8 if cfg.tool else 16) if cfg.num_frames is None else cfg.num_frames
        given = {"max_turns": cfg.max_turns, "max_tokens": cfg.episode_tokens}
        self.limits = Limits(num_frames, use_tool=cfg.tool, syntax=cfg.call_syntax, **given)
        self.stream = None
        if cfg.stream and not cfg.json and isinstance(self.sampler, OwnSampler):
            self.stream = Stream(self.sampler.tokenizer)
            self.sampler.on_token = self.say
        self.episodes: list[Episode] = []
        self.has_noted = False

    def ask(self, path: Path, text: str) -> None:
        """Put a question to a video, and print what comes of it. Raises VideoError or TooLong."""
        began, cfg, num_frames = time.time(), self.cfg, self.limits.num_frames
        options = {"options": cfg.options, "span_s": cfg.span_s}
        question = Question("infer", str(path), "", "recognition", text, answer="", **options)
        check_prompt(question, self.encoder, self.sampler.tokenizer, [self.limits])
        video = self.encoder.open(question.clip)
        note = ARENA_ONLY if is_lost(self.folder, video) else None
        if not cfg.json:
            if note and not self.has_noted:
                print(f"note    {note}")
                self.has_noted = True
            name = f"{path}: " if len(cfg.videos) > 1 else ""
            overview = ", ".join(map(str, video.sample(num_frames)))
            print(f"video   {name}{video.num_frames} frames, seen first: {overview}")
        how = {"seed": (cfg.seed,), "on_turn": None if cfg.json else self.show}
        (episode,) = rollout(self.sampler, self.encoder, [question], self.limits, **how)
        self.episodes.append(episode)
        seconds = time.time() - began
        if cfg.json:
            more = {"model_commit": hub_commit(self.folder), "note": note}
            print(json.dumps(as_json(episode, seconds) | more), flush=True)
        else:
            print(answer_line(episode, cfg.options))
        if cfg.strip or cfg.inline:
            self.picture(episode, video)
        if not cfg.json:
            print(f"{len(episode.frames)} frames looked at, {seconds:.1f} s")

    def say(self, number: int, token: int) -> None:
        start = "" if self.stream.shown else "say     "
        if text := self.stream.add(token):
            print(start + text, end="", flush=True)

    def show(self, env: Env) -> None:
        if self.stream:
            print()
            self.stream.end()
        show(env.turns[-1], streamed=self.stream is not None)

    def picture(self, episode: Episode, video: Video) -> None:
        """Write the frames that an episode has looked at, and show them in the terminal."""
        png, num, path = encode_png(strip(episode, video)), len(self.episodes), self.cfg.strip
        if path:
            path.parent.mkdir(parents=True, exist_ok=True)
            with replacing(path if num == 1 else path.with_stem(f"{path.stem}_{num}")) as new:
                new.write_bytes(png)
        if self.cfg.inline and not self.cfg.json:
            raw = getattr(sys.stdout, "stream", sys.stdout)  # a text would be made harmless
            raw.write(inline(png, self.cfg.inline))


def ask_all(cfg: Config, player: Player) -> None:
    """Put each question to each video. Raises ValueError at the end where one could not be."""
    broken, num_unasked = set(), 0
    for text in questions_of(cfg):
        if cfg.questions and not cfg.json:
            print(f"ask     {text}")
        for path in (path for path in cfg.videos if path not in broken):
            try:
                player.ask(path, text)
            except (VideoError, TooLong) as error:
                is_long = isinstance(error, TooLong)  # another question may fit
                if len(cfg.videos) == 1 and (cfg.question or not is_long):
                    raise
                about = f"{path}: {error}" if is_long else error
                print(printable(f"error: {about}"), file=sys.stderr, flush=True)
                num_unasked += is_long
                broken |= set() if is_long else {path}
    if broken:
        raise ValueError(f"{len(broken)} of {len(cfg.videos)} videos could not be used")
    if num_unasked:
        raise ValueError(f"{num_unasked} questions are too long, and were not asked")


def main(cfg: Config) -> None:
    cfg.check()
    player = Player(cfg)
    try:
        ask_all(cfg, player)
    finally:
        if cfg.page is not None and player.episodes:
            cfg.page.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(cfg.page, episode_page(*player.episodes))


if __name__ == "__main__":
    cli.run(main, Config)
