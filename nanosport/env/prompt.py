"""One template for SFT, RL, evaluation and inference: Qwen's chat format, `frame N:` labels, the
tool's schema.

Text is put together piece by piece, and every piece is encoded once, when it enters the
conversation; sampled tokens are never decoded and encoded again. A piece always begins and ends
beside a special token, so the pieces' ids are the ids of the whole text.
"""

import json
from collections.abc import Sequence

from nanosport.env.env import Env
from nanosport.env.tools import SCHEMA, TOOL_NAME, V1_NAME, Syntax
from nanosport.records import LETTERS, Question, check_text

END = "<|im_end|>"
"""What ends a turn, of whomever."""
VISION_START, IMAGE_PAD, VISION_END = "<|vision_start|>", "<|image_pad|>", "<|vision_end|>"

SYSTEM_NO_TOOL = (
    "Answer the question about the sports video. Think inside <think></think>, then answer inside "
    "<answer></answer>."
)
WITH_TOOL = (
    "Answer the question about the sports video. Think inside <think></think>, then either call "
    "the tool to see more frames or answer inside <answer></answer>.\n\n"
)
SYSTEM = (
    f"{WITH_TOOL}# Tools\n\n<tools>\n{json.dumps(SCHEMA)}\n</tools>\n\n"
    "For each function call, return a json object with function name and arguments within "
    "<tool_call></tool_call> XML tags:\n"
    '<tool_call>\n{"name": <function-name>, "arguments": <args-json-object>}\n</tool_call>'
)
SYSTEM_V1 = (
    f"{WITH_TOOL}To see more frames between two frame indices, write\n<tool_call>"
    f'{{"action": "{V1_NAME}", "frame_range": [idx_start, idx_end]}}</tool_call>'
)
HOW = {
    "choice": "Answer with one option.",
    "open": "Answer in a few words.",
    "number": "Answer with a number.",
    "span": "Answer with the first and the last second, such as 3.5-8.",
}
"""What is asked for with each kind of question."""


def label(index: int, times_s: Sequence[float] | None = None) -> str:
    """What stands before a frame. times_s: of all frames, where they do not follow from a rate."""
    return f"frame {index}:" if times_s is None else f"frame {index} at {times_s[index]:.2f} s:"


def frame_text(
    indices: Sequence[int], tokens_per_frame: Sequence[int], times_s: Sequence[float] | None = None
) -> str:
    """Labelled frames, each as many image placeholders as the vision tower gives tokens."""
    return "".join(
        f"{label(index, times_s)}{VISION_START}{IMAGE_PAD * count}{VISION_END}\n"
        for index, count in zip(indices, tokens_per_frame, strict=True)
    )


def question_text(question: Question, num_frames: int, fps: float | None = None) -> str:
    """The question with its lettered options and how to answer. A span is asked for in seconds, so
    the frame rate is said.

    Raises ValueError where its texts forge special tokens.
    """
    for text in (question.question, *question.options):
        check_text(text)
    lettered = zip(LETTERS, question.options)
    options = "".join(f"\n({letter}) {text}" for letter, text in lettered)
    rate = f" at {fps:.4g} a second" if question.kind == "span" and fps else ""
    asked = f"{question.question}{options}\n{HOW[question.kind]}"
    return f"The video has {num_frames} frames{rate}. {asked}"


def system(use_tool: bool = True, syntax: Syntax = TOOL_NAME) -> str:
    """What the model is told first."""
    with_tool = SYSTEM_V1 if syntax == V1_NAME else SYSTEM
    return with_tool if use_tool else SYSTEM_NO_TOOL


def opening(
    question: Question,
    indices: Sequence[int],
    tokens_per_frame: Sequence[int],
    num_frames: int,
    use_tool: bool = True,
    fps: float | None = None,
    times_s: Sequence[float] | None = None,
    syntax: Syntax = TOOL_NAME,
) -> str:
    """Everything before the first assistant token."""
    user = frame_text(indices, tokens_per_frame, times_s)
    user += question_text(question, num_frames, fps)
    start = f"<|im_start|>system\n{system(use_tool, syntax)}{END}\n<|im_start|>user\n"
    return f"{start}{user}{END}\n<|im_start|>assistant\n"


def opening_of(env: Env, tokens_per_frame: int) -> str:
    """The opening of an episode."""
    shown, limits = (env.overview, [tokens_per_frame] * len(env.overview)), env.limits
    about = (env.video.num_frames, limits.use_tool, env.fps, env.times_s, limits.syntax)
    return opening(env.question, *shown, *about)


def tool_result(content: str) -> str:
    """What follows a turn that called the tool: its end, the tool's frames or error, and the start
    of the next turn."""
    response = f"<tool_response>\n{content.rstrip()}\n</tool_response>"
    return f"{END}\n<|im_start|>user\n{response}{END}\n<|im_start|>assistant\n"
