"""Every rule for a turn, and no text that makes the parser raise."""

import json
import random

import pytest

from nanosport.env.tools import MIN_WINDOW, TOOL_NAME, V1_NAME, parse, split_think, tool_call

THINK = "<think>the score changes.</think>\n"
GOOD = THINK + tool_call(20, 40)


def call(start, end) -> str:
    """Arguments as raw JSON text, so that what json.dumps never writes can be tried too."""
    return f'{THINK}<tool_call>{{"name": "{TOOL_NAME}", "arguments": {{"idx_start": {start}, "idx_end": {end}}}}}</tool_call>'


def test_a_call():
    action = parse(GOOD, 100)
    assert (action.kind, action.window, action.error, action.think) == (
        "tool",
        (20, 40),
        None,
        "the score changes.",
    )
    assert parse(call(0, 99), 100).window == (0, 99)


@pytest.mark.parametrize(
    "written, read",
    [
        ("A", "A"),
        (" red 7\n", "red 7"),
        ('3-2, "quoted" {json}', '3-2, "quoted" {json}'),
        ("赢", "赢"),
    ],
)
def test_an_answer(written, read):
    action = parse(f"\n{THINK}<answer>{written}</answer>\n", 100)
    assert (action.kind, action.answer, action.window, action.error) == ("answer", read, None, None)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "B",
        "<answer>B</answer>",
        tool_call(20, 40),
        "<think>no end <answer>B</answer>",
        "no start</think><answer>B</answer>",
        THINK,
        THINK + "B",
        THINK + "<answer>B",
        THINK + "<answer></answer>",
        THINK + "<answer> \n</answer>",
        THINK + "<answer>B</answer> and so on",
        "first " + THINK + "<answer>B</answer>",
        THINK + "text between <answer>B</answer>",
        THINK + "<answer>B</answer><answer>C</answer>",
        GOOD + tool_call(50, 70),
        GOOD + "<answer>B</answer>",
        THINK + "<answer>B</answer>" + tool_call(20, 40),
        THINK + THINK + "<answer>B</answer>",
        "<think><think>x</think></think><answer>B</answer>",
        "<think>x <answer>A</answer></think><answer>B</answer>",
        "<think>x <tool_call></think><answer>B</answer>",
        THINK + "<answer><answer>B</answer>",
        THINK + "<answer><tool_response>B</tool_response></answer>",
        THINK + "<tool_call><answer>B</answer></tool_call>",
        THINK + "<ANSWER>B</ANSWER>",
        THINK + "<answer>B</answer><|im_end|>",
    ],
)
def test_no_action_can_be_read(text):
    action = parse(text, 100)
    assert (
        action.kind == "invalid"
        and action.error
        and action.window is None
        and action.answer is None
    )


@pytest.mark.parametrize(
    "written, why",
    [
        ("", "not valid JSON"),
        ("{", "not valid JSON"),
        ("frame_extraction_tool(20, 40)", "not valid JSON"),
        (json.dumps({"name": TOOL_NAME})[:-1] + ",}", "not valid JSON"),
        ("[" * 200_000, "not valid JSON"),
        ('{"a":' * 50_000 + "1" + "}" * 50_000, "not valid JSON"),
        ("null", "only tool"),
        ("[]", "only tool"),
        ("7", "only tool"),
        ('"text"', "only tool"),
        (json.dumps({"name": "crop", "arguments": {"idx_start": 20, "idx_end": 40}}), "only tool"),
        (json.dumps({"name": [TOOL_NAME], "arguments": {"idx_start": 20, "idx_end": 40}}), "only tool"),
        (json.dumps({"name": TOOL_NAME}), "nothing else"),
        (json.dumps({"name": TOOL_NAME, "arguments": None}), "nothing else"),
        (json.dumps({"name": TOOL_NAME, "arguments": [20, 40]}), "nothing else"),
        (json.dumps({"name": TOOL_NAME, "arguments": '{"idx_start": 20, "idx_end": 40}'}), "are a text; they must be an object"),
        (f'{{"name": "{TOOL_NAME}", "arguments": {{"idx_start": 20, "idx_end": 40, "idx_end": 90}}}}', "names a key twice"),
        (f'{{"name": "crop", "name": "{TOOL_NAME}", "arguments": {{"idx_start": 20, "idx_end": 40}}}}', "names a key twice"),
        (json.dumps({"name": TOOL_NAME, "arguments": {"idx_start": 20}}), "nothing else"),
        (json.dumps({"name": TOOL_NAME, "arguments": {"idx_start": 20, "idx_end": 40, "fps": 2}}), "nothing else"),
        (json.dumps({"name": TOOL_NAME, "arguments": {"idx_start": 20, "idx_end": 40}, "id": 1}), "nothing else"),
    ],
)  # fmt: skip
def test_a_malformed_call(written, why):
    action = parse(f"{THINK}<tool_call>{written}</tool_call>", 100)
    assert action.kind == "bad_call" and why in action.error and action.window is None


