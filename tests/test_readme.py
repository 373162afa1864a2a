"""What README and docs promise is there: files, commands, flags, figures."""

import importlib.util
import json
import re
from collections import Counter
from dataclasses import fields
from pathlib import Path

import pytest
import torch

import eval as evaluation
import infer
import rl
import train
from data_prep import check, convert, difficulty, distill, look, split
from nanosport.bench import ablate
from nanosport.bench.demo import seeds_table
from nanosport.env.figures import TITLES
from nanosport.env.reward import Reward
from nanosport.plan import __main__ as plan
from nanosport.records import DIMENSIONS, Episode, Question, Turn
from nanosport.report import __main__ as report
from nanosport.serve import __main__ as serve
from nanosport.train import checkpoint
from nanosport.train.metrics import TokenMeans, log_row, rollout_stats, take_work
from nanosport.train.training import Update

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
PAGES = {path.name: path.read_text() for path in [ROOT / "README.md", *ROOT.glob("docs/*.md")]}
SCRIPTS = {"train.py": train, "rl.py": rl, "eval.py": evaluation, "infer.py": infer}
MODULES = {
    f"data_prep.{module.__name__.rpartition('.')[2]}": module
    for module in (check, convert, difficulty, distill, look, split)
} | {
    "nanosport.plan": plan,
    "nanosport.bench.ablate": ablate,
    "nanosport.report": report,
    "nanosport.serve": serve,
}
EVERYWHERE = (
    "--nproc-per-node",
    "--shutdown-timeout",
    "--help",
    "--version",
    "--flag",
)  # torchrun's, tyro's


def prose(page: str) -> str:
    """A page without code blocks, tables, headings, pictures and the targets of links."""
    page = re.sub(r"```.*?```", "", page, flags=re.S)
    lines = [line for line in page.splitlines() if not line.startswith(("|", "!", "#"))]
    return re.sub(r"\]\([^)]*\)", "]", "\n".join(lines))


def test_the_readme_is_an_invitation():
    text = re.sub(r"`[^`]*`", "code", prose(README))
    sentences = [s for s in re.split(r"(?<=[.:!?])\s+", text) if len(s.split()) > 1]
    lengths = [len(sentence.split()) for sentence in sentences]
    assert len(prose(README).split()) <= 900
    assert sum(lengths) / len(lengths) <= 20 and max(lengths) <= 40


@pytest.mark.parametrize("name", PAGES)
def test_every_path_that_is_named_is_there(name):
    code = re.sub(r"```.*?```", "", PAGES[name], flags=re.S)
    named = re.findall(r"`((?:nanosport|kernels|data_prep|docs|tests|assets)/[\w./-]*)`", code)
    targets = re.findall(r"\]\((?!http)([^)#]+)\)", code)
    folder = ROOT if name == "README.md" else ROOT / "docs"
    assert all((ROOT / path).exists() for path in named), named
    assert all((folder / path).exists() for path in targets), targets


@pytest.mark.parametrize("name", PAGES)
def test_every_command_and_its_flags_are_there(name):
    blocks = "\n".join(re.findall(r"```sh\n(.*?)```", PAGES[name], flags=re.S))
    inline = "\n".join(re.findall(r"`(python -m [^`]+)`", PAGES[name]))
    lines = [line.partition("   #")[0] for line in f"{blocks}\n{inline}".splitlines()]
    for command in (part for line in lines for part in line.split("&&")):
        module = re.search(r"python -m ([\w.]+)", command)
        script = re.search(r"(\w+\.py)\b", command)
        if module:
            assert importlib.util.find_spec(module[1]), command
            config = getattr(MODULES.get(module[1]), "Config", None)
        elif script and script[1] in SCRIPTS:
            config = SCRIPTS[script[1]].Config
        else:
            continue
        if config:
            known = {f"--{field.name.replace('_', '-')}" for field in fields(config)}
            asked = set(re.findall(r"--[a-z][a-z-]*", command)) - set(EVERYWHERE)
            assert asked <= known, (command, asked - known)


def test_every_flag_of_a_table_is_a_flag():
    known = {
        f"--{field.name.replace('_', '-')}"
        for module in (*SCRIPTS.values(), *MODULES.values())
        for field in fields(module.Config)
    } | {"--url", *EVERYWHERE}
    for name, page in PAGES.items():
        flags = {re.sub(r"^--no-", "--", f) for f in re.findall(r"`(--[a-z][a-z-]*)", page)}
        assert flags <= known, (name, flags - known)


