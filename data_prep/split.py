"""Splits records into sft.jsonl, rl.jsonl and test.jsonl, so that nothing of one match, player or
video is in two of them.

    python -m data_prep.split *.jsonl --out out/splits    # 15,000, 63,000 and 6,700 questions
    python -m data_prep.split *.jsonl --out out/small --scale 0.1 --quota sports_qa=0.3 t3set=0.05
    python -m data_prep.split --check out/splits          # once more, after files were edited

1. Records that share a `group`, a video or a soccer match are tied and go to one split. What is
   tied to a test-only source can only go to test.
2. Of questions about one clip in nearly the same words, the first by id stays; answers that are a
   choice, a number or a span must be the same.
3. What is tied goes as a whole to one split, for each source in the ratio of --sft, --rl and
   --test. RL is given none without a checkable answer; SFT takes those.
4. A split takes its target from what it was given, with an equal share of each source (or its
   --quota); a source that runs out leaves the rest of its share to the others. RL takes checkable
   answers only. Where the data are too few for the targets, the splits take all they were given,
   and so keep the ratio; test-only sources come on top of that, up to the test's target.

The same records and seed give the same bytes, in whatever order the files are named; a smaller
--scale gives subsets of the three files. What was reached, what was dropped and why, and the
near-duplicates are in DIR/split.json.
"""

import hashlib
import heapq
import json
import math
import os
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from sys import intern
from typing import Annotated, BinaryIO

import tyro
from tqdm import tqdm

from data_prep import leaks
from data_prep.leaks import SPLITS, add_id, check_folder, check_splits, is_test_only, question_ties
from data_prep.paths import moved, real_video
from nanosport import cli
from nanosport.env.scoring import normalise
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.files import named, replacing, write_atomically
from nanosport.records import LETTERS, Question, stream_records
from nanosport.report import printable

CHECKABLE_WORDS = 12
"""An open answer of at most so many words is short enough for the F1 of its words to tell right
from wrong."""


@dataclass(frozen=True)
class Config:
    records: Annotated[tuple[Path, ...], tyro.conf.Positional] = ()
    """Record files, one JSON object a line."""
    out: Path | None = None
    """Folder for sft.jsonl, rl.jsonl, test.jsonl and split.json."""
    check: Path | None = None
    """Instead of splitting: look for leaks in the three files of this folder."""
    seed: Annotated[int, AtLeast(0)] = 0
    scale: Annotated[float, Above(0), AtMost(1)] = 1.0
    """Take this part of the targets."""
    sft: Annotated[int, AtLeast(0)] = 15_000
    """Questions wanted for SFT."""
    rl: Annotated[int, AtLeast(0)] = 63_000
    """Questions wanted for RL."""
    test: Annotated[int, AtLeast(0)] = 6_700
    """Questions wanted for the test."""
    quota: tuple[str, ...] = ()
    """NAME=SHARE: the share of a source in each split, between 0 and 1; the sources not named have
    equal parts of the rest."""

    @property
    def targets(self) -> dict[str, int]:
        return {split: getattr(self, split) for split in SPLITS}


@dataclass(frozen=True, slots=True)
class Entry:
    """What is kept in memory of a record."""

    id: str
    file: int
    """Number of its file."""
    offset: int
    """Where its line starts, in bytes."""
    source: str
    sport: str
    dimension: str
    ties: tuple[tuple[str, str], ...]
    clip: tuple
    """Its video, links followed, and its span."""
    checkable: bool
    rank: int
    """Pseudo-random, from seed and id: every random choice is an order by rank."""
    text: bytes
    """Hash of question, right answer and options, as normalised words."""


# Reading.


def _hash(text: str) -> bytes:
    return hashlib.blake2b(text.encode("utf-8", "surrogatepass"), digest_size=8).digest()


def checkable(question: Question) -> bool:
    """Whether a rule can tell right from wrong, as the reward of RL has to."""
    return question.kind != "open" or len(question.answer.split()) <= CHECKABLE_WORDS


def right_text(options: Sequence[str], answer: str) -> str:
    """The right option, or the answer of what is no choice."""
    return options[LETTERS.index(answer)] if options else answer


def text_hash(question: Question) -> bytes:
    """Equal where question, right answer and options have the same words, in whatever order the
    options stand."""
    right = normalise(right_text(question.options, question.answer))
    options = sorted(map(normalise, question.options))
    return _hash(repr([normalise(question.question), right, options]))


