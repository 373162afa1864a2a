"""infer.py says so where the shipped model is asked about what it cannot know."""

import json
import shutil
from pathlib import Path

import pytest

import infer
from nanosport.records import read_questions
from tests.helpers.clips import write

CLIPS = Path(__file__).parents[2] / "shared" / "data" / "clips"
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
