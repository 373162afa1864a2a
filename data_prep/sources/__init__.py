"""One adapter a data set, and what they share.

A module of this package is a source: constants `SOURCE` (its name, which its question ids start
with) and `LICENCE`, and `records(root, seed)`, which yields a Question for each usable entry and a
Skip, with its place and reason, for each other one. `records_of` adds the two constants to each
question. `video` is relative to root. A fault of a whole file (cut off, of another type, a pickle
that is no plain data, not there) raises ValueError. Nothing is downloaded, and every choice depends
on the seed and the question's id alone, so the order of processing does not matter.
"""

import json
import os
import pickle
import random
import re
import reprlib
import unicodedata
from collections import OrderedDict
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import lru_cache
from importlib import import_module
from pathlib import Path, PurePosixPath
from typing import TextIO

import numpy as np
from numpy._core import multiarray, numeric

from nanosport.records import LETTERS, Question
from nanosport.video import Video

VIDEOS = (".mp4", ".mkv", ".avi", ".mov", ".webm", ".m4v", ".mpg", ".mpeg", ".ts")
IMAGES = (".jpg", ".jpeg", ".png")
CHUNK = 2**20
"""Characters read at a time."""
SHOWN = 300
"""Signs of a message."""


_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlevel = 80, 3


def brief(value) -> str:
    """repr for a message, of bounded length, however deep and long the value is."""
    text = _REPR.repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


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


@contextmanager
def _reading(path: Path):
    """What goes wrong with a JSON file, as ValueError."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"{path}: cannot be read ({error.strerror}); check its permissions"
        ) from None
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path}: not a whole JSON file ({error}); download it again") from None


def read_items(path: Path, *of: type) -> Iterator[tuple]:
    """What a JSON file holds, part by part in little memory: (None, number, entry) of a list's
    entries and of a JSON-lines file; (name, None, value) of an object's members, and (name, place,
    part) for each part of a member that is a list or an object itself and not empty.

    Raises ValueError where the file is no list or dict as `of` asks, and where it breaks off: when
    what is before that is out.
    """
    with _reading(path), path.open(encoding="utf-8-sig") as file:
        if path.suffix.lower() == ".jsonl":
            for number, line in enumerate(filter(str.strip, file)):
                yield None, number, json.loads(line, strict=False)
            return
        text = _Text(file)
        data = {"[": [], "{": {}}.get(text.peek())
        data = text.value() if data is None else data
        if isinstance(data, of) and isinstance(data, list | dict):
            for place, *within, part in _parts(text, open_members=True):
                yield (None, place, part) if data == [] else (place, *(within or [None]), part)
            if text.peek():
                raise ValueError("more behind the list")
            return
    _expect(path, data, of)


def read_entries(path: Path) -> Iterator:
    """The entries of a list in a JSON file, or the lines of a JSON-lines file, as `read_items` has
    them."""
    return (entry for _, _, entry in read_items(path, list))


_ENDS = tuple(",]}: \t\n\r")
_DECODE = json.JSONDecoder(strict=False).raw_decode  # with line breaks inside a text
_SPACE = re.compile(r"[ \t\n\r]*")


class _Text:
    """A JSON text that is read piece by piece."""

    def __init__(self, file: TextIO):
        self.file, self.text, self.at = file, "", 0

    def _more(self) -> bool:
        """Read as much again as waits; whether there was more."""
        more = self.file.read(max(CHUNK, len(self.text) - self.at))
        self.text, self.at = self.text[self.at :] + more, 0
        return bool(more)

    def peek(self) -> str:
        """The next sign that is no space; nothing at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()
            if self.at < len(self.text) or not self._more():
                return self.text[self.at : self.at + 1]

    def take(self, signs: str) -> str:
        """The next sign, which must be one of these."""
        if (sign := self.peek()) not in list(signs):
            raise ValueError(f"Expecting {' or '.join(map(repr, signs))}")
        self.at += 1
        return sign

    def value(self):
        """The next whole value."""
        self.peek()
        while True:
            try:
                value, after = _DECODE(self.text, self.at)
            except json.JSONDecodeError as error:
                if not self._more():
                    raise ValueError(error.msg) from None
                continue
            if self.text[after : after + 1] not in _ENDS and self._more():
                continue  # a number may go on there
            self.at = after
            return value


