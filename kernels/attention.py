"""Attention over packed segments (training, vision windows) and over a cache (generation).

    out_i = Σ_j softmax_j(q_i·k_j / √d) v_j      j over the tokens of i's own segment,
                                                 and j ≤ i where causal

Segments may share what they begin with (the prompt of a group of rollouts): then it is a segment of
its own, computed once, and the others see it before themselves, through Keys.

T tokens of all segments, S keys they see (or cached tokens), R rows, H query heads, K key/value
heads (H = K·G), d head width.
"""

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

# cuDNN's attention builds a plan for every new shape, and a cache grows by a token each step: it
# makes a decode step several times slower (nanosport.bench.engine)
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Keys:
    """What the segments see: first the tokens before each, then its own.

    The keys of a shared prefix are copied for each segment that sees it, the layer around them is
    not: with few key heads a copy costs a hundredth of the tokens it stands for, and any attention
    kernel takes it.
    """

    index_S: torch.Tensor | None
    """None: the keys are given in this order."""
    cu_seqlens: torch.Tensor
    longest: int

    @classmethod
    def of(cls, places: Sequence[np.ndarray], device="cpu") -> "Keys":
        """places: where in T the tokens lie that a segment sees, in order; its own are the last."""
        bounds = torch.from_numpy(np.cumsum([0, *map(len, places)])).int()
        index_S = torch.from_numpy(np.concatenate(places))
        return cls(index_S.to(device), bounds.to(device), max(map(len, places)))


def varlen_attention(
    q_THd, k_TKd, v_TKd, cu_seqlens, max_seqlen: int, causal: bool, keys: Keys | None = None
):
    """out_THd in q's dtype: each segment cu_seqlens[i]:cu_seqlens[i+1] sees itself, or what `keys`
    says; differentiable.

    cu_seqlens: int32, on the device of q, first 0 and last T.
    """
    keys = keys or Keys(None, cu_seqlens, max_seqlen)
    if keys.index_S is not None:
        k_TKd, v_TKd = (TakeRows.apply(x, keys.index_S) for x in (k_TKd, v_TKd))
    spans = cu_seqlens, keys.cu_seqlens, max_seqlen, keys.longest
    attention = sdpa_per_length
    # the flash kernels know no float32
    if q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16):
        heads = q_THd.shape[1], k_TKd.shape[1], q_THd.shape[2]
        _, attention = choose(heads, causal, q_THd.dtype, q_THd.device.type)
    return attention(q_THd, k_TKd, v_TKd, spans, causal)


class TakeRows(torch.autograd.Function):
    """x_TKd[index_S], whose gradient adds up in float32: a prompt's keys have one from each member
    of its group, and bfloat16 would round every sum."""

    @staticmethod
    def forward(ctx, x_TKd, index_S):
        ctx.save_for_backward(index_S)
        ctx.num_rows = len(x_TKd)
        return x_TKd.index_select(0, index_S)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad_SKd):
        (index_S,) = ctx.saved_tensors
        wide_SKd = grad_SKd.to(torch.promote_types(grad_SKd.dtype, torch.float32))
        sum_TKd = wide_SKd.new_zeros(ctx.num_rows, *grad_SKd.shape[1:])
        return sum_TKd.index_add_(0, index_S, wide_SKd).to(grad_SKd.dtype), None


@lru_cache
def choose(heads: tuple[int, int, int], causal: bool, dtype, device: str) -> tuple[str, Callable]:
    """(name, function) of the first attention of FLASH that is installed here and right on this
    process's card, forward and backward; else SDPA. heads: H, K and d."""
    for name, attention in FLASH.items():
        try:
            if is_right(attention, heads, causal, dtype, device):
                return name, attention
        except Exception:  # not installed, or not made for this card: each raises errors of its own
            continue
    return "SDPA a segment", sdpa_per_length


def is_right(attention: Callable, heads: tuple[int, int, int], causal: bool, dtype, device) -> bool:
    """Whether output and gradients of small segments, of which some come after a prefix and some
    are longer than a kernel's tile, are those of SDPA in float32, but for the dtype's rounding."""
    lengths = 300, 3, 140
    key_lengths = (300, 90, 530) if causal else lengths
    generator = torch.Generator().manual_seed(0)
    shapes = [(sum(lengths), heads[0]), *[(sum(key_lengths), heads[1])] * 2]
    drawn = [torch.randn(*shape, heads[2], generator=generator) for shape in shapes]
    bounds = [torch.tensor([0, *n]).cumsum(0).int().to(device) for n in (lengths, key_lengths)]
    spans = (*bounds, max(lengths), max(key_lengths))

    def outputs(function, dtype):
        inputs = [x.to(device, dtype).requires_grad_() for x in drawn]
        out = function(*inputs, spans, causal)
        grad = torch.linspace(-1, 1, out.numel(), device=device).view_as(out).to(dtype)
        return out.detach(), *torch.autograd.grad(out, inputs, grad)

    # whoever asks may be computing a layer that keeps nothing: what is kept here is no part of it
    as_it_is = torch.autograd.graph.saved_tensors_hooks(lambda x: x, lambda x: x)
    with torch.enable_grad(), as_it_is:
        pairs = zip(outputs(attention, dtype), outputs(sdpa_per_length, torch.float32))
        return all(float((x - exact).norm() / exact.norm()) < 0.02 for x, exact in pairs)


