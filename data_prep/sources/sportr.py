"""SportR: questions on infraction, its class, the penalty, the explanation, where it is seen, and
tactics.

The files are gated and their field names are not documented: JSON or JSON-lines lists are read
whose fields are called by one of the NAMES. If a file uses others, the error shows them; add them
to NAMES.

Quirks: none known. Where a question has options, the answer may be a label or a text. An answer of
two numbers is a time span in seconds; one of four (a box in a picture) cannot be scored and is
skipped.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import islice
from pathlib import Path

from data_prep.entries import brief, field, option, read_entries
from data_prep.options import by_label, choose
from data_prep.sources import Folder, Skip, joined, place_of
from nanosport.records import Question

SOURCE = "sportr"
LICENCE = "CC BY-NC 4.0, gated"
NAMES = {
    "video": ("video", "video_path", "video_id", "clip", "path", "file"),
    "question": ("question", "query", "prompt"),
    "answer": ("answer", "ground_truth", "gt", "response"),
    "options": ("options", "choices", "candidates"),
    "sport": ("sport", "category"),
    "task": ("type", "task", "question_type"),
}
DIMENSION = {  # by the first that the task, or where it has none the question, matches
    "assessment": "tactic|strateg|improve|should",
    "rules": "infraction|foul|class|penal|explain|explanation|rule|violat|why",
    "recognition": "",
}


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.named(r".*\.jsonl?", "JSON or JSON-lines file"):
        first = islice(read_entries(root / path), 100)  # an entry may lack a field
        names = {name: None for entry in first if isinstance(entry, dict) for name in entry}
        lacking = [n for n in ("video", "question", "answer") if _name(names, n) is None]
        if names and lacking:
            found = ", ".join(names)
            raise ValueError(
                f"{root / path}: no field for {lacking[0]} among {found}; add its name to NAMES "
                "in data_prep/sources/sportr.py"
            )
        yield from joined(folder.each(path, partial(_question, folder, seed, path)))


def _name(entry: dict, what: str) -> str | None:
    """What the entry, or the entries with these fields, calls it."""
    found = {str(name).lower(): name for name in entry}
    return next((found[name] for name in NAMES[what] if name in found), None)


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}: must be an object of fields")
    names = {what: _name(entry, what) or what for what in NAMES}
    video, question = folder.video(field(entry, names["video"])), field(entry, names["question"])
    id, kind, answer = f"{SOURCE}/{place_of(path)}/{number}", "open", entry.get(names["answer"])
    options = entry.get(names["options"]) or {}
    if isinstance(answer, list):
        if len(answer) != 2 or not all(isinstance(x, int | float) and 0 <= x < 1e6 for x in answer):
            raise ValueError(
                f"answer {brief(answer)}: must be a text, or a time span [start, end] in seconds"
            )
        kind, answer, options = "span", f"{answer[0]:g}-{answer[1]:g}", ()
    else:
        answer = option(entry, names["answer"])
        if options:
            kind, (options, answer) = "choice", choose(seed, id, by_label(options), answer)
    task = entry.get(names["task"])
    task = task.lower() if isinstance(task, str) else question.lower()
    yield Question(
        id=id,
        video=video,
        sport=field(entry, names["sport"]).lower().replace("_", " "),
        dimension=next(name for name, pattern in DIMENSION.items() if re.search(pattern, task)),
        question=question,
        options=tuple(options),
        answer=answer,
        kind=kind,
        group=f"{SOURCE}/{video}",
        provenance=f"{path} {number}",
    )
