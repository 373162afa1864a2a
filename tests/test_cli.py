"""The command lines as a user meets them: answers, clear errors, no traceback."""

import importlib
import inspect
import json
import os
import re
import resource
import signal
import subprocess
import sys
import time
import typing
from dataclasses import dataclass, fields, is_dataclass, replace
from pathlib import Path
from typing import Annotated

import numpy as np
import pytest
import torch

import eval as evaluation
import infer
import rl
import train
from data_prep import arena, check, convert, difficulty, distill, look, pretrain, split, teacher
from nanosport import cli, files
from nanosport.fields import AtLeast, Bound, Share, marks_of
from nanosport.image import ImageConfig, smart_resize
from nanosport.train import presets
from tests.helpers.source_folders import finebadminton

ROOT = Path(__file__).parents[1]


def call(*arguments, cwd=ROOT, **environment):
    command = [sys.executable, *map(str, arguments)]
    options = {"cwd": cwd, "capture_output": True, "text": True, "timeout": 300}
    return subprocess.run(command, env=os.environ | environment, **options)


@pytest.fixture(scope="module")
def clip(tmp_path_factory):
    """A held-out clip: its seed, plan and layout were in no training set."""
    plan = arena.make_plan(np.random.default_rng(12345), arena.TEST_LAYOUTS)
    path = tmp_path_factory.mktemp("clip") / "clip.mp4"
    arena.write_video(path, (arena.render(plan, t) for t in range(plan.num_frames)))
    return plan, path


def test_infer_answers_an_arena_clip_correctly_in_under_10_seconds(clip, tmp_path):
    plan, path = clip
    page = tmp_path / "episode.html"
    done = call("infer.py", path, "Call the decisive play.", "--json", "--page", page)
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert (
        said["answer"]
        == f"{plan.kits[plan.scorer]} {plan.number} {arena.SHOTS[plan.sport][plan.shot]}"
    )
    window = next(t["window"] for t in said["turns"] if t["action"] == "tool")
    assert window[0] <= plan.start and plan.end <= window[1]
    assert len(said["frames"]) >= 16 and said["seconds"] < 10
    assert page.read_text().count("<img") == len(said["frames"])


def test_infer_prints_turns_and_the_chosen_option(clip):
    plan, path = clip
    done = call(
        "infer.py", path, "How is the balance of the scorer?", "--options", *arena.BALANCE.values()
    )
    assert done.returncode == 0, done.stderr
    assert [line.split()[0] for line in done.stdout.splitlines()[:3]] == ["video", "think", "look"]
    assert done.stdout.splitlines()[-2] == f"answer  {arena.BALANCE[plan.lean]}"


@pytest.mark.parametrize(
    "arguments, words",
    [
        (("missing.mp4", "Who?"), "missing.mp4"),
        (("README.md", "Who?"), "README.md"),
        (("CLIP", " "), "question is empty"),
        (("CLIP", "Who <|image_pad|>?"), "special token"),
        (("CLIP", "Who?", "--options", "one"), "--options"),
        (("CLIP", "Who?", "--model", "no/such/folder"), "no such folder"),
        (("CLIP", "Who?", "--model", "tests"), "config.json"),
        (("CLIP", "Who?", "--temperature", "-1"), "temperature"),
        (("CLIP", "Who?", "--top-p", "0"), "--top-p"),
        (("CLIP", "Who?", "--num-frames", "0"), "--num-frames"),
    ],
)
def test_infer_wrong_use_gives_one_clear_line(arguments, words, clip):
    done = call("infer.py", *[clip[1] if a == "CLIP" else a for a in arguments])
    assert done.returncode == 1
    assert done.stderr.startswith("error: ") and len(done.stderr.splitlines()) == 1
    assert words in done.stderr


