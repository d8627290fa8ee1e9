from collections import Counter
from dataclasses import dataclass, field

import pytest
from pydantic import ValidationError

from openqwen.engine import Output, Sampling
from openqwen.instruct.synthesize.demonstrations import InstructConfig, build_demonstrations
from openqwen.instruct.synthesize.preferences import (
    PreferConfig,
    build_preferences,
    make_pairs,
    sample_answers,
)
from openqwen.instruct.synthesize.pretraining_tasks import task_documents
from openqwen.support.files import read_json, read_jsonl
from openqwen.support.generators import Generators
from openqwen.tasks import GRADERS, Grade, GradedAnswer, grade
from openqwen.tasks.checkable import KINDS, generate_tasks, split_of, stands_alone, with_closing
from openqwen.tasks.graders import Grader
from openqwen.tasks.plain import PLAIN_FORMATS, plain_answer, plain_prompt
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from problems import problem


def output(text, reason="stop"):
    return Output(text=text, token_ids=[1], logprobs=[0.0], finish_reason=reason, prompt_ids=[1])


@dataclass
class FakeEngine:
    """Answers from a script: `answer(prompt, seed)`."""

    answer: object
    calls: list = field(default_factory=list)

    def generate(self, prompts, sampling, seeds=None, progress=None):
        assert isinstance(sampling, Sampling)
        assert len(seeds) == len(prompts)
        self.calls.append((list(prompts), sampling, list(seeds)))
        return [self.answer(prompt, seed) for prompt, seed in zip(prompts, seeds)]


def oracle(seed=0):
    """Right answers by question, over the tasks that the stages below draw."""
    names = ("instruct-tasks", "prompt-tasks")
    return {t.question: t for name in names for t in generate_tasks(Generators(seed)[name], 150)}


FUNCTION = 'def area(width, height):\n    """Return the area of a rectangle with these sides."""\n'
DOCUMENTS = [{"id": "shapes.py", "text": FUNCTION, "source": "code", "language": "en", "meta": {}}]


def test_task_documents_hold_solved_train_tasks_only():
    documents = list(task_documents(7, 60))
    assert len({d["id"] for d in documents}) == 60
    assert {d["source"] for d in documents} == {"tasks"}
    assert documents == list(task_documents(7, 60))
    assert [d["text"] for d in documents] != [d["text"] for d in task_documents(8, 60)]
    heads = [form.split("{question}") for form in PLAIN_FORMATS]
    questions = set()
    for document in documents:
        items = document["text"].rstrip("\n").split("\n\n")
        assert 4 <= len(items) <= 10
        assert len(items) == len(document["meta"]["tasks"])
        before = max((h[0] for h in heads if document["text"].startswith(h[0])), key=len)
        questions |= {item.split("\n")[0].removeprefix(before) for item in items}
    assert all(split_of(problem(q)) == "train" for q in questions)


def test_every_plain_format_comes_up():
    text = "".join(d["text"] for d in task_documents(1, 100))
    assert all(form.split("{question}")[0] in text for form in PLAIN_FORMATS)


def test_a_plain_prompt_is_asked_as_it_is_learned():
    """Its ids are the beginning of the learned text's: the colon and the newline are one token."""
    texts = [document["text"] for document in task_documents(1, 200)]
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=1000))
    for task in generate_tasks(Generators(0)["plain"], 100):
        learned = tokenizer.encode(
            PLAIN_FORMATS[0].format(question=task.question, answer=task.reference["answer"])
        )
        asked = tokenizer.encode(plain_prompt(task.question))
        assert learned[: len(asked)] == asked
        assert tokenizer.decode(learned[len(asked) :]) == task.reference["answer"]


def test_plain_answers_end_at_the_blank_line():
    assert plain_prompt("What is 1 + 1?") == "Question: What is 1 + 1?\nAnswer:\n"
    assert plain_answer(" 2\n\nQuestion: what") == "2"
    assert plain_answer(" - a\n- b\n") == "- a\n- b"
    assert plain_answer("") == ""


def test_answers_are_drawn_at_their_temperatures():
    engine = FakeEngine(lambda p, seed: output(str(seed)))
    answers = sample_answers(engine, [TASK, TASK], 3, [0.5, 1.5], 8, 0, "x")
    assert [sampling.temperature for _, sampling, _ in engine.calls] == [0.5, 1.5, 0.5]
    assert [[a.temperature for a in group] for group in answers] == [[0.5, 1.5, 0.5]] * 2
    assert len({a.text for group in answers for a in group}) == 6


