"""Pre-train the nano backbone: a Qwen2.5-VL of two million parameters that sees and speaks of the arena, but knows no tool.

    python -m data_prep.pretrain                                  # → assets/nano-backbone
    python -m data_prep.pretrain --start out/pre --out out/pre3   # goes on after the stages that out/pre has been through

Order matters more than size: first single frames (describe them, answer plain questions), then single frames and several
(list them, say when the score changes), then words alone (find and copy numbers), then whole conversations; from the third
stage on the vision tower stays as it is. Every example is rendered
afresh, so nothing is seen twice. After each stage its perception is measured on unseen plans and stored beside the weights.
"""

import json
import re
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data_prep import arena, draw, teacher
from nanosport import cli, optim
from nanosport.episode import Question
from nanosport.image import ImageConfig, preprocess
from nanosport.load import load_config, load_model, load_tokenizer, save_model
from nanosport.log import provenance, write_atomically
from nanosport.model import Qwen25VL, mrope_positions
from nanosport.prompt import SYSTEM, SYSTEM_NO_TOOL, frame_text, opening, question_text, tool_result
from nanosport.tools import tool_call

PATCH = 28
IMAGE = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 168 * 112}
IMAGE |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
TOKENS_PER_FRAME = 6  # 168×112 pixels in 2×2 squares of 28-pixel patches
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HARD = rf"Ġ?([0-9]+|no|a|sent|{'|'.join(draw.KITS)}|\.)"  # digits, sanctions, kits, where a list ends
HARD_WEIGHT = 4.0  # the hardest to see: of these, any that was left out stayed at chance through the first stage
TAGS = ("<think>", "</think>", "<tool_call>", "</tool_call>", "<tool_response>", "</tool_response>", "<answer>", "</answer>")


