"""Episodes on disk as they are played: an evaluation that is stopped goes on where it was."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path

from nanosport.files import append, mend
from nanosport.records import Episode, Question, Turn, read_lines


class Played:
    """What is played of one evaluation, by mode and the number of the question, without tokens.

    The file is one of this model, data, flags and code: their fingerprint is part of its name.
    """

    def __init__(self, beside: Path, made_by: dict, questions: Sequence[Question], rank: int):
        """beside: the report's path; the file lies there too. rank: each has its own file."""
        key = hashlib.sha256(json.dumps(made_by, sort_keys=True).encode()).hexdigest()[:10]
        share = f".{rank}" if rank else ""
        self.path = beside.with_name(f"{beside.stem}.{key}{share}.played.jsonl")
        self.questions = questions
        self.episodes: dict[tuple[str, int], Episode | None] = {}
        """An episode is None where the question's video was lost."""
        if self.path.exists():
            mend(self.path)
            for _, row in read_lines(self.path, "what was played"):
                if row["status"] is not None:  # a lost video may be there again
                    self.episodes[row["mode"], row["number"]] = self._episode(row)

    def _episode(self, row: dict) -> Episode:
        turns = tuple(
            Turn(**{k: tuple(v) if isinstance(v, list) else v for k, v in turn.items()})
            for turn in row["turns"]
        )
        question, frames = self.questions[row["number"]], tuple(row["frames"])
        return Episode(question, (), (), (), frames, turns, row["status"], row["answer"])

    def add(self, mode: str, number: int, episode: Episode | None) -> None:
        """Keep an episode."""
        kept = dict.fromkeys(("status", "answer", "frames", "turns"))
        if episode is not None:
            kept |= {name: getattr(episode, name) for name in kept}
            kept["turns"] = [asdict(turn) for turn in episode.turns]
            episode = replace(episode, ids=(), mask=(), sampled_logp=())  # most of its memory
        self.episodes[mode, number] = episode
        self.path.parent.mkdir(parents=True, exist_ok=True)
        append(self.path, json.dumps({"mode": mode, "number": number, **kept}) + "\n")

    def remove(self) -> None:
        """Drop the file: the report has been written."""
        self.path.unlink(missing_ok=True)
