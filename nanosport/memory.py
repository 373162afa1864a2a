"""The memory of one GPU by part, from shapes alone: what torch allocates in training, in rollouts and at an update.

Tested against measured peaks. Gradients count in full, although those of a first micro-batch come only as its activations go. The
vision tower is frozen, as in every preset. All sizes are bytes.

Letters: T tokens of a micro-batch, S keys its segments see, M rows with loss, L layers, D width, I inner width, H heads, K·d width of
keys, V vocabulary, W trained weights, n GPUs, c bytes of the compute dtype.
"""

from dataclasses import dataclass

import torch

from kernels.policy_loss import CHUNK_BYTES
from nanosport.cost import num_weights
from nanosport.frames import CHUNK
from nanosport.model import ModelConfig
from nanosport.vision import VisionConfig

GIB = 2**30
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
