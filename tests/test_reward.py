"""The reward is the paper's equation (v1), branch by branch; accuracy reads answers as people write
them."""

import json
import re
import time
from collections import Counter
from dataclasses import asdict, replace

import pytest
import torch

from data_prep import arena
from nanosport.env.reward import (
    Reward,
    RewardError,
    flat_groups,
    format_valid,
    gated_reward,
    reward_function,
)
from nanosport.env.scoring import accuracy
from nanosport.records import Episode, Question, Turn, parse_question
from nanosport.train.rollouts import Rollouts
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
        "b",
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
        ("volley 7 red", 1 / 6),  # all of its words, in another order
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


SHOTS = ("header", "tap-in", "volley")
YES = ("yes", "no")
TEN = tuple("one two three four five six seven eight nine ten".split())
CALLS = ("offside", "foul", "corner kick", "goal kick")
SIDES = ("the home team", "the away team", "neither team")
CALL, CARD = "Call it.", "Which card did the official show?"
AS_A_PERSON_SAYS = {
    "a letter, however it is wrapped": [
        ("choice", "B", SHOTS, said, 1)
        for said in (
            "B|(B)|B.|B)|b|(b)|**B**|*B*|__B__|`B`|'B'|\"B\"|“B”|«B»|‘B’|B!|[B]|{B}|<B>|【B】|「B」|\\boxed{B}|"
            "$B$|Option B|option (B)|OPTION B.|Answer: B|The answer is B|The answer is (b).|"
            "The correct answer is: B.|It's b|I think B|I'd say B|My choice: B|B it is|B, I think|"
            "Ｂ|Ｂ．|（Ｂ）|选B|选 B|答案是B|答案：B。|B。|B、|\\text{B}|B\n|Final answer:\n\n**B**"
        ).split("|")
    ],
    "a letter with its own text": [
        ("choice", "B", SHOTS, said, 1)
        for said in (
            "B - tap-in|B – tap-in|B — tap in|B: tap-in|B：tap-in|B) tap-in|(B) tap-in|B.tap-in|"
            "B tap-in|b) a tap-in|B (tap-in)|tap-in (B)|The tap-in, so B"
        ).split("|")
    ],
    "an option's text, however it is said": [
        ("choice", "B", SHOTS, said, 1)
        for said in (
            "tap-in|Tap-in.|tap in|tapin|TAP‑IN|a tap-in|“tap-in”|It was a tap-in|"
            "He scored with a tap-in, from close range|It was not a header but a tap-in"
        ).split("|")
    ],
    "what is denied is not said": [
        ("choice", "B", SHOTS, "B, not A", 1),
        ("choice", "B", SHOTS, "A is wrong, so B", 1),
        ("choice", "A", SHOTS, "B is wrong, A", 1),
        ("choice", "B", YES, "No, he did not", 1),
        ("choice", "B", SHOTS, "Neither A nor C, so B", 1),
        ("choice", "B", SHOTS, "It can't be B", 0),
        ("choice", "B", SHOTS, "I don’t think it's option B", 0),
        ("choice", "B", SHOTS, "Not B", 0),
        ("choice", "B", SHOTS, "not the tap-in", 0),
        ("choice", "B", SHOTS, "It isn't B", 0),
        ("choice", "B", SHOTS, "It isn’t option B", 0),
        ("choice", "B", SHOTS, "B is wrong", 0),
        ("choice", "B", SHOTS, "B is wrong, C", 0),
        ("choice", "B", SHOTS, "neither A nor B", 0),
        ("choice", "B", SHOTS, "不是B", 0),
        *(("choice", "B", SHOTS, said, 0) for said in (
            "anything but B|all but B|A instead of B|except B|everything except B|wrong: B|I rule out B|"
            "B can be excluded|B is unlikely|Cannot be B|cannot be option B|I doubt it is B|B is impossible|"
            "It is not true that it is B|the answer is not B|B cannot be"
        ).split("|")),
        ("choice", "A", SHOTS, "A instead of B", 1),
        ("choice", "A", SHOTS, "A, except B", 1),
        ("choice", "B", SHOTS, "A B", 0),
        ("choice", "B", SHOTS, "A B C", 0),
        ("choice", "A", ("in the net", "out"), "It is not true that it is in the net", 0),
    ],
    "a letter in other dress": [
        ("choice", "B", SHOTS, said, 1)
        for said in (
            "ⓑ|⒝|option_b|OptionB|{\"answer\": \"B\"}|<b>B</b>|La respuesta es B|Antwort: B|$\\boxed{\\text{B}}$|"
            "B is correct|Option B is correct because he taps it in|Letter B|B\n\nExplanation: he taps it"
        ).split("|")
    ],
    "who hedges says nothing": [
        ("choice", "B", SHOTS, said, 0)
        for said in (
            "A or B|B or C|B and C|(a) and (b)|a and b|A, B, C|B, C|B C|B/C|A|BC|Best: C|B or not B|"
            "Both A and B|both|neither|B volley|B: volley|C tap-in|tap-in or volley|B or something|"
            "header, tap-in, volley|选B或C|...|()|I cannot tell|Because"
        ).split("|")
    ],
    "an article or a pronoun is no letter": [
        ("choice", "A", SHOTS, "A player hits it", 0),
        ("choice", "A", SHOTS, "A clear winner", 0),
        ("choice", "A", SHOTS, "A tap-in", 0),
        ("choice", "A", SHOTS, "a", 1),
        ("choice", "A", SHOTS, "It's a.", 1),
        ("choice", "A", SHOTS, "A because he jumps", 1),
        ("choice", "A", SHOTS, "A is right", 1),
        ("choice", "I", TEN, "I cannot tell", 0),
        ("choice", "I", TEN, "I'm not sure", 0),
        ("choice", "I", TEN, "İ foo", 0),
        ("choice", "I", TEN, "I", 1),
        ("choice", "I", TEN, "Option I.", 1),
        ("choice", "D", SHOTS + ("lob",), "He'd lobbed it", 0),
        ("choice", "B", SHOTS, "Bö", 0),
    ],
    "options that look alike are told apart": [
        ("choice", "A", (">3", "<3"), ">3", 1),
        ("choice", "A", (">3", "<3"), "<3", 0),
        ("choice", "A", (">3", "<3"), "3", 0),
        ("choice", "A", ("3:2", "3-2"), "3:2", 1),
        ("choice", "A", ("3:2", "3-2"), "3-2.", 0),
        ("choice", "A", ("3:2", "3-2"), "three to two", 0),
        ("choice", "A", ("2-1", "1-2"), "two to one", 1),
        ("choice", "B", ("the", "a"), "the", 0),
        ("choice", "B", ("3", "-3"), "-3", 1),
        ("choice", "B", ("3", "-3"), "3", 0),
        ("choice", "A", ("drop shot", "drop"), "It is a drop shot", 1),
        ("choice", "B", ("drop shot", "drop"), "It is a drop shot", 0),
        ("choice", "B", ("drop shot", "drop"), "A drop", 1),
        ("choice", "A", ("drop shot", "drop"), "dropshot", 1),
        ("choice", "A", ("Team B", "Team A"), "It was team B", 1),
        ("choice", "B", ("B", "A"), "(B) A", 1),
        ("choice", "A", ("red card", "red"), "red", 0),
    ],
    "in other scripts": [
        ("choice", "A", ("café", "bar"), "cafe\u0301", 1),
        ("choice", "A", ("扣杀", "吊球"), "扣杀。", 1),
        ("choice", "A", ("扣杀", "吊球"), "这是扣杀", 1),
        ("choice", "A", ("扣杀", "吊球"), "吊球", 0),
        ("choice", "A", YES, "Ｙｅｓ", 1),
        ("choice", "A", YES, "\ufeffyes\u200b", 1),
    ],
    "a number as people write it": [
        ("number", truth, (), said, 1)
        for truth, answers in {
            "3": "3|3.|+3|three|Three.|3rd|**3**|(3)|３|3 (three)|3, so 3|about 3|3 goals|3kg|三3",
            "-3": "-3|−3|–3|minus three|negative 3|minus 3|answer:-3",
            "0": "0|-0|zero|0.0|nil",
            "4": "fourth|the 4th|四|4次",
            "12": "a dozen|1 dozen|十二|twelfth",
            "100": "a hundred|one hundred|100%|一百",
            "120": "one hundred and twenty|one hundred twenty|2 minutes|2:00",
            "2": "twice|second|two times|2nd|两次",
            "1": "once|first|one second|a total of one",
            "2500": "2.5k|two thousand five hundred|twenty-five hundred|2,500",
            "3.2": "three point two|3,2|degree of difficulty: 3.2",
            "2.5": "two and a half|2½",
            "3600": "1 hour|1h|60 min|1:00:00",
            "10": "10|10.|#10|No. 10|no. 10|\\boxed{10}|$10|１０",
            "9.5": "9.5|9,5|9.5/10|9,5 / 10|9.5 out of 10|9.5 out of ten|9½|9.50 points",
            "0.5": ".5|½|1/2|0,5|50%|50 percent",
            "50": "50%|50 %|fifty",
            "1234": "1,234|1 234|1 234|1\u202f234|1'234|1’234|1234.0|1.234,0",
            "1234.5": "1,234.5|1.234,5|1 234,5|1234.5|1234,5",
            "1000": "1e3|1k|1,000|one thousand|1 000",
            "21": "twenty-one|twenty one|21st",
            "90": "90|1:30|1.5 min|1,5 minutes|1 min 30 s|1m30s|01:30",
            "1.5": "1.5 min|1.5",
        }.items()
        for said in answers.split("|")
    ],
    "another number, or none": [
        ("number", truth, (), said, 0)
        for truth, answers in {
            "3": "−3|-3|not 3|more than 3|less than three|at least 3|over 3|>3|3+|3 or more|up to 3|≥ 3|between 3 and 4|3 or 4|"
            "3-4|3–4|3/5|x3|v3|3:2|2:3|3.5.1|none|no one|3 of 5|",
            "4": "isn't 4|minimum 4|maximum 4|4 dozen|half of 4|4 < x|4 hundred|no idea|fourteen|forty",
            "7": "one two three four five six seven|not seven|seven or eight|七十",
            "0": "no|none|nothing to see|never mind|one or none",
            "95": "9,5|9 5",
            "123": "1,2,3|1 23|12 3",
            "1234": "12,34|1.234",
            "10": "10k|10 thousand|1e10|ten million",
            "1": "no one|one hundred|one to two|1⁄2",
            "2": "2:0|2½",
            "90": "1:3|1:90",
        }.items()
        for said in answers.split("|")
    ],
    "a span of time": [
        ("span", "12-15", (), said, 1)
        for said in (
            "12-15|12–15|12 — 15|12−15|00:12-00:15|0:12 – 0:15|00:00:12 to 00:00:15|12 to 15|12 s to 15 s|"
            "from 12 to 15 seconds|From 12s until 15s.|between 12 and 15|[12, 15]|[12,15]|(12.0, 15.0)|"
            "12,0-15,0|12～15|12 ~ 15 sec|The rally is from 12 to 15 seconds.|0.2 min - 0.25 min|"
            "0.2-0.25 min|starts at 12 s, ends at 15 s|12秒到15秒|从12秒至15秒|１２－１５|"
            "twelve to fifteen|**12-15**|12 through 15|from second 12 to second 15|12th to 15th second|t=12 to t=15|"
            "00:00:12,000 --> 00:00:15,000|from 12 seconds up to 15 seconds|12 bis 15|de 12 a 15|12 → 15|12..15|"
            "start_time: 12, end_time: 15|{\"start\": 12, \"end\": 15}|<12, 15>"
        ).split("|")
    ],
    "a span of minutes": [
        ("span", "75-90", (), said, 1)
        for said in "1:15-1:30|1'15-1'30|1m15s-1m30s|1.25-1.5 min|1 min 15 s - 1 min 30 s".split("|")
    ],
    "another span, or none": [
        ("span", "12-15", (), said, score)
        for said, score in {
            "15-12": 0, "12": 0, "at 13": 0, "not 12-15": 0, "12-15 and 20-30": 0, "12 or 15": 0,
            "1-2-3": 0, "12:15": 0, "": 0, "12-18": 0.5, "13.5-16.5": 1.5 / 4.5, "20-30": 0,
            "12-15 min": 0, "12 s": 0, "-12-15": 0, "0-1000": 3 / 1000, "the whole clip": 0, "nan-nan": 0,
        }.items()
    ],
    "one moment, with a tolerance": [
        ("span", "12-12", (), said, score)
        for said, score in {
            "12-12": 1, "11.9-12.1": 1, "12": 1, "at 12.4 s": 1, "0:12": 1, "11.5-12.5": 1, "0.2 min": 1,
            "11.4-12.4": 0, "12.6": 0, "10-14": 0, "13": 0, "12-13": 0, "none": 0,
        }.items()
    ],
    "an open answer": [
        ("open", truth, question, said, 1)
        for truth, question, answers in [
            ("yellow", CARD, "yellow|Yellow!|It was yellow|the yellow card|The official did show yellow"),
            ("2-1", CALL, "2-1|2:1|2 – 1|2 to 1|two to one|Two to one."),
            ("1,234.5 points", CALL, "1234.5 points|1234,5 points"),
            ("didn't foul", CALL, "did not foul|didn’t foul"),
            ("Red's volley", CALL, "red volley|RED VOLLEY"),
            ("扣杀得分", CALL, "扣杀得分。|扣杀 得分"),
            ("by her", CALL, "by her|By her."),
            ("9.5", CALL, "9.5|9,5|9.50|Nine point five"),
            ("3", CALL, "3|3.0|three"),
            ("50%", CALL, "50%|50 percent|fifty percent"),
            ("ﬁnal ５", CALL, "final 5"),
            ("スマッシュ", CALL, "ｽﾏｯｼｭ|スマッシュ。"),
            ("yes", CALL, "Yes, he did"),
        ]
        for said in answers.split("|")
    ],
    "order, signs and denials count": [
        ("open", "2-1", CALL, "1-2", 0),
        ("open", "-1", CALL, "1", 0),
        ("open", "1", CALL, "-1", 0),
        ("open", ">3", CALL, "<3", 0),
        ("open", "left to right", CALL, "right to left", 1 / 6),
        ("open", "red beats blue", CALL, "blue beats red", 1 / 6),
        ("open", "yellow card", CALL, "not yellow card", 0.8 * 2 / 3 / 2),
        ("open", "no goal", CALL, "goal", 1 / 3),
        ("open", "?", CALL, "!", 0),
        ("open", "7 passes to 10", CALL, "10 passes to 7", 1 / 4),
        ("open", "before the break", CALL, "after the break", 1 / 4),
        ("open", "more than 3", CALL, "less than 3", 1 / 3),
        ("open", "the ball went in", CALL, "the ball went out", 1 / 3),
        ("open", "red beats blue", CALL, "red or blue", 1 / 3),
        ("open", "yellow card", CALL, "hardly a yellow card", 0.8 * 2 / 3 / 2),
        ("open", "扣杀", CALL, "杀扣", 1 / 4),
        ("open", "red 7 volley", CALL, "red 7 tap-in", 4 / 7),
    ],
    "a choice in other words": [
        ("choice", letter, options, said, 1)
        for letter, options, answers in [
            ("B", CALLS, "B. Foul|Foul|It's a foul|This is clearly a foul.|**Answer: B. foul**|Choice (B)|#B|B ✓|✅ B|→ B|- B|• B|"
             "Réponse : B|我选择B|正确答案是：B|B选项|选项B|My final answer is option B.|B since he trips him|Definitely B|Ans: B|"
             "$\\boxed{B}$|\\boxed{\\text{B. foul}}|<answer>B</answer>|B, because of the trip|The referee gives a foul|No, foul.|No: B"),
            ("D", CALLS, "not B but D|D not B|D (not B)|goal kick rather than foul|Instead of foul, goal kick|a goal kick, not a corner kick|"
             "Goal-kick|goalkick|D rather than B|goal kick (D)"),
            ("A", CALLS, "A. offside|(A) offside|a: offside|A) Offside|offside, no foul|Offside without any foul|A, no B"),
            ("A", YES, "Yes, it is|yes it was|Yes — the ball crossed the line|Yes, not offside|(A) Yes|A. Yes"),
            ("B", YES, "No!|No, there was no foul|no, not at all|No. The ball is out.|(B) No|NO"),
            ("A", ("true", "false"), "It is true|That's true.|TRUE"),
            ("A", SIDES, "home team|the home team wins|home team, not the away team"),
            ("C", SIDES, "neither team|Neither team.|It was neither team"),
            ("B", ("left", "right"), "right, not left|on the right|not left but right|not on the left but on the right"),
            ("A", ("A-side", "B-side"), "A-side|a-side|A side|the A-side"),
            ("A", ("a serve", "a smash"), "serve|A serve|(A) a serve|A: a serve|A. serve"),
            ("B", ("a serve", "a smash"), "smash|A smash|It's a smash"),
            ("C", ("1", "2", "3", "4"), "3|three|C. 3|C) three|It is 3|3 players"),
        ]
        for said in answers.split("|")
    ],
    "a choice that is none, or another": [
        ("choice", letter, options, said, 0)
        for letter, options, answers in [
            ("B", CALLS, "no foul|It was no foul|there is no foul|without a foul|without any foul|no B|A. foul|A: foul|(A) foul|A, foul|a) foul|"
             "C - foul|B: offside|(B) offside|B) goal kick|A foul is not shown; it is offside|B... no, C|B, no wait, D|foul? no: offside|"
             "either B or C|probably B, possibly C|B? C?|foul/offside|All of them|all of the above|B is false|B isn't right|Unlike B, C|"
             "rather A than B|First I thought B, but it is C|ABCD|A-D|between A and C|E|N/A|It could be any|fou|f"),
            ("D", CALLS, "kick|corner kick or goal kick|not a goal kick|no goal kick"),
            ("A", YES, "Yes and no|yes or no|Yes/No|not yes|no yes|Maybe"),
            ("B", YES, "not no|I know|now|nothing|yes"),
            ("A", ("true", "false"), "not true|It is not true|untrue|isn't true|True or false"),
            ("A", SIDES, "both teams|home and away|the home team or the away team|not the home team|team"),
            ("A", ("left", "right"), "left or right|left to right|not on the left|not to the left|not at left|left/right"),
            ("A", ("a serve", "a smash"), "A smash|(A) a smash|A. a smash|A: smash"),
            ("C", ("1", "2", "3", "4"), "3 or 4|2-3|33|3.5|more than 3|1 2 3 4|B. 3|3, 4"),
        ]
        for said in answers.split("|")
    ],
    "another number, in other words": [
        ("number", truth, (), said, score)
        for truth, score, answers in [
            ("7", 1, "7 of them|exactly 7|~7|≈7|= 7|７|٧|७|共7次|7 in total|seven (7)|7x|There are 7."),
            ("7", 0, "no more than 7|fewer than 7|7:00|7/2|7e1|<7|≤7|seven eight|7...8|#7 and #8|7*2|7^2|2 x 7|seventeen|٧٠"),
            ("0", 0, "٧|७"),
            ("2.5", 1, "2 1/2|2 1/2 points|5/2|2.5 m|two and a half"),
            ("2.5", 0, "21/2|1 2 1/2|2 1/2/3|2.05|2 5|2-5"),
            ("3.75", 1, "3 3/4"),
            ("88.4", 1, "88.4/100|88,40|eighty-eight point four|Score: 88.4"),
            ("88.4", 0, "884|8.84|88.4.1|88-4"),
            ("75", 1, "1 minute and 15 seconds|0:01:15|75secs|seventy-five seconds"),
            ("75", 0, "1:75|115|1.15|1 min 5 s"),
        ]
        for said in answers.split("|")
    ],
    "in scripts whose vowels and tones are marks": [
        ("open", truth, CALL, said, score)
        for truth, score, answers in [
            ("जीत", 1, "जीत|जीत।"),
            ("जीत", 0, "जात|जूत|जत"),
            ("लाल कार्ड", 1, "लाल कार्ड।"),
            ("เสื้อ", 0, "เสือ"),
            ("ลูกวอลเลย์", 1, "ลูกวอลเลย์."),
            ("بطاقة صفراء", 1, "بِطاقة صفراء"),
            ("10वीं", 0, "10वा"),
        ]
        for said in answers.split("|")
    ]
    + [
        ("choice", "A", ("जात", "जीत"), "यह जात है", 1),
        ("choice", "B", ("जात", "जीत"), "यह जात है", 0),
    ],
    "fractions and large numbers": [
        ("number", truth, (), said, score)
        for truth, score, answers in [
            ("0.75", 1, "three quarters|three-quarters|three fourths|3 quarters|Three quarters of it."),
            ("0.5", 1, "one half|a half|one-half"),
            ("2.5", 1, "2 and a half|two and one half|two-and-a-half"),
            ("3.25", 1, "three and a quarter|3 and a quarter"),
            ("-0.5", 1, "minus a half"),
            ("0.1", 1, "a tenth|one tenth"),
            ("3", 0, "three quarters|a third|one third|three halves|three and a quarter|three hundredths|3 tenths|三半|"
             "3万|3千|三千|三百|3百|3亿|3 billion|3萬|三分之一|九点三|3 and a half"),
            ("1", 0, "一千|一万|one half|a tenth|1 point and a half|一〇一"),
            ("3", 1, "the third|三|three quarter-finals"),
            ("1000", 1, "一千|千|1千"),
            ("35000", 1, "3.5万|三万五千"),
            ("200000", 1, "二十万|20万|二十萬"),
            ("101", 1, "一百零一|一〇一"),
        ]
        for said in answers.split("|")
    ],
    "a bound stands before or after its number": [
        ("number", "7", (), said, 0)
        for said in (
            "7 at most|7 at least|7 goals at most|7, at least|7 (at most)|7 plus|7 or higher|7 and up|7 or above|7 goals or more|"
            "7 and over|7 or below|7 maximum|7 max|7 players minimum|upwards of 7|至少7|最多七|不是7|没有7|不到七|超过7|少于7|7以上|7个以下|7-plus|7-or-more|a minimum of 7|max 7|at least about 7|7 at a minimum|7 and fewer|not 7, at most 7"
        ).split("|")
    ]
    + [("number", "7", (), said, 1) for said in "7 up front|7 and no more|7 minutes|7 at the break".split("|")],
    "a number of ten, and one that is not another": [
        ("number", truth, (), said, score)
        for truth, score, answers in [
            ("9.5", 1, "9.5 (out of 10)|9.5 points out of 10|9.5/10.0|9.5 (out of ten).|9.5/100.0"),
            ("9.5", 0, "9.5/10.5|9.5 out of 10 or 11|9.5/11|9 out of 9.5"),
            ("3", 1, "3, not 4|3 (not 4)|three, not two|3 rather than 4|3 instead of 2"),
            ("4", 0, "3, not 4|not 3 or 4|not 4, 3"),
            ("3", 0, "not 3 or 4|not 3, not 4|more than 3, not 4|3 or 4, not 5|3 4"),
            ("135", 1, "2分15秒|两分十五秒|2分钟15秒"),
        ]
        for said in answers.split("|")
    ],
    "a letter that is a name is no option's": [
        ("choice", letter, options, said, score)
        for letter, options, score, answers in [
            ("B", ("Team B wins", "Team A wins"), 1, "Team A|It's team A|Team A wins|team a wins|B|(B)|B. Team A wins|Team-A"),
            ("A", ("Team B wins", "Team A wins"), 0, "Team A|It's team A|Team A wins|team A won|team|wins|B"),
            ("C", ("Player C", "Player A", "Player B"), 1, "Player B|it is player B|C: Player B"),
            ("A", ("Player A", "Player B"), 0, "player|Player|player B"),
            ("C", ("A header", "a volley", "both A and B"), 1, "both A and B|C"),
            ("A", ("A header", "a volley", "both A and B"), 0, "A and B|A or B|both"),
        ]
        for said in answers.split("|")
    ]
    + [
        ("open", "Team A scores", CALL, said, score)
        for said, score in {
            "Team A scores": 1, "team a scores": 1, "The team A scores.": 1, "team scores": 0.8,
            "Team B scores": 1 / 3, "Team C scores": 1 / 3,
        }.items()
    ]
    + [
        ("open", "Team B scores", CALL, "Team A scores", 1 / 3),
        ("open", "Player A fouls Player B", CALL, "Player B fouls Player A", 0.3),
        ("open", "A volley", CALL, "volley", 1),
        ("open", "Team A", CALL, "team", 2 / 3),
    ],
    "a denial in other words": [
        ("choice", "B", ("spike", "dig"), said, 0)
        for said in (
            "B can't be right|B couldn't be|B won't do|B does not fit|hardly B|far from B|not a B|isn't a B|Not exactly B|no way B|"
            "There is no way it's B|By no means B|I don't believe B|I disagree with B|B is definitely wrong|non-B|B? No.|B: no|"
            "It isn't, I think, B|not really a dig|It is not quite a dig|no real dig|no sign of a dig|nothing like a dig|"
            "the dig did not happen|hardly a dig|I cannot say dig|wrong to say dig|not any dig|at most B|"
            "不选B|非B|并非B|不会是B|不应该选B|没选B|B不对|B错误|B是错的|B不正确|除了B|不认为是B|Bではない|Bではありません"
        ).split("|")
    ]
    + [
        ("choice", "B", ("spike", "dig"), said, 1)
        for said in (
            "No doubt it is B|without a doubt B|Not A. B.|不是A，是B|B不是A|It cannot be A, so B|B, hardly A|B, no doubt|B can be right"
        ).split("|")
    ]
    + [
        ("choice", letter, options, said, score)
        for letter, options, score, answers in [
            ("A", ("Foul", "No foul"), 0, "no clear foul|there was no actual foul|no visible foul|It isn't really a foul|hardly a foul"),
            ("A", ("Goal", "No goal"), 0, "The goal is disallowed|The goal does not count"),
            ("B", ("犯规", "不犯规"), 1, "不犯规|没有犯规|没犯规"),
            ("A", ("犯规", "不犯规"), 0, "不犯规|没有犯规|没犯规|無犯規"),
            ("C", ("yes", "no", "cannot tell"), 1, "can't tell|can not tell|I can't tell|Cannot tell."),
            ("C", SHOTS, 0, "not only B but also C"),
            ("A", ("spike", "dig"), 0, "B is not A"),
        ]
        for said in answers.split("|")
    ]
    + [
        ("open", truth, CALL, said, score)
        for truth, said, score in [
            ("犯规", "不犯规", 4 / 15), ("犯规", "没有犯规", 4 / 15), ("犯规", "非犯规", 4 / 15), ("不犯规", "没有犯规", 1),
            ("没有犯规", "犯规", 0.4), ("ファウル", "ファウルなし", 8 / 9 * 4 / 5 / 2), ("cannot score", "can't score", 1),
            ("cannot score", "can not score", 1), ("won't count", "will not count", 1), ("can score", "can't score", 4 / 15),
            ("his serve", "her serve", 1 / 4), ("he scores", "she scores", 1 / 4), ("he scores", "scores", 1),
            ("by her", "by him", 0), ("volley", "his volley", 1),
        ]
    ],
    "yes, no and what explains them": [
        ("choice", letter, YES, said, score)
        for letter, score, answers in [
            ("A", 1, "Yes, no contact was made|Yes, there was no contact|Yes - no defender was near|Yes. No defender touched it.|"
             "Yes, no doubt about it|A, no contact was made"),
            ("B", 0, "Yes, no contact was made|Yes and no|Yes, no doubt about it"),
            ("B", 1, "No, no contact was made|No, there's no contact|B. No contact"),
            ("A", 0, "No, no contact|Yes, no.|yes no|Yes. No. Maybe|yes, no it is not|Yes, no wait|yes and no at all"),
        ]
        for said in answers.split("|")
    ]
    + [
        ("open", truth, "Was it a goal?", said, score)
        for truth, said, score in [
            ("no", "No, it did not.", 1), ("no", "No, it wasn't.", 1), ("no", "no, never", 1), ("no", "No, it was not a goal", 1),
            ("yes", "Yes, it was.", 1), ("no", "no, yes", 1 / 3), ("no", "not no", 1 / 3), ("no", "yes, it was not", 0),
            ("yes", "yes, not", 1 / 6), ("no", "not", 0), ("yes", "no, it was", 0),
        ]
    ]
    + [
        ("open", truth, CALL, said, score)
        for truth, said, score in [
            ("-1", "minus one", 1), ("-1", "negative 1", 1), ("1", "minus one", 0), ("7", "no. 7", 1), ("7", "No. 7", 1),
            ("no", "No. 7", 0), ("red 7 volley", "red no. 7 volley", 1), ("first half", "the 1st half", 1),
            ("second half", "1st half", 1 / 2),
        ]
    ],
    "a part of an option that no other has": [
        ("choice", letter, options, said, score)
        for letter, options, score, answers in [
            ("A", ("Yellow card", "Red card", "No card"), 1, "yellow|a yellow|It's yellow|Yellow."),
            ("A", ("Yellow card", "Red card", "No card"), 0, "card|the card|red|yellow red|not yellow|yellow or red|none|it|y|yell"),
            ("A", ("Yellow card", "yellow shirt"), 0, "yellow"),
            ("B", ("All of the above", "None of the above", "spike"), 1, "None.|none"),
            ("B", ("All of the above", "None of the above", "spike"), 0, "all|above|of the"),
            ("A", ("not offside", "onside"), 0, "offside"),
            ("A", ("cannot be determined", "yes", "no"), 0, "determined|can be determined"),
            ("A", ("first half", "second half"), 1, "1st half|In the 1st half|First|the 1st"),
            ("A", ("first half", "second half"), 0, "2nd half|half|1 second half|1"),
        ]
        for said in answers.split("|")
    ],
    "a span in the words of who was asked for it": [
        ("span", "3.5-8", (), said, 1)
        for said in (
            "first: 3.5, last: 8|The first second is 3.5 and the last is 8|starts at 3.5 s and stops at 8 s|about 3.5 to about 8|"
            "begin: 3.5; finish: 8|{\"start_s\": 3.5, \"end_s\": 8}|第3.5秒到第8秒|3.5秒から8秒|3.5 s (start) to 8 s (end)|"
            "roughly 3.5 s to roughly 8 s|It starts at 3.5 seconds and finishes at 8 seconds."
        ).split("|")
    ]
    + [
        ("span", "12-15", (), said, 0)
        for said in "12-15 h|12%-15%|12 % to 15 %|12 hours to 15 hours|不是12到15|first: 12, last: not 15|about 12|last: 15, first: 12".split("|")
    ],
    "listing does not pay": [
        ("open", "white 1 smash", CALL, "white 1 smash", 1),
        ("open", "white 1 smash", CALL, "white smash", 0.8),
        ("open", "white 1 smash", CALL, "white smash drop clear", 4 / 7 * 3 / 4),
        ("open", "white 1 smash", CALL, "white black 1 2 3 4 smash drop", 6 / 11 * 3 / 8),
        ("open", "white 1 smash", CALL, "white 1 smash-drop", 6 / 7 * 3 / 4),
        ("open", "yellow", CARD, "yellow red", 2 / 3 / 2),
        ("open", "yellow", CARD, "yellow, red, none", 1 / 6),
        ("open", "yellow", "Was it yellow or red?", "yellow red", 2 / 3 / 2),
        ("open", "left", CALL, "not left", 1 / 6),
    ],
}  # fmt: skip


