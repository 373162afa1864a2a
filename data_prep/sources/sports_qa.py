"""Sports-QA: short questions on clips of MultiSports (ball games, aerobics) and FineGym.

`train.json`, `val.json`, `test.json`: lists of {qa_id, video "<prefix>/<stem>", type, question,
answer, ans_cls}. Clips are looked for by their stem.

Quirks: the prefix is the only word on the sport (`football` is soccer, `fg` is FineGym), and clips
often lie in other folders than it says. `group` is the YouTube video, whose id stands in
`v_<id>_cNNN_NN` (FineGym: `<id>_E_…`). Nearly half of the answers are yes, no, 1 or 2: yes and no
become options in random order, digits a number; `provenance` keeps the type, so that accuracy can
be told by type. `qa_id` may begin anew in each file.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import field, option
from data_prep.options import shuffle_options
from data_prep.sources import Folder, Skip, clip_name, place_of
from nanosport.records import Question

SOURCE = "sports_qa"
LICENCE = "none stated"
SPORTS = {
    "football": "soccer",
    "basketball": "basketball",
    "volleyball": "volleyball",
    "aerobic_gymnastics": "gymnastics",
    "fg": "gymnastics",
}
DIMENSION = {
    "descriptive": "recognition",
    "temporal": "recognition",
    "causal": "rules",
    "counterfactual": "rules",
}


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.named(r"(train|val|test)\.json", "train.json, val.json or test.json"):
        yield from folder.each(path, partial(_question, folder, seed, path))


def _question(folder: Folder, seed: int, path: str, number: int, entry) -> Iterator[Question]:
    clip = field(entry, "video").replace("\\", "/")
    prefix, stem = clip.partition("/")[0].lower(), clip_name(clip)
    if prefix not in SPORTS:
        raise ValueError(f"video {entry['video']!r}: must be in one of {', '.join(SPORTS)}")
    youtube = re.fullmatch(r"v_([\w-]{11})_c\d+_\d+|([\w-]{11})(?:_E_\w+)?", stem)
    if not youtube:
        raise ValueError(
            f"video {entry['video']!r}: must be v_<YouTube id>_cNNN_NN, the questions are "
            "grouped by that id"
        )
    if (kind := field(entry, "type").lower()) not in DIMENSION:
        raise ValueError(f"type {kind!r}: must be one of {', '.join(DIMENSION)}")
    qa_id, answer, options = option(entry, "qa_id"), option(entry, "answer"), ()
    id = f"{SOURCE}/{place_of(path)}/{qa_id}"
    scored, said = "number" if answer.isdecimal() else "open", answer.lower()
    if said in ("yes", "no"):
        scored, other = "choice", "no" if said == "yes" else "yes"
        options, answer = shuffle_options(seed, id, said, [other])
    yield Question(
        id=id,
        video=folder.video(stem),
        sport=SPORTS[prefix],
        dimension=DIMENSION[kind],
        question=field(entry, "question"),
        options=options,
        answer=answer,
        kind=scored,
        group=f"{SOURCE}/{youtube[1] or youtube[2]}",
        provenance=f"{path} {number}: qa_id {qa_id}, {kind}",
    )
