"""The Triton kernels of elementwise.py. Each reads what it is given once and writes what it makes
once: memory is all its time."""

import torch
import triton
import triton.language as tl

BLOCK, NUM_WARPS = 1024, 4


def rotary_tiles(num_heads: int, num_keys: int, half: int) -> dict[str, int]:
    """The powers of two that hold the heads, and how the kernel is launched."""
    sizes = {"HEADS": num_heads, "KEYS": num_keys, "WIDTH": half}
    tiles = {name: triton.next_power_of_2(size) for name, size in sizes.items()}
    return tiles | {"num_warps": max(1, min(8, tiles["HEADS"] * tiles["WIDTH"] // 256))}


def norm_tiles(width: int) -> dict[str, int]:
    block = triton.next_power_of_2(width)
    return {"BLOCK": block, "num_warps": max(1, min(16, block // 256))}


@triton.jit
def turn_heads(
    x_ptr, head_stride, out_ptr, cos, sin,
    N: tl.constexpr, HALF: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    head, i = tl.arange(0, HEADS)[:, None], tl.arange(0, WIDTH)[None, :]
    inside = (head < N) & (i < HALF)
    left = tl.load(x_ptr + head * head_stride + i, mask=inside).to(tl.float32)
    right = tl.load(x_ptr + head * head_stride + HALF + i, mask=inside).to(tl.float32)
    out_ptr += head * 2 * HALF + i
    tl.store(out_ptr, (left * cos - right * sin).to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(out_ptr + HALF, (right * cos + left * sin).to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def rotary_kernel(
    q_ptr, k_ptr, cos_ptr, sin_ptr, q_out_ptr, k_out_ptr,
    q_row, q_head, k_row, k_head, cos_row, sin_row,
    H: tl.constexpr, K: tl.constexpr, HALF: tl.constexpr,
    HEADS: tl.constexpr, KEYS: tl.constexpr, WIDTH: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """A program turns all heads of one token."""
    token, i = tl.program_id(0).to(tl.int64), tl.arange(0, WIDTH)[None, :]
    cos = tl.load(cos_ptr + token * cos_row + i, mask=i < HALF).to(tl.float32)
    sin = tl.load(sin_ptr + token * sin_row + i, mask=i < HALF).to(tl.float32)
    if BACK:
        sin = -sin
    q_ptr, q_out_ptr = q_ptr + token * q_row, q_out_ptr + token * H * 2 * HALF
    turn_heads(q_ptr, q_head, q_out_ptr, cos, sin, H, HALF, HEADS, WIDTH)
    k_ptr, k_out_ptr = k_ptr + token * k_row, k_out_ptr + token * K * 2 * HALF
    turn_heads(k_ptr, k_head, k_out_ptr, cos, sin, K, HALF, KEYS, WIDTH)


@triton.jit
def swiglu_kernel(gate_ptr, up_ptr, out_ptr, gate_row, up_row, F, BLOCK: tl.constexpr):
    """A program takes a span of one token's channels; the backward one too."""
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + token * gate_row + f, mask=f < F).to(tl.float32)
    up = tl.load(up_ptr + token * up_row + f, mask=f < F).to(tl.float32)
    out = gate * tl.sigmoid(gate) * up
    tl.store(out_ptr + token * F + f, out.to(out_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def swiglu_backward_kernel(
    gate_ptr, up_ptr, d_ptr, dgate_ptr, dup_ptr, gate_row, up_row, d_row, F, BLOCK: tl.constexpr
):
    token = tl.program_id(0).to(tl.int64)
    f = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    gate = tl.load(gate_ptr + token * gate_row + f, mask=f < F).to(tl.float32)
    up = tl.load(up_ptr + token * up_row + f, mask=f < F).to(tl.float32)
    d = tl.load(d_ptr + token * d_row + f, mask=f < F).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    dgate, dup = d * up * (sigmoid + gate * sigmoid * (1 - sigmoid)), d * gate * sigmoid
    tl.store(dgate_ptr + token * F + f, dgate.to(dgate_ptr.dtype.element_ty), mask=f < F)
    tl.store(dup_ptr + token * F + f, dup.to(dup_ptr.dtype.element_ty), mask=f < F)


@triton.jit
def add_norm_kernel(
    x_ptr, delta_ptr, weight_ptr, total_ptr, norm_ptr, inverse_ptr, eps, D,
    HAS_DELTA: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes one token."""
    token, c = tl.program_id(0).to(tl.int64), tl.arange(0, BLOCK)
    at = token * D + c
    total = tl.load(x_ptr + at, mask=c < D, other=0.0)
    if HAS_DELTA:
        delta = tl.load(delta_ptr + at, mask=c < D, other=0.0)
        total = (total.to(tl.float32) + delta.to(tl.float32)).to(total.dtype)
        tl.store(total_ptr + at, total, mask=c < D)
    s = total.to(tl.float32)
    inverse = tl.rsqrt(tl.sum(s * s, 0) / D + eps)
    rounded = (s * inverse).to(total.dtype).to(tl.float32)
    norm = tl.load(weight_ptr + c, mask=c < D).to(tl.float32) * rounded
    tl.store(norm_ptr + at, norm.to(norm_ptr.dtype.element_ty), mask=c < D)
    tl.store(inverse_ptr + token, inverse)


@triton.jit
def add_norm_backward_kernel(
    total_ptr, weight_ptr, inverse_ptr, dtotal_ptr, dnorm_ptr, dx_ptr, dparts_ptr, T, D,
    HAS_DTOTAL: tl.constexpr, HAS_DWEIGHT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """A program takes neighbouring tokens, as many as any other."""
    program, c = tl.program_id(0), tl.arange(0, BLOCK)
    weight = tl.load(weight_ptr + c, mask=c < D, other=0.0).to(tl.float32)
    dweight, share = tl.zeros((BLOCK,), tl.float32), tl.cdiv(T, tl.num_programs(0))
    first = program.to(tl.int64) * share
    for k in range(0, tl.minimum(share, T - first)):
        token = first + k
        at = token * D + c
        total = tl.load(total_ptr + at, mask=c < D, other=0.0)
        dnorm = tl.load(dnorm_ptr + at, mask=c < D, other=0.0).to(tl.float32)
        inverse = tl.load(inverse_ptr + token)
        u = total.to(tl.float32) * inverse
        g = weight * dnorm
        dx = inverse * (g - u * (tl.sum(g * u, 0) / D))
        if HAS_DTOTAL:
            dx += tl.load(dtotal_ptr + at, mask=c < D, other=0.0).to(tl.float32)
        tl.store(dx_ptr + at, dx.to(dx_ptr.dtype.element_ty), mask=c < D)
        if HAS_DWEIGHT:
            dweight += dnorm * u.to(total.dtype).to(tl.float32)
    if HAS_DWEIGHT:
        tl.store(dparts_ptr + program * D + c, dweight, mask=c < D)


def dense(x: torch.Tensor) -> torch.Tensor:
    """x with its last dimension's elements side by side."""
    return x if x.stride(-1) == 1 else x.contiguous()


def rotary(q_THd, k_TKd, cos_T1d, sin_T1d, q_out_THd, k_out_TKd, back: bool) -> None:
    """Fill the outs; back: turn by the negative angles."""
    (T, H, d), K = q_THd.shape, k_TKd.shape[1]
    q_THd, k_TKd, cos_T1d, sin_T1d = map(dense, (q_THd, k_TKd, cos_T1d, sin_T1d))
    strides = *q_THd.stride()[:2], *k_TKd.stride()[:2], cos_T1d.stride(0), sin_T1d.stride(0)
    rotary_kernel[(T,)](
        q_THd, k_TKd, cos_T1d, sin_T1d, q_out_THd, k_out_TKd, *strides,
        H, K, d // 2, BACK=back, **rotary_tiles(H, K, d // 2),
    )  # fmt: skip


def swiglu(gate_TF, up_TF, out_TF) -> None:
    """Fill out."""
    (T, F), (gate_TF, up_TF) = out_TF.shape, map(dense, (gate_TF, up_TF))
    swiglu_kernel[T, triton.cdiv(F, BLOCK)](
        gate_TF, up_TF, out_TF, gate_TF.stride(0), up_TF.stride(0), F, BLOCK, num_warps=NUM_WARPS
    )


def swiglu_backward(gate_TF, up_TF, d_TF, dgate_TF, dup_TF) -> None:
    """Fill dgate and dup."""
    (T, F), given = d_TF.shape, tuple(map(dense, (gate_TF, up_TF, d_TF)))
    strides = (x.stride(0) for x in given)
    swiglu_backward_kernel[T, triton.cdiv(F, BLOCK)](
        *given, dgate_TF, dup_TF, *strides, F, BLOCK, num_warps=NUM_WARPS
    )


def add_norm(x, delta, weight_D, eps: float, total, norm, inverse) -> None:
    """Fill total (unless delta is None), norm and inverse, which has a number a row. x and the
    outs are contiguous."""
    given = x if delta is None else delta.contiguous()
    add_norm_kernel[(inverse.numel(),)](
        x, given, weight_D.contiguous(), total, norm, inverse, eps, len(weight_D),
        delta is not None, **norm_tiles(len(weight_D)),
    )  # fmt: skip


def add_norm_backward(total, weight_D, inverse, dtotal, dnorm, dx, dparts_PD) -> None:
    """Fill dx, and dparts by as many programs as it has rows; it may be of width 0, and dtotal
    None."""
    T, D, dnorm = inverse.numel(), len(weight_D), dnorm.contiguous()
    given = dnorm if dtotal is None else dtotal.contiguous()
    add_norm_backward_kernel[(len(dparts_PD),)](
        total, weight_D.contiguous(), inverse, given, dnorm, dx, dparts_PD, T, D,
        dtotal is not None, dparts_PD.shape[1] > 0, **norm_tiles(D),
    )  # fmt: skip
