"""Qwen3-VL (dense): its config, and its vision tower.

The tower attends inside whole frames. A patch's place is told twice: by rotary angles, and by an
embedding that is interpolated between those of a square table. DeepStack: features are also taken
after some of the blocks, each for one of the decoder's first layers. Letters as in vision.py.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import isqrt
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from nanosport.fields import AtLeast, only
from nanosport.model import decoder, vision
from nanosport.model.layers import Embedding, LayerNorm, Linear, run_layer


@dataclass(frozen=True, kw_only=True)
class VisionConfig(vision.VisionConfig):
    hidden_act = "gelu_pytorch_tanh"
    num_position_embeddings: Annotated[int, AtLeast(1)]
    """Of a square table."""
    deepstack_visual_indexes: Annotated[tuple[int, ...], AtLeast(0)]
    """The blocks after which features are taken, besides those of the last."""

    @property
    def feature_size(self) -> int:
        return self.out_hidden_size * (1 + len(self.deepstack_visual_indexes))

    def tower(self) -> "Tower":
        return Tower(self)

    def shallow(self) -> "VisionConfig":
        blocks = range(len(self.deepstack_visual_indexes))
        return replace(self, depth=len(blocks) + 1, deepstack_visual_indexes=tuple(blocks))


@dataclass(frozen=True, kw_only=True)
class ModelConfig(decoder.ModelConfig):
    rope_default = 5e5, (24, 20, 20)
    qkv_bias, qk_norm, vision_type = False, True, VisionConfig
    head_dim: Annotated[int, AtLeast(2)]

    @classmethod
    def check_settings(cls, text: dict, rope: dict, where) -> None:
        only(where, "attention_bias", text.get("attention_bias") or False, False)
        only(where, "mrope_interleaved", rope.get("mrope_interleaved", True), True)

    def size_rules(self) -> list[tuple]:
        v, (_, high, wide), half = self.vision, self.mrope_section, self.head_dim // 2
        deep, places = v.deepstack_visual_indexes, v.num_position_embeddings
        unordered = list(deep) != sorted({k for k in deep if k < v.depth})
        rising = f"vision_config: deepstack_visual_indexes: must rise, and be below {v.depth}"
        too_deep = len(deep) > self.num_hidden_layers
        as_many = "vision_config: deepstack_visual_indexes: more than the decoder has layers"
        square = f"vision_config: num_position_embeddings {places}: must be a square"
        last = max(3 * high - 2, 3 * wide - 1)
        third = f"mrope_section {self.mrope_section}: height and width: must fit in every third"
        return [
            *super().size_rules(),
            (last >= half, f"{third} of {half} frequencies"),
            (unordered, rising),
            (too_deep, as_many),
            (isqrt(places) ** 2 != places, square),
        ]

    def rotary_axes(self) -> torch.Tensor:
        """Every third frequency follows height, every third width, as many as mrope_section says;
        the others follow time."""
        axes = torch.zeros(self.head_dim // 2, dtype=torch.long)
        for axis in (1, 2):
            axes[axis : 3 * self.mrope_section[axis] : 3] = axis
        return axes

    def published_name(self, name: str) -> str:
        for ours, published in (("visual.", "model.visual."), ("model.", "model.language_model.")):
            if name.startswith(ours):
                return published + name.removeprefix(ours)
        return name


class TwoLayers(nn.Module):
    """linear_fc2(gelu(linear_fc1(x))); approximate: of the gelu."""

    def __init__(self, width: int, inner: int, out: int, approximate: str):
        super().__init__()
        self.linear_fc1, self.linear_fc2 = Linear(width, inner), Linear(inner, out)
        self.approximate = approximate

    def forward(self, x):
        return self.linear_fc2(F.gelu(self.linear_fc1(x), approximate=self.approximate))


class PatchMerger(TwoLayers):
    """A square of patches → a slice of its feature."""

    def __init__(self, cfg: VisionConfig, norm_square: bool):
        """norm_square: the norm is of the whole square, not of each patch."""
        wide = cfg.hidden_size * cfg.merge_unit
        super().__init__(wide, wide, cfg.out_hidden_size, approximate="none")
        self.norm = LayerNorm(wide if norm_square else cfg.hidden_size, eps=vision.EPS)

    def forward(self, x_PD):
        normed = self.norm(x_PD.view(-1, *self.norm.normalized_shape))
        return super().forward(normed.view(-1, self.linear_fc1.in_features))


class Tower(nn.Module):
    recompute = "none"
    """What of each block the backward pass computes again, as run_layer takes it."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg, width = cfg, cfg.hidden_size
        self.patch_embed = vision.PatchEmbed(cfg, bias=True)
        self.pos_embed = Embedding(cfg.num_position_embeddings, width)
        self.blocks = nn.ModuleList(
            vision.VisionBlock(
                cfg, LayerNorm, TwoLayers(width, cfg.intermediate_size, width, "tanh")
            )
            for _ in range(cfg.depth)
        )
        self.merger = PatchMerger(cfg, norm_square=False)
        self.deepstack_merger_list = nn.ModuleList(
            PatchMerger(cfg, norm_square=True) for _ in cfg.deepstack_visual_indexes
        )

    def forward(
        self, patches_PC: torch.Tensor, grids: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """features_ND of all images, in their order: the last block's slice, then one for each of
        the decoder's first layers.

        patches_PC: P = Σ t·h·w flattened patches, square by square as the processor cuts them.
        grids: one (t, h, w) an image, in patches. Raises ValueError where the two do not fit.
        """
        cfg, device = self.cfg, patches_PC.device
        grids = vision.checked_grids(patches_PC, grids, cfg)
        places_P2 = torch.cat([vision.patch_places(grid, cfg.spatial_merge_size) for grid in grids])
        cos, sin = vision.place_cos_sin(places_P2.to(device), cfg)
        attend = vision.attention_over(vision.frame_lengths(grids), cos, sin)
        x_PD, deep = self.patch_embed(patches_PC), []
        # frames of one video share their grid: it is interpolated once
        embedded = {grid: self.interpolate(grid).to(x_PD.dtype) for grid in set(grids)}
        x_PD = x_PD + torch.cat([embedded[grid] for grid in grids])
        for index, block in enumerate(self.blocks):
            x_PD = run_layer(block, x_PD, attend, self.recompute)
            if index in cfg.deepstack_visual_indexes:
                deep.append(self.deepstack_merger_list[len(deep)](x_PD))
        return torch.cat([self.merger(x_PD), *deep], dim=-1)

    def interpolate(self, grid: tuple[int, int, int]) -> torch.Tensor:
        """(P, D) of an image: each patch's embedding, between the four of the table about it. The
        table's corners are the image's. The weights are in float32."""
        (_, *sides), last = grid, isqrt(self.cfg.num_position_embeddings) - 1
        spans = torch.tensor([max(1, side - 1) for side in sides])
        at_P2 = vision.patch_places(grid, self.cfg.spatial_merge_size).float() * last / spans
        low_P2 = at_P2.long()
        rest_P2, high_P2 = at_P2 - low_P2, (low_P2 + 1).clamp(max=last)
        rows = zip((low_P2[:, 0], high_P2[:, 0]), (1 - rest_P2[:, 0], rest_P2[:, 0]))
        cols = list(zip((low_P2[:, 1], high_P2[:, 1]), (1 - rest_P2[:, 1], rest_P2[:, 1])))
        corners = [(r * (last + 1) + c, a * b) for r, a in rows for c, b in cols]
        ids_P4, weights_P4 = (torch.stack(part, dim=1) for part in zip(*corners))
        device = self.pos_embed.weight.device
        return (self.pos_embed(ids_P4.to(device)) * weights_P4.to(device)[..., None]).sum(1)
