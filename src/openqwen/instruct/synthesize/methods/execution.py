"""Execution feedback: solutions and tests are generated together and checked against each other.

Qwen2 report, 4.1. Every solution runs against every test in the sandbox. A test that no solution
passes is dropped, and so is a solution that passes nothing. A test is kept where enough of the
other solutions pass it. Solutions that pass all kept tests become D; they are preferred to those
that fail one.

Tests of the file itself (MBPP's) are not shown to the model. `reference` says what they are for:
"measure" counts how often they agree, and so how many wrong solutions slip through; "require" drops
what they disagree with.
"""

import ast
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.engine import Output, Sampling
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.method import Item, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.problems import count_items, in_context, read_items
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.sandbox import Limits, Program
from openqwen.support.stage import Stage, StageRun
from openqwen.tasks import Task
from openqwen.tasks.code import program_of

_ENTRY = "solution"  # the function's name where the task gives none
_LONGEST_TEST = 1_000  # characters
_MBPP_TESTS = " Your code should pass these tests:"  # behind the question (tasks/readers.py)


class ExecutionConfig(SynthesisConfig):
    """How many solutions and tests to generate, and which to trust."""

    form: Literal["tasks", "mbpp"] = Field(
        "tasks", description="form of the file: our tasks, or MBPP as published"
    )
    split: Literal["train", "validation", "prompt", "all"] = Field(
        "train", description="which of MBPP's splits to use; its test split is for evaluation only"
    )
    solutions: int = Field(6, ge=2, description="solutions sampled for each problem")
    test_answers: int = Field(2, ge=1, description="answers with tests sampled for each problem")
    tests: int = Field(5, ge=1, description="tests asked for in one answer")
    temperature: float = Field(0.8, ge=0, description="sampling temperature")
    max_tokens: int = Field(512, ge=1, description="longest solution, in tokens")
    seconds: float = Field(3.0, gt=0, description="CPU time of one solution with one test")
    agreement: float = Field(
        0.5, ge=0, le=1, description="least share of the solutions that must pass a kept test"
    )
    least_tests: int = Field(2, ge=1, description="fewest kept tests of a usable problem")
    keep: int = Field(2, ge=1, description="most demonstrations of one problem")
    pairs: int = Field(2, ge=0, description="most preference pairs of one problem")
    reference: Literal["ignore", "measure", "require"] = Field(
        "measure", description="what the file's own tests are for"
    )


class Execution(Method):
    """Generated solutions against generated tests, over a file of programming problems."""

    name = "execution"

    def __init__(self, config: ExecutionConfig, tasks: Path):
        super().__init__(config)
        self.tasks = tasks

    def items(self) -> Iterable[Item]:
        """The problems of the file; of MBPP those of the split."""
        for item in read_items(self.tasks, self.config.form, grader="code"):
            split = item.data.origin.get("split") if item.data else None
            wanted = self.config.form != "mbpp" or self.config.split in ("all", split)
            if wanted and split != "test":
                yield item

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Generate both, run all against all, select."""
        config, task = self.config, item.data
        entry = task.reference.get("entry") or _ENTRY
        question, example, hidden = question_parts(task)
        values = {"question": question, "entry": entry, "example": example}
        asked = in_context(task, work.messages("solve", **values))
        wanted = in_context(task, work.messages("tests", count=config.tests, **values))
        sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        outputs = yield from work.ask(
            [asked] * config.solutions + [wanted] * config.test_answers, sampling
        )
        answers = self._answers(outputs[: config.solutions], entry, task, work)
        tests = self._tests(outputs[config.solutions :], entry, example, work)
        sources = [source for _, source in answers]
        passed = yield from self._matrix(sources, tests, entry, work)
        alive, kept = cross_check(passed, config.agreement)
        for index in range(len(answers)):
            work.gate("solution alive", index in alive, "passes no test", answers[index][0])
        for index, test in enumerate(tests):
            work.gate("test kept", index in kept, "too few solutions pass it", test)
        if not work.gate("tests enough", len(kept) >= config.least_tests, "too few tests kept"):
            return
        right = [s for s in alive if all(passed[s][t] for t in kept)]
        wrong = [s for s in range(len(answers)) if s not in right]
        for index in alive:
            work.gate("solution right", index in right)
        holds = yield from self._by_reference(task, sources, hidden, work)
        for index, passes in enumerate(holds):
            if passes is not None:
                kind = "right" if index in right else "wrong"
                work.gate(f"{kind} by own tests", passes == (index in right))
        if config.reference == "require":
            right = [s for s in right if holds[s] is True]
            wrong = [s for s in wrong if holds[s] is False]
        unlike = {sources[s].strip(): s for s in reversed(right)}
        right = sorted(unlike.values())
        for s in right[: config.keep]:
            work.demonstration([*asked, assistant(answers[s][0])], tests=len(kept))
        for number, s in enumerate(wrong[: config.pairs] if right else []):
            chosen = answers[right[number % len(right)]][0]
            work.preference(asked, chosen, answers[s][0], tests=len(kept))

    def _answers(
        self, outputs: Sequence[Output], entry: str, task: Task, work: Work
    ) -> list[tuple[str, str]]:
        """(answer, program) of those that ended and define the function."""
        answers = []
        reference = {"entry": entry, "setup": task.reference.get("setup", "")}
        for output in outputs:
            text = output.text.strip()
            source = program_of(text, reference) if output.finish_reason == "stop" else ""
            if work.gate("solution", defines(source, entry), f"no function {entry}", text):
                answers.append((text, source))
        return answers

    def _tests(self, outputs: Sequence[Output], entry: str, example: str, work: Work) -> list[str]:
        """The different tests in the answers. The example, which the prompt shows, is none."""
        tests: dict[str, None] = {}
        for output in outputs:
            found = assertions(output.text, entry)
            work.gate("answer with tests", bool(found), "no test", output.text)
            tests.update(dict.fromkeys(found))
        tests.pop(_normal(example), None)
        return list(tests)

    def _matrix(
        self, sources: Sequence[str], tests: Sequence[str], entry: str, work: Work
    ) -> Steps[list[list[bool]]]:
        """passed[solution][test]. What the sandbox could not run counts as failed.

        A solution that does not end in the first test is not run with the others.
        """
        limits = Limits(seconds=self.config.seconds)
        passed = [[False] * len(tests) for _ in sources]
        hanging: set[int] = set()
        for columns in (range(len(tests))[:1], range(len(tests))[1:]):
            cells = [(s, t) for s in range(len(sources)) if s not in hanging for t in columns]
            verdicts = yield from work.run(
                [Program(sources[s], tests=tests[t], entry=entry, limits=limits) for s, t in cells]
            )
            for (s, t), verdict in zip(cells, verdicts, strict=True):
                passed[s][t] = verdict.passed
                if verdict.status == "timeout":
                    hanging.add(s)
                if verdict.status == "infra":
                    work.refuse(f"the sandbox failed: {verdict.reason}")
        return passed

    def _by_reference(
        self, task: Task, sources: Sequence[str], hidden: str, work: Work
    ) -> Steps[list[bool | None]]:
        """Whether each program passes the file's own tests; None where nothing can be said."""
        if self.config.reference == "ignore" or not hidden:
            return [None] * len(sources)
        limits, entry = Limits(seconds=self.config.seconds), task.reference.get("entry")
        verdicts = yield from work.run(
            [Program(source, tests=hidden, entry=entry, limits=limits) for source in sources]
        )
        return [v.passed if v.status != "infra" else None for v in verdicts]


