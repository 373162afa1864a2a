"""Stage 1: supervised fine-tuning on tool trajectories, loss on the assistant's tokens only.

python train.py                                  # the nano backbone on the built-in arena
torchrun --nproc-per-node 8 train.py 7b          # the paper's recipe
torchrun --nproc-per-node 2 train.py --model my/qwen2.5-vl --data my/trajectories.jsonl --lr 1e-5
python train.py --resume                         # go on, on as many processes as you like

A step: take trajectories in a shuffled order → make each an episode with a mask → deal them to the
ranks → cross entropy on the masked tokens → update.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import torch

from data_prep import arena, teacher
from kernels.policy_loss import fused_linear_cross_entropy
from nanosport.fields import MAY_CHANGE, AtLeast, Share
from nanosport.model.folder import ASSETS, load_tokenizer
from nanosport.records import Episode, read_records
from nanosport.train import dist, heldout, presets
from nanosport.train.config import TrainingConfig
from nanosport.train.deal import data_order
from nanosport.train.inputs import MAX_UNUSABLE, Records, Trajectories
from nanosport.train.training import Training


@dataclass(frozen=True)
class Config(TrainingConfig):
    model: str = str(ASSETS / "nano-backbone")
    data: Path = Path("out/arena/trajectories.jsonl")
    """Teacher trajectories, one JSON object a line. The default is rendered where it is missing."""
    out: Path = Path("out/sft")
    steps: int = 350
    lr: float = 1e-3
    warmup: int = 10
    weight_decay: float = 0.01
    save_every: int = 100
    batch_size: Annotated[int, AtLeast(1)] = 24
    """Trajectories of a step, over all ranks; the data is gone through as often as that takes."""
    episode_tokens: Annotated[int, AtLeast(1)] = 16_384
    """A longer trajectory, frames included, is left out."""
    max_new_tokens: Annotated[int, AtLeast(1), MAY_CHANGE] = 160
    """At an evaluation (--eval-every) one turn is cut after so many tokens."""
    max_unusable: Annotated[Share, MAY_CHANGE] = MAX_UNUSABLE
    """Records that cannot be used are left out, up to this share of them."""


def collect(
    training: Training, trajectories: Trajectories, step: int
) -> tuple[list[Episode], list[int], int]:
    """(the step's episodes of every rank, the rank that each comes from, how many of them stand in
    for one whose video is lost)."""
    cfg, records = training.cfg, trajectories.records
    with training.stage("data"):
        order = data_order(len(records), cfg.seed, step, cfg.batch_size)
        mine = dist.share(order, training.rank)
        mine = records.take(mine, lambda numbers: [trajectories[k] for k in numbers])
        episodes, homes = dist.gather_items(mine)
        return episodes, homes, records.num_replaced(order, episodes)


def sft_loss(training: Training, episodes: list[Episode], scale: float) -> torch.Tensor:
    """Cross entropy of a micro-batch's trained tokens, each times `scale`."""
    batch = training.pack(episodes, training.encoder)
    scale_M = torch.full_like(batch.sampled_logp_M, scale)
    head_VD = training.computing.head_weight_VD
    hidden_MD = training.hidden(batch)
    return fused_linear_cross_entropy(hidden_MD, head_VD, batch.targets_M, scale_M)[0]


def make_default_data() -> None:
    """Render the arena and write the scripted teacher's trajectories, where they are missing."""
    if not Config.data.exists():
        arena.main(arena.Config())
        teacher.main(teacher.Config())


def main(cfg: Config) -> None:
    training = Training(cfg, "SFT")
    if cfg.data == Config.data:
        dist.once(make_default_data)
    rows = read_records(cfg.data)  # before a model is downloaded for nothing
    training.load()
    records = Records(cfg.data, rows, training.encoder)
    tokenizer = load_tokenizer(training.source)
    trajectories = Trajectories(records, tokenizer, cfg.episode_tokens, cfg.call_syntax)
    records.check(trajectories.__getitem__, cfg.max_unusable, training.rank, training.stage)

    held_out = heldout.of_sft(training, records) if cfg.eval_every else None

    for step in training.steps(held_out):
        episodes, homes, replaced = collect(training, trajectories, step)
        micro_batches, balance = training.deal(episodes, 1, homes)
        num_tokens = sum(sum(episode.mask) for episode in episodes)
        losses = []
        for numbers, counts in micro_batches:
            with training.stage("train"):
                chosen = [episodes[number] for number in numbers]
                loss = sft_loss(training, chosen, counts / num_tokens)
                loss.backward()
                losses.append(loss.detach())
        update = training.update(step, losses, episodes)

        row = {"step": step, "loss": update.loss, "grad_norm": update.grad_norm, "lr": update.lr}
        row |= {"tokens": num_tokens, "skipped": int(update.skipped), "balance": balance}
        row["replaced"] = replaced
        training.log(row, shown=("loss",))


if __name__ == "__main__":
    cli.run(main, Config, presets.SFT)
