"""Video in, frames out: frame-exact decoding of files that may be damaged.

    video = Video("rally.mp4")          # or a folder of frames, or one still image
    indices = video.sample(8)           # uniform in time, first and last frame included
    frames_FCHW = video.frames(indices)

PyAV (which brings its own FFmpeg) scans every file once: presentation times and key frames, no decoding. Frame i is
then found by a seek to the key frame before it. torchcodec, where it loads, decodes the plain case from that same
index; all else stays with PyAV, so that both backends give the same frames bit for bit.

Shape letters: F frames, C channels, H height, W width.
"""

import bisect
import io
import json
import math
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import numpy as np
import torch

MAX_PIXELS = 1920 * 1088
"""Larger frames are scaled down while decoding: 8 frames of 8K would take 850 MB, these take 50 MB."""
MAX_CODED_PIXELS = 2**26
"""Even one decoded frame of more (8K is 2**25) is refused: a few kB of file can ask for gigabytes."""
IMAGES = (".jpg", ".jpeg", ".png")


class VideoError(ValueError):
    """A video that cannot be used. One line: which file, why, what to do."""


class Video:
    """A clip whose frames are read by index. It holds no file between calls: pickle it, fork it, nothing needs closing.

    path: a video file, a folder of .jpg/.jpeg/.png frames in natural order (frame_2 before frame_10), or one such image
        (a video of one frame).
    timeout_s: limit for each call, opening included.
    backend: "torchcodec", "pyav", or None for the best that loads. Forced or not, torchcodec leaves damaged, resized
        and >8-bit videos to PyAV: the attribute `backend` tells which reads ("torchcodec", "pyav" or "folder").
    fps: rate of a folder of frames, which carries none.
    span_s: only the frames from the first time to the second, in seconds; frame 0 is then the first of these.

    Attributes besides: num_frames (that do decode), height, width, fps (average), times_s (float64, 0 at the first);
    of a file also rotation (degrees counter-clockwise) and frames_promised (by its header), each None where it says nothing.
    Frames come as a player shows them: rotated, with square pixels, all of the first one's size, at most MAX_PIXELS.
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
        self.path, self.timeout_s, self.backend = Path(path), timeout_s, "pyav"
        self.rotation = self.frames_promised = None
        if self.path.is_dir():
            try:
                found = [p for p in self.path.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
            except OSError as error:
                raise VideoError(f"{self.path}: cannot be read ({error.strerror}); check its permissions") from error
            self._index_images(fps, sorted(found, key=_natural))
        elif self.path.suffix.lower() in IMAGES:
            self._index_images(fps, [self.path])
        else:
            decoder = None if backend == "pyav" else _torchcodec()
            if backend == "torchcodec" and decoder is None:
                raise ValueError("backend 'torchcodec' does not load here (it needs FFmpeg's shared libraries): use None or 'pyav'")
            self._index_file(decoder is not None, self._deadline())
        assert self.num_frames == len(self.times_s) > 0, (self.num_frames, len(self.times_s))
        self._offset = 0
        if span_s is not None:
            inside = np.flatnonzero((self.times_s >= span_s[0]) & (self.times_s <= span_s[1]))
            if not len(inside):
                last = self.times_s[-1]
                raise VideoError(f"{self.path}: no frame between {span_s[0]:g} s and {span_s[1]:g} s; its last is at {last:.2f} s")
            self._offset, self.num_frames = int(inside[0]), len(inside)
            self.times_s = self.times_s[inside] - self.times_s[inside[0]]

    def sample(self, num: int, start: int = 0, end: int | None = None) -> tuple[int, ...]:
        """`num` frame indices uniformly in time from frame `start` to `end`, both included; all, if there are fewer.

        At a constant frame rate: the rounded linspace of indices. Sorted, without repeats, hence fewer than `num`
        also where frames are sparse in time.
        """
        end = self.num_frames - 1 if end is None else end
        if num < 1 or not 0 <= start <= end < self.num_frames:
            raise VideoError(f"{self.path}: sample({num}, {start}, {end}): need num >= 1 and 0 <= start <= end < {self.num_frames}")
        if num > end - start:
            return tuple(range(start, end + 1))
        at_s = np.linspace(self.times_s[start], self.times_s[end], num)
        position = np.interp(at_s, self.times_s[start : end + 1], np.arange(start, end + 1))
        return tuple(
            np.unique(np.rint(position.round(6)).astype(int)).tolist()
        )  # round(6): ties as in linspace, not by float noise

    def frames(self, indices: Sequence[int]) -> torch.Tensor:
        """RGB frames_FCHW, uint8, in the order of `indices` (repeats allowed).

        A frame lost inside a damaged stretch is held over from its neighbour, as players do. VideoError: an index out
        of range, a file gone or changed, the deadline."""
        indices = [int(i) for i in indices]
        bad = [i for i in indices if not 0 <= i < self.num_frames]
        if bad:
            raise VideoError(f"{self.path}: frame {bad[0]} is out of range; it has frames 0 to {self.num_frames - 1}")
        if not indices:
            return torch.empty(0, 3, self.height, self.width, dtype=torch.uint8)
        indices = [i + self._offset for i in indices]
        wanted, deadline = sorted(set(indices)), self._deadline()
        read = {"folder": self._read_images, "torchcodec": self._read_torchcodec, "pyav": self._read_pyav}
        try:
            rgb = read[self.backend](wanted, deadline)
        except (RuntimeError, IndexError, ValueError) as error:
            if self.backend != "torchcodec" or isinstance(error, VideoError):
                raise  # else torchcodec's answer to anything odd in a file (no duration, a new size); PyAV copes
            self.backend = "pyav"
            rgb = self._read_pyav(wanted, deadline)
        return torch.stack([rgb[i] for i in indices])

    def _deadline(self) -> float:
        return time.monotonic() + self.timeout_s

    def _check(self, deadline: float):
        if time.monotonic() > deadline:
            raise VideoError(f"{self.path}: not decoded within {self.timeout_s:g} s; raise timeout_s or cut the video shorter")

    def _show(self, frame, sar):
        """Set the size that every frame is shown in, from the first one."""
        width, height, self._turns = frame.width, frame.height, round(frame.rotation / 90) % 4
        # Square pixels: the short side grows. Not under a rotation: players disagree on which axis is then meant.
        if sar and 1 / 4 < sar < 4 and not self._turns:
            width, height = (round(width * sar), height) if sar > 1 else (width, round(height / sar))
        if width * height > MAX_PIXELS:
            scale = math.sqrt(MAX_PIXELS / (width * height))
            width, height = (max(2, int(side * scale) // 2 * 2) for side in (width, height))
        self._size = width, height
        self.width, self.height = (height, width) if self._turns % 2 else (width, height)

    def _rgb(self, frame) -> torch.Tensor:
        """An av frame as shown: (3, H, W) uint8."""
        rgb_HWC = torch.from_numpy(frame.to_ndarray(format="rgb24", width=self._size[0], height=self._size[1]))
        return rgb_HWC.rot90(self._turns).permute(2, 0, 1)

    # A folder of frames: known by their names.

    def _index_images(self, fps: float, paths: list[Path]):
        if not paths:
            raise VideoError(f"{self.path}: a folder without {', '.join(IMAGES)} frames; give a video file or a folder of frames")
        self._images, self.backend, self.num_frames, self.fps = paths, "folder", len(paths), float(fps)
        self.times_s = np.arange(len(paths)) / self.fps
        self._show(_image(paths[0]), None)

    def _read_images(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        rgb = {}
        for i in wanted:
            self._check(deadline)
            rgb[i] = self._rgb(_image(self._images[i]))
        return rgb

    # A file: its frames are known by their presentation time `_pts`, or by counting from the start where that is None.

    def _index_file(self, use_torchcodec: bool, deadline: float):
        with _open(self.path, self.timeout_s) as (container, stream):
            packets = [  # not the packets themselves: they hold the whole file's bytes
                (p.pts, p.dts, p.duration or 1, p.is_keyframe, p.is_discard, p.is_corrupt)
                for p in self._packets(container, stream, deadline)
                if p.size
            ]
            rate, time_base = float(stream.average_rate or 25), stream.time_base
            counted, sar, self._stream = stream.frames, stream.sample_aspect_ratio, stream.index
        timed = [p for p in packets if p[0] is not None]
        keys = sorted((pts, pts if dts is None else dts) for pts, dts, _, key, _, _ in timed if key)
        shown = sorted((pts, length, key) for pts, _, length, key, discard, _ in timed if not discard)
        # An edit list's discarded packets are decoded and not shown; every other must have a time of its own.
        unique = len({pts for pts, _, _ in shown}) == sum(not p[4] for p in packets)
        clean = unique and bool(keys) and bool(shown) and not any(p[5] for p in packets)
        complete = clean and counted == len(packets)  # by the header's count, which few formats have
        whole = len(shown) == len(packets)
        self._keys, self._pts = keys if clean else [], [p[0] for p in shown]
        first = next(self._decode(None, deadline), None)
        if first is None:
            raise VideoError(f"{self.path}: no frame can be decoded (encrypted, damaged or empty); download or convert it anew")
        self._show(first, sar)
        self.rotation, self.frames_promised = round(first.rotation) % 360, counted or None
        sound = clean and first.pts == self._pts[0] and (complete or self._tail_decodes(deadline))
        if not sound:  # slow, and the only truth about a damaged file
            self._pts = [frame.pts for frame in self._decode(None, deadline)]
        self.num_frames, self.fps = len(self._pts), rate
        if None in self._pts or self._pts != sorted(set(self._pts)):  # no times, or they run backwards
            self._pts, self.times_s = None, np.arange(self.num_frames) / rate
        else:
            self.times_s = np.array([float((pts - self._pts[0]) * time_base) for pts in self._pts])
            self.fps = float((self.num_frames - 1) / self.times_s[-1]) if self.num_frames > 1 else rate
        # torchcodec resizes, and converts more than 8 bits, with other pixels than PyAV: it gets neither.
        plain = self._size == (first.width, first.height) and all(c.bits == 8 for c in first.format.components)
        if use_torchcodec and sound and whole and plain:
            frames = [{"pts": pts, "duration": duration, "key_frame": int(key)} for pts, duration, key in shown]
            self.backend, self._mapping = "torchcodec", json.dumps({"frames": frames})

    def _tail_decodes(self, deadline: float) -> bool:
        """Whether all frames from the last key frame on decode: a file cut short ends in packets that do not."""
        last = self._keys[-1][0]
        tail = [frame.pts for frame in self._decode(self._keys[-1], deadline) if frame.pts is None or frame.pts >= last]
        return tail == self._pts[bisect.bisect_left(self._pts, last) :]

    def _packets(self, container, stream, deadline: float) -> Iterator:
        try:
            for packet in container.demux(stream):
                self._check(deadline)
                yield packet
        except _av().FFmpegError:  # the container breaks off: what came before it counts
            self._check(deadline)

    def _decode(self, key: tuple[int, int] | None, deadline: float) -> Iterator:
        """av frames in presentation order from a key frame (pts, dts) or the start; steps over damaged packets."""
        with _open(self.path, self.timeout_s) as (container, stream):
            seeks = key is not None and key != self._keys[0]
            if seeks:
                try:
                    container.seek(key[1], stream=stream)
                except _av().FFmpegError:
                    pass  # the landing shows it
            for n, packet in enumerate(self._packets(container, stream, deadline)):
                if seeks and n == 0 and not (packet.is_keyframe and packet.pts is not None and packet.pts <= key[0]):
                    break  # landed elsewhere (MPEG-TS has no index)
                try:
                    yield from packet.decode()
                except _av().FFmpegError:
                    continue
            else:
                return
        yield from self._decode(None, deadline)

    def _read_pyav(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        rgb, groups = {}, {}
        for i in wanted:  # grouped by the key frame to decode from; leading pictures belong to the one before
            k = bisect.bisect_right([key[0] for key in self._keys], self._pts[i]) - 1 if self._pts else -1
            groups.setdefault(max(k, 0), []).append(i)
        for k, group in groups.items():
            previous = None
            for n, frame in enumerate(self._decode(self._keys[k] if self._pts and self._keys else None, deadline)):
                at = frame.pts if self._pts else n
                while at is not None and group and (due := self._pts[group[0]] if self._pts else group[0]) <= at:
                    rgb[group.pop(0)] = self._rgb(frame if due == at or previous is None else previous)
                if not group:
                    break
                previous = frame
            if group and previous is None:
                raise VideoError(f"{self.path}: frame {group[0]} no longer decodes; the file has changed, open it again")
            rgb.update((i, self._rgb(previous)) for i in group)
        return rgb

    def _read_torchcodec(self, wanted: list[int], deadline: float) -> dict[int, torch.Tensor]:
        decoder = _torchcodec()(self.path.absolute(), stream_index=self._stream, custom_frame_mappings=self._mapping, device="cpu")
        rgb = {}
        for start in range(0, len(wanted), 8):  # it cannot be interrupted: small bites keep the deadline
            self._check(deadline)
            part = wanted[start : start + 8]
            rgb.update(zip(part, decoder.get_frames_at(part).data, strict=True))
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


@cache
def _av():
    import av

    av.logging.set_level(None)  # FFmpeg's own lines on stderr; what matters is raised
    return av


@cache
def _torchcodec():
    """torchcodec's VideoDecoder, or None where it or its FFmpeg libraries are missing."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return VideoDecoder


