"""Distillation: a teacher plays the environment with the real tool, and what passes every filter
becomes SFT data.

    python -m data_prep.distill records.jsonl --url http://localhost:8000/v1 --teacher qwen3-vl
    python -m data_prep.distill records.jsonl --teacher assets/nano-deepsport    # a local model
    python train.py --data out/trajectories.jsonl

With --url the teacher is served behind an OpenAI-compatible endpoint and sees the frames as JPEGs;
without it, --teacher is a model folder or hub id and plays through the project's own engine. Either
way its answers lie on disk, in the folder OUT.answers, before they count: a run that was killed is
started again with the same command and asks for nothing twice.

A trajectory is kept if its format is valid, its answer right, its reasoning consistent with the
windows it asked for and not over-long, and, with --judge-url, its reasoning graded well enough.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, dataclass
from itertools import groupby
from pathlib import Path
from typing import Annotated, Literal

import tyro
from tqdm import tqdm

from nanosport import cli
from nanosport.engine.sampler import Sampling
from nanosport.env import prompt
from nanosport.env.endpoint import Endpoint, EndpointError, Refused
from nanosport.env.env import Env, Limits
from nanosport.env.judge import MAX_UNGRADED, Judge, NoGrade, graded, judge_of
from nanosport.env.reward import format_valid
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS, TOOL_NAME, Syntax, split_think
from nanosport.fields import Above, AtLeast, AtMost, Share
from nanosport.files import provenance, write_atomically
from nanosport.image import encode_jpeg
from nanosport.records import Episode, Question, Turn, check_text, read_questions, record_row
from nanosport.video import Video, VideoError

REFUSED = "refused by the endpoint"
FIRST_REFUSED = 3
"""Where so many requests are refused before one is answered, the others would be too."""
PICTURES = re.compile(r"at most (\d+) (?:image|picture|multimodal)", re.IGNORECASE)


@dataclass(frozen=True)
class Config:
    data: Annotated[Path, tyro.conf.Positional]
    """Records, one JSON object a line."""
    teacher: str
    """The model's name at the endpoint; without --url a model folder or hub id."""
    out: Path = Path("out/trajectories.jsonl")
    """Trajectories for train.py; OUT.json beside it holds the counts, OUT.answers every answer of
    teacher and judge."""
    url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1. The key is read from OPENAI_API_KEY."""
    samples: Annotated[int, AtLeast(1)] = 4
    """Episodes a question."""
    keep: Annotated[int, AtLeast(1)] = 1
    """Of those that pass, at most so many a question."""
    temperature: Annotated[float, AtLeast(0)] = 0.7
    max_new_tokens: Annotated[int, AtLeast(1)] = 2048
    """Of one turn."""
    sampler: Literal["own", "vllm"] = "own"
    """Who samples a local teacher's turns: this project's sampler, or vLLM (docs/vllm.md)."""
    max_turns: Annotated[int, AtLeast(1)] = 5
    min_accuracy: Share = 0.5
    """A right answer scores at least this, by rule or, open ones, by the judge."""
    max_words: Annotated[int, AtLeast(1)] = 400
    """Of the reasoning of one turn."""
    judge_url: str | None = None
    judge: str = ""
    """The judge's name at its endpoint. The key is read from JUDGE_API_KEY."""
    min_grade: Share = 0.75
    """The judge's grade of the reasoning."""
    max_ungraded: Share = MAX_UNGRADED
    """An answer without a grade is scored by rule, reasoning without one is left out, and both are
    counted; above this share of them the run ends."""
    call_syntax: Syntax = TOOL_NAME
    """How the teacher is told to call the tool."""
    workers: Annotated[int, AtLeast(1), AtMost(1024)] = 8
    """Questions at a time; the samples of one follow each other."""
    per_minute: Annotated[float, AtLeast(0)] = 0.0
    """Requests a minute at most, to each endpoint; 0 for no limit."""
    timeout_s: Annotated[float, Above(0), AtMost(86_400)] = 300.0
    wait_s: Annotated[float, AtLeast(0)] = 600.0
    """A service that is away is waited for so long."""
    price_in: Annotated[float, AtLeast(0)] = 0.0
    """Of a million prompt tokens of the teacher, for the tally of costs."""
    price_out: Annotated[float, AtLeast(0)] = 0.0
    seed: Annotated[int, AtLeast(0)] = 0


