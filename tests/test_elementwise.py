"""Rotary embedding, SwiGLU and residual add with RMSNorm: Triton's kernels, interpreted, against
autograd in float64, and what a CPU runs against the plain operations."""

import importlib.util
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from kernels import elementwise
from nanosport.model.decoder import Layer
from nanosport.model.layers import MLP, RMSNorm, join

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
pytest.importorskip("triton")


@pytest.fixture
def fused(monkeypatch, rounding):
    monkeypatch.setattr(elementwise, "is_fused", lambda x: x.dtype != torch.float64)


def rotary(x):
    return elementwise.rotary(x["q"], x["k"], x["cos"], x["sin"])


def swiglu(x):
    return (elementwise.swiglu(x["gate"], x["up"]),)


def add_norm(x):
    return elementwise.add_norm(x["x"], x.get("delta"), x["weight"], 1e-6)


def rotary_inputs(rows, dtype, strided, heads=5, keys=3, width=10, table=None):
    """cos and sin in the dtype of q and k, as the decoder has them, or in `table`."""
    angles = 3 * torch.randn(rows, 1, width // 2).repeat(1, 1, 2)
    q, k = torch.randn(rows, heads, width), torch.randn(rows, keys, width)
    x = {"q": q, "k": k, "cos": angles.cos(), "sin": angles.sin()}
    x = {name: value.to(table or dtype) for name, value in x.items()}
    x |= {name: x[name].to(dtype) for name in ("q", "k")}
    if strided:  # parts of one product
        joined = torch.cat([x["q"].flatten(1), x["k"].flatten(1), x["k"].flatten(1)], dim=-1)
        parts = joined.split([heads * width, keys * width, keys * width], dim=-1)
        x |= {name: part.unflatten(-1, (-1, width)) for name, part in zip("qk", parts)}
    return x


def swiglu_inputs(rows, dtype, strided, width=37):
    joined = (2 * torch.randn(rows, 2 * width)).to(dtype)
    parts = joined.split(width, dim=-1)
    return dict(zip(("gate", "up"), parts if strided else [part.contiguous() for part in parts]))


def norm_inputs(rows, dtype, strided, width=37, delta=True):
    x = {"x": torch.randn(rows, width), "delta": 2 * torch.randn(rows, width)}
    x = {name: value.to(dtype) for name, value in x.items() if delta or name == "x"}
    if strided:
        x = {name: value.T.contiguous().T for name, value in x.items()}
    return x | {"weight": (1 + 0.3 * torch.randn(width)).to(dtype)}


CASES = {
    "rotary": (rotary, rotary_inputs),
    "rotary of a tower": (
        rotary,
        lambda *given: rotary_inputs(*given, heads=4, keys=4, width=6, table=torch.float32),
    ),
    "SwiGLU": (swiglu, swiglu_inputs),
    "SwiGLU of several blocks": (swiglu, lambda *given: swiglu_inputs(*given, width=1500)),
    "add and norm": (add_norm, norm_inputs),
    "norm alone": (add_norm, lambda *given: norm_inputs(*given, delta=False)),
}
CONSTANT = ("cos", "sin")


def gradients(op, x) -> dict[str, torch.Tensor]:
    """Results of op, and the gradients of what goes in, where random numbers pull at the results."""
    leaves = {n: v.detach().requires_grad_() for n, v in x.items() if n not in CONSTANT}
    outs = op(x | {name: leaf.view_as(leaf) for name, leaf in leaves.items()})
    generator, loss = torch.Generator().manual_seed(1), 0.0
    for out in outs:  # numbers that any dtype has
        pull = torch.randn(out.shape, generator=generator).bfloat16()
        loss = loss + (out * pull.to(out)).sum()
    results = {f"out {number}": out.detach() for number, out in enumerate(outs)}
    found = torch.autograd.grad(loss, list(leaves.values()))
    return results | {f"d {name}": gradient for name, gradient in zip(leaves, found)}


def error(got, want) -> float:
    return (got.double() - want).norm().item() / max(want.norm().item(), 1e-12)


def assert_as_good_as_torch(op, x) -> None:
    """Errors against float64 of at most twice those of the plain operations in x's dtype."""
    mine, want = gradients(op, x), gradients(op, {name: v.double() for name, v in x.items()})
    with pytest.MonkeyPatch.context() as plain:
        plain.setattr(elementwise, "is_fused", lambda x: False)
        usual = gradients(op, x)
    for name, gold in want.items():
        assert mine[name].dtype == usual[name].dtype and mine[name].shape == gold.shape, name
        found, torchs = error(mine[name], gold), error(usual[name], gold)
        assert found <= 2 * torchs + 4 * torch.finfo(torch.float32).eps, (name, found, torchs)


@pytest.mark.parametrize("strided", [False, True], ids=["whole", "parts"])
@pytest.mark.parametrize("rows", [0, 1, 7])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", CASES)
def test_errors_are_at_most_twice_plain_torchs(case, dtype, rows, strided, fused):
    torch.manual_seed(rows)
    op, make = CASES[case]
    x = make(rows, dtype, strided)
    if strided and rows > 1:
        assert not all(value.is_contiguous() for value in x.values())
    assert_as_good_as_torch(op, x)


BUGS = [
    ("rotary", "sin = -sin", "sin = sin"),
    ("rotary", "left * cos - right * sin", "left * cos + right * sin"),
    ("rotary", "x_ptr + head * head_stride + HALF + i", "x_ptr + head * head_stride + i"),
    ("rotary", "k_ptr + token * k_row", "k_ptr + token * q_row"),
    ("SwiGLU", "gate * sigmoid * (1 - sigmoid)", "gate * (1 - sigmoid)"),
    ("SwiGLU", "up_ptr + token * up_row", "up_ptr + token * F"),
    ("add and norm", "/ D + eps", "/ BLOCK + eps"),
    ("add and norm", "u * (tl.sum(g * u, 0) / D)", "u * (tl.sum(g, 0) / D)"),
    ("add and norm", "dx += tl.load", "dx -= tl.load"),
    ("add and norm", "dweight += dnorm", "dweight = dnorm"),
    ("add and norm", "tl.minimum(share, T - first)", "tl.minimum(share, T - first - 1)"),
]


@pytest.mark.parametrize("case, right, wrong", BUGS, ids=[f"{c}: {w}" for c, _, w in BUGS])
def test_planted_bugs_are_caught(case, right, wrong, fused, tmp_path, monkeypatch):
    source = Path(elementwise.__file__).with_name("elementwise_triton.py").read_text()
    assert right in source
    (tmp_path / "planted.py").write_text(source.replace(right, wrong))
    spec = importlib.util.spec_from_file_location("planted", tmp_path / "planted.py")
    planted = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "planted", planted)
    spec.loader.exec_module(planted)
    monkeypatch.setattr(elementwise, "NORM_PROGRAMS", 3)
    monkeypatch.setattr(elementwise, "triton_kernels", lambda: planted)
    op, make = CASES[case]
    with pytest.raises(AssertionError):
        assert_as_good_as_torch(op, make(7, torch.float32, True))


