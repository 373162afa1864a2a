"""Pre-train the nano backbone: a Qwen2.5-VL or Qwen3-VL of two million parameters that sees and
speaks of the arena, but knows no tool.

    python -m data_prep.pretrain                                  # → assets/nano-backbone
    python -m data_prep.pretrain qwen3_vl                # → assets/nano-backbone-qwen3-vl
    python -m data_prep.pretrain --start out/pre --out out/pre3   # goes on after out/pre's stages

Order matters more than size: first single frames (describe them, answer plain questions), then
single frames and several (list them, say when the score changes), then words alone (find and copy
numbers), then whole conversations; from the third stage on the vision tower stays as it is. Every
example is rendered afresh, so nothing is seen twice. After each stage its perception is measured on
unseen plans and stored beside the weights.
"""

import json
import re
import tempfile
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Annotated, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data_prep import arena, draw, teacher
from nanosport import cli
from nanosport.env.prompt import (
    SYSTEM,
    SYSTEM_NO_TOOL,
    frame_text,
    opening,
    question_text,
    tool_result,
)
from nanosport.env.tools import tool_call
from nanosport.fields import Above, AtLeast, AtMost
from nanosport.files import ASSETS, provenance, write_atomically
from nanosport.image import ImageConfig, preprocess
from nanosport.model.decoder import VLModel, mrope_positions
from nanosport.model.folder import load_config, load_model, load_tokenizer, save_model
from nanosport.records import Question
from nanosport.train import optim

Family = Literal["qwen2_5_vl", "qwen3_vl"]
PATCH = 28
IMAGE = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2}
MIN_PIXELS, MAX_PIXELS = 56 * 56, 168 * 112
TOKENS_PER_FRAME = 6  # 168×112 pixels in 2×2 squares of 28-pixel patches
SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>",
    "<|image_pad|>", "<|video_pad|>",
)  # fmt: skip
TAGS = (
    "<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>",
    "<answer>", "</answer>",
)  # fmt: skip
# digits, sanctions, kits, where a list ends: the hardest to see; of these, any that was left out
# stayed at chance through the first stage
HARD = rf"Ġ?([0-9]+|no|a|sent|{'|'.join(draw.KITS)}|\.)"
HARD_WEIGHT = 4.0


def corpus() -> list[str]:
    """The arena's own language, for the tokenizer."""
    rng = np.random.default_rng(0)
    texts = [SYSTEM] * 100 + [tool_result("") + tool_call(1, 2)] * 100
    texts += [f"frame {n}: {n}" for n in range(256)] * 100
    for _ in range(400):
        plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
        for question in arena.make_questions(plan, rng, "", ""):
            evidence = teacher.evidence(plan, question, range(plan.num_frames))
            texts.append(opening(question, (0, 30), (1, 1), plan.num_frames, use_tool=False))
            texts.append(teacher.answer_turn(evidence, teacher.truth(question)))
    texts += [
        "the score changes between no frame shows the play. i look at more frames. "
        "Describe the frame. List the frames."
    ] * 50
    return texts + ["When does the score change? abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ"] * 50


