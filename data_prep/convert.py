"""Turn a downloaded data set into the project's records, one JSON line a question.

    python -m data_prep.convert sportu --root data/sportu --out out/sportu.jsonl
    python -m data_prep.convert finediving --root data/FineDiving --out out/diving.jsonl --limit 9

A source is a module of data_prep/sources; its docstring says which files it reads. Every entry ends
in the record file or in the table of what was skipped and why. Records are checked as a reader will
check them, and written as they come; the file appears under its name when all are there. A run that
was killed is started again with the same command, and goes on behind the last record.
"""

import hashlib
import json
import pkgutil
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from itertools import islice
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from data_prep import sources
from data_prep.sources import Folder, Skip, records_of
from nanosport import cli
from nanosport.fields import AtLeast
from nanosport.files import is_own_file, mend, named, writing
from nanosport.records import Question, parse_question, read_lines, record_row

SHOWN = 20
"""Reasons for skipping that the table shows; the rest is one line."""


@dataclass(frozen=True)
class Config:
    source: Annotated[str, tyro.conf.Positional]
    """Which data set: a module of data_prep/sources."""
    root: Path
    """The folder it was downloaded to; nothing is written there but --out, if you say so."""
    out: Path
    """The record file; the paths of its videos are relative to its folder."""
    seed: Annotated[int, AtLeast(0)] = 0
    """Of phrasings and of the order of options."""
    limit: Annotated[int | None, AtLeast(1)] = None
    """Stop after this many records."""


@dataclass
class Tally:
    """What became of the entries."""

    kept: int = 0
    skipped: Counter = field(default_factory=Counter)
    """By reason, with … for what differs from entry to entry."""
    example: dict[str, Skip] = field(default_factory=dict)
    counts: dict[str, Counter] = field(
        default_factory=lambda: {name: Counter() for name in ("sport", "dimension", "kind")}
    )

    def keep(self, question: Question) -> None:
        self.kept += 1
        for name, counter in self.counts.items():
            counter[getattr(question, name)] += 1

    def skip(self, skip: Skip) -> None:
        reason = re.sub(r"'[^']*'|\"[^\"]*\"|\[.*\]|\d+", "…", skip.why)
        self.skipped[reason] += 1
        self.example.setdefault(reason, skip)

    def __str__(self) -> str:
        lines = [f"kept      {self.kept:8,}", f"skipped   {self.skipped.total():8,}"]
        reasons = self.skipped.most_common()
        for reason, count in reasons[:SHOWN]:
            skip = self.example[reason]
            lines.append(f"  {count:8,}  e.g. {skip.where}: {skip.why}")
        if others := reasons[SHOWN:]:
            count = sum(count for _, count in others)
            lines.append(f"  {count:8,}  for {len(others)} other reasons")
        for name, counter in self.counts.items():
            counts = (f"{value} {count:,}" for value, count in counter.most_common())
            lines.append(f"{name:10}{', '.join(counts)}")
        return "\n".join(lines)


def source_names() -> list[str]:
    return sorted(module.name for module in pkgutil.iter_modules(sources.__path__))


def record_lines(
    found: Iterable[Question | Skip],
    root: Path,
    folder: Path,
    tally: Tally,
    done: Sequence[str] = (),
) -> Iterator[str]:
    """The lines of a record file in `folder` for questions whose video is relative to `root`; both
    end in the tally. done: the ids of the first ones, which are written already: their lines are
    empty.

    What a reader of the file would refuse is skipped, and so is an id that was there before.
    """
    seen = set()
    for item in found:
        if isinstance(item, Skip):
            tally.skip(item)
            continue
        if done[tally.kept : tally.kept + 1] == [item.id]:
            seen.add(item.id)
            tally.keep(item)
            yield ""
            continue
        try:
            if item.id in seen:
                raise ValueError("id: another entry has it too")
            row = record_row(replace(item, video=str(root / item.video)), folder)
            if item.group == item.video:  # it has no other
                row["group"] = row["video"]
            line = json.dumps(row, ensure_ascii=False, allow_nan=False)
            parse_question(json.loads(line))
        except ValueError as error:
            tally.skip(Skip(f"{item.provenance} ({item.id})", str(error)))
            continue
        if tally.kept < len(done):
            raise ValueError(
                f"id {item.id!r}: {done[tally.kept]!r} was written in its place, which is removed; "
                "start again"
            )
        seen.add(item.id)
        tally.keep(item)
        yield line


def main(cfg: Config) -> None:
    cli.check(cfg)
    if cfg.source not in source_names():
        raise ValueError(f"{cfg.source}: no such source; there are {', '.join(source_names())}")
    root, out = cfg.root.resolve(), cfg.out.resolve()
    if out.is_dir() or out.is_relative_to(root) and out.exists():
        raise ValueError(
            f"--out {cfg.out}: is a folder, or a file of the input; choose another name"
        )
    tally = Tally()
    out.parent.mkdir(parents=True, exist_ok=True)
    with (
        kept_lines(cfg, root, out) as (file, done),
        tqdm(records_of(cfg.source, cfg.root, cfg.seed), desc=cfg.source, unit="entry") as found,
    ):
        if done:
            print(f"{len(done):,} records are there already: going on behind them")
        lines = record_lines(found, root, out.parent, tally, done)
        for line in islice(lines, cfg.limit):
            file.write(line and line + "\n")
        if not tally.kept:
            raise ValueError(f"{cfg.root}: no entry gives a record\n{tally}")
    print(f"{tally}\nwrote {cfg.out}")


@contextmanager
def kept_lines(cfg: Config, root: Path, out: Path):
    """(the file to write to, the ids of the records that are there): what a run of the same source,
    root and seed on the same files has written before it was killed. It takes the name `out` when
    all is written; where an input is at fault nothing is left."""
    if not is_own_file(out):
        with writing(out) as file:
            yield file, []
        return
    folder = Folder(root)
    stats = [(root / name).lstat() for name in folder.files]
    state = folder.files, folder.videos, [(stat.st_size, stat.st_mtime_ns) for stat in stats]
    made_by = repr((cfg.source, cfg.seed, cfg.limit, root, state)).encode()
    start = f".{out.name}.partial."
    kept = out.with_name(f"{start}{hashlib.sha256(made_by).hexdigest()[:10]}")
    for old in out.parent.glob(f"{start}*"):
        if old != kept:
            old.unlink()
    done: list[str] = []
    if kept.exists():
        mend(kept)
        done = [row["id"] for _, row in read_lines(kept, "a record")]
    try:
        with named(out, kept), open(kept, "a", encoding="utf-8") as file:
            yield file, done
        kept.replace(out)
    except ValueError:
        kept.unlink()
        raise


if __name__ == "__main__":
    cli.run(main, Config)