@pytest.mark.parametrize("script", ["train.py", "rl.py", "eval.py"])
def test_scripts_refuse_a_missing_model_in_one_line(script, tmp_path):
    data = tmp_path / "data.jsonl"
    row = {
        "id": "1",
        "video": "v.mp4",
        "sport": "",
        "dimension": "rules",
        "question": "?",
        "options": [],
        "answer": "a",
    }
    data.write_text(json.dumps(row) + "\n")
    done = call(
        script,
        "--model",
        tmp_path / "none",
        "--data",
        data,
        *(() if script == "eval.py" else ("--out", tmp_path / "out")),
    )
    assert (
        done.returncode == 1
        and len(done.stderr.splitlines()) == 1
        and "no such folder" in done.stderr
    )


def test_a_place_that_cannot_be_written_is_one_line(clip, tmp_path):
    (tmp_path / "file").write_text("")
    finebadminton(tmp_path / "root")
    done = call(
        "-m",
        "data_prep.convert",
        "finebadminton",
        "--root",
        tmp_path / "root",
        "--out",
        tmp_path / "file" / "x.jsonl",
    )
    assert done.returncode == 1 and re.fullmatch(
        r"error: .*/file.*: (File exists|Not a directory)\n", done.stderr
    ), done.stderr


def test_eval_leaves_out_a_broken_video_and_says_so(clip, tmp_path):
    rng = np.random.default_rng(0)
    questions = arena.make_questions(clip[0], rng, "good", str(clip[1]))[:2]
    (tmp_path / "broken.mp4").write_bytes(b"not a video")
    questions += arena.make_questions(clip[0], rng, "bad", "broken.mp4")[:1]
    data = tmp_path / "test.jsonl"
    data.write_text("".join(json.dumps(arena.asdict(q)) + "\n" for q in questions))
    done = call("eval.py", "--data", data, "--out", tmp_path / "report.json")
    assert done.returncode == 0, done.stderr
    assert "left out" in done.stdout and "broken.mp4" in done.stdout
    report = json.loads((tmp_path / "report.json").read_text())
    assert all(row["questions"] == 2 for row in report["rows"].values())
    assert {"command", "commit", "device"} <= report.keys()


@pytest.mark.parametrize("script, named", [(train, presets.SFT), (rl, presets.RL)])
def test_presets_are_the_papers_recipes(script, named):
    """Every preset is a config that a run accepts; RL goes on from where its SFT leaves the
    model."""
    configs = {name: script.Config(**fields) for name, fields in named.items()}
    assert list(configs) == ["nano", "3b", "7b", "7b-scaled", "8b", "videobrain"]
    assert configs["nano"] == script.Config()
    for name, cfg in configs.items():
        cfg.check()
        if script is rl and name != "nano":
            assert cfg.model == str(train.Config(**presets.SFT[name]).out / "model")
    if script is rl:
        assert (configs["7b"].steps, configs["7b"].num_prompts, configs["7b"].group_size) == (
            300,
            32,
            8,
        ) and configs["7b"].kl > 0
        assert (
            configs["7b"].episode_tokens - 12_800 >= 8 * 299
        )  # twelve thousand eight hundred of response behind eight frames
        brain = configs["videobrain"]
        assert (brain.reward, brain.max_turns, brain.lr, brain.kl) == ("videobrain", 6, 1e-6, 1e-3)
        assert (brain.entropy_bonus, brain.steps * brain.num_prompts) == (1e-3, 6400)
        assert (brain.max_new_tokens, brain.episode_tokens) == (8192, 8192 + 16_384)
        assert brain.freeze_vision and brain.group_size == 8
    backbones = {name: train.Config(**fields).model for name, fields in presets.SFT.items()}
    assert backbones["8b"] == backbones["videobrain"] == "Qwen/Qwen3-VL-8B-Instruct"
    for size in ((360, 640), (720, 1280), (1080, 1920)):
        assert smart_resize(*size, ImageConfig(max_pixels=configs["7b"].max_pixels)) == (364, 644)
        third = ImageConfig.from_folder("assets/qwen3-vl-8b", configs["8b"].max_pixels)
        assert smart_resize(*size, third) == (352, 640)


