"""A look before training: one web page of random rows of a record or trajectory file, and counts
over all of it.

    python -m data_prep.look out/arena/sft.jsonl
    python -m data_prep.look out/arena/trajectories.jsonl --out trajectories.html --rows 50 --seed 1

The page needs no network and no script. A row shows its question, all its fields, the overview
frames and a time line with the event's window; a trajectory also its turns, with the text that is
trained highlighted, what the tool returns, and the windows asked for.
"""

import html
import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nanosport import cli
from nanosport.env.env import Env, Limits
from nanosport.env.prompt import question_text
from nanosport.fields import AtLeast
from nanosport.files import write_atomically
from nanosport.records import LETTERS, Question, Turn, stream_records
from nanosport.report import page, pictures, small
from nanosport.video import Video

POLICY = "default-src 'none'; img-src data:; style-src 'unsafe-inline'"
HEAD = f"""<meta http-equiv="Content-Security-Policy" content="{POLICY}">
<style>td{{text-align:left;vertical-align:top;overflow-wrap:anywhere}}figure img{{width:auto;
margin:auto}}mark{{background:#fff1a8}}.counts{{display:flex;flex-wrap:wrap;gap:2em}}
.right{{font-weight:bold;color:#1e8449}}.fault{{color:#c0392b;font-weight:bold}}
h2{{border-top:2px solid #1b1f24}}table{{font-size:13px}}</style>
"""
MASK = """<p><mark>Highlighted</mark> text is trained: the assistant's turns as they stand in the
file. Nothing else is: neither prompt nor frames nor tool results. The page plays the turns through
the tool's own rules, but encodes no token.</p>"""


@dataclass(frozen=True)
class Config:
    data: Annotated[Path, tyro.conf.Positional]
    """Records or trajectories, one JSON object a line."""
    out: Path = Path("look.html")
    """The page to write."""
    rows: Annotated[int, AtLeast(1)] = 24
    """Rows drawn at random."""
    seed: Annotated[int, AtLeast(0)] = 0


def escape(value) -> str:
    """Text from outside as HTML text; half a surrogate pair, which no file can hold, becomes a
    question mark."""
    return html.escape(str(value).encode(errors="replace").decode())


def survey(
    path: Path, num_rows: int, seed: int
) -> tuple[list[tuple[int, dict, Question]], dict[str, Counter]]:
    """([(line number, JSON object, question)] of random rows in the file's order, counts of all
    rows by name), in one pass."""
    names = ("source", "sport", "dimension", "kind", "answer letter", "group", "turns")
    rng, picked, counts = random.Random(seed), [], {name: Counter() for name in names}
    records = tqdm(stream_records(path), desc="read", unit="row")
    for count, (line, row, question) in enumerate(records, 1):
        # reservoir sampling
        place = len(picked) if len(picked) < num_rows else rng.randrange(count)
        if place < num_rows:
            picked[place : place + 1] = [(line.number, row, question)]
        for name in ("source", "sport", "dimension", "kind", "group"):
            counts[name][getattr(question, name)] += 1
        if question.options:
            counts["answer letter"][question.answer] += 1
        if "messages" in row:
            counts["turns"][len(row["messages"])] += 1
    return sorted(picked, key=lambda p: p[0]), counts


def count_tables(counts: dict[str, Counter], most: int = 15) -> str:
    """A small table for each name; of many values the most frequent."""
    tables = []
    for name, counter in counts.items():
        rows, total = sorted(counter.items(), key=lambda c: (-c[1], str(c[0]))), counter.total()
        if more := rows[most:]:
            rows[most:] = [(f"{len(more)} others", sum(n for _, n in more))]
        lines = [f"<tr><th>{name}: {len(counter)}</th><th>rows</th><th></th></tr>"]
        for value, n in rows:
            cells = escape(value) or "(empty)", n, f"{100 * n / total:.1f} %"
            lines.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
        if rows:
            tables += ["<table>", *lines, "</table>"]
    return f'<div class="counts">{"".join(tables)}</div>'


def small_pictures(video: Video, indices: Sequence[int], window: tuple[int, int] | None) -> str:
    """Small pictures of frames, each over its index; those inside `window` are outlined."""
    frames_FHWC = small(video.frames(indices)).permute(0, 2, 3, 1).numpy()
    return pictures(indices, frames_FHWC, window)


