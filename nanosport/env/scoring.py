"""Scores an answer in [0, 1] by rule, as a person would who reads it. Reward, evaluation and
distillation all score here."""

import re
from collections.abc import Sequence

from nanosport.reading import CJK, MARKS, WORD_BEFORE, numerals, plain, readings, time_span
from nanosport.records import LETTERS, Question

ENDING = rf"[^\W\d_{CJK}]*(?:[{MARKS}]+[^\W\d_{CJK}]*)*"
TOKEN = re.compile(  # a number with its sign, a score such as 2-1, a word
    rf"(?:[<>≤≥]|(?<![\w)])-(?=\d))?\d+(?:[./-]\d+)*{ENDING}|(?!\W)[{CJK}]|[^\W_{CJK}]+{ENDING}"
)
COMPOUND = re.compile(r"(?<![^\W\d_])[^\W\d_]++-[^\W\d_]+")
NOT = re.compile(r"(?<=\bcan)(?:'t|not)\b|(?<!\bca)n't|[不無无非未]|[没沒]有?|ない|なし|ません")
ORDINALS = dict(zip("1st 2nd 3rd 4th 5th".split(), "first second third fourth fifth".split()))
LABEL = re.compile(r"\w [A-HJ-Z]\b(?!')|^[A-Z]$")
"""A letter that is a name, as in "Team A": where there are such, "a" is no article."""
ARTICLES = frozenset("a an the".split())
FILLERS = frozenset(
    "it its is was were are be been by with of and this that he she they his her did does do has"
    " have had".split()
)
DENIALS = frozenset("not no never without nor neither hardly or".split())
OPPOSITES = [pair.split() for pair in (
    "before after|more less|most least|over under|above below|in out|inside outside|up down"
    "|first last|home away|top bottom|front back|forward backward|high low|win lose|he she|his her"
    "|him her"
).split("|")]  # fmt: skip
ENDS = " .,;:!?'\"*_()[]{}。、【】「」"
"""Signs that may stand around an answer."""
HEDGE = re.compile(r" (?:or|或)  pick|pick\w  (?:or|或) ")
DENIED = re.compile(  # in words two spaces apart
    r" (?:not|nor|neither|never|hardly|non|than|except|exclud\w+|wrong|disagree|unlikely"
    r"|ruled?  out|(?<!no  )(?<!without  )doubt|instead  of|far  from|nothing  like"
    r"|no  (?:way|means)|at  (?:least|most)|(?:all|any|anything|everything)  but|除(?:  了)?)"
    r"  (?:(?:be|think|believe|say|it|i|is|option|true|correct|that|answer|on|in|at|to|by|with|all"
    r"|any|quite|even|(?!only)\w+ly|[是选会应该能认为])  )*pick(\w) "
    r"| (?:no|without)  (?:(?:any|clear|real|actual|obvious|visible|such|sign  of)  )*pick(\w) "
    r"| pick(\w)  (?:(?:(?:is|was|be|can  be|seems|looks|是)  )?(?:\w+ly  )?"
    r"(?:wrong|incorrect|false|unlikely|excluded|impossible|ruled  out|disallowed|错)"
    r"|(?:is|was|can|could|do|does|did|will|would|should)  not(?!  pick)|not  [对正]|no(?= $)"
    r"|で  は  (?:あ  り  )?not) "
)
OF_NONE = re.compile(r"(?<!and )(?<!or ) no  (?!(?:so|wait|it|he|she|they|that|pick\w) )(?=\w)")
"""The "no" of "Yes, no contact was made"."""
NO_LABEL = "and|or|nor|both|neither|not|only|is|are|options?|answers?|choices?"
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
        return float(named(answer, question.options) == {question.answer})
    rules = {
        "number": lambda truth: number(answer, truth, question.tolerance),
        "span": lambda truth: span(answer, truth, question.tolerance),
        "open": lambda truth: in_words(answer, truth, question.question),
    }
    return max(map(rules[question.kind], question.answers))


def normalise(text: str, beside: str = "") -> list[str]:
    """Words and numbers, without case, punctuation and articles: "Two to one!" is 2-1. An "a" is
    no article where the text `beside` names things by letters."""
    articles = ARTICLES - {"a"} if LABEL.search(plain(beside)) else ARTICLES
    text = numerals(plain(text).casefold()).replace("won't", "will not").replace("'s ", " ")
    text = re.sub(r"\bno\. ?(?=\d)", "", NOT.sub(" not ", text))
    text = re.sub(r"(\d)(?::| ?- ?| to )(?=\d)", r"\1-", text)
    text = re.sub(r"(\d),(?=\d{3}(?!\d))", r"\1", text)  # 1,200
    text = re.sub(r"(\d),(?=\d)", r"\1.", text).replace("%", " percent ")  # 9,5
    text = re.sub(r"(?<![\d.])(\d+(?:\.\d*[1-9])?)\.?0*(?![\d.])", r"\1", text)  # 9.50
    return [ORDINALS.get(word, word) for word in TOKEN.findall(text) if word not in articles]


def exact(answer: str, truth: str) -> float:
    """Whether both are the same words in the same order."""
    said, true = (normalise(text, truth) or plain(text) for text in (answer, truth))
    return float(said == true)


# Choice.


def named(answer: str, options: Sequence[str]) -> set[str]:
    """The letters of the options that an answer names and does not deny."""
    letters = LETTERS[: len(options)]
    answer, *options = unlabelled(plain(answer), list(map(plain, options)), letters)
    said = answer.strip(ENDS)
    if said in tuple(letters):
        return {said}
    return alone(said, letters, options) or mentioned(said, letters, options)