def scored(kind, truth, options, said) -> float:
    """options: in their place stands an open question's text."""
    question, options = (options, ()) if kind == "open" else ("How?", options)
    asked = ("q", "v", "golf", "rules", question, options, truth)
    return accuracy(said, Question(*asked, kind=kind))


@pytest.mark.parametrize("what", AS_A_PERSON_SAYS)
def test_an_answer_scores_as_a_person_would_score_it(what):
    wrong = [
        (row, scored(*row[:4]))
        for row in AS_A_PERSON_SAYS[what]
        if scored(*row[:4]) != pytest.approx(row[4])
    ]
    assert not wrong


def test_any_of_several_answers_is_right():
    several = replace(OPEN, also=("a red goal", "it went in"))
    assert accuracy("red 7 volley", several) == accuracy("It went in!", several) == 1.0
    assert accuracy("red 7 volley it went in", several) < 0.5
    count = Question("q", "v", "s", "rules", "?", (), "3", kind="number", also=("5",))
    assert [accuracy(said, count) for said in ("3", "five", "4", "3 or 5")] == [1, 1, 0, 0]
    when = Question("q", "v", "s", "rules", "?", (), "3-5", kind="span", also=("20-30",))
    assert accuracy("20-30", when) == accuracy("3-5", when) == 1.0
    row = json.loads(json.dumps(asdict(when)))
    assert parse_question(row) == when
    for bad in ({"also": ["x"]}, {"also": "20-30"}, {"also": [1]}):
        with pytest.raises(ValueError, match="also|answer 'x'"):
            parse_question(row | bad)
    with pytest.raises(ValueError, match="also: must be empty where there are options"):
        parse_question(json.loads(json.dumps(asdict(CHOICE))) | {"also": ["A"]})


