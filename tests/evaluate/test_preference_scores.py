import pytest

from openqwen.evaluate import near_misses, pair_accuracy, win_rate


def by_length(conversations):
    return [float(len(messages[-1]["content"])) for messages in conversations]


def prompt(text):
    return [{"role": "user", "content": text}]


def pair(chosen, rejected, task):
    return {
        "prompt": prompt("?"),
        "chosen": [{"role": "assistant", "content": chosen}],
        "rejected": [{"role": "assistant", "content": rejected}],
        "origin": {"task": task},
    }


def test_pair_accuracy_overall_and_by_task():
    pairs = [
        pair("aaa", "a", "long"),
        pair("a", "aaa", "short"),
        pair("aa", "bb", "short"),
        pair("aaa", "", "long"),
    ]
    result = pair_accuracy(by_length, pairs)
    assert result["pair_accuracy"] == 2.5 / 4
    assert result["n"] == 4
    assert result["pair_accuracy_by_task"] == {
        "long": {"accuracy": 1.0, "n": 2},
        "short": {"accuracy": 0.25, "n": 2},
    }
    assert result["pair_accuracy_low"] < 2.5 / 4 < result["pair_accuracy_high"]


def test_near_misses_are_the_models_own_cool_errors():
    pairs = [
        pair("a", str(t), "t") | {"origin": {"task": "t", "temperature": t}}
        for t in (0.5, 1.0, 1.5)
    ]
    assert near_misses([*pairs, pair("a", "the program's", "t")]) == pairs[:2]


def test_the_scorer_sees_prompt_and_answer():
    seen = []

    def score(conversations):
        seen.extend(conversations)
        return [0.0] * len(conversations)

    pair_accuracy(score, [pair("yes", "no", "t")])
    assert seen == [
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}],
        [{"role": "user", "content": "?"}, {"role": "assistant", "content": "no"}],
    ]


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
    with pytest.raises(ValueError, match="no pairs"):
        pair_accuracy(by_length, [])
    with pytest.raises(ValueError, match="no answers"):
        win_rate([], [])
    with pytest.raises(ValueError, match="zip"):
        win_rate([1.0], [])
