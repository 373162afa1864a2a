"""A tiny RL run must learn: its reward rises; and RL does not start from a model that is not ready
for it."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
from nanosport.engine.own import OwnSampler, banned_ids
from nanosport.env.env import Limits
from nanosport.env.prompt import END
from nanosport.env.rollout import Conversation
from nanosport.env.tools import STOPS
from nanosport.image import ImageConfig, preprocess
from nanosport.model.folder import load_model, load_tokenizer
from nanosport.model.frames import FrameEncoder
from nanosport.records import read_questions

ROOT = Path(__file__).parent.parent


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
    rows = [json.loads(line) for line in (tmp_path / "rl/metrics.jsonl").read_text().splitlines()]
    rewards = [row["reward"] for row in rows]
    first, last = sum(rewards[:6]) / 6, sum(rewards[-6:]) / 6
    assert last > first + 0.3, [round(r, 2) for r in rewards]
    assert max(row["logprob_gap_text"] for row in rows) < 1e-3


@pytest.fixture
def small(two_questions, tmp_path) -> rl.Config:
    """Two steps on the arena's two questions, from the shipped SFT model."""
    rows = [json.loads(line) for line in two_questions.read_text().splitlines()]
    data = tmp_path / "rl.jsonl"
    data.write_text("".join(json.dumps(row | {"pass_rate": 0.5}) + "\n" for row in rows))
    return rl.Config(
        str(ROOT / "assets/nano-sft"), data, tmp_path / "rl", steps=2, num_prompts=2, group_size=4, temperature=1.2,
        max_new_tokens=80, min_format_rate=0, min_tool_rate=0, save_every=1,
    )  # fmt: skip


def log_of(cfg: rl.Config) -> list[dict]:
    return [json.loads(line) for line in (cfg.out / "metrics.jsonl").read_text().splitlines()]


def without_clock(rows: list[dict]) -> list[dict]:
    return [{k: v for k, v in row.items() if not k.startswith("seconds")} for row in rows]


def test_rl_learns_from_a_reward_of_ones_own_and_refills_flat_groups(small, tmp_path, monkeypatch):
    path = tmp_path / "my_reward.py"
    path.write_text(
        "def flat(episode):\n    return 0.25\n\ndef long(episode, accuracy):\n    return accuracy + len(episode.ids) / 1e4\n"
    )
    flat = replace(small, reward=f"{path}:flat", refill=2)
    slept, sleep = [], OwnSampler.sleep
    monkeypatch.setattr(OwnSampler, "sleep", lambda self: (slept.append(1), sleep(self)))
    rl.main(flat)
    rows = log_of(flat)
    assert len(slept) == len(rows), "once a step: on a GPU vLLM wakes with the next weights alone"
    assert [(r["flat_groups"], r["refilled"], r["reward"]) for r in rows] == [(1, 0, 0.25)] * 2
    assert all(abs(r["loss"]) < 1e-6 or r["kl"] > 0 for r in rows)
    # each of them was sampled three times: once, and for every refill
    once = replace(small, reward=f"{path}:flat", out=tmp_path / "once")
    rl.main(once)
    work = [sum(r["decode_steps"] for r in log_of(cfg)) for cfg in (flat, once)]
    assert work[0] > 2 * work[1]
    with pytest.raises(ValueError, match="NameError"):
        path.write_text("def broken(episode):\n    return nothing\n")
        rl.main(replace(small, reward=f"{path}:broken", out=tmp_path / "broken"))


def test_refilled_groups_come_back_on_resume(small, tmp_path):
    """By accuracy alone most groups are flat, and what replaces them is drawn anew alike."""
    whole = replace(small, reward="accuracy", refill=3, steps=3)
    rl.main(whole)
    rows = log_of(whole)
    assert sum(row["refilled"] for row in rows) > 0, [row["flat_groups"] for row in rows]
    assert all(row["refilled"] <= 2 * row["flat_groups"] for row in rows)
    cut = replace(whole, out=tmp_path / "cut", steps=2)
    rl.main(cut)
    rl.main(replace(cut, steps=3, resume=True))
    both = [without_clock(log_of(cfg)) for cfg in (whole, cut)]
    same = ("reward", "refilled", "flat_groups", "tokens", "ungraded")
    assert [[row[k] for k in same] for row in both[0]][:2] == [
        [row[k] for k in same] for row in both[1]
    ][:2]
    assert both[0][2]["refilled"] == both[1][2]["refilled"]


def test_rl_with_videobrains_reward_and_the_first_versions_calls(small, tmp_path):
    rl.main(replace(small, reward="videobrain", max_turns=6, call_syntax="choose_frames"))
    rows = log_of(small)
    # the shipped model was taught other calls: what it says is refused, and no look is paid
    assert all(row["tool_rate"] == 0 for row in rows) and len(rows) == 2
    small.data.write_text(small.data.read_text().replace('"pass_rate": 0.5', '"pass_rate": null'))
    with pytest.raises(ValueError, match="has no pass_rate, which --reward videobrain needs"):
        rl.main(replace(small, reward="videobrain", out=tmp_path / "other"))


def test_flags_of_rewards_are_checked(small):
    with pytest.raises(ValueError, match="--failed-rate 0.8: must be below --solved-rate 0.75"):
        rl.main(replace(small, reward="videobrain", failed_rate=0.8))
    with pytest.raises(ValueError, match="--reward v3: must be one of v1, v2, videobrain"):
        rl.main(replace(small, reward="v3"))
    with pytest.raises(ValueError, match="--refill -1"):
        rl.main(replace(small, refill=-1))


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


def test_turns_end_where_only_the_end_of_turn_ends_them(arena_folder):
    """The shipped model, played by transformers' generate with the model's own end of turn as the
    only stop: at least 99 of 100 turns end, each right behind its action."""
    folder = ROOT / "assets/nano-deepsport"
    theirs = Qwen2_5_VLForConditionalGeneration.from_pretrained(folder, dtype=torch.float32).eval()
    tokenizer = load_tokenizer(folder)
    model = load_model(folder)
    encoder = FrameEncoder(model, ImageConfig.from_folder(folder))
    end = tokenizer.convert_tokens_to_ids(END)
    torch.manual_seed(0)
    texts = []
    for question in read_questions(arena_folder / "test.jsonl"):
        conversation = Conversation(question, encoder, tokenizer, Limits())
        frames_FCHW = encoder.open(question.clip).frames(conversation.env.overview)
        patches_PC, grids = preprocess(frames_FCHW, encoder.image)
        ids_1T = torch.tensor([conversation.open().ids])
        out_BT = theirs.generate(
            input_ids=ids_1T,
            attention_mask=torch.ones_like(ids_1T),
            pixel_values=patches_PC,
            image_grid_thw=torch.tensor(grids),
            mm_token_type_ids=(ids_1T == model.cfg.image_token_id).int(),
            suppress_tokens=banned_ids(model, tokenizer).tolist(),
            do_sample=True,
            temperature=0.6,
            top_p=0.9,
            top_k=0,
            num_return_sequences=9,
            max_new_tokens=160,
            eos_token_id=end,
            pad_token_id=0,
        )
        texts += tokenizer.batch_decode(out_BT[:, ids_1T.shape[1] :])
    ended = [text.partition(END) for text in texts]
    assert len(texts) > 100 and sum(bool(stop) for _, stop, _ in ended) >= 0.99 * len(texts)
    assert all(said.endswith(STOPS) for said, stop, _ in ended if stop)