@pytest.mark.parametrize(
    "value",
    ["true", "false", "20.0", '"20"', "null", "NaN", "Infinity", "-Infinity", "2e1", "[20]", "{}"],
)
def test_indices_are_integers(value):
    for text in (call(value, 40), call(20, value)):
        action = parse(text, 100)
        assert (
            action.kind == "bad_call" and action.error == "idx_start and idx_end must be integers"
        )


@pytest.mark.parametrize(
    "start, end",
    [(-1, 40), (20, 100), (100, 200), (40, 20), (30, 30), (-9, -1), (0, 10**400), (-(10**400), 50)],
)
def test_an_interval_inside_the_video(start, end):
    action = parse(call(start, end), 100)
    assert (
        action.kind == "bad_call"
        and "inside 0 to 99" in action.error
        and action.window == (start, end)
    )


def test_digits_beyond_what_python_reads():
    assert parse(call(0, "9" * 5000), 100).kind == "bad_call"


def test_windows_of_eight_frames_or_fewer_are_refused():
    assert MIN_WINDOW == 9
    assert parse(call(20, 28), 100).kind == "tool"
    action = parse(call(20, 27), 100)
    assert action.kind == "bad_call" and "at least 9 frames" in action.error
    assert parse(call(0, 7), 8).kind == "bad_call"


def test_a_repeated_interval_is_refused_and_named():
    action = parse(GOOD, 100, asked=((0, 20), (20, 40)))
    assert action.kind == "bad_call" and action.window == (20, 40)
    assert action.error.startswith("frames 20 to 40 were already returned")
    assert parse(GOOD, 100, asked=((0, 20), (20, 41))).kind == "tool"


def test_no_tool_offered():
    action = parse(GOOD, 100, allow_tool=False)
    assert (action.kind, action.error) == ("invalid", "no tool was offered")
    assert parse(THINK + "<answer>B</answer>", 100, allow_tool=False).kind == "answer"


def test_written_calls_are_read_again():
    for start, end in ((0, 8), (5, 99), (91, 99)):
        assert parse(THINK + tool_call(start, end), 100).window == (start, end)


def test_reasoning_is_shown_even_of_broken_turns():
    assert split_think(THINK + "<answer>B</answer>") == ("the score changes.", "<answer>B</answer>")
    assert split_think("<answer>B</answer>") == ("", "<answer>B</answer>")


