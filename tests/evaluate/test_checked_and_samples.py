import re
from dataclasses import dataclass

import pytest

from openqwen.engine import Output
from openqwen.evaluate import CHATS, CONTINUATIONS, EvaluateConfig, answer_samples, checked_accuracy
from openqwen.evaluate.checked import sampled_answers
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.support.progress import Progress
from openqwen.tasks import GRADERS, Grade
from openqwen.tasks.checkable import KINDS, generate_tasks, split_of
from openqwen.tasks.graders import Grader
from openqwen.tasks.plain import plain_prompt


@dataclass
class FakeEngine:
    answers: dict

    def generate(self, prompts, sampling, seeds=None, progress=None):
        self.sampling = sampling
        if progress:
            progress.advance(len(prompts))
        texts = [p if isinstance(p, str) else p[-1]["content"] for p in prompts]
        return [Output(self.answers.get(text, "?"), [1], [0.0], "stop", [1]) for text in texts]


def test_accuracy_chance_and_answers_by_task():
    items = generate_tasks(Generators(0)["items"], 170, split="heldout")
    right = {
        t.question: t.reference["answer"]
        for t in items
        if t.kind in ("add", "json") or t.question.endswith("?")
    }
    engine = FakeEngine(right)
    work = Progress("checked", len(items), "tasks")
    result = checked_accuracy(engine, items, 16, work)
    assert work.done == 170
    assert (engine.sampling.temperature, engine.sampling.max_tokens) == (0.0, 16)
    assert result["checked_accuracy"] == len(right) / 170
    assert result["chance"] == pytest.approx(sum(t.reference["chance"] for t in items) / 170)
    assert set(result["checked_by_task"]) == set(KINDS)
    assert result["checked_by_task"]["add"] == {
        "accuracy": 1.0,
        "chance": pytest.approx(1 / 100),
        "n": 10,
    }
    assert sum(row["n"] for row in result["checked_by_task"].values()) == 170
    for item, answer in zip(items, result["answers"]):
        assert answer["prompt"] == item.prompt
        assert answer["correct"] == (item.question in right)


def test_an_answer_that_could_not_be_graded_is_an_error_and_not_wrong(monkeypatch):
    def judge(tasks, answers):
        right = [Grade(answer == "yes", 1.0, "") for answer in answers]
        return [Grade(False, 0.0, "no sandbox", "infra"), *right[1:]]

    items = generate_tasks(Generators(0)["items"], 4, split="test", kinds=["add"])
    monkeypatch.setitem(GRADERS, "exact", Grader(judge, GRADERS["exact"].fault))
    engine = FakeEngine({items[1].question: "yes"})
    for score in (checked_accuracy, sampled_answers):
        with pytest.raises(OpenQwenError, match="could not be graded: no sandbox"):
            score(engine, items, 16)


def test_sampled_answers_are_drawn_once_each_at_temperature_1():
    items = generate_tasks(Generators(0)["items"], 34, split="test")
    engine = FakeEngine({t.question: t.reference["answer"] for t in items[:10]})
    sampled = sampled_answers(engine, items, 16)
    assert [one.grade.passed for one in sampled] == [True] * 10 + [False] * 24
    assert engine.sampling.temperature == 1.0


def test_a_model_before_sft_is_asked_in_plain_text():
    tasks = generate_tasks(Generators(0)["items"], 17, split="test")
    answers = {plain_prompt(t.question): f" {t.reference['answer']}\n\nQ: more" for t in tasks}
    result = checked_accuracy(FakeEngine(answers), tasks, 16, plain=True)
    assert result["checked_accuracy"] == 1.0
    assert result["answers"][0]["prompt"] == plain_prompt(tasks[0].question)
    assert result["answers"][0]["answer"] == answers[plain_prompt(tasks[0].question)]
    for plain in (True, False):
        sampled = sampled_answers(FakeEngine(answers), tasks, 16, plain=plain)
        assert [one.grade.passed for one in sampled] == [plain] * 17


def test_no_tasks_are_refused():
    with pytest.raises(ValueError, match="no tasks"):
        checked_accuracy(FakeEngine({}), [], 16)


def test_samples_have_both_kinds():
    samples = answer_samples(FakeEngine({CHATS[0]: "23", CONTINUATIONS[0]: "pass"}), 8)
    assert len(samples) == len(CHATS) + len(CONTINUATIONS)
    assert samples[0] == {"prompt": CONTINUATIONS[0], "answer": "pass", "kind": "continuation"}
    assert {"prompt": CHATS[0], "answer": "23", "kind": "chat"} in samples


def test_shown_chat_prompts_are_held_out():
    problems = (
        *(
            "add 2 18",
            "compare 57 67",
            "count code frog note soup",
            "repeat hand 2",
            "join hyphens brown window",
        ),
        *("reverse clock thin board present", "json plane find", "bullets simple good hard"),
    )
    for chat, problem in zip(CHATS, problems):
        assert split_of(problem) == "heldout"
        assert set(problem.split()[1:]) <= set(re.findall(r"\w+", chat))


def test_configuration_is_documented():
    assert all(f.description for f in EvaluateConfig.model_fields.values())
