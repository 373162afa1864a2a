"""The language model of every family, in plain PyTorch: the same function, and the same weight
names, as the published checkpoints.

Tokens come packed end to end. `hidden` takes whole sequences (training, log-probs); generation
runs the same layers with an attention of its own, over a cache (`run_layers`). Both return hidden
states; whoever needs logits applies the head, to the rows that need it.

A family is one module (qwen2_5_vl.py, qwen3_vl.py): its ModelConfig says how config.json is read,
how its decoder differs and what its weights are called in a folder; its VisionConfig builds the
tower. Features may be wider than the model: their first slice goes in the image tokens' places,
each further one (DeepStack) is added there after one of the first layers.

Letters: T tokens, D hidden, H heads, K key/value heads, d head width, V vocabulary, N vision
tokens.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from operator import call
from typing import Annotated, ClassVar

import torch
from torch import nn

from kernels.attention import Keys, choose, varlen_attention
from kernels.elementwise import rotary
from nanosport.fields import Above, AtLeast, AtMost, build, only, section
from nanosport.model.layers import (
    MLP,
    Embedding,
    Linear,
    RMSNorm,
    apply,
    inverse_frequencies,
    join,
    learns,
    run_layer,
)
from nanosport.model.vision import MAX_LAYERS, VisionConfig


@dataclass(frozen=True, kw_only=True)
class ModelConfig:
    """What every family has; a family's own config extends it."""

    rope_default: ClassVar[tuple[float, tuple[int, int, int]]]
    """rope_theta and mrope_section where config.json has none."""
    qkv_bias: ClassVar[bool]
    qk_norm: ClassVar[bool]
    """Whether the queries and keys of each head are normed before they are rotated."""
    vision_type: ClassVar[type[VisionConfig]]
    """The family's config of its tower, from config.json's `vision_config`."""

    vocab_size: Annotated[int, AtLeast(1)]
    hidden_size: Annotated[int, AtLeast(1)]
    intermediate_size: Annotated[int, AtLeast(1)]
    num_hidden_layers: Annotated[int, AtLeast(1), AtMost(MAX_LAYERS)]
    num_attention_heads: Annotated[int, AtLeast(1)]
    num_key_value_heads: Annotated[int, AtLeast(1)]
    rms_norm_eps: Annotated[float, Above(0)]
    rope_theta: Annotated[float, Above(0)]
    mrope_section: Annotated[tuple[int, int, int], AtLeast(0)]
    """How many rotary frequencies follow the time, height and width position; together half the
    head width."""
    tie_word_embeddings: bool
    image_token_id: Annotated[int, AtLeast(0)]
    video_token_id: Annotated[int, AtLeast(0)]
    vision_start_token_id: Annotated[int, AtLeast(0)]
    vision_end_token_id: Annotated[int, AtLeast(0)]
    eos_token_ids: Annotated[tuple[int, ...], AtLeast(0)]
    vision: VisionConfig

    @classmethod
    def from_dict(cls, raw: dict, where="config.json") -> "ModelConfig":
        """From config.json, flat or nested (`text_config`, `rope_parameters`). Raises ValueError
        for the first field that is wrong, after `where`."""
        inner = section(raw, "text_config", where)
        text = raw | {name: value for name, value in inner.items() if value is not None}
        rope = section(text, "rope_scaling", where) | section(text, "rope_parameters", where)
        rope_type = rope.get("rope_type", rope.get("type", "default"))
        only(where, "rope type", rope_type, "default", "mrope")
        only(where, "hidden_act", text.get("hidden_act", "silu"), "silu")
        cls.check_settings(text, rope, where)
        # transformers ties where either level says so
        tied = raw.get("tie_word_embeddings") or text.get("tie_word_embeddings")
        theta, parts = cls.rope_default
        values = text | {
            "rope_theta": rope.get("rope_theta", text.get("rope_theta", theta)),
            "mrope_section": rope.get("mrope_section", parts),
            "tie_word_embeddings": tied or False,
            "eos_token_ids": as_ids(text.get("eos_token_id")),
            "vision": cls.vision_type.from_dict(section(raw, "vision_config", where), where),
        }
        cfg = build(cls, values, where)
        for wrong, rule in cfg.size_rules():
            if wrong:
                raise ValueError(f"{where}: {rule}")
        return cfg

    @classmethod
    def check_settings(cls, text: dict, rope: dict, where) -> None:
        """Raise ValueError for a setting that asks for what the family's code has not."""
        raise NotImplementedError

    def size_rules(self) -> list[tuple]:
        """(whether it is broken, the rule) of sizes that must fit together."""
        heads, half, v = self.num_attention_heads, f"{self.head_dim}/2, half a head", self.vision
        odd_section, keys = 2 * sum(self.mrope_section) != self.head_dim, self.num_key_value_heads
        wide, tower = v.out_hidden_size != self.hidden_size, "vision_config"
        return [
            (heads % keys, f"num_key_value_heads: must divide the {heads} heads"),
            (odd_section, f"mrope_section {self.mrope_section}: must sum to {half}"),
            (v.hidden_size % (4 * v.num_heads), f"{tower}: num_heads: must divide hidden_size / 4"),
            (wide, f"{tower}: out_hidden_size: must be hidden_size"),
        ]

    def rotary_axes(self) -> torch.Tensor:
        """(d/2,): which of the three positions each rotary frequency follows."""
        raise NotImplementedError

    def published_name(self, name: str) -> str:
        """What one of our weights is called in a published folder, and in what takes weights by
        those names."""
        return name