def build_tokenizer(folder: Path, vocab_size: int = 1280) -> None:
    """Train a byte-level BPE on the arena's own language and write tokenizer.json. Numbers below
    1000 stay whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    words = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s")
    split = pre_tokenizers.Split(words, "isolated")
    to_bytes = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, to_bytes])
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus(), trainer)

    ends = {"eos_token": "<|im_end|>", "pad_token": "<|endoftext|>"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, **ends)
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.add_tokens(list(TAGS))
    fast.save_pretrained(folder)


VISION = {
    "depth": 4,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_heads": 4,
    "in_chans": 3,
    "out_hidden_size": 128,
    "patch_size": PATCH,
    "spatial_merge_size": 2,
    "spatial_patch_size": PATCH,
    "temporal_patch_size": 2,
    "window_size": 4 * PATCH,
    "fullatt_block_indexes": [1, 3],
    "hidden_act": "silu",
    "tokens_per_second": 2,
}
OF_WINDOWS = ("in_chans", "spatial_patch_size", "window_size", "fullatt_block_indexes")
VISION_3 = {n: v for n, v in VISION.items() if n not in (*OF_WINDOWS, "tokens_per_second")}
VISION_3 |= {
    "model_type": "qwen3_vl",
    "hidden_size": 112,
    "num_heads": 7,
    "in_channels": 3,
    "num_position_embeddings": 64,
    "deepstack_visual_indexes": [1],
    "hidden_act": "gelu_pytorch_tanh",
}
TEXT = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "hidden_act": "silu",
    "max_position_embeddings": 32768,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
}
TEXT_IDS = {"bos_token_id": "<|endoftext|>", "eos_token_id": "<|im_end|>"}
VISION_IDS = {
    "vision_start_token_id": "<|vision_start|>",
    "vision_end_token_id": "<|vision_end|>",
    "image_token_id": "<|image_pad|>",
    "video_token_id": "<|video_pad|>",
}


def qwen2_5_vl(text: dict, ids: dict) -> tuple[dict, dict]:
    """(config.json, preprocessor_config.json) as Qwen2.5-VL's are published."""
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        **TEXT,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        **text,
        **ids,
        "torch_dtype": "bfloat16",
        "vision_config": VISION,
    }
    return config, IMAGE | {
        "min_pixels": MIN_PIXELS,
        "max_pixels": MAX_PIXELS,
        "image_mean": [0.48145466, 0.4578275, 0.40821073],
        "image_std": [0.26862954, 0.26130258, 0.27577711],
        "image_processor_type": "Qwen2VLImageProcessor",
        "processor_class": "Qwen2_5_VLProcessor",
    }


def qwen3_vl(text: dict, ids: dict) -> tuple[dict, dict]:
    """(config.json, preprocessor_config.json) as Qwen3-VL's are published."""
    rope = {"rope_type": "default", "mrope_interleaved": True, "mrope_section": [6, 5, 5]}
    text_config = {"model_type": "qwen3_vl_text", **TEXT, "head_dim": 32, "attention_bias": False}
    config = {
        "architectures": ["Qwen3VLForConditionalGeneration"],
        "model_type": "qwen3_vl",
        "text_config": text_config | text | {"rope_scaling": rope, "dtype": "bfloat16"},
        "vision_config": VISION_3,
        "tie_word_embeddings": True,
        **ids,
    }
    return config, IMAGE | {
        "size": {"shortest_edge": MIN_PIXELS, "longest_edge": MAX_PIXELS},
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
        "image_processor_type": "Qwen2VLImageProcessorFast",
        "processor_class": "Qwen3VLProcessor",
    }


def write_config(folder: Path, family: Family = "qwen2_5_vl") -> None:
    """config.json and preprocessor_config.json of the nano model, in the published layout."""
    vocab = json.loads((folder / "tokenizer.json").read_text())
    known = {t["content"]: t["id"] for t in vocab["added_tokens"]}
    size = max(max(known.values()), max(vocab["model"]["vocab"].values())) + 1
    text, ids = ({n: known[t] for n, t in names.items()} for names in (TEXT_IDS, VISION_IDS))
    make = {"qwen2_5_vl": qwen2_5_vl, "qwen3_vl": qwen3_vl}[family]
    made = make({"vocab_size": size} | text, ids)
    for name, content in zip(("config", "preprocessor_config"), made):
        (folder / f"{name}.json").write_text(json.dumps(content, indent=2) + "\n")


@dataclass(frozen=True)
class Reply:
    """One exchange: what is said to the model in full, what it should say, and which skill that
    is."""

    prompt: str
    text: str
    skill: str


Example = tuple[arena.Plan, list[int], list[Reply]]
"""(the plan, the frame indices that are shown, the exchanges)"""


def frames(shown) -> str:
    return frame_text(shown, [TOKENS_PER_FRAME] * len(shown))


def user(request: str, system: str | None = None) -> str:
    before = f"<|im_start|>system\n{system}<|im_end|>\n" if system else ""
    return f"{before}<|im_start|>user\n{request}<|im_end|>\n<|im_start|>assistant\n"


def uniform(first: int, last: int, count: int) -> list[int]:
    return [int(t) for t in np.round(np.linspace(first, last, count))]


def interval(start: int, end: int) -> str:
    return json.dumps({"idx_start": start, "idx_end": end})


