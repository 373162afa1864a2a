"""Head and loss in one: hidden states of the action rows → log-probs, cross entropy or policy loss.

Only rows that carry loss come in (prompt, frames and tool results are dropped before), and logits exist for `CHUNK` rows
at a time: they are computed again in the backward pass. With x_t a hidden row, W the head, τ the sampler's temperature:

    logp_t  = log softmax(x_t Wᵀ / τ)[target_t]                      banned columns are −∞, as in the sampler
    ratio_t = exp(logp_t − old_t)
    loss    = Σ_t scale_t · ( −min(ratio_t·A_t, clip(ratio_t, 1−low, 1+high)·A_t) + β·k3_t )
    k3_t    = exp(ref_t − logp_t) − (ref_t − logp_t) − 1             the KL(policy ‖ reference) estimator of GRPO

`scale_t` makes the variants: see nanosport/loss.py. This is the torch reference and the boundary a fused kernel takes over.
"""

from dataclasses import dataclass

import torch
from torch.utils.checkpoint import checkpoint

CHUNK = 2048  # rows; 2048 × 152064 logits in float32 are 1.2 GB


@dataclass(frozen=True)
class PolicyStats:
    """Detached, one value a row (M)."""

    logp_M: torch.Tensor
    entropy_M: torch.Tensor
    ratio_M: torch.Tensor
    clipped_M: torch.Tensor
    """1.0 where the clip removed the gradient."""
    kl_M: torch.Tensor


def _chunk_logprobs(hidden_MD, weight_VD, targets_M, temperature, banned):
    logits_MV = (hidden_MD @ weight_VD.T).float() / temperature
    if banned is not None:
        logits_MV = logits_MV.index_fill(1, banned, float("-inf"))
    log_p_MV = logits_MV.log_softmax(-1)
    logp_M = log_p_MV.gather(1, targets_M[:, None])[:, 0]
    with torch.no_grad():  # for the logs; 0 · −∞ of a banned column counts as 0
        entropy_M = -(log_p_MV.exp() * log_p_MV.clamp_min(-1e4)).sum(-1)
    return logp_M, entropy_M


def linear_logprobs(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_M: torch.Tensor,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_M, entropy_M) in float32; logp is differentiable. `banned`: token ids the sampler cannot draw."""
    if len(targets_M) == 0:  # a rank without action rows still takes part in the backward pass
        empty = (hidden_MD.sum() + weight_VD.sum()).float() * 0 + torch.zeros(0, device=hidden_MD.device)
        return empty, empty.detach()
    parts = [
        checkpoint(_chunk_logprobs, x, weight_VD, y, temperature, banned, use_reentrant=False)
        for x, y in zip(hidden_MD.split(CHUNK), targets_M.split(CHUNK))
    ]
    logp, entropy = zip(*parts)
    return torch.cat(logp), torch.cat(entropy)


def linear_cross_entropy(hidden_MD, weight_VD, targets_M, scale_M) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_t −scale_t·logp_t, logp_M detached): the SFT loss through the same log-prob path."""
    logp_M, _ = linear_logprobs(hidden_MD, weight_VD, targets_M)
    return -(scale_M * logp_M).sum() + 0.0 * hidden_MD.sum(), logp_M.detach()


def linear_policy_loss(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_M: torch.Tensor,
    advantages_M: torch.Tensor,
    old_logp_M: torch.Tensor | None,
    ref_logp_M: torch.Tensor | None,
    scale_M: torch.Tensor,
    *,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    beta: float = 0.0,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyStats]:
    """(loss, stats) of the equations above.

    old_logp_M None: the policy itself, before this update (ratio 1, on policy). ref_logp_M None: no KL term.
    """
    logp_M, entropy_M = linear_logprobs(hidden_MD, weight_VD, targets_M, temperature, banned)
    ratio_M = torch.exp(logp_M - (logp_M.detach() if old_logp_M is None else old_logp_M))
    clipped_ratio_M = ratio_M.clamp(1 - clip_low, 1 + clip_high)
    surrogate_M = torch.minimum(ratio_M * advantages_M, clipped_ratio_M * advantages_M)
    kl_M = torch.zeros_like(logp_M)
    if ref_logp_M is not None:
        kl_M = torch.exp(ref_logp_M - logp_M) - (ref_logp_M - logp_M) - 1
    loss = (scale_M * (beta * kl_M - surrogate_M)).sum() + 0.0 * hidden_MD.sum()
    clipped_M = (clipped_ratio_M * advantages_M < ratio_M * advantages_M).float()
    return loss, PolicyStats(logp_M.detach(), entropy_M, ratio_M.detach(), clipped_M, kl_M.detach())