def flash_attention_4(q_THd, k_SKd, v_SKd, spans, causal):
    """From the package flash-attn-4; compute capability 9.0 and later."""
    from flash_attn.cute import flash_attn_varlen_func

    names = ("cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q", "max_seqlen_k")
    named = dict(zip(names, spans))
    out = flash_attn_varlen_func(q_THd, k_SKd, v_SKd, **named, causal=causal)
    return out[0] if isinstance(out, tuple) else out  # some versions add the log-sums


def flash_attention_2(q_THd, k_SKd, v_SKd, spans, causal):
    """From the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    return flash_attn_varlen_func(q_THd, k_SKd, v_SKd, *spans, causal=causal)


def torch_varlen(q_THd, k_SKd, v_SKd, spans, causal):
    """FlashAttention 2 as built into torch (CUDA only)."""
    from torch.nn.attention.varlen import varlen_attn  # imports triton: not before it is needed

    options = {"window_size": (-1, 0) if causal else (-1, -1)}
    if torch_groups_heads():
        options["enable_gqa"] = q_THd.shape[1] != k_SKd.shape[1]
    else:
        k_SKd, v_SKd = (repeat_heads(x, q_THd.shape[1]) for x in (k_SKd, v_SKd))
    return varlen_attn(q_THd, k_SKd, v_SKd, *spans, **options)


def torch_groups_heads() -> bool:
    """Torch 2.11 does not: there keys and values are repeated for each query head, and kept."""
    from torch.nn.attention.varlen import varlen_attn

    return "enable_gqa" in inspect.signature(varlen_attn).parameters


FLASH = {
    "FlashAttention 4": flash_attention_4,
    "FlashAttention 2": flash_attention_2,
    "FlashAttention 2 of torch": torch_varlen,
}
"""The fastest first: forward and backward of 16,384 tokens in three segments at 7B shapes take 3.9
ms on an H100 by the first, 8.1 by the last."""


def sdpa_per_length(q_THd, k_SKd, v_SKd, spans, causal):
    """The reference, and what a CPU runs: one SDPA call for each pair of lengths, since vision
    windows are many but of few lengths."""
    starts_by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    own, seen = (pairwise(bounds.tolist()) for bounds in spans[:2])
    for (start, end), (key_start, key_end) in zip(own, seen, strict=True):
        if end > start:
            shape = (end - start, key_end - key_start)
            starts_by_shape.setdefault(shape, []).append((start, key_start))
    if len(starts_by_shape) == 1:  # the tokens already lie in batch order
        shape = next(iter(starts_by_shape))
        return sdpa_of_one_shape(q_THd, k_SKd, v_SKd, *shape, causal)

    order, outs = [], []
    for shape, starts in starts_by_shape.items():
        rows, key_rows = (
            (torch.tensor(begin)[:, None] + torch.arange(length)).flatten().to(q_THd.device)
            for begin, length in zip(zip(*starts), shape)
        )
        k, v = (x.index_select(0, key_rows) for x in (k_SKd, v_SKd))
        order.append(rows)
        outs.append(sdpa_of_one_shape(q_THd.index_select(0, rows), k, v, *shape, causal))
    return torch.cat(outs).index_select(0, torch.cat(order).argsort())


def sdpa_of_one_shape(q, k, v, length: int, num_keys: int, causal):
    """Attention of segments of `length` queries, each over `num_keys` keys."""
    q = q.unflatten(0, (-1, length)).transpose(1, 2)
    k, v = (x.unflatten(0, (-1, num_keys)).transpose(1, 2) for x in (k, v))
    num_heads = q.shape[1]
    if causal and num_keys > length:
        # is_causal would count from the first key, but the queries are the last of the keys;
        # with a mask, only the math path knows GQA
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(num_keys - length)
        k, v = (repeat_heads(x, num_heads) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
    else:
        groups = num_heads != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=groups)
    return out.transpose(1, 2).flatten(0, 1)


def cached_attention(q_RHd, k_RKSd, v_RKSd, mask_RS):
    """One new query a row over that row's S cached keys; the mask is added to the scores."""
    # the heads that share a key head become its queries: no key is copied, and the one mask row
    # serves them all
    q_RKGd = q_RHd.unflatten(1, (k_RKSd.shape[1], -1))
    mask_R11S = mask_RS[:, None, None]
    out_RKGd = F.scaled_dot_product_attention(q_RKGd, k_RKSd, v_RKSd, attn_mask=mask_R11S)
    return out_RKGd.flatten(1, 2)


def repeat_heads(x, num_heads: int):
    """Repeat key heads, the second dimension, up to `num_heads`, neighbours alike."""
    return x if x.shape[1] == num_heads else x.repeat_interleave(num_heads // x.shape[1], 1)
