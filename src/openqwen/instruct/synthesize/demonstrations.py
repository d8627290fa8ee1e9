"""The `instruct` stage: demonstrations D from programs, the model itself and docstrings.

It also keeps tasks as prompts for online DPO and GRPO.
"""

from collections.abc import Collection, Iterable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.corpus.documents import read_documents
from openqwen.engine import Engine, Generator
from openqwen.instruct.synthesize.rejection import rejection_sample
from openqwen.instruct.synthesize.repurpose import demonstrations_from_docstrings
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, MODEL, Effort, Stage, StageRun
from openqwen.tasks import Task
from openqwen.tasks.checkable import generate_tasks
from openqwen.tokenizer import load_tokenizer


class InstructConfig(Settings):
    """How many demonstrations to make, and how."""

    demonstrations: int = Field(
        20_000, ge=0, description="checkable tasks with the program's answer"
    )
    turns: int = Field(1, ge=1, description="most tasks in one conversation, drawn from 1 up")
    repurposed: int = Field(2_000, ge=0, description="most demonstrations made from docstrings")
    rejection_prompts: int = Field(
        1_000, ge=0, description="tasks that the pre-trained model answers itself"
    )
    rejection_samples: int = Field(4, ge=1, description="answers sampled for each of them")
    rejection_temperature: float = Field(1.0, ge=0, description="sampling temperature")
    max_tokens: int = Field(24, ge=1, description="longest sampled answer, in tokens")
    prompts: int = Field(4_000, ge=0, description="prompts kept for online DPO and GRPO")


def build_demonstrations(
    config: InstructConfig,
    documents: Iterable[dict[str, Any]],
    generator: Generator,
    seed: int,
    folder: Path,
    model: str | None = None,
) -> dict[str, float]:
    """Write demonstrations.jsonl, prompts.jsonl and instruct.json into `folder`.

    The tasks with the program's answer, those that the model answers, and the prompts for later are
    three draws from the train split, each with all kinds equally often. Kinds with few questions
    come up in all three; most other questions in one.

    Args:
        documents: the corpus's training documents.
        generator: the pre-trained model.
        model: its name, for `origin`.

    Returns:
        Counts of records by method, and the share of the model's answers that are right.
    """
    generators = Generators(seed)
    gold = generate_tasks(generators["instruct-tasks"], config.demonstrations)
    answered = generate_tasks(generators["rejection-tasks"], config.rejection_prompts)
    kept = generate_tasks(generators["prompt-tasks"], config.prompts)

    sampled, acceptance = rejection_sample(
        generator,
        answered,
        config.rejection_samples,
        config.rejection_temperature,
        config.max_tokens,
        seed,
        model,
    )
    docstrings = _repurposed(documents, generators, seed, config.repurposed)
    records = _conversations(gold, config.turns, generators, seed)
    records += sampled + docstrings
    records = [records[i] for i in generators["order"].permutation(len(records))]

    write_jsonl(folder / "demonstrations.jsonl", records)
    write_jsonl(folder / "prompts.jsonl", (_prompt(task, seed) for task in kept))
    write_json(folder / "instruct.json", {"acceptance": acceptance})
    return {
        "demonstrations": len(records),
        "gold": len(gold),
        "rejection": len(sampled),
        "repurpose": len(docstrings),
        "prompts": len(kept),
        "acceptance": acceptance["rate"],
    }


def _conversations(
    tasks: Sequence[Task], turns: int, generators: Generators, seed: int
) -> list[dict[str, Any]]:
    """The tasks with the program's answers, in order, one to `turns` of them a conversation."""
    records = []
    start = 0
    while start < len(tasks):
        group = tasks[start : start + int(generators["turns"].integers(1, turns + 1))]
        start += len(group)
        messages = []
        for task in group:
            messages += [*task.prompt, {"role": "assistant", "content": task.reference["answer"]}]
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
    """Documents and the base model's samples → demonstrations D."""
    documents = read_documents(run.inputs["corpus"] / "train.parquet")
    model = run.inputs["model"]
    engine = Engine(load_model(model, device=best_device()), load_tokenizer(model))
    return build_demonstrations(run.config, documents, engine, run.seed, run.output, model.name)


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    return Effort(answers=recipe.instruct.rejection_prompts * recipe.instruct.rejection_samples)


STAGE = Stage(
    name="instruct",
    help="Make demonstrations without people.",
    config=InstructConfig,
    inputs={"corpus": CORPUS, "model": MODEL},
    outputs=["demonstrations", "prompts"],
    run=run_instruct,
    estimate=_effort,
)