def test_the_table_is_long():
    assert sum(map(len, AS_A_PERSON_SAYS.values())) >= 950


def test_listing_both_earns_less_than_guessing():
    """Whatever the chance, a list of `k` candidates must earn less than one of them."""
    for rest in ([], ["white"], ["white", "1"], ["white", "1", "smash", "long"]):
        for shots in (["drop", "clear"], ["drop", "clear", "drive"], [*"abcdefgh"]):
            question = replace(OPEN, answer=" ".join([*rest, shots[0]]))
            said = [" ".join([*rest, shot]) for shot in shots] + [" ".join([*rest, *shots])]
            played = [episode(answer, LOOK, SAY, question=question) for answer in said]
            *guesses, listed = [gated_reward(each).total for each in played]
            assert listed < sum(guesses) / len(guesses)


@pytest.mark.parametrize(
    "kind, truth, options",
    [("choice", "B", SHOTS), ("number", "3", ()), ("span", "10-20", ()), ("open", "red 7", CALL)],
)
def test_no_answer_takes_long_or_raises(kind, truth, options):
    """Patterns are linear, and five thousand digits are more than Python makes an integer of."""
    size = 60_000
    hard = [
        "1" + " " * size + "x",
        "9" * 5_000,
        f"{'9' * 5_000}-{'9' * 5_000}",
        "9" * 5_000 + "½",
        "A " * size,
    ]
    hard += [f"1{sign}" * size for sign in (*".,:/'- ", " and ", " min ", " s", "m", "e", " 234")]
    hard += [
        sign * size
        for sign in (
            "1",
            "a",
            "a-",
            "(",
            "'",
            "-",
            " ",
            "n't",
            "not ",
            "twenty ",
            "B or ",
            "½",
            "…",
        )
    ]
    hard += [
        "a" + "\u0301\u0327" * size,
        "1:" * 5_000 + "30",
        "\ud800",
        "\x00",
        "e" * size,
        "1 s to " * size,
    ]
    began = time.process_time()
    for said in hard:
        assert 0 <= scored(kind, truth, options, said) < 1
    assert time.process_time() - began < 20
    assert scored(kind, truth, options, f"{' ' * 2**20}{truth}") == 1