def asked(rng: np.random.Generator, plan: arena.Plan, shown) -> tuple[Question, str, str]:
    """(question, reply, skill). What the frames do not show is asked for rarely: the answer is then
    a guess."""
    sees = any(plan.in_event(t) for t in shown)
    drawn = arena.make_questions(plan, rng, "", "")
    fitting = [q for q in drawn if q.needs_tool == sees or rng.random() < 0.1]
    question = fitting[int(rng.integers(len(fitting)))]
    reply = teacher.answer_turn(teacher.evidence(plan, question, shown), teacher.truth(question))
    skill = "close-up answers" if sees else "guesses"
    return question, reply, skill if question.needs_tool else "overview answers"


def short_example(rng: np.random.Generator, stage: int) -> Example:
    """One request about one frame, or in stage 2 about several."""
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    kind, task = rng.random(), rng.random()
    single = stage == 1 or rng.random() < 0.7
    if single and kind < 0.5:
        shown = [int(rng.integers(plan.start, plan.end + 1))]
    elif single:
        shown = [int(rng.integers(plan.num_frames))]
    elif kind < 0.5:
        shown = uniform(0, plan.num_frames - 1, 16 if kind < 0.1 else 8)
    else:  # a closer look at the play
        first = int(rng.integers(max(0, plan.start - 20), plan.start + 1))
        shown = uniform(first, min(first + int(rng.integers(18, 28)), plan.num_frames - 1), 8)

    # what is asked about them
    def example(request: str, text: str, skill: str, system: str | None = None) -> Example:
        return plan, shown, [Reply(user(frames(shown) + request, system), text, skill)]

    listing = teacher.listing(plan, shown)
    if task < (0.7 if stage == 1 else 0.4) and single:
        sees = any(plan.in_event(t) for t in shown)
        text = listing if sees else f"{arena.scene(plan)}, {listing}"
        return example("Describe the frame.", text, "descriptions")
    if task < 0.2 and not single:
        return example("List the frames.", listing, "lists")
    if task < 0.7 and shown[0] < plan.start and shown[-1] > plan.end:
        text = teacher.notice(plan, shown, teacher.change(plan, shown))
        return example("When does the score change?", text, "score changes")
    question, text, skill = asked(rng, plan, shown)
    return example(question_text(question, plan.num_frames), text, skill, SYSTEM_NO_TOOL)


def in_words(rng: np.random.Generator) -> Example:
    """Stage 3: the later requests without a picture; cheap, and copying a number must not fail.

    The frames are drawn at random: their numbers can only be copied, not guessed from their
    distance, as those of uniform frames can.
    """
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    if rng.random() < 0.5:
        drawn = [rng.choice(plan.num_frames, 2, replace=False) for _ in range(4)]
        gaps = [sorted(int(t) for t in pair) for pair in drawn]
        request = "the score changes between {} and {}. Write it as JSON."
        return plan, [], [Reply(user(request.format(*gap)), interval(*gap), "JSON") for gap in gaps]
    count, last = int(rng.integers(3, 15)), plan.num_frames - 1
    shown = [0, *sorted(int(t) for t in rng.choice(np.arange(1, last), count, replace=False)), last]
    k = teacher.change(plan, shown)
    told = "".join(f"frame {t}: {arena.describe(plan, t)}\n" for t in shown)
    request, notice = user(told + "When does the score change?"), teacher.notice(plan, shown, k)
    as_json = Reply(user("Write it as JSON."), interval(shown[k], shown[k + 1]), "JSON")
    return plan, [], [Reply(request, notice, "score changes, told"), as_json]


def conversation(rng: np.random.Generator) -> Example:
    """Stage 4: several frames, often two looks, under any system prompt. The tool's prompt is read
    too, but no call is ever made: what is asked is answered in words."""
    if rng.random() < 0.25:
        return in_words(rng)
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    system = (None, SYSTEM_NO_TOOL, SYSTEM)[int(rng.integers(3))]
    overview = uniform(0, plan.num_frames - 1, 16 if rng.random() < 0.15 else 8)
    k = teacher.change(plan, overview)
    gap = overview[k], overview[k + 1]
    closer, kind = uniform(*gap, 8), rng.random()

    # one look
    if kind < 0.3:
        shown = overview if kind < 0.15 else closer
        question, reply, skill = asked(rng, plan, shown)
        request = frames(shown) + question_text(question, plan.num_frames)
        return plan, shown, [Reply(user(request, system), reply, skill)]
    if kind < 0.4:
        shown = closer if rng.random() < 0.5 else overview
        request, listing = frames(shown) + "List the frames.", teacher.listing(plan, shown)
        return plan, shown, [Reply(user(request, system), listing, "lists")]

    # two looks, with the question before the first or after it
    question, reply, skill = asked(rng, plan, closer)
    asking = question_text(question, plan.num_frames)
    first = kind < 0.7
    when = asking + " First say when the score changes." if first else "When does the score change?"
    notice = teacher.notice(plan, overview, k)
    turns = [Reply(user(frames(overview) + when, system), notice, "score changes")]
    if not first:
        turns.append(Reply(user("Write it as JSON."), interval(*gap), "JSON"))
        if kind < 0.85:
            return plan, overview, turns
    turns.append(Reply(user(frames(closer) + ("" if first else asking)), reply, skill))
    return plan, overview + closer, turns


