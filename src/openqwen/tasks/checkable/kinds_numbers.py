"""Checkable tasks on small numbers, and on counting."""

from math import factorial

from numpy.random import Generator

from openqwen.tasks.checkable.draft import FORMS, Draft, number, pick, problem_of, words


def _near(value: int, *others: int) -> tuple[str, ...]:
    """Plausible wrong values: one more, one less, and others that suit the task."""
    return tuple(str(v) for v in (value + 1, value - 1, *others) if v >= 0)


def add(rng: Generator) -> Draft:
    """A number below 100 plus 1, 2 or 3, in either order; no sum is likelier than 1/100."""
    a, b = number(rng, 0, 99), number(rng, 1, 3)
    form = pick(rng, *FORMS["add"])
    first, second = (a, b) if rng.integers(2) else (b, a)
    problem = problem_of("add", *sorted((a, b)))
    wrong = _near(a + b, a + b + 10, abs(a - b))
    return Draft(problem, form.format(first, second), str(a + b), wrong, 1 / 100)


def subtract(rng: Generator) -> Draft:
    """A number minus 1, 2 or 3; each difference between 0 and 99 equally often."""
    difference, b = number(rng, 0, 99), number(rng, 1, 3)
    a = difference + b
    form = pick(rng, *FORMS["subtract"])
    wrong = _near(difference, difference + 10, a + b)
    problem = problem_of("subtract", a, b)
    return Draft(problem, form.format(a=a, b=b), str(difference), wrong, 1 / 100)


def compare(rng: Generator) -> Draft:
    """The larger or the smaller of two different numbers below 100; both stand in the question."""
    a = number(rng, 0, 99)
    b = (a + number(rng, 1, 99)) % 100
    which = pick(rng, "larger", "smaller")
    form = pick(rng, *FORMS["compare"])
    answer, other = (max(a, b), min(a, b)) if which == "larger" else (min(a, b), max(a, b))
    problem = problem_of("compare", *sorted((a, b)))  # to know the larger one is to know the other
    return Draft(problem, form.format(which=which, a=a, b=b), str(answer), (str(other),), 0.5)


def sort(rng: Generator) -> Draft:
    """Two or three different numbers below 30 in rising order."""
    count = number(rng, 2, 3)
    values: list[int] = []
    while len(values) < count:
        value = number(rng, 0, 29)
        if value not in values:
            values.append(value)
    form = pick(rng, *FORMS["sort"])
    rising = sorted(values)
    answer = " ".join(map(str, rising))
    orders = (rising[::-1], values, [*rising[1:], rising[0]])
    wrong = tuple(" ".join(map(str, order)) for order in orders)
    problem = problem_of("sort", *rising)
    question = form.format(" ".join(map(str, values)))
    return Draft(problem, question, answer, wrong, 1 / factorial(count))


def count(rng: Generator) -> Draft:
    """How many words a list of one to six has."""
    n = number(rng, 1, 6)
    form = pick(rng, *FORMS["count"])
    separator = pick(rng, " ", ", ")
    items = words(rng, n)
    problem = problem_of("count", *sorted(items))
    return Draft(problem, form.format(separator.join(items)), str(n), _near(n), 1 / 6)


def occurrences(rng: Generator) -> Draft:
    """How often, zero to three times, a word stands in a list of up to five."""
    n = number(rng, 0, 3)
    target, *others = words(rng, 4)
    items = [target] * n + others[: number(rng, 1, 2) if n else number(rng, 2, 3)]
    items = [items[i] for i in rng.permutation(len(items))]
    form = pick(rng, *FORMS["occurrences"])
    problem = problem_of("occurrences", target, *sorted(items))
    question = form.format(w=target, x=" ".join(items))
    return Draft(problem, question, str(n), _near(n, len(items)), 1 / 4)


def contains(rng: Generator) -> Draft:
    """Whether a word stands in a list of two to four; yes and no equally often."""
    target, *items = words(rng, number(rng, 3, 5))
    present = bool(rng.integers(2))
    if present:
        items[int(rng.integers(len(items)))] = target
    form = pick(rng, *FORMS["contains"])
    answer, other = ("yes", "no") if present else ("no", "yes")
    problem = problem_of("contains", target, *sorted(items))
    return Draft(problem, form.format(w=target, x=", ".join(items)), answer, (other,), 0.5)


NUMBER_KINDS = {
    "add": add,
    "subtract": subtract,
    "compare": compare,
    "sort": sort,
    "count": count,
    "occurrences": occurrences,
    "contains": contains,
}
