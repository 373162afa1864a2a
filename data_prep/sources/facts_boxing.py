"""FACTS, boxing: short clips of 8 classes of punches.

Layout as for fencing (facts_fencing). Neither it nor the names of the classes are documented: they
are taken from the folders or rows as they are, and every class found is an option (eight at most).
`group` is the clip.

Quirks: none known. A class that no other one stands beside gives no question.
"""

from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from data_prep.sources import Folder, Skip
from data_prep.sources.facts_fencing import class_questions, labelled_clips
from nanosport.records import Question

SOURCE = "facts_boxing"
LICENCE = "non-commercial"
ASK = (
    "Which punch does this clip show?",
    "How does the boxer punch?",
    "What kind of punch is thrown?",
)


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    classes = set()
    for _, (_, name) in labelled_clips(folder):
        with suppress(ValueError):  # its row is skipped below
            classes.add(name_class(name))
    known = sorted(classes)
    return class_questions(folder, seed, SOURCE, "boxing", ASK, name_class, known)


def name_class(text: str) -> str:
    """The class in words. Raises ValueError where there is none."""
    if not (words := " ".join(text.replace("_", " ").replace("-", " ").lower().split())):
        raise ValueError(f"class {text!r}: must be a name")
    return words
