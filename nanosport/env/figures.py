"""The benchmark's figures of episodes: each with its interval over videos, beside another model's,
in a table. docs/metrics.md says what each means."""

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from nanosport.env.intervals import intervals, numbered, pass_at, sign_flip, sums
from nanosport.env.reward import format_valid, used_tool
from nanosport.env.scoring import temporal_iou
from nanosport.records import DIMENSIONS, Episode, Question

TITLES = {"accuracy": "overall"} | {name: name for name in DIMENSIONS}
TITLES |= {
    "by_sport": "",
    "by_source": "",
    "by_seed": "seed",
    "accuracy_tool_needed": "tool needed",
    "accuracy_tool_not_needed": "tool not needed",
    "pass_at": "pass@",
    "majority": "majority",
    "frames": "frames",
    "turns": "turns",
    "tokens": "tokens",
    "tool_rate": "tool rate",
    "tool_rate_needed": "tool rate, needed",
    "tool_rate_not_needed": "tool rate, not needed",
    "window_hit_rate": "window hit",
    "window_iou": "window IoU",
    "format_rate": "format",
    "ungraded": "ungraded",
    "seconds_per_question": "seconds a question",
}
PUBLISHED = {
    "DeepSport, published, v1": (51.09, 43.82, 24.74, 24.60, 40.08, 14.39),
    "DeepSport, published, v2": (None, None, None, None, 37.67, 9.81),
    "GPT-5, published": (46.50, 32.89, 27.01, 22.76, 35.70, 16.0),
    "Qwen3-VL-235B-A22B-Thinking, published": (44.96, 31.03, 28.72, 25.59, 35.36, 16.0),
    "Qwen3-VL-8B-Thinking, published": (None, None, None, None, 34.83, 16.0),
    "Qwen2.5-VL-7B-Instruct, published": (None, None, None, None, 16.98, 16.0),
}
"""The paper's rows (arXiv 2511.12908; DeepSport's with the version), by the dimensions, overall and
frames: 6.7k test questions of its own, graded by Claude 4.5 Sonnet."""


def published() -> dict[str, dict]:
    """The paper's rows as those of a report."""
    keys = (*DIMENSIONS, "accuracy", "frames")
    return {name: dict(zip(keys, values, strict=True)) for name, values in PUBLISHED.items()}


def looks(episode: Episode) -> list[tuple[int, int]]:
    """The windows that were asked for and shown."""
    return [turn.window for turn in episode.turns if turn.action == "tool" and turn.frames]


def contained(episode: Episode) -> bool:
    """Whether one requested window held the whole event."""
    first, last = episode.question.window
    return any(start <= first and last <= end for start, end in looks(episode))


def overlap(episode: Episode) -> float:
    """Intersection over union, in frames, of the event and the window that fits it best; 0 where
    none was asked for."""
    first, last = episode.question.window
    event = (first, last + 1)
    return max((temporal_iou((a, b + 1), event) for a, b in looks(episode)), default=0.0)


def columns(episodes: Sequence[Episode], scores: Sequence[float]) -> dict[tuple[str, ...], list]:
    """By each figure's place in a report, its value of every episode; None where it does not
    count. Shares are in percent."""
    questions = [episode.question for episode in episodes]
    points = [100.0 * score for score in scores]
    used = [100.0 * used_tool(episode) for episode in episodes]
    needs = [question.needs_tool for question in questions]
    # where nobody knows whether a look is needed, a known event is to be looked at all the same
    placed = [bool(q.window) and q.needs_tool is not False for q in questions]

    def where(values: Iterable, keys: Iterable, key) -> list:
        return [value if its_key == key else None for value, its_key in zip(values, keys)]

    def inside(measure) -> list:
        return [100.0 * measure(e) if p else None for e, p in zip(episodes, placed)]

    found: dict[tuple[str, ...], list] = {("accuracy",): points}
    dimensions = [question.dimension for question in questions]
    found |= {(name,): where(points, dimensions, name) for name in DIMENSIONS}
    for name in ("sport", "source"):
        keys = [getattr(question, name) for question in questions]
        for key in sorted(set(filter(None, keys))):
            found[f"by_{name}", key] = where(points, keys, key)
    found["accuracy_tool_needed",] = where(points, needs, True)
    found["accuracy_tool_not_needed",] = where(points, needs, False)
    found["frames",] = [len(episode.frames) for episode in episodes]
    found["turns",] = [len(episode.turns) for episode in episodes]
    found["tokens",] = [sum(b - a for a, b in (t.tokens for t in e.turns)) for e in episodes]
    found["tool_rate",] = used
    found["tool_rate_needed",] = where(used, needs, True)
    found["tool_rate_not_needed",] = where(used, needs, False)
    found["window_hit_rate",] = inside(contained)
    found["window_iou",] = inside(overlap)
    found["format_rate",] = [100.0 * format_valid(episode) for episode in episodes]
    return found | together(episodes, scores)


