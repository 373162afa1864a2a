"""Attention of one new token a row over keys that lie in pages (generation).

    out_b = Σ_j softmax_j(q_b·k_j / √d) v_j      j < length_b, token j in page table_b[j // S]

A program of the Triton kernel takes one row, one key head and a span of the row's pages: the query
heads that share the key head are one tile, so each key is read once. The spans' sums are then put
together by their log-sums. Reading is all its work: at 2.46 TB/s on an H100 a prototype of it took
0.14 ms a layer for 32 rows of 5,500 tokens (head width 128, 4 key heads).

Letters: R rows, H query heads, K key heads (H = K·G), d head width, P pages of the pool, S tokens a
page, W pages a row at most.
"""

import torch

PROGRAMS = 528
"""A launch is split until it has so many programs: four for each of an H100's 132
multiprocessors."""


def paged_attention(q_RHd, k_PKSd, v_PKSd, table_RW, length_R):
    """out_RHd in q's dtype. table_RW, length_R: int32; every length is at least 1."""
    if not q_RHd.is_cuda:
        return gathered_attention(q_RHd, k_PKSd, v_PKSd, table_RW, length_R)
    return split_attention(q_RHd, k_PKSd, v_PKSd, table_RW, length_R)


def gathered_attention(q_RHd, k_PKSd, v_PKSd, table_RW, length_R):
    """The reference: gathers the pages of each row, and says the formula."""
    k_RTKd, v_RTKd = (x[table_RW.long()].transpose(2, 3).flatten(1, 2) for x in (k_PKSd, v_PKSd))
    heads = q_RHd.shape[1] // k_RTKd.shape[2]
    k_RTHd, v_RTHd = (x.repeat_interleave(heads, 2).float() for x in (k_RTKd, v_RTKd))
    scores_RHT = torch.einsum("rhd,rthd->rht", q_RHd.float(), k_RTHd) * q_RHd.shape[-1] ** -0.5
    unseen_RT = torch.arange(k_RTHd.shape[1], device=q_RHd.device) >= length_R[:, None]
    weights_RHT = scores_RHT.masked_fill(unseen_RT[:, None], float("-inf")).softmax(-1)
    v_RTHd = v_RTHd.masked_fill(unseen_RT[..., None, None], 0.0)
    return torch.einsum("rht,rthd->rhd", weights_RHT, v_RTHd).to(q_RHd.dtype)


def split_attention(q_RHd, k_PKSd, v_PKSd, table_RW, length_R, splits: int | None = None):
    """The Triton kernel's way. splits: how many spans a row's pages make; None: what fills a
    card."""
    from kernels.paged_decode import decode_kernel, tiles  # imports triton: not before it is needed

    (R, H, d), (_, K, S, _) = q_RHd.shape, k_PKSd.shape
    splits = splits or min(table_RW.shape[1], -(-PROGRAMS // (R * K)))
    out_RKXGd = q_RHd.new_empty(R, K, splits, H // K, d, dtype=torch.float32)
    log_sum_RKXG = q_RHd.new_empty(R, K, splits, H // K, dtype=torch.float32)
    launch = tiles(H // K, d, q_RHd.element_size())
    decode_kernel[R, K, splits](
        q_RHd.contiguous(), k_PKSd, v_PKSd, table_RW, length_R, out_RKXGd, log_sum_RKXG,
        d**-0.5, K, table_RW.shape[1], splits, H // K, d, S, **launch,
    )  # fmt: skip
    if splits == 1:
        return out_RKXGd.view(R, H, d).to(q_RHd.dtype)
    share_RKXG1 = log_sum_RKXG.softmax(2)[..., None]
    return (out_RKXGd * share_RKXG1).sum(2).view(R, H, d).to(q_RHd.dtype)
