"""The `evaluate-reward` stage: the scores of a reward model."""

from functools import partial
from typing import Any

from openqwen.evaluate.config import EvaluateConfig
from openqwen.evaluate.model import STAGE as EVALUATE
from openqwen.evaluate.preferences import near_misses, pair_accuracy
from openqwen.model import load_scorer
from openqwen.support.device import best_device
from openqwen.support.files import read_jsonl, write_json
from openqwen.support.stage import PREFERENCES, REWARD, Stage, StageRun
from openqwen.tokenizer import load_tokenizer
from openqwen.train.reward import score


def evaluate_reward(run: StageRun) -> dict[str, float]:
    """How often the reward model puts the better answer first: held-out pairs and test pairs, all
    and near misses.
    """
    folder = run.inputs["reward"]
    scorer, tokenizer = load_scorer(folder, device=best_device()), load_tokenizer(folder)
    scores: dict[str, Any] = {}
    for split, prefix in (("test", "test_"), ("heldout", "")):
        pairs = list(read_jsonl(run.inputs["preferences"] / f"{split}.jsonl"))
        for name, chosen in (
            (f"{prefix}pair_accuracy", pairs),
            (f"{prefix}near_accuracy", near_misses(pairs)),
        ):
            if chosen:
                found = pair_accuracy(partial(score, scorer, tokenizer), chosen)
                scores |= {
                    key.replace("pair_accuracy", name): value
                    for key, value in found.items()
                    if key != "n"
                }
                scores[f"{name}_n"] = len(chosen)
    write_json(run.output / "scores.json", scores)
    return {name: value for name, value in scores.items() if isinstance(value, float)}


STAGE = Stage(
    name="evaluate-reward",
    help="",
    config=EvaluateConfig,
    inputs={"reward": REWARD, "preferences": PREFERENCES},
    outputs=[],
    run=evaluate_reward,
    estimate=EVALUATE.estimate,
)
