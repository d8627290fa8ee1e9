"""Recipes in YAML, overrides, and the errors that name file, line and key."""

from pathlib import Path

import pytest

from openqwen.recipe.graph import recipe_class
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.errors import OpenQwenError


@pytest.fixture
def load(fake, tmp_path):
    def _load(text: str):
        path = tmp_path / "r.yaml"
        path.write_bytes(text.encode() if isinstance(text, str) else text)
        return load_settings(path, recipe_class())

    return _load


@pytest.mark.parametrize("text", ["1e-3", "1E-3", "1.0e-3", "0.001", "1.e-3", "+1e-3"])
def test_a_number_in_any_spelling(load, text):
    assert load(f"learn: {{train: {{learning_rate: {text}}}}}").learn.train.learning_rate == 1e-3


def test_empty_file_and_merge_keys(load):
    assert load("") == recipe_class()()
    assert load("# nothing\n") == recipe_class()()
    assert load("corpus: &c {words: 3}\nlearn: {train: {<<: {steps: 5}}}").learn.train.steps == 5


@pytest.mark.parametrize(
    ("text", "told"),
    [
        (
            "learn:\n  train:\n    stepz: 3",
            ["no key 'learn.train.stepz'", "Did you mean 'steps'", "r.yaml:3"],
        ),
        ("lern: {}", ["no key 'lern'", "'learn'", "r.yaml:1"]),
        ("online-score: {}", ["Did you mean 'online_score'"]),
        ("learn: {qqq: 1}", ["no key 'learn.qqq'", "Known here: train"]),
        ("seed: many", ["seed is 'many'", "integer", "r.yaml:1"]),
        ("learn: {train: {steps: 0}}", ["learn.train.steps is 0", "greater than 0"]),
        ("learn: 3", ["learn is 3"]),
        ("seed: x\nlern: 1", ["seed is 'x'", "fix these too", "lern"]),
        ("seed: 1\nseed: 2", ["the key 'seed' is given twice", "r.yaml:2:1"]),
        ("learn:\n  train: {a: 1, a: 2}", ["'a' is given twice", "r.yaml:2"]),
        ("seed: [1,\nlearn: 3", ["not valid YAML", "r.yaml:2"]),
        ("a:\n\tb: 1", ["not valid YAML", "r.yaml:2"]),
        ("- 1\n- 2", ["a mapping"]),
        ("seed: !!python/object:os.system x", ["not valid YAML", "r.yaml:1"]),
        ("? [a, b]\n: 1", ["not valid YAML"]),
        (b"seed: \xff\xfe", ["not valid YAML"]),
        ("seed: '\x07'", ["not valid YAML"]),
    ],
)
def test_errors_name_the_place(load, text, told):
    with pytest.raises(OpenQwenError) as caught:
        load(text)
    for part in told:
        assert part in str(caught.value)


def test_bare_names_are_found(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("recipes").mkdir()
    Path("recipes/mine.yaml").write_text("seed: 3")
    assert find_recipe("mine") == Path("recipes/mine.yaml")
    assert find_recipe("recipes/mine.yaml") == Path("recipes/mine.yaml")
    with pytest.raises(OpenQwenError, match="Did you mean 'mine'"):
        find_recipe("mine2")


def test_overrides_stand_over_yaml(call):
    assert (
        call("run", "tiny.yaml", "--learn.train.learning_rate=5e-4", "--seed", "7", "--output", "x")
        == 0
    )
    manifest = Path("x/learn/manifest.json").read_text()
    assert '"learning_rate": 0.0005' in manifest
    assert '"seed": 7' in manifest


@pytest.mark.parametrize(
    ("arguments", "status", "told"),
    [
        (["--learn.train.stepz", "3"], 1, "Did you mean '--learn.train.steps'"),
        (["--learning-rate", "3"], 1, "no flag '--learning-rate'"),
        (["--untill", "corpus"], 1, "Did you mean '--until'"),
        (
            ["--learn.train.steps", "0"],
            1,
            "learn.train.steps is 0, but it should be greater than 0",
        ),
        (["--learn.train.steps", "many"], 2, "--learn.train.steps"),
        (["extra"], 1, "Unexpected argument 'extra'."),
        (["untl", "learn"], 1, "Unexpected argument 'untl'. Did you mean '--until'?"),
    ],
)
def test_bad_flags(call, arguments, status, told):
    assert call("run", "tiny.yaml", *arguments) == status
    assert told in call.err
    assert "Traceback" not in call.err
    assert call.ran == []


def test_help_shows_every_field_with_the_recipe_s_value(call):
    assert call("run", "tiny.yaml", "--help") == 0
    for text in (
        "--learn.train.learning-rate FLOAT",
        "Peak learning rate. (default: 0.001)",
        "--from STAGE",
        "--seed",
    ):
        assert text in call.out
    assert call("run", "--help") == 0
    assert "--corpus.folder" in call.out
