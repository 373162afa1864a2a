"""The video doctor, on real files: good, damaged, missing, and ones whose opening never returns."""

import fcntl
import json
import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from pathlib import Path

import av
import numpy as np
import pytest

from data_prep import check
from data_prep.arena import FPS, write_video
from data_prep.draw import HEIGHT, WIDTH
from nanosport.records import Clip, read_questions, read_records

ROOT = Path(__file__).parents[1]
SHARED = Path(__file__).parents[2] / "shared" / "data"
NUM = 36


def pictures(num: int = NUM):
    return (np.full((HEIGHT, WIDTH, 3), 7 * k % 256, np.uint8) for k in range(num))


def record(video: str, **more) -> dict:
    row = {
        "id": f"about {video}",
        "video": video,
        "sport": "golf",
        "dimension": "rules",
        "question": "Why?",
        "options": [],
        "answer": "so",
    }
    return row | more


def write_records(path: Path, rows: list[dict]) -> Path:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def report_of(records: Path) -> dict[str, dict]:
    rows = [
        json.loads(line)
        for line in records.with_suffix(".clean.report.jsonl").read_text().splitlines()
    ]
    assert len({(r["video"], str(r["span_s"])) for r in rows}) == len(rows), "a clip has two lines"
    return {r["video"]: r for r in rows}