def _parts(text: _Text, open_members: bool = False) -> Iterator[tuple]:
    """(number, entry) of the list that begins here, (name, value) of the object; open_members: for
    its lists and objects (name, place, part)."""
    kind = text.take("[{")
    end, number = {"[": "]", "{": "}"}[kind], 0
    sign = text.take(end) if text.peek() == end else ","
    while sign == ",":
        place = number
        try:
            if kind == "{":
                place = text.value()
                text.take(":")
                if open_members and (sign := text.peek()) in ("[", "{"):
                    part = None
                    for part in _parts(text):
                        yield (place, *part)
                    if part is None:
                        yield place, {"[": [], "{": {}}[sign]
                    sign = text.take("," + end)
                    continue
            value = text.value()
            sign = text.take("," + end)
        except ValueError as error:
            raise ValueError(f"entry {place}: {error}") from None
        yield place, value
        number += 1


def _dtype(*arguments) -> np.dtype:
    dtype = np.dtype(*arguments)
    if dtype.kind not in "biufSUO":
        raise pickle.UnpicklingError(f"asks for arrays of {dtype}")
    return dtype


def _latin1(text: str, encoding: str) -> bytes:
    return text.encode("latin1")  # how old protocols spell bytes


def _no_bytes() -> bytes:
    return b""  # which they spell as a call of bytes


def _ndarray(*_):
    # it could be taken for pointers
    raise pickle.UnpicklingError("asks for numpy.ndarray over a buffer")


def _empty_array(*_) -> np.ndarray:
    return np.ndarray((0,), np.int8)  # its content follows: numpy checks it


def _scalar(dtype: np.dtype, *data):
    if dtype.kind == "O":
        raise pickle.UnpicklingError("asks for a scalar of any object")
    return multiarray.scalar(dtype, *data)


_PLAIN = {
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "scalar"): _scalar,
    ("numpy._core.numeric", "_frombuffer"): numeric._frombuffer,
    ("numpy", "ndarray"): _ndarray,
    ("numpy", "dtype"): _dtype,
    ("_codecs", "encode"): _latin1,
    ("builtins", "bytes"): _no_bytes,
    ("builtins", "set"): set,
    ("collections", "OrderedDict"): OrderedDict,
}


class _Unpickler(pickle.Unpickler):
    """A pickle runs whatever callables it names; it may name those that build numpy arrays, and no
    other."""

    def find_class(self, module: str, name: str):
        # old versions call them otherwise
        now = module.replace("numpy.core.", "numpy._core.").replace("__builtin__", "builtins")
        plain = _PLAIN.get((now, name))
        if plain is None:
            raise pickle.UnpicklingError(f"asks for {module}.{name}")
        return plain


def read_pickle(path: Path, of: type) -> list | dict:
    """The list or dict of a pickle of plain containers, texts, numbers and numpy arrays. Raises
    ValueError where it is not."""
    try:
        with path.open("rb") as file:
            data = _Unpickler(file, encoding="latin1").load()
    except Exception as error:  # there is no error that damaged or hostile bytes cannot raise
        raise ValueError(
            f"{path}: not a pickle of plain data ({brief(str(error))}); only plain containers, "
            "texts, numbers and numpy arrays are read, since other pickles can run code: download "
            "it again"
        ) from None
    _expect(path, data, (of,))
    return data


def _expect(path: Path, data, of: tuple[type, ...]) -> None:
    if not isinstance(data, of):
        names = " or ".join(f"a {kind.__name__}" for kind in of)
        raise ValueError(
            f"{path}: holds a {type(data).__name__}, {names} was expected; if it is not this "
            "data set's file, move it away"
        )


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


WHOLE = re.compile(r"\s*-?\d{1,12}(\.0)?\s*")


def field(entry, name: str, of: type = str):
    """A field of an entry: a text that is not blank, or a value of another type; a whole number may
    be written as a text. Raises ValueError where it is not one."""
    if not isinstance(entry, dict):
        raise ValueError(f"a {type(entry).__name__}: must be an object with the field {name}")
    value = entry.get(name)
    if of is int and isinstance(value, str | float | np.number) and WHOLE.fullmatch(str(value)):
        value = int(float(value))
    if not isinstance(value, of) or isinstance(value, bool) or (of is str and not value.strip()):
        raise ValueError(f"{name} {brief(value)}: must be a {'text' if of is str else of.__name__}")
    return value.strip() if of is str else value