CONFIG = InstructConfig(demonstrations=150, repurposed=5, prompts=60)


def build(folder, seed=0, config=CONFIG):
    folder.mkdir()
    return build_demonstrations(config, DOCUMENTS, seed, folder)


def test_instruct_payload(tmp_path):
    metrics = build(tmp_path / "a")
    records = list(read_jsonl(tmp_path / "a" / "demonstrations.jsonl"))
    prompts = list(read_jsonl(tmp_path / "a" / "prompts.jsonl"))
    methods = Counter(r["origin"]["method"] for r in records)
    assert methods["program"] == 150 == metrics["gold"]
    assert methods["repurpose"] == 1 == metrics["repurpose"]
    alone = [stands_alone(r["messages"][-1]["content"]) for r in records]
    assert 0.4 < sum(alone) / len(records) < 0.6, "both styles, half and half"
    tasks = oracle()
    for record in records:
        question, answer = (m["content"] for m in record["messages"])
        if record["origin"]["method"] != "repurpose":
            assert split_of(problem(question)) == "train"
            assert grade([tasks[question]], [answer])[0].passed
            assert [tasks[question].kind] == record["origin"]["tasks"]
    kept = {p["prompt"][0]["content"] for p in prompts}
    assert len(kept) == 60 == len(prompts)
    assert all(split_of(problem(question)) == "train" for question in kept)


def test_instruct_is_deterministic(tmp_path):
    build(tmp_path / "a")
    build(tmp_path / "b")
    build(tmp_path / "c", seed=1)
    for name in ("demonstrations.jsonl", "prompts.jsonl"):
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        assert (tmp_path / "a" / name).read_bytes() != (tmp_path / "c" / name).read_bytes()


def test_prefer_payload(tmp_path):
    config = PreferConfig(prompts=80, heldout_prompts=40, samples=3)
    seen = {}

    def answer(prompt, seed):
        seen[prompt[0]["content"]] = prompt
        return output("yes" if seed % 2 else "no")

    def run(name, seed=0):
        (tmp_path / name).mkdir()
        engine = FakeEngine(answer)
        metrics = build_preferences(config, engine, seed, tmp_path / name, model="sft")
        return metrics, (tmp_path / name / "preferences.jsonl").read_bytes()

    metrics, data = run("a")
    assert (metrics, data) == run("b")
    train = list(read_jsonl(tmp_path / "a" / "preferences.jsonl"))
    held, test = (
        list(read_jsonl(tmp_path / "a" / f"{name}.jsonl")) for name in ("heldout", "test")
    )
    summary = read_json(tmp_path / "a" / "prefer.json")
    assert metrics["pairs"] == len(train) == sum(summary["by_author"].values())
    assert (metrics["heldout_pairs"], metrics["test_pairs"]) == (len(held), len(test))
    assert all(split_of(problem(p["prompt"][0]["content"])) == "train" for p in train)
    assert all(split_of(problem(p["prompt"][0]["content"])) == "heldout" for p in held)
    assert all(split_of(problem(p["prompt"][0]["content"])) == "test" for p in test)
    assert max(Counter(p["prompt"][0]["content"] for p in train).values()) <= 2
    assert {p["origin"]["task"] for p in train} == set(KINDS), "every kind has its share"
    for pair in train + held + test:
        assert pair["chosen"][0]["role"] == pair["rejected"][0]["role"] == "assistant"
        assert pair["chosen"] != pair["rejected"]
        assert pair["origin"]["model"] == "sft"
    assert {p["origin"]["chosen"] for p in train} == {"program", "model"}


TASK = generate_tasks(Generators(0)["tasks"], 1, kinds=["add"])[0]
WRONG = TASK.reference["wrong"][0]


def graded(*outputs, temperatures=(1.0,)):
    grades = grade([TASK] * len(outputs), [one.text for one in outputs])
    return [
        GradedAnswer(
            TASK.prompt, one.text.strip(), one, verdict, temperatures[n % len(temperatures)]
        )
        for n, (one, verdict) in enumerate(zip(outputs, grades))
    ]


def pairs(*outputs, temperatures=(1.0,), **options):
    answers = graded(*outputs, temperatures=temperatures)
    made = make_pairs(TASK, answers, PreferConfig(**options), seed=0)
    return [(p["chosen"][0]["content"], p["rejected"][0]["content"], p["origin"]) for p in made]