@contextmanager
def hanging(path: Path):
    """A file whose opening by another process blocks inside the kernel (for lease-break-time, 45
    s); yields its descriptor."""
    path.write_bytes(b"x" * 1000)
    before, file = signal.signal(signal.SIGIO, signal.SIG_IGN), os.open(path, os.O_RDWR)
    try:
        fcntl.fcntl(file, fcntl.F_SETLEASE, fcntl.F_WRLCK)
    except OSError:
        os.close(file)
        pytest.skip("no file leases here, and nothing else makes a plain file's opening hang")
    try:
        yield file
    finally:
        os.close(file)
        signal.signal(signal.SIGIO, before)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("records")
    write_video(folder / "good.mp4", pictures())
    whole = (folder / "good.mp4").read_bytes()
    (folder / "truncated.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "empty.mp4").write_bytes(b"")
    (folder / "text.mp4").write_text("not a video\n")
    os.mkfifo(folder / "pipe.mp4")
    (folder / "frames").mkdir()
    for k, picture in enumerate(pictures(3)):
        with av.open(str(folder / "frames" / f"{k}.png"), "w", format="image2") as out:
            stream = out.add_stream("png", rate=1)
            stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "rgb24"
            out.mux(stream.encode(av.VideoFrame.from_ndarray(picture, format="rgb24")))
    with av.open(str(folder / "short.mp4"), "w", options={"movflags": "faststart"}) as out:
        stream = out.add_stream("libx264", rate=FPS, options={"g": "6", "crf": "1"})
        stream.width, stream.height, stream.pix_fmt = WIDTH, HEIGHT, "yuv420p"
        noise = np.random.default_rng(0)
        for _ in range(NUM):
            out.mux(
                stream.encode(
                    av.VideoFrame.from_ndarray(
                        noise.integers(0, 256, (HEIGHT, WIDTH, 3), np.uint8), format="rgb24"
                    )
                )
            )
        out.mux(stream.encode())
    os.truncate(
        folder / "short.mp4", (folder / "short.mp4").stat().st_size // 2
    )  # its index promises what is no longer there
    return folder


def test_every_kind_of_file(folder, capsys):
    rows = [
        record("good.mp4", id="whole"),
        record("truncated.mp4"),
        record(
            "good.mp4", id="window outside", window=[30, NUM], provenance="<b>kept as it is</b>"
        ),
        record("empty.mp4"),
        record("text.mp4"),
        record("missing.mp4"),
        record("pipe.mp4"),
        record("frames"),
        record("short.mp4"),
        {
            "question": record("good.mp4", id="part", span_s=[1, 2], window=[0, FPS]),
            "messages": ["a turn"],
            "cost": 3,
        },
        {"question": record("good.mp4", id="beyond", span_s=[60, 70]), "messages": ["a turn"]},
        record(str(folder / "good.mp4"), id="absolute", group="match 7"),
    ]
    records = write_records(folder / "records.jsonl", rows)
    out = folder / "elsewhere" / "clean.jsonl"
    check.main(check.Config(records, out))

    lines = [json.loads(line) for line in out.with_suffix(".report.jsonl").read_text().splitlines()]
    report = {(r["video"], tuple(r["span_s"] or ())): r for r in lines}
    assert len(lines) == len(report) == 11
    good = report["good.mp4", ()]
    size = {
        "frames_promised": NUM,
        "frames": NUM,
        "fps": FPS,
        "width": WIDTH,
        "height": HEIGHT,
        "rotation": 0,
        "window_outside": True,
    }
    assert (
        size.items() <= good.items()
        and good["usable"]
        and good["backend"] in ("pyav", "torchcodec")
    )
    assert (
        good["duration_s"] == pytest.approx((NUM - 1) / FPS, abs=1e-3) and 0 < good["seconds"] < 60
    )
    part = report["good.mp4", (1, 2)]
    assert (part["frames_promised"], part["frames"], part["window_outside"]) == (
        None,
        FPS + 1,
        False,
    )
    assert (report["frames", ()]["frames"], report["frames", ()]["backend"]) == (3, "folder")
    short = report["short.mp4", ()]
    assert short["usable"] and short["frames_promised"] == NUM and 0 < short["frames"] < NUM
    why = {key[0]: r["reason"] for key, r in report.items() if not r["usable"]}
    expected = {
        "truncated.mp4": "moov",
        "empty.mp4": "empty file",
        "text.mp4": "not a video",
        "missing.mp4": "no such file",
    }
    expected |= {"pipe.mp4": "not a regular file", "good.mp4": "no frame between 60 s and 70 s"}
    assert why.keys() == expected.keys() and all(
        expected[v] in reason and "\n" not in reason for v, reason in why.items()
    )

    clean = out.read_text().splitlines()
    kept = [rows[k] for k in (0, 2, 7, 8, 9, 11)]
    assert len(clean) == len(kept)
    for line, row, (question, messages) in zip(clean, kept, read_records(out), strict=True):
        found = json.loads(line)
        given, inner = (row["question"], found["question"]) if "messages" in row else (row, found)
        assert Path(question.video).samefile(folder / given["video"])
        assert inner == given | {"video": inner["video"]} | (
            {} if "group" in given else {"group": given["video"]}
        )
        assert messages == row.get("messages", []) and found.get("cost") == row.get("cost")
    printed = capsys.readouterr().out
    assert (
        "11 clips: 5 usable, 1 of them with fewer frames than promised; 6 unusable" in printed
        and "6 records kept, 6 dropped" in printed
    )
    assert "1 records kept with a window outside their clip: 'window outside'\n" in printed
    assert not list(out.parent.glob("*.partial"))


def test_in_another_folder_a_video_behind_a_link_is_found(tmp_path, folder):
    (tmp_path / "far" / "store").mkdir(parents=True)
    (tmp_path / "far" / "good.mp4").write_bytes((folder / "good.mp4").read_bytes())
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "linked").symlink_to("../far/store")
    records = write_records(tmp_path / "data" / "r.jsonl", [record("linked/../good.mp4")])
    check.main(check.Config(records, tmp_path / "out" / "clean.jsonl", workers=1))
    (question,) = read_questions(tmp_path / "out" / "clean.jsonl")
    assert Path(question.video).samefile(tmp_path / "far" / "good.mp4")


def test_in_the_same_folder_every_record_stays_as_it_is(folder):
    rows = [
        record("good.mp4"),
        record("./good.mp4", options=["é", "<b>"], answer="B"),
        record("missing.mp4"),
    ]
    records = write_records(folder / "same.jsonl", rows)
    check.main(check.Config(records, workers=1))
    assert [
        json.loads(line) for line in (folder / "same.clean.jsonl").read_text().splitlines()
    ] == rows[:2]


