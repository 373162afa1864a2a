"""Counts what a 7B decoder layer moves through memory between its matrix products, forward and
backward, without a GPU.

    python -m nanosport.bench.traffic

Everything runs on the meta device: every operation that makes a new tensor is counted with the
bytes it reads and writes, once as torch runs it and once as one perfectly fused kernel would move
them (each input read once, each output written once). The whole layer is counted as torch runs it,
and through kernels/elementwise.py, whose kernels move what they are given; its attention and matrix
products are left out. The products, at the same rate of tokens, say what share of the time that is.
"""

import argparse
from unittest.mock import patch

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from kernels import elementwise
from kernels.elementwise import rotary, rotate
from nanosport.cli import ending
from nanosport.fields import COUNT
from nanosport.files import ASSETS
from nanosport.model.decoder import Layer
from nanosport.model.folder import load_config

CFG = load_config(ASSETS / "qwen2.5-vl-7b")
WIDTH, INNER, HEAD = CFG.hidden_size, CFG.intermediate_size, CFG.head_dim
HEADS, KV_HEADS = CFG.num_attention_heads, CFG.num_key_value_heads
PRODUCTS, BANDWIDTH = 700e12, 2.8e12
"""FLOP/s and bytes/s that a well-used H100 reaches: assumed, not measured here."""


def tensors(x) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(x) if isinstance(leaf, torch.Tensor)]


PRODUCTS_APART = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Traffic(TorchDispatchMode):
    """Sums the bytes of all inputs and outputs of every operation that is neither a view nor a
    matrix product, and counts the operations. On a GPU each is a launch."""

    def __init__(self):
        super().__init__()
        self.num_bytes = self.launches = 0

    def note(self, *moved: torch.Tensor) -> None:
        """A launch that moves each of these once."""
        self.num_bytes += sum({id(t): t.numel() * t.element_size() for t in moved}.values())
        self.launches += 1

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = tensors(args)
        storages = {t.untyped_storage()._cdata for t in given}
        made = tensors(out)
        if not func._schema.is_mutable:
            made = [t for t in made if t.untyped_storage()._cdata not in storages]
        is_empty = func.__name__.startswith(("empty", "new_empty"))
        if made and not is_empty and func not in PRODUCTS_APART:
            self.note(*given, *made)
        return out


class Kernels:
    """Stands in for kernels/elementwise_triton.py: notes what each of them is given."""

    def __init__(self, traffic: Traffic):
        self.traffic = traffic

    def __getattr__(self, name):
        return lambda *args, **_: self.traffic.note(*tensors(args))


class TorchNorm(torch.autograd.Function):
    """torch's RMSNorm of a GPU, a kernel forward and one backward; it has none on meta."""

    @staticmethod
    def forward(ctx, x, traffic: Traffic):
        out, ctx.traffic = torch.empty_like(x), traffic
        ctx.save_for_backward(x)
        traffic.note(x, out, x.new_empty(len(x), dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx, d):
        dx, (x,) = torch.empty_like(d), ctx.saved_tensors
        ctx.traffic.note(d, x, dx, x.new_empty(len(x), dtype=torch.float32))
        return dx, None


class Attention(torch.autograd.Function):
    """Attention without its own traffic."""

    @staticmethod
    def forward(ctx, q, k, v):
        ctx.save_for_backward(q, k, v)
        return torch.empty_like(q)

    @staticmethod
    def backward(ctx, _):
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors)


def layer_traffic(tokens: int, fused: bool) -> Traffic:
    """Of one layer, forward and backward, by the fused kernels or as torch runs it."""
    with torch.device("meta"):
        layer = Layer(CFG).bfloat16()
        x = torch.empty(tokens, WIDTH, dtype=torch.bfloat16, requires_grad=True)
        cos_sin = torch.empty(2, tokens, 1, HEAD, dtype=torch.bfloat16)
    traffic = Traffic()
    norm = lambda x, *_, **__: TorchNorm.apply(x, traffic)  # noqa: E731
    with (
        patch.object(elementwise, "is_fused", lambda x: fused),
        patch.object(elementwise, "triton_kernels", lambda: Kernels(traffic)),
        patch.object(F, "rms_norm", norm),
        traffic,
    ):
        out = layer(x, lambda q, k, v: Attention.apply(*rotary(q, k, *cos_sin), v))
        torch.autograd.grad(out, [x, *layer.parameters()], torch.empty_like(out))
    return traffic


def count(function, *inputs) -> tuple[int, int]:
    """(bytes moved as it runs, bytes one fused kernel forward and one backward would move)."""
    with Traffic() as traffic:
        out = function(*inputs)
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.empty_like(out))
    read, written = (sum(x.numel() * x.element_size() for x in xs) for xs in (inputs, [out]))
    backward = read + written + read  # inputs and the gradient in, gradients out
    return traffic.num_bytes, read + written + backward


def plain_norm(x, weight):
    """RMSNorm in single torch operations."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def parts(tokens: int) -> dict[str, tuple[int, int]]:
    """(as run, fused) bytes of the elementwise parts of one layer at `tokens` tokens."""

    def empty(*shape, grad=True):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=grad)

    angles = empty(tokens, 1, HEAD, grad=False)
    run, fused = count(plain_norm, empty(tokens, WIDTH), empty(WIDTH))
    gate_up = empty(tokens, INNER), empty(tokens, INNER)
    return {
        "RMSNorm, two": (2 * run, 2 * fused),
        "M-RoPE": count(rotate, empty(tokens, HEADS + KV_HEADS, HEAD), angles, angles),
        "SwiGLU": count(lambda gate, up: F.silu(gate) * up, *gate_up),
    }


def product_flops(tokens: int) -> int:
    """Of the layer's seven matrix products, forward and backward; attention itself apart."""

    def attend(q, k, v):
        return q + (k + v).repeat_interleave(HEADS // KV_HEADS, 1)

    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(tokens, WIDTH, requires_grad=True)
        out = Layer(CFG)(x, attend)
        out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--tokens", type=COUNT, default=8192)
    tokens = parser.parse_args().tokens
    whole = 1e3 * product_flops(tokens) / PRODUCTS
    print(
        f"7B decoder layer, {tokens} tokens, bf16; matrix products {whole:.1f} ms at "
        f"{PRODUCTS / 1e12:.0f} TFLOP/s"
    )
    for name, (run, fused) in parts(tokens).items():
        ms, least = (1e3 * b / BANDWIDTH for b in (run, fused))
        print(
            f"{name:14}{run / 2**30:6.2f} GiB as run, {fused / 2**30:5.2f} fused: {ms:4.2f} → "
            f"{least:4.2f} ms at {BANDWIDTH / 1e12} TB/s"
        )
    for name, fused in (("as torch runs it", False), ("by our kernels", True)):
        found = layer_traffic(tokens, fused)
        print(
            f"the layer {name}: {found.launches} launches, {found.num_bytes / 2**30:.2f} GiB, "
            f"{1e3 * found.num_bytes / BANDWIDTH:.2f} ms"
        )


if __name__ == "__main__":
    ending(main)
