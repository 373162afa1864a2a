"""Distillation: a teacher plays the environment with the real tool, and what passes every filter becomes SFT data.

    python -m data_prep.distill records.jsonl --url http://localhost:8000/v1 --teacher qwen3-vl --out out/trajectories.jsonl
    python -m data_prep.distill records.jsonl --teacher assets/nano-deepsport --out out/trajectories.jsonl   # a local checkpoint
    python train.py --data out/trajectories.jsonl

With --url the teacher is served behind an OpenAI-compatible endpoint and sees the frames as JPEGs; without it, --teacher is a
model folder or hub id and plays through the project's own engine. Either way its answers lie on disk, in the folder OUT.answers,
before they count: a run that was killed is started again with the same command and asks for nothing twice.

A trajectory is kept if its format is valid, its answer right, its reasoning consistent with the windows it asked for and not
over-long, and, with --judge-url, its reasoning graded well enough.
"""

import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nanosport import cli, prompt
from nanosport.endpoint import Endpoint, Refused, image_part
from nanosport.engine import Sampling, load_engine
from nanosport.episode import Episode, Question, Turn, check_text, read_questions, record_row
from nanosport.judge import Judge, NoGrade, accuracy
from nanosport.load import resolve, version
from nanosport.log import provenance, write_atomically
from nanosport.reward import format_valid
from nanosport.rollout import Loop, act, rollout
from nanosport.tools import STOPS, split_think
from nanosport.video import Video, VideoError

REFUSED = "refused by the endpoint"


@dataclass(frozen=True)
class Config:
    data: Annotated[Path, tyro.conf.Positional]
    """Records, one JSON object a line."""
    teacher: str
    """The model's name at the endpoint; without --url a model folder or hub id."""
    out: Path = Path("out/trajectories.jsonl")
    """Trajectories for train.py; OUT.json beside it holds the counts, OUT.answers every answer of teacher and judge."""
    url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1. The key is read from OPENAI_API_KEY."""
    samples: int = 4
    """Episodes a question."""
    keep: int = 1
    """Of those that pass, at most so many a question."""
    temperature: float = 0.7
    max_new_tokens: int = 2048
    """Of one turn."""
    max_turns: int = 5
    min_accuracy: float = 0.5
    """A right answer scores at least this, by rule or, open ones, by the judge."""
    max_words: int = 400
    """Of the reasoning of one turn."""
    judge_url: str | None = None
    judge: str = ""
    """The judge's name at its endpoint. The key is read from JUDGE_API_KEY."""
    min_grade: float = 0.75
    """The judge's grade of the reasoning."""
    workers: int = 8
    """Questions at a time; the samples of one follow each other."""
    per_minute: float = 0.0
    """Requests a minute at most, to each endpoint; 0 for no limit."""
    timeout_s: float = 300.0
    price_in: float = 0.0
    """Of a million prompt tokens of the teacher, for the tally of costs."""
    price_out: float = 0.0
    seed: int = 0

    def check(self) -> None:
        """Raise ValueError for values no run can use."""
        cli.at_least(
            1, samples=self.samples, keep=self.keep, max_turns=self.max_turns, workers=self.workers, max_words=self.max_words
        )
        if self.judge_url and not self.judge:
            raise ValueError("--judge-url needs --judge, the model's name there")


def play(question: Question, endpoint: Endpoint, loop: Loop, cfg: Config) -> Iterator[Episode]:
    """Episodes of a teacher behind an endpoint: the text and the rules of a rollout, the frames as pictures."""
    video = Video(question.video, span_s=question.span_s)
    overview = video.sample(loop.num_frames)
    asked = prompt.question_text(question, video.num_frames, video.fps)
    opening = [
        {"role": "system", "content": prompt.SYSTEM},
        {"role": "user", "content": [*pictures(video, overview), {"type": "text", "text": asked}]},
    ]
    for sample in range(cfg.samples):
        messages, frames, turns, status = list(opening), list(overview), [], None
        while status is None:
            try:
                reply = endpoint.chat(
                    messages, sample, temperature=cfg.temperature, max_tokens=cfg.max_new_tokens, stop=list(STOPS)
                )
            except Refused:
                status, answer = REFUSED, None
                break
            text = closed(reply.text)
            cut = Turn(text, "invalid", error=f"no action within {cfg.max_new_tokens} tokens")
            turn, status, answer = act(text, turns, video, loop) if reply.finished else (cut, "out_of_tokens", None)
            turns.append(turn)
            frames += turn.frames
            shown = pictures(video, turn.frames) or [{"type": "text", "text": f"error: {turn.error}\n"}]
            content = [{"type": "text", "text": "<tool_response>\n"}, *shown, {"type": "text", "text": "</tool_response>"}]
            messages += [{"role": "assistant", "content": text}, {"role": "user", "content": content}]
        yield Episode(question, (), (), (), tuple(frames), tuple(turns), status, answer)


