"""Head and loss in one, with three matrix products: hidden states of the action rows → log-probs, cross entropy or policy loss.

Only rows that carry loss come in (prompt, frames and tool results are dropped before). With x_t a hidden row, W the head, τ
the sampler's temperature and z_t = x_t Wᵀ / τ, banned columns at −∞ as in the sampler:

    logp_t    = z_t[y_t] − log Σ_v exp z_tv                H_t = −Σ_v p_tv log p_tv
    ratio_t   = exp(logp_t − old_t)                        gspo: exp of its mean exponent over the sequence
    kept_t    = clip(ratio_t, 1 − low, 1 + high)
    gain_t    = min(ratio_t·A_t, kept_t·A_t)               cispo: stop_gradient(kept_t)·A_t·logp_t;  SFT is that with ratio 1, A 1
    weight_t  = min(exp(old_t − rollout_t), cap)           truncated importance weight, where the rollout's log-probs are given
    k3_t      = exp(ref_t − logp_t) − (ref_t − logp_t) − 1 GRPO's estimator of KL(policy ‖ reference)
    loss      = Σ_t scale_t · (−weight_t·gain_t + β·k3_t − η·H_t)

`scale_t` makes the other variants: see nanosport/loss.py. d loss/d logp_t =: g_t and d loss/d H_t = −scale_t·η depend on row t
alone, so the gradient of a row of logits is known as soon as the row is:

    d loss/d z_tv = g_t·([v = y_t] − p_tv) + scale_t·η·p_tv·(log p_tv + H_t)

It is therefore written over the logits at once, and multiplied into dX and dW while they are there: 6·M·D·V operations, where
autograd or a recomputing kernel takes 8. Logits exist for one chunk of rows only. The legend of shapes: M action rows,
C rows of a chunk, D width, V vocabulary. `torch_rows` is the reference and what a CPU runs, kernels/policy_row.py the GPU's.
"""

from dataclasses import dataclass, fields, replace

import torch

CHUNK_BYTES = {"cuda": 5 << 28, "cpu": 8 << 20}  # of logits; large on a GPU, since each chunk reads and writes all of dW


@dataclass(frozen=True)
class Rows:
    """What is known of each action row beside its hidden state; float32, but targets int64."""

    targets_M: torch.Tensor
    advantages_M: torch.Tensor
    scale_M: torch.Tensor
    old_M: torch.Tensor | None = None
    ref_M: torch.Tensor | None = None
    rollout_M: torch.Tensor | None = None
    ratio_M: torch.Tensor | None = None
    """The sequence's ratio, which then stands in for the token's."""

    def __getitem__(self, span: slice) -> "Rows":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return Rows(**{name: None if x is None else x[span] for name, x in given.items()})


@dataclass(frozen=True)
class Objective:
    """The constants of the equations above; `likelihood` chooses cispo's gain."""

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    entropy_bonus: float = 0.0
    rollout_cap: float = 2.0
    likelihood: bool = False


@dataclass(frozen=True)
class PolicyStats:
    """Detached, one value a row (M)."""

    logp_M: torch.Tensor
    entropy_M: torch.Tensor
    ratio_M: torch.Tensor
    clipped_M: torch.Tensor
    """1.0 where the clip took the gradient away (cispo: where it cut the ratio)."""
    kl_M: torch.Tensor


