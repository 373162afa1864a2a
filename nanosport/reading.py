"""Reads what people write: one way of writing for each sign, numbers, spans of time.

Every pattern is linear in the text: what may repeat begins at one place only, and a run of spaces
is one space before any pattern is tried.
"""

import math
import re
import unicodedata

CJK = "⺀-鿿豈-﫿"
"""A range of characters, words of one sign each, that are written without spaces."""
MARKS = "".join(c for c in map(chr, range(0x300, 0xFE00)) if unicodedata.category(c)[0] == "M")
"""Vowels and tones of Hindi, Thai and others, which belong to the letter before."""
WORD_BEFORE = rf"(?<![^\W{CJK}])"
"""No letter or digit stands before."""
SIGNS = {ord(each): sign for sign, signs in {
    "'": "‘’‚‛′`", '"': "“”„‟«»", "-": "‐‑‒–—―−", "/": "⁄∕", ":": "∶", "I": "İ", "i": "ı",
    "": "\u200b\u200d\ufeff\xad" + "".join(map(chr, range(0x64B, 0x653))),  # Arabic's vowels
}.items() for each in signs}  # fmt: skip
ONES = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
    "fifteen sixteen seventeen eighteen nineteen"
).split()
TENS = "twenty thirty forty fifty sixty seventy eighty ninety".split()
VALUES = {word: k for k, word in enumerate(ONES)} | {word: 10 * k for k, word in enumerate(TENS, 2)}
ONE = "|".join(ONES[:10])
SMALL = rf"(?:(?:{'|'.join(TENS)})(?:[- ](?:{ONE}))?|{'|'.join(ONES)})"
HUNDREDS = rf"(?:(?:{SMALL}|a) hundred(?:(?: and)? {SMALL})?|{SMALL})"
NUMERAL = re.compile(
    rf"\b(?<!no )(?:(?:{HUNDREDS}|a) thousand(?:(?: and)? {HUNDREDS})?|{HUNDREDS})\b"
    rf"((?: and a half\b)?)((?: point(?: (?:{ONE}))+)?)\b"
)
MINUS = re.compile(r"\b(?:minus|negative) (?=\d)")
RARE = {word: k for k, words in enumerate(
    "nil nought|first once|second twice|third thrice|fourth|fifth|sixth|seventh|eighth|ninth"
    "|tenth|eleventh|twelfth dozen".split("|")) for word in words.split()
}  # fmt: skip
"""Words that are a number where a text has no other."""
PARTS = {word: k for word, k in RARE.items() if word.endswith(("rd", "th"))} | {
    "half": 2, "halve": 2, "quarter": 4, "hundredth": 100, "thousandth": 1000
}  # fmt: skip
FRACTION = re.compile(
    r"(?<![\w.,:/-])(?<!and )(?:(\d{1,9})(?:[ -]and[ -]| ))?(?:(\d{1,9})|an?)[ -]"
    rf"({'|'.join(PARTS)})s?\b(?!-)"
)
"""3 quarters, 9 and a half."""
HAN = {sign: k for k, sign in enumerate("零一二三四五六七八九")} | {"〇": 0, "两": 2, "兩": 2}
HAN_TIMES = {"十": 10, "百": 100, "千": 1000, "万": 10_000, "萬": 10_000, "亿": 10**8, "億": 10**8}
DECIMAL = re.compile(  # 1,234.5   1.234,5   1.234.567   1'234   9,5   .5
    r"([1-9]\d{0,2}(?:,\d{3})+(?!,)|\d{1,3}(?:\.\d{3})+(?=,)|\d{1,3}(?:\.\d{3}){2,}"
    r"|\d{1,3}(?:'\d{3})+|\d*)(?:[.,](\d+))?(e[-+]?\d{1,3})?"
)
CLOCK = re.compile(r"\d+(?::[0-5]\d){1,2}(?:[.,]\d+)?")
MINUTES = r"m(?:in(?:ute)?s?)?"
SECONDS = r"s(?:ec(?:ond)?s?)?"
IN_WORDS = re.compile(
    rf"(?<!\d)(\d+) ?(?:{MINUTES}|分钟?)(?: and)? ?(\d++(?:[.,]\d+)?) ?(?:{SECONDS}\b|秒)"
)
MIXED = re.compile(r"(?<![\d.,:/-])(\d{1,3}) ([1-9])/([2-9])(?![\d.,:/])")
"""2 1/2 is 2.5."""
NUMBER = re.compile(
    r"(?:(?P<bound>(?:\b(?:not|never|nor|than|least|most|over|under|above|below|up to|half of"
    r"|minimum|max(?:imum)?|(?:min|max)imum of|upwards of)|n't)\b|[<>≤≥]|不[是到止]?|[没沒]有?"
    r"|[至最][少多]|[大小多少高低]于|超过) ?(?:about |around )?)?"
    rf"(?:(?<![\w)])(?P<sign>[-+]))?{WORD_BEFORE}(?<!\d[.,:/])"
    r"(?P<digits>(?:(?<![\w.])\.)?\d+(?:[.,:/'-]\d+)*(?:e[-+]?\d{1,3}(?!\d))?)"
    rf"(?: ?(?P<unit>%|[{''.join(HAN_TIMES)}]|(?:percent|k|dozen|hundred|thousand|million|billion"
    r"|min(?:ute)?s?|h(?:ours?)?)\b))?"
    r"(?P<beyond> ?\+(?! ?\d)| ?[<>≤≥]| ?个?(?:半|以[上下])"
    r"|(?: [^\W\d]++)?,?[ -]\(?(?:at (?:the )?(?:least|most)|(?:at a )?minimum|max(?:imum)?|plus"
    r"|(?:or|and)[ -](?:more|less|fewer|up|upwards?|over|above|higher|under|below|lower"
    r"|an? half))\b)?"
)
TIMES = dict(k=1e3, dozen=12, hundred=1e2, thousand=1e3, million=1e6, billion=1e9) | HAN_TIMES
MOMENT = re.compile(
    r"(?<!\d)(?<!\d[.,:])((?:\d++:){0,2}\d++(?:[.,]\d++)?)"
    rf"(?:st|nd|rd|th)?(?: ?(?:({MINUTES})|{SECONDS}|秒)(?![a-z]))?"
)
BETWEEN = re.compile(
    r"\W*+(?:(?:(?:up )?to|until|till?|through|and|it|the|ends?|ending|times?|at|t|s|seconds?"
    r"|start|begin|last|is|finish(?:es)?|stops?|about|around|roughly|approximately"
    r"|到|至|から|bis|a|à|y|et)\b\W*+)*"
)


