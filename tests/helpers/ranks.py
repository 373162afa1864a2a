"""Run under torchrun by the tests: train.py's and rl.py's mains one after the other in one process
group, with what the tests plant.

    torchrun --nproc-per-node 2 tests/helpers/ranks.py '[["train", {"out": …}], ["rl", {…}]]' [PLANT]

PLANT happens on rank 1 at its third micro-batch: "error", "hang" or "bug"; or "blind", its episodes
have lost their frames. "apart": rank 1 has a file system of its own. "slow": rank 0 takes two
seconds to write a model, and rank 1 says so if it leaves before.
"""

import json
import os
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path

import torch

import rl
import train
from nanosport import cli
from nanosport.model import folder
from nanosport.records import Episode
from nanosport.train import checkpoint
from nanosport.train.training import Training


def planted(kind: str, pack_all, calls=[]):  # noqa: B006
    def pack(training, episodes, encoder):
        calls.append(1)
        if os.environ["RANK"] == "1" and len(calls) == 3:
            if kind == "error":
                raise ValueError("this clip broke")
            if kind == "bug":
                raise KeyError("nobody thought of this")
            if kind == "hang":
                time.sleep(120)
            episodes = [blind(episode, training.model.cfg.image_token_id) for episode in episodes]
        return pack_all(training, episodes, encoder)

    return pack


def blind(episode: Episode, image_token_id: int) -> Episode:
    """The episode without its frames."""
    kept = [k for k, token in enumerate(episode.ids) if token != image_token_id]
    names = ("ids", "mask", "sampled_logp")
    parts = {name: tuple(getattr(episode, name)[k] for k in kept) for name in names}
    place = {k: new for new, k in enumerate((*kept, len(episode.ids)))}
    turns = [replace(turn, tokens=tuple(place[k] for k in turn.tokens)) for turn in episode.turns]
    return replace(episode, **parts, turns=tuple(turns), frames=())


def main(_) -> None:
    for script, flags in json.loads(JOBS):
        module = {"train": train, "rl": rl}[script]
        known = {k: Path(v) if k in ("data", "eval_data", "out") else v for k, v in flags.items()}
        if plant == ["apart"] and os.environ["RANK"] == "1":
            known["out"] = known["out"].with_name("of_another_node")
        module.main(module.Config(**known))


def slowly(write_all):
    def write_weights(*args):
        time.sleep(2)
        return write_all(*args)

    return write_weights


def looking_back(whole):
    out = Path(json.loads(JOBS)[0][1]["out"])
    return lambda message, code: whole(
        f"{message}{'' if checkpoint.latest(out) else '; NOTHING IS SAVED'}", code
    )


@dataclass(frozen=True)
class NoFlags:
    """cli.run wants a config."""


if __name__ == "__main__":
    torch.set_num_threads(1)
    JOBS, *plant = sys.argv[1:]
    sys.argv[1:] = []
    if plant == ["slow"]:
        folder.write_weights, cli.leave = slowly(folder.write_weights), looking_back(cli.leave)
    elif plant != ["apart"] and plant:
        Training.pack = planted(plant[0], Training.pack)
    cli.run(main, NoFlags)
