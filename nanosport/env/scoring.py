"""Scores an answer in [0, 1] by rule, as a person would who reads it. Reward, evaluation and
distillation all score here."""

import re
from collections.abc import Sequence

from nanosport.reading import CJK, WORD_BEFORE, numerals, plain, readings, time_span
from nanosport.records import LETTERS, Question

TOKEN = re.compile(  # a number with its sign, a score such as 2-1, a word
    rf"(?:[<>≤≥]|(?<![\w)])-(?=\d))?\d+(?:[./-]\d+)*[^\W\d_{CJK}]*|(?!\W)[{CJK}]|[^\W_{CJK}]+"
)
COMPOUND = re.compile(r"(?<![^\W\d_])[^\W\d_]++-[^\W\d_]+")
ARTICLES = frozenset("a an the".split())
FILLERS = frozenset(
    "it its is was were are be been by with of and this that he she they his her did does do has"
    " have had".split()
)
DENIALS = frozenset("not no never without cannot nor neither hardly or".split())
OPPOSITES = [
    (one, two) for pair in (
        "before after|more less|most least|over under|above below|in out|inside outside"
        "|up down|first last|home away|top bottom|front back|forward backward|high low|win lose"
    ).split("|") for one, two in (pair.split(), pair.split()[::-1])
]  # fmt: skip
ENDS = " .,;:!?'\"*_()[]{}。、【】「」"
"""Signs that may stand around an answer."""
HEDGE = re.compile(r" (?:or|或)  pick|pick\w  (?:or|或) ")
DENIED = re.compile(  # in words two spaces apart
    r" (?:not|cannot|nor|neither|never|than|except|excludes?|excluding|excluded|wrong|doubt"
    r"|unlikely|rule  out|ruled  out|instead  of|(?:all|any|anything|everything)  but|不  是)"
    r"  (?:(?:be|think|it|is|option|true|correct|that|answer|on|in|at|to|by|with)  )*pick(\w) "
    r"| (?:no|without)  (?:any  )?pick(\w) "
    r"| pick(\w)  (?:(?:(?:is|was|be|can  be|seems|looks)  )?"
    r"(?:wrong|incorrect|false|unlikely|excluded|impossible|ruled  out)"
    r"|(?:is|was|can)  not|cannot) "
)
MOMENT_S = 0.5
"""A time may be off by this much where one moment is asked for."""


def accuracy(answer: str | None, question: Question) -> float:
    """acc(τ) ∈ [0, 1].

    choice: 1 for the option's letter or its text, and no other option's. number: 1 within the
    question's tolerance. span: temporal IoU. open: F1 of the words in their order. Of several right
    answers the best counts.
    """
    if answer is None:
        return 0.0
    if question.kind == "choice":
        return choice(answer, question.answer, question.options)
    rules = {
        "number": lambda truth: number(answer, truth, question.tolerance),
        "span": lambda truth: span(answer, truth, question.tolerance),
        "open": lambda truth: in_words(answer, truth, question.question),
    }
    return max(map(rules[question.kind], question.answers))


def normalise(text: str) -> list[str]:
    """Words and numbers, without case, punctuation and articles: "Two to one!" is 2-1."""
    text = numerals(plain(text).casefold()).replace("n't", " not").replace("'s ", " ")
    text = re.sub(r"(\d)(?::| ?- ?| to )(?=\d)", r"\1-", text)
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text)  # 1,200
    text = re.sub(r"(\d),(?=\d)", r"\1.", text).replace("%", " percent ")  # 9,5
    text = re.sub(r"(?<![\d.])(\d+(?:\.\d*[1-9])?)\.?0*(?![\d.])", r"\1", text)  # 9.50
    return [word for word in TOKEN.findall(text) if word not in ARTICLES]


def exact(answer: str, truth: str) -> float:
    """Whether both are the same words in the same order."""
    return float((normalise(answer) or plain(answer)) == (normalise(truth) or plain(truth)))


# Choice.


def choice(answer: str, letter: str, options: Sequence[str]) -> float:
    """Whether the answer names option `letter`, by letter or by text, and no other."""
    return float(named(answer, options) == {letter})


