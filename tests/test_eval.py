"""An evaluation keeps what it has played, shares its questions, and shows what broke the format."""

import io
import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path

import pytest

import eval as evaluation
import infer
from nanosport.cli import Preempted, Terminal
from nanosport.engine.own import OwnSampler
from nanosport.engine.players import load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.figures import table
from nanosport.env.played import Played
from nanosport.env.tools import STOPS
from nanosport.records import Episode, Question, Turn, read_questions
from nanosport.report import episode_page
from nanosport.video import VideoError
from tests.helpers.chat_server import ChatServer
from tests.helpers.clips import write

ROOT = Path(__file__).parent.parent
MODEL = str(ROOT / "assets" / "nano-sft")


@pytest.fixture(scope="module")
def data(arena_folder, tmp_path_factory) -> Path:
    """Eight questions about two arena clips, and one whose video is gone."""
    asked = read_questions(arena_folder / "test.jsonl")[:8]
    rows = [vars(q) | {"video": str(Path(q.video).absolute())} for q in asked]
    rows.insert(3, rows[0] | {"id": "lost", "video": "gone.mp4"})
    path = tmp_path_factory.mktemp("data") / "questions.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def whole(data, tmp_path_factory) -> tuple[evaluation.Config, dict]:
    """An evaluation from beginning to end, and its rows."""
    out = tmp_path_factory.mktemp("whole") / "report.json"
    cfg = evaluation.Config(MODEL, data, out, batch_size=2, max_new_tokens=60)
    evaluation.main(cfg)
    assert [path.name for path in out.parent.iterdir()] == ["report.json"]
    return cfg, rows_of(out)


def rows_of(report: Path) -> dict:
    """A report's rows, without what a clock measured."""
    rows = json.loads(report.read_text())["rows"]
    return {
        name: {k: v for k, v in row.items() if not k.startswith("seconds")}
        for name, row in rows.items()
    }


@pytest.fixture
def opened(monkeypatch) -> list[int]:
    """The conversations that are opened meanwhile."""
    numbers, open_group = [], OwnSampler.open

    def open_(sampler, prompt, streams):
        group = open_group(sampler, prompt, streams)
        numbers.extend(group)
        return group

    monkeypatch.setattr(OwnSampler, "open", open_)
    return numbers


