"""The engine's settings, as users see them."""

import re

import pytest

from openqwen.cli import main
from openqwen.engine import EngineConfig
from openqwen.recipe.settings import validate
from openqwen.serve.settings import ServeConfig
from openqwen.support.errors import OpenQwenError


def test_an_unknown_setting_is_an_error_that_suggests_the_nearest():
    with pytest.raises(
        OpenQwenError, match=r"no key 'engine\.speculat'\. Did you mean 'speculate'"
    ):
        validate(ServeConfig, {"engine": {"speculat": 4}}, "serve.yaml")
    config = validate(ServeConfig, {"engine": {"speculate": 4}}, "serve.yaml").engine
    assert config == EngineConfig(speculate=4)
    with pytest.raises(ValueError, match="frozen"):
        config.speculate = 5


def test_the_help_of_serve_shows_every_setting_of_the_engine(capsys):
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    shown = re.sub(r"[│\s]+", "", capsys.readouterr().out)
    for name, field in EngineConfig.model_fields.items():
        assert f"--engine.{name.replace('_', '-')}" in shown
        assert re.sub(r"\s+", "", field.description) in shown
