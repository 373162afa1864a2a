"""The Triton kernel of paged_attention.py."""

import triton
import triton.language as tl

NUM_WARPS = 4


def tiles(heads: int, width: int, item_bytes: int) -> dict[str, int]:
    """The tile that holds so many heads of this width (tl.dot wants 16 rows at least), and how it
    is launched. The table's load takes stages too: with five, the next keys come while these are
    summed; float32 has shared memory for fewer."""
    tile = {"HEADS": heads, "WIDTH": width}
    tile = {name: max(16, triton.next_power_of_2(size)) for name, size in tile.items()}
    return tile | {"num_warps": NUM_WARPS, "num_stages": 5 if item_bytes == 2 else 3}


@triton.jit
def decode_kernel(
    q_ptr, k_ptr, v_ptr, table_ptr, length_ptr, out_ptr, log_sum_ptr,
    scale, num_key_heads, table_width, splits,
    G: tl.constexpr, D: tl.constexpr, PAGE: tl.constexpr, HEADS: tl.constexpr, WIDTH: tl.constexpr,
):  # fmt: skip
    row, head, split = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    length = tl.load(length_ptr + row)
    pages = tl.cdiv(length, PAGE)
    span = tl.cdiv(pages, splits)
    g, d, s = tl.arange(0, HEADS), tl.arange(0, WIDTH), tl.arange(0, PAGE)
    in_head = (g[:, None] < G) & (d[None, :] < D)
    first = (row * num_key_heads + head) * G
    q = tl.load(q_ptr + (first + g[:, None]) * D + d[None, :], mask=in_head, other=0.0)

    top = tl.full((HEADS,), -1e30, tl.float32)
    total = tl.zeros((HEADS,), tl.float32)
    mean = tl.zeros((HEADS, WIDTH), tl.float32)
    for number in range(split * span, tl.minimum((split + 1) * span, pages)):
        page = tl.load(table_ptr + row * table_width + number).to(tl.int64)
        at = ((page * num_key_heads + head) * PAGE + s[:, None]) * D + d[None, :]
        seen = number * PAGE + s < length
        # what lies behind the last token may be anything, NaN too
        k = tl.load(k_ptr + at, mask=seen[:, None] & (d[None, :] < D), other=0.0)
        v = tl.load(v_ptr + at, mask=seen[:, None] & (d[None, :] < D), other=0.0)
        z = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
        z = tl.where(seen[None, :], z, -1e30)
        new_top = tl.maximum(top, tl.max(z, 1))
        weight = tl.exp(z - new_top[:, None])
        shrink = tl.exp(top - new_top)
        total = total * shrink + tl.sum(weight, 1)
        more = tl.dot(weight.to(v.dtype), v, input_precision="ieee")
        mean = mean * shrink[:, None] + more
        top = new_top

    # a span without a page weighs nothing: e^(−1e30)
    place = ((row * num_key_heads + head) * splits + split) * G + g
    total = tl.maximum(total, 1e-30)
    where = out_ptr + place[:, None] * D + d[None, :]
    tl.store(where, mean / total[:, None], mask=in_head)
    tl.store(log_sum_ptr + place, top + tl.log(total), mask=g < G)
