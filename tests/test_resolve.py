"""Where a model is looked for: paths are never asked of the hub, shipped models are found from any
folder, and what came from the hub is named by its commit."""

import json
import shutil

import pytest

import eval as evaluation
import infer
import rl
import train
from data_prep import difficulty, pretrain
from nanosport.files import ASSETS
from nanosport.model.folder import load_config, resolve
from nanosport.plan.__main__ import Config as Plan
from nanosport.plan.__main__ import stages
from tests.helpers.clips import write
from tests.helpers.hub_cache import hub_cache


def test_shipped_models_are_found_from_any_folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", ask_nobody)
    for name in ("nano-deepsport", "nano-sft", "nano-backbone", "nano-backbone-qwen3-vl"):
        assert resolve(f"assets/{name}") == ASSETS / name
    for config in (infer.Config, evaluation.Config, train.Config, difficulty.Config):
        assert resolve(config.model).parent == ASSETS
    assert pretrain.Config().out.parent == ASSETS
    assert {stage.model for stage in stages(Plan("nano", gpus=1)).values()} == {
        load_config(ASSETS / "nano-backbone")
    }
    mine = tmp_path / "assets" / "nano-sft"
    shutil.copytree(ASSETS / "nano-sft", mine)
    assert resolve("assets/nano-sft").resolve() == mine  # a path is a path


def ask_nobody(*_, **__):
    raise AssertionError("the hub was asked")


@pytest.mark.parametrize(
    "model",
    [
        "assets/nano-typo", "out/sft", "./owner/name", "../owner/name", "/owner/name", "~/name",
        "~nobody/name", "owner/name/model", "owner/", "/name", "name", "owner//name", "owner/name@",
        ".owner/name", "owner\\name",
    ],
)  # fmt: skip
def test_what_looks_like_a_path_is_never_asked_of_the_hub(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", ask_nobody)
    with pytest.raises(ValueError, match="no such folder$") as caught:
        resolve(model)
    assert "\n" not in str(caught.value)


def test_rl_without_an_sft_model_takes_the_shipped_one_from_any_folder(
    arena_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("huggingface_hub.snapshot_download", ask_nobody)
    data = (arena_folder / "rl.jsonl").absolute()
    cfg = rl.Config(data=data, out=tmp_path / "run", steps=1, num_prompts=1, group_size=2)
    taken = []
    monkeypatch.setattr(rl, "read_data", lambda cfg: taken.append(cfg.model) or exit())
    with pytest.raises(SystemExit):
        rl.main(cfg)
    assert taken == [str(ASSETS / "nano-sft")]


def test_a_run_and_a_report_name_the_commit_of_a_hub_model(
    nano_folder, arena_folder, tmp_path, monkeypatch, capsys
):
    snapshot = hub_cache(nano_folder, tmp_path)
    asked = {}

    def download(name, revision, allow_patterns):
        asked.update(name=name, revision=revision)
        return str(snapshot)

    monkeypatch.setattr("huggingface_hub.snapshot_download", download)
    data, model = arena_folder / "trajectories.jsonl", "owner/name@refs/pr/7"
    cfg = train.Config(model, data, tmp_path / "run", steps=1, batch_size=1, save_every=1)
    train.main(cfg)
    assert asked == {"name": "owner/name", "revision": "refs/pr/7"}
    run = json.loads((tmp_path / "run" / "run.json").read_text())
    assert run["config"]["model"] == model and run["model_commit"] == snapshot.name

    report = tmp_path / "report.json"
    few = {"limit": 1, "modes": ("no-tool",), "max_new_tokens": 3, "out": report}
    evaluation.main(evaluation.Config("owner/name", arena_folder / "test.jsonl", **few))
    assert asked["revision"] is None
    assert json.loads(report.read_text())["model_commit"] == snapshot.name
    capsys.readouterr()
    clip = write(tmp_path / "clip.mp4")
    for name, commit in (("owner/name@v1", snapshot.name), (str(nano_folder), None)):
        infer.main(infer.Config((clip, "Who?"), model=name, max_new_tokens=3, json=True))
        assert json.loads(capsys.readouterr().out)["model_commit"] == commit