def read_entries(paths: Sequence[Path], seed: int) -> list[Entry]:
    """One entry a record. Raises ValueError where a line is no record, and where two have one
    id."""
    entries, files, names = [], {}, {}
    for number, path in enumerate(paths):
        records = tqdm(stream_records(path), desc=printable(path.name), unit="record")
        for line, row, question in records:
            if "messages" in row:
                raise ValueError(
                    f"{path}: {question.id!r} is a trajectory; split the records, and distil "
                    "after it"
                )
            add_id(files, question.id, path)
            found = question_ties(question, real_video(path, question))
            ties = tuple(names.setdefault(name, name) for name in found)
            entries.append(
                Entry(
                    question.id,
                    number,
                    line.offset,
                    intern(question.source or "unnamed"),
                    intern(question.sport),
                    intern(question.dimension),
                    ties,
                    (ties[0][1], question.span_s),
                    checkable(question),
                    int.from_bytes(_hash(f"{seed}/{question.id}")),
                    text_hash(question),
                )
            )
    return entries


def read_row(entry: Entry, files: Sequence[BinaryIO]) -> dict:
    """The JSON object of an entry, once more."""
    files[entry.file].seek(entry.offset)
    row = json.loads(files[entry.file].readline())
    if row.get("id") != entry.id:
        raise ValueError(f"{files[entry.file].name}: has changed while it was read; start again")
    return row


# Choosing.


