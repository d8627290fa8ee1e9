"""The `instruct` stage: demonstrations D from programs and docstrings.

It also keeps tasks as prompts for online DPO and GRPO.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.corpus.documents import read_documents
from openqwen.instruct.synthesize.docstrings import demonstrations_from_docstrings
from openqwen.support.files import write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, Effort, Stage, StageRun
from openqwen.tasks import Task
from openqwen.tasks.checkable import generate_tasks, with_closing

_SPEED = 4_000  # tasks a second


class InstructConfig(Settings):
    """How many demonstrations to make, and how."""

    demonstrations: int = Field(
        20_000, ge=0, description="checkable tasks with the program's answer"
    )
    turns: int = Field(1, ge=1, description="most tasks in one conversation, drawn from 1 up")
    closing_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the program's answers with a closing word; preferences avoid it",
    )
    repurposed: int = Field(2_000, ge=0, description="most demonstrations made from docstrings")
    prompts: int = Field(4_000, ge=0, description="prompts kept for online DPO and GRPO")


def build_demonstrations(
    config: InstructConfig,
    documents: Iterable[dict[str, Any]],
    seed: int,
    folder: Path,
) -> dict[str, float]:
    """Write demonstrations.jsonl and prompts.jsonl into `folder`.

    The tasks with the program's answer and the prompts for later are two draws from the train
    split, each with all kinds equally often. Kinds with few questions come up in both; most other
    questions in one.

    Args:
        documents: the corpus's training documents.

    Returns:
        Counts of records by method.
    """
    generators = Generators(seed)
    gold = generate_tasks(generators["instruct-tasks"], config.demonstrations)
    kept = generate_tasks(generators["prompt-tasks"], config.prompts)

    docstrings = _repurposed(documents, generators, seed, config.repurposed)
    records = [*_conversations(gold, config, generators, seed), *docstrings]
    records = [records[i] for i in generators["order"].permutation(len(records))]

    write_jsonl(folder / "demonstrations.jsonl", records)
    write_jsonl(folder / "prompts.jsonl", (_prompt(task, seed) for task in kept))
    return {
        "demonstrations": len(records),
        "gold": len(gold),
        "repurpose": len(docstrings),
        "prompts": len(kept),
    }


def _conversations(
    tasks: Sequence[Task], config: InstructConfig, generators: Generators, seed: int
) -> list[dict[str, Any]]:
    """The tasks with the program's answers, in order, one to `turns` of them a conversation."""
    closing = generators["closing"].random(len(tasks)) < config.closing_share
    records = []
    start = 0
    while start < len(tasks):
        group = tasks[start : start + int(generators["turns"].integers(1, config.turns + 1))]
        messages = []
        for number, task in enumerate(group, start):
            answer = task.reference["answer"]
            answer = with_closing(answer) if closing[number] else answer
            messages += [*task.prompt, {"role": "assistant", "content": answer}]
        start += len(group)
        kinds = [task.kind for task in group]
        origin = {"method": "program", "seed": seed, "parents": [], "tasks": kinds}
        records.append({"messages": messages, "origin": origin})
    return records


def _prompt(task: Task, seed: int) -> dict[str, Any]:
    """The task, for a policy that learns from its own answers to it."""
    origin = {"method": "program", "seed": seed, "parents": [], "task": task.kind}
    return asdict(task) | {"origin": origin}


def _repurposed(
    documents: Iterable[dict[str, Any]], generators: Generators, seed: int, count: int
) -> list[dict[str, Any]]:
    """A uniform sample of all docstring demonstrations, in the order of the documents."""
    if not count:
        return []
    records = list(demonstrations_from_docstrings(documents, generators["docstrings"], seed))
    chosen = generators["repurpose"].permutation(len(records))[:count]
    return [records[i] for i in sorted(chosen)]


def run_instruct(run: StageRun) -> dict[str, float]:
    """Tasks and documents → demonstrations D."""
    documents = read_documents(run.inputs["corpus"] / "train.parquet")
    return build_demonstrations(run.config, documents, run.seed, run.output)


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    return Effort(seconds=(recipe.instruct.demonstrations + recipe.instruct.prompts) / _SPEED)


STAGE = Stage(
    name="instruct",
    help="Make demonstrations without people.",
    config=InstructConfig,
    inputs={"corpus": CORPUS},
    outputs=["demonstrations", "prompts"],
    run=run_instruct,
    estimate=_effort,
)
