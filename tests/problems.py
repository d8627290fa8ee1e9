"""Read a question back into its problem, from its text and the forms that questions have."""

import re

from openqwen.tasks.checkable.draft import FORMS

PLACES = ["first", "second", "third"]
TIMES = {"twice": 2, "three times": 3, "four times": 4, "five times": 5}


def parse(question: str) -> tuple[str, dict[str, str], list[str]]:
    """(kind, its operands by name, and those without a name)."""
    matches = []
    for kind, forms in FORMS.items():
        for form in forms:
            pattern = re.sub(r"\\\{\w*\\\}", "(.+?)", re.escape(form))
            if match := re.fullmatch(pattern, question):
                fixed = len(re.sub(r"\{\w*\}", "", form))
                matches.append((fixed, kind, re.findall(r"\{(\w*)\}", form), match.groups()))
    _, kind, names, values = max(matches)  # the form with the most text of its own
    named = {name: value for name, value in zip(names, values) if name}
    return kind, named, " ".join(v for n, v in zip(names, values) if not n).replace(",", "").split()


def problem(question: str) -> str:
    """The operation and its operands, sorted where their order changes nothing."""
    kind, named, items = parse(question)
    listed = named.get("x", "").replace(",", "").split()
    if kind == "equation":
        kind, items = ("add" if named["s"] == "+" else "subtract"), [named["a"], named["b"]]
    match kind:
        case "add" | "sort":
            items.sort(key=int)
        case "subtract":
            items = items or [named["a"], named["b"]]
        case "compare":
            items = sorted([named["a"], named["b"]], key=int)
        case "count":
            items.sort()
        case "contains" | "occurrences":
            items = [named["w"], *sorted(listed)]
        case "repeat":
            items = [named["w"], named["n"] if "n" in named else TIMES[named["t"]]]
        case "place":
            items = [PLACES.index(named["p"]) if named["p"] in PLACES else len(listed) - 1, *listed]
        case "join" | "quote":
            items = [named["s"], *listed]
        case "json":
            items = [named["k"], named["v"]]
        case "exact_words":
            items = [named["n"], named["a"], named["b"]]
    return " ".join(map(str, [kind, *items]))