def build_tokenizer(folder: Path, vocab_size: int = 1280) -> None:
    """Train a byte-level BPE on the arena's own language and write tokenizer.json. Numbers below 1000 stay whole."""
    from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
    from transformers import PreTrainedTokenizerFast

    tokenizer = Tokenizer(models.BPE())
    split = Regex(r" ?\p{L}+| ?\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(split, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    rng, corpus = np.random.default_rng(0), [SYSTEM] * 100 + [tool_result("") + tool_call(1, 2)] * 100
    corpus += [f"frame {n}: {n}" for n in range(256)] * 100
    for _ in range(400):
        plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
        for question in arena.make_questions(plan, rng, "", ""):
            corpus.append(opening(question, (0, 30), (1, 1), plan.num_frames, use_tool=False))
            corpus.append(teacher.answer_turn(teacher.evidence(plan, question, range(plan.num_frames)), teacher.truth(question)))
    corpus += [
        "the score changes between no frame shows the play. i look at more frames. Describe the frame. List the frames."
    ] * 50
    corpus += ["When does the score change? abcdefghijklmnopqrstuvwxyz ABCDEFGHIJ"] * 50
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - len(TAGS),
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(corpus, trainer)
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")
    fast.add_special_tokens({"additional_special_tokens": list(SPECIAL[1:])})
    fast.add_tokens(list(TAGS))
    fast.save_pretrained(folder)


def write_config(folder: Path) -> None:
    """config.json and preprocessor_config.json of the nano model, in the published layout."""
    vocab = json.loads((folder / "tokenizer.json").read_text())
    ids = {t["content"]: t["id"] for t in vocab["added_tokens"]}
    size = max(max(ids.values()), max(vocab["model"]["vocab"].values())) + 1
    vision = {"depth": 4, "hidden_size": 128, "intermediate_size": 256, "num_heads": 4, "in_chans": 3, "out_hidden_size": 128}
    vision |= {"patch_size": PATCH, "spatial_merge_size": 2, "spatial_patch_size": PATCH, "temporal_patch_size": 2}
    vision |= {"window_size": 4 * PATCH, "fullatt_block_indexes": [1, 3], "hidden_act": "silu", "tokens_per_second": 2}
    config = {
        "architectures": ["Qwen2_5_VLForConditionalGeneration"],
        "model_type": "qwen2_5_vl",
        "hidden_size": 128,
        "intermediate_size": 384,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "hidden_act": "silu",
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "mrope", "mrope_section": [4, 6, 6]},
        "tie_word_embeddings": True,
        "vocab_size": size,
        "bos_token_id": ids["<|endoftext|>"],
        "eos_token_id": ids["<|im_end|>"],
        "vision_start_token_id": ids["<|vision_start|>"],
        "vision_end_token_id": ids["<|vision_end|>"],
        "image_token_id": ids["<|image_pad|>"],
        "video_token_id": ids["<|video_pad|>"],
        "torch_dtype": "bfloat16",
        "vision_config": vision,
    }
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    processor = {**IMAGE, "image_processor_type": "Qwen2VLImageProcessor", "processor_class": "Qwen2_5_VLProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(processor, indent=2) + "\n")


@dataclass(frozen=True)
class Reply:
    """One exchange: what is said to the model in full, what it should say, and which skill that is."""

    prompt: str
    text: str
    skill: str


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
    """(question, reply, skill). What the frames do not show is asked for rarely: the answer is then a guess."""
    sees = any(plan.in_event(t) for t in shown)
    fitting = [q for q in arena.make_questions(plan, rng, "", "") if q.needs_tool == sees or rng.random() < 0.1]
    question = fitting[int(rng.integers(len(fitting)))]
    reply = teacher.answer_turn(teacher.evidence(plan, question, shown), teacher.truth(question))
    return question, reply, ("close-up answers" if sees else "guesses") if question.needs_tool else "overview answers"


def short_example(rng: np.random.Generator, stage: int) -> tuple[arena.Plan, list[int], list[Reply]]:
    """(plan, shown frame indices, exchanges): one request about one frame, or in stage 2 about several."""
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    draw, task = rng.random(), rng.random()
    single = stage == 1 or rng.random() < 0.7
    if single:
        shown = [int(rng.integers(plan.start, plan.end + 1) if draw < 0.5 else rng.integers(plan.num_frames))]
    elif draw < 0.5:
        shown = uniform(0, plan.num_frames - 1, 16 if draw < 0.1 else 8)
    else:  # a closer look at the play
        first = int(rng.integers(max(0, plan.start - 20), plan.start + 1))
        shown = uniform(first, min(first + int(rng.integers(18, 28)), plan.num_frames - 1), 8)
    sees = any(plan.in_event(t) for t in shown)
    if task < (0.7 if stage == 1 else 0.4) and single:
        text = teacher.listing(plan, shown) if sees else f"{arena.scene(plan)}, {teacher.listing(plan, shown)}"
        return plan, shown, [Reply(user(frames(shown) + "Describe the frame."), text, "descriptions")]
    if task < 0.2 and not single:
        return plan, shown, [Reply(user(frames(shown) + "List the frames."), teacher.listing(plan, shown), "lists")]
    if task < 0.7 and shown[0] < plan.start and shown[-1] > plan.end:
        text = teacher.notice(plan, shown, teacher.change(plan, shown))
        return plan, shown, [Reply(user(frames(shown) + "When does the score change?"), text, "score changes")]
    question, text, skill = asked(rng, plan, shown)
    return plan, shown, [Reply(user(frames(shown) + question_text(question, plan.num_frames), SYSTEM_NO_TOOL), text, skill)]


def in_words(rng: np.random.Generator) -> tuple[arena.Plan, list[int], list[Reply]]:
    """Stage 3: the later requests without a picture; cheap, and copying a number must not fail. The frames are drawn at
    random: their numbers can only be copied, not guessed from their distance, as those of uniform frames can."""
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    if rng.random() < 0.5:
        gaps = [sorted(int(t) for t in rng.choice(plan.num_frames, 2, replace=False)) for _ in range(4)]
        return (
            plan,
            [],
            [Reply(user(f"the score changes between {a} and {b}. Write it as JSON."), interval(a, b), "JSON") for a, b in gaps],
        )
    count, last = int(rng.integers(3, 15)), plan.num_frames - 1
    shown = [0, *sorted(int(t) for t in rng.choice(np.arange(1, last), count, replace=False)), last]
    k = teacher.change(plan, shown)
    told = "".join(f"frame {t}: {arena.describe(plan, t)}\n" for t in shown)
    turns = [Reply(user(told + "When does the score change?"), teacher.notice(plan, shown, k), "score changes, told")]
    return plan, [], [*turns, Reply(user("Write it as JSON."), interval(shown[k], shown[k + 1]), "JSON")]


def conversation(rng: np.random.Generator) -> tuple[arena.Plan, list[int], list[Reply]]:
    """Stage 4: several frames, often two looks, under any system prompt. The tool's prompt is read too, but no call is ever
    made: what is asked is answered in words."""
    if rng.random() < 0.25:
        return in_words(rng)
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    system = (None, SYSTEM_NO_TOOL, SYSTEM)[int(rng.integers(3))]
    overview = uniform(0, plan.num_frames - 1, 16 if rng.random() < 0.15 else 8)
    k = teacher.change(plan, overview)
    text, gap = teacher.notice(plan, overview, k), (overview[k], overview[k + 1])
    closer = uniform(*gap, 8)
    kind = rng.random()
    if kind < 0.15:
        question, reply, skill = asked(rng, plan, overview)
        return plan, overview, [Reply(user(frames(overview) + question_text(question, plan.num_frames), system), reply, skill)]
    if kind < 0.3:
        question, reply, skill = asked(rng, plan, closer)
        return plan, closer, [Reply(user(frames(closer) + question_text(question, plan.num_frames), system), reply, skill)]
    if kind < 0.4:
        shown = closer if rng.random() < 0.5 else overview
        return plan, shown, [Reply(user(frames(shown) + "List the frames.", system), teacher.listing(plan, shown), "lists")]
    question, reply, skill = asked(rng, plan, closer)
    if kind < 0.7:  # the question first, then the frames that answer it
        request = question_text(question, plan.num_frames) + " First say when the score changes."
        turns = [Reply(user(frames(overview) + request, system), text, "score changes")]
        return plan, overview + closer, [*turns, Reply(user(frames(closer)), reply, skill)]
    turns = [Reply(user(frames(overview) + "When does the score change?", system), text, "score changes")]
    turns.append(Reply(user("Write it as JSON."), interval(*gap), "JSON"))
    if kind < 0.85:
        return plan, overview, turns
    return plan, overview + closer, [*turns, Reply(user(frames(closer) + question_text(question, plan.num_frames)), reply, skill)]


class Examples(IterableDataset):
    """Endless batches: (ids_T, positions_3T, cu_seqlens, weights_T, pixels_FCHW uint8 or None, [(skill, from, to), …])."""

    def __init__(self, folder: Path, stage: int, batch: int, seed: int):
        self.folder, self.stage, self.batch, self.seed = folder, stage, batch, seed

    def __iter__(self):
        info = get_worker_info()
        if info:  # the other cores are the trainer's
            torch.set_num_threads(1)
        rng = np.random.default_rng([self.seed, self.stage, info.id if info else 0])
        tokenizer = load_tokenizer(self.folder)
        cfg = load_config(self.folder)
        hard = {i for token, i in tokenizer.get_vocab().items() if re.fullmatch(HARD, token)}
        while True:
            ids, weights, positions, lengths, pixels, spans = [], [], [], [0], [], []
            for _ in range(self.batch):
                made = {3: in_words, 4: conversation}.get(self.stage)
                plan, shown, exchanges = made(rng) if made else short_example(rng, self.stage)
                start = len(ids)
                for k, exchange in enumerate(exchanges):
                    before = tokenizer.encode("\n" * (k > 0) + exchange.prompt, add_special_tokens=False)
                    said = tokenizer.encode(exchange.text + "<|im_end|>", add_special_tokens=False)
                    spans.append((exchange.skill, len(ids) + len(before), len(ids) + len(before) + len(said)))
                    ids += before + said
                    weights += [0.0] * len(before) + [HARD_WEIGHT if token in hard else 1.0 for token in said]
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


def losses(model: Qwen25VL, batch, image: ImageConfig):
    """(weighted mean cross entropy of the replies' tokens, whether each is the argmax, which positions predict them)."""
    ids_T, positions_3T, cu_seqlens, weights_T, pixels, _ = batch
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.visual.merger.ln_q.weight.requires_grad):
        features_ND = None if pixels is None else model.encode(*preprocess(pixels, image))
    hidden_TD = model.hidden(ids_T, positions_3T, cu_seqlens, features_ND)
    rows = weights_T.roll(-1) > 0
    rows[-1] = False
    logits_MV = hidden_TD[rows] @ model.head_weight_VD.T
    targets_M = ids_T.roll(-1)[rows]
    weights_M = weights_T.roll(-1)[rows]
    loss = (weights_M * F.cross_entropy(logits_MV, targets_M, reduction="none")).sum() / weights_M.sum()
    return loss, logits_MV.argmax(-1) == targets_M, rows


