"""What each layer keeps for the backward pass, and what it computes again, by the memory there is.

Per token and layer, in bytes of a two-byte dtype, for the 7B (D 3584, H·d 3584, K·d 512, inner I
18,944):

    all     D                          7 KiB   the whole layer is computed again
    mlp     D + 2·H·d + 2·K·d          23 KiB  all but the attention, which costs most for what it
                                               keeps, and q, k and v before it
    none    4·D + 2·H·d + 2·K·d + 3·I  155 KiB nothing is computed again
"""

import torch

from nanosport.model.cost import num_weights
from nanosport.model.qwen2_5_vl import ModelConfig

LESS = ("all", "mlp", "none")
"""Each computes less again than the one before, and keeps more."""


def kept_values(cfg: ModelConfig) -> dict[str, int]:
    """How many values of two bytes a layer keeps of each token on a GPU."""
    width, heads = cfg.hidden_size, cfg.num_attention_heads * cfg.head_dim
    log_sums = 2 * cfg.num_attention_heads  # in float32
    attention = 2 * heads + 2 * cfg.num_key_value_heads * cfg.head_dim + log_sums
    quotients = 4  # of two norms, in float32
    none = 4 * width + attention + 3 * cfg.intermediate_size + quotients
    return {"all": width, "mlp": width + attention, "none": none}


def choose(cfg: ModelConfig, num_tokens: int, room: float, value_bytes: int = 2) -> list[str]:
    """What each layer computes again where the layers may keep `room` bytes of a micro-batch. The
    last layers keep most: what they keep is freed first."""
    kept, modes = kept_values(cfg), ["all"] * cfg.num_hidden_layers
    room -= kept_bytes(cfg, modes, num_tokens, value_bytes)
    for before, mode in zip(LESS, LESS[1:]):
        cost = (kept[mode] - kept[before]) * num_tokens * value_bytes
        count = int(max(0, min(len(modes), room / cost)))
        modes[len(modes) - count :] = [mode] * count
        room -= count * cost
    return modes


def kept_bytes(cfg: ModelConfig, modes: list[str], num_tokens: int, value_bytes: int = 2) -> int:
    """What the layers keep of a micro-batch, at most."""
    kept = kept_values(cfg)
    return sum(kept[mode] for mode in modes) * num_tokens * value_bytes


def reserve(cfg: ModelConfig, num_tokens: int, value_bytes: int = 2) -> float:
    """Bytes that a backward pass needs beside what was kept: a layer computed again with its
    gradients, the weights and gradients of two layers where they are gathered, the loss's logits
    and the head's gradient."""
    layer = 2 * kept_values(cfg)["none"] * num_tokens * value_bytes
    gathered = 2 * (value_bytes + 4) * num_weights(cfg)["layers"] / cfg.num_hidden_layers
    return layer + gathered + 8 * cfg.vocab_size * cfg.hidden_size + (4 << 30)


def free_bytes(device: torch.device) -> float:
    """What the allocator can still give on a GPU."""
    free, _ = torch.cuda.mem_get_info(device)
    return free + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
