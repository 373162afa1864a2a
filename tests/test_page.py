"""The page of a run: what rl.py keeps for it, and what a person sees and does there."""

import json
import shutil
import threading
import time
from dataclasses import asdict, replace
from html.parser import HTMLParser
from pathlib import Path

import pytest

import rl
from nanosport.env.reward import gated_reward
from nanosport.model.folder import load_tokenizer
from nanosport.records import Episode, Question, Turn
from nanosport.report import __main__ as report
from nanosport.train.rollouts import episode_row
from tests.helpers.browser import Browser, in_a_browser
from tests.helpers.clips import write

MODEL = str(rl.ASSETS / "nano-sft")
HOSTILE = (
    "</script><!--<script>alert(1)</script><img src=x onerror=alert(2)>\"'><svg onload=alert(3)> {}"
)
THINK = "<think>i look.</think>\n"


@pytest.fixture(scope="module")
def run(arena_folder, tmp_path_factory) -> rl.Config:
    """Two steps of three questions, four episodes each."""
    given = {"steps": 2, "num_prompts": 3, "group_size": 4, "keep_rollouts": 5, "kl": 0.0}
    loose = {"min_format_rate": 0, "min_tool_rate": 0, "temperature": 1.0}
    out = tmp_path_factory.mktemp("page") / "run"
    cfg = rl.Config(MODEL, arena_folder / "rl.jsonl", out, **given, **loose)
    rl.main(cfg)
    return cfg


def groups_of(out: Path, step: int) -> list[dict]:
    path = out / "rollouts" / f"step_{step:06}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture
def opened(browser):
    """Make a run's page and open it; what its console says fails the test."""

    def open(out: Path, **flags) -> Browser:
        report.main(report.Config(out, **flags))
        browser.said.clear()
        browser.open((flags.get("out", out / "page") / "index.html").as_uri())
        return browser

    yield open
    assert not browser.said


# What is kept.


def test_whole_groups_are_kept_with_their_tokens(run):
    tokenizer = load_tokenizer(rl.ASSETS / "nano-sft")
    for step in range(2):
        groups = groups_of(run.out, step)
        assert [len(group["episodes"]) for group in groups] == [4, 4]  # 5, up to whole groups
        for group in groups:
            assert Path(group["question"]["video"]).is_file()
            rows = group["episodes"]
            assert sum(row["advantage"] for row in rows) == pytest.approx(0, abs=1e-3)
            for row in rows:
                part = row["reward"]
                total = part["accuracy"] + part["tool"] if part["format"] else -0.05
                assert part["total"] == pytest.approx(total)
                for turn in row["turns"]:
                    assert len(turn["tokens"]) == len(turn["logp"]) > 5
                    assert max(turn["logp"]) <= 0 and min(turn["logp"]) < 0
                    said = "".join(turn["tokens"])
                    assert said.startswith(turn["text"])
                    assert said[len(turn["text"]) :] in ("", *tokenizer.all_special_tokens)
    logged = [json.loads(line) for line in (run.out / "metrics.jsonl").read_text().splitlines()]
    for row in logged:
        spent = sum(v for k, v in row.items() if k in ("seconds_rollout", "seconds_train"))
        assert row["seconds_keep"] < 0.1 * spent  # the loop does not wait for it


def test_a_resumed_run_keeps_no_episode_twice_and_a_new_one_none_of_the_old(run, tmp_path):
    shutil.copytree(run.out, tmp_path / "run")
    before = groups_of(run.out, 1)
    (tmp_path / "run" / "rollouts" / "step_000002.jsonl").write_text("from a part that was lost\n")
    cfg = replace(run, out=tmp_path / "run", steps=3, resume=True, keep_rollouts=4)
    rl.main(cfg)
    assert groups_of(cfg.out, 1) == before and len(groups_of(cfg.out, 2)) == 1
    rl.main(replace(cfg, steps=1, resume=False, overwrite=True, keep_rollouts=0))
    assert not [*(cfg.out / "rollouts").iterdir()]


# How an episode ended.

EVENT = (10, 20)


def made(turns: list[Turn], answer: str | None, window=EVENT, video="v.mp4") -> Episode:
    question = Question("q", video, "golf", "rules", "Who?", (), "red", window=window)
    frames = (0, 39, *(i for turn in turns for i in turn.frames))
    status = "answered" if answer else "format_error"
    return Episode(question, (7,), (1,), (-0.5,), frames, tuple(turns), status, answer)


