"""What must stay in one split: records that share a group, a video or a soccer match, and all that
a test-only source has.

`tied` finds which records belong together before they are divided; `check_splits` looks for leaks
in files that are there, whoever made them (`python -m data_prep.split --check DIR`).
"""

import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from pathlib import Path

from data_prep.paths import real_video
from data_prep.sources import foul_group
from nanosport.records import Question, stream_records

SPLITS = ("sft", "rl", "test")
TEST_ONLY = {"soccerbench"}
"""Sources never to be trained on: SoccerBench is a published benchmark, partly on matches that
SoccerReplay-1988 has too."""
NO_TEAM = frozenset(
    "league premier liga serie bundesliga ligue champions uefa cup club football united city real "
    "afc ssc rcd vfl vfb tsg fsv ogc".split()
)
"""Words in the names of matches that say nothing about who plays."""


def is_test_only(source: str) -> bool:
    return source.casefold() in TEST_ONLY


def group_ties(group: str) -> list[tuple[str, str]]:
    """Names of what a group must not be parted from.

    A soccer match has a name for each word of its teams with its date besides: "2015-02-21 - 18-00
    Chelsea 1 - 1 Burnley" in SoccerNet is "2015-02-21_chelsea-fc-burnley-fc-premier-league" in
    SoccerReplay-1988. Two matches of a day that share such a word ("manchester") are tied as well,
    which costs a little data, where a match overlooked would be a leak.
    """
    ties = [("group", group)]
    if match := re.fullmatch(r"soccer/[^/]+/(\d{4}-\d\d-\d\d)-(.+)", group):
        plain = "".join(
            c for c in unicodedata.normalize("NFKD", match[2]) if not unicodedata.combining(c)
        )
        ties += [
            ("match", f"{match[1]} {word}")
            for word in sorted(set(re.findall(r"[^\W\d_]{3,}", plain)) - NO_TEAM)
        ]
    return ties


def add_id(files: dict[str, Path], id: str, path: Path) -> None:
    """Note that a record is in this file. Raises ValueError where there is one of its id."""
    if id in files:
        raise ValueError(
            f"id {id!r}: is in {files[id]} and in {path}; ids must differ in all files"
        )
    files[id] = path


def question_ties(question: Question, video: str) -> list[tuple[str, str]]:
    """Of a question whose video really is `video`. A group that only repeats the video's name is no
    group of its own. A clip of MVFoul is known by its path, wherever the file lies, or by the real
    one, which may say more."""
    foul = foul_group(question.video) or foul_group(video)
    return [
        ("video", video),
        *(group_ties(foul) if foul else ()),
        *(group_ties(question.group) if question.group != question.video else ()),
    ]


def tied(ties: Iterable[Sequence[tuple[str, str]]]) -> list[int]:
    """For each record the number of the first one it is tied to, directly or through others
    (union-find)."""
    parent, first = [], {}

    def root(k: int) -> int:
        while parent[k] != k:
            parent[k] = k = parent[parent[k]]
        return k

    for k, names in enumerate(ties):
        parent.append(k)
        for name in names:
            one, other = sorted((root(first.setdefault(name, k)), root(k)))
            parent[other] = one
    return [root(k) for k in range(len(parent))]


def check_splits(paths: Iterable[Path], held_out: Iterable[str] = ()) -> int:
    """Number of records of the split files, whose names end in their split (test.jsonl; any other
    name is training).

    Raises ValueError, naming what leaks and where, if a group, a match or a video is in two of
    them, if a test-only source or something it shares is in training, or if two records have one
    id. `held_out` are groups that must not be in training.
    """
    held, where, files = {tie for group in held_out for tie in group_ties(group)}, {}, {}
    for path in map(Path, paths):
        split = path.stem.rpartition(".")[2]
        if path.is_file() and not path.stat().st_size:
            continue  # its target was 0, or nothing was left for it
        for *_, question in stream_records(path):
            add_id(files, question.id, path)
            if split != "test" and is_test_only(question.source):
                raise ValueError(
                    f"{question.id!r} is in {split}, but its source {question.source!r} is test "
                    "material only"
                )
            ties = question_ties(question, real_video(path, question))
            if split != "test" and (tie := next((tie for tie in ties if tie in held), None)):
                raise ValueError(
                    f"{' '.join(tie)!r} is in {split} ({question.id!r}), but a test-only source "
                    "has it: to test or nowhere"
                )
            for tie in ties:
                other, other_id = where.setdefault(tie, (split, question.id))
                if other != split:
                    raise ValueError(
                        f"{' '.join(tie)!r} is in {other} ({other_id!r}) and in {split} "
                        f"({question.id!r})"
                    )
    return len(files)


def check_folder(folder: Path) -> int:
    """check_splits on the three files of a folder; split.json, where it is there, says what was
    held out."""
    report, paths = folder / "split.json", [folder / f"{split}.jsonl" for split in SPLITS]
    if missing := [path for path in paths if not path.is_file()]:
        raise ValueError(
            f"{missing[0]}: no such file; --check takes a folder with sft.jsonl, rl.jsonl and "
            "test.jsonl"
        )
    try:
        held_out = json.loads(report.read_bytes())["held_out"] if report.is_file() else []
        return check_splits(paths, map(str, held_out))
    except (KeyError, TypeError, json.JSONDecodeError):
        raise ValueError(f"{report}: has no list held_out of groups; split again") from None
