"""SoccerReplay-1988: matches with timed live comments, made into questions on clips of 30 s.

`<league_season>/<match>/` holds `1-half.mkv` and `2-half.mkv`; a JSON file in it, or called
`<match>.json` beside or apart from it, has comments [{half, time_stamp "MM:SS", comments_type,
comments_text_anonymized}]. Two questions a comment: what happens (recognition, four options) and
the comment itself (commentary, open).

Quirks: an older form calls the comments `event_descriptions`. Labels are spelt in several ways
(`off side` / `off-side`, `foul with no card` / `foul (no card)`, `start of half game` / `start of
game (half)`). "statistics and summary" shows nothing in the picture: skipped, as the authors do.
Times are counted from the start of each half's video.
"""

import re
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.sources import (
    Folder,
    Skip,
    brief,
    each,
    field,
    match_group,
    read_json,
    shuffle_options,
    template,
)
from nanosport.records import Question

SOURCE = "soccerreplay"
LICENCE = "gated, NDA; no redistribution"
DIMENSION = {"event": "recognition", "commentary": "commentary"}
AROUND_S = 15
EVENTS = (
    "corner", "goal", "injury", "own goal", "penalty", "penalty missed", "red card",
    "second yellow card", "substitution", "start of half", "end of half", "yellow card", "throw in",
    "free kick", "saved by goalkeeper", "shot off target", "clearance", "lead to corner", "offside",
    "var", "foul without card", "ball possession", "ball out of play",
)  # fmt: skip
SPELLINGS = {
    "startofgamehalf": "start of half",
    "startofhalfgame": "start of half",
    "endofgamehalf": "end of half",
    "endofhalfgame": "end of half",
    "foulnocard": "foul without card",
    "foulwithnocard": "foul without card",
} | {event.replace(" ", ""): event for event in EVENTS}
ASK = {
    "event": (
        "What happens in this clip?",
        "Which event does the clip show?",
        "Which of these is the key event of this passage of play?",
    ),
    "commentary": (
        "Comment on this moment of the match as a live commentator would, with [PLAYER], "
        "[TEAM], [COACH] and [REFEREE] for names.",
        "Write the live text comment for this clip. Put [PLAYER], [TEAM], [COACH] and "
        "[REFEREE] where names would stand.",
        "You report this match live. What do you say about this moment? Names become [PLAYER], "
        "[TEAM], [COACH] or [REFEREE].",
    ),
}


def event_type(label: str) -> str:
    """The one spelling of an event. Raises ValueError for what is none, or shows nothing."""
    letters = re.sub("[^a-z]", "", label.lower())
    if letters == "statisticsandsummary":
        raise ValueError("comments_type statistics and summary: shows nothing in the picture")
    if letters not in SPELLINGS:
        raise ValueError(f"comments_type {label!r}: is no known event")
    return SPELLINGS[letters]


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder, halves = Folder(root), {}
    for video in folder.videos:
        if (half := re.search(r"/([12])-half\.\w+$", video)) and (match := match_group(video)):
            halves[match, half[1]] = video
    for path in folder.named(r".*\.json", "JSON file of a match"):
        data = read_json(root / path, dict)
        comments = data.get("comments", data.get("event_descriptions"))
        if not isinstance(comments, list):
            raise ValueError(
                f"{root / path}: holds no list `comments` or `event_descriptions`; is it a "
                "match of this data set?"
            )
        if (match := match_group(path.removesuffix(".json"))) is None:
            raise ValueError(
                f"{root / path}: its path names no match; keep the folders <league_season>/<match>"
            )
        yield from each(path, enumerate(comments), partial(_questions, halves, match, seed, path))


def _questions(
    halves: dict, match: str, seed: int, path: str, number: int, entry
) -> Iterator[Question | Skip]:
    time, half = field(entry, "time_stamp"), brief(entry.get("half")).strip("'")  # 1 or "1"
    if not (clock := re.fullmatch(r"(\d{1,3}):([0-5]?\d)", time)):
        raise ValueError(f"time_stamp {time!r}: must be MM:SS")
    if (match, half) not in halves:
        raise ValueError(f"half {half}: the match has no video {half}-half.mkv below root")
    moment = 60 * int(clock[1]) + int(clock[2])
    for task, name in (("event", "comments_type"), ("commentary", "comments_text_anonymized")):
        id, options = f"{SOURCE}/{match.removeprefix('soccer/')}/{number}/{task}", ()
        try:
            answer = field(entry, name)
            if task == "event":
                right = event_type(answer)
                options, answer = shuffle_options(
                    seed, id, right, (event for event in EVENTS if event != right), num=4
                )
        except ValueError as error:
            yield Skip(f"{path} {number}, {task}", str(error))
            continue
        yield Question(
            id=id,
            video=halves[match, half],
            sport="soccer",
            dimension=DIMENSION[task],
            question=template(seed, id, ASK[task]),
            options=options,
            answer=answer,
            span_s=(float(max(0, moment - AROUND_S)), float(moment + AROUND_S)),
            source=SOURCE,
            group=match,
            provenance=f"{path} {number}",
            licence=LICENCE,
        )
