"""`openqwen merge BASE MODELS... --output`: closed forms, files, and what it refuses."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from openqwen import cli
from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_checkpoint
from openqwen.tokenizer import TokenizerConfig, load_tokenizer, train_tokenizer
from openqwen.train import merge
from openqwen.train.merge import MergeConfig, merge_tensor, slerp

SIZES = (384, 32, 48, 2, 4, 2)
EXPERTS = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 12,
    "shared_expert_intermediate_size": 20,
}


def checkpoint(folder, seed, sizes=SIZES, words="one two three four five", **more):
    tokenizer = train_tokenizer([words] * 20, TokenizerConfig(vocabulary=300))
    config = ModelConfig(
        *sizes, max_position_embeddings=64, **({"tie_word_embeddings": True} | more)
    )
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(seed))
    save_checkpoint(model, tokenizer, folder, chat=seed > 0)
    return folder


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [checkpoint(folder / name, seed) for seed, name in enumerate(("base", "one", "two"))]


def weights(folder):
    return {n: p.detach() for n, p in load_model(folder).named_parameters()}


def test_tasks_are_added_and_the_result_is_the_first_models_chat_model(models, tmp_path, capsys):
    base, one, two = models
    out = tmp_path / "out"
    command = ["merge", "--method", "task-arithmetic", str(base), str(one), str(two)]
    assert cli.main([*command, "--weights", "0.5", "-0.25", "--output", str(out)]) == 0
    start, first, second = map(weights, models)
    for name, weight in weights(out).items():
        exact = start[name].double() + 0.5 * (first[name] - start[name]).double()
        exact -= 0.25 * (second[name] - start[name]).double()
        torch.testing.assert_close(weight.double(), exact, rtol=1e-6, atol=1e-7)
    generation = json.loads((out / "generation_config.json").read_text())
    assert generation == json.loads((one / "generation_config.json").read_text())
    assert load_tokenizer(out).encode("one two") == load_tokenizer(one).encode("one two")
    manifest = json.loads((out / "manifest.json").read_text())
    assert manifest["metrics"]["models"] == 3
    assert manifest["metrics"]["distance"] > 0
    assert manifest["inputs"].keys() == {"base", "models.0", "models.1"}


@pytest.mark.parametrize("method", ["linear", "slerp", "ties", "dare", "task-arithmetic"])
def test_a_model_merged_with_itself_is_itself(models, tmp_path, method):
    _, one, _ = models
    out = tmp_path / "out"
    assert cli.main(["merge", str(one), str(one), "--output", str(out), "--method", method]) == 0
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, weights(one)[name], rtol=1e-6, atol=1e-8)


def test_files_are_written_one_by_one(models, tmp_path, monkeypatch):
    """In files of 50 kB, and with experts that are stored one by one."""
    folders = [
        checkpoint(tmp_path / str(n), n, tie_word_embeddings=False, **EXPERTS) for n in range(2)
    ]
    monkeypatch.setattr(merge, "_SHARD_BYTES", 50_000)
    out = tmp_path / "out"
    command = ["merge", *map(str, folders), "--output", str(out), "--method", "linear"]
    assert cli.main([*command, "--weights=1", "--weights=3"]) == 1  # tyro takes them as one list
    assert cli.main([*command, "--weights", "1", "3"]) == 0
    files = sorted(out.glob("model-*.safetensors"))
    assert len(files) > 2
    assert max(sum(t.nbytes for t in load_file(f).values()) for f in files) <= 50_000
    both = [weights(folder) for folder in folders]
    for name, weight in weights(out).items():
        torch.testing.assert_close(weight, both[0][name] / 4 + both[1][name] * 3 / 4)


def test_the_result_has_the_dtype_of_the_base_or_the_one_asked_for(models, tmp_path):
    base, one, _ = models
    half = tmp_path / "half"
    save_checkpoint(load_model(base, dtype="bfloat16"), load_tokenizer(base), half)
    for flags, dtype in (([], torch.bfloat16), (["--dtype", "float32"], torch.float32)):
        out = tmp_path / str(dtype)
        command = ["merge", str(half), str(one), "--method", "slerp", "--output", str(out)]
        assert cli.main([*command, *flags]) == 0
        assert {t.dtype for t in load_file(out / "model.safetensors").values()} == {dtype}
        config = json.loads((out / "config.json").read_text())
        assert config["torch_dtype"] == str(dtype).removeprefix("torch.")


def random(seed, size=1_000):
    return torch.from_numpy(np.random.default_rng(seed).normal(size=(size // 10, 10))).float()


def test_slerp_is_on_the_arc():
    one, other = random(1), random(2)
    one, other = one / one.norm(), other / other.norm()
    for t in (0.0, 0.3, 1.0):
        found = slerp(one, other, t)
        assert float(found.norm()) == pytest.approx(1, abs=1e-5)
        angle = float(torch.acos((one * found).sum()))
        assert angle == pytest.approx(t * float(torch.acos((one * other).sum())), abs=2e-3)
    torch.testing.assert_close(slerp(one, 3 * one, 0.5), 2 * one)  # no arc: a line
    assert not slerp(torch.zeros(3), torch.zeros(3), 0.5).any()


def test_ties_keeps_the_largest_entries_and_the_sign_with_more_weight():
    base = torch.zeros(1, 5)
    one = torch.tensor([[3.0, -2.0, 0.1, 1.0, 0.2]])
    two = torch.tensor([[-1.0, -4.0, 0.3, 0.2, 2.0]])
    config = MergeConfig(method="ties", models=["a", "b"], density=0.6, scale=2.0)
    # Kept are 3, -2, 1 and -1, -4, 2. The first sign is positive; the second entry is a mean.
    found = merge_tensor("x", [base, one, two], config, 0)
    assert found.tolist() == [[6.0, -6.0, 0.0, 2.0, 4.0]]


def test_dare_keeps_the_mean_and_repeats_with_its_seed():
    base, one = torch.zeros(1_000, 100), torch.ones(1_000, 100)
    config = MergeConfig(method="dare", models=["a"], density=0.1)
    found = merge_tensor("x", [base, one], config, 7)
    assert found.unique().tolist() == [0.0, 10.0]
    assert float(found.mean()) == pytest.approx(1, abs=0.03)
    assert torch.equal(found, merge_tensor("x", [base, one], config, 7))
    assert not torch.equal(found, merge_tensor("x", [base, one], config, 8))
    assert not torch.equal(found, merge_tensor("y", [base, one], config, 7))


def refused(capsys, *arguments):
    assert cli.main(["merge", *map(str, arguments)]) == 1
    return capsys.readouterr().err


def test_what_does_not_fit_is_named(models, tmp_path, capsys):
    base, one, two = models
    out = ("--output", tmp_path / "out")
    wide = checkpoint(tmp_path / "wide", 3, (384, 32, 64, 2, 4, 2))
    text = refused(capsys, base, one, wide, *out)
    assert "'model.layers.0.mlp.gate_proj.weight' is [64, 32] in it, and [48, 32]" in text
    deep = checkpoint(tmp_path / "deep", 3, (384, 32, 48, 3, 4, 2))
    assert "'model.layers.2.input_layernorm.weight' is" in refused(capsys, base, deep, *out)
    other = checkpoint(tmp_path / "other", 3, words="six seven eight nine ten")
    assert "The vocabulary of" in refused(capsys, base, other, *out)
    assert "No model to merge with" in refused(capsys, base, *out)
    assert "slerp goes from the base to one" in refused(
        capsys, base, one, two, *out, "--method", "slerp"
    )
    assert "1 weights are given, and 2" in refused(capsys, base, one, two, *out, "--weights", "1")
    assert "no checkpoint here" in refused(capsys, base, tmp_path, *out)
    broken = load_model(one)
    with torch.no_grad():
        broken.model.layers[1].mlp.up_proj.weight[0, 0] = torch.nan
    save_checkpoint(broken, load_tokenizer(one), tmp_path / "nan")
    text = refused(capsys, base, tmp_path / "nan", *out, "--method", "linear")
    assert "'model.layers.1.mlp.up_proj.weight' is not finite" in text
    assert not (tmp_path / "out").exists()