def plain(text: str) -> str:
    """The text with one form of each letter, quote, dash and space."""
    if not text.isascii():
        fraction = r"(?<!\d)(\d*)([¼-¾⅐-⅞])"  # 2½ is 2.5, where Unicode's compatible form is 21/2
        text = re.sub(fraction, lambda m: str(float(m[1] or 0) + unicodedata.numeric(m[2])), text)
        # in parts: a long run of accents takes the square of its length to sort
        parts = (text[start : start + 500] for start in range(0, len(text), 500))
        text = "".join(unicodedata.normalize("NFKC", part) for part in parts).translate(SIGNS)
        text = re.sub(r"\d", lambda m: str(unicodedata.digit(m[0])), text)
    return " ".join(text.split())


def numerals(text: str) -> str:
    """The text, in small letters, with digits for number words: "one hundred and two" is 102, "two
    and a half" 2.5, "three point two" 3.2, "minus one" -1."""

    def digits(found: re.Match) -> str:
        half, point = found[1], found[2]
        whole = total = 0
        for word in re.split("[- ]", found[0].removesuffix(point).removesuffix(half)):
            if word == "thousand":
                whole, total = 0, max(1, total) * 1000
            elif word == "hundred":
                total += max(1, whole) * 100 - whole
                whole = 0
            else:
                value = VALUES.get(word, 0)
                total, whole = total + value, whole + value
        after = "5" if half else "".join(str(VALUES[word]) for word in point.split()[1:])
        return f"{total}.{after}" if after else str(total)

    return MINUS.sub("-", NUMERAL.sub(digits, text))