@contextmanager
def _open(path: Path, timeout_s: float):
    """(container, its default video stream). `file:` + an absolute path: no name is taken for a URL or option."""
    head, av = _head(path), _av()
    try:
        container = av.open(f"file:{path.absolute()}", timeout=timeout_s, options={"protocol_whitelist": "file"})
    except av.error.ExitError as error:
        raise VideoError(f"{path}: not decoded within {timeout_s:g} s; raise timeout_s") from error
    except (av.FFmpegError, ValueError) as error:
        raise VideoError(f"{path}: {_diagnosis(head)}") from error
    with container:
        streams = [s for s in container.streams.video if not s.disposition & av.stream.Disposition.attached_pic]
        if not streams:
            what = "only an attached picture" if container.streams.video else "no video stream (audio only, or empty)"
            raise VideoError(f"{path}: {what}; give a file with video")
        stream = next((s for s in streams if s.disposition & av.stream.Disposition.default), streams[0])
        codec = stream.codec_context
        if codec is None:
            raise VideoError(f"{path}: its codec is unknown to FFmpeg; convert it to H.264")
        if codec.width * codec.height > MAX_CODED_PIXELS:
            raise VideoError(f"{path}: frames of {codec.width}x{codec.height} are too large to decode; scale it down")
        codec.thread_count = 1  # callers run many videos at once
        yield container, stream


