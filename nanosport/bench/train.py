"""Times an SFT step and a policy update on random weights of true shapes on one GPU, beside plain
transformers and, where it is installed, transformers with Liger's layers, in under 5 minutes.

python -m nanosport.bench.train                # 3B whole; 7B, 8B with as many layers as fit
python -m nanosport.bench.train --shapes 3b    # → results/train/<card>.json and a table

Ours are the stages of train.py and rl.py: packed, float32 weights, gradients and Adam moments,
bfloat16 compute, the fused loss. Theirs is the same decoder from transformers, trained as TRL
trains it: padded batches, autocast over the same float32 weights, logits of every token after the
prompt. Weights, tokens and objective are the same, so both report one loss. Frames are encoded
beforehand, as with a frozen tower. All layers are computed again in the backward pass, but in the
rows "recompute auto".

tokens/s count the tokens of the episodes, however often each was computed. MFU counts what one pass
over them needs: three times the forward's operations, once for the reference, nothing recomputed or
padded, a shared prefix once where it is shared. "As others count" a shared prefix counts for each
episode. device_ms says where the GPU's time goes, by kind of kernel. Peak memory is torch's own
count. Without a GPU it runs the nano shape on lengths shrunk as its width is (NANO), and peaks come
from the profiler: that checks the code and compares the two, but is no figure of any GPU.
"""

import argparse
import gc
import time
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path
from statistics import median

import torch

from nanosport.bench.device import card_name, device_ms, peak_bytes, write_report
from nanosport.bench.theirs import DEVICE, Theirs, WithLiger, Work, fill
from nanosport.cli import ending, leave_group
from nanosport.fields import COUNT
from nanosport.files import ASSETS, provenance
from nanosport.model.cost import CARDS
from nanosport.model.decoder import ModelConfig, VLModel, attention_of
from nanosport.model.folder import load_config
from nanosport.plan.memory import GIB, RESERVED, step_peak
from nanosport.plan.synthetic import Lengths, bare_actors, bare_training, take_step
from nanosport.train import dist

GPU = DEVICE.type == "cuda"
OF_CPU = {"nano": "nano-backbone", "nano-qwen3": "nano-backbone-qwen3-vl"}
SHAPES = {"3b": "qwen2.5-vl-3b", "7b": "qwen2.5-vl-7b", "8b": "qwen3-vl-8b"} if GPU else OF_CPU
NANO = Lengths(frame_tokens=9, label=2, prompt_text=11, turn_text=7, result_text=1)
"""The paper's lengths ÷ 28, as the nano model's width is the 7B's ÷ 28: attention, which grows with
length ÷ width, then keeps about its share of the operations (13 % here, 8 % there; 77 % with a nano
model on whole lengths)."""


class Ours:
    """The stages of train.py and rl.py."""

    def __init__(self, cfg: ModelConfig, work: Work, dtype: torch.dtype):
        self.cfg, self.actors = cfg, None
        adapted = work.run.lora_rank > 0
        model = self._model(dtype if adapted else torch.float32)
        self.training = bare_training(work.run, model, work.episodes[0], DEVICE, dtype)
        if work.is_policy:
            reference = self.training.computing
            if not adapted:
                reference = dist.shard(self._model(dtype).requires_grad_(False), dtype, DEVICE)
            self.actors = bare_actors(self.training, reference)

    def _model(self, dtype: torch.dtype) -> VLModel:
        with torch.device("meta"):
            model = VLModel(self.cfg).to(dtype)
        model.to_empty(device=DEVICE)
        fill(dict(model.named_parameters()))
        return model

    def step(self, work: Work) -> float:
        """Take a step, and return its loss."""
        self.training.cfg = work.run
        self.training.stage.seconds.clear()
        return take_step(self.training, self.actors, work.episodes)

    @property
    def seconds(self) -> dict[str, float]:
        spent = self.training.stage.seconds
        names = {"pack and reference": "reference", "train": "train", "update": "update"}
        return {name: spent.get(stage, 0.0) for name, stage in names.items()}


IMPLEMENTATIONS = {
    Ours: "nanosport",
    Theirs: "transformers, padded",
    WithLiger: "transformers, Liger's layers",
}