def play(question: Question, endpoint: Endpoint, limits: Limits, cfg: Config) -> Iterator[Episode]:
    """Episodes of a teacher behind an endpoint: the text and the rules of a rollout, the frames as
    pictures."""
    video = Video(question.video, span_s=question.span_s)
    first = opening(Env(question, video, limits))
    options = {"temperature": cfg.temperature, "max_tokens": cfg.max_new_tokens}
    options["stop"] = list(STOPS)
    for sample in range(cfg.samples):
        env, messages = Env(question, video, limits), list(first)
        while env.status is None:
            try:
                reply = endpoint.chat(messages, sample, **options)
            except Refused as error:
                check_refusal(error, endpoint, limits)
                env.end(REFUSED)
                break
            text = close_tag(reply.text)
            turn = env.step(text, cut=None if reply.finished else cfg.max_new_tokens)
            messages += answer_messages(text, turn, env)
        yield env.episode()


def check_refusal(error: Refused, endpoint: Endpoint, limits: Limits) -> None:
    """Raise EndpointError where a refusal means that the whole run is of no use."""
    most = limits.num_frames + limits.frames_per_call * (limits.max_turns - 1)
    if found := PICTURES.search(str(error)):
        fix = f"an episode shows up to {most}: let it take as many (vLLM: --limit-mm-per-prompt)"
        raise EndpointError(f"{error}; it takes {found[1]} pictures, {fix}, or lower --max-turns")
    tally = endpoint.tally
    if tally["refused"] >= FIRST_REFUSED and not tally["calls"] + tally["cached"]:
        raise EndpointError(f"{error}; the first {tally['refused']} requests were all refused")


def opening(env: Env) -> list[dict]:
    """The messages before the first turn: what a rollout's prompt says, token for token."""
    asked = prompt.question_text(env.question, env.video.num_frames, env.fps)
    return [
        {"role": "system", "content": prompt.system(syntax=env.limits.syntax)},
        {"role": "user", "content": pictures(env, env.overview, "", asked)},
    ]


def same_prompt(env: Env, endpoint: Endpoint) -> bool | None:
    """Whether the server makes the rollout's tokens of the teacher's first messages, a picture's
    placeholders counted as one; None where it does not show its tokens."""
    text = prompt.opening_of(env, 1)
    said = endpoint.tokens(messages=opening(env), add_generation_prompt=True)
    meant = endpoint.tokens(prompt=text, add_special_tokens=False)
    if said is None or meant is None:
        return None
    return [token for token, _ in groupby(said)] == [token for token, _ in groupby(meant)]


def answer_messages(text: str, turn: Turn, env: Env) -> list[dict]:
    """A turn as a message, and what comes back for it as the next."""
    error = "" if turn.frames else f"error: {turn.error}\n"
    shown = pictures(env, turn.frames, f"<tool_response>\n{error}", "</tool_response>")
    return [{"role": "assistant", "content": text}, {"role": "user", "content": shown}]


def pictures(env: Env, indices: Sequence[int], before: str, after: str) -> list[dict]:
    """Each frame after its label and before a newline, between two texts, as parts of a message: a
    JPEG in a data URL."""
    parts, text = [], before
    for index, frame_CHW in zip(indices, env.video.frames(indices) if indices else ()):
        url = "data:image/jpeg;base64," + base64.b64encode(encode_jpeg(frame_CHW)).decode()
        parts.append({"type": "text", "text": text + prompt.label(index, env.times_s)})
        parts.append({"type": "image_url", "image_url": {"url": url}})
        text = "\n"
    return [*parts, {"type": "text", "text": text + after}]


def close_tag(text: str) -> str:
    """The turn as the sampler would have stopped it: up to its first closing tag, which an endpoint
    cuts off, and with one newline after its thoughts."""
    text = re.sub(r"</think>\s*", "</think>\n", text, count=1)
    ends = [text.index(stop) + len(stop) for stop in STOPS if stop in text]
    if ends:
        return text[: min(ends)]
    for stop in STOPS:
        if stop.replace("/", "") in text:
            return text + stop
    return text


