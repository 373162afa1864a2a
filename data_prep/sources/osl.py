"""OSL, the form in which SoccerNet's data now comes, whatever the data set: XFoul, MVFouls,
SVFouls, gymnastics and so on. One question of each answered question, class, event and caption.

{"dataset_name", "labels": {head: {"type", "labels": [text]}}, "data": [{"id", "inputs": [{"type":
"video", "path", "fps"}], "metadata", "labels": {head: {"label"}}, "answers": [{"question",
"answers": [text | {"text"}]}], "events": [{"head", "label", "position_ms"}], "captions":
[{"text"}], "dense_captions": [{"text", "position_ms"}], "streaming_vqa": [{"question", "options":
[{"id", "text"}], "correct_option_id", "position_ms"}]}]}. The older form has "questions": [{"id",
"question"}] at the root, and answers [{"question_id", "answer"}].

Quirks: a question may have several answers, in one sample or in neighbouring ones (`action_0`,
`action_0__2`): all are right. Of several views the second is shown where they are clips of MVFoul,
whose first stands far off, else the first. Times may be texts. A class may be Unknown, or a number
that only the data set's own page explains. Events of whole matches are asked about in parts of half
a minute, in which a person can count them. `group` is the match that the metadata name, the action
of MVFoul, or the video.
"""

import re
from collections.abc import Iterator
from functools import partial
from itertools import groupby
from pathlib import Path

import numpy as np

from data_prep.entries import brief, field, option, read_items
from data_prep.options import by_label, choose, shuffle_options, template
from data_prep.sources import (
    Folder,
    Skip,
    each,
    foul_group,
    joined,
    match_group,
    place_of,
    sport_of,
)
from data_prep.sources.events import event_questions, words
from nanosport.records import Question, is_text
from nanosport.video import Video

SOURCE = "osl"
LICENCE = "as the data set's own page says"
AROUND_S = 5.0
"""A dense caption is about so long before and after its time."""
PART_S, WHOLE_S = 30.0, 60.0
"""A video of more than WHOLE_S seconds is cut into parts where its events are asked about."""
UNKNOWN = ("", "unknown", "n/a")
CLASS = ("Which of these is the {} here?", "What is the {} in this clip?")
CAPTION = ("Describe what happens in this clip.", "Report what this clip shows.")
RULES = r"foul|card|offen|sever|rule|penal|handball|referee|sanction|decision|\bvar\b"


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder = Folder(root)
    for path in folder.named(r".*\.json", "OSL file"):
        yield from read(folder, path, seed, SOURCE)


def read(folder: Folder, path: str, seed: int, source: str) -> Iterator[Question | Skip]:
    """The questions of an OSL file, in little memory. Raises ValueError where it is another one."""
    header: dict = {}
    for member, place, value in read_items(folder.root / path, dict):
        if place is None:
            header[member] = value
        else:
            if not isinstance(header.get(member), dict):
                header[member] = {}
            if member != "data":
                header[member][place] = value
    if not isinstance(header.get("data"), dict | list):
        raise ValueError(f"{folder.root / path}: holds no list `data` of samples; move it away")
    reader = Reader(folder, path, seed, source, header)
    items = read_items(folder.root / path, dict)
    samples = ((k, s) for member, k, s in items if member == "data" and k is not None)
    for _, same in groupby(samples, key=lambda pair: _base_id(*pair)):
        yield from reader.samples(list(same))


def _base_id(number: int, sample) -> str:
    """What the samples of one clip have in common that were written one after the other."""
    id = sample.get("id") if isinstance(sample, dict) else None
    return re.sub(r"__\d+$", "", id) if isinstance(id, str) and id else f"number {number}"


def _texts(metadata) -> list[str]:
    values = metadata.values() if isinstance(metadata, dict) else ()
    return [value for value in values if isinstance(value, str)]


def is_object(value) -> bool:
    return isinstance(value, dict)


def _list(value) -> list:
    """A list as it is, another value as a list of one, none of nothing."""
    return value if isinstance(value, list) else [value] if value else []


def _part(entry, name: str, of: type):
    """A list or object of an entry; it may be missing."""
    return field(entry, name, of) if isinstance(entry, dict) and entry.get(name) else of()


