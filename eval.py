"""The benchmark: accuracy by dimension and sport, how often and how well the tool is used, with and without it.

    python eval.py                                              # the shipped model on the arena's held-out clips
    python eval.py --model out/rl/model --data my/test.jsonl --out results/mine.json
    python eval.py --modes no-tool --num-frames 16

Mode `tool` is the paper's loop from eight overview frames; mode `no-tool` gives the *same* model 16 uniform frames and no tool.
"""

import json
import time
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

from tqdm import tqdm

from data_prep import arena
from nanosport import cli
from nanosport.endpoint import Endpoint
from nanosport.engine import Engine, Sampling, load_engine
from nanosport.episode import DIMENSIONS, Episode, Question, read_questions
from nanosport.frames import FrameEncoder
from nanosport.judge import Judge, accuracy, agreement
from nanosport.load import resolve
from nanosport.log import provenance, write_atomically
from nanosport.reward import format_valid
from nanosport.rollout import Loop, rollout
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
    num_frames: int = 16
    """Uniform frames in mode no-tool."""
    temperature: float = 0.6
    """0.6 and top-p 0.9 are the settings of FrameThinker, the paper's nearest ancestor; 0 is greedy."""
    top_p: float = 0.9
    max_new_tokens: int = 160
    """Of one assistant turn."""
    limit: int | None = None
    """Only the first so many questions."""
    batch_size: int = 32
    """Questions in flight."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1, of a language model that scores open answers; else the F1 of their words does."""
    judge: str = ""
    """Its name there. The key is read from JUDGE_API_KEY; verdicts are kept in out/answers."""
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for values no run can use. Not in __post_init__: tyro would print it as a parse error."""
        cli.at_least(1, num_frames=self.num_frames, batch_size=self.batch_size)
        if self.judge_url and not self.judge:
            raise ValueError("--judge-url needs --judge, the model's name there")
        if not self.modes:
            raise ValueError("--modes: name at least one of tool, no-tool")


def contained(episode: Episode) -> bool:
    """Whether one requested window held the whole event."""
    first, last = episode.question.window
    return any(t.action == "tool" and t.frames and t.window[0] <= first and last <= t.window[1] for t in episode.turns)


def figures(episodes: list[Episode], acc: list[float]) -> dict:
    """Given each episode's score, all rates and means, in percent where they are shares; None where nothing was there to count."""

    def mean(values) -> float | None:
        values = list(values)
        return round(100 * sum(values) / len(values), 2) if values else None

    used = [any(t.action == "tool" and t.frames for t in e.turns) for e in episodes]
    needs = [e.question.needs_tool for e in episodes]
    placed = [e for e, n in zip(episodes, needs) if n and e.question.window]
    return {
        "accuracy": mean(acc),
        **{d: mean(a for a, e in zip(acc, episodes) if e.question.dimension == d) for d in DIMENSIONS},
        "by_sport": {
            s: mean(a for a, e in zip(acc, episodes) if e.question.sport == s) for s in sorted({e.question.sport for e in episodes})
        },
        "accuracy_tool_needed": mean(a for a, n in zip(acc, needs) if n),
        "accuracy_tool_not_needed": mean(a for a, n in zip(acc, needs) if n is False),
        "frames": round(sum(len(e.frames) for e in episodes) / len(episodes), 2),
        "tool_rate": mean(used),
        "tool_rate_needed": mean(u for u, n in zip(used, needs) if n),
        "tool_rate_not_needed": mean(u for u, n in zip(used, needs) if n is False),
        "window_hit_rate": mean(contained(e) for e in placed),
        "format_rate": mean(format_valid(e) for e in episodes),
        "status": dict(Counter(e.status for e in episodes)),
        "questions": len(episodes),
    }


def run_mode(
    cfg: Config, mode: str, engine: Engine, encoder: FrameEncoder, questions: list[Question], judge: Judge | None = None
) -> dict:
    """Figures of one mode, with every episode's outcome."""
    began = time.time()
    loop = Loop() if mode == "tool" else Loop(num_frames=cfg.num_frames, use_tool=False)
    episodes = []
    for start in tqdm(range(0, len(questions), cfg.batch_size), desc=f"eval {mode}", unit="batch"):
        some = questions[start : start + cfg.batch_size]
        episodes += rollout(engine, encoder, some, loop, seed=(cfg.seed,), first=start)
    acc, judged = [accuracy(e.answer, e.question) for e in episodes], {}
    if judge is not None:
        rule, acc = acc, judge.answers([e.answer for e in episodes], [e.question for e in episodes])
        judged = {"judge_and_rule": agreement(rule, acc)}
    outcomes = [
        {
            "id": e.question.id,
            "answer": e.answer,
            "truth": e.question.answer,
            "accuracy": round(score, 3),
            "windows": [t.window for t in e.turns if t.window],
            "status": e.status,
        }
        for e, score in zip(episodes, acc)
    ]
    return {**figures(episodes, acc), **judged, "seconds": round(time.time() - began, 1), "episodes": outcomes}


def table(rows: dict[str, dict]) -> str:
    """The paper's table: a line a row, Markdown."""
    columns = [*DIMENSIONS, "accuracy", "frames", "tool_rate", "tool_rate_needed", "tool_rate_not_needed", "window_hit_rate"]
    heads = [*DIMENSIONS, "overall", "frames", "tool rate", "… needed", "… not needed", "window hit"]
    lines = ["| model | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for name, row in rows.items():
        cells = ["–" if row.get(c) is None else f"{row[c]:.1f}" for c in columns]
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main(cfg: Config) -> None:
    cfg.check()
    if cfg.data == Config.data and not cfg.data.exists():
        arena.main(arena.Config())
    source = resolve(cfg.model)
    encoder, engine = load_engine(source, Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens))
    questions, broken = usable(read_questions(cfg.data)[: cfg.limit], encoder.open)
    for line in broken:
        print(f"left out: {line}")
    if not questions:
        raise ValueError(f"{cfg.data}: none of its videos can be used")
    name = cfg.name or source.name
    judge = Judge(Endpoint(cfg.judge_url, cfg.judge, Path("out/answers"), key_name="JUDGE_API_KEY")) if cfg.judge_url else None
    rows = {}
    for mode in cfg.modes:
        label = name if mode == "tool" else f"{name}, {cfg.num_frames} frames, no tool"
        rows[label] = run_mode(cfg, mode, engine, encoder, questions, judge)
    print(table(rows))
    if cfg.out is not None:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        config = {k: str(v) for k, v in asdict(cfg).items()}
        report = {"rows": rows, "left_out": broken, "config": config, **provenance()}
        write_atomically(cfg.out, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    cli.run(main, Config)