def looked(start: int, end: int) -> Turn:
    text = f'{THINK}<tool_call>\n{{"idx_start": {start}, "idx_end": {end}}}\n</tool_call>'
    return Turn(text, "tool", (start, end), (start, end), tokens=(0, 1))


SAID = Turn(f"{THINK}<answer>red</answer>", "answer", tokens=(0, 1))
BROKEN = Turn("no tags", "invalid", error="a turn is …", tokens=(0, 1))


def row_of(episode: Episode, advantage=0.5) -> dict:
    return episode_row(episode, gated_reward(episode), advantage, {7: "token"})


@pytest.mark.parametrize(
    "turns, answer, window, kind",
    [
        ([SAID], "red", EVENT, "right without the tool"),
        ([looked(25, 35), SAID], "red", EVENT, "right with the tool"),
        ([SAID], "blue", EVENT, "wrong without the tool"),
        ([looked(15, 35), SAID], "blue", EVENT, "wrong window"),
        ([looked(15, 35), looked(8, 20), SAID], "blue", EVENT, "wrong on the right frames"),
        ([looked(8, 20), SAID], "blue", None, "wrong with the tool"),
        ([looked(8, 20), BROKEN], None, EVENT, "format"),
    ],
)
def test_each_episode_is_of_one_kind(turns, answer, window, kind):
    assert report.kind_of(row_of(made(turns, answer, window)), window) == kind
    assert kind in report.KINDS


# The page.


def write_run(out: Path, groups: list[list[Episode]], name="q", log=()) -> Path:
    """A run's folder with one step, as rl.py leaves it."""
    (out / "rollouts").mkdir(parents=True)
    lines = []
    for k, group in enumerate(groups):
        question = asdict(group[0].question) | {"id": f"{name} {k}"}
        rows = [row_of(episode, 0.5 - m) for m, episode in enumerate(group)]
        lines.append(json.dumps({"question": question, "episodes": rows}) + "\n")
    (out / "rollouts" / "step_000000.jsonl").write_text("".join(lines))
    rows = log or [{"step": 0, "reward": 0.5, "loss": None}]
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "run.json").write_text(json.dumps({"command": name, "commit": name}))
    return out


