"""FineBadminton: expert multiple-choice questions on rallies, with the true windows of every
stroke.

Questions: lists of {video_id, start_frame, end_frame, temporal (the task), question {question_en},
options_en ["A. …"], answer, question_id}, each with a clip cut to start_frame … end_frame, called
by `local_video` or by its question_id. Rounds: lists of {video "<match>_<round>.mp4", hitting
[{start_frame, end_frame, hit_frame, hitter, …}]}.

`window` is the stroke that the question is about, counted in the clip: the last one (of the player
at the top or bottom, where the question says so), or the one whose number is the answer. It takes
the rounds of the match; without them, where a stroke of the round cannot be read, and for questions
on the whole rally, nothing narrower than the clip is known and `window` is None. `group` is the
match.

Quirks: frames are counted in the match's video, not in the clip. `duration` is a word or a number.
A stroke may have its hit only. A file name has `_` for the space of its question_id. `quality` is a
text or a number. Some answers stand in the same place: options are shuffled.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import field, read_entries
from data_prep.options import choose, labelled
from data_prep.sources import Folder, Skip, each
from nanosport.records import LETTERS, Question

SOURCE = "finebadminton"
LICENCE = "annotations Apache-2.0; broadcast video"
DIMENSION = {
    "action classification": "recognition",
    "action localization": "recognition",
    "action prediction": "recognition",
    "hitting count": "recognition",
    "detailed hitting count": "recognition",
    "hitting localization": "recognition",
    "hitting prediction": "recognition",
    "moving recognition": "recognition",
    "hitting comment": "commentary",
    "pointer recognition": "assessment",
    "round comment": "assessment",
    "round count": "recognition",
}
ON_LAST_STROKE = (
    "action classification",
    "action prediction",
    "hitting localization",
    "hitting prediction",
    "hitting comment",
)
FRAMES = ("start_frame", "hit_frame", "end_frame")


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder, strokes = Folder(root), defaultdict(dict)
    paths = folder.named(r".*\.json", "JSON file of questions")
    for path in paths:
        yield from each(path, _entries(root / path, rounds=True), partial(_collect, strokes))
    for path in paths:
        ask = partial(_question, folder, strokes, seed, path)
        yield from each(path, _entries(root / path, rounds=False), ask)


def _entries(path: Path, rounds: bool) -> Iterator[tuple]:
    """(number, entry) of a file's rounds, or of its questions."""
    for number, entry in enumerate(read_entries(path)):
        if (isinstance(entry, dict) and "hitting" in entry) == rounds:
            yield number, entry


def _frames(row) -> tuple[int, int, int]:
    """First, hit and last frame of a stroke; where only the hit is known, it stands for all."""
    hit = field(row, "hit_frame", int)
    first, last = (hit if row.get(name) is None else field(row, name, int) for name in FRAMES[::2])
    return first, hit, last


def _collect(strokes: dict, number: int, entry: dict) -> Iterator[Skip]:
    """Keep a round's strokes by match and frames: the rounds may be there in two languages. A row
    without a kind of hit and a player is a mark that its annotator has left.

    Of a round with a stroke that cannot be read the others would be counted wrongly: (first, None,
    last) marks where it lies.
    """
    match, rows = field(entry, "video").partition("_")[0], field(entry, "hitting", list)
    fields = [row.get(name) for row in rows if isinstance(row, dict) for name in FRAMES]
    named = [frame for frame in fields if isinstance(frame, int)]
    try:
        strokes[match] |= {
            _frames(row): row.get("hitter")
            for row in rows
            if not (isinstance(row, dict) and row.get("hit_type") == "" and not row.get("hitter"))
        }
    except ValueError:
        if named:
            strokes[match][min(named), None, max(named)] = None
        raise
    yield from ()


def _window(
    strokes: dict, start: int, end: int, task: str, question: str, answer: str
) -> tuple[int, int] | None:
    if any(hit is None and first <= end and start <= last for first, hit, last in strokes):
        return None
    inside = sorted(
        frames for frames in strokes if frames[1] is not None and start <= frames[1] <= end
    )
    if task == "action localization" and answer.isdecimal() and 0 < int(answer) <= len(inside):
        first, _, last = inside[int(answer) - 1]
    elif task in ON_LAST_STROKE and inside:
        side = re.search(r"\b(top|bottom)\b", question.lower())
        own = [frames for frames in inside if not side or strokes[frames] == side[1]]
        if not own:
            return None
        first, _, last = own[-1]
    else:
        return None
    return max(first, start) - start, min(last, end) - start


def _question(
    folder: Folder, strokes: dict, seed: int, path: str, number: int, entry
) -> Iterator[Question]:
    name, match = field(entry, "question_id"), field(entry, "video_id").partition(".")[0]
    task, clip = field(entry, "temporal").lower(), entry.get("local_video")
    if task not in DIMENSION:
        raise ValueError(f"temporal {task!r}: must be one of {', '.join(DIMENSION)}")
    start, end = field(entry, "start_frame", int), field(entry, "end_frame", int)
    if not 0 <= start < end:
        raise ValueError(
            f"start_frame {start}, end_frame {end}: must be 0 or above, and in this order"
        )
    name, question = name.replace(" ", "_"), field(field(entry, "question", dict), "question_en")
    id = f"{SOURCE}/{name}"
    options, answer = choose(seed, id, labelled(entry, "options_en"), field(entry, "answer"))
    right = options[LETTERS.index(answer)]
    yield Question(
        id=id,
        video=folder.video(name if clip is None else field(entry, "local_video")),
        sport="badminton",
        dimension=DIMENSION[task],
        question=question,
        options=options,
        answer=answer,
        window=_window(strokes[match], start, end, task, question, right),
        group=f"{SOURCE}/{match}",
        provenance=f"{path} {number}: {task}, frames {start} to {end} of {match}",
    )
