"""What a recipe needs and takes before it is run: memory of each GPU by part, seconds of a step by stage, GPU-hours.

python -m nanosport.plan 7b --gpus 8 --gpu-memory 80
python -m nanosport.plan 3b --gpus 4 --gpu A100 --micro-tokens 8192
python -m nanosport.plan 7b --json

Memory is what torch allocates on one GPU of one node; it follows from shapes alone and is tested against measured peaks. Gradients
count in full, although those of a first micro-batch come only as its activations go. Times rest on assumptions (MFU, lengths of
episodes), which are flags and are printed beside the figures. Decoding of videos and a judge are not in them. The vision tower is
frozen, as in every preset. GiB are 2^30 bytes.

Letters: T tokens of a micro-batch, S keys its segments see, M rows with loss, L layers, D width, I inner width, H heads, K·d width of
keys, V vocabulary, W trained weights, n GPUs, c bytes of the compute dtype.
"""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from kernels.policy_loss import CHUNK_BYTES
from nanosport import presets
from nanosport.cost import causal_pairs, head_flops, num_weights, text_flops, vision_flops
from nanosport.frames import CACHE_BYTES, CHUNK
from nanosport.image import ImageConfig, smart_resize
from nanosport.load import load_config
from nanosport.model import ModelConfig
from nanosport.vision import VisionConfig

GIB = 2**30
CARDS = {
    "H100": (989e12, 3.35e12, 450e9),
    "H200": (989e12, 4.8e12, 450e9),
    "A100": (312e12, 2.0e12, 300e9),
    "H20": (148e12, 4.0e12, 450e9),
}
"""Dense bf16 FLOP/s, memory bytes/s, NVLink bytes/s each way."""
PAPER_GPU_HOURS = 796  # on H20, both stages
RESERVED = 2 * GIB  # CUDA context, NCCL, cuBLAS and what the allocator cannot fill


def qwen(hidden: int, inner: int, layers: int, heads: int, vocab: int, kv_heads: int, tied: bool) -> ModelConfig:
    """Qwen2.5-VL in its published shapes: a hub id's config.json cannot be read before it is downloaded."""
    tower = VisionConfig(32, 1280, 3420, 16, hidden, patch_size=14, window_size=112, fullatt_block_indexes=(7, 15, 23, 31))
    ids = {"image_token_id": 151655, "video_token_id": 151656, "vision_start_token_id": 151652, "vision_end_token_id": 151653}
    shape = {"vocab_size": vocab, "hidden_size": hidden, "intermediate_size": inner, "num_hidden_layers": layers}
    more = {"num_attention_heads": heads, "num_key_value_heads": kv_heads, "tie_word_embeddings": tied, "eos_token_ids": (151645,)}
    return ModelConfig(**shape, **more, **ids, rms_norm_eps=1e-6, rope_theta=1e6, mrope_section=(16, 24, 24), vision=tower)


MODELS = {"3b": qwen(2048, 11008, 36, 16, 151936, 2, tied=True), "7b": qwen(3584, 18944, 28, 28, 152064, 4, tied=False)}


@dataclass(frozen=True)
class Lengths:
    """An episode as the paper has it, on average; texts are assumed, for it does not say them."""

    frame_tokens: int = 299
    """Vision tokens of a frame of 640×360."""
    overview: int = 8
    """Frames before the first turn."""
    frames_per_call: int = 8
    calls: float = 0.8
    """Tool calls of an episode: 8 + 0.8 · 8 = 14.4 frames."""
    label: int = 9
    """Text tokens beside each frame, `frame 123:` with its delimiters."""
    prompt_text: int = 300
    """System prompt with the tool's schema, question and options."""
    turn_text: int = 200
    """Tokens of one assistant turn, the thought among them."""
    result_text: int = 20
    """Text around a tool's frames."""

    @property
    def prompt(self) -> int:
        return self.overview * (self.frame_tokens + self.label) + self.prompt_text

    @property
    def result(self) -> int:
        """Tokens that one call adds, besides the turn that asks for it."""
        return self.frames_per_call * (self.frame_tokens + self.label) + self.result_text

    @property
    def trained(self) -> float:
        return (1 + self.calls) * self.turn_text

    @property
    def response(self) -> float:
        return self.trained + self.calls * self.result

    @property
    def frames(self) -> float:
        return self.overview + self.calls * self.frames_per_call

    def still_going(self, turn: int, max_turns: int) -> float:
        """Share of the episodes that have a turn number `turn` (0 the first), each turn calling the tool equally often."""
        low, high = 0.0, 1.0
        for _ in range(40):
            share = (low + high) / 2
            low, high = (share, high) if sum(share**k for k in range(1, max_turns)) < self.calls else (low, share)
        return high**turn


