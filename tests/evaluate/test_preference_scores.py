import pytest

from openqwen.evaluate import near_misses, win_rate


def prompt(text):
    return [{"role": "user", "content": text}]


def pair(chosen, rejected, task):
    return {
        "prompt": prompt("?"),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "origin": {"task": task},
    }


def test_near_misses_are_the_models_own_cool_errors():
    pairs = [
        pair("a", str(t), "t") | {"origin": {"task": "t", "temperature": t}}
        for t in (0.5, 1.0, 1.5)
    ]
    assert near_misses([*pairs, pair("a", "the program's", "t")]) == pairs[:2]


def test_win_rate_is_symmetric_and_ties_count_half():
    a, b = [2.0, 1.0, 3.0, 1.0], [1.0, 2.0, 1.0, 1.0]
    forth, back = win_rate(a, b), win_rate(b, a)
    assert (forth["win_rate"], forth["ties"], forth["n"]) == (2.5 / 4, 1, 4)
    assert forth["win_rate"] + back["win_rate"] == 1
    assert forth["low"] == pytest.approx(1 - back["high"])
    assert win_rate(a, a)["win_rate"] == 0.5


def test_wins_by_a_check():
    result = win_rate([True, True, False, False], [False, True, False, False])
    assert (result["win_rate"], result["ties"]) == (2.5 / 4, 3)


def test_nothing_to_compare_is_refused():
    with pytest.raises(ValueError, match="no answers"):
        win_rate([], [])
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [])