def held_bytes(trainer: Ours) -> int:
    """Weights and Adam's moments: what is there before peak_bytes begins to count on a CPU."""
    training, reference = trainer.training, [trainer.actors.reference] if trainer.actors else []
    models = [training.model, training.computing, *reference]
    held = [weight for model in models for weight in model.parameters()]
    held += [x for state in training.optimizer.state.values() for x in state.values()]
    return sum({id(tensor): tensor.nbytes for tensor in held}.values())


def measure(kind: type, cfg: ModelConfig, work: Work, repeats: int) -> dict:
    """Median time of a step and its stages, the time of each step, speeds, and the peak; says so
    where it does not fit."""
    try:
        trainer, times = kind(cfg, work, torch.bfloat16 if GPU else torch.float32), []
        loss = trainer.step(work)  # the first makes Adam's moments, and kernels
        peak = peak_bytes(lambda: trainer.step(work))
        for _ in range(repeats):
            trainer.step(work)
            times.append({**trainer.seconds, "step": sum(trainer.seconds.values())})
        spent = device_ms(lambda: trainer.step(work))
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:
        if kind is not WithLiger:
            raise
        return {"error": f"Liger: {error!r}".splitlines()[0]}  # it patches other versions
    seconds = {name: round(median(t[name] for t in times), 4) for name in times[0]}
    tokens = sum(len(episode.ids) for episode in work.episodes)
    passes = 3 + work.is_policy
    unshared = work.flops(cfg, False) * passes
    flops = work.flops(cfg, True) * passes if kind is Ours else unshared
    row = {"seconds": seconds, "steps_s": [round(t["step"], 4) for t in times]}
    row["tokens_per_s"] = round(tokens / seconds["step"])
    row |= {"tflops": round(flops / seconds["step"] / 1e12, 3), "loss": loss}
    row |= {"unshared_tflops": round(unshared / seconds["step"] / 1e12, 3), "device_ms": spent}
    if kind is Ours:
        peak += 0 if GPU else held_bytes(trainer)
    if GPU or kind is Ours:
        row["peak_gib"] = round(peak / GIB, 4)
    return row


def fitted(cfg: ModelConfig, room_gib: float, lengths: Lengths, micro_tokens: int) -> ModelConfig:
    """`cfg` with as many layers as the planner puts into 90 % of the room, for a policy update on
    one GPU."""
    group = Work.of(cfg, lengths, 1, 8, micro_tokens=micro_tokens, recompute="all")
    step, room = (group.run, group.episodes, 1, True), 0.9 * room_gib * GIB - RESERVED
    for layers in range(cfg.num_hidden_layers, 0, -1):
        smaller = replace(cfg, num_hidden_layers=layers)
        if step_peak(smaller, *step) <= room:
            return smaller
    raise ValueError(f"{room_gib:.0f} GiB hold not one layer: give a larger GPU")


def cases(cfg: ModelConfig, lengths: Lengths, micro_tokens: int) -> list[tuple]:
    """(name, work, implementations) of all that is timed: micro-batches of `micro_tokens`, and a
    group of 8 in one."""
    flags = {"micro_tokens": micro_tokens, "recompute": "all" if GPU else "none"}
    group = Work.of(cfg, lengths, 1, 8, **flags)
    whole = flags | {"micro_tokens": sum(len(episode.ids) for episode in group.episodes)}
    auto = {"recompute": "auto"}
    return [
        ("SFT step", Work.of(cfg, lengths, 8, 1, **flags), (Ours, Theirs)),
        ("SFT step, recompute auto", Work.of(cfg, lengths, 8, 1, **flags | auto), (Ours,)),
        ("policy update", group, (Ours, Theirs)),
        ("policy update, group in one pack", Work.of(cfg, lengths, 1, 8, **whole), (Ours,)),
        (
            "policy update, one pack, recompute auto",
            Work.of(cfg, lengths, 1, 8, **whole | auto),
            (Ours,),
        ),
    ]