def test_the_arenas_answers_score_by_option_or_by_the_share_of_their_words():
    """What `make demo` trains on and reports: every answer of a question's own form."""
    counted = 0
    for k in range(12):
        rng = arena.clip_rng(7, "test", k)
        plan = arena.make_plan(rng, arena.TEST_LAYOUTS)
        kits, shots, digits = plan.kits, arena.SHOTS[plan.sport], range(1, 10)
        forms = {
            "Which shirt number scored?": [str(n) for n in digits],
            "Which card did the official show?": list(arena.SANCTION),
            "How is the balance of the scorer?": list(arena.BALANCE.values()),
            "Call the decisive play.": [
                f"{a} {n} {b}" for a in kits for n in digits for b in shots
            ],
            "Give the final score.": [
                f"{kits[0]} {m} {kits[1]} {n}" for m in range(5) for n in range(5)
            ],
        }
        closeup = [one for each in arena.closeup_questions(plan, rng).values() for one in each]
        for text, right, wrong in [*closeup, *arena.overview_questions(plan).values()]:
            options = (*(wrong or ())[:1], right, *wrong[1:]) if wrong else ()
            common = ("q", "v", plan.sport, "rules", text, options, "B" if wrong else right)
            question = Question(*common)
            for letter, option in zip("ABCD", options):
                said = (
                    f"{option}|{letter}|({letter})|{letter}.|({letter}) {option}|{letter}. {option}"
                )
                scores = {accuracy(one, question) for one in said.split("|")}
                assert scores == {float(option == right)}, (question, option)
                counted += 6
            for said in [] if options else forms[text]:
                words, true = re.findall(r"\w+", said), re.findall(r"\w+", right)
                same = (Counter(words) & Counter(true)).total()
                if text == "Give the final score.":  # 2-3 is not 3-2: a number in its place counts
                    same = sum(a == b for a, b in zip(words, true, strict=True))
                    crossed = words[1] == true[3] or words[3] == true[1]
                    if crossed and same < 4:
                        assert accuracy(said, question) <= 0.75
                        continue
                f1 = 2 * same / (len(words) + len(true))
                assert accuracy(said, question) == pytest.approx(f1), (said, right)
                counted += 1
    assert counted > 2_000


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


