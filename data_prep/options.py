"""How a question is asked: its phrasing, and its options in an order that the seed and its id
decide."""

import random
import re
import unicodedata
from collections.abc import Iterable, Mapping

from data_prep.entries import brief, field, option
from nanosport.records import LETTERS


def template(seed: int, id: str, phrasings: tuple[str, ...]) -> str:
    """One of several ways to ask."""
    return random.Random(f"{seed}/{id}/phrasing").choice(phrasings)


def labelled(entry, name: str) -> dict[str, str]:
    """The options by label of a field that lists texts such as "A. a smash"."""
    texts = field(entry, name, list)
    plain = (text for text in texts if isinstance(text, str))
    found = (re.fullmatch(r"([A-J])[.):]\s*(\S.*?)\s*", text, re.DOTALL) for text in plain)
    options = {each[1]: each[2] for each in found if each}
    if len(options) != len(texts):
        raise ValueError(f"{name} {brief(texts)}: must be texts with the labels A., B., …")
    return options


def by_label(options: list | dict) -> dict[str, str]:
    """The options that are there by label, those of a list by letter, without the labels where all
    texts begin with theirs."""
    if isinstance(options, list):
        options = {chr(65 + n): text for n, text in enumerate(options)}
    if not isinstance(options, dict):
        raise ValueError(f"options {brief(options)}: must be a list, or an object of labels")
    there = [label for label, text in options.items() if text is not None and str(text).strip()]
    texts = {label: option(options, label) for label in there}
    starts = {label: rf"\(?{re.escape(label)}[.):]+\s*(?=\S)" for label in there}
    if all(re.match(starts[label], text) for label, text in texts.items()):
        texts = {label: re.sub(starts[label], "", text, count=1) for label, text in texts.items()}
    return texts


def shuffle_options(
    seed: int, id: str, right: str, wrong: Iterable[str], num: int = 10
) -> tuple[tuple[str, ...], str]:
    """(options in random order, letter of the right one): the right one and at most num − 1 of the
    wrong ones, each once.

    "None of the above" stays last. Raises ValueError where a wrong one says the same as the right
    one, or one names another by its letter.
    """
    rng = random.Random(f"{seed}/{id}/options")
    same = right.casefold().strip()
    wrong = list({text.casefold().strip(): text for text in reversed(list(wrong))}.values())[::-1]
    if any(text.casefold().strip() == same for text in wrong):
        raise ValueError("options: another one says the same as the right one")
    options = [right, *(wrong if len(wrong) < num else rng.sample(wrong, num - 1))]
    if not wrong:
        raise ValueError("options: must be at least two that differ")
    by_letter = r"\b[A-J]\b\W{1,3}(and|or|nor|&)\W{1,2}[A-J]\b"
    if any(re.search(by_letter, option) for option in options):
        raise ValueError("options: one names others by letter, so their order cannot change")
    rng.shuffle(options)
    options.sort(key=lambda option: "of the above" in option.lower())
    return tuple(options), LETTERS[options.index(right)]


def choose(
    seed: int, id: str, options: Mapping[str, str], answer: str
) -> tuple[tuple[str, ...], str]:
    """shuffle_options for options by label, where `answer` is a label or, as some sources have it,
    the text of an option, or both as in "(A) a smash"."""
    said = answer.casefold().strip()
    right = [label for label in options if label.casefold() == said]
    right = right or [label for label, text in options.items() if text.casefold().strip() == said]
    if not right and (said := slug(answer)):
        right = [
            label
            for label, text in options.items()
            if said in (slug(label), slug(text), slug(f"{label} {text}"))
        ]
    if len(right) != 1:
        raise ValueError(
            f"answer {brief(answer)}: must be one of {', '.join(options)}, or the text of one"
        )
    wrong = (text for label, text in options.items() if label != right[0])
    return shuffle_options(seed, id, options[right[0]], wrong)


def slug(text: str) -> str:
    """The words of a text in small letters, with single hyphens between."""
    return re.sub(r"[\W_]+", "-", unicodedata.normalize("NFKC", text).lower()).strip("-")
