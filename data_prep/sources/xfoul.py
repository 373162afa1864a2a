"""X-VARS (SoccerNet-XFoul) and its videos' labels (SoccerNet-MVFoul): fouls, as a referee sees and
explains them.

XFoul: lists of {path "<split>/action_N", question, answer}, open questions, or OSL files as the
module `osl` reads them. MVFoul:
`<split>/annotations.json` {Set, Actions {"N": {UrlLocal, Offence, Severity …, Clips [{Url, Camera
type, …}]}}} beside `<split>/action_N/clip_K.mp4`, made into one question a label. `group` is the
match of UrlLocal.

Quirks: one action has several clips; the first replay is shown where there is one, since the live
camera (clip 0) stands far off. Severity is a text "1.0" … "5.0". A label may be empty (not
annotated) and its case varies. UrlLocal has backslashes. The split is written `Train` here and
`train` there. Clips last about 5 s at 25 fps with the foul near frame 75, but no true window is
known. XFoul does not know the match: without its split's annotations.json an entry is skipped.
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
    osl,
    read_entries,
    read_items,
    shuffle_options,
    template,
)
from nanosport.records import Question

SOURCE = "xfoul"
LICENCE = "video under the SoccerNet NDA"
CARDS = {
    "1.0": "no card",
    "2.0": "between no card and a yellow card",
    "3.0": "a yellow card",
    "4.0": "between a yellow and a red card",
    "5.0": "a red card",
}
YES_NO = {"yes": "yes", "no": "no"}
ACTIONS = (
    "standing tackling", "tackling", "challenge", "holding", "elbowing", "high leg", "pushing",
    "dive",
)  # fmt: skip
LABELS = {  # field: (dimension, what each value means, ways to ask)
    "Offence": (
        "rules",
        {"offence": "a foul", "no offence": "no foul", "between": "on the borderline"},
        (
            "Is this a foul?",
            "How do you judge this duel: foul or no foul?",
            "You are the video referee. Is it an offence?",
        ),
    ),
    "Severity": (
        "rules",
        CARDS,
        (
            "Which card does the foul deserve?",
            "How should the referee punish this foul?",
            "What is the right sanction here?",
        ),
    ),
    "Action class": (
        "recognition",
        {action: action for action in ACTIONS},
        (
            "What kind of action is it?",
            "Which of these describes the duel?",
            "How does the player go into the opponent?",
        ),
    ),
    "Contact": (
        "recognition",
        {"with contact": "yes", "without contact": "no"},
        ("Do the players touch each other?", "Is there contact between the two players?"),
    ),
    "Bodypart": (
        "recognition",
        {"upper body": "the upper body", "under body": "the lower body"},
        (
            "With which part of the body is the duel fought?",
            "Which part of the body makes the contact?",
        ),
    ),
    "Try to play": (
        "rules",
        YES_NO,
        ("Does the player try to play the ball?", "Is it an attempt to play the ball?"),
    ),
    "Touch ball": (
        "recognition",
        YES_NO | {"maybe": "it cannot be told"},
        ("Does the player touch the ball?", "Is the ball touched in the duel?"),
    ),
    "Handball": (
        "rules",
        {"handball": "yes", "no handball": "no"},
        ("Is there a handball?", "Does a hand or an arm play the ball?"),
    ),
}  # fmt: skip


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder, actions, asked = Folder(root), {}, []
    for path in folder.named(r".*\.json", "annotations.json or XFoul list"):
        items, members = read_items(root / path, dict, list), set()
        for member, place, action in items:
            members.add(member)
            if member == "Actions":
                make = partial(_labels, folder, actions, seed, path)
                yield from each(path, [(place, action)], make)
        if "data" in members:
            yield from osl.read(folder, path, seed, (SOURCE, LICENCE))
        elif members <= {None}:
            asked.append(path)
        elif "Actions" not in members:
            raise ValueError(
                f"{root / path}: is neither a list of questions nor has Actions or OSL's data; "
                "remove it, or give another --root"
            )
    for path in asked:
        entries = enumerate(read_entries(root / path))
        yield from each(path, entries, partial(_question, actions, path))


def _labels(
    folder: Folder, actions: dict, seed: int, path: str, number: str, action
) -> Iterator[Question | Skip]:
    """One question a label; the action's (video, match) is kept in `actions` for XFoul."""
    split, place = (folder.root.resolve() / path).parent.name.lower(), f"action_{number}"
    if (match := match_group(field(action, "UrlLocal"))) is None:
        raise ValueError(f"UrlLocal {action['UrlLocal']!r}: must be league, season and match")
    clips = [field(clip, "Url").rpartition("/")[2] for clip in field(action, "Clips", list)]
    if not clips:
        raise ValueError("Clips: must name a clip")
    video = folder.video(f"{Path(path).parent.as_posix()}/{place}/{clips[min(1, len(clips) - 1)]}")
    actions[split, place] = video, match
    for name, (dimension, meaning, phrasings) in LABELS.items():
        id, value = f"{SOURCE}/{split}/{place}/{name.lower().replace(' ', '_')}", action.get(name)
        value = value.strip().lower() if isinstance(value, str) else value
        if not isinstance(value, str) or value not in meaning:
            yield Skip(
                f"{path} {number}, {name}",
                f"{name} {brief(value)}: is no known label" if value else f"{name}: not annotated",
            )
            continue
        wrong = [text for text in meaning.values() if text != meaning[value]]
        options, answer = shuffle_options(seed, id, meaning[value], wrong)
        yield Question(
            id=id,
            video=video,
            sport="soccer",
            dimension=dimension,
            question=template(seed, id, phrasings),
            options=options,
            answer=answer,
            source=SOURCE,
            group=match,
            provenance=f"{path} {number}: {name}",
            licence=LICENCE,
        )


def _question(actions: dict, path: str, number: int, entry) -> Iterator[Question]:
    place = re.search(r"(?:^|/)(\w+)/(action_\d+)$", field(entry, "path"))
    if not place:
        raise ValueError(f"path {entry['path']!r}: must be <split>/action_N")
    if (key := (place[1].lower(), place[2])) not in actions:
        raise ValueError(
            f"path {entry['path']!r}: not in the annotations.json of {key[0]}, which knows its "
            "match and its clips"
        )
    video, match = actions[key]
    yield Question(
        id=f"{SOURCE}/{Path(path).stem}/{number}",
        video=video,
        sport="soccer",
        dimension="rules",
        question=field(entry, "question"),
        options=(),
        answer=field(entry, "answer"),
        source=SOURCE,
        group=match,
        provenance=f"{path} {number}",
        licence=LICENCE,
    )