@torch.no_grad()
def perception(model, folder: Path, image: ImageConfig, stage: int, batches: int = 6) -> dict[str, float]:
    """By skill, the share of unseen replies whose every token is the argmax (teacher forced). Guesses cannot be right."""
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
    out: Path = Path("assets/nano-backbone")
    steps: tuple[int, int, int, int] = (900, 500, 800, 900)
    """Of the four stages."""
    start: Path | None = None
    """Go on from this folder, with the stage after the last in its pretrain.json."""
    lr: float = 2e-3
    """Peak learning rate of the first stage, twice that of the others; linear warm-up, cosine decay to a tenth."""
    seed: int = 0
    workers: int = 1


def main(cfg: Config) -> None:
    torch.manual_seed(cfg.seed)
    if cfg.start is None:
        source, done = cfg.out, []
        with tempfile.TemporaryDirectory() as files:
            build_tokenizer(Path(files))
            write_config(Path(files))
            save_model(Qwen25VL(load_config(files)).init_weights(), cfg.out, source=files)
    else:
        source, done = cfg.start, json.loads((cfg.start / "pretrain.json").read_text())["stages"]
    if len(done) >= len(STAGES):
        raise ValueError(f"--start {source}: has been through all stages already")
    image = ImageConfig.from_folder(source)
    for stage in range(len(done) + 1, len(STAGES) + 1):
        # from the folder every time: a stage goes on from the same bits whether or not the ones before ran just now
        model, began, steps = load_model(source), time.time(), cfg.steps[stage - 1]
        optim.trainable(model, freeze_vision=stage >= 3, freeze_projector=stage >= 3)
        optimizer = optim.build(model, weight_decay=0.01)
        peak = cfg.lr if stage == 1 else cfg.lr / 2
        loader = DataLoader(
            Examples(source, stage, BATCH[stage], cfg.seed), batch_size=None, num_workers=cfg.workers, prefetch_factor=4
        )
        bar = tqdm(zip(range(steps), loader), total=steps, desc=f"stage {stage}, {STAGES[stage]}")
        for step, batch in bar:
            optim.set_lr(optimizer, step, peak, warmup=50, total=steps)
            loss, hit_M, _ = losses(model, batch, image)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", tokens_right=f"{hit_M.float().mean():.3f}")
        right = perception(model, source, image, stage)
        print(f"stage {stage}: whole replies right {right}")
        save_model(model, cfg.out, source=source, dtype=torch.bfloat16)
        source = cfg.out
        made = {key: provenance()[key] for key in ("command", "commit", "torch", "device")}
        row = {
            "stage": STAGES[stage],
            "steps": steps,
            "batch": BATCH[stage],
            "seed": cfg.seed,
            "seconds": round(time.time() - began),
        }
        done.append({**row, "whole_replies_right": right, **made})
        write_atomically(cfg.out / "pretrain.json", json.dumps({"stages": done}, indent=2) + "\n")


if __name__ == "__main__":
    cli.run(main, Config)
