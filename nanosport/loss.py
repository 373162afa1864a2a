"""GRPO's two ingredients beside the fused loss: advantages of a group, and how much each token weighs.

Let L_i be the trainable tokens of episode i, N the episodes and T = Σ L_i, all counted over every rank and micro-batch:
    grpo      scale = 1 / (N · L_i)             each episode weighs the same        advantage (r − mean) / std
    dapo      scale = 1 / T, clip-higher        each token weighs the same          advantage (r − mean) / std
    dr_grpo   scale = 1 / (N · L_max)           no length bias                      advantage  r − mean
    cispo     as dapo, but the clipped ratio weighs log π instead of stopping the gradient (MiniMax-M1)
    gspo      as grpo, but one ratio for the sequence, the geometric mean of its tokens' (Qwen)
"""

from collections.abc import Sequence

import torch

VARIANTS = ("grpo", "dapo", "dr_grpo", "cispo", "gspo")


def group_advantages(rewards: Sequence[float], group_size: int, variant: str = "grpo", eps: float = 1e-4) -> torch.Tensor:
    """A_i = (r_i − mean) / (std + eps) inside each group of `group_size` neighbours; dr_grpo leaves the std out."""
    r_GN = torch.tensor(rewards, dtype=torch.float64).view(-1, group_size)  # in float32 equal rewards gave advantages of 1e-3
    centred_GN = r_GN - r_GN.mean(1, keepdim=True)
    if variant != "dr_grpo":
        centred_GN = centred_GN / (r_GN.std(1, keepdim=True, unbiased=False) + eps)
    return centred_GN.flatten().float()


def token_scale(variant: str, length: int, num_episodes: int, num_tokens: int, max_length: int) -> float:
    """What one trainable token of an episode of `length` such tokens weighs; the counts are global."""
    if variant in ("grpo", "gspo"):
        return 1.0 / (num_episodes * length)
    if variant in ("dapo", "cispo"):
        return 1.0 / num_tokens
    return 1.0 / (num_episodes * max_length)
