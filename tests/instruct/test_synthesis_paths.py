"""Reasoning paths: equations, edit distance, RFT's selection, the weighted majority."""

import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openqwen.instruct.synthesize.methods.rejection import final_answer, weighted_majority
from openqwen.instruct.synthesize.paths import (
    distinct,
    edit_distance,
    equations,
    holds,
    most_different,
)


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("She sold 48/2 = <<48/2=24>>24 clips.", [("48/2", "24")]),
        ("48 / 2 = $24, and 24 + 48 = 72.", [("48/2", "24"), ("24+48", "72")]),
        (r"\(3 \times 4 = 12\) and \[\frac{12}{5} = 2.4\]", [("3*4", "12"), ("(12)/(5)", "2.4")]),
        ("3 x 4 = 12; 12 ÷ 4 = 3; 5 × $2 = $10", [("3*4", "12"), ("12/4", "3"), ("5*2", "10")]),
        ("(1 + 2) * 3 = 9", [("(1+2)*3", "9")]),
        ("1,000 + 2,500 = 3,500", [("1000+2500", "3500")]),
        ("20% * 50 = 10", [("20/100*50", "10")]),
        ("It is <<2*3=6>>6.", [("2*3", "6")]),
        ("3*4 + 2 = 12 + 2 = 14", [("12+2", "14")]),
        ("48/2 = 48/2 = 24.", [("48/2", "24")]),
        ("x + 2 = 5, so x = 3", []),
        ("no numbers", []),
        ("5 = 5", []),
    ],
)
def test_equations(text, found):
    assert equations(text) == found


@pytest.mark.parametrize(
    ("equation", "right"),
    [
        (("48/2", "24"), True),
        (("48/2", "25"), False),
        (("10/3", "3.33"), True),
        (("10/3", "3.5"), False),
        (("(1+2)*3", "9"), True),
        (("2*(3+4", "14"), True),  # cannot be read: it gets the benefit of the doubt
        (("1/0", "5"), True),
        (("5/20", "25%"), True),
        (("0.1+0.2", "0.3"), True),
        (("--5", "5"), True),
        ((" ".join("(" * 500), "5"), True),
    ],
)
def test_calculations(equation, right):
    assert holds(equation) is right


@pytest.mark.parametrize("text", ["=" * 50_000, "1+" * 20_000, "1 + 1 = " * 9_000, "(" * 50_000])
def test_long_texts_are_read_soon(text):
    equations(text)


def table_distance(a, b):
    """Levenshtein's table as it is defined."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        above, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            above, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, above + (x != y))
    return row[-1]


@given(st.text("ab中", max_size=30), st.text("ab中", max_size=30))
def test_the_edit_distance_is_levenshteins(a, b):
    assert edit_distance(a, b) == table_distance(a, b)


def rft(paths):
    """RFT's selection, transcribed: Yuan et al. 2023, and their collect_rejection_sampling.py."""
    lists, kept = [], []
    for path in paths:
        found = equations(path)
        if found not in lists:
            lists.append(found)
            kept.append(path)
            continue
        at = lists.index(found)
        others = [other for other in kept if other != kept[at]]
        old = sum(table_distance(kept[at], other) for other in others)
        if sum(table_distance(path, other) for other in others) > old:
            kept[at] = path
    return kept


@pytest.mark.parametrize("seed", range(30))
def test_selection_equals_rfts(seed):
    draw = random.Random(seed)
    paths = []
    for _ in range(9):
        parts = [f"{a} + {b} = {a + b}" for a, b in draw.choices([(1, 2), (2, 3), (4, 4)], k=2)]
        words = " ".join(draw.choices(["so", "then", "we get", "it is"], k=draw.randrange(1, 6)))
        paths.append(f"{parts[0]} {words} {parts[1]}")
    assert [paths[i] for i in distinct(paths)] == rft(paths)


def test_paths_without_equations_are_compared_as_texts():
    assert distinct(["a", "b", "a", " b "]) == [0, 1]


@pytest.mark.parametrize("seed", range(10))
def test_the_most_different_are_the_farthest(seed):
    draw = random.Random(seed)
    paths = ["".join(draw.choices("abc", k=draw.randrange(1, 12))) for _ in range(8)]
    chosen = [0]
    while len(chosen) < 4:
        gaps = {
            i: min(table_distance(paths[i], paths[c]) for c in chosen)
            for i in range(8)
            if i not in chosen
        }
        chosen.append(max(gaps, key=gaps.get))
    assert most_different(paths, 4) == sorted(chosen)
    assert most_different(paths, 99) == list(range(8))
    assert most_different([], 4) == []


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}", "42"),
        (r"\boxed{1{,}200}", "1200"),
        ("the answer is $18.", "18"),
        ("#### 7", "7"),
        ("we get 3 and then 5", "5"),
        (r"\boxed{\frac{1}{2}}", "1/2"),
        (r"\boxed{x + 1}", "x+1"),
        ("no idea", None),
        ("", None),
    ],
)
def test_final_answers(text, answer):
    assert final_answer(text) == answer


def test_the_weighted_majority():
    assert weighted_majority(["1", "2", "1", None], None) == ("1", 0.5)
    assert weighted_majority([None, None], None) == (None, 0.0)
    assert weighted_majority([], None) == (None, 0.0)
    winner, share = weighted_majority(["1", "1", "2"], [-3.0, -3.0, 2.0])
    weights = [1 / (1 + math.exp(3)), 1 / (1 + math.exp(-2))]
    assert winner == "2"
    assert share == pytest.approx(weights[1] / (2 * weights[0] + weights[1]))
    assert weighted_majority(["1", "2"], [-1e9, -1e9])[0] == "1"