def together(episodes: Sequence[Episode], scores: Sequence[float]) -> dict[tuple[str, ...], list]:
    """What several answers to a question come to: pass@k for k = 1, 2, 4, … and all, and the score
    of the answer that was given most often. Nothing where each was asked once."""
    by_id: dict[str, list[int]] = {}
    for k, episode in enumerate(episodes):
        by_id.setdefault(episode.question.id, []).append(k)
    num = min(map(len, by_id.values()))
    if num < 2:
        return {}
    sizes = sorted({2**k for k in range(num.bit_length())} | {num})
    found = {("pass_at", str(k)): [0.0] * len(episodes) for k in sizes}
    found["majority",] = [0.0] * len(episodes)
    said = [(episode.answer or "").strip().casefold() for episode in episodes]
    for numbers in by_id.values():
        num_right = sum(scores[k] >= 0.5 for k in numbers)
        # of those given equally often, the one that came first
        ((most, _),) = Counter(said[k] for k in numbers).most_common(1)
        chosen = next(k for k in numbers if said[k] == most)
        for k in numbers:
            found["majority",][k] = 100.0 * scores[chosen]
            for size in sizes:
                found["pass_at", str(size)][k] = 100.0 * pass_at(size, num_right, len(numbers))
    return found


def figures(episodes: Sequence[Episode], scores: Sequence[float]) -> dict:
    """All rates and means of episodes and their scores: shares in percent, None where there was
    nothing to count; and of each the 95 % interval over videos, as [low, high]."""
    found = columns(episodes, scores)
    values_EF = np.array(list(found.values()), dtype=float).T
    bounds = intervals(values_EF, numbered([episode.question.video for episode in episodes]))
    row: dict = {"intervals": {}}
    for place, values, (low, high) in zip(found, values_EF.T, bounds):
        counted = values[~np.isnan(values)]
        put(row, place, round(float(counted.mean()), 2) if len(counted) else None)
        if not np.isnan(low):
            put(row["intervals"], place, [round(float(low), 2), round(float(high), 2)])
    row.setdefault("by_source", {})
    row["status"] = dict(Counter(episode.status for episode in episodes))
    return row | {"questions": len({episode.question.id for episode in episodes})}


def put(row: dict, place: tuple[str, ...], value) -> None:
    """Set a value in a dict of dicts."""
    for name in place[:-1]:
        row = row.setdefault(name, {})
    row[place[-1]] = value


def outcome(episode: Episode, score: float) -> dict:
    """What the report keeps of an episode, with the first turn that broke the format."""
    broken = next((turn for turn in episode.turns if turn.error), None)
    return {
        "id": episode.question.id,
        "question": episode.question.question,
        "video": episode.question.video,
        "answer": episode.answer,
        "truth": episode.question.answer,
        "accuracy": round(score, 3),
        **{name: getattr(episode.question, name) for name in ("dimension", "sport", "source")},
        "frames": len(episode.frames),
        "turns": len(episode.turns),
        "tokens": sum(end - start for start, end in (turn.tokens for turn in episode.turns)),
        "windows": [turn.window for turn in episode.turns if turn.window],
        "status": episode.status,
        **({"error": broken.error, "text": broken.text} if broken else {}),
    }


def asked_alike(*sides: Sequence[dict]) -> list[list[tuple]]:
    """What tells the questions of two sides apart: ids alone may be those of other data. Reports
    from before they held the questions' texts go by the rest."""
    names = ("id", "truth", "question")
    names = [name for name in names if all(name in one for side in sides for one in side[:1])]
    return [[tuple(one[name] for name in names) for one in side] for side in sides]