def test_a_preset_is_named_before_its_flags():
    done = call("train.py", "7b", "--lr", "0")
    assert done.returncode == 1 and done.stderr.splitlines() == ["error: --lr 0.0: must be above 0"]
    done = call("rl.py", "3b", "--data", "none.jsonl")
    assert (
        done.returncode == 1 and "none.jsonl: no such file" in done.stderr
    )  # before a model is downloaded


# Ranges.

COMMANDS = [train, rl, evaluation, infer, arena, check, convert, difficulty, distill, look]
NESTED = [f"nanosport.{name}.__main__" for name in ("plan", "report", "serve")]
COMMANDS += [pretrain, split, teacher, *map(importlib.import_module, NESTED)]


def numbers_in(hint) -> set:
    """The types of number that a flag takes."""
    parts = typing.get_args(hint)
    return {hint} & {int, float} | set().union(*map(numbers_in, parts))


def test_every_command_is_looked_at():
    scripts = [path.stem for path in ROOT.glob("*.py")]
    scripts += [f"data_prep.{path.stem}" for path in (ROOT / "data_prep").glob("*.py")]
    running = [
        name for name in scripts if "cli.run(" in inspect.getsource(importlib.import_module(name))
    ]
    assert {module.__name__ for module in COMMANDS} == {*running, *NESTED}


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_every_number_on_a_command_line_has_a_range(module):
    assert is_dataclass(module.Config)
    marks, hints = marks_of(module.Config), typing.get_type_hints(module.Config)
    for field in fields(module.Config):
        if numbers_in(hints[field.name]):
            assert any(isinstance(mark, Bound) for mark in marks[field.name]), field.name


def with_values(module, **values):
    """A command's flags with these values, whether or not there are such."""
    given = {f.name: Path("x") for f in fields(module.Config) if "Path" in str(f.type)}
    needed = {"teacher": "t", "source": "sportu", "words": ("v.mp4", "Who?")}
    given |= {f.name: needed[f.name] for f in fields(module.Config) if f.name in needed}
    return module.Config(**given | values)


@pytest.mark.parametrize("module", COMMANDS, ids=lambda module: module.__name__)
def test_no_number_is_beyond_reason(module):
    """Neither NaN nor infinity, nor one that no machine holds, is a value of any flag."""
    hints = typing.get_type_hints(module.Config)
    for field in fields(module.Config):
        kinds = numbers_in(hints[field.name])
        odd = [float("nan"), float("inf"), -float("inf")] if float in kinds else []
        for value in odd + ([10**30, -(10**30)] if kinds else []):
            several = (value,) * 4 if "tuple" in str(hints[field.name]) else value
            with pytest.raises(ValueError, match=f"^--{field.name.replace('_', '-')} .*: must be "):
                cli.check(with_values(module, **{field.name: several}))


WRONG = [
    (train, "lr", 0.0, "above 0"),
    (train, "weight_decay", -5.0, "at least 0"),
    (train, "seed", -1, "at least 0"),
    (train, "stuck_after_s", -1.0, "at least 0"),
    (rl, "kl", -0.1, "at least 0"),
    (rl, "entropy_bonus", -0.1, "at least 0"),
    (rl, "rollout_batch", 0, "at least 1"),
    (rl, "max_turns", 0, "at least 1"),
    (rl, "min_format_rate", 80.0, "at most 1"),
    (rl, "clip_low", 1.5, "at most 1"),
    (evaluation, "limit", -1, "at least 1"),
    (evaluation, "top_p", 1.01, "at most 1"),
    (evaluation, "max_unusable", 5.0, "at most 1"),
    (infer, "num_frames", 0, "at least 1"),
    (check, "timeout_s", 0.0, "above 0"),
    (distill, "per_minute", -1.0, "at least 0"),
    (distill, "min_grade", 75.0, "at most 1"),
    (difficulty, "max_new_tokens", 0, "at least 1"),
    (teacher, "guess", 1.5, "at most 1"),
    (pretrain, "steps", (1, 1, -1, 1), "at least 0"),
    (arena, "workers", 100_000, "at most 1024"),
]


