"""Checkable tasks on words (strings) and on the form of the answer (format)."""

import json
from collections import Counter
from math import factorial
from typing import Any

from numpy.random import Generator

from openqwen.instruct.synthesize.kinds import (
    FORMS,
    LETTERS,
    Draft,
    Kind,
    number,
    pick,
    problem_of,
    words,
)
from openqwen.instruct.synthesize.words import WORDS

_TIMES = {2: "twice", 3: "three times", 4: "four times", 5: "five times"}
_PLACES = ("first", "second", "third", "last")
_JOINTS = {"hyphens": "-", "underscores": "_", "commas": ", ", "slashes": "/", "plus signs": "+"}
_QUOTES = {
    "double quotes": '""',
    "single quotes": "''",
    "parentheses": "()",
    "square brackets": "[]",
}
_INITIAL_SHARE = max(Counter(word[0] for word in WORDS).values()) / len(WORDS)


def repeat(rng: Generator) -> Draft:
    """A word two to five times over."""
    (word,), n = words(rng, 1), number(rng, 2, 5)
    form = pick(rng, *FORMS["repeat"])
    answer = " ".join([word] * n)
    wrong = tuple(" ".join([word] * k) for k in (n - 1, n + 1))
    question = form.format(w=word, n=n, t=_TIMES[n])
    return Draft(problem_of("repeat", word, n), question, answer, wrong, 1 / (4 * len(WORDS)))


def place(rng: Generator) -> Draft:
    """The first, second, third or last of three or four words."""
    items = words(rng, number(rng, 3, 4))
    ask = pick(rng, *_PLACES)
    at = len(items) - 1 if ask == "last" else _PLACES.index(ask)
    answer, others = items[at], (*items[:at], *items[at + 1 :])
    form = pick(rng, *FORMS["place"])
    problem = problem_of("place", at, *items)  # the last of three is the third
    return Draft(problem, form.format(p=ask, x=" ".join(items)), answer, others, 1 / len(items))


def join(rng: Generator) -> Draft:
    """Two to four words with a given sign between them."""
    items = words(rng, number(rng, 2, 4))
    name = pick(rng, *_JOINTS)
    form = pick(rng, *FORMS["join"])
    answer = _JOINTS[name].join(items)
    wrong = (
        " ".join(items),
        *(sign.join(items) for sign in _JOINTS.values()),
        _JOINTS[name].join(items[:-1]),
    )
    problem = problem_of("join", name, *items)
    return Draft(problem, form.format(s=name, x=" ".join(items)), answer, wrong, 0.0)


def reverse(rng: Generator) -> Draft:
    """Two to four words in reverse order."""
    items = words(rng, number(rng, 2, 4))
    form = pick(rng, *FORMS["reverse"])
    orders = (items, [*items[1:], items[0]], items[:0:-1])
    wrong = tuple(" ".join(order) for order in orders)
    chance = 1 / factorial(len(items))
    problem = problem_of("reverse", *items)
    return Draft(problem, form.format(" ".join(items)), " ".join(items[::-1]), wrong, chance)


def initials(rng: Generator) -> Draft:
    """The first letters of two or three words.

    A constant answer needs every letter right for one length.
    """
    items = words(rng, number(rng, 2, 3))
    form = pick(rng, *FORMS["initials"])
    letters = [word[0] for word in items]
    wrong = (
        " ".join(letters[::-1]),
        " ".join(letters[:-1]),
        " ".join([*letters[:-1], items[-1][1]]),
    )
    question, chance = form.format(" ".join(items)), _INITIAL_SHARE**2 / 2
    return Draft(problem_of("initials", *items), question, " ".join(letters), wrong, chance)


def quote(rng: Generator) -> Draft:
    """One or two words between given signs, copied letter for letter."""
    text = " ".join(words(rng, number(rng, 1, 2)))
    name = pick(rng, *_QUOTES)
    form = pick(rng, *FORMS["quote"])
    quoted = {other: signs[0] + text + signs[1] for other, signs in _QUOTES.items()}
    wrong = (text, *quoted.values(), quoted[name][:-1])
    question = form.format(x=text, s=name)
    return Draft(problem_of("quote", name, text), question, quoted[name], wrong, 0.0)


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    if len({key for key, _ in pairs}) < len(pairs):
        raise ValueError("a key stands twice")
    return dict(pairs)


