"""Rewards of an episode: the paper's gated one, its neighbours, ablations, and one of your own."""

import inspect
import runpy
import traceback
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from reprlib import repr as short

from nanosport.env.judge import Judge, graded
from nanosport.env.scoring import accuracy
from nanosport.fields import LIMITS
from nanosport.records import Episode

TOOL_WEIGHT, CURIOSITY, FORMAT_PENALTY = 0.5, 0.03, 0.05
NAMES = ("v1", "v2", "videobrain", "accuracy", "ungated")
BY_CLASS = ("v2", "videobrain")
"""These need each question's pass rate."""
VIDEOBRAIN = {  # class: the bonus of right with the tool, right without, wrong with it
    "direct": (0.0, 0.5, 0.0),
    "adaptive": (0.5, 0.5, 0.0),
    "active": (0.5, 0.0, 0.2),
}
VIDEOBRAIN_FORMAT = 0.05
RULES = {"videobrain": {"min_window": 8, "near": 1}}
"""What an episode's Limits are under a reward, where they differ."""


class RewardError(ValueError):
    """A reward of somebody's own failed. It says in one line for which episode, where, and why."""


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
    ungraded: float = 0.0
    """1.0 where a judge was asked and gave no grade, so that the rule has scored."""


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
    episode: Episode,
    version: str = "v1",
    acc: float | None = None,
    solved_rate: float = 0.75,
    failed_rate: float = 0.25,
) -> Reward:
    """The reward of an episode whose answer scores `acc` (by rule where it is not given):

    R = g_fmt·(acc + R_tool) − 0.05·(1 − g_fmt).

    v1: R_tool = 0.5·acc if the tool was used and acc ≥ 0.5; 0.03 if it was used and acc < 0.5;
        0 if it was not used, or showed nothing new.
    v2: as v1 where the base model fails on the overview frames (pass rate below solved_rate).
        Where it succeeds, R_tool = 0.5·acc if the tool was *not* used and acc ≥ 0.5, else 0. Its
        constants are not published: v1's are taken.
    ungated: R_tool = 0.5 for every episode whose tool showed something new, right or wrong.
    accuracy: R = acc, whatever the format and the tool.
    videobrain: R = g_fmt·(0.05 + [acc ≥ 0.5] + the cell of VIDEOBRAIN), arXiv 2602.04094. Direct is
        what the base model solves (pass rate from solved_rate on), Active what it fails (up to
        failed_rate), Adaptive the rest; its own thresholds are not published.
    """
    if version not in NAMES:
        raise ValueError(f"reward {version!r}: must be one of {', '.join(NAMES)}")
    acc = accuracy(episode.answer, episode.question) if acc is None else acc
    valid = format_valid(episode)
    used, num_new, right = used_tool(episode), new_frames(episode), acc >= 0.5
    rate = episode.question.pass_rate
    if version == "videobrain":
        kind = "direct" if rate >= solved_rate else "active" if rate <= failed_rate else "adaptive"
        looked, without, wrong = VIDEOBRAIN[kind]
        tool = (looked if right else wrong) if num_new else 0.0 if used else without * right
    elif version == "ungated":
        tool = TOOL_WEIGHT if num_new else 0.0
    elif version == "accuracy":
        tool = 0.0
    elif version == "v2" and rate >= solved_rate:
        tool = TOOL_WEIGHT * acc if right and not used else 0.0
    else:
        tool = (TOOL_WEIGHT * acc if right else CURIOSITY) if num_new else 0.0

    answered = VIDEOBRAIN_FORMAT + right if version == "videobrain" else acc
    broken = {"accuracy": acc, "videobrain": 0.0}.get(version, -FORMAT_PENALTY)
    total = answered + tool if valid else broken
    return Reward(total, acc, tool, float(valid), float(used), float(num_new))


def reward_function(
    name: str, solved_rate: float = 0.75, failed_rate: float = 0.25
) -> Callable[[Episode, float | None], Reward]:
    """The function of (episode, accuracy or None) that --reward names: one of NAMES, or
    FILE.py:FUNCTION. Raises ValueError where there is none."""
    if name in NAMES:
        rates = {"solved_rate": solved_rate, "failed_rate": failed_rate}
        return lambda episode, acc: gated_reward(episode, name, acc, **rates)
    path, colon, function = name.rpartition(":")
    if not colon or not path.endswith(".py"):
        rule = f"must be one of {', '.join(NAMES)}, or FILE.py:FUNCTION"
        raise ValueError(f"--reward {name}: {rule}")
    try:
        own = runpy.run_path(path, run_name=Path(path).stem)[function]
        inputs = inspect.signature(own).parameters.values()
        needed = [p for p in inputs if p.default is p.empty and p.kind < p.VAR_POSITIONAL]
    except (Exception, SystemExit) as error:
        raise ValueError(f"--reward {name}: {_where(error, path)}") from error
    return partial(_own_reward, name, own, len(needed) > 1)


def flat_groups(rewards: Sequence[Reward], group_size: int) -> list[int]:
    """The numbers of the groups whose episodes all have one reward: their advantages are 0."""
    totals = [reward.total for reward in rewards]
    groups = range(len(totals) // group_size)
    parts = [totals[k * group_size : (k + 1) * group_size] for k in groups]
    return [k for k in groups if max(parts[k]) - min(parts[k]) < 1e-9]


def _own_reward(
    name: str, own: Callable, wants_accuracy: bool, episode: Episode, acc: float | None
) -> Reward:
    """What a function of somebody's own makes of an episode."""
    acc = accuracy(episode.answer, episode.question) if acc is None else acc
    about = f"--reward {name}, episode of question {episode.question.id!r}"
    try:
        total = own(episode, acc) if wants_accuracy else own(episode)
        said = short(total)
    except (Exception, SystemExit) as error:
        raise RewardError(f"{about}: {_where(error, name.rpartition(':')[0])}") from error
    is_number = isinstance(total, int | float) and not isinstance(total, bool)
    if not is_number or not abs(total) < LIMITS[float]:
        rule = "must be a finite number, an int or a float of Python's: float(…) makes one"
        raise RewardError(f"{about}: returned {said}; it {rule}")
    parts = float(format_valid(episode)), float(used_tool(episode)), float(new_frames(episode))
    return Reward(float(total), acc, 0.0, *parts)


def _where(error: BaseException, path: str) -> str:
    """An error of somebody's file, with its last line there."""
    lines = [f.lineno for f in traceback.extract_tb(error.__traceback__) if f.filename == path]
    line = f", line {lines[-1]}" if lines else ""
    return f"{type(error).__name__}: {' '.join(str(error).split())}{line}"


def rewards_of(episodes: Sequence[Episode], judge: Judge | None, reward: Callable) -> list[Reward]:
    """The reward of each episode, its answer scored by the judge where there is one, and by rule
    where that gives no grade."""
    return [
        replace(reward(episode, score), ungraded=float(judge is not None and grade is None))
        for episode, score, grade in zip(episodes, *graded(episodes, judge), strict=True)
    ]
