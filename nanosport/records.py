"""What the stages hand on, as frozen records: Clip → Question → Turn → Episode.

Shape letters used in the whole project:
    B batch rows   T tokens   S cached tokens   M trainable (action) rows   V vocabulary
    D hidden   H heads   K key/value heads   d head width
    F frames   C channels (or patch width)   P patches   N vision tokens
"""

import json
import math
import os
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING, asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from nanosport.fields import unique
from nanosport.reading import number, time_span

DIMENSIONS = ("recognition", "rules", "assessment", "commentary")
KINDS = ("choice", "open", "number", "span")
LETTERS = "ABCDEFGHIJ"
"""Options are named by these, in order."""
RECORD_VERSION = 1
T = TypeVar("T")


class Clip(NamedTuple):
    """What is looked at: a video, or the part of it between two times."""

    video: str
    span_s: tuple[float, float] | None = None

    def __str__(self) -> str:
        if self.span_s is None:
            return self.video
        return "{} from {:g} s to {:g} s".format(self.video, *self.span_s)


@dataclass(frozen=True)
class Question:
    """A question about a clip: the one record of the project, written as one JSON object a line.

    A line must have the fields without a default. The others may be missing, and are null where
    they may be None.
    """

    id: str
    """It is unique in its file."""
    video: str
    """Path of a video file or a folder of frames; a relative one starts at the record file's
    folder."""
    sport: str
    dimension: str
    """One of DIMENSIONS."""
    question: str
    options: tuple[str, ...]
    """Texts of (A), (B), …; empty where there are none."""
    answer: str
    """choice: the option's letter; open: the reference text; number: its digits; span: "12.5-18",
    seconds into the clip."""
    needs_tool: bool | None = None
    """Whether the overview frames are not enough; None where nobody knows."""
    window: tuple[int, int] | None = None
    """First and last frame of the decisive event, counted in the clip, where they are known."""
    kind: str = ""
    """How the answer is scored, one of KINDS. Default: choice with options, else open."""
    tolerance: float = 0.0
    """A number may be off by this much and is still right."""
    span_s: tuple[float, float] | None = None
    """The clip: from when to when in the video, in seconds; None for all of it."""
    pass_rate: float | None = None
    """Share of right answers of the base model from the overview alone (data_prep.difficulty); None
    where it was not measured."""
    source: str = ""
    """The data set it comes from."""
    group: str = ""
    """Questions of one match, player or video, which a split keeps together. Default: the video."""
    provenance: str = ""
    """Where it stands in its source: file and key."""
    licence: str = ""
    """A note on what the source allows."""
    also: tuple[str, ...] = ()
    """Other answers that are as right as `answer`, of the same form; none where there are
    options."""
    version: int = RECORD_VERSION

    def __post_init__(self):
        if not self.kind:
            object.__setattr__(self, "kind", "choice" if self.options else "open")
        if not self.group:
            object.__setattr__(self, "group", self.video)

    @property
    def answers(self) -> tuple[str, ...]:
        """All that are right."""
        return (self.answer, *self.also)

    @property
    def clip(self) -> Clip:
        return Clip(self.video, self.span_s)


@dataclass(frozen=True)
class Turn:
    """One assistant message and what came back for it."""

    text: str
    action: str
    """`tool`, `answer`, `bad_call` or `invalid`."""
    window: tuple[int, int] | None = None
    """The interval asked for, valid or not."""
    frames: tuple[int, ...] = ()
    """Frame indices the tool returned."""
    error: str | None = None
    """Why the action was refused, as the model was told."""
    tokens: tuple[int, int] = (0, 0)
    """The first and one past the last of its sampled ids in the episode."""
    version: int = 0
    """The step of the run whose weights have sampled it; 0 outside a run."""


