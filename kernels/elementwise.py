"""What a layer does between its matrix products, element by element.

    rotary      (left, right) → (left·cos − right·sin, right·cos + left·sin), halves of each head
    swiglu      silu(gate)·up
    add_norm    s = x + delta  and  n = weight·u,  u = s·r rounded,  r = 1/√(mean s² + eps)

As torch operations they move several times what they read and write. So on a GPU each is one Triton
kernel forward and one backward (kernels/elementwise_triton.py), which computes in float32 and
rounds what it stores; u too, before the weight comes in, as the checkpoints were trained. What is
plain torch here is the reference, and what a CPU runs. The gradients are

    rotary      the rotation by the negative angle
    swiglu      dgate = d·up·(σ + gate·σ·(1 − σ)),  dup = d·gate·σ,  σ = sigmoid(gate)
    add_norm    dx = ddelta = ds + r·(g − s·r·mean(g·s·r)),  g = weight·dn
                dweight = Σ_t dn·u: each program sums rows of its own in float32, torch the programs

Letters: T tokens, H query heads, K key heads, d head width, F inner width, D width, P programs.
"""

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

NORM_PROGRAMS = 264
"""The norm's backward pass takes so many programs at most, two for each of an H100's 132
multiprocessors: each writes a row of sums for the weight's gradient."""


def is_fused(x: torch.Tensor) -> bool:
    """Choose between Triton and torch; no other place does."""
    return x.is_cuda and x.dtype != torch.float64  # the kernels compute in float32


def triton_kernels():
    from kernels import elementwise_triton  # not before it is needed: a Mac has no triton

    return elementwise_triton


def rotary(q_THd, k_TKd, cos_T1d, sin_T1d) -> tuple[torch.Tensor, torch.Tensor]:
    """q and k, channel i of each head turned with channel i + d/2; in their own dtype.

    The two halves of cos and sin are alike, as both channels turn by one angle. q and k may be
    parts of a wider tensor.
    """
    if is_fused(q_THd):
        return Rotary.apply(q_THd, k_TKd, cos_T1d, sin_T1d)
    return rotate(q_THd, cos_T1d, sin_T1d), rotate(k_TKd, cos_T1d, sin_T1d)


def rotate(x, cos, sin):
    """The reference of rotary: in the wider dtype of x and the angles, rounded to x's."""
    wide = x.to(torch.promote_types(x.dtype, cos.dtype))
    left, right = wide.chunk(2, dim=-1)
    return (wide * cos + torch.cat((-right, left), dim=-1) * sin).to(x.dtype)


class Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q_THd, k_TKd, cos_T1d, sin_T1d):
        ctx.save_for_backward(cos_T1d, sin_T1d)
        outs = q_THd.new_empty(q_THd.shape), k_TKd.new_empty(k_TKd.shape)
        triton_kernels().rotary(q_THd, k_TKd, cos_T1d, sin_T1d, *outs, back=False)
        return outs

    @staticmethod
    @once_differentiable
    def backward(ctx, dq_THd, dk_TKd):
        outs = dq_THd.new_empty(dq_THd.shape), dk_TKd.new_empty(dk_TKd.shape)
        triton_kernels().rotary(dq_THd, dk_TKd, *ctx.saved_tensors, *outs, back=True)
        return *outs, None, None


def swiglu(gate_TF, up_TF) -> torch.Tensor:
    """silu(gate)·up. gate and up may be parts of a wider tensor."""
    if is_fused(gate_TF):
        return SwiGLU.apply(gate_TF, up_TF)
    return F.silu(gate_TF) * up_TF


class SwiGLU(torch.autograd.Function):
    @staticmethod
    def forward(ctx, gate_TF, up_TF):
        ctx.save_for_backward(gate_TF, up_TF)
        out_TF = gate_TF.new_empty(gate_TF.shape)
        triton_kernels().swiglu(gate_TF, up_TF, out_TF)
        return out_TF

    @staticmethod
    @once_differentiable
    def backward(ctx, d_TF):
        dgate_TF, dup_TF = d_TF.new_empty(d_TF.shape), d_TF.new_empty(d_TF.shape)
        triton_kernels().swiglu_backward(*ctx.saved_tensors, d_TF, dgate_TF, dup_TF)
        return dgate_TF, dup_TF


def add_norm(x, delta, weight_D, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """(x + delta, the RMSNorm of that) for x and delta of shape (…, D); delta None: (x, its norm).

    The sum goes on beside the norm: what comes back to it is added in the norm's backward pass.
    """
    if is_fused(x):
        return AddNorm.apply(x, delta, weight_D, eps)
    total = x if delta is None else x + delta
    return total, weight_D * F.rms_norm(total, weight_D.shape, eps=eps)


class AddNorm(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, delta, weight_D, eps):
        x, wide = x.contiguous(), torch.promote_types(x.dtype, weight_D.dtype)
        total = x if delta is None else torch.empty_like(x)
        norm = torch.empty_like(x, dtype=wide)
        inverse = x.new_empty(x.shape[:-1], dtype=torch.float32)
        triton_kernels().add_norm(x, delta, weight_D, eps, total, norm, inverse)
        ctx.save_for_backward(total, weight_D, inverse)
        ctx.set_materialize_grads(False)
        return total, norm

    @staticmethod
    @once_differentiable
    def backward(ctx, dtotal, dnorm):
        total, weight_D, inverse = ctx.saved_tensors
        if dnorm is None:
            return dtotal, dtotal if ctx.needs_input_grad[1] else None, None, None
        dx, wants_dweight = torch.empty_like(total), ctx.needs_input_grad[2]
        num_programs = max(1, min(NORM_PROGRAMS, inverse.numel()))
        dparts_PD = inverse.new_empty(num_programs, len(weight_D) if wants_dweight else 0)
        triton_kernels().add_norm_backward(total, weight_D, inverse, dtotal, dnorm, dx, dparts_PD)
        dweight_D = dparts_PD.sum(0).to(weight_D.dtype) if wants_dweight else None
        return dx, dx if ctx.needs_input_grad[1] else None, dweight_D, None
