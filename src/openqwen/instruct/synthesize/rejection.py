"""Rejection sampling: the model answers, a program checks, right answers become demonstrations.

Qwen2 report, section 4.1 ("Rejection Sampling"); de-duplication as in RFT (Yuan et al. 2023).
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from openqwen.engine import Generator, Output, Sampling
from openqwen.instruct.synthesize.pretraining_tasks import FORMATS
from openqwen.instruct.synthesize.tasks import Task
from openqwen.support.generators import Generators
from openqwen.support.progress import progress


@dataclass(frozen=True)
class Rejection:
    """What rejection sampling gave. acceptance: {"samples", "correct", "rate", "by_task": {task:
    the first three}}.
    """

    demonstrations: list[dict[str, Any]]
    acceptance: dict[str, Any]


def sample_answers(
    engine: Generator,
    prompts: Sequence[Any],
    samples: int,
    temperatures: Sequence[float],
    max_tokens: int,
    seed: int,
    label: str,
) -> list[list[Output]]:
    """`samples` outputs for each prompt (texts, ids or messages), each with a seed of its own.

    The n-th answer to a prompt is drawn at the n-th temperature, which start over when they run
    out.
    """
    seeds = Generators(seed)[label].integers(2**31, size=(len(prompts), samples))
    answers: list[list[Output]] = [[] for _ in prompts]
    with progress(label, len(prompts) * samples, "answers") as work:
        for n in range(samples):
            sampling = Sampling(
                max_tokens=max_tokens, temperature=temperatures[n % len(temperatures)]
            )
            outputs = engine.generate(
                prompts, sampling, seeds=[int(s) for s in seeds[:, n]], progress=work
            )
            for answer, output in zip(answers, outputs, strict=True):
                answer.append(output)
    return answers


def rejection_sample(
    engine: Generator,
    tasks: Sequence[Task],
    samples: int,
    temperature: float,
    max_tokens: int,
    seed: int,
    model: str | None = None,
) -> Rejection:
    """Demonstrations from a pre-trained model's own right answers; several for a task where they
    differ.

    The model has not seen the chat format yet, so it is asked in the plain one that its
    pre-training data holds.
    """
    prompts = [plain_prompt(task.question) for task in tasks]
    answers = sample_answers(engine, prompts, samples, [temperature], max_tokens, seed, "rejection")
    origin = {"method": "rejection", "seed": seed, "parents": []} | (
        {"model": model} if model else {}
    )
    demonstrations: list[dict[str, Any]] = []
    drawn: Counter[str] = Counter()
    correct: Counter[str] = Counter()
    for task, outputs in zip(tasks, answers, strict=True):
        right = [
            text for text in (plain_answer(output.text) for output in outputs) if task.check(text)
        ]
        drawn[task.task] += len(outputs)
        correct[task.task] += len(right)
        for text in dict.fromkeys(right):
            messages = [*task.prompt, {"role": "assistant", "content": text}]
            demonstrations.append({"messages": messages, "origin": origin | {"tasks": [task.task]}})
    by_task = {name: _counted(drawn[name], correct[name]) for name in sorted(drawn)}
    return Rejection(
        demonstrations, _counted(drawn.total(), correct.total()) | {"by_task": by_task}
    )


def _counted(samples: int, correct: int) -> dict[str, Any]:
    return {"samples": samples, "correct": correct, "rate": correct / samples if samples else 0.0}


def plain_prompt(question: str) -> str:
    """A question in the first plain format, up to where the answer begins.

    The newline is part of it: the colon before it and the newline are one token.
    """
    return FORMATS[0].format(question=question, answer="")


def plain_answer(text: str) -> str:
    """The answer in a continuation: what stands before the blank line that ends an item."""
    return text.lstrip().split("\n\n")[0].strip()