class Examples(IterableDataset):
    """Endless batches: (ids_T, positions_3T, cu_seqlens, weights_T, pixels_FCHW uint8 or None,
    [(skill, from, to), …])."""

    def __init__(self, folder: Path, stage: int, batch: int, seed: int):
        self.folder, self.stage, self.batch, self.seed = folder, stage, batch, seed

    def __iter__(self):
        info = get_worker_info()
        if info:  # the other cores are the trainer's
            torch.set_num_threads(1)
        rng = np.random.default_rng([self.seed, self.stage, info.id if info else 0])
        tokenizer, cfg = load_tokenizer(self.folder), load_config(self.folder)
        encode = partial(tokenizer.encode, add_special_tokens=False)
        hard = {i for token, i in tokenizer.get_vocab().items() if re.fullmatch(HARD, token)}
        while True:
            ids, weights, positions, lengths, pixels, spans = [], [], [], [0], [], []
            for _ in range(self.batch):
                made = {3: in_words, 4: conversation}.get(self.stage)
                plan, shown, exchanges = made(rng) if made else short_example(rng, self.stage)
                start = len(ids)
                for k, exchange in enumerate(exchanges):
                    before = encode("\n" * (k > 0) + exchange.prompt)
                    said = encode(exchange.text + "<|im_end|>")
                    ids += before
                    spans.append((exchange.skill, len(ids), len(ids) + len(said)))
                    ids += said
                    weights += [0.0] * len(before)
                    weights += [HARD_WEIGHT if token in hard else 1.0 for token in said]
                positions.append(mrope_positions(ids[start:], [(1, 4, 6)] * len(shown), cfg)[0])
                lengths.append(len(ids))
                pixels += [arena.render(plan, t) for t in shown]
            yield (
                torch.tensor(ids),
                torch.cat(positions, 1),
                torch.tensor(lengths).int(),
                torch.tensor(weights),
                torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2) if pixels else None,
                spans,
            )


def losses(model: VLModel, batch, image: ImageConfig):
    """(weighted mean cross entropy of the replies' tokens, whether each is the argmax, which
    positions predict them)."""
    ids_T, positions_3T, cu_seqlens, weights_T, pixels, _ = batch
    trained = next(model.visual.merger.parameters()).requires_grad
    with torch.set_grad_enabled(torch.is_grad_enabled() and trained):
        features_ND = None if pixels is None else model.encode(*preprocess(pixels, image))
    hidden_TD = model.hidden(ids_T, positions_3T, cu_seqlens, features_ND)
    rows = weights_T.roll(-1) > 0
    rows[-1] = False
    logits_MV = hidden_TD[rows] @ model.head_weight_VD.T
    targets_M = ids_T.roll(-1)[rows]
    weights_M = weights_T.roll(-1)[rows]
    losses_M = F.cross_entropy(logits_MV, targets_M, reduction="none")
    loss = (weights_M * losses_M).sum() / weights_M.sum()
    return loss, logits_MV.argmax(-1) == targets_M, rows


@torch.no_grad()
def perception(
    model, folder: Path, image: ImageConfig, stage: int, batches: int = 6
) -> dict[str, float]:
    """By skill, the share of unseen replies whose every token is the argmax (teacher forced).
    Guesses cannot be right."""
    found: dict[str, list[bool]] = {}
    stream = iter(Examples(folder, stage, 64 if stage == 1 else 32, seed=990))
    for _ in range(batches):
        batch = next(stream)
        _, hit_M, rows = losses(model, batch, image)
        right_T = torch.ones(len(rows), dtype=torch.bool)
        right_T[rows.roll(1)] = hit_M
        for skill, start, end in batch[5]:
            found.setdefault(skill, []).append(bool(right_T[start:end].all()))
    return {skill: round(sum(hits) / len(hits), 3) for skill, hits in sorted(found.items())}


