"""Opens videos and pictures with PyAV, which brings its own FFmpeg, or says why that cannot be.

What can be told from a file's first bytes is told before FFmpeg sees it: no name is taken for an
address, no playlist opens other files, no pipe blocks.
"""

import io
import math
import re
from contextlib import contextmanager, suppress
from functools import cache
from pathlib import Path

import numpy as np

MAX_CODED_PIXELS = 2**26
"""A larger frame (8K is 2**25) is refused: a few kB of file can ask for gigabytes."""
IMAGES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
ADDRESS = re.compile(r"(^|/)[a-z][a-z0-9+.-]+:/")
"""https://…, of which a path keeps one slash, as it is or behind a folder."""
NO_VIDEO = {
    rb"version https://git-lfs": "a Git LFS pointer, not the video itself; run `git lfs pull`",
    rb"ffconcat|#extm3u|.*<mpd": "a playlist, which names other files; give the video itself",
    rb"<!doctype|<html": (
        "an HTML page saved under a video's name; check the link and download it again"
    ),
}
"""How files begin, in small letters, that people take for a video, and what they are."""
EXIF = {1: (0, False), 2: (0, True), 3: (2, False), 4: (2, True)}
EXIF |= {5: (1, True), 6: (3, False), 7: (3, True), 8: (1, False)}
"""What `orientation` gives, by the number in EXIF's tag."""


class VideoError(ValueError):
    """A video that cannot be used. It says in one line which file, why, and what to do."""


def load_decoders() -> None:
    """Import what decodes, which takes a second or two."""
    pyav(), torchcodec()


@cache
def pyav():
    import av

    av.logging.set_level(None)  # FFmpeg's own lines on stderr; what matters is raised
    return av


@cache
def torchcodec():
    """torchcodec's VideoDecoder, or None where it or its FFmpeg libraries are missing."""
    try:
        from torchcodec.decoders import VideoDecoder
    except (ImportError, RuntimeError, OSError):
        return None
    return VideoDecoder


@contextmanager
def open_video(path: Path, timeout_s: float):
    """(container, its default video stream)."""
    head, av = _head(path), pyav()
    url = f"file:{path.absolute()}"  # so that no name is taken for a URL or an option
    try:
        container = av.open(url, timeout=timeout_s, options={"protocol_whitelist": "file"})
    except av.error.ExitError as error:
        raise VideoError(f"{path}: not decoded within {timeout_s:g} s; raise timeout_s") from error
    except (av.FFmpegError, ValueError) as error:
        if head[4:8] == b"ftyp":
            why = "an MP4 cut off before its index (moov); download it again"
        else:
            what = "not a video that FFmpeg can read (damaged, or no video at all)"
            why = f"{what}; download or convert it anew"
        raise VideoError(f"{path}: {why}") from error
    with container:
        flags, every = av.stream.Disposition, container.streams.video
        streams = [s for s in every if not s.disposition & flags.attached_pic]
        if not streams:
            what = "only an attached picture" if every else "no video stream (audio only, or empty)"
            raise VideoError(f"{path}: {what}; give a file with video")
        stream = next((s for s in streams if s.disposition & flags.default), streams[0])
        if stream.codec_context is None:
            raise VideoError(f"{path}: its codec is unknown to FFmpeg; convert it to H.264")
        _check_size(path, stream.codec_context)
        stream.codec_context.thread_count = 1  # callers run many videos at once
        yield container, stream


def _check_size(path: Path, codec) -> None:
    if codec.width * codec.height > MAX_CODED_PIXELS:
        what = f"frames of {codec.width}x{codec.height} are too large to decode"
        raise VideoError(f"{path}: {what}; scale it down")


def orientation(frame) -> tuple[int, bool]:
    """How a player shows an av frame, by its display matrix: (quarter turns counter-clockwise,
    whether it is mirrored left to right before that)."""
    with suppress(ValueError):  # PyAV does not know all kinds of side data
        matrix = frame.side_data.get("DISPLAYMATRIX")
        if matrix is not None:
            a, b, _, c, d, *_ = np.frombuffer(bytes(matrix), np.int32).astype(float)
            is_mirrored = a * d < b * c
            sign = -1 if is_mirrored else 1
            if a * d != b * c:  # all zeros, say: no picture could be shown so
                return round(-math.degrees(math.atan2(sign * b, sign * a)) / 90) % 4, is_mirrored
    return 0, False


def exif_orientation(path: Path) -> tuple[int, bool]:
    """As `orientation`, of a still, by its EXIF tag."""
    with path.open("rb") as file:
        head = file.read(2**17)
    found = re.search(rb"(?:Exif\0\0|eXIf|EXIF.{4})(II\*\0.*|MM\0\*.*)", head, re.DOTALL)
    tiff = found[1] if found else b""

    def number(at: int, size: int = 2) -> int:
        return int.from_bytes(tiff[at : at + size], "little" if tiff[:2] == b"II" else "big")

    start = number(4, size=4)
    tags = range(start + 2, start + 2 + 12 * number(start), 12)
    shown_as = next((number(tag + 8) for tag in tags if number(tag) == 0x112), 1)
    return EXIF.get(shown_as, EXIF[1])


def image_paths(path: Path) -> list[Path]:
    """The image that `path` is, or the images of that folder in natural order."""
    if not path.is_dir():
        return [path]
    try:
        names = [p for p in path.iterdir() if p.suffix.lower() in IMAGES and p.name[0] != "."]
        names = [p for p in names if p.is_file()]
    except OSError as error:
        why = f"cannot be read ({error.strerror}); check its permissions"
        raise VideoError(f"{path}: {why}") from error
    if not names:
        kinds = ", ".join(IMAGES)
        fix = "give a video file or a folder of frames"
        raise VideoError(f"{path}: a folder without {kinds} frames; {fix}")
    return sorted(names, key=_natural)


def image(path: Path):
    """The av frame of a still. From memory: FFmpeg would take a % in the name for a sequence."""
    _head(path)
    av = pyav()
    try:
        with av.open(io.BytesIO(path.read_bytes())) as container:
            _check_size(path, container.streams.video[0].codec_context)
            return next(container.decode(video=0))
    except (av.FFmpegError, IndexError, StopIteration) as error:
        raise VideoError(f"{path}: not a readable image; extract the frames again") from error


def _head(path: Path) -> bytes:
    """The file's first bytes. Raises VideoError where they tell that it is no video."""
    try:
        if not path.exists():
            if ADDRESS.search(str(path)):
                what = "an address, and nothing is downloaded here"
                address = str(path).replace(":/", "://", 1)  # Path has taken one slash
                raise VideoError(f"{address}: {what}; download the video, and give its file")
            raise VideoError(f"{path}: no such file; check the path")
        if not path.is_file():  # a pipe would block for ever
            raise VideoError(f"{path}: not a regular file; copy the video to disk")
        with path.open("rb") as file:
            head = file.read(512)
    except OSError as error:
        why = f"cannot be read ({error.strerror}); check its permissions"
        raise VideoError(f"{path}: {why}") from error
    if not head:
        raise VideoError(f"{path}: an empty file (0 bytes); download it again")
    start = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    for pattern, why in NO_VIDEO.items():
        if re.match(pattern, start, re.DOTALL):
            raise VideoError(f"{path}: {why}")
    return head


def _natural(path: Path) -> tuple:
    """Sorts frame_2 before frame_10."""
    parts = re.split(r"(\d+)", path.name)  # texts and numbers in turn
    numbered = [int(part) if part.isdecimal() else part for part in parts]
    return numbered, path.name  # 1.png and 01.png: always in the same order
