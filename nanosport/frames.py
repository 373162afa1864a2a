"""(video, frame index) → vision features: each frame decoded and encoded once, as long as the tower is frozen.

The eight rollouts of a question look at the same overview and often at the same windows, and the trainer looks at them
again: with a frozen tower all of them are served from one bounded cache.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import torch

from nanosport.episode import Frames
from nanosport.image import ImageConfig, preprocess, smart_resize
from nanosport.model import Qwen25VL
from nanosport.video import Video

CHUNK = 64  # frames through the tower at a time


def load_frames(video: Video, indices: Sequence[int], cfg: ImageConfig) -> Frames:
    """Decode and preprocess: what the model takes."""
    indices = tuple(int(i) for i in indices)
    return Frames(indices, *preprocess(video.frames(indices), cfg))


class FrameEncoder:
    """Opens videos and turns frames into features_ND of the model's vision tower."""

    def __init__(self, model: Qwen25VL, image: ImageConfig, frozen: bool = True, max_cached: int = 100_000, max_videos: int = 1024):
        """frozen: the tower is not trained, features are cached (at most `max_cached` frames); else they carry gradients."""
        self.model, self.image, self.frozen = model, image, frozen
        self.max_cached, self.max_videos = max_cached, max_videos
        self.cache: OrderedDict[tuple[str, int], torch.Tensor] = OrderedDict()
        self.videos: OrderedDict[str, Video] = OrderedDict()
        self.num_decoded = 0

    def open(self, path: str) -> Video:
        """The video; its index of frames is kept while it is among the last used. Raises VideoError."""
        if path not in self.videos:
            self.videos[path] = Video(path)
            if len(self.videos) > self.max_videos:
                self.videos.popitem(last=False)
        self.videos.move_to_end(path)
        return self.videos[path]

    def grid(self, path: str) -> tuple[int, int, int]:
        """(1, h, w) in patches: every frame of a video has the same."""
        video = self.open(path)
        height, width = smart_resize(video.height, video.width, self.image)
        return 1, height // self.image.patch_size, width // self.image.patch_size

    def tokens_per_frame(self, path: str) -> int:
        _, h, w = self.grid(path)
        return h * w // self.image.merge_size**2

    def features(self, wanted: Sequence[tuple[str, int]]) -> torch.Tensor:
        """features_ND of (path, frame index) pairs, in their order."""
        if not self.frozen:
            return self._encode(wanted)
        missing = sorted({key for key in wanted if key not in self.cache})
        for start in range(0, len(missing), CHUNK):
            keys = missing[start : start + CHUNK]
            with torch.no_grad():
                encoded = self._encode(keys).split([self.tokens_per_frame(path) for path, _ in keys])
            self.cache.update((key, part.clone()) for key, part in zip(keys, encoded))  # a view would keep the whole chunk
        found = [self.cache[key] for key in wanted]
        for key in wanted:
            self.cache.move_to_end(key)
        while len(self.cache) > self.max_cached:
            self.cache.popitem(last=False)
        return torch.cat(found)

    def _encode(self, keys: Sequence[tuple[str, int]]) -> torch.Tensor:
        patches, grids = [], []
        for path, run in groupby(keys, key=lambda key: key[0]):
            frames = load_frames(self.open(path), [index for _, index in run], self.image)
            self.num_decoded += len(frames.indices)
            patches.append(frames.patches_PC)
            grids += frames.grids
        return self.model.encode(torch.cat(patches).to(self.model.head_weight_VD.device), grids)
