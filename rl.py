"""Stage 2: GRPO with the gated tool-use reward, on whole multi-turn episodes.

    python rl.py                                       # from out/sft (else the shipped SFT model), on the built-in arena
    torchrun --nproc-per-node 8 rl.py 7b               # the paper's recipe on one node, from out/sft_7b and out/splits/rl.jsonl
    torchrun --nproc-per-node 2 rl.py --model out/my-sft/model --data my/rl.jsonl --lr 1e-6 --adam-eps 1e-8
    python rl.py --resume

A step: sample `group_size` episodes a question → reward each → advantage inside the group → policy loss on the sampled
tokens → update. Left out of GRPO on purpose: a value network, replay, length shaping, filtering of groups.
"""

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
from tqdm import tqdm

from data_prep import arena
from kernels.policy_loss import Objective, fused_linear_policy_loss, linear_logprobs
from nanosport import checkpoint, cli, dist, optim, presets
from nanosport.batch import data_order, deal, make_units, pack
from nanosport.endpoint import Endpoint
from nanosport.engine import Engine, Sampling
from nanosport.episode import Episode, read_questions
from nanosport.faults import Preempted, Preemption, Skips, Stages
from nanosport.frames import FrameEncoder
from nanosport.image import ImageConfig
from nanosport.judge import Judge, accuracy
from nanosport.load import load_model, load_tokenizer, resolve
from nanosport.log import Run
from nanosport.loss import group_advantages, token_scale
from nanosport.reward import Reward, gated_reward
from nanosport.rollout import Loop, rollout


