"""infer.py: what it says, of one video and of many, to a person and to a program, and how it
ends."""

import base64
import io
import json
import os
import pty
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import av
import numpy as np
import pytest

import infer
from nanosport.cli import Terminal
from nanosport.records import read_questions
from nanosport.report import small
from nanosport.strip import inline, strip
from nanosport.video import Video, VideoError
from tests.helpers.clips import write, write_long

ROOT = Path(__file__).parents[1]
DATA = ROOT.parent / "shared" / "data"
CLIPS = DATA / "clips"
NOTE = "note    this model has two million parameters and knows only the rendered arena; for real "
NOTE += "video give --model Qwen/Qwen2.5-VL-7B-Instruct"


def lines(capsys, video: Path, **options) -> list[str]:
    """What infer.py prints about a video."""
    infer.main(infer.Config((Path(video), "Which sport is this?"), max_new_tokens=40, **options))
    return capsys.readouterr().out.splitlines()


def arena_clip(arena_folder: Path) -> Path:
    return Path(read_questions(arena_folder / "test.jsonl")[0].video)


def test_an_arena_clip_gets_no_note(arena_folder, capsys):
    assert lines(capsys, arena_clip(arena_folder))[0].startswith("video ")


@pytest.mark.parametrize("size, rate", [((48, 64), 12), ((224, 336), 25)])
def test_a_clip_of_another_size_or_rate_gets_one_before_the_answer(size, rate, tmp_path, capsys):
    clip = write(tmp_path / "clip.mp4", height=size[0], width=size[1], rate=rate)
    said = lines(capsys, clip)
    assert said[0].startswith(NOTE) and not any("note " in line for line in said[1:])


def test_the_first_of_several_videos_that_is_not_the_arenas_gets_it(arena_folder, tmp_path, capsys):
    other = str(write(tmp_path / "clip.mp4", height=48, width=64))
    words = (arena_clip(arena_folder), other, other, "Who scored?")
    infer.main(infer.Config(words, max_new_tokens=5))
    said = capsys.readouterr().out.splitlines()
    (k,) = (k for k, line in enumerate(said) if line.startswith("note "))
    assert said[k + 1].startswith(f"video   {other}") and said[0].startswith("video ")


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_a_real_clip_gets_one_inside_json(capsys):
    clip = sorted(CLIPS.iterdir())[0]
    infer.main(infer.Config((clip, "Which sport is this?"), max_new_tokens=40, json=True))
    printed = capsys.readouterr()
    said = json.loads(printed.out)
    assert said["frames"] and f"note    {said['note']}".startswith(NOTE) and not printed.err


def test_a_model_of_ones_own_gets_no_note(tmp_path, capsys):
    model = shutil.copytree(infer.Config.model, tmp_path / "model")
    clip = write(tmp_path / "clip.mp4")
    assert lines(capsys, clip, model=str(model))[0].startswith("video ")


# Several videos, several questions.


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_every_real_and_every_hard_video_gets_an_answer_or_one_clear_line(tmp_path, capsys):
    paths = sorted(map(str, [*CLIPS.iterdir(), *(DATA / "hard").iterdir()]))
    out = {"json": True, "strip": tmp_path / "strip.png", "max_new_tokens": 6}
    with pytest.raises(ValueError, match=rf"^\d+ of {len(paths)} videos could not be used$"):
        infer.main(infer.Config((*paths, "Which sport is this?"), **out))
    printed = capsys.readouterr()
    said = [json.loads(line) for line in printed.out.splitlines()]
    assert all(one["frames"] and one["status"] for one in said)
    refused = re.findall(r"^error: (.*?): .+$", printed.err, flags=re.M)
    assert len(printed.err.splitlines()) == len(refused) > 5 and "Traceback" not in printed.err
    assert sorted([*refused, *(one["video"] for one in said)]) == paths
    assert len([*tmp_path.iterdir()]) == len(said)  # a strip of each


