"""What each layer keeps for the backward pass, and what it computes again, by the memory there is.

Per token and layer, in bytes of a two-byte dtype, for the 7B (D 3584, H·d 3584, K·d 512, inner I
18,944; S/T keys a token, 1 where no prefix is shared):

    all     D                          7 KiB   the whole layer is computed again
    mlp     D + 2·H·d + 2·K·d·S/T      23 KiB  all but the attention, which costs most for what it
                                               keeps, and q, k and v before it
    none    as mlp + 3·D + 3·I         155 KiB nothing is computed again
"""

from dataclasses import dataclass

import torch

from kernels.attention import torch_groups_heads
from nanosport.model.cost import num_weights
from nanosport.model.decoder import ModelConfig

LESS = ("all", "mlp", "none")
"""Each computes less again than the one before, and keeps more."""


@dataclass(frozen=True)
class Kept:
    """What a GPU keeps of a micro-batch, in bytes."""

    cfg: ModelConfig
    num_tokens: int
    dtype: torch.dtype = torch.bfloat16
    attention: str = ""
    """Its name, as attention_of gives it."""
    num_keys: int | None = None
    """The keys that all segments see, where some are shared; None: one for each token."""

    def layer(self, mode: str) -> int:
        """Of one layer."""
        cfg, size = self.cfg, self.dtype.itemsize
        repeats = self.attention.endswith("of torch") and not torch_groups_heads()
        key_heads = cfg.num_attention_heads if repeats else cfg.num_key_value_heads
        keys = 2 * key_heads * cfg.head_dim * size * (self.num_keys or self.num_tokens)
        heads = (2 * cfg.head_dim * size + 4) * cfg.num_attention_heads  # log-sums in float32
        token = cfg.hidden_size * size
        if mode != "all":
            token += heads
        if mode == "none":
            quotients = 8  # of two norms, in float32
            token += 3 * (cfg.hidden_size + cfg.intermediate_size) * size + quotients
            if cfg.qk_norm:  # queries and keys before their norms, and their quotients
                normed = cfg.num_attention_heads + cfg.num_key_value_heads
                token += normed * (cfg.head_dim * size + 4)
        return token * self.num_tokens + (mode != "all") * keys

    def layers(self, modes: list[str]) -> int:
        return sum(self.layer(mode) for mode in modes)


def choose(kept: Kept, room: float) -> list[str]:
    """What each layer computes again where the layers may keep `room` bytes. The last layers keep
    most: what they keep is freed first."""
    modes = ["all"] * kept.cfg.num_hidden_layers
    room -= kept.layers(modes)
    for before, mode in zip(LESS, LESS[1:]):
        cost = kept.layer(mode) - kept.layer(before)
        count = int(max(0, min(len(modes), room / cost)))
        modes[len(modes) - count :] = [mode] * count
        room -= count * cost
    return modes


def reserve(kept: Kept) -> float:
    """Bytes that a backward pass needs beside what was kept: a layer computed again with its
    gradients, the weights and gradients of two layers where they are gathered, the loss's logits
    and the head's gradient; and what an allocator cannot fill."""
    cfg = kept.cfg
    gathered = 2 * (kept.dtype.itemsize + 4) * num_weights(cfg)["layers"] / cfg.num_hidden_layers
    head = 8 * cfg.vocab_size * cfg.hidden_size
    return 2 * kept.layer("none") + gathered + head + (5 << 30)