@pytest.mark.parametrize("module, name, value, rule", WRONG)
def test_a_number_out_of_its_range_is_refused_with_the_rule(module, name, value, rule):
    with pytest.raises(ValueError, match=f"^--{name.replace('_', '-')} .*: must be {rule}$"):
        cli.check(with_values(module, **{name: value}))


def test_half_a_character_on_the_command_line_is_refused_with_its_flag(clip):
    done = call("infer.py", clip[1], os.fsdecode(b"Who scored \xff?"))
    assert done.returncode == 1 and done.stderr.startswith("error: the text: lone surrogates")
    for flags in ({"options": ("a", "b\ud800")}, {"model": "\udcff"}):
        with pytest.raises(ValueError, match=f"--{min(flags)}: lone surrogates"):
            cli.check(with_values(infer, **flags))
    cli.check(with_values(infer, page=Path(os.fsdecode(b"caf\xe9.html"))))  # a file may be named so


BENCHES = (
    "engine --repeats 0",
    "kernels --repeats -1",
    "traffic --tokens nan",
    "train --micro-tokens 1e4",
)


@pytest.mark.parametrize("line", BENCHES)
def test_a_benchmark_refuses_a_number_with_its_flag_and_rule(line):
    name, flag, value = line.split()
    done = call("-m", f"nanosport.bench.{name}", flag, value)
    rule = f"error: argument {flag}: {value}: must be a whole number, at least 1"
    assert done.returncode == 2 and done.stderr.splitlines()[-1].endswith(rule)


def test_a_benchmarks_numbers_all_have_a_range():
    for path in (ROOT / "nanosport" / "bench").glob("*.py"):
        assert not re.search(r"type=(int|float)\b", path.read_text()), path


def test_too_few_pixels_are_refused_with_the_flag_and_the_least(clip, tmp_path):
    for least in (1, 3135):
        done = call("infer.py", clip[1], "Who?", "--max-pixels", least)
        why = f"error: --max-pixels {least}: must be at least 3136, the model's min_pixels"
        assert done.returncode == 1 and done.stderr.splitlines() == [why]
    folder = ROOT / "assets" / "nano-deepsport"
    assert ImageConfig.from_folder(folder, 3136).max_pixels == 3136


# How a command ends.


def shell(line: str, **names):
    """(exit code of the first command, all that is said on stderr)."""
    script = f"{line}\nexit ${{PIPESTATUS[0]}}".replace("python", sys.executable)
    env = os.environ | {name: str(value) for name, value in names.items()}
    done = subprocess.run(["bash", "-c", script], cwd=ROOT, env=env, capture_output=True, text=True)
    return done.returncode, done.stderr


PIPES = (
    "python -u infer.py $CLIP 'Who?' | head -1",
    "python infer.py $CLIP 'Who?' --json | head -c 1",
    "python -u train.py --help | head -1",
    "python eval.py --data $DATA --modes tool 2> >(grep -v it/s >&2) | true",
    "python -u -m data_prep.check $DATA --out $OUT | true",
    "python -m nanosport.bench.demo results/demo/seed*.json | true",
)


@pytest.mark.parametrize("line", PIPES)
def test_a_reader_that_goes_ends_a_command_without_a_word(line, clip, tmp_path):
    asked = arena.make_questions(clip[0], np.random.default_rng(0), "q", str(clip[1]))[:1]
    data = tmp_path / "q.jsonl"
    data.write_text("".join(json.dumps(arena.asdict(q)) + "\n" for q in asked))
    code, said = shell(line, CLIP=clip[1], DATA=data, OUT=tmp_path / "clean.jsonl")
    assert code in (0, 141) and not re.search("Traceback|roken|rror", said), said


