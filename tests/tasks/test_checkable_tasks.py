import json
import math
import re
from collections import Counter, defaultdict
from itertools import permutations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.tasks import Task, grade
from openqwen.tasks.checkable import (
    KINDS,
    SPLITS,
    draw_task,
    generate_tasks,
    split_of,
    stands_alone,
    stream_tasks,
    with_closing,
)
from openqwen.tasks.checkable.words import WORDS
from problems import problem


def rng(name="test", seed=0):
    return Generators(seed)[name]


def many(kind: str, n: int = 200) -> list[Task]:
    source = rng(kind)
    return [draw_task(kind, source) for _ in range(n)]


def passes(task: Task, *answers: str) -> list[bool]:
    return [one.passed for one in grade([task] * len(answers), answers)]


def test_words_are_plain_short_and_different():
    assert 250 <= len(WORDS) <= 350
    assert len(set(WORDS)) == len(WORDS)
    assert all(re.fullmatch("[a-z]{3,7}", word) for word in WORDS)


def test_seventeen_kinds_and_three_graders_are_data():
    assert len(KINDS) == 17
    tasks = [draw_task(kind, rng()) for kind in KINDS]
    assert {task.grader for task in tasks} == {"exact", "json", "regex"}
    assert json.loads(json.dumps([task.__dict__ for task in tasks])) == [t.__dict__ for t in tasks]


@pytest.mark.parametrize("kind", KINDS)
def test_own_answers_pass_and_wrong_answers_fail(kind):
    for task in many(kind):
        answer = task.reference["answer"]
        assert passes(task, answer, f" {answer}\n") == [True, True]
        assert task.reference["wrong"]
        wrong = ["", " ", task.question, answer + " x", answer + answer, "x" + answer]
        assert not any(passes(task, *task.reference["wrong"], *wrong)), task.question


@pytest.mark.parametrize("kind", KINDS)
def test_a_closing_word_changes_the_style_and_not_the_grade(kind):
    for task in many(kind, 20):
        answer, wrong = task.reference["answer"], task.reference["wrong"]
        closed = with_closing(answer)
        assert passes(task, closed, f"{closed}\n", f"{answer}\nDone.") == [True] * 3
        bad = [*map(with_closing, wrong), with_closing(closed), "Done.", f"{answer}Done."]
        assert not any(passes(task, *bad)), task.question
        assert stands_alone(answer)
        assert not stands_alone(f"{closed}\n")


@pytest.mark.parametrize("kind", KINDS)
def test_tasks_are_short_and_varied(kind):
    tasks = many(kind)
    assert all(len(task.question) <= 80 and len(task.reference["answer"]) <= 50 for task in tasks)
    first_words = {task.question.split()[0] for task in tasks}
    assert len(first_words) >= 2, "several phrasings"
    assert len({task.question for task in tasks}) > 0.9 * len(tasks), "many different prompts"


def solve(kind: str, question: str) -> str:
    """The right answer, computed from the question's text alone."""
    numbers = [int(n) for n in re.findall(r"\d+", question)]
    listed = [w for w in re.findall(r"[a-z]+", question.split(":")[-1]) if w in WORDS]
    match kind:
        case "add":
            return str(sum(numbers))
        case "subtract":
            return str(abs(numbers[0] - numbers[1]))
        case "compare":
            return str(max(numbers) if "larger" in question else min(numbers))
        case "sort":
            return " ".join(map(str, sorted(numbers)))
        case "count":
            return str(len(listed))
        case "occurrences":
            target = next(w for w in re.findall(r"[a-z]+", question.split(":")[0]) if w in WORDS)
            return str(listed.count(target))
        case "contains":
            target, *items = [w for w in re.findall(r"[a-z]+", question) if w in WORDS]
            return "yes" if target in items else "no"
        case "repeat":
            times = {"twice": 2, "three": 3, "four": 4, "five": 5}
            n = numbers[0] if numbers else next(n for word, n in times.items() if word in question)
            return " ".join([next(w for w in re.findall(r"[a-z]+", question) if w in WORDS)] * n)
        case "place":
            ordinal = re.search("first|second|third|last", question.split(":")[0])[0]
            return (
                listed[-1]
                if ordinal == "last"
                else listed[["first", "second", "third"].index(ordinal)]
            )
        case "reverse":
            return " ".join(reversed(listed))
        case "initials":
            return " ".join(word[0] for word in listed)
        case "equation":
            a, sign, b = re.search(r"(\d+) ([+-]) (\d+)", question).groups()
            return f"{a} {sign} {b} = {int(a) + int(b) if sign == '+' else int(a) - int(b)}"
    raise AssertionError(kind)


