"""SPORTU, the video part: multiple-choice and open questions on clips of seven sports.

`SportU_Video_mc.json`: list of {id, question, options {A … D}, answer, "difficulty level"};
`SportU_Video_oe.json`: {id, question, answer, …}. `id` is the stem of the clip, whose folder and
suffix are not documented: it is looked for by its name. `SportU_text.json` is about no video: its
rows are skipped.

Quirks: ice hockey is `hockey_…`. Options may be numbers, and may repeat: a wrong one is then shown
once, and where the right one repeats the row is skipped. Many rows share an `id`, so a row's key is
(id, question). Case of names varies (`Badminton_1`, `soccer_3_0`, `SportU_video_oe.json`). Some
questions have two options only. `<sport>_<N>_<K>` are views of one play: `group` is `<sport>_<N>`.
There are no times and no official split.
"""

import hashlib
import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import field, option
from data_prep.options import by_label, choose
from data_prep.sources import Folder, Skip, clip_name, joined
from nanosport.records import Question

SOURCE = "sportu"
LICENCE = "none stated"
SPORTS = (
    "soccer", "basketball", "volleyball", "american football", "ice hockey", "baseball",
    "badminton",
)  # fmt: skip
DIMENSION = {  # by the first that the question matches
    "rules": r"foul|fault|rule|violat|penal|offside|referee|infraction|illegal|allowed",
    "assessment": r"error|mistake|technique|technical|tactic|strateg|improve|should",
    "recognition": "",
}


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.files:
        if path.lower().endswith("sportu_text.json"):
            yield from folder.each(path, _about_no_video)
    for path in folder.named(
        r"SportU_video_(mc|oe)\.json", "SportU_Video_mc.json or SportU_Video_oe.json"
    ):
        yield from joined(folder.each(path, partial(_question, folder, seed, path)))


def _about_no_video(number: int, entry) -> Iterator[Question]:
    raise ValueError("the question is about no video")


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    stem, question = clip_name(field(entry, "id")), field(entry, "question")
    answer, options = option(entry, "answer"), ()
    play = re.fullmatch(r"([a-z_ ]+?)_(\d+)(?:_\d+)?", stem.lower())
    sport = play[1].replace("_", " ") if play else ""
    sport = "ice hockey" if sport == "hockey" else sport
    if sport not in SPORTS:
        raise ValueError(
            f"id {stem!r}: must be <sport>_<N> or <sport>_<N>_<K>, with one of {', '.join(SPORTS)}"
        )
    kind = "mc" if path.lower().endswith("mc.json") else "oe"
    id = f"{SOURCE}/{stem}/{kind}/{hashlib.sha256(question.encode()).hexdigest()[:12]}"
    if kind == "mc":
        options, answer = choose(seed, id, by_label(field(entry, "options", dict)), answer)
    yield Question(
        id=id,
        video=folder.video(stem),
        sport=sport,
        dimension=next(
            name for name, pattern in DIMENSION.items() if re.search(pattern, question.lower())
        ),
        question=question,
        options=options,
        answer=answer,
        group=f"{SOURCE}/{play[1]}_{play[2]}",
        provenance=f"{path} {number}: {stem}",
    )
