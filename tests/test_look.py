"""The page of random rows: what it shows, and that no text of the data becomes a part of the
page."""

import json
import subprocess
from collections import Counter
from html import escape
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest

from data_prep import look
from data_prep.arena import write_video
from data_prep.draw import HEIGHT, WIDTH
from data_prep.teacher import answer_turn, tool_turn
from nanosport import report
from nanosport.bench import demo
from nanosport.records import Episode, Question, Turn
from tests.helpers.browser import CHROMIUM, in_a_browser

NUM = 60
HOSTILE = "</pre></td></mark></style></title><script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)>&lt;b&gt; {}"


class Page(HTMLParser):
    """Tags, attributes and texts; which text is marked, and which belongs to which row."""

    def __init__(self, path: Path):
        super().__init__()
        self.tags, self.attributes, self.text, self.marked, self.cells, self.faults = (
            Counter(),
            [],
            "",
            [],
            [],
            [],
        )
        self.open = []
        self.feed(path.read_text())
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags[tag] += 1
        self.attributes += [(tag, name, value) for name, value in attrs]
        if tag not in ("meta", "img", "br"):
            self.open.append((tag, dict(attrs).get("class")))
        if tag == "mark":
            self.marked.append("")
        if tag in ("td", "th"):
            self.cells.append("")
        if self.open[-1] == ("p", "fault"):
            self.faults.append("")

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag, f"</{tag}> closes another element"

    def handle_data(self, data):
        self.text += data
        inside = [tag for tag, _ in self.open]
        if "mark" in inside:
            self.marked[-1] += data
        if "td" in inside or "th" in inside:
            self.cells[-1] += data
        if ("p", "fault") in self.open:
            self.faults[-1] += data