STAGES = {1: "single frames", 2: "single frames and several", 3: "words alone", 4: "conversations"}
BATCH = {1: 96, 2: 40, 3: 48, 4: 24}


@dataclass(frozen=True)
class Config:
    out: Path = ASSETS / "nano-backbone"
    family: Family = "qwen2_5_vl"
    """Of a model that begins from random weights."""
    steps: Annotated[tuple[int, int, int, int], AtLeast(0)] = (900, 500, 800, 900)
    """Of the four stages."""
    start: Path | None = None
    """Go on from this folder, with the stage after the last in its pretrain.json."""
    lr: Annotated[float, Above(0)] = 2e-3
    """Peak learning rate of the first stage, twice that of the others; linear warm-up, cosine decay
    to a tenth."""
    seed: Annotated[int, AtLeast(0)] = 0
    workers: Annotated[int, AtLeast(1), AtMost(1024)] = 1


PRESETS = {
    "qwen2_5_vl": {},
    "qwen3_vl": {"family": "qwen3_vl", "out": ASSETS / "nano-backbone-qwen3-vl"},
}


def start(cfg: Config) -> tuple[Path, list[dict]]:
    """(the folder to go on from, what its stages were): of random weights, or of --start."""
    if cfg.start is not None:
        return cfg.start, json.loads((cfg.start / "pretrain.json").read_text())["stages"]
    with tempfile.TemporaryDirectory() as files:
        build_tokenizer(Path(files))
        write_config(Path(files), cfg.family)
        save_model(VLModel(load_config(files)).init_weights(), cfg.out, source=files)
    return cfg.out, []


def train_stage(cfg: Config, source: Path, stage: int, image: ImageConfig) -> VLModel:
    """Train the model of a folder through a stage."""
    model, steps = load_model(source), cfg.steps[stage - 1]
    optim.trainable(model, freeze_vision=stage >= 3, freeze_projector=stage >= 3)
    optimizer = optim.build(model, weight_decay=0.01)
    peak = cfg.lr if stage == 1 else cfg.lr / 2
    examples = Examples(source, stage, BATCH[stage], cfg.seed)
    workers = {"num_workers": cfg.workers, "prefetch_factor": 4}
    loader = DataLoader(examples, batch_size=None, **workers)
    bar = tqdm(zip(range(steps), loader), total=steps, desc=f"stage {stage}, {STAGES[stage]}")
    for step, batch in bar:
        optim.set_lr(optimizer, step, peak, warmup=50, total=steps)
        loss, hit_M, _ = losses(model, batch, image)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        if step % 20 == 0:
            right = f"{hit_M.float().mean():.3f}"
            bar.set_postfix(loss=f"{loss.item():.3f}", tokens_right=right)
    return model


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    source, done = start(cfg)
    if len(done) >= len(STAGES):
        raise ValueError(f"--start {source}: has been through all stages already")
    if cfg.start is not None:
        cli.not_the_input(cfg.out, cfg.start)
    image = ImageConfig.from_folder(source)
    for stage in range(len(done) + 1, len(STAGES) + 1):
        # from the folder every time: a stage goes on from the same bits whether or not the ones
        # before ran just now
        began = time.time()
        model = train_stage(cfg, source, stage, image)
        right = perception(model, source, image, stage)
        print(f"stage {stage}: whole replies right {right}")
        save_model(model, cfg.out, source=source, dtype=torch.bfloat16)
        source = cfg.out
        row = {"stage": STAGES[stage], "steps": cfg.steps[stage - 1], "batch": BATCH[stage]}
        row |= {"seed": cfg.seed, "seconds": round(time.time() - began)}
        row["whole_replies_right"] = right
        made = provenance()
        row |= {key: made[key] for key in ("command", "commit", "torch", "device")}
        done.append(row)
        write_atomically(cfg.out / "pretrain.json", json.dumps({"stages": done}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, Config, PRESETS)
