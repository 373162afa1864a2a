"""Video in, frames out: frame-exact decoding of files that may be damaged.

    video = Video("rally.mp4")          # or a folder of frames, or one still image
    indices = video.sample(8)           # uniform in time, first and last frame included
    frames_FCHW = video.frames(indices)

PyAV scans every file once for presentation times and key frames, without decoding. Frame i is then
reached by a seek to the key frame before it. torchcodec, where it loads, decodes the plain case
from that same index, in the containers that keep each frame's time; all else stays with PyAV, so
that both give the same frames bit for bit. What opens files is in media.py.

Shape letters: F frames, C channels, H height, W width.
"""

import bisect
import copy
import json
import math
import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from itertools import groupby
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanosport import media
from nanosport.media import VideoError

MAX_PIXELS = 1920 * 1088
"""Larger frames are scaled down while decoding: 8 frames of 8K would take 850 MB, these 50 MB."""
TIMED = ("mov,mp4,m4a,3gp,3g2,mj2", "matroska,webm")
"""Containers that keep the time of each frame; in others torchcodec finds other frames."""


class Packet(NamedTuple):
    """What a file says of one coded frame (PyAV's packet would hold the file's bytes)."""

    pts: int | None
    """When it is shown."""
    dts: int | None
    """When it is decoded."""
    duration: int
    is_key: bool
    is_hidden: bool
    """Decoded but not shown, by an edit list."""
    is_corrupt: bool


