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


BITS = 10


def numbered(
    path: Path, num=75, codec="libx264", times=None, tick=1, first=0, sound=False, **flags
):
    """A clip in which each frame shows its own number, as black and white bars.

    times, first: in ticks of 1 / (25 · tick) s. sound: a second stream, which starts at 0 s.
    """
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=25, options=flags)
        stream.width, stream.height, stream.pix_fmt = 160, 64, "yuv420p"
        stream.codec_context.time_base = Fraction(1, 25 * tick)
        if sound:
            hum = out.add_stream("aac", rate=16_000)
            silence = np.zeros((1, 1024), np.float32)
            for k in range(16 * num // 25):
                wave = av.AudioFrame.from_ndarray(silence, format="fltp", layout="mono")
                wave.sample_rate, wave.pts, wave.time_base = 16_000, 1024 * k, Fraction(1, 16_000)
                out.mux(hum.encode(wave))
            out.mux(hum.encode())
        for k in range(num):
            bars = np.repeat([255 * (k >> bit & 1) for bit in range(BITS)], 160 // BITS)
            picture = np.broadcast_to(bars[None, :, None], (64, 160, 3)).astype(np.uint8)
            frame = av.VideoFrame.from_ndarray(picture, format="rgb24")
            frame.time_base = Fraction(1, 25 * tick)
            frame.pts = first + (k * tick if times is None else times[k])
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


def number_in(frame_CHW) -> int:
    """The number that a frame shows."""
    bars = frame_CHW.float().mean((0, 1)).view(BITS, -1).mean(1)
    return sum(1 << bit for bit in range(BITS) if bars[bit] > 127)


def write_long(path: Path, seconds: int, rate: int = 25) -> Path:
    """A clip of many hours in little time: ten seconds are encoded, and laid end to end."""
    short, num = path.with_name(f"ten_seconds_of_{path.name}"), 10 * rate
    write(short, num=num, rate=rate, gop=num)
    with av.open(str(short)) as source, av.open(str(path), "w") as out:
        packets = [packet for packet in source.demux(video=0) if packet.size]
        stream = out.add_stream_from_template(source.streams.video[0])
        ticks = round(10 / packets[0].time_base)
        at = [(packet.pts, packet.dts) for packet in packets]
        for again in range(seconds // 10):
            for packet, (pts, dts) in zip(packets, at):
                packet.pts, packet.dts = pts + again * ticks, dts + again * ticks
                packet.stream = stream
                out.mux(packet)
                packet.stream = source.streams.video[0]
    short.unlink()
    return path
