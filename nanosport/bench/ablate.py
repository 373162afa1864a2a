"""What each term of the reward does: RL from one SFT model of a seed under each row's reward, and
the benchmark's figures of each.

    make ablate                                                  # every row, seeds 0, 1 and 2
    python -m nanosport.bench.ablate --rows v2 accuracy --seeds 0
    python -m nanosport.bench.ablate --from-demo out/demo0 out/demo1    # takes what make demo made

A stage whose result is there and was made with the same command is skipped, and a training run that
was cut goes on. Each stage writes to SEED/NAME.log, and a line says when a row is done. The table
and a curve for each figure are made anew after each row: table.md and CURVE.svg.
"""

import itertools
import json
import shlex
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import tyro

import eval as evaluation
import rl
import train
from data_prep import arena
from nanosport import cli
from nanosport.bench.demo import chart, mean_and_spread, read
from nanosport.cli import Preempted
from nanosport.env.figures import compared
from nanosport.fields import AtLeast
from nanosport.files import provenance, write_atomically
from nanosport.records import read_lines
from nanosport.report import markdown
from nanosport.train.checkpoint import latest

ROWS = {
    "v2": ("--reward", "v2"),
    "videobrain": ("--reward", "videobrain"),
    "v1": (),
    "accuracy": ("--reward", "accuracy"),
    "ungated": ("--reward", "ungated"),
    "repeats-allowed": ("--allow-repeats",),
    "frames-drawn": ("--frames-drawn", "4", "8", "16"),
}
"""By the name of a row, what rl.py is given beside the seed."""
COLOURS = dict(
    zip(ROWS, "#c0392b #8e44ad #1b1f24 #2471a3 #d68910 #1e8449 #7f8c8d".split(), strict=True)
)
COLUMNS = {
    "accuracy": "overall",
    "accuracy_tool_needed": "tool needed",
    "accuracy_tool_not_needed": "not needed",
    "tool_rate_needed": "tool rate where needed",
    "tool_rate_not_needed": "tool rate elsewhere",
    "window_hit_rate": "window hit",
    "window_iou": "window IoU",
    "format_rate": "format",
    "frames": "frames",
}
MOVES = {
    key: COLUMNS[key]
    for key in ("tool_rate_needed", "tool_rate_not_needed", "window_hit_rate", "frames")
}
CURVES = ("accuracy", "tool_rate", "repeat_rate", "format_rate", "frames", "kl", "entropy")
SMOKE = {
    "arena": ("--sft-clips", "12", "--rl-clips", "6", "--test-clips", "3"),
    "sft": ("--steps", "12"),
    "rl": "--steps 2 --num-prompts 2 --min-format-rate 0".split(),
}


@dataclass(frozen=True)
class Config:
    seeds: tuple[Annotated[int, AtLeast(0)], ...] = (0, 1, 2)
    rows: tuple[Literal[*ROWS], ...] = tuple(ROWS)
    out: Path = Path("out/ablate")
    from_demo: tuple[Path, ...] = ()
    """Folders of `make demo`, one a seed: arena, SFT model and row v1 are taken from there where
    they are whole and were made with the same flags."""
    keep: Path | None = None
    """Put the table, the curves, the reports, each question's score and RL's logs there too. What
    is there, made with the same commands, is not made again, on whatever machine."""
    smoke: bool = False
    """Run every stage with few steps."""


@dataclass(frozen=True)
class Stage:
    """A command, and what is there when it has ended."""

    name: str
    args: tuple[str, ...]
    """What python is given."""
    made: Path
    """Its result: a file, or a folder."""
    demos: str = ""
    """What `make demo` has in its place, in its own folder."""

    @property
    def is_run(self) -> bool:
        """Whether it trains, and can be resumed."""
        return self.args[0] in ("train.py", "rl.py")


