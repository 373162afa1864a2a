"""What needs processes of its own: real compilation, ranks, the bench; and the kernels' promises to
the rest of the project."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from nanosport.bench import kernels as bench
from nanosport.bench import traffic
from nanosport.files import provenance

ROOT = Path(__file__).parent.parent


def run(*command: str, **env: str) -> str:
    """Stdout of a command run in the root; TRITON_INTERPRET of the tests is not handed on."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        command,
        cwd=ROOT,
        env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_kernel_compiles_for_a100_and_h100_without_spills():
    pytest.importorskip("triton")
    lines = run(sys.executable, "tests/helpers/compile_kernels.py").splitlines()
    assert len(lines) == 2 * 2 * (4 * 2 + 4 + 6 + 3 + 2 * 6) and all(
        line.endswith(" 0 bytes spilled") for line in lines
    )
    registers = {line.split(": ")[0]: int(line.split(": ")[1].split()[0]) for line in lines}
    row = [number for name, number in registers.items() if "aligned" in name]
    assert max(row) <= 64, "four programs of 256 threads no longer fit on a multiprocessor"
    norm = [number for name, number in registers.items() if "bf16 norm backward 7B" in name]
    assert max(norm) <= 64, "two programs of 512 threads no longer fit on a multiprocessor"


def test_a_tied_head_sharded_over_two_ranks_equals_one_process():
    command = (
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        "tests/helpers/sharded_head.py",
    )
    assert "equal" in run(*command)


def test_the_bench_runs_without_a_gpu_and_says_so(tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the bench would measure it")
    said = run(
        sys.executable, "-m", "nanosport.bench.kernels", "--out", str(tmp_path), "--repeats", "1"
    )
    assert "No GPU" in said and not list(tmp_path.iterdir())
    for op in ("policy_loss", "attention", "rotary", "SwiGLU", "add, RMSNorm", "decoder layer"):
        assert any(line.startswith(op) and "nanosport" in line for line in said.splitlines())


def test_a_table_is_made_of_what_the_bench_wrote(tmp_path):
    rows = [
        {
            "op": "policy_loss",
            "impl": "nanosport",
            "shape": "7B",
            "ms": 1.5,
            "peak_gib": 2.25,
            "tflops": 700.0,
        },
        {"op": "policy_loss", "impl": "torch full logits", "shape": "7B", "error": "out of memory"},
    ]
    (tmp_path / "card.json").write_text(
        json.dumps({**provenance(), "matmul_tflops": 750.0, "rows": rows})
    )
    table = bench.as_markdown(tmp_path / "card.json").splitlines()
    assert torch.__version__ in table[0] and "750.0" in table[0]
    assert table[4:] == [
        "| policy_loss | nanosport | 7B | 1.5 | 2.25 | 700.0 |",
        "| policy_loss | torch full logits | 7B | out of memory | – | – |",
    ]


def test_memory_of_attention_grows_with_the_tokens_not_with_their_square():
    """One causal layer over 16k tokens, forward and backward: the scores alone would be 2 GiB."""
    code = """
import re, torch
from kernels.attention import varlen_attention
peak = lambda: int(re.search(r"VmHWM:\\s*(\\d+)", open("/proc/self/status").read())[1]) / 2**10  # ru_maxrss would begin with the parent's
def run(tokens):
    q, k, v = (torch.randn(tokens, heads, 16, requires_grad=True) for heads in (2, 1, 1))
    varlen_attention(q, k, v, torch.tensor([0, tokens], dtype=torch.int32), tokens, causal=True).sum().backward()
run(256)
before = peak()
run(16384)
print(peak() - before)
"""
    assert float(run(sys.executable, "-c", code)) < 200, "MiB above what was there"


def test_traffic_counts_what_each_operation_reads_and_writes():
    with torch.device("meta"):
        x = torch.empty(8, 16, dtype=torch.bfloat16, requires_grad=True)
        size = 8 * 16 * 2
        assert traffic.count(lambda x: x * 2, x)[0] == 4 * size  # x, 2x; the gradient, twice it
        assert traffic.count(lambda x: (x * 2).view(16, 8).exp(), x) == (
            4 * size + 5 * size,
            5 * size,
        )  # views cost nothing
    found = traffic.parts(8192)
    assert found["RMSNorm, two"][0] > 10 * found["RMSNorm, two"][1]
    assert sum(
        run - fused for run, fused in (found["M-RoPE"], found["SwiGLU"])
    ) / 2**30 == pytest.approx(2.7, abs=0.1)
    plain, fused = (traffic.layer_traffic(8192, fused) for fused in (False, True))
    assert (plain.launches, fused.launches) == (47, 19)
    assert fused.num_bytes < 0.52 * plain.num_bytes
    seven = 6 * 8192 * (2 * 3584 * 3584 + 2 * 3584 * 512 + 3 * 3584 * 18944)
    assert traffic.product_flops(8192) == seven