@dataclass(frozen=True)
class Episode:
    """A whole trajectory, token in token out: no id here was ever decoded and encoded again."""

    question: Question
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    """1 where the policy (or the teacher) produced the token, 0 for prompt, frames and tool
    results."""
    sampled_logp: tuple[float, ...]
    """The sampler's log-probability where mask is 1, 0.0 elsewhere."""
    frames: tuple[int, ...]
    """Frame indices in the order of their tokens: the overview, then those of every tool call."""
    turns: tuple[Turn, ...]
    status: str
    """`answered`, `format_error`, `out_of_turns` or `out_of_tokens`."""
    answer: str | None = None
    grid: tuple[int, int, int] = (1, 0, 0)
    """(1, height, width) of each frame in patches."""


class Line(NamedTuple):
    """A line of a file."""

    number: int
    """The first is 1."""
    offset: int
    """Where it starts, in bytes."""


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON-lines file; a relative `video` is taken from the file's folder.

    Raises ValueError with file, line and field where a line is not a question.
    """
    return [question for question, _ in read_records(path)]


def read_records(path: Path) -> list[tuple[Question, list[str]]]:
    """(question, assistant messages) of a JSON-lines file; a bare question has no messages.

    Raises ValueError as `stream_records` does, and where an id comes again: several trajectories
    may be of one question, but an id is of one question alone.
    """
    path, records, first = Path(path), [], {}
    for line, row, question in stream_records(path):
        number, same = first.setdefault(question.id, (line.number, question))
        if number < line.number and ("messages" not in row or question != same):
            raise ValueError(
                f"{path}, line {line.number}: id {question.id!r}: line {number} has it already; "
                "ids must differ"
            )
        video = str(path.parent / question.video)
        records.append((replace(question, video=video), row.get("messages", [])))
    return records


def stream_records(path: Path) -> Iterator[tuple[Line, dict, Question]]:
    """Yield (line, its JSON object, its question with `video` as it stands there), in little
    memory.

    Raises ValueError with file, line and field where a line is neither a question nor a trajectory.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `python -m data_prep.arena` makes built-in data")
    line = None
    for line, (row, question) in read_lines(path, "a question", lambda row: (row, parse_row(row))):
        yield line, row, question
    if line is None:
        raise ValueError(f"{path}: holds no question")


def read_lines(
    path: Path, what: str, parse: Callable[[Any], T] = lambda value: value
) -> Iterator[tuple[Line, T]]:
    """Yield (line, what `parse` makes of its JSON value) for each line that is not blank, in little
    memory.

    Raises ValueError with file and line where one is not `what`.
    """
    offset = 0
    with open(path, "rb") as file:  # bytes: in text U+2028 would end a line too
        for number, line in enumerate(file, 1):
            if line.strip():
                try:
                    item = parse(json.loads(line.strip(), object_pairs_hook=unique))
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    raise ValueError(f"{path}, line {number}: not {what}: {error}") from None
                yield Line(number, offset), item
            offset += len(line)


def record_row(question: Question, folder: Path) -> dict:
    """The JSON object of a question for a file in `folder`; its video's path starts there."""
    at, name = os.path.split(question.video)  # a path with ".." starts where a link leads
    video = os.path.join(os.path.realpath(at), name)
    return asdict(question) | {"video": os.path.relpath(video, os.path.realpath(folder))}


def check_text(text: str, field: str = "the text") -> str:
    """Return the text. Raises ValueError that names the field where it would forge a special token
    of the template, such as <|im_end|> or <|image_pad|>, or is no whole text."""
    check_whole(text, field)
    if forged := re.search(r"<\|\w+\|>", text):
        token = forged[0]
        raise ValueError(f"{field} {text[:60]!r} contains the special token {token}: remove it")
    return text


def check_whole(text: str, field: str) -> None:
    """Raise ValueError where a text has what no file can hold."""
    if alone := re.search("[\ud800-\udfff]", text):
        near = text[max(0, alone.start() - 20) : alone.end()]
        why = "characters cut in two, or bytes that are no UTF-8"
        raise ValueError(f"{field}: lone surrogates ({why}) after {near!r}: remove them")


# What a JSON object must be to count as a record.