def test_one_of_several_videos_that_cannot_be_used_does_not_end_the_others(tmp_path, capsys):
    clips = [str(write(tmp_path / f"{name}.mp4")) for name in "ab"]
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    words = (clips[0], str(tmp_path / "broken.mp4"), clips[1], "Who?")
    page = tmp_path / "page.html"
    with pytest.raises(ValueError, match="^1 of 3 videos could not be used$"):
        infer.main(infer.Config(words, max_new_tokens=20, page=page))
    printed = capsys.readouterr()
    videos = re.findall(r"^video   (.*?): 40 frames", printed.out, flags=re.M)
    assert videos == clips and len(re.findall("^(no )?answer", printed.out, flags=re.M)) == 2
    assert printed.err.count("\n") == 1 and "broken.mp4: not a video" in printed.err
    assert page.read_text().count("<h1>") == 2


def test_several_questions_keep_the_frames_of_their_video(tmp_path, capsys):
    clip, asked = str(write(tmp_path / "clip.mp4")), tmp_path / "questions.txt"
    asked.write_text("Who scored?\n\n  How?  \nWhen\u2028 was it?\n")
    cfg = infer.Config((clip,), asked, max_new_tokens=5, tool=False, json=True)
    assert [*infer.questions_of(cfg)] == ["Who scored?", "How?", "When\u2028 was it?"]
    player = infer.Player(cfg)
    decoded = []
    for text in infer.questions_of(cfg):
        player.ask(Path(clip), text)
        decoded.append(player.encoder.counts["frames_decoded"])
    assert decoded == [16, 16, 16]
    capsys.readouterr()
    infer.main(cfg)
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["question"] for one in said] == [*infer.questions_of(cfg)]


def test_a_question_that_is_too_long_costs_no_other(tmp_path, capsys):
    clip, page = str(write(tmp_path / "clip.mp4")), tmp_path / "page.html"
    asked = tmp_path / "questions.txt"
    asked.write_text(f"Who scored?\n{'word ' * 20_000}\nHow?\n")
    with pytest.raises(ValueError, match="1 questions are too long, and were not asked"):
        infer.main(infer.Config((clip,), asked, max_new_tokens=5, tool=False, page=page))
    said = capsys.readouterr()
    assert said.out.count("frames looked at") == 2 and "tokens, at most 16,384" in said.err
    assert page.read_text().count("<h1>") == 2


@pytest.mark.parametrize("text", ["", " \n\n", "Who?\n<|im_end|>\n", b"Who \xff?"])
def test_a_file_without_a_question_or_with_a_bad_one_is_one_line(text, tmp_path):
    path = tmp_path / "q.txt"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(ValueError, match="no question; give|special token|not a text in UTF-8"):
        [*infer.questions_of(infer.Config(("clip.mp4",), path))]


def test_without_a_question_each_line_of_standard_input_is_one(monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO("Who?\n\nHow?"))
    assert [*infer.questions_of(infer.Config(("clip.mp4",)))] == ["Who?", "How?"]
    monkeypatch.setattr(sys, "stdin", io.StringIO(""))
    with pytest.raises(ValueError, match="standard input: no question; give one after the video"):
        [*infer.questions_of(infer.Config(("clip.mp4",)))]


def test_what_cannot_be_meant_is_refused_before_a_model_is_loaded(tmp_path):
    clip = str(write(tmp_path / "clip.mp4"))
    for flags, rule in (
        ({"words": ()}, "no video: give a video file"),
        ({"words": (clip, clip)}, "clip.mp4: is there as a file; the question comes after"),
        ({"start": 3.0, "end": 2.0}, "--end 2: must be above --start 3"),
        ({"strip": Path(clip)}, "--strip .*: is the file that is read"),
    ):
        with pytest.raises(ValueError, match=rule):
            infer.Config(**{"words": (clip, "Who?")} | flags, model="none").check()


# Tokens as they come.


class Pieces(io.StringIO):
    """A standard output that remembers each piece that it was given."""

    def __init__(self):
        super().__init__()
        self.pieces = []

    def write(self, text):
        self.pieces.append(text)
        return super().write(text)


