"""JSON files that other programs wrote, read into dataclasses whose fields say what they may hold:

num_attention_heads: Annotated[int, AtLeast(1)]
"""

import json
from collections import Counter
from dataclasses import MISSING, fields
from pathlib import Path
from reprlib import repr as short
from typing import get_args, get_type_hints

from nanosport import cli
from nanosport.cli import AtLeast

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
    lowest = [value >= m.bound if isinstance(m, AtLeast) else value > m.bound for m in marks]
    return abs(value) < LIMITS[kind] and all(lowest)


def rule(kind, marks: tuple) -> str:
    """What `fits` asks for, in words."""
    if parts := get_args(kind):
        many = "" if parts[-1] is ... else f" of {len(parts)}"
        return f"a list{many}, each {rule(parts[0], marks)}"
    words = (f"{'at least' if isinstance(m, AtLeast) else 'above'} {m.bound}" for m in marks)
    return ", ".join((KINDS[kind], *words))


def check(cls: type, name: str, value, where) -> None:
    """Raise ValueError where the dataclass's field of this name must not hold this value."""
    asked = get_type_hints(cls)[name], cli.marks(cls)[name]
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
