"""Dataclasses whose fields say what they may hold, and other programs' JSON files, read into them:

num_attention_heads: Annotated[int, AtLeast(1)]
"""

import argparse
import json
import operator
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import MISSING, fields
from functools import partial
from inspect import get_annotations
from pathlib import Path
from reprlib import repr as short
from typing import Annotated, NamedTuple, get_args, get_type_hints

MAY_CHANGE = "a resumed run may have another value of this flag"
MAY_GROW = "a resumed run may have a larger value of this flag"
NAMES = "among its texts are names of files, which may hold any bytes"


class Bound(NamedTuple):
    """Marks a flag that has a bound. As argparse's `type` it reads a whole number."""

    words: str
    holds: Callable[[float, float], bool]
    bound: float

    def __call__(self, text: str) -> int:
        if not re.fullmatch(r"-?\d{1,18}", text) or not self.holds(int(text), self.bound):
            rule = f"must be a whole number, {self.words} {self.bound}"
            raise argparse.ArgumentTypeError(f"{text}: {rule}")
        return int(text)


AtLeast = partial(Bound, "at least", operator.ge)
Above = partial(Bound, "above", operator.gt)
AtMost = partial(Bound, "at most", operator.le)
COUNT = AtLeast(1)
Share = Annotated[float, AtLeast(0), AtMost(1)]


def marks_of(config_type: type) -> dict[str, tuple]:
    """The marks of each field of a config, by the field's name.

    A config that extends another may give a field a new default: the marks stand where it was born.
    """
    marks_by_name: dict[str, tuple] = {}
    for base in reversed(config_type.__mro__):
        for name, hint in get_annotations(base).items():
            marks_by_name.setdefault(name, getattr(hint, "__metadata__", ()))
    return marks_by_name


KINDS = {int: "a whole number below 2^31", float: "a finite number", bool: "true or false"}
LIMITS = {int: 2**31, float: 1e38, bool: 2}
"""Values are smaller, so that tensors can hold them."""


def read_json(path: Path) -> dict:
    """The object in a JSON file. Raises ValueError where there is none, or it has a key twice."""
    try:
        raw = json.loads(path.read_text("utf-8"), object_pairs_hook=unique)
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a JSON object ({error})") from error
    if not isinstance(raw, dict):
        raise ValueError(f"{path}: cannot be read as a JSON object (it holds {short(raw)})")
    return raw


def unique(pairs: list[tuple]) -> dict:
    """The object of these pairs: which of two values another program would take is not said."""
    raw = dict(pairs)
    if len(raw) < len(pairs):
        twice = next(name for name, count in Counter(n for n, _ in pairs).items() if count > 1)
        raise ValueError(f"the key {short(twice)} is there twice")
    return raw


def section(raw: dict, name: str, where) -> dict:
    """The object under a name, empty where it is missing or null."""
    value = raw.get(name)
    if not isinstance(value, dict | None):
        raise ValueError(f"{where}: {name} {short(value)}: must be an object")
    return value or {}


def only(where, name: str, value, *known) -> None:
    """Raise ValueError where a setting asks for what this code has not."""
    if value not in known:
        has = " and ".join(map(repr, known))
        raise ValueError(f"{where}: {name} {short(value)}: this code has only {has}")


def fits(value, kind, marks: tuple) -> bool:
    """Whether a value is of a field's type, which may be a tuple's, and within its bounds."""
    if parts := get_args(kind):
        known = isinstance(value, list | tuple)
        known = known and (parts[-1] is ... or len(value) == len(parts))
        return known and all(fits(one, parts[0], marks) for one in value)
    if kind not in KINDS:
        return isinstance(value, kind)
    if type(value) is not kind and (kind is not float or type(value) is not int):
        return False
    return abs(value) < LIMITS[kind] and all(mark.holds(value, mark.bound) for mark in marks)


def rule(kind, marks: tuple) -> str:
    """What `fits` asks for, in words."""
    if parts := get_args(kind):
        many = "" if parts[-1] is ... else f" of {len(parts)}"
        return f"a list{many}, each {rule(parts[0], marks)}"
    return ", ".join((KINDS[kind], *(f"{mark.words} {mark.bound}" for mark in marks)))


def check(cls: type, name: str, value, where) -> None:
    """Raise ValueError where the dataclass's field of this name must not hold this value."""
    asked = get_type_hints(cls)[name], marks_of(cls)[name]
    if not fits(value, *asked):
        raise ValueError(f"{where}: {name} {short(value)}: must be {rule(*asked)}")


def build(cls: type, values: dict, where):
    """An instance of the dataclass; `values` may hold more. Raises ValueError for the first field
    that is missing, of another type, or out of its bounds."""
    for field in fields(cls):
        if field.name in values:
            check(cls, field.name, values[field.name], where)
        elif field.default is MISSING:
            raise ValueError(f"{where}: {field.name!r} is missing")
    known = {field.name: values[field.name] for field in fields(cls) if field.name in values}
    return cls(**{name: tuple(v) if isinstance(v, list) else v for name, v in known.items()})
