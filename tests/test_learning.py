"""A tiny RL run must learn: its reward rises; and RL does not start from a model that is not ready
for it."""

import json
from dataclasses import asdict
from pathlib import Path

import pytest
import torch
from transformers import Qwen2_5_VLForConditionalGeneration

import rl
from nanosport.engine.own import banned_ids
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
