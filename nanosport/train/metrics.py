"""What RL's log says of a step. docs/metrics.md says what each figure means."""

from collections import Counter
from collections.abc import Sequence

import torch

from kernels.policy_loss import PolicyStats, TokenInputs
from nanosport.env.reward import Reward
from nanosport.env.tools import REPEATED
from nanosport.records import Episode
from nanosport.train import dist
from nanosport.train.pack import Batch
from nanosport.train.training import Training, Update


def rollout_stats(
    episodes: Sequence[Episode], rewards: Sequence[Reward], step: int
) -> dict[str, float]:
    """Means over a step's episodes."""
    lags = [step - turn.version for episode in episodes for turn in episode.turns]
    shown = [[t.window for t in e.turns if t.action == "tool"] for e in episodes]
    refused = [any(REPEATED in (t.error or "") for t in e.turns) for e in episodes]
    sums = {
        "reward": sum(r.total for r in rewards),
        "accuracy": sum(r.accuracy for r in rewards),
        "tool_reward": sum(r.tool * r.format for r in rewards),
        "tool_rate": sum(r.used_tool for r in rewards),
        "new_frames": sum(r.new_frames for r in rewards),
        "format_rate": sum(r.format for r in rewards),
        "repeat_rate": sum(was or len({*seen}) < len(seen) for was, seen in zip(refused, shown)),
        "frames": sum(len(e.frames) for e in episodes),
        "turns": sum(len(e.turns) for e in episodes),
    }
    means = {name: value / len(episodes) for name, value in sums.items()}
    means["staleness"] = sum(lags) / max(1, len(lags))
    return means | {"ungraded": sum(r.ungraded for r in rewards)}


class TokenMeans:
    """Means over a step's sampled tokens, of all ranks."""

    NAMES = (
        "kl", "entropy", "clipped", "masked", "gap_text", "gap_image", "tokens", "image_tokens",
    )  # fmt: skip

    def __init__(self):
        self.sums: list[torch.Tensor] = []

    def add(self, stats: PolicyStats, batch: Batch, tokens: TokenInputs) -> None:
        """Add a micro-batch. No old_logp_M: `stats` has the policy before its update."""
        after_image_M = batch.after_image_M
        logp_M = stats.logp_M if tokens.old_logp_M is None else tokens.old_logp_M
        gap_M = (logp_M - batch.sampled_logp_M).abs()
        values = (stats.kl_M, stats.entropy_M, stats.clipped_M, tokens.scale_M == 0)
        # not gap_M[after_image_M]: a GPU would be waited for, to know how many they are
        values += tuple(gap_M.where(rows_M, 0.0) for rows_M in (~after_image_M, after_image_M))
        values += (torch.ones_like(gap_M), after_image_M)
        self.sums.append(torch.stack([values_M.sum().double() for values_M in values]))

    def over_ranks(self, device) -> dict[str, float]:
        """The means, by their names in the log. All ranks must call this."""
        zeros = torch.zeros(len(self.NAMES), dtype=torch.float64, device=device)
        sums = dict(zip(self.NAMES, dist.total(sum(self.sums, zeros).tolist(), device)))
        tokens, image_tokens = sums["tokens"], sums["image_tokens"]
        return {
            "kl": sums["kl"] / tokens,
            "clip_fraction": sums["clipped"] / tokens,
            "masked": sums["masked"] / tokens,
            "entropy": sums["entropy"] / tokens,
            "logprob_gap_text": sums["gap_text"] / max(1.0, tokens - image_tokens),
            "logprob_gap_after_image": sums["gap_image"] / max(1.0, image_tokens),
            "tokens": int(tokens),
        }


WORK = (
    "tokens_read", "decode_steps", "rows_put_back", "pages", "frames_decoded", "frames_cached",
    "seconds_read", "seconds_speak", "seconds_video", "seconds_tower",
    "servers_lost", "asked_again",
)  # fmt: skip


def take_work(*counters: Counter) -> dict[str, float]:
    """What a rank's sampler and encoder have done in a step; they begin to count anew."""
    counts = sum(counters, Counter())
    for counter in counters:
        counter.clear()
    return {name: counts[name] for name in WORK}


def log_row(
    step: int,
    stats: dict,
    means: dict,
    updates: Sequence[Update],
    balance: float,
    replaced: int = 0,
) -> dict[str, float]:
    """A step's line of the log. balance: the share of the time in which the ranks do not wait.
    replaced: how many questions stand in for one whose video is lost."""
    learnt = sum(update.loss for update in updates if not update.skipped)
    return {
        "step": step,
        "loss": learnt / len(updates),
        **stats,
        **means,
        "grad_norm": updates[-1].grad_norm,
        "skipped": sum(update.skipped for update in updates),
        "lr": updates[-1].lr,
        "balance": balance,
        "replaced": replaced,
    }


def check_gap(row: dict[str, float], most: float) -> None:
    """Raise ValueError where sampler and trainer are not the same model any more."""
    text, after_image = row["logprob_gap_text"], row["logprob_gap_after_image"]
    if not row["skipped"] and not max(text, after_image) <= most:
        raise ValueError(
            f"step {row['step']}: rollout and trainer log-probs differ by {text:.3f} (text) and "
            f"{after_image:.3f} (after images) on average, above --max-logprob-gap {most}"
        )


def check_rollouts(training: Training, stats: dict[str, float], step: int) -> None:
    """Raise ValueError for a run that is lost: one whose model does not hold the format yet when it
    starts, or has stopped calling the tool."""
    cfg = training.cfg
    if step == 0 and stats["format_rate"] < cfg.min_format_rate:
        raise ValueError(
            f"{cfg.model}: only {stats['format_rate']:.0%} of its sampled episodes have a valid "
            f"format, --min-format-rate asks for {cfg.min_format_rate:.0%}: train SFT longer first "
            "(train.py --steps)"
        )
    before = training.state.get("starved", 0)
    starved = before + 1 if stats["tool_rate"] < cfg.min_tool_rate else 0
    training.state["starved"] = starved
    if starved == 5:
        raise ValueError(
            f"step {step}: the tool was called in less than {cfg.min_tool_rate:.0%} of the "
            "episodes for five steps; lower --lr, raise --kl, or train SFT longer "
            "(--min-tool-rate 0 goes on)"
        )