def test_a_hanging_clip_is_killed_and_the_others_are_unharmed(folder):
    for name in ("after.mp4", "beside.mp4"):
        (folder / name).write_bytes((folder / "good.mp4").read_bytes())
    records = write_records(
        folder / "hang.jsonl",
        [record(v) for v in ("hang.mp4", "good.mp4", "beside.mp4", "after.mp4")],
    )
    with hanging(folder / "hang.mp4"):
        began = time.monotonic()
        check.main(check.Config(records, workers=1, timeout_s=2))
        assert time.monotonic() - began < 25, "it waited for the file"
    report = report_of(records)
    assert (
        report["hang.mp4"]["reason"].startswith("not checked within 2 s")
        and 2 <= report["hang.mp4"]["seconds"] < 10
    )
    assert all(
        report[v]["usable"] and report[v]["frames"] == NUM
        for v in ("good.mp4", "beside.mp4", "after.mp4")
    )
    assert len(read_questions(folder / "hang.clean.jsonl")) == 3
    assert not multiprocessing.active_children()


def test_a_crash_costs_one_clip(folder):
    def crash(file: int) -> None:
        while (
            fcntl.fcntl(file, fcntl.F_GETLEASE) == fcntl.F_WRLCK
        ):  # until the worker is inside open()
            time.sleep(0.01)
        os.kill(multiprocessing.active_children()[0].pid, signal.SIGSEGV)

    with hanging(folder / "crash.mp4") as file:
        thread = threading.Thread(target=crash, args=(file,), daemon=True)
        thread.start()
        found = dict(
            check.check_clips(
                [Clip("crash.mp4"), Clip("good.mp4")], folder, workers=1, timeout_s=20
            )
        )
        thread.join(10)
    assert (
        not found[Clip("crash.mp4")]["usable"]
        and "crashed (Segmentation fault)" in found[Clip("crash.mp4")]["reason"]
    )
    assert found[Clip("good.mp4")]["usable"]


def test_a_killed_run_goes_on_without_checking_a_clip_twice(tmp_path, folder):
    names = [f"{k}.mp4" for k in range(5)]
    for name in names:
        (tmp_path / name).write_bytes((folder / "good.mp4").read_bytes())
    records = write_records(tmp_path / "records.jsonl", [record(v) for v in ("hang.mp4", *names)])
    report = tmp_path / "records.clean.report.jsonl"
    with hanging(tmp_path / "hang.mp4"):
        running = subprocess.Popen(
            [sys.executable, "-m", "data_prep.check", str(records), "--workers", "2"],
            cwd=ROOT,
            stderr=subprocess.PIPE,
        )
        began = time.monotonic()
        while not report.exists() or report.read_bytes().count(b"\n") < 3:
            assert running.poll() is None and time.monotonic() - began < 40, running.stderr.read()
            time.sleep(0.02)
        running.kill()
        running.wait()
    whole = report.read_bytes().splitlines(keepends=True)
    report.write_bytes(
        b"".join(whole[:3]) + whole[2][:30]
    )  # what a kill leaves in the middle of a line
    checked = [json.loads(line)["video"] for line in whole[:3]]
    for name in checked:
        (tmp_path / name).unlink()  # checked again, they would be missing
    with pytest.raises(ValueError, match="--resume"):
        check.main(check.Config(records))
    assert report.read_bytes().splitlines(keepends=True)[:3] == whole[:3]
    check.main(check.Config(records, resume=True))
    rows = report_of(records)
    assert report.read_bytes().splitlines(keepends=True)[:3] == whole[:3] and len(rows) == 6
    assert [v for v, row in rows.items() if not row["usable"]] == ["hang.mp4"]
    assert [Path(q.video).name for q in read_questions(tmp_path / "records.clean.jsonl")] == names

    before = report.read_bytes()
    check.main(check.Config(records, resume=True))  # nothing is left
    assert report.read_bytes() == before


def test_where_no_clip_is_usable_it_says_so(tmp_path, capsys):
    records = write_records(tmp_path / "records.jsonl", [record("gone.mp4"), record("lost.mp4")])
    with pytest.raises(ValueError, match="not one clip is usable"):
        check.main(check.Config(records))
    assert "2  no such file; check the path" in capsys.readouterr().out
    assert not (tmp_path / "records.clean.jsonl").exists()


@pytest.mark.parametrize(
    "line",
    [
        "{",
        "[1]",
        '{"question": 3, "messages": []}',
        '{"messages": 3}',
        json.dumps(record("a.mp4", window=[5, 2])),
        '"' + "[" * 9,
    ],
)
def test_a_damaged_line_is_the_readers_own_error(tmp_path, line):
    records = tmp_path / "records.jsonl"
    records.write_text(json.dumps(record("a.mp4")) + f"\n{line}\n")
    with pytest.raises(ValueError) as theirs:
        read_questions(records)
    with pytest.raises(ValueError) as ours:
        check.main(check.Config(records))
    assert str(ours.value) == str(theirs.value) and "line 2" in str(ours.value)
    assert list(tmp_path.iterdir()) == [records]