def han(sign: re.Match) -> str:
    """The digits of a Chinese numeral: 二十一 is 21, 一〇一 is 101, 三万 is 30000."""
    total = last = 0
    for each in sign[0][:30]:
        times = HAN_TIMES.get(each, 0)
        if times > 1000:
            total, last = max(1, total + last) * times, 0
        else:
            total += max(1, last) * times
            last = 0 if times else 10 * last + HAN[each]
    return str(total + last)


def in_digits(text: str) -> str:
    """The plain text in small letters, with digits for words where it has none, and 1:30 for "1 min
    30 s"."""
    text = plain(text).casefold()
    text = text if re.search(r"\d", text) else numerals(text)
    text = FRACTION.sub(lambda m: str(int(m[1] or 0) + int(m[2] or 1) / PARTS[m[3]]), text)
    for words, spell in (
        (rf"\b(?:{'|'.join(RARE)})\b", lambda found: str(RARE[found[0]])),
        (f"[{''.join(HAN | HAN_TIMES)}]+", han),
    ):
        text = text if re.search(r"\d", text) else re.sub(words, spell, text)
    text = MIXED.sub(lambda m: str(int(m[1]) + int(m[2]) / int(m[3])), text)
    return IN_WORDS.sub(lambda m: f"{m[1]}:{m[2].zfill(2)}", text)


def number(text: str) -> float | None:
    """The one number in a text ("about 9.5 points" → 9.5); None where it has none or several."""
    return next(iter(readings(text)), None)


def readings(text: str) -> tuple[float, ...]:
    """What the one number in a text may mean, first what it says: 50% is 50, else 0.5; 1.5 min is
    1.5, else 90 seconds. Empty where it has none or several, or only a bound."""
    text = MINUS.sub("-", in_digits(text))
    of_ten = r"(?: points?)? ?\(?(?:/ ?100?(?:\.0)?|out of \w+)\)?(?![\w/]|[.,]\d)"
    text = re.sub(rf"(?<=\d){of_ten}", "", text)  # 9.5/10
    text = re.split(r"(?<=\d)\W{1,3}(?:not|rather than|instead of) (?=\d)", text)[0]  # 3, not 4
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
    if unit.startswith(("min", "h")) and unit != "hundred":
        return value, value * (60 if unit[0] == "m" else 3600)
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
    for part in clock.replace(",", ".").split(":") if ":" in clock else [clock]:
        total = 60 * total + decimal(part)
    return total


def time_span(text: str) -> tuple[float, float] | None:
    """(start, end) in seconds of a text such as "12.5-18", "from 12.5 s to 18 s" or "00:12 –
    00:18"; None where it is no span."""
    text = re.sub(r"(?<=[\[(])([\d.:]++),(?=[\d.:]++[\])])", r"\1, ", in_digits(text))  # [12,15]
    text = text.replace("_", " ").replace("第", "")
    text = re.sub(r"(?<!\d)(\d{1,3})'([0-5]\d)(?!\d)", r"\1:\2", text)  # 1'30
    found = list(MOMENT.finditer(text))
    if len(found) != 2 or not BETWEEN.fullmatch(text[found[0].end() : found[1].start()]):
        return None
    minutes = [bool(m[2]) or ":" not in m[1] and bool(found[1][2]) for m in found]
    start, end = (seconds(m[1]) * (60 if in_min else 1) for m, in_min in zip(found, minutes))
    refused = re.search(r"\bnot\b|n't\b|不|\d ?(?:%|percent\b|h(?:ours?|rs?)?\b)", text)
    negative = re.match(r"\W*-\d", text)
    return (start, end) if start <= end < math.inf and not refused and not negative else None
