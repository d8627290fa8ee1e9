"""Reasoning paths: their equations, and which of several paths differ most (RFT).

Yuan et al. 2023, "Scaling Relationship on Learning Mathematical Reasoning with Large Language
Models", 3.3 and appendix: of the paths with one list of equations one is kept, the one whose edit
distance to the other kept paths is largest.
"""

import ast
import operator
import re
from collections.abc import Callable, Sequence
from fractions import Fraction
from typing import Any

_NUMBER = r"-?(?:\d[\d,]{0,30}\.?\d{0,30}|\.\d{1,30})"
# The counts are limits: without them a long row of "(" or "1+" would take quadratic time.
_TERM = rf"[$€£¥(\s]{{0,8}}{_NUMBER}[\s)%]{{0,8}}"
# A result that an operator follows is a part of the next expression: "3*4 + 2 = 12 + 2 = 14".
_EQUATION = re.compile(
    rf"({_TERM}(?:[-+*/]{_TERM}){{1,12}})=\s*[$€£¥]?\s*({_NUMBER})(%?)(?![\d.,]*\d|\s*[-+*/]\s*[$(\d])"
)
_TOLERANCE = Fraction(1, 100)  # relative: a solution may round
_OPERATIONS: dict[type, Callable[[Any, Any], Fraction]] = {
    ast.Add: operator.add,
    ast.Sub: operator.sub,
    ast.Mult: operator.mul,
    ast.Div: operator.truediv,
}
_LONGEST = 20_000  # characters of a path that are read


def equations(path: str) -> list[tuple[str, str]]:
    """The calculations in a text, in order: ("48/2", "24") for "48 / 2 = $24".

    Read are GSM8K's calculator marks, LaTeX's \\times, \\div, \\frac{a}{b}, and ×, ÷ and x between
    numbers.
    """
    text = path[:_LONGEST]
    text = re.sub(r"=\s*<<[^<>]*>>", "=", text)  # "48/2 = <<48/2=24>>24"
    text = re.sub(r"\\frac\{([^{}]*)\}\{([^{}]*)\}", r"(\1)/(\2)", text)
    text = re.sub(r"\\text\{[^{}]*\}|\\[,;! ]|\\left|\\right|\\\(|\\\)|\\\[|\\\]|<<|>>", " ", text)
    text = re.sub(r"\\times|\\cdot|×|(?<=[\d\s)])[x∗](?=[\s(]*[$]?\d)", "*", text)
    text = re.sub(r"\\div|÷", "/", text).replace("\\$", "$").replace("\\%", "%")
    text = text.replace("−", "-").replace("–", "-")
    found = []
    for match in _EQUATION.finditer(text):
        left = re.sub(r"[$€£¥,\s]", "", match[1]).replace("%", "/100")
        found.append((left, match[2].replace(",", "").rstrip(".") + match[3]))
    return found


def holds(equation: tuple[str, str]) -> bool:
    """Whether a calculation is right, to one per cent; True where its left side cannot be read."""
    left, right = equation
    try:
        value = _value(ast.parse(left, mode="eval").body)
        result = Fraction(right.rstrip("%"))
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return True
    results = [result, result / 100] if right.endswith("%") else [result]
    return any(abs(value - r) <= _TOLERANCE * max(abs(value), abs(r)) for r in results)


def _value(node: ast.AST) -> Fraction:
    """The value of a parsed expression of + - * / and numbers; ValueError for anything else."""
    if isinstance(node, ast.Constant) and isinstance(node.value, int | float):
        return Fraction(str(node.value))
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_value(node.operand)
    if isinstance(node, ast.BinOp) and type(node.op) in _OPERATIONS:
        return _OPERATIONS[type(node.op)](_value(node.left), _value(node.right))
    raise ValueError("no arithmetic")


def distinct(paths: Sequence[str]) -> list[int]:
    """Indices of one path for each list of equations, in the order of their first.

    Where a later path has the equations of a kept one, it takes its place if its edit distance to
    the other kept paths adds up to more. Paths without equations count as the same only if their
    text is the same.
    """
    kept: dict[object, int] = {}
    for index, path in enumerate(paths):
        found = equations(path)
        key = tuple(found) if found else path.strip()
        if key not in kept:
            kept[key] = index
        if kept[key] == index or not found:
            continue
        others = [paths[other] for name, other in kept.items() if name != key]
        old = sum(edit_distance(paths[kept[key]], other) for other in others)
        if sum(edit_distance(path, other) for other in others) > old:
            kept[key] = index
    return list(kept.values())


def most_different(paths: Sequence[str], count: int) -> list[int]:
    """Indices of `count` of the paths, the first and then always the farthest from those chosen.

    A path's distance to the chosen ones is that to the nearest of them.
    """
    chosen = list(range(min(1, len(paths), count)))
    nearest = [edit_distance(path, paths[0]) for path in paths] if chosen else []
    while len(chosen) < min(count, len(paths)):
        rest = [index for index in range(len(paths)) if index not in chosen]
        best = max(rest, key=lambda index: (nearest[index], -index))
        chosen.append(best)
        new = [edit_distance(path, paths[best]) for path in paths]
        nearest = [min(pair) for pair in zip(nearest, new, strict=True)]
    return sorted(chosen)


def contrasts(right: Sequence[str], wrong: Sequence[str], count: int) -> list[tuple[str, str]]:
    """Up to `count` pairs of a right and a wrong path that share their beginning.

    The wrong ones are taken evenly from first to last. Each stands against the right one that
    shares the longest beginning with it: the pair then differs in the error alone.
    """
    if not right or not count:
        return []
    if len(wrong) > count:
        step = (len(wrong) - 1) / max(count - 1, 1)
        wrong = [wrong[round(n * step)] for n in range(count)]
    return [(max(right, key=lambda text: _shared(text, other)), other) for other in wrong]


def _shared(a: str, b: str) -> int:
    """Characters up to the first difference."""
    differences = (n for n, (one, other) in enumerate(zip(a, b)) if one != other)
    return next(differences, min(len(a), len(b)))


def edit_distance(a: str, b: str) -> int:
    """Levenshtein's distance, by bits (Myers 1999, Hyyrö 2003): one step for each character of b.

    The bits of `up` and `down` are the rows where a column of the table rises or falls by one.
    """
    if not a:
        return len(b)
    where: dict[str, int] = {}
    for row, character in enumerate(a):
        where[character] = where.get(character, 0) | 1 << row
    full, last = (1 << len(a)) - 1, 1 << (len(a) - 1)
    up, down, distance = full, 0, len(a)
    for character in b:
        equal = where.get(character, 0)
        diagonal = (((equal & up) + up) ^ up) | equal | down
        right_up = down | ~(diagonal | up) & full
        right_down = up & diagonal
        distance += bool(right_up & last) - bool(right_down & last)
        right_up = (right_up << 1 | 1) & full
        right_down = right_down << 1 & full
        up = right_down | ~(diagonal | right_up) & full
        down = right_up & diagonal
    return distance