def unlabelled(answer: str, options: Sequence[str], letters: str) -> list[str]:
    """The answer and the options, where "Team A" is the word TeamA if an option has it: this letter
    is no option's."""
    named_by = rf"\b(?!(?i:{NO_LABEL})\b)([^\W\d_]+)[ -][{letters}]\b(?!')"
    labels = {re.escape(word) for text in options for word in re.findall(named_by, text)}
    found = re.compile(rf"\b({'|'.join(labels)})[ -]([{letters}])\b(?!')", re.IGNORECASE)
    return [found.sub(r"\1\2", text) if labels else text for text in (answer, *options)]


def alone(said: str, letters: str, options: Sequence[str]) -> set[str]:
    """The options that an answer is: a letter with its own text, a text as it is written, or by its
    words, so that "dropshot" is "drop shot". The last two find several where options are alike."""
    head = re.match(rf"([{letters}])(\W)\W*(?=\w)", said, re.IGNORECASE)
    labelled = head and head[2] in ").:,"  # "A: foul" begins with a letter, "a foul" with a word
    for form in (lambda text: text.strip(ENDS).casefold(), lambda text: "".join(normalise(text))):
        whole, forms = form(said), [form(text) for text in options]
        if head and form(said[head.end() :]) == forms[letters.index(head[1].upper())] != "":
            return {head[1].upper()}
        alike = {each for each, text in zip(letters, forms) if text == whole != ""}
        if alike and not labelled:
            return alike
    return set()


def mentioned(said: str, letters: str, options: Sequence[str]) -> set[str]:
    """The options that a sentence names and does not deny."""
    words, *texts = (marked(text, letters) for text in (said, *options))
    core = f" {'  '.join(word for word in words.split() if word not in FILLERS)} "
    parts = [(text, each) for text, each in zip(texts, letters) if core.strip() and core in text]
    # each mention becomes a word of its own, the longest texts first
    for text, each in sorted(zip(texts, letters), key=lambda pair: -len(pair[0])):
        if text == " no " and words.startswith(" pick"):
            words = OF_NONE.sub(" without  ", words)
        if texts.count(text) == 1 and not re.fullmatch(r" (?:pick\w )?", text):
            words = words.replace(text, f" pick{each} ")
    if HEDGE.search(words):
        return set()
    kept = DENIED.sub("  ", words)
    denied = {letter for found in DENIED.findall(words) for letter in found}
    picked = set(re.findall(r"pick(\w)", kept)) - denied
    if not picked and len(parts) == 1:  # "yellow" of "yellow card", not "offside" of "not offside"
        text, each = parts[0]
        picked = {each} if DENIALS.isdisjoint(text.replace(core, " ").split()) else picked
    return picked


def marked(text: str, letters: str) -> str:
    """Words with two spaces between, and `pickB` for an option's letter. "A player" and "I think"
    begin with a word, not with a letter."""
    word = (
        r"(?-i:a [A-Z])|[AI] (?!(?:is|was|and|or|nor|but|because|since|instead|rather|except"
        rf"|[{letters}])\b)\w"
    )
    lone = rf"(?:{WORD_BEFORE}|(?<=[Oo]ption))(?<!\w')(?!{word})([{letters}])(?!'?[^\W{CJK}])"
    text = re.sub(r"\b(no)\b(?=[,.:;!?])", r"\1 so", text, flags=re.I)  # denies none
    found = re.sub(lone, r" pick\1 ", text.replace("_", " "), flags=re.I)
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
    said, true = (normalise(text, truth) for text in (answer, truth))
    free = FILLERS - opposed(said, true)
    said, true = ([word for word in words if word not in free] for words in (said, true))
    if asked.isdisjoint(true):
        said = [word for word in said if word not in asked]
    if said[:1] == true[:1] == ["no"]:  # "No, it did not" denies once
        said = ["no", *(word for word in said[1:] if word not in ("not", "never"))]
    if not said or not true:
        return 0.0
    f1 = 2 * common_subsequence(said, true) / (len(said) + len(true))
    compounds = map(normalise, COMPOUND.findall(answer))
    length = len(said) - sum(len(parts) - 1 for parts in compounds if {*parts}.isdisjoint(true))
    return f1 * min(1.0, len(true) / max(1, length)) * (0.5 if contradicts(said, true) else 1.0)


def contradicts(said: Sequence[str], true: Sequence[str]) -> bool:
    """Whether one denies and the other does not, says the opposite, names another letter, or has
    the same words or numbers in another order: "7 passes to 10" is not "10 passes to 7"."""
    if DENIALS.isdisjoint(said) != DENIALS.isdisjoint(true) or opposed(said, true):
        return True
    letters = [{w for w in words if re.fullmatch("[a-z]", w)} for words in (said, true)]
    if all(letters) and letters[0].isdisjoint(letters[1]):
        return True
    said_numbers, true_numbers = ([w for w in ws if re.search(r"\d", w)] for ws in (said, true))
    return any(
        one != two and sorted(one) == sorted(two)
        for one, two in ((said, true), (said_numbers, true_numbers))
    )


def opposed(said: Sequence[str], true: Sequence[str]) -> set[str]:
    """The words of one whose opposite the other says, with those."""
    pairs = OPPOSITES
    for one, other in ((said, true), (true, said)):
        alone = set(one).difference(other)
        pairs = [pair for pair in pairs if not alone.isdisjoint(pair)]
    return {word for pair in pairs for word in pair}


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
