"""Head and loss in one, with three matrix products: hidden states of the rows that are trained →
log-probs, cross entropy or policy loss.

Only rows that carry loss come in (prompt, frames and tool results are dropped before). Let x_t be a
hidden row, W the head, τ the sampler's temperature, and z_t = x_t Wᵀ / τ with banned columns at −∞
as in the sampler. Then

    logp_t    = z_t[y_t] − log Σ_v exp z_tv
    H_t       = −Σ_v p_tv log p_tv
    ratio_t   = exp(logp_t − old_logp_t)         gspo: exp of its mean exponent over the sequence
    kept_t    = clip(ratio_t, 1 − low, 1 + high)
    gain_t    = min(ratio_t·A_t, kept_t·A_t)     cispo: stop_gradient(kept_t)·A_t·logp_t
                                                 SFT is cispo with ratio 1 and advantage 1
    weight_t  = min(exp(old_logp_t − sampled_logp_t), cap)
                                                 truncated importance weight, where it is asked for
    k3_t      = exp(ref_logp_t − logp_t) − (ref_logp_t − logp_t) − 1
                                                 GRPO's estimator of KL(policy ‖ reference)
    loss      = Σ_t scale_t · (−weight_t·gain_t + β·k3_t − η·H_t)

`scale_t` makes the other variants: see nanosport/train/variants.py. Both g_t := d loss/d logp_t and
d loss/d H_t = −scale_t·η depend on row t alone, so the gradient of a row of logits is known as soon
as the row is:

    d loss/d z_tv = g_t·([v = y_t] − p_tv) + scale_t·η·p_tv·(log p_tv + H_t)

It is therefore written down at once, over the logits where it has their dtype, and multiplied into
dX and dW while it is there: 6·M·D·V operations, where autograd or a recomputing kernel takes 8.
`torch_rows` is the reference and what a CPU runs, kernels/policy_row.py the GPU's.

Logits are float32, whatever the inputs are: a logit between 16 and 32 would be rounded to 0.125 in
bfloat16, and a change of the policy by 3e-4 could not be seen. Their gradient is rounded to the
inputs' dtype, for two products at its speed. So logits exist for the rows of one product, their
gradient for a chunk of rows, which is larger: each chunk but the first reads and writes all of dW.

Letters: M rows with loss, C rows of a chunk, R rows of a product, D width, V vocabulary.
"""

from dataclasses import dataclass, fields, replace

import torch

PRODUCT_BYTES = {"cuda": 5 << 27, "cpu": 8 << 20}
"""Logits that one product makes, at most."""
CHUNK_BYTES = {"cuda": 3 << 29, "cpu": 0}
"""Gradients of logits that are held at a time, at least; a GPU with room to spare holds more. On a
CPU they are a product's, over its logits."""


@dataclass(frozen=True)
class TokenInputs:
    """What is known of each trained token beside its hidden state; float32, but ids int64."""

    targets_M: torch.Tensor
    """The token that the row predicts."""
    advantages_M: torch.Tensor
    scale_M: torch.Tensor
    """What the token weighs in the loss."""
    old_logp_M: torch.Tensor | None = None
    """The policy's log-probs before the step's first update. None: on policy, the ratio is 1."""
    ref_logp_M: torch.Tensor | None = None
    """The reference's log-probs. None: no KL term."""
    sampled_logp_M: torch.Tensor | None = None
    """The sampler's log-probs. None: no importance weight."""
    sequence_M: torch.Tensor | None = None
    """The sequence of each row, 0 … M − 1, for gspo's ratio. Advantage and scale are then one a
    sequence, and there is no importance weight."""
    ratio_M: torch.Tensor | None = None
    """The sequence's ratio, which then stands in for the token's."""

    def __getitem__(self, span: slice) -> "TokenInputs":
        given = {f.name: getattr(self, f.name) for f in fields(self)}
        return TokenInputs(**{name: None if x is None else x[span] for name, x in given.items()})


@dataclass(frozen=True)
class Objective:
    """The constants of the equations above."""

    temperature: float = 1.0
    clip_low: float = 0.2
    clip_high: float = 0.2
    beta: float = 0.0
    entropy_bonus: float = 0.0
    rollout_cap: float = 2.0
    likelihood: bool = False
    """Take cispo's gain."""


@dataclass(frozen=True)
class PolicyStats:
    """Detached, one value a row (M)."""

    logp_M: torch.Tensor
    entropy_M: torch.Tensor
    ratio_M: torch.Tensor
    clipped_M: torch.Tensor
    """1.0 where the clip took the gradient away (cispo: where it cut the ratio)."""
    kl_M: torch.Tensor


