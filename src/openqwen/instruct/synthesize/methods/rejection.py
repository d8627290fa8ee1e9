"""Rejection sampling: several reasoning paths a problem, right and sound ones become D.

Qwen2 report, 4.1: paths that reach the right conclusion and that the model judges reasonable become
demonstrations; right against wrong paths become preferences. Without a reference answer the
weighted majority decides (Qwen2.5-Math): an answer's weight is the sum of σ(reward) over its paths,
or their number where there is no reward model. Duplicates are removed as in RFT (paths.py).
"""

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pydantic import Field

from openqwen.engine import Sampling
from openqwen.instruct.synthesize.config import SynthesisConfig
from openqwen.instruct.synthesize.method import Item, Method, Steps, Work, assistant
from openqwen.instruct.synthesize.paths import (
    contrasts,
    distinct,
    equations,
    holds,
    most_different,
)
from openqwen.instruct.synthesize.problems import count_items, in_context, read_items
from openqwen.instruct.synthesize.runner import synthesize
from openqwen.support.stage import Stage, StageRun
from openqwen.tasks import Task
from openqwen.tasks.numbers import (
    last_boxed,
    last_number,
    marked_answer,
    parse_number,
    phrase_number,
)

_VERDICT = re.compile(r"(?:verdict|结论)\W*(yes|no|是|否)", re.IGNORECASE)


class RejectionConfig(SynthesisConfig):
    """How many paths to sample, and which to keep. Temperature 0.7 is RFT's."""

    form: Literal["tasks", "gsm8k", "math"] = Field(
        "tasks", description="form of the file: our tasks, or GSM8K or MATH as published"
    )
    samples: int = Field(8, ge=1, description="paths sampled for each problem")
    temperature: float = Field(0.7, ge=0, description="sampling temperature")
    max_tokens: int = Field(512, ge=1, description="longest path, in tokens")
    check_equations: bool = Field(True, description="refuse paths with a wrong calculation")
    judged: bool = Field(True, description="let the model judge whether right paths are sound")
    judge_tokens: int = Field(256, ge=1, description="longest judgement, in tokens")
    keep: int = Field(4, ge=1, description="most demonstrations of one problem")
    pairs: int = Field(2, ge=0, description="most preference pairs of one problem")
    majority: float = Field(
        0.5, ge=0, le=1, description="least share of the leading answer, without a reference"
    )
    reward: Path | None = Field(
        None, description="a reward model: it weighs votes, and the best paths are kept"
    )


@dataclass(frozen=True)
class ReasoningPath:
    """A sampled path that ended. right: None where its final answer is missing."""

    text: str
    right: bool | None
    reward: float


