"""Where people would rather look than read: an episode as a page, figures as a table."""

import base64
import html
from collections.abc import Sequence
from pathlib import Path

import torch

from nanosport.image import encode_png
from nanosport.records import LETTERS, Episode
from nanosport.video import Video

STYLE = """
body{font:15px/1.5 system-ui,sans-serif;max-width:1080px;margin:2em auto;padding:0 1em;
color:#1b1f24}table{border-collapse:collapse}td,th{padding:.3em .7em;text-align:right;
border-bottom:1px solid #ddd}td:first-child,th:first-child{text-align:left}
figure{display:inline-block;margin:4px;font-size:12px;
text-align:center}figure img{width:168px;display:block}.event img{outline:3px solid #d33}
pre{background:#f5f6f7;padding:.7em;white-space:pre-wrap}h2{margin-top:1.6em}"""


THUMBNAIL = 168
"""Pixels of a small picture's longer side."""


def printable(text: str) -> str:
    """Text from outside for a terminal: an escape sequence stands there as it is written."""
    return "".join(c if c.isprintable() or c == "\n" else repr(c)[1:-1] for c in text)


def page(title: str, body: str) -> str:
    """A web page that needs nothing else."""
    head = f'<meta charset="utf-8"><title>{html.escape(title)}</title><style>{STYLE}</style>'
    return f'<!doctype html><html lang="en">{head}\n{body}</html>\n'


def pictures(indices: Sequence[int], frames_FHWC, window: tuple[int, int] | None) -> str:
    """Frames side by side, each over its index; those inside `window` are outlined."""
    cells = []
    for index, frame_HWC in zip(indices, frames_FHWC, strict=True):
        source = "data:image/png;base64," + base64.b64encode(encode_png(frame_HWC)).decode()
        event = ' class="event"' if window and window[0] <= index <= window[1] else ""
        name = f"frame {index}"
        cells.append(f'<figure{event}><img src="{source}" alt="{name}">{name}</figure>')
    return "".join(cells)


def small_size(height: int, width: int) -> tuple[int, int]:
    """(height, width) of a small picture, not larger than a THUMBNAIL."""
    scale = min(1.0, THUMBNAIL / max(height, width))
    return max(1, round(height * scale)), max(1, round(width * scale))


def small(frames_FCHW: torch.Tensor) -> torch.Tensor:
    """uint8 frames as small pictures."""
    size = small_size(*frames_FCHW.shape[2:])
    smaller = torch.nn.functional.interpolate(frames_FCHW.float(), size, mode="area")
    return smaller.round().byte()


def episode_body(episode: Episode) -> str:
    """The question, then every turn: what was said, and the frames that came back."""
    question = episode.question
    video = Video(question.video, span_s=question.span_s)

    def show(indices: Sequence[int]) -> str:
        return pictures(indices, video.frames(indices).permute(0, 2, 3, 1).numpy(), question.window)

    lettered = zip(LETTERS, question.options)
    options = "".join(f"<br>({letter}) {html.escape(text)}" for letter, text in lettered)
    called = sum(len(turn.frames) for turn in episode.turns)
    overview = episode.frames[: len(episode.frames) - called]
    parts = [f"<p><b>{html.escape(question.question)}</b>{options}</p>", show(overview)]
    for turn in episode.turns:
        parts.append(f"<pre>{html.escape(turn.text)}</pre>")
        if turn.error:
            parts.append(f"<p>refused: {html.escape(turn.error)}</p>")
        if turn.frames:
            parts.append(show(turn.frames))
    truth = f", the truth is <b>{html.escape(question.answer)}</b>" if question.answer else ""
    parts.append(f"<p>{episode.status}: <b>{html.escape(str(episode.answer))}</b>{truth}</p>")
    return "".join(parts)


def episode_page(*episodes: Episode) -> str:
    """Episodes as a page. The outlined frames show the decisive event, where it is known."""
    names = [html.escape(Path(episode.question.video).name) for episode in episodes]
    bodies = [f"<h1>{name}</h1>{episode_body(e)}" for name, e in zip(names, episodes)]
    return page("episode", "".join(bodies))


def markdown(*rows: Sequence[str]) -> str:
    """A Markdown table of rows of cells; the first has the titles."""
    lines = ["|" + "|".join(f" {cell} " if cell else " " for cell in row) + "|" for row in rows]
    lines.insert(1, "|---" * len(rows[0]) + "|")
    return "\n".join(lines)