SOLVED = [
    "add",
    "subtract",
    "compare",
    "sort",
    "count",
    "occurrences",
    "contains",
    "place",
    "reverse",
    "initials",
]


@pytest.mark.parametrize("kind", [*SOLVED, "repeat", "equation"])
def test_answers_agree_with_an_independent_solver(kind):
    for task in many(kind):
        assert solve(kind, task.question) == task.reference["answer"], task.question


# The answers that a question itself names, for a guesser who picks one of them blindly.
NAMED = {
    "compare": lambda q: re.findall(r"\d+", q),
    "sort": lambda q: [" ".join(order) for order in permutations(re.findall(r"\d+", q))],
    "contains": lambda q: ["yes", "no"],
    "place": lambda q: q.split(":")[1].split(),
    "reverse": lambda q: [" ".join(order) for order in permutations(q.split(":")[1].split())],
}


@pytest.mark.parametrize("kind", KINDS)
def test_chance_is_the_best_blind_guess(kind):
    tasks = many(kind, 2000)
    chance = math.fsum(task.reference["chance"] for task in tasks) / len(tasks)
    # One constant answer: the commonest of one half of the tasks, scored on the other half.
    best, _ = Counter(task.reference["answer"] for task in tasks[:1000]).most_common(1)[0]
    graded = grade(tasks[1000:], [best] * 1000)
    constant = sum(one.passed for one in graded) / 1000
    guesses = 0.0
    if kind in NAMED:
        shares = [passes(task, *NAMED[kind](task.question)) for task in tasks]
        guesses = sum(sum(share) / len(share) for share in shares) / len(shares)
    assert abs(max(constant, guesses) - chance) < 0.03
    if kind in NAMED:
        assert guesses == pytest.approx(chance, abs=1e-9)


@pytest.mark.parametrize("kind", ["add", "subtract", "equation", "repeat", "count", "occurrences"])
def test_the_most_common_answer_is_as_common_as_chance_says(kind):
    tasks = many(kind, 4000)
    common = Counter(task.reference["answer"] for task in tasks).most_common(1)[0][1] / len(tasks)
    deviation = math.sqrt(tasks[0].reference["chance"] / len(tasks))
    assert abs(common - tasks[0].reference["chance"]) < 6 * deviation


def test_splits_never_cross_and_prompts_never_repeat():
    train = generate_tasks(rng("a"), 3000)
    held, test = (generate_tasks(rng("b"), 1000, split=split) for split in ("heldout", "test"))
    for split, tasks in zip(SPLITS, (train, held, test)):
        questions = [task.question for task in tasks]
        assert len(set(questions)) == len(questions)
        assert {split_of(task.origin["problem"]) for task in tasks} == {split}
    counts = Counter(task.kind for task in train).values()
    assert max(counts) - min(counts) <= 1
    stream = stream_tasks(rng("c"))
    assert all(split_of(next(stream).origin["problem"]) == "train" for _ in range(500))


@pytest.mark.parametrize("kind", KINDS)
def test_a_problem_is_what_its_question_asks(kind):
    assert all(problem(task.question) == task.origin["problem"] for task in many(kind, 400))


def test_no_problem_is_in_two_splits_however_it_is_put():
    """Read from the questions' texts; 4 + 7 and 7 + 4 are one problem in every kind of task."""
    splits = {
        split: generate_tasks(rng(split), 3000 if split == "train" else 1200, split=split)
        for split in SPLITS
    }
    problems = {
        split: {problem(task.question) for task in tasks} for split, tasks in splits.items()
    }
    for one, other in (("train", "heldout"), ("train", "test"), ("heldout", "test")):
        assert not problems[one] & problems[other]
    sums = {
        split: {p for p in group if p.startswith(("add", "subtract"))}
        for split, group in problems.items()
    }
    assert min(map(len, sums.values())) > 30
    assert "add 4 7" in {problem(f"{a} + {b} = ?") for a, b in ((4, 7), (7, 4))}
    assert problem("Write out 7 + 4 with its result.") == "add 4 7"


@pytest.mark.parametrize("split", ["heldout", "test"])
def test_a_tenth_is_held_out_and_another_for_the_test(split):
    stream = rng("share")
    tasks = [draw_task(kind, stream) for kind in KINDS for _ in range(200)]
    share = sum(split_of(task.origin["problem"]) == split for task in tasks) / len(tasks)
    assert 0.07 < share < 0.13


