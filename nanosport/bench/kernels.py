"""Checks and times the kernels on one GPU, beside what people use instead, in one run of under 8
minutes.

    python -m nanosport.bench.kernels       # → results/kernels/<card>.json and a table
    python -m nanosport.bench.kernels --table results/kernels/*.json    # what was measured
    pip install -r nanosport/bench/requirements.txt   # adds Liger to the comparison

Without a GPU it runs small shapes, the Triton kernel in its interpreter: that checks the code and
measures nothing.

Times are the median of several forward + backward passes. Peak memory is what is allocated above
the inputs. TFLOP/s count 6·M·D·V operations for the loss, whatever an implementation really does,
and 3.5 times the forward's for attention.
"""

import argparse
import itertools
import json
import os
import time
from collections.abc import Iterator
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"  # before triton is first imported

from kernels import elementwise, policy_loss, policy_row
from kernels.attention import varlen_attention
from kernels.elementwise import add_norm, rotary, swiglu
from kernels.policy_loss import Objective, TokenInputs, fused_linear_policy_loss
from nanosport.bench.device import card_name, wait, write_report
from nanosport.cli import ending
from nanosport.fields import COUNT
from nanosport.files import ASSETS, provenance
from nanosport.model.decoder import Layer
from nanosport.model.folder import load_config
from nanosport.report import markdown

GPU = torch.cuda.is_available()
DEVICE, DTYPE = ("cuda", torch.bfloat16) if GPU else ("cpu", torch.float32)
SHAPES = {"tiny": (32, 515)}
if GPU:
    SHAPES = {"3B": (2048, 151936), "7B": (3584, 152064), "8B": (4096, 151936)}
ROWS = (1024, 4096, 8192, 16384) if GPU else (64,)
TOKENS = (4096, 16384, 65536, 131072) if GPU else (256,)
CFG = load_config(ASSETS / ("qwen2.5-vl-7b" if GPU else "nano-backbone"))
HEADS, KV_HEADS, HEAD = CFG.num_attention_heads, CFG.num_key_value_heads, CFG.head_dim
WIDTH, INNER = CFG.hidden_size, CFG.intermediate_size
BETA, LENGTH = 0.04, 1024 if GPU else 16
OBJECTIVE = Objective(beta=BETA)


