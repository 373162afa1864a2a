"""What needs processes of its own: real compilation, ranks, the bench; and the kernels' promises to the rest of the project."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parent.parent


def run(*command: str, **env: str) -> str:
    """Stdout of a command run in the root; TRITON_INTERPRET of the tests is not handed on."""
    inherited = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(command, cwd=ROOT, env={**inherited, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **env}, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


def test_every_kernel_compiles_for_a100_and_h100_without_spills():
    pytest.importorskip("triton")
    lines = run(sys.executable, "tests/compile_kernels.py").splitlines()
    assert len(lines) == 2 * 2 * 4 * 2 and all(line.endswith(" 0 bytes spilled") for line in lines)
    registers = [int(line.split(": ")[1].split()[0]) for line in lines]
    assert max(registers) <= 64, "four programs of 256 threads no longer fit on a multiprocessor"


def test_a_tied_head_sharded_over_two_ranks_equals_one_process():
    command = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "tests/sharded_head.py")
    assert "equal" in run(*command)


def test_the_bench_runs_without_a_gpu_and_says_so(tmp_path):
    pytest.importorskip("triton")
    if torch.cuda.is_available():
        pytest.skip("a GPU is here: the bench would measure it")
    said = run(sys.executable, "-m", "kernels.bench", "--out", str(tmp_path), "--repeats", "1")
    assert "No GPU" in said and not list(tmp_path.iterdir())
    for op in ("policy_loss", "attention", "decoder layer"):
        assert any(line.startswith(op) and "nanosport" in line for line in said.splitlines())

