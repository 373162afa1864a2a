"""X-VARS (SoccerNet-XFoul) and its videos' labels (SoccerNet-MVFoul): fouls, as a referee sees and
explains them.

XFoul: lists of {path "<split>/action_N", question, answer}, open questions, or OSL files as the
module `osl` reads them. MVFoul:
`<split>/annotations.json` {Set, Actions {"N": {UrlLocal, Offence, Severity …, Clips [{Url, Camera
type, …}]}}} beside `<split>/action_N/clip_K.mp4`, made into one question a label. `group` is the
match of UrlLocal.

Quirks: one action has several clips; the first replay is shown where there is one, since the live
camera (clip 0) stands far off. Severity is a text "1.0" … "5.0", or a number. A label may be empty
(not annotated) and its case varies. UrlLocal has backslashes. The split is written `Train` here and
`train` there, and its folder may be `train_720p`. Clips last about 5 s at 25 fps with the foul near
frame 75, but no true window is known. XFoul does not know the match: without its split's
annotations.json an entry is skipped. Several answers to one question are one record.
"""

from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

from data_prep.entries import brief, field, option, read_items
from data_prep.options import shuffle_options, template
from data_prep.sources import Folder, Skip, each, foul_group, joined, match_group, osl, place_of
from nanosport.records import Question, is_text

SOURCE = "xfoul"
LICENCE = "video under the SoccerNet NDA"
CARDS = {
    "1": "no card",
    "2": "between no card and a yellow card",
    "3": "a yellow card",
    "4": "between a yellow and a red card",
    "5": "a red card",
}
YES_NO = {"yes": "yes", "no": "no"}
ACTIONS = (
    "standing tackling", "tackling", "challenge", "holding", "elbowing", "high leg", "pushing",
    "dive",
)  # fmt: skip
LABELS = {  # field: (dimension, what each value means, ways to ask)
    "Offence": (
        "rules", {"offence": "a foul", "no offence": "no foul", "between": "on the borderline"},
        ("Is this a foul?", "How do you judge this duel: foul or no foul?",
         "You are the video referee. Is it an offence?"),
    ),
    "Severity": (
        "rules", CARDS,
        ("Which card does the foul deserve?", "How should the referee punish this foul?",
         "What is the right sanction here?"),
    ),
    "Action class": (
        "recognition", {action: action for action in ACTIONS},
        ("What kind of action is it?", "Which of these describes the duel?",
         "How does the player go into the opponent?"),
    ),
    "Contact": (
        "recognition", {"with contact": "yes", "without contact": "no"},
        ("Do the players touch each other?", "Is there contact between the two players?"),
    ),
    "Bodypart": (
        "recognition", {"upper body": "the upper body", "under body": "the lower body"},
        ("With which part of the body is the duel fought?",
         "Which part of the body makes the contact?"),
    ),
    "Try to play": (
        "rules", YES_NO,
        ("Does the player try to play the ball?", "Is it an attempt to play the ball?"),
    ),
    "Touch ball": (
        "recognition", YES_NO | {"maybe": "it cannot be told"},
        ("Does the player touch the ball?", "Is the ball touched in the duel?"),
    ),
    "Handball": (
        "rules", {"handball": "yes", "no handball": "no"},
        ("Is there a handball?", "Does a hand or an arm play the ball?"),
    ),
}  # fmt: skip


def records(root: Path, seed: int) -> Iterator[Question | Skip]:
    folder, actions, asked = Folder(root), {}, []
    for path in folder.named(r".*\.json", "annotations.json or XFoul list"):
        items, members = read_items(root / path, dict, list), set()
        for member, place, action in items:
            members.add(member)
            if member == "Actions" and place is not None:
                make = partial(_labels, folder, actions, seed, path)
                yield from each(path, [(place, action)], make)
        if "data" in members:
            yield from osl.read(folder, path, seed, SOURCE)
        elif members <= {None}:
            asked.append(path)
        elif "Actions" not in members:
            raise ValueError(
                f"{root / path}: is neither a list of questions nor has Actions or OSL's data; "
                "remove it, or give another --root"
            )
    for path in asked:
        yield from joined(folder.each(path, partial(_question, actions, path)))


def _labels(
    folder: Folder, actions: dict, seed: int, path: str, number: str, action
) -> Iterator[Question | Skip]:
    """One question a label; the action's (video, match) is kept in `actions` for XFoul."""
    split = (folder.root.resolve() / path).parent.name.lower().partition("_")[0]
    place = f"action_{number}"
    if (match := match_group(field(action, "UrlLocal"))) is None:
        raise ValueError(f"UrlLocal {action['UrlLocal']!r}: must be league, season and match")
    clips = [field(clip, "Url").rpartition("/")[2] for clip in field(action, "Clips", list)]
    if not clips:
        raise ValueError("Clips: must name a clip")
    video = folder.video(f"{Path(path).parent.as_posix()}/{place}/{clips[min(1, len(clips) - 1)]}")
    actions[foul_group(f"{split}/{place}")] = video, match

    def make(name: str, label: tuple) -> Iterator[Question]:
        dimension, meaning, phrasings = label
        id, value = f"{SOURCE}/{split}/{place}/{name.lower().replace(' ', '_')}", action.get(name)
        with suppress(ValueError):
            value = option(action, name).lower().removesuffix(".0")
        if not is_text(value) or value not in meaning:
            why = f" {brief(value)}: is no known label" if value else ": not annotated"
            raise ValueError(f"{name}{why}")
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
            group=match,
            provenance=f"{path} {number}: {name}",
        )

    yield from each(f"{path} {number},", LABELS.items(), make)


def _question(actions: dict, path: str, number: int, entry) -> Iterator[Question]:
    if (place := foul_group(field(entry, "path"))) is None:
        raise ValueError(f"path {entry['path']!r}: must be <split>/action_N")
    if place not in actions:
        raise ValueError(
            f"path {entry['path']!r}: not in the annotations.json of its split, which knows its "
            "match and its clips"
        )
    video, match = actions[place]
    yield Question(
        id=f"{SOURCE}/{place_of(path)}/{number}",
        video=video,
        sport="soccer",
        dimension="rules",
        question=field(entry, "question"),
        options=(),
        answer=field(entry, "answer"),
        group=match,
        provenance=f"{path} {number}",
    )
