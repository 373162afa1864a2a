"""FineDiving: competition dives with action code, sub-actions, difficulty and score, made into four
questions each.

`FineDiving_fine-grained_annotation.pkl` is {(video, n): {action_type, sub-action_types {id: name},
frames_labels, dive_score, difficulty, …}}, `fine-grained_annotation_aqa.pkl` {(video, n):
[action_type, dive_score, difficulty, steps_transit_frames, labels]}, and
`FineDiving_coarse_annotation.pkl` {(video, n): {action_type, start_frame, end_frame, dive_score,
difficulty, …}}; the first of them that is there is read. The clips are folders of frames,
`<video>/<n>/*.jpg`, wherever they lie below root; the coarse form also takes a whole video.

Quirks: the annotations are pickles, so they are read without running what they name. Both shapes of
an entry may come in either file. Numbers are numpy scalars. The list form has no names of
sub-actions: they are taken from `Sub_action_Types_Table.pkl`, without which that question is
skipped, as it is in the coarse form. A failed dive has a score of 0. The official split is in
`train_split.pkl` and `test_split.pkl`, and is noted in `provenance`; `group` is the competition
video, of which the official split has dives on both sides.
"""

from collections.abc import Iterator
from functools import partial
from itertools import groupby, islice, permutations
from pathlib import Path

import numpy as np

from data_prep.entries import brief, field, read_pickle
from data_prep.options import shuffle_options, template
from data_prep.sources import Folder, Skip, each, frames_span
from nanosport.records import Question

SOURCE = "finediving"
LICENCE = "release agreement; research only"
TASKS = {  # name: (dimension, how far off is still right, ways to ask)
    "code": (
        "recognition", 0.0,
        ("Which dive is it?", "Which code does this dive have in the competition's list?",
         "Name the dive by its code."),
    ),
    "steps": (
        "recognition", 0.0,
        ("In which order do the parts of the dive come?",
         "Which sequence of sub-actions does the dive show?"),
    ),
    "difficulty": (
        "rules", 0.2,
        ("What is the dive's degree of difficulty? Within 0.2 counts as right.",
         "Estimate the degree of difficulty of this dive, to within 0.2."),
    ),
    "score": (
        "assessment", 5.0,
        ("Which score did the dive get? Within 5 points counts as right.",
         "Judge this dive: estimate its final score, to within 5 points."),
    ),
}  # fmt: skip


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    files = folder.named(
        r"(FineDiving_)?(fine-grained|coarse)_annotation.*\.pkl",
        "FineDiving_fine-grained_annotation.pkl",
    )
    path = min(files, key=lambda name: ("coarse" in name.lower(), "aqa" in name.lower()))
    entries, official, names = read_pickle(root / path, dict), {}, None
    for name in folder.files:
        if name.endswith("Sub_action_Types_Table.pkl"):
            names = read_pickle(root / name, dict)
        elif name.endswith(("train_split.pkl", "test_split.pkl")):
            keys, split = read_pickle(root / name, list), Path(name).name
            try:
                official |= {_key(key): split.removesuffix("_split.pkl") for key in keys}
            except ValueError as error:
                raise ValueError(f"{root / name}: {error}") from None
    codes = sorted(
        {code for entry in entries.values() if isinstance(code := _fields(entry, None)[0], str)}
    )
    named = ((brief(key), (key, entry)) for key, entry in entries.items())
    yield from each(path, named, partial(_questions, folder, (codes, official, names), seed, path))


def _key(key) -> tuple[str, int]:
    if not (
        isinstance(key, tuple | list)
        and len(key) == 2
        and isinstance(key[0], str)
        and isinstance(key[1], int | np.integer)
    ):
        raise ValueError(f"key {brief(key)}: must be (video, number)")
    return key[0], int(key[1])


