"""Times our sampler beside vLLM's, turn by turn in one process, on the same questions.

    python -m nanosport.bench.samplers --data out/arena/rl.jsonl    # → results/engine/vllm_cpu.json

Both play whole episodes, with tool, frames and one token after each stop text, and sample at
temperature 0.8; their draws differ, so the figure is tokens a second. vLLM must be installed
(docs/vllm.md).
"""

import argparse
import json
import time
from importlib.metadata import version
from pathlib import Path
from statistics import median

import torch

from nanosport.bench.device import card_name, write_report
from nanosport.cli import ending
from nanosport.engine.players import Room, load_sampler, make_sampler
from nanosport.engine.sampler import Sampling
from nanosport.env.env import Limits
from nanosport.env.rollout import rollout
from nanosport.env.tools import STOPS
from nanosport.fields import COUNT
from nanosport.files import ASSETS, provenance
from nanosport.records import read_questions


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--model", type=Path, default=ASSETS / "nano-deepsport")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, default=Path("results/engine"))
    parser.add_argument("--questions", type=COUNT, default=32)
    parser.add_argument("--group-size", type=COUNT, default=8)
    parser.add_argument("--repeats", type=COUNT, default=3, help="runs a time is the median of")
    args = parser.parse_args()
    questions, limits = read_questions(args.data)[: args.questions], Limits()
    sampling = Sampling(0.8, max_new_tokens=160, stops=STOPS)
    encoder, ours = load_sampler(args.model, sampling)
    room = Room(limits.max_tokens + sampling.max_new_tokens, len(questions) * args.group_size)
    theirs = make_sampler("vllm", args.model, ours.model, sampling, room)

    rows = {"nanosport": [], "vllm": []}
    for repeat in range(args.repeats + 1):
        for name, sampler in zip(rows, (ours, theirs)):
            began = time.perf_counter()
            episodes = rollout(sampler, encoder, questions, limits, args.group_size, (repeat,))
            seconds = time.perf_counter() - began
            said = sum(sum(episode.mask) for episode in episodes)
            if repeat:  # the first time warms up
                rows[name].append(
                    {"seconds": round(seconds, 2), "tokens_per_s": round(said / seconds)}
                )
    speeds = {name: median(run["tokens_per_s"] for run in runs) for name, runs in rows.items()}
    package = "vllm" if torch.cuda.is_available() else "vllm-cpu"
    report = {**provenance(), package: version(package), "threads": torch.get_num_threads()}
    report |= {"episodes": len(questions) * args.group_size, "runs": rows, "tokens_per_s": speeds}
    print(json.dumps(report, indent=1))
    print(write_report(args.out, f"vllm_{card_name()}", report))


if __name__ == "__main__":
    ending(main)