def template(seed: int, id: str, phrasings: tuple[str, ...]) -> str:
    """One of several ways to ask."""
    return random.Random(f"{seed}/{id}/phrasing").choice(phrasings)


def option(entry, name: str) -> str:
    """A field that may be a number too, as a text."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}" if abs(value) < 1e15 else field(entry, name)
    return field(entry, name)


def labelled(entry, name: str) -> dict[str, str]:
    """The options by label of a field that lists texts such as "A. a smash"."""
    texts = field(entry, name, list)
    plain = (text for text in texts if isinstance(text, str))
    found = (re.fullmatch(r"([A-J])[.):]\s*(\S.*?)\s*", text, re.DOTALL) for text in plain)
    options = {each[1]: each[2] for each in found if each}
    if len(options) != len(texts):
        raise ValueError(f"{name} {brief(texts)}: must be texts with the labels A., B., …")
    return options


def by_label(options: list | dict) -> dict[str, str]:
    """The options that are there by label, those of a list by letter, without the labels where all
    texts begin with theirs."""
    if isinstance(options, list):
        options = {chr(65 + n): text for n, text in enumerate(options)}
    if not isinstance(options, dict):
        raise ValueError(f"options {brief(options)}: must be a list, or an object of labels")
    there = [label for label, text in options.items() if text is not None and str(text).strip()]
    texts = {label: option(options, label) for label in there}
    starts = {label: rf"\(?{re.escape(label)}[.):]+\s*(?=\S)" for label in there}
    if all(re.match(starts[label], text) for label, text in texts.items()):
        texts = {label: re.sub(starts[label], "", text, count=1) for label, text in texts.items()}
    return texts


def shuffle_options(
    seed: int, id: str, right: str, wrong: Iterable[str], num: int = 10
) -> tuple[tuple[str, ...], str]:
    """(options in random order, letter of the right one): the right one and at most num − 1 of the
    wrong ones, each once.

    "None of the above" stays last. Raises ValueError where a wrong one says the same as the right
    one, or one names another by its letter.
    """
    rng = random.Random(f"{seed}/{id}/options")
    same = right.casefold().strip()
    wrong = list({text.casefold().strip(): text for text in reversed(list(wrong))}.values())[::-1]
    if any(text.casefold().strip() == same for text in wrong):
        raise ValueError("options: another one says the same as the right one")
    options = [right, *(wrong if len(wrong) < num else rng.sample(wrong, num - 1))]
    if not wrong:
        raise ValueError("options: must be at least two that differ")
    by_letter = r"\b[A-J]\b\W{1,3}(and|or|nor|&)\W{1,2}[A-J]\b"
    if any(re.search(by_letter, option) for option in options):
        raise ValueError("options: one names others by letter, so their order cannot change")
    rng.shuffle(options)
    options.sort(key=lambda option: "of the above" in option.lower())
    return tuple(options), LETTERS[options.index(right)]


def choose(
    seed: int, id: str, options: Mapping[str, str], answer: str
) -> tuple[tuple[str, ...], str]:
    """shuffle_options for options by label, where `answer` is a label or, as some sources have it,
    the text of an option, or both as in "(A) a smash"."""
    said = answer.casefold().strip()
    right = [label for label in options if label.casefold() == said]
    right = right or [label for label, text in options.items() if text.casefold().strip() == said]
    if not right and (said := slug(answer)):
        right = [
            label
            for label, text in options.items()
            if said in (slug(label), slug(text), slug(f"{label} {text}"))
        ]
    if len(right) != 1:
        raise ValueError(
            f"answer {brief(answer)}: must be one of {', '.join(options)}, or the text of one"
        )
    wrong = (text for label, text in options.items() if label != right[0])
    return shuffle_options(seed, id, options[right[0]], wrong)


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


def slug(text: str) -> str:
    """The words of a text in small letters, with single hyphens between."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
