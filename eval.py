"""The benchmark: accuracy by dimension and sport, how often and how well the tool is used, with and
without it.

    python eval.py                                # the shipped model on the arena's held-out clips
    python eval.py --model out/rl/model --data my/test.jsonl --out results/mine.json
    python eval.py --modes no-tool --num-frames 16
    torchrun --nproc-per-node 8 eval.py --model out/rl/model    # the ranks share the questions

Mode `tool` is the paper's loop from eight overview frames; mode `no-tool` gives the *same* model 16
uniform frames and no tool.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import json
import signal
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

from tqdm import tqdm

from data_prep import arena
from nanosport.cli import Preempted
from nanosport.engine.players import Room, load_sampler
from nanosport.engine.sampler import Sampler, Sampling
from nanosport.env.endpoint import EndpointError
from nanosport.env.env import Limits
from nanosport.env.judge import MAX_UNGRADED, Judge, agreement, judge_of
from nanosport.env.played import Played
from nanosport.env.reward import format_valid, used_tool
from nanosport.env.rollout import rollout
from nanosport.env.scoring import accuracy, temporal_iou
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax
from nanosport.fields import Above, AtLeast, AtMost, Share
from nanosport.files import ASSETS, own_name, provenance, write_atomically
from nanosport.model.folder import hub_commit, resolve, version
from nanosport.model.frames import FrameEncoder
from nanosport.records import DIMENSIONS, Episode, Question, read_records
from nanosport.report import table
from nanosport.train import dist
from nanosport.train.inputs import MAX_UNUSABLE, Records
from nanosport.video import VideoError

Players = tuple[FrameEncoder, Sampler]


@dataclass(frozen=True)
class Config:
    model: str = str(ASSETS / "nano-deepsport")
    """A model folder, or a Hugging Face hub id, of a revision if it ends in @REVISION."""
    data: Path = Path("out/arena/test.jsonl")
    """Questions, one JSON object a line. The default is rendered where it is missing."""
    out: Path | None = None
    """JSON file for the figures and every episode's outcome."""
    modes: tuple[Literal["tool", "no-tool"], ...] = ("tool", "no-tool")
    name: str | None = None
    """Name of the row; the model's by default."""
    num_frames: Annotated[int, AtLeast(1)] = 16
    """Uniform frames in mode no-tool."""
    temperature: Annotated[float, AtLeast(0)] = 0.6
    """0.6 and top-p 0.9 are the settings of FrameThinker, the paper's nearest ancestor; 0 is
    greedy."""
    top_p: Annotated[float, Above(0), AtMost(1)] = 0.9
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    """One assistant turn is cut after so many tokens."""
    max_pixels: Annotated[int | None, AtLeast(1)] = None
    """Larger frames are scaled down to this. None: as the model's preprocessor_config.json says."""
    episode_tokens: Annotated[int, AtLeast(1)] = 16_384
    """A whole episode, frames included, is ended when it reaches so many tokens."""
    max_unusable: Share = MAX_UNUSABLE
    """Questions that cannot be used are left out, up to this share of them."""
    call_syntax: Syntax = TOOL_NAME
    """How the model was taught to call the tool."""
    limit: Annotated[int | None, AtLeast(1)] = None
    """Only the first so many questions are asked."""
    batch_size: Annotated[int, AtLeast(1)] = 32
    """So many questions are played at a time."""
    sampler: Literal["own", "vllm"] = "own"
    """Who samples: this project's sampler, or vLLM's engine in this process (docs/vllm.md)."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1, of a language model that scores open answers;
    else the words that they share do, in order."""
    judge: str = ""
    """The judge's name there. The key is read from JUDGE_API_KEY; verdicts are kept in
    out/answers."""
    judge_wait_s: Annotated[float, AtLeast(0)] = 600.0
    """A judge that is away is waited for so long."""
    max_ungraded: Share = MAX_UNGRADED
    """An answer without a grade is scored by rule and counted; above this share of them the
    evaluation ends, and what was played is kept."""
    seed: Annotated[int, AtLeast(0)] = 0


def looks(episode: Episode) -> list[tuple[int, int]]:
    """The windows that were asked for and shown."""
    return [turn.window for turn in episode.turns if turn.action == "tool" and turn.frames]


