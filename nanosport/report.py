"""Where people would rather look than read: the demo's table, the reward curve, an episode with its frames.

python -m nanosport.report out/demo                   # eval_*.json + rl/log.jsonl → report.json, index.html
python -m nanosport.report results/demo/*.json        # reports of several seeds → the README's table, mean ± std
"""

import base64
import html
import io
import json
import sys
from pathlib import Path

import av
import numpy as np

from nanosport.episode import Episode
from nanosport.log import provenance, write_atomically
from nanosport.video import Video

STYLE = """body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;color:#1b1f24}
table{border-collapse:collapse}td,th{padding:.3em .7em;border-bottom:1px solid #ddd;text-align:right}td:first-child,th:first-child
{text-align:left}figure{display:inline-block;margin:4px;font-size:12px;text-align:center}figure img{width:168px;display:block}
.event img{outline:3px solid #d33}pre{background:#f5f6f7;padding:.7em;white-space:pre-wrap}h2{margin-top:1.6em}"""


def png(picture_HWC: np.ndarray) -> bytes:
    """uint8 RGB → the bytes of a PNG file."""
    buffer = io.BytesIO()
    with av.open(buffer, "w", format="image2pipe") as container:
        stream = container.add_stream("png", rate=1)
        stream.height, stream.width, stream.pix_fmt = *picture_HWC.shape[:2], "rgb24"
        container.mux(stream.encode(av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")))
        container.mux(stream.encode())
    return buffer.getvalue()


def figures(video: Video, indices, window=None) -> str:
    """Frames side by side, each under its index; those inside `window` are outlined."""
    cells = []
    for index, frame in zip(indices, video.frames(indices).permute(0, 2, 3, 1).numpy()):
        image = base64.b64encode(png(frame)).decode()
        event = ' class="event"' if window and window[0] <= index <= window[1] else ""
        cells.append(f'<figure{event}><img src="data:image/png;base64,{image}" alt="frame {index}">frame {index}</figure>')
    return "".join(cells)


def episode_body(episode: Episode) -> str:
    """The question, then every turn: what was said, and the frames that came back."""
    question, video = episode.question, Video(episode.question.video, span_s=episode.question.span_s)
    options = "".join(f"<br>({letter}) {html.escape(o)}" for letter, o in zip("ABCDEFGHIJ", question.options))
    called = sum(len(t.frames) for t in episode.turns)
    overview = episode.frames[: len(episode.frames) - called]
    parts = [f"<p><b>{html.escape(question.question)}</b>{options}</p>", figures(video, overview, question.window)]
    for turn in episode.turns:
        parts.append(f"<pre>{html.escape(turn.text)}</pre>")
        if turn.error:
            parts.append(f"<p>refused: {html.escape(turn.error)}</p>")
        if turn.frames:
            parts.append(figures(video, turn.frames, question.window))
    truth = f", the truth is <b>{html.escape(question.answer)}</b>" if question.answer else ""
    return "".join(parts) + f"<p>{episode.status}: <b>{html.escape(str(episode.answer))}</b>{truth}</p>"


def page(title: str, body: str) -> str:
    return f'<!doctype html><html lang="en"><meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>\n{body}</html>\n'


def episode_page(episode: Episode) -> str:
    """One episode as a web page that needs nothing else. The outlined frames show the decisive event, where it is known."""
    return page("episode", f"<h1>{html.escape(Path(episode.question.video).name)}</h1>{episode_body(episode)}")


def curve(rows: list[dict], names: tuple[str, ...]) -> str:
    """Lines over steps as SVG; all values share one axis that starts at 0."""
    width, height, left, bottom = 720, 260, 44, 26
    top = max(max(r[n] for r in rows) for n in names) * 1.05 or 1.0
    last = max(1, rows[-1]["step"])
    colours = ("#c0392b", "#2471a3", "#1e8449", "#7d3c98")
    parts = []
    for k in range(5):
        y = height - bottom - (height - bottom - 10) * k / 4
        parts.append(
            f'<path d="M{left} {y:.1f}H{width - 10}" stroke="#e3e5e8"/><text x="4" y="{y + 4:.1f}">{top * k / 4:.2f}</text>'
        )
    for n, (name, colour) in enumerate(zip(names, colours)):
        points = " ".join(
            f"{left + (width - left - 10) * r['step'] / last:.1f},{height - bottom - (height - bottom - 10) * r[name] / top:.1f}"
            for r in rows
        )
        parts.append(f'<polyline points="{points}" fill="none" stroke="{colour}" stroke-width="2"/>')
        parts.append(
            f'<text x="{left + 8 + 150 * n}" y="{height - 6}" fill="{colour}">{html.escape(name.replace("_", " "))}</text>'
        )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'font-family="sans-serif" font-size="12">{"".join(parts)}</svg>'
    )


def html_table(rows: dict[str, dict], columns: dict[str, str]) -> str:
    head = "".join(f"<th>{html.escape(title)}</th>" for title in columns.values())
    body = ""
    for name, row in rows.items():
        cells = "".join(f"<td>{'–' if row.get(c) is None else format(row[c], '.1f')}</td>" for c in columns)
        body += f"<tr><td>{html.escape(name)}</td>{cells}</tr>"
    return f"<table><tr><th></th>{head}</tr>{body}</table>"


def read(path: Path):
    """A stage's JSON; ValueError says which stage is missing."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{path}: cannot be read ({error}); has the stage that writes it run?") from error


def main(folder: Path) -> None:
    """Put the demo's parts together: the printed table, report.json and index.html."""
    from eval import table  # the benchmark's own columns

    rows, seconds = {}, {"arena": read(folder / "arena/arena.json")["seconds"]}
    for name in ("backbone", "no_tool", "sft", "rl"):
        found = read(folder / f"eval_{name}.json")
        for label, row in found["rows"].items():
            seconds[f"eval {label}"] = row["seconds"]
            rows[label] = {k: v for k, v in row.items() if k not in ("episodes", "seconds")}
    for stage in ("sft", "rl"):
        seconds[stage] = read(folder / stage / "run.json")["seconds"]
    log = [json.loads(line) for line in (folder / "rl/log.jsonl").read_text().splitlines()]
    seconds["total"] = round(sum(seconds.values()), 1)
    report = {"rows": rows, "seconds": seconds, "seed": read(folder / "rl/run.json")["config"]["seed"], **provenance()}
    write_atomically(folder / "report.json", json.dumps(report, indent=1) + "\n")

    columns = {"recognition": "recognition", "rules": "rules", "assessment": "assessment", "commentary": "commentary"}
    columns |= {"accuracy": "overall", "frames": "frames", "tool_rate": "tool rate", "window_hit_rate": "window hit"}
    body = "<h1>DeepSport in small</h1><p>Accuracy in percent on held-out clips of the arena.</p>" + html_table(rows, columns)
    body += "<h2>RL: mean of each step's episodes</h2>" + curve(log, ("reward", "accuracy", "tool_rate", "format_rate"))
    body += '<h2>One episode</h2><p>The outlined frames show the decisive event.</p><iframe src="episode.html" width="100%" height="900"></iframe>'
    write_atomically(folder / "index.html", page("nanosport demo", body))
    write_atomically(folder / "reward_curve.svg", curve(log, ("reward", "accuracy", "tool_rate", "format_rate")))
    print(table(rows))
    print(f"{seconds['total'] / 60:.1f} minutes; open {folder / 'index.html'}")


def seeds_table(reports: list[dict]) -> str:
    """Markdown, mean ± standard deviation over the reports."""
    columns = ("recognition", "rules", "assessment", "commentary", "accuracy")
    columns += ("accuracy_tool_needed", "frames", "tool_rate", "window_hit_rate")
    heads = ("recognition", "rules", "assessment", "commentary", "overall", "tool needed", "frames", "tool rate", "window hit")
    lines = ["| | " + " | ".join(heads) + " |", "|---" * (len(heads) + 1) + "|"]
    for label in reports[0]["rows"]:
        cells = []
        for column in columns:
            values = [r["rows"][label][column] for r in reports]
            cells.append("–" if None in values else f"{np.mean(values):.1f} ± {np.std(values):.1f}")
        lines.append(f"| {label} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    try:
        given = [Path(argument) for argument in sys.argv[1:]] or [Path("out/demo")]
        if given[0].suffix == ".json":
            print(seeds_table([read(path) for path in given]))
        else:
            main(given[0])
    except ValueError as error:
        sys.exit(f"error: {error}")
