"""SoccerBench: multiple-choice questions on soccer broadcasts. It is test material: never train on
it.

`qa/q8.json` … `qa/q14.json` are about videos: entries {Q, materials, openA, closeA: "O2", O1 … O9}.
Where there are none of these, any JSON list of such entries is read, as SoccerRef-Agents'
`video_600.json`, whose materials are {path, context}: its clips are MVFoul's train split. `group`
is the match, in the form that SoccerReplay-1988 and MVFoul have too, else the action of MVFoul, so
that a split can keep them apart.

Quirks: `materials` may be null or ["none"], and may name several videos (replays to compare, views
of one foul), which one question cannot show: both are skipped. Labels have gaps. `closeA` is
sometimes the option's sentence. One position holds most of the right answers, so options are
shuffled.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.sources import (
    Folder,
    Skip,
    brief,
    choose,
    each,
    field,
    foul_group,
    match_group,
    option,
    read_entries,
)
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
    folder, numbered = Folder(root), r"q([89]|1[0-4])\.json"
    if not any(re.fullmatch(numbered, Path(path).name, re.I) for path in folder.files):
        numbered = r"(?!q\d+\.json).*\.json"
    for path in folder.named(numbered, "q8.json … q14.json"):
        yield from each(
            path, enumerate(read_entries(root / path)), partial(_question, folder, seed, path)
        )


def _material(entry) -> tuple[str, str]:
    """(path, group) of the entry's one video."""
    materials = entry.get("materials") or ["none"]
    if materials == ["none"]:
        raise ValueError("materials: none, the question is about no video")
    (path, *more), context = materials if isinstance(materials, list) else [None], None
    if isinstance(path, dict):
        path, context = path.get("path"), path.get("context")
    if not isinstance(path, str) or more:
        raise ValueError(f"materials {brief(materials)}: must name one video, the question has one")
    context = context if isinstance(context, str) else ""
    group = match_group(path) or match_group(context) or foul_group(path)
    if group is None:
        raise ValueError(
            f"materials {path!r}: names no match, so an overlap with training matches could not "
            "be found"
        )
    return path, group


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    task, question = Path(path).stem.lower(), field(entry, "Q")
    material, group = _material(entry)
    labels = sorted(
        (key for key in entry if re.fullmatch(r"O\d+", key) and entry[key]),
        key=lambda key: int(key[1:]),
    )
    id = f"{SOURCE}/{task}/{number}"
    options, answer = choose(
        seed, id, {label: option(entry, label) for label in labels}, field(entry, "closeA")
    )
    yield Question(
        id=id,
        video=folder.video(material),
        sport="soccer",
        dimension=DIMENSION.get(task, "rules"),
        question=question,
        options=options,
        answer=answer,
        source=SOURCE,
        group=group,
        provenance=f"{path} {number}: {material}",
        licence=LICENCE,
    )