def _fields(entry, table: dict | None) -> tuple:
    """(action type, score, difficulty, labels of the frames, names of the sub-actions), each None
    where the entry lacks it."""
    if isinstance(entry, dict):
        names = ("action_type", "dive_score", "difficulty", "frames_labels", "sub-action_types")
        return tuple(entry.get(name) for name in names)
    if isinstance(entry, list | tuple) and len(entry) >= 5:
        return *entry[:3], entry[4], table
    return (None,) * 5


def _steps(labels, names) -> list[str]:
    """The dive's sub-actions in their order."""
    labels = labels.ravel().tolist() if isinstance(labels, np.ndarray) else labels
    if not isinstance(labels, list) or not all(
        isinstance(label, int | float | np.integer) and abs(label) < 1e9 for label in labels
    ):
        raise ValueError("frames_labels: must be a number a frame")
    if not isinstance(names, dict) or not all(
        isinstance(key, int | str | np.integer) for key in names
    ):
        raise ValueError("sub-action_types: the entry has no names for its sub-actions")
    names = {int(key): name for key, name in names.items()}
    order = [names.get(int(label)) for label, _ in groupby(labels)]  # a part may come again
    if len(order) > 10 or not all(isinstance(name, str) for name in order):
        raise ValueError("sub-action_types: must name every label of frames_labels, ten at most")
    return order


def _answer(task: str, value, names, id: str, codes: list, seed: int) -> tuple[tuple, str, str]:
    """(options, answer, kind) of a task. Raises ValueError where the entry has no value for it."""
    if task == "code":
        if not isinstance(value, str):
            raise ValueError(f"action_type {brief(value)}: must be a text")
        others = (other for other in codes if other != value)
        return *shuffle_options(seed, id, value, others, num=4), "choice"
    if task == "steps":
        orders = islice(permutations(_steps(value, names)), 720)
        right, *others = dict.fromkeys(", then ".join(order) for order in orders)
        return *shuffle_options(seed, id, right, others, num=4), "choice"
    is_number = isinstance(value, int | float | np.integer | np.floating)
    failed = task == "score" and is_number and value == 0  # a dive that was not done as announced
    if not is_number or isinstance(value, bool) or not (0 < value < 1000 or failed):
        raise ValueError(f"{task} {brief(value)}: must be a number between 0 and 1000")
    return (), f"{float(value):.2f}", "number"


def _clip(folder: Folder, competition: str, number: int, entry) -> tuple[str, tuple | None]:
    """(video, span) of a dive: its folder of frames, or its part of the whole video."""
    try:
        return folder.video(f"{competition}/{number}"), None
    except ValueError:
        if not isinstance(entry, dict) or "start_frame" not in entry:
            raise
    video = folder.video(competition)
    first, last = (field(entry, name, int) for name in ("start_frame", "end_frame"))
    return video, frames_span(folder.root / video, first, last)


def _questions(
    folder: Folder, tables: tuple, seed: int, path: str, place: str, item: tuple
) -> Iterator[Question | Skip]:
    (codes, official, table), (key, entry) = tables, item
    competition, number = _key(key)
    video, span = _clip(folder, competition, number, entry)
    code, score, difficulty, labels, names = _fields(entry, table)
    values = {"code": code, "steps": labels, "difficulty": difficulty, "score": score}
    split = official.get((competition, number), "split unknown")

    def make(task: str, value) -> Iterator[Question]:
        id = f"{SOURCE}/{competition}/{number}/{task}"
        dimension, tolerance, phrasings = TASKS[task]
        options, answer, kind = _answer(task, value, names, id, codes, seed)
        yield Question(
            id=id,
            video=video,
            sport="diving",
            dimension=dimension,
            question=template(seed, id, phrasings),
            options=options,
            answer=answer,
            kind=kind,
            tolerance=tolerance,
            span_s=span,
            group=f"{SOURCE}/{competition}",
            provenance=f"{path} {(competition, number)}, official {split}",
        )

    yield from each(f"{path} {place},", values.items(), make)