def as_ids(eos: int | Sequence[int] | None) -> tuple[int, ...]:
    """End-of-sequence ids, of which a config may have none, one or a list."""
    if eos is None:
        return ()
    return tuple(eos) if isinstance(eos, list | tuple) else (eos,)


def check_features(is_image: torch.Tensor, features_ND: torch.Tensor | None) -> None:
    """Raise ValueError unless there are as many vision features as image tokens."""
    num_tokens, num_features = int(is_image.sum()), 0 if features_ND is None else len(features_ND)
    if num_tokens != num_features:
        counts = f"{num_tokens} image tokens, but {num_features} vision features"
        raise ValueError(f"{counts}: they must be as many")


def mrope_positions(
    ids: Sequence[int] | torch.Tensor,
    grids: Sequence[tuple[int, int, int]],
    cfg: ModelConfig,
    start: int = 0,
) -> tuple[torch.Tensor, int]:
    """(positions_3T, next_start) of one sequence of text and images, or of the next part of one.

    Text counts on by 1 on all three axes. An image's tokens share its time position and spread over
    height and width; what follows starts after its longer side. next_start is the `start` of the
    part appended next. Raises ValueError where the runs of image tokens and the grids do not match:
    an image must come whole, and text must part two images.
    """
    ids, merge, grids = torch.as_tensor(ids).tolist(), cfg.vision.spatial_merge_size, list(grids)
    parts, num_used = [torch.empty(3, 0, dtype=torch.long)], 0
    for is_image, run in groupby(ids, key=lambda token: token == cfg.image_token_id):
        length = len(list(run))
        if not is_image:
            parts.append(torch.arange(start, start + length).expand(3, -1))
            start += length
            continue
        if num_used == len(grids):
            raise ValueError(f"image {num_used + 1} has no grid: {len(grids)} were given")
        t, h, w = (int(n) for n in grids[num_used])
        h, w, num_used = h // merge, w // merge, num_used + 1
        if length != t * h * w:
            tokens = f"{length} image tokens in a row, but its grid makes {t * h * w}"
            raise ValueError(f"image {num_used}: {tokens}")
        places = torch.cartesian_prod(torch.arange(t), torch.arange(h), torch.arange(w))
        parts.append(places.view(-1, 3).T + start)
        start += max(h, w)
    if num_used != len(grids):
        raise ValueError(f"{len(grids)} grids were given, but the tokens hold {num_used} images")
    return torch.cat(parts, dim=1), start


def mrope_tables(cfg: ModelConfig, device) -> tuple[torch.Tensor, torch.Tensor]:
    """(axis, frequency), d/2 each: which of the three positions turns a channel, and how fast."""
    return cfg.rotary_axes().to(device), inverse_frequencies(cfg.rope_theta, cfg.head_dim, device)


def mrope_cos_sin(positions_3T, tables, dtype):
    """cos and sin, (T, 1, d): each frequency follows one of the three positions."""
    axes, inv_freq = tables
    angles_Td = positions_3T.T[:, axes].float() * inv_freq
    cos, sin = angles_Td.cos().to(dtype), angles_Td.sin().to(dtype)
    return torch.cat((cos, cos), dim=-1)[:, None], torch.cat((sin, sin), dim=-1)[:, None]


def attention_of(cfg: ModelConfig, device: torch.device, dtype=torch.bfloat16) -> str:
    """The name of the attention that training runs on a device."""
    if device.type != "cuda" or dtype == torch.float32:
        return "SDPA a segment"
    heads = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
    return choose(heads, True, dtype, device.type)[0]


class Attention(nn.Module):
    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.head_dim, width, bias = cfg.head_dim, cfg.hidden_size, cfg.qkv_bias
        self.q_proj = Linear(width, cfg.num_attention_heads * cfg.head_dim, bias)
        self.k_proj = Linear(width, cfg.num_key_value_heads * cfg.head_dim, bias)
        self.v_proj = Linear(width, cfg.num_key_value_heads * cfg.head_dim, bias)
        self.o_proj = Linear(cfg.num_attention_heads * cfg.head_dim, width, bias=False)
        if cfg.qk_norm:
            self.q_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
            self.k_norm = RMSNorm(cfg.head_dim, cfg.rms_norm_eps)
        self.qk_norm, self.joined = cfg.qk_norm, None

    def forward(self, x):
        """q (…, H, d), k and v (…, K, d), not yet rotated."""
        joined = self.joined
        if torch.is_grad_enabled() and self.q_proj.weight.requires_grad and not learns(self.q_proj):
            joined = None  # its gradient would not reach the three
        parts = apply((self.q_proj, self.k_proj, self.v_proj), x, joined)
        q, k, v = (part.unflatten(-1, (-1, self.head_dim)) for part in parts)
        return (self.q_norm(q), self.k_norm(k), v) if self.qk_norm else (q, k, v)


