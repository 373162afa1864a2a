"""A tiny RL run must learn: the reward rises, and the tool stays."""

import json
from pathlib import Path

import pytest

import rl
from data_prep import arena

ROOT = Path(__file__).parents[1]


def test_rewards_rise_in_a_tiny_rl_run(tmp_path):
    arena.main(arena.Config(out=tmp_path / "arena", sft_clips=1, rl_clips=6, test_clips=1))
    cfg = rl.Config(
        model=str(ROOT / "assets/nano-sft"),
        data=tmp_path / "arena/rl.jsonl",
        out=tmp_path / "rl",
        steps=14,
        num_prompts=4,
        lr=4e-4,
        warmup=1,
    )
    rl.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "rl/log.jsonl").read_text().splitlines()]
    first = sum(r["reward"] for r in rows[:4]) / 4
    last = sum(r["reward"] for r in rows[-4:]) / 4
    assert last > first + 0.1, [round(r["reward"], 2) for r in rows]
    assert min(r["tool_rate"] for r in rows) > 0.3
    assert max(r["logprob_gap_text"] for r in rows) < 1e-3
    assert max(r["logprob_gap_after_image"] for r in rows) < 1e-3


def test_rl_refuses_a_model_that_does_not_hold_the_format(tmp_path):
    arena.main(arena.Config(out=tmp_path / "arena", sft_clips=1, rl_clips=1, test_clips=1))
    cfg = rl.Config(
        model=str(ROOT / "assets/nano-backbone"), data=tmp_path / "arena/rl.jsonl", out=tmp_path / "rl", num_prompts=2, min_format_rate=0.95
    )
    with pytest.raises(ValueError, match="train SFT longer"):
        rl.main(cfg)
