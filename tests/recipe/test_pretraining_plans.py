"""The shipped plans of Qwen2.5 and Qwen2.5-Turbo hold the numbers that the reports give, and can be
planned.
"""

import numpy as np
import pytest

from openqwen import cli
from openqwen.model import ModelConfig
from openqwen.recipe.graph import recipe_class
from openqwen.recipe.settings import find_recipe, load_settings
from openqwen.support.generators import Generators
from openqwen.train.packed_dataset import DocumentSampler, PackedDataset
from openqwen.train.pretrain import network_config


def plan(name):
    recipe = load_settings(find_recipe(name), recipe_class())
    return recipe, [*recipe.pretrain.resolved(), *recipe.extend.resolved()]


def test_qwen25_reads_4096_then_32768_with_the_base_raised():
    recipe, stages = plan("qwen2.5")
    assert [(s.data.context, s.rope_theta) for s in stages] == [(4_096, 1e4), (32_768, 1e6)]
    assert sum(s.data.tokens for s in stages) == 18e12
    assert stages[0].train.learning_rate > stages[1].train.learning_rate
    made, published = network_config(recipe.pretrain, 151_665), ModelConfig.named("qwen2.5-0.5b")
    fields = ["vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
              "num_key_value_heads", "tie_word_embeddings"]  # fmt: skip
    different = [f for f in fields if getattr(made, f) != getattr(published, f)]
    assert different == ["vocab_size"]  # 151,936 rows there; 151,665 tokens need 151,680


def test_turbo_reads_forty_percent_at_the_longest_of_four_lengths():
    recipe, stages = plan("qwen2.5-turbo")
    long = stages[1:]
    assert [s.data.context for s in long] == [32_768, 65_536, 131_072, 262_144]
    assert {s.rope_theta for s in long} == {1e7}
    assert {s.data.lengths[s.data.context] for s in long} == {0.4}
    assert recipe.pretrain.network.experts == 64


class Source:
    """Long and short documents."""

    lengths = np.array([300_000, 140_000, 70_000, 40_000, 5_000, 900] * 6)

    def document(self, number):
        return np.zeros(self.lengths[number], dtype=np.uint32)


@pytest.mark.parametrize("isolated", [True, False])
def test_the_turbo_plan_in_small_holds_its_shares(isolated):
    _, stages = plan("qwen2.5-turbo")
    generators = Generators(1)
    sampler = DocumentSampler({"books": Source()}, generators)
    for stage in stages[1:]:
        data = stage.data.model_copy(update={"tokens": 20_000_000, "isolated": isolated})
        pieces = PackedDataset(sampler, data, generators)
        sizes = pieces.rows[:, 1] - 1
        assert sizes.max() == data.context
        assert sizes[sizes == data.context].sum() / sizes.sum() == pytest.approx(0.4, abs=0.02)
        assert sizes.sum() == pytest.approx(20_000_000, rel=0.02)


@pytest.mark.parametrize("name", ["qwen2.5", "qwen2.5-turbo"])
def test_the_plans_are_printed_by_a_dry_run(name, tmp_path, capsys):
    assert cli.main(["run", name, "--dry-run", "--output", str(tmp_path / "run")]) == 0
    assert "19 of 19 to make" in capsys.readouterr().out
    assert not (tmp_path / "run").exists()


def test_a_stage_alone_reads_its_section_of_a_recipe(tmp_path, capsys):
    with pytest.raises(SystemExit, match="0"):
        cli.main(["extend", "--recipe=qwen2.5-turbo", "--help"])
    shown = capsys.readouterr().out
    assert "--stages.to-256k.tokens" in shown
    assert "10000000" in shown
    assert cli.main(["pretrain", "--recipe", str(tmp_path / "none.yaml")]) == 1
    with pytest.raises(SystemExit, match="2"):
        cli.main(["sweep", "--recipe", "qwen2.5"])
