"""What a run reads is tried before its first step, and what is lost meanwhile is replaced."""

import json
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

import eval as evaluation
import infer
import rl
import train
from data_prep import check, difficulty, look, split, teacher
from nanosport.cli import Terminal
from nanosport.engine.players import load_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.rollout import Conversation, rollout
from nanosport.env.tools import STOPS
from nanosport.image import ImageConfig
from nanosport.model import frames
from nanosport.model.frames import FrameEncoder
from nanosport.records import Clip, Question, read_records
from nanosport.report import printable
from nanosport.train.inputs import Records, TooLong, Trajectories, check_prompt
from tests.helpers.clips import write

MODEL = str(Path(__file__).parent.parent / "assets" / "nano-sft")
ANSWER = teacher.answer_turn("i see.", "B")
SMALL = {"temperature": 0.0, "max_new_tokens": 20}


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Two good clips, one too thin to be cut into patches, and one that is none."""
    folder = tmp_path_factory.mktemp("clips")
    for name in ("a.mp4", "b.mp4"):
        write(folder / name)
    write(folder / "thin.mp4", num=3, height=2, width=420)
    (folder / "none.mp4").write_text("not a video")
    return folder


def question(video, name: str, **more) -> dict:
    asked = {"id": name, "video": str(video), "sport": "soccer", "dimension": "rules"}
    return asked | {"question": "How?", "options": ["x", "y"], "answer": "B"} | more


def rows_file(path: Path, rows: list[dict], messages=None) -> Path:
    if messages is not None:
        rows = [{"question": row, "messages": messages} for row in rows]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def players():
    return load_sampler(Path(MODEL), Sampling(0.0, max_new_tokens=20, stops=STOPS))


def some_broken(folder: Path) -> list[dict]:
    names = ["a.mp4", "thin.mp4", "b.mp4", "none.mp4", "gone.mp4", "a.mp4", "gone.mp4", "b.mp4"]
    names += ["a.mp4"]
    return [question(folder / name, f"q{k}") for k, name in enumerate(names)]


REASONS = (
    "line 2 (q1): {}/thin.mp4: frames of 420x2: the sides' ratio must be at most 200; crop",
    "line 4 (q3): {}/none.mp4: not a video that FFmpeg can read",
    "line 5 (q4), the first of 2: {}/gone.mp4: no such file; check the path",
)


def assert_named(printed: str, folder: Path) -> None:
    for reason in REASONS:
        assert reason.format(folder) in printed
    assert "4 of 9 records are left out" in printed


def test_sft_leaves_out_what_it_cannot_use_by_name(folder, tmp_path, capsys):
    data = rows_file(tmp_path / "data.jsonl", some_broken(folder), [ANSWER])
    shared = {"model": MODEL, "steps": 2, "batch_size": 2, "warmup": 1}
    train.main(train.Config(data=data, out=tmp_path / "run", **shared))
    assert_named(capsys.readouterr().out, folder)
    log = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").read_text().splitlines()]
    assert [row["replaced"] for row in log] == [0, 0]


def test_rl_leaves_out_what_it_cannot_use_by_name(folder, tmp_path, capsys):
    data = rows_file(tmp_path / "data.jsonl", some_broken(folder))
    cfg = {"steps": 1, "num_prompts": 2, "group_size": 2, "min_format_rate": 0.0, "warmup": 1}
    rl.main(rl.Config(MODEL, data, tmp_path / "run", max_new_tokens=20, **cfg))
    assert_named(capsys.readouterr().out, folder)


def test_eval_leaves_out_what_it_cannot_use_by_name(folder, tmp_path, capsys):
    data = rows_file(tmp_path / "data.jsonl", some_broken(folder))
    evaluation.main(evaluation.Config(MODEL, data, tmp_path / "r.json", **SMALL))
    assert_named(capsys.readouterr().out, folder)
    report = json.loads((tmp_path / "r.json").read_text())
    assert len(report["left_out"]) == 3
    assert [row["questions"] for row in report["rows"].values()] == [5, 5]


def test_more_than_the_share_ends_the_run_before_its_first_step(folder, tmp_path):
    data = rows_file(tmp_path / "data.jsonl", some_broken(folder), [ANSWER])
    run = {"model": MODEL, "data": data, "out": tmp_path / "run", "warmup": 1}
    why = "4 of 9 records cannot be used, --max-unusable allows 40.0%: .*line 2"
    with pytest.raises(ValueError, match=why):
        train.main(train.Config(**run, max_unusable=0.4))
    assert not (tmp_path / "run/metrics.jsonl").exists()
    with pytest.raises(ValueError, match="allows 0.0%"):
        evaluation.main(evaluation.Config(MODEL, data, max_unusable=0.0))
    data = rows_file(tmp_path / "lost.jsonl", [question("gone.mp4", "q")])
    with pytest.raises(ValueError, match="1 of 1 records cannot be used"):
        evaluation.main(evaluation.Config(MODEL, data, max_unusable=1.0))


def test_a_malformed_trajectory_is_named_with_its_line(folder, tmp_path, players):
    whole = [{"question": question(folder / "a.mp4", f"q{k}"), "messages": [ANSWER]} for k in "123"]
    endless = whole[0] | {"messages": [teacher.tool_turn("i look.", 0, 20)]}
    twice = whole[1] | {"messages": [ANSWER, ANSWER]}
    outside = whole[2] | {"messages": [teacher.tool_turn("i look.", 0, 900), ANSWER]}
    rows = [*whole, endless, twice, outside]
    (tmp_path / "t.jsonl").write_text("\n\n".join(map(json.dumps, rows)) + "\n")
    encoder, sampler = players
    records = Records(tmp_path / "t.jsonl", read_records(tmp_path / "t.jsonl"), encoder)
    trajectories = Trajectories(records, sampler.tokenizer, 4000)
    lines = records.check(trajectories.__getitem__, 0.5, 0)
    wanted = (
        "line 7 (q1): the trajectory ends without an answer",
        "line 9 (q2): the episode ends (answered) before message 2 of 2",
        "line 11 (q3): message 1: the interval must lie inside 0 to 39",
    )
    assert all(f"t.jsonl, {why}" in line for line, why in zip(lines, wanted, strict=True))
    assert len(records) == 3


def test_trajectories_that_are_too_long_are_counted_and_the_longest_named(folder, tmp_path, capsys):
    short, long = [ANSWER], [teacher.answer_turn("i see. " * 400, "B")]
    longest = [teacher.answer_turn("i see. " * 900, "B")]
    rows = [
        {"question": question(folder / "a.mp4", f"q{k}"), "messages": messages}
        for k, messages in enumerate((short, long, short, longest, short))
    ]
    data = rows_file(tmp_path / "t.jsonl", rows)
    run = {"model": MODEL, "data": data, "out": tmp_path / "run", "warmup": 1}
    train.main(train.Config(**run, steps=1, batch_size=2, episode_tokens=1000))
    said = capsys.readouterr().out
    assert "line 4 (q3), the longest of 2: " in said and " tokens, at most 1,000; " in said
    assert "2 of 5 records are left out" in said and "--episode-tokens" in said


@pytest.mark.parametrize("limits", [Limits(), Limits(num_frames=16, use_tool=False), Limits(3)])
@pytest.mark.parametrize("kind", [{}, {"kind": "span", "options": [], "answer": "1-2"}])
def test_the_tokens_that_are_counted_are_the_prompts(folder, players, limits, kind):
    encoder, sampler = players
    asked = question(folder / "a.mp4", "q", **kind) | {"options": ()}
    asked = Question(**asked | ({"kind": "open"} if not kind else {}))
    opened = Conversation(asked, encoder, sampler.tokenizer, limits)
    exact = len(opened.open().ids)
    fits = Limits(limits.num_frames, max_tokens=exact, use_tool=limits.use_tool)
    check_prompt(asked, encoder, sampler.tokenizer, [fits])
    with pytest.raises(TooLong, match=f"{exact:,} tokens, at most {exact - 1:,}") as error:
        less = Limits(limits.num_frames, max_tokens=exact - 1, use_tool=limits.use_tool)
        check_prompt(asked, encoder, sampler.tokenizer, [fits, less])
    assert error.value.tokens == exact


@pytest.mark.parametrize("text", ["w " * 30_000, "goal" * 250_000, "?" * 60_000])
def test_a_long_question_is_refused_before_anything_is_decoded(text, folder, tmp_path, players):
    encoder, sampler = players
    before = encoder.counts["frames_decoded"]
    for asked in ({"question": text}, {"options": ["x", text], "answer": "A"}):
        row = question(folder / "a.mp4", "q", **asked)
        asked = Question(**row | {"options": tuple(row["options"])})
        with pytest.raises(TooLong, match="tokens, at most 16,384"):
            check_prompt(asked, encoder, sampler.tokenizer, [Limits()])
    assert encoder.counts["frames_decoded"] == before
    with pytest.raises(TooLong, match="tokens, at most 16,384"):
        infer.main(infer.Config((folder / "a.mp4", text)))


def test_smaller_frames_make_room(folder, tmp_path, capsys):
    large = write(tmp_path / "large.mp4", num=20, height=360, width=640)
    short = {"words": (large, "How?"), "model": MODEL, "max_new_tokens": 5, "episode_tokens": 600}
    with pytest.raises(TooLong, match="--max-pixels"):
        infer.main(infer.Config(**short, max_pixels=400_000))
    infer.main(infer.Config(**short, max_pixels=10_000))
    data = rows_file(tmp_path / "q.jsonl", [question(large, "q")])
    cfg = {"modes": ("tool",), "episode_tokens": 600, "max_new_tokens": 5}
    with pytest.raises(ValueError, match="1 of 1 records"):
        evaluation.main(evaluation.Config(MODEL, data, max_pixels=400_000, **cfg))
    evaluation.main(evaluation.Config(MODEL, data, tmp_path / "r.json", max_pixels=10_000, **cfg))


# What is lost in mid-run.


def lose_one(folder: Path, tmp_path: Path, encoder) -> tuple[Records, Path]:
    """Three records on clips of their own, of which the second has gone since it was indexed."""
    clips = [write(tmp_path / f"{k}.mp4") for k in range(3)]
    rows = [question(path, f"q{k}") for k, path in enumerate(clips)]
    records = rows_file(tmp_path / "data.jsonl", rows, [ANSWER])
    return Records(records, read_records(records), encoder), clips[1]


def test_a_question_whose_video_is_lost_is_replaced_by_the_next(folder, tmp_path, capsys):
    encoder, sampler = load_sampler(Path(MODEL), Sampling(0.0, max_new_tokens=20, stops=STOPS))
    records, lost = lose_one(folder, tmp_path, encoder)
    assert records.check_prompts(sampler.tokenizer, [Limits()], 0.0, 0) == []
    lost.unlink()

    def play(numbers):
        asked = [records.rows[number][0] for number in numbers]
        return rollout(sampler, encoder, asked, Limits(), 2)

    episodes = records.take([0, 1], play)
    assert [episode.question.id for episode in episodes] == ["q0", "q0", "q2", "q2"]
    assert records.num_replaced([0, 1], episodes[::2]) == 1
    said = capsys.readouterr().out
    assert said.count("replaced by the next record: ") == 1 and f"{lost}: no such file" in said
    assert records.take([1, 2], list) == [2, 2], "it is not asked for again"
    for path in tmp_path.glob("*.mp4"):
        encoder.unusable[str(path)] = encoder.unusable[str(lost)]
    with pytest.raises(ValueError, match="the videos of all its records are lost"):
        records.take([0], list)


def test_a_trajectory_whose_video_is_lost_is_replaced_too(folder, tmp_path, players):
    encoder = FrameEncoder(None, ImageConfig.from_folder(MODEL))
    records, lost = lose_one(folder, tmp_path, encoder)
    trajectories = Trajectories(records, players[1].tokenizer, 4000)
    records.check(trajectories.__getitem__, 0.0, 0)
    lost.unlink()
    episodes = records.take([2, 1], lambda numbers: [trajectories[k] for k in numbers])
    assert [episode.question.id for episode in episodes] == ["q2", "q2"]
    assert records.num_replaced([2, 1], episodes) == 1


def test_another_error_is_not_taken_for_a_lost_video(folder, tmp_path, players):
    records, _ = lose_one(folder, tmp_path, players[0])

    def outside(numbers):
        players[0].open(Clip(records.rows[0][0].video, (900.0, 901.0)))

    with pytest.raises(ValueError, match="no frame between 900 s and 901 s"):
        records.take([0], outside)


# What is indexed.


def test_a_match_is_indexed_once_however_many_parts_of_it_are_opened(folder):
    encoder, path = FrameEncoder(None, ImageConfig()), str(folder / "a.mp4")
    parts = [encoder.open(Clip(path, (k / 10, k / 10 + 1))) for k in range(20)]
    whole = encoder.open(Clip(path))
    assert all(part._pts is whole._pts for part in parts) and encoder.num_indexed == 40
    with ThreadPoolExecutor(8) as pool:  # threads may share it
        again = list(pool.map(encoder.open, [Clip(path, (0, 1 + k / 10)) for k in range(40)]))
    assert all(part._pts is whole._pts for part in again)


def test_the_files_used_last_stay_indexed(folder, tmp_path, monkeypatch):
    monkeypatch.setattr(frames, "INDEXED_FRAMES", 100)
    paths = [str(write(tmp_path / f"{k}.mp4")) for k in range(4)]
    encoder = FrameEncoder(None, ImageConfig())
    for k in (0, 1, 0, 2, 3):
        encoder.open(Clip(paths[k]))
    assert list(encoder.videos) == paths[2:] and encoder.num_indexed == 80


def test_labels_carry_times_for_spans_where_the_rate_varies(tmp_path, players):
    encoder, sampler = players
    times = [k * 100 + (2000 if k > 20 else 0) for k in range(40)]
    uneven, even = write(tmp_path / "u.mp4", times=times), write(tmp_path / "e.mp4")

    def said(path: Path, kind: str) -> str:
        asked = Question("q", str(path), "soccer", "rules", "When?", (), "1-2", kind=kind)
        opened = Conversation(asked, encoder, sampler.tokenizer, Limits())
        return sampler.tokenizer.decode(opened.open().ids)

    assert "frame 39 at 5.90 s:" in said(uneven, "span") and "a second." not in said(uneven, "span")
    assert "frame 39:" in said(even, "span") and "at 10 a second" in said(even, "span")
    assert "frame 39:" in said(uneven, "open")


@pytest.mark.parametrize(
    "span_s, outside", [((1.0, 2.0), False), ((1.0, 4.05), False), ((1.0, 4.5), True)]
)
def test_the_doctor_names_a_span_that_ends_after_its_video(folder, span_s, outside):
    found = check.examine(str(folder / "a.mp4"), span_s, 60.0)
    assert found["usable"] and found["span_outside"] is outside


def test_text_from_outside_carries_no_terminal_escape(folder, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(sys, "stdout", Terminal(sys.stdout))
    rows = [question(folder / "a.mp4", "q"), question("\x1b[2Jx.mp4", "\x1b]0;title\x07")]
    data = rows_file(tmp_path / "data.jsonl", rows)
    evaluation.main(evaluation.Config(MODEL, data, tmp_path / "r.json", ("tool",), **SMALL))
    said = capsys.readouterr().out
    assert "\x1b" not in said and "\\x1b[2Jx.mp4" in said
    assert printable("ä→\n\t\u202e") == "ä→\n\\t\\u202e"


# How a file of lines is read.


def lines_file(path: Path, *lines) -> Path:
    path.write_bytes(b"\n".join(v if type(v) is bytes else json.dumps(v).encode() for v in lines))
    return path


@pytest.mark.parametrize("text", ["Who \ud83d?", "\udc00", "\ude00\ud83d a pair that is swapped"])
@pytest.mark.parametrize(
    "field", ["id", "video", "sport", "question", "options", "answer", "source", "message 2"]
)
def test_half_a_character_is_named_with_line_and_field(field, text, tmp_path):
    good, more = question("a.mp4", "q0"), {}
    if field != "message 2":
        more = {field: ["x", text] if field == "options" else text}
    bad = question("a.mp4", "q1") | more
    messages = [ANSWER, text if field == "message 2" else ANSWER]
    data = lines_file(tmp_path / "d.jsonl", good, b"", {"question": bad, "messages": messages})
    for read in (read_records, check.last_windows, lambda path: look.survey(path, 3, 0)):
        with pytest.raises(ValueError, match=rf"d.jsonl, line 3: .*{field}: lone surrogates") as no:
            read(data)
        str(no.value).encode()


def test_half_a_character_in_bytes_is_named_too(tmp_path):
    raw = json.dumps(question("a.mp4", "q")).encode().replace(b"How?", b"How \xed\xa0\xbd?")
    with pytest.raises(ValueError, match="line 1: not a question: question: lone surrogates"):
        read_records(lines_file(tmp_path / "d.jsonl", raw))


@pytest.mark.parametrize(
    "line, why",
    [
        (b'{"id": "q", "id": "r"}', "the key 'id' is there twice"),
        (
            b'{"question": {"id": "q", "sport": "", "sport": ""}, "messages": []}',
            "the key 'sport' is there",
        ),
        (b"[" * 100_000, "recursion"),
        (b'{"messages": ' + b'{"a":' * 100_000, "recursion"),
        (json.dumps(question("a", "q")).encode().replace(b"}", b', "tolerance": 1e999}'), "toler"),
        (json.dumps(question("a", "q", span_s=[0, 10**400])).encode(), "span_s .*2\\^53"),
        (json.dumps(question("a", "q")).encode().replace(b"}", b', "pass_rate": NaN}'), "pass_ra"),
        (
            json.dumps(question("a", "q"))
            .encode()
            .replace(b"}", b', "window": [0, 9%s]}' % (b"9" * 5000)),
            "4300",
        ),
        (json.dumps({"messages": [3], "question": question("a", "q")}).encode(), "expected string"),
        (json.dumps({"messages": [ANSWER]}).encode(), "the question must be a JSON object"),
    ],
)
def test_what_is_no_record_is_one_line_with_its_number(line, why, tmp_path):
    data = lines_file(tmp_path / "d.jsonl", question("a.mp4", "q0"), line)
    with pytest.raises(ValueError, match=f"d.jsonl, line 2: not a question: .*{why}") as caught:
        read_records(data)
    assert len(str(caught.value)) < 500 and "\n" not in str(caught.value)


BLANK = (b"", b"  \t", b"\r", b" \r")


def test_blank_lines_are_skipped_by_every_reader(arena_folder, tmp_path):
    asked = [question("a.mp4", f"q{k}") for k in range(4)]
    spread = lines_file(tmp_path / "d.jsonl", b"", asked[0], *BLANK, *asked[1:], b"", b"")
    assert [q.id for q, _ in read_records(spread)] == ["q0", "q1", "q2", "q3"]
    assert [number for number, *_ in look.survey(spread, 9, 0)[0]] == [2, 7, 8, 9]
    entries = split.read_entries([spread], 0)
    with open(spread, "rb") as file:
        assert [split.read_row(entry, [file])["id"] for entry in entries] == [
            r["id"] for r in asked
        ]
    told = [{"question": row, "messages": [ANSWER]} for row in asked]
    assert len(read_records(lines_file(tmp_path / "t.jsonl", *told[:2], *BLANK, *told[2:]))) == 4

    plans = (arena_folder / "sft_plans.jsonl").read_bytes().splitlines()
    between = lines_file(tmp_path / "plans.jsonl", plans[0], b"", *plans[1:], b"  ")
    assert teacher.read_plans(between) == teacher.read_plans(arena_folder / "sft_plans.jsonl")
    rates = lines_file(
        tmp_path / "rates.jsonl", {"seed": "0"}, b"", {"id": "q", "pass_rate": 0.5}, b""
    )
    assert difficulty.read_rates(rates, {"seed": "0"}) == {"q": 0.5}
    row = {"video": "a.mp4", "span_s": None, "usable": False, "reason": "none"}
    report = lines_file(
        tmp_path / "report.jsonl", b"", row, b" ", row | {"video": "b.mp4"}, b'{"cut'
    )
    assert [clip.video for clip, _ in check.read_report(report)] == ["a.mp4", "b.mp4"]
    assert report.read_bytes().endswith(b'"none"}\n')
    with pytest.raises(ValueError, match="holds no question"):
        read_records(lines_file(tmp_path / "empty.jsonl", *BLANK))


def test_an_id_is_of_one_question(folder, tmp_path):
    one, other = question(folder / "a.mp4", "q0"), question(folder / "b.mp4", "q0")
    twice = lines_file(tmp_path / "d.jsonl", one, question(folder / "b.mp4", "q1"), b"", one)
    why = "d.jsonl, line 4: id 'q0': line 1 has it already; ids must differ"
    with pytest.raises(ValueError, match=why):
        evaluation.main(evaluation.Config(MODEL, twice))
    with pytest.raises(ValueError, match=why):
        rl.main(rl.Config(MODEL, twice, tmp_path / "run"))
    told = [{"question": row, "messages": [ANSWER]} for row in (one, one, other)]
    mixed = lines_file(tmp_path / "t.jsonl", *told)
    with pytest.raises(ValueError, match="t.jsonl, line 3: id 'q0': line 1 has it already"):
        train.main(train.Config(MODEL, mixed, tmp_path / "run"))
    assert not (tmp_path / "run").exists()
    assert len(read_records(lines_file(tmp_path / "several.jsonl", *told[:2]))) == 2