@pytest.mark.parametrize(
    "rate, kind",
    [(1.0, "direct"), (0.75, "direct"), (0.5, "adaptive"), (0.25, "active"), (0.0, "active")],
)
@pytest.mark.parametrize("right", [True, False])
@pytest.mark.parametrize("turns", [(SAY,), (LOOK, SAY)], ids=["without", "with"])
def test_videobrains_table(rate, kind, right, turns):
    """Every cell of the published table, and the zeros beside it."""
    bonus = {
        ("direct", True, True): 0.0, ("direct", True, False): 0.5, ("direct", False, True): 0.0,
        ("adaptive", True, True): 0.5, ("adaptive", True, False): 0.5, ("adaptive", False, True): 0.0,
        ("active", True, True): 0.5, ("active", True, False): 0.0, ("active", False, True): 0.2,
    }.get((kind, right, len(turns) == 2), 0.0)  # fmt: skip
    question = replace(OPEN, pass_rate=rate)
    made = episode("red 7 volley" if right else "blue 3", *turns, question=question)
    reward = gated_reward(made, "videobrain")
    assert reward.total == pytest.approx(0.05 + right + bonus) and reward.tool == bonus
    # half right, as a judge may say, is right; a broken format earns nothing
    assert gated_reward(made, "videobrain", 0.5).total == pytest.approx(
        gated_reward(made, "videobrain", 1.0).total
    )
    spoilt = episode("red 7 volley", BAD, *turns, question=question)
    assert gated_reward(spoilt, "videobrain").total == 0.0


