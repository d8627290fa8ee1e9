"""`train.merging` in the trainer, the stages, the recipe and the plan."""

import json

import pytest
import torch
from test_parallel import close, run
from training import Stop, network, same_bits, trainer

from openqwen import cli
from openqwen.model import (
    ModelConfig,
    Qwen2,
    initialize,
    load_model,
    save_checkpoint,
    save_weights,
)
from openqwen.recipe import plan_devices
from openqwen.recipe.graph import check_graph, nodes_of, recipe_class
from openqwen.recipe.plan_devices import trainings
from openqwen.support.errors import OpenQwenError
from openqwen.support.files import write_json
from openqwen.support.generators import Generators
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.merging import OnlineMerging
from openqwen.train.merging.settings import MergingConfig
from openqwen.train.optimizer import OptimizerConfig, build_optimizers
from openqwen.train.sft import SftConfig


def checkpoint(folder, seed, words="one two three four", sizes=(384, 32, 48, 2, 4, 2)):
    tokenizer = train_tokenizer([words] * 20, TokenizerConfig(vocabulary=300))
    model = Qwen2(ModelConfig(*sizes, max_position_embeddings=256, tie_word_embeddings=True))
    initialize(model, torch.Generator().manual_seed(seed))
    save_checkpoint(model, tokenizer, folder)
    return folder


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """A base for the trainer's own network, whose files have no tokenizer."""
    folder = tmp_path_factory.mktemp("base")
    model = network()
    initialize(model, Generators(9).torch("weights"))
    write_json(folder / "config.json", model.config.to_json())
    save_weights(model, folder)
    return folder


SETTINGS = [
    {"form": "dare", "reserve": 0.3},
    {"form": "dare", "reserve": 0.3, "scaling": "none", "store": "disk", "every": 2},
    {"form": "ties", "reserve": 0.1, "signs": "unweighted"},
]


@pytest.mark.parametrize("settings", SETTINGS)
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(base, tmp_path, settings):
    merging = {"base": base, "alpha": 1e-3, **settings}
    whole = trainer(tmp_path / "whole", merging=merging)
    whole.run()
    for stop in (3, 8):
        with pytest.raises(Stop):
            trainer(tmp_path / "cut", stop_at=stop, merging=merging).run()
    resumed = trainer(tmp_path / "cut", merging=merging)
    resumed.run()
    assert same_bits(whole.model, resumed.model)
    plain = trainer(tmp_path / "plain")
    plain.run()
    assert not same_bits(whole.model, plain.model)


def test_without_merging_it_trains_as_before_to_the_bit(base, tmp_path):
    plain = trainer(tmp_path / "plain")
    plain.run()
    merged = trainer(tmp_path / "merged", merging={"base": base, "alpha": 0, "reserve": 1})
    merged.run()
    assert same_bits(plain.model, merged.model)


def test_a_state_of_adamw_goes_on_with_merging_and_has_the_same_key(base, tmp_path):
    assert "merging" not in OptimizerConfig().model_dump()
    assert "merging" in OptimizerConfig(merging={"base": base}).model_dump()
    with pytest.raises(Stop):
        trainer(tmp_path, stop_at=4).run()
    trainer(tmp_path, merging={"base": base, "alpha": 1e-2}).run()
    entries = (tmp_path / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in entries] == list(range(12))


def test_the_task_vector_is_the_start_minus_the_base(base):
    model = network()
    config = OptimizerConfig(merging={"base": base, "reserve": 1.0})
    (optimizer,) = build_optimizers(model, config, seed=3)
    assert isinstance(optimizer, OnlineMerging)
    assert [g["weight_decay"] for g in optimizer.param_groups] == [0.1, 0.0]
    right = dict(load_model(base).named_parameters())
    for name, parameter in model.named_parameters():
        task = optimizer._parts[parameter].task.values
        assert torch.equal(task, (parameter - right[name]).detach().flatten().clamp(-1, 1))


def test_what_cannot_be_merged_is_refused(base, tmp_path):
    wide = network(width=48)
    with pytest.raises(OpenQwenError, match=r"'model.embed_tokens.weight' is \[64, 32\] in it"):
        build_optimizers(wide, OptimizerConfig(merging={"base": base}))
    with pytest.raises(OpenQwenError, match=r"'lm_head.weight' is missing in it"):
        build_optimizers(network(tied=False), OptimizerConfig(merging={"base": base}))
    with pytest.raises(OpenQwenError, match="around AdamW, not muon"):
        build_optimizers(network(), OptimizerConfig(method="muon", merging={"base": base}))
    with pytest.raises(ValueError, match=r"give merging\.base"):
        MergingConfig(form="ties")
    with pytest.raises(OpenQwenError, match="no checkpoint here"):
        build_optimizers(network(), OptimizerConfig(merging={"base": tmp_path}))


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    pairs = [
        {
            "prompt": [{"role": "user", "content": "one"}],
            "chosen": [{"role": "assistant", "content": "two " * (n + 1)}],
            "rejected": [{"role": "assistant", "content": "three " * (n + 1)}],
        }
        for n in range(6)
    ]
    data = "".join(json.dumps(record) + "\n" for record in pairs)
    (folder / "pairs.jsonl").write_text(data)
    demonstrations = [{"messages": pair["prompt"] + pair["chosen"]} for pair in pairs]
    data = "".join(json.dumps(record) + "\n" for record in demonstrations)
    (folder / "demonstrations.jsonl").write_text(data)
    checkpoint(folder / "start", 1)
    checkpoint(folder / "base", 2)
    checkpoint(folder / "other", 3, words="six seven eight nine")
    return folder