class Elements(HTMLParser):
    """The names of a page's elements, with all that loads something."""

    def __init__(self, text: str):
        super().__init__()
        self.names, self.loads = [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.names.append(tag)
        self.loads += [value for name, value in attrs if name in ("src", "href")]


def test_the_page_loads_nothing_from_elsewhere(run):
    report.main(report.Config(run.out))
    text = (run.out / "page" / "index.html").read_text()
    assert (
        not Elements(text).loads and "http-equiv" in text and "://" not in text.split("</style>")[0]
    )
    for name in ("page.js", "page.css"):
        own = (report.PARTS / name).read_text().replace("http://www.w3.org/2000/svg", "")
        assert "://" not in own and "innerHTML" not in own and "url(" not in own


@in_a_browser
def test_a_run_is_shown_with_its_curves_frames_and_tokens(run, opened):
    page = opened(run.out)
    titles = page.value("[...document.querySelectorAll('#charts h3')].map(e => e.textContent)")
    wanted = "Reward by part,Accuracy,Tool and format,Entropy,Gap of sampler and trainer"
    assert {*wanted.split(","), "Seconds by stage"} <= {*titles}
    assert page.value("document.querySelectorAll('#charts polyline').length") > 12
    assert page.value("document.getElementById('count').textContent") == "16 of 16 episodes"

    # the first episode, its frames on disk, its reward, and on demand its tokens
    (first, *_), rows = groups_of(run.out, 0), "document.querySelector('article table').innerText"
    episode, question = first["episodes"][0], first["question"]
    text = page.value("document.getElementById('detail').innerText")
    assert question["question"] in text and f"the truth: {question['answer']}" in text
    assert f"event: {question['window'][0]} to {question['window'][1]}" in text
    total = page.value(rows).splitlines()[0].split()
    assert total[0] == "total" and float(total[1]) == pytest.approx(
        episode["reward"]["total"], abs=1e-2
    )
    images = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    page.value("Promise.all([...document.images].map(i => (i.loading = 'eager', i.decode())))")
    assert page.value(images)
    assert page.value("document.images.length") == len(episode["frames"])
    assert not page.value("document.querySelectorAll('ruby').length")
    page.press("t")
    count = sum(len(turn["tokens"]) for turn in episode["turns"])
    page.value("new Promise(done => setTimeout(done, 100))")
    assert page.value("document.querySelectorAll('ruby').length") == count
    shown = page.value("document.querySelector('ruby rt').textContent")
    assert float(shown) == pytest.approx(episode["turns"][0]["logp"][0], abs=0.006)
    torn = "[...document.querySelectorAll('rt')].filter(e => e.getClientRects().length > 1).length"
    assert not page.value(torn), "a number stays on its line, below its token"
    assert all(url.startswith(("file:", "data:")) for url in page.asked_for())


@in_a_browser
def test_hostile_texts_stay_texts(tmp_path, opened):
    clip = write(tmp_path / "<img src=x onerror=alert(4)>.mp4")
    hurt = [HOSTILE.format(k) for k in range(8)]
    turns = [replace(looked(3, 30), text=f"{THINK}{hurt[0]}"), replace(BROKEN, error=hurt[1])]
    episode = made(turns, hurt[2], video=str(clip))
    asked = {"question": hurt[3], "options": (hurt[4], "b"), "answer": "A", "kind": "choice"}
    episode = replace(episode, question=replace(episode.question, **asked))
    out = write_run(tmp_path / "<script>alert(5)<", [[episode, episode]], name=hurt[5])
    row = json.loads((out / "rollouts" / "step_000000.jsonl").read_text())
    for one in row["episodes"]:
        one["turns"][0]["tokens"] = [hurt[6]]
    (out / "rollouts" / "step_000000.jsonl").write_text(json.dumps(row) + "\n")

    page = opened(out)
    page.press("t", "b")
    page.value("new Promise(done => setTimeout(done, 100))")
    text = page.value("document.body.textContent")
    spaces = hurt[6].replace(" ", "␣")
    assert all(hurt[k] in text for k in (0, 1, 2, 3, 4, 5)) and spaces in text and clip.name in text
    assert page.value("document.scripts.length") == 3  # the run, its tokens, and what shows both
    assert page.value("document.querySelectorAll('[onerror], [onload]').length") == 0
    assert page.value(
        "[...document.images].every(i => i.getAttribute('src').startsWith('frames/'))"
    )


@in_a_browser
def test_the_console_is_heard_and_a_script_that_is_not_ours_refused(tmp_path, browser):
    """Else the tests above hear nothing."""
    report.main(report.Config(write_run(tmp_path / "run", [[made([SAID], "red")] * 2])))
    page = tmp_path / "run" / "page" / "index.html"
    page.write_text(page.read_text().replace("</body>", "<script>alert(1)</script></body>"))
    browser.said.clear()
    browser.open(page.as_uri())
    assert "Content Security Policy" in browser.said[0]
    browser.value("setTimeout(() => undefined_function())")
    browser.value("new Promise(done => setTimeout(done, 50))")
    assert any("undefined_function" in line for line in browser.said)


KINDS = [
    ([SAID], "red"), ([looked(8, 20), SAID], "red"), ([SAID], "blue"),
    ([looked(15, 35), SAID], "blue"), ([looked(8, 20), SAID], "blue"), ([BROKEN], None),
]  # fmt: skip


@in_a_browser
def test_the_page_is_used_by_keyboard_alone(tmp_path, opened):
    clip = str(write(tmp_path / "clip.mp4"))
    groups = [[made(*kind, video=clip) for kind in KINDS] for _ in range(4)]
    page = opened(write_run(tmp_path / "run", groups))
    chosen = "document.querySelector('[aria-selected=true]').id"
    articles = "document.querySelectorAll('article').length"
    focus = "document.activeElement.id"

    # by Tab through all that can be used, each with a name
    seen = []
    for _ in range(6):
        page.press("Tab")
        seen.append(page.value(focus))
    assert seen == ["cursor", "kind", "step", "text", "list", "beside"]
    unnamed = "[...document.querySelectorAll('select, input')].filter(e => !e.labels.length).length"
    assert page.value(unnamed) == 0

    page.value("document.getElementById('list').focus()")
    page.press("ArrowDown", "ArrowDown", "ArrowUp")
    assert page.value(chosen) == "row-1"
    page.press("End")
    assert page.value(chosen) == "row-23"
    active = "document.getElementById('list').getAttribute('aria-activedescendant')"
    assert page.value(active) == "row-23"
    page.press("Home", "j", "j", "k")
    assert page.value(chosen) == "row-1" and page.value(articles) == 1
    page.press("b")
    assert page.value(articles) == 2
    names = "[...document.querySelectorAll('article')].map(e => e.getAttribute('aria-label'))"
    assert page.value(names) == ["Episode 1", "Episode 0"]
    page.press("j", "j")
    assert page.value(names) == ["Episode 3", "Episode 0"]  # goes on with the next one's group
    assert "wrong window" in page.value("document.querySelector('article').innerText")

    # the filters, and what a reload keeps
    page.press("/")
    assert page.value(focus) == "text"
    page.press("W", "h", "o", "?", "j")
    assert page.value("document.getElementById('count').textContent") == "0 of 24 episodes"
    page.press("Backspace")
    page.value("(t => { t.value = 'who?'; t.dispatchEvent(new Event('input', {bubbles: true})) })"
               "(document.getElementById('text'))")  # fmt: skip
    assert page.value("document.getElementById('count').textContent") == "24 of 24 episodes"
    for kind in report.KINDS:
        script = f"kind.value = {json.dumps(kind)}; filters.dispatchEvent(new Event('input'))"
        page.value(script)
        left = page.value("document.getElementById('count').textContent")
        assert left == ("0" if kind == "wrong with the tool" else "4") + " of 24 episodes"
        shown = page.value(
            "[...document.querySelectorAll('.row')].map(r => r.children[1].textContent)"
        )
        assert {*shown} <= {kind}
    page.value("kind.value = 'wrong window'; filters.dispatchEvent(new Event('input'))")
    page.value("list.focus()")
    page.press("j", "j")
    kept = page.value("location.hash")
    page.events.clear()
    page.call("Page.reload")
    while not any(e.get("method") == "Page.loadEventFired" for e in page.events):
        page._next(30)
    assert page.value("location.hash") == kept and page.value(chosen) == "row-2"


@in_a_browser
def test_a_page_that_follows_a_run_stays_at_the_episode_that_is_looked_at(tmp_path, opened):
    out = write_run(tmp_path / "run", [[made(*kind) for kind in KINDS]])
    page, file = opened(out), out / "page/index.html"
    file.write_text(file.read_text().replace('"live_s":null', '"live_s":0.5'))
    page.open(file.as_uri())
    page.press("j", "j")
    kept, began = page.value("location.hash"), time.monotonic()
    while page.value("performance.getEntriesByType('navigation')[0].type") != "reload":
        assert time.monotonic() < began + 20
        time.sleep(0.1)
    assert page.value("location.hash") == kept
    page.value("document.querySelector('#live input').click()")
    time.sleep(0.3)
    page.value("document.querySelector('#live input').checked = false")
    page.value("window.stays = true")
    time.sleep(1)
    assert page.value("window.stays")  # the box stops it
    assert page.value("document.querySelector('[aria-selected=true]').id") == "row-2"


@in_a_browser
def test_it_can_be_read_in_the_dark(tmp_path, opened):
    page = opened(write_run(tmp_path / "run", [[made([SAID], "red")] * 2]))
    colours = "(s => [s.backgroundColor, s.color])(getComputedStyle(document.body))"

    def light(colour: str) -> float:
        return sum(map(int, colour.removeprefix("rgb(").rstrip(")").split(","))) / 765

    for scheme, is_dark in (("light", False), ("dark", True)):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        page.call("Emulation.setEmulatedMedia", features=[feature])
        paper, ink = map(light, page.value(colours))
        assert (paper < 0.2 and ink > 0.8) if is_dark else (paper > 0.8 and ink < 0.2)
    page.call("Emulation.setEmulatedMedia", features=[])


@in_a_browser
def test_two_thousand_episodes_are_there_in_two_seconds(tmp_path, opened):
    """With the thoughts and the tokens of a larger model."""
    clip, long = str(write(tmp_path / "clip.mp4")), "a long thought " * 40
    group = [made(*KINDS[k % 6], video=clip) for k in range(8)]
    group = [
        replace(
            one, turns=tuple(replace(t, text=t.text.replace("i look.", long)) for t in one.turns)
        )
        for one in group
    ]
    log = [{"step": k, "reward": k / 9, "accuracy": 0.5, "kl": 0.1} for k in range(500)]
    out = write_run(tmp_path / "run", [group] * 260, log=log)
    rows = [json.loads(line) for line in (out / "rollouts/step_000000.jsonl").open()]
    for episode in (episode for row in rows for episode in row["episodes"]):
        for turn in episode["turns"]:
            turn |= {"tokens": [" thought"] * 150, "logp": [-0.1234] * 150}
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (out / "rollouts/step_000000.jsonl").write_text(lines)
    page = opened(out)
    assert page.value("document.getElementById('count').textContent") == "2000 of 2000 episodes"
    assert (tmp_path / "run/page/index.html").stat().st_size > 5e6
    ready = [int(page.value("document.documentElement.dataset.readyMs"))]
    for _ in range(2):  # others are at work on this machine
        page.open(f"{(out / 'page/index.html').as_uri()}")
        ready.append(int(page.value("document.documentElement.dataset.readyMs")))
    print(f"ready after {ready} ms")
    assert min(ready) < 2000, ready
    assert page.value("document.querySelectorAll('.row').length") < 60  # only what is in sight
    began = time.monotonic()
    page.value("list.focus()")
    page.press("End", "Home", *["j"] * 20)
    assert time.monotonic() - began < 4
    assert page.value("document.querySelector('[aria-selected=true]').id") == "row-20"


@in_a_browser
def test_a_video_that_has_gone_is_said_and_the_rest_is_shown(tmp_path, opened):
    clip = write(tmp_path / "clip.mp4")
    out = write_run(tmp_path / "run", [[made([looked(8, 20), SAID], "red", video=str(clip))] * 2])
    clip.unlink()
    text = opened(out).value("document.getElementById('detail').innerText")
    assert "no such file" in text and "asked: 8 to 20" in text and "answered: red" in text


@in_a_browser
def test_a_run_of_train_py_has_curves_and_no_episodes(tmp_path, opened):
    rows = [{"step": k, "loss": 1 / (k + 1), "seconds_train": 1.0} for k in range(3)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "run.json").write_text("{}")
    page = opened(tmp_path)
    assert page.value("document.querySelectorAll('#charts figure').length") == 2
    assert page.value("document.getElementById('episodes').hidden")
    page.press("Tab", "ArrowLeft")
    assert page.value("document.getElementById('at').textContent") == "step 1"
    assert "loss 0.5" in page.value("document.getElementById('charts').textContent")


def test_frames_are_made_once_and_another_file_has_others(tmp_path):
    clip = write(tmp_path / "clip.mp4")
    out = write_run(tmp_path / "run", [[made([looked(8, 20), SAID], "red", video=str(clip))] * 2])
    report.main(report.Config(out))
    first = {path: path.stat().st_mtime_ns for path in (out / "page/frames").iterdir()}
    assert len(first) == 4  # 0, 39, 8 and 20, of both episodes
    report.main(report.Config(out))
    assert {path: path.stat().st_mtime_ns for path in (out / "page/frames").iterdir()} == first
    write(clip, num=60)
    report.main(report.Config(out))
    assert not first.keys() & set((out / "page/frames").iterdir())
    assert len([*(out / "page/frames").iterdir()]) == 4, "what nobody shows any more goes"


def test_a_watched_run_is_shown_anew_after_a_step(tmp_path, monkeypatch):
    out = write_run(tmp_path / "run", [[made([SAID], "red")] * 2])
    page, ended = out / "page/index.html", threading.Event()
    with open(out / "metrics.jsonl", "a") as log:
        log.write('{"step": 1, "rew')  # of a run at work: half a line

    def sleep(_):
        if ended.is_set():
            raise KeyboardInterrupt
        assert '"step":1,' not in page.read_text() and '"live_s":0.1' in page.read_text()
        with open(out / "metrics.jsonl", "a") as log:
            log.write('ard": 0.75}\n')
        ended.set()

    monkeypatch.setattr(report.time, "sleep", sleep)
    with pytest.raises(KeyboardInterrupt):
        report.main(report.Config(out, watch=True, every_s=0.1))
    assert '{"step":1,"reward":0.75}' in page.read_text()
    monkeypatch.undo()
    report.main(report.Config(out))
    assert '"live_s":null' in page.read_text()


def test_what_is_no_run_is_one_line(tmp_path):
    for flags in ({}, {"watch": True}):
        with pytest.raises(ValueError, match="give the folder of a run"):
            report.main(report.Config(tmp_path / "none", **flags))
    out = write_run(tmp_path / "run", [[made([SAID], "red")] * 2])
    kept = json.loads((out / "rollouts/step_000000.jsonl").read_text())
    del kept["episodes"][0]["advantage"]
    (out / "rollouts/step_000000.jsonl").write_text(json.dumps(kept) + "\n")
    with pytest.raises(ValueError, match="step_000000.jsonl, line 1: not a kept group"):
        report.main(report.Config(out))
    shutil.rmtree(out / "rollouts")
    (out / "metrics.jsonl").write_text("{\n")
    with pytest.raises(ValueError, match="metrics.jsonl: a line is damaged"):
        report.main(report.Config(out))