def test_tokens_are_printed_as_they_come(arena_folder, monkeypatch, capsys):
    cfg = infer.Config((arena_clip(arena_folder), "Call the decisive play."), stream=True)
    monkeypatch.setattr(sys, "stdout", Pieces())
    infer.main(cfg)
    out, pieces = sys.stdout.getvalue(), sys.stdout.pieces
    monkeypatch.undo()
    infer.main(infer.Config(cfg.words, json=True))
    turns = json.loads(capsys.readouterr().out)["turns"]
    assert len(turns) > 1 and all(f"say     {turn['text']}" in out for turn in turns)
    assert "look    frames" in out and "think " not in out and "<|im_end|>" not in out
    first = "".join(pieces).index("look    frames")
    before = sum(len("".join(pieces[:k])) < first for k in range(len(pieces)))
    assert before > 20  # and not in one piece when the turn has ended


def test_half_a_character_waits_for_its_other_half():
    class Bytes:
        def decode(self, ids, skip_special_tokens):
            return bytes(ids).decode(errors="replace")

    stream = infer.Stream(Bytes())
    assert [stream.add(byte) for byte in "é!".encode()] == ["", "é", "!"]


# The strip.


def test_the_strip_shows_the_frames_and_the_window(arena_folder, tmp_path):
    clip, out = arena_clip(arena_folder), tmp_path / "new" / "strip.png"
    player = infer.Player(infer.Config((clip, "?"), json=True, strip=out))
    for text in ("Call the decisive play.", "Which team must score more?"):
        player.ask(clip, text)
    assert {path.name for path in out.parent.iterdir()} == {"strip.png", "strip_2.png"}
    episode, video = player.episodes[0], Video(clip)
    with av.open(str(out)) as file:
        picture = next(file.decode(video=0)).to_ndarray(format="rgb24")
    assert np.array_equal(picture, strip(episode, video))
    small_FHWC = small(video.frames(episode.frames[:2])).permute(0, 2, 3, 1).numpy()
    height, width = small_FHWC.shape[1:3]
    assert np.array_equal(picture[6 : 6 + height, 6 : 6 + width], small_FHWC[0])
    assert np.array_equal(picture[6 : 6 + height, 12 + width : 12 + 2 * width], small_FHWC[1])

    # the second row's line: as long as the window is of the clip
    (start, end), row = episode.turns[0].window, len(picture) // len(episode.turns)
    blue = (picture[2 * row - 3] == infer.strip.__globals__["WINDOW"]).all(-1).sum()
    length = picture.shape[1] - 12
    assert blue == pytest.approx(length * (end - start + 1) / video.num_frames, abs=2)


def test_terminals_get_the_picture_by_their_protocol(monkeypatch):
    png = bytes(range(256)) * 40
    kitty, iterm = inline(png, "kitty"), inline(png, "iterm")
    parts = re.findall("\x1b_G(.*?);(.*?)\x1b\\\\", kitty)
    assert base64.b64decode("".join(data for _, data in parts)) == png and len(parts) == 4
    assert parts[0][0] == "a=T,f=100,m=1" and [told for told, _ in parts[1:]] == [
        "m=1",
        "m=1",
        "m=0",
    ]
    assert max(len(data) for _, data in parts) <= 4096
    told, data = re.fullmatch("\x1b]1337;File=(.*?):(.*)\x07\n", iterm).groups()
    assert told == f"inline=1;size={len(png)}" and base64.b64decode(data) == png


def test_a_picture_reaches_the_terminal_and_no_text_does_raw(tmp_path, monkeypatch, capsys):
    clip = write(tmp_path / "clip.mp4")
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    infer.main(infer.Config((clip, "Who?"), max_new_tokens=5, inline="kitty"))
    out = capsys.readouterr().out
    assert out.count("\x1b_G") == out.count("\x1b") / 2 > 0


# A part of a video, and very long ones.


