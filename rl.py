"""Stage 2: GRPO with the gated tool-use reward, on whole multi-turn episodes.

    python rl.py                            # from out/sft (else the shipped SFT model)
    torchrun --nproc-per-node 8 rl.py 7b    # the paper's recipe
    torchrun --nproc-per-node 2 rl.py --model out/my-sft/model --data my/rl.jsonl --lr 1e-6
    python rl.py --resume

A step: sample `group_size` episodes of each question → reward each → advantage inside the group →
policy loss on the sampled tokens → update. Absent on purpose: a value network, replay,
length shaping.
"""

from nanosport import cli  # isort: skip (first: with it Ctrl-C ends the imports in one line)

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Literal

import torch

from data_prep import arena
from kernels.policy_loss import (
    Objective,
    PolicyStats,
    TokenInputs,
    fused_linear_policy_loss,
    linear_logprobs,
)
from nanosport.env.env import Limits
from nanosport.env.judge import MAX_UNGRADED, judge_of
from nanosport.env.reward import BY_CLASS, flat_groups
from nanosport.fields import MAY_CHANGE, Above, AtLeast, AtMost, Share
from nanosport.model import lora
from nanosport.model.folder import ASSETS
from nanosport.records import Episode, Question, read_records
from nanosport.train import dist, presets
from nanosport.train.actors import Actors, Draw, RolloutConfig
from nanosport.train.heldout import HeldOut
from nanosport.train.inputs import MAX_UNUSABLE, Records
from nanosport.train.metrics import (
    TokenMeans,
    check_gap,
    check_rollouts,
    log_row,
    rollout_stats,
)
from nanosport.train.pack import Batch
from nanosport.train.rollouts import Rollouts, gathered, keep
from nanosport.train.training import Training
from nanosport.train.variants import (
    BOUNDS,
    LAGGING_CAP,
    VARIANTS,
    group_advantages,
    near,
    token_scale,
)


@dataclass(frozen=True)
class Config(RolloutConfig):
    model: str | None = None
    """The SFT model: a folder, or a hub id. Default: out/sft/model where train.py left one, else
    the shipped assets/nano-sft."""
    data: Path = Path("out/arena/rl.jsonl")
    """Questions with checkable answers, one JSON object a line. The default is rendered where it is
    missing."""
    out: Path = Path("out/rl")
    steps: int = 40
    lr: float = 7e-4
    warmup: int = 5
    weight_decay: float = 0.0
    save_every: int = 20
    adam_eps: float = 3e-3
    updates: Annotated[int, AtLeast(1)] = 1
    """Optimizer updates of a step, each on a part of the questions; with more than 1 the ratio
    leaves 1 and is clipped."""
    judge_url: Annotated[str | None, MAY_CHANGE] = None
    """OpenAI-compatible endpoint, up to and with /v1, of a language model that scores open answers;
    else the words that they share do, in order."""
    judge: str = ""
    """The judge's name there. The key is read from JUDGE_API_KEY; verdicts are kept in
    `out`/answers."""
    judge_wait_s: Annotated[float, AtLeast(0), MAY_CHANGE] = 600.0
    """A judge that is away is waited for so long; then the run is saved, and ends."""
    max_ungraded: Annotated[Share, MAY_CHANGE] = MAX_UNGRADED
    """An answer without a grade is scored by rule and counted; above this share of them the run is
    saved, and ends."""
    loss: Literal[tuple(VARIANTS)] = "grpo"
    """The variant: nanosport/train/variants.py has them in a table."""
    clip_low: Annotated[float | None, Above(0), AtMost(1)] = None
    """The ratio is clipped to 1 − clip_low … 1 + clip_high. None: as the variant has it."""
    clip_high: Annotated[float | None, Above(0)] = None
    """None: as the variant has it, which for grpo and dr_grpo is clip_low."""
    kl: Annotated[float, AtLeast(0)] = 0.03
    """β, weight of KL(policy ‖ SFT model)."""
    entropy_bonus: Annotated[float, AtLeast(0)] = 0.0
    """η, weight of the policy's entropy; 0.001 is a usual start."""
    max_unusable: Annotated[Share, MAY_CHANGE] = MAX_UNUSABLE
    """Questions that cannot be used are left out, up to this share of them."""
    min_format_rate: Annotated[Share, MAY_CHANGE] = 0.8
    """RL does not start below this share of valid episodes in its first rollouts: a half-done SFT
    loses the tool."""
    min_tool_rate: Annotated[Share, MAY_CHANGE] = 0.05
    """RL stops when five steps in a row call the tool less often."""
    max_logprob_gap: Annotated[float, AtLeast(0), MAY_CHANGE] = 0.1
    """RL stops when |rollout − trainer log-prob| is larger on average: the two are then not the
    same model."""

    def check(self) -> None:
        """Raise ValueError for values that no run can use."""
        super().check()
        if self.loss == "gspo" and self.rollout_cap is not None:
            raise ValueError(
                "--rollout-cap weighs tokens, --loss gspo whole sequences: leave one of them out"
            )
        if self.loss == "gspo" and self.rollout_mask == "token":
            rule = "takes tokens, --loss gspo whole sequences: choose sequence or geometric"
            raise ValueError(f"--rollout-mask token: {rule}")
        if self.judge_url and 0 < self.stuck_after_s <= self.judge_wait_s:
            raise ValueError(f"--judge-wait-s {self.judge_wait_s}: must be below --stuck-after-s")
        if self.updates > self.num_prompts:
            rule = f"must be at most --num-prompts {self.num_prompts}"
            raise ValueError(f"--updates {self.updates}: {rule}")

    @property
    def objective(self) -> Objective:
        """The constants of the loss."""
        variant = VARIANTS[self.loss]
        low = variant.clip_low if self.clip_low is None else self.clip_low
        high = variant.clip_high if self.clip_high is None else self.clip_high
        return Objective(
            self.temperature,
            low,
            low if high is None else high,
            self.kl,
            self.entropy_bonus,
            self.cap_of(self.loss) or LAGGING_CAP,
            variant.likelihood,
        )