def torch_rows(
    logits_CV, tokens: TokenInputs, objective: Objective, gradient_CV, out_6C: torch.Tensor
) -> None:
    """Fill out_6C with loss, logp, entropy, ratio, clipped and kl of each row, and gradient_CV,
    unless it is None, with the logits' gradient; it may be the logits themselves."""
    log_p_CV = (logits_CV.to(out_6C.dtype) / objective.temperature).log_softmax(-1)
    logp_C = log_p_CV.gather(1, tokens.targets_M[:, None])[:, 0]
    p_CV = log_p_CV.exp()
    log_p_CV = log_p_CV.masked_fill(p_CV == 0, 0.0)  # 0 · −∞ of a banned column counts as 0
    entropy_C = -(p_CV * log_p_CV).sum(-1)
    gain_C, slope_C, *stats = gain_of(logp_C, tokens, objective)
    ratio_C, clipped_C, kl_C = stats
    loss_C = tokens.scale_M * (objective.beta * kl_C - gain_C - objective.entropy_bonus * entropy_C)
    torch.stack([loss_C, logp_C, entropy_C, ratio_C, clipped_C.to(loss_C.dtype), kl_C], out=out_6C)

    # d loss / d logits, as the equation has it
    if gradient_CV is not None:
        pull_C1 = (-tokens.scale_M * slope_C / objective.temperature)[:, None]
        d_CV = -pull_C1 * p_CV
        d_CV.scatter_add_(1, tokens.targets_M[:, None], pull_C1)
        if objective.entropy_bonus:
            bonus_C1 = (tokens.scale_M * objective.entropy_bonus / objective.temperature)[:, None]
            d_CV += bonus_C1 * p_CV * (log_p_CV + entropy_C[:, None])
        gradient_CV.copy_(d_CV)


def gain_of(logp_C: torch.Tensor, tokens: TokenInputs, objective: Objective) -> tuple:
    """(gain, slope, ratio, clipped, kl) of each row; the slope is d (gain − β·kl) / d logp."""
    old_C = logp_C if tokens.old_logp_M is None else tokens.old_logp_M
    ratio_C = torch.exp(logp_C - old_C) if tokens.ratio_M is None else tokens.ratio_M
    kept_C = ratio_C.clamp(1 - objective.clip_low, 1 + objective.clip_high)
    moved_C, clipped_gain_C = ratio_C * tokens.advantages_M, kept_C * tokens.advantages_M
    if objective.likelihood:
        gain_C, slope_C, clipped_C = clipped_gain_C * logp_C, clipped_gain_C, kept_C != ratio_C
    else:
        gain_C, clipped_C = torch.minimum(moved_C, clipped_gain_C), clipped_gain_C < moved_C
        slope_C = moved_C.masked_fill(clipped_C, 0.0)  # a clipped ratio may be infinite

    if tokens.sampled_logp_M is not None:
        weight_C = torch.exp(old_C - tokens.sampled_logp_M).clamp(max=objective.rollout_cap)
        gain_C, slope_C = weight_C * gain_C, weight_C * slope_C
    kl_C = torch.zeros_like(logp_C)
    if tokens.ref_logp_M is not None:
        gap_C = tokens.ref_logp_M - logp_C
        kl_C = gap_C.expm1() - gap_C  # 3e-4 apart it is 4.5e-8, less than float32 knows of 1
        slope_C = slope_C - objective.beta * (1 - gap_C.exp())
    return gain_C, slope_C, ratio_C, clipped_C, kl_C


def by_triton(x: torch.Tensor) -> bool:
    """Choose between Triton and torch; no other place does."""
    return x.is_cuda and x.dtype != torch.float64  # the kernels compute in float32


def fill_rows(
    logits_CV, tokens: TokenInputs, objective: Objective, gradient_CV, out_6C: torch.Tensor
) -> None:
    """What torch_rows does, by the kernel where there is one."""
    rows = torch_rows
    if by_triton(logits_CV):  # triton is not imported before it is needed: a Mac has none
        from kernels.policy_row import triton_rows as rows
    rows(logits_CV, tokens, objective, gradient_CV, out_6C)


def float_logits(hidden_CD, weight_VD, out=None) -> torch.Tensor:
    """Logits in float32 at least. Products of narrower numbers are exact in it, and a GPU's tensor
    cores sum in it anyhow: there nothing is rounded."""
    wide = torch.promote_types(hidden_CD.dtype, torch.float32)
    if hidden_CD.dtype == wide:
        return torch.mm(hidden_CD, weight_VD.T, out=out)
    if hidden_CD.is_cuda:
        return torch.mm(hidden_CD, weight_VD.T, out_dtype=wide, out=out)
    return torch.mm(hidden_CD.to(wide), weight_VD.T.to(wide), out=out)