@dataclass(frozen=True)
class Config:
    model: str | None = None
    """The SFT model: a folder, or a hub id. Default: out/sft/model where train.py left one, else the shipped assets/nano-sft."""
    data: Path = Path("out/arena/rl.jsonl")
    """Questions with checkable answers, one JSON object a line."""
    out: Path = Path("out/rl")
    """Run folder: model/, log.jsonl, run.json."""
    steps: int = 40
    num_prompts: int = 32
    """Questions a step, over all ranks."""
    group_size: int = 8
    """Episodes of each question."""
    rollout_batch: int = 256
    """Episodes a rank samples at a time; it changes memory and time, not what is drawn."""
    updates: int = 1
    """Optimizer updates a step, each on a part of the questions; with more than 1 the ratio leaves 1 and is clipped."""
    reward: Literal["v1", "v2"] = "v1"
    """v1: any useful tool call is paid. v2: only where the base model fails on the overview, and elsewhere doing without it; the
    questions then need a pass_rate (python -m data_prep.difficulty)."""
    solved_rate: float = 0.75
    """v2: the base model succeeds where its pass rate is at least this. At 0.5 a fifth of the arena's guesses would count as knowledge."""
    judge_url: str | None = None
    """OpenAI-compatible endpoint, up to and with /v1, of a language model that scores open answers; else the F1 of their words does."""
    judge: str = ""
    """Its name there. The key is read from JUDGE_API_KEY; verdicts are kept in `out`/answers."""
    loss: Literal["grpo", "dapo", "dr_grpo", "cispo", "gspo"] = "grpo"
    clip_low: float | None = None
    """The ratio is clipped to 1 − clip_low … 1 + clip_high. None: 0.2; gspo 0.0003 (its ratio is a whole sequence's); cispo 1, no bound."""
    clip_high: float | None = None
    """None: as clip_low; dapo 0.28 (clip-higher), gspo 0.0004, cispo 4."""
    kl: float = 0.03
    """β, weight of KL(policy ‖ SFT model)."""
    entropy_bonus: float = 0.0
    """η, weight of the policy's entropy; 0.001 is a usual start."""
    rollout_cap: float | None = None
    """Weigh each token by min(trainer's ÷ sampler's probability, this), for samplers that drift from the trainer. None: do not."""
    lr: float = 7e-4
    """Peak learning rate: linear warm-up, cosine decay to a tenth."""
    warmup: int = 5
    weight_decay: float = 0.0
    adam_eps: float = 3e-3
    """Adam divides by √v + this. At 1e-8 every weight moves by about lr, signal or noise; at ten times the gradient's root mean
    square the update follows the gradient itself."""
    max_grad_norm: float = 1.0
    temperature: float = 0.8
    """Of the sampler, and of the log-probs in the loss."""
    max_new_tokens: int = 160
    """Of one assistant turn."""
    max_turns: int = 5
    episode_tokens: int = 16_384
    """Of a whole episode, frames included; one that reaches it is ended."""
    micro_tokens: int = 16_384
    """Tokens a micro-batch holds at most, on one rank; it changes memory, not gradients."""
    share_prefix: bool = True
    """Compute what episodes begin with alike once; it changes time and memory, not gradients."""
    freeze_vision: bool = True
    """Leave the vision tower as it is."""
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
    min_format_rate: float = 0.8
    """RL does not start below this share of valid episodes in its first rollouts: a half-done SFT loses the tool."""
    min_tool_rate: float = 0.05
    """RL stops when five steps in a row call the tool less often."""
    max_logprob_gap: float = 0.1
    """RL stops when |rollout − trainer log-prob| is on average larger: the two are then not the same model."""
    seed: int = 0
    save_every: int = 20
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
        cli.at_least(1, steps=self.steps, num_prompts=self.num_prompts, updates=self.updates, save_every=self.save_every)
        cli.at_least(
            1, keep=self.keep, micro_tokens=self.micro_tokens, max_pixels=1 if self.max_pixels is None else self.max_pixels
        )
        cli.at_least(0, kl=self.kl, recompute_every=self.recompute_every, stuck_after_s=self.stuck_after_s, warmup=self.warmup)
        cli.at_least(2, group_size=self.group_size)
        cli.above(0, lr=self.lr, temperature=self.temperature, max_grad_norm=self.max_grad_norm)
        cli.above(0, clip_low=self.objective.clip_low, clip_high=self.objective.clip_high, rollout_cap=self.objective.rollout_cap)
        if self.judge_url and not self.judge:
            raise ValueError("--judge-url needs --judge, the model's name there")
        if self.loss == "gspo" and self.rollout_cap is not None:
            raise ValueError("--rollout-cap weighs tokens, --loss gspo whole sequences: leave one of them out")
        if self.updates > self.num_prompts:
            raise ValueError(f"--updates {self.updates}: at most one for each of --num-prompts {self.num_prompts}")

    @property
    def objective(self) -> Objective:
        low, high = {"dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0)}.get(self.loss, (0.2, None))
        low = low if self.clip_low is None else self.clip_low
        high = self.clip_high if self.clip_high is not None else low if high is None else high
        cap = 2.0 if self.rollout_cap is None else self.rollout_cap
        return Objective(self.temperature, low, high, self.kl, self.entropy_bonus, cap, likelihood=self.loss == "cispo")


RESUMABLE = (
    "model", "data", "steps", "num_prompts", "group_size", "updates", "reward", "solved_rate", "judge", "loss", "clip_low", "clip_high", "kl", "entropy_bonus",
    "rollout_cap", "warmup", "weight_decay", "adam_eps", "temperature", "max_new_tokens", "max_turns",
    "episode_tokens", "freeze_vision", "freeze_projector", "max_pixels", "dtype", "seed",
)  # fmt: skip
"""Flags that a run keeps when it is resumed; --lr and --max-grad-norm may change, for one that must calm down."""


@torch.no_grad()
def logprobs(model, batch, temperature: float, banned: torch.Tensor) -> torch.Tensor:
    """logp_M of the batch's sampled tokens, through the path the loss takes."""
    hidden_TD = model.hidden(batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys)
    return linear_logprobs(hidden_TD[batch.rows_M], model.head_weight_VD, batch.targets_M, temperature, banned)[0]


def main(cfg: Config) -> None:
    cfg.check()
    rank, world, device = dist.start()
    dtype = dist.dtype_of(cfg.dtype, device)
    if cfg.num_prompts < world * cfg.updates:
        raise ValueError(
            f"--num-prompts {cfg.num_prompts}: must be at least one for each of {world} processes × {cfg.updates} updates"
        )
    if cfg.data == Config.data and not cfg.data.exists():
        if rank == 0:
            arena.main(arena.Config())
        dist.barrier()

    questions = read_questions(cfg.data)
    if cfg.reward == "v2" and (unmeasured := next((q for q in questions if q.pass_rate is None), None)):
        raise ValueError(
            f"{cfg.data}: {unmeasured.id} has no pass_rate, which --reward v2 needs: python -m data_prep.difficulty {cfg.data}"
        )
    if cfg.model is None:
        default = "out/sft/model" if Path("out/sft/model").exists() else "assets/nano-sft"
        cfg = replace(cfg, model=default)
    source = resolve(cfg.model)
    run = Run(cfg.out, cfg, cfg.resume, cfg.overwrite) if rank == 0 else None
    dist.check_shared(cfg.out / "run.json")
    stages, preemption, skips = Stages(rank, cfg.stuck_after_s), Preemption(), Skips(cfg.out, rank)
    torch.manual_seed(cfg.seed)
    model = load_model(source, device)
    model.recompute_every = model.visual.recompute_every = cfg.recompute_every
    optim.trainable(model, cfg.freeze_vision, cfg.freeze_projector)
    dist.shard(model, dtype, device)
    # who samples needs whole weights: the model itself where it is not sharded, else a copy in the compute dtype
    sampler = load_model(source, device, dtype) if dist.sharded(model) else model
    reference = None
    if cfg.kl > 0:
        reference = dist.shard(load_model(source, device, dtype).requires_grad_(False), dtype, device)
    optimizer = optim.build(model, cfg.weight_decay, cfg.adam_eps, offload=cfg.offload_adam)
    settings = {key: str(getattr(cfg, key)) for key in RESUMABLE}
    state = checkpoint.load(cfg.out, model, optimizer, settings) if cfg.resume else {"step": 0, "starved": 0}
    dist.copy_weights(model, sampler)
    first, starved = state["step"], state["starved"]
    if run and cfg.resume:
        run.rewind(first)
    checkpoints = checkpoint.Checkpoints(cfg.out, source, rank, dtype, cfg.keep, cfg.max_pixels)

    tokenizer, image = load_tokenizer(source), ImageConfig.from_folder(source, cfg.max_pixels)
    frozen = cfg.freeze_vision and cfg.freeze_projector
    encoder = FrameEncoder(sampler, image)
    ref_encoder = encoder if frozen or reference is None else FrameEncoder(reference, image)
    learning_encoder = encoder if frozen else FrameEncoder(model, image, frozen=False)
    engine = Engine(sampler, tokenizer, Sampling(cfg.temperature, max_new_tokens=cfg.max_new_tokens))
    loop = Loop(max_turns=cfg.max_turns, max_tokens=cfg.episode_tokens)
    judge = Judge(Endpoint(cfg.judge_url, cfg.judge, cfg.out / "answers", key_name="JUDGE_API_KEY")) if cfg.judge_url else None

    def save(next_step: int) -> None:
        with stages("save"):
            checkpoints.save(model, optimizer, {"step": next_step, "starved": starved, "settings": settings})

    bar = tqdm(range(first, cfg.steps), initial=first, total=cfg.steps, desc="RL", disable=rank > 0)
    for step in bar:
        stages.new_step(step)
        with stages("rollout"):
            picked = data_order(len(questions), cfg.seed, step, cfg.num_prompts)
            mine, place = dist.share(picked, rank), dist.share(range(cfg.num_prompts), rank)[0]
            seed = (cfg.seed, step)
            episodes, together = [], max(1, cfg.rollout_batch // cfg.group_size)
            for start in range(0, len(mine), together):
                asked = [questions[k] for k in mine[start : start + together]]
                episodes += rollout(engine, encoder, asked, loop, cfg.group_size, seed, first=place + start)

        with stages("judge"):
            answers, asked = [e.answer for e in episodes], [e.question for e in episodes]
            scores = judge.answers(answers, asked) if judge else map(accuracy, answers, asked)
            rewards = [gated_reward(e, cfg.reward, acc, cfg.solved_rate) for e, acc in zip(episodes, scores)]
        with stages("gather"):  # frames are known by index: an episode is small
            shares, stopping = zip(*dist.gather((list(zip(episodes, rewards)), preemption.asked)))
        if any(stopping):  # an update would take long; without it, this step can be done again
            save(step)
            checkpoints.finish()
            raise Preempted(f"stopped by SIGTERM in step {step}; what was before it is saved, --resume goes on")
        episodes, rewards = map(list, zip(*(pair for share in shares for pair in share)))
        homes = [r for r, share in enumerate(shares) for _ in share]
        advantages = group_advantages([r.total for r in rewards], cfg.group_size, cfg.loss)
        stats = rollout_stats(episodes, rewards)
        check_rollout(cfg, stats, step)
        starved = starved + 1 if stats["tool_rate"] < cfg.min_tool_rate else 0
        if starved == 5:
            raise ValueError(
                f"step {step}: the tool was called in less than {cfg.min_tool_rate:.0%} of the episodes for five steps; "
                "lower --lr, raise --kl, or train SFT longer (--min-tool-rate 0 goes on)"
            )

        work, balances = [], []  # one list of (batch, episode numbers, whether they count, old, ref) an update
        with stages("reference"), torch.no_grad():
            for update in range(cfg.updates):
                part = [k for k in range(len(episodes)) if k // cfg.group_size % cfg.updates == update]
                shared, its_homes = [episodes[k] for k in part], [homes[k] for k in part]
                units = make_units(shared, cfg.group_size, its_homes, model.cfg, cfg.micro_tokens, cfg.share_prefix)
                dealt, balance = deal(units, world, cfg.micro_tokens, frozen)
                balances.append(balance)
                work.append([])
                for places in dealt[rank]:
                    # where there are more ranks than groups, one idles on another's: all ranks go through the layers together
                    chosen = [part[j] for j in places or (0,)]
                    batch = pack([episodes[k] for k in chosen], encoder, model.cfg, device, cfg.share_prefix)
                    old = logprobs(model, batch, cfg.temperature, engine.banned) if cfg.updates > 1 else None
                    ref = None
                    if reference is not None:
                        theirs = replace(batch, features_ND=ref_encoder.features(batch.frames))
                        ref = logprobs(reference, theirs, cfg.temperature, engine.banned)
                    work[-1].append((batch, chosen, bool(places), old, ref))

        sums = dict.fromkeys(("loss", "kl", "entropy", "clipped", "gap_text", "gap_image", "tokens", "image_tokens"), 0.0)
        skipped, lengths = 0, [sum(e.mask) for e in episodes]
        for update, batches in enumerate(work):
            part = [k for k in range(len(episodes)) if k // cfg.group_size % cfg.updates == update]
            num_tokens, limit = sum(lengths[k] for k in part), cfg.max_new_tokens * cfg.max_turns
            loss_sum = 0.0
            optimizer.zero_grad()
            with stages("train"):
                for batch, chosen, counts, old, ref in batches:
                    if not frozen:  # the tower's gradient needs a forward pass of its own
                        batch = replace(batch, features_ND=learning_encoder.features(batch.frames))
                    hidden_TD = model.hidden(batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys)
                    weigh = [counts * token_scale(cfg.loss, lengths[k], len(part), num_tokens, limit) for k in chosen]
                    loss, out = fused_linear_policy_loss(
                        hidden_TD[batch.rows_M],
                        model.head_weight_VD,
                        batch.targets_M,
                        advantages[chosen].to(device)[batch.episode_M],
                        old,
                        ref,
                        batch.sampled_logp_M if cfg.rollout_cap is not None else None,
                        torch.tensor(weigh, device=device)[batch.episode_M],
                        cfg.objective,
                        banned=engine.banned,
                        sequence_M=batch.episode_M if cfg.loss == "gspo" else None,
                    )
                    loss.backward()
                    if not counts:
                        continue
                    gap_M = ((old if old is not None else out.logp_M) - batch.sampled_logp_M).abs()
                    loss_sum += loss.item()
                    sums["kl"] += out.kl_M.sum().item()
                    sums["entropy"] += out.entropy_M.sum().item()
                    sums["clipped"] += out.clipped_M.sum().item()
                    sums["gap_text"] += gap_M[~batch.after_image_M].sum().item()
                    sums["gap_image"] += gap_M[batch.after_image_M].sum().item()
                    sums["tokens"] += len(gap_M)
                    sums["image_tokens"] += batch.after_image_M.sum().item()
            with stages("update"):
                (loss_sum,) = dist.total([loss_sum], device)
                grad_norm = optim.clip(model, cfg.max_grad_norm)
                lr = optim.set_lr(optimizer, step, cfg.lr, cfg.warmup, cfg.steps)
                if skips.bad(step, loss_sum, grad_norm, [episodes[k] for k in part]):
                    skipped += 1
                else:
                    sums["loss"] += loss_sum / world  # summed over the ranks below
                    optimizer.step()
        with stages("weights to the sampler"):
            dist.copy_weights(model, sampler)
            if not frozen:
                encoder.forget()
            totals = dist.total([*sums.values(), float(preemption.asked)], device)

        sums, stop = dict(zip(sums, totals)), totals[-1] > 0
        tokens, image_tokens = sums["tokens"], sums["image_tokens"]
        row = {
            "step": step,
            "loss": sums["loss"] / cfg.updates,
            **stats,
            "kl": sums["kl"] / tokens,
            "clip_fraction": sums["clipped"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "logprob_gap_text": sums["gap_text"] / max(1.0, tokens - image_tokens),
            "logprob_gap_after_image": sums["gap_image"] / max(1.0, image_tokens),
            "grad_norm": grad_norm,
            "skipped": skipped,
            "lr": lr,
            "tokens": int(tokens),
            "balance": sum(balances) / len(balances),
            **{f"seconds_{stage.replace(' ', '_')}": s for stage, s in stages.seconds.items()},
        }
        gaps = row["logprob_gap_text"], row["logprob_gap_after_image"]
        if not skipped and not max(gaps) <= cfg.max_logprob_gap:
            raise ValueError(
                f"step {step}: rollout and trainer log-probs differ by {gaps[0]:.3f} (text) and {gaps[1]:.3f} (after images) on average, "
                f"above --max-logprob-gap {cfg.max_logprob_gap}"
            )
        if run:
            run.write(row)
            bar.set_postfix({k: f"{row[k]:.2f}" for k in ("reward", "accuracy", "tool_rate", "format_rate")})
        if (step + 1) % cfg.save_every == 0 or step + 1 == cfg.steps or stop:
            save(step + 1)
        if stop and step + 1 < cfg.steps:
            checkpoints.finish()
            raise Preempted(f"stopped by SIGTERM behind step {step}, which is saved; --resume goes on")
    checkpoints.finish()
    stages.close()
    if run:
        run.close()
        print(f"RL model in {run.model}")
    dist.barrier()


def rollout_stats(episodes: list[Episode], rewards: list[Reward]) -> dict[str, float]:
    """Means over the episodes of every rank."""
    repeats = [any("already returned" in (t.error or "") for t in e.turns) for e in episodes]
    sums = {
        "reward": sum(r.total for r in rewards),
        "accuracy": sum(r.accuracy for r in rewards),
        "tool_reward": sum(r.tool * r.format for r in rewards),
        "tool_rate": sum(r.used_tool for r in rewards),
        "format_rate": sum(r.format for r in rewards),
        "repeat_rate": sum(repeats),
        "frames": sum(len(e.frames) for e in episodes),
        "turns": sum(len(e.turns) for e in episodes),
    }
    return {name: value / len(episodes) for name, value in sums.items()}


def check_rollout(cfg: Config, stats: dict, step: int) -> None:
    """Refuse to start RL from a model that does not hold the format yet."""
    if step == 0 and stats["format_rate"] < cfg.min_format_rate:
        raise ValueError(
            f"{cfg.model}: only {stats['format_rate']:.0%} of its sampled episodes have a valid format, "
            f"--min-format-rate asks for {cfg.min_format_rate:.0%}: train SFT longer first (train.py --steps)"
        )


if __name__ == "__main__":
    cli.run(main, Config, presets.RL)
