"""What a model costs, from its config alone (weights and operations), and what cards can do.

An operation is a multiplication or an addition: the product of (M, K) and (K, N) has 2·M·K·N.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from nanosport.model import lora
from nanosport.model.decoder import ModelConfig, VLModel

CARDS = {
    "H100": (989e12, 3.35e12, 450e9),
    "H200": (989e12, 4.8e12, 450e9),
    "A100": (312e12, 2.0e12, 300e9),
    "H20": (148e12, 4.0e12, 450e9),
}
"""Each card's dense bf16 FLOP/s, memory bytes/s, and NVLink bytes/s each way."""


@lru_cache(maxsize=8)
def num_weights(cfg: ModelConfig) -> dict[str, int]:
    """How many weights each part has: embedding, decoder layers, head (0 where it is the
    embedding), vision."""
    with torch.device("meta"):
        model = VLModel(cfg)
    counts = dict.fromkeys(("embedding", "layers", "head", "vision"), 0)
    for name, weight in model.named_parameters():
        part = {"visual": "vision", "lm_head": "head"}.get(name.split(".")[0], "layers")
        counts["embedding" if "embed_tokens" in name else part] += weight.numel()
    return counts


@lru_cache(maxsize=8)
def num_adapted(cfg: ModelConfig, rank: int, targets: tuple[str, ...]) -> int:
    """How many weights the adapters of a --lora-rank have."""
    with torch.device("meta"):
        layers = [layer for _, layer in lora.linears(VLModel(cfg), targets)]
    return sum(rank * (layer.in_features + layer.out_features) for layer in layers)


def text_flops(cfg: ModelConfig, tokens: int, pairs: float) -> float:
    """Operations of the decoder's forward pass, without the head, over `tokens` tokens with `pairs`
    (query, key) pairs."""
    width = cfg.num_attention_heads * cfg.head_dim
    attention = 4.0 * pairs * width * cfg.num_hidden_layers
    return 2.0 * tokens * num_weights(cfg)["layers"] + attention


def causal_pairs(lengths: Sequence[int], prefix: int = 0) -> float:
    """How many (query, key) pairs sequences of `lengths` have, whose first `prefix` tokens are the
    same and computed once."""
    return prefix**2 / 2 + sum((length**2 - prefix**2) / 2 for length in lengths)


def head_flops(cfg: ModelConfig, rows: int) -> float:
    """Operations of one product with the head; a loss with its gradients takes three."""
    return 2.0 * rows * cfg.hidden_size * cfg.vocab_size


def vision_flops(cfg: ModelConfig, features: int) -> float:
    """Operations of the tower's forward pass over frames that become `features` tokens, as if every
    weight met every patch, and without its attention's pairs (a few per cent)."""
    return 2.0 * features * cfg.vision.merge_unit * num_weights(cfg)["vision"]


def decode_seconds(cfg: ModelConfig, cached: float, bytes_per_s: float, layer_s: float) -> float:
    """A decoding step in bfloat16: it reads the weights and the `cached` tokens of all rows, and
    launches each layer, which takes layer_s at least."""
    weights = num_weights(cfg)["layers"] + cfg.vocab_size * cfg.hidden_size
    keys = 2 * cached * cfg.num_hidden_layers * cfg.num_key_value_heads * cfg.head_dim
    return max(2 * (weights + keys) / bytes_per_s, layer_s * cfg.num_hidden_layers)