def dpo(models, out, *flags):
    command = ["dpo", "--model", models / "start", "--preferences", models / "pairs.jsonl"]
    return cli.main([*map(str, command), "--output", str(out), "--batch", "3", *map(str, flags)])


def test_dpo_merges_and_its_artifact_depends_on_the_base(models, tmp_path, capsys):
    flags = ("--train.merging.base", models / "base", "--train.merging.alpha", "1e-2")
    assert dpo(models, tmp_path / "merged", *flags, "--train.merging.form", "ties") == 0
    manifest = json.loads((tmp_path / "merged" / "manifest.json").read_text())
    assert manifest["config"]["train"]["merging"]["form"] == "ties"
    assert manifest["inputs"]["base"]["stage"] == str(models / "base")
    assert dpo(models, tmp_path / "plain") == 0
    start, merged, plain = (
        dict(load_model(path).named_parameters())
        for path in (models / "start", tmp_path / "merged", tmp_path / "plain")
    )
    moved = [
        max(float((model[n] - start[n]).detach().abs().max()) for n in start)
        for model in (merged, plain)
    ]
    assert moved[0] > 100 * moved[1]  # α = 0.01 of a large task vector, against a rate of 7e-7


def test_another_vocabulary_and_adapters_are_refused(models, tmp_path, capsys):
    assert dpo(models, tmp_path / "x", "--train.merging.base", models / "other") == 1
    assert "in one and" in capsys.readouterr().err
    command = ["sft", "--model", models / "start", "--output", tmp_path / "x"]
    command += ["--demonstrations", models / "demonstrations.jsonl", "--lora.rank", "2"]
    command += ["--train.merging.base", models / "base"]
    assert cli.main(list(map(str, command))) == 1
    assert "a base has no adapters" in capsys.readouterr().err
    command = ["dpo", "--model", models / "start", "--preferences", models / "pairs.jsonl"]
    command += ["--output", tmp_path / "x", "--train.merging.form", "ties"]
    assert cli.main(list(map(str, command))) == 1
    assert "give merging.base" in capsys.readouterr().err


def test_sft_from_the_base_itself_says_that_nothing_is_merged(models, tmp_path, capsys):
    command = ["sft", "--model", models / "start", "--output", tmp_path / "out"]
    command += ["--demonstrations", models / "demonstrations.jsonl", "--epochs", "1"]
    command += ["--train.merging.base", models / "start"]
    assert cli.main(list(map(str, command))) == 0
    assert "nothing is merged" in capsys.readouterr().err.replace("\n", " ")


def test_a_recipe_names_an_earlier_stage_as_the_base():
    merging = {"train": {"merging": {"base": "extend"}}}
    nodes = nodes_of(recipe_class()(dpo=merging, online_dpo=merging))
    check_graph(nodes)
    inputs = {node.name: node.inputs for node in nodes}
    assert inputs["dpo"] == {"model": "sft", "preferences": "prefer", "base": "extend"}
    assert inputs["online-dpo"]["base"] == "extend"
    assert "base" not in inputs["sft"]


def test_the_plan_counts_what_merging_keeps():
    def moments(**merging):
        recipe = recipe_class()(dpo={"train": {"merging": merging}})
        stage = next(s for s in trainings(recipe) if s.name == "dpo")
        return plan_devices._setting(stage, ModelConfig.named("qwen2.5-0.5b"), 1).moments

    assert moments() == 8
    assert moments(base="extend", reserve=0.01) == pytest.approx(12.165)
    assert moments(base="extend", reserve=0.5, store="bfloat16", every=2) == 8 + 2 + 4 + 4
    assert moments(base="extend", form="ties", reserve=0.01, alpha=0) == 8


def test_bytes_are_those_that_the_optimizer_holds(base):
    for settings in ({}, {"reserve": 0.5}, {"form": "ties", "reserve": 0.1, "every": 2}):
        config = OptimizerConfig(merging={"base": base, **settings})
        model = network()
        (optimizer,) = build_optimizers(model, config)
        for parameter in model.parameters():
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        kept = sum(
            tensor.nbytes
            for part in optimizer._parts.values()
            for tensor in vars(part.task).values()
            if tensor is not None
        )
        for state in optimizer.state.values():
            kept += sum(state[name].nbytes for name in ("lost", "cached") if name in state)
        weights = model.config.parameters()
        assert config.merging.bytes_per_weight * weights == pytest.approx(kept, rel=0.06)


def test_every_stage_that_shares_the_optimizers_settings_offers_it():
    assert SftConfig(train={"merging": {"base": "x"}}).train.merging.form == "dare"


@pytest.mark.slow
@pytest.mark.parametrize("case", ["dense", "experts:expert=2", "dense:tensor=2"])
def test_two_processes_train_what_one_trains(tmp_path, case):
    kind = f"merging-{case.split(':')[0]}"
    one = run(tmp_path / "one", 1, kind) / kind
    two = run(tmp_path / "two", 2, f"merging-{case}") / f"merging-{case}".replace(":", "-")
    close(two, one)