def stages_of(cfg: Config, seed: int, row: str) -> list[Stage]:
    """What a row of a seed takes, in order."""
    folder, given = cfg.out / f"seed{seed}", SMOKE if cfg.smoke else dict.fromkeys(SMOKE, ())
    clips = folder / "arena"
    sft, run, report = folder / "sft", folder / row, folder / f"eval_{row}.json"
    records, measured = f"{clips}/rl.jsonl", f"{folder}/rl_measured.jsonl"
    made, at = f"{clips}/trajectories.jsonl", ("--seed", str(seed))

    needs_rates = row in rl.BY_CLASS
    render = ("-m", "data_prep.arena", "--out", f"{clips}", *at, *given["arena"])
    teach = ("-m", "data_prep.teacher", "--data", f"{clips}", *at)
    tune = ("train.py", "--data", made, "--out", f"{sft}", *at, *given["sft"])
    rate = ("-m", "data_prep.difficulty", records, "--out", measured, *at)
    learn = ("rl.py", "--model", f"{sft}/model", "--data", measured if needs_rates else records)
    learn += ("--out", f"{run}", *at, *ROWS[row], "--min-tool-rate", "0", *given["rl"])
    judge = ("eval.py", "--model", f"{run}/model", "--name", row, "--modes", "tool")
    judge += ("--data", f"{clips}/test.jsonl", "--out", f"{report}")
    is_v1 = row == "v1"
    stages = [
        Stage("arena", render, clips, "arena"),
        Stage("teacher", teach, Path(made), "arena/trajectories.jsonl"),
        Stage("sft", tune, sft, "sft"),
        Stage("difficulty", rate, Path(measured)),
        Stage(row, learn, run, "rl" if is_v1 else ""),
        Stage(f"eval_{row}", judge, report, "eval_rl.json" if is_v1 else ""),
    ]
    return [stage for stage in stages if needs_rates or stage.name != "difficulty"]


def record_of(stage: Stage, folder: Path) -> dict:
    """What is known of how a stage's result was made; nothing where it was not."""
    path = folder / f"{stage.name}.made.json"
    return read(path) if path.exists() else {}


def record(stage: Stage, folder: Path, about: dict) -> None:
    write_atomically(folder / f"{stage.name}.made.json", json.dumps(about, indent=1) + "\n")


def demos_record(stage: Stage, demo: Path, seed: int) -> dict:
    """How the demo has made what may stand for a stage's result; nothing where it may not: it is
    not whole, or was made with other flags."""
    theirs = demo / stage.demos
    if stage.args[0] == "-m":
        flags = tyro.cli(arena.Config, args=stage.args[2:]) if stage.name == "arena" else None
        num_clips = flags and flags.sft_clips + flags.rl_clips + flags.test_clips
        whole = (demo / "arena/trajectories.jsonl").exists() and read(demo / "arena/arena.json")
        fits = whole and whole["seed"] == seed and num_clips in (None, whole["clips"])
        return {"commit": "unknown"} if fits else {}
    kind = {"train.py": train.Config, "rl.py": rl.Config, "eval.py": evaluation.Config}
    about = theirs / "run.json" if stage.is_run else theirs
    if not about.exists():
        return {}
    about, newest = read(about), latest(theirs) if stage.is_run else None
    if stage.is_run and (not newest or newest.name != f"step_{about['config']['steps']:06d}"):
        return {}
    ours = asdict(tyro.cli(kind[stage.args[0]], args=stage.args[1:]))
    # these change no weight and no figure
    others = ("model", "data", "out", "name", "resume", "overwrite", "min_tool_rate")
    same = all(
        as_text(about["config"].get(key, value)) == as_text(value)
        for key, value in ours.items()
        if key not in others
    )
    return {key: about[key] for key in ("command", "commit")} if same else {}


def as_text(value) -> str:
    """A flag's value, however its file has written it."""
    return str(tuple(value) if isinstance(value, list) else value)


def is_whole(stage: Stage, folder: Path, commands: list[str]) -> bool:
    """Whether a stage's result is there, made with these commands to its end."""
    about = record_of(stage, folder)
    return about.get("commands") == commands and "seconds" in about and stage.made.exists()


