"""T3-Set: multi-ball table tennis training, with what two coaches said about each round.

`<player>/<technique>/round_NN/` holds `video/remote/` (else `video/right/`) and, in folders or
files named after comments or suggestions, lists of {start "HH:MM:SS,mmm", end, text, comment_en,
suggestion_key, suggestion_type, type, stroke_index, index}. Questions, all of coaching: what the
coach says (one a comment, open), what part of the stroke the coaches correct (one a round and part)
and what is wrong with it.

Quirks: keys are written with spaces or underscores. `index` is sometimes `comment_index`. The text
is Chinese: the English `comment_en` is used. A `realtime` comment is about what was just played, so
its clip begins LEAD_S before; a `global` one is about the whole round. The official split is by
round and so has every player on both sides: `group` is the player.
"""

import re
from collections import defaultdict
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import brief, field, read_entries
from data_prep.options import shuffle_options, template
from data_prep.sources import Folder, Skip, each
from nanosport.records import Question

SOURCE = "t3set"
LICENCE = "CC BY-NC-SA 4.0"
LEAD_S = 5.0
KEYS = (
    "center of gravity", "time of striking ball", "angle of racket", "backswing of racket",
    "grip of racket", "waist", "upper body", "right wrist", "right shoulder", "right forearm",
    "right upper arm", "right elbow", "right hand", "right finger", "right foot", "right leg",
    "right knee", "left wrist", "left shoulder", "left elbow", "left hand", "left foot", "left leg",
    "left knee",
)  # fmt: skip
TYPES = {
    "position": "where it is or how it moves",
    "strength": "the force it gives",
    "stability": "that it is not kept stable",
    "racket": "how it goes with the racket",
}
ASK = {
    "advice": (
        "You coach this player, who trains the {}. What do you say?",
        "What should this player change in the {}?",
        "Give this player one piece of advice on the {}.",
    ),
    "key": (
        "Which of these does the coach correct in this player's {}?",
        "The player trains the {}. Which of these needs correction?",
    ),
    "type": (
        "In this player's {}, the coach corrects the {}. What is wrong?",
        "What is the fault that the coach sees in this player's {}, looking at the {}?",
    ),
}


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder, rounds, others = Folder(root), defaultdict(list), []
    for path in folder.named(r".*\.json", "JSON files of comments"):
        if place := re.fullmatch(r"(.*/round[ _-]?\d+)/.*(?:comment|suggestion).*", path, re.I):
            rounds[place[1]].append(path)
        else:
            others.append(Skip(path, "is not called after comments or suggestions of a round"))
    if not rounds:
        raise ValueError(
            f"{root}: holds no comments in <player>/<technique>/round_NN/; --root is the folder "
            "of the players"
        )
    yield from others
    for place, paths in rounds.items():
        *_, player, technique, _ = ("", "", *place.split("/"))
        videos = [video for video in folder.videos if video.startswith(place + "/")]
        if not player or not videos:
            lacking = "video" if player else "player: it must lie in <player>/<technique>/"
            yield Skip(place, f"the round has no {lacking}")
            continue
        common = {
            "video": min(
                videos, key=lambda video: ("/remote/" not in video, "/right/" not in video, video)
            ),
            "sport": "table tennis",
            "dimension": "assessment",
            "group": f"{SOURCE}/{player}",
        }
        said = [
            (f"{path} {n}", entry)
            for path in paths
            for n, entry in enumerate(read_entries(root / path))
        ]
        technique = technique.replace("_", " ")
        yield from each("", said, partial(_advice, seed, technique, common))
        yield from _corrections(seed, technique, common, place, said)


def _key(entry) -> str | None:
    """The part of the body or stroke, in words; None for "others"."""
    key = field(entry, "suggestion_key").lower().replace("_", " ")
    if key not in (*KEYS, "others"):
        raise ValueError(f"suggestion_key {key!r}: is no known part")
    return None if key == "others" else key


def _seconds(text: str) -> float:
    if not (clock := re.fullmatch(r"(\d{1,2}):(\d\d):(\d\d)[,.](\d{1,3})", text)):
        raise ValueError(f"time {text!r}: must be HH:MM:SS,mmm")
    return 3600 * int(clock[1]) + 60 * int(clock[2]) + int(clock[3]) + float(f"0.{clock[4]}")


def _advice(seed: int, technique: str, common: dict, where: str, entry) -> Iterator[Question]:
    span, id = None, f"{SOURCE}/{where.replace('.json ', '/')}/advice"
    if field(entry, "type") == "realtime":
        start, end = _seconds(field(entry, "start")), _seconds(field(entry, "end"))
        if end < start:
            raise ValueError(f"end {entry['end']!r}: must not be before start {entry['start']!r}")
        span = (max(0.0, start - LEAD_S), end)
    elif entry["type"] != "global":
        raise ValueError(f"type {entry['type']!r}: must be global or realtime")
    yield Question(
        id=id,
        question=template(seed, id, ASK["advice"]).format(technique),
        options=(),
        answer=field(entry, "comment_en"),
        span_s=span,
        provenance=f"{where}, index {brief(entry.get('index', entry.get('comment_index')))}",
        **common,
    )


def _corrections(
    seed: int, technique: str, common: dict, place: str, said: list[tuple]
) -> Iterator[Question | Skip]:
    """What the coaches correct in a round; wrong options are parts that neither of them spoke
    of."""
    types, first = defaultdict(set), {}
    for where, entry in said:
        try:
            if key := _key(entry):
                first.setdefault(key, where)
                types[key].add(field(entry, "suggestion_type").lower())
        except ValueError as error:
            yield Skip(f"{where}, correction", str(error))

    def make(key: str, kinds: set[str]) -> Iterator[Question]:
        asked = [("key", key, (other for other in KEYS if other not in types))]
        if len(kinds) == 1 and (kind := min(kinds)) in TYPES:
            asked.append(("type", TYPES[kind], (TYPES[other] for other in TYPES if other != kind)))
        for task, right, wrong in asked:
            id = f"{SOURCE}/{place}/{key.replace(' ', '_')}/{task}"
            options, answer = shuffle_options(seed, id, right, wrong, num=4)
            yield Question(
                id=id,
                question=template(seed, id, ASK[task]).format(technique, key),
                options=options,
                answer=answer,
                provenance=first[key],
                **common,
            )

    yield from each(place, types.items(), make)
