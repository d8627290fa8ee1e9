"""Checkpoints: files that are damaged, contradict each other, or hold something else."""

import json
import shutil

import pytest
import torch
from checkpoint_folders import (
    SIZES,
    NoTokenizer,
    change,
    make_folder,
    reference_folder,
)
from safetensors.torch import save_file
from transformers import (
    Qwen2ForCausalLM,
)

from openqwen.model import (
    ModelConfig,
    Packed,
    Qwen2,
    initialize,
    load_model,
    save_checkpoint,
)
from openqwen.model.weights import save_weights
from openqwen.support.errors import OpenQwenError


@pytest.fixture
def folder(tmp_path):
    return make_folder(tmp_path)


def shrink(tensors):
    for layer in range(2):
        del tensors[f"model.layers.{layer}.self_attn.q_proj.weight"]
        del tensors[f"model.layers.{layer}.self_attn.k_proj.weight"]
    tensors["model.extra"] = torch.zeros(2, 3)
    tensors["model.norm.weight"] = torch.zeros(7)


@pytest.mark.parametrize(
    ("edit", "told"),
    [
        (
            lambda t: t.pop("model.norm.weight"),
            r"1 missing tensors: 'model\.norm\.weight' \[32\]\.",
        ),
        (
            lambda t: t.update({"model.extra": torch.zeros(2)}),
            r"1 extra tensors: 'model\.extra' \[2\]\.",
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(7)}),
            r"1 tensors of another shape: 'model\.norm\.weight' \[7\] in place of \[32\]\.",
        ),
        (
            shrink,
            (
                r"4 missing tensors: .*q_proj.weight' \[32, 32\], .*, …; 1 extra tensors: .*; 1 "
                r"tensors of another"
            ),
        ),
        (
            lambda t: t.update({"model.norm.weight": torch.zeros(32).double()}),
            r"'model\.norm\.weight': F64",
        ),
    ],
)
def test_wrong_tensors_are_counted_and_named(folder, edit, told):
    change(folder, edit)
    with pytest.raises(OpenQwenError, match=told):
        load_model(folder)


def logits_of(model):
    tokens = torch.arange(10)
    return model.logits(model(tokens, tokens, Packed.from_lengths([10])))


def test_a_tied_head_may_be_in_the_file(folder, capsys):
    change(folder, lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"].clone()}))
    assert load_model(folder).lm_head is None
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_a_head_that_differs_from_the_embedding_is_used_although_the_config_ties_them(
    tmp_path, device, capsys
):
    reference_folder(tmp_path / "a", True, torch.float32)
    change(
        tmp_path / "a", lambda t: t.update({"lm_head.weight": t["model.embed_tokens.weight"] * -2})
    )
    model = load_model(tmp_path / "a", device=device)
    assert "lm_head.weight differs" in capsys.readouterr().err
    assert not model.config.tie_word_embeddings
    if device == "meta":
        return
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path / "a")
    torch.testing.assert_close(logits_of(model), theirs(torch.arange(10)[None]).logits[0])
    save_checkpoint(model, NoTokenizer(), tmp_path / "b")
    again = Qwen2ForCausalLM.from_pretrained(tmp_path / "b")
    assert not again.config.tie_word_embeddings
    torch.testing.assert_close(logits_of(load_model(tmp_path / "b")), logits_of(model))


@pytest.mark.parametrize("gone", [False, True])
def test_one_file_counts_before_the_shards_beside_it(tmp_path, gone, capsys):
    reference_folder(tmp_path, False, torch.float32, max_shard_size="12KB")
    newer = Qwen2(ModelConfig(**SIZES))
    initialize(newer, torch.Generator().manual_seed(5))
    save_file(newer.state_dict(), tmp_path / "model.safetensors", {"format": "pt"})
    if gone:
        sorted(tmp_path.glob("model-*.safetensors"))[0].unlink()
    assert torch.equal(load_model(tmp_path).lm_head.weight, newer.lm_head.weight)
    assert "model.safetensors is read" in capsys.readouterr().err
    theirs = Qwen2ForCausalLM.from_pretrained(tmp_path)
    assert torch.equal(theirs.lm_head.weight, newer.lm_head.weight)


def test_tensors_that_change_nothing_are_ignored_with_a_note(folder, capsys):
    before = logits_of(load_model(folder))
    more = {
        "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8, dtype=torch.float64),
        "v_head.summary.weight": torch.ones(1, 32),
        "v_head.summary.bias": torch.ones(1),
        "score.weight": torch.ones(3, 32),
        "step": torch.ones(1, dtype=torch.int64),
    }
    change(folder, lambda t: t.update(more))
    assert torch.equal(logits_of(load_model(folder)), before)
    assert "5 tensors that the network does not use" in capsys.readouterr().err


@pytest.mark.parametrize(
    "name", ["model.layers.0.self_attn.q_norm.weight", "lm_head.bias", "model.layers.2.mlp.x"]
)
def test_tensors_that_would_change_the_network_are_refused(folder, name):
    change(folder, lambda t: t.update({name: torch.ones(8)}))
    with pytest.raises(OpenQwenError, match=f"1 extra tensors: '{name}'"):
        load_model(folder)