def inputs(num_rows: int, width: int, vocab: int, dtype=DTYPE) -> dict[str, torch.Tensor]:
    g = torch.Generator(DEVICE).manual_seed(0)
    options = {"generator": g, "device": DEVICE}
    x = {
        name: torch.randn(n, width, dtype=dtype, **options)
        for name, n in (("hidden", num_rows), ("weight", vocab))
    }
    x["weight"].mul_(width**-0.5)
    x["targets"] = torch.randint(vocab, (num_rows,), **options)
    x["advantages"] = torch.randn(num_rows // LENGTH, **options).repeat_interleave(LENGTH)
    x["scale"] = torch.full((num_rows,), 1 / num_rows, device=DEVICE)
    logp, _ = policy_loss.linear_logprobs(x["hidden"], x["weight"], x["targets"])
    for name in ("old_logp_M", "ref_logp_M"):
        x[name] = logp + 0.1 * torch.randn(num_rows, **options)
    x["hidden"].requires_grad_()
    x["weight"].requires_grad_()
    return x


def policy_terms(logp_M, x):
    """What every plain implementation does with the log-probs."""
    ratio_M, a_M, d_M = (logp_M - x["old_logp_M"]).exp(), x["advantages"], x["ref_logp_M"] - logp_M
    gain_M = torch.minimum(ratio_M * a_M, ratio_M.clamp(0.8, 1.2) * a_M)
    return (x["scale"] * (BETA * (d_M.exp() - d_M - 1) - gain_M)).sum()


def full_logits(hidden_MD, weight_VD, targets_M):
    logits_MV = (hidden_MD @ weight_VD.T).to(torch.promote_types(hidden_MD.dtype, torch.float32))
    return logits_MV.log_softmax(-1).gather(1, targets_M[:, None])[:, 0]


def ours(x):
    tokens = TokenInputs(
        x["targets"], x["advantages"], x["scale"], x["old_logp_M"], x["ref_logp_M"]
    )
    return fused_linear_policy_loss(x["hidden"], x["weight"], tokens, OBJECTIVE)[0]


def torch_full(x):
    return policy_terms(full_logits(x["hidden"], x["weight"], x["targets"]), x)


def torch_compiled():
    """Full logits, compiled for the one shape that comes: made anew for each."""
    torch._dynamo.reset()
    logp = torch.compile(full_logits, dynamic=False)
    return lambda x: policy_terms(logp(x["hidden"], x["weight"], x["targets"]), x)


def torch_chunked(x):
    """Logits of 1024 rows at a time, made again in the backward pass: four products."""
    parts = zip(x["hidden"].split(1024), x["targets"].split(1024))
    logp = [checkpoint(full_logits, h, x["weight"], y, use_reentrant=False) for h, y in parts]
    return policy_terms(torch.cat(logp), x)


def liger():
    """LigerFusedLinearGRPOLoss on sequences of 1024 tokens, or None where it is not installed."""
    try:
        from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss
    except ImportError:
        return None
    how = {"beta": BETA, "compiled": GPU, "use_ref_model": True, "loss_type": "dapo"}
    loss = LigerFusedLinearGRPOLoss(**how, epsilon_low=0.2, epsilon_high=0.2)

    def run(x):
        grid = (-1, LENGTH)
        return loss(
            _input=x["hidden"].view(*grid, x["hidden"].shape[-1]),
            lin_weight=x["weight"],
            selected_token_ids=x["targets"].view(grid),
            attention_mask=torch.ones_like(x["targets"]).view(grid),
            advantages=x["advantages"].view(grid)[:, 0],
            ref_per_token_logps=x["ref_logp_M"].view(grid),
            old_per_token_logps=x["old_logp_M"].view(grid),
        )[0]

    return run


def measure(step, inputs: tuple, leaves, repeats: int, required: bool = True) -> dict[str, float]:
    """Median milliseconds and peak GiB above what was there, of step(*inputs).backward(); says so
    where it does not fit."""
    try:
        times = []
        for _ in range(repeats + 2):
            for leaf in leaves:
                leaf.grad = None
            wait()
            if GPU:
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            step(*inputs).backward()
            wait()
            times.append(1e3 * (time.perf_counter() - began))
        peak = (torch.cuda.max_memory_allocated() - before) / 2**30 if GPU else 0.0
        found = {"ms": median(times[2:]), "ms_min": min(times[2:]), "peak_gib": peak}
        return {name: round(value, 3) for name, value in found.items()}
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except Exception as error:  # another's failure is a row of the table, not the end of the run
        if required:
            raise
        return {"error": f"{type(error).__name__}: {error}".splitlines()[0][:200]}
    finally:
        for leaf in leaves:
            leaf.grad = None
        torch.cuda.empty_cache()  # does nothing without a GPU


def ceiling() -> float:
    """TFLOP/s of this card's own matrix product, 8192³: what 100 % means here."""
    n = 8192 if GPU else 256
    a, b = (torch.randn(n, n, device=DEVICE, dtype=DTYPE) for _ in "ab")
    times = []
    for _ in range(12):
        wait()
        began = time.perf_counter()
        a @ b
        wait()
        times.append(time.perf_counter() - began)
    return 2 * n**3 / median(times[2:]) / 1e12


VARIANTS = {  # what the check goes through: constants, what is given, banned columns
    "grpo": (OBJECTIVE, ("old_logp_M", "ref_logp_M"), None),
    "on policy, temperature, banned": (Objective(0.7), (), [0, 7]),
    "cispo, entropy, importance weight": (
        Objective(0.7, 1.0, 0.3, 0.1, 0.01, 1.2, True),
        ("old_logp_M", "ref_logp_M", "sampled_logp_M"),
        [0, 7],
    ),
    "gspo": (Objective(clip_low=0.05, clip_high=0.05), ("old_logp_M", "sequence_M"), None),
}


def gradients(x, row, objective: Objective, given: tuple, banned) -> dict[str, torch.Tensor]:
    """What comes out of the loss where `row` fills the rows."""
    policy_loss.fill_rows = row
    hidden, weight = (x[k].detach().clone().requires_grad_() for k in ("hidden", "weight"))
    banned = None if banned is None else torch.tensor(banned, device=DEVICE)
    optional = {name: x[name] for name in given}
    targets = x["targets"].clamp(min=8)  # none is banned
    tokens = TokenInputs(targets, x["advantages"], x["scale"], **optional)
    loss, stats = fused_linear_policy_loss(hidden, weight, tokens, objective, banned)
    loss.backward()
    values = {"loss": loss.detach(), "dX": hidden.grad, "dW": weight.grad}
    return values | {"logp": stats.logp_M, "entropy": stats.entropy_M}


def check() -> dict[str, dict]:
    """Errors of the row kernel and of the torch row at this dtype against float64, at an odd size
    and over several chunks; raises where the kernel's are above twice torch's."""
    x = inputs(3 * LENGTH, 256 if GPU else 24, 5003 if GPU else 101)
    x["sampled_logp_M"] = x["old_logp_M"] + 0.3 * torch.randn_like(x["old_logp_M"])
    x["sequence_M"] = torch.arange(3 * LENGTH, device=DEVICE) // LENGTH
    exact = {k: v.double() if v.is_floating_point() else v for k, v in x.items()}
    errors, fill, chunk_rows = {}, policy_loss.fill_rows, policy_loss.chunk_rows
    policy_loss.chunk_rows = lambda *_: LENGTH - 5
    ways = ((exact, policy_loss.torch_rows), (x, fill), (x, policy_loss.torch_rows))
    for variant, case in VARIANTS.items():
        want, kernel, plain = (gradients(*way, *case) for way in ways)
        for name, value in want.items():
            error, usual = (
                (got[name].double() - value).norm().item() / value.norm().item()
                for got in (kernel, plain)
            )
            errors.setdefault(variant, {})[name] = {"kernel": error, "torch": usual}
            if not error <= 2 * usual + 1e-6:
                raise ValueError(
                    f"{variant}, {name}: error {error:.2e} against float64, plain torch {usual:.2e}"
                )
    policy_loss.fill_rows, policy_loss.chunk_rows = fill, chunk_rows
    return errors


def bench_policy_loss(repeats: int, top: float) -> Iterator[dict]:
    """A row for each implementation and shape. top: the card's TFLOP/s."""
    for (model, (width, vocab)), num_rows in itertools.product(SHAPES.items(), ROWS):
        x = inputs(num_rows, width, vocab)
        steps = {"nanosport": ours, "torch full logits": torch_full, "torch chunked": torch_chunked}
        if step := liger():
            steps["Liger"] = step
        if GPU:
            steps["torch.compile full logits"] = torch_compiled()
        shape = f"{model} M={num_rows} D={width} V={vocab}"
        for name, step in steps.items():
            found = measure(step, (x,), (x["hidden"], x["weight"]), repeats, required=step is ours)
            row = {"op": "policy_loss", "impl": name, "shape": shape, **found}
            if "ms" in row:  # Liger's own normaliser apart, all compute one loss
                with torch.no_grad():
                    row["loss"] = step(x).item()
                row["tflops"] = round(6 * num_rows * width * vocab / row["ms"] / 1e9, 1)
                row["percent_of_ceiling"] = round(100 * row["tflops"] / top, 1)
            yield row


def varlen(q_THd, k_TKd, v_TKd, cu_seqlens, length):
    return varlen_attention(q_THd, k_TKd, v_TKd, cu_seqlens, length, causal=True).float().sum()


def sdpa(q_THd, k_TKd, v_TKd, cu_seqlens, length):
    outs = []
    for segment in zip(*(x.split(length) for x in (q_THd, k_TKd, v_TKd))):
        q, k, v = (x[None].transpose(1, 2) for x in segment)
        outs.append(F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True))
    return torch.stack(outs).float().sum()


