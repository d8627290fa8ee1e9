"""The `prefer` stage: preferences P from the aligned model's own answers, judged by programs.

Qwen2.5 report, section 4.2: the SFT model answers fresh queries; answers that pass the check are
positives, those that fail are negatives. Two ways of `openqwen synthesize` meet here, with programs
in place of a judge. Rejection sampling: an answer must be right. A constitution of one principle:
an answer must stand alone (`tasks.checkable.closing`).
"""

from collections import Counter
from collections.abc import Collection, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Engine, Generator, Sampling
from openqwen.instruct.synthesize.method import assistant
from openqwen.instruct.synthesize.paths import contrasts
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.progress import progress
from openqwen.support.settings import Settings
from openqwen.support.stage import MODEL, Effort, Stage, StageRun
from openqwen.tasks import GradedAnswer, Task, answer_tasks
from openqwen.tasks.checkable import PRINCIPLE, generate_tasks, stands_alone
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
        Counts of pairs, the share of answers that are right ("sampled_accuracy"), that of those
        that stand alone ("sampled_style"), and that of pairs in which the model wrote both sides
        ("own_share").
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
    graded = [a for group in answers for a in group if a.grade.counts]
    accuracy = sum(a.grade.passed for a in graded) / max(1, len(graded))
    style = sum(stands_alone(a.text) for a in graded) / max(1, len(graded))

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
        "samples": len(graded),
        "sampled_accuracy": accuracy,
    }
    write_json(folder / "prefer.json", summary)
    return {
        "pairs": len(train),
        "heldout_pairs": len(pairs["heldout"]),
        "sampled_accuracy": accuracy,
        "sampled_style": style,
        "own_share": authors["model/model"] / len(train) if train else 0.0,
        "test_pairs": len(pairs["test"]),
    }


def sample_answers(
    generator: Generator,
    tasks: Sequence[Task],
    samples: int,
    temperatures: Sequence[float],
    max_tokens: int,
    seed: int,
    label: str,
) -> list[list[GradedAnswer]]:
    """Sample `samples` graded answers to each task, each with its own seed.

    The n-th answer to a task is sampled at the n-th temperature; after the last comes the first.
    """
    seeds = Generators(seed)[label].integers(2**31, size=(len(tasks), samples))
    answers: list[list[GradedAnswer]] = [[] for _ in tasks]
    with progress(label, len(tasks) * samples, "answers") as work:
        for n in range(samples):
            temperature = temperatures[n % len(temperatures)]
            sampling = Sampling(max_tokens=max_tokens, temperature=temperature)
            batch = answer_tasks(generator, tasks, sampling, seeds[:, n].tolist(), progress=work)
            for group, answer in zip(answers, batch, strict=True):
                group.append(answer)
    return answers


def make_pairs(
    task: Task,
    answers: Sequence[GradedAnswer],
    config: PreferConfig,
    seed: int,
    model: str | None = None,
) -> list[dict[str, Any]]:
    """Make up to `pairs_per_prompt` pairs of the sampled answers to one task.

    The chosen answer is right and stands alone; the rejected one is wrong, or right with a closing
    word. An answer that did not end is never chosen (it would teach not to stop), and is rejected
    last.

    Returns:
        Preference records; their "criteria" say by which the chosen side is better: "correctness",
        "style" or both. For a side that the model wrote, the origin holds the token ids that
        were sampled, with the one that ended it ("chosen_ids", "rejected_ids"; encoding the text
        again would often give others), and the lowest temperature at which that text was sampled
        ("chosen_temperature"; "temperature" for the rejected side).
    """
    # Answers that ended come first: the ids of a text are those of its first answer.
    ordered = sorted(answers, key=lambda answer: not _ended(answer))
    right = {answer.text for answer in answers if answer.grade.passed}
    good = list(dict.fromkeys(a.text for a in ordered if _good(a) and _ended(a)))
    bad = list(dict.fromkeys(a.text for a in ordered if not _good(a) and a.grade.counts))
    chosen_by = rejected_by = "model"
    if not good and config.program_chosen:
        good, chosen_by = [task.reference["answer"]], "program"
    if not bad and config.program_rejected:
        bad, rejected_by = task.reference["wrong"], "program"
    origin: dict[str, Any] = {"method": "rejection", "seed": seed, "parents": [], "task": task.kind}
    origin |= {"chosen": chosen_by, "rejected": rejected_by} | ({"model": model} if model else {})
    pairs = []
    for chosen, rejected in contrasts(
        good, bad, 1 if rejected_by == "program" else config.pairs_per_prompt
    ):
        criteria = {"correctness": int(rejected not in right)}
        criteria["style"] = int(not stands_alone(rejected))
        pair_origin = origin | (PRINCIPLE if criteria["style"] else {})
        if chosen_by == "model":
            pair_origin |= _sampling(chosen, ordered, "chosen_ids", "chosen_temperature")
        if rejected_by == "model":
            pair_origin |= _sampling(rejected, ordered, "rejected_ids", "temperature")
        pairs.append(
            {
                "prompt": task.prompt,
                "chosen": [assistant(chosen)],
                "rejected": [assistant(rejected)],
                "criteria": {name: better for name, better in criteria.items() if better},
                "origin": pair_origin,
            }
        )
    return pairs


def _good(answer: GradedAnswer) -> bool:
    return answer.grade.passed and stands_alone(answer.text)


def _ended(answer: GradedAnswer) -> bool:
    return answer.output.finish_reason == "stop"


def _sampling(
    text: str, answers: Sequence[GradedAnswer], ids: str, temperature: str
) -> dict[str, Any]:
    """The first answer's token ids and the lowest temperature among the answers of this text."""
    same = [answer for answer in answers if answer.text == text]
    return {ids: same[0].output.written_ids, temperature: min(a.temperature for a in same)}


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
