"""Estimate for `--dry-run` how long a stage takes that has never run."""

from collections.abc import Collection
from typing import Any

from openqwen.support.device import best_device, peak_flops
from openqwen.support.stage import Stage
from openqwen.train.pretrain import network_config

SHARE = 0.6  # share of the processor's matrix peak that training a small model reaches
_ANSWERS = 250  # short answers generated per second


def seconds(stage: Stage, recipe: Any, roles: Collection[str]) -> float:
    """Return the expected seconds of a stage in a recipe; roles: the inputs that it is given."""
    assert stage.estimate is not None
    effort = stage.estimate(recipe, roles)
    spent = effort.seconds + effort.answers / _ANSWERS
    if effort.rows:
        network = network_config(recipe.pretrain, recipe.tokenizer.vocabulary)
        rows = effort.rows.items()
        operations = sum(n * network.flops_per_token(length / 2) for length, n in rows)
        spent += operations / (SHARE * peak_flops(best_device()))
    return spent
