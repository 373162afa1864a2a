"""Stage 1: supervised fine-tuning on tool trajectories, loss on the assistant's tokens only.

python train.py                                            # nano backbone on the built-in arena
torchrun --nproc-per-node 8 train.py 7b                    # the paper's recipe on one node, from out/splits/trajectories.jsonl
torchrun --nproc-per-node 2 train.py --model my/qwen2.5-vl --data my/trajectories.jsonl --lr 1e-5
python train.py --resume                                   # go on where it was stopped, on as many processes as you like
"""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data_prep import arena, teacher
from kernels.policy_loss import fused_linear_cross_entropy
from nanosport import checkpoint, cli, dist, optim, presets
from nanosport.batch import data_order, deal, make_units, pack
from nanosport.episode import read_records
from nanosport.faults import Preempted, Preemption, Skips, Stages
from nanosport.frames import FrameEncoder
from nanosport.image import ImageConfig
from nanosport.load import load_model, load_tokenizer, resolve
from nanosport.log import Run
from nanosport.rollout import Loop, replay


@dataclass(frozen=True)
class Config:
    model: str = "assets/nano-backbone"
    """A model folder, or a Hugging Face hub id."""
    data: Path = Path("out/arena/trajectories.jsonl")
    """Teacher trajectories, one JSON object a line. The default is rendered where it is missing."""
    out: Path = Path("out/sft")
    """Run folder: model/, log.jsonl, run.json."""
    steps: int = 350
    """Optimizer steps; the data is gone through as often as that takes."""
    batch_size: int = 24
    """Trajectories a step, over all ranks."""
    micro_tokens: int = 16_384
    """Tokens a micro-batch holds at most, on one rank; it changes memory, not gradients."""
    lr: float = 1e-3
    """Peak learning rate: linear warm-up, cosine decay to a tenth."""
    warmup: int = 10
    weight_decay: float = 0.01
    max_grad_norm: float = 1.0
    share_prefix: bool = True
    """Compute what trajectories begin with alike once; it changes time and memory, not gradients."""
    freeze_vision: bool = True
    """Leave the vision tower as it is; with the projector frozen too, each frame is encoded once."""
    freeze_projector: bool = True
    """Leave the projector behind the tower as it is (`visual.merger`)."""
    max_pixels: int | None = None
    """Larger frames are scaled down to this. None: as the model's preprocessor_config.json says."""
    recompute_every: int = 0
    """1: recompute each layer in the backward pass instead of keeping its activations; 2: every second layer; 0: none."""
    offload_adam: bool = False
    """Keep Adam's moments in the CPU's memory."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Computed in; weights, gradients and Adam moments are float32 always. None: bfloat16 on a GPU, float32 on a CPU."""
    seed: int = 0
    save_every: int = 100
    keep: int = 2
    """Checkpoints."""
    stuck_after_s: float = 1800.0
    """End the run where a stage of a step takes longer, and say on which rank; 0: never."""
    resume: bool = False
    """Go on from the newest checkpoint in `out`."""
    overwrite: bool = False
    """Replace the run in `out`."""

    def check(self) -> None:
        """Raise ValueError for values no run can use. Not in __post_init__: tyro would print it as a parse error."""
        cli.at_least(1, steps=self.steps, batch_size=self.batch_size, micro_tokens=self.micro_tokens, save_every=self.save_every)
        cli.at_least(1, keep=self.keep, max_pixels=1 if self.max_pixels is None else self.max_pixels)
        cli.at_least(0, recompute_every=self.recompute_every, stuck_after_s=self.stuck_after_s, warmup=self.warmup)
        cli.above(0, lr=self.lr, max_grad_norm=self.max_grad_norm)


RESUMABLE = (
    "model", "data", "steps", "batch_size", "warmup", "weight_decay", "freeze_vision", "freeze_projector", "max_pixels", "dtype", "seed",
)  # fmt: skip
"""Flags that a run keeps when it is resumed; --lr and --max-grad-norm may change, for one that must calm down."""


