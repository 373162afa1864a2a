"""The benchmark: accuracy by dimension and sport, how often and how well the tool is used, with and
without it.

    python eval.py                                # the shipped model on the arena's held-out clips
    python eval.py --model out/rl/model --data my/test.jsonl --out results/mine.json
    python eval.py --modes no-tool --num-frames 16
    python eval.py --seeds 0 1 2 --against out/sft_eval.json    # a paired test against a report
    torchrun --nproc-per-node 8 eval.py --model out/rl/model    # the ranks share the questions

Mode `tool` is the paper's loop from eight overview frames; mode `no-tool` gives the *same* model 16
uniform frames and no tool.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

import json
import signal
import sys
import time
from collections.abc import Sequence
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
from nanosport.env.figures import compared, figures, outcome, published, row_named, table
from nanosport.env.judge import MAX_UNGRADED, Judge, agreement, graded, judge_of
from nanosport.env.played import Played
from nanosport.env.rollout import rollout
from nanosport.env.scoring import accuracy
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax
from nanosport.fields import Above, AtLeast, AtMost, Share
from nanosport.files import ASSETS, is_own_file, provenance, write_atomically
from nanosport.model.folder import hub_commit, resolve, version
from nanosport.model.frames import FrameEncoder
from nanosport.records import Episode, Question, read_records
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
    seeds: Annotated[tuple[int, ...], AtLeast(0)] = (0,)
    """Every question is asked once with each; the figures are over all of them."""
    samples: Annotated[int, AtLeast(1)] = 1
    """So many answers to a question with each seed. With several answers the report has pass@k, and
    the score of the answer that is given most often."""
    against: str | None = None
    """The row that each is compared with, on the questions that both were asked: mode tool or
    no-tool of this evaluation, or REPORT or REPORT:ROW of another one (the test is paired)."""
    lines: Path | None = None
    """JSON lines for the outcome of every episode, with its row."""
    table: Literal["markdown", "latex"] = "markdown"
    """How the figures are printed."""
    published: bool = False
    """Print the paper's own rows beside: other questions, another judge."""


def limits_of(cfg: Config, mode: str) -> Limits:
    """What an episode of a mode is given."""
    if mode == "tool":
        return Limits(max_tokens=cfg.episode_tokens, syntax=cfg.call_syntax)
    return Limits(cfg.num_frames, max_tokens=cfg.episode_tokens, use_tool=False)


