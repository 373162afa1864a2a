"""The gated tool-use reward of an episode."""

from dataclasses import dataclass

from nanosport.env.scoring import accuracy
from nanosport.records import Episode

TOOL_WEIGHT, CURIOSITY, FORMAT_PENALTY = 0.5, 0.03, 0.05


@dataclass(frozen=True)
class Reward:
    """The total and its parts."""

    total: float
    accuracy: float
    tool: float
    """R_tool of the equation, before the gate of the format."""
    format: float
    """1.0 where the whole trajectory is valid."""
    used_tool: float
    """1.0 where frames were returned at least once."""
    new_frames: float
    """How many frames the tool has shown for the first time."""


def format_valid(episode: Episode) -> bool:
    """g_fmt: it ended in an answer, and no turn was malformed, out of range or a repeated
    interval."""
    return episode.status == "answered" and all(turn.error is None for turn in episode.turns)


def used_tool(episode: Episode) -> bool:
    """Whether the tool has returned frames at least once."""
    return any(turn.action == "tool" and turn.frames for turn in episode.turns)


def new_frames(episode: Episode) -> int:
    """How many frames the tool has shown for the first time.

    A window within a frame of one seen before, or of the overview, brings none: else the whole clip
    once more, or a window moved by a frame, would pass for a look.
    """
    num_overview = len(episode.frames) - sum(len(turn.frames) for turn in episode.turns)
    shown = [episode.frames[:num_overview]]
    num_new = 0
    for frames in (turn.frames for turn in episode.turns if turn.frames):
        moved = any(
            abs(frames[0] - old[0]) <= 1 and abs(frames[-1] - old[-1]) <= 1 for old in shown if old
        )
        num_new += 0 if moved else len(set(frames).difference(*shown))
        shown.append(frames)
    return num_new


def gated_reward(
    episode: Episode, version: str = "v1", acc: float | None = None, solved_rate: float = 0.75
) -> Reward:
    """The reward of an episode whose answer scores `acc` (by rule where it is not given):

    R = g_fmt·(acc + R_tool) − 0.05·(1 − g_fmt).

    v1: R_tool = 0.5·acc if the tool was used and acc ≥ 0.5; 0.03 if it was used and acc < 0.5;
        0 if it was not used, or showed nothing new.
    v2: as v1 where the base model fails on the overview frames (pass rate below solved_rate).
        Where it succeeds, R_tool = 0.5·acc if the tool was *not* used and acc ≥ 0.5, else 0. Its
        constants are not published: v1's are taken.
    """
    if version not in ("v1", "v2"):
        raise ValueError(f"reward {version!r}: must be v1 or v2")
    acc = accuracy(episode.answer, episode.question) if acc is None else acc
    valid = format_valid(episode)
    used, num_new = used_tool(episode), new_frames(episode)
    if version == "v2" and episode.question.pass_rate >= solved_rate:
        tool = TOOL_WEIGHT * acc if acc >= 0.5 and not used else 0.0
    else:
        tool = (TOOL_WEIGHT * acc if acc >= 0.5 else CURIOSITY) if num_new else 0.0
    total = acc + tool if valid else -FORMAT_PENALTY
    return Reward(total, acc, tool, float(valid), float(used), float(num_new))
