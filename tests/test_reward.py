"""The reward is the paper's equation (v1), branch by branch; accuracy reads answers as people write
them."""

import pytest
import torch

from nanosport.env.reward import format_valid, gated_reward
from nanosport.env.scoring import accuracy
from nanosport.records import Episode, Question, Turn
from nanosport.train.variants import VARIANTS, group_advantages, token_scale

CHOICE = Question("q", "v", "soccer", "recognition", "How?", ("a header", "volley", "tap-in"), "B")
OPEN = Question("q", "v", "soccer", "commentary", "Call it.", (), "red 7 volley")
LOOK = Turn("", "tool", (0, 20), (0, 10, 20))
LATE = Turn("", "tool", (0, 20), ())  # a valid call in the last turn: nothing came back
BAD = Turn("", "bad_call", (5, 6), (), "the interval must span at least 9 frames")
REPEAT = Turn(
    "",
    "bad_call",
    (0, 20),
    (),
    "frames 0 to 20 were already returned; ask for another interval or answer",
)
SAY = Turn("", "answer")


def episode(answer, *turns, question=OPEN, status="answered", overview=(0, 40, 80)) -> Episode:
    frames = (*overview, *(index for turn in turns for index in turn.frames))
    return Episode(question, (), (), (), frames, turns, status, answer)


def look(*frames: int) -> Turn:
    return Turn("", "tool", (frames[0], frames[-1]), frames)


@pytest.mark.parametrize(
    "looks, num_new, total",
    [
        ([(0, 10, 20)], 2, 1.5),
        ([(0, 40, 80)], 0, 1.0),  # the overview once more
        ([(1, 40, 80)], 0, 1.0),  # the overview, moved by a frame
        ([(1, 41, 79)], 0, 1.0),
        ([(0, 39, 79)], 0, 1.0),
        ([(2, 41, 80)], 2, 1.5),
        ([(0, 80)], 0, 1.0),  # a part of what was seen
        ([(0, 40)], 0, 1.0),
        ([(0, 10, 20), (1, 11, 21)], 2, 1.5),  # a window moved by a frame adds nothing
        ([(0, 40, 80), (0, 10, 20)], 2, 1.5),  # but a later look may
        ([(0, 10, 20), (10, 15, 20)], 3, 1.5),
    ],
)
def test_a_look_earns_by_a_frame_not_seen_before(looks, num_new, total):
    made = episode("red 7 volley", *(look(*frames) for frames in looks), SAY)
    reward = gated_reward(made, acc=1.0)
    assert (reward.new_frames, reward.total, reward.used_tool) == (num_new, total, 1.0)
    wrong = gated_reward(made, acc=0.0)
    assert wrong.total == (0.03 if num_new else 0.0)


@pytest.mark.parametrize(
    "acc, answer, turns, status, total",
    [
        # valid format, no tool: R = acc
        (1.0, "red 7 volley", (SAY,), "answered", 1.0),
        (0.0, "blue 3", (SAY,), "answered", 0.0),
        (2 / 3, "red 7 header", (SAY,), "answered", 2 / 3),
        # tool and acc ≥ 0.5: R = acc + 0.5·acc
        (1.0, "red 7 volley", (LOOK, SAY), "answered", 1.5),
        (1.0, "red 7 volley", (LOOK, LOOK, SAY), "answered", 1.5),
        (2 / 3, "red 7 header", (LOOK, SAY), "answered", 1.0),
        (0.5, "red", (LOOK, SAY), "answered", 0.75),
        # tool and acc < 0.5: R = acc + 0.03
        (0.0, "blue 3", (LOOK, SAY), "answered", 0.03),
        (0.4, "red x", (LOOK, SAY), "answered", 0.43),
        # invalid format: R = −0.05, whatever the answer and the tool
        (1.0, "red 7 volley", (BAD, SAY), "answered", -0.05),
        (1.0, "red 7 volley", (LOOK, REPEAT, SAY), "answered", -0.05),
        (0.0, None, (Turn("", "invalid", error="no action"),), "format_error", -0.05),
        (0.0, None, (LOOK, LOOK), "out_of_turns", -0.05),
        (0.0, None, (LATE,), "out_of_turns", -0.05),
        (0.0, None, (LOOK,), "out_of_tokens", -0.05),
    ],
)
def test_the_equation(acc, answer, turns, status, total):
    made = episode(answer, *turns, status=status)
    reward = gated_reward(made)
    assert reward.accuracy == pytest.approx(acc) and reward.total == pytest.approx(total)
    assert reward.format == format_valid(made) == (total != -0.05)
    used = any(t is LOOK for t in turns)
    assert reward.new_frames == (2 if used else 0)
    assert reward.used_tool == used and (reward.tool > 0) == used
    if reward.format:
        assert reward.total == reward.accuracy + reward.tool