class LocalTeacher:
    """A checkpoint that plays through the project's sampler; the texts of its turns are kept on
    disk, question by question."""

    def __init__(self, cfg: Config, cache: Path):
        # not before it is needed: an endpoint's teacher needs no model here
        from nanosport.engine.players import Room, load_sampler
        from nanosport.model.folder import resolve, version

        sampling = Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens, stops=STOPS)
        folder = resolve(cfg.teacher)
        room = Room(Limits().max_tokens + cfg.max_new_tokens, cfg.samples)
        players = load_sampler(folder, sampling, None, cfg.sampler, room)
        self.encoder, self.sampler = players
        self.version = version(folder)
        self.cfg, self.cache, self.lock = cfg, cache, threading.Lock()

    def episodes(self, question: Question, limits: Limits) -> list[Episode]:
        """Its episodes of a question, from disk where they were played before."""
        cfg = self.cfg
        drawn = cfg.samples, cfg.temperature, cfg.max_new_tokens, cfg.max_turns, cfg.seed
        asked = [cfg.teacher, self.version, asdict(question), *drawn]
        asked += [cfg.sampler] if cfg.sampler != "own" else []  # it draws otherwise
        asked += [cfg.call_syntax] if cfg.call_syntax != TOOL_NAME else []
        name = hashlib.sha256(json.dumps(asked).encode()).hexdigest()
        path = self.cache / name[:2] / f"{name}.json"
        if path.exists():
            return [play_again(question, limits, *row) for row in json.loads(path.read_text())]
        with self.lock:  # one sampler
            stream = int(name[:8], 16)  # its own, whatever the order of the questions
            group = (cfg.samples, (cfg.seed, stream))
            episodes = rollout(self.sampler, self.encoder, [question], limits, *group)
        path.parent.mkdir(parents=True, exist_ok=True)
        kept = [[e.status, [turn.text for turn in e.turns]] for e in episodes]
        write_atomically(path, json.dumps(kept))
        return episodes


def play_again(question: Question, limits: Limits, status: str, texts: Sequence[str]) -> Episode:
    """The episode of known turns: the environment gives the same frames as it gave then."""
    env = Env(question, Video(question.video, span_s=question.span_s), limits)
    for text in texts:
        env.step(text)
    env.end(status)
    return env.episode()


FRAME = re.compile(
    r"\bframes?\s+(\d+)(?:\s*(?:-|–|to|and)\s*(\d+))?|\bbetween\s+(\d+)\s+and\s+(\d+)",
    re.IGNORECASE,
)


def cited(text: str) -> set[float]:
    """Frame indices that a reasoning names: "frame 12", "frames 12 to 40", "between 12 and 40".
    One of five thousand digits is no int in Python; as a float it is beyond every video."""
    return {float(n) for found in FRAME.findall(text) for n in found if n}


def consistent(episode: Episode) -> bool:
    """A call asks where its reasoning points: a frame it names, if it names any, lies in the
    window. An answer speaks of frames that were shown."""
    for turn in episode.turns:
        named = cited(split_think(turn.text)[0])
        if turn.action == "tool" and named:
            first, last = turn.window
            if not any(first <= n <= last for n in named):
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
    (score,), _ = graded([episode], judge)
    if score < cfg.min_accuracy:
        return "wrong answer"
    try:
        if judge is not None and judge.reasoning(episode.question, texts) < cfg.min_grade:
            return "grade of the reasoning"
    except (NoGrade, Refused) as error:
        judge.ungraded([error])
        return "no grade from the judge"
    return None


