"""Videos that were sent here, in a folder that goes with the process. Each is known by an id that
nobody can guess; no name that was sent becomes a path."""

import asyncio
import secrets
import tempfile
import time
from collections.abc import AsyncIterator, Callable
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

MB = 1_000_000


class Refused(Exception):
    """A request that is refused, with the status of its answer and why."""

    def __init__(self, status: int, why: str):
        super().__init__(why)
        self.status = status


@dataclass
class Upload:
    path: Path
    used_at: float
    readers: int = 0
    is_dropped: bool = False
    """It goes when nobody reads it any more."""


class Uploads:
    """The videos that are here."""

    def __init__(self, most: int, max_mb: float, keep_s: float, pause_s: float):
        """most: videos at a time. keep_s: how long one stays that nobody asks about. pause_s: the
        longest that a sender may be silent."""
        self.folder = tempfile.TemporaryDirectory(prefix="nanosport_")
        self.most, self.max_mb, self.keep_s, self.pause_s = most, max_mb, keep_s, pause_s
        self.videos: dict[str, Upload] = {}
        self.num_coming = 0
        self.on_removed: Callable[[Path], object] = lambda path: None  # for whoever else knows it

    async def receive(self, parts: AsyncIterator[bytes], promised: int | None) -> str:
        """Take a video, and return its id. promised: its bytes, as the sender says. Raises Refused;
        nothing is then left of it."""
        self.check_size(promised or 0)
        if len(self.videos) + self.num_coming >= self.most:
            raise Refused(503, f"{self.most} videos are here already; try again later")
        name, size = secrets.token_urlsafe(16), 0
        path = Path(self.folder.name) / name
        self.num_coming += 1
        try:
            with open(path, "wb") as file:
                while part := await self.next_part(parts):
                    self.check_size(size := size + len(part))
                    file.write(part)
            if promised is not None and size < promised:
                raise Refused(400, f"{size} of {promised} bytes came; send it again")
        except BaseException:
            path.unlink(missing_ok=True)
            raise
        finally:
            self.num_coming -= 1
        self.videos[name] = Upload(path, time.monotonic())
        return name

    async def next_part(self, parts: AsyncIterator[bytes]) -> bytes:
        """What comes next; nothing at the end. Raises Refused for a sender that is silent."""
        try:
            return await asyncio.wait_for(anext(parts, b""), self.pause_s)
        except TimeoutError:
            raise Refused(408, f"nothing came for {self.pause_s:g} s; send it again") from None

    def check_size(self, size: int) -> None:
        """Raise Refused for more bytes than a video may have."""
        if size > self.max_mb * MB:
            raise Refused(413, f"a video may have {self.max_mb:g} MB; cut it shorter")

    @contextmanager
    def reading(self, name: str):
        """The path of a video, which stays until it has been read. Raises Refused."""
        upload = self.videos.get(name)
        if upload is None or upload.is_dropped:
            raise Refused(404, "no such video here; send it (again) first")
        upload.readers += 1
        try:
            yield upload.path
        finally:
            upload.readers -= 1
            upload.used_at = time.monotonic()
            self.sweep()

    def drop(self, name: str) -> None:
        """Remove a video, when it has been read."""
        if name in self.videos:
            self.videos[name].is_dropped = True
        self.sweep()

    def sweep(self) -> None:
        """Remove what is dropped, or has not been asked about for too long."""
        oldest = time.monotonic() - self.keep_s
        for name, upload in [*self.videos.items()]:
            if not upload.readers and (upload.is_dropped or upload.used_at < oldest):
                upload.path.unlink(missing_ok=True)
                self.on_removed(self.videos.pop(name).path)