@dataclass(frozen=True)
class Micro:
    """A micro-batch."""

    tokens: int
    keys: int
    """What its segments see: a shared prefix once for each that sees it; else as many as tokens."""
    rows: int
    """With loss."""
    features: int
    """Vision tokens."""


def micro_batch(lengths: Lengths, micro_tokens: int, together: int, episodes: float) -> Micro:
    """The fullest micro-batch of a rank that has `episodes` of a step, `together` of them in a unit that begins alike.

    As batch.make_units does, a unit is halved until it fits: P + k·R ≤ micro_tokens. As many units as go in are then packed.
    """
    while together > 1 and lengths.prompt + together * lengths.response > micro_tokens:
        together //= 2
    unit = lengths.prompt + together * lengths.response
    tokens = max(unit, min(micro_tokens, unit * max(1.0, episodes / together)))
    units, more = tokens / unit, lengths.calls * lengths.frames_per_call
    keys = units * (lengths.prompt + together * (lengths.prompt + lengths.response)) if together > 1 else tokens
    features = units * lengths.frame_tokens * (lengths.overview + together * more)
    return Micro(*map(round, (tokens, keys, units * together * lengths.trained, features)))


@dataclass(frozen=True)
class Layout:
    """How a model is trained: what of train.py's and rl.py's flags memory depends on."""

    gpus: int = 1
    """Among which the weights are sharded."""
    sharded: bool = True
    """FSDP2, as on every GPU. False: one process on a CPU."""
    recompute_every: int = 0
    dtype: torch.dtype = torch.bfloat16
    device: str = "cuda"
    offload_adam: bool = False


def trained_weights(cfg: ModelConfig) -> int:
    return sum(num_weights(cfg).values()) - num_weights(cfg)["vision"]


def state_bytes(cfg: ModelConfig, layout: Layout) -> dict[str, float]:
    """What is there all the time: weights 4·W/n, gradients 4·W/n, Adam's two moments 8·W/n; the tower c·W_tower, whole."""
    shard = 4 * trained_weights(cfg) / layout.gpus
    tower = layout.dtype.itemsize * num_weights(cfg)["vision"]
    return {"weights": shard, "gradients": shard, "Adam moments": 0 if layout.offload_adam else 2 * shard, "vision tower": tower}


def layer_bytes(cfg: ModelConfig, micro: Micro, layout: Layout) -> float:
    """What one decoder layer keeps for its backward pass: c·(T·(8·D + 4·I) + 2·S·K·d) + 4·T·H.

    Each norm keeps input, quotient and output (3·D, twice), attention its queries and output (2·D), keys and values, and float32
    sums; the MLP its gate, silu(gate), up and their product (4·I). A CPU keeps attention's output twice, the second in its own order,
    and where a prefix is shared its keys as often as there are heads, 2·S·D.
    """
    on_cpu, width = layout.device == "cpu", cfg.hidden_size
    keys = width if on_cpu and micro.keys > micro.tokens else cfg.num_key_value_heads * cfg.head_dim
    per_token = (8 + on_cpu) * width + 4 * cfg.intermediate_size
    return layout.dtype.itemsize * (micro.tokens * per_token + 2 * micro.keys * keys) + 4 * micro.tokens * cfg.num_attention_heads


