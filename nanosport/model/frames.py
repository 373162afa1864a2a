"""(clip, frame index) → vision features: a frozen tower decodes and encodes each frame once.

The eight rollouts of a question look at the same overview and often at the same windows, and the
trainer looks at them again: all of them are served from one bounded cache. Frames that will be
asked for are decoded ahead, in threads.
"""

import os
import threading
import time
from collections import Counter, OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from itertools import groupby

import torch

from nanosport.image import ImageConfig, check_shape, cut, resize, smart_resize
from nanosport.model.decoder import VLModel
from nanosport.records import Clip
from nanosport.video import Video, VideoError

TOWER_PATCHES = 76_544
"""So many patches go through the tower together at most, or one frame: 64 frames of 640×360."""
INDEXED_FRAMES = 5_000_000
"""Files stay indexed up to so many frames, about 200 bytes each: 55 hours at 25 a second."""
DECODERS = 4
"""Threads that decode ahead."""
CACHE_BYTES, CACHE_SHARE = 8 << 30, 1 / 16
"""Features are kept up to this size, on the device: 4,000 frames of 640×360 for a 7B model; on a
GPU up to this share of its memory."""

FrameName = tuple[Clip, int]
"""A frame is known by its clip and its index there."""


class FrameEncoder:
    """Opens videos and turns frames into features_ND of the model's vision tower."""

    def __init__(self, model: VLModel | None, image: ImageConfig, frozen: bool = True):
        """frozen: the tower is not trained, so its features are kept; else they carry gradients."""
        if model is not None:
            cuts = image.patch_size, image.temporal_patch_size, image.merge_size
            tower = model.cfg.vision
            takes = tower.patch_size, tower.temporal_patch_size, tower.spatial_merge_size
            if cuts != takes:
                what = f"patch_size, temporal_patch_size, merge_size {cuts}, in config.json {takes}"
                raise ValueError(f"the image processor's settings are another model's: {what}")
        self.model, self.image, self.frozen = model, image, frozen
        self.cache_bytes, self.cached_bytes = CACHE_BYTES, 0
        # on a CPU threads that decode would only slow the model's own down
        self.decodes_ahead = model is not None and self.device.type != "cpu"
        if self.decodes_ahead:  # a small card has better use for its memory
            card = torch.cuda.get_device_properties(self.device).total_memory
            self.cache_bytes = min(CACHE_BYTES, int(CACHE_SHARE * card))
        self.cache: OrderedDict[FrameName, torch.Tensor] = OrderedDict()
        self.videos: OrderedDict[str, Video] = OrderedDict()
        self.num_indexed, self.lock, self.in_turn = 0, threading.Lock(), threading.Lock()
        self.unusable: dict[str, VideoError] = {}
        """Files that cannot be used, or not any more, and why."""
        self.decoders = ThreadPoolExecutor(DECODERS)
        self.coming: dict[FrameName, tuple[Future, int]] = {}
        """Frames that are decoded ahead: by whom, and their place in what comes."""
        self.counts: Counter[str] = Counter()
        """frames_decoded, frames_cached (served without), seconds_video (waited for decoding),
        seconds_tower."""

    def open(self, clip: Clip) -> Video:
        """Return the clip's video. A file is indexed once for all its clips, and the indices of the
        files used last are kept. Threads may share this.

        Raises VideoError where the video cannot be used.
        """
        if (error := self.unusable.get(clip.video)) is not None:
            raise error
        with self.lock:
            if clip.video in self.videos:
                self.videos.move_to_end(clip.video)
            video = self.videos.get(clip.video)
        video = self._index(clip.video) if video is None else video
        return video if clip.span_s is None else video.part(clip.span_s)

    def _index(self, path: str) -> Video:
        try:
            video = Video(path)
            check_shape(video, self.image)
        except Exception as error:
            raise self._lose(path, error) from error
        with self.lock:
            if path not in self.videos:  # else another thread was quicker
                self.videos[path] = video
                self.num_indexed += video.num_frames
            while len(self.videos) > 1 and self.num_indexed > INDEXED_FRAMES:
                self.num_indexed -= self.videos.popitem(last=False)[1].num_frames
        return video

    def look_for(self, clip: Clip) -> None:
        """Raise VideoError where a clip's file has gone since it was indexed."""
        if not os.path.exists(clip.video):
            raise self._lose(clip.video, VideoError(f"{clip.video}: no such file any more"))

    def _lose(self, path: str, error: Exception) -> VideoError:
        """Remember that a file cannot be used, whatever it has brought about."""
        if not isinstance(error, VideoError):
            error = VideoError(f"{path}: {error!r}; convert it, or leave it out")
        self.unusable[path] = error
        return error

    def grid(self, clip: Clip) -> tuple[int, int, int]:
        """Return (1, height, width) in patches, which every frame of a clip has."""
        video = self.open(clip)
        height, width = smart_resize(video.height, video.width, self.image)
        return 1, height // self.image.patch_size, width // self.image.patch_size

    def tokens_per_frame(self, clip: Clip) -> int:
        _, height, width = self.grid(clip)
        return height * width // self.image.merge_size**2

    def expect(self, names: Sequence[FrameName]) -> None:
        """Begin to decode frames whose features will be asked for."""
        if not self.decodes_ahead:
            return
        missing = {n for n in names if n not in self.cache and n not in self.coming}
        for clip, run in groupby(in_order(missing), key=lambda name: name[0]):
            indices = [index for _, index in run]
            future = self.decoders.submit(self._decode, clip, indices)
            self.coming |= {(clip, index): (future, k) for k, index in enumerate(indices)}

    def expect_no_more(self) -> None:
        """Drop what is still decoded ahead."""
        for future, _ in self.coming.values():
            future.cancel()
        self.coming.clear()

    def features(self, names: Sequence[FrameName]) -> torch.Tensor:
        """Return features_ND of the frames, in their order. Threads may share this."""
        with self.in_turn:
            return self._features(names)

    def _features(self, names: Sequence[FrameName]) -> torch.Tensor:
        if not names:  # no rows, but the way through a trained tower, which all ranks go together
            cfg = self.model.cfg.vision
            blank_PC = torch.zeros(cfg.merge_unit, cfg.patch_width, device=self.device)
            grid = (1, cfg.spatial_merge_size, cfg.spatial_merge_size)
            return self.model.encode(blank_PC, [grid])[:0]
        if not self.frozen:
            return self._encode(names)
        missing = in_order({n for n in names if n not in self.cache})
        for batch in self._batches(missing):
            self._remember(batch)
        self.counts["frames_cached"] += len(names) - len(missing)
        features = [self.cache[name] for name in names]

        # the frames used last stay
        for name in names:
            self.cache.move_to_end(name)
        while self.cached_bytes > self.cache_bytes:
            self.cached_bytes -= self.cache.popitem(last=False)[1].nbytes
        return torch.cat(features)

    def _batches(self, names: Sequence[FrameName]) -> list[list[FrameName]]:
        """The frames that go through the tower together."""
        batches, left = [], 0
        for name in names:
            _, height, width = self.grid(name[0])
            if height * width > left:
                batches.append([])
                left = TOWER_PATCHES
            batches[-1].append(name)
            left -= height * width
        return batches

    @torch.no_grad()
    def _remember(self, names: Sequence[FrameName]) -> None:
        """Encode frames into the cache."""
        sizes = [self.tokens_per_frame(clip) for clip, _ in names]
        began = time.monotonic() - self.counts["seconds_video"]  # of which decoding is no part
        parts = [part.clone() for part in self._encode(names).split(sizes)]  # a view keeps them all
        if self.device.type == "cuda":
            torch.cuda.synchronize()
        self.counts["seconds_tower"] += time.monotonic() - self.counts["seconds_video"] - began
        self.cache.update(zip(names, parts))
        self.cached_bytes += sum(part.nbytes for part in parts)

    def _encode(self, names: Sequence[FrameName]) -> torch.Tensor:
        patches, grids, began = [], [], time.monotonic()
        for clip, run in groupby(names, key=lambda name: name[0]):
            frames_FCHW = self._frames(clip, [index for _, index in run])
            patches_PC, its_grids = cut(frames_FCHW.to(self.device), self.image)
            patches.append(patches_PC)
            grids += its_grids
        self.counts["seconds_video"] += time.monotonic() - began
        return self.model.encode(torch.cat(patches), grids)

    def _frames(self, clip: Clip, indices: Sequence[int]) -> torch.Tensor:
        """Resized frames_FCHW, which have been decoded ahead or are decoded now."""
        coming = [self.coming.pop((clip, index), None) for index in indices]
        if None in coming:
            return self._decode(clip, indices)
        return torch.stack([future.result()[k] for future, k in coming])

    def _decode(self, clip: Clip, indices: Sequence[int]) -> torch.Tensor:
        try:
            frames_FCHW = resize(self.open(clip).frames(indices), self.image)
        except Exception as error:
            raise self._lose(clip.video, error) from error
        with self.lock:
            self.counts["frames_decoded"] += len(indices)
        return frames_FCHW

    @property
    def device(self) -> torch.device:
        return self.model.head_weight_VD.device

    def forget(self, video: str | None = None) -> None:
        """Drop all features: the tower has changed. Or one video's, and its index: it is gone.
        Threads may share this."""
        with self.in_turn, self.lock:
            for name in [n for n in self.cache if video in (None, n[0].video)]:
                self.cached_bytes -= self.cache.pop(name).nbytes
            if video in self.videos:
                self.num_indexed -= self.videos.pop(video).num_frames
            self.unusable.pop(video, None)


def in_order(names: set[FrameName]) -> list[FrameName]:
    """Clip by clip, so that a video's frames are decoded in one go."""
    return sorted(names, key=lambda name: (str(name[0]), name[1]))
