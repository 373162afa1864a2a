"""Frame-exact events: F3Set, the sets of E2E-Spot, and whatever comes in their form.

JSON lists of {video, num_frames, fps, events [{frame, label, comment}]}. Two kinds of questions:
what event number k of the clip is (four options), and at which frame an event happens that comes
once. `window` is the event's, EVENT_S around its frame, so that what a tool call shows can be
compared with what it should show, without a teacher.

Clips are folders of frames or files called as `video` says. Where there is none, but a file called
`<video>` without its `_<first>_<last>`, the clip is that part of it, by the file's own time stamps.

Quirks: `fps` may be -1, for frames without a rate. Some events lie behind the clip's end. Labels
are joined with `_`, and are short. The name is the only word on match and sport, but for the
folder.
"""

import re
from collections import Counter
from collections.abc import Iterator
from functools import partial
from pathlib import Path

from data_prep.entries import brief, field, read_entries
from data_prep.options import shuffle_options, template
from data_prep.sources import Folder, Skip, clip_name, frames_span, place_of, sport_of
from nanosport.records import Question

SOURCE = "events"
LICENCE = "as the data set's own page says"
EVENT_S = 0.5
"""An event's window begins and ends so long before and after its frame."""
WORDS = {
    "fh": "forehand", "bh": "backhand", "gs": "groundstroke", "apr": "approach",
    "cc": "cross-court", "dl": "down the line", "dm": "down the middle", "io": "inside-out",
    "ii": "inside-in", "t": "down the T", "b": "to the body", "w": "wide", "err": "error",
    "vt": "vault", "bb": "balance beam", "fx": "floor", "ub": "uneven bars", "fligh": "flight",
    "som(s).tuck": "somersault in tuck", "som(s).pike": "somersault in pike",
    "twist(s)": "twist", "swing": "racket swing",
}  # fmt: skip
ASK = {
    "what": (
        "Which of these is event number {} of the clip?",
        "Count the events of the clip: what is number {}?",
    ),
    "when": (
        "At which frame does this happen: {}? Within {} frames counts as right.",
        "Give the frame of this event, to within {1} frames: {0}.",
    ),
}


def words(label: str) -> str:
    """A label in words: far_ad_serve_-_-_T_-_in is "far ad serve down the T in"."""
    parts = (part.strip() for part in label.split("_") if part.strip("- "))
    return " ".join(WORDS.get(part.lower(), part) for part in parts).strip()


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.named(r".*\.jsonl?", "JSON list of clips with events"):
        labels = set()
        for entry in read_entries(root / path):
            rows = entry.get("events") if isinstance(entry, dict) else None
            for row in rows if isinstance(rows, list) else []:
                if isinstance(row, dict) and isinstance(row.get("label"), str):
                    labels.add(words(row["label"]))
        others = sorted(labels - {""})
        yield from folder.each(path, partial(_questions, folder, seed, path, others))


def group_of(name: str, sport: str) -> str:
    """The match or video that a clip is of, as the other data sets call it that have it too."""
    name = clip_name(name)
    if gym := re.match(r"([\w-]{11})_E_\d+", name):
        return f"sports_qa/{gym[1]}"  # FineGym's
    if dive := re.fullmatch(r"(.+)__\d+", name):
        return f"finediving/{dive[1]}"
    return f"{SOURCE}/{sport}/{re.sub(r'_[0-9]+_[0-9]+$', '', name)}"


def _rate(fps) -> float:
    """Frames a second; 25 where none are given. Raises ValueError where they are no number."""
    try:
        rate = float(-1 if fps is None else fps)
    except (TypeError, ValueError, OverflowError):
        raise ValueError(f"fps {brief(fps)}: must be a number") from None
    return rate if 0 < rate < 1000 else 25.0


def _clip(folder: Folder, name: str) -> tuple[str, tuple | None]:
    """(video, span) of a clip."""
    try:
        return folder.video(name), None
    except ValueError:
        part = re.fullmatch(r"(.+)_(\d+)_(\d+)(\.\w+)?", name)
        try:
            video = folder.video(part[1]) if part else None
        except ValueError:
            video = None
        if video is None:
            raise
    return video, frames_span(folder.root / video, int(part[2]), int(part[3]) - 1)


def _questions(
    folder: Folder, seed: int, path: str, labels: list[str], number: int, entry
) -> Iterator[Question | Skip]:
    name, num_frames = field(entry, "video"), field(entry, "num_frames", int)
    rate = _rate(entry.get("fps"))
    video, span = _clip(folder, name)
    sport = sport_of(path, name, folder.root.name)
    rows, where = field(entry, "events", list), f"{path} {number}"
    common = {
        "video": video, "sport": sport, "span_s": span, "group": group_of(name, sport),
        "provenance": f"{where}: {name}",
    }  # fmt: skip
    place = f"{SOURCE}/{place_of(path)}/{number}"
    yield from event_questions(rows, num_frames, rate, labels, (seed, place, where), common)


def event_questions(
    rows: list, num_frames: int, rate: float, labels: list[str], at: tuple, common: dict
) -> Iterator[Question | Skip]:
    """The questions on a clip's events. rate: frames a second; labels: those of all events, in
    words; at: seed, start of the ids and place in the file; common: the other fields."""
    seed, place, where = at
    near = max(1, round(EVENT_S * rate))
    try:
        events = sorted((field(row, "frame", int), words(field(row, "label"))) for row in rows)
    except ValueError as error:  # the others would be counted wrongly
        yield Skip(where, f"events: {error}")
        return
    times = Counter(label for _, label in events)
    for k, (frame, label) in enumerate(events, 1):
        if not 0 <= frame < num_frames:
            yield Skip(f"{where}, event {k}", f"frame {frame}: the clip has {num_frames}")
            continue
        window = (max(0, frame - near), min(num_frames - 1, frame + near))
        base = {"dimension": "recognition", "window": window, **common}
        id = f"{place}/{k}/what"
        others = (other for other in labels if other != label)
        try:
            options, letter = shuffle_options(seed, id, label, others, num=4)
            text = template(seed, id, ASK["what"]).format(k)
            yield Question(id=id, question=text, options=options, answer=letter, **base)
        except ValueError as error:
            yield Skip(f"{where}, event {k}", str(error))
        if times[label] == 1:
            id, within = f"{place}/{k}/when", max(2, near // 2)
            text = template(seed, id, ASK["when"]).format(label, within)
            answer = {"options": (), "answer": str(frame), "kind": "number"}
            yield Question(id=id, question=text, tolerance=float(within), **answer, **base)