def time_line(
    num_frames: int, overview: Sequence[int], window: tuple[int, int] | None, turns: Sequence[Turn]
) -> str:
    """The clip from left to right: ticks at the overview frames, the event's window, below it the
    windows asked for."""
    left, width, last = 230, 770, max(1, num_frames - 1)  # labels, then the clip
    bars = [(window, "#d33", "event")] if window else []
    bars += [
        (t.window, "#777" if t.error else "#2471a3", "refused" if t.error else "asked")
        for t in turns
        if t.window
    ]
    height = 18 + 20 * len(bars)
    marks = "".join(
        f'<path d="M{left + width * t / last:.1f} 0V{height}" stroke="#c8ccd0"/>' for t in overview
    )
    for k, ((start, end), colour, what) in enumerate(bars):
        x, end_x = (left + width * min(max(t, 0), last) / last for t in (start, end))
        y, over = 18 + 20 * k, "" if 0 <= start <= end < num_frames else ", outside the clip"
        marks += f'<text y="{y + 11}" fill="{colour}">{what}: {start} to {end}{over}</text>'
        box = f'x="{x:.1f}" y="{y}" width="{max(2, end_x - x):.1f}" height="14"'
        marks += f'<rect {box} fill="{colour}"/>'
    return (
        f'<svg viewBox="0 0 1004 {height}" width="100%" font-family="sans-serif" font-size="12">'
        f'<text y="11">frames 0 to {num_frames - 1}</text>{marks}</svg>'
    )


def conversation(env: Env, messages: Sequence[str]) -> str:
    """The turns as HTML, with what the environment says to them: `replay` without a model."""
    question, video = env.question, env.video
    asked = question_text(question, video.num_frames, env.fps)
    parts = [f"<pre>{escape(asked)}</pre>"]
    for message in messages:
        if env.status is not None:
            break
        turn = env.step(message)
        parts.append(f"<pre><mark>{escape(message)}</mark></pre>")
        if turn.error and env.status is None:
            parts.append(f"<p>tool result</p><pre>error: {escape(turn.error)}</pre>")
        if turn.frames:
            shown = small_pictures(video, turn.frames, question.window)
            parts.append(f"<p>tool result</p>{shown}")

    # why it is no trajectory, in the words of train.py
    played = len(env.turns)
    faults = [f"message {k}: {turn.error}" for k, turn in enumerate(env.turns, 1) if turn.error]
    if played < len(messages):
        faults.append(f"it ends ({env.status}) before message {played + 1} of {len(messages)}")
    elif env.status != "answered":
        faults.append("it ends without an answer")
    if faults:
        why = escape("; ".join(faults))
        parts.append(f'<p class="fault">train.py refuses this trajectory: {why}</p>')
    parts += [f"<pre>{escape(message)}</pre>" for message in messages[played:]]
    return "".join(parts)


def row_body(row: dict, question: Question, folder: Path) -> str:
    """One row as HTML."""
    options = ""
    for letter, text in zip(LETTERS, question.options):
        option = f"({letter}) {escape(text)}"
        right = letter == question.answer
        options += "<br>" + (f'<span class="right">{option} ✓</span>' if right else option)
    parts = [f"<p><b>{escape(question.question)}</b>{options}</p>"]
    parts.append(f"<p>answer: <b>{escape(question.answer)}</b></p>")

    # the clip, and what is said about it
    messages = row.get("messages", [])
    try:
        video = Video(folder / question.video, span_s=question.span_s)
        env = Env(question, video, Limits())
        shown = small_pictures(video, env.overview, question.window)
        said = conversation(env, messages) if messages else ""
        line = time_line(video.num_frames, env.overview, question.window, env.turns)
        parts += [shown, line, said]
    except Exception as error:  # whatever an untrusted file brings about
        why = " ".join(str(error).split()) or type(error).__name__
        parts.append(f'<p class="fault">{escape(why)}</p>')
        parts += [f"<pre><mark>{escape(message)}</mark></pre>" for message in messages]

    # every field of the line
    fields = asdict(question)
    if "messages" in row:
        fields |= {k: v for k, v in row.items() if k not in ("question", "messages")}
    cells = (f"<tr><td>{escape(k)}</td><td>{escape(v)}</td></tr>" for k, v in fields.items())
    return "".join([*parts, "<table>", *cells, "</table>"])


def main(cfg: Config) -> None:
    cli.check(cfg)
    cli.not_the_input(cfg.out, cfg.data)
    picked, counts = survey(cfg.data, cfg.rows, cfg.seed)
    videos = (cfg.data.parent / question.video for _, _, question in picked)
    cli.not_the_input(cfg.out, *videos)
    total, trajectories = counts["kind"].total(), counts["turns"].total()
    title = f"{len(picked)} of {total} rows of {cfg.data.name}".encode(errors="replace").decode()
    drawn = f"<p>Drawn with seed {cfg.seed}; the counts are of the whole file.</p>"
    body = [f"{HEAD}<h1>{escape(title)}</h1>{drawn}", count_tables(counts)]
    body += [MASK] if trajectories else []
    for number, row, question in tqdm(picked, desc="look", unit="row"):
        body.append(f"<h2>line {number}: {escape(question.id)}</h2>")
        body.append(row_body(row, question, cfg.data.parent))
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    write_atomically(cfg.out, page(title, "\n".join(body)))
    print(f"{title}: {cfg.out}")


if __name__ == "__main__":
    cli.run(main, Config)
