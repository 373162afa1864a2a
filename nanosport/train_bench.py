"""Times an SFT step and a policy update on random weights of true shapes on one GPU, beside plain transformers, in under 10 minutes.

python -m nanosport.train_bench                      # 3B whole, 7B with as many layers as fit → results/train/<card>.json and a table
python -m nanosport.train_bench --shapes 3b          # one of them

Ours is what train.py and rl.py do with a batch: packed, FSDP2 over a group of this one GPU, float32 weights, gradients and Adam
moments, bfloat16 compute, the fused loss. Theirs is the same decoder from transformers, trained as TRL trains it: padded batches,
autocast over the same float32 weights, logits of every token behind the prompt. Weights, tokens and objective are the same, so
both report one loss. Frames are encoded beforehand, as with a frozen tower; theirs is given that too. Compiled is ours with the
decoder's layers through torch.compile, which train.py and rl.py do not do: it says what that would gain.

tokens/s count the tokens of the episodes, however often each was computed. MFU counts what one pass over them needs: three times
the forward's operations, once for the reference, nothing recomputed, nothing padded, a shared prefix once where it is shared.
Peak memory is torch's own count. Without a GPU it runs the nano shape on lengths shrunk as its width is (NANO), and peaks
come from the profiler; that checks the code and compares the two, but is no figure of any GPU.
"""

import argparse
import gc
import json
import time
import zlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import median

import numpy as np
import torch

from kernels.policy_loss import Objective, fused_linear_cross_entropy, fused_linear_policy_loss, linear_logprobs
from nanosport import dist, memory, optim
from nanosport.batch import Batch, deal, make_units, pack
from nanosport.cost import CARDS, head_flops, num_weights
from nanosport.episode import Clip, Episode, Question, Turn
from nanosport.load import load_config
from nanosport.log import provenance, write_atomically
from nanosport.loss import group_advantages, token_scale
from nanosport.model import ModelConfig, Qwen25VL

GPU = torch.cuda.is_available()
OBJECTIVE = Objective(temperature=1.0, beta=0.01)
LR = 1e-9  # so small that every step of a comparison sees the same weights
NANO = memory.Lengths(frame_tokens=9, label=2, prompt_text=11, turn_text=7, result_text=1)
"""The paper's lengths ÷ 28, as the nano model's width is the 7B's ÷ 28: attention, which grows with length ÷ width, then keeps
about its share of the operations (13 % here, 8 % there; 77 % with a nano model on whole lengths)."""
SPECIAL = 7  # ids below are the nano tokenizer's special ones; the large models have theirs above 151,000


class SeenFrames:
    """A FrameEncoder whose tower is frozen and which has seen every frame: random features instead of a tower's."""

    def __init__(self, cfg: ModelConfig, grid: tuple[int, int], device, dtype):
        self.cfg, self.shape, self.device, self.dtype = cfg, grid, device, dtype

    def grid(self, clip: Clip) -> tuple[int, int, int]:
        merge = self.cfg.vision.spatial_merge_size
        return 1, self.shape[0] * merge, self.shape[1] * merge

    def tokens_per_frame(self, clip: Clip) -> int:
        return self.shape[0] * self.shape[1]

    def features(self, frames: Sequence[tuple[Clip, int]]) -> torch.Tensor:
        """The same for the same frame, so that packings can be compared."""
        per = self.tokens_per_frame(frames[0][0])
        index = torch.tensor([int(clip.video) * 1000 + number for clip, number in frames], device=self.device)
        wave = torch.arange(per * self.cfg.hidden_size, device=self.device).float()
        return torch.sin(index[:, None] * 0.37 + wave).view(-1, self.cfg.hidden_size).to(self.dtype)


