"""What the families' vision towers share: patches of any number of frames → features that the
language model reads as tokens.

Every merge×merge square of patches becomes one feature.

Letters: P patches, N features (P / merge²), u patches a feature (merge²), C patch width (channels ·
temporal patch · patch²), D hidden, H heads, d head width.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import lru_cache
from operator import call
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import varlen_attention
from kernels.elementwise import rotary
from nanosport.fields import Above, AtLeast, AtMost, build, only, section
from nanosport.image import MAX_SIDE
from nanosport.model.layers import Linear, inverse_frequencies

MAX_LAYERS = 1000
"""Published models have 130 at most; a million take minutes to build, before a weight is read."""
EPS = 1e-6
"""Of every norm of a tower."""


@dataclass(frozen=True, kw_only=True)
class VisionConfig:
    """What every tower has; a family's own config extends it."""

    hidden_act: ClassVar[str]
    """The one activation that the family's blocks have."""

    depth: Annotated[int, AtLeast(1), AtMost(MAX_LAYERS)]
    hidden_size: Annotated[int, AtLeast(1), AtMost(2**20)]
    intermediate_size: Annotated[int, AtLeast(1)]
    num_heads: Annotated[int, AtLeast(1)]
    out_hidden_size: Annotated[int, AtLeast(1), AtMost(2**20)]
    """Width of the language model."""
    patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)]
    """Pixels a side."""
    in_channels: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 3
    temporal_patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    spatial_merge_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    rope_theta: Annotated[float, Above(0)] = 10000.0

    @classmethod
    def from_dict(cls, raw: dict, where) -> "VisionConfig":
        """From config.json's `vision_config`, published (`in_chans`) or of transformers 5
        (`in_channels`). Raises ValueError for the first field that is wrong, after `where`."""
        where = f"{where}: vision_config"
        only(where, "hidden_act", raw.get("hidden_act", cls.hidden_act), cls.hidden_act)
        rope = section(raw, "rope_parameters", where)
        values = {"in_channels": raw.get("in_chans", 3)} | raw
        return build(cls, values | {"rope_theta": rope.get("rope_theta", cls.rope_theta)}, where)

    @property
    def head_dim(self) -> int:
        return self.hidden_size // self.num_heads

    @property
    def patch_width(self) -> int:
        return self.in_channels * self.temporal_patch_size * self.patch_size**2

    @property
    def merge_unit(self) -> int:
        """Patches that become one feature."""
        return self.spatial_merge_size**2

    @property
    def feature_size(self) -> int:
        """Width of a feature: one slice or several, each as wide as the language model."""
        return self.out_hidden_size

    def tower(self) -> nn.Module:
        """A tower with random weights."""
        raise NotImplementedError

    def shallow(self) -> "VisionConfig":
        """A tower of as few blocks as need the memory, besides their weights, of all: one block's
        room is the next one's."""
        raise NotImplementedError


class VisionAttention(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.num_heads = cfg.num_heads
        self.qkv = Linear(cfg.hidden_size, 3 * cfg.hidden_size)
        self.proj = Linear(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x_PD):
        """q, k and v, each (P, H, d)."""
        return self.qkv(x_PD).unflatten(-1, (3, self.num_heads, -1)).unbind(-3)


class VisionBlock(nn.Module):
    def __init__(self, cfg: VisionConfig, norm: Callable[..., nn.Module], mlp: nn.Module):
        """norm(width, eps): makes a norm, with `residual` as in RMSNorm."""
        super().__init__()
        self.norm1 = norm(cfg.hidden_size, eps=EPS)
        self.attn = VisionAttention(cfg)
        self.norm2 = norm(cfg.hidden_size, eps=EPS)
        self.mlp = mlp

    def forward(self, x_PD, attend, compute=call):
        x_PD, *queries_keys_values = compute(self.before, x_PD)
        return compute(self.after, x_PD, attend(*queries_keys_values))

    def before(self, x_PD):
        x_PD, normed_PD = self.norm1.residual(x_PD)
        return x_PD, *self.attn(normed_PD)

    def after(self, x_PD, attended):
        x_PD, normed_PD = self.norm2.residual(x_PD, self.attn.proj(attended.flatten(-2)))
        return x_PD + self.mlp(normed_PD)


class PatchEmbed(nn.Module):
    def __init__(self, cfg: VisionConfig, bias: bool):
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, kernel, stride=kernel, bias=bias)

    def forward(self, patches_PC):
        weight_DC = self.proj.weight.flatten(1)  # the convolution never overlaps: it is a Linear
        return F.linear(patches_PC.to(weight_DC.dtype), weight_DC, self.proj.bias)


@lru_cache(maxsize=256)  # frames of one video share their grid
def patch_places(grid: tuple[int, int, int], merge: int) -> torch.Tensor:
    """places_P2: row and column of each patch of an image."""
    t, h, w = grid
    # patches come square by square: a feature's patches are neighbours in memory
    places = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    places = places.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
    return places.reshape(-1, 2).repeat(t, 1)


def place_cos_sin(places_P2: torch.Tensor, cfg: VisionConfig) -> tuple[torch.Tensor, torch.Tensor]:
    """cos and sin, (P, 1, d): half of the channels turn with the row, half with the column."""
    inv_freq = inverse_frequencies(cfg.rope_theta, cfg.head_dim // 2, places_P2.device)
    angles_Pd = (places_P2.float()[..., None] * inv_freq).flatten(1).repeat(1, 2)
    return angles_Pd.cos()[:, None], angles_Pd.sin()[:, None]


def attention_over(lengths: Sequence[int], cos, sin):
    """The attention of a block, inside segments of these lengths."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(cos.device, torch.int32)

    # rotated in float32; in a closure, where no mixed-precision wrapper of the blocks can round cos
    # and sin
    def attend(q, k, v):
        q, k = rotary(q, k, cos, sin)
        return varlen_attention(q, k, v, cu_seqlens, max(lengths), causal=False)

    return attend


def frame_lengths(grids) -> list[int]:
    """How many patches each frame has: the segments of an attention that stays inside a frame."""
    return [h * w for t, h, w in grids for _ in range(t)]


def checked_grids(patches_PC, grids, cfg: VisionConfig) -> list[tuple[int, int, int]]:
    """The grids as whole numbers. Raises ValueError where patches and grids do not fit each other
    or the tower."""
    grids = [tuple(int(n) for n in grid) for grid in grids]
    num_patches, merge = sum(t * h * w for t, h, w in grids), cfg.spatial_merge_size
    if not grids or patches_PC.shape != (num_patches, cfg.patch_width):
        given, wanted = tuple(patches_PC.shape), (num_patches, cfg.patch_width)
        raise ValueError(f"patches of shape {given}: {len(grids)} grids ask for {wanted}")
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            rule = f"height and width must be multiples of {merge} patches"
            raise ValueError(f"grid {grid}: {rule}")
    return grids
