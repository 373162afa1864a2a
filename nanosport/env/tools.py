"""One turn's action: parse what the model wrote, check it, and say what is wrong in words the model
can use.

A valid turn is <think>…</think> and then exactly one action: <answer>…</answer>, or a <tool_call>
around {"name": "frame_extraction_tool", "arguments": {"idx_start": a, "idx_end": b}}; with the
syntax of the paper's first version, around {"action": "choose_frames", "frame_range": [a, b]}.
"""

import json
import re
from dataclasses import dataclass
from typing import Literal

from nanosport.fields import unique

TOOL_NAME = "frame_extraction_tool"
V1_NAME = "choose_frames"
Syntax = Literal["frame_extraction_tool", "choose_frames"]
"""How a call is written: as Qwen's function calls, or as DeepSport v1 and FrameThinker do."""
STOPS = ("</tool_call>", "</answer>")
"""What a turn says last, before its end."""
REPEATED = "were already returned"
"""What the error of a repeated window says."""
MIN_WINDOW = 9
"""A window of 8 frames or fewer is invalid (as in FrameThinker, the nearest ancestor)."""

SCHEMA = {
    "type": "function",
    "function": {
        "name": TOOL_NAME,
        "description": "Returns more frames between two frame indices.",
        "parameters": {
            "type": "object",
            "properties": {"idx_start": {"type": "integer"}, "idx_end": {"type": "integer"}},
            "required": ["idx_start", "idx_end"],
        },
    },
}

_TURN = re.compile(
    r"\s*<think>(?P<think>.*?)</think>"
    r"\s*(?:<tool_call>(?P<call>.*?)</tool_call>|<answer>(?P<answer>.*?)</answer>)\s*",
    re.DOTALL,
)
_TAG = re.compile(r"</?(?:think|tool_call|tool_response|answer)>")
_FORM = "a turn is <think>…</think> and then one <tool_call>…</tool_call> or <answer>…</answer>"


@dataclass(frozen=True)
class Action:
    """What a turn does.

    kind is `tool` (with window), `answer` (with answer), `bad_call` (with error; the episode may go
    on) or `invalid` (with error: no action could be read, and the episode ends).
    """

    kind: str
    think: str = ""
    window: tuple[int, int] | None = None
    answer: str | None = None
    error: str | None = None


def parse(
    text: str,
    num_frames: int,
    asked: tuple[tuple[int, int], ...] = (),
    allow_tool: bool = True,
    *,
    syntax: Syntax = TOOL_NAME,
    min_window: int = MIN_WINDOW,
    near: int = 0,
) -> Action:
    """Read one assistant turn.

    `num_frames` of the video, its shortest window and the intervals `asked` before decide whether a
    call is valid; repeating an interval, or one that is off by `near` frames at most, is a format
    error, the paper's "cognitive consistency" check.
    """
    turn = _TURN.fullmatch(text)
    if turn is None or any(_TAG.search(part) for part in turn.groups() if part):
        return Action("invalid", error=_FORM)
    think = turn["think"].strip()
    if turn["answer"] is not None:
        if answer := turn["answer"].strip():
            return Action("answer", think, answer=answer)
        return Action("invalid", think, error="the answer is empty")
    if not allow_tool:
        return Action("invalid", think, error="no tool was offered")
    window, error = _window(turn["call"], num_frames, syntax, min_window)
    again = [
        one for one in asked if window and max(abs(a - b) for a, b in zip(one, window)) <= near
    ]
    if error is None and again:
        seen = f"frames {again[0][0]} to {again[0][1]} {REPEATED}"
        error = f"{seen}; ask for another interval or answer"
    return Action("bad_call" if error else "tool", think, window=window, error=error)


def _window(
    call: str, num_frames: int, syntax: Syntax, min_window: int
) -> tuple[tuple[int, int] | None, str | None]:
    """The interval a call asks for, and what is wrong with it."""
    try:
        request = json.loads(call, object_pairs_hook=unique)
    except (ValueError, RecursionError) as error:
        why = "names a key twice" if str(error).endswith("twice") else "is not valid JSON"
        return None, f"the tool call {why}"
    kind, within = ("action", "frame_range") if syntax == V1_NAME else ("name", "arguments")
    if not isinstance(request, dict) or request.get(kind) != syntax:
        return None, f"the only tool is {syntax}"
    bounds = request.get(within)
    if syntax == TOOL_NAME:
        names, form = ("idx_start", "idx_end"), "the arguments must be idx_start and idx_end"
        if isinstance(bounds, str):
            form = "the arguments are a text; they must be an object of idx_start and idx_end"
        has_both = isinstance(bounds, dict) and set(bounds) == set(names)
        bounds = [bounds[name] for name in names] if has_both else None
    else:
        form = "frame_range must be [idx_start, idx_end]"
    if set(request) != {kind, within} or not isinstance(bounds, list) or len(bounds) != 2:
        return None, f"{form}, nothing else"
    start, end = window = tuple(bounds)
    if type(start) is not int or type(end) is not int:
        return None, "idx_start and idx_end must be integers"
    if not 0 <= start < end < num_frames:
        bounds = f"0 to {num_frames - 1}"
        return window, f"the interval must lie inside {bounds}, idx_start before idx_end"
    if end - start + 1 < min_window:
        return window, f"the interval must span at least {min_window} frames"
    return window, None


def tool_call(start: int, end: int, syntax: Syntax = TOOL_NAME) -> str:
    """The canonical text of a call, as a teacher writes it."""
    if syntax == V1_NAME:
        call = {"action": V1_NAME, "frame_range": [start, end]}
        return f"<tool_call>{json.dumps(call)}</tool_call>"
    call = {"name": TOOL_NAME, "arguments": {"idx_start": start, "idx_end": end}}
    return f"<tool_call>\n{json.dumps(call)}\n</tool_call>"


def split_think(text: str) -> tuple[str, str]:
    """(reasoning, the rest) of a turn, whether it is valid or not: for people to read."""
    think, closed, rest = text.partition("</think>")
    return (think.replace("<think>", "").strip(), rest.strip()) if closed else ("", text.strip())