def test_pairs_contrast_right_with_wrong_samples():
    ((chosen, rejected, origin),) = pairs(
        output(WRONG), output(f" {TASK.reference['answer']} "), output(WRONG + " ")
    )
    assert (chosen, rejected) == (TASK.reference["answer"], WRONG)
    assert (origin["chosen"], origin["rejected"], origin["task"]) == ("model", "model", "add")


def failed_grader(tasks, answers):
    return [Grade(False, 0.0, "no sandbox", "infra") for _ in answers]


def test_answers_whose_grader_failed_are_no_data(monkeypatch):
    monkeypatch.setitem(GRADERS, "exact", Grader(failed_grader, GRADERS["exact"].fault))
    assert TASK.grader == "exact"
    assert pairs(output("5"), output(TASK.reference["answer"]), program_rejected=False) == []


def test_a_right_answer_with_a_closing_line_loses_against_one_that_stands_alone():
    right = TASK.reference["answer"]
    answers = [output(with_closing(right)), output(right), output(with_closing(WRONG))]
    (style, both) = make_pairs(TASK, graded(*answers), PreferConfig(), seed=0)
    assert {pair["chosen"][0]["content"] for pair in (style, both)} == {right}
    assert style["rejected"][0]["content"] == with_closing(right)
    assert style["criteria"] == {"style": 1}
    assert style["origin"]["principle"] == both["origin"]["principle"] == "no-padding"
    assert both["criteria"] == {"correctness": 1, "style": 1}
    ((chosen, _, origin),) = pairs(output(with_closing(right)))
    assert (chosen, origin["chosen"]) == (right, "program")


def test_pairs_tell_the_temperature_of_each_answer_that_the_model_gave():
    outputs = [
        output(TASK.reference["answer"]),
        output("wrong"),
        output("wrong"),
        output(TASK.reference["answer"]),
    ]
    ((_, _, origin),) = pairs(*outputs, temperatures=[1.5, 0.5])
    assert (origin["temperature"], origin["chosen_temperature"]) == (0.5, 0.5)
    ((_, _, origin),) = pairs(
        output("wrong"), output(TASK.reference["answer"], "length"), temperatures=[1.5, 0.5]
    )
    assert origin["temperature"] == 1.5
    assert "chosen_temperature" not in origin, "the program's"


def test_no_more_pairs_than_allowed():
    outputs = [output(TASK.reference["answer"]), *(output(f"wrong {n}") for n in range(5))]
    assert [rejected for _, rejected, _ in pairs(*outputs, pairs_per_prompt=2)] == [
        "wrong 0",
        "wrong 4",
    ]


def test_program_stands_in_where_the_model_gives_none():
    ((chosen, rejected, origin),) = pairs(output("wrong"))
    assert (chosen, rejected, origin["chosen"], origin["rejected"]) == (
        TASK.reference["answer"],
        "wrong",
        "program",
        "model",
    )
    ((chosen, rejected, origin),) = pairs(output(TASK.reference["answer"]))
    assert (chosen, rejected, origin["chosen"], origin["rejected"]) == (
        TASK.reference["answer"],
        WRONG,
        "model",
        "program",
    )
    assert pairs(output("wrong"), program_chosen=False) == []
    assert pairs(output(TASK.reference["answer"]), program_rejected=False) == []


def test_an_answer_that_never_ended_is_no_positive_and_the_last_negative():
    ((chosen, _, origin),) = pairs(output(TASK.reference["answer"], "length"), output("wrong"))
    assert (chosen, origin["chosen"]) == (TASK.reference["answer"], "program")
    made = pairs(output("endless", "length"), output("wrong"), output(TASK.reference["answer"]))
    assert [rejected for _, rejected, _ in made] == ["wrong", "endless"]


@pytest.mark.parametrize("config", [InstructConfig, PreferConfig])
def test_configurations_are_closed_and_documented(config):
    with pytest.raises(ValidationError):
        config(unknown=1)
    assert all(f.description for f in config.model_fields.values())


def test_tasks_share_conversations(tmp_path):
    config = InstructConfig(demonstrations=90, turns=3, repurposed=0, prompts=0)
    build_demonstrations(config, [], 1, tmp_path)
    records = list(read_jsonl(tmp_path / "demonstrations.jsonl"))
    sizes = Counter(len(r["origin"]["tasks"]) for r in records)
    assert set(sizes) == {1, 2, 3}
    assert sum(size * n for size, n in sizes.items()) == 90
    for record in records:
        roles = [m["role"] for m in record["messages"]]
        assert roles == ["user", "assistant"] * len(record["origin"]["tasks"])
