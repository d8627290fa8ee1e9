"""Which letter an answer chooses."""

import pytest

from openqwen.support.errors import OpenQwenError
from openqwen.tasks import Grade, Task, grade
from openqwen.tasks.choice import chosen_letter

CASES = [
    ("B", "B"),
    ("(B)", "B"),
    ("A", "A"),
    ("B. Paris", "B"),
    ("**B. Paris**", "B"),
    ("The answer is (C).", "C"),
    ("The best answer is: (A) the sun", "A"),
    ("Answer: D", "D"),
    ("**Answer:** D", "D"),
    ("Answer: A\n\nExplanation: B is wrong.", "A"),
    ("The correct option is **A**.", "A"),
    ("The correct answer is the option B", "B"),
    ("the answer is b", "B"),
    (r"so $\boxed{C}$", "C"),
    (r"\boxed{\text{(B)}}", "B"),
    (r"\boxed{\mathrm{D}}", "D"),
    (r"\boxed{B. Paris}, not A", "B"),
    ("The answer is A. No, wait: the answer is B.", "B"),
    ("Option A is wrong; B is right", "B"),
    ("A, because B is wrong", "A"),
    ("(A) is wrong, (B) is right", "B"),
    ("(B) is correct.", "B"),
    ("答案是B", "B"),
    ("答案：C", "C"),
    ("所以选C。", "C"),
    ("The answer is A or B", None),
    ("the answer is C, D", None),
    ("A good reason", None),
    ("The answer is a dog", None),
    ("E", None),
    ("", None),
]


@pytest.mark.parametrize(("answer", "letter"), CASES)
def test_letters(answer, letter):
    assert chosen_letter(answer) == letter


def test_the_pronoun_is_no_letter():
    assert chosen_letter("I think so", "ABCDEFGHIJ") is None
    assert chosen_letter("I think it is J", "ABCDEFGHIJ") == "J"
    assert chosen_letter("The answer is (I).", "ABCDEFGHIJ") == "I"


def test_grades():
    task = Task("t", [{"role": "user", "content": "?"}], "choice", {"answer": "B"})
    right, wrong, none = grade([task] * 3, ["The answer is B.", "C", "I do not know."])
    assert right == Grade(True, 1.0, "")
    assert wrong == Grade(False, 0.0, "C is chosen")
    assert none == Grade(False, 0.0, "no letter is chosen", "no_answer")
    assert none.counts


@pytest.mark.parametrize("reference", [{}, {"answer": "E"}, {"answer": "AB"}, {"answer": "a"}])
def test_a_reference_is_a_letter(reference):
    task = Task("t", [{"role": "user", "content": "?"}], "choice", reference)
    with pytest.raises(OpenQwenError, match="'answer' must be one letter of ABCD"):
        grade([task], ["B"])


@pytest.mark.parametrize(
    "answer", ["(" * 10**6, "answer is " * 10**5, "\\boxed{" * 10**5, "A or " * 10**5]
)
def test_long_answers_end(answer):
    assert chosen_letter(answer) is None
