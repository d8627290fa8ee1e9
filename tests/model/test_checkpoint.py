"""Checkpoints: the same bytes out as in, little memory, consistent stop tokens; what is wrong is
named.
"""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checkpoint_folders import (
    SIZES,
    NoTokenizer,
    change,
    file_names,
    make_folder,
    reference_folder,
    weight_files,
)
from safetensors.torch import save_file
from torch import nn
from transformers import (
    AutoModelForSequenceClassification,
    Qwen2ForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
)

from openqwen.model import (
    ModelConfig,
    Packed,
    Qwen2,
    Scorer,
    initialize,
    load_model,
    load_scorer,
    save_checkpoint,
)
from openqwen.model.stored import Reader, stored_in_folder
from openqwen.model.weights import fill, published_tensors, save_weights
from openqwen.support.errors import OpenQwenError


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


@pytest.mark.parametrize("shard_bytes", [10**9, 12_000, 1])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("tied", [True, False])
def test_a_folder_of_transformers_is_saved_as_it_was(tmp_path, tied, dtype, shard_bytes):
    reference_folder(tmp_path / "a", tied, dtype, max_shard_size=shard_bytes)
    save_checkpoint(
        load_model(tmp_path / "a", dtype=None), NoTokenizer(), tmp_path / "b", shard_bytes
    )
    assert len(weight_files(tmp_path / "a")) > 3 or shard_bytes == 10**9
    assert weight_files(tmp_path / "b") == weight_files(tmp_path / "a")
    before, after = (
        {p.name: json.loads(p.read_text()) for p in (tmp_path / f).glob("*config.json")}
        for f in "ab"
    )
    assert after["generation_config.json"] == before["generation_config.json"]
    assert after["config.json"]["dtype"] == str(dtype).removeprefix("torch.")
    assert {k: v for k, v in after["config.json"].items() if k in before["config.json"]} == before[
        "config.json"
    ]
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "b", dtype=dtype)
    assert again.generation_config.eos_token_id == [61, 60]


@pytest.mark.parametrize("tied", [True, False])
def test_what_we_save_transformers_computes_alike(tmp_path, tied):
    reference = reference_folder(tmp_path, tied, torch.float32)
    ours = load_model(tmp_path)
    tokens = torch.arange(10)
    logits = ours.logits(ours(tokens, tokens, Packed.from_lengths([10])))
    torch.testing.assert_close(logits, reference(tokens[None]).logits[0])


def test_saving_what_was_loaded_gives_the_same_bytes_even_in_its_own_place(folder):
    before = (folder / "model.safetensors").read_bytes()
    save_weights(load_model(folder), folder)
    assert (folder / "model.safetensors").read_bytes() == before
    save_weights(load_model(folder), folder, shard_bytes=10_000)
    assert len(list(folder.glob("model-*.safetensors"))) > 1
    assert not (folder / "model.safetensors").exists()
    save_weights(load_model(folder), folder)
    assert set(weight_files(folder)) == {"model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == before


def test_half_precision_is_used_from_the_file_which_is_never_written(folder, monkeypatch):
    save_weights(load_model(folder, "bfloat16"), folder)
    before = (folder / "model.safetensors").read_bytes()
    monkeypatch.setattr(Reader, "copy", lambda *_: pytest.fail("a tensor was copied"))
    model = load_model(folder, dtype=None)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(1)
    assert (folder / "model.safetensors").read_bytes() == before
    assert all(p.requires_grad and p.is_leaf for p in model.parameters())


def test_answers_depend_on_the_weights_alone(folder):
    """Not on where in memory they are: MKL's float32 product with one vector rounds by the
    alignment of the matrix.
    """
    mapped = load_model(folder)
    built = Qwen2(mapped.config)
    built.load_state_dict(mapped.state_dict())
    one = torch.tensor([7])
    logits = [
        m.logits(m(one, torch.tensor([0]), Packed.from_lengths([1]))) for m in (mapped, built)
    ]
    assert torch.equal(*logits)


def test_loading_draws_no_random_numbers(folder, monkeypatch):
    monkeypatch.setattr(
        torch.Tensor, "normal_", lambda *_: pytest.fail("a random number was drawn")
    )
    monkeypatch.setattr(
        torch.Tensor, "uniform_", lambda *_: pytest.fail("a random number was drawn")
    )
    before = torch.get_rng_state()
    load_model(folder)
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_a_cast_is_the_nearest_number(folder, dtype):
    exact = load_model(folder).state_dict()
    for name, tensor in load_model(folder, dtype=dtype).state_dict().items():
        assert torch.equal(tensor, exact[name].to(getattr(torch, dtype)))
    with pytest.raises(OpenQwenError, match="'float8'"):
        load_model(folder, dtype="float8")


def test_files_of_several_dtypes_load_as_the_one_that_holds_them_all(folder):
    change(folder, lambda t: t.update({"model.norm.weight": t["model.norm.weight"].bfloat16()}))
    assert {p.dtype for p in load_model(folder, dtype=None).parameters()} == {torch.float32}
    change(folder, lambda t: t.update({n: x.bfloat16() for n, x in t.items()}))
    assert {p.dtype for p in load_model(folder, dtype=None).parameters()} == {torch.bfloat16}


def test_a_scorer_comes_back(tmp_path):
    scorer = Scorer(ModelConfig(**SIZES))
    initialize(scorer, torch.Generator().manual_seed(0))
    save_checkpoint(scorer, NoTokenizer(), tmp_path)
    for name, tensor in load_scorer(tmp_path).state_dict().items():
        assert torch.equal(tensor, scorer.state_dict()[name])
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["architectures"], config["pad_token_id"]) == (
        ["Qwen2ForSequenceClassification"],
        60,
    )


