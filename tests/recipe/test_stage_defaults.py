"""Naming one key of a stage's settings leaves every other key as the stage has it."""

from collections.abc import Iterator
from typing import Any

import pytest
import yaml
from pydantic import BaseModel

from openqwen.recipe.flags import RunOptions, parse
from openqwen.recipe.graph import load_stage, recipe_class, verbs
from openqwen.recipe.settings import load_settings
from openqwen.train.sweep import SweepConfig

Recipe = recipe_class()
CONFIGS = {name: load_stage(name).config for name in verbs()} | {"recipe": Recipe}


def keys(settings: BaseModel, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Every key at every depth, with its value."""
    for name in type(settings).model_fields:
        value = getattr(settings, name)
        if isinstance(value, BaseModel):
            yield from keys(value, (*path, name))
        else:
            yield (*path, name), value


def nested(path: tuple[str, ...], value: Any) -> Any:
    return nested(path[:-1], {path[-1]: value}) if path else value


@pytest.mark.parametrize("name", CONFIGS)
def test_naming_any_single_key_changes_no_other(name):
    kind = CONFIGS[name]
    default = kind()
    for path, value in keys(default):
        assert kind.model_validate(nested(path, value)) == default, ".".join(path)


ONE_KEY = [
    (("dpo", "train", "beta1"), 0.8, ("dpo", "train", "learning_rate"), 7e-7),
    (("online_dpo", "train", "clip"), 0.5, ("online_dpo", "train", "learning_rate"), 7e-7),
    (("reward", "train", "clip"), 0.5, ("reward", "train", "learning_rate"), 3e-6),
    (("pretrain", "train", "bad", "spike"), 9.0, ("pretrain", "train", "learning_rate"), 3e-4),
    (("extend", "train", "clip"), 0.5, ("extend", "train", "learning_rate"), 3e-5),
    (("extend", "data", "tokens"), 1_000, ("extend", "data", "context"), 32_768),
    (("sft", "lora", "alpha"), 64.0, ("sft", "lora", "rank"), 0),
]


@pytest.mark.parametrize("given", ["yaml", "flags", "python"])
@pytest.mark.parametrize(("path", "value", "other", "kept"), ONE_KEY)
def test_a_recipe_keeps_the_stage_s_own_defaults(tmp_path, given, path, value, other, kept):
    if given == "yaml":
        (tmp_path / "r.yaml").write_text(yaml.safe_dump(nested(path, value)))
        recipe = load_settings(tmp_path / "r.yaml", Recipe)
    elif given == "flags":
        flag = "--" + ".".join(path).replace("_", "-")
        _, recipe = parse([flag, str(value)], RunOptions, Recipe(), "openqwen run", "")
    else:
        recipe = Recipe(**nested(path, value))
    found = dict(keys(recipe))
    assert found == dict(keys(Recipe())) | {path: value}
    assert found[other] == kept


def test_networks_of_a_sweep_are_those_named_and_keep_what_their_namesakes_have():
    networks = SweepConfig(networks={"small": {"layers": 5}, "mine": {"heads": 8}}).networks
    small = SweepConfig().networks["small"]
    assert networks["small"] == small.model_copy(update={"layers": 5})
    assert list(networks) == ["small", "mine"]
