"""Times a decode step of our own sampler, with and without cuDNN's attention.

    python -m nanosport.bench.engine      # → results/engine/<card>.json and a table, a minute long

On a GPU the model has the 7B's shape and random weights in bfloat16, and torch's own preference is
cuDNN. A time is a turn's, divided by its tokens; a turn begins after a prompt of a length that was
not met before. The floor is what the card needs to read the weights and the cache once. Without a
GPU it runs the nano shape: that checks the code, but is no figure of any GPU.
"""

import argparse
import json
import time
from pathlib import Path
from statistics import median

import numpy as np
import torch

from nanosport.cli import ending
from nanosport.engine.own import OwnSampler
from nanosport.engine.sampler import Piece, Sampling
from nanosport.fields import COUNT
from nanosport.files import ASSETS, provenance, write_atomically
from nanosport.model.cost import CARDS, decode_seconds
from nanosport.model.folder import load_config, load_tokenizer
from nanosport.model.qwen2_5_vl import Qwen25VL

TOKENS = 24
"""A turn has so many tokens."""


def random_model(name: str, device: str, dtype: torch.dtype) -> Qwen25VL:
    """A model of a shape in assets/, with random weights."""
    with torch.device("meta"):
        model = Qwen25VL(load_config(ASSETS / name)).to(dtype)
    return model.to_empty(device=device).init_weights().requires_grad_(False)


def turn_seconds(sampler: OwnSampler, rows: int, length: int) -> float:
    """Sample one turn for `rows` conversations that share a prompt of `length` tokens."""
    ids = np.random.default_rng(length).integers(10, 200, length).tolist()
    state = sampler.prefill([Piece(ids)]).select([0] * rows)
    state.make_room(TOKENS)
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    sampler.generate(state, [np.random.default_rng(row) for row in range(rows)])  # waits for ids
    return time.perf_counter() - began


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--out", type=Path, default=Path("results/engine"))
    parser.add_argument("--repeats", type=COUNT, default=3, help="turns a time is the median of")
    args = parser.parse_args()
    gpu = torch.cuda.is_available()
    shape = ("qwen2.5-vl-7b", "cuda", torch.bfloat16) if gpu else ("nano-sft", "cpu", torch.float32)
    model, card = random_model(*shape), torch.cuda.get_device_name() if gpu else "cpu"
    sampler = OwnSampler(
        model, load_tokenizer(ASSETS / "nano-sft"), Sampling(max_new_tokens=TOKENS)
    )
    sampler.end_ids = set()  # every turn is as long
    bandwidth = next((speeds[1] for name, speeds in CARDS.items() if name in card), None)

    cases, rows = [(32, 2764), (8, 2764), (32, 5500), (8, 5500), (1, 5500)], []
    for with_cudnn in (False, True) if gpu else (False,):
        torch.backends.cuda.enable_cudnn_sdp(with_cudnn)
        for num_rows, cached in cases if gpu else [(2, 60), (1, 60)]:
            lengths = [cached + 40 * repeat for repeat in range(args.repeats)]
            times = [1e3 * turn_seconds(sampler, num_rows, n) / TOKENS for n in lengths]
            row = {"rows": num_rows, "cached_tokens": cached, "cudnn": with_cudnn}
            row |= {"ms_a_token": round(median(times), 2), "all": [round(ms, 2) for ms in times]}
            if bandwidth:
                floor = decode_seconds(model.cfg, num_rows * cached, bandwidth, 0.0)
                row["floor_ms"] = round(1e3 * floor, 2)
            rows.append(row)
            print(row)
    args.out.mkdir(parents=True, exist_ok=True)
    path = args.out / f"{card.lower().replace(' ', '-')}.json"
    report = {**provenance(), "gpu": gpu, "shape": shape[0], "tokens_a_turn": TOKENS, "rows": rows}
    write_atomically(path, json.dumps(report, indent=1) + "\n")
    print(path)


if __name__ == "__main__":
    ending(main)
