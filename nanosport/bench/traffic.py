"""Counts what the elementwise parts of a 7B decoder layer move through memory, forward and
backward, without a GPU.

    python -m nanosport.bench.traffic

Everything runs on the meta device: every operation that makes a new tensor is counted with the
bytes it reads and writes, once as torch runs it and once as one perfectly fused kernel would move
them (each input read once, each output written once). The layer's matrix products, at the same rate
of tokens, say what share of the time that is.
"""

import argparse
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from nanosport.cli import ending
from nanosport.fields import COUNT
from nanosport.model.qwen2_5_vl import Layer, rotate

WIDTH, HEADS, KV_HEADS, HEAD, INNER = 3584, 28, 4, 128, 18944
PRODUCTS, BANDWIDTH = (
    700e12,
    2.8e12,
)  # FLOP/s and bytes/s a well-used H100 reaches: assumed, not measured here


def tensors(x) -> list[torch.Tensor]:
    return (
        [x]
        if isinstance(x, torch.Tensor)
        else [t for y in x for t in tensors(y)]
        if isinstance(x, list | tuple)
        else []
    )


class Traffic(TorchDispatchMode):
    """Sums the bytes of all inputs and outputs of every operation that is not a view."""

    def __init__(self):
        super().__init__()
        self.num_bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        given = tensors(args)
        storages = {t.untyped_storage()._cdata for t in given}
        made = [
            t
            for t in tensors(out)
            if t.untyped_storage()._cdata not in storages or func._schema.is_mutable
        ]
        if made and not func.__name__.startswith("empty"):
            self.num_bytes += sum(t.numel() * t.element_size() for t in (*given, *made))
        return out


def count(function, *inputs) -> tuple[int, int]:
    """(bytes moved as it runs, bytes one fused kernel forward and one backward would move)."""
    with Traffic() as traffic:
        out = function(*inputs)
        torch.autograd.grad(out, [x for x in inputs if x.requires_grad], torch.empty_like(out))
    read, written = (sum(x.numel() * x.element_size() for x in xs) for xs in (inputs, [out]))
    return traffic.num_bytes, (read + written) + (
        read + written + read
    )  # backward: inputs and the gradient in, gradients out


def plain_norm(x, weight):
    """RMSNorm in single torch operations; nanosport.vision.RMSNorm has torch's fused one inside."""
    wide = x.float()
    return weight * (wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + 1e-6)).to(x.dtype)


def parts(tokens: int) -> dict[str, tuple[int, int]]:
    """(as run, fused) bytes of the elementwise parts of one layer at `tokens` tokens."""

    def empty(*shape, grad=True):
        return torch.empty(*shape, dtype=torch.bfloat16, device="meta", requires_grad=grad)

    angles = empty(tokens, 1, HEAD, grad=False)
    norm = count(plain_norm, empty(tokens, WIDTH), empty(WIDTH))
    return {
        "RMSNorm, two": (2 * norm[0], 2 * norm[1]),
        "M-RoPE": count(rotate, empty(tokens, HEADS + KV_HEADS, HEAD), angles, angles),
        "SwiGLU": count(
            lambda gate, up: F.silu(gate) * up, empty(tokens, INNER), empty(tokens, INNER)
        ),
    }


def config() -> SimpleNamespace:
    shape = {
        "hidden_size": WIDTH,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD,
    }
    return SimpleNamespace(**shape, intermediate_size=INNER, rms_norm_eps=1e-6)


def product_flops(tokens: int) -> int:
    """Of the layer's seven matrix products, forward and backward; attention itself apart."""
    with torch.device("meta"), FlopCounterMode(display=False) as counter:
        x = torch.empty(tokens, WIDTH, requires_grad=True)
        out = Layer(config())(
            x, lambda q, k, v: q + (k + v).repeat_interleave(HEADS // KV_HEADS, 1)
        )
        out.backward(torch.empty_like(out))
    return counter.get_total_flops()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
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


if __name__ == "__main__":
    ending(main)