def named(answer: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that an answer names and does not deny."""
    letters = LETTERS[: len(options)]
    said = plain(answer).strip(ENDS)
    # alone: a capital letter, a letter with its own text, a text as it is written, a text by its
    # words; the last two find several where options are alike
    if said in tuple(letters):
        return {said}
    head = re.match(rf"([{letters}])(\W)\W*(?=\w)", said, re.IGNORECASE)
    labelled = head and head[2] in ").:,"  # "A: foul" begins with a letter, "a foul" with a word
    for same in (same_text, same_words):
        if head and same(said[head.end() :], options[letters.index(head[1].upper())]):
            return {head[1].upper()}
        alike = {each for each, text in zip(letters, options) if same(said, text)}
        if alike and not (labelled and same is same_words):
            return alike

    # inside a sentence: each mention becomes a word of its own, the longest texts first
    words = marked(said, letters)
    texts = [marked(text, letters) for text in options]
    for text, each in sorted(zip(texts, letters), key=lambda pair: -len(pair[0])):
        if texts.count(text) == 1 and not re.fullmatch(r" (?:pick\w )?", text):
            words = words.replace(text, f" pick{each} ")
    if HEDGE.search(words):
        return set()
    kept = DENIED.sub("  ", words)
    denied = {letter for found in DENIED.findall(words) for letter in found}
    return set(re.findall(r"pick(\w)", kept)) - denied


def same_text(one: str, other: str) -> bool:
    return plain(one).strip(ENDS).casefold() == plain(other).strip(ENDS).casefold() != ""


def same_words(one: str, other: str) -> bool:
    """Whether both have the same letters in their words, so that "dropshot" is "drop shot"."""
    return "".join(normalise(one)) == "".join(normalise(other)) != ""


def marked(text: str, letters: str) -> str:
    """Words with two spaces between, and `pickB` for an option's letter. "A player" and "I think"
    begin with a word, not with a letter."""
    word = (
        rf"[AI] (?!(?:is|was|and|or|nor|but|because|since|instead|rather|except|[{letters}])\b)\w"
    )
    lone = rf"(?:{WORD_BEFORE}|(?<=[Oo]ption))(?<!\w')(?!{word})([{letters}])(?!'?[^\W{CJK}])"
    text = re.sub(
        r"\b(no)\b(?=[,.:;!?])", r"\1 so", plain(text), flags=re.IGNORECASE
    )  # denies none
    found = re.sub(lone, r" pick\1 ", text.replace("_", " "), flags=re.IGNORECASE)
    words = (f"pick{w[4].upper()}" if re.fullmatch("pick[a-j]", w) else w for w in normalise(found))
    return f" {'  '.join(words)} "


# Numbers and times.


def number(answer: str, truth: str, tolerance: float) -> float:
    """Whether what the answer's one number may mean is within `tolerance` of the truth."""
    (true, *_) = readings(truth)
    return float(any(abs(said - true) <= tolerance + 1e-9 for said in readings(answer)))


def span(answer: str, truth: str, tolerance: float) -> float:
    """Temporal IoU of two spans of seconds. Where the truth is one moment: whether the answer lies
    within the tolerance, or MOMENT_S, around it."""
    moment = readings(answer)[-1:] * 2
    start, end = true = time_span(truth)
    if not (said := time_span(answer) or moment):
        return 0.0
    if start == end:
        near = max(tolerance, MOMENT_S) + 1e-9
        return float(start - near <= said[0] <= said[1] <= end + near)
    return temporal_iou(said, true)


def temporal_iou(said: tuple[float, float], true: tuple[float, float]) -> float:
    """Overlap ÷ union of two spans; two equal moments are 1."""
    overlap = min(said[1], true[1]) - max(said[0], true[0])
    union = max(said[1], true[1]) - min(said[0], true[0])
    return float(said == true) if union == 0 else max(0.0, overlap) / union


# Words.


def in_words(answer: str, truth: str, question: str) -> float:
    """2·LCS / (said + true words), where LCS is the longest common subsequence: order counts.

    A longer answer than the reference is worth less in proportion, so that listing does not pay;
    a wrong compound, such as "tap-in", is one word more. Fillers are free, and so are the
    question's words unless the reference has one: "the yellow card" is "yellow" where a card is
    asked for. What contradicts the reference is worth half.
    """
    if exact(answer, truth):
        return 1.0
    asked = set(normalise(question))
    said, true = ([w for w in normalise(t) if w not in FILLERS] for t in (answer, truth))
    if asked.isdisjoint(true):
        said = [word for word in said if word not in asked]
    if not said or not true:
        return 0.0
    f1 = 2 * common_subsequence(said, true) / (len(said) + len(true))
    compounds = map(normalise, COMPOUND.findall(answer))
    length = len(said) - sum(len(parts) - 1 for parts in compounds if {*parts}.isdisjoint(true))
    return f1 * min(1.0, len(true) / max(1, length)) * (0.5 if contradicts(said, true) else 1.0)


def contradicts(said: Sequence[str], true: Sequence[str]) -> bool:
    """Whether one denies and the other does not, says the opposite, or has the same words or
    numbers in another order: "7 passes to 10" is not "10 passes to 7"."""
    if DENIALS.isdisjoint(said) != DENIALS.isdisjoint(true):
        return True
    if any(w in said and w not in true and o in true and o not in said for w, o in OPPOSITES):
        return True
    said_numbers, true_numbers = ([w for w in ws if re.search(r"\d", w)] for ws in (said, true))
    return any(
        one != two and sorted(one) == sorted(two)
        for one, two in ((said, true), (said_numbers, true_numbers))
    )


def common_subsequence(one: Sequence[str], other: Sequence[str]) -> int:
    """The length of the longest common subsequence: Hyyrö's bits, a row of the table at a time."""
    places: dict[str, int] = {}
    for k, word in enumerate(other):
        places[word] = places.get(word, 0) | 1 << k
    row = full = (1 << len(other)) - 1
    for word in one:
        hits = row & places.get(word, 0)
        row = (row + hits | row - hits) & full
    return len(other) - row.bit_count()
