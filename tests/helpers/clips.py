"""Clips whose frames all differ, for tests of whatever reads a video."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np


def image(height: int, width: int, n: int = 0) -> np.ndarray:
    y, x = np.mgrid[:height, :width]
    return np.stack(
        [(x * 3 + n * 9) % 256, (y * 5 + n * 17) % 256, (x + y + n * 40) % 256], -1
    ).astype(np.uint8)


def write(
    path: Path,
    num=40,
    height=48,
    width=64,
    gop=10,
    times=None,
    rate=10,
    codec="libx264",
    pix_fmt="yuv420p",
) -> Path:
    """A clip with B-frames whose frames all differ. times: presentation times in ms."""
    with av.open(str(path), "w") as out:
        stream = out.add_stream(
            codec, rate=rate, options={"g": str(gop), "bf": "2", "preset": "veryfast"}
        )
        stream.height, stream.width, stream.pix_fmt = height, width, pix_fmt
        stream.time_base = stream.codec_context.time_base = Fraction(1, 1000)
        for n in range(num):
            frame = av.VideoFrame.from_ndarray(image(height, width, n), format="rgb24")
            frame.pts, frame.time_base = (
                (times[n] if times else n * 1000 // rate),
                Fraction(1, 1000),
            )
            out.mux(stream.encode(frame))
        out.mux(stream.encode(None))
    return path