def activation_bytes(cfg: ModelConfig, micro: Micro, layout: Layout) -> float:
    """All layers' layer_bytes, of recomputed ones only the input c·T·D; cos and sin 2·c·T·d."""
    layers, c = cfg.num_hidden_layers, layout.dtype.itemsize
    recomputed = -(-layers // layout.recompute_every) if layout.recompute_every else 0
    kept = recomputed * c * micro.tokens * cfg.hidden_size + (layers - recomputed) * layer_bytes(cfg, micro, layout)
    return kept + 2 * c * micro.tokens * cfg.head_dim


def backward_bytes(cfg: ModelConfig, micro: Micro, layout: Layout) -> float:
    """A layer's backward pass above what is kept: gradients of the MLP's two inner factors and of the stream, c·T·(2·I + D); and
    layer_bytes but for its input where the last layer is recomputed (if it is not, what it kept has gone when one before it is)."""
    stream = layout.dtype.itemsize * micro.tokens * cfg.hidden_size
    gradients = layout.dtype.itemsize * micro.tokens * 2 * cfg.intermediate_size + stream
    recomputed = layout.recompute_every and (cfg.num_hidden_layers - 1) % layout.recompute_every == 0
    return gradients + (layer_bytes(cfg, micro, layout) - stream if recomputed else 0)


def gathered_bytes(cfg: ModelConfig, layout: Layout) -> float:
    """FSDP2 around one layer's backward pass: this layer and the next in the compute dtype and its gradients, 3·c·W_layer; the float32
    sum of the one before, under way, 4·W_layer; and the embedding, which belongs to no layer, c·V·D."""
    if not layout.sharded:
        return 0.0
    parts, c = num_weights(cfg), layout.dtype.itemsize
    return (3 * c + 4) * parts["layers"] / cfg.num_hidden_layers + c * parts["embedding"]


def loss_bytes(cfg: ModelConfig, micro: Micro, layout: Layout) -> float:
    """The final norm 3·c·T·D, which is free again before the layers' backward pass, and the loss: logits of a chunk, the head's
    gradient in float32 4·V·D, rows and their gradient 2·c·M·D, and of a sharded model the gathered head c·V·D.

    Logits take CHUNK_BYTES at most; Triton makes the gradient in their place, torch on a CPU has five of them at once.
    """
    c, head = layout.dtype.itemsize, cfg.vocab_size * cfg.hidden_size
    chunk = min(max(CHUNK_BYTES[layout.device], 64 * c * cfg.vocab_size), c * micro.rows * cfg.vocab_size)
    chunk *= 5 if layout.device == "cpu" else 1
    return chunk + 4 * head + (c * head if layout.sharded else 0) + c * cfg.hidden_size * (3 * micro.tokens + 2 * micro.rows)


def train_bytes(cfg: ModelConfig, micro: Micro, layout: Layout) -> dict[str, float]:
    """Forward and backward pass of one micro-batch; the peak lies in the loss or in the last layer's backward pass."""
    loss, backward, gathered = loss_bytes(cfg, micro, layout), backward_bytes(cfg, micro, layout), gathered_bytes(cfg, layout)
    parts = {"activations": activation_bytes(cfg, micro, layout)}
    return parts | ({"loss chunk": loss} if loss > backward + gathered else {"one layer": backward, "gathered layers": gathered})


def update_bytes(cfg: ModelConfig, layout: Layout) -> float:
    """AdamW's square roots of all its second moments at once, 4·W/n (offloaded: moments and root of one weight, 12·V·D/n at most);
    then the sampler gets its weights one by one, 4·V·D at most."""
    head = 4 * cfg.vocab_size * cfg.hidden_size
    return max(3 * head / layout.gpus if layout.offload_adam else 4 * trained_weights(cfg) / layout.gpus, head)


def token_bytes(cfg: ModelConfig) -> int:
    """Keys and values of one token in the cache, in bfloat16: 4·L·K·d."""
    return 4 * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim


def cache_bytes(cfg: ModelConfig, lengths: Lengths, rows: int, new_tokens: int, max_turns: int) -> float:
    """The cache at the worst moment of a rollout of `rows` episodes: token_bytes of each slot, every row padded to the longest.

    Rows that end leave (KVCache.select) and room for a turn is added (KVCache.grow), both by a copy: for a moment old and new are
    there; and half of a turn's rows go on in a cache of their own.
    """
    left = [rows * lengths.still_going(turn, max_turns) for turn in range(max_turns)]
    slots = [lengths.prompt + turn * (lengths.result + lengths.turn_text) + new_tokens for turn in range(max_turns)]
    moments = [1.5 * n * size for n, size in zip(left, slots)]
    moments += [(n + more) * size for n, more, size in zip(left, left[1:], slots)]
    moments += [n * (size + more) for n, size, more in zip(left[1:], slots, slots[1:])]
    return token_bytes(cfg) * max(moments)


def prefill_bytes(cfg: ModelConfig, rows: float, new: int, seen: int) -> float:
    """A layer where T new tokens a row enter the cache, B·T·(6·I + 8·D), its mask 3·B·T·S, repeated keys and values 4·B·S·D."""
    inside = new * (6 * cfg.intermediate_size + 8 * cfg.hidden_size)
    return rows * (inside + 3 * new * seen + 4 * seen * cfg.hidden_size)


def encode_bytes(cfg: ModelConfig, lengths: Lengths) -> float:
    """frames.CHUNK frames in the tower: pixels in float32, a block's inside 4·I + 8·D, queries and keys rotated in float32, 24·D."""
    tower, patches = cfg.vision, CHUNK * lengths.frame_tokens * cfg.vision.merge_unit
    return patches * (4 * tower.patch_width + 4 * tower.intermediate_size + 32 * tower.hidden_size)


@dataclass(frozen=True)
class Config:
    preset: str = "7b"
    """nano, 3b, 7b or 7b-scaled; the first word on the command line."""
    gpus: int = 8
    """Of one node: the weights are sharded among them."""
    gpu: Literal["H100", "H200", "A100", "H20"] = "H100"
    gpu_memory: float = 80.0
    """GiB of each."""
    model: str | None = None
    """A model folder whose shape is taken instead of the preset's."""
    batch_size: int | None = None
    """SFT's trajectories a step. None, here and below: as the preset says."""
    sft_steps: int | None = None
    num_prompts: int | None = None
    group_size: int | None = None
    steps: int | None = None
    """Of RL."""
    max_new_tokens: int | None = None
    micro_tokens: int | None = None
    recompute_every: int | None = None
    rollout_batch: int | None = None
    offload_adam: bool = False
    share_prefix: bool = True
    calls: float = 0.8
    """Assumed tool calls of an episode."""
    prompt_text: int = 300
    """Assumed text tokens of a prompt, besides the frames' labels."""
    turn_text: int = 200
    """Assumed tokens of an assistant turn."""
    longest_turn: float = 2.0
    """Assumed length of the longest turn among those sampled together, in mean ones: all wait for it."""
    mfu: float = 0.4
    """Assumed share of the peak FLOP/s in training and prefill."""
    bandwidth: float = 0.6
    """Assumed share of the peak bytes/s in decoding, in the update, and between GPUs."""
    layer_ms: float = 0.2
    """Assumed least time of a layer in a decoding step: its kernels are launched one by one."""
    json: bool = False
    """Print a JSON object instead of the tables."""


@dataclass(frozen=True)
class Stage:
    """SFT or RL, as one GPU sees it."""

    model: ModelConfig
    lengths: Lengths
    layout: Layout
    run: Any
    """train.Config or rl.Config."""
    prompts: float
    """A step."""
    members: int
    """Episodes of each."""
    share_prefix: bool

    @property
    def episodes(self) -> float:
        return self.prompts * self.members

    @property
    def sampled(self) -> float:
        """Episodes a rank samples at a time."""
        return min(self.episodes, max(self.run.rollout_batch, self.members))

    @property
    def micro(self) -> Micro:
        return micro_batch(self.lengths, self.run.micro_tokens, self.members if self.share_prefix else 1, self.episodes)

    @property
    def micro_batches(self) -> float:
        return self.episodes * self.lengths.trained / self.micro.rows


def stages(cfg: Config) -> dict[str, Stage]:
    """SFT and RL of a preset with the flags over it. Raises ValueError for what no run can be."""
    import rl  # not before they are needed: they bring video decoders and tyro, and the benchmark wants the formulas alone
    import train

    for flag in ("gpus", "gpu_memory", "calls", "mfu", "bandwidth", "turn_text", "longest_turn"):
        if getattr(cfg, flag) <= 0:
            raise ValueError(f"--{flag.replace('_', '-')} {getattr(cfg, flag)}: must be above 0")
    if cfg.preset not in presets.RL:
        raise ValueError(f"--preset {cfg.preset}: must be one of {', '.join(presets.RL)}")
    given = {name: value for name, value in asdict(cfg).items() if value is not None and name != "model"}
    wanted = {
        "SFT": ({"batch_size"}, train.Config, presets.SFT),
        "RL": ({"num_prompts", "group_size", "steps", "max_new_tokens", "rollout_batch"}, rl.Config, presets.RL),
    }
    runs = {}
    for name, (own, config, known) in wanted.items():
        runs[name] = config(
            **known[cfg.preset] | {k: v for k, v in given.items() if k in own | {"micro_tokens", "recompute_every", "offload_adam"}}
        )
    sft, policy = replace(runs["SFT"], steps=cfg.sft_steps or runs["SFT"].steps), runs["RL"]
    sft.check()
    policy.check()
    if policy.num_prompts < cfg.gpus:
        raise ValueError(f"--num-prompts {policy.num_prompts}: must be at least one for each of --gpus {cfg.gpus}")
    if not cfg.calls < policy.max_turns - 1:
        raise ValueError(f"--calls {cfg.calls}: must be below {policy.max_turns - 1}, one less than an episode's turns")
    folder = cfg.model or (Path(__file__).parent.parent / sft.model if cfg.preset == "nano" else None)
    model = load_config(folder) if folder else MODELS[cfg.preset[:2]]
    image = ImageConfig.from_folder(folder, sft.max_pixels) if folder else ImageConfig(max_pixels=sft.max_pixels)
    height, width = smart_resize(360, 640, image)
    tokens = height * width // (image.patch_size * image.merge_size) ** 2
    same = model, Lengths(tokens, calls=cfg.calls, prompt_text=cfg.prompt_text, turn_text=cfg.turn_text)
    layout = [Layout(cfg.gpus, recompute_every=run.recompute_every, offload_adam=run.offload_adam) for run in (sft, policy)]
    return {
        "SFT": Stage(*same, layout[0], sft, sft.batch_size / cfg.gpus, 1, False),
        "RL": Stage(*same, layout[1], policy, -(-policy.num_prompts // cfg.gpus), policy.group_size, cfg.share_prefix),
    }


def memory(stage: Stage) -> dict[str, dict[str, float]]:
    """{moment: {part: bytes}}. The moments follow each other; the parts of "always" are there in all but "start", when each rank
    loads all weights in float32 before it keeps its shard."""
    model, lengths, run, micro, layout = stage.model, stage.lengths, stage.run, stage.micro, stage.layout
    feature, weights = 2 * model.hidden_size, num_weights(model)
    always = {"CUDA, NCCL": RESERVED, **state_bytes(model, layout)}
    always["frames seen"] = min(CACHE_BYTES, run.steps * stage.episodes * lengths.frames * lengths.frame_tokens * feature)
    moments = {
        "always": always,
        "start": {"all weights": 4 * sum(weights.values())},
        "encode": {"tower": encode_bytes(model, lengths)},
    }
    if stage.members > 1:
        always["rollout copy"] = 2 * sum(weights.values())
        always["reference"] = 2 * (trained_weights(model) / layout.gpus + weights["vision"]) if run.kl > 0 else 0.0
        called = stage.sampled * lengths.still_going(1, run.max_turns)
        moments["rollout"] = {
            "KV cache": cache_bytes(model, lengths, stage.sampled, run.max_new_tokens, run.max_turns),
            "prefill": max(
                prefill_bytes(model, stage.sampled / stage.members, lengths.prompt, lengths.prompt),
                prefill_bytes(model, called, lengths.result, lengths.prompt + lengths.result),
            ),
        }
    always["frames of the step"] = feature * micro.features * (max(1.0, stage.micro_batches) if stage.members > 1 else 1)
    return moments | {"train": train_bytes(model, micro, layout), "update": {"Adam's square roots": update_bytes(model, layout)}}


def totals(moments: dict[str, dict[str, float]]) -> dict[str, float]:
    """{moment: bytes with what is always there}."""
    always = sum(moments["always"].values())
    return {
        moment: sum(parts.values()) + {"always": 0.0, "start": RESERVED}.get(moment, always) for moment, parts in moments.items()
    }


def peak(stage: Stage) -> float:
    return max(totals(memory(stage)).values())


def train_flops(stage: Stage) -> tuple[float, float]:
    """(operations of the forward passes of a step, of its head); attention's pairs as they are packed."""
    micro, lengths = stage.micro, stage.lengths
    length, together = lengths.prompt + lengths.response, micro.rows / lengths.trained
    pairs = together * length**2 / 2
    if micro.keys > micro.tokens:
        units = (micro.tokens - together * lengths.response) / lengths.prompt
        pairs = units * causal_pairs([length] * round(together / units), lengths.prompt)
    count = stage.micro_batches
    return count * text_flops(stage.model, micro.tokens, pairs), count * head_flops(stage.model, micro.rows)


def seconds(stage: Stage, cfg: Config) -> dict[str, float]:
    """Of a step of one GPU, with F the operations of the forward passes:

    train      (3·F + 3·head + F·share of recomputed layers) ÷ (MFU · peak), or moving 8·W a micro-batch over NVLink if that is longer
    reference  (F + head) ÷ (MFU · peak)
    decode     a token reads 2·(W_layers + head) and the cache, and takes L·layer_ms at least; all wait for each turn's longest row
    prefill    F of prompts and tool results; each frame once through the tower
    update     36·W/n through memory: norm and scaling of the gradients, AdamW, its square roots
    sampler    4·W·(n − 1)/n over NVLink, then 2·W written
    """
    model, lengths, run = stage.model, stage.lengths, stage.run
    flops, bandwidth, nvlink = (peak * share for peak, share in zip(CARDS[cfg.gpu], (cfg.mfu, cfg.bandwidth, cfg.bandwidth)))
    trained, away = trained_weights(model), (cfg.gpus - 1) / cfg.gpus
    forward, head = train_flops(stage)
    again = 1 / run.recompute_every if run.recompute_every else 0.0
    train = max(((3 + again) * forward + 3 * head) / flops, 8 * trained * away * stage.micro_batches / nvlink)
    looked = stage.prompts * lengths.overview + stage.episodes * lengths.calls * lengths.frames_per_call
    found = {"frames": vision_flops(model, looked * lengths.frame_tokens) / flops}
    if stage.members > 1:
        fed = stage.prompts * lengths.prompt + stage.episodes * lengths.calls * lengths.result
        found["prefill"], found["decode"] = text_flops(model, fed, fed * lengths.prompt) / flops, 0.0
        for turn in range(run.max_turns):
            left = stage.sampled * lengths.still_going(turn, run.max_turns)
            read = 2 * (num_weights(model)["layers"] + model.vocab_size * model.hidden_size)
            read += token_bytes(model) * left * (lengths.prompt + turn * (lengths.result + lengths.turn_text))
            tokens = min(lengths.turn_text * cfg.longest_turn, run.max_new_tokens) * min(1.0, left) * stage.episodes / stage.sampled
            found["decode"] += tokens * max(read / bandwidth, cfg.layer_ms / 1e3 * model.num_hidden_layers)
        found["reference"] = (forward + head) / flops if run.kl > 0 else 0.0
        found["weights to the sampler"] = 4 * trained * away / nvlink + 2 * trained / bandwidth
    return found | {"train": train, "update": 36 * trained / cfg.gpus / bandwidth}


def fits(cfg: Config) -> bool:
    return max(peak(stage) for stage in stages(cfg).values()) <= cfg.gpu_memory * GIB


def advice(cfg: Config) -> str | None:
    """The flags that make it fit, those that cost least first; None where none of these do."""
    policy = stages(cfg)["RL"].run
    fewer = [{"micro_tokens": policy.micro_tokens // k} for k in (2, 4)]
    changes = [{"recompute_every": 1}, *fewer, *({"recompute_every": 1, **less} for less in fewer)]
    changes += [
        {"rollout_batch": policy.group_size},
        {"offload_adam": True},
        {"offload_adam": True, "rollout_batch": policy.group_size},
    ]
    changes += [{"recompute_every": 1, **fewer[-1], **changes[-1]}]
    more = [n for n in range(cfg.gpus + 1, policy.num_prompts + 1) if policy.num_prompts % n == 0]
    changes += [{"gpus": n} for n in more] + [{"gpus": n, **changes[-1]} for n in more]
    found = next((change for change in changes if fits(replace(cfg, **change))), None)
    return found and " ".join(
        f"--{name.replace('_', '-')}" + ("" if value is True else f" {value}") for name, value in found.items()
    )


def report(cfg: Config) -> dict:
    """All that is printed. Memory in bytes; `kv_cache_at_most`: were the tool called in every turn of every episode."""
    both, found = stages(cfg), {"config": asdict(cfg), "fits": fits(cfg)}
    found["advice"] = None if found["fits"] else advice(cfg)
    for name, stage in both.items():
        parts, spent = memory(stage), seconds(stage, cfg)
        found[name] = {
            "micro_batch": asdict(stage.micro),
            "memory": parts,
            "total": totals(parts),
            "seconds": spent,
            "steps": stage.run.steps,
        }
        found[name]["gpu_hours"] = stage.run.steps * sum(spent.values()) * cfg.gpus / 3600
    stage, run = both["RL"], both["RL"].run
    always = replace(stage.lengths, calls=run.max_turns - 1.01)
    found["RL"]["kv_cache_at_most"] = cache_bytes(stage.model, always, stage.sampled, run.max_new_tokens, run.max_turns)
    return found | {"lengths": asdict(stage.lengths), "gpu_hours": found["SFT"]["gpu_hours"] + found["RL"]["gpu_hours"]}


def main(cfg: Config) -> None:
    found = report(cfg)
    if cfg.json:
        return print(json.dumps(found, indent=1))
    print(f"{cfg.preset} on {cfg.gpus} × {cfg.gpu} with {cfg.gpu_memory:g} GiB")
    for name in ("SFT", "RL"):
        part = found[name]
        total, tokens = part["total"], part["micro_batch"]["tokens"]
        print(f"\n{name}: GiB of each GPU, {max(total.values()) / GIB:.1f} at the peak; a micro-batch has up to {tokens:,} tokens")
        for moment, parts in part["memory"].items():
            listed = ", ".join(f"{what} {size / GIB:.2f}" for what, size in parts.items())
            print(f"  {moment:8}{total[moment] / GIB:7.1f} {' ' if moment == 'always' else '+'} {listed}")
        print(f"{name}: {sum(part['seconds'].values()):.1f} s a step, {part['steps']} steps, {part['gpu_hours']:.0f} GPU-hours")
        print("  " + ", ".join(f"{what} {size:.1f}" for what, size in part["seconds"].items()))
    print(f"\nBoth: {found['gpu_hours']:.0f} GPU-hours; the paper says {PAPER_GPU_HOURS}, on 8 × H20.")
    print("Not counted: decoding of videos, judges, ranks that wait.")
    assumed = ("mfu", "bandwidth", "layer_ms", "calls", "prompt_text", "turn_text", "longest_turn")
    flags = " ".join(f"--{name.replace('_', '-')} {getattr(cfg, name)}" for name in assumed)
    print(f"Assumed: {flags}; {found['lengths']['frame_tokens']} tokens a frame.")
    print(f"Were the tool called in every turn, the KV cache would take {found['RL']['kv_cache_at_most'] / GIB:.1f} GiB.")
    way = f"turn {found['advice']}" if found["advice"] else "none of its flags helps"
    print(f"\n{cfg.gpu_memory:g} GiB: {'it fits' if found['fits'] else f'it does not fit: {way}'}.")


if __name__ == "__main__":
    from nanosport import cli

    cli.run(main, Config, {name: {"preset": name} for name in ("7b", *presets.RL)})