@pytest.mark.parametrize("closed", [">&-", ">&- 2>&-", "--json >&-"])
def test_a_closed_output_is_no_error(closed, clip, tmp_path):
    page = tmp_path / "p.html"
    code, said = shell(
        f"python infer.py $CLIP 'Who?' --page $PAGE {closed}", CLIP=clip[1], PAGE=page
    )
    assert code == 0 and "Traceback" not in said and page.read_text().endswith("</html>\n")


def test_a_full_disk_is_named(clip):
    for flags, name in ((">/dev/full", "/dev/stdout"), ("--page /dev/full", "/dev/full")):
        code, said = shell(f"python infer.py $CLIP 'Who?' {flags}", CLIP=clip[1])
        assert code == 1 and said == f"error: {name}: No space left on device\n"


@pytest.mark.parametrize("level", ["-O", "-OO"])
@pytest.mark.parametrize("command", [("train.py",), ("rl.py", "7b"), ("-m", "data_prep.check")])
def test_without_docstrings_a_command_runs(level, command):
    done = call(level, *command, "--help")
    assert done.returncode == 0 and "usage" in done.stdout and not done.stderr


def test_without_docstrings_an_answer_comes(clip):
    done = call("-OO", "infer.py", clip[1], "Call the decisive play.", "--json")
    assert done.returncode == 0 and json.loads(done.stdout)["answer"], done.stderr


@dataclass(frozen=True)
class Flags:
    """Of a command that is made up."""

    share: Share = 0.5
    count: Annotated[int, AtLeast(1)] = 1
    out: Path = Path("out")
    resumable: bool = False


@pytest.fixture
def ended(monkeypatch, capfd):
    """Run a command with flags; returns its exit code, and what it has printed."""

    def run(main, *arguments, config_type=Flags):
        monkeypatch.setattr(sys, "argv", ["command", *map(str, arguments)])
        with monkeypatch.context() as patch:
            patch.setattr(sys, "stdout", open(1, "w", encoding="ascii", closefd=False))
            try:
                cli.run(main, config_type)
            except SystemExit as end:
                return end.code, *capfd.readouterr()
            sys.stdout.flush()
            return 0, *capfd.readouterr()

    return run


def test_float32_is_float32_on_a_card_too(ended):
    """Not TF32, which keeps ten of the 23 bits of each factor."""
    said = []
    code, *_ = ended(lambda _: said.append(torch.get_float32_matmul_precision()))
    assert code == 0 and said == ["highest"]


def raises(error):
    def main(_):
        raise error

    return main


HOSTILE = "\x1b[2J\x1b]0;title\x07 \u202e \x9b31m \udcff"


def test_nothing_that_is_printed_acts_on_a_terminal(ended):
    code, out, err = ended(lambda _: print(f"é {HOSTILE}\nnext"))
    assert (code, err) == (0, "") and out.count("\n") == 2 and out.isascii()
    assert "\x1b" not in out and out.startswith(r"\xe9 \x1b[2J\x1b]0;title\x07 \u202e")
    for error in (
        ValueError(HOSTILE),
        FileNotFoundError(2, "gone", HOSTILE),
        cli.Preempted(HOSTILE),
    ):
        code, out, err = ended(raises(error))
        assert (
            code
            and not out
            and r"\x1b[2J" in err
            and not re.search("[\x00-\x09\x1b\x9b\u202e]", err)
        )


def test_the_doctor_prints_no_escape_of_a_record(tmp_path):
    rows = [{"id": "\x1b[31mq", "video": f"{HOSTILE[:4]}x.mp4", "sport": "", "dimension": "rules"}]
    rows[0] |= {"question": "?", "options": [], "answer": "a", "source": "\x1b[2Js"}
    data = tmp_path / "\x1b[1mq.jsonl"
    data.write_text(json.dumps(rows[0]) + "\n")
    for command in ("check", "split"):
        done = call("-m", f"data_prep.{command}", data, "--out", tmp_path / "\x1b[7mout")
        assert "\x1b[" not in (done.stdout + done.stderr).replace("\x1b[A", ""), command
        assert r"\x1b[" in done.stdout + done.stderr