def make_episodes(cfg: ModelConfig, lengths: memory.Lengths, groups: int, group_size: int, seed: int = 0) -> list[Episode]:
    """Random tokens in the paper's lengths; a group's members share their prompt, `calls` of them an episode call the tool."""
    rng, episodes = np.random.default_rng(seed), []
    top = min(cfg.vocab_size, 151_000)

    def text(count: int) -> list[int]:
        return rng.integers(SPECIAL, top, count).tolist()

    def frames(count: int) -> list[int]:
        one = [cfg.vision_start_token_id, *[cfg.image_token_id] * lengths.frame_tokens, cfg.vision_end_token_id]
        return [token for _ in range(count) for token in (*text(lengths.label - 2), *one)]

    for group in range(groups):
        question = Question(str(group), str(group), "", "recognition", "?", (), "a")
        prompt = frames(lengths.overview) + text(lengths.prompt_text)
        for member in range(group_size):
            number = len(episodes)
            calls = int((number + 1) * lengths.calls) - int(number * lengths.calls)
            ids, mask, seen, turns = list(prompt), [0] * len(prompt), list(range(lengths.overview)), []
            for call in range(calls):
                new = [100 * (member + 1) + 10 * call + k for k in range(lengths.frames_per_call)]
                ids += text(lengths.turn_text) + frames(len(new)) + text(lengths.result_text)
                mask += [1] * lengths.turn_text + [0] * lengths.result
                seen += new
                turns.append(Turn("", "tool", None, tuple(new)))
            ids, mask = ids + text(lengths.turn_text), mask + [1] * lengths.turn_text
            turns.append(Turn("", "answer"))
            episodes.append(Episode(question, tuple(ids), tuple(mask), (0.0,) * len(ids), tuple(seen), tuple(turns), "answered"))
    return episodes


def fill(named_weights: dict[str, torch.Tensor]) -> None:
    """Random weights that depend on their name alone: the same here and in transformers."""
    for name, weight in named_weights.items():
        if weight.ndim == 1:
            weight.data.fill_(0.0 if name.endswith("bias") else 1.0)
        else:
            generator = torch.Generator(weight.device).manual_seed(zlib.crc32(name.encode()))
            weight.data.normal_(0.0, 0.02, generator=generator)


@dataclass(frozen=True)
class Work:
    """What a step is given: episodes, an advantage each, how they are packed."""

    episodes: list[Episode]
    group_size: int
    micro_tokens: int
    share_prefix: bool = True

    @property
    def advantages(self) -> torch.Tensor:
        rewards = [float(k % self.group_size % 3) for k in range(len(self.episodes))]
        return group_advantages(rewards, self.group_size) if self.group_size > 1 else torch.ones(len(rewards))

    def dealt(self, cfg: ModelConfig) -> list[list[int]]:
        homes = [0] * len(self.episodes)
        units = make_units(self.episodes, self.group_size, homes, cfg, self.micro_tokens, self.share_prefix)
        return deal(units, 1, self.micro_tokens, True)[0][0]

    def flops(self, cfg: ModelConfig) -> float:
        """Of a forward pass, head included."""
        units = make_units(self.episodes, self.group_size, [0] * len(self.episodes), cfg, self.micro_tokens, self.share_prefix)
        return sum(u.flops for u in units) + head_flops(cfg, sum(sum(e.mask) for e in self.episodes))


class Clock:
    """Seconds between its stops, the GPU's work included."""

    def __init__(self):
        self.seconds, self.began = {}, self._now()

    def _now(self) -> float:
        if GPU:
            torch.cuda.synchronize()
        return time.perf_counter()

    def stop(self, name: str) -> None:
        now = self._now()
        self.seconds[name], self.began = now - self.began, now


