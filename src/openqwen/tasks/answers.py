"""From tasks to graded answers: any generator answers, and every answer is graded once."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from openqwen.engine import Generator, Output, Prompt, Sampling
from openqwen.support.progress import Progress
from openqwen.tasks.cache import GradeCache
from openqwen.tasks.graders import grade
from openqwen.tasks.models import GraderModel
from openqwen.tasks.plain import plain_answer, plain_prompt
from openqwen.tasks.task import Grade, Task


@dataclass(frozen=True)
class GradedAnswer:
    """One answer with its grade.

    Args:
        prompt: what the generator was asked.
        text: the answer, without white space around it.
        output: what the generator gave.
        grade: the grade of the text.
        temperature: what the answer was sampled at.
    """

    prompt: Prompt
    text: str
    output: Output
    grade: Grade
    temperature: float


def answer_tasks(
    generator: Generator,
    tasks: Sequence[Task],
    sampling: Sampling,
    seeds: Sequence[int] | None = None,
    plain: bool = False,
    progress: Progress | None = None,
    models: Mapping[str, GraderModel] | None = None,
    cache: GradeCache | None = None,
) -> list[GradedAnswer]:
    """Generate one answer to each task, in order, and grade them all.

    Args:
        seeds: one for each task; None: derived from `sampling.seed`.
        plain: ask in plain text, for a model that has not learned the chat format.
        progress: advanced by 1 with each answer.
        models, cache: for the graders, see `grade`.
    """
    prompts: list[Prompt] = [plain_prompt(t.question) if plain else t.prompt for t in tasks]
    outputs = generator.generate(prompts, sampling, seeds=seeds, progress=progress)
    texts = [plain_answer(output.text) if plain else output.text for output in outputs]
    grades = grade(tasks, texts, models=models, cache=cache)
    return [
        GradedAnswer(prompt, text.strip(), output, verdict, sampling.temperature)
        for prompt, text, output, verdict in zip(prompts, texts, outputs, grades)
    ]