def _image(path: Path):
    """The av frame of a still. From memory: FFmpeg would take a % in the name for a sequence."""
    _head(path)
    av = _av()
    try:
        with av.open(io.BytesIO(path.read_bytes())) as container:
            codec = container.streams.video[0].codec_context
            if codec.width * codec.height > MAX_CODED_PIXELS:
                raise VideoError(f"{path}: an image of {codec.width}x{codec.height} is too large to decode; scale it down")
            return next(container.decode(video=0))
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise VideoError(f"{path}: not a readable image; extract the frames again") from error


def _head(path: Path) -> bytes:
    """The file's first bytes; VideoError where they tell that it is no video."""
    try:
        if not path.exists():
            raise VideoError(f"{path}: no such file; check the path")
        if not path.is_file():  # a pipe would block for ever
            raise VideoError(f"{path}: not a regular file; copy the video to disk")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        raise VideoError(f"{path}: cannot be read ({error.strerror}); check its permissions") from error
    if not head:
        raise VideoError(f"{path}: an empty file (0 bytes); download it again")
    if head.startswith(b"version https://git-lfs"):
        raise VideoError(f"{path}: a Git LFS pointer, not the video itself; run `git lfs pull`")
    if head.lstrip().lower().startswith((b"<!doctype", b"<html")):
        raise VideoError(f"{path}: an HTML page saved under a video's name; check the link and download it again")
    return head


def _diagnosis(head: bytes) -> str:
    if head[4:8] == b"ftyp":
        return "an MP4 cut off before its index (moov); download it again"
    return "not a video that FFmpeg can read (damaged, or no video at all); download or convert it anew"


def _natural(path: Path) -> list:
    return [(int(part), "") if part.isdecimal() else (0, part) for part in re.split(r"(\d+)", path.name)]