def contained(episode: Episode) -> bool:
    """Whether one requested window held the whole event."""
    first, last = episode.question.window
    return any(start <= first and last <= end for start, end in looks(episode))


def overlap(episode: Episode) -> float:
    """Intersection over union, in frames, of the event and the window that fits it best; 0 where
    none was asked for."""
    first, last = episode.question.window
    event = (first, last + 1)
    return max((temporal_iou((a, b + 1), event) for a, b in looks(episode)), default=0.0)


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
    # where nobody knows whether a look is needed, a known event is to be looked at all the same
    placed = [e for e, n in zip(episodes, needs) if n is not False and e.question.window]

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
        "window_iou": mean_percent(overlap(e) for e in placed),
        "format_rate": mean_percent(format_valid(e) for e in episodes),
        "status": dict(Counter(e.status for e in episodes)),
        "questions": len(episodes),
    }


def outcome(episode: Episode, score: float) -> dict:
    """What the report keeps of an episode, with the first turn that broke the format."""
    broken = next((turn for turn in episode.turns if turn.error), None)
    return {
        "id": episode.question.id,
        "answer": episode.answer,
        "truth": episode.question.answer,
        "accuracy": round(score, 3),
        "windows": [turn.window for turn in episode.turns if turn.window],
        "status": episode.status,
        **({"error": broken.error, "text": broken.text} if broken else {}),
    }


def limits_of(cfg: Config, mode: str) -> Limits:
    """What an episode of a mode is given."""
    if mode == "tool":
        return Limits(max_tokens=cfg.episode_tokens, syntax=cfg.call_syntax)
    return Limits(cfg.num_frames, max_tokens=cfg.episode_tokens, use_tool=False)


def play(
    cfg: Config, mode: str, players: Players, questions: Sequence[Question], first: int
) -> list[Episode | None]:
    """The episodes of neighbouring questions, the first of which has this number; None where the
    video is lost meanwhile."""
    encoder, sampler = players
    try:
        limits = limits_of(cfg, mode)
        return rollout(sampler, encoder, questions, limits, seed=(cfg.seed,), first=first)
    except VideoError:  # the others are played as if it had not happened
        if len(questions) == 1:
            return [None]
        one_by_one = (play(cfg, mode, players, [q], first + k) for k, q in enumerate(questions))
        return [episode for (episode,) in one_by_one]


def run_mode(
    cfg: Config, mode: str, players: Players, played: Played, rank: int, judge: Judge | None
) -> dict:
    """Figures of one mode, with every episode's outcome. The ranks share the questions."""
    began, mine = time.time(), dist.share(range(len(played.questions)), rank)
    starts = range(0, len(mine), cfg.batch_size)
    for start in tqdm(starts, desc=f"eval {mode}", unit="batch", disable=rank > 0):
        numbers = mine[start : start + cfg.batch_size]
        if (mode, numbers[0]) not in played.episodes:
            batch = [played.questions[number] for number in numbers]
            played.add(mode, numbers[0], play(cfg, mode, players, batch, numbers[0]))
    episodes = [played.episodes[mode, number] for number in mine]
    lost = [played.questions[k].id for k, e in zip(mine, episodes) if e is None]
    episodes = [episode for episode in episodes if episode is not None]

    by_rule = grades = [accuracy(e.answer, e.question) for e in episodes]
    if judge is not None:
        grades = judge.answers([e.answer for e in episodes], [e.question for e in episodes])
    scored, _ = dist.gather_items(list(zip(episodes, grades, by_rule)))
    lost, _ = dist.gather_items(lost)
    if not scored:
        raise ValueError(f"{cfg.data}: every video is lost; is the disk there?")
    episodes, grades, by_rule = map(list, zip(*scored))
    scores = [rule if grade is None else grade for grade, rule in zip(grades, by_rule)]
    more = {"lost": lost} if lost else {}
    if judge is not None:
        more["ungraded"] = grades.count(None)
        if graded := [pair for pair in zip(by_rule, grades) if pair[1] is not None]:
            more["judge_and_rule"] = agreement(*zip(*graded))
    outcomes = [outcome(episode, score) for episode, score in zip(episodes, scores)]
    seconds = round(time.time() - began, 1)
    return {**figures(episodes, scores), **more, "seconds": seconds, "episodes": outcomes}