@pytest.mark.parametrize(
    "criteria", [None, {"truthfulness": 1.0, "conciseness": 0.25, "debiasing": 1.0}]
)
def test_a_reward_model_scores_alike_in_transformers(tmp_path, criteria):
    scorer = Scorer(ModelConfig(**SIZES), criteria)
    initialize(scorer, torch.Generator().manual_seed(0))
    save_checkpoint(scorer, NoTokenizer(), tmp_path)
    theirs = AutoModelForSequenceClassification.from_pretrained(tmp_path, dtype=torch.float32)
    names = list(criteria or {"reward": 1.0})
    assert [theirs.config.id2label[number] for number in range(len(names))] == names
    tokens = torch.randint(1, 50, (9,), generator=torch.Generator().manual_seed(4))
    packed = Packed.from_lengths([9])
    mine = load_scorer(tmp_path)
    assert mine.criteria == (criteria or {"reward": 1.0})
    with torch.no_grad():
        scores = mine(tokens, packed.positions, packed, torch.tensor([8]))
        torch.testing.assert_close(scores, theirs(tokens[None]).logits, rtol=1e-4, atol=1e-5)
    theirs.save_pretrained(tmp_path / "again")  # the weights of criteria survive transformers
    assert load_scorer(tmp_path / "again").criteria == mine.criteria


