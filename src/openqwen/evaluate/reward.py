"""The `evaluate-reward` stage: the scores of a reward model."""

from collections.abc import Collection
from functools import partial
from typing import Any

from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.preferences import near_misses, pair_accuracy
from openqwen.model import load_scorer
from openqwen.support.device import best_device
from openqwen.support.files import read_jsonl, write_json
from openqwen.support.stage import CONVERSATION, PREFERENCES, REWARD, Effort, Stage, StageRun
from openqwen.tokenizer import load_tokenizer
from openqwen.train.preferences import COMPARED
from openqwen.train.reward import score


def evaluate_reward(run: StageRun) -> dict[str, float]:
    """Pair accuracy of a reward model on heldout and test pairs, on all and on near misses."""
    folder = run.inputs["reward"]
    scorer, tokenizer = load_scorer(folder, device=best_device()), load_tokenizer(folder)
    scores: dict[str, Any] = {}
    for split, prefix in (("test", "test_"), ("heldout", "")):
        pairs = list(read_jsonl(run.inputs["preferences"] / f"{split}.jsonl"))
        for kind, chosen in (("pair", pairs), ("near", near_misses(pairs))):
            if chosen:
                name = f"{prefix}{kind}_accuracy"
                result = pair_accuracy(partial(score, scorer, tokenizer), chosen)
                count = result.pop("n")
                for key, value in result.items():
                    scores[key.replace("pair_accuracy", name)] = value
                scores[f"{name}_n"] = count
    write_json(run.output / "scores.json", scores)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


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