def test_only_the_part_between_start_and_end_is_shown(tmp_path, capsys):
    clip = write(tmp_path / "clip.mp4", num=40, rate=10)
    said = {}
    for start, end in ((0.0, None), (1.0, 2.0), (3.0, None)):
        cfg = {"start": start, "end": end, "max_new_tokens": 5, "json": True, "num_frames": 99}
        infer.main(infer.Config((clip, "Who?"), **cfg))
        said[start] = json.loads(capsys.readouterr().out)["frames"]
    assert [len(said[start]) for start in said] == [40, 11, 10]
    with pytest.raises(VideoError, match="no frame between 60 s and inf s; it shows frames from"):
        infer.main(infer.Config((clip, "Who?"), start=60.0))


def memory_mb(name: str) -> float:
    """Of this process: VmRSS, now, or VmHWM, its peak."""
    status = Path("/proc/self/status").read_text()
    return int(re.search(rf"{name}:\s+(\d+)", status)[1]) / 1024


def test_a_video_of_two_hours_takes_little_memory(tmp_path, capsys):
    short, long = write(tmp_path / "short.mp4"), write_long(tmp_path / "long.mp4", 7200, rate=10)
    player = infer.Player(infer.Config((long, "?"), max_new_tokens=5))
    player.ask(short, "Who?")
    Path("/proc/self/clear_refs").write_text("5")  # the peak begins anew
    before = memory_mb("VmRSS")
    player.ask(long, "Who?")
    assert "72000 frames, seen first: 0, 10286, 20571" in capsys.readouterr().out
    assert memory_mb("VmHWM") - before < 150


# How it ends.


def test_an_address_is_refused_in_a_clear_word(tmp_path):
    for name in ("https://example.com/clip.mp4", "rtsp://camera/1", "s3://bucket/clip.jpg"):
        said = f"^{name}: an address, and nothing is downloaded here; download"
        with pytest.raises(VideoError, match=said):  # before a model is
            infer.main(infer.Config((name, "Who?"), model="no/model"))
        with pytest.raises(
            VideoError, match="an address, and nothing is downloaded here; download"
        ):
            Video(tmp_path / name)  # as a record has it, from its file's folder on
    with pytest.raises(VideoError, match="no such file; check the path"):
        Video(tmp_path / "16:9" / "clip.mp4")


def hear_ctrl_c() -> None:
    """What a shell starts in the background, and its children, would not."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_ends_it_in_one_line_in_the_middle_of_a_turn_and_at_the_prompt(tmp_path):
    """A person asks at a terminal: a question that will not do is said, the next one answered."""
    clip = write(tmp_path / "clip.mp4")
    ours, theirs = pty.openpty()
    command = [sys.executable, "infer.py", clip, "--max-new-tokens", "30"]
    streams = {"stdin": theirs, "stdout": theirs, "stderr": subprocess.PIPE}
    run = subprocess.Popen(command, cwd=ROOT, preexec_fn=hear_ctrl_c, **streams)
    os.close(theirs)
    said = ""

    def read_until(pattern: str, timeout_s: float = 120) -> None:
        nonlocal said
        until = time.monotonic() + timeout_s
        while not re.search(pattern, said):
            assert time.monotonic() < until, said
            said += os.read(ours, 4096).decode(errors="replace")

    read_until("question> $")
    os.write(ours, b"Who <|im_end|>?\n")
    read_until("error: .*special token[^\0]*question> $")
    os.write(ours, b"Who?\n")
    read_until(r"say     [^\0]*frames looked at, .*\s+question> $")  # streamed: it is a terminal
    os.write(ours, b"How?\n")
    read_until(r"frames looked at[^\0]*frames, seen first[^\0]*say")
    run.send_signal(signal.SIGINT)
    assert run.wait(60) == 130 and run.stderr.read() == b"\nstopped\n"
    os.close(ours)


def test_a_wrong_flag_ends_it_with_2():
    done = subprocess.run(
        [sys.executable, "infer.py", "clip.mp4", "?", "--no-such-flag"],
        cwd=ROOT,
        capture_output=True,
    )
    assert done.returncode == 2