def _is_object(text: str, wanted: dict[str, Any]) -> bool:
    """Whether the text is JSON for exactly `wanted`, down to the types, no key standing twice."""
    try:
        value = json.loads(text, object_pairs_hook=_unique)
    except (ValueError, RecursionError):
        return False
    return value == wanted and all(type(value[key]) is type(wanted[key]) for key in wanted)


def json_object(rng: Generator) -> Draft:
    """A JSON object with one given key and a word or a number as its value."""
    key, word = words(rng, 2)
    value = word if rng.integers(2) else number(rng, 0, 99)
    form = pick(rng, *FORMS["json"])
    wanted = {key: value}
    wrong = (
        f"{{{key}: {value}}}",
        f'"{key}": {json.dumps(value)}',
        json.dumps({str(value): key}),
        f"{key} = {value}",
    )
    problem, question = problem_of("json", key, value), form.format(k=key, v=value)
    answer = json.dumps(wanted)
    return Draft(problem, question, answer, wrong, 0.0, lambda text: _is_object(text, wanted))


def bullets(rng: Generator) -> Draft:
    """Two or three items as a list, one a line, each behind "- " or "* "."""
    items = words(rng, number(rng, 2, 3))
    form = pick(rng, *FORMS["bullets"])
    listed = ["\n".join(f"{sign} {item}" for item in items) for sign in "-*"]
    wrong = (
        "\n".join(items),
        ", ".join(items),
        "\n".join(f"- {item}" for item in items[::-1]),
        f"- {items[0]}",
    )
    problem, question = problem_of("bullets", *items), form.format(", ".join(items))
    return Draft(problem, question, listed[0], wrong, 0.0, lambda text: text in listed)


def exact_words(rng: Generator) -> Draft:
    """Exactly three to five words of plain lower-case letters, the outer two given; the rest is
    free.
    """
    n = number(rng, 3, 5)
    first, *middle, last = words(rng, n)
    form = pick(rng, *FORMS["exact_words"])

    def accepts(text: str) -> bool:
        found = text.split(" ")
        plain = all(word and LETTERS.issuperset(word) for word in found)
        return plain and len(found) == n and found[0] == first and found[-1] == last

    more = words(rng, 1)
    lists = (
        [first, *middle, *more, last],
        [first, *middle[1:], last],
        [last, *middle, first],
        [first, *middle, *more],
    )
    wrong = tuple(" ".join(found) for found in lists)
    question, answer = form.format(n=n, a=first, b=last), " ".join([first, *middle, last])
    return Draft(problem_of("exact_words", n, first, last), question, answer, wrong, 0.0, accepts)


def equation(rng: Generator) -> Draft:
    """A small sum or difference as `3 + 4 = 7`: its problems are those of `add` and `subtract`."""
    a, b = number(rng, 0, 12), number(rng, 0, 12)
    sign = pick(rng, "+", "-")
    if sign == "-":
        a, b = max(a, b), min(a, b)
    result = a + b if sign == "+" else a - b
    form = pick(rng, *FORMS["equation"])
    left = f"{a} {sign} {b}"
    wrong = (str(result), left, f"{left} = {result + 1}", f"{left} = {abs(result - 1)}")
    problem = problem_of("add", *sorted((a, b))) if sign == "+" else problem_of("subtract", a, b)
    return Draft(problem, form.format(a=a, b=b, s=sign), f"{left} = {result}", wrong, 1 / 169)


TEXT_KINDS = (
    Kind("repeat", "strings", repeat),
    Kind("place", "strings", place),
    Kind("join", "strings", join),
    Kind("reverse", "strings", reverse),
    Kind("initials", "strings", initials),
    Kind("quote", "format", quote),
    Kind("json", "format", json_object),
    Kind("bullets", "format", bullets),
    Kind("exact_words", "format", exact_words),
    Kind("equation", "format", equation),
)
