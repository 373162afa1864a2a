"""SoccerBench: multiple-choice questions on soccer broadcasts. It is test material: never train on
it.

`qa/q8.json` … `qa/q14.json` are about videos: entries {Q, materials, openA, closeA: "O2", O1 … O9}.
Where there are none of these, any JSON list of such entries is read, as SoccerRef-Agents'
`video_600.json`, whose materials are {path, context}: its clips are MVFoul's train split. `group`
is the match, in the form that SoccerReplay-1988 and MVFoul have too, else the action of MVFoul, so
that a split can keep them apart.

Quirks: `materials` may be null, ["none"] or a picture; may name replays to compare, which one
question cannot show; and may begin with the folders of whoever has packed the files anew, which end
before `materials/`. Of the views of one foul the second is shown, as with MVFoul: the first stands
far off. `q14` names them without a split, and none above action_300: they are MVFoul's test split.
Labels have gaps. `closeA` is sometimes the option's sentence, and is left out of a challenge. One
position holds most of the right answers, so options are shuffled.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import brief, field, option
from data_prep.options import by_label, choose
from data_prep.sources import IMAGES, Folder, Skip, foul_group, match_group, place_of
from nanosport.records import Question, is_text

SOURCE = "soccerbench"
LICENCE = "CC BY-NC-SA 4.0; test only"
VIEW = re.compile(r"/clip_\d+(\.\w+)?$")
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
        yield from folder.each(path, partial(_question, folder, seed, path))


def _material(entry) -> tuple[str, str]:
    """(path, group) of the entry's one video."""
    materials = entry.get("materials") or ["none"]
    if materials == ["none"]:
        raise ValueError("materials: none, the question is about no video")
    materials = materials if isinstance(materials, list) else [materials]
    objects = [each if isinstance(each, dict) else {"path": each} for each in materials]
    paths, context = [each.get("path") for each in objects], objects[0].get("context")
    paths = [path.replace("\\", "/") for path in paths if is_text(path)]
    if len({VIEW.sub("", path) for path in paths}) != 1 or len(paths) < len(materials):
        raise ValueError(f"materials {brief(materials)}: must name one video, the question has one")
    path = re.sub(r"^.*/(?=materials/)", "", paths[len(paths) > 1])
    if path.lower().endswith(IMAGES):
        raise ValueError(f"materials {brief(path)}: a picture, the question is about no video")
    context = context if isinstance(context, str) else ""
    alone = re.search(r"q14/(action_\d+)/", path)
    group = match_group(path) or match_group(context) or foul_group(path)
    group = f"mvfoul/test/{alone[1]}" if alone and not group else group
    if group is None:
        raise ValueError(
            f"materials {path!r}: names no match, so an overlap with training matches could not "
            "be found"
        )
    return path, group


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    task, question = Path(path).stem.lower(), field(entry, "Q")
    material, group = _material(entry)
    labels = [key for key in entry if re.fullmatch(r"O\d+", key)]
    id = f"{SOURCE}/{place_of(path)}/{number}"
    offered = by_label({key: entry[key] for key in sorted(labels, key=lambda key: int(key[1:]))})
    options, answer = choose(seed, id, offered, option(entry, "closeA"))
    yield Question(
        id=id,
        video=folder.video(material),
        sport="soccer",
        dimension=DIMENSION.get(task, "rules"),
        question=question,
        options=options,
        answer=answer,
        group=group,
        provenance=f"{path} {number}: {material}",
    )
