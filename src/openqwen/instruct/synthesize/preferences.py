"""The `prefer` stage: preferences P from the aligned model's right and wrong answers.

Qwen2.5 report, section 4.2: the SFT model answers fresh queries; answers that pass the check are
positives, those that fail are negatives.
"""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Engine, Generator
from openqwen.instruct.synthesize.rejection import sample_answers
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.stage import MODEL, Effort, Stage, StageRun
from openqwen.tasks import GradedAnswer, Task
from openqwen.tasks.checkable import generate_tasks
from openqwen.tokenizer import load_tokenizer


class PreferConfig(Settings):
    """How many preferences to make, and what to do where no answer is right, or none is wrong."""

    prompts: int = Field(2_000, ge=1, description="prompts that the SFT model answers")
    heldout_prompts: int = Field(
        400,
        ge=1,
        description="prompts of the development split, and as many of the test split, that measure "
        "pair accuracy",
    )
    samples: int = Field(4, ge=1, description="answers sampled for each prompt")
    temperatures: list[float] = Field(
        [1.0],
        min_length=1,
        description="sampling temperatures; the answers to a prompt take them in turn",
    )
    max_tokens: int = Field(24, ge=1, description="longest answer, in tokens")
    pairs_per_prompt: int = Field(2, ge=1, description="most pairs made of one prompt's answers")
    program_chosen: bool = Field(
        True, description="where no answer is right, take the program's answer as the chosen one"
    )
    program_rejected: bool = Field(
        True, description="where no answer is wrong, take a wrong one of the program's"
    )


def build_preferences(
    config: PreferConfig, generator: Generator, seed: int, folder: Path, model: str | None = None
) -> dict[str, float]:
    """Write preferences.jsonl, heldout.jsonl, test.jsonl and prefer.json into `folder`.

    Prompts are of the train split, all kinds equally often. Most are new to the model. Of the kinds
    with few questions it has seen most in SFT; without them it would unlearn those kinds.

    Args:
        generator: the SFT model.
        model: its name, for `origin`.

    Returns:
        Counts of pairs, the share of answers that are right, and the share of pairs in which the
        model wrote both sides ("own_share").
    """
    rng = Generators(seed)["prefer-tasks"]
    groups = {
        "preferences": generate_tasks(rng, config.prompts),
        "heldout": generate_tasks(rng, config.heldout_prompts, split="heldout"),
        "test": generate_tasks(rng, config.heldout_prompts, split="test"),
    }
    tasks = [task for group in groups.values() for task in group]
    answers = sample_answers(
        generator, tasks, config.samples, config.temperatures, config.max_tokens, seed, "prefer"
    )
    right = [a.grade.passed for group in answers for a in group if a.grade.counts]
    accuracy = sum(right) / max(1, len(right))

    pairs: dict[str, list[dict[str, Any]]] = {}
    remaining = iter(answers)
    for name, group in groups.items():
        pairs[name] = []
        for task in group:
            pairs[name] += make_pairs(task, next(remaining), config, seed, model)
        write_jsonl(folder / f"{name}.jsonl", pairs[name])
    train = pairs["preferences"]
    authors = Counter(f"{pair['origin']['chosen']}/{pair['origin']['rejected']}" for pair in train)
    summary = {
        "by_author": dict(sorted(authors.items())),
        "samples": len(right),
        "sampled_accuracy": accuracy,
    }
    write_json(folder / "prefer.json", summary)
    return {
        "pairs": len(train),
        "heldout_pairs": len(pairs["heldout"]),
        "sampled_accuracy": accuracy,
        "own_share": authors["model/model"] / len(train) if train else 0.0,
        "test_pairs": len(pairs["test"]),
    }


def make_pairs(
    task: Task,
    answers: Sequence[GradedAnswer],
    config: PreferConfig,
    seed: int,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Make up to `pairs_per_prompt` pairs of the sampled answers to one task.

    An answer that did not end is never chosen (it would teach not to stop), and is rejected last.

    Returns:
        Preference records. For a side that the model wrote, the origin holds the token ids that
        were sampled, with the one that ended it ("chosen_ids", "rejected_ids"; encoding the text
        again would often give others), and the lowest temperature at which that text was sampled
        ("chosen_temperature"; "temperature" for the rejected side).
    """
    # Answers that ended come first: the ids of a text are those of its first answer.
    ordered = sorted(answers, key=lambda answer: not _ended(answer))
    right = list(dict.fromkeys(a.text for a in ordered if a.grade.passed and _ended(a)))
    wrong = list(dict.fromkeys(a.text for a in ordered if not a.grade.passed and a.grade.counts))
    chosen_by = rejected_by = "model"
    if not right and config.program_chosen:
        right, chosen_by = [task.reference["answer"]], "program"
    if not wrong and config.program_rejected:
        wrong, rejected_by = task.reference["wrong"], "program"
    if not right or not wrong:
        return []
    origin: dict[str, Any] = {"method": "rejection", "seed": seed, "parents": [], "task": task.kind}
    origin |= {"chosen": chosen_by, "rejected": rejected_by} | ({"model": model} if model else {})
    count = 1 if rejected_by == "program" else config.pairs_per_prompt
    pairs = []
    for rejected in _spread(wrong, count):
        chosen = _nearest(rejected, right)
        pair_origin = dict(origin)
        if chosen_by == "model":
            pair_origin |= _sampling(chosen, ordered, "chosen_ids", "chosen_temperature")
        if rejected_by == "model":
            pair_origin |= _sampling(rejected, ordered, "rejected_ids", "temperature")
        pairs.append(
            {
                "prompt": task.prompt,
                "chosen": [{"role": "assistant", "content": chosen}],
                "rejected": [{"role": "assistant", "content": rejected}],
                "origin": pair_origin,
            }
        )
    return pairs


def _ended(answer: GradedAnswer) -> bool:
    return answer.output.finish_reason == "stop"


def _sampling(
    text: str, answers: Sequence[GradedAnswer], ids: str, temperature: str
) -> dict[str, Any]:
    """The first answer's token ids and the lowest temperature among the answers of this text."""
    same = [answer for answer in answers if answer.text == text]
    return {ids: same[0].output.written_ids, temperature: min(a.temperature for a in same)}


def _nearest(wrong: str, right: Sequence[str]) -> str:
    """The right answer that shares the longest beginning with a wrong one.

    The pair then differs in the error alone.
    """

    def shared(text: str) -> int:
        differences = [n for n, (a, b) in enumerate(zip(text, wrong)) if a != b]
        return differences[0] if differences else min(len(text), len(wrong))

    return max(right, key=shared)


def _spread(texts: list[str], count: int) -> list[str]:
    """`count` of the texts, evenly from first to last, and so over the temperatures."""
    if len(texts) <= count or count == 1:
        return texts[:count]
    return [texts[round(i * (len(texts) - 1) / (count - 1))] for i in range(count)]


def run_prefer(run: StageRun) -> dict[str, float]:
    """The chat model's graded answers → preferences P."""
    model = run.inputs["model"]
    engine = Engine(load_model(model, device=best_device()), load_tokenizer(model))
    return build_preferences(run.config, engine, run.seed, run.output, model.name)


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    prefer = recipe.prefer
    return Effort(answers=(prefer.prompts + 2 * prefer.heldout_prompts) * prefer.samples)


STAGE = Stage(
    name="prefer",
    help="Make preference pairs by sampling and checking.",
    config=PreferConfig,
    inputs={"model": MODEL},
    outputs=["preferences"],
    run=run_prefer,
    estimate=_effort,
)
