"""The entries of files that others wrote, JSON and pickles, and the fields of an entry: damaged or
hostile ones raise ValueError."""

import json
import pickle
import re
import reprlib
from collections import OrderedDict
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TextIO

import numpy as np
from numpy._core import multiarray, numeric

CHUNK = 2**20
"""Characters read at a time."""
_REPR = reprlib.Repr()
_REPR.maxstring, _REPR.maxlevel = 80, 3


def brief(value) -> str:
    """repr for a message, of bounded length, however deep and long the value is."""
    text = _REPR.repr(value)
    return text if len(text) <= 100 else text[:100] + "…"


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


def option(entry, name: str) -> str:
    """A field that may be a number too, as a text."""
    value = entry.get(name) if isinstance(entry, dict) else None
    if isinstance(value, int | float) and not isinstance(value, bool):
        return f"{value:.15g}" if abs(value) < 1e15 else field(entry, name)
    return field(entry, name)
