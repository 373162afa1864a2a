"""The demo's report: its table, its reward curve, one of its episodes.

python -m nanosport.bench.demo out/demo                # eval_*.json, rl/metrics.jsonl → index.html
python -m nanosport.bench.demo results/demo/seed*.json   # several seeds → the README's table
"""

import html
import json
import sys
from pathlib import Path

import numpy as np

from nanosport import cli
from nanosport.env.figures import table
from nanosport.files import provenance, write_atomically
from nanosport.records import DIMENSIONS, read_lines
from nanosport.report import markdown, page

COLUMNS = {dimension: dimension for dimension in DIMENSIONS} | {
    "accuracy": "overall",
    "accuracy_tool_needed": "tool needed",
    "frames": "frames",
    "tool_rate": "tool rate",
    "window_hit_rate": "window hit",
}
NAMES = {"qwen2_5_vl": "Qwen2.5-VL", "qwen3_vl": "Qwen3-VL"}
"""A family's name by config.json's model_type."""
CURVES = {
    "reward": "#c0392b",
    "accuracy": "#2471a3",
    "tool_rate": "#1e8449",
    "format_rate": "#7d3c98",
}


def curve(rows: list[dict]) -> str:
    """The CURVES over a run's steps as SVG."""
    rows = [row for row in rows if None not in map(row.get, CURVES)]  # null: it was not finite
    return chart({name: [(row["step"], row[name]) for row in rows] for name in CURVES}, CURVES)


def chart(lines: dict[str, list[tuple[float, float]]], colours: dict[str, str]) -> str:
    """Lines of (step, value) as SVG, each by its name; all share one axis that starts at 0."""
    width, height, left, bottom = 720, 260, 44, 26
    places = [place for line in lines.values() for place in line]
    base, last = height - bottom, max(1, max(x for x, _ in places))
    top = max(y for _, y in places) * 1.05 or 1.0
    parts, legend = [], ""
    for k in range(5):
        y, value = base - (base - 10) * k / 4, top * k / 4
        parts.append(f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#e3e5e8"/>')
        parts.append(f'<text x="4" y="{y + 4:.1f}">{value:.2f}</text>')
    for name, line in lines.items():
        places = [
            (left + (width - left - 10) * x / last, base - (base - 10) * y / top) for x, y in line
        ]
        points = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        line = f'points="{points}" fill="none" stroke="{colours[name]}" stroke-width="2"'
        parts.append(f"<polyline {line}/>")
        label = html.escape(name.replace("_", " "))
        legend += f'<tspan dx="10" fill="{colours[name]}">━ </tspan>{label}'
    parts.append(f'<text x="{left - 10}" y="{height - 6}">{legend}</text>')
    size = f'viewBox="0 0 {width} {height}" width="{width}" font-family="sans-serif" font-size="12"'
    return f'<svg xmlns="http://www.w3.org/2000/svg" {size}>{"".join(parts)}</svg>'


def html_table(rows: dict[str, dict]) -> str:
    """The table of a page."""
    columns = {key: title for key, title in COLUMNS.items() if key != "accuracy_tool_needed"}
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = ""
    for name, row in rows.items():
        values = ["–" if row.get(key) is None else format(row[key], ".1f") for key in columns]
        cells = "".join(f"<td>{value}</td>" for value in values)
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def read(path: Path):
    """A stage's JSON. Raises ValueError that says which stage is missing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{path}: cannot be read ({error}); has the stage that writes it run?"
        ) from error


def report_demo(folder: Path) -> None:
    """Put the demo's parts together: the printed table, report.json and index.html."""
    rows, seconds = {}, {"arena": read(folder / "arena/arena.json")["seconds"]}
    for name in ("backbone", "no_tool", "sft", "rl"):
        for label, row in read(folder / f"eval_{name}.json")["rows"].items():
            seconds[f"eval {label}"] = row["seconds"]
            rows[label] = {k: v for k, v in row.items() if k not in ("episodes", "seconds")}
    runs = {stage: read(folder / stage / "run.json") for stage in ("sft", "rl")}
    seconds |= {stage: run["seconds"] for stage, run in runs.items()}
    seconds["total"] = round(sum(seconds.values()), 1)
    family = NAMES[read(folder / "rl/model/config.json")["model_type"]]
    report = {"family": family, "seed": runs["rl"]["config"]["seed"]}
    report |= {"rows": rows, "seconds": seconds}
    write_atomically(folder / "report.json", json.dumps(report | provenance(), indent=1) + "\n")

    # the page
    log = [row for _, row in read_lines(folder / "rl/metrics.jsonl", "a step's row")]
    body = f"""<h1>DeepSport in small, on {family}</h1>
<p>Accuracy in percent on held-out clips of the arena.</p>{html_table(rows)}
<h2>RL: mean of each step's episodes</h2>{curve(log)}
<h2>One episode</h2><p>The outlined frames show the decisive event.</p>
<iframe src="episode.html" width="100%" height="900"></iframe>"""
    write_atomically(folder / "index.html", page("nanosport demo", body))
    write_atomically(folder / "reward_curve.svg", curve(log))
    print(table(rows))
    print(f"{seconds['total'] / 60:.1f} minutes; open {folder / 'index.html'}")


def seeds_table(reports: list[dict]) -> str:
    """The README's table, in Markdown: mean ± standard deviation over reports. Raises ValueError
    where they are of several families."""
    # reports from before there were two name none
    families = sorted({report.get("family", NAMES["qwen2_5_vl"]) for report in reports})
    if len(families) > 1:
        raise ValueError(f"reports on {' and '.join(families)}: give those of one family")
    lines = [["", *COLUMNS.values()]]
    for label in reports[0]["rows"]:
        by_column = [[report["rows"][label][key] for report in reports] for key in COLUMNS]
        lines.append([label, *map(mean_and_spread, by_column)])
    return markdown(*lines)


def mean_and_spread(values: list[float | None]) -> str:
    """Mean ± standard deviation of a figure over seeds, if all have it; of one seed the figure
    alone."""
    if None in values:
        return "–"
    spread = f" ± {np.std(values, ddof=1):.1f}" if len(values) > 1 else ""
    return f"{np.mean(values):.1f}{spread}"


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]] or [Path("out/demo")]
    if paths[0].suffix == ".json":
        print(seeds_table([read(path) for path in paths]))
    else:
        report_demo(paths[0])


if __name__ == "__main__":
    cli.ending(main)
