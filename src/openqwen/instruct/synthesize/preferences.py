"""The `prefer` stage: preferences P from the aligned model's own right and wrong answers.

Qwen2.5 report, section 4.2: the SFT model answers fresh queries; answers that pass the check are
positives, those that fail are negatives.
"""

from collections import Counter
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import Any

from pydantic import Field

from openqwen.engine import Engine, Generator, Output
from openqwen.instruct.synthesize.rejection import sample_answers
from openqwen.instruct.synthesize.tasks import Task, generate_tasks
from openqwen.model import load_model
from openqwen.support.device import best_device
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.generators import Generators
from openqwen.support.settings import Settings
from openqwen.support.stage import MODEL, Effort, Stage, StageRun
from openqwen.tokenizer import load_tokenizer


class PreferConfig(Settings):
    """How many preferences to make, and what stands in where the model gives no right or no wrong
    answer.
    """

    prompts: int = Field(2_000, ge=1, description="prompts that the SFT model answers")
    heldout_prompts: int = Field(
        400,
        ge=1,
        description=(
            "prompts of the development split, and as many of the test split, for pair accuracy"
        ),
    )
    samples: int = Field(4, ge=1, description="answers sampled for each prompt")
    temperatures: list[float] = Field(
        [1.0],
        min_length=1,
        description="sampling temperatures, one answer's after the other's: errors of every size",
    )
    max_tokens: int = Field(24, ge=1, description="longest answer, in tokens")
    pairs_per_prompt: int = Field(
        2, ge=1, description="pairs made of one prompt's answers, at most"
    )
    program_chosen: bool = Field(
        True, description="where no answer is right, prefer the program's own"
    )
    program_rejected: bool = Field(
        True, description="where no answer is wrong, reject a wrong one of the program's"
    )


def build_preferences(
    config: PreferConfig, engine: Generator, seed: int, folder: Path, model: str | None = None
) -> dict[str, float]:
    """Write preferences.jsonl, heldout.jsonl, test.jsonl and prefer.json into `folder`; returns
    flat metrics.

    engine: the SFT model. model: its name. Prompts are of the train split, all kinds equally often.
    Most are new to the model; of the kinds with few questions it has seen most in SFT, and without
    them it would unlearn those kinds.
    """
    rng = Generators(seed)["prefer-tasks"]
    groups = {
        "preferences": generate_tasks(rng, config.prompts),
        "heldout": generate_tasks(rng, config.heldout_prompts, split="heldout"),
        "test": generate_tasks(rng, config.heldout_prompts, split="test"),
    }
    tasks = [task for group in groups.values() for task in group]
    prompts = [task.prompt for task in tasks]
    answers = sample_answers(
        engine, prompts, config.samples, config.temperatures, config.max_tokens, seed, "prefer"
    )
    right = [t.check(output.text) for t, outputs in zip(tasks, answers) for output in outputs]
    accuracy = sum(right) / len(right)

    left = iter(answers)
    pairs = {
        name: [pair for task in group for pair in make_pairs(task, next(left), config, seed, model)]
        for name, group in groups.items()
    }
    for name, records in pairs.items():
        write_jsonl(folder / f"{name}.jsonl", records)
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
    task: Task, outputs: Sequence[Output], config: PreferConfig, seed: int, model: str | None = None
) -> list[dict[str, Any]]:
    """Up to `pairs_per_prompt` pairs from the sampled answers to one task.

    An answer that never ended is no positive (it would teach not to stop) and the last choice of a
    negative. Of the model's own answers, origin["temperature"] (the wrong one's) and
    origin["chosen_temperature"] are the lowest that each was drawn at; origin["chosen_ids"] and
    origin["rejected_ids"] are the tokens that were sampled, the end among them: the text encoded
    anew would often be others.
    """
    right = _distinct(o.text for o in outputs if o.finish_reason == "stop" and task.check(o.text))
    ended = [o.text for o in outputs if o.finish_reason == "stop" and not task.check(o.text)]
    unended = [o.text for o in outputs if o.finish_reason != "stop" and not task.check(o.text)]
    wrong = _distinct(ended + unended)
    chosen_by = rejected_by = "model"
    if not right and config.program_chosen:
        right, chosen_by = [task.answer], "program"
    if not wrong and config.program_rejected:
        wrong, rejected_by = list(task.wrong), "program"
    if not right or not wrong:
        return []
    origin: dict[str, Any] = {"method": "rejection", "seed": seed, "parents": [], "task": task.task}
    origin |= {"chosen": chosen_by, "rejected": rejected_by} | ({"model": model} if model else {})
    count = 1 if rejected_by == "program" else config.pairs_per_prompt
    drawn: dict[str, float] = {}
    for n, output in enumerate(outputs):
        temperature = config.temperatures[n % len(config.temperatures)]
        drawn[output.text.strip()] = min(temperature, drawn.get(output.text.strip(), temperature))
    ids: dict[str, list[int]] = {}
    for output in sorted(
        outputs, key=lambda o: o.finish_reason != "stop"
    ):  # those that ended go first
        ids.setdefault(output.text.strip(), output.written_ids)
    pairs = []
    for text in _spread(wrong, count):
        sides = {"chosen": _nearest(text, right), "rejected": text}
        own: dict[str, Any] = {}
        for side, name in (("chosen", "chosen_temperature"), ("rejected", "temperature")):
            if origin[side] == "model":
                own |= {f"{side}_ids": ids[sides[side]], name: drawn[sides[side]]}
        answers = {side: [{"role": "assistant", "content": said}] for side, said in sides.items()}
        pairs.append({"prompt": task.prompt, **answers, "origin": origin | own})
    return pairs


def _nearest(wrong: str, right: Sequence[str]) -> str:
    """The right answer that shares the longest beginning with a wrong one: there the error stands
    out.
    """

    def shared(text: str) -> int:
        return next(
            (n for n, (a, b) in enumerate(zip(text, wrong)) if a != b), min(len(text), len(wrong))
        )

    return max(right, key=shared)


def _spread(texts: list[str], count: int) -> list[str]:
    """`count` of the texts, evenly from first to last: the coolest sample's error and the hottest
    one's.
    """
    if len(texts) <= count or count == 1:
        return texts[:count]
    return [texts[round(i * (len(texts) - 1) / (count - 1))] for i in range(count)]


def _distinct(texts: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(text.strip() for text in texts))


def run_prefer(run: StageRun) -> dict[str, float]:
    """The chat model's checked samples → preferences P."""
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
