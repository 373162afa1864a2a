"""The rewards beside each other: a Markdown table of what `make rewards` has left of each seed.

python -m nanosport.bench.rewards out/rewards/seed*                          # the table
python -m nanosport.bench.rewards out/rewards/seed* --out results/rewards    # and the reports, kept
"""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import tyro

from nanosport import cli
from nanosport.files import write_atomically
from nanosport.report import markdown

COLUMNS = {
    "accuracy": "overall",
    "accuracy_tool_needed": "tool needed",
    "accuracy_tool_not_needed": "not needed",
    "tool_rate_needed": "tool rate where needed",
    "tool_rate_not_needed": "tool rate elsewhere",
    "window_hit_rate": "window hit",
    "window_iou": "window IoU",
}


@dataclass(frozen=True)
class Config:
    seeds: Annotated[tuple[Path, ...], tyro.conf.Positional]
    """A folder for each seed, with eval_REWARD.json."""
    out: Path | None = None
    """Keep the reports there, without the episodes, as SEED_REWARD.json."""


def reports(seeds: tuple[Path, ...]) -> dict[str, dict[str, dict]]:
    """The reports by reward and the name of the seed's folder. Raises ValueError where a reward is
    not there for all seeds."""
    found: dict[str, dict[str, dict]] = {}
    for seed in seeds:
        for path in sorted(seed.glob("eval_*.json")):
            reward = path.stem.removeprefix("eval_")
            found.setdefault(reward, {})[seed.name] = json.loads(path.read_text())
    for reward, by_seed in found.items():
        if missing := {seed.name for seed in seeds} - by_seed.keys():
            raise ValueError(
                f"{min(missing)}: has no eval_{reward}.json; run make rewards to its end"
            )
    if not found:
        raise ValueError("no eval_REWARD.json in the folders; run make rewards first")
    return found


def rewards_table(found: dict[str, dict[str, dict]]) -> str:
    """A row a reward, and in each cell the figure of every seed."""
    cells = {}
    for reward, by_seed in found.items():
        rows = [next(iter(report["rows"].values())) for report in by_seed.values()]
        values = [[row.get(key) for row in rows] for key in COLUMNS]
        cells[reward] = [
            " / ".join("–" if v is None else f"{v:.1f}" for v in each) for each in values
        ]
    return markdown(["reward", *COLUMNS.values()], cells)


def main(cfg: Config) -> None:
    found = reports(cfg.seeds)
    if cfg.out is not None:
        cfg.out.mkdir(parents=True, exist_ok=True)
        for reward, by_seed in found.items():
            for seed, report in by_seed.items():
                for row in report["rows"].values():
                    row.pop("episodes", None)
                text = json.dumps(report, indent=1) + "\n"
                write_atomically(cfg.out / f"{seed}_{reward}.json", text)
    print(rewards_table(found))


if __name__ == "__main__":
    cli.run(main, Config)