def pictures(video: Video, indices: Sequence[int]) -> list[dict]:
    """Each frame after its label."""
    parts = []
    for index, frame_CHW in zip(indices, video.frames(indices)):
        parts += [{"type": "text", "text": f"frame {index}:"}, image_part(frame_CHW)]
    return parts


def closed(text: str) -> str:
    """The turn as the engine would have stopped it: up to its first closing tag, which an endpoint cuts off."""
    ends = [text.index(stop) + len(stop) for stop in STOPS if stop in text]
    if ends:
        return text[: min(ends)]
    for stop in STOPS:
        if stop.replace("/", "") in text:
            return text.rstrip() + stop
    return text


class LocalTeacher:
    """A checkpoint that plays through the engine; the texts of its turns are kept on disk, question by question."""

    def __init__(self, cfg: Config, cache: Path):
        sampling = Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens)
        folder = resolve(cfg.teacher)
        self.encoder, self.engine, self.version = *load_engine(folder, sampling), version(folder)
        self.cfg, self.cache, self.lock = cfg, cache, threading.Lock()

    def episodes(self, question: Question, loop: Loop) -> list[Episode]:
        cfg = self.cfg
        limits = cfg.samples, cfg.temperature, cfg.max_new_tokens, cfg.max_turns, cfg.seed
        asked = [cfg.teacher, self.version, asdict(question), *limits]
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        path = self.cache / name[:2] / f"{name}.json"
        if path.exists():
            return [again(question, loop, *row) for row in json.loads(path.read_text())]
        with self.lock:  # one engine
            stream = int(name[:8], 16)  # its own, whatever the order of the questions
            found = rollout(self.engine, self.encoder, [question], loop, cfg.samples, (cfg.seed, stream))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps([[e.status, [t.text for t in e.turns]] for e in found]))
        return found


def again(question: Question, loop: Loop, status: str, texts: Sequence[str]) -> Episode:
    """The episode of known turns: the environment gives the same frames as it gave then."""
    video, turns, answer = Video(question.video, span_s=question.span_s), [], None
    for text in texts:
        turn, _, answer = act(text, turns, video, loop)
        turns.append(turn)
    frames = (*video.sample(loop.num_frames), *(i for t in turns for i in t.frames))
    return Episode(question, (), (), (), frames, tuple(turns), status, answer)


FRAME = re.compile(r"\bframes?\s+(\d+)(?:\s*(?:-|–|to|and)\s*(\d+))?|\bbetween\s+(\d+)\s+and\s+(\d+)", re.IGNORECASE)


def cited(text: str) -> set[int]:
    """Frame indices that a reasoning names: "frame 12", "frames 12 to 40", "between 12 and 40"."""
    return {int(n) for found in FRAME.findall(text) for n in found if n}


def consistent(episode: Episode) -> bool:
    """A call asks where its reasoning points: a frame it names, if it names any, lies in the window. An answer speaks of frames
    that were shown."""
    for turn in episode.turns:
        named = cited(split_think(turn.text)[0])
        if turn.action == "tool" and named and not any(turn.window[0] <= n <= turn.window[1] for n in named):
            return False
        if turn.action == "answer" and not named <= set(episode.frames):
            return False
    return True


