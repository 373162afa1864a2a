"""The loss variants of GRPO: how rewards become advantages, and what each token weighs.

Let L_i be the trained tokens of episode i, N the episodes and T = Σ L_i, all counted over every
rank and micro-batch. A token's scale is then

    episode     1 / (N · L_i)        each episode weighs the same
    token       1 / T                each token weighs the same
    constant    1 / (N · L_max)      each token weighs the same, whatever the other episodes are
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch


@dataclass(frozen=True)
class Variant:
    """One row of the table below."""

    clip_low: float
    """The ratio is kept above 1 − clip_low …"""
    clip_high: float | None
    """… and below 1 + clip_high; None: as clip_low."""
    weigh: Literal["episode", "token", "constant"]
    divide_by_std: bool = True
    """A group's advantages are divided by the standard deviation of its rewards."""
    likelihood: bool = False
    """The clipped ratio weighs log π, where else it would stop the gradient."""
    per_sequence: bool = False
    """One ratio for the sequence: the geometric mean of its tokens'."""


VARIANTS = {
    "grpo": Variant(0.2, None, "episode"),
    "dapo": Variant(0.2, 0.28, "token"),
    "dr_grpo": Variant(0.2, None, "constant", divide_by_std=False),
    "cispo": Variant(1.0, 4.0, "token", likelihood=True),  # MiniMax-M1
    "gspo": Variant(3e-4, 4e-4, "episode", per_sequence=True),  # Qwen
}


def group_advantages(rewards: Sequence[float], group_size: int, variant: str) -> torch.Tensor:
    """A_i = (r_i − mean) / (std + 1e-4) inside each group of `group_size` neighbours."""
    # float64: in float32 equal rewards gave advantages of 1e-3
    rewards_GN = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)
    advantages_GN = rewards_GN - rewards_GN.mean(1, keepdim=True)
    if VARIANTS[variant].divide_by_std:
        advantages_GN = advantages_GN / (rewards_GN.std(1, keepdim=True, unbiased=False) + 1e-4)
    return advantages_GN.flatten().float()


def token_scale(
    variant: str, length: int, num_episodes: int, num_tokens: int, max_length: int
) -> float:
    """The scale of a token in an episode of `length` trained tokens; the counts are global."""
    weigh = VARIANTS[variant].weigh
    if weigh == "token":
        return 1.0 / num_tokens
    return 1.0 / (num_episodes * (length if weigh == "episode" else max_length))


LAGGING_CAP = 2.0
"""What importance weights are cut to where the sampler lags behind, unless a flag says it."""
BOUNDS = {"token": 2.0, "sequence": 2.0, "geometric": 1.05}
"""Off by more than this, in either direction, is too far, unless a flag says it."""


def near(rule: str, bound: float, log_ratio_M: torch.Tensor, episode_M: torch.Tensor):
    """Which tokens are near enough to the policy to be learnt from (M, bool).

    log_ratio_M: trainer's minus sampler's log-probability. What must lie within ±log bound is, by
    the rule, `token` its own log_ratio, `sequence` the sum over its episode, `geometric` the mean.
    """
    if rule != "token":
        sums_N = log_ratio_M.new_zeros(int(episode_M.max()) + 1)
        sums_2N = torch.stack([sums_N, sums_N])
        sums_2N.index_add_(1, episode_M, torch.stack([log_ratio_M, torch.ones_like(log_ratio_M)]))
        scores_N = sums_2N[0] if rule == "sequence" else sums_2N[0] / sums_2N[1].clamp_min(1)
        log_ratio_M = scores_N[episode_M]
    return log_ratio_M.abs() <= math.log(bound)