@contextmanager
def keeping(played: Played):
    """Say where what was played lies, if an evaluation does not come to its end."""
    kept = f"what was played is kept in {played.path}, and the same command goes on from there"
    signals = []

    def stop(number, _) -> None:
        signals.append(number)
        raise KeyboardInterrupt  # which no `except Exception` takes

    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    except KeyboardInterrupt:
        kept = kept if played.path.exists() else "nothing is played yet"
        if signals:
            raise Preempted(f"stopped by SIGTERM; {kept}") from None
        raise KeyboardInterrupt(kept) from None
    except EndpointError as error:
        raise ValueError(f"{error}; {kept}") from error
    finally:
        signal.signal(signal.SIGTERM, before)


def open_played(cfg: Config, source: Path, questions: list[Question], rank: int) -> Played:
    """What an evaluation of the same model, questions and flags has played before it was
    stopped."""
    # these change no episode
    others = ("out", "name", "judge_url", "judge", "judge_wait_s", "max_ungraded", "max_unusable")
    made_by = {k: str(v) for k, v in asdict(cfg).items() if k not in others}
    made_by |= {k: v for k, v in provenance().items() if k in ("commit", "torch", "device")}
    made_by |= {"weights": version(source), "questions": [*map(repr, questions)]}
    made_by["processes"] = cli.num_processes()
    beside = cfg.out if cfg.out and own_name(cfg.out) else Path("out/eval.json")
    played = Played(beside, made_by, questions, rank)
    if played.episodes and rank == 0:
        print(f"{len(played.episodes)} episodes are played already: going on from {played.path}")
    return played


def show(rows: dict[str, dict], examples: int = 3) -> None:
    """Print the table, and some turns that broke the format."""
    print(table(rows))
    for label, row in rows.items():
        for one in [one for one in row["episodes"] if "error" in one][:examples]:
            said = " ".join(one["text"].split())[:300]
            print(f"{label}: {one['id']}: {one['error']}: {said}")


def make_default_data() -> None:
    """Render the arena, where it is missing."""
    if not Config.data.exists():
        arena.main(arena.Config())


def main(cfg: Config) -> None:
    cli.check(cfg)
    if not cfg.modes:
        raise ValueError("--modes: name at least one of tool, no-tool")
    rank = dist.start()[0] if cli.num_processes() > 1 else 0
    limits = {"max_ungraded": cfg.max_ungraded, "wait_s": cfg.judge_wait_s}
    judge = judge_of(cfg.judge_url, cfg.judge, Path("out/answers"), **limits)
    if cfg.data == Config.data:
        dist.once(make_default_data)
    rows = read_records(cfg.data)
    if cfg.out is not None:
        cli.not_the_input(cfg.out, cfg.data, cfg.model, *{question.video for question, _ in rows})
    source = resolve(cfg.model)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS)
    room = Room(cfg.episode_tokens + cfg.max_new_tokens, cfg.batch_size)
    players = load_sampler(source, sampling, cfg.max_pixels, cfg.sampler, room)
    encoder, sampler = players
    records = Records(cfg.data, rows[: cfg.limit], encoder)
    limits = [limits_of(cfg, mode) for mode in cfg.modes]
    left_out = records.check_prompts(sampler.tokenizer, limits, cfg.max_unusable, rank)

    name, rows = cfg.name or source.name, {}
    played = open_played(cfg, source, records.questions, rank)
    with keeping(played):
        for mode in cfg.modes:
            label = name if mode == "tool" else f"{name}, {cfg.num_frames} frames, no tool"
            rows[label] = run_mode(cfg, mode, players, played, rank, judge)

    # written first: a terminal may be gone
    if cfg.out is not None and rank == 0:
        cfg.out.parent.mkdir(parents=True, exist_ok=True)
        config = {k: str(v) for k, v in asdict(cfg).items()}
        report = {"rows": rows, "left_out": left_out, "config": config, **provenance()}
        report["model_commit"] = hub_commit(source)
        write_atomically(cfg.out, json.dumps(report, indent=1) + "\n")
    dist.barrier()
    played.remove()
    if rank == 0:
        show(rows)


if __name__ == "__main__":
    cli.run(main, Config)