def torch_rows(logits_CV, rows: Rows, objective: Objective, gradient: bool, out_6C: torch.Tensor) -> None:
    """Fill out_6C with loss, logp, entropy, ratio, clipped and kl; with `gradient`, overwrite the logits with theirs."""
    log_p_CV = (logits_CV.to(out_6C.dtype) / objective.temperature).log_softmax(-1)
    logp_C = log_p_CV.gather(1, rows.targets_M[:, None])[:, 0]
    p_CV = log_p_CV.exp()
    log_p_CV = log_p_CV.masked_fill(p_CV == 0, 0.0)  # 0 · −∞ of a banned column counts as 0
    entropy_C = -(p_CV * log_p_CV).sum(-1)

    old_C = logp_C if rows.old_M is None else rows.old_M
    ratio_C = torch.exp(logp_C - old_C) if rows.ratio_M is None else rows.ratio_M
    kept_C = ratio_C.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    if objective.likelihood:
        gain_C, slope_C, clipped_C = kept_C * rows.advantages_M * logp_C, kept_C * rows.advantages_M, kept_C != ratio_C
    else:
        gain_C = torch.minimum(ratio_C * rows.advantages_M, kept_C * rows.advantages_M)
        clipped_C = kept_C * rows.advantages_M < ratio_C * rows.advantages_M
        slope_C = (ratio_C * rows.advantages_M).masked_fill(clipped_C, 0.0)  # a clipped ratio may be infinite
    if rows.rollout_M is not None:
        weight_C = torch.exp(old_C - rows.rollout_M).clamp(max=objective.rollout_cap)
        gain_C, slope_C = weight_C * gain_C, weight_C * slope_C
    kl_C = torch.zeros_like(logp_C)
    if rows.ref_M is not None:
        gap_C = rows.ref_M - logp_C
        kl_C = gap_C.exp() - gap_C - 1
        slope_C = slope_C - objective.beta * (1 - gap_C.exp())
    loss_C = rows.scale_M * (objective.beta * kl_C - gain_C - objective.entropy_bonus * entropy_C)
    torch.stack([loss_C, logp_C, entropy_C, ratio_C, clipped_C.to(loss_C.dtype), kl_C], out=out_6C)

    if gradient:
        pull_C1 = (-rows.scale_M * slope_C / objective.temperature)[:, None]
        d_CV = -pull_C1 * p_CV
        d_CV.scatter_add_(1, rows.targets_M[:, None], pull_C1)
        if objective.entropy_bonus:
            bonus_C1 = (rows.scale_M * objective.entropy_bonus / objective.temperature)[:, None]
            d_CV += bonus_C1 * p_CV * (log_p_CV + entropy_C[:, None])
        logits_CV.copy_(d_CV)


def fill_rows(logits_CV, rows: Rows, objective: Objective, gradient: bool, out_6C: torch.Tensor) -> None:
    """The one place that chooses between Triton and torch."""
    if logits_CV.is_cuda and logits_CV.dtype != torch.float64:  # the kernel computes in float32
        from kernels.policy_row import triton_rows  # not before it is needed: a Mac has no triton

        return triton_rows(logits_CV, rows, objective, gradient, out_6C)
    return torch_rows(logits_CV, rows, objective, gradient, out_6C)


