"""Scores an answer in [0, 1] by rule. Reward, evaluation and distillation all score here."""

import re
import string
from collections import Counter

from nanosport.records import LETTERS, Question, number, time_span


def accuracy(answer: str | None, question: Question) -> float:
    """acc(τ) ∈ [0, 1].

    choice: 1 for the option's letter or its text. number: 1 within the question's tolerance. span:
    temporal IoU. open: F1 of the words, which is 1 where they are the same.
    """
    if answer is None:
        return 0.0
    if question.kind == "choice":
        return choice(answer, question.answer, question.options)
    if question.kind == "number":
        said, true = number(answer), number(question.answer)
        return float(said is not None and abs(said - true) <= question.tolerance + 1e-9)
    if question.kind == "span":
        said, true = time_span(answer), time_span(question.answer)
        return temporal_iou(said, true) if said else 0.0
    return token_f1(answer, question.answer)


def normalise(text: str) -> list[str]:
    """Words without case, punctuation and articles (as SQuAD scores)."""
    table = str.maketrans({c: " " for c in string.punctuation})
    return [w for w in text.lower().translate(table).split() if w not in ("a", "an", "the")]


def choice(answer: str, letter: str, options: tuple[str, ...]) -> float:
    """Whether the answer names option `letter`, by letter or by text."""
    said = re.match(r"\(?([A-J])\)?(?:[.:,)]|\s|$)", answer.strip())
    words, texts = normalise(answer), [normalise(option) for option in options]
    # "A dig" is an option's text, not the letter A; a bare letter is a letter, whatever they say
    if words in texts and not (said and said.end() == len(answer.strip())):
        return float(words == texts[LETTERS.index(letter)])
    return float(said is not None and said[1] == letter)


def exact(answer: str, truth: str) -> float:
    """Whether both are the same words."""
    return float(normalise(answer) == normalise(truth))


def token_f1(answer: str, truth: str) -> float:
    """2·P·R / (P + R) of the words, each counted as often as it comes."""
    said, true = Counter(normalise(answer)), Counter(normalise(truth))
    common = (said & true).total()
    return 2 * common / (said.total() + true.total()) if common else 0.0


def temporal_iou(said: tuple[float, float], true: tuple[float, float]) -> float:
    """Overlap ÷ union of two spans; two equal moments are 1."""
    overlap = min(said[1], true[1]) - max(said[0], true[0])
    union = max(said[1], true[1]) - min(said[0], true[0])
    return float(said == true) if union == 0 else max(0.0, overlap) / union
