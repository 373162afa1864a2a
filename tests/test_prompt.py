"""Our chat text is the published template's, in text and in ids, and nothing from outside can forge
its special tokens."""

import json
from pathlib import Path

import pytest

from nanosport.env.prompt import (
    IMAGE_PAD,
    SYSTEM,
    SYSTEM_NO_TOOL,
    frame_text,
    opening,
    question_text,
    tool_result,
)
from nanosport.env.tools import parse, tool_call
from nanosport.model.folder import load_tokenizer
from nanosport.records import Question, check_text, read_questions, read_records

QWEN = Path(__file__).parents[2] / "shared" / "data" / "qwen" / "Qwen2.5-VL-7B-Instruct"
needs_qwen = pytest.mark.skipif(not QWEN.is_dir(), reason=f"{QWEN} is not here")

QUESTION = Question(
    "q", "clip.mp4", "soccer", "recognition", "Who scored?", ("red 7", "blue 9"), "A"
)
SHOWN, WINDOW = (0, 20, 40), (20, 30, 40)
CALL = f"<think>between 20 and 40.</think>\n{tool_call(20, 40)}"
ANSWER = "<think>frame 30 shows red 7.</think>\n<answer>A</answer>"


def pieces(num_tokens: int = 6, use_tool: bool = True) -> list[str]:
    """A conversation, cut where its pieces enter it: prompt, sampled call, tool result, sampled
    answer."""
    first = opening(QUESTION, SHOWN, [num_tokens] * 3, 41, use_tool)
    return (
        [first, CALL, tool_result(frame_text(WINDOW, [num_tokens] * 3)), ANSWER]
        if use_tool
        else [first, ANSWER]
    )


def images(indices) -> list[dict]:
    parts = [
        ({"type": "text", "text": f"frame {i}:"}, {"type": "image"}, {"type": "text", "text": "\n"})
        for i in indices
    ]
    return [part for triple in parts for part in triple]


def text(content: str) -> dict:
    return {"type": "text", "text": content}


def rendered(messages: list[dict], num_tokens: int) -> str:
    """Through the published Jinja template; a processor then expands each placeholder to the
    image's tokens."""
    template = json.loads((QWEN / "chat_template.json").read_text())["chat_template"]
    whole = load_tokenizer(QWEN).apply_chat_template(
        messages, chat_template=template, tokenize=False
    )
    return whole.replace(IMAGE_PAD, IMAGE_PAD * num_tokens)


@needs_qwen
@pytest.mark.parametrize("num_tokens", [1, 6, 299])
def test_text_is_the_published_templates(num_tokens):
    messages = [
        {"role": "system", "content": SYSTEM},
        {"role": "user", "content": [*images(SHOWN), text(question_text(QUESTION, 41))]},
        {"role": "assistant", "content": CALL},
        {
            "role": "user",
            "content": [text("<tool_response>\n"), *images(WINDOW), text("</tool_response>")],
        },
        {"role": "assistant", "content": ANSWER},
    ]
    assert "".join(pieces(num_tokens)) + "<|im_end|>\n" == rendered(messages, num_tokens)


@needs_qwen
def test_text_without_tool_and_after_an_error_is_the_published_templates():
    user = {"role": "user", "content": [*images(SHOWN), text(question_text(QUESTION, 41))]}
    messages = [
        {"role": "system", "content": SYSTEM_NO_TOOL},
        user,
        {"role": "assistant", "content": ANSWER},
    ]
    assert "".join(pieces(6, use_tool=False)) + "<|im_end|>\n" == rendered(messages, 6)
    messages = [
        {"role": "system", "content": SYSTEM},
        user,
        {"role": "assistant", "content": CALL},
        {"role": "user", "content": "<tool_response>\nerror: ask again\n</tool_response>"},
        {"role": "assistant", "content": ANSWER},
    ]
    ours = opening(QUESTION, SHOWN, [6] * 3, 41) + CALL + tool_result("error: ask again") + ANSWER
    assert ours + "<|im_end|>\n" == rendered(messages, 6)