class Rejection(Method):
    """Rejection sampling over a file of problems."""

    name = "rejection"

    def __init__(self, config: RejectionConfig, tasks: Path):
        super().__init__(config)
        self.tasks = tasks

    def items(self) -> Iterable[Item]:
        """The problems of the file."""
        return read_items(self.tasks, self.config.form, grader="math")

    def steps(self, item: Item, work: Work) -> Steps[None]:
        """Sample, decide which are right, judge, select."""
        config, task = self.config, item.data
        asked = in_context(task, work.messages("solve", question=task.question))
        sampling = Sampling(max_tokens=config.max_tokens, temperature=config.temperature)
        outputs = yield from work.ask([asked] * config.samples, sampling)
        texts = []
        for output in outputs:
            ended = output.finish_reason == "stop" and bool(output.text.strip())
            if work.gate("ended", ended, "empty or cut off", output.text):
                texts.append(output.text.strip())
        rewards = [0.0] * len(texts)
        if config.reward:
            rewards = yield from work.reward([[*asked, assistant(text)] for text in texts])
        rights = yield from self._rights(task, texts, rewards, work)
        paths = [ReasoningPath(*path) for path in zip(texts, rights, rewards, strict=True)]

        sound = []
        for path in paths:
            if not work.gate("right", path.right is True):
                continue
            exact = not config.check_equations or all(map(holds, equations(path.text)))
            if work.gate("calculations", exact, "a calculation is wrong", path.text):
                sound.append(path)
        if config.judged:
            sound = yield from self._judged(task, sound, work)
        for path in self._selected(sound, work):
            work.demonstration([*asked, assistant(path.text)])
        wrong = list(dict.fromkeys(path.text for path in paths if path.right is False))
        right = list(dict.fromkeys(path.text for path in sound))
        for chosen, rejected in contrasts(right, wrong, config.pairs):
            work.preference(asked, chosen, rejected)

    def _rights(
        self, task: Task, texts: Sequence[str], rewards: Sequence[float], work: Work
    ) -> Steps[list[bool | None]]:
        """Of each path, whether its final answer is right; None where there is no final answer."""
        if task.reference:
            grades = yield from work.grade([task] * len(texts), texts)
            for grade in grades:
                if not grade.counts:
                    work.refuse(f"not graded: {grade.reason}")
            return [grade.passed if grade.status == "graded" else None for grade in grades]
        answers = [final_answer(text) for text in texts]
        winner, share = weighted_majority(answers, rewards if self.config.reward else None)
        reason = f"the leading answer has {share:.0%} of the votes"
        if not work.gate("majority", share > self.config.majority, reason):
            return [None] * len(texts)
        return [None if answer is None else answer == winner for answer in answers]

    def _judged(
        self, task: Task, paths: list[ReasoningPath], work: Work
    ) -> Steps[list[ReasoningPath]]:
        """The paths that the model judges reasonable."""
        prompts = []
        for path in paths:
            prompts.append(work.messages("judge", question=task.question, solution=path.text))
        sampling = Sampling(max_tokens=self.config.judge_tokens)
        outputs = yield from work.ask(prompts, sampling, by="judge")
        sound = []
        for path, output in zip(paths, outputs, strict=True):
            verdicts = _VERDICT.findall(output.text)
            yes = bool(verdicts) and verdicts[-1].lower() in ("yes", "是")
            reason = "judged not sound" if verdicts else "no verdict"
            if work.gate("reasonable", yes, reason, path.text):
                sound.append(path)
        return sound

    def _selected(self, paths: list[ReasoningPath], work: Work) -> list[ReasoningPath]:
        """The paths to keep: of those with different equations the best, or the most different."""
        different = [paths[index] for index in distinct([path.text for path in paths])]
        for number in range(len(paths)):
            work.gate("distinct", number < len(different))
        if self.config.reward:
            return sorted(different, key=lambda path: -path.reward)[: self.config.keep]
        indices = most_different([path.text for path in different], self.config.keep)
        return [different[index] for index in indices]


def final_answer(text: str) -> str | None:
    """The final answer of a path in a form in which equal answers are equal; None without one."""
    marked = marked_answer(text)
    if marked is None:
        number = last_number(text)
    else:
        boxed = marked == last_boxed(text)
        number = parse_number(marked) if boxed else phrase_number(marked)
    if number is not None:
        return str(number.value)
    return re.sub(r"\s+|\\[,;! ]|\$", "", marked) if marked else None


def weighted_majority(
    answers: Sequence[str | None], rewards: Sequence[float] | None
) -> tuple[str | None, float]:
    """The answer with the largest weight, and its share of all weights; of equals the first.

    A path weighs σ(reward), or 1 without rewards (Qwen2.5-Math report, 3.1).
    """
    weights: dict[str, float] = {}
    total = 0.0
    for index, answer in enumerate(answers):
        weight = 1.0 if rewards is None else 1 / (1 + math.exp(-max(-500, rewards[index])))
        total += weight
        if answer is not None:
            weights[answer] = weights.get(answer, 0.0) + weight
    if not weights:
        return None, 0.0
    winner = max(weights, key=lambda answer: weights[answer])
    return winner, weights[winner] / total


def run_rejection(run: StageRun) -> dict[str, float]:
    """Problems → demonstrations D and preferences P."""
    tasks = run.data("tasks") if run.config.form == "tasks" else run.inputs["tasks"]
    method = Rejection(run.config, tasks)
    return synthesize(method, run, count_items(tasks, run.config.form))


STAGE = Stage(
    name="synthesize-rejection",
    help="Sample reasoning paths; right, sound ones become D, right against wrong P.",
    config=RejectionConfig,
    inputs={"tasks": "Problems: a file of tasks, or GSM8K or MATH as published (--form)."},
    outputs=["demonstrations", "preferences"],
    run=run_rejection,
)