def row_named(name: str, asked: Sequence[Question]) -> tuple[str, dict]:
    """(label, row) of REPORT, or REPORT:ROW. Raises ValueError where there is none, or none of its
    questions are among those asked."""
    files = (name[:k] for k, sign in enumerate(f"{name}:") if sign == ":")
    path = next((file for file in files if Path(file).is_file()), name)
    row = name[len(path) + 1 :]
    try:
        rows = json.loads(Path(path).read_text())["rows"]
        row = row or next(iter(rows))
        theirs = [one for one in rows[row]["episodes"] if one["accuracy"] >= 0]
        mine = [{"id": q.id, "truth": q.answer, "question": q.question} for q in asked]
        keys, others = asked_alike(theirs, mine)
        if not set(keys).intersection(others):
            raise LookupError("none of its questions are asked here")
        return row, rows[row]
    except (OSError, ValueError, LookupError, TypeError) as error:
        rule = "must be tool, no-tool, or a report of eval.py with its episodes, as REPORT or "
        raise ValueError(f"--against {name}: {rule}REPORT:ROW ({error})") from error


def compared(row: dict, label: str, other: dict) -> dict:
    """How much better a row is than another on the questions that both were asked: difference in
    points, its interval over videos, and p of the paired test by sign flips."""
    means: list[dict[tuple, float]] = []
    sides = row["episodes"], other["episodes"]
    keys = asked_alike(*sides)
    for episodes, names in zip(sides, keys):
        by_name: dict[tuple, list[float]] = {}
        for name, one in zip(names, episodes):
            by_name.setdefault(name, []).append(100.0 * one["accuracy"])
        means.append({name: sum(values) / len(values) for name, values in by_name.items()})
    shared = [name for name in means[0] if name in means[1]]
    video_of = {name: one["video"] for name, one in zip(keys[0], sides[0])}
    videos = numbered([video_of[name] for name in shared])
    differences = np.array([[means[0][name] - means[1][name]] for name in shared])
    by_video, (bounds,) = sums(differences, videos)[0], intervals(differences, videos)
    return {
        "row": label,
        "questions": len(shared),
        "difference": round(float(differences.mean()), 2),
        "interval": None if np.isnan(bounds[0]) else [round(float(bound), 2) for bound in bounds],
        "p": round(sign_flip(by_video[:, 0]), 4),
    }


def lines_of(row: dict) -> dict[str, str]:
    """A row's figures as they are shown, by their titles: 90.4 [87.1, 93.2]."""

    def shown(value, bounds) -> str:
        number = "–" if value is None else f"{value:.1f}"
        return number + (" [{:.1f}, {:.1f}]".format(*bounds) if bounds else "")

    found, bounds = {}, row.get("intervals", {})
    for key, title in TITLES.items():
        value, its = row.get(key), bounds.get(key, {})
        if not isinstance(value, dict):
            if key in row:
                found[title] = shown(value, its)
        elif key != "by_source" or len(value) > 1:
            space = " " if title and title[-1] != "@" else ""
            found |= {f"{title}{space}{k}": shown(v, its.get(k)) for k, v in value.items()}
    if than := row.get("against"):
        how = "" if than["interval"] is None else " [{:+.1f}, {:+.1f}]".format(*than["interval"])
        found[f"difference to {than['row']}"] = (
            f"{than['difference']:+.1f}{how}, p = {than['p']:.3g}"
        )
    return found


def table(rows: dict[str, dict], form: str = "markdown") -> str:
    """The figures of rows side by side, a line a figure: as aligned Markdown, or as LaTeX (with
    booktabs)."""
    shown = {name: lines_of(row) for name, row in rows.items()}
    titles = dict.fromkeys(title for lines in shown.values() for title in lines)
    cells = [["figure", *rows]]
    cells += [[title, *(lines.get(title, "–") for lines in shown.values())] for title in titles]
    if form == "latex":
        head, *body = (" & ".join(map(latex, line)) + r" \\" for line in cells)
        begin = rf"\begin{{tabular}}{{l{'r' * len(rows)}}}"
        parts = [begin, r"\toprule", head, r"\midrule", *body, r"\bottomrule", r"\end{tabular}"]
        return "\n".join(parts)
    widths = [max(map(len, column)) for column in zip(*cells)]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join(
        "| " + " | ".join(cell.ljust(width) for cell, width in zip(line, widths)) + " |"
        for line in cells
    )


def latex(text: str) -> str:
    """A text as LaTeX prints it."""
    named = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    named |= {"–": "--"} | {sign: f"\\{sign}" for sign in "&%$#_{}"}
    return "".join(named.get(sign, sign) for sign in text)