@pytest.mark.parametrize("programs", [1, 3, 7, 264])
def test_the_norms_weight_gradient_is_a_sum_over_programs(programs, fused, monkeypatch):
    monkeypatch.setattr(elementwise, "NORM_PROGRAMS", programs)
    x = norm_inputs(7, torch.float32, False)
    assert_as_good_as_torch(add_norm, x)
    first, again = (gradients(add_norm, x)["d weight"] for _ in range(2))
    assert torch.equal(first, again)


def test_the_norms_quotient_is_rounded_before_its_weight(fused):
    """As the published checkpoints were trained: not the same as one rounding at the end."""
    x = norm_inputs(64, torch.bfloat16, False)
    total, norm = add_norm(x)
    want = x["x"] + x["delta"]
    quotient = want.float() * (want.float().square().mean(-1, keepdim=True) + 1e-6).rsqrt()
    assert torch.equal(total, want) and torch.equal(norm, x["weight"] * quotient.bfloat16())
    once = (x["weight"].float() * quotient).bfloat16()
    assert not torch.equal(norm, once)


def test_gradients_that_are_not_asked_for_are_not_made(fused):
    x = norm_inputs(7, torch.float32, False)
    x["x"].requires_grad_()
    total, norm = add_norm(x)
    norm.sum().backward()  # the sum has no gradient, which is no gradient of zeros
    assert x["x"].grad.isfinite().all() and x["weight"].grad is None and x["delta"].grad is None
    lone = x["x"].detach().requires_grad_()
    add_norm(x | {"x": lone})[0].sum().backward()
    assert torch.equal(lone.grad, torch.ones_like(lone))


