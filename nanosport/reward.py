"""Score an answer, and turn an episode into its gated tool-use reward."""

import re
import string
from collections import Counter
from dataclasses import dataclass

from nanosport.episode import Episode, Question

TOOL_WEIGHT, CURIOSITY, FORMAT_PENALTY = 0.5, 0.03, 0.05


@dataclass(frozen=True)
class Reward:
    """The total and its parts."""

    total: float
    accuracy: float
    tool: float
    """R_tool of the equation, before the gate of the format."""
    format: float
    """1.0 where the whole trajectory is valid."""
    used_tool: float
    """1.0 where frames were returned at least once."""


def normalise(text: str) -> list[str]:
    """Words without case, punctuation and articles (as SQuAD scores)."""
    table = str.maketrans({c: " " for c in string.punctuation})
    return [w for w in text.lower().translate(table).split() if w not in ("a", "an", "the")]


def accuracy(answer: str | None, question: Question) -> float:
    """acc(τ) ∈ [0, 1]: the option's letter, or its text; for open questions the F1 of the words."""
    if answer is None:
        return 0.0
    if question.options:
        letter = re.match(r"\(?([A-J])\)?(?:[.:,)]|\s|$)", answer.strip())
        words, options = normalise(answer), [normalise(option) for option in question.options]
        # "A dig" is the text of an option, not the letter A; a bare letter is a letter, whatever the options say
        if words in options and not (letter and letter.end() == len(answer.strip())):
            return float(words == options[ord(question.answer) - ord("A")])
        return float(letter is not None and letter[1] == question.answer)
    said, true = Counter(normalise(answer)), Counter(normalise(question.answer))
    common = (said & true).total()
    return 2 * common / (said.total() + true.total()) if common else 0.0


def format_valid(episode: Episode) -> bool:
    """g_fmt: it ended in an answer, and no turn was malformed, out of range or a repeated interval."""
    return episode.status == "answered" and all(turn.error is None for turn in episode.turns)


def gated_reward(episode: Episode) -> Reward:
    """DeepSport v1:  R = g_fmt·(acc + R_tool) − 0.05·(1 − g_fmt),

    R_tool = 0.5·acc if the tool was used and acc ≥ 0.5; 0.03 if it was used and acc < 0.5; 0 if it was not used.
    """
    acc, valid = accuracy(episode.answer, episode.question), format_valid(episode)
    used = any(turn.action == "tool" and turn.frames for turn in episode.turns)
    tool = (TOOL_WEIGHT * acc if acc >= 0.5 else CURIOSITY) if used else 0.0
    return Reward(acc + tool if valid else -FORMAT_PENALTY, acc, tool, float(valid), float(used))
