"""SoccerBench: multiple-choice questions on soccer broadcasts. It is test material: never train on
it.

`qa/q8.json` … `qa/q14.json` are about videos: entries {Q, materials, openA, closeA: "O2", O1 … O9}.
`group` is the match, in the form that SoccerReplay-1988 has too, so that a split can keep the two
apart.

Quirks: `materials` may be null, and may name several videos (replays to compare, views of one
foul), which one question cannot show: both are skipped. Labels have gaps. `closeA` is sometimes the
option's sentence. One position holds most of the right answers, so options are shuffled.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.sources import Folder, Skip, brief, choose, each, field, match_group, read_entries
from nanosport.records import Question

SOURCE = "soccerbench"
LICENCE = "CC BY-NC-SA 4.0; test only"
DIMENSION = {  # tasks in the order of the benchmark's own list, which has no q7
    "q8": "recognition",  # camera switching
    "q9": "recognition",  # replay grounding
    "q10": "recognition",  # action classification
    "q11": "commentary",  # commentary generation
    "q12": "commentary",  # questions about a commentary
    "q13": "recognition",  # jersey colours
    "q14": "rules",  # fouls from several views
}


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.named(r"q([89]|1[0-4])\.json", "q8.json … q14.json"):
        yield from each(
            path, enumerate(read_entries(root / path)), partial(_question, folder, seed, path)
        )


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    task = Path(path).stem.lower()
    question, materials = field(entry, "Q"), entry.get("materials") or []
    if not isinstance(materials, list) or len(materials) != 1 or not isinstance(materials[0], str):
        raise ValueError(f"materials {brief(materials)}: must name one video, the question has one")
    if (group := match_group(materials[0])) is None:
        raise ValueError(
            f"materials {materials[0]!r}: names no match, so an overlap with training matches "
            "could not be found"
        )
    labels = sorted(
        (key for key in entry if re.fullmatch(r"O\d+", key) and entry[key]),
        key=lambda key: int(key[1:]),
    )
    id = f"{SOURCE}/{task}/{number}"
    options, answer = choose(
        seed, id, {label: field(entry, label) for label in labels}, field(entry, "closeA")
    )
    yield Question(
        id=id,
        video=folder.video(materials[0]),
        sport="soccer",
        dimension=DIMENSION[task],
        question=question,
        options=options,
        answer=answer,
        source=SOURCE,
        group=group,
        provenance=f"{path} {number}: {materials[0]}",
        licence=LICENCE,
    )
