"""The program that compares answers by math-verify. It runs in the sandbox (mathematics.py).

It reads {"pairs": [[reference, answer], …], "seconds": CPU time of a pair} and prints one line for
each pair: "equal", "no answer", or why the two are not equal.
"""

import json
import re
import resource
import sys
import time
from typing import Any

from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify
from sympy import Abs, Eq, Float, N, Rational

_TARGETS = [LatexExtractionConfig(boxed_match_priority=0), ExprExtractionConfig()]
_SOFT = 3  # seconds after which math-verify gives up, where Python code runs


def compare(reference: str, answer: str) -> str:
    """One line on a pair."""
    bare = "$" not in reference and "boxed" not in reference
    gold = _parsed(f"${reference}$" if bare else reference) or _parsed(reference)
    given = _parsed(answer)
    if not given and not re.search(r"\n|\b(?<!\\)[A-Za-z]{3,}\b", answer):  # a bare formula
        given = _parsed(f"${answer}$")
    if not gold:
        return "the reference cannot be read"
    if not given:
        return "no answer"
    if not verify(gold, given, timeout_seconds=_SOFT):
        return "not equal"
    return _false_positive(gold, given) or "equal"


def _parsed(text: str) -> list[Any]:
    # Its list of units holds \mathrm{e}: 1 - 1/\mathrm{e} would be read as 1.
    text = re.sub(r"\\(?:mathrm|text|operatorname)\{([eid])\}", r"{\1}", text)
    return list(parse(text, _TARGETS, parsing_timeout=_SOFT))


def _false_positive(gold: list[Any], given: list[Any]) -> str:
    """Why a pair is not equal although math-verify accepts it, or ""."""
    for parsed in (gold, given):
        if isinstance(parsed[-1], str) and re.search(r"[-+*/^=({]\s*$", parsed[-1]):
            return "a formula was read in part only"
    if gold[-1] == given[-1]:  # the same text
        return ""
    a, b = gold[0], given[0]
    if isinstance(b, Eq) and not isinstance(a, Eq) and b.lhs.free_symbols and not _is_name(b.lhs):
        return "an equation is not its right side"
    if not (getattr(a, "is_number", False) and getattr(b, "is_number", False)):
        return ""
    percent = "%" in f"{gold[-1]} {given[-1]}"
    factors = [1, 100, Rational(1, 100)] if percent else [1]
    if any(_near(a * factor, b) for factor in factors):
        return ""
    return "not equal: the numbers differ by less than math-verify's tolerance"


def _is_name(expression: Any) -> bool:
    return expression.is_Symbol or expression.is_Function or not expression.is_Add


def _near(a: Any, b: Any) -> bool:
    """Whether two numbers agree to twelve digits, or to five where one of them is a decimal."""
    digits = 5 if a.has(Float) or b.has(Float) else 12
    a, b = N(a, 40), N(b, 40)
    scale = max(Abs(a), Abs(b))
    if a == 0 or b == 0:  # the other is zero too, but for rounding
        return bool(scale < 10**-100)
    return bool(Abs(a - b) <= scale * 10**-digits)


def main() -> None:
    """Compare the pairs of standard input."""
    work = json.load(sys.stdin)
    hard = resource.getrlimit(resource.RLIMIT_CPU)[1]
    for reference, answer in work["pairs"]:
        soft = int(time.process_time()) + work["seconds"]
        resource.setrlimit(resource.RLIMIT_CPU, (min(soft, hard), hard))
        try:
            line = compare(reference, answer)
        except Exception as error:
            line = f"{type(error).__name__}: {error}"
        print(" ".join(line.split())[:300], flush=True)


if __name__ == "__main__":
    main()