def chunk_rows(weight_VD: torch.Tensor, num_rows: int) -> int:
    """Rows whose logits are held at a time: as many as CHUNK_BYTES allow, evenly shared among the chunks."""
    most = max(64, CHUNK_BYTES[weight_VD.device.type] // (len(weight_VD) * weight_VD.element_size()))
    chunks = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // chunks))


def add_outer(dweight_VD: torch.Tensor, dlogits_CV: torch.Tensor, hidden_CD: torch.Tensor) -> None:
    """dW += dlogitsᵀ X, multiplied in the inputs' dtype and summed in float32 (float64 for float64)."""
    if dlogits_CV.is_cuda and dlogits_CV.dtype != dweight_VD.dtype:
        torch.addmm(dweight_VD, dlogits_CV.T, hidden_CD, out_dtype=dweight_VD.dtype, out=dweight_VD)
    else:
        dweight_VD.addmm_(dlogits_CV.T.to(dweight_VD.dtype), hidden_CD.to(dweight_VD.dtype))


def sweep(hidden_MD, weight_VD, rows: Rows, objective: Objective, banned, grad_hidden: bool, grad_weight: bool):
    """(out_6M, dX or None, dW in float32 or None), chunk after chunk."""
    wide = torch.promote_types(hidden_MD.dtype, torch.float32)
    out_6M = torch.empty(6, len(hidden_MD), dtype=wide, device=hidden_MD.device)
    dhidden_MD = torch.empty_like(hidden_MD) if grad_hidden else None
    dweight_VD = torch.zeros_like(weight_VD, dtype=wide) if grad_weight else None
    size = chunk_rows(weight_VD, len(hidden_MD))
    for start in range(0, len(hidden_MD), size):
        span = slice(start, start + size)
        logits_CV = hidden_MD[span] @ weight_VD.T
        if banned is not None:
            logits_CV.index_fill_(1, banned, float("-inf"))
        fill_rows(logits_CV, rows[span], objective, grad_hidden or grad_weight, out_6M[:, span])
        if grad_hidden:
            torch.mm(logits_CV, weight_VD, out=dhidden_MD[span])
        if grad_weight:
            add_outer(dweight_VD, logits_CV, hidden_MD[span])
    return out_6M, dhidden_MD, dweight_VD


class HeadLoss(torch.autograd.Function):
    """sweep() as one node of the graph; the gradients are there before backward asks for them."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, rows, objective, banned):
        out_6M, *gradients = sweep(hidden_MD, weight_VD, rows, objective, banned, *ctx.needs_input_grad[:2])
        ctx.save_for_backward(*gradients)
        ctx.dtype = weight_VD.dtype
        ctx.mark_non_differentiable(out_6M)
        return out_6M[0].sum(), out_6M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        dhidden_MD, dweight_VD = ctx.saved_tensors
        if dhidden_MD is not None:
            dhidden_MD = dhidden_MD * grad.to(dhidden_MD.dtype)
        if dweight_VD is not None:  # scaled and rounded in one pass over the largest tensor here
            dweight_VD = torch.mul(dweight_VD, grad, out=torch.empty_like(dweight_VD, dtype=ctx.dtype))
        return dhidden_MD, dweight_VD, None, None, None


def whole(weight_VD: torch.Tensor, hidden_MD: torch.Tensor) -> torch.Tensor:
    """The head as one tensor in the dtype of the hidden states; of a shard of FSDP2, gathered, its gradient summed back."""
    if hasattr(weight_VD, "full_tensor"):
        from torch.distributed.tensor import Partial  # slow to import, and only a sharded run needs it

        weight_VD = weight_VD.full_tensor(grad_placements=[Partial()] * weight_VD.device_mesh.ndim)
    return weight_VD.to(hidden_MD.dtype)


@torch.no_grad()
def linear_logprobs(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_M: torch.Tensor,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_M, entropy_M) in float32, without gradients: bitwise what the loss sees. `banned`: ids the sampler cannot draw."""
    nothing_M = torch.zeros(len(targets_M), device=hidden_MD.device)
    rows = Rows(targets_M, nothing_M, nothing_M)
    out_6M, _, _ = sweep(hidden_MD, whole(weight_VD, hidden_MD), rows, Objective(temperature), banned, False, False)
    return out_6M[1], out_6M[2]


def fused_linear_cross_entropy(hidden_MD, weight_VD, targets_M, scale_M) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_t −scale_t·logp_t, logp_M detached): SFT's loss."""
    rows = Rows(targets_M, torch.ones_like(scale_M), scale_M)
    loss, out_6M = HeadLoss.apply(hidden_MD, whole(weight_VD, hidden_MD), rows, Objective(likelihood=True), None)
    return loss, out_6M[1]


def fused_linear_policy_loss(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_M: torch.Tensor,
    advantages_M: torch.Tensor,
    old_logp_M: torch.Tensor | None,
    ref_logp_M: torch.Tensor | None,
    rollout_logp_M: torch.Tensor | None,
    scale_M: torch.Tensor,
    objective: Objective,
    *,
    banned: torch.Tensor | None = None,
    sequence_M: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyStats]:
    """(loss, stats) of the equations above; differentiable in hidden_MD and weight_VD.

    old_logp_M None: the policy itself, before this update (ratio 1, on policy). ref_logp_M None: no KL term. rollout_logp_M
    None: no importance weight. sequence_M: the sequence of each row, 0 … M − 1, for gspo's ratio, which takes a pass of its own;
    its gradient asks for one advantage and one scale a sequence, and for no importance weight.
    """
    weight_VD = whole(weight_VD, hidden_MD)
    rows = Rows(targets_M, advantages_M, scale_M, old_logp_M, ref_logp_M, rollout_logp_M)
    assert sequence_M is None or rollout_logp_M is None, "gspo's ratio is the sequence's, an importance weight the token's"
    if sequence_M is not None and old_logp_M is not None:
        logp_M, _ = linear_logprobs(hidden_MD, weight_VD, targets_M, objective.temperature, banned)
        sums_2M = torch.zeros(2, len(logp_M), dtype=logp_M.dtype, device=logp_M.device)
        sums_2M.index_add_(1, sequence_M, torch.stack([logp_M - old_logp_M, torch.ones_like(logp_M)]))
        rows = replace(rows, ratio_M=(sums_2M[0] / sums_2M[1].clamp_min(1)).exp()[sequence_M])
    loss, out_6M = HeadLoss.apply(hidden_MD, weight_VD, rows, objective, banned)
    return loss, PolicyStats(*out_6M[1:])
