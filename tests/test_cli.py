"""The command lines as a user meets them: answers, clear errors, no traceback."""

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import rl
import train
from data_prep import arena
from nanosport.image import ImageConfig, smart_resize
from nanosport.train import presets
from tests.helpers.source_folders import finebadminton

ROOT = Path(__file__).parents[1]
CLIPS = ROOT.parent / "shared" / "data" / "clips"


def call(*arguments, cwd=ROOT):
    return subprocess.run(
        [sys.executable, *map(str, arguments)], cwd=cwd, capture_output=True, text=True, timeout=300
    )


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


@pytest.mark.skipif(not CLIPS.is_dir(), reason="the real clips are not beside this checkout")
def test_infer_takes_every_real_clip(capsys):
    import infer

    for path in sorted(CLIPS.iterdir()):
        infer.main(infer.Config(path, "Which sport is this?", json=True))
        said = json.loads(capsys.readouterr().out)
        assert (
            said["status"] in ("answered", "format_error", "out_of_turns", "out_of_tokens")
            and said["frames"]
        )


@pytest.mark.parametrize("script, named", [(train, presets.SFT), (rl, presets.RL)])
def test_presets_are_the_papers_recipes(script, named):
    """Every preset is a config that a run accepts; RL goes on from where its SFT leaves the
    model."""
    configs = {name: script.Config(**fields) for name, fields in named.items()}
    assert list(configs) == ["nano", "3b", "7b", "7b-scaled"] and configs["nano"] == script.Config()
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
    for size in ((360, 640), (720, 1280), (1080, 1920)):
        assert smart_resize(*size, ImageConfig(max_pixels=configs["7b"].max_pixels)) == (364, 644)


def test_a_preset_is_named_before_its_flags():
    done = call("train.py", "7b", "--lr", "0")
    assert done.returncode == 1 and done.stderr.splitlines() == ["error: --lr 0.0: must be above 0"]
    done = call("rl.py", "3b", "--data", "none.jsonl")
    assert (
        done.returncode == 1 and "none.jsonl: no such file" in done.stderr
    )  # before a model is downloaded