def test_no_mutation_raises():
    """What comes back is always one of four kinds, and an action always carries what its kind
    promises."""
    rng = random.Random(0)
    seeds = [
        GOOD,
        call(3, 50),
        THINK + "<answer>B</answer>",
        call("true", '"x"'),
        THINK + "<answer>\n</answer>",
    ]
    parts = '<think> </think> <tool_call> </tool_call> <answer> </answer> { } " : , [ ] \\ \\u 0 -1 1e999 NaN null true <|im_end|>'.split()
    parts += ["\x00", "\ud800", "é", "\n", " ", "idx_start", "name", "9" * 30]
    kinds = set()
    for _ in range(4000):
        text = rng.choice(seeds)
        for _ in range(rng.randrange(1, 5)):
            a, b = sorted(rng.choices(range(len(text) + 1), k=2))
            b = min(b, a + rng.randrange(12))
            text = (
                text[:a]
                + rng.choice(["", rng.choice(parts), text[a:b] * 2, text[a:b][::-1]])
                + text[b:]
            )
        action = parse(
            text, rng.choice([1, 9, 100]), asked=((20, 40),), allow_tool=rng.random() < 0.9
        )
        kinds.add(action.kind)
        assert (action.error is None) == (action.kind in ("tool", "answer")), text
        assert action.kind != "answer" or action.answer
        if action.kind == "tool":
            assert type(action.window[0]) is int and 0 <= action.window[0] < action.window[1] < 100
    assert kinds == {"tool", "answer", "bad_call", "invalid"}


# The syntax of the paper's first version, and another reward's rules.


@pytest.mark.parametrize(
    "call, window, error",
    [
        ('{"action": "choose_frames", "frame_range": [20, 40]}', (20, 40), None),
        ('{"frame_range": [20, 40], "action": "choose_frames"}', (20, 40), None),
        ('{"action": "choose_frames", "frame_range": [40, 20]}', (40, 20), "inside 0 to 99"),
        ('{"action": "choose_frames", "frame_range": [20, 25]}', (20, 25), "at least 9 frames"),
        ('{"action": "choose_frames", "frame_range": [20, 40.0]}', None, "integers"),
        ('{"action": "choose_frames", "frame_range": [20, true]}', None, "integers"),
        ('{"action": "choose_frames", "frame_range": [20]}', None, "nothing else"),
        ('{"action": "choose_frames", "frame_range": "20-40"}', None, "nothing else"),
        ('{"action": "choose_frames", "frame_range": {"a": 1}}', None, "nothing else"),
        ('{"action": "choose_frames"}', None, "nothing else"),
        ('{"action": "choose_frames", "frame_range": [20, 40], "fps": 2}', None, "nothing else"),
        ('{"action": "zoom", "frame_range": [20, 40]}', None, "the only tool is choose_frames"),
        ("[20, 40]", None, "the only tool is choose_frames"),
        ("20, 40", None, "not valid JSON"),
    ],
)
def test_the_first_versions_call(call, window, error):
    action = parse(f"{THINK}<tool_call>{call}</tool_call>", 100, syntax=V1_NAME)
    assert action.kind == ("bad_call" if error else "tool") and action.window == window
    assert error is None or error in action.error


def test_each_syntax_refuses_the_other():
    for syntax, other in ((TOOL_NAME, V1_NAME), (V1_NAME, TOOL_NAME)):
        assert parse(THINK + tool_call(20, 40, syntax), 100, syntax=syntax).window == (20, 40)
        refused = parse(THINK + tool_call(20, 40, other), 100, syntax=syntax)
        assert refused.kind == "bad_call" and refused.error == f"the only tool is {syntax}"


@pytest.mark.parametrize(
    "window, near, kind",
    [
        ((20, 40), 0, "bad_call"), ((21, 40), 0, "tool"), ((21, 40), 1, "bad_call"), ((19, 41), 1, "bad_call"),
        ((22, 40), 1, "tool"), ((20, 42), 1, "tool"), ((18, 38), 1, "tool"),
    ],
)  # fmt: skip
def test_a_window_moved_by_a_frame_is_a_repeat_where_that_is_the_rule(window, near, kind):
    action = parse(THINK + tool_call(*window), 100, ((20, 40),), near=near)
    assert action.kind == kind and (
        kind == "tool" or "frames 20 to 40 were already" in action.error
    )


@pytest.mark.parametrize(
    "length, min_window, kind", [(8, 8, "tool"), (7, 8, "bad_call"), (8, 9, "bad_call")]
)
def test_the_shortest_window_is_a_rule_too(length, min_window, kind):
    action = parse(THINK + tool_call(20, 19 + length), 100, min_window=min_window)
    assert action.kind == kind