def bench(name: str, cfg: ModelConfig, timed: list[tuple], repeats: int) -> list[dict]:
    """Time all cases of a model, and print a line of each."""
    planned = [step_peak(cfg, work.run, work.episodes, int(GPU), GPU) for _, work, _ in timed]
    dist.start()
    rows, here = [], card_name()
    card_flops = next((flops for card, (flops, *_) in CARDS.items() if card in here), None)
    for (op, work, kinds), num_bytes in zip(timed, planned):
        for kind in kinds:
            row = {"op": op, "impl": IMPLEMENTATIONS[kind], "model": name}
            row |= {"layers": cfg.num_hidden_layers, "episodes": len(work.episodes)}
            row |= {"micro_tokens": work.run.micro_tokens, **measure(kind, cfg, work, repeats)}
            if "error" not in row and kind is Ours and work.run.recompute != "auto":
                row["planned_gib"] = round(num_bytes / GIB, 4)
            gc.collect()
            torch.cuda.empty_cache()  # does nothing without a GPU
            if "tflops" in row and card_flops:
                for mfu, counted in (("mfu", "tflops"), ("mfu_unshared", "unshared_tflops")):
                    row[f"{mfu}_percent"] = round(100 * row[counted] * 1e12 / card_flops, 1)
            rows.append(row)
            print(line(row), flush=True)
    leave_group()
    return rows


def line(row: dict) -> str:
    head = f"{row['model']:6}{row['layers']:3} layers  {row['op']:34}{row['impl']:22}"
    if "error" in row:
        return head + row["error"]
    peak = f"{row['peak_gib']:8.2f} GiB" if "peak_gib" in row else ""
    planned = f" (planned {row['planned_gib']:.2f})" if "planned_gib" in row else ""
    mfu = f"MFU {row['mfu_percent']:4.1f} %" if "mfu_percent" in row else ""
    speed = f"{row['seconds']['step']:8.3f} s {row['tokens_per_s']:8,} tokens/s"
    return f"{head}{speed}  {mfu}{peak}{planned}"


def shape(name: str, micro_tokens: int | None) -> tuple[ModelConfig, str, list[tuple]]:
    """(the model, its label, the cases) of a shape."""
    full, tokens = load_config(ASSETS / SHAPES[name]), micro_tokens or (8192 if GPU else 600)
    if not GPU:
        return full, name, cases(full, NANO, tokens)
    room = torch.cuda.get_device_properties(0).total_memory / GIB
    cfg = fitted(full, room, Lengths(), 3 * tokens)
    layers, whole = cfg.num_hidden_layers, full.num_hidden_layers
    label = name if layers == whole else f"{name}, {layers} of {whole} layers"
    return cfg, label, cases(cfg, Lengths(), tokens)


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--out", type=Path, default=Path("results/train"), help="the JSON's folder")
    parser.add_argument("--shapes", nargs="+", default=[*SHAPES], choices=[*SHAPES])
    parser.add_argument("--micro-tokens", type=COUNT, help="tokens of a pack; 8192, on a CPU 600")
    parser.add_argument("--repeats", type=COUNT, default=3, help="steps a time is the median of")
    args = parser.parse_args()
    began, rows = time.time(), []
    if not GPU:
        print("No GPU here: the nano shape, lengths ÷ 28, float32. This checks the code.")
    # Liger's patches stay: what is plain must be timed before
    jobs = [(name, None) for name in args.shapes]
    if find_spec("liger_kernel"):
        jobs += [(name, WithLiger) for name in args.shapes]
    for name, liger in jobs:
        cfg, label, timed = shape(name, args.micro_tokens)
        if liger:
            timed = [(op, work, (liger,)) for op, work, kinds in timed if Theirs in kinds]
        rows += bench(label, cfg, timed, args.repeats)
        report = {**provenance(), "gpu": GPU, "seconds": round(time.time() - began)}
        report["attention"] = attention_of(cfg, DEVICE)
        report |= {"lengths": vars(Lengths() if GPU else NANO), "rows": rows}
        if not GPU:
            report["note"] = "nano shape on a CPU, lengths ÷ 28, float32: no GPU measured"
        path = write_report(args.out, card_name(), report)  # after each, so that none is lost
        print(f"{path}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    ending(main)