def one_layer(layer, x_TD, cu_seqlens, cos, sin):
    def attend(q, k, v):
        q, k = rotary(q, k, cos, sin)
        return varlen_attention(q, k, v, cu_seqlens, len(x_TD), causal=True)

    return layer(x_TD, attend).float().sum()


def bench_attention(repeats: int) -> Iterator[dict]:
    for tokens, segments in itertools.product(TOKENS, (1, 8)):
        qkv = [
            torch.randn(tokens, heads, HEAD, device=DEVICE, dtype=DTYPE, requires_grad=True)
            for heads in (HEADS, KV_HEADS, KV_HEADS)
        ]
        length = tokens // segments
        cu_seqlens = torch.arange(0, tokens + 1, length, device=DEVICE, dtype=torch.int32)
        shape = f"T={tokens} in {segments} H={HEADS} K={KV_HEADS} d={HEAD}"
        flops = 3.5 * 2 * tokens * length * HEADS * HEAD
        for name, step in (("nanosport varlen", varlen), ("torch SDPA, a call a segment", sdpa)):
            found = measure(step, (*qkv, cu_seqlens, length), qkv, repeats, required=step is varlen)
            row = {"op": "attention", "impl": name, "shape": shape, **found}
            if "ms" in row:
                row["tflops"] = round(flops / row["ms"] / 1e9, 1)
            yield row


