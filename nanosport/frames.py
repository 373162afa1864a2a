"""(clip, frame index) → vision features: each frame decoded and encoded once, as long as the tower is frozen.

The eight rollouts of a question look at the same overview and often at the same windows, and the trainer looks at them
again: with a frozen tower all of them are served from one bounded cache.
"""

from collections import OrderedDict
from collections.abc import Sequence
from itertools import groupby

import torch

from nanosport.episode import Clip, Frames
from nanosport.image import ImageConfig, preprocess, smart_resize
from nanosport.model import Qwen25VL
from nanosport.video import Video

CHUNK = 64  # frames through the tower at a time
CACHE_BYTES = 8 << 30  # of features, on the device: 4,000 frames of 640×360 for a 7B model


def load_frames(video: Video, indices: Sequence[int], cfg: ImageConfig) -> Frames:
    """Decode and preprocess: what the model takes."""
    indices = tuple(int(i) for i in indices)
    return Frames(indices, *preprocess(video.frames(indices), cfg))


class FrameEncoder:
    """Opens videos and turns frames into features_ND of the model's vision tower."""

    def __init__(
        self, model: Qwen25VL, image: ImageConfig, frozen: bool = True, cache_bytes: int = CACHE_BYTES, max_videos: int = 1024
    ):
        """frozen: the tower is not trained, features are cached (at most `cache_bytes` of them); else they carry gradients."""
        self.model, self.image, self.frozen = model, image, frozen
        self.cache_bytes, self.max_videos, self.held = cache_bytes, max_videos, 0
        self.cache: OrderedDict[tuple[Clip, int], torch.Tensor] = OrderedDict()
        self.videos: OrderedDict[Clip, Video] = OrderedDict()
        self.num_decoded = 0

    def open(self, clip: Clip) -> Video:
        """The clip's video; its index of frames is kept while it is among the last used. Raises VideoError."""
        if clip not in self.videos:
            self.videos[clip] = Video(clip.video, span_s=clip.span_s)
            if len(self.videos) > self.max_videos:
                self.videos.popitem(last=False)
        self.videos.move_to_end(clip)
        return self.videos[clip]

    def grid(self, clip: Clip) -> tuple[int, int, int]:
        """(1, h, w) in patches: every frame of a clip has the same."""
        video = self.open(clip)
        height, width = smart_resize(video.height, video.width, self.image)
        return 1, height // self.image.patch_size, width // self.image.patch_size

    def tokens_per_frame(self, clip: Clip) -> int:
        _, h, w = self.grid(clip)
        return h * w // self.image.merge_size**2

    def features(self, wanted: Sequence[tuple[Clip, int]]) -> torch.Tensor:
        """features_ND of (clip, frame index) pairs, in their order."""
        if not wanted:  # no rows, but the way through a trained tower, which all ranks go together
            cfg = self.model.cfg.vision
            blank_PC = torch.zeros(cfg.merge_unit, cfg.patch_width, device=self.device)
            return self.model.encode(blank_PC, [(1, cfg.spatial_merge_size, cfg.spatial_merge_size)])[:0]
        if not self.frozen:
            return self._encode(wanted)
        missing = sorted({key for key in wanted if key not in self.cache}, key=lambda key: (str(key[0]), key[1]))
        for start in range(0, len(missing), CHUNK):
            keys = missing[start : start + CHUNK]
            with torch.no_grad():
                encoded = self._encode(keys).split([self.tokens_per_frame(clip) for clip, _ in keys])
            self.cache.update((key, part.clone()) for key, part in zip(keys, encoded))  # a view would keep the whole chunk
            self.held += sum(part.nbytes for part in encoded)
        found = [self.cache[key] for key in wanted]
        for key in wanted:
            self.cache.move_to_end(key)
        while self.held > self.cache_bytes:
            self.held -= self.cache.popitem(last=False)[1].nbytes
        return torch.cat(found)

    def _encode(self, keys: Sequence[tuple[Clip, int]]) -> torch.Tensor:
        patches, grids = [], []
        for clip, run in groupby(keys, key=lambda key: key[0]):
            frames = load_frames(self.open(clip), [index for _, index in run], self.image)
            self.num_decoded += len(frames.indices)
            patches.append(frames.patches_PC)
            grids += frames.grids
        return self.model.encode(torch.cat(patches).to(self.device), grids)

    @property
    def device(self) -> torch.device:
        return self.model.head_weight_VD.device

    def forget(self) -> None:
        """The tower has changed: what it made of frames is void."""
        self.cache.clear()
        self.held = 0