def test_it_writes_over_nothing_that_it_reads(tmp_path):
    records = write_records(tmp_path / "a.report.jsonl", [record("a.mp4")])
    for out in (records, tmp_path / "a.jsonl"):
        with pytest.raises(ValueError, match="choose another name"):
            check.main(check.Config(records, out, resume=True))
    (tmp_path / "b.report.jsonl").write_text('{"video": 3}\n')
    with pytest.raises(ValueError, match="b.report.jsonl, line 1: not a line of this report"):
        check.main(check.Config(records, tmp_path / "b.jsonl", resume=True))


def test_memory_does_not_grow_with_the_texts(tmp_path):
    with open(tmp_path / "records.jsonl", "w") as file:
        for k in range(6000):
            file.write(json.dumps(record("good.mp4", id=str(k), question="word " * 2000)) + "\n")
    write_video(tmp_path / "good.mp4", pictures(2))
    script = """
import re, sys
from pathlib import Path
from data_prep import check
status = Path("/proc/self/status")  # ru_maxrss would begin with the parent's
peak_mb = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", status.read_text())[1]) / 1024
if __name__ == "__main__":
    before = peak_mb()
    check.main(check.Config(Path(sys.argv[1]), workers=1))
    print(peak_mb() - before)
"""
    (tmp_path / "measure.py").write_text(script)
    command = [sys.executable, str(tmp_path / "measure.py"), str(tmp_path / "records.jsonl")]
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout.splitlines()[-1]) < 25, "MB, for a file of 60"
    assert (tmp_path / "records.clean.jsonl").stat().st_size > 50e6


def test_many_records_of_few_clips_take_bounded_time(tmp_path):
    """A fifth of 100,000, which are too many for a test, in a fifth of a minute; each clip is
    opened once."""
    names = [f"{k}.mp4" for k in range(4)]
    for name in names:
        write_video(tmp_path / name, pictures(2))
    records = write_records(
        tmp_path / "records.jsonl", [record(names[k % 4], id=str(k)) for k in range(20_000)]
    )
    began = time.process_time()
    check.main(check.Config(records, workers=1))
    assert time.process_time() - began < 12 and len(report_of(records)) == 4
    assert len(read_questions(tmp_path / "records.clean.jsonl")) == 20_000


@pytest.mark.skipif(not (SHARED / "hard.json").exists(), reason=f"{SHARED} is not here")
def test_every_shared_file(tmp_path):
    hard = {
        str(SHARED / "hard" / c["file"]): c for c in json.loads((SHARED / "hard.json").read_text())
    }
    clips = {str(SHARED / c["file"]): c for c in json.loads((SHARED / "clips.json").read_text())}
    clips = {
        v: c for v, c in clips.items() if Path(v).exists() and Path(v).stat().st_size < 100_000
    }
    records = write_records(tmp_path / "records.jsonl", [record(v) for v in hard | clips])
    check.main(check.Config(records))
    report = report_of(records)
    assert report.keys() == (hard | clips).keys()
    for video, c in hard.items():
        usable = c["frames_decoded"] > 0 and "attached_pic" not in c["expect"]
        assert report[video]["usable"] == usable, (video, report[video])
        assert not usable or report[video]["frames"] == c["frames_decoded"], video
    for video, c in clips.items():
        assert report[video]["usable"] and report[video]["frames"] == c["nb_frames_decoded"], video
    named = {Path(v).name: row for v, row in report.items()}
    assert (named["rotated_meta_90.mp4"]["rotation"], named["rotated_meta_90.mp4"]["width"]) == (
        90,
        256,
    )
    assert (
        named["truncated_half_faststart.mp4"]["frames_promised"],
        named["truncated_half_faststart.mp4"]["frames"],
    ) == (196, 99)
    assert named["piped_no_duration.webm"]["frames_promised"] is None
    assert len(read_questions(tmp_path / "records.clean.jsonl")) == sum(
        row["usable"] for row in report.values()
    )