POINTER = (
    b"version https://git-lfs.github.com/spec/v1\noid sha256:" + b"0" * 64 + b"\nsize 988097824\n"
)


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "generation_config.json"])
def test_a_pointer_of_git_lfs_is_told_from_damage(folder, name):
    (folder / name).write_bytes(POINTER)
    with pytest.raises(OpenQwenError, match="git-lfs pointer") as error:
        load_model(folder)
    assert error.value.where == folder / name


def test_weights_that_another_program_packed_are_refused_by_its_name(folder):
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(
        json.dumps(config | {"quantization_config": {"quant_method": "gptq"}})
    )
    with pytest.raises(OpenQwenError, match="'gptq'"):
        load_model(folder)


# Stop tokens


STATED = [  # config.json's, generation_config.json's, and what is stated together
    (7, None, [7]),
    ([7, 9], None, [7, 9]),
    (None, 7, [7]),
    (7, [9, 7], [7, 9]),
    ([], [], []),
    ([7, 64, -1], 1000, [7]),
]


@pytest.mark.parametrize(("own", "generation", "stops"), STATED)
def test_stop_tokens_are_those_of_both_files_and_are_kept(
    tmp_path, folder, own, generation, stops, capsys
):
    config = json.loads((folder / "config.json").read_text()) | {"eos_token_id": own}
    (folder / "config.json").write_text(json.dumps(config))
    if generation is not None:
        (folder / "generation_config.json").write_text(
            json.dumps({"eos_token_id": generation, "top_k": 3})
        )
    model = load_model(folder)
    assert list(model.config.stops) == stops
    assert ("outside the vocabulary" in capsys.readouterr().err) == (generation == 1000)
    save_checkpoint(model, NoTokenizer(), tmp_path / "again")
    again = load_model(tmp_path / "again").config
    assert set(again.stops) == set(stops or [61, 60])
    save_checkpoint(model, NoTokenizer(), tmp_path / "chat", chat=True)
    assert set(load_model(tmp_path / "chat").config.stops) == {61, 60, *stops}


@pytest.mark.parametrize("name", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("eos", ["</s>", 1.5, [1, "x"], True, {"id": 1}])
def test_stop_tokens_that_are_no_ids_are_named(folder, name, eos):
    values = json.loads((folder / name).read_text()) if (folder / name).exists() else {}
    (folder / name).write_text(json.dumps(values | {"eos_token_id": eos}))
    with pytest.raises(OpenQwenError, match="eos_token_id is"):
        load_model(folder)


def test_what_cannot_be_read_is_named(folder):
    weights = folder / "model.safetensors"
    whole = weights.read_bytes()
    for size in (0, 7, 30, len(whole) - 100):
        weights.write_bytes(whole[:size])
        with pytest.raises(OpenQwenError, match="cannot be read"):
            load_model(folder)
    weights.unlink()
    with pytest.raises(OpenQwenError, match="no weights here"):
        load_model(folder)
    (folder / "pytorch_model.bin").write_bytes(b"\x80\x04.")
    with pytest.raises(OpenQwenError, match="never loaded"):
        load_model(folder)
    with pytest.raises(OpenQwenError, match=r"config\.json is missing"):
        load_model(folder / "nowhere")


def test_a_missing_shard_is_named(folder):
    save_weights(load_model(folder), folder, shard_bytes=10_000)
    gone = sorted(folder.glob("model-*.safetensors"))[1]
    gone.unlink()
    with pytest.raises(
        OpenQwenError, match=f"1 of .* files that the index names are missing, first '{gone.name}'"
    ):
        load_model(folder)
    (folder / "model.safetensors.index.json").write_text(
        '{"weight_map": {"x": "../../secret.safetensors"}}'
    )
    with pytest.raises(OpenQwenError, match=r"first '\.\./\.\./secret"):
        load_model(folder)
    for broken in ("[]", "{}", '{"weight_map": {"x": 1}}'):
        (folder / "model.safetensors.index.json").write_text(broken)
        with pytest.raises(OpenQwenError, match="no 'weight_map'"):
            load_model(folder)


def test_a_hub_id_is_a_source(folder, tmp_path, monkeypatch):
    repository = tmp_path / "cache" / "models--Qwen--Tiny"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text("0" * 40)
    shutil.copytree(
        folder, repository / "snapshots" / ("0" * 40), ignore=shutil.ignore_patterns("cache")
    )
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    assert load_model("Qwen/Tiny").config == load_model(folder).config
    with pytest.raises(OpenQwenError, match="no path 'Qwen/Other'"):
        load_model("Qwen/Other")


def test_an_absurd_number_of_layers_is_refused(folder):
    config = json.loads((folder / "config.json").read_text()) | {"num_hidden_layers": 10**9}
    (folder / "config.json").write_text(json.dumps(config))
    with pytest.raises(OpenQwenError, match="1000000000 layers"):
        load_model(folder)