def main(cfg: Config) -> None:
    cfg.check()
    rank, world, device = dist.start()
    dtype = dist.dtype_of(cfg.dtype, device)
    torch.manual_seed(cfg.seed)
    if cfg.data == Config.data and not cfg.data.exists():
        if rank == 0:
            arena.main(arena.Config())
            teacher.main(teacher.Config())
        dist.barrier()

    records = read_records(cfg.data)  # before a model is downloaded for nothing
    source = resolve(cfg.model)
    run = Run(cfg.out, cfg, cfg.resume, cfg.overwrite) if rank == 0 else None
    dist.check_shared(cfg.out / "run.json")
    stages, preemption, skips = Stages(rank, cfg.stuck_after_s), Preemption(), Skips(cfg.out, rank)
    model = load_model(source, device)
    model.recompute_every = model.visual.recompute_every = cfg.recompute_every
    optim.trainable(model, cfg.freeze_vision, cfg.freeze_projector)
    dist.shard(model, dtype, device)
    optimizer = optim.build(model, cfg.weight_decay, offload=cfg.offload_adam)
    settings = {key: str(getattr(cfg, key)) for key in RESUMABLE}
    first = checkpoint.load(cfg.out, model, optimizer, settings)["step"] if cfg.resume else 0
    if run and cfg.resume:
        run.rewind(first)
    checkpoints = checkpoint.Checkpoints(cfg.out, source, rank, dtype, cfg.keep, cfg.max_pixels)

    frozen = cfg.freeze_vision and cfg.freeze_projector
    encoder = FrameEncoder(model, ImageConfig.from_folder(source, cfg.max_pixels), frozen)
    tokenizer = load_tokenizer(source)
    episodes = {}  # made when first needed, then kept: ids and masks are small
    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc="SFT", disable=rank > 0)
    for step in bar:
        began = time.time()
        stages.new_step(step)
        with stages("data"):
            mine = dist.share(data_order(len(records), cfg.seed, step, cfg.batch_size), rank)
            for k in mine:
                if k not in episodes:
                    question, messages = records[k]
                    episodes[k] = replay(question, messages, encoder, tokenizer, Loop())
            shares = dist.gather([episodes[k] for k in mine])
            everyone, homes = [e for s in shares for e in s], [r for r, s in enumerate(shares) for _ in s]
            units = make_units(everyone, 1, homes, model.cfg, cfg.micro_tokens, cfg.share_prefix)
            dealt, balance = deal(units, world, cfg.micro_tokens, frozen)
        num_tokens = sum(sum(e.mask) for e in everyone)

        loss_sum = 0.0
        optimizer.zero_grad()
        with stages("train"):
            for chosen in dealt[rank]:
                # where there are more ranks than trajectories, one idles on another's: all ranks go through the layers together
                part, counts = ([everyone[k] for k in chosen], 1.0) if chosen else (everyone[:1], 0.0)
                batch = pack(part, encoder, model.cfg, device, cfg.share_prefix)
                hidden_TD = model.hidden(batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys)
                scale_M = torch.full_like(batch.sampled_logp_M, counts / num_tokens)
                loss, _ = fused_linear_cross_entropy(hidden_TD[batch.rows_M], model.head_weight_VD, batch.targets_M, scale_M)
                loss.backward()
                loss_sum += loss.item()
        with stages("update"):
            (loss_sum,) = dist.total([loss_sum], device)
            grad_norm = optim.clip(model, cfg.max_grad_norm)
            lr = optim.set_lr(optimizer, step, cfg.lr, cfg.warmup, cfg.steps)
            skipped = skips.bad(step, loss_sum, grad_norm, everyone)
            if not skipped:
                optimizer.step()
            (asked,) = dist.total([float(preemption.asked)], device)

        if run:
            row = {"step": step, "loss": loss_sum, "grad_norm": grad_norm, "lr": lr, "tokens": num_tokens}
            run.write({**row, "skipped": int(skipped), "balance": balance, "seconds": time.time() - began})
            bar.set_postfix(loss=f"{loss_sum:.3f}")
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or asked:
            with stages("save"):
                checkpoints.save(model, optimizer, {"step": step + 1, "settings": settings})
        if asked and step + 1 < cfg.steps:
            checkpoints.finish()
            raise Preempted(f"stopped by SIGTERM behind step {step}, which is saved; --resume goes on")
    checkpoints.finish()
    stages.close()
    if run:
        run.close()
        print(f"SFT model in {run.model}")
    dist.barrier()


if __name__ == "__main__":
    cli.run(main, Config, presets.SFT)