def test_every_command_checks_its_ranges(ended):
    code, _, err = ended(raises(AssertionError), "--share", "1.5")
    assert (code, err) == (1, "error: --share 1.5: must be at most 1\n")
    code, _, err = ended(raises(AssertionError), "--share", "nan")
    assert (code, err) == (1, "error: --share nan: must be a finite number below 2^63\n")


def test_what_is_said_of_resume_after_a_stop_is_true(ended, tmp_path):
    assert ended(raises(KeyboardInterrupt)) == (130, "", "\nstopped\n")
    stopped = ended(raises(KeyboardInterrupt), "--resumable")
    assert stopped == (130, "", "\nstopped; --resume goes on from what is saved\n")
    run = train.Config(out=tmp_path / "run")
    assert not run.resumable
    begun = tmp_path / "run" / "checkpoints" / ".step_000001"
    begun.mkdir(parents=True)
    (begun / "trainer.json").write_text("{}")
    assert not run.resumable
    begun.rename(begun.with_name("step_000001"))
    assert run.resumable and replace(rl.Config(), out=run.out).resumable
    doctor = check.Config(tmp_path / "r.jsonl")
    assert not doctor.resumable
    (tmp_path / "r.clean.report.jsonl").write_text("")
    assert doctor.resumable


STARTS = (["train.py"], ["eval.py"], ["-m", "data_prep.check", "x"], ["-m", "nanosport.plan"])


@pytest.mark.parametrize("command", STARTS, ids=lambda command: command[-1])
def test_ctrl_c_among_the_imports_is_one_line(command):
    with subprocess.Popen(
        [sys.executable, *command], cwd=ROOT, stderr=subprocess.PIPE, preexec_fn=listen
    ) as run:
        while "torch" not in Path(f"/proc/{run.pid}/maps").read_text():  # it has begun to import
            time.sleep(0.002)
        run.send_signal(signal.SIGINT)
        assert run.stderr.read() == b"\nstopped\n" and run.wait() == 130


def listen() -> None:
    """A shell's background jobs ignore Ctrl-C."""
    signal.signal(signal.SIGINT, signal.default_int_handler)


def test_ctrl_c_is_left_alone_where_the_code_is_a_library(tmp_path):
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler); "
    code += "import nanosport.cli; print(signal.getsignal(signal.SIGINT))"
    assert "default_int_handler" in call("-c", code).stdout
    (tmp_path / "theirs.py").write_text(code)
    assert "default_int_handler" in call("-m", "theirs", PYTHONPATH=f"{ROOT}:{tmp_path}").stdout


# What is written, and where.


def test_a_link_stays_and_its_file_is_replaced(tmp_path):
    (tmp_path / "there").mkdir()
    for target in ("there/old", "there/new"):
        link = tmp_path / Path(target).name
        link.symlink_to(target)
        files.write_atomically(link, "text")
        assert link.is_symlink() and (tmp_path / target).read_text() == "text"
    assert sorted(path.name for path in (tmp_path / "there").iterdir()) == ["new", "old"]


def test_what_is_no_plain_file_is_written_to(tmp_path):
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    reader = subprocess.Popen(["cat", pipe], stdout=subprocess.PIPE, text=True)
    files.write_atomically(pipe, "text")
    assert reader.communicate()[0] == "text" and pipe.is_fifo()
    files.write_atomically(Path("/dev/null"), "text")
    assert Path("/dev/null").is_char_device()
    with pytest.raises(IsADirectoryError):
        files.write_atomically(tmp_path, "text")


