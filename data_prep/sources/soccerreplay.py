"""SoccerReplay-1988: matches with timed live comments, made into questions on clips of 30 s.

`<league_season>/<match>/` holds `1-half.mkv` and `2-half.mkv`; a JSON file in it, or called
`<match>.json` beside or apart from it, has comments [{half, time_stamp "MM:SS", comments_type,
comments_text_anonymized}]. Two questions a comment: what happens (recognition, four options) and
the comment itself (commentary, open).

Two more forms of the same matches: AI4Soccer's `<match>.json`, lists of {question, choices ["A.
…"], answer "A", type, current_event_index}, questions on what was shown until an event; and
UniSoccer's `classification_*.json`, lists of {video, caption, comments_text_anonymized} on clips
that are cut.

Quirks: an older form calls the comments `event_descriptions`. Labels are spelt in several ways
(`off side` / `off-side`, `foul with no card` / `foul (no card)`, `start of half game` / `start of
game (half)`). "statistics and summary" shows nothing in the picture: skipped, as the authors do.
Times are counted from the start of each half's video. A half is a video of its own: AI4Soccer's
questions on both halves are skipped, and so are those on what will come.
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_prep.entries import brief, field, read_items
from data_prep.options import choose, labelled, shuffle_options, slug, template
from data_prep.sources import Folder, Skip, each, match_group, place_of
from nanosport.records import Question

SOURCE = "soccerreplay"
LICENCE = "gated, NDA; no redistribution"
AROUND_S = 15
COMMENTS = ("comments", "event_descriptions")
EVENTS = (
    "corner", "goal", "injury", "own goal", "penalty", "penalty missed", "red card",
    "second yellow card", "substitution", "start of half", "end of half", "yellow card", "throw in",
    "free kick", "saved by goalkeeper", "shot off target", "clearance", "lead to corner", "offside",
    "var", "foul without card", "ball possession", "ball out of play", "show added time",
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


def match_of(path: str) -> str | None:
    """The match that a path names, by league and season where it says so, else by its date."""
    dated = (part for part in path.split("/") if re.match(r"\d{4}-\d\d-\d\d[ _-]", part))
    return match_group(path) or next(
        (f"soccer/unknown-season/{slug(part)}" for part in dated), None
    )


class Matches:
    """The videos of the matches below root, and when their events are."""

    def __init__(self, folder: Folder, paths: list[str]):
        self.folder, self.halves, self.files = folder, {}, defaultdict(list)
        self.last: dict[str, dict] = {}
        for video in folder.videos:
            if (half := re.search(r"/([12])-half\.\w+$", video)) and (match := match_of(video)):
                self.halves[match.rpartition("/")[2], half[1]] = video, match
        for path in paths:
            if match := match_of(path.rpartition(".")[0]):
                self.files[match.rpartition("/")[2]].append(path)

    def half(self, match: str, half: str) -> tuple[str, str]:
        """(video, group). Raises ValueError where the half has no video."""
        if (found := self.halves.get((match.rpartition("/")[2], half))) is None:
            raise ValueError(f"half {half}: the match has no video {half}-half.mkv below root")
        return found

    def events(self, match: str) -> dict[int, tuple[str, int]]:
        """(half, second) of each comment of a match by its index."""
        if match in self.last:
            return self.last[match]
        self.last = {match: (found := {})}
        for path in self.files[match.rpartition("/")[2]]:
            for member, place, entry in read_items(self.folder.root / path, dict, list):
                if member in COMMENTS and isinstance(entry, dict):
                    with suppress(ValueError):
                        index = place if entry.get("index") is None else entry["index"]
                        found[field({"index": index}, "index", int)] = _moment(entry)
        return found


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    paths = folder.named(r".*\.json", "JSON file of a match")
    matches = Matches(folder, paths)
    for path in paths:
        match, used = match_of(path.rpartition(".")[0]), False
        for member, place, entry in read_items(root / path, dict, list):
            make = _form(member, entry)
            if make is not None:
                used = True
                ask = partial(make, matches, match, seed, path)
                yield from each(path, [] if place is None else [(place, entry)], ask)
        if not used:
            yield Skip(path, "holds no comments of a match, and no questions on one")


def _form(member: str | None, entry) -> Callable | None:
    """What makes questions of an entry; None where it is none."""
    if member is None:
        is_asked = isinstance(entry, dict) and "choices" in entry
        return _about_half if is_asked else _clip
    return _questions if member in COMMENTS else None


def _moment(entry) -> tuple[str, int]:
    """(half, second) of a comment."""
    time, half = field(entry, "time_stamp"), str(field(entry, "half", int))
    if not (clock := re.fullmatch(r"(\d{1,3}):([0-5]?\d)", time)):
        raise ValueError(f"time_stamp {time!r}: must be MM:SS")
    return half, 60 * int(clock[1]) + int(clock[2])


def _about_half(
    matches: Matches, match: str | None, seed: int, path: str, number: int, entry
) -> Iterator[Question]:
    """A question of AI4Soccer's."""
    about, span = field(entry, "type"), None
    if about == "future":
        raise ValueError("type 'future': asks what will come, which is not in the picture")
    if about not in ("past", "half"):
        raise ValueError(f"type {about!r}: asks about both halves, which are two videos")
    if match is None:
        raise ValueError("its path names no match: keep the file's name")
    if about == "past":
        event = field(entry, "current_event_index", int)
        half, second = matches.events(match).get(event, ("", 0))
        if half != "1":
            why = (
                "asks about both halves, which are two videos" if half else "its JSON is not there"
            )
            raise ValueError(f"type 'past', event {brief(event)} of the match: {why}")
        span = (0.0, float(second + AROUND_S))
    video, group = matches.half(match, "1")
    id = f"{SOURCE}/{place_of(path)}/{number}"
    options, answer = choose(seed, id, labelled(entry, "choices"), field(entry, "answer"))
    yield Question(
        id=id,
        video=video,
        sport="soccer",
        dimension="recognition",
        question=field(entry, "question"),
        options=options,
        answer=answer,
        span_s=span,
        group=group,
        provenance=f"{path} {number}",
    )


