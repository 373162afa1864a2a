"""The Triton row kernel of policy_loss.py: one program takes one row of logits.

It reads the row of float32 twice and writes it once in bfloat16, 10 bytes an element: at M = 8192
and V = 152064 that is 12.5 GB, 2.6 ms at an H200's 4.8 TB/s, where the three matrix products would
take 38 ms at 700 TFLOP/s. So it is written to be read, and the tensor cores stay with cuBLAS. A NaN
in a row of logits stays NaN in all that comes of it.
"""

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 2048, 8
SCALE_BLOCK, SCALE_PROGRAMS = 2048, 1056


@triton.jit
def row_kernel(
    logits_ptr, gradient_ptr, targets_ptr, advantages_ptr, scale_ptr,
    old_logp_ptr, ref_logp_ptr, sampled_logp_ptr, ratio_ptr, out_ptr,
    V, row_stride, gradient_stride, out_stride,
    temperature, clip_low, clip_high, beta, entropy_bonus, rollout_cap,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_SAMPLED: tl.constexpr,
    HAS_RATIO: tl.constexpr, LIKELIHOOD: tl.constexpr, GRADIENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row = tl.program_id(0)
    logits_ptr += row.to(tl.int64) * row_stride
    target = tl.load(targets_ptr + row)
    target_z = tl.load(logits_ptr + target).to(tl.float32) / temperature
    top, log_total, entropy = row_sums(logits_ptr, V, temperature, BLOCK)
    gap = target_z - top - log_total
    logp = tl.where(gap > 0, 0.0, gap)

    gain, slope, ratio, clipped, kl = token_gain(
        row, logp, advantages_ptr, old_logp_ptr, ref_logp_ptr, sampled_logp_ptr, ratio_ptr,
        clip_low, clip_high, beta, rollout_cap,
        HAS_OLD, HAS_REF, HAS_SAMPLED, HAS_RATIO, LIKELIHOOD,
    )  # fmt: skip
    scale = tl.load(scale_ptr + row)
    tl.store(out_ptr + row, scale * (beta * kl - gain - entropy_bonus * entropy))
    tl.store(out_ptr + out_stride + row, logp)
    tl.store(out_ptr + 2 * out_stride + row, entropy)
    tl.store(out_ptr + 3 * out_stride + row, ratio)
    tl.store(out_ptr + 4 * out_stride + row, clipped)
    tl.store(out_ptr + 5 * out_stride + row, kl)

    if GRADIENT:
        pull = -scale * slope / temperature
        bonus = scale * entropy_bonus / temperature
        gradient_ptr += row.to(tl.int64) * gradient_stride
        write_gradient(
            logits_ptr, gradient_ptr, target, V, temperature, top, log_total, entropy, pull, bonus,
            BLOCK,
        )  # fmt: skip


@triton.jit
def row_sums(logits_ptr, V, temperature, BLOCK: tl.constexpr):
    """(largest z, log Σ e^(z − largest), entropy) of a row."""
    columns = tl.arange(0, BLOCK)
    # every lane keeps its own running maximum, Σ e^(z − top) and Σ e^(z − top)·(z − top)
    top_B = tl.full((BLOCK,), -1e30, tl.float32)
    sum_B = tl.zeros((BLOCK,), tl.float32)
    dot_B = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        z_B = tl.load(logits_ptr + start + columns, mask=start + columns < V, other=float("-inf"))
        z_B = z_B.to(tl.float32) / temperature
        new_B = tl.maximum(top_B, z_B)
        shrink_B = tl.exp(top_B - new_B)
        e_B = tl.exp(z_B - new_B)
        spread_B = tl.where(e_B > 0, e_B * (z_B - new_B), 0.0)
        dot_B = (dot_B + sum_B * (top_B - new_B)) * shrink_B + spread_B
        sum_B = sum_B * shrink_B + e_B
        top_B = new_B

    # the lanes meet once, at the end
    top = tl.max(top_B, 0)
    shrink_B = tl.exp(top_B - top)
    dot_B = tl.where(sum_B > 0, (dot_B + sum_B * (top_B - top)) * shrink_B, 0.0)
    total = tl.sum(sum_B * shrink_B, 0)
    log_total = tl.log(total)
    return top, log_total, log_total - tl.sum(dot_B, 0) / total


@triton.jit
def token_gain(
    row, logp, advantages_ptr, old_logp_ptr, ref_logp_ptr, sampled_logp_ptr, ratio_ptr,
    clip_low, clip_high, beta, rollout_cap,
    HAS_OLD: tl.constexpr, HAS_REF: tl.constexpr, HAS_SAMPLED: tl.constexpr,
    HAS_RATIO: tl.constexpr, LIKELIHOOD: tl.constexpr,
):  # fmt: skip
    """(gain, slope, ratio, clipped, kl), as policy_loss.gain_of."""
    advantage = tl.load(advantages_ptr + row)
    old = logp
    if HAS_OLD:
        old = tl.load(old_logp_ptr + row)
    ratio = tl.exp(logp - old)
    if HAS_RATIO:
        ratio = tl.load(ratio_ptr + row)
    low, high = 1 - clip_low, 1 + clip_high
    kept_ratio = tl.where(ratio < low, low, tl.where(ratio > high, high, ratio))
    if LIKELIHOOD:
        gain = kept_ratio * advantage * logp
        slope = kept_ratio * advantage
        clipped = (kept_ratio != ratio).to(tl.float32)
    else:
        outside = kept_ratio * advantage < ratio * advantage
        gain = tl.where(outside, kept_ratio, ratio) * advantage
        clipped = outside.to(tl.float32)
        slope = tl.where(outside, 0.0, ratio * advantage)
    if HAS_SAMPLED:
        weight = tl.exp(old - tl.load(sampled_logp_ptr + row))
        weight = tl.where(weight > rollout_cap, rollout_cap, weight)
        gain *= weight
        slope *= weight
    kl = logp * 0.0
    if HAS_REF:
        gap = tl.load(ref_logp_ptr + row) - logp
        # near 0, exp(gap) − gap − 1 would be nothing but float32's rounding of 1
        series = 1 / 24 + gap * (1 / 120 + gap / 720)
        near = gap * gap * (0.5 + gap * (1 / 6 + gap * series))
        kl = tl.where(tl.abs(gap) < 0.25, near, tl.exp(gap) - gap - 1)
        slope -= beta * (1 - tl.exp(gap))
    return gain, slope, ratio, clipped, kl


@triton.jit
def write_gradient(
    logits_ptr, gradient_ptr, target, V, temperature, top, log_total, entropy, pull, bonus,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Write d loss / d logits of the row; it may lie over the logits."""
    columns = tl.arange(0, BLOCK)
    for start in range(0, V, BLOCK):
        inside_B = start + columns < V
        z_B = tl.load(logits_ptr + start + columns, mask=inside_B, other=float("-inf"))
        log_p_B = z_B.to(tl.float32) / temperature - top - log_total
        p_B = tl.exp(log_p_B)
        spread_B = tl.where(p_B > 0, p_B * (log_p_B + entropy), 0.0)
        hit_B = (start + columns == target).to(tl.float32)
        gradient_B = pull * (hit_B - p_B) + bonus * spread_B
        gradient_B = gradient_B.to(gradient_ptr.dtype.element_ty)
        tl.store(gradient_ptr + start + columns, gradient_B, mask=inside_B)


def triton_rows(logits_CV, tokens, objective, gradient_CV, out_6C: torch.Tensor) -> None:
    """Do on the GPU what policy_loss.torch_rows does."""
    needed = (tokens.targets_M, tokens.advantages_M, tokens.scale_M)
    optional = (tokens.old_logp_M, tokens.ref_logp_M, tokens.sampled_logp_M, tokens.ratio_M)
    written_CV = logits_CV if gradient_CV is None else gradient_CV
    row_kernel[(len(logits_CV),)](
        logits_CV, written_CV, *(x.contiguous() for x in needed),
        *(out_6C if x is None else x.contiguous() for x in optional), out_6C,
        logits_CV.shape[1], logits_CV.stride(0), written_CV.stride(0), out_6C.stride(0),
        objective.temperature, objective.clip_low, objective.clip_high,
        objective.beta, objective.entropy_bonus, objective.rollout_cap,
        *(x is not None for x in optional), objective.likelihood, gradient_CV is not None,
        BLOCK, num_warps=NUM_WARPS,
    )  # fmt: skip


@triton.jit
def scale_kernel(x_ptr, scale_ptr, N, BLOCK: tl.constexpr):
    scale, stride = tl.load(scale_ptr).to(tl.float32), tl.num_programs(0) * BLOCK
    if scale != 1.0:
        for start in range(0, N, stride):
            at = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK) + start
            x = tl.load(x_ptr + at, mask=at < N).to(tl.float32) * scale
            tl.store(x_ptr + at, x.to(x_ptr.dtype.element_ty), mask=at < N)


def scale_in_place(x: torch.Tensor, scale: torch.Tensor) -> None:
    """x *= scale, of which x is not touched where the scale is 1. x: dense."""
    scale_kernel[(SCALE_PROGRAMS,)](x, scale, x.numel(), SCALE_BLOCK, num_warps=NUM_WARPS)