def test_a_classifier_without_names_has_labels_of_weight_one(tmp_path):
    scorer = Scorer(ModelConfig(**SIZES), {"a": 2.0, "b": 3.0})
    initialize(scorer, torch.Generator().manual_seed(0))
    save_checkpoint(scorer, NoTokenizer(), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    for key in ("id2label", "label2id", "reward_weights"):
        del config[key]
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert load_scorer(tmp_path).criteria == {"LABEL_0": 1.0, "LABEL_1": 1.0}
    (tmp_path / "config.json").write_text(json.dumps(config | {"reward_weights": {"LABEL_0": []}}))
    with pytest.raises(OpenQwenError, match="give a number for each label"):
        load_scorer(tmp_path)


def saved(folder, model, **options):
    save_checkpoint(model, NoTokenizer(), folder, **options)
    return [
        json.loads((folder / name).read_text())
        for name in ("config.json", "generation_config.json")
    ]


def test_stop_tokens_stay_what_they_were_until_the_model_learns_to_chat(tmp_path, folder):
    both = {"bos_token_id": 60, "eos_token_id": [61, 60], "pad_token_id": 60}
    config, generation = saved(tmp_path / "fresh", load_model(folder))
    assert (config["eos_token_id"], generation) == (61, both)
    config, generation = saved(tmp_path / "again", load_model(tmp_path / "fresh"))
    assert (config["eos_token_id"], generation) == (61, both)

    base = json.loads((folder / "config.json").read_text()) | {
        "bos_token_id": 60,
        "eos_token_id": 60,
    }
    (folder / "config.json").write_text(json.dumps(base))
    config, generation = saved(tmp_path / "base", load_model(folder))
    assert (config["eos_token_id"], generation) == (60, both | {"eos_token_id": 60})
    (folder / "generation_config.json").write_text('{"eos_token_id": 60, "max_new_tokens": 2048}')
    config, generation = saved(tmp_path / "kept", load_model(folder))
    assert (config["eos_token_id"], generation) == (
        60,
        {"eos_token_id": 60, "max_new_tokens": 2048},
    )
    (folder / "config.json").write_text(json.dumps(base | {"eos_token_id": [60, 61]}))
    config, _ = saved(tmp_path / "two", load_model(folder))
    assert config["eos_token_id"] == [60, 61]
    config, generation = saved(tmp_path / "chat", load_model(folder), chat=True)
    assert (config["eos_token_id"], generation) == (61, both | {"max_new_tokens": 2048})


PEAK = """
import sys
from pathlib import Path
from openqwen.model import load_model
def peak():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith("VmHWM"))
load_model(sys.argv[1])  # libraries are loaded, buffers made
before = peak()
model = load_model(sys.argv[2], sys.argv[3])
print((peak() - before) / sum(parameter.nbytes for parameter in model.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(
    not Path("/proc/self/status").exists(), reason="this system does not tell the peak memory"
)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_loading_takes_hardly_more_memory_than_the_weights(folder, tmp_path, dtype):
    large = tmp_path / "large"
    model = Qwen2(ModelConfig(60_000, 1024, 4096, 4, 16, 4, tie_word_embeddings=False)).bfloat16()
    save_checkpoint(model, NoTokenizer(), large)
    command = [sys.executable, "-c", PEAK, str(folder), str(large), dtype]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert float(done.stdout) < 1.2


# Experts


class Sparse(nn.Module):
    """The parameters of a sparse layer as the network keeps them, E = 3, i = 4, h = 8."""

    def __init__(self):
        super().__init__()
        self.gate = nn.Linear(8, 3, bias=False)
        self.experts = nn.Module()
        self.experts.gate_up_proj = nn.Parameter(torch.randn(3, 8, 8))
        self.experts.down_proj = nn.Parameter(torch.randn(3, 8, 4))


class Stand(nn.Module):
    def __init__(self):
        super().__init__()
        self.mlp = Sparse()


def test_experts_are_published_one_by_one_as_views(tmp_path):
    model = Stand()
    names = [name for name, _ in published_tensors(model)]
    experts = [
        f"mlp.experts.{e}.{half}_proj.weight" for e in range(3) for half in ("gate", "up", "down")
    ]
    assert names == ["mlp.gate.weight", *experts]
    views = dict(published_tensors(model))
    fused = model.mlp.experts.gate_up_proj
    assert torch.equal(
        torch.cat([views["mlp.experts.1.gate_proj.weight"], views["mlp.experts.1.up_proj.weight"]]),
        fused[1],
    )
    assert views["mlp.experts.2.up_proj.weight"].data_ptr() == fused[2, 4:].data_ptr()
    save_weights(model, tmp_path, shard_bytes=400)
    again = fill(Stand, stored_in_folder(tmp_path), tmp_path)
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name])


def test_experts_that_a_file_keeps_fused_are_read_too(tmp_path):
    model = Stand()
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    again = fill(Stand, stored_in_folder(tmp_path), tmp_path, "bfloat16")
    for name, tensor in again.state_dict().items():
        assert torch.equal(tensor, model.state_dict()[name].bfloat16())


@pytest.mark.parametrize("original", [True, False])
def test_the_names_of_a_mixture_are_those_of_transformers(tmp_path, original):
    torch.manual_seed(0)
    sparse = {
        "num_experts": 3,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 16,
        "shared_expert_intermediate_size": 24,
    }
    reference = Qwen2MoeForCausalLM(Qwen2MoeConfig(**SIZES, **sparse))
    reference.save_pretrained(tmp_path, save_original_format=original)
    stored = stored_in_folder(tmp_path)
    state = reference.state_dict()
    assert ("model.layers.0.mlp.experts.gate_up_proj" in file_names(tmp_path)) is not original
    assert set(stored) == {name for name, _ in published_tensors(reference)}
    with Reader() as reader:
        for name, view in published_tensors(reference):
            assert torch.equal(reader.mapped(stored[name]), view)
    assert "model.layers.1.mlp.experts.gate_up_proj" in state
