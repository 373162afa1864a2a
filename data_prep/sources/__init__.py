"""One adapter a data set, and what they share.

A module of this package is a source: constants `SOURCE` (its name, which its question ids start
with) and `LICENCE`, and `records(root, seed)`, which yields a Question for each usable entry and a
Skip, with its place and reason, for each other one. `records_of` adds the two constants to each
question. `video` is relative to root. A fault of a whole file (cut off, of another type, a pickle
that is no plain data, not there) raises ValueError. Nothing is downloaded, and every choice depends
on the seed and the question's id alone, so the order of processing does not matter.
"""

import os
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePosixPath

import numpy as np

from data_prep.entries import read_entries
from data_prep.options import slug
from nanosport.records import Question
from nanosport.video import Video

VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
IMAGES = (".jpg", ".jpeg", ".png")
SHOWN = 300
"""Signs of a message."""


@dataclass(frozen=True)
class Skip:
    """An entry that gives no question."""

    where: str
    """File and entry."""
    why: str

    def __post_init__(self):
        for name in ("where", "why"):
            text = " ".join(getattr(self, name).split())
            shown = text if len(text) <= SHOWN else f"{text[:SHOWN]}…"
            object.__setattr__(self, name, shown)


def records_of(name: str, root: Path, seed: int) -> Iterator[Question | Skip]:
    """The records of a source, each question with the source's name and licence."""
    module = import_module(f"{__name__}.{name}")
    for item in module.records(root, seed):
        if isinstance(item, Question):
            item = replace(item, source=module.SOURCE, licence=module.LICENCE)
        yield item


class Folder:
    """All files below a data set's root, listed once. Hidden files are left out, and links to
    folders or out of root.

    files, videos: paths relative to root, sorted; a folder of frames is one video. links: those
    that are left out.
    """

    def __init__(self, root: Path):
        if not root.is_dir():
            raise ValueError(
                f"{root}: no such folder; --root is the folder of the downloaded data set"
            )
        self.root, self.files, self.videos, self.links = root, [], [], []
        self._named: dict[str, list[str]] = {}
        inside = root.resolve()
        for folder, folders, names in os.walk(root):
            folders[:] = sorted(name for name in folders if not name.startswith("."))
            self.links += [
                os.path.relpath(Path(folder, name), root)
                for name in folders
                if Path(folder, name).is_symlink()
            ]
            here = os.path.relpath(folder, root)
            here = "" if here == "." else here + "/"
            for name in sorted(name for name in names if not name.startswith(".")):
                suffix = os.path.splitext(name)[1].lower()
                if suffix in IMAGES:
                    continue
                path = Path(folder, name)
                if path.is_symlink() and not path.resolve().is_relative_to(inside):
                    self.links.append(here + name)
                    continue
                self.files.append(here + name)
                if suffix in VIDEOS:
                    self._add(here + name)
            suffixes = {os.path.splitext(name)[1].lower() for name in names}
            # beside videos they are thumbnails
            if here and suffixes & set(IMAGES) and not suffixes & set(VIDEOS):
                self._add(here[:-1])

    def _add(self, path: str) -> None:
        self.videos.append(path)
        parts = _bare(path).split("/")
        for key in {parts[-1], "/".join(parts[-2:])}:
            self._named.setdefault(key, []).append(path)

    def named(self, pattern: str, expected: str) -> list[str]:
        """Files whose name matches `pattern`, in any case. Raises ValueError with what was
        `expected` where there is none."""
        found = [
            path
            for path in self.files
            if re.fullmatch(pattern, path.rpartition("/")[2], re.IGNORECASE)
        ]
        if not found:
            raise ValueError(
                f"{self.root}: holds no {expected}{self._not_followed()}; --root is the folder of "
                "the downloaded data set"
            )
        return found

    def _not_followed(self) -> str:
        """What a message about a missing file adds where there are links."""
        if not self.links:
            return ""
        return (
            f" ({self.links[0]} is a link, which is not followed: mount the folder there, or move "
            "it; `hf download --local-dir` makes files)"
        )

    def each(self, path: str, make: Callable) -> Iterator[Question | Skip]:
        """What `make(number, entry)` yields for the entries of a file, as the function `each` has
        it."""
        return each(path, enumerate(read_entries(self.root / path)), make)

    def video(self, name: str) -> str:
        """The one video whose path ends in `name`, in any case, with or without its suffix.

        Raises ValueError where none or several do, and where the name is absolute, has `..` in it,
        or a NUL.
        """
        name = name.replace("\\", "/")
        parts = PurePosixPath(name).parts
        if not parts or name.startswith("/") or ".." in parts or "\0" in name:
            raise ValueError(f"video {name!r}: must be a path inside the data set")
        bare = _bare("/".join(parts))
        found = self._named.get("/".join(bare.split("/")[-2:]), [])
        found = [path for path in found if f"/{_bare(path)}".endswith(f"/{bare}")]
        if len(found) > 1:
            found = [path for path in found if path == name] or found
        if len(found) != 1:
            several = (
                f"names {len(found)} videos, {found[0]} and {found[1]}: remove one"
                if found
                else f"is not below root{self._not_followed()}"
            )
            raise ValueError(f"video {name!r}: {several}")
        return found[0]


