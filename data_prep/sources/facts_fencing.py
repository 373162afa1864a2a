"""FACTS, fencing: short clips of 8 classes, {attack, riposte, counter-attack, remise} by the left
or the right fencer.

The layout is not documented. Two are read: a folder a class, named in any order and spelling
(`left_attack`, `Attack-Right`); or, where there are CSV files, their rows, with a column for the
file and one for the class. `group` is the clip: the bout it comes from is not known.

Quirks: none known.
"""

import csv
import re
from collections.abc import Callable, Iterator
from pathlib import Path

from data_prep.entries import brief
from data_prep.options import shuffle_options, template
from data_prep.sources import Folder, Skip, each
from nanosport.records import Question

SOURCE = "facts_fencing"
LICENCE = "unknown; ask the authors"
ACTIONS = ("attack", "riposte", "counter-attack", "remise")
ASK = (
    "Which action does this clip show?",
    "Which fencer acts in this clip, and how?",
    "What happens in this exchange?",
)
FILE_COLUMNS = ("file", "filename", "file_name", "video", "video_path", "clip", "path")
CLASS_COLUMNS = ("label", "class", "action", "category")


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    names = [name_class(f"{action} {side}") for action in ACTIONS for side in ("left", "right")]
    return class_questions(Folder(root), seed, SOURCE, "fencing", ASK, name_class, names)


def name_class(text: str) -> str:
    """The class that a folder or a row names. Raises ValueError where it names none."""
    sides = {*re.findall("left|right", text.lower())}
    found = re.findall(r"(counter)?[\W_]*(attack|riposte|remise)", text.lower())
    actions = {f"counter-{action}" if counter else action for counter, action in found}
    if len(sides) != 1 or len(actions) != 1 or not actions <= set(ACTIONS):
        raise ValueError(
            f"class {text!r}: must name one of {', '.join(ACTIONS)}, and left or right"
        )
    return f"{actions.pop()} by the {sides.pop()} fencer"


def labelled_clips(folder: Folder) -> list[tuple[str, tuple[str, str]]]:
    """(where it is said, (file, class)) of every clip: rows of the CSV files, or the videos in
    their class's folder."""
    if tables := [path for path in folder.files if path.lower().endswith(".csv")]:
        return [clip for path in tables for clip in _rows(folder.root, path)]
    clips = [(path, (path, path.split("/")[-2])) for path in folder.videos if "/" in path]
    if not clips:
        raise ValueError(
            f"{folder.root}: holds neither a folder of clips for each class nor a CSV file of "
            "clips and classes"
        )
    return clips


def _rows(root: Path, path: str) -> Iterator[tuple[str, tuple[str, str]]]:
    """The clips of a CSV file."""
    try:
        with (root / path).open(newline="", encoding="utf-8-sig") as file:
            sign = max(",;\t", key=file.readline().count)
            file.seek(0)
            rows = csv.DictReader(file, delimiter=sign)
            columns = {name.strip().lower(): name for name in rows.fieldnames or () if name}
            of = [
                next((columns[name] for name in known if name in columns), None)
                for known in (FILE_COLUMNS, CLASS_COLUMNS)
            ]
            if None in of:
                raise ValueError(
                    f"its columns are {brief([*columns])}; one of {FILE_COLUMNS} and one of "
                    f"{CLASS_COLUMNS} are needed"
                )
            for row in rows:
                clip = tuple((row[column] or "").strip() for column in of)
                yield f"{path} line {rows.line_num}", clip
    except (ValueError, csv.Error) as error:
        raise ValueError(f"{root / path}: not a table of clips and classes: {error}") from None


def class_questions(
    folder: Folder,
    seed: int,
    source: str,
    sport: str,
    ask: tuple,
    name: Callable[[str], str],
    classes: list[str],
) -> Iterator[Question | Skip]:
    """Which class is it: one question a clip, with up to eight of the `classes` as options."""

    def make(where: str, clip: tuple[str, str]) -> Iterator[Question]:
        video, right = folder.video(clip[0]), name(clip[1])
        id = f"{source}/{video}"
        options, answer = shuffle_options(
            seed, id, right, (other for other in classes if other != right), num=8
        )
        yield Question(
            id=id,
            video=video,
            sport=sport,
            dimension="recognition",
            question=template(seed, id, ask),
            options=options,
            answer=answer,
            provenance=where,
        )

    yield from each("", labelled_clips(folder), make)