class Ours:
    """train.py's step and rl.py's on given episodes; with a reference it is rl.py's."""

    def __init__(self, cfg: ModelConfig, grid: tuple[int, int], dtype: torch.dtype, device, recompute_every: int, policy: bool):
        self.cfg, self.device = cfg, device
        self.model = self._model(torch.float32)
        self.model.recompute_every = recompute_every
        optim.trainable(self.model, True, True)
        dist.shard(self.model, dtype, device)
        self.reference = dist.shard(self._model(dtype).requires_grad_(False), dtype, device) if policy else None
        self.optimizer = optim.build(self.model, 0.0)
        self.encoder = SeenFrames(cfg, grid, device, self.model.visual.patch_embed.proj.weight.dtype)
        self.banned = torch.tensor([cfg.image_token_id, cfg.video_token_id], device=device)

    def _model(self, dtype: torch.dtype) -> Qwen25VL:
        with torch.device("meta"):
            model = Qwen25VL(self.cfg).to(dtype)
        model.to_empty(device=self.device)
        fill(dict(model.named_parameters()))
        return model

    def hidden(self, model: Qwen25VL, batch: Batch) -> torch.Tensor:
        hidden_TD = model.hidden(batch.ids_T, batch.positions_3T, batch.cu_seqlens, batch.features_ND, batch.keys)
        return hidden_TD[batch.rows_M]

    def loss(self, batch: Batch, chosen: list[int], work: Work, ref_M: torch.Tensor | None) -> torch.Tensor:
        model, lengths = self.model, [sum(e.mask) for e in work.episodes]
        if self.reference is None:
            scale_M = torch.full_like(batch.sampled_logp_M, 1 / sum(lengths))
            return fused_linear_cross_entropy(self.hidden(model, batch), model.head_weight_VD, batch.targets_M, scale_M)[0]
        weigh = [token_scale("grpo", lengths[k], len(lengths), sum(lengths), 1) for k in chosen]
        advantages_M, scale_M = (x.to(self.device)[batch.episode_M] for x in (work.advantages[chosen], torch.tensor(weigh)))
        rows = batch.targets_M, advantages_M, None, ref_M, None, scale_M
        return fused_linear_policy_loss(self.hidden(model, batch), model.head_weight_VD, *rows, OBJECTIVE, banned=self.banned)[0]

    def step(self, work: Work) -> float:
        """The loss, after reference, forward and backward passes, clip and update; self.seconds has the time of each."""
        batches, clock = [], Clock()
        for chosen in work.dealt(self.cfg):
            batch, ref_M = pack([work.episodes[k] for k in chosen], self.encoder, self.cfg, self.device, work.share_prefix), None
            if self.reference is not None:
                with torch.no_grad():
                    rows_MD, head_VD = self.hidden(self.reference, batch), self.reference.head_weight_VD
                    ref_M = linear_logprobs(rows_MD, head_VD, batch.targets_M, OBJECTIVE.temperature, self.banned)[0]
            batches.append((batch, chosen, ref_M))
        clock.stop("pack and reference")
        self.optimizer.zero_grad()
        loss_sum = 0.0
        for batch, chosen, ref_M in batches:
            loss = self.loss(batch, chosen, work, ref_M)
            loss.backward()
            loss_sum += loss.item()
        clock.stop("train")
        optim.clip(self.model, 1.0)
        optim.set_lr(self.optimizer, 0, LR, 1, 1)
        self.optimizer.step()
        clock.stop("update")
        self.seconds = clock.seconds
        return loss_sum


