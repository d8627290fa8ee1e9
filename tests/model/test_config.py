"""Published sizes and the config.json round trip."""

import pytest

from openqwen.model import ModelConfig
from openqwen.support.errors import OpenQwenError

TOTALS = {  # facts: qwen2-recipe 1.4
    "qwen2-0.5b": 494_032_768,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_published_parameter_counts(name, total):
    assert ModelConfig.named(name).parameters() == total


def test_json_round_trip_and_both_rope_spellings():
    config = ModelConfig.named("qwen2.5-14b")
    assert ModelConfig.from_json(config.to_json()) == config
    values = config.to_json()
    theta = values.pop("rope_theta")
    values["rope_parameters"] = {"rope_type": "default", "rope_theta": theta}
    assert ModelConfig.from_json(values) == config


def test_errors_name_the_field():
    with pytest.raises(OpenQwenError, match=r"qwen2\.5-7b"):
        ModelConfig.named("qwen2.5-7bb")
    with pytest.raises(OpenQwenError, match="hidden_size"):
        ModelConfig.from_json({"vocab_size": 5})
    with pytest.raises(OpenQwenError, match="sliding"):
        ModelConfig.from_json(ModelConfig.named("qwen2-7b").to_json() | {"use_sliding_window": True})