def add_outer(total_VD, dlogits_CV, hidden_CD, dtype: torch.dtype) -> torch.Tensor:
    """total + dlogitsᵀ X in dtype, multiplied in the inputs'; total None: the first of the sum."""
    factors, options = (dlogits_CV.T, hidden_CD), {}
    if dlogits_CV.is_cuda and dlogits_CV.dtype != dtype:
        options = {"out_dtype": dtype}
    else:
        factors = [x.to(dtype) for x in factors]
    if total_VD is None:
        return torch.mm(*factors, **options)
    return torch.addmm(total_VD, *factors, **options, out=total_VD)


def product_rows(weight_VD: torch.Tensor, num_rows: int) -> int:
    """How many rows' logits one product makes: PRODUCT_BYTES at most, shared evenly.

    It depends on the shapes alone, so that a row's logits are the same to the bit in each pass.
    """
    wide = torch.promote_types(weight_VD.dtype, torch.float32)
    most = max(64, PRODUCT_BYTES[weight_VD.device.type] // (len(weight_VD) * wide.itemsize))
    products = max(1, -(-num_rows // most))
    return max(1, -(-num_rows // products))


def chunk_rows(weight_VD: torch.Tensor, num_rows: int) -> int:
    """How many rows' gradients are held and multiplied into dW at a time: whole products, as many
    as half of the free memory takes, shared evenly."""
    (V, D), narrow = weight_VD.shape, weight_VD.dtype.itemsize < 4
    size, row_bytes = product_rows(weight_VD, num_rows), V * weight_VD.element_size()
    room = max(CHUNK_BYTES[weight_VD.device.type], free_bytes(weight_VD.device) // 2)
    products = max(1, -(-num_rows // size))
    # one chunk needs no float32 sum of dW, which takes the room of D rows more
    if num_rows <= room // row_bytes + D * narrow:
        return size * products
    chunks = -(-products // max(1, room // (size * row_bytes)))
    return size * -(-products // chunks)


def free_bytes(device: torch.device) -> int:
    """What is left of a GPU's memory: the driver's, and what torch holds without need. 0 for a CPU,
    and so for a planner, which counts with CHUNK_BYTES."""
    if device.type != "cuda":
        return 0
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return torch.cuda.mem_get_info(device)[0] + unused


def sweep(hidden_MD, weight_VD, tokens: TokenInputs, objective: Objective, banned, wanted: tuple):
    """(out_6M, dX, dW) of all rows, chunk after chunk. dW is summed in float32: where there is one
    chunk, by its product, which then rounds it to the inputs' dtype.

    wanted: whether dX and whether dW is asked for; what is not is None.
    """
    (M, V), dtype = (len(hidden_MD), len(weight_VD)), hidden_MD.dtype
    wide = torch.promote_types(dtype, torch.float32)
    out_6M = hidden_MD.new_empty(6, M, dtype=wide)
    dhidden_MD = torch.empty_like(hidden_MD) if wanted[0] else None
    dweight_VD = torch.zeros_like(weight_VD) if wanted[1] and not M else None
    size = product_rows(weight_VD, M)
    held = chunk_rows(weight_VD, M) if wanted[1] else size
    logits_RV = hidden_MD.new_empty(min(size, held, M), V, dtype=wide)
    gradient_CV = logits_RV
    if any(wanted) and (dtype != wide or held > size):
        gradient_CV = hidden_MD.new_empty(min(held, M), V)
    for start in range(0, M, held):
        chunk = slice(start, min(start + held, M))
        for first in range(start, chunk.stop, size):
            rows = slice(first, min(first + size, chunk.stop))
            logits = float_logits(hidden_MD[rows], weight_VD, out=logits_RV[: rows.stop - first])
            if banned is not None:
                logits.index_fill_(1, banned, float("-inf"))
            gradient = gradient_CV[first - start : rows.stop - start] if any(wanted) else None
            fill_rows(logits, tokens[rows], objective, gradient, out_6M[:, rows])
        gradient = gradient_CV[: chunk.stop - start]
        if dhidden_MD is not None:
            torch.mm(gradient, weight_VD, out=dhidden_MD[chunk])
        if wanted[1]:
            summed_in = wide if held < M else dtype
            dweight_VD = add_outer(dweight_VD, gradient, hidden_MD[chunk], summed_in)
    return out_6M, dhidden_MD, dweight_VD


def scaled(gradient: torch.Tensor | None, scale: torch.Tensor) -> torch.Tensor | None:
    """gradient · scale. Where the scale is 1, as it is after loss.backward(), nothing is moved: on
    a GPU a kernel sees that, since the host would have to wait for it."""
    if gradient is None:
        return None
    if by_triton(gradient):
        from kernels.policy_row import scale_in_place

        scale_in_place(gradient, scale)
        torch.autograd.graph.increment_version(gradient)  # a second backward pass must not take it
        return gradient
    return gradient if scale == 1 else gradient * scale.to(gradient.dtype)


class HeadLoss(torch.autograd.Function):
    """sweep() as one node of the graph; the gradients are there before backward asks for them."""

    @staticmethod
    def forward(ctx, hidden_MD, weight_VD, tokens, objective, banned):
        wanted = ctx.needs_input_grad[:2]
        how = tokens, objective, banned, wanted
        out_6M, dhidden_MD, dweight_VD = sweep(hidden_MD, weight_VD, *how)
        if dweight_VD is not None:
            dweight_VD = dweight_VD.to(weight_VD.dtype)
        ctx.save_for_backward(dhidden_MD, dweight_VD)
        ctx.mark_non_differentiable(out_6M)
        return out_6M[0].sum(), out_6M

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad, _):
        return *(scaled(gradient, grad) for gradient in ctx.saved_tensors), None, None, None


def full_head(weight_VD: torch.Tensor, hidden_MD: torch.Tensor) -> torch.Tensor:
    """The head as one tensor in the dtype of the hidden states."""
    if hasattr(weight_VD, "full_tensor"):
        return GatherHead.apply(weight_VD, hidden_MD.dtype)
    return weight_VD.to(hidden_MD.dtype)


class GatherHead(torch.autograd.Function):
    """FSDP2's shards, cast before they are gathered; their gradients are summed in the shards' own
    dtype."""

    @staticmethod
    def forward(ctx, weight_VD, dtype):
        ctx.mesh, ctx.placements = weight_VD.device_mesh, weight_VD.placements
        ctx.dtype = weight_VD.dtype
        return weight_VD.detach().to(dtype).full_tensor()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_VD):
        from torch.distributed.tensor import DTensor, Partial  # slow to import

        each = [Partial()] * ctx.mesh.ndim
        grad_VD = DTensor.from_local(grad_VD.to(ctx.dtype), ctx.mesh, each)
        return grad_VD.redistribute(placements=ctx.placements), None


@torch.no_grad()
def linear_logprobs(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    targets_M: torch.Tensor,
    temperature: float = 1.0,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(logp_M, entropy_M) in float32, without gradients: bitwise what the loss sees.

    banned: ids the sampler cannot draw.
    """
    zeros_M = torch.zeros(len(targets_M), device=hidden_MD.device)
    tokens, objective = TokenInputs(targets_M, zeros_M, zeros_M), Objective(temperature)
    weight_VD = full_head(weight_VD, hidden_MD)
    out_6M, _, _ = sweep(hidden_MD, weight_VD, tokens, objective, banned, (False, False))
    return out_6M[1], out_6M[2]


def fused_linear_cross_entropy(
    hidden_MD: torch.Tensor, weight_VD: torch.Tensor, targets_M: torch.Tensor, scale_M: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Σ_t −scale_t·logp_t, logp_M detached): SFT's loss, differentiable in the first two."""
    tokens = TokenInputs(targets_M, torch.ones_like(scale_M), scale_M)
    likelihood = Objective(likelihood=True)
    loss, stats = fused_linear_policy_loss(hidden_MD, weight_VD, tokens, likelihood)
    return loss, stats.logp_M


def fused_linear_policy_loss(
    hidden_MD: torch.Tensor,
    weight_VD: torch.Tensor,
    tokens: TokenInputs,
    objective: Objective,
    banned: torch.Tensor | None = None,
) -> tuple[torch.Tensor, PolicyStats]:
    """(loss, stats) of the equations above; differentiable in hidden_MD and weight_VD.

    With tokens.sequence_M the ratio is the sequence's, as gspo has it: off policy that takes a pass
    of its own. banned: ids the sampler cannot draw.
    """
    weight_VD = full_head(weight_VD, hidden_MD)
    assert tokens.sequence_M is None or tokens.sampled_logp_M is None, (
        "gspo's ratio is the sequence's, an importance weight the token's"
    )
    if tokens.sequence_M is not None and tokens.old_logp_M is not None:
        temperature = objective.temperature
        logp_M, _ = linear_logprobs(hidden_MD, weight_VD, tokens.targets_M, temperature, banned)
        exponents_2M = torch.stack([logp_M - tokens.old_logp_M, torch.ones_like(logp_M)])
        sums_2M = torch.zeros_like(exponents_2M).index_add_(1, tokens.sequence_M, exponents_2M)
        mean_M = sums_2M[0] / sums_2M[1].clamp_min(1)
        tokens = replace(tokens, ratio_M=mean_M.exp()[tokens.sequence_M])
    loss, out_6M = HeadLoss.apply(hidden_MD, weight_VD, tokens, objective, banned)
    return loss, PolicyStats(*out_6M[1:])