@pytest.mark.parametrize(
    "said",
    [
        "B",
        "(B)",
        "B.",
        "B)",
        "B:",
        " B ",
        "(B) volley",
        "B volley",
        "B. volley",
        "B: volley",
        "volley",
        "Volley.",
        "the volley",
    ],
)
def test_a_right_choice(said):
    assert accuracy(said, CHOICE) == 1.0


@pytest.mark.parametrize(
    "said",
    [
        None,
        "",
        " ",
        "A",
        "(A)",
        "C. volley",
        "J",
        "b",
        "header",
        "A header",
        "tap in",
        "Because",
        "Both",
        "volley header",
        "?",
    ],
)
def test_a_wrong_choice(said):
    assert accuracy(said, CHOICE) == 0.0


def test_an_article_is_no_letter_and_a_letter_no_article():
    dig = Question("q", "v", "volleyball", "recognition", "How?", ("spike", "dig"), "A")
    assert accuracy("A", dig) == accuracy("A spike", dig) == accuracy("a spike", dig) == 1.0
    assert accuracy("A dig", dig) == 0.0
    crossed = Question("q", "v", "s", "rules", "Which court?", ("B", "A"), "A")
    assert accuracy("A", crossed) == accuracy("(A) B", crossed) == 1.0
    assert accuracy("B", crossed) == 0.0


@pytest.mark.parametrize(
    "said, f1",
    [
        ("red 7 volley", 1.0),
        ("The Red, 7: VOLLEY!", 1.0),
        ("volley 7 red", 1.0),
        ("red", 0.5),
        ("red 7 header", 2 / 3),
        ("red red red", 1 / 3),
        ("blue 3 header", 0.0),
        ("", 0.0),
        ("the", 0.0),
    ],
)
def test_open_answers_score_by_words(said, f1):
    assert accuracy(said, OPEN) == pytest.approx(f1)


@pytest.mark.parametrize("variant", VARIANTS)
def test_advantages(variant):
    rewards = [1.5, 0.03, -0.05, 1.0, 0.0, 1.0, 1.0, 0.0]
    got = group_advantages(rewards, 4, variant).view(2, 4).double()
    for group, advantages in zip((rewards[:4], rewards[4:]), got):
        r = torch.tensor(group, dtype=torch.float64)
        std = ((r - r.mean()) ** 2).mean() ** 0.5
        wanted = r - r.mean() if variant == "dr_grpo" else (r - r.mean()) / (std + 1e-4)
        assert torch.allclose(advantages, wanted, atol=1e-6)
        assert abs(advantages.sum()) < 1e-5


@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("size", [2, 3, 5, 6, 7, 8])
@pytest.mark.parametrize("reward", [0.0, 1.5, 1.53, 0.1, -0.05, 2 / 3])
def test_equal_rewards_teach_nothing(variant, size, reward):
    """Divided by eps, the rounding of a float32 mean would be an advantage of 1e-3."""
    assert group_advantages([reward] * size, size, variant).abs().max() < 1e-8


def test_token_scales():
    lengths, limit = [3, 10, 1, 50], 64
    scales = {
        v: [token_scale(v, n, len(lengths), sum(lengths), limit) for n in lengths] for v in VARIANTS
    }
    weight = {v: [s * n for s, n in zip(scales[v], lengths)] for v in VARIANTS}  # of whole episodes
    assert weight["grpo"] == pytest.approx([1 / 4] * 4)
    assert scales["dapo"] == pytest.approx([1 / 64] * 4) and sum(weight["dapo"]) == pytest.approx(1)
    assert scales["dr_grpo"] == pytest.approx([1 / 256] * 4) and sum(
        weight["dr_grpo"]
    ) == pytest.approx(64 / 256)


def test_a_reward_of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'v3': must be v1 or v2"):
        gated_reward(episode("red 7 volley", LOOK, SAY), version="v3")