def parse_row(row: dict) -> Question:
    """The question of a line, which is a bare question or a trajectory. Raises ValueError."""
    if not isinstance(row, dict):
        raise ValueError("must be a JSON object")
    if not isinstance(messages := row.get("messages", []), list):
        raise ValueError("messages: must be a list of texts")
    question = parse_question(row.get("question") if "messages" in row else row)
    for k, message in enumerate(messages, 1):
        check_text(message, f"message {k}")
    return question


def parse_question(row: dict) -> Question:
    """A record from its JSON object. Raises ValueError that names the field where it is not one."""
    if not isinstance(row, dict):
        raise ValueError("the question must be a JSON object")
    defaults = {f.name: None if f.default is MISSING else f.default for f in fields(Question)}
    values = defaults | row
    if values["version"] != RECORD_VERSION:
        raise ValueError(f"version {row['version']!r}: this code reads version {RECORD_VERSION}")
    if unknown := row.keys() - defaults.keys():
        known = ", ".join(sorted(defaults))
        raise ValueError(f"unknown field {min(unknown)!r}; known are {known}")
    for name, (holds, rule) in RULES.items():
        value = values[name]
        if not holds(value):
            raise ValueError(f"{name} {value!r:.200}: {rule}")
        for text in filter(is_text, value if isinstance(value, list) else (value,)):
            (check_text if name in ("question", "options") else check_whole)(text, name)

    # what joins several fields
    question = Question(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    kind, answer, num_options = question.kind, question.answer, len(question.options)
    if kind not in KINDS or (kind == "choice") != (num_options > 0):
        rule = f"must be one of {', '.join(KINDS)}, and choice exactly where there are options"
        raise ValueError(f"kind {kind!r}: {rule}")
    if kind == "choice" and answer not in list(LETTERS[:num_options]):
        raise ValueError(f"answer {answer!r}: must be the letter of one of {num_options} options")
    if kind == "choice" and question.also:
        raise ValueError("also: must be empty where there are options")
    for answer in question.answers:
        if kind == "number" and number(answer) is None:
            raise ValueError(f"answer {answer!r}: must be a number")
        if kind == "span" and time_span(answer) is None:
            raise ValueError(f"answer {answer!r}: must be a time span such as 12.5-18")
    return question


def is_text(value) -> bool:
    return isinstance(value, str)


def is_number(value, kinds=int | float) -> bool:
    return isinstance(value, kinds) and not isinstance(value, bool)


def is_pair(value, kinds=int | float) -> bool:
    """Whether the value is null or a list of two numbers, 0 ≤ first ≤ second."""
    if value is None:
        return True
    if not isinstance(value, list) or [is_number(v, kinds) for v in value] != [True, True]:
        return False
    return 0 <= value[0] <= value[1] < 2**53


TEXTS = ("sport", "question", "answer", "kind", "source", "group", "provenance", "licence")
PAIR = "must be null or two numbers from 0 to 2^53, the first not above the second"
OPTIONS = "must be a list of at most ten texts, empty for an open question"
RULES = {  # field: (whether a value will do, the rule in words)
    "id": (lambda v: is_text(v) and v, "must be a text that is not empty"),
    "video": (lambda v: is_text(v) and v, "must be a text that is not empty"),
    "dimension": (lambda v: v in DIMENSIONS, f"must be one of {', '.join(DIMENSIONS)}"),
    "options": (lambda v: isinstance(v, list) and len(v) <= 10 and all(map(is_text, v)), OPTIONS),
    "needs_tool": (lambda v: isinstance(v, bool | None), "must be true, false or null"),
    "window": (lambda v: is_pair(v, int), PAIR),
    "span_s": (is_pair, PAIR),
    "pass_rate": (
        lambda v: v is None or is_number(v) and 0 <= v <= 1,
        "must be null or a share between 0 and 1",
    ),
    "also": (
        lambda v: isinstance(v, list | tuple) and all(map(is_text, v)),
        "must be a list of texts",
    ),
    "tolerance": (lambda v: is_number(v) and 0 <= v < math.inf, "must be 0 or above"),
} | dict.fromkeys(TEXTS, (is_text, "must be a text"))
