"""How long each stage should take, before it has ever run: arithmetic over measured speed.

For `--dry-run`.
"""

from collections.abc import Collection
from typing import Any

from openqwen.support.device import best_device, peak_flops
from openqwen.support.stage import Stage
from openqwen.train.pretrain import network_config

SHARE = 0.6  # of the matrix peak that training a small model reaches
_ANSWERS = 250  # short answers a second


def seconds(stage: Stage, recipe: Any, roles: Collection[str]) -> float:
    """Seconds that a stage should take in a recipe, given these roles."""
    assert stage.estimate is not None
    effort = stage.estimate(recipe, roles)
    spent = effort.seconds + effort.answers / _ANSWERS
    if effort.rows:
        network = network_config(recipe.pretrain, recipe.tokenizer.vocabulary)
        operations = sum(
            n * network.flops_per_token(length / 2) for length, n in effort.rows.items()
        )
        spent += operations / (SHARE * peak_flops(best_device()))
    return spent
