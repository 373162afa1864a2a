"""What the stages hand on, as frozen records: Question → Turn → Episode.

Shape letters used in the whole project:
    B batch rows   T tokens   S cached tokens   D hidden   H heads   K key/value heads   d head width   V vocabulary
    F frames   C channels (or patch width)   P patches   N vision tokens   M trainable (action) rows
"""

import json
import re
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch

DIMENSIONS = ("recognition", "rules", "assessment", "commentary")


@dataclass(frozen=True)
class Question:
    """One question about one clip, as data_prep writes it (one JSON object a line)."""

    id: str
    video: str
    """Path of the clip: a video file or a folder of frames."""
    sport: str
    dimension: str
    """One of DIMENSIONS."""
    question: str
    options: tuple[str, ...]
    """Texts of (A), (B), …; empty for an open question."""
    answer: str
    """The option's letter, or the reference text of an open question."""
    needs_tool: bool | None = None
    """Whether the overview frames are not enough; None where nobody knows."""
    window: tuple[int, int] | None = None
    """First and last frame index of the decisive event, where known."""


@dataclass(frozen=True)
class Frames:
    """Frames as the model takes them: pixels already resized, normalised and cut into patches."""

    indices: tuple[int, ...]
    """Frame index in the video, one each; what the `frame N:` labels say."""
    patches_PC: torch.Tensor
    """float32, P = Σ h·w patches of C = channels·temporal_patch·patch² values."""
    grids: tuple[tuple[int, int, int], ...]
    """(1, h, w) in patches, one a frame."""


@dataclass(frozen=True)
class Turn:
    """One assistant message and what came back for it."""

    text: str
    action: str
    """`tool`, `answer` or `invalid`."""
    window: tuple[int, int] | None = None
    """The interval asked for, valid or not."""
    frames: tuple[int, ...] = ()
    """Frame indices the tool returned."""
    error: str | None = None
    """Why the action was refused, as the model was told."""


@dataclass(frozen=True)
class Episode:
    """A whole trajectory, token in token out: no id here was ever decoded and encoded again."""

    question: Question
    ids: tuple[int, ...]
    mask: tuple[int, ...]
    """1 where the policy (or the teacher) produced the token, 0 for prompt, frames and tool results."""
    logprobs: tuple[float, ...]
    """The sampler's log-probability where mask is 1, 0.0 elsewhere."""
    frames: tuple[int, ...]
    """Frame indices in the order of their tokens: the overview, then those of every tool call."""
    turns: tuple[Turn, ...]
    status: str
    """`answered`, `format_error`, `out_of_turns` or `out_of_tokens`."""
    answer: str | None = None


def read_questions(path: Path) -> list[Question]:
    """Questions of a JSON-lines file; a relative `video` is taken from the file's folder.

    Raises ValueError with file, line and field where a line is not a question.
    """
    return [question for question, _ in read_records(path)]


def read_records(path: Path) -> list[tuple[Question, list[str]]]:
    """(question, assistant messages) of a JSON-lines file; the messages are empty where a line is a bare question."""
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path}: no such file; `python -m data_prep.arena` makes the built-in data")
    records = []
    for number, line in enumerate(path.read_bytes().splitlines(), 1):  # of bytes: in text U+2028 would end a line too
        try:
            row = json.loads(line)
            if not isinstance(row, dict):
                raise ValueError("must be a JSON object")
            messages = row.get("messages", [])
            if not isinstance(messages, list):
                raise ValueError("messages: must be a list of texts")
            question = _question(row["question"] if "messages" in row else row, path.parent)
            records.append((question, [check_text(m) for m in messages]))
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{path}, line {number}: not a question: {error}") from None
    if not records:
        raise ValueError(f"{path}: holds no question")
    return records


def check_text(text: str) -> str:
    """Refuse a text from outside that would forge the template's special tokens, such as <|im_end|> or <|image_pad|>."""
    if forged := re.search(r"<\|\w+\|>", text):
        raise ValueError(f"the text {text[:60]!r} contains the special token {forged[0]}: remove it")
    return text


def _question(row: dict, folder: Path) -> Question:
    if not isinstance(row, dict):
        raise ValueError("the question must be a JSON object")
    known = {f.name for f in fields(Question)}
    if unknown := set(row) - known:
        raise ValueError(f"unknown field {sorted(unknown)[0]!r}; known are {', '.join(sorted(known))}")
    for name in ("id", "video", "sport", "dimension", "question", "answer"):
        if not isinstance(row.get(name), str):
            raise ValueError(f"{name} {row.get(name)!r}: must be a text")
    if not isinstance(options := row.get("options"), list) or len(options) > 10:
        raise ValueError(f"options {options!r}: must be a list of at most ten texts, empty for an open question")
    for text in (row["question"], *options):
        check_text(text)
    question = Question(**{k: tuple(v) if isinstance(v, list) else v for k, v in row.items()})
    if question.dimension not in DIMENSIONS:
        raise ValueError(f"dimension {question.dimension!r}: must be one of {', '.join(DIMENSIONS)}")
    if question.options and question.answer not in list("ABCDEFGHIJ"[: len(question.options)]):
        raise ValueError(f"answer {question.answer!r}: must be the letter of one of {len(question.options)} options")
    return replace(question, video=str(folder / question.video))
