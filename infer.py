"""Ask a question about a video; see each turn as it happens, then the answer.

python infer.py clip.mp4 "Which shirt number scored?"
python infer.py clip.mp4 "How was the point scored?" --options header volley tap-in
python infer.py clip.mp4 "…" --model out/rl/model --json
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import tyro

from data_prep import arena, draw
from nanosport.engine.players import Room, load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Env, Limits
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax, split_think
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.files import ASSETS, write_atomically
from nanosport.model.folder import hub_commit, resolve
from nanosport.records import LETTERS, Episode, Question, Turn, check_text
from nanosport.report import episode_page
from nanosport.train.inputs import check_prompt
from nanosport.video import Video

ARENA_ONLY = (
    "this model has two million parameters and knows only the rendered arena; for real video give "
    "--model Qwen/Qwen2.5-VL-7B-Instruct, or a folder that you have trained from it"
)


@dataclass(frozen=True)
class Config:
    video: Annotated[Path, tyro.conf.Positional]
    """A video file, or a folder of frames."""
    question: Annotated[str, tyro.conf.Positional]
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
    json: bool = False
    """Print one JSON object and nothing else."""
    page: Path | None = None
    """Write the episode with its frames as a web page."""

    def check(self) -> None:
        """Raise ValueError for values that no run can use."""
        cli.check(self)
        if len(self.options) > 10 or len(self.options) == 1:
            rule = "give two to ten, or none for an open question"
            raise ValueError(f"--options: {len(self.options)} given; {rule}")
        if not self.question.strip():
            raise ValueError("the question is empty")
        if self.page is not None:
            cli.not_the_input(self.page, self.video, self.model, flag="--page")
        for text in (self.question, *self.options):
            check_text(text)


def is_lost(model: Path, video: Video) -> bool:
    """Whether a shipped model is asked about a video that is not the arena's."""
    shipped = model.resolve().parent == ASSETS.resolve()
    rendered = (video.width, video.height) == (draw.WIDTH, draw.HEIGHT)
    return shipped and not (rendered and round(video.fps) == arena.FPS)


def show(turn: Turn) -> None:
    """Print one turn, for people."""
    think, _ = split_think(turn.text)
    if turn.error:
        print(f"said    {turn.text.strip()}")
    else:
        print(f"think   {think}")
    if turn.action == "tool":
        frames = ", ".join(map(str, turn.frames)) or "no turn left"
        print(f"look    frames {turn.window[0]} to {turn.window[1]} → {frames}")
    elif turn.error:
        print(f"refused {turn.error}")
    sys.stdout.flush()


def as_json(episode: Episode, seconds: float) -> dict:
    """The episode, for machines."""
    fields = ("text", "action", "window", "frames", "error")
    turns = [
        {"think": split_think(turn.text)[0]} | {name: getattr(turn, name) for name in fields}
        for turn in episode.turns
    ]
    return {
        "video": episode.question.video,
        "question": episode.question.question,
        "answer": episode.answer,
        "status": episode.status,
        "frames": episode.frames,
        "turns": turns,
        "seconds": round(seconds, 2),
    }


def answer_line(episode: Episode, options: tuple[str, ...]) -> str:
    """The answer with the option that its letter stands for, or why there is none."""
    if not episode.answer:
        return f"no answer ({episode.status.replace('_', ' ')})"
    letters = LETTERS[: len(options)]
    option = f"  {options[letters.index(episode.answer)]}" if episode.answer in [*letters] else ""
    return f"answer  {episode.answer}{option}"


def main(cfg: Config) -> None:
    cfg.check()
    began, folder = time.time(), resolve(cfg.model)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS)
    room = Room(cfg.episode_tokens + cfg.max_new_tokens, rows=1)
    encoder, sampler = load_sampler(folder, sampling, cfg.max_pixels, cfg.sampler, room)
    asked = cfg.question.strip()
    question = Question("infer", str(cfg.video), "", "recognition", asked, cfg.options, "")
    num_frames = (8 if cfg.tool else 16) if cfg.num_frames is None else cfg.num_frames
    given = {"max_turns": cfg.max_turns, "max_tokens": cfg.episode_tokens}
    limits = Limits(num_frames, use_tool=cfg.tool, syntax=cfg.call_syntax, **given)
    check_prompt(question, encoder, sampler.tokenizer, [limits])
    video = encoder.open(question.clip)
    note = ARENA_ONLY if is_lost(folder, video) else None
    if not cfg.json:
        if note:
            print(f"note    {note}")
        overview = ", ".join(map(str, video.sample(num_frames)))
        print(f"video   {video.num_frames} frames, seen first: {overview}")

    def on_turn(env: Env) -> None:
        if not cfg.json:
            show(env.turns[-1])

    (episode,) = rollout(sampler, encoder, [question], limits, seed=(cfg.seed,), on_turn=on_turn)
    seconds = time.time() - began
    if cfg.page is not None:
        cfg.page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cfg.page, episode_page(episode))
    if cfg.json:
        more = {"model_commit": hub_commit(folder), "note": note}
        print(json.dumps(as_json(episode, seconds) | more))
    else:
        print(answer_line(episode, cfg.options))
        print(f"{len(episode.frames)} frames looked at, {seconds:.1f} s")


if __name__ == "__main__":
    cli.run(main, Config)