class Video:
    """A clip whose frames are read by index.

    It holds no file between calls: it can be pickled and forked, and nothing needs closing. Frames
    come as a player shows them: rotated, with square pixels, all of the first one's size, at most
    MAX_PIXELS.

    path: a video file; a folder of frames (media.IMAGES) in natural order (frame_2 before
    frame_10); or one such image, a video of one frame. timeout_s: the limit for each call, opening
    included. backend: "torchcodec", "pyav", or None for the best that loads; damaged, resized and
    >8-bit videos are PyAV's in any case. fps: the rate of a folder of frames, which carries none.
    span_s: only the frames on screen from the first time to the second, in seconds as a player
    counts them; frame 0 is then the first of these.

    Attributes: num_frames (that do decode), height, width, fps (average), times_s (float64, 0 at
    the first), start_s (when a player shows the first), backend (which reads: "torchcodec", "pyav"
    or "folder"); of a file also rotation (degrees counter-clockwise) and frames_promised (by its
    header), None where it says nothing.
    """

    def __init__(
        self,
        path: str | os.PathLike,
        timeout_s: float = 60.0,
        backend: str | None = None,
        fps: float = 25.0,
        span_s: tuple[float, float] | None = None,
    ):
        if backend not in (None, "torchcodec", "pyav"):
            raise ValueError(f"backend {backend!r}: must be None, 'torchcodec' or 'pyav'")
        if not 0 < fps < math.inf:
            raise ValueError(f"fps {fps}: must be positive and finite")
        self.path, self.timeout_s, self._offset, self.start_s = Path(path), timeout_s, 0, 0.0
        self.rotation = self.frames_promised = None
        if self.path.is_dir() or self.path.suffix.lower() in media.IMAGES:
            self._index_images(fps)
        else:
            has_torchcodec = backend != "pyav" and media.torchcodec() is not None
            if backend == "torchcodec" and not has_torchcodec:
                raise ValueError(
                    "backend 'torchcodec' does not load here (it needs FFmpeg's shared "
                    "libraries): use None or 'pyav'"
                )
            self._index_file(has_torchcodec, self._deadline())
        assert self.num_frames == len(self.times_s) > 0, (self.num_frames, len(self.times_s))
        if span_s is not None:
            self._keep_span(*span_s)

    def sample(self, num: int, start: int = 0, end: int | None = None) -> tuple[int, ...]:
        """`num` frame indices uniformly in time from frame `start` to `end`, both included; all, if
        there are fewer.

        At a constant frame rate: the rounded linspace of indices. Sorted, without repeats, hence
        fewer than `num` also where frames are sparse in time.
        """
        end = self.num_frames - 1 if end is None else end
        if num < 1 or not 0 <= start <= end < self.num_frames:
            rule = f"need num >= 1 and 0 <= start <= end < {self.num_frames}"
            raise VideoError(f"{self.path}: sample({num}, {start}, {end}): {rule}")
        if num > end - start:
            return tuple(range(start, end + 1))
        at_s = np.linspace(self.times_s[start], self.times_s[end], num)
        position = np.interp(at_s, self.times_s[start : end + 1], np.arange(start, end + 1))
        nearest = np.rint(position.round(6))  # round(6): ties as in linspace, not by float noise
        return tuple(np.unique(nearest.astype(int)).tolist())

    def frames(self, indices: Sequence[int]) -> torch.Tensor:
        """RGB frames_FCHW, uint8, in the order of `indices` (repeats allowed).

        A frame lost inside a damaged stretch is held over from its neighbour, as players do. Raises
        VideoError where an index is out of range, the file has gone or changed, or time is up.
        """
        indices = [int(i) for i in indices]
        if outside := [i for i in indices if not 0 <= i < self.num_frames]:
            has = f"it has frames 0 to {self.num_frames - 1}"
            raise VideoError(f"{self.path}: frame {outside[0]} is out of range; {has}")
        if not indices:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        indices = [i + self._offset for i in indices]
        wanted, deadline = sorted(set(indices)), self._deadline()
        read = self._read_images if self.backend == "folder" else self._read_file
        rgb = read(wanted, deadline)
        return torch.stack([rgb[i] for i in indices])

    def part(self, span_s: tuple[float, float]) -> "Video":
        """The frames on screen between two times, read through the same index."""
        part = copy.copy(self)
        part._keep_span(*span_s)
        return part

    @property
    def end_s(self) -> float:
        """When a player has shown the last frame."""
        return float(self.start_s + self.times_s[-1] + 1 / self.fps)

    @property
    def is_steady(self) -> bool:
        """Whether each frame's time follows from its index and the rate."""
        expected_s = np.arange(self.num_frames) / self.fps
        return bool(np.abs(self.times_s - expected_s).max() < 1 / self.fps)

    def _keep_span(self, start_s: float, end_s: float) -> None:
        at_s = self.times_s + self.start_s
        if end_s < at_s[0] or start_s >= self.end_s:
            span = f"{start_s:g} s and {end_s:g} s"
            has = f"it shows frames from {at_s[0]:.2f} s to {self.end_s:.2f} s"
            raise VideoError(f"{self.path}: no frame between {span}; {has}")
        ends = np.searchsorted(at_s, (start_s + 1e-6, end_s + 1e-6), side="right")
        first = max(0, int(ends[0]) - 1)  # the frame that is on screen when the span begins
        last = max(first + 1, int(ends[1]))
        self._offset, self.num_frames = self._offset + first, last - first
        self.start_s = float(at_s[first])
        self.times_s = self.times_s[first:last] - self.times_s[first]

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    def _check(self, deadline: float) -> None:
        if time.monotonic() > deadline:
            raise VideoError(
                f"{self.path}: not decoded within {self.timeout_s:g} s; "
                "raise timeout_s or cut the video shorter"
            )

    def _set_size(self, frame, pixel_ratio, orientation: tuple[int, bool]) -> None:
        """Set the size that every frame is shown in, from the first one."""
        width, height = frame.width, frame.height
        self._turns, self._mirrored = orientation
        # Square pixels: the short side grows. Not under a rotation: players disagree on which axis
        # is then meant.
        if pixel_ratio and 1 / 4 < pixel_ratio < 4 and not self._turns:
            if pixel_ratio > 1:
                width = round(width * pixel_ratio)
            else:
                height = round(height / pixel_ratio)
        if width * height > MAX_PIXELS:
            scale = math.sqrt(MAX_PIXELS / (width * height))
            width, height = (max(2, int(side * scale) // 2 * 2) for side in (width, height))
        self._size = width, height
        self.width, self.height = (height, width) if self._turns % 2 else (width, height)

    def _rgb(self, frame) -> torch.Tensor:
        """An av frame as it is shown: (3, H, W) uint8."""
        width, height = self._size
        rgb_HWC = torch.from_numpy(frame.to_ndarray(format="rgb24", width=width, height=height))
        rgb_HWC = rgb_HWC.flip(1) if self._mirrored else rgb_HWC
        return rgb_HWC.rot90(self._turns).permute(2, 0, 1)

    # A folder of frames: they are known by their names.

    def _index_images(self, fps: float) -> None:
        self._images = media.image_paths(self.path)
        self.backend, self.num_frames, self.fps = "folder", len(self._images), float(fps)
        self.times_s = np.arange(self.num_frames) / self.fps
        first = self._images[0]
        self._set_size(media.image(first), None, media.exif_orientation(first))

    def _read_images(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        rgb = {}
        for i in wanted:
            self._check(deadline)
            rgb[i] = self._rgb(media.image(self._images[i]))
        return rgb

    # A file: its frames are known by their presentation time `_pts`, or by counting from the start
    # where that is None. What holds of its packets decides what is trusted, and that who decodes:
    #
    #   what holds                                              is trusted    else
    #   all shown have times of their own and not their         key frames    decode from the start
    #     decoder's order, there are key frames, none is
    #     corrupt
    #   and the first decodes at its time; the header counts    times         decode all, and count
    #     as many, or the last ones decode
    #   and none is hidden, the container is TIMED, and the     torchcodec    PyAV decodes
    #     pixels need no conversion and no mirror

    def _index_file(self, has_torchcodec: bool, deadline: float) -> None:
        with media.open_video(self.path, self.timeout_s) as (container, stream):
            packets = [
                Packet(p.pts, p.dts, p.duration or 1, p.is_keyframe, p.is_discard, p.is_corrupt)
                for p in self._packets(container, stream, deadline)
                if p.size
            ]
            self._stream, self._time_base = stream.index, stream.time_base
            self.fps, self.frames_promised = float(stream.average_rate or 25), stream.frames or None
            clock_start_s = (container.start_time or 0) / 1e6
            pixel_ratio = stream.sample_aspect_ratio
            is_timed = container.format.name in TIMED
            may_guess = stream.codec_context.has_b_frames and not is_timed

        # key frames; is_guessed: the reader makes times up, in the order of decoding, as for AVI
        timed = [p for p in packets if p.pts is not None]
        shown = sorted((p for p in timed if not p.is_hidden), key=lambda p: p.pts)
        keys = sorted((p.pts, p.pts if p.dts is None else p.dts) for p in timed if p.is_key)
        lags = {p.pts - p.dts for p in timed if p.dts is not None}
        is_guessed = may_guess and len(lags) == 1
        own_times = len({p.pts for p in shown}) == sum(not p.is_hidden for p in packets)
        trusted = bool(own_times and keys and shown and not is_guessed)
        trusted = trusted and not any(p.is_corrupt for p in packets)
        self._keys, self._pts = keys if trusted else [], [p.pts for p in shown]
        self.backend = "pyav"
        first = next(self._decode(None, deadline), None)
        if first is None:
            what = "no frame can be decoded (encrypted, damaged or empty)"
            raise VideoError(f"{self.path}: {what}; download or convert it anew")
        self._set_size(first, pixel_ratio, media.orientation(first))
        self.rotation = 90 * self._turns

        # times: few formats have a count; to decode all is slow, and the only truth about damage
        trusted = trusted and first.pts == self._pts[0]
        is_counted = self.frames_promised == len(packets)
        trusted = trusted and (is_counted or self._last_decode(deadline))
        if not trusted:
            frames = self._decode(None, deadline)
            self._pts = [None if is_guessed else frame.pts for frame in frames]
        self._set_times(clock_start_s)

        if has_torchcodec and trusted and is_timed and len(shown) == len(packets):
            self._use_torchcodec(first, shown)

    def _use_torchcodec(self, first, shown: list[Packet]) -> None:
        """Let torchcodec decode where it gives PyAV's pixels, which it does not where it resizes,
        mirrors, or converts more than 8 bits."""
        as_stored = self._size == (first.width, first.height) and not self._mirrored
        upright = round(first.rotation) % 360 == self.rotation
        if as_stored and upright and all(c.bits == 8 for c in first.format.components):
            index = [{"pts": p.pts, "duration": p.duration, "key_frame": +p.is_key} for p in shown]
            self.backend, self._mapping = "torchcodec", json.dumps({"frames": index})

    def _set_times(self, clock_start_s: float) -> None:
        """Set the time of each frame. clock_start_s: when a player starts its clock."""
        self.num_frames = len(self._pts)
        if None in self._pts or self._pts != sorted(set(self._pts)):  # none, or they run backwards
            self._pts, self.times_s = None, np.arange(self.num_frames) / self.fps
            return
        first = self._pts[0]
        self.times_s = np.array([float((pts - first) * self._time_base) for pts in self._pts])
        self.start_s = max(0.0, float(first * self._time_base) - clock_start_s)
        if self.num_frames > 1:
            self.fps = float((self.num_frames - 1) / self.times_s[-1])

    def _last_decode(self, deadline: float) -> bool:
        """Whether all frames from the last key frame on decode: a file cut short ends in packets
        that do not."""
        start = self._keys[-1][0]
        decoded = [frame.pts for frame in self._decode(self._keys[-1], deadline)]
        from_start = [pts for pts in decoded if pts is None or pts >= start]
        return from_start == self._pts[bisect.bisect_left(self._pts, start) :]

    def _packets(self, container, stream, deadline: float) -> Iterator:
        try:
            for packet in container.demux(stream):
                self._check(deadline)
                yield packet
        except media.pyav().FFmpegError:  # the container breaks off: what came before it counts
            self._check(deadline)

    def _decode(self, key: tuple[int, int] | None, deadline: float) -> Iterator:
        """Yield av frames in presentation order, from a key frame (pts, dts) or from the start;
        damaged packets are stepped over."""
        FFmpegError = media.pyav().FFmpegError
        with media.open_video(self.path, self.timeout_s) as (container, stream):
            seeks = key is not None and key != self._keys[0]
            if seeks:
                with suppress(FFmpegError):  # where it landed is seen below
                    container.seek(key[1], stream=stream)
            for n, packet in enumerate(self._packets(container, stream, deadline)):
                if seeks and n == 0:
                    landed = packet.is_keyframe and packet.pts is not None and packet.pts <= key[0]
                    if not landed:  # MPEG-TS has no index
                        break
                with suppress(FFmpegError):
                    yield from packet.decode()
            else:
                return
        yield from self._decode(None, deadline)

    def _read_file(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        if self.backend == "torchcodec":
            try:
                return self._read_torchcodec(wanted, deadline)
            except VideoError:
                raise
            except (RuntimeError, IndexError, ValueError):
                # its answer to anything odd in a file (no duration, a new size); PyAV copes
                self.backend = "pyav"
        return self._read_pyav(wanted, deadline)

    def _key_before(self, i: int) -> tuple[int, int] | None:
        """The key frame to decode frame i from, or None for the start. Pictures that lead a key
        frame belong to the one before."""
        if not (self._pts and self._keys):
            return None
        after = bisect.bisect_right(self._keys, self._pts[i], key=lambda key: key[0])
        return self._keys[max(after - 1, 0)]

    def _read_pyav(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        rgb = {}
        due_at = self._pts or range(wanted[-1] + 1)
        for key, group in groupby(wanted, self._key_before):
            due, previous = list(group), None
            for n, frame in enumerate(self._decode(key, deadline)):
                at = frame.pts if self._pts else n
                while at is not None and due and due_at[due[0]] <= at:
                    exact = due_at[due[0]] == at or previous is None
                    rgb[due.pop(0)] = self._rgb(frame if exact else previous)
                if not due:
                    break
                previous = frame
            if due and previous is None:
                what = f"frame {due[0]} no longer decodes; the file has changed, open it again"
                raise VideoError(f"{self.path}: {what}")
            rgb.update((i, self._rgb(previous)) for i in due)
        return rgb

    def _read_torchcodec(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        decoder = media.torchcodec()(
            self.path.absolute(),
            stream_index=self._stream,
            custom_frame_mappings=self._mapping,
            device="cpu",
        )
        rgb = {}
        for start in range(0, len(wanted), 8):  # small bites: it cannot be interrupted
            self._check(deadline)
            part = wanted[start : start + 8]
            frames = decoder.get_frames_at(part)
            expected_s = torch.tensor([float(self._pts[i] * self._time_base) for i in part])
            if (frames.pts_seconds - expected_s).abs().max() > 1e-3:
                raise RuntimeError("these are not the frames that were asked for")
            rgb.update(zip(part, frames.data, strict=True))
        return rgb


def usable(questions: Sequence, open: Callable) -> tuple[list, list[str]]:
    """The questions whose clip `open` opens, and one line for each clip that it does not."""
    broken = {}
    for clip in dict.fromkeys(q.clip for q in questions):
        try:
            open(clip)
        except VideoError as error:
            broken[clip] = str(error)
    return [q for q in questions if q.clip not in broken], list(broken.values())
