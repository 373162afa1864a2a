"""Attention over packed segments (training, vision windows) and over a key/value cache (generation).

    out_i = Σ_j softmax_j(scale · q_i·k_j) v_j      j over the tokens of i's own segment, and j ≤ i where causal

T tokens of all segments, S cached tokens, B rows, H query heads, K key/value heads (H = K·G), d head width.
"""

import inspect
from itertools import pairwise

import torch
import torch.nn.functional as F

try:
    from flash_attn import flash_attn_varlen_func
except ImportError:  # an optional package: torch carries the same kernel
    flash_attn_varlen_func = None


def varlen_attention(q_THd, k_TKd, v_TKd, cu_seqlens, max_seqlen: int, causal: bool, scale: float | None = None):
    """Attention of each segment cu_seqlens[i]:cu_seqlens[i+1] with itself; differentiable.

    cu_seqlens: int32, on the device of q, first 0 and last T. Returns out_THd in q's dtype.
    """
    fused = q_THd.is_cuda and q_THd.dtype in (torch.bfloat16, torch.float16)  # the flash kernels know no float32
    if fused and flash_attn_varlen_func is not None:
        spans = (cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return flash_attn_varlen_func(q_THd, k_TKd, v_TKd, *spans, softmax_scale=scale, causal=causal)
    if fused:
        return torch_varlen(q_THd, k_TKd, v_TKd, cu_seqlens, max_seqlen, causal, scale)
    return sdpa_per_length(q_THd, k_TKd, v_TKd, cu_seqlens, causal, scale)


def torch_varlen(q_THd, k_TKd, v_TKd, cu_seqlens, max_seqlen, causal, scale):
    """FlashAttention 2 as built into torch (CUDA only)."""
    from torch.nn.attention.varlen import varlen_attn  # imports triton: not before it is needed

    options = {"window_size": (-1, 0) if causal else (-1, -1), "scale": scale}
    if "enable_gqa" in inspect.signature(varlen_attn).parameters:  # torch 2.11 has it not
        options["enable_gqa"] = q_THd.shape[1] != k_TKd.shape[1]
    else:
        k_TKd, v_TKd = (repeat_heads(x, q_THd.shape[1], dim=1) for x in (k_TKd, v_TKd))
    return varlen_attn(q_THd, k_TKd, v_TKd, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen, **options)


def sdpa_per_length(q_THd, k_TKd, v_TKd, cu_seqlens, causal, scale):
    """The reference, and what a CPU runs: one SDPA call a length, since vision windows are many but of few lengths."""
    starts_by_length = {}
    bounds = cu_seqlens.tolist()
    for start, end in pairwise(bounds):
        if end > start:
            starts_by_length.setdefault(end - start, []).append(start)

    def attend(q, k, v, length):
        q, k, v = (x.unflatten(0, (-1, length)).transpose(1, 2) for x in (q, k, v))
        gqa = q.shape[1] != k.shape[1]
        out = F.scaled_dot_product_attention(q, k, v, is_causal=causal, scale=scale, enable_gqa=gqa)
        return out.transpose(1, 2).flatten(0, 1)

    if len(starts_by_length) == 1:  # the tokens already lie in batch order
        return attend(q_THd, k_TKd, v_TKd, *starts_by_length)
    order, outs = [], []
    for length, starts in starts_by_length.items():
        rows = (torch.tensor(starts)[:, None] + torch.arange(length)).flatten().to(q_THd.device)
        order.append(rows)
        outs.append(attend(*(x.index_select(0, rows) for x in (q_THd, k_TKd, v_TKd)), length))
    return torch.cat(outs).index_select(0, torch.cat(order).argsort())


def cached_attention(q_BTHd, k_BKSd, v_BKSd, mask_B1TS):
    """T new queries a row over that row's S cached keys, the new ones among them; mask is added to the scores."""
    B, T, H, d = q_BTHd.shape
    if T == 1:  # the G heads of a key head become its queries: no key is copied, and the one mask row serves them all
        q_BKGd = q_BTHd.view(B, k_BKSd.shape[1], -1, d)
        return F.scaled_dot_product_attention(q_BKGd, k_BKSd, v_BKSd, attn_mask=mask_B1TS).reshape(B, T, H, d)
    k_BHSd, v_BHSd = (repeat_heads(x, H, dim=1) for x in (k_BKSd, v_BKSd))  # with a mask, only the math path knows GQA
    return F.scaled_dot_product_attention(q_BTHd.transpose(1, 2), k_BHSd, v_BHSd, attn_mask=mask_B1TS).transpose(1, 2)


def repeat_heads(x, num_heads: int, dim: int):
    return x if x.shape[dim] == num_heads else x.repeat_interleave(num_heads // x.shape[dim], dim)
