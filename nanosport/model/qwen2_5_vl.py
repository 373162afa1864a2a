"""Qwen2.5-VL: its config, and its vision tower.

Most of the tower's blocks attend inside windows (112 pixels a side), a few inside the whole frame.
So that a window is one contiguous segment, the squares of patches are sorted by window first and
put back at the end. Letters as in vision.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Annotated

import torch
from torch import nn

from nanosport.fields import AtLeast, only
from nanosport.model import decoder, vision
from nanosport.model.layers import MLP, Linear, RMSNorm, run_layer


@dataclass(frozen=True, kw_only=True)
class VisionConfig(vision.VisionConfig):
    hidden_act = "silu"
    window_size: Annotated[int, AtLeast(1)]
    """Pixels a side."""
    fullatt_block_indexes: Annotated[tuple[int, ...], AtLeast(0)]

    def tower(self) -> "Tower":
        return Tower(self)

    def shallow(self) -> "VisionConfig":
        return replace(self, depth=2, fullatt_block_indexes=(1,))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(decoder.ModelConfig):
    rope_default = 1e6, (16, 24, 24)
    qkv_bias, qk_norm, vision_type = True, False, VisionConfig

    @classmethod
    def check_settings(cls, text: dict, rope: dict, where) -> None:
        only(where, "use_sliding_window", text.get("use_sliding_window") or False, False)

    def size_rules(self) -> list[tuple]:
        v, heads = self.vision, self.hidden_size % self.num_attention_heads
        square = v.patch_size * v.spatial_merge_size
        window = f"vision_config: window_size: must be at least {square}"
        return [
            (heads, "num_attention_heads: must divide hidden_size"),
            *super().size_rules(),
            (v.window_size < square, window),
        ]

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_attention_heads

    def rotary_axes(self) -> torch.Tensor:
        """One run of frequencies for each position."""
        return torch.arange(3).repeat_interleave(torch.tensor(self.mrope_section))


class PatchMerger(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.ln_q = RMSNorm(cfg.hidden_size, eps=vision.EPS)
        wide = cfg.hidden_size * cfg.merge_unit
        self.mlp = nn.Sequential(Linear(wide, wide), nn.GELU(), Linear(wide, cfg.out_hidden_size))

    def forward(self, x_NuD):
        return self.mlp(self.ln_q(x_NuD).flatten(1))


@lru_cache(maxsize=256)  # frames of one video share their grid
def frame_layout(grid: tuple[int, int, int], cfg: VisionConfig):
    """(order_N, window_lengths) of one image: the features sorted by window, and the number of
    patches in each window."""
    (t, h, w), merge = grid, cfg.spatial_merge_size
    window = cfg.window_size // merge // cfg.patch_size
    axes = torch.arange(t), torch.arange(h // merge), torch.arange(w // merge)
    frame, row, col = torch.meshgrid(*axes, indexing="ij")
    # h and w: more than enough windows a side
    window_id_N = ((frame * h + row // window) * w + col // window).flatten()
    order_N = window_id_N.argsort(stable=True)  # stable: row-major inside a window
    window_lengths = window_id_N[order_N].unique_consecutive(return_counts=True)[1] * cfg.merge_unit
    return order_N, window_lengths.tolist()


def layout(grids: Sequence[tuple[int, int, int]], cfg: VisionConfig):
    """(order_N, window_lengths, places_P2) of images, one after the other."""
    order, window_lengths, places, num_before = [], [], [], 0
    for grid in grids:
        order_N, lengths = frame_layout(grid, cfg)
        order.append(order_N + num_before)
        window_lengths += lengths
        places.append(vision.patch_places(grid, cfg.spatial_merge_size))
        num_before += len(order_N)
    return torch.cat(order), window_lengths, torch.cat(places)


class Tower(nn.Module):
    recompute = "none"
    """What of each block the backward pass computes again, as run_layer takes it."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = vision.PatchEmbed(cfg, bias=False)
        self.blocks = nn.ModuleList(
            vision.VisionBlock(cfg, RMSNorm, MLP(cfg.hidden_size, cfg.intermediate_size, bias=True))
            for _ in range(cfg.depth)
        )
        self.merger = PatchMerger(cfg)

    def forward(
        self, patches_PC: torch.Tensor, grids: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """features_ND of all images, in their order.

        patches_PC: P = Σ t·h·w flattened patches, square by square as the processor cuts them.
        grids: one (t, h, w) an image, in patches. Raises ValueError where the two do not fit.
        """
        cfg, device = self.cfg, patches_PC.device
        grids = vision.checked_grids(patches_PC, grids, cfg)
        order_N, window_lengths, places_P2 = layout(grids, cfg)
        order_N = order_N.to(device)

        def by_window(x_PD):
            return x_PD.unflatten(0, (-1, cfg.merge_unit))[order_N].flatten(0, 1)

        cos, sin = vision.place_cos_sin(by_window(places_P2.to(device)), cfg)

        # full attention too stays inside a frame
        in_window = vision.attention_over(window_lengths, cos, sin)
        in_frame = vision.attention_over(vision.frame_lengths(grids), cos, sin)
        x_PD = by_window(self.patch_embed(patches_PC))
        for index, block in enumerate(self.blocks):
            attend = in_frame if index in cfg.fullatt_block_indexes else in_window
            x_PD = run_layer(block, x_PD, attend, self.recompute)
        return self.merger(x_PD.unflatten(0, (-1, cfg.merge_unit)))[order_N.argsort()]