class Theirs:
    """The same decoder from transformers, padded, logits of all tokens behind the prompts, as trl.GRPOTrainer and SFTTrainer do."""

    def __init__(self, cfg: ModelConfig, grid: tuple[int, int], dtype: torch.dtype, device, recompute_every: int, policy: bool):
        self.cfg, self.device, self.dtype = cfg, device, dtype
        self.encoder, self.banned = (
            SeenFrames(cfg, grid, device, dtype),
            torch.tensor([cfg.image_token_id, cfg.video_token_id], device=device),
        )
        self.model, self.head_VD = self._model(torch.float32)
        if recompute_every:
            self.model.gradient_checkpointing_enable({"use_reentrant": False})
        self.model.train()
        self.reference = self._model(dtype) if policy else None
        weights = dict(self.model.named_parameters()) | {"head": self.head_VD}
        self.weights = list({id(w): w for w in weights.values()}.values())
        self.optimizer = torch.optim.AdamW(self.weights, lr=LR, betas=(0.9, 0.98), weight_decay=0.0)

    def _model(self, dtype: torch.dtype):
        from transformers.models.qwen2_5_vl.configuration_qwen2_5_vl import Qwen2_5_VLTextConfig
        from transformers.models.qwen2_5_vl.modeling_qwen2_5_vl import Qwen2_5_VLTextModel

        cfg = self.cfg
        same = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
            "num_key_value_heads",
            "rms_norm_eps",
        )
        rope = {"rope_type": "default", "type": "default", "mrope_section": list(cfg.mrope_section), "rope_theta": cfg.rope_theta}
        config = Qwen2_5_VLTextConfig(**{name: getattr(cfg, name) for name in same}, rope_parameters=rope, use_cache=False)
        config._attn_implementation = "sdpa"
        with torch.device(self.device):
            model = Qwen2_5_VLTextModel(config).to(dtype)
            head_VD = (
                None if cfg.tie_word_embeddings else torch.nn.Parameter(torch.empty(cfg.vocab_size, cfg.hidden_size, dtype=dtype))
            )
        fill(
            {f"model.{name}": weight for name, weight in model.named_parameters()}
            | ({} if head_VD is None else {"lm_head.weight": head_VD})
        )
        return model, model.embed_tokens.weight if head_VD is None else head_VD

    def logprobs(self, model, head_VD, batch: list[Episode], start: int) -> torch.Tensor:
        """logp of the tokens start + 1, … of each row; padding at the right."""
        parts = [pack([e], self.encoder, self.cfg, self.device, False) for e in batch]
        ids_BT, positions_BT3 = (
            torch.nn.utils.rnn.pad_sequence(xs, batch_first=True)
            for xs in ([p.ids_T for p in parts], [p.positions_3T.T for p in parts])
        )
        lengths_B1 = torch.tensor([len(p.ids_T) for p in parts], device=self.device)[:, None]
        mask_BT = torch.arange(ids_BT.shape[1], device=self.device) < lengths_B1
        with torch.autocast(torch.device(self.device).type, self.dtype, enabled=self.dtype != torch.float32):
            x_BTD = model.embed_tokens(ids_BT)
            is_image = (ids_BT == self.cfg.image_token_id)[..., None]
            x_BTD = x_BTD.masked_scatter(is_image, torch.cat([p.features_ND for p in parts]).to(x_BTD.dtype))
            positions = positions_BT3.permute(2, 0, 1)
            out_BTD = model(inputs_embeds=x_BTD, attention_mask=mask_BT.long(), position_ids=positions).last_hidden_state
            logits_BTV = torch.nn.functional.linear(out_BTD[:, start:-1], head_VD) / OBJECTIVE.temperature
        if self.reference is not None:
            logits_BTV[..., self.banned] = float("-inf")
        targets_BT = ids_BT[:, start + 1 :]
        targets_BT = targets_BT.masked_fill(
            torch.isin(targets_BT, self.banned), 0
        )  # no action: 0 · −∞ would be NaN in the gradient
        # row by row in float32 where the logits are: the memory-lean way of trl's selective_log_softmax
        rows = [row.float().log_softmax(-1).gather(-1, y[:, None])[:, 0] for row, y in zip(logits_BTV, targets_BT)]
        return torch.stack(rows)

    def step(self, work: Work) -> float:
        clock = Clock()
        self.optimizer.zero_grad()
        lengths = [sum(e.mask) for e in work.episodes]
        longest = max(len(e.ids) for e in work.episodes)
        size, loss_sum = max(1, work.micro_tokens // longest), 0.0
        for first in range(0, len(lengths), size):
            chosen = list(range(first, min(first + size, len(lengths))))
            batch = [work.episodes[k] for k in chosen]
            start = min(e.mask.index(1) for e in batch) - 1
            mask_BT = torch.nn.utils.rnn.pad_sequence([torch.tensor(e.mask[start + 1 :]) for e in batch], batch_first=True).to(
                self.device
            )
            ref_BT = None
            if self.reference is not None:
                with torch.no_grad():
                    ref_BT = self.logprobs(*self.reference, batch, start)
            logp_BT = self.logprobs(self.model, self.head_VD, batch, start)
            scale_B1 = torch.tensor([1 / sum(lengths)] * len(batch), device=self.device)[:, None]
            loss_BT = -logp_BT
            if ref_BT is not None:
                scale_B1 = torch.tensor([1 / (len(lengths) * lengths[k]) for k in chosen], device=self.device)[:, None]
                ratio_BT, gap_BT, a_B1 = (
                    (logp_BT - logp_BT.detach()).exp(),
                    ref_BT - logp_BT,
                    work.advantages[chosen].to(self.device)[:, None],
                )
                low, high = 1 - OBJECTIVE.clip_low, 1 + OBJECTIVE.clip_high
                gain_BT = torch.minimum(ratio_BT * a_B1, ratio_BT.clamp(low, high) * a_B1)
                loss_BT = OBJECTIVE.beta * (gap_BT.exp() - gap_BT - 1) - gain_BT
            loss = (loss_BT * scale_B1).masked_fill(mask_BT == 0, 0.0).sum()
            loss.backward()
            loss_sum += loss.item()
        clock.stop("train, reference included")
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        clock.stop("update")
        self.seconds = clock.seconds
        return loss_sum


class Compiled(Ours):
    """With the decoder's layers through torch.compile, for any lengths: what it would gain over single operations."""

    def __init__(self, *args):
        super().__init__(*args)
        for layer in self.model.model.layers:
            layer.forward = torch.compile(layer.forward, dynamic=True)


IMPLEMENTATIONS = {Ours: "nanosport", Theirs: "transformers, padded", Compiled: "nanosport, compiled"}


def peak_bytes(step: Callable[[], object]) -> int:
    """What torch has allocated at most during `step`; on a CPU, which keeps no count, above what was there before."""
    if GPU:
        torch.cuda.reset_peak_memory_stats()
        step()
        return torch.cuda.max_memory_allocated()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        step()
    events = [e for e in profile.profiler.kineto_results.events() if e.name() == "[memory]"]
    return int(np.cumsum([e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]).max())


def held_bytes(trainer: Ours) -> int:
    """Weights and Adam moments: what is there before peak_bytes begins to count on a CPU."""
    held = [p for m in (trainer.model, trainer.reference) if m is not None for p in m.parameters()]
    held += [t for state in trainer.optimizer.state.values() for t in state.values() if isinstance(t, torch.Tensor)]
    return sum(t.numel() * t.element_size() for t in held)


def planned_bytes(trainer: Ours, work: Work) -> float:
    """The planner's peak for this step, from the batches it really packs: without the sampler, and without the CUDA context."""
    cfg, parts = trainer.cfg, num_weights(trainer.cfg)
    sharded = dist.sharded(trainer.model)
    layout = memory.Layout(1, sharded, trainer.model.recompute_every, trainer.encoder.dtype, trainer.device.type)
    batches = [pack([work.episodes[k] for k in b], trainer.encoder, cfg, "cpu", work.share_prefix) for b in work.dealt(cfg)]
    micros = [
        memory.Micro(len(b.ids_T), len(b.ids_T if b.keys is None else b.keys.index_S), len(b.rows_M), len(b.features_ND))
        for b in batches
    ]
    stay = sum(memory.state_bytes(cfg, layout).values()) + (
        layout.dtype.itemsize * sum(parts.values()) if trainer.reference is not None else 0
    )
    stay += layout.dtype.itemsize * cfg.hidden_size * sum(m.features for m in micros)
    update = memory.update_bytes(cfg, layout) if sharded else 0.0
    return stay + max(update, *(sum(memory.train_bytes(cfg, m, layout).values()) for m in micros))


def measure(
    kind: type, cfg: ModelConfig, grid: tuple[int, int], work: Work, policy: bool, repeats: int, recompute_every: int
) -> dict:
    """Median time of a step and its stages, the time of each step, speeds, and the peak; says so where it does not fit."""
    device = torch.device("cuda" if GPU else "cpu")
    try:
        trainer = kind(cfg, grid, torch.bfloat16 if GPU else torch.float32, device, recompute_every, policy)
        loss, times = trainer.step(work), []  # the first makes Adam's moments, and kernels
        peak = peak_bytes(lambda: trainer.step(work))
        for _ in range(repeats):
            trainer.step(work)
            times.append({**trainer.seconds, "step": sum(trainer.seconds.values())})
    except torch.OutOfMemoryError:
        return {"error": "out of memory"}
    except torch._dynamo.exc.TorchDynamoException as error:
        return {"error": f"torch.compile: {error}".splitlines()[0]}
    seconds = {name: round(median(t[name] for t in times), 4) for name in times[0]}
    needed = replace(work, share_prefix=work.share_prefix and kind is not Theirs)
    tokens, flops = sum(len(e.ids) for e in work.episodes), needed.flops(cfg) * (4 if policy else 3)
    found = {
        "seconds": seconds,
        "steps_s": [round(t["step"], 4) for t in times],
        "tokens_per_s": round(tokens / seconds["step"]),
        "tflops": round(flops / seconds["step"] / 1e12, 3),
    }
    found["loss"] = loss
    if kind is not Theirs:
        peak += 0 if GPU else held_bytes(trainer)
        found["planned_gib"] = round(planned_bytes(trainer, work) / 2**30, 4)
    if GPU or kind is not Theirs:
        found["peak_gib"] = round(peak / 2**30, 4)
    return found


def card() -> tuple[float, float] | None:
    """(peak FLOP/s, GiB) of this GPU, where the planner knows it."""
    name = torch.cuda.get_device_name() if GPU else ""
    known = next((c for c in CARDS if c in name), None)
    return (CARDS[known][0], torch.cuda.get_device_properties(0).total_memory / 2**30) if known else None


def fitted(cfg: ModelConfig, room_gib: float, micro: memory.Micro) -> ModelConfig:
    """`cfg` with as many layers as the planner puts into 90 % of the room, for a policy update on one GPU."""
    for layers in range(cfg.num_hidden_layers, 0, -1):
        small, layout = replace(cfg, num_hidden_layers=layers), memory.Layout(1, recompute_every=1)
        need = sum(memory.state_bytes(small, layout).values()) + 2 * sum(num_weights(small).values())
        need += max(sum(memory.train_bytes(small, micro, layout).values()), memory.update_bytes(small, layout))
        if need + memory.RESERVED <= 0.9 * room_gib * 2**30:
            return small
    raise ValueError(f"{room_gib:.0f} GiB hold not one layer: give a larger GPU")


def bench(
    name: str, cfg: ModelConfig, grid: tuple[int, int], lengths: memory.Lengths, micro_tokens: int, repeats: int
) -> list[dict]:
    """SFT step and policy update of ours and theirs in micro-batches of `micro_tokens`; a group of 8 with a shared prefix and without."""
    rows, group = [], make_episodes(cfg, lengths, 1, 8)
    whole_group = sum(len(e.ids) for e in group)
    singles = make_episodes(cfg, lengths, 8, 1)
    cases = [
        ("SFT step", False, Work(singles, 1, micro_tokens), (Ours, Theirs)),
        ("policy update", True, Work(group, 8, micro_tokens), (Ours, Theirs, Compiled)),
        ("policy update, group in one pack", True, Work(group, 8, whole_group), (Ours,)),
        ("policy update, prefix not shared", True, Work(group, 8, micro_tokens, False), (Ours,)),
    ]
    for op, policy, work, kinds in cases:
        for kind in kinds:
            found = measure(kind, cfg, grid, work, policy, repeats, 1 if GPU else 0)
            gc.collect()
            if GPU:
                torch.cuda.empty_cache()
                if "tflops" in found and card():
                    found["mfu_percent"] = round(100 * found["tflops"] * 1e12 / card()[0], 1)
            row = {"op": op, "impl": IMPLEMENTATIONS[kind], "model": name}
            row |= {"layers": cfg.num_hidden_layers, "episodes": len(work.episodes), "micro_tokens": work.micro_tokens, **found}
            rows.append(row)
            print(line(row), flush=True)
    return rows


def line(row: dict) -> str:
    head = f"{row['model']:6}{row['layers']:3} layers  {row['op']:34}{row['impl']:22}"
    if "error" in row:
        return head + row["error"]
    peaks = f"{row['peak_gib']:8.2f} GiB" if "peak_gib" in row else ""
    planned = f" (planned {row['planned_gib']:.2f})" if "planned_gib" in row else ""
    mfu = f"MFU {row['mfu_percent']:4.1f} %" if "mfu_percent" in row else ""
    return f"{head}{row['seconds']['step']:8.3f} s {row['tokens_per_s']:8,} tokens/s  {mfu}{peaks}{planned}"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("results/train"), help="folder of the JSON")
    parser.add_argument("--shapes", nargs="+", default=["3b", "7b"] if GPU else ["nano"], choices=["3b", "7b"] if GPU else ["nano"])
    parser.add_argument("--micro-tokens", type=int, help="tokens of a pack; 8192, on a CPU 600")
    parser.add_argument("--repeats", type=int, default=3, help="steps a time is the median of")
    args = parser.parse_args()
    torch.set_float32_matmul_precision("high")
    began, rows = time.time(), []
    if not GPU:
        print(
            "No GPU here: the nano shape, lengths ÷ 28, float32. This checks the code and compares implementations; it is no GPU's figure."
        )
    dist.start()
    for name in args.shapes:
        cfg, lengths, grid, micro_tokens = (
            load_config(Path(__file__).parent.parent / "assets" / "nano-backbone"),
            NANO,
            (3, 3),
            args.micro_tokens or 600,
        )
        if GPU:
            lengths, grid, micro_tokens = memory.Lengths(), (13, 23), args.micro_tokens or 8192
            room = torch.cuda.get_device_properties(0).total_memory / 2**30
            cfg = fitted(memory.MODELS[name], room, memory.micro_batch(lengths, 3 * micro_tokens, 8, 8))
        whole = memory.MODELS[name].num_hidden_layers if GPU else cfg.num_hidden_layers
        label = name if cfg.num_hidden_layers == whole else f"{name}, {cfg.num_hidden_layers} of {whole} layers"
        rows += bench(label, cfg, grid, lengths, micro_tokens, args.repeats)
        report = {**provenance(), "gpu": GPU, "seconds": round(time.time() - began), "lengths": vars(lengths), "rows": rows}
        if not GPU:
            report["note"] = "nano shape on a CPU, lengths ÷ 28, float32: implementations compared, no GPU measured"
        args.out.mkdir(parents=True, exist_ok=True)
        device = torch.cuda.get_device_name().lower().replace(" ", "-") if GPU else "cpu"
        write_atomically(args.out / f"{device}.json", json.dumps(report, indent=1) + "\n")  # after each, so that none is lost
        print(f"{args.out / device}.json, {time.time() - began:.0f} s")
    dist.stop()


if __name__ == "__main__":
    main()
