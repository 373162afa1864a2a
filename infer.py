"""Ask a question about a video; see each turn as it happens, then the answer.

python infer.py clip.mp4 "Which shirt number scored?"
python infer.py clip.mp4 "How was the point scored?" --options header volley tap-in
python infer.py clip.mp4 "…" --model out/rl/model --json
"""

import json
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanosport import cli
from nanosport.engine import Sampling, load_engine
from nanosport.episode import Episode, Question, Turn, check_text
from nanosport.load import resolve
from nanosport.log import write_atomically
from nanosport.report import episode_page
from nanosport.rollout import Loop, Session, rollout
from nanosport.tools import split_think


@dataclass(frozen=True)
class Config:
    video: Annotated[Path, tyro.conf.Positional]
    """A video file, or a folder of frames."""
    question: Annotated[str, tyro.conf.Positional]
    options: tuple[str, ...] = ()
    """Options to choose from; they are lettered (A), (B), …"""
    model: str = str(Path(__file__).parent / "assets" / "nano-deepsport")
    """A model folder, or a Hugging Face hub id. The default knows the arena and nothing else."""
    tool: bool = True
    """Whether the model may ask for more frames."""
    num_frames: int | None = None
    """Overview frames: 8 with the tool, 16 without, unless given."""
    max_turns: int = 5
    temperature: float = 0.0
    """0 takes the most likely token; FrameThinker samples with 0.6 and top-p 0.9."""
    top_p: float = 1.0
    max_new_tokens: int = 160
    """Of one turn."""
    seed: int = 0
    json: bool = False
    """Print one JSON object and nothing else."""
    page: Path | None = None
    """Write the episode with its frames as a web page."""

    def check(self) -> None:
        """Raise ValueError for values no run can use. Not in __post_init__: tyro would print it as a parse error."""
        cli.at_least(1, max_turns=self.max_turns)
        if len(self.options) > 10 or len(self.options) == 1:
            raise ValueError(f"--options: {len(self.options)} given; give two to ten, or none for an open question")
        if not self.question.strip():
            raise ValueError("the question is empty")
        for text in (self.question, *self.options):
            check_text(text)


def show(turn: Turn) -> None:
    """One turn, for people."""
    think, _ = split_think(turn.text)
    print(f"think   {think}")
    if turn.action == "tool":
        print(f"look    frames {turn.window[0]} to {turn.window[1]} → {', '.join(map(str, turn.frames)) or 'no turn left'}")
    elif turn.error:
        print(f"refused {turn.error}")
    sys.stdout.flush()


def as_json(episode: Episode, seconds: float) -> dict:
    """The episode, for machines."""
    turns = []
    for turn in episode.turns:
        think, _ = split_think(turn.text)
        turns.append({"think": think, "action": turn.action, "window": turn.window, "frames": turn.frames, "error": turn.error})
    return {
        "video": episode.question.video,
        "question": episode.question.question,
        "answer": episode.answer,
        "status": episode.status,
        "frames": episode.frames,
        "turns": turns,
        "seconds": round(seconds, 2),
    }


def main(cfg: Config) -> None:
    cfg.check()
    began = time.time()
    encoder, engine = load_engine(resolve(cfg.model), Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens))
    question = Question("infer", str(cfg.video), "", "recognition", cfg.question.strip(), cfg.options, "")
    num_frames = (8 if cfg.tool else 16) if cfg.num_frames is None else cfg.num_frames
    loop = Loop(num_frames=num_frames, max_turns=cfg.max_turns, use_tool=cfg.tool)

    def on_turn(session: Session) -> None:
        if not cfg.json:
            if len(session.turns) == 1:
                first = session.frames[: loop.num_frames]
                print(f"video   {session.video.num_frames} frames, seen first: {', '.join(map(str, first))}")
            show(session.turns[-1])

    (episode,) = rollout(engine, encoder, [question], loop, seed=(cfg.seed,), on_turn=on_turn)
    if cfg.page is not None:
        cfg.page.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(cfg.page, episode_page(episode))
    if cfg.json:
        print(json.dumps(as_json(episode, time.time() - began)))
    else:
        answer = f"answer  {episode.answer}" if episode.answer else f"no answer ({episode.status.replace('_', ' ')})"
        if episode.answer and cfg.options and episode.answer in "ABCDEFGHIJ"[: len(cfg.options)]:
            answer += f"  {cfg.options[ord(episode.answer) - ord('A')]}"
        print(f"{answer}\n{len(episode.frames)} frames looked at, {time.time() - began:.1f} s")


if __name__ == "__main__":
    cli.run(main, Config)
