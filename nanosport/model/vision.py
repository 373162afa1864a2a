"""Qwen2.5-VL's vision tower: patches of any number of frames → features that the language model
reads as tokens.

Every merge×merge square of patches becomes one feature. Most blocks attend inside windows (112
pixels a side), a few inside the whole frame. So that a window is one contiguous segment, the
squares are sorted by window first and put back at the end.

Letters: P patches, N features (P / merge²), u patches a feature (merge²), C patch width (channels ·
temporal patch · patch²), D hidden, H heads, d head width.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import nn

from kernels.attention import varlen_attention
from kernels.elementwise import rotary
from nanosport.fields import Above, AtLeast, AtMost, build, only, section
from nanosport.image import MAX_SIDE
from nanosport.model.layers import (
    MLP,
    Linear,
    RMSNorm,
    call,
    inverse_frequencies,
    run_layer,
)

MAX_LAYERS = 1000
"""Published models have 130 at most; a million take minutes to build, before a weight is read."""


@dataclass(frozen=True)
class VisionConfig:
    depth: Annotated[int, AtLeast(1), AtMost(MAX_LAYERS)]
    hidden_size: Annotated[int, AtLeast(1), AtMost(2**20)]
    intermediate_size: Annotated[int, AtLeast(1)]
    num_heads: Annotated[int, AtLeast(1)]
    out_hidden_size: Annotated[int, AtLeast(1), AtMost(2**20)]
    """Width of the language model."""
    patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)]
    """Pixels a side."""
    window_size: Annotated[int, AtLeast(1)]
    """Pixels a side."""
    fullatt_block_indexes: Annotated[tuple[int, ...], AtLeast(0)]
    in_channels: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 3
    temporal_patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    spatial_merge_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    rope_theta: Annotated[float, Above(0)] = 10000.0

    @classmethod
    def from_dict(cls, raw: dict, where="config.json") -> "VisionConfig":
        """From config.json's `vision_config`, published (`in_chans`) or of transformers 5
        (`in_channels`). Raises ValueError for the first field that is wrong."""
        where = f"{where}: vision_config"
        rope = section(raw, "rope_parameters", where)
        only(where, "hidden_act", raw.get("hidden_act", "silu"), "silu")
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
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.norm1 = RMSNorm(cfg.hidden_size, eps=1e-6)
        self.attn = VisionAttention(cfg)
        self.norm2 = RMSNorm(cfg.hidden_size, eps=1e-6)
        self.mlp = MLP(cfg.hidden_size, cfg.intermediate_size, bias=True)

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
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        kernel = (cfg.temporal_patch_size, cfg.patch_size, cfg.patch_size)
        self.proj = nn.Conv3d(cfg.in_channels, cfg.hidden_size, kernel, stride=kernel, bias=False)

    def forward(self, patches_PC):
        weight_DC = self.proj.weight.flatten(1)  # the convolution never overlaps: it is a Linear
        return F.linear(patches_PC.to(weight_DC.dtype), weight_DC)


class PatchMerger(nn.Module):
    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.ln_q = RMSNorm(cfg.hidden_size, eps=1e-6)
        wide = cfg.hidden_size * cfg.merge_unit
        self.mlp = nn.Sequential(Linear(wide, wide), nn.GELU(), Linear(wide, cfg.out_hidden_size))

    def forward(self, x_NuD):
        return self.mlp(self.ln_q(x_NuD).flatten(1))


@lru_cache(maxsize=256)  # frames of one video share their grid
def frame_layout(grid: tuple[int, int, int], cfg: VisionConfig):
    """(order_N, window_lengths, coordinates_P2) of one image.

    They are the features sorted by window, the number of patches in each window, and the row and
    column of each patch.
    """
    (t, h, w), merge = grid, cfg.spatial_merge_size
    window = cfg.window_size // merge // cfg.patch_size
    axes = torch.arange(t), torch.arange(h // merge), torch.arange(w // merge)
    frame, row, col = torch.meshgrid(*axes, indexing="ij")
    # h and w: more than enough windows a side
    window_id_N = ((frame * h + row // window) * w + col // window).flatten()
    order_N = window_id_N.argsort(stable=True)  # stable: row-major inside a window
    window_lengths = window_id_N[order_N].unique_consecutive(return_counts=True)[1] * cfg.merge_unit

    # patches come square by square: a feature's patches are neighbours in memory
    coordinates = torch.cartesian_prod(torch.arange(h), torch.arange(w))
    coordinates = coordinates.view(h // merge, merge, w // merge, merge, 2).transpose(1, 2)
    return order_N, window_lengths.tolist(), coordinates.reshape(-1, 2).repeat(t, 1)


def layout(grids: Sequence[tuple[int, int, int]], cfg: VisionConfig):
    """(order_N, window_lengths, coordinates_P2) of images, one after the other."""
    order, window_lengths, coordinates, num_before = [], [], [], 0
    for grid in grids:
        order_N, lengths, coordinates_P2 = frame_layout(grid, cfg)
        order.append(order_N + num_before)
        window_lengths += lengths
        coordinates.append(coordinates_P2)
        num_before += len(order_N)
    return torch.cat(order), window_lengths, torch.cat(coordinates)


def attention_over(lengths: Sequence[int], cos, sin):
    """The attention of a block, inside segments of these lengths."""
    cu_seqlens = torch.tensor([0, *lengths]).cumsum(0).to(cos.device, torch.int32)

    # rotated in float32; in a closure, where no mixed-precision wrapper of the blocks can round cos
    # and sin
    def attend(q, k, v):
        q, k = rotary(q, k, cos, sin)
        return varlen_attention(q, k, v, cu_seqlens, max(lengths), causal=False)

    return attend


class VisionTower(nn.Module):
    recompute = "none"
    """What of each block the backward pass computes again, as run_layer takes it."""

    def __init__(self, cfg: VisionConfig):
        super().__init__()
        self.cfg = cfg
        self.patch_embed = PatchEmbed(cfg)
        self.blocks = nn.ModuleList(VisionBlock(cfg) for _ in range(cfg.depth))
        self.merger = PatchMerger(cfg)

    def forward(
        self, patches_PC: torch.Tensor, grids: Sequence[tuple[int, int, int]]
    ) -> torch.Tensor:
        """features_ND of all images, in their order.

        patches_PC: P = Σ t·h·w flattened patches, square by square as the processor cuts them.
        grids: one (t, h, w) an image, in patches. Raises ValueError where the two do not fit.
        """
        cfg, device = self.cfg, patches_PC.device
        grids = [tuple(int(n) for n in grid) for grid in grids]
        check_patches(patches_PC, grids, cfg)
        order_N, window_lengths, coordinates_P2 = layout(grids, cfg)
        order_N = order_N.to(device)

        def by_window(x_PD):
            return x_PD.unflatten(0, (-1, cfg.merge_unit))[order_N].flatten(0, 1)

        # rotary angles: half of the channels turn with the row, half with the column
        inv_freq = inverse_frequencies(cfg.rope_theta, cfg.head_dim // 2, device)
        places_P2 = by_window(coordinates_P2.to(device)).float()
        angles_Pd = (places_P2[..., None] * inv_freq).flatten(1).repeat(1, 2)
        cos, sin = angles_Pd.cos()[:, None], angles_Pd.sin()[:, None]

        # full attention too stays inside a frame
        in_window = attention_over(window_lengths, cos, sin)
        in_frame = attention_over([h * w for t, h, w in grids for _ in range(t)], cos, sin)
        x_PD = by_window(self.patch_embed(patches_PC))
        for index, block in enumerate(self.blocks):
            attend = in_frame if index in cfg.fullatt_block_indexes else in_window
            x_PD = run_layer(block, x_PD, attend, self.recompute)
        return self.merger(x_PD.unflatten(0, (-1, cfg.merge_unit)))[order_N.argsort()]


def check_patches(patches_PC, grids, cfg: VisionConfig) -> None:
    """Raise ValueError where patches and grids do not fit each other or the tower."""
    num_patches, merge = sum(t * h * w for t, h, w in grids), cfg.spatial_merge_size
    if not grids or patches_PC.shape != (num_patches, cfg.patch_width):
        given, wanted = tuple(patches_PC.shape), (num_patches, cfg.patch_width)
        raise ValueError(f"patches of shape {given}: {len(grids)} grids ask for {wanted}")
    for grid in grids:
        if min(grid) < 1 or grid[1] % merge or grid[2] % merge:
            rule = f"height and width must be multiples of {merge} patches"
            raise ValueError(f"grid {grid}: {rule}")