@pytest.fixture(scope="module")
def clip(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    write_video(path, (np.full((HEIGHT, WIDTH, 3), 4 * k, np.uint8) for k in range(NUM)))
    return path


def record(video, k: int = 0, **more) -> dict:
    row = {
        "id": f"row {k}",
        "video": str(video),
        "sport": "golf",
        "dimension": "rules",
        "question": f"Why {k}?",
        "options": [],
        "answer": "so",
    }
    return row | more


def render(path: Path, records: list[dict], **flags) -> Page:
    path.write_text("".join(json.dumps(row) + "\n" for row in records))
    look.main(look.Config(path, path.with_suffix(".html"), **flags))
    return Page(path.with_suffix(".html"))


def hostile_rows(clip: Path) -> list[dict]:
    hurt = [HOSTILE.format(k) for k in range(8)]
    choice = record(clip, options=[hurt[0], "no"], answer="A", question=hurt[1])
    texts = {
        name: hurt[2]
        for name in ("id", "sport", "source", "group", "provenance", "licence", "answer")
    }
    messages = [tool_turn(hurt[4], 3, 30), f"no action {hurt[5]}", f"unread {hurt[6]}"]
    return [
        choice,
        record(clip, **texts),
        record(f"missing {hurt[3]}.mp4"),
        {"question": choice, "messages": messages, hurt[7]: hurt[7]},
    ]


def test_no_text_of_the_data_becomes_a_part_of_the_page(tmp_path, clip):
    page = render(tmp_path / "<script>alert(0)<.jsonl".replace("/", ""), hostile_rows(clip))
    harmless = {
        "html",
        "meta",
        "title",
        "style",
        "h1",
        "h2",
        "p",
        "b",
        "br",
        "span",
        "div",
        "pre",
        "mark",
        "figure",
        "img",
    }
    harmless |= {"table", "tr", "th", "td", "svg", "text", "path", "rect"}
    assert page.tags.keys() <= harmless
    assert all(
        value.startswith("data:image/png;base64,")
        for tag, name, value in page.attributes
        if name == "src"
    )
    known = {
        "lang",
        "charset",
        "http-equiv",
        "content",
        "class",
        "src",
        "alt",
        "viewbox",
        "width",
        "height",
        "font-family",
        "font-size",
    }
    assert {name for _, name, _ in page.attributes} <= known | {"x", "y", "d", "stroke", "fill"}
    assert page.tags["style"] == 2 and page.tags["title"] == 1
    for k in range(8):
        assert HOSTILE.format(k) in page.text
    source = next(tmp_path.glob("*.html")).read_text()
    assert "http://" not in source and "https://" not in source and "<script" not in source
    assert "default-src 'none'" in source


def test_halves_of_surrogate_pairs_do_not_stop_it(tmp_path, clip):
    rows = [{"question": record(clip), "messages": ["c d"], "note": "a \ud800 b"}]
    assert "a ? b" in render(tmp_path / "r.jsonl", rows, rows=1).text


def test_counts_are_of_the_whole_file(tmp_path, clip):
    rows = [
        record(clip, k, source="ab"[k % 2], sport=f"sport {k % 20}", group=f"match {k % 5}")
        for k in range(40)
    ]
    rows += [
        record(clip, 40 + k, options=["x", "y", "z"], answer="ABC"[k % 3], dimension="commentary")
        for k in range(10)
    ]
    rows += [record(clip, 50, kind="number", answer="3")]
    page = render(tmp_path / "r.jsonl", rows, rows=2)
    table = page.cells[: page.cells.index("id")]
    counts = dict(zip(table, table[1:]))
    assert [c for c in table if ": " in c] == [
        "source: 3",
        "sport: 21",
        "dimension: 2",
        "kind: 3",
        "answer letter: 3",
        "group: 6",
    ]
    expected = {
        "a": 20,
        "b": 20,
        "(empty)": 11,
        "golf": 11,
        "sport 0": 2,
        "6 others": 12,
        "rules": 41,
        "commentary": 10,
    }
    expected |= {
        "open": 40,
        "choice": 10,
        "number": 1,
        "A": 4,
        "B": 3,
        "C": 3,
        "match 4": 8,
        str(clip): 11,
    }
    assert {name: counts[name] for name in expected} == {
        name: str(n) for name, n in expected.items()
    }
    at = table.index("A")
    assert table[at : at + 3] == ["A", "4", "40.0 %"]
    assert page.tags["h2"] == 2 and "2 of 51 rows" in page.text


def test_a_row_is_shown_with_its_frames_and_its_answer(tmp_path, clip):
    row = record(
        clip,
        options=["left", "right"],
        answer="B",
        window=[20, 30],
        span_s=[1, 4],
        source="made",
        licence="free",
    )
    page = render(tmp_path / "r.jsonl", [row])
    source = (tmp_path / "r.html").read_text()
    assert (
        page.tags["img"] == 8 and "frame 36" in page.text and "frame 37" not in page.text
    )  # 1 s to 4 s at 12 a second
    assert '<span class="right">(B) right ✓</span>' in source and "(A) left<" in source
    shown = [int(value.split()[1]) for tag, name, value in page.attributes if name == "alt"]
    assert source.count('<figure class="event">') == sum(20 <= t <= 30 for t in shown) == 2
    assert "event: 20 to 30" in page.text and "outside" not in page.text
    cells = dict(zip(page.cells, page.cells[1:]))
    assert (cells["source"], cells["licence"], cells["window"], cells["span_s"]) == (
        "made",
        "free",
        "(20, 30)",
        "(1, 4)",
    )
    page = render(tmp_path / "r.jsonl", [row | {"window": [20, 90]}])
    assert "event: 20 to 90, outside the clip" in page.text


def test_a_broken_video_shows_its_reason(tmp_path, clip):
    (tmp_path / "empty.mp4").write_bytes(b"")
    rows = [record("gone.mp4"), record("empty.mp4"), record(clip, span_s=[70, 80]), record(clip)]
    rows.append({"question": record("gone.mp4"), "messages": ["what was said"]})
    page = render(tmp_path / "r.jsonl", rows)
    assert len(page.faults) == 4 and page.tags["img"] == 8
    for fault, why in zip(
        page.faults,
        ("no such file", "empty file", "no frame between 70 s and 80 s", "no such file"),
    ):
        assert why in fault
    assert page.marked == ["Highlighted", "what was said"]


def test_a_trajectory_shows_what_is_trained(tmp_path, clip):
    good = [tool_turn("i look.", 10, 30), tool_turn("again.", 10, 30), answer_turn("i see.", "so")]
    page = render(
        tmp_path / "r.jsonl", [{"question": record(clip, window=[12, 18]), "messages": good[::2]}]
    )
    assert page.marked == ["Highlighted", *good[::2]] and page.tags["img"] == 16 and not page.faults
    assert "asked: 10 to 30" in page.text and "The video has 60 frames. Why 0?" in page.text
    assert all("The video has" not in text and "tool result" not in text for text in page.marked)

    page = render(tmp_path / "r.jsonl", [{"question": record(clip), "messages": good}])
    assert page.marked == ["Highlighted", *good] and "refused: 10 to 30" in page.text
    assert (
        "error: frames 10 to 30 were already returned" in page.text
        and "message 2: frames 10 to 30" in page.faults[0]
    )
    page = render(tmp_path / "r.jsonl", [{"question": record(clip), "messages": good[:1]}])
    assert "ends without an answer" in page.faults[0]
    page = render(
        tmp_path / "r.jsonl", [{"question": record(clip), "messages": [good[2], "too much"]}]
    )
    assert (
        "before message 2 of 2" in page.faults[0]
        and page.marked == ["Highlighted", good[2]]
        and "too much" in page.text
    )


def test_it_does_not_write_over_its_records(tmp_path):
    data = tmp_path / "records.jsonl"
    data.write_text("{}\n")
    with pytest.raises(ValueError, match="is the file that is read"):
        look.main(look.Config(data, out=tmp_path / "x" / ".." / "records.jsonl"))
    assert data.read_text() == "{}\n"


def test_the_seed_decides_which_rows(tmp_path):
    rows = [record("gone.mp4", k) for k in range(200)]
    render(tmp_path / "r.jsonl", rows, rows=10)
    first = (tmp_path / "r.html").read_bytes()
    render(tmp_path / "r.jsonl", rows, rows=10)
    assert (tmp_path / "r.html").read_bytes() == first
    render(tmp_path / "r.jsonl", rows, rows=10, seed=1)
    assert (tmp_path / "r.html").read_bytes() != first


def test_every_row_is_drawn_equally_often(tmp_path):
    path = tmp_path / "r.jsonl"
    path.write_text("".join(json.dumps(record("gone.mp4", k)) + "\n" for k in range(10)))
    drawn = Counter(number for seed in range(300) for number, _, _ in look.survey(path, 3, seed)[0])
    assert drawn.total() == 900 and all(60 <= drawn[k] <= 120 for k in range(1, 11))  # 90 ± 8


def test_a_damaged_line_is_said(tmp_path):
    with pytest.raises(ValueError, match="r.jsonl, line 2: not a question"):
        path = tmp_path / "r.jsonl"
        path.write_text(json.dumps(record("gone.mp4")) + "\n{\n")
        look.main(look.Config(path, tmp_path / "r.html"))
    assert not (tmp_path / "r.html").exists()


FLAGS = """--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking --disable-component-update
--disable-sync --enable-logging=stderr --v=0 --dump-dom""".split()


def browse(path: Path) -> tuple[str, list[str]]:
    """(the document as the browser has it, what its console says)."""
    command = [CHROMIUM, *FLAGS, f"--user-data-dir={path.parent}/profile", path.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0 and "</html>" in done.stdout, done.stderr
    return done.stdout, [line for line in done.stderr.splitlines() if "CONSOLE" in line]


@in_a_browser
def test_it_opens_in_a_browser_without_an_error_and_scripts_stay_text(tmp_path, clip):
    made = render(tmp_path / "r.jsonl", hostile_rows(clip))
    document, console = browse(tmp_path / "r.html")
    (tmp_path / "dom.html").write_text(document)
    shown = Page(tmp_path / "dom.html")
    assert not console and made.tags["img"] == 8 * 3 + 8
    assert (
        shown.tags - Counter(head=1, body=1, tbody=shown.tags["table"]) == made.tags
    )  # not one element more than was written
    assert (
        all(HOSTILE.format(k) in shown.text for k in range(8))
        and "<script>alert(1)</script>" in shown.text
    )


@in_a_browser
def test_the_console_of_a_faulty_page_is_heard(tmp_path, clip):
    render(tmp_path / "r.jsonl", [record(clip)])
    page = tmp_path / "r.html"
    page.write_text(
        page.read_text() + "<script>alert(1)</script>"
    )  # a text not escaped: the page's policy refuses it
    assert "Content Security Policy" in browse(page)[1][0]
    page.write_text("<!doctype html><p>fine</p><script>undefined_function()</script>")
    assert "undefined_function is not defined" in browse(page)[1][0]


@in_a_browser
def test_the_reports_open_in_a_browser_too(tmp_path, clip):
    hurt = HOSTILE.format(0)
    question = Question("q", str(clip), "golf", "rules", hurt, (hurt, "no"), "A", window=(10, 20))
    turns = (
        Turn(tool_turn(hurt, 3, 30), "tool", (3, 30), (3, 11, 30)),
        Turn(hurt, "invalid", error=hurt),
    )
    episode = Episode(question, (), (), (), (0, 59, 3, 11, 30), turns, "format_error", hurt)
    (tmp_path / "episode.html").write_text(report.episode_page(episode))
    document, console = browse(tmp_path / "episode.html")
    text = escape(hurt, quote=False)
    assert (
        not console
        and "<script" not in document
        and document.count("<img ") == 5
        and document.count(text) == 6
    )
    rows = [
        {"step": k, "reward": k / 3, "accuracy": 0.5, "tool_rate": 0.0, "format_rate": 1.0}
        for k in range(4)
    ]
    body = demo.html_table({hurt: {"accuracy": 50.0}}) + demo.curve(rows)
    body += '<iframe src="episode.html"></iframe>'
    (tmp_path / "index.html").write_text(report.page(hurt, body))
    document, console = browse(tmp_path / "index.html")
    assert (
        not console
        and "<script" not in document
        and document.count("<polyline ") == 4
        and document.count(text) == 2
    )