def test_every_metric_is_explained_and_no_other():
    episode = Episode(
        Question("q", "v", "soccer", "rules", "?", (), "a"),
        (1,), (1,), (0.0,), (3,), (Turn("a", "answer", tokens=(0, 1)),), "answered", "a",
    )  # fmt: skip
    means = TokenMeans()
    means.sums.append(torch.ones(len(means.NAMES)))
    stats = rollout_stats([episode], [Reward(1.0, 1.0, 0.0, 1.0, 0.0, 0.0)], 0)
    row = log_row(0, stats, means.over_ranks("cpu"), [Update(1.0, 1.0, 0.1, False)], 1.0)
    row |= take_work(Counter(pages=3)) | {"flat_groups": 0, "refilled": 0}
    assert row["pages"] == 3 and row["rows_put_back"] == 0
    page = PAGES["metrics.md"]
    of_rl, rest = page.split("## `metrics.jsonl` of `train.py`")
    explained = set(re.findall(r"^\| `(\w+)`", of_rl, flags=re.M))
    assert explained == set(row)
    of_both, rest = rest.split("## `heldout.jsonl`")
    code = [*ROOT.glob("nanosport/*/*.py"), *ROOT.glob("*.py")]
    stages = {
        name for path in code for name in re.findall(r'stage\("([a-z ]+)"\)', path.read_text())
    }
    assert set(re.findall(r"^\| `seconds_(\w+)` ", of_both, flags=re.M)) == {
        name.replace(" ", "_") for name in stages
    }
    of_held_out, of_eval = rest.split("## The report of `eval.py`")
    assert set(re.findall(r"^\| `(\w+)`", of_held_out, flags=re.M)) == {
        "step",
        "best",
        "eval_data_crc32",
    }
    figures = set(evaluation.figures([episode] * 2, [1.0] * 2)) - set(DIMENSIONS)
    of_a_run = "ungraded judge_and_rule by_seed against lost seconds seconds_per_question"
    of_table = "\n".join(line for line in of_eval.splitlines() if line.startswith("|"))
    assert set(TITLES) <= figures | set(DIMENSIONS) | set(of_a_run.split())
    inside = {"row", "difference", "interval", "p"}
    explained = set(re.findall(r"`(\w+)`", of_table)) - inside
    assert explained == figures | set(of_a_run.split())


DEMOS = sorted(path.name for path in ROOT.glob("results/demo*") if path.is_dir())


@pytest.mark.parametrize("demo", DEMOS)
def test_the_tables_are_made_of_the_committed_figures(demo):
    paths = sorted((ROOT / "results" / demo).glob("seed*.json"))
    reports = [json.loads(path.read_text()) for path in paths]
    assert len(reports) == 3 and seeds_table(reports) in README


def test_the_ablations_table_is_made_of_what_is_kept(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)  # where nothing is made
    cfg = ablate.Config(keep=ROOT / "results/ablate")
    found = ablate.results(cfg)
    assert [*found] == [*ablate.ROWS] and all(len(by_seed) == 3 for by_seed in found.values())
    table = f"{ablate.figures_table(found)}\n\n{ablate.sentences(found)}\n"
    assert table == (cfg.keep / "table.md").read_text()
    assert table.strip() in (ROOT / "results/README.md").read_text()


def test_adapters_reach_what_the_page_says_of_the_gain_of_all_weights():
    shares = []
    for seed in range(3):
        rows = json.loads((ROOT / f"results/demo/seed{seed}.json").read_text())["rows"]
        own = json.loads((ROOT / f"results/lora/seed{seed}.json").read_text())["rows"]
        (adapted,), sft = own.values(), rows["SFT"]["accuracy"]
        gain = adapted["accuracy"] - sft
        shares.append(round(100 * gain / (rows["SFT+RL"]["accuracy"] - sft)))
    assert min(shares) >= 90
    assert f"{min(shares)} to {max(shares)} %](../results/README.md#lora)" in PAGES["lora.md"]
    said = (ROOT / "results/README.md").read_text()
    assert "| share of the gain | " + " | ".join(f"{share} %" for share in shares) + " |" in said


def test_reports_of_two_families_make_no_table():
    report = {"family": "Qwen3-VL", "rows": {}}
    with pytest.raises(ValueError, match="reports on Qwen2.5-VL and Qwen3-VL: give those of one"):
        seeds_table([report, {"rows": {}}])


def test_what_a_shipped_model_was_made_with_names_no_folder_of_ours(tmp_path):
    """Paths of the repository are relative to it, also where an export writes them."""
    pages = [page.read_text() for page in (ROOT / "assets").glob("*/made.json")]
    run = {"config": {"model": str(ROOT / "assets" / "nano-backbone")}}
    (tmp_path / "run.json").write_text(json.dumps(run))
    (tmp_path / "model").symlink_to(ROOT / "assets" / "nano-sft")
    checkpoint.export(tmp_path / "model", tmp_path / "out")
    pages.append((tmp_path / "out" / "made.json").read_text())
    assert len(pages) >= 3 and not any(': "/' in page for page in pages)
    assert json.loads(pages[-1])["config"]["model"] == "assets/nano-backbone"
