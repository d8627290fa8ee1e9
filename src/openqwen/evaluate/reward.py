"""The `evaluate-reward` stage: the scores of a reward model."""

import re
from collections.abc import Collection
from typing import Any

from openqwen.engine.score import RewardModel
from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.preferences import near_misses
from openqwen.evaluate.reward_report import reward_report
from openqwen.evaluate.scored_records import score_records
from openqwen.support.files import write_json, write_jsonl
from openqwen.support.records import read_records
from openqwen.support.stage import CONVERSATION, PREFERENCES, REWARD, Effort, Stage, StageRun
from openqwen.train.preferences import COMPARED


def evaluate_reward(run: StageRun) -> dict[str, float]:
    """Score a reward model on heldout and test pairs; see `reward_report`.

    Scores whose names begin with `test_` are of pairs that no setting was chosen by; those with
    `near_` are of near misses alone. heldout.jsonl and test.jsonl hold the pairs with their scores.
    """
    model = RewardModel.load(run.inputs["reward"])
    scores: dict[str, Any] = {}
    for split, prefix in (("test", "test_"), ("heldout", "")):
        path = run.inputs["preferences"] / f"{split}.jsonl"
        records = list(score_records(model, read_records(path)))
        write_jsonl(run.output / f"{split}.jsonl", records)
        scores |= {f"{prefix}{key}": value for key, value in reward_report(records).items()}
        for key, value in reward_report(near_misses(records)).items():
            if key.startswith("pair_accuracy"):
                scores[f"{prefix}{key.replace('pair', 'near', 1)}"] = value
    write_json(run.output / "scores.json", scores)
    first = {name: scores[name] for name in scores if re.search("(pair|near)_accuracy", name)}
    return {name: value for name, value in (first | scores).items() if isinstance(value, float)}


def _effort(recipe: Any, roles: Collection[str]) -> Effort:
    # Two splits of pairs, forward only: a third of a training token each.
    return Effort(rows={CONVERSATION: 2 * recipe.prefer.heldout_prompts * COMPARED / 3})


STAGE = Stage(
    name="evaluate-reward",
    help="",
    config=EvaluateConfig,
    inputs={"reward": REWARD, "preferences": PREFERENCES},
    outputs=[],
    run=evaluate_reward,
    estimate=_effort,
)
