"""Frames → patches, as the published processor makes them: smart resize, bicubic, normalise, cut.

Shape letters: F frames, C channels (of patches: values), H height, W width, P patches.
"""

import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F

from nanosport.video import VideoError


@dataclass(frozen=True)
class ImageConfig:
    """What preprocessor_config.json says, the defaults being Qwen2.5-VL's."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 12845056
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, max_pixels: int | None = None) -> "ImageConfig":
        """From a model folder's preprocessor_config.json, in which newer models write `size` for the pixel bounds.

        max_pixels: another bound than the file's.
        """
        file = Path(path) / "preprocessor_config.json"
        try:
            raw = json.loads(file.read_text())
            size = raw.get("size") or {}
            config = cls(
                *(int(raw[key]) for key in ("patch_size", "temporal_patch_size", "merge_size")),
                int(raw["min_pixels"] if raw.get("min_pixels") is not None else size["shortest_edge"]),
                max_pixels or int(raw["max_pixels"] if raw.get("max_pixels") is not None else size["longest_edge"]),
                *(tuple(float(value) for value in raw[key]) for key in ("image_mean", "image_std")),
            )
        except OSError as error:
            raise ValueError(f"{file}: cannot be read ({error.strerror}); give the folder of a Qwen-VL model") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"{file}: not a Qwen-VL preprocessor config ({error!r}); download the model's file again") from error
        sizes = (config.patch_size, config.temporal_patch_size, config.merge_size, config.min_pixels)
        if (
            min(sizes) < 1
            or config.max_pixels < config.min_pixels
            or len(config.mean) != 3
            or len(config.std) != 3
            or min(config.std) <= 0
        ):
            raise ValueError(f"{file}: values out of range: {config}; download the model's file again")
        return config


def smart_resize(height: int, width: int, cfg: ImageConfig) -> tuple[int, int]:
    """(height, width) in multiples of a merged patch's side, within the pixel bounds: Qwen2-VL's published rule."""
    if max(height, width) > 200 * min(height, width):
        raise VideoError(f"frames of {width}x{height}: the sides' ratio must be at most 200; crop the video")
    factor = cfg.patch_size * cfg.merge_size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > cfg.max_pixels:
        beta = math.sqrt(height * width / cfg.max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < cfg.min_pixels:
        beta = math.sqrt(cfg.min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def preprocess(frames_FCHW: torch.Tensor, cfg: ImageConfig) -> tuple[torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """uint8 frames to (patches_PC float32, (1, h, w) each), bit for bit as Qwen2VLImageProcessor.

    Each frame is an image of its own, doubled in time. Patches by merge block; in a patch: channel, time, row, column.
    """
    assert frames_FCHW.dtype == torch.uint8 and frames_FCHW.ndim == 4 and frames_FCHW.shape[1] == 3, frames_FCHW.shape
    (f, c, *size), p, m = frames_FCHW.shape, cfg.patch_size, cfg.merge_size
    height, width = smart_resize(*size, cfg)
    h, w = height // p, width // p
    if f == 0:
        return torch.empty(0, c * cfg.temporal_patch_size * p * p, device=frames_FCHW.device), ()
    # In uint8, as published (a float resize differs by up to one level), hence on the CPU: the GPU has no such kernel.
    x = F.interpolate(frames_FCHW.cpu(), (height, width), mode="bicubic", antialias=True).to(frames_FCHW.device)
    mean, std = (torch.tensor(v, device=x.device).view(-1, 1, 1) * 255.0 for v in (cfg.mean, cfg.std))
    x = (x.float() - mean) / std
    x = x.view(f, c, h // m, m, p, w // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7)  # F, block row, column, row, column in it, C, p, p
    x = x.unsqueeze(6).expand(-1, -1, -1, -1, -1, -1, cfg.temporal_patch_size, -1, -1)
    return x.reshape(f * h * w, -1), ((1, h, w),) * f
