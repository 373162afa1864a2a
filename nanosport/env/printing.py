"""What is printed of an episode: its tokens as they come, its turns, its answer."""

import sys

from nanosport.env.tools import split_think
from nanosport.records import LETTERS, Episode, Turn


class Stream:
    """The text of a turn as its tokens come, without the end of the turn."""

    def __init__(self, tokenizer):
        self.tokenizer, self.ids, self.shown = tokenizer, [], ""

    def add(self, token: int) -> str:
        """The text that a token adds: none while the rest of a character is to come."""
        self.ids.append(token)
        text, before = self.tokenizer.decode(self.ids, skip_special_tokens=True), len(self.shown)
        if text.endswith("\ufffd"):
            return ""
        self.shown = text
        return text[before:]

    def end(self) -> None:
        """The turn is whole: a new one begins."""
        self.ids, self.shown = [], ""


def show(turn: Turn, streamed: bool = False) -> None:
    """Print one turn, for people. streamed: its text has been printed."""
    think, _ = split_think(turn.text)
    if not streamed:
        print(f"said    {turn.text.strip()}" if turn.error else f"think   {think}")
    if turn.action == "tool":
        frames = ", ".join(map(str, turn.frames)) or "no turn left"
        print(f"look    frames {turn.window[0]} to {turn.window[1]} → {frames}")
    elif turn.error:
        print(f"refused {turn.error}")
    sys.stdout.flush()


def turn_json(turn: Turn) -> dict:
    """A turn, for machines."""
    names = ("text", "action", "window", "frames", "error")
    return {name: getattr(turn, name) for name in names}


def as_json(episode: Episode, seconds: float) -> dict:
    """The episode, for machines."""
    turns = [{"think": split_think(turn.text)[0]} | turn_json(turn) for turn in episode.turns]
    return {
        "video": episode.question.video,
        "question": episode.question.question,
        "answer": episode.answer,
        "status": episode.status,
        "frames": episode.frames,
        "turns": turns,
        "seconds": round(seconds, 2),
    }


def answer_line(episode: Episode, options: tuple[str, ...]) -> str:
    """The answer with the option that its letter stands for, or why there is none."""
    if not episode.answer:
        return f"no answer ({episode.status.replace('_', ' ')})"
    letters = LETTERS[: len(options)]
    option = f"  {options[letters.index(episode.answer)]}" if episode.answer in [*letters] else ""
    return f"answer  {episode.answer}{option}"