def test_a_file_that_cannot_be_written_is_named_and_nothing_is_left(tmp_path):
    (tmp_path / "r.json").write_text("old")
    with pytest.raises(OSError) as full, files.writing(tmp_path / "r.json") as file:
        file.write("half")
        raise OSError(28, "No space left on device")
    assert full.value.filename == str(tmp_path / "r.json")
    assert re.fullmatch(
        r".*/r.json: No space left on device; [\d,]+\.\d MB are free there", cli.why(full.value)
    )
    assert [path.read_text() for path in tmp_path.iterdir()] == ["old"]
    with pytest.raises(OSError, match="/dev/full"):
        files.append(Path("/dev/full"), "text" * 9999)
    with pytest.raises(FileNotFoundError, match="none/r.json"):
        files.write_atomically(tmp_path / "none" / "r.json", "text")


def overwriting(folder: Path):
    """Commands that would write over what they read, by the name of it."""
    data, clip, link = folder / "r.jsonl", folder / "clips" / "a.mp4", folder / "linked.jsonl"
    link.hardlink_to(data)
    (folder / "soft.jsonl").symlink_to(data)
    model = ROOT / "assets" / "nano-sft"
    for out in (data, link, folder / "soft.jsonl", clip):
        yield evaluation, evaluation.Config(str(model), data, out)
        yield difficulty, difficulty.Config(data, out, str(model))
        yield distill, distill.Config(data, str(model), out)
        yield look, look.Config(data, out)
        yield infer, infer.Config((data if out != clip else clip, "Who?"), page=out)
    for module, flags in ((evaluation, {"data": data}), (infer, {"words": (clip, "?")})):
        out = {"out" if module is evaluation else "page": model / "config.json"}
        yield module, module.Config(model=str(model), **flags, **out)
    yield check, check.Config(data, link)
    for suffix, module in ((".json", distill), (".rates.jsonl", difficulty)):
        beside = folder / f"x{suffix}"
        beside.hardlink_to(data)
        model_flag = {"teacher" if module is distill else "model": str(model)}
        yield module, module.Config(data=beside, out=folder / "x", **model_flag)
    (folder / "trajectories.jsonl").symlink_to(data)
    (folder / "sft.jsonl").symlink_to(data)
    yield teacher, teacher.Config(folder)
    yield infer, infer.Config((clip.parent, "Who?"), page=clip)
    (folder / "pre").mkdir()
    (folder / "pre" / "pretrain.json").write_text('{"stages": []}')
    yield pretrain, pretrain.Config(folder / "pre", start=folder / "pre")
    (folder / "run").mkdir()
    (folder / "run" / "metrics.jsonl").hardlink_to(data)
    yield train, train.Config(str(model), data, folder / "run")
    (folder / "test.jsonl").hardlink_to(data)
    yield split, split.Config((data,), folder)


def test_no_command_writes_over_what_it_reads(clip, tmp_path):
    (tmp_path / "clips").mkdir()
    (tmp_path / "clips" / "a.mp4").write_bytes(clip[1].read_bytes())
    asked = arena.make_questions(clip[0], np.random.default_rng(0), "q", "clips/a.mp4")[:2]
    data = tmp_path / "r.jsonl"
    data.write_text("".join(json.dumps(arena.asdict(q)) + "\n" for q in asked))
    before = {path: path.read_bytes() for path in (data, tmp_path / "clips" / "a.mp4")}
    for module, cfg in overwriting(tmp_path):
        with pytest.raises(ValueError, match="is read; choose another|would be written over"):
            module.main(cfg)
        assert all(path.read_bytes() == raw for path, raw in before.items()), cfg


def test_two_processes_may_write_one_file(tmp_path):
    code = "from pathlib import Path; from nanosport.files import write_atomically as write\n"
    code += f"for _ in range(300): write(Path({str(tmp_path / 'answer')!r}), 'B')"
    writers = [subprocess.Popen([sys.executable, "-c", code], cwd=ROOT) for _ in range(2)]
    assert [writer.wait(60) for writer in writers] == [0, 0]
    assert [path.name for path in tmp_path.iterdir()] == ["answer"]