def ensure(stage: Stage, commands: list[str], folder: Path, demo: Path | None, seed: int) -> None:
    """Have a stage's result made. commands: those of all stages up to this one.

    Raises ValueError where its command fails, Preempted after SIGTERM.
    """
    if is_whole(stage, folder, commands):
        return
    same, about = record_of(stage, folder).get("commands") == commands, {"commands": commands}
    theirs = demos_record(stage, demo, seed) if demo and stage.demos and not same else {}
    is_theirs = theirs and stage.made.resolve() == (demo / stage.demos).resolve()
    if not same and not is_theirs and (stage.made.is_symlink() or stage.made.is_file()):
        stage.made.unlink()
        stage.made.with_name(f"{stage.made.name}.rates.jsonl").unlink(missing_ok=True)
    if theirs:
        if not is_theirs:
            stage.made.symlink_to((demo / stage.demos).resolve())
        return record(stage, folder, about | {"demo": theirs, "seconds": None})
    about["commit"] = provenance()["commit"]
    record(stage, folder, about)
    began, more = time.time(), (["--resume"] if same else ["--overwrite"]) if stage.is_run else []
    run([*stage.args, *more], folder / f"{stage.name}.log")
    record(stage, folder, about | {"seconds": round(time.time() - began, 1)})


def run(args: list[str], log: Path) -> None:
    """Run a command of this project; what it says goes to a file."""
    with open(log, "a") as file:
        print(f"$ python {shlex.join(args)}", file=file, flush=True)
        process = subprocess.Popen([sys.executable, *args], stdout=file, stderr=file)
        try:
            code = process.wait()
        except BaseException:  # a training run saves what it has
            process.terminate()
            process.wait()
            raise
    if code:
        last = (log.read_text(errors="replace").splitlines() or [""])[-1]
        raise ValueError(f"python {shlex.join(args)}: ended with {code}: {last} (see {log})")


def commands_of(stages: list[Stage]) -> list[str]:
    return [shlex.join(stage.args) for stage in stages]


Result = tuple[dict, list[dict]]
"""A row's seed: the benchmark's report, and RL's log."""
Found = dict[str, dict[int, Result]]
"""By row and seed."""


def figures_of(report: dict) -> dict:
    """The one row of a report."""
    (figures,) = report["rows"].values()
    return figures


def made(cfg: Config, seed: int, row: str) -> Result | None:
    """What was made here of a row's seed, if it was with these commands, to its end."""
    stages = stages_of(cfg, seed, row)
    *_, learn, judge = stages
    if not is_whole(judge, judge.made.parent, commands_of(stages)):
        return None
    log = [line for _, line in read_lines(learn.made / "metrics.jsonl", "a step")]
    return read(judge.made), log


def kept(cfg: Config, seed: int, row: str) -> Result | None:
    """What --keep holds of a row's seed, if it was made with these commands."""
    path = cfg.keep and cfg.keep / f"{row}_seed{seed}.json"
    if not path or not path.exists():
        return None
    report, scores = read(path), path.with_suffix(".scores.jsonl")
    if report["made"][-1]["commands"] != commands_of(stages_of(cfg, seed, row)):
        return None
    figures_of(report)["episodes"] = [one for _, one in read_lines(scores, "a question's score")]
    return report, [line for _, line in read_lines(path.with_suffix(".jsonl"), "a step")]


def keep(cfg: Config, seed: int, row: str) -> None:
    """Put a row's seed where `kept` finds it, if it was made here."""
    if not cfg.keep or not (here := made(cfg, seed, row)):
        return
    *_, learn, judge = stages_of(cfg, seed, row)
    report, path = here[0], cfg.keep / f"{row}_seed{seed}.json"
    names, episodes = ("id", "video", "accuracy"), figures_of(report).pop("episodes")
    scores = [{name: one[name] for name in names} for one in episodes]
    records = [record_of(stage, judge.made.parent) for stage in (learn, judge)]
    lines = "".join(json.dumps(one) + "\n" for one in scores)
    write_atomically(path.with_suffix(".scores.jsonl"), lines)
    write_atomically(path.with_suffix(".jsonl"), (learn.made / "metrics.jsonl").read_text())
    write_atomically(path, json.dumps(report | {"made": records}, indent=1) + "\n")


def results(cfg: Config) -> Found:
    """What is there, made here or kept."""
    found: Found = {}
    for row, seed in itertools.product(ROWS, cfg.seeds):
        if result := made(cfg, seed, row) or kept(cfg, seed, row):
            found.setdefault(row, {})[seed] = result
    return found


