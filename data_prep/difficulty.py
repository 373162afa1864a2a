"""Measures how often the base model answers from the overview alone, and stores it in each record
as `pass_rate`.

    python -m data_prep.difficulty out/arena/rl.jsonl --out out/arena/rl_measured.jsonl
    python rl.py --data out/arena/rl_measured.jsonl --reward v2

The base model, without the tool, answers every question `samples` times from the overview frames; a
pass scores at least 0.5. What is measured is kept batch by batch in OUT.rates.jsonl: a run that was
killed goes on there.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated

import tyro
from tqdm import tqdm

from nanosport import cli
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.rollout import rollout
from nanosport.env.scoring import accuracy
from nanosport.env.tools import STOPS
from nanosport.fields import AtLeast
from nanosport.files import ASSETS, append, checksum, mend, write_atomically
from nanosport.records import Question, read_lines, read_questions, record_row
from nanosport.video import usable


@dataclass(frozen=True)
class Config:
    data: Annotated[Path, tyro.conf.Positional]
    """Records, one JSON object a line."""
    out: Path
    """The same records with pass_rate."""
    model: str = str(ASSETS / "nano-backbone")
    """The base model, before any training with the tool: a folder, or a hub id."""
    samples: Annotated[int, AtLeast(1)] = 8
    temperature: Annotated[float, AtLeast(0)] = 0.7
    max_new_tokens: Annotated[int, AtLeast(1)] = 160
    batch_size: Annotated[int, AtLeast(1)] = 16
    """So many questions are asked at a time."""
    seed: Annotated[int, AtLeast(0)] = 0


def measure(
    cfg: Config, folder: Path, questions: list[Question], rates: dict[str, float], kept: Path
) -> list[str]:
    """Add the rates that are missing to `rates` and to the file `kept`, batch by batch; returns a
    line for each clip that cannot be used."""
    from nanosport.engine.players import load_sampler  # not before it is needed: it loads the model

    sampling = Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens, stops=STOPS)
    encoder, sampler = load_sampler(folder, sampling)
    limits, broken = Limits(use_tool=False), []
    batches = range(0, len(questions), cfg.batch_size)
    for start in tqdm(batches, desc="difficulty", unit="batch"):
        batch = questions[start : start + cfg.batch_size]
        if all(question.id in rates for question in batch):
            continue  # by whole batches: a run that goes on draws as one that was never cut
        batch, unusable = usable(batch, encoder.open)
        broken += unusable
        drawn = (cfg.samples, (cfg.seed,), range(start, start + len(batch)))
        episodes = rollout(sampler, encoder, batch, limits, *drawn) if batch else []
        for k, question in enumerate(batch):
            group = episodes[k * cfg.samples : (k + 1) * cfg.samples]
            passed = sum(accuracy(episode.answer, question) >= 0.5 for episode in group)
            rates[question.id] = passed / cfg.samples
        rows = [{"id": question.id, "pass_rate": rates[question.id]} for question in batch]
        append(kept, "".join(json.dumps(row) + "\n" for row in rows))
    return broken


def main(cfg: Config) -> None:
    from nanosport.model.folder import resolve, version  # not before it is needed, as above

    cli.check(cfg)
    questions = read_questions(cfg.data)
    names = ("model", "samples", "temperature", "max_new_tokens", "seed")
    folder = resolve(cfg.model)
    settings = {name: str(getattr(cfg, name)) for name in names}
    settings |= {"weights": version(folder), "data": f"{checksum(cfg.data):08x}"}
    kept = cfg.out.with_name(cfg.out.name + ".rates.jsonl")
    read = (cfg.data, cfg.model, *{question.video for question in questions})
    cli.not_the_input(cfg.out, *read, beside=kept)
    rates = read_rates(kept, settings)
    cfg.out.parent.mkdir(parents=True, exist_ok=True)
    for line in dict.fromkeys(measure(cfg, folder, questions, rates, kept)):
        print(f"left without a pass rate: {line}")

    rows = [record_row(replace(q, pass_rate=rates.get(q.id)), cfg.out.parent) for q in questions]
    write_atomically(cfg.out, "".join(json.dumps(row) + "\n" for row in rows))
    measured = [rates[question.id] for question in questions if question.id in rates]
    if measured:
        mean, solved = sum(measured) / len(measured), sum(rate >= 0.5 for rate in measured)
        print(
            f"{len(measured)} questions, mean pass rate {mean:.2f}, {solved} solved from the "
            f"overview, in {cfg.out}"
        )


def read_rates(path: Path, settings: dict[str, str]) -> dict[str, float]:
    """Rates measured before under the same settings; starts the file where there is none."""
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(settings) + "\n")
        return {}
    mend(path)
    first, *rows = (row for _, row in read_lines(path, "a measured rate"))
    if first != settings:
        raise ValueError(
            f"{path}: was measured under {json.dumps(first)}; remove it to measure anew, or choose "
            "another --out"
        )
    return {row["id"]: row["pass_rate"] for row in rows}


if __name__ == "__main__":
    cli.run(main, Config)