class Layer(nn.Module):
    """x is (T, D), packed; `attend` rotates q and k and knows which tokens see which."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.input_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.self_attn = Attention(cfg)
        self.post_attention_layernorm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=False)

    def forward(self, x, attend, compute=call):
        """compute: how what lies before and after the attention is called; see run_layer."""
        x, *queries_keys_values = compute(self.before, x)
        return compute(self.after, x, attend(*queries_keys_values))

    def before(self, x):
        x, normed = self.input_layernorm.residual(x)
        return x, *self.self_attn(normed)

    def after(self, x, attended):
        attended = self.self_attn.o_proj(attended.flatten(-2))
        x, normed = self.post_attention_layernorm.residual(x, attended)
        return x + self.mlp(normed)


class TextModel(nn.Module):
    """Holds the names `model.*`; VLModel runs it."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.embed_tokens = Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList(Layer(cfg) for _ in range(cfg.num_hidden_layers))
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps)


class VLModel(nn.Module):
    recompute: Sequence[str] = ()
    """What of each layer the backward pass computes again, as run_layer takes it; (): nothing."""

    def __init__(self, cfg: ModelConfig):
        super().__init__()
        self.cfg = cfg
        self.visual = cfg.vision.tower()
        self.model = TextModel(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    @property
    def head_weight_VD(self) -> torch.Tensor:
        return (self.model.embed_tokens if self.cfg.tie_word_embeddings else self.lm_head).weight

    def encode(self, patches_PC, grids) -> torch.Tensor:
        """features_ND of images: `visual`, entered through the root, as FSDP2 asks
        (register_fsdp_forward_method)."""
        return self.visual(patches_PC, grids)

    def embed(self, ids, features_ND=None):
        """(token embeddings with the features in the places of the image tokens, in order; what is
        added there after each of the first layers, as run_layers takes it)."""
        x, is_image = self.model.embed_tokens(ids), ids == self.cfg.image_token_id
        if ids.device.type == "cpu":  # a GPU would be waited for: there, `pack` has compared them
            check_features(is_image, features_ND)
        if features_ND is None:
            return x, ()
        place, slices = is_image[..., None], features_ND.to(x.dtype).split(x.shape[-1], dim=-1)
        return x.masked_scatter(place, slices[0]), [(place, part) for part in slices[1:]]

    def hidden(
        self, ids_T, positions_3T, cu_seqlens, features_ND=None, keys: Keys | None = None
    ) -> torch.Tensor:
        """hidden_TD of sequences packed end to end, after the final norm; differentiable.

        cu_seqlens: int32 (number of sequences + 1), first 0, last T, on the CPU, so that no GPU is
        waited for. features_ND: from `visual`, all images in order. keys: what each segment sees
        where they share what they begin with.
        """
        x_TD, deep = self.embed(ids_T, features_ND)
        max_seqlen, cu_seqlens = int(cu_seqlens.diff().max()), cu_seqlens.to(x_TD.device)

        def attend(layer, q, k, v):
            return varlen_attention(q, k, v, cu_seqlens, max_seqlen, causal=True, keys=keys)

        cos_sin = mrope_cos_sin(positions_3T, mrope_tables(self.cfg, x_TD.device), x_TD.dtype)
        return self.run_layers(x_TD, cos_sin, attend, deep)

    forward = hidden  # what DDP and FSDP wrap

    def run_layers(self, x_TD, cos_sin, attend, deep: Sequence[tuple] = ()) -> torch.Tensor:
        """hidden_TD of embedded tokens, after the final norm. attend(layer, q, k, v): the attention
        of rotated queries and keys; generation keeps them in its cache there. deep: as `embed`
        gives it."""
        for index, layer in enumerate(self.model.layers):
            recompute = self.recompute[index] if self.recompute else "none"

            def rotated(q, k, v, index=index):
                return attend(index, *rotary(q, k, *cos_sin), v)

            x_TD = run_layer(layer, x_TD, rotated, recompute)
            if index < len(deep):
                x_TD = x_TD + torch.zeros_like(x_TD).masked_scatter(*deep[index])
        return self.model.norm(x_TD)

    @torch.no_grad()
    def init_weights(self, std: float = 0.02):
        """Random weights for training from scratch: normal matrices, zero biases, unit norms."""
        for name, weight in self.named_parameters():
            if name.endswith("bias"):
                weight.zero_()
            elif weight.ndim == 1:
                weight.fill_(1.0)
            else:
                weight.normal_(0.0, std)
        return self


def join_projections(model: VLModel) -> None:
    """Make one product of each layer's q, k and v, and of its gate and up: for generation, whose
    products are as quick as their weights are read."""
    for layer in model.model.layers:
        attention, mlp = layer.self_attn, layer.mlp
        if attention.joined is not None:
            return  # another sampler of the same model has done it
        attention.joined = join((attention.q_proj, attention.k_proj, attention.v_proj))
        mlp.joined = join((mlp.gate_proj, mlp.up_proj))
