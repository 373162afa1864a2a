"""Frames → patches, as the published processor makes them (smart resize, bicubic, normalise, cut),
and frames → PNG or JPEG files.

Shape letters: F frames, C channels (of patches: values), H height, W width, P patches.
"""

import io
import math
import os
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import torch.nn.functional as F

from nanosport.fields import Above, AtLeast, AtMost, build, only, read_json, section
from nanosport.video import Video, VideoError

RGB = tuple[float, float, float]
DIGITS = {  # 4 × 6 pixels, one hexadecimal digit a row
    "0": "699996", "1": "262227", "2": "69124F", "3": "E1611E", "4": "99F111",
    "5": "F8E11E", "6": "68E996", "7": "F12444", "8": "696996", "9": "69971E",
}  # fmt: skip
MAX_SIDE = 64
"""Of a patch, and of a square of them: a frame is enlarged to their product at least."""


@dataclass(frozen=True)
class ImageConfig:
    """What a model folder says of its image processor; the defaults are Qwen2.5-VL's."""

    patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 14
    temporal_patch_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    merge_size: Annotated[int, AtLeast(1), AtMost(MAX_SIDE)] = 2
    min_pixels: Annotated[int, AtLeast(1), AtMost(2**24)] = 3136
    max_pixels: Annotated[int, AtLeast(1)] = 12845056
    image_mean: RGB = (0.48145466, 0.4578275, 0.40821073)
    image_std: Annotated[RGB, Above(0)] = (0.26862954, 0.26130258, 0.27577711)

    @classmethod
    def from_folder(cls, path: str | os.PathLike, max_pixels: int | None = None) -> "ImageConfig":
        """From a model folder; newer models write the pixel bounds as `size`. max_pixels: another
        bound than the folder's."""
        file, raw = image_settings(Path(path))
        for name in ("do_resize", "do_rescale", "do_normalize"):
            only(file, name, raw.get(name, True), True)
        only(file, "resample", raw.get("resample", 3), 3)  # bicubic
        size = section(raw, "size", file)
        bounds = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}
        values = {new: size[old] for new, old in bounds.items() if size.get(old) is not None}
        names = [field.name for field in fields(cls)]
        values |= {name: raw[name] for name in names if raw.get(name) is not None}
        if "max_pixels" not in values:  # published models differ, and so do programs' defaults
            raise ValueError(f"{file}: max_pixels is missing, and longest_edge of size with it")
        config = build(cls, values | ({"max_pixels": max_pixels} if max_pixels else {}), file)
        if config.min_pixels > config.max_pixels:
            where = "--max-pixels" if max_pixels else f"{file}: max_pixels"
            why = f"must be at least {config.min_pixels}, the model's min_pixels"
            raise ValueError(f"{where} {config.max_pixels}: {why}")
        return config


def image_settings(folder: Path) -> tuple[Path, dict]:
    """(file, settings in it) of a model folder's image processor, in transformers' order: what
    processor_config.json has under `image_processor`, else preprocessor_config.json."""
    nested, file = folder / "processor_config.json", folder / "preprocessor_config.json"
    if nested.is_file() and (settings := section(read_json(nested), "image_processor", nested)):
        return nested, settings
    if not file.is_file():
        why = "cannot be read: it is missing, and processor_config.json has no image_processor"
        raise ValueError(f"{file}: {why}; give the folder of a Qwen-VL model")
    return file, read_json(file)


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
    """uint8 frames to (patches_PC float32, (1, h, w) each): Qwen2VLImageProcessor, bit for bit."""
    return cut(resize(frames_FCHW, cfg).to(frames_FCHW.device), cfg)


def resize(frames_FCHW: torch.Tensor, cfg: ImageConfig) -> torch.Tensor:
    """uint8 frames in the size that the model sees, still bytes, on the CPU."""
    shape = frames_FCHW.shape
    assert frames_FCHW.dtype == torch.uint8 and len(shape) == 4 and shape[1] == 3, shape
    size = smart_resize(*shape[2:], cfg)
    if shape[0] == 0:
        return frames_FCHW.new_empty(0, 3, *size)
    # In uint8, as published (a float resize differs by up to one level), hence on the CPU: the GPU
    # has no such kernel.
    return F.interpolate(frames_FCHW.cpu(), size, mode="bicubic", antialias=True)


def cut(
    frames_FCHW: torch.Tensor, cfg: ImageConfig
) -> tuple[torch.Tensor, tuple[tuple[int, int, int], ...]]:
    """Resized frames, wherever they are, to normalized (patches_PC float32, (1, h, w) each).

    Each frame is an image of its own, doubled in time. Patches come by merge block; in a patch the
    order is channel, time, row, column.
    """
    (f, c, height, width), p, m = frames_FCHW.shape, cfg.patch_size, cfg.merge_size
    h, w, device = height // p, width // p, frames_FCHW.device
    norm = cfg.image_mean, cfg.image_std
    mean, std = (torch.tensor(v, device=device).view(-1, 1, 1) * 255.0 for v in norm)
    x = (frames_FCHW.float() - mean) / std

    # F, block row, block column, row and column in the block, C, time, p, p
    x = x.view(f, c, h // m, m, p, w // m, m, p).permute(0, 2, 5, 3, 6, 1, 4, 7).unsqueeze(6)
    x = x.expand(-1, -1, -1, -1, -1, -1, cfg.temporal_patch_size, -1, -1)
    return x.reshape(f * h * w, c * cfg.temporal_patch_size * p * p), ((1, h, w),) * f


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