def collect(training: Training, actors: Actors, records: Records, step: int) -> Rollouts:
    """A step's scored episodes, of every rank. With --refill, groups from which there is nothing to
    learn are replaced by those of further questions.

    Raises Preempted after SIGTERM, ValueError where the judge fails.
    """
    size, num_prompts = training.cfg.group_size, training.cfg.num_prompts
    rollouts = gathered(training, actors, records, Draw(step))
    flat = flat_groups(rollouts.rewards, size)
    num_flat = len(flat)
    for again in range(1, training.cfg.refill + 1):
        if flat:
            more = gathered(training, actors, records, Draw(step, again, len(flat)))
            rollouts = rollouts.refilled(flat, more, size)
            flat = flat_groups(rollouts.rewards, size)
    actors.sampler.sleep()
    refills = {"flat_groups": num_flat / num_prompts, "refilled": num_flat - len(flat)}
    return replace(rollouts, work=rollouts.work | refills)


@dataclass(frozen=True)
class Micro:
    """A micro-batch, with what the loss must know of its tokens."""

    batch: Batch
    tokens: TokenInputs
    counts: bool
    """False where this rank only goes through the layers together with the others."""


@dataclass(frozen=True)
class Part:
    """What one update of a step learns from."""

    episodes: list[Episode]
    """Those of every rank."""
    micro_batches: list[Micro]
    """Those of this rank."""
    balance: float
    """The share of the time in which the ranks work, and do not wait for each other."""


@torch.no_grad()
def prepare(
    training: Training, actors: Actors, rollouts: Rollouts, advantages: torch.Tensor, update: int
) -> Part:
    """Pack the episodes of an update, and compute their old and reference log-probs."""
    cfg = training.cfg
    with training.stage("reference"):
        part = [
            k for k in range(len(rollouts.episodes)) if k // cfg.group_size % cfg.updates == update
        ]
        episodes = [rollouts.episodes[k] for k in part]
        homes = [rollouts.homes[k] for k in part]
        micro_batches, balance = training.deal(episodes, cfg.group_size, homes)

        # what each episode's tokens weigh, counted over all ranks
        lengths = [sum(episode.mask) for episode in episodes]
        totals = (len(episodes), sum(lengths), cfg.max_new_tokens * cfg.max_turns)
        scales = torch.tensor([token_scale(cfg.loss, length, *totals) for length in lengths])
        micros = []
        for numbers, counts in micro_batches:
            batch = training.pack([episodes[k] for k in numbers], actors.encoder)
            weights = advantages[part][numbers], counts * scales[numbers]
            tokens = token_inputs(training, actors, batch, *weights)
            micros.append(Micro(batch, tokens, counts))
    return Part(episodes, micros, balance)


def token_inputs(
    training: Training, actors: Actors, batch: Batch, advantages: torch.Tensor, scales: torch.Tensor
) -> TokenInputs:
    """What the loss must know of a batch's tokens. advantages, scales: one for each episode."""
    cfg, model, device = training.cfg, training.computing, training.device
    reference, banned, temperature = actors.reference, actors.sampler.banned, cfg.temperature
    episode_M = batch.episode_M

    def logprobs(model, batch: Batch) -> torch.Tensor:
        """Log-probs through the path that the loss takes."""
        head_VD, targets_M = model.head_weight_VD, batch.targets_M
        return linear_logprobs(batch.hidden_MD(model), head_VD, targets_M, temperature, banned)[0]

    masks, scale_M = cfg.rollout_mask != "none", scales.to(device)[episode_M]
    old_M = logprobs(model, batch) if cfg.updates > 1 or masks else None
    if masks:
        bound = cfg.rollout_bound or BOUNDS[cfg.rollout_mask]
        scale_M = scale_M * near(cfg.rollout_mask, bound, old_M - batch.sampled_logp_M, episode_M)
    ref_M = None
    if reference is not None:
        with lora.off(reference):
            features_ND = actors.ref_encoder.features(batch.frames)
            ref_M = logprobs(reference, replace(batch, features_ND=features_ND))
    return TokenInputs(
        batch.targets_M,
        advantages.to(device)[episode_M],
        scale_M,
        old_M,
        ref_M,
        batch.sampled_logp_M if cfg.cap_of(cfg.loss) is not None else None,
        episode_M if VARIANTS[cfg.loss].per_sequence else None,
    )