def test_videobrain_pays_no_look_that_shows_nothing_new():
    question = replace(OPEN, pass_rate=0.0)
    again = episode("red 7 volley", look(0, 40, 80), SAY, question=question)
    assert gated_reward(again, "videobrain").total == pytest.approx(1.05)
    other = replace(OPEN, pass_rate=0.5)  # it has used the tool all the same
    again = episode("red 7 volley", look(0, 40, 80), SAY, question=other)
    assert gated_reward(again, "videobrain").total == pytest.approx(1.05)


def test_ablations():
    right, wrong = (episode(said, LOOK, SAY) for said in ("red 7 volley", "blue 3"))
    spoilt, blind = episode("red 7 volley", BAD, SAY), episode("red 7 volley", SAY)
    made = (right, wrong, spoilt, blind)
    assert [gated_reward(e, "accuracy").total for e in made] == [1.0, 0.0, 1.0, 1.0]
    assert [gated_reward(e, "ungated").total for e in made] == [1.5, 0.5, -0.05, 1.0]
    nothing = episode("red 7 volley", look(0, 40, 80), SAY)
    assert gated_reward(nothing, "ungated").total == 1.0


def test_a_reward_of_ones_own(tmp_path):
    path = tmp_path / "my_reward.py"
    path.write_text(
        "BONUS = 0.1\n\ndef short(episode, accuracy):\n    return accuracy - BONUS * len(episode.turns)\n\n"
        "def one(episode):\n    return 1\n\ndef bad(episode):\n    x = 1\n    return episode.nothing\n\n"
        "def nan(episode):\n    return float('nan')\n\ndef text(episode):\n    return 'high'\n\n"
        "def bonus(episode, bonus=0.1):\n    return bonus\n\ndef huge(episode):\n    return 10**400\n\n"
        "def long(episode):\n    return 10**5000\n\ndef leave(episode):\n    raise SystemExit(0)\n\n"
        "def tensor(episode):\n    import torch\n    return torch.tensor(0.5)\n\n"
        "def some(*all):\n    return len(all)\n"
    )
    made = episode("red 7 volley", LOOK, SAY)
    score = reward_function(f"{path}:short")
    assert score(made, None).total == pytest.approx(0.8) and score(
        made, 0.5
    ).total == pytest.approx(0.3)
    assert (score(made, 0.5).accuracy, score(made, None).new_frames) == (0.5, 2)
    assert reward_function(f"{path}:one")(made, None).total == 1.0
    assert reward_function(f"{path}:bonus")(made, 1.0).total == 0.1
    assert reward_function(f"{path}:some")(made, 1.0).total == 1.0
    for name, why in {
        "bad": "question 'q': AttributeError: 'Episode' object has no attribute 'nothing', line 11",
        "nan": "returned nan; it must be a finite number",
        "text": "returned 'high'; it must be a finite number",
        "tensor": "returned tensor(0.5000); it must be a finite number, an int or a float of Python's: "
        "float(…) makes one",
        "huge": "00; it must be a finite number",
        "long": "ValueError: Exceeds the limit",
        "leave": "SystemExit: 0, line 29",
    }.items():
        with pytest.raises(RewardError, match=re.escape(why)) as caught:
            reward_function(f"{path}:{name}")(made, None)
        assert str(caught.value).startswith(f"--reward {path}:{name}, episode of ")
    path.with_name("exit.py").write_text("import sys\n\nsys.exit(0)\n")
    path.write_text("import math\n\nx = 1 / 0\n")
    for name, why in {
        f"{path}:score": "ZeroDivisionError: division by zero, line 3",
        f"{tmp_path}/gone.py:score": "FileNotFoundError",
        f"{tmp_path}/exit.py:score": "SystemExit: 0, line 3",
        "v3": "must be one of v1, v2, videobrain, accuracy, ungated, or FILE.py:FUNCTION",
        "my_reward:score": "or FILE.py:FUNCTION",
    }.items():
        with pytest.raises(ValueError, match=re.escape(why)):
            reward_function(name)
    path.write_text("other = 1\n")
    for name in ("score", "other"):
        with pytest.raises(ValueError, match="--reward .*(KeyError: 'score'|TypeError)"):
            reward_function(f"{path}:{name}")