def results(
    cfg: Config,
    questions: list[Question],
    judge: Judge | None,
    endpoint: Endpoint | None,
    cache: Path,
) -> Iterator:
    """(question number, sample, fault or None, texts of the turns), as they come."""
    limits = Limits(max_turns=cfg.max_turns, syntax=cfg.call_syntax)
    local = None if endpoint else LocalTeacher(cfg, cache)

    def work(k: int) -> list:
        question, rows = questions[k], []
        try:
            if local:
                episodes = local.episodes(question, limits)
            else:
                episodes = play(question, endpoint, limits, cfg)
            for sample, episode in enumerate(episodes):
                texts = [turn.text for turn in episode.turns]
                rows.append((k, sample, fault(episode, cfg, judge), texts))
            return rows
        except VideoError:
            return [(k, sample, "unusable video", []) for sample in range(cfg.samples)]

    pool = ThreadPoolExecutor(cfg.workers)
    try:
        for rows in pool.map(work, range(len(questions))):
            yield from rows
    finally:
        for asked in (endpoint, judge and judge.endpoint):
            if asked:
                asked.close()  # questions at work end with the request that is under way
        pool.shutdown(cancel_futures=True)


def trajectories(cfg: Config, questions: list[Question], passed: dict[int, dict]) -> list[str]:
    """The lines of --out. passed: by question and sample, the texts of the turns."""
    lines = []
    for k in sorted(passed):
        record = record_row(questions[k], cfg.out.parent)
        for sample in sorted(passed[k])[: cfg.keep]:
            lines.append(json.dumps({"question": record, "messages": passed[k][sample]}))
    return lines


def check_prompt(
    cfg: Config, questions: Sequence[Question], endpoint: Endpoint | None
) -> bool | None:
    """Whether an endpoint's teacher is shown the rollout's tokens, with a line where it is not;
    None where nobody can tell."""
    same = None
    if endpoint:
        with suppress(VideoError):
            question, limits = questions[0], Limits(syntax=cfg.call_syntax)
            video = Video(question.video, span_s=question.span_s)
            same = same_prompt(Env(question, video, limits), endpoint)
    if same is False:
        why = "its server puts other tokens around the messages than a rollout's prompt has"
        print(f"note: {cfg.teacher}: {why}; the trajectories are written in the rollout's form")
    return same


def main(cfg: Config) -> None:
    cli.check(cfg)
    cache = cfg.out.with_name(cfg.out.name + ".answers")
    limits = {k: getattr(cfg, k) for k in ("timeout_s", "wait_s", "per_minute")}
    judge, endpoint = judge_of(cfg.judge_url, cfg.judge, cache, cfg.max_ungraded, **limits), None
    questions = read_questions(cfg.data)
    counts = cfg.out.with_name(cfg.out.name + ".json")
    read = (cfg.data, cfg.teacher, *{question.video for question in questions})
    cli.not_the_input(cfg.out, *read, beside=counts)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    if cfg.url:
        limits |= {"price_in": cfg.price_in, "price_out": cfg.price_out}
        endpoint = Endpoint(cfg.url, cfg.teacher, cache, **limits)
    same = check_prompt(cfg, questions, endpoint)

    # every episode, as it comes
    faults, passed = Counter(), {}
    found = results(cfg, questions, judge, endpoint, cache)
    bar = tqdm(found, "distil", len(questions) * cfg.samples, unit="episode")
    for k, sample, why, texts in bar:
        faults[why or "passed"] += 1
        if why is None:
            passed.setdefault(k, {})[sample] = texts
        cost = {"cost": f"{endpoint.cost:.2f}"} if endpoint and endpoint.cost else {}
        bar.set_postfix(passed=faults["passed"], **cost)

    # the counts, then what has passed
    lines = trajectories(cfg, questions, passed)
    report = {"questions": len(questions), "solved": len(passed), "trajectories": len(lines)}
    asked = {"teacher": endpoint, "judge": judge and judge.endpoint}
    tally = {name: {**e.tally, "cost": round(e.cost, 4)} for name, e in asked.items() if e}
    report |= {"episodes": dict(faults), "endpoints": tally, "same_prompt": same}
    report |= {"config": {k: str(v) for k, v in asdict(cfg).items()}, **provenance()}
    write_atomically(counts, json.dumps(report, indent=1) + "\n")
    for why, count in faults.most_common():
        print(f"{count:8} of {faults.total()} episodes: {why}")
    if not lines:
        why = "no episode of {} passed the filters: nothing is written; see the counts above"
        raise ValueError(why.format(cfg.teacher))
    write_atomically(cfg.out, "\n".join(lines) + "\n")
    print(f"{len(lines)} trajectories of {len(passed)} questions in {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config)
