"""The frames that an episode has looked at, as one picture, for a file or for a terminal.

A row for the overview, then one for each call: its frames over their indices, and below them the
clip as a line from left to right, with the window that was asked for.
"""

import base64
from collections.abc import Sequence

import numpy as np
import torch

from nanosport.image import DIGITS
from nanosport.records import Episode
from nanosport.report import small, small_size
from nanosport.video import Video

PAPER, INK, LINE, WINDOW = 18, 235, 70, (90, 160, 235)
GAP, TEXT = 6, 18
"""Pixels between frames, and of what stands below them."""


def strip(episode: Episode, video: Video) -> np.ndarray:
    """The picture_HWC, uint8. video: the clip of its question, open."""
    calls = [turn for turn in episode.turns if turn.frames]
    num_overview = len(episode.frames) - sum(len(turn.frames) for turn in calls)
    rows = [(episode.frames[:num_overview], None)]
    rows += [(turn.frames, turn.window) for turn in calls]
    cell = max(small_size(video.height, video.width)[1], 10 * len(str(video.num_frames))) + GAP
    width = GAP + cell * max(len(indices) for indices, _ in rows)
    return np.concatenate([_row(video, *row, cell, width) for row in rows])


def _row(
    video: Video, indices: Sequence[int], window: tuple[int, int] | None, cell: int, all_width: int
) -> np.ndarray:
    """One row. cell, all_width: pixels from a frame to the next, and of the whole row."""
    parts = [indices[k : k + 8] for k in range(0, len(indices), 8)]  # frames can be large
    frames_FCHW = torch.cat([small(video.frames(part)) for part in parts])
    frames_FHWC = frames_FCHW.permute(0, 2, 3, 1).numpy()
    height, width = frames_FHWC.shape[1:3]
    row_HWC = np.full((height + TEXT + 2 * GAP, all_width, 3), PAPER, np.uint8)
    for k, (index, frame_HWC) in enumerate(zip(indices, frames_FHWC)):
        x, label_HW = GAP + k * cell, _digits(index)
        row_HWC[GAP : GAP + height, x : x + width] = frame_HWC
        below_HWC = row_HWC[GAP + height + 2 :, x:]
        below_HWC[: label_HW.shape[0], : label_HW.shape[1]][label_HW] = INK

    # the clip from its first frame to its last
    left, length = GAP, all_width - 2 * GAP
    row_HWC[-4:-2, left : left + length] = LINE
    for start, end in [window] if window else [(index, index) for index in indices]:
        a, b = (left + length * place // video.num_frames for place in (start, end + 1))
        row_HWC[-5:-1, a : max(b, a + 2)] = WINDOW
    return row_HWC


def _digits(number: int) -> np.ndarray:
    """A number in white on nothing: where it is, of 12 pixels' height."""
    shifts = (3, 2, 1, 0, None)  # the last column is blank
    columns = [
        [[s is not None and int(row, 16) >> s & 1 for s in shifts] for row in DIGITS[digit]]
        for digit in str(number)
    ]
    return np.kron(np.concatenate(columns, 1), np.ones((2, 2))) > 0


def inline(png: bytes, protocol: str) -> str:
    """What a terminal shows as a picture. protocol: kitty or iterm."""
    data = base64.b64encode(png).decode()
    if protocol == "iterm":
        return f"\x1b]1337;File=inline=1;size={len(png)}:{data}\x07\n"
    parts = [data[k : k + 4096] for k in range(0, len(data), 4096)]
    told = ["a=T,f=100," if k == 0 else "" for k in range(len(parts))]
    more = [int(k + 1 < len(parts)) for k in range(len(parts))]
    return "".join(f"\x1b_G{t}m={m};{p}\x1b\\" for t, m, p in zip(told, more, parts)) + "\n"