def test_spread_gradients(fused):
    """A sum's gradient is one number, spread over the shape by strides of zero."""
    for op, make in CASES.values():
        x = make(5, torch.float32, False)
        sums = []
        for dtype in (torch.float32, torch.float64):
            leaves = {n: v.to(dtype, copy=True).requires_grad_() for n, v in x.items()}
            outs = op(leaves | {n: leaves[n].detach() for n in CONSTANT if n in x})
            sum(out.sum() for out in outs).backward()
            sums.append([leaf.grad for name, leaf in leaves.items() if name not in CONSTANT])
        for mine, want in zip(*sums):
            torch.testing.assert_close(mine.double(), want, rtol=1e-4, atol=1e-5)


def plain_rotary(x, cos, sin):
    left, right = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-right, left), dim=-1) * sin


def plain_add_norm(x, weight):
    return x, weight * F.rms_norm(x, weight.shape, eps=1e-6)


PLAIN = {
    "rotary": lambda x: tuple(plain_rotary(x[n], x["cos"], x["sin"]) for n in "qk"),
    "rotary of a tower": lambda x: tuple(
        plain_rotary(x[n].float(), x["cos"], x["sin"]).to(x[n].dtype) for n in "qk"
    ),
    "SwiGLU": lambda x: (F.silu(x["gate"]) * x["up"],),
    "norm alone": lambda x: plain_add_norm(x["x"], x["weight"]),
    "add and norm": lambda x: plain_add_norm(x["x"] + x["delta"], x["weight"]),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("case", PLAIN)
def test_a_cpu_computes_what_the_plain_operations_do_to_the_bit(case, dtype):
    op, make = CASES[case]
    x = make(7, dtype, True)
    mine, want = gradients(op, x), gradients(PLAIN[case], x)
    assert all(torch.equal(mine[name], value) for name, value in want.items())


def a_layer(qk_norm=False):
    torch.manual_seed(0)
    sizes = {"hidden_size": 24, "num_attention_heads": 6, "num_key_value_heads": 2, "head_dim": 4}
    sizes |= {"intermediate_size": 37, "qkv_bias": not qk_norm, "qk_norm": qk_norm}
    layer = Layer(SimpleNamespace(**sizes, rms_norm_eps=1e-6))
    for norm in (part for part in layer.modules() if isinstance(part, RMSNorm)):
        torch.nn.init.normal_(norm.weight, 1.0, 0.3)
    return layer


def attend_with(cos, sin):
    def attend(q, k, v):
        q, k = elementwise.rotary(q, k, cos, sin)
        return q * (k + v).repeat_interleave(3, 1)

    return attend


@pytest.mark.parametrize("qk_norm", [False, True])
@pytest.mark.parametrize("recomputed", [False, True])
def test_a_layer_of_kernels_is_the_layer(recomputed, qk_norm, fused, monkeypatch):
    layer, x = a_layer(qk_norm), torch.randn(9, 24)
    angles = torch.randn(9, 1, 2).repeat(1, 1, 2)
    attend = attend_with(angles.cos(), angles.sin())
    found = []
    for kernels in (True, False):
        monkeypatch.setattr(elementwise, "is_fused", lambda x, kernels=kernels: kernels)
        leaf = x.clone().requires_grad_()
        if recomputed and kernels:
            out = checkpoint(layer, leaf, attend, use_reentrant=False)
        else:
            out = layer(leaf, attend)
        weights = [leaf, *layer.parameters()]
        found.append([out, *torch.autograd.grad(out.square().sum(), weights)])
    for mine, want in zip(*found):
        torch.testing.assert_close(mine, want, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("qk_norm", [False, True])
def test_joined_projections_of_a_sampler(qk_norm, fused):
    layer, x = a_layer(qk_norm), torch.randn(9, 24)
    angles = torch.randn(9, 1, 2).repeat(1, 1, 2)
    attend = attend_with(angles.cos(), angles.sin())
    with torch.no_grad():
        want, attention = layer(x, attend), layer.self_attn
        attention.joined = join((attention.q_proj, attention.k_proj, attention.v_proj))
        layer.mlp.joined = join((layer.mlp.gate_proj, layer.mlp.up_proj))
        torch.testing.assert_close(layer(x, attend), want)


def test_modules_take_rows_of_any_shape(fused):
    norm, x = RMSNorm(6, 1e-6), torch.randn(5, 4, 6)
    torch.testing.assert_close(norm(x), F.rms_norm(x, (6,), eps=1e-6))
    mlp, y = MLP(6, 10, bias=True), torch.randn(5, 6)
    want = mlp.down_proj(F.silu(mlp.gate_proj(y)) * mlp.up_proj(y))
    torch.testing.assert_close(mlp(y), want)
