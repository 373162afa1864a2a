"""Reads what people write: one way of writing for each sign, numbers, spans of time.

Every pattern is linear in the text: what may repeat begins at one place only, and a run of spaces
is one space before any pattern is tried.
"""

import math
import re
import unicodedata

CJK = "⺀-鿿豈-﫿"
"""A range of characters, words of one sign each, that are written without spaces."""
WORD_BEFORE = rf"(?<![^\W{CJK}])"
"""No letter or digit stands before."""
SIGNS = {ord(each): sign for sign, signs in {
    "'": "‘’‚‛′`", '"': "“”„‟«»", "-": "‐‑‒–—―−", "/": "⁄∕", ":": "∶", "": "\u200b\u200d\ufeff\xad",
}.items() for each in signs}  # fmt: skip
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: k for k, word in enumerate(ONES)} | {word: 10 * k for k, word in enumerate(TENS, 2)}
NUMERAL = re.compile(
    rf"\b(?<!no )(?:(?:{'|'.join(TENS)})\b(?:[- ](?:{'|'.join(ONES[1:10])})\b)?"
    rf"|(?:{'|'.join(ONES)})\b)"
)
DECIMAL = re.compile(  # 1,234.5   1.234,5   1.234.567   1'234   9,5   .5
    r"([1-9]\d{0,2}(?:,\d{3})+(?!,)|\d{1,3}(?:\.\d{3})+(?=,)|\d{1,3}(?:\.\d{3}){2,}"
    r"|\d{1,3}(?:'\d{3})+|\d*)(?:[.,](\d+))?(e[-+]?\d{1,3})?"
)
CLOCK = re.compile(r"\d+(?::[0-5]\d){1,2}(?:[.,]\d+)?")
MINUTES = r"m(?:in(?:ute)?s?)?"
SECONDS = r"s(?:ec(?:ond)?s?)?"
IN_WORDS = re.compile(rf"(?<!\d)(\d+) ?{MINUTES}(?: and)? ?(\d++(?:[.,]\d+)?) ?{SECONDS}\b")
NUMBER = re.compile(
    r"(?:(?P<bound>\b(?:not|never|nor|than|least|most|over|under|above|below|up to)\b|[<>≤≥]) ?)?"
    rf"(?:(?<![\w)])(?P<sign>[-+]))?{WORD_BEFORE}(?<!\d[.,:/])"
    r"(?P<digits>(?:(?<![\w.])\.)?\d+(?:[.,:/'-]\d+)*(?:e[-+]?\d{1,3}(?!\d))?)"
    r"(?: ?(?P<unit>%|percent\b|k\b|hundred\b|thousand\b|million\b|min(?:ute)?s?\b))?"
    r"(?P<beyond> ?\+(?! ?\d)| or (?:more|less|fewer)\b)?"
)
TIMES = {"k": 1e3, "hundred": 1e2, "thousand": 1e3, "million": 1e6}
MOMENT = re.compile(
    r"(?<!\d)(?<!\d[.,:])((?:\d++:){0,2}\d++(?:[.,]\d++)?)"
    rf"(?: ?(?:({MINUTES})|{SECONDS}|秒)(?![a-z]))?"
)
BETWEEN = re.compile(r"\W*+(?:(?:to|until|till|and|it|ends?|ending|at|到|至)\b\W*+)*")


def plain(text: str) -> str:
    """The text with one form of each letter, quote, dash and space."""
    if not text.isascii():
        fraction = r"(?<!\d)(\d*)([¼-¾⅐-⅞])"  # 2½ is 2.5, where Unicode's compatible form is 21/2
        text = re.sub(fraction, lambda m: str(float(m[1] or 0) + unicodedata.numeric(m[2])), text)
        # in parts: a long run of accents takes the square of its length to sort
        parts = (text[start : start + 500] for start in range(0, len(text), 500))
        text = "".join(unicodedata.normalize("NFKC", part) for part in parts).translate(SIGNS)
    return " ".join(text.split())


def numerals(text: str) -> str:
    """The text, in small letters, with digits for the words up to ninety-nine."""
    return NUMERAL.sub(lambda m: str(sum(VALUES[w] for w in re.split("[- ]", m[0]))), text)


def in_digits(text: str) -> str:
    """The plain text in small letters, with digits for words where it has none, and 1:30 for "1 min
    30 s"."""
    text = plain(text).casefold()
    text = text if re.search(r"\d", text) else numerals(text)
    return IN_WORDS.sub(lambda m: f"{m[1]}:{m[2].zfill(2)}", text)


def number(text: str) -> float | None:
    """The one number in a text ("about 9.5 points" → 9.5); None where it has none or several."""
    return next(iter(readings(text)), None)


def readings(text: str) -> tuple[float, ...]:
    """What the one number in a text may mean, first what it says: 50% is 50, else 0.5; 1.5 min is
    1.5, else 90 seconds. Empty where it has none or several, or only a bound."""
    text = re.sub(r"\b(?:minus|negative) (?=\d)", "-", in_digits(text))
    text = re.sub(r"(?<=\d) ?(?:/ ?100?|out of \w+)(?![\w/]|[.,]\d)", "", text)  # 9.5/10
    spaced = r"(?<![\d.,:/])[1-9]\d{0,2}(?: \d{3})+(?!\d)"
    text = re.sub(spaced, lambda m: m[0].replace(" ", ""), text)
    found = {reading(each) for each in NUMBER.finditer(text)}
    return found.pop() if len(found) == 1 else ()


def reading(found: re.Match) -> tuple[float, ...]:
    """What one match of NUMBER may mean; empty where it is no number, such as 1,2,3 or 3-4."""
    digits, unit = found["digits"], found["unit"] or ""
    over, _, under = digits.partition("/")
    value = seconds(digits) if CLOCK.fullmatch(digits) else decimal(over)
    value /= decimal(under or "1") or math.nan
    value *= (-1 if found["sign"] == "-" else 1) * TIMES.get(unit, 1)
    if found["bound"] or found["beyond"] or not math.isfinite(value):
        return ()
    if unit.startswith("min"):
        return value, 60 * value
    return (value, value / 100) if unit in ("%", "percent") else (value,)


def decimal(digits: str) -> float:
    """The number that a text of digits, points and commas is; nan where it is none."""
    if not digits or not (found := DECIMAL.fullmatch(digits)):
        return math.nan
    whole, part, power = found.groups("")
    return float(f"{re.sub(r'[^0-9]', '', whole) or 0}.{part or 0}{power}")


def seconds(clock: str) -> float:
    """The seconds of 12.5, 1:30 or 1:02:03."""
    total = 0.0
    for part in clock.split(":"):
        total = 60 * total + decimal(part)
    return total


def time_span(text: str) -> tuple[float, float] | None:
    """(start, end) in seconds of a text such as "12.5-18", "from 12.5 s to 18 s" or "00:12 –
    00:18"; None where it is no span."""
    text = re.sub(r"(?<=[\[(])([\d.:]++),(?=[\d.:]++[\])])", r"\1, ", in_digits(text))  # [12,15]
    found = list(MOMENT.finditer(text))
    if len(found) != 2 or not BETWEEN.fullmatch(text[found[0].end() : found[1].start()]):
        return None
    minutes = [bool(m[2]) or ":" not in m[1] and bool(found[1][2]) for m in found]
    start, end = (seconds(m[1]) * (60 if in_min else 1) for m, in_min in zip(found, minutes))
    denied = re.search(r"\bnot\b|n't\b", text)
    return (start, end) if start <= end < math.inf and not denied else None