def play(
    cfg: Config, mode: str, players: Players, played: Played, places: Sequence[int], bar: tqdm
) -> None:
    """Play those of a seed's questions that lack an answer, each one's samples side by side, and
    keep each episode as it ends; None where its video is lost meanwhile. places: of their first
    samples in `played`."""
    (encoder, sampler), size = players, len(played.questions) // len(cfg.seeds)
    samples = range(cfg.samples)
    places = [p for p in places if any((mode, p + k) not in played.episodes for k in samples)]
    if not places:
        return
    seed = (cfg.seeds[places[0] // size],)
    numbers = [place % size // cfg.samples for place in places]

    def keep(k: int, episode: Episode | None) -> None:
        place = places[k // cfg.samples] + k % cfg.samples
        if (mode, place) not in played.episodes:  # else another sample of its question was lacking
            played.add(mode, place, episode)
            bar.update()

    try:
        asked, limits = [played.questions[place] for place in places], limits_of(cfg, mode)
        rollout(sampler, encoder, asked, limits, cfg.samples, seed, numbers, on_end=keep)
    except VideoError:
        if len(places) > 1:  # the others are played as if it had not happened
            for place in places:
                play(cfg, mode, players, played, [place], bar)
        else:
            for k in samples:
                keep(k, None)


def play_all(cfg: Config, mode: str, players: Players, played: Played, rank: int) -> list[int]:
    """Play this rank's questions, as far as they are not played already; returns the places of
    their episodes in `played`, where a seed comes after the other."""
    size = len(played.questions) // len(cfg.seeds)
    mine = [number * cfg.samples for number in dist.share(range(size // cfg.samples), rank)]
    firsts = [[s * size + first for first in mine] for s in range(len(cfg.seeds))]
    places = [first + k for its in firsts for first in its for k in range(cfg.samples)]
    lacking = sum((mode, place) not in played.episodes for place in places)
    with tqdm(total=lacking, desc=f"eval {mode}", unit="episode", disable=rank > 0) as bar:
        for its in firsts:
            for k in range(0, len(its), cfg.batch_size):
                play(cfg, mode, players, played, its[k : k + cfg.batch_size], bar)
    return places


def run_mode(
    cfg: Config, mode: str, players: Players, played: Played, rank: int, judge: Judge | None
) -> dict:
    """Figures of one mode, with every episode's outcome. The ranks share the questions."""
    began, known = time.time(), {place for its, place in played.episodes if its == mode}
    places = play_all(cfg, mode, players, played, rank)
    new, _ = dist.gather_items([place for place in places if place not in known])
    lost = [played.questions[k].id for k in places if played.episodes[mode, k] is None]
    # none of their other answers counts: what was answered without a look would be left
    places = [place for place in places if played.questions[place].id not in lost]
    episodes = [played.episodes[mode, place] for place in places]

    scored, _ = dist.gather_items(list(zip(places, episodes, *graded(episodes, judge))))
    lost, _ = dist.gather_items(lost)
    if not scored:
        raise ValueError(f"{cfg.data}: every video is lost; is the disk there?")
    scored.sort(key=lambda one: one[0])  # as one process has played them
    places, episodes, scores, grades = map(list, zip(*scored))

    size = len(played.questions) // len(cfg.seeds)
    more: dict = {"lost": [*dict.fromkeys(lost)]} if lost else {}
    if judge is not None:
        more["ungraded"] = grades.count(None)
        by_rule = [accuracy(e.answer, e.question) for e in episodes]
        if pairs := [pair for pair in zip(by_rule, grades) if pair[1] is not None]:
            more["judge_and_rule"] = agreement(*zip(*pairs))
    if len(cfg.seeds) > 1:
        by_seed = [[] for _ in cfg.seeds]
        for place, score in zip(places, scores):
            by_seed[place // size].append(score)
        means = [round(100 * sum(t) / len(t), 2) if t else None for t in by_seed]
        more["by_seed"] = dict(zip(map(str, cfg.seeds), means))
    seconds = time.time() - began
    more["seconds"] = round(seconds, 1)
    if new:  # else there is nothing that these seconds were for
        more["seconds_per_question"] = round(seconds / len(new), 3)
    outcomes = [
        outcome(episode, score) | {"seed": cfg.seeds[place // size], "sample": place % cfg.samples}
        for place, episode, score in zip(places, episodes, scores)
    ]
    return {**figures(episodes, scores), **more, "episodes": outcomes}


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
    others = "out name judge_url judge judge_wait_s max_ungraded max_unusable against lines table"
    others = (*others.split(), "published")
    made_by = {k: str(v) for k, v in asdict(cfg).items() if k not in others}
    made_by |= {k: v for k, v in provenance().items() if k in ("commit", "torch", "device")}
    made_by |= {"weights": version(source), "questions": [*map(repr, questions)]}
    made_by["processes"] = cli.num_processes()
    beside = cfg.out if cfg.out and is_own_file(cfg.out) else Path("out/eval.json")
    asked = [q for _ in cfg.seeds for q in questions for _ in range(cfg.samples)]
    played = Played(beside, made_by, asked, rank)
    if played.episodes and rank == 0:
        print(f"{len(played.episodes)} episodes are played already: going on from {played.path}")
    return played


def compare(rows: dict[str, dict], label: str, other: dict) -> None:
    """Say in each row how it differs from another one."""
    for row in rows.values():
        if row is not other:
            row["against"] = compared(row, label, other)


def write(cfg: Config, report: dict) -> None:
    """Write the report, with how it was made, and the lines."""
    config = {key: str(value) for key, value in asdict(cfg).items()}
    report = {**report, "config": config, **provenance()}
    lines = "".join(
        json.dumps({"row": label, **one}) + "\n"
        for label, row in report["rows"].items()
        for one in row["episodes"]
    )
    for path, text in ((cfg.lines, lines), (cfg.out, json.dumps(report, indent=1) + "\n")):
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, text)


def show(cfg: Config, rows: dict[str, dict], examples: int = 3) -> None:
    """Print the table, and some turns that broke the format."""
    print(table(rows | (published() if cfg.published else {}), cfg.table))
    to = sys.stderr if cfg.table == "latex" else sys.stdout  # a paper takes the table alone
    for label, row in rows.items():
        for one in [one for one in row["episodes"] if "error" in one][:examples]:
            said = " ".join(one["text"].split())[:300]
            print(f"{label}: {one['id']}: {one['error']}: {said}", file=to)


def main(cfg: Config) -> None:
    cli.check(cfg)
    for flag, values in (("--modes", cfg.modes), ("--seeds", cfg.seeds)):
        if not values or len({*values}) < len(values):
            raise ValueError(f"{flag}: name at least one, and each once")
    rank = dist.start()[0] if cli.num_processes() > 1 else 0
    limits = {"max_ungraded": cfg.max_ungraded, "wait_s": cfg.judge_wait_s}
    judge = judge_of(cfg.judge_url, cfg.judge, Path("out/answers"), **limits)
    if cfg.data == Config.data:
        dist.once(lambda: cfg.data.exists() or arena.main(arena.Config()))
    rows = read_records(cfg.data)
    videos = {question.video for question, _ in rows}
    for flag, path in (("--out", cfg.out), ("--lines", cfg.lines)):
        if path is not None:
            cli.not_the_input(path, cfg.data, cfg.model, *videos, flag=flag)
    source = resolve(cfg.model)
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS)
    room = Room(cfg.episode_tokens + cfg.max_new_tokens, cfg.batch_size * cfg.samples)
    players = load_sampler(source, sampling, cfg.max_pixels, cfg.sampler, room)
    encoder, sampler = players
    records = Records(cfg.data, rows[: cfg.limit], encoder)
    limits = [limits_of(cfg, mode) for mode in cfg.modes]
    left_out = records.check_prompts(sampler.tokenizer, limits, cfg.max_unusable, rank)

    other, is_mode = ("", {}), cfg.against in cfg.modes
    if cfg.against and not is_mode:  # before anything is played in vain
        other = row_named(cfg.against, records.questions)

    name, rows = cfg.name or source.name, {}
    played = open_played(cfg, source, records.questions, rank)
    with keeping(played):
        for mode in cfg.modes:
            label = name if mode == "tool" else f"{name}, {cfg.num_frames} frames, no tool"
            rows[label] = run_mode(cfg, mode, players, played, rank, judge)

    # written first: a terminal may be gone
    if cfg.against:
        compare(rows, *(list(rows.items())[cfg.modes.index(cfg.against)] if is_mode else other))
    if rank == 0:
        report = {"rows": rows, "left_out": left_out, "model_commit": hub_commit(source)}
        write(cfg, report)
    dist.barrier()
    played.remove()
    if rank == 0:
        show(cfg, rows)


if __name__ == "__main__":
    cli.run(main, Config)
