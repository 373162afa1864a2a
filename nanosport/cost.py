"""What a model costs, from its config alone: weights and operations; what cards can do. Packing, planner and benchmarks count with these.

An operation is a multiplication or an addition: the matrix product of (M, K) and (K, N) has 2·M·K·N.
"""

from collections.abc import Sequence
from functools import lru_cache

import torch

from nanosport.model import ModelConfig, Qwen25VL

CARDS = {
    "H100": (989e12, 3.35e12, 450e9),
    "H200": (989e12, 4.8e12, 450e9),
    "A100": (312e12, 2.0e12, 300e9),
    "H20": (148e12, 4.0e12, 450e9),
}
"""Dense bf16 FLOP/s, memory bytes/s, NVLink bytes/s each way."""


@lru_cache(maxsize=8)
def num_weights(cfg: ModelConfig) -> dict[str, int]:
    """Weights by part: of the embedding, of all decoder layers, of the head (0 where it is the embedding), of the vision tower."""
    with torch.device("meta"):
        model = Qwen25VL(cfg)
    counts = dict.fromkeys(("embedding", "layers", "head", "vision"), 0)
    for name, weight in model.named_parameters():
        part = {"visual": "vision", "lm_head": "head"}.get(name.split(".")[0], "layers")
        counts["embedding" if "embed_tokens" in name else part] += weight.numel()
    return counts


def text_flops(cfg: ModelConfig, tokens: int, pairs: float) -> float:
    """Forward pass of the decoder over `tokens` tokens with `pairs` (query, key) pairs; without the head."""
    return 2.0 * tokens * num_weights(cfg)["layers"] + 4.0 * pairs * cfg.hidden_size * cfg.num_hidden_layers


def causal_pairs(lengths: Sequence[int], prefix: int = 0) -> float:
    """(query, key) pairs of sequences of `lengths`, whose first `prefix` tokens are the same and computed once."""
    return prefix**2 / 2 + sum((length**2 - prefix**2) / 2 for length in lengths)


def head_flops(cfg: ModelConfig, rows: int) -> float:
    """One matrix product with the head; a loss with its gradients takes three."""
    return 2.0 * rows * cfg.hidden_size * cfg.vocab_size


def vision_flops(cfg: ModelConfig, features: int) -> float:
    """Forward pass of the tower over frames that become `features` tokens, but for its attention's pairs (a few per cent)."""
    return 2.0 * features * cfg.vision.merge_unit * num_weights(cfg)["vision"]
