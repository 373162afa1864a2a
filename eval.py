"""The benchmark: accuracy by dimension and sport, how often and how well the tool is used, with and
without it.

    python eval.py                                # the shipped model on the arena's held-out clips
    python eval.py --model out/rl/model --data my/test.jsonl --out results/mine.json
    python eval.py --modes no-tool --num-frames 16

Mode `tool` is the paper's loop from eight overview frames; mode `no-tool` gives the *same* model 16
uniform frames and no tool.
"""

import json
import time
from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from data_prep import arena
from nanosport import cli
from nanosport.cli import AtLeast
from nanosport.engine.own import load_sampler
from nanosport.engine.sampler import Sampler, Sampling
from nanosport.env.env import Limits
from nanosport.env.judge import Judge, agreement, judge_of
from nanosport.env.reward import format_valid, used_tool
from nanosport.env.rollout import rollout
from nanosport.env.scoring import accuracy
from nanosport.env.tools import STOPS
from nanosport.files import provenance, write_atomically
from nanosport.model.folder import resolve
from nanosport.model.frames import FrameEncoder
from nanosport.records import DIMENSIONS, Episode, Question, read_questions
from nanosport.report import table
from nanosport.video import usable


@dataclass(frozen=True)
class Config:
    model: str = "assets/nano-deepsport"
    """A model folder, or a Hugging Face hub id."""
    data: Path = Path("out/arena/test.jsonl")
    """Questions, one JSON object a line. The default is rendered where it is missing."""
    out: Path | None = None
    """JSON file for the figures and every episode's outcome."""
    modes: tuple[Literal["tool", "no-tool"], ...] = ("tool", "no-tool")
    name: str | None = None
    """Name of the row; the model's by default."""
    num_frames: Annotated[int, AtLeast(1)] = 16
    """Uniform frames in mode no-tool."""
    temperature: float = 0.6
    """0.6 and top-p 0.9 are the settings of FrameThinker, the paper's nearest ancestor; 0 is
    greedy."""
    top_p: float = 0.9
    max_new_tokens: int = 160
    """One assistant turn is cut after so many tokens."""
    limit: int | None = None
    """Only the first so many questions are asked."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """So many questions are played at a time."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1, of a language model that scores open answers;
    else the F1 of their words does."""
    judge: str = ""
    """The judge's name there. The key is read from JUDGE_API_KEY; verdicts are kept in
    out/answers."""
    seed: int = 0


def contained(episode: Episode) -> bool:
    """Whether one requested window held the whole event."""
    first, last = episode.question.window
    looks = [turn.window for turn in episode.turns if turn.action == "tool" and turn.frames]
    return any(start <= first and last <= end for start, end in looks)


def mean_percent(values: Iterable[float]) -> float | None:
    """Their mean in percent; None where there are none."""
    values = list(values)
    return round(100 * sum(values) / len(values), 2) if values else None


def figures(episodes: list[Episode], scores: list[float]) -> dict:
    """All rates and means of episodes and their scores: shares in percent, None where there was
    nothing to count."""
    questions = [episode.question for episode in episodes]
    used = [used_tool(episode) for episode in episodes]
    needs = [question.needs_tool for question in questions]
    placed = [e for e, needed in zip(episodes, needs) if needed and e.question.window]

    def where(values: list, keys: Iterable, key) -> float | None:
        return mean_percent(value for value, its_key in zip(values, keys) if its_key == key)

    dimensions, sports = [q.dimension for q in questions], [q.sport for q in questions]
    return {
        "accuracy": mean_percent(scores),
        **{dimension: where(scores, dimensions, dimension) for dimension in DIMENSIONS},
        "by_sport": {sport: where(scores, sports, sport) for sport in sorted(set(sports))},
        "accuracy_tool_needed": where(scores, needs, True),
        "accuracy_tool_not_needed": where(scores, needs, False),
        "frames": round(sum(len(e.frames) for e in episodes) / len(episodes), 2),
        "tool_rate": mean_percent(used),
        "tool_rate_needed": where(used, needs, True),
        "tool_rate_not_needed": where(used, needs, False),
        "window_hit_rate": mean_percent(contained(e) for e in placed),
        "format_rate": mean_percent(format_valid(e) for e in episodes),
        "status": dict(Counter(e.status for e in episodes)),
        "questions": len(episodes),
    }


def outcome(episode: Episode, score: float) -> dict:
    """What the report keeps of an episode."""
    return {
        "id": episode.question.id,
        "answer": episode.answer,
        "truth": episode.question.answer,
        "accuracy": round(score, 3),
        "windows": [turn.window for turn in episode.turns if turn.window],
        "status": episode.status,
    }


def run_mode(
    cfg: Config,
    mode: str,
    players: tuple[FrameEncoder, Sampler],
    questions: list[Question],
    judge: Judge | None = None,
) -> dict:
    """Figures of one mode, with every episode's outcome."""
    began, (encoder, sampler) = time.time(), players
    limits = Limits() if mode == "tool" else Limits(num_frames=cfg.num_frames, use_tool=False)
    episodes = []
    for start in tqdm(range(0, len(questions), cfg.batch_size), desc=f"eval {mode}", unit="batch"):
        batch = questions[start : start + cfg.batch_size]
        episodes += rollout(sampler, encoder, batch, limits, seed=(cfg.seed,), first=start)
    scores, judged = [accuracy(e.answer, e.question) for e in episodes], {}
    if judge is not None:
        by_rule, asked = scores, [e.question for e in episodes]
        scores = judge.answers([e.answer for e in episodes], asked)
        judged = {"judge_and_rule": agreement(by_rule, scores)}
    seconds = round(time.time() - began, 1)
    outcomes = [outcome(episode, score) for episode, score in zip(episodes, scores)]
    return {**figures(episodes, scores), **judged, "seconds": seconds, "episodes": outcomes}


def main(cfg: Config) -> None:
    cli.check(cfg)
    if not cfg.modes:
        raise ValueError("--modes: name at least one of tool, no-tool")
    judge = judge_of(cfg.judge_url, cfg.judge, Path("out/answers"))
    if cfg.data == Config.data and not cfg.data.exists():
        arena.main(arena.Config())
    source = resolve(cfg.model)
    players = load_sampler(source, Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS))
    questions, broken = usable(read_questions(cfg.data)[: cfg.limit], players[0].open)
    for line in broken:
        print(f"left out: {line}")
    if not questions:
        raise ValueError(f"{cfg.data}: none of its videos can be used")

    name, rows = cfg.name or source.name, {}
    for mode in cfg.modes:
        label = name if mode == "tool" else f"{name}, {cfg.num_frames} frames, no tool"
        rows[label] = run_mode(cfg, mode, players, questions, judge)
    print(table(rows))
    if cfg.out is not None:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        config = {k: str(v) for k, v in asdict(cfg).items()}
        report = {"rows": rows, "left_out": broken, "config": config, **provenance()}
        write_atomically(cfg.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, Config)