def test_same_seed_same_tasks():
    def key(tasks):
        return [(t.kind, t.question, t.reference["answer"], t.reference["wrong"]) for t in tasks]

    assert key(generate_tasks(rng(seed=1), 300)) == key(generate_tasks(rng(seed=1), 300))
    assert key(generate_tasks(rng(seed=1), 300)) != key(generate_tasks(rng(seed=2), 300))


def test_there_are_enough_prompts_for_the_recipe():
    tasks = generate_tasks(rng("plenty"), 34_000)
    counts = Counter(task.kind for task in tasks)
    assert set(counts) == set(KINDS)
    assert min(counts.values()) >= 1000  # small numbers run out first
    assert max(counts.values()) < 2500


def test_a_used_up_kind_leaves_its_share_and_all_used_up_is_an_error():
    with pytest.raises(OpenQwenError, match="different prompts, not"):
        generate_tasks(rng(), 5_000, split="heldout", kinds=["equation"])
    mixed = generate_tasks(rng(), 1200, split="heldout", kinds=["equation", "json"])
    assert Counter(t.kind for t in mixed)["json"] > 600


def test_unknown_split_is_refused():
    with pytest.raises(ValueError, match="split"):
        generate_tasks(rng(), 1, split="validation")


HUGE = [
    "9" * 10_000_000,
    "[" * 5_000_000,
    '{"a":' * 1_000_000,
    " " * 5_000_000 + "7",
    "- a\n" * 1_000_000,
    "a " * 4000,
]
STRANGE = [
    "٧",
    "７",
    "\x00",
    "\ud800",
    "7\u200b",
    "1e999",
    "NaN",
    "[" * 150,
    '{"a": ' * 33,
    "²",
    "yes\x00",
    "−1",
    "- ",
]


@pytest.mark.parametrize("text", HUGE + STRANGE, ids=lambda t: repr(t[:8]))
def test_checkers_survive_adversaries(text):
    source = rng("adversary")
    tasks = [draw_task(kind, source) for kind in KINDS]
    assert not any(one.passed for one in grade(tasks, [text] * len(tasks)))


@given(st.text(max_size=60))
@settings(max_examples=25, deadline=None)
def test_checkers_take_any_text(text):
    source = rng("fuzz")
    tasks = [draw_task(kind, source) for kind in KINDS]
    assert len(grade(tasks, [text] * len(tasks))) == 17


def test_json_is_judged_by_value_and_type():
    for task in many("json", 100):
        answer = task.reference["answer"]
        ((key, value),) = json.loads(answer).items()
        same = ({"indent": 2}, {"separators": (",", ":")})
        assert all(passes(task, *(json.dumps({key: value}, **how) for how in same)))
        other = str(value) if isinstance(value, int) else [value]
        bad = [{key: other}, {key: value, "more": 1}, [answer], {key.upper(): value}, {key: None}]
        bad += [{}, value, {key: bool(value)}]
        assert not any(passes(task, *map(json.dumps, bad)))
        twice = answer.replace("{", f'{{"{key}": 1, ')
        assert passes(task, twice, answer.replace('"', "'")) == [False, False]


def test_exact_words_takes_any_filling_of_the_right_length():
    for task in many("exact_words", 100):
        first, *middle, last = task.reference["answer"].split()
        assert passes(task, " ".join([first, *["x"] * len(middle), last])) == [True]
        bad = (
            [first, last],
            [first, *["x"] * (len(middle) + 1), last],
            [first, *["X1"] * len(middle), last],
        )
        assert not any(
            passes(task, *map(" ".join, bad), task.reference["answer"].replace(" ", "  "))
        )


def test_bullets_may_be_stars_but_not_mixed():
    for task in many("bullets", 20):
        answer = task.reference["answer"]
        bad = (answer.replace("- ", "* ", 1), answer.replace("- ", "-"))
        assert passes(task, answer.replace("- ", "* "), *bad) == [True, False, False]


def test_wrong_answers_are_different_from_each_other():
    by_kind = defaultdict(set)
    for kind in KINDS:
        for task in many(kind, 50):
            assert len(set(task.reference["wrong"])) == len(task.reference["wrong"])
            by_kind[kind].add(len(task.reference["wrong"]))
    assert all(min(sizes) >= 1 for sizes in by_kind.values())