def policy_loss(
    training: Training, actors: Actors, micro: Micro
) -> tuple[torch.Tensor, PolicyStats]:
    """The loss of a micro-batch, differentiable, and what it has come through."""
    batch = micro.batch
    if not training.cfg.frozen:  # the tower's gradient needs a forward pass of its own
        batch = replace(batch, features_ND=training.encoder.features(batch.frames))
    hidden_MD, head_VD = training.hidden(batch), training.computing.head_weight_VD
    objective, banned = training.cfg.objective, actors.sampler.banned
    return fused_linear_policy_loss(hidden_MD, head_VD, micro.tokens, objective, banned)


def read_data(cfg: Config) -> list[tuple[Question, list[str]]]:
    """The records to train on. Raises ValueError where one has no pass rate that the reward
    needs."""
    rows = read_records(cfg.data)
    unmeasured = next((q for q, _ in rows if q.pass_rate is None), None)
    if cfg.reward in BY_CLASS and unmeasured:
        raise ValueError(
            f"{cfg.data}: {unmeasured.id} has no pass_rate, which --reward {cfg.reward} needs: "
            f"python -m data_prep.difficulty {cfg.data}"
        )
    return rows


def main(cfg: Config) -> None:
    if cfg.model is None:
        left_by_sft = Path("out/sft/model")
        cfg = replace(cfg, model=str(left_by_sft if left_by_sft.exists() else ASSETS / "nano-sft"))
    how = {"wait_s": cfg.judge_wait_s, "max_ungraded": cfg.max_ungraded}
    judge = judge_of(cfg.judge_url, cfg.judge, cfg.out / "answers", **how)
    training = Training(cfg, "RL")
    if cfg.num_prompts < training.world * cfg.updates:
        raise ValueError(
            f"--num-prompts {cfg.num_prompts}: must be at least one for each of {training.world} "
            f"processes × {cfg.updates} updates"
        )
    if cfg.data == Config.data:
        dist.once(lambda: cfg.data.exists() or arena.main(arena.Config()))
    rows = read_data(cfg)
    training.load()
    actors = Actors(training, judge)
    records = Records(cfg.data, rows, actors.encoder)
    how = (cfg.max_unusable, training.rank, training.stage)
    records.check_prompts(actors.sampler.tokenizer, [actors.limits], *how)

    held_out = None
    if cfg.eval_every:
        limits = replace(actors.limits, num_frames=Limits.num_frames, frames_drawn=())
        players = actors.sampler, actors.encoder
        held_out = HeldOut(training, records, *players, limits, judge)

    for step in training.steps(held_out):
        rollouts = collect(training, actors, records, step)
        stats = rollout_stats(rollouts.episodes, rollouts.rewards, step)
        check_rollouts(training, stats, step)
        rewards = [reward.total for reward in rollouts.rewards]
        advantages = group_advantages(rewards, cfg.group_size, cfg.loss)
        with training.stage("keep"):
            keep(training, actors, rollouts, advantages, step)
        # all before the first update: old log-probs are those of the policy that has sampled
        parts = [
            prepare(training, actors, rollouts, advantages, update) for update in range(cfg.updates)
        ]

        updates, means = [], TokenMeans()
        for part in parts:
            losses = []
            for micro in part.micro_batches:
                with training.stage("train"):
                    loss, token_stats = policy_loss(training, actors, micro)
                    loss.backward()
                    if micro.counts:
                        losses.append(loss.detach())
                        means.add(token_stats, micro.batch, micro.tokens)
            updates.append(training.update(step, losses, part.episodes))
        actors.publish(step + 1)

        balance = sum(part.balance for part in parts) / len(parts)
        totals = means.over_ranks(training.device)
        row = log_row(step, stats, totals, updates, balance, rollouts.replaced) | rollouts.work
        check_gap(row, cfg.max_logprob_gap)
        shown = ("reward", "accuracy", "tool_rate", "format_rate")
        training.log(row, shown, rollouts.episodes, rewards)


if __name__ == "__main__":
    cli.run(main, Config, presets.RL)
