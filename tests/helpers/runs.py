"""What the tests of whole runs share: their logs, their sudden ends, and torchrun."""

import json
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest

from nanosport.train import optim
from nanosport.train.metrics import WORK

ROOT = Path(__file__).parents[2]
CLOCKED = ("seconds", "balance", *WORK)  # what may differ between two runs of one thing


def log(run: Path) -> list[dict]:
    """The lines of a run's log without what a clock measured, or one rank has done."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


def wait_for_log(out: Path, run: subprocess.Popen) -> None:
    """Until a running process has done its first step."""
    while not (out / "metrics.jsonl").exists() or not log(out):
        assert run.poll() is None, run.stderr.read()[-2000:]
        time.sleep(0.05)


def assert_same(rows: list[dict], wanted: list[dict]) -> None:
    """Up to the rounding of sums in another order."""
    assert [row["step"] for row in rows] == [row["step"] for row in wanted]
    for ours, theirs in zip(rows, wanted):
        for key, value in theirs.items():
            assert ours[key] == pytest.approx(value, rel=1e-3, abs=3e-5), (ours["step"], key)


def killed(main, cfg, monkeypatch, step: int) -> None:
    """Run and die in the middle of `step`: gradients are there, the update is not."""
    whole = optim.set_lr

    def die(optimizer, now, *rest, **kwargs):
        if now == step:
            raise KeyboardInterrupt
        return whole(optimizer, now, *rest, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(optim, "set_lr", die)
        with pytest.raises(KeyboardInterrupt):
            main(cfg)


def flags(cfg, **more) -> dict:
    """What of a config is not its default, as JSON takes it."""
    given = {k: v for k, v in vars(cfg).items() if v != getattr(type(cfg), k, None)} | more
    return {k: str(v) if isinstance(v, Path) else v for k, v in given.items()}


def torchrun(
    jobs: list, *plant: str, nodes: int = 1, timeout_s: float = 300, meanwhile=None
) -> subprocess.CompletedProcess:
    """tests/helpers/ranks.py on two processes, or on two for each of two nodes, which are both this
    machine.

    meanwhile: called with the running process.
    """
    env = {
        **os.environ,
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": str(ROOT),
    }
    where = (
        ["--standalone"]
        if nodes == 1
        else [
            "--nnodes",
            str(nodes),
            "--master-addr",
            "127.0.0.1",
            "--master-port",
            str(free_port()),
        ]
    )
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", *where]
    call = {"cwd": ROOT, "env": env, "text": True, "stderr": subprocess.PIPE}
    others = [
        subprocess.Popen(
            [*command, "--node-rank", str(k), "tests/helpers/ranks.py", json.dumps(jobs)],
            **call | {"stderr": subprocess.DEVNULL},
        )
        for k in range(1, nodes)
    ]
    try:
        with subprocess.Popen(
            [*command, "tests/helpers/ranks.py", json.dumps(jobs), *plant], **call
        ) as run:
            try:
                if meanwhile:
                    meanwhile(run)
                _, printed = run.communicate(timeout=timeout_s)
            except BaseException:
                run.kill()
                raise
            return subprocess.CompletedProcess(run.args, run.returncode, stderr=printed)
    finally:
        for other in others:
            other.wait(60)


def free_port() -> int:
    with socket.socket() as any_one:
        any_one.bind(("127.0.0.1", 0))
        return any_one.getsockname()[1]