def _clip(
    matches: Matches, match: str | None, seed: int, path: str, number: int, entry
) -> Iterator[Question | Skip]:
    """A clip of UniSoccer's."""
    name = field(entry, "video")
    if (group := match_group(name)) is None:
        raise ValueError(f"video {name!r}: names no match")
    about = matches.folder.video(name), group, None
    id = f"{SOURCE}/{place_of(path)}/{number}"
    fields = (("event", "caption"), ("commentary", "comments_text_anonymized"))
    yield from _ask(about, id, seed, f"{path} {number}", entry, fields)


def _questions(
    matches: Matches, match: str | None, seed: int, path: str, number: int, entry
) -> Iterator[Question | Skip]:
    """A comment on a match."""
    if match is None:
        raise ValueError("its path names no match: keep the folders <league_season>/<match>")
    half, moment = _moment(entry)
    video, group = matches.half(match, half)
    about = video, group, (float(max(0, moment - AROUND_S)), float(moment + AROUND_S))
    id = f"{SOURCE}/{group.removeprefix('soccer/')}/{number}"
    fields = (("event", "comments_type"), ("commentary", "comments_text_anonymized"))
    yield from _ask(about, id, seed, f"{path} {number}", entry, fields)


def _ask(
    about: tuple, place: str, seed: int, where: str, entry, fields: tuple
) -> Iterator[Question | Skip]:
    """What happens, and how it is commented on. about: video, group and span."""
    video, group, span = about

    def make(task: str, name: str) -> Iterator[Question]:
        if task == "commentary" and name not in entry:
            return  # a form without comments
        id, options, answer = f"{place}/{task}", (), field(entry, name)
        if task == "event":
            right = event_type(answer)
            others = (event for event in EVENTS if event != right)
            options, answer = shuffle_options(seed, id, right, others, num=4)
        yield Question(
            id=id,
            video=video,
            sport="soccer",
            dimension="recognition" if task == "event" else "commentary",
            question=template(seed, id, ASK[task]),
            options=options,
            answer=answer,
            span_s=span,
            group=group,
            provenance=where,
        )

    yield from each(f"{where},", fields, make)