def fault(episode: Episode, cfg: Config, judge: Judge | None) -> str | None:
    """The first filter an episode fails; the dear one, the judge's, is asked last."""
    texts = [t.text for t in episode.turns]
    if episode.status == REFUSED:
        return REFUSED
    if not format_valid(episode):
        return "format"
    try:
        [check_text(text) for text in texts]
    except ValueError:
        return "format"
    if max(len(split_think(text)[0].split()) for text in texts) > cfg.max_words:
        return "over-long reasoning"
    if not consistent(episode):
        return "reasoning against its windows"
    asked = episode.answer, episode.question
    try:
        if (accuracy(*asked) if judge is None else judge.answer(*asked)) < cfg.min_accuracy:
            return "wrong answer"
        if judge is not None and judge.reasoning(episode.question, texts) < cfg.min_grade:
            return "grade of the reasoning"
    except (NoGrade, Refused):
        return "no grade from the judge"
    return None


def results(cfg: Config, questions: list[Question], judge: Judge | None, endpoint: Endpoint | None, cache: Path) -> Iterator:
    """(question number, sample, fault or None, texts of the turns), as they come."""
    loop = Loop(max_turns=cfg.max_turns)
    local = None if endpoint else LocalTeacher(cfg, cache)

    def work(k: int) -> list:
        try:
            found = local.episodes(questions[k], loop) if local else play(questions[k], endpoint, loop, cfg)
            return [(k, n, fault(e, cfg, judge), [t.text for t in e.turns]) for n, e in enumerate(found)]
        except VideoError:
            return [(k, n, "unusable video", []) for n in range(cfg.samples)]

    pool = ThreadPoolExecutor(cfg.workers)
    try:
        for rows in pool.map(work, range(len(questions))):
            yield from rows
    finally:
        for asked in (endpoint, judge and judge.endpoint):
            if asked:
                asked.close()  # questions at work end with the request that is under way
        pool.shutdown(cancel_futures=True)


def main(cfg: Config) -> None:
    cfg.check()
    cli.not_the_input(cfg.out, cfg.data)
    questions = read_questions(cfg.data)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    cache = cfg.out.with_name(cfg.out.name + ".answers")
    limits = {"timeout_s": cfg.timeout_s, "per_minute": cfg.per_minute}
    endpoint = Endpoint(cfg.url, cfg.teacher, cache, price_in=cfg.price_in, price_out=cfg.price_out, **limits) if cfg.url else None
    judge = Judge(Endpoint(cfg.judge_url, cfg.judge, cache, key_name="JUDGE_API_KEY", **limits)) if cfg.judge_url else None
    faults, passed = Counter(), {}
    bar = tqdm(results(cfg, questions, judge, endpoint, cache), total=len(questions) * cfg.samples, desc="distil", unit="episode")
    for k, n, why, texts in bar:
        faults[why or "passed"] += 1
        if why is None:
            passed.setdefault(k, {})[n] = texts
        cost = f"{endpoint.cost:.2f}" if endpoint and endpoint.cost else None
        bar.set_postfix(passed=faults["passed"], **({"cost": cost} if cost else {}))
    rows = []
    for k in sorted(passed):
        record = record_row(questions[k], cfg.out.parent)
        rows += [json.dumps({"question": record, "messages": passed[k][n]}) for n in sorted(passed[k])[: cfg.keep]]
    episodes = sum(faults.values())
    tally = {
        name: {**e.tally, "cost": round(e.cost, 4)} for name, e in (("teacher", endpoint), ("judge", judge and judge.endpoint)) if e
    }
    report = {
        "questions": len(questions),
        "solved": len(passed),
        "trajectories": len(rows),
        "episodes": dict(faults),
        "endpoints": tally,
    }
    settings = {k: str(v) for k, v in asdict(cfg).items()}
    write_atomically(
        cfg.out.with_name(cfg.out.name + ".json"), json.dumps({**report, "config": settings, **provenance()}, indent=1) + "\n"
    )
    for why, count in faults.most_common():
        print(f"{count:8} of {episodes} episodes: {why}")
    if not rows:
        raise ValueError(f"no episode of {cfg.teacher} passed the filters: nothing is written; see the counts above")
    write_atomically(cfg.out, "\n".join(rows) + "\n")
    print(f"{len(rows)} trajectories of {len(passed)} questions in {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config)