def cross_check(passed: Sequence[Sequence[bool]], agreement: float) -> tuple[list[int], list[int]]:
    """Indices of the solutions that pass some test, and of the tests that are kept.

    passed: [solution][test]. A test is kept if at least one of those solutions passes it, and at
    least the share `agreement` of them.
    """
    alive = [s for s, row in enumerate(passed) if any(row)]
    kept = []
    for test in range(len(passed[0]) if passed else 0):
        votes = sum(passed[s][test] for s in alive)
        if votes and votes >= agreement * len(alive):
            kept.append(test)
    return alive, kept


def question_parts(task: Task) -> tuple[str, str, str]:
    """(question, an example of a call, the tests that are not shown) of a problem.

    MBPP's question does not say how the function is called: its first test shows that.
    """
    tests = str(task.reference.get("tests", ""))
    question, found, _ = task.question.partition(_MBPP_TESTS)
    if not found:
        return question, "", tests
    first, _, rest = tests.partition("\n")
    return question, first.strip(), rest


def defines(source: str, entry: str) -> bool:
    """Whether a program can be parsed and defines the function."""
    try:
        tree = ast.parse(source)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return any(isinstance(node, kinds) and node.name == entry for node in tree.body)


def assertions(answer: str, entry: str) -> list[str]:
    """The asserts in an answer that call the function once, each as one line of its own.

    A line that does not parse, as the last of an answer that was cut off, is left out.
    """
    found = []
    for line in answer.splitlines():
        text = line.strip().removeprefix(">>> ")
        if not text.startswith("assert") or len(text) > _LONGEST_TEST:
            continue
        normal = _normal(text)
        if normal and _calls(normal, entry) == 1:  # f(1) == f(1) would hold for any function
            found.append(normal)
    return found


def _calls(test: str, entry: str) -> int:
    calls = [node.func for node in ast.walk(ast.parse(test)) if isinstance(node, ast.Call)]
    return sum(isinstance(called, ast.Name) and called.id == entry for called in calls)


def _normal(test: str) -> str:
    """A test in one spelling, without its message; "" where it does not parse."""
    try:
        body = ast.parse(test).body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return ""
    if len(body) != 1 or not isinstance(body[0], ast.Assert):
        return ""
    return ast.unparse(ast.Assert(body[0].test, None))


def run_execution(run: StageRun) -> dict[str, float]:
    """Programming problems → demonstrations D and preferences P."""
    tasks = run.data("tasks") if run.config.form == "tasks" else run.inputs["tasks"]
    method = Execution(run.config, tasks)
    small = run.config.form == "mbpp"
    total = sum(1 for _ in method.items()) if small else count_items(tasks, run.config.form)
    return synthesize(method, run, total)


STAGE = Stage(
    name="synthesize-execution",
    help="Write solutions and tests, run each against each; those that hold become D and P.",
    config=ExecutionConfig,
    inputs={"tasks": "Programming problems: a file of tasks, or MBPP as published (--form)."},
    outputs=["demonstrations", "preferences"],
    run=run_execution,
)