@pytest.mark.parametrize("which", ["nano", pytest.param("qwen", marks=needs_qwen)])
@pytest.mark.parametrize("use_tool", [True, False])
def test_ids_of_the_pieces_are_the_ids_of_the_whole(which, use_tool, nano_folder):
    tokenizer = load_tokenizer(nano_folder if which == "nano" else QWEN)
    parts = pieces(use_tool=use_tool)
    apart = [i for part in parts for i in tokenizer.encode(part, add_special_tokens=False)]
    assert apart == tokenizer.encode("".join(parts), add_special_tokens=False)
    assert tokenizer.decode(apart, skip_special_tokens=False) == "".join(parts)
    assert apart.count(tokenizer.convert_tokens_to_ids(IMAGE_PAD)) == 6 * (6 if use_tool else 3)


def test_options_are_lettered_and_the_way_to_answer_is_said():
    assert question_text(QUESTION, 41).endswith(
        "Who scored?\n(A) red 7\n(B) blue 9\nAnswer with one option."
    )
    assert question_text(Question("q", "v", "s", "rules", "Why?", (), "foul"), 41).endswith(
        "Why?\nAnswer in a few words."
    )


FORGED = (
    "<|im_start|>",
    "<|im_end|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|endoftext|>",
)


@pytest.mark.parametrize("token", FORGED)
def test_special_tokens_are_refused(token, tmp_path):
    with pytest.raises(ValueError, match="special token"):
        check_text(f"Who scored?{token}")
    assert check_text("a < b | c > d, <think>, <|>") == "a < b | c > d, <think>, <|>"
    good = {"id": "q", "video": "v.mp4", "sport": "s", "dimension": "rules"}
    good |= {"question": "Why?", "options": ["x", "y"], "answer": "A"}
    file = tmp_path / "q.jsonl"
    for bad in ({"question": f"Why?{token}"}, {"options": ["x", f"y{token}"]}):
        file.write_text("\n".join(json.dumps(row) for row in (good, good | bad)) + "\n")
        with pytest.raises(ValueError, match=r"q\.jsonl, line 2: .*special token"):
            read_questions(file)
    file.write_text(
        json.dumps({"question": good, "messages": [f"<think>{token}</think>\n<answer>A</answer>"]})
        + "\n"
    )
    with pytest.raises(ValueError, match=r"q\.jsonl, line 1: .*special token"):
        read_records(file)
    for question in (
        Question("q", "v", "s", "rules", token, (), "x"),
        Question("q", "v", "s", "rules", "Why?", (token, "y"), "A"),
    ):
        with pytest.raises(ValueError, match="special token"):
            opening(question, SHOWN, [6] * 3, 41)


@pytest.mark.parametrize(
    "call",
    [
        '"<|image_pad|>"',
        '{"name": "<|image_pad|>"}',
        "<|image_pad|>",
        '{"arguments": {"<|image_pad|>": 1}}',
    ],
)
def test_what_a_model_writes_is_not_quoted_back_to_it(call):
    action = parse(f"<think><|image_pad|></think>\n<tool_call>{call}</tool_call>", 100)
    shown = (
        tool_result(action.error).removeprefix("<|im_end|>\n<|im_start|>").partition("</tool")[0]
    )
    assert action.kind == "bad_call" and "<|" not in shown


def test_the_first_versions_call_is_said_in_the_prompt():
    question = Question("q", "v", "golf", "rules", "Who?", (), "red")
    text = opening(question, [0, 5], [1, 1], 10, syntax="choose_frames")
    assert (
        '<tool_call>{"action": "choose_frames", "frame_range": [idx_start, idx_end]}</tool_call>'
        in text
    )
    assert "frame_extraction_tool" not in text
    assert opening(question, [0, 5], [1, 1], 10, False, syntax="choose_frames") == opening(
        question, [0, 5], [1, 1], 10, False
    )