def _bare(path: str) -> str:
    """A path in lower case, with composed letters and without a video's suffix."""
    path = unicodedata.normalize("NFC", path).lower()
    return os.path.splitext(path)[0] if path.endswith(VIDEOS) else path


def clip_name(path: str) -> str:
    """The last part of a video's path, without its suffix."""
    name = path.replace("\\", "/").rpartition("/")[2]
    return os.path.splitext(name)[0] if name.lower().endswith(VIDEOS) else name


def place_of(path: str) -> str:
    """What stands for a file in the ids of its questions: equal names in two folders differ."""
    return path.rpartition(".")[0].replace("/", "-")


def each(where: str, entries: Iterable[tuple], make: Callable) -> Iterator[Question | Skip]:
    """What `make(key, entry)` yields for each (key, entry); an entry it refuses with ValueError
    ends in a Skip."""
    for key, entry in entries:
        try:
            yield from make(key, entry)
        except ValueError as error:
            yield Skip(f"{where} {key}".strip(), str(error))


def joined(questions: Iterable[Question | Skip]) -> Iterator[Question | Skip]:
    """The questions, each open one once: its `also` are the answers that other entries give it. The
    open ones come last."""
    open_ones: dict[tuple, Question] = {}
    for item in questions:
        if isinstance(item, Skip) or item.kind != "open":
            yield item
            continue
        first = open_ones.setdefault((item.clip, item.question), item)
        if new := [answer for answer in item.answers if answer not in first.answers]:
            also = (*first.also, *new)
            open_ones[first.clip, first.question] = replace(first, also=also)
        elif first is not item:
            yield Skip(item.provenance, "question and answer: another entry has both")
    yield from open_ones.values()


def match_group(path: str) -> str | None:
    """`soccer/<league_season>/<match>` of a path that names a soccer match, None where it names
    none.

    All soccer sources group by it, so that a match in two of them is found. Both parts are lower
    case with single hyphens, and a match starts with its date; SoccerNet writes "2015-02-21 - 18-00
    Chelsea 1 - 1 Burnley" and SoccerReplay-1988 "2015-02-21_chelsea-fc-burnley-fc-premier-league",
    so a check across the two has to compare the dates and the teams.
    """
    parts = path.replace("\\", "/").split("/")
    for k, part in enumerate(parts[:-1]):
        if season := re.fullmatch(r"(?:(.+)_)?(\d{4}-\d{4})", part):
            league = season[1] or (parts[k - 1] if k else "")
            return "/".join(["soccer", slug(f"{league} {season[2]}"), slug(parts[k + 1])])
    return None


def foul_group(path: str) -> str | None:
    """`mvfoul/<split>/action_N` of a path that names a clip of SoccerNet-MVFoul, as every data set
    that has it does; None where it names none. The folder of a split may be called `train_720p` or
    `Chall`."""
    path = path.replace("\\", "/")
    found = re.search(r"(?:^|/)(train|valid|test|chall)[^/]*/(action_\d+)", path, re.I)
    return f"mvfoul/{found[1]}/{found[2]}".lower() if found else None


SPORTS = {  # the word for it where that is not its name
    "table.?tennis": "table tennis", "american.?football": "american football",
    "hockey": "ice hockey", "nba": "basketball", "skating|fs_(comp|perf)": "figure skating",
    "gym": "gymnastics", "soccer|football|foul": "soccer",
} | {name: name for name in (
    "tennis", "badminton", "basketball", "volleyball", "diving", "baseball", "boxing", "fencing",
)}  # fmt: skip


def sport_of(*texts: str) -> str:
    """The sport that the first of these texts names; `sports` where none does."""
    for text in texts:
        for words, sport in SPORTS.items():
            if re.search(words, text, re.I):
                return sport
    return "sports"


@lru_cache(maxsize=8)
def _times(video: str) -> np.ndarray:
    return Video(video).times_s


def frames_span(video: Path, first: int, last: int) -> tuple[float, float]:
    """The seconds of the frames `first` to `last` of a video, from its own time stamps. Raises
    ValueError where it cannot be opened, or has not so many."""
    times = _times(str(video))
    if not 0 <= first < last < len(times):
        raise ValueError(f"frames {first} to {last}: its video {video.name} has {len(times)}")
    return float(times[first]), float(times[last])