def played_in(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.played.jsonl"))


def interrupted(cfg: evaluation.Config, number: int, after: int) -> str:
    """Evaluate, and send this process a signal when so many episodes are on disk; returns what the
    command says on its way out."""

    def watch() -> None:
        while True:
            files = played_in(cfg.out.parent)
            if files and len(files[0].read_text().splitlines()) >= after:
                return os.kill(os.getpid(), number)
            time.sleep(0.005)

    # a shell's background jobs ignore Ctrl-C, and other tests may have left a handler
    before = signal.getsignal(signal.SIGTERM)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    watcher = threading.Thread(target=watch, daemon=True)
    watcher.start()
    with pytest.raises((KeyboardInterrupt, Preempted)) as stop:
        evaluation.main(cfg)
    watcher.join()
    assert signal.getsignal(signal.SIGTERM) == before
    return str(stop.value)


@pytest.mark.parametrize(
    "number, after, batch", [(signal.SIGINT, 2, 2), (signal.SIGTERM, 10, 2), (signal.SIGTERM, 1, 8)]
)
def test_a_stopped_evaluation_goes_on_where_it_was(
    number, after, batch, whole, tmp_path, capsys, opened
):
    """Each answer is on disk when it is given, though others of its batch are not, and none is
    asked for again."""
    cfg, wanted = replace(whole[0], out=tmp_path / "r.json", batch_size=batch), whole[1]
    said = interrupted(cfg, number, after) + capsys.readouterr().err
    (kept,) = played_in(tmp_path)
    assert f"what was played is kept in {kept}, and the same command goes on from there" in said
    num_kept = len(kept.read_text().splitlines())
    assert not cfg.out.exists() and num_kept < (8 if after == 1 else 16)
    with open(kept, "a") as file:  # a kill may cut the last line
        file.write('{"mode": "tool", "num')
    before = len(kept.read_text().splitlines()) - 1
    opened.clear()
    evaluation.main(cfg)
    assert len(opened) == 16 - before
    assert f"{before} episodes are played already: going on from {kept}" in capsys.readouterr().out
    assert rows_of(cfg.out) == wanted and not played_in(tmp_path)
    # the seconds are this command's, and so are the questions that they are shared among
    first = next(iter(json.loads(cfg.out.read_text())["rows"].values()))
    new = len(first["episodes"]) - min(before, len(first["episodes"]))
    assert bool(new) == ("seconds_per_question" in first)
    if new:
        assert first["seconds_per_question"] == pytest.approx(first["seconds"] / new, abs=0.06)


def test_seeds_and_samples_are_played_apart_and_kept_after_a_kill(whole, tmp_path, capsys):
    """Two seeds and two samples of four questions; the command is killed, and goes on."""
    cfg = replace(whole[0], out=tmp_path / "r.json", seeds=(0, 5), samples=2, limit=5)
    cfg = replace(cfg, modes=("tool",), lines=tmp_path / "r.jsonl", against="tool")
    command = [sys.executable, "eval.py", "--model", MODEL, "--data", str(cfg.data), "--out"]
    command += [str(cfg.out), "--seeds", "0", "5", "--samples", "2", "--modes", "tool"]
    command += ["--batch-size", "2", "--max-new-tokens", "60", "--limit", "5"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    process = subprocess.Popen(command, cwd=ROOT, env=env, stderr=subprocess.DEVNULL)
    while process.poll() is None and not any(
        p.read_text().count("\n") > 1 for p in played_in(tmp_path)
    ):
        time.sleep(0.01)
    process.kill()
    process.wait()
    (kept,) = played_in(tmp_path)
    lines = kept.read_text().splitlines(keepends=True)
    assert 0 < len(lines) < 16
    kept.write_text("".join(lines[:-1]))  # whatever the kill has cut
    evaluation.main(cfg)
    assert "episodes are played already: going on" in capsys.readouterr().out

    (row,) = rows_of(cfg.out).values()
    assert len(row["episodes"]) == len(cfg.lines.read_text().splitlines()) == 16
    assert row["questions"] == 4 and row["pass_at"].keys() == {"1", "2", "4"}
    means = row["by_seed"]
    assert means.keys() == {"0", "5"} and row["accuracy"] == pytest.approx(sum(means.values()) / 2)
    alone = next(iter(whole[1].values()))["episodes"][:4]
    assert row["episodes"][:8:2] == alone, "seed 0's first sample is the one without others"
    assert row["episodes"][8:] != row["episodes"][:8] and "against" not in row
    told = [json.loads(line) for line in cfg.lines.read_text().splitlines()]
    names = [(one["id"], one["seed"], one["sample"]) for one in told]
    assert len({*names}) == 16 and {name[1:] for name in names} == {(0, 0), (0, 1), (5, 0), (5, 1)}
    assert all(one["dimension"] and one["sport"] and one["frames"] >= 8 for one in told)
    assert sum(one["tokens"] for one in told) / 16 == pytest.approx(row["tokens"], abs=0.01)


def test_other_flags_begin_anew(whole, tmp_path, capsys):
    cfg = replace(whole[0], out=tmp_path / "r.json")
    interrupted(cfg, signal.SIGTERM, 2)
    for other in (replace(cfg, seeds=(1,)), replace(cfg, limit=5)):
        capsys.readouterr()
        evaluation.main(other)
        assert "played already" not in capsys.readouterr().out
    assert len(played_in(tmp_path)) == 1, "what the first has played stays"


@pytest.mark.parametrize(
    "terminal", [lambda: io.TextIOWrapper(io.BytesIO(), "ascii"), lambda: Gone()]
)
def test_the_report_is_written_before_anything_is_printed(terminal, whole, tmp_path):
    cfg = replace(whole[0], out=tmp_path / "r.json", name="größer", limit=2, modes=("tool",))
    with redirect_stdout(terminal()), pytest.raises((OSError, UnicodeEncodeError)):
        evaluation.main(cfg)
    assert rows_of(cfg.out)["größer"]["questions"] == 2


class Gone(io.StringIO):
    """A pipe that nobody reads."""

    def write(self, text: str) -> int:
        raise BrokenPipeError(32, "Broken pipe")


def test_ranks_share_the_questions_and_come_to_the_same(whole, tmp_path):
    cfg, wanted = whole
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node", "3", "eval.py", "--model", MODEL, "--data", str(cfg.data)]
    command += ["--out", str(tmp_path / "r.json"), "--batch-size", "2", "--max-new-tokens", "60"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.count("| nano-sft,") == 1 and done.stdout.count("left out: ") == 1
    assert rows_of(tmp_path / "r.json") == wanted and not played_in(tmp_path)


def test_a_video_that_is_lost_in_mid_run_costs_its_questions_alone(whole, tmp_path):
    cfg, wanted = whole
    rows = [json.loads(line) for line in cfg.data.read_text().splitlines()]
    copy = tmp_path / "copy.mp4"
    copy.write_bytes(Path(rows[1]["video"]).read_bytes())
    rows[1]["video"] = str(copy)
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = [q for q in read_questions(tmp_path / "q.jsonl") if q.id != "lost"]
    sampling = Sampling(cfg.temperature, cfg.top_p, cfg.max_new_tokens, STOPS)
    encoder, sampler = load_sampler(Path(MODEL), sampling)
    for question in asked:
        encoder.open(question.clip)
    copy.unlink()
    played = Played(tmp_path / "r.json", {}, asked, 0)
    row = evaluation.run_mode(cfg, "tool", (encoder, sampler), played, 0, None)
    before = next(iter(wanted.values()))
    assert row["lost"] == [rows[1]["id"]] and row["questions"] == 7
    assert json.loads(json.dumps(row["episodes"])) == [
        one for one in before["episodes"] if one["id"] != rows[1]["id"]
    ]
    assert not any(e.ids for e in played.episodes.values() if e), "tokens fill the memory"

    # when the disk is there again, it is asked
    copy.write_bytes(Path(rows[0]["video"]).read_bytes())
    encoder.unusable.clear()
    again = Played(tmp_path / "r.json", {}, asked, 0)
    assert len(again.episodes) == 7
    row = evaluation.run_mode(cfg, "tool", (encoder, sampler), again, 0, None)
    assert "lost" not in row and row["questions"] == 8

    # where it is lost before its second answer, the first counts no more
    twice, copies = [q for q in asked for _ in range(2)], tmp_path / "two.json"
    played = Played(copies, {}, twice, 0)
    played.add("tool", 2, again.episodes["tool", 1])
    copy.unlink()
    players = load_sampler(Path(MODEL), sampling)
    row = evaluation.run_mode(replace(cfg, samples=2), "tool", players, played, 0, None)
    assert row["lost"] == [rows[1]["id"]] and row["questions"] == 7
    assert len(row["episodes"]) == 14 and set(row["pass_at"]) == {"1", "2"}
    assert len(Played(copies, {}, twice, 0).episodes) == 15, "but it is kept"


def test_what_is_answered_when_a_video_is_lost_is_not_asked_again(whole, tmp_path, opened):
    cfg, wanted = whole
    asked = [q for q in read_questions(cfg.data) if q.id != "lost"]
    encoder, sampler = load_sampler(Path(MODEL), Sampling(0.6, 0.9, 60, STOPS))
    closed, close, turns, losses = [], sampler.close, sampler.turns, []

    def close_(number: int) -> None:
        closed.append(number)
        close(number)

    def turns_():
        for turn in turns():
            yield turn
            if closed and not losses:
                losses.append(turn)
                raise VideoError("gone")

    sampler.close, sampler.turns = close_, turns_
    played = Played(tmp_path / "r.json", {}, asked, 0)
    row = evaluation.run_mode(cfg, "tool", (encoder, sampler), played, 0, None)
    assert losses and len(opened) == 8 + 1, "one of a batch of two has ended"
    assert json.loads(json.dumps(row["episodes"])) == next(iter(wanted.values()))["episodes"]


def test_a_judge_that_fails_does_not_lose_what_was_played(arena_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = [q for q in read_questions(arena_folder / "test.jsonl") if q.kind == "open"][:2]
    rows = [vars(q) | {"video": str(Path(q.video).absolute()), "answer": "a zebra"} for q in asked]
    (tmp_path / "q.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    with ChatServer(MODEL) as server:
        server.trouble = [401] * 20
        cfg = evaluation.Config(MODEL, tmp_path / "q.jsonl", modes=("tool",))
        judged = replace(cfg, judge_url=server.url, judge="nano")
        with pytest.raises(ValueError, match="what was played is kept in .*played.jsonl"):
            evaluation.main(judged)
    (kept,) = played_in(tmp_path / "out")
    said = io.StringIO()
    with redirect_stdout(said):
        evaluation.main(cfg)  # by rule
    assert f"2 episodes are played already: going on from out/{kept.name}" in said.getvalue()
    assert not kept.exists()


def test_no_input_is_written_over(data, tmp_path):
    with pytest.raises(ValueError, match="--out .*: is the file that is read"):
        evaluation.main(evaluation.Config(MODEL, data, data))
    clip = write(tmp_path / "clip.mp4")
    with pytest.raises(ValueError, match="--page .*clip.mp4: is the file that is read"):
        infer.main(infer.Config((clip, "Who?"), page=tmp_path / "." / "clip.mp4"))


# What broke the format.


def test_what_broke_the_format_is_in_the_report_and_below_the_table(whole, tmp_path, capsys):
    cfg = replace(whole[0], out=tmp_path / "r.json", temperature=3.0, top_p=1.0, modes=("tool",))
    evaluation.main(cfg)
    (row,) = rows_of(cfg.out).values()
    broken = [one for one in row["episodes"] if "text" in one]
    assert broken and all(one["error"] and one["text"] for one in broken)
    assert len(broken) >= sum(n for how, n in row["status"].items() if how != "answered")
    said = capsys.readouterr().out.split("\n|")[-1].splitlines()[1:]
    assert len(said) == 3 and broken[0]["error"] in said[0] and broken[0]["id"] in said[0]
    assert " ".join(broken[0]["text"].split())[:20] in said[0]
    evaluation.show(replace(cfg, table="latex"), {"a": row})
    printed = capsys.readouterr()
    assert printed.out.rstrip().endswith(r"\end{tabular}"), "a paper takes the output as it is"
    assert len(printed.err.splitlines()) == 3


def test_infer_shows_what_broke_the_format(tmp_path, capsys):
    clip, page = write(tmp_path / "clip.mp4"), tmp_path / "page.html"
    hot = {"words": (clip, "Who?"), "model": MODEL, "temperature": 3.0, "max_new_tokens": 8}
    infer.main(infer.Config(**hot, page=page))
    said = capsys.readouterr().out
    infer.main(infer.Config(**hot, json=True))
    (turn,) = json.loads(capsys.readouterr().out)["turns"]
    assert turn["error"] == "no action within 8 tokens" and turn["text"]
    assert f"refused {turn['error']}" in said and turn["text"].strip()[:10] in said
    assert turn["error"] in page.read_text()


@pytest.mark.parametrize("action", ["invalid", "bad_call"])
def test_no_turn_reaches_the_terminal_raw(action, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    infer.show(Turn("\x1b[31mred <think>", action, error="the tool call \x07 is not valid JSON"))
    said = capsys.readouterr().out
    assert "said    \\x1b[31mred <think>" in said and "\x07" not in said


def test_the_page_shows_a_turn_that_broke_the_format(tmp_path):
    clip = write(tmp_path / "clip.mp4")
    question = Question("q", str(clip), "soccer", "rules", "Who?", (), "")
    turn = Turn("<b>no</b> tags", "invalid", error="a turn is <think>…")
    episode = evaluation.Episode(question, (), (), (), (0, 39), (turn,), "format_error")
    shown = episode_page(episode)
    assert "&lt;b&gt;no&lt;/b&gt; tags" in shown and "refused: a turn is &lt;think&gt;…" in shown


def test_the_windows_of_questions_with_a_known_event_are_measured():
    """Also where nobody knows whether a look is needed, as with real footage."""

    def played(needs_tool, *windows) -> Episode:
        asked = Question("q", "v", "tennis", "recognition", "?", (), "a", needs_tool, (40, 59))
        turns = [Turn("", "tool", window, (window[0],)) for window in windows]
        late = Turn("", "tool", (40, 59), ())  # nothing came back
        return Episode(asked, (), (), (), (0,), (*turns, late, Turn("", "answer")), "answered", "a")

    made = [
        played(None, (40, 59)),  # exact: hit, IoU 1
        played(None, (30, 69), (0, 9)),  # hit, 20 of 40
        played(True, (50, 69)),  # 10 of 30
        played(None),
        played(False, (40, 59)),  # not asked to look
    ]
    row = evaluation.figures(made, [1.0] * 5)
    assert row["window_hit_rate"] == 50.0
    assert row["window_iou"] == pytest.approx(100 * (1 + 0.5 + 1 / 3 + 0) / 4, abs=0.01)
    bare = replace(made[0], question=replace(made[0].question, window=None))
    assert evaluation.figures([bare], [1.0])["window_iou"] is None
    assert "window IoU" in table({"m": row}) and "ungraded" not in table({"m": row})
    assert "| ungraded " in table({"m": row | {"ungraded": 3}})
