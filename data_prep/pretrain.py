"""Pre-train the nano backbone: a Qwen2.5-VL of two million parameters that sees and speaks of the arena, but knows no tool.

    python -m data_prep.pretrain                # → assets/nano-backbone

Order matters more than size: first single frames (describe them, answer plain questions), then single frames and several
(list them, say when the score changes), then several with the vision tower as it is. Every example is rendered afresh, so nothing is seen twice. Its perception is
measured at the end on unseen plans, and is stored beside the weights.
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
import tyro
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from tqdm import tqdm

from data_prep import arena, teacher
from nanosport import optim
from nanosport.load import load_config, load_model, load_tokenizer, save_model
from nanosport.log import provenance
from nanosport.model import Qwen25VL, mrope_positions
from nanosport.prompt import SYSTEM, frame_text, opening, tool_result
from nanosport.tools import tool_call
from nanosport.video import ImageConfig, preprocess

PATCH = 28
IMAGE = {"patch_size": PATCH, "temporal_patch_size": 2, "merge_size": 2, "min_pixels": 56 * 56, "max_pixels": 168 * 112}
IMAGE |= {"image_mean": [0.48145466, 0.4578275, 0.40821073], "image_std": [0.26862954, 0.26130258, 0.27577711]}
TOKENS_PER_FRAME = 6  # 168×112 pixels in 2×2 squares of 28-pixel patches
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")
HARD_WEIGHT = 4.0  # digits are few and the hardest to see: unweighted, 600 steps left them at chance and all else right
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
    corpus += ["the score changes between no frame shows the play. i look at more frames. Describe the frame. List the frames."] * 50
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


def frames_and_task(rng: np.random.Generator, stage: int):
    """(plan, shown frame indices, prompt, reply) of one example."""
    plan = arena.make_plan(rng, arena.TRAIN_LAYOUTS)
    draw, task = rng.random(), rng.random()
    single = stage == 1 or (stage == 2 and rng.random() < 0.7)
    if single:
        shown = np.array([rng.integers(plan.start, plan.end + 1) if draw < 0.5 else rng.integers(plan.num_frames)])
    elif draw < 0.5:  # a uniform overview
        shown = np.linspace(0, plan.num_frames - 1, 16 if draw < 0.1 else 8)
    else:  # a closer look at the play
        first = int(rng.integers(max(0, plan.start - 20), plan.start + 1))
        shown = np.linspace(first, min(first + int(rng.integers(18, 28)), plan.num_frames - 1), 8)
    shown = [int(t) for t in np.round(shown)]
    sizes = [TOKENS_PER_FRAME] * len(shown)
    sees = any(plan.in_event(t) for t in shown)

    def chat(request: str) -> str:
        return f"<|im_start|>user\n{frame_text(shown, sizes)}{request}<|im_end|>\n<|im_start|>assistant\n"

    if task < (0.7 if stage == 1 else 0.4) and single:
        reply = teacher.listing(plan, shown) if sees else f"{arena.scene(plan)}, {teacher.listing(plan, shown)}"
        return plan, shown, chat("Describe the frame."), reply
    if task < 0.2 and not single:
        return plan, shown, chat("List the frames."), teacher.listing(plan, shown)
    if task < 0.7 and shown[0] < plan.start and shown[-1] > plan.end:
        before, after = max(t for t in shown if t <= plan.end), min(t for t in shown if t > plan.end)
        reply = f"{teacher.listing(plan, shown)}. the score changes between {before} and {after}."
        return plan, shown, chat("When does the score change?"), reply
    # what the frames do not show is asked for rarely: the answer is then a guess
    asked = [q for q in arena.make_questions(plan, rng, "", "") if q.needs_tool == sees or rng.random() < 0.1]
    question = asked[int(rng.integers(len(asked)))]
    reply = teacher.answer_turn(teacher.evidence(plan, question, shown), teacher.truth(question))
    return plan, shown, opening(question, shown, sizes, plan.num_frames, use_tool=False), reply


class Examples(IterableDataset):
    """Endless batches: (ids_T, positions_3T, cu_seqlens, weights_T, pixels_FCHW uint8)."""

    def __init__(self, folder: Path, stage: int, batch: int, seed: int):
        self.folder, self.stage, self.batch, self.seed = folder, stage, batch, seed

    def __iter__(self):
        torch.set_num_threads(1)
        info = get_worker_info()
        rng = np.random.default_rng([self.seed, self.stage, info.id if info else 0])
        tokenizer = load_tokenizer(self.folder)
        cfg = load_config(self.folder)
        hard = {i for token, i in tokenizer.get_vocab().items() if re.fullmatch("Ġ?[0-9]+", token)}
        while True:
            ids, mask, positions, lengths, pixels = [], [], [], [0], []
            for _ in range(self.batch):
                plan, shown, prompt, reply = frames_and_task(rng, self.stage)
                before = tokenizer.encode(prompt, add_special_tokens=False)
                said = tokenizer.encode(reply + "<|im_end|>", add_special_tokens=False)
                ids += before + said
                mask += [0.0] * len(before) + [HARD_WEIGHT if token in hard else 1.0 for token in said]
                positions.append(mrope_positions(before + said, [(1, 4, 6)] * len(shown), cfg)[0])
                lengths.append(len(before) + len(said))
                pixels += [arena.render(plan, t) for t in shown]
            yield (
                torch.tensor(ids),
                torch.cat(positions, 1),
                torch.tensor(lengths).cumsum(0).int(),
                torch.tensor(mask),
                torch.from_numpy(np.stack(pixels)).permute(0, 3, 1, 2),
            )


def losses(model: Qwen25VL, batch, image: ImageConfig):
    """(weighted mean cross entropy of the reply's tokens, whether each is the argmax, which positions predict them)."""
    ids_T, positions_3T, cu_seqlens, weights_T, pixels = batch
    patches_PC, grids = preprocess(pixels, image)
    with torch.set_grad_enabled(torch.is_grad_enabled() and model.visual.merger.ln_q.weight.requires_grad):
        features_ND = model.encode(patches_PC, grids)
    hidden_TD = model.hidden(ids_T, positions_3T, cu_seqlens, features_ND)
    rows = weights_T.roll(-1) > 0
    rows[-1] = False
    logits_MV = hidden_TD[rows] @ model.head_weight_VD.T
    targets_M = ids_T.roll(-1)[rows]
    weights_M = weights_T.roll(-1)[rows]
    loss = (weights_M * F.cross_entropy(logits_MV, targets_M, reduction="none")).sum() / weights_M.sum()
    return loss, logits_MV.argmax(-1) == targets_M, rows


@torch.no_grad()
def perception(model, folder: Path, image: ImageConfig, stage: int, batches: int = 6) -> float:
    """Share of unseen examples whose whole reply is the argmax, token by token (teacher forced)."""
    right = total = 0
    stream = iter(Examples(folder, stage, 64 if stage == 1 else 32, seed=990))
    for _ in range(batches):
        batch = next(stream)
        _, hit_M, rows = losses(model, batch, image)
        wrong_T = torch.zeros(len(rows), dtype=torch.long)
        wrong_T[rows] = (~hit_M).long()
        for a, b in zip(batch[2], batch[2][1:]):
            right += int(wrong_T[a:b].sum() == 0)
            total += 1
    return right / total


@dataclass(frozen=True)
class Config:
    out: Path = Path("assets/nano-backbone")
    single_steps: int = 750
    """Steps on single frames."""
    mixed_steps: int = 600
    """Steps on single frames and several."""
    multi_steps: int = 600
    """Steps on several frames, with the vision tower as it is."""
    start: Path | None = None
    """Go on from this folder's weights and tokenizer, with the last stage only."""
    lr: float = 2e-3
    """Peak learning rate of the first stage, twice that of the others; linear warm-up, cosine decay to a tenth."""
    seed: int = 0
    workers: int = 1


def main(cfg: Config) -> None:
    began = time.time()
    torch.manual_seed(cfg.seed)
    source = Path(tempfile.mkdtemp())  # tokenizer and config, which save_model puts beside the weights
    if cfg.start is None:
        build_tokenizer(source)
        write_config(source)
        model = Qwen25VL(load_config(source)).init_weights()
    else:
        source, model = cfg.start, load_model(cfg.start)
    image = ImageConfig.from_folder(source)
    print(f"{sum(p.numel() for p in model.parameters()):,} parameters")
    steps = {1: cfg.single_steps, 2: cfg.mixed_steps, 3: cfg.multi_steps}
    report = {"command": provenance()["command"], "commit": provenance()["commit"], "seed": cfg.seed, "steps": steps}
    for stage, size in ((1, 96), (2, 40), (3, 24)):
        if cfg.start is not None and stage < 3:
            continue
        optim.trainable(model, freeze_vision=stage == 3)
        optimizer = optim.build(model, weight_decay=0.01)
        peak = cfg.lr if stage == 1 else cfg.lr / 2
        loader = iter(DataLoader(Examples(source, stage, size, cfg.seed), batch_size=None, num_workers=cfg.workers, prefetch_factor=4))
        bar = tqdm(range(steps[stage]), desc=f"stage {stage}")
        for step in bar:
            optim.set_lr(optimizer, step, peak, warmup=50, total=steps[stage], cosine=True)
            loss, hit_M, _ = losses(model, next(loader), image)
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
            optimizer.step()
            if step % 20 == 0:
                bar.set_postfix(loss=f"{loss.item():.3f}", tokens_right=f"{hit_M.float().mean():.3f}")
        del loader
        report[f"stage_{stage}_right"] = perception(model, source, image, stage)
        print(f"stage {stage}: whole replies right {report[f'stage_{stage}_right']:.3f}")
        save_model(model, cfg.out, source=source, dtype=torch.bfloat16)
    report["seconds"] = round(time.time() - began)
    if cfg.start is not None:
        report["started_from"] = json.loads((cfg.start / "pretrain.json").read_text())
    (cfg.out / "pretrain.json").write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main(tyro.cli(Config))
