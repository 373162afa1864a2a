"""Frames → patches, as the published processor makes them (smart resize, bicubic, normalise, cut),
and frames → PNG or JPEG files.

Shape letters: F frames, C channels (of patches: values), H height, W width, P patches.
"""

import io
import json
import math
import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from nanosport.video import Video, VideoError


@dataclass(frozen=True)
class ImageConfig:
    """What preprocessor_config.json says; the defaults are Qwen2.5-VL's."""

    patch_size: int = 14
    temporal_patch_size: int = 2
    merge_size: int = 2
    min_pixels: int = 3136
    max_pixels: int = 12845056
    mean: tuple[float, ...] = (0.48145466, 0.4578275, 0.40821073)
    std: tuple[float, ...] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, max_pixels: int | None = None) -> "ImageConfig":
        """From a model folder's preprocessor_config.json; newer models write the pixel bounds as
        `size` there. max_pixels: another bound than the file's."""
        file = Path(path) / "preprocessor_config.json"
        try:
            raw = json.loads(file.read_text())
            config = cls._from_dict(raw, max_pixels)
        except OSError as error:
            why = f"cannot be read ({error.strerror})"
            raise ValueError(f"{file}: {why}; give the folder of a Qwen-VL model") from error
        except (ValueError, TypeError, KeyError, AttributeError) as error:
            why = f"not a Qwen-VL preprocessor config ({error!r})"
            raise ValueError(f"{file}: {why}; download the model's file again") from error
        if max_pixels is not None and max_pixels < config.min_pixels:
            rule = f"must be at least {config.min_pixels}, the model's min_pixels"
            raise ValueError(f"--max-pixels {max_pixels}: {rule}")
        sides = config.patch_size, config.temporal_patch_size, config.merge_size
        bounds = 1 <= config.min_pixels <= config.max_pixels
        colours = len(config.mean) == len(config.std) == 3 and min(config.std) > 0
        if min(sides) < 1 or not bounds or not colours:
            why = f"values out of range: {config}"
            raise ValueError(f"{file}: {why}; download the model's file again")
        return config

    @classmethod
    def _from_dict(cls, raw: dict, max_pixels: int | None) -> "ImageConfig":
        size = raw.get("size") or {}

        def bound(name: str, name_in_size: str) -> int:
            return int(size[name_in_size] if raw.get(name) is None else raw[name])

        return cls(
            **{n: int(raw[n]) for n in ("patch_size", "temporal_patch_size", "merge_size")},
            min_pixels=bound("min_pixels", "shortest_edge"),
            max_pixels=max_pixels or bound("max_pixels", "longest_edge"),
            mean=tuple(map(float, raw["image_mean"])),
            std=tuple(map(float, raw["image_std"])),
        )


MAX_RATIO = 200
"""Qwen2-VL's rule: a frame's long side is at most so many times the short one."""


def check_shape(video: Video, cfg: ImageConfig) -> None:
    """Raise VideoError where the frames' shape cannot become patches: the doctor and every run ask
    here."""
    try:
        smart_resize(video.height, video.width, cfg)
    except VideoError as error:
        raise VideoError(f"{video.path}: {error}") from None


def smart_resize(height: int, width: int, cfg: ImageConfig) -> tuple[int, int]:
    """(height, width) in multiples of a merged patch's side, within the pixel bounds: Qwen2-VL's
    published rule."""
    if max(height, width) > MAX_RATIO * min(height, width):
        rule = f"the sides' ratio must be at most {MAX_RATIO}; crop the video"
        raise VideoError(f"frames of {width}x{height}: {rule}")
    factor = cfg.patch_size * cfg.merge_size
    h, w = round(height / factor) * factor, round(width / factor) * factor
    if h * w > cfg.max_pixels:
        beta = math.sqrt(height * width / cfg.max_pixels)
        h, w = (max(factor, math.floor(side / beta / factor) * factor) for side in (height, width))
    elif h * w < cfg.min_pixels:
        beta = math.sqrt(cfg.min_pixels / (height * width))
        h, w = (math.ceil(side * beta / factor) * factor for side in (height, width))
    return h, w


def preprocess(
    frames_FCHW: torch.Tensor, cfg: ImageConfig
) -> tuple[torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """uint8 frames to (patches_PC float32, (1, h, w) each), bit for bit as Qwen2VLImageProcessor.

    Each frame is an image of its own, doubled in time. Patches come by merge block; in a patch the
    order is channel, time, row, column.
    """
    shape, device = frames_FCHW.shape, frames_FCHW.device
    assert frames_FCHW.dtype == torch.uint8 and len(shape) == 4 and shape[1] == 3, shape
    (f, c, *size), p, m = shape, cfg.patch_size, cfg.merge_size
    height, width = smart_resize(*size, cfg)
    h, w = height // p, width // p
    if f == 0:
        return torch.empty(0, c * cfg.temporal_patch_size * p * p, device=device), ()

    # In uint8, as published (a float resize differs by up to one level), hence on the CPU: the GPU
    # has no such kernel.
    x = F.interpolate(frames_FCHW.cpu(), (height, width), mode="bicubic", antialias=True)
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255.0 for v in (cfg.mean, cfg.std))
    x = (x.to(device).float() - mean) / std

    # F, block row, block column, row and column in the block, C, time, p, p
    x = x.view(f, c, h // m, m, p, w // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    x = x.expand(-1, -1, -1, -1, -1, -1, cfg.temporal_patch_size, -1, -1)
    return x.reshape(f * h * w, -1), ((1, h, w),) * f


def encode_png(picture_HWC: np.ndarray) -> bytes:
    """A uint8 RGB picture as the bytes of a PNG file."""
    return _encode(picture_HWC, "image2pipe", "png", "rgb24", {})


def encode_jpeg(frame_CHW: torch.Tensor) -> bytes:
    """A uint8 RGB frame as the bytes of a JPEG file of high quality."""
    options = {"qmin": "2", "qmax": "2", "threads": "1"}
    picture_HWC = frame_CHW.permute(1, 2, 0).numpy()
    return _encode(picture_HWC, "mjpeg", "mjpeg", "yuvj444p", options)


def _encode(picture_HWC: np.ndarray, container: str, codec: str, pixels: str, options) -> bytes:
    import av  # not before it is needed: a benchmark's machine may have none

    frame = av.VideoFrame.from_ndarray(np.ascontiguousarray(picture_HWC), format="rgb24")
    buffer = io.BytesIO()
    with av.open(buffer, "w", format=container) as file:
        stream = file.add_stream(codec, rate=1, options=options)
        stream.width, stream.height, stream.pix_fmt = frame.width, frame.height, pixels
        file.mux([*stream.encode(frame), *stream.encode()])
    return buffer.getvalue()