def near_duplicates(texts: Sequence[str]) -> list[tuple[int, int]]:
    """(kept, dropped) positions of texts whose sets of words have a Jaccard index of at least 0.9
    with one kept before.

    Two such sets share one of their rarest words, n − ⌈0.9 n⌉ + 1 of n, so only those that do are
    compared.
    """
    words = [frozenset(normalise(text)) for text in texts]
    count = Counter(word for each in words for word in each)
    found, having = [], defaultdict(list)
    for k, each in enumerate(words):
        rare = sorted(each, key=lambda word: (count[word], word))[: len(each) // 10 + 1]
        candidates = sorted({j for word in rare for j in having[word]})
        twin = next(
            (j for j in candidates if 10 * len(each & words[j]) >= 9 * len(each | words[j])), None
        )
        if twin is not None:
            found.append((twin, k))
            continue
        for word in rare:
            having[word].append(k)
    return found


def find_duplicates(entries: Sequence[Entry], files: Sequence[BinaryIO]) -> dict[str, str]:
    """Id of the one kept, by the id of each near-duplicate about the same clip."""
    about, found = defaultdict(list), {}
    for entry in entries:
        about[entry.clip].append(entry)
    for those in about.values():
        if len(those) > 1:
            # test-only ones first: were they dropped, nothing would hold their group out of
            # training
            those.sort(key=lambda entry: (not is_test_only(entry.source), entry.id))
            rows, alike = [read_row(entry, files) for entry in those], defaultdict(list)
            for k, row in enumerate(rows):
                # another word or order may ask for another thing: then the answers differ
                same = row["options"] or row.get("kind") in ("number", "span")
                right = tuple(normalise(right_text(row["options"], row["answer"])))
                alike[right if same else None].append(k)
            for places in alike.values():
                for kept, dropped in near_duplicates([rows[k]["question"] for k in places]):
                    found[those[places[dropped]].id] = those[places[kept]].id
    return found


def divide(
    tied_entries: Iterable[Sequence[Entry]], targets: dict[str, int]
) -> Iterator[tuple[str, Sequence[Entry]]]:
    """(split, tied entries). Each set of sources is divided in the ratio of the targets, what is
    left over carried to the next.

    They come in order of their lowest rank, so the large come early, where they spoil the ratio
    least.
    """
    pools, need = defaultdict(list), dict.fromkeys(SPLITS, 0.0)
    for those in tied_entries:
        sources = tuple(sorted({entry.source for entry in those}))
        if any(map(is_test_only, sources)):
            yield "test", those
        else:
            pools[sources, any(entry.checkable for entry in those)].append(those)
    for (_, takes_rl), pool in sorted(pools.items()):
        size = sum(map(len, pool))
        num_checkable = sum(entry.checkable for those in pool for entry in those)
        # what RL will not use of its groups is made up for, until that takes more than twice as
        # many
        if takes_rl:
            ratio = targets | {"rl": targets["rl"] / max(0.5, num_checkable / size)}
        else:
            ratio = {"sft": targets["sft"] + targets["rl"], "test": targets["test"]}
        ratio = {split: part / sum(ratio.values()) for split, part in ratio.items() if part}
        for split, share in ratio.items():
            need[split] += share * size
        for those in sorted(pool, key=lambda those: min(entry.rank for entry in those)):
            split = max(
                ratio, key=lambda split: (min(need[split], len(those)), need[split] / ratio[split])
            )
            need[split] -= len(those)
            yield split, those


def fill(total: int, have: dict[str, int], weight: dict[str, float]) -> Counter:
    """How many to take of each source: one after the other of the one furthest below its weight
    that has any left.

    So a larger total takes at least as many of each, which rounding shares would not (the Alabama
    paradox).
    """
    taken = Counter()
    waiting = [(1 / weight[source], source) for source in have if have[source] and weight[source]]
    heapq.heapify(waiting)
    for _ in range(min(total, sum(have[source] for _, source in waiting))):
        _, source = heapq.heappop(waiting)
        taken[source] += 1
        if taken[source] < have[source]:
            heapq.heappush(waiting, ((taken[source] + 1) / weight[source], source))
    return taken


def weights(quota: Sequence[str], sources: Iterable[str]) -> dict[str, float]:
    """Share of each source: as --quota says, else an equal part of what it leaves."""
    named, sources = {}, set(sources)
    for text in quota:
        name, _, share = text.rpartition("=")
        if name not in sources or name in named:
            raise ValueError(
                f"--quota {text}: must be NAME=SHARE, once each, with NAME one of "
                f"{', '.join(map(repr, sorted(sources)))}"
            )
        try:
            named[name] = float(share)
        except ValueError:
            named[name] = math.nan
        if not 0 <= named[name] <= 1:
            raise ValueError(f"--quota {text}: the share must be a number between 0 and 1")
    if (left := 1 - math.fsum(named.values())) < -1e-9:
        raise ValueError(f"--quota {' '.join(quota)}: the shares must not sum to more than 1")
    return {
        source: named.get(source, max(0.0, left) / max(1, len(sources - named.keys())))
        for source in sources
    }


def choose(
    groups: Iterable[Sequence[Entry]],
    targets: dict[str, int],
    scale: float,
    weight: dict[str, float],
) -> tuple[dict[str, list[Entry]], dict[str, Counter]]:
    """(chosen entries by split, in order of rank; how many were dropped, by reason and source)."""
    pools, chosen = {split: [] for split in SPLITS}, {}
    dropped = {"open answer too long for RL": Counter(), "beyond the target": Counter()}
    for split, those in divide(groups, targets):
        for entry in those:
            if split == "rl" and not entry.checkable:
                dropped["open answer too long for RL"][entry.source] += 1
            else:
                pools[split].append(entry)
    for split, pool in pools.items():
        pool.sort(key=lambda entry: (entry.rank, entry.id))
        left = fill(round(targets[split] * scale), Counter(entry.source for entry in pool), weight)
        chosen[split] = []
        for entry in pool:
            if left[entry.source]:
                left[entry.source] -= 1
                chosen[split].append(entry)
            else:
                dropped["beyond the target"][entry.source] += 1
    return chosen, dropped


# The command.


def check_config(cfg: Config) -> None:
    if not cfg.records or not cfg.out:
        raise ValueError("name the record files and --out DIR, or --check DIR alone")
    cli.check(cfg)
    if not cfg.sft + cfg.rl + cfg.test:
        raise ValueError("--sft 0 --rl 0 --test 0: one of them must be above 0")
    written = [path for split in SPLITS if (path := cfg.out / f"{split}.jsonl").exists()]
    if read := [path for path in cfg.records if any(map(path.samefile, written))]:
        raise ValueError(f"--out {cfg.out}: {read[0]} would be written over; choose another folder")
    if cfg.out.exists() and not cfg.out.is_dir():
        raise ValueError(f"--out {cfg.out}: is a file; name a folder")


def describe(
    cfg: Config,
    entries: Sequence[Entry],
    first: Sequence[int],
    chosen: dict[str, list[Entry]],
    duplicates: dict[str, str],
) -> dict:
    """split.json, but for what was dropped. `first` is the number of the tied records that each
    entry belongs to."""
    split_of = {entry.id: split for split, those in chosen.items() for entry in those}
    held = {number for entry, number in zip(entries, first) if is_test_only(entry.source)}
    groups, shared, places = defaultdict(set), defaultdict(Counter), defaultdict(set)
    for entry, number in zip(entries, first):
        split = split_of.get(entry.id, "dropped")
        groups[split].add(number)
        places[entry.text].add(number)
        if number in held and not is_test_only(entry.source):
            shared[entry.source][split] += 1

    # what was read, and what has become of it
    read = zip(cfg.records, Counter(entry.file for entry in entries).values())
    names = ("source", "sport", "dimension")
    reached = {
        split: {"questions": len(those), "groups": len(groups[split])}
        | {name: Counter(getattr(entry, name) for entry in those) for name in names}
        for split, those in chosen.items()
    }
    ties = {tie for entry in entries if is_test_only(entry.source) for tie in entry.ties}
    twins = sorted(duplicates.items())
    return {
        "seed": cfg.seed,
        "scale": cfg.scale,
        "quota": sorted(cfg.quota),
        "records": {os.path.relpath(path, cfg.out): count for path, count in read},
        "targets": {split: round(target * cfg.scale) for split, target in cfg.targets.items()},
        "reached": reached,
        "tied_to_test_only": shared,
        "same_text_in_several_groups": sum(len(places[entry.text]) > 1 for entry in entries),
        "near_duplicates": [{"kept": kept, "dropped": dropped} for dropped, kept in twins],
        "held_out": sorted(name for kind, name in ties if kind == "group"),
    }


def print_report(report: dict) -> None:
    """A table of sources and splits, and a line for whatever a user has to know."""
    reached, dropped, targets = report["reached"], report["dropped"], report["targets"]
    columns = {split: reached[split]["source"] for split in SPLITS} | {
        "dropped": sum(dropped.values(), Counter())
    }
    print(" " * 20 + "".join(f"{name:>10}" for name in columns))
    for source in sorted(set().union(*columns.values())):
        counts = "".join(f"{column[source]:10,}" for column in columns.values())
        print(f"{ascii(source)[1:-1]:20}{counts}")
    print(f"{'all':20}" + "".join(f"{column.total():10,}" for column in columns.values()))
    for reason, counts in dropped.items():
        if counts:
            print(f"dropped, {reason}: {counts.total():,}")
    if tied_ones := sum(report["tied_to_test_only"].values(), Counter()):
        print(
            f"kept out of training, tied to a test-only source: {tied_ones.total():,}, of which "
            f"{tied_ones['test']:,} in test"
        )
    if several := report["same_text_in_several_groups"]:
        print(f"kept, though another group has the same question with the same answer: {several:,}")
    if any(reached[split]["questions"] < targets[split] for split in SPLITS):
        got = ", ".join(
            f"{split} {reached[split]['questions']:,} of {targets[split]:,}" for split in SPLITS
        )
        print(
            "too few questions for the targets, so the groups were divided in the targets' "
            f"ratio: {got}"
        )


def write(
    chosen: dict[str, list[Entry]], report: dict, cfg: Config, files: Sequence[BinaryIO]
) -> None:
    """The three files and split.json, under their names when all are there and hold no leak."""
    out = cfg.out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        new = {s: stack.enter_context(replacing(out / f"{s}.jsonl")) for s in SPLITS}
        for split, entries in chosen.items():
            with named(out / f"{split}.jsonl", new[split]), open(new[split], "w") as file:
                for entry in tqdm(entries, desc=split, unit="record"):
                    row, folder = read_row(entry, files), cfg.records[entry.file].parent
                    video = moved(row["video"], folder, out)
                    # a group that only repeats the video's name goes on to do so
                    row |= {"group": video} if row.get("group") == row["video"] else {}
                    file.write(json.dumps(row | {"video": video}) + "\n")
        check_splits(new.values(), report["held_out"])
        # where a kill leaves old files beside new ones there is no report
        (out / "split.json").unlink(missing_ok=True)
    write_atomically(out / "split.json", json.dumps(report, indent=1, sort_keys=True) + "\n")


def main(cfg: Config) -> None:
    if cfg.check:
        if cfg.records or cfg.out:
            raise ValueError("--check DIR: stands alone, without record files and --out")
        found = f"{check_folder(cfg.check):,} records, no group, match or video in two splits"
        print(f"{cfg.check}: {found}")
        return
    check_config(cfg)
    entries = read_entries(cfg.records, cfg.seed)
    weight = weights(cfg.quota, (entry.source for entry in entries))
    first = leaks.tied(entry.ties for entry in entries)
    with ExitStack() as stack:
        files = [stack.enter_context(open(path, "rb")) for path in cfg.records]
        duplicates, groups = find_duplicates(entries, files), defaultdict(list)
        for entry, number in zip(entries, first):
            if entry.id not in duplicates:
                groups[number].append(entry)
        chosen, dropped = choose(groups.values(), cfg.targets, cfg.scale, weight)
        twins = (entry.source for entry in entries if entry.id in duplicates)
        dropped["near-duplicate"] = Counter(twins)
        report = describe(cfg, entries, first, chosen, duplicates) | {"dropped": dropped}
        write(chosen, report, cfg, files)
    print_report(report)
    print(f"wrote {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config)