class Pull(torch.autograd.Function):
    """A loss of zero, whose gradients are the results themselves: no pass over them is timed."""

    @staticmethod
    def forward(ctx, *outs):
        ctx.save_for_backward(*outs)
        return outs[0].new_zeros(())

    @staticmethod
    def backward(ctx, _):
        return ctx.saved_tensors


def elementwise_cases(tokens: int) -> dict[str, tuple]:
    """(operation, what is differentiated, what is not) of each."""

    def leaf(*shape):
        return torch.randn(*shape, device=DEVICE, dtype=DTYPE, requires_grad=True)

    angles = torch.randn(tokens, 1, HEAD // 2, device=DEVICE).repeat(1, 1, 2)
    cos_sin = angles.cos().to(DTYPE), angles.sin().to(DTYPE)
    turned = leaf(tokens, HEADS, HEAD), leaf(tokens, KV_HEADS, HEAD)
    rows = leaf(tokens, WIDTH), leaf(tokens, WIDTH), leaf(WIDTH)
    return {
        "rotary": (rotary, turned, cos_sin),
        "SwiGLU": (swiglu, (leaf(tokens, INNER), leaf(tokens, INNER)), ()),
        "add, RMSNorm": (add_norm, rows, (1e-6,)),
    }


def bench_elementwise(repeats: int) -> Iterator[dict]:
    """Each operation by our kernel and in plain torch; raises where the kernel's error against
    float64 is above twice torch's."""
    choose = elementwise.is_fused
    kernels_too = {"nanosport": choose if GPU else lambda x: x.dtype != torch.float64}
    ways = kernels_too | {"torch": lambda x: False}
    for tokens in TOKENS[:2] if GPU else (9,):
        for name, (op, leaves, others) in elementwise_cases(tokens).items():

            def step(*given, op=op):
                outs = op(*given)
                return Pull.apply(*(outs if isinstance(outs, tuple) else (outs,)))

            errors = {}
            for impl, elementwise.is_fused in ways.items():
                errors[impl] = elementwise_error(step, leaves, others)
                found = measure(step, (*leaves, *others), leaves, repeats)
                shape = " ".join(str(tuple(leaf.shape)) for leaf in leaves)
                yield {"op": name, "impl": impl, "shape": shape, **found}
            if not errors["nanosport"] <= 2 * errors["torch"] + 1e-6:
                raise ValueError(f"{name}: errors against float64 {errors}")
    elementwise.is_fused = choose


def elementwise_error(step, leaves: tuple, others: tuple) -> float:
    """The largest error of a gradient against float64."""
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    wide = [x.double() if isinstance(x, torch.Tensor) else x for x in others]
    got = torch.autograd.grad(step(*leaves, *others), leaves)
    want = torch.autograd.grad(step(*exact, *wide), exact)
    return max(((g.double() - w).norm() / w.norm()).item() for g, w in zip(got, want))


def bench_layer() -> Iterator[dict]:
    """One decoder layer of the 7B, forward and backward: its memory grows linearly with the
    tokens."""
    layer = Layer(CFG).to(DEVICE, DTYPE)
    for tokens in TOKENS[-3:]:
        x_TD = torch.randn(tokens, WIDTH, device=DEVICE, dtype=DTYPE, requires_grad=True)
        cu_seqlens = torch.tensor([0, tokens], device=DEVICE, dtype=torch.int32)
        cos, sin = torch.randn(2, tokens, 1, HEAD, device=DEVICE, dtype=DTYPE)
        given, leaves = (layer, x_TD, cu_seqlens, cos, sin), [x_TD, *layer.parameters()]
        row = {"op": "decoder layer", "impl": "nanosport", "shape": f"T={tokens} D={WIDTH}"}
        yield row | measure(one_layer, given, leaves, repeats=1)


def line(row: dict) -> str:
    figures = row.get("error")
    if figures is None:
        figures = f"{row['ms']:9.2f} ms {row['peak_gib']:7.2f} GiB"
        figures += f" {row.get('tflops', 0):7.1f} TFLOP/s"
    return f"{row['op']:14}{row['impl']:30}{row['shape']:40}{figures}"


def as_markdown(path: Path) -> str:
    """A table of a written JSON: its hardware, then a line a measurement."""
    report = json.loads(path.read_text())
    made = f"{report['device']}, torch {report['torch']}, commit {report['commit']}"
    titles = {"op": "op", "impl": "implementation", "shape": "shape", "ms": "ms"}
    titles |= {"peak_gib": "peak GiB", "tflops": "TFLOP/s"}
    lines = [list(titles.values())]
    for row in report["rows"]:
        whole = {"ms": row.get("error"), "peak_gib": "–", "tflops": "–"} | row
        lines.append([str(whole[name]) for name in titles])
    return f"{made}; matrix product {report['matmul_tflops']} TFLOP/s\n\n{markdown(*lines)}"


def main() -> None:
    as_it_is = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=as_it_is)
    parser.add_argument("--out", type=Path, default=Path("results/kernels"), help="JSON's folder")
    parser.add_argument("--repeats", type=COUNT, default=5, help="passes a time is the median of")
    only_print = "measure nothing: print these as Markdown"
    parser.add_argument("--table", type=Path, nargs="+", metavar="JSON", help=only_print)
    args = parser.parse_args()
    if args.table:
        print("\n\n".join(map(as_markdown, args.table)))
        return
    if not GPU:
        print(
            "No GPU here: tiny shapes in Triton's interpreter. This checks the code; its times "
            "mean nothing and are not written."
        )
        policy_loss.fill_rows = policy_row.triton_rows
    began, rows = time.time(), []
    errors = check()
    top = ceiling()
    print(f"errors against float64: {errors}\nmatrix product 8192³: {top:.0f} TFLOP/s")
    repeats = args.repeats
    benches = (bench_policy_loss(repeats, top), bench_attention(repeats))
    benches += (bench_elementwise(repeats), bench_layer())
    for bench in benches:
        for row in bench:
            rows.append(row)
            print(line(row), flush=True)
        if GPU:  # after each, so that what is measured is not lost
            report = {**provenance(), "seconds": round(time.time() - began)}
            report |= {"matmul_tflops": round(top, 1), "errors": errors, "rows": rows}
            path = write_report(args.out, card_name(), report)
            print(f"{path}, {time.time() - began:.0f} s")


if __name__ == "__main__":
    ending(main)
