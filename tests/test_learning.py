"""A tiny RL run must learn: its reward rises; and RL does not start from a model that is not ready
for it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest

import rl
from nanosport.records import read_questions


@pytest.fixture(scope="module")
def two_questions(arena_folder, tmp_path_factory) -> Path:
    """Two multiple-choice questions: with so few, a policy that answers at random can learn which
    letter pays."""
    path = tmp_path_factory.mktemp("questions") / "rl.jsonl"
    asked = [
        q for q in read_questions(arena_folder / "rl.jsonl") if q.options and q.answer in "ABC"
    ][:2]
    path.write_text(
        "".join(
            json.dumps(asdict(q) | {"video": str(Path(q.video).absolute())}) + "\n" for q in asked
        )
    )
    return path


def test_the_reward_of_a_tiny_run_rises(taught_folder, two_questions, tmp_path):
    cfg = rl.Config(
        model=str(taught_folder), data=two_questions, out=tmp_path / "rl", steps=24, num_prompts=2, lr=5e-4, adam_eps=1e-8, temperature=1.0,
        warmup=1, max_new_tokens=60, min_format_rate=0, min_tool_rate=0,
    )  # fmt: skip
    rl.main(cfg)
    rows = [json.loads(line) for line in (tmp_path / "rl/log.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    first, last = sum(rewards[:6]) / 6, sum(rewards[-6:]) / 6
    assert last > first + 0.3, [round(r, 2) for r in rewards]
    assert max(row["logprob_gap_text"] for row in rows) < 1e-3


def test_rl_refuses_a_model_that_does_not_hold_the_format(nano_folder, two_questions, tmp_path):
    cfg = rl.Config(
        model=str(nano_folder),
        data=two_questions,
        out=tmp_path / "rl",
        num_prompts=2,
        max_new_tokens=30,
    )
    with pytest.raises(ValueError, match="train SFT longer"):
        rl.main(cfg)