def figures_table(found: Found) -> str:
    """A row of mean ± standard deviation over the seeds that are there, in Markdown."""
    lines = [["row", "seeds", *COLUMNS.values()]]
    for row, by_seed in found.items():
        figures = [figures_of(report) for report, _ in by_seed.values()]
        by_column = [[one.get(key) for one in figures] for key in COLUMNS]
        lines.append([row, " ".join(map(str, by_seed)), *map(mean_and_spread, by_column)])
    return markdown(*lines)


def sentences(found: Found) -> str:
    """What each row changes against v1, over the seeds that both have: the paired difference, and
    the figures in which rewards differ most. p is of these models: how far training again would
    differ, the spread over the seeds says."""
    lines, plain = [], found.get("v1", {})
    for row, by_seed in found.items():
        seeds = [seed for seed in by_seed if seed in plain and row != "v1"]
        if not seeds:
            continue
        merged = []
        for reports in (by_seed, plain):
            rows = {seed: figures_of(reports[seed][0]) for seed in seeds}
            episodes = [
                one | {key: f"{seed}/{one[key]}" for key in ("id", "video") if key in one}
                for seed, its in rows.items()
                for one in its["episodes"]
            ]
            means = {key: np.mean([its[key] for its in rows.values()]) for key in MOVES}
            merged.append(means | {"episodes": episodes})
        than = compared(merged[0], "v1", merged[1])
        bounds = " [{:+.1f}, {:+.1f}]".format(*than["interval"]) if than["interval"] else ""
        parts = [f"overall {than['difference']:+.1f}{bounds} points, p = {than['p']:.2g}"]
        parts += [f"{MOVES[k]} {merged[1][k]:.1f} → {merged[0][k]:.1f}" for k in MOVES]
        lines.append(
            f"- `{row}` against `v1` (seeds {' '.join(map(str, seeds))}): {'; '.join(parts)}."
        )
    return "\n".join(lines)


def curves(found: Found) -> dict[str, str]:
    """By a figure of RL's log, the lines of all rows as SVG: means over the seeds."""
    lines: dict[str, dict[str, list]] = {name: {} for name in CURVES}
    for row, by_seed in found.items():
        logs = [log for _, log in by_seed.values()]
        for name in CURVES:
            steps = [[line.get(name) for line in at_step] for at_step in zip(*logs)]
            lines[name][row] = [(k, np.mean(v)) for k, v in enumerate(steps) if None not in v]
    return {name: chart(by_row, COLOURS) for name, by_row in lines.items()}


def write(cfg: Config) -> str:
    """Write the table and the curves of what is there; returns the table."""
    found = results(cfg)
    files = {"table.md": f"{figures_table(found)}\n\n{sentences(found)}\n"}
    files |= {f"{name}.svg": svg for name, svg in curves(found).items()}
    for folder in filter(None, (cfg.out, cfg.keep)):
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in files.items():
            write_atomically(folder / name, text)
    for row, by_seed in found.items():
        for seed in by_seed:
            keep(cfg, seed, row)
    return files["table.md"]


def stop(*_) -> None:
    raise Preempted("stopped by SIGTERM; the same command goes on")


def main(cfg: Config) -> None:
    cli.check(cfg)
    signal.signal(signal.SIGTERM, stop)
    demos = {read(demo / "arena/arena.json")["seed"]: demo for demo in cfg.from_demo}
    if unknown := demos.keys() - set(cfg.seeds):
        raise ValueError(f"--from-demo {demos[min(unknown)]}: its seed is not among --seeds")
    for row, seed in itertools.product(cfg.rows, cfg.seeds):
        stages, there = stages_of(cfg, seed, row), kept(cfg, seed, row)
        folder = cfg.out / f"seed{seed}"
        folder.mkdir(parents=True, exist_ok=True)
        for k, stage in enumerate(stages if not there else (), 1):
            ensure(stage, commands_of(stages[:k]), folder, demos.get(seed), seed)
        figures = figures_of(there[0] if there else read(stages[-1].made))
        said = f"overall {figures['accuracy']:.1f}, tool rate {figures['tool_rate']:.1f}"
        print(f"{time.strftime('%H:%M')} {row}, seed {seed}: {said}", flush=True)
        write(cfg)
    print(write(cfg))


if __name__ == "__main__":
    cli.run(main, Config)
