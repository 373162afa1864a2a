"""The paged decode kernel, in Triton's interpreter, and its reference against plain attention."""

import pytest
import torch
import torch.nn.functional as F

from kernels.attention import cached_attention
from kernels.paged_attention import gathered_attention, paged_attention, split_attention

SHAPES = [(7, 1, 16, 16), (2, 2, 32, 16), (3, 2, 20, 4), (8, 1, 64, 64)]
"""(query heads of a key head, key heads, head width, tokens a page)"""


def make(group: int, heads: int, width: int, size: int, lengths, dtype=torch.float32):
    """Queries, a pool with NaN wherever no token lies, tables of scattered pages, and each row's
    own keys and values."""
    torch.manual_seed(group)
    most = -(-max(lengths) // size)
    pool = torch.full((2, len(lengths) * most + 1, heads, size, width), float("nan"), dtype=dtype)
    order = (torch.randperm(len(lengths) * most) + 1).tolist()
    table = torch.zeros(len(lengths), most + 1, dtype=torch.int32)  # what is not used: page 0
    own = []
    for row, length in enumerate(lengths):
        kv = torch.randn(2, heads, length, width).to(dtype)
        own.append(kv)
        for k in range(-(-length // size)):
            table[row, k] = order.pop()
            part = kv[:, :, k * size : (k + 1) * size]
            pool[:, table[row, k], :, : part.shape[2]] = part
    q_RHd = torch.randn(len(lengths), group * heads, width).to(dtype)
    return q_RHd, *pool, table, torch.tensor(lengths, dtype=torch.int32), own


def plain(q_RHd, own) -> torch.Tensor:
    rows = []
    for q_Hd, (k_KTd, v_KTd) in zip(q_RHd, own):
        heads = len(q_Hd) // len(k_KTd)
        k, v = (x.repeat_interleave(heads, 0).double() for x in (k_KTd, v_KTd))
        rows.append(F.scaled_dot_product_attention(q_Hd[:, None].double(), k, v)[:, 0])
    return torch.stack(rows)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("splits", [None, 1, 2, 5])
def test_the_kernel_equals_plain_attention(shape, splits):
    """Rows of one token, of whole pages, and with fewer pages than spans; NaN lies behind them."""
    pytest.importorskip("triton")
    size = shape[3]
    *given, own = make(*shape, lengths=[1, size, size + 1, 3 * size - 1])
    out_RHd = split_attention(*given, splits=splits)
    torch.testing.assert_close(out_RHd.double(), plain(given[0], own), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("shape", SHAPES)
def test_the_reference_equals_plain_attention(shape):
    *given, own = make(*shape, lengths=[1, shape[3], 2 * shape[3] + 1])
    out_RHd = gathered_attention(*given)
    torch.testing.assert_close(out_RHd.double(), plain(given[0], own), rtol=1e-5, atol=1e-5)
    assert torch.equal(paged_attention(*given), out_RHd)  # what a CPU runs


def test_half_precision_sums_in_float32():
    """In float16: the interpreter reads no bfloat16."""
    pytest.importorskip("triton")
    *given, own = make(7, 2, 32, 16, lengths=[40, 33], dtype=torch.float16)
    for out_RHd in (split_attention(*given), gathered_attention(*given)):
        assert out_RHd.dtype == torch.float16
        torch.testing.assert_close(out_RHd.double(), plain(given[0], own), rtol=0, atol=2e-3)


def test_rows_side_by_side_equal_plain_attention():
    """The way of a CPU: one tensor, and a mask for what a row has not."""
    q_RHd, k, v, *_, own = make(2, 2, 8, 16, lengths=[5, 12, 16])
    k_RKSd, v_RKSd = torch.randn(2, 3, 2, 16, 8)
    mask_RS = torch.zeros(3, 16)
    for row, kv in enumerate(own):
        length = kv.shape[2]
        k_RKSd[row, :, :length], v_RKSd[row, :, :length] = kv
        mask_RS[row, length:] = float("-inf")
    out_RHd = cached_attention(q_RHd, k_RKSd, v_RKSd, mask_RS)
    torch.testing.assert_close(out_RHd.double(), plain(q_RHd, own), rtol=1e-5, atol=1e-5)
