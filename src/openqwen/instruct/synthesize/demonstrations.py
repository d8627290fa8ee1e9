"""The `instruct` stage: demonstrations D from programs, the model itself and docstrings, and
prompts for later.
"""

from collections import deque
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.corpus.documents import read_documents
from openqwen.engine import Engine, Generator
from openqwen.instruct.synthesize.rejection import rejection_sample
from openqwen.instruct.synthesize.repurpose import demonstrations_from_docstrings
from openqwen.instruct.synthesize.tasks import Task, generate_tasks
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.stage import CORPUS, MODEL, Effort, Stage, StageRun
from openqwen.tokenizer import load_tokenizer


class InstructConfig(Settings):
    """How many demonstrations to make, and how."""

    demonstrations: int = Field(
        20_000, ge=0, description="checkable tasks with the program's own answer"
    )
    turns: int = Field(
        1, ge=1, description="tasks in one conversation, at most; each has one to so many"
    )
    repurposed: int = Field(2_000, ge=0, description="demonstrations made from docstrings, at most")
    rejection_prompts: int = Field(
        1_000, ge=0, description="tasks that the pre-trained model answers itself"
    )
    rejection_samples: int = Field(4, ge=1, description="answers sampled for each of them")
    rejection_temperature: float = Field(1.0, ge=0, description="sampling temperature")
    max_tokens: int = Field(24, ge=1, description="longest sampled answer, in tokens")
    prompts: int = Field(4_000, ge=0, description="prompts kept for online DPO")


def build_demonstrations(
    config: InstructConfig,
    documents: Iterable[dict[str, Any]],
    engine: Generator,
    seed: int,
    folder: Path,
    model: str | None = None,
) -> dict[str, float]:
    """Write demonstrations.jsonl, prompts.jsonl and instruct.json into `folder`; returns flat
    metrics.

    documents: the corpus's training documents. engine: the pre-trained model. model: its name, for
    `origin`. Gold, sampled and later prompts are drawn from the train split one set after the
    other, each with all kinds equally often: a kind with few questions comes up in all three, and
    most others' questions in one.
    """
    generators = Generators(seed)
    gold = generate_tasks(generators["instruct-tasks"], config.demonstrations)
    asked = generate_tasks(generators["rejection-tasks"], config.rejection_prompts)
    kept = generate_tasks(generators["prompt-tasks"], config.prompts)

    rejection = rejection_sample(
        engine,
        asked,
        config.rejection_samples,
        config.rejection_temperature,
        config.max_tokens,
        seed,
        model,
    )
    docstrings = _repurposed(documents, generators, seed, config.repurposed)
    records = (
        _conversations(gold, config.turns, generators, seed) + rejection.demonstrations + docstrings
    )
    records = [records[i] for i in generators["order"].permutation(len(records))]

    write_jsonl(folder / "demonstrations.jsonl", records)
    write_jsonl(folder / "prompts.jsonl", (_prompt(task, seed) for task in kept))
    write_json(folder / "instruct.json", {"acceptance": rejection.acceptance})
    return {
        "demonstrations": len(records),
        "gold": len(gold),
        "rejection": len(rejection.demonstrations),
        "repurpose": len(docstrings),
        "prompts": len(kept),
        "acceptance": rejection.acceptance["rate"],
    }


def _conversations(
    tasks: Sequence[Task], turns: int, generators: Generators, seed: int
) -> list[dict[str, Any]]:
    """The tasks with the program's answers, in their order, one to `turns` of them in a
    conversation.
    """
    records = []
    left = deque(tasks)
    while left:
        group = [
            left.popleft()
            for _ in range(min(len(left), int(generators["turns"].integers(1, turns + 1))))
        ]
        messages = [
            m
            for task in group
            for m in (*task.prompt, {"role": "assistant", "content": task.answer})
        ]
        origin = {
            "method": "program",
            "seed": seed,
            "parents": [],
            "tasks": [task.task for task in group],
        }
        records.append({"messages": messages, "origin": origin})
    return records


def _prompt(task: Task, seed: int) -> dict[str, Any]:
    return {
        "prompt": task.prompt,
        "origin": {"method": "program", "seed": seed, "parents": [], "task": task.task},
    }


def _repurposed(
    documents: Iterable[dict[str, Any]], generators: Generators, seed: int, count: int
) -> list[dict[str, Any]]:
    """A uniform sample of all docstring demonstrations, in the order of the documents."""
    found = (
        list(demonstrations_from_docstrings(documents, generators["docstrings"], seed))
        if count
        else []
    )
    chosen = generators["repurpose"].permutation(len(found))[:count]
    return [found[i] for i in sorted(chosen)]


def run_instruct(run: StageRun) -> dict[str, float]:
    """Documents and the base model's own samples → demonstrations D."""
    documents = (
        d for d in read_documents(run.inputs["corpus"] / "train.parquet") if d["source"] != "tasks"
    )
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