def test_flat_groups():
    rewards = [Reward(total, 0, 0, 1, 0, 0) for total in (1, 1, 1, 0.1, 0.2, 0.3, 0.3, 0.3, 0.3)]
    assert flat_groups(rewards, 3) == [0, 2] and flat_groups([], 3) == []


def test_groups_without_variance_are_refilled():
    def some(totals, name):
        made = [replace(episode("x", SAY), answer=f"{name}{k}") for k in range(len(totals))]
        rewards = [Reward(total, 0, 0, 1, 0, 0) for total in totals]
        return Rollouts(made, rewards, [0] * len(totals), 1, {"tokens_read": 5})

    first, more = some([1, 1, 0, 1, 2, 2, 3, 3], "a"), some([0, 0, 1, 0, 5, 5], "b")
    found = first.refilled([0, 2, 3], more, 2)
    assert [e.answer for e in found.episodes] == ["b2", "b3", "a2", "a3", "a4", "a5", "a6", "a7"]
    assert [r.total for r in found.rewards] == [1, 0, 0, 1, 2, 2, 3, 3]
    assert (found.replaced, found.work) == (2, {"tokens_read": 10})
    assert [e.answer for e in first.episodes] == [f"a{k}" for k in range(8)]


def test_a_reward_of_an_unknown_name_is_refused():
    with pytest.raises(ValueError, match="'v3': must be one of v1, v2, videobrain"):
        gated_reward(episode("red 7 volley", LOOK, SAY), version="v3")
