"""Attention over packed segments (training, vision windows) and over a cache (generation).

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j      j over the tokens of i's own segment,
                                                    and j ≤ i where causal

Segments may share what they begin with (the prompt of a group of rollouts): then it is a segment of
its own, computed once, and the others see it before themselves, through Keys.

T tokens of all segments, S keys they see (or cached tokens), R rows, H query heads, K key/value
heads (H = K·G), d head width.
"""

import inspect
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an optional package: torch carries the same kernel
    flash_attn_varlen_func = None

# cuDNN's attention builds a plan for every new shape, and a cache grows by a token each step: it
# makes a decode step several times slower (nanosport.bench.engine)
torch.backends.cuda.enable_cudnn_sdp(False)


@dataclass(frozen=True)
class Keys:
    """What the segments see: first the tokens before each, then its own.

    The keys of a shared prefix are copied for each segment that sees it, the layer around them is
    not: with few key heads a copy costs a hundredth of the tokens it stands for, any attention
    kernel takes it, and its gradients add up by themselves.
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
    q_THd,
    k_TKd,
    v_TKd,
    cu_seqlens,
    max_seqlen: int,
    causal: bool,
    scale: float | None = None,
    keys: Keys | None = None,
):
    """out_THd in q's dtype: each segment cu_seqlens[i]:cu_seqlens[i+1] sees itself, or what `keys`
    says; differentiable.

    cu_seqlens: int32, on the device of q, first 0 and last T.
    """
    cu_keys, max_keys = cu_seqlens, max_seqlen
    if keys is not None:
        if keys.index_S is not None:
            k_TKd, v_TKd = k_TKd.index_select(0, keys.index_S), v_TKd.index_select(0, keys.index_S)
        cu_keys, max_keys = keys.cu_seqlens, keys.longest
    # the flash kernels know no float32
    if not (q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16)):
        return sdpa_per_length(q_THd, k_TKd, v_TKd, cu_seqlens, cu_keys, causal, scale)
    spans = (cu_seqlens, cu_keys, max_seqlen, max_keys)
    if flash_attn_varlen_func is None:
        return torch_varlen(q_THd, k_TKd, v_TKd, spans, causal, scale)
    options = {"softmax_scale": scale, "causal": causal}
    return flash_attn_varlen_func(q_THd, k_TKd, v_TKd, *spans, **options)


def torch_varlen(q_THd, k_SKd, v_SKd, spans, causal, scale):
    """FlashAttention 2 as built into torch (CUDA only)."""
    from torch.nn.attention.varlen import varlen_attn  # imports triton: not before it is needed

    options = {"window_size": (-1, 0) if causal else (-1, -1), "scale": scale}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 has it not
        options["enable_gqa"] = q_THd.shape[1] != k_SKd.shape[1]
    else:
        k_SKd, v_SKd = (repeat_heads(x, q_THd.shape[1], dim=1) for x in (k_SKd, v_SKd))
    return varlen_attn(q_THd, k_SKd, v_SKd, *spans, **options)


def sdpa_per_length(q_THd, k_SKd, v_SKd, cu_seqlens, cu_keys, causal, scale):
    """The reference, and what a CPU runs: one SDPA call for each pair of lengths, since vision
    windows are many but of few lengths."""
    starts_by_shape: dict[tuple[int, int], list[tuple[int, int]]] = {}
    spans, key_spans = (pairwise(bounds.tolist()) for bounds in (cu_seqlens, cu_keys))
    for (start, end), (key_start, key_end) in zip(spans, key_spans, strict=True):
        if end > start:
            shape = (end - start, key_end - key_start)
            starts_by_shape.setdefault(shape, []).append((start, key_start))
    if len(starts_by_shape) == 1:  # the tokens already lie in batch order
        shape = next(iter(starts_by_shape))
        return sdpa_of_one_shape(q_THd, k_SKd, v_SKd, *shape, causal, scale)

    order, outs = [], []
    for shape, starts in starts_by_shape.items():
        rows, key_rows = (
            (torch.tensor(begin)[:, None] + torch.arange(length)).flatten().to(q_THd.device)
            for begin, length in zip(zip(*starts), shape)
        )
        k, v = (x.index_select(0, key_rows) for x in (k_SKd, v_SKd))
        order.append(rows)
        outs.append(sdpa_of_one_shape(q_THd.index_select(0, rows), k, v, *shape, causal, scale))
    return torch.cat(outs).index_select(0, torch.cat(order).argsort())


def sdpa_of_one_shape(q, k, v, length: int, num_keys: int, causal, scale):
    """Attention of segments of `length` queries, each over `num_keys` keys."""
    q = q.unflatten(0, (-1, length)).transpose(1, 2)
    k, v = (x.unflatten(0, (-1, num_keys)).transpose(1, 2) for x in (k, v))
    num_heads = q.shape[1]
    if causal and num_keys > length:
        # is_causal would count from the first key, but the queries are the last of the keys;
        # with a mask, only the math path knows GQA
        mask = torch.ones(length, num_keys, dtype=torch.bool, device=q.device)
        mask = mask.tril(num_keys - length)
        k, v = (repeat_heads(x, num_heads, dim=1) for x in (k, v))
        out = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)
    else:
        options = {"is_causal": causal, "scale": scale, "enable_gqa": num_heads != k.shape[1]}
        out = F.scaled_dot_product_attention(q, k, v, **options)
    return out.transpose(1, 2).flatten(0, 1)


def cached_attention(q_RHd, k_RKSd, v_RKSd, mask_RS):
    """One new query a row over that row's S cached keys; the mask is added to the scores."""
    # the heads that share a key head become its queries: no key is copied, and the one mask row
    # serves them all
    q_RKGd = q_RHd.unflatten(1, (k_RKSd.shape[1], -1))
    mask_R11S = mask_RS[:, None, None]
    out_RKGd = F.scaled_dot_product_attention(q_RKGd, k_RKSd, v_RKSd, attn_mask=mask_R11S)
    return out_RKGd.flatten(1, 2)


def repeat_heads(x, num_heads: int, dim: int):
    """Repeat key heads up to `num_heads`, neighbours alike."""
    return x if x.shape[dim] == num_heads else x.repeat_interleave(num_heads // x.shape[dim], dim)