SIDE_FILES = ["check $DATA", "difficulty $DATA", "distill $DATA --teacher assets/nano-sft"]
NO_PLACE = [
    "/dev/null",
    "/dev/stdout >$NEW",
    "/dev/stdout | cat",
    "/proc/self/fd/1 >$NEW",
    "data_prep",
]


@pytest.mark.parametrize("command", SIDE_FILES)
def test_what_is_written_beside_a_file_needs_one(command, clip, tmp_path):
    asked = arena.make_questions(clip[0], np.random.default_rng(0), "q", str(clip[1]))[:1]
    data, devices = tmp_path / "q.jsonl", {*os.listdir("/dev")}
    data.write_text("".join(json.dumps(arena.asdict(q)) + "\n" for q in asked))
    for out in NO_PLACE:
        line = f"python -m data_prep.{command} --out {out}"
        code, said = shell(line, DATA=data, NEW=tmp_path / "new")
        assert (code, said.count("\n")) == (1, 1), said
        assert said.startswith(f"error: --out {out.split()[0]}: must be a plain file, for "), said
    assert {*os.listdir("/dev")} == devices


def test_what_is_played_does_not_lie_beside_an_open_file(tmp_path, nano_folder):
    with open(tmp_path / "report", "w") as file:
        cfg = evaluation.Config(out=Path(f"/proc/self/fd/{file.fileno()}"))
        assert evaluation.open_played(cfg, nano_folder, [], 0).path.parent == Path("out")


FULL = {
    "infer.py $CLIP 'Who?' --page $OUT/page.html": "page.html",
    "eval.py --data $DATA --modes tool --out $OUT/report.json": "report.[0-9a-f]*.played.jsonl",
    "rl.py --model assets/nano-sft --data $DATA --num-prompts 1 --out $OUT": "run.json",
    "-m data_prep.arena --out $OUT --workers 1": "clips/sft_00000.mp4",
    "-m data_prep.check $DATA --out $OUT/clean.jsonl": "clean.report.jsonl",
    "-m data_prep.difficulty $DATA --out $OUT/rated.jsonl": "rated.jsonl.rates.jsonl",
    "-m data_prep.distill $DATA --teacher assets/nano-sft --out $OUT/t.jsonl": "t.jsonl.answers/.*",
    "-m data_prep.look $DATA --out $OUT/look.html": "look.html",
    "-m data_prep.split $DATA --out $OUT": "[a-z]*.jsonl",
}


@pytest.mark.parametrize("command", FULL)
def test_a_disk_that_is_full_is_one_line_that_names_the_file(command, clip, tmp_path):
    """A limit on the size of files does to a write what a full disk does, for any user."""
    asked = arena.make_questions(clip[0], np.random.default_rng(0), "q", str(clip[1]))[:1]
    data, out = tmp_path / "q.jsonl", tmp_path / "out"
    data.write_text("".join(json.dumps(arena.asdict(q)) + "\n" for q in asked))
    size = resource.getrlimit(resource.RLIMIT_FSIZE)[1]
    limit = f"import resource as r; r.setrlimit(r.RLIMIT_FSIZE, (99, {size}))"
    start = f"import os, sys; {limit}; os.execv(sys.executable, [sys.executable, *sys.argv[1:]])"
    names = {"CLIP": clip[1], "DATA": data, "OUT": out, "START": start}
    code, said = shell(f'python -c "$START" {command}', **names)
    assert code == 1 and "Traceback" not in said, said
    line = rf"error: {re.escape(str(out))}/{FULL[command]}: File too large"
    assert re.fullmatch(line, said.splitlines()[-1]), said
    grows = re.compile(r"run.lock|.*\.(played|report)\.jsonl")  # line by line, and is mended
    assert all(grows.fullmatch(path.name) for path in out.rglob("*") if path.is_file())