def _seconds(row, name: str = "position_ms") -> float:
    """A time of a row, which is a number or a text of milliseconds."""
    try:
        at_s = float(row.get(name)) / 1000
    except (AttributeError, TypeError, ValueError, OverflowError):
        at_s = -1.0
    if not 0 <= at_s < 1e6:
        raise ValueError(f"{name} of {brief(row)}: must be milliseconds from 0 on")
    return at_s


class Reader:
    """Makes questions of the samples of a file."""

    def __init__(self, folder: Folder, path: str, seed: int, source: str, header: dict):
        self.folder, self.path, self.seed = folder, path, seed
        named = (*_texts(header.get("metadata")), str(header.get("dataset_name")))
        self.sport = sport_of(*named, path, source)
        self.heads = {
            head: list(filter(is_text, schema["labels"]))
            for head, schema in _part(header, "labels", dict).items()
            if is_object(schema) and isinstance(schema.get("labels"), list)
        }
        asked = filter(is_object, _part(header, "questions", dict).values())
        self.asked = {str(each.get("id")): each.get("question") for each in asked}
        self.place = f"{source}/{place_of(path)}"

    def samples(self, same: list[tuple]) -> Iterator[Question | Skip]:
        """The questions of the samples of one clip."""
        answered: list[Question | Skip] = []
        forms = {
            "answers": self._answers,
            "labels": self._class,
            "captions": self._caption,
            "dense_captions": self._dense,
            "streaming_vqa": self._asked_then,
        }
        for number, sample in same:
            where = f"{self.path} {number}"
            try:
                common = self._common(where, sample)
            except ValueError as error:
                yield Skip(where, str(error))
                continue
            made = 0
            for name, make in forms.items():
                rows = sample.get(name)
                rows = list(rows.items()) if is_object(rows) else list(enumerate(_list(rows)))
                made += len(rows)
                found = each(f"{where}, {name}", rows, partial(make, number, common))
                if name == "answers":
                    answered += found
                else:
                    yield from found
            if sample.get("events"):
                made += 1
                yield from each(where, [("events", sample)], partial(self._events, number, common))
            if not made:
                yield Skip(where, "the sample has no question, class, event or caption")
        yield from joined(answered)

    def _common(self, where: str, sample) -> dict:
        """The fields that all questions of a sample share. Raises ValueError where it shows no
        video."""
        inputs = filter(is_object, field(sample, "inputs", list))
        views = [view for view in inputs if view.get("type", "video") == "video"]
        if not views:
            raise ValueError("inputs: name no video")
        path = field(views[0], "path")
        if foul_group(path):
            path = field(views[min(1, len(views) - 1)], "path")
        here = (Path(self.path).parent / path).as_posix()
        try:
            video = self.folder.video(here)
        except ValueError:
            video = self.folder.video(path)
        metadata = _part(sample, "metadata", dict)
        group = next(filter(None, map(match_group, _texts(metadata))), None)
        return {
            "video": video,
            "sport": sport_of(*_texts({"": metadata.get("sport")}), self.sport),
            "group": group or foul_group(path) or "",
            "provenance": f"{where}: {brief(sample.get('id'))}",
        }

    def _question(self, place: str, question: str, answer: str, common: dict, **more) -> Question:
        """A question, open where there are no options."""
        dimension = "rules" if re.search(RULES, question, re.IGNORECASE) else "recognition"
        values = {"dimension": dimension, "options": (), **common, **more}
        return Question(id=f"{self.place}/{place}", question=question, answer=answer, **values)

    def _answers(self, number: int, common: dict, k: int, group) -> Iterator[Question]:
        """A question with its answers."""
        asked = group.get("question") if is_object(group) else None
        if asked is None and is_object(group):
            asked = self.asked.get(str(group.get("question_id")))
        question = field({"question": asked}, "question")
        said = _list(group.get("answers")) or _list(group.get("answer"))
        texts = [text.get("text") if is_object(text) else text for text in said]
        texts = [option({"answer": text}, "answer") for text in texts if text not in (None, "")]
        if not texts:
            raise ValueError("answers: none is given")
        answer, *also = dict.fromkeys(texts)
        yield self._question(f"{number}/{k}", question, answer, common, also=tuple(also))

    def _class(self, number: int, common: dict, head: str, value) -> Iterator[Question]:
        """What the clip's class is, of those of its head."""
        said = value
        if is_object(value):
            said = value.get("labels") or value.get("label")
        said = said[0] if isinstance(said, list) and len(said) == 1 else said
        if not is_text(said) or not said.strip():
            raise ValueError(f"{head} {brief(value)}: must have one label")
        if said.strip().casefold() in UNKNOWN:
            raise ValueError(f"{head} {brief(said)}: is not annotated")
        if said.strip().isdecimal():
            raise ValueError(f"{head} {brief(said)}: is a number, and no class that can be seen")
        id = f"{self.place}/{number}/{head}"
        known = [words(text) for text in self.heads.get(head, ()) if text.casefold() not in UNKNOWN]
        same = [text for text in known if text.casefold() == words(said).casefold()]
        right, others = (*same, words(said))[0], (text for text in known if text not in same)
        options, letter = shuffle_options(self.seed, id, right, others)
        text = template(self.seed, id, CLASS).format(head.replace("_", " "))
        yield self._question(f"{number}/{head}", text, letter, common, options=options)

    def _caption(self, number: int, common: dict, k: int, row, **more) -> Iterator[Question]:
        """What is said of a clip."""
        place, more = f"{number}/caption{k}", {"dimension": "commentary", **more}
        text = template(self.seed, f"{self.place}/{place}", CAPTION)
        yield self._question(place, text, field(row, "text"), common, **more)

    def _dense(self, number: int, common: dict, k: int, row) -> Iterator[Question]:
        """What is said of a part of a clip."""
        field(row, "text")
        if row.get("start_ms") is not None:
            start_s, end_s = _seconds(row, "start_ms"), _seconds(row, "end_ms")
        else:
            start_s, end_s = _seconds(row) - AROUND_S, _seconds(row) + AROUND_S
        if end_s <= start_s:
            raise ValueError(f"end_ms {row['end_ms']}: must be after start_ms")
        span = (max(0.0, start_s), end_s)
        yield from self._caption(number, common, f"_dense{k}", row, span_s=span)

    def _asked_then(self, number: int, common: dict, k: int, row) -> Iterator[Question]:
        """A question that is asked at a time, about what was before."""
        question, right = field(row, "question"), option(row, "correct_option_id")
        offered = field(row, "options", list)
        if any(map(is_object, offered)):
            offered = {option(each, "id"): option(each, "text") for each in offered}
        else:
            offered = by_label(offered)
        place, span = f"{number}/then{k}", (0.0, _seconds(row))
        options, letter = choose(self.seed, f"{self.place}/{place}", offered, right)
        yield self._question(place, question, letter, common, options=options, span_s=span)

    def _events(self, number: int, common: dict, _, sample) -> Iterator[Question | Skip]:
        """What happens when."""
        rows = field(sample, "events", list)
        video = Video(str(self.folder.root / common["video"]))
        times, fps = video.times_s, video.fps
        size = len(times) if len(times) <= WHOLE_S * fps else round(PART_S * fps)
        parts: dict[int, list] = {}
        for k, row in enumerate(rows):
            at_s = _seconds(row)
            if at_s > video.end_s:
                why = f"position_ms {row['position_ms']}: the video ends at {video.end_s:.2f} s"
                yield Skip(f"{self.path} {number}, event {k}", why)
                continue
            at = np.searchsorted(times, at_s - 1e-3)
            part, frame = divmod(min(int(at), len(times) - 1), size)
            parts.setdefault(part, []).append({"frame": frame, "label": row.get("label")})
        labels = sorted({words(text) for texts in self.heads.values() for text in texts})
        for part, events in sorted(parts.items()):
            first, after = part * size, min((part + 1) * size, len(times))
            span, name = None, "event"
            if size < len(times):
                span, name = (float(times[first]), float(times[after - 1])), f"event{part}"
            place = self.seed, f"{self.place}/{number}/{name}", f"{self.path} {number}"
            more = common | {"span_s": span}
            yield from event_questions(events, after - first, fps, labels, place, more)
