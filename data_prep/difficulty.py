"""Measures how often the base model answers from the overview alone, and stores it in each record as `pass_rate`.

    python -m data_prep.difficulty out/arena/rl.jsonl --out out/arena/rl_measured.jsonl
    python rl.py --data out/arena/rl_measured.jsonl --reward v2

The base model, without the tool, answers every question `samples` times from the overview frames; a pass scores at least 0.5. What is
measured is kept batch by batch in OUT.rates.jsonl: a run that was killed goes on there.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nanosport import cli
from nanosport.engine import Sampling, load_engine
from nanosport.episode import read_questions, record_row
from nanosport.judge import accuracy
from nanosport.load import resolve, version
from nanosport.log import write_atomically
from nanosport.rollout import Loop, rollout
from nanosport.video import usable


@dataclass(frozen=True)
class Config:
    data: Annotated[Path, tyro.conf.Positional]
    """Records, one JSON object a line."""
    out: Path
    """The same records with pass_rate."""
    model: str = "assets/nano-backbone"
    """The base model, before any training with the tool: a folder, or a hub id."""
    samples: int = 8
    temperature: float = 0.7
    max_new_tokens: int = 160
    batch_size: int = 16
    """Questions in flight."""
    seed: int = 0


def main(cfg: Config) -> None:
    cli.at_least(1, samples=cfg.samples, batch_size=cfg.batch_size)
    cli.not_the_input(cfg.out, cfg.data)
    questions = read_questions(cfg.data)
    if len({q.id for q in questions}) < len(questions):
        raise ValueError(f"{cfg.data}: two questions have one id; rates are kept by id")
    settings = {k: str(v) for k, v in asdict(cfg).items() if k in ("model", "samples", "temperature", "max_new_tokens", "seed")}
    folder = resolve(cfg.model)
    settings["weights"] = version(folder)
    kept = cfg.out.with_name(cfg.out.name + ".rates.jsonl")
    rates = read_rates(kept, settings)
    encoder, engine = load_engine(folder, Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens))
    loop, broken = Loop(use_tool=False), []
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    with open(kept, "a") as file:
        for start in tqdm(range(0, len(questions), cfg.batch_size), desc="difficulty", unit="batch"):
            some = questions[start : start + cfg.batch_size]
            if all(q.id in rates for q in some):
                continue  # by whole batches: a run that goes on draws as one that was never cut
            some, unusable = usable(some, encoder.open)
            broken += unusable
            episodes = rollout(engine, encoder, some, loop, cfg.samples, (cfg.seed,), first=start) if some else []
            for k, question in enumerate(some):
                group = episodes[k * cfg.samples : (k + 1) * cfg.samples]
                rates[question.id] = sum(accuracy(e.answer, question) >= 0.5 for e in group) / cfg.samples
                file.write(json.dumps({"id": question.id, "pass_rate": rates[question.id]}) + "\n")
            file.flush()
    for line in dict.fromkeys(broken):
        print(f"left without a pass rate: {line}")
    rows = [record_row(replace(q, pass_rate=rates.get(q.id)), cfg.out.parent) for q in questions]
    write_atomically(cfg.out, "".join(json.dumps(row) + "\n" for row in rows))
    found = [rates[q.id] for q in questions if q.id in rates]
    if found:
        solved = sum(rate >= 0.5 for rate in found)
        print(
            f"{len(found)} questions, mean pass rate {sum(found) / len(found):.2f}, {solved} solved from the overview, in {cfg.out}"
        )


def read_rates(path: Path, settings: dict[str, str]) -> dict[str, float]:
    """Rates measured before under the same settings; starts the file where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings) + "\n")
        return {}
    first, *lines = path.read_text().splitlines()
    if json.loads(first) != settings:
        raise ValueError(f"{path}: was measured under {first}; remove it to measure anew, or choose another --out")
    whole = [line for line in lines if line.endswith("}")]  # the last may have been cut
    if len(whole) < len(lines):
        write_atomically(path, "".join(line + "\n" for line in (first, *whole)))
    return {row["id"]: row["pass_rate"] for row in map(json.loads, whole)}


if __name__ == "__main__":
    cli.run(main, Config)
