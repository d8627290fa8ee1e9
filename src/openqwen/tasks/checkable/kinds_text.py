"""Checkable tasks on words, and on the format of the answer."""

import json
from collections import Counter
from math import factorial

from numpy.random import Generator

from openqwen.tasks.checkable.draft import FORMS, Draft, number, pick, problem_of, words
from openqwen.tasks.checkable.words import WORDS

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
    ordinal = pick(rng, *_PLACES)
    at = len(items) - 1 if ordinal == "last" else _PLACES.index(ordinal)
    answer, others = items[at], (*items[:at], *items[at + 1 :])
    form = pick(rng, *FORMS["place"])
    problem = problem_of("place", at, *items)  # the last of three is the third
    return Draft(problem, form.format(p=ordinal, x=" ".join(items)), answer, others, 1 / len(items))


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


def json_object(rng: Generator) -> Draft:
    """A JSON object with one given key and a word or a number as its value."""
    key, word = words(rng, 2)
    value = word if rng.integers(2) else number(rng, 0, 99)
    form = pick(rng, *FORMS["json"])
    wrong = (
        f"{{{key}: {value}}}",
        f'"{key}": {json.dumps(value)}',
        json.dumps({str(value): key}),
        f"{key} = {value}",
    )
    problem, question = problem_of("json", key, value), form.format(k=key, v=value)
    return Draft(problem, question, json.dumps({key: value}), wrong, 0.0, grader="json")


def bullets(rng: Generator) -> Draft:
    """Two or three items as a list, one a line, all behind "- " or all behind "* "."""
    items = words(rng, number(rng, 2, 3))
    form = pick(rng, *FORMS["bullets"])
    answer = "\n".join(f"- {item}" for item in items)
    wrong = (
        "\n".join(items),
        ", ".join(items),
        "\n".join(f"- {item}" for item in items[::-1]),
        f"- {items[0]}",
    )
    pattern = "([-*]) " + r"\n\1 ".join(items)
    problem, question = problem_of("bullets", *items), form.format(", ".join(items))
    return Draft(problem, question, answer, wrong, 0.0, grader="regex", pattern=pattern)


def exact_words(rng: Generator) -> Draft:
    """Three to five words of lower-case letters, the first and the last given; the rest is free."""
    n = number(rng, 3, 5)
    first, *middle, last = words(rng, n)
    form = pick(rng, *FORMS["exact_words"])
    more = words(rng, 1)
    lists = (
        [first, *middle, *more, last],
        [first, *middle[1:], last],
        [last, *middle, first],
        [first, *middle, *more],
    )
    wrong = tuple(" ".join(items) for items in lists)
    question, answer = form.format(n=n, a=first, b=last), " ".join([first, *middle, last])
    problem = problem_of("exact_words", n, first, last)
    pattern = f"{first} ([a-z]+ ){{{n - 2}}}{last}"
    return Draft(problem, question, answer, wrong, 0.0, grader="regex", pattern=pattern)


def equation(rng: Generator) -> Draft:
    """A sum or difference as `37 + 2 = 39`: its problems are those of `add` and `subtract`."""
    a, b = number(rng, 0, 99), number(rng, 1, 3)
    sign = pick(rng, "+", "-")
    if sign == "-":
        a += b
    result = a + b if sign == "+" else a - b
    form = pick(rng, *FORMS["equation"])
    left = f"{a} {sign} {b}"
    wrong = (str(result), left, f"{left} = {result + 1}", f"{left} = {abs(result - 1)}")
    problem = problem_of("add", *sorted((a, b))) if sign == "+" else problem_of("subtract", a, b)
    return Draft(problem, form.format(a=a, b=b, s=sign), f"{left} = {result}", wrong, 1 / 600)


TEXT_KINDS = {
    "repeat": repeat,
    "place": place,
    "join": join,
    "reverse": reverse,
    "initials": initials,
    "quote": quote,
    "json": json_object,
    "bullets": bullets,
    "exact_words": exact_words,
    "equation": equation,
}
