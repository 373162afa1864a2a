"""What the tests of whole runs share: their logs, their sudden ends, and torchrun."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from nanosport import optim

ROOT = Path(__file__).parent.parent
CLOCKED = ("seconds", "balance")  # what may differ between two runs of one thing


def log(run: Path) -> list[dict]:
    """The lines of a run's log without what a clock measured."""
    rows = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKED)} for row in rows]


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


def torchrun(jobs: list, *plant: str, ranks: int = 2, timeout_s: float = 300) -> subprocess.CompletedProcess:
    """tests/ranks.py on several processes."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks), "tests/ranks.py"]
    env = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}
    command += [json.dumps(jobs), *plant]
    return subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout_s)
