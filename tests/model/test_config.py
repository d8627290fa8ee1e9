"""Published sizes and the config.json round trip."""

import json

import pytest
import transformers

from openqwen.model import ModelConfig, published
from openqwen.model.config import _SIZES
from openqwen.model.long_context import DualChunk, Yarn
from openqwen.support.errors import OpenQwenError

TOTALS = {  # facts: qwen2-recipe 1.4
    "qwen2-0.5b": 494_032_768,
    "qwen2-1.5b": 1_543_714_304,
    "qwen2-7b": 7_615_616_512,
    "qwen2-72b": 72_706_203_648,
    "qwen2-57b-a14b": 57_408_658_944,
    "qwen2.5-0.5b": 494_032_768,
    "qwen2.5-1.5b": 1_543_714_304,
    "qwen2.5-3b": 3_085_938_688,
    "qwen2.5-7b": 7_615_616_512,
    "qwen2.5-14b": 14_770_033_664,
    "qwen2.5-32b": 32_763_876_352,
    "qwen2.5-72b": 72_706_203_648,
    "Qwen/Qwen2.5-7B-Instruct-1M": 7_615_616_512,
    "qwen2.5-14b-1m": 14_770_033_664,
}
YARN = {"factor": 4.0, "original_max_position_embeddings": 32_768}


@pytest.mark.parametrize(("name", "total"), TOTALS.items())
def test_published_parameter_counts(name, total):
    assert ModelConfig.named(name).parameters() == total


def test_active_parameters_of_the_mixture_of_experts():
    assert ModelConfig.named("qwen2-57b-a14b").parameters(active=True) == 14_249_270_784
    assert ModelConfig.named("qwen2-7b").parameters(active=True) == 7_615_616_512


def test_base_and_instruct_differ_where_published():
    assert ModelConfig.named("qwen2.5-14b").rms_norm_eps == 1e-5
    assert ModelConfig.named("qwen2.5-14b-instruct").rms_norm_eps == 1e-6
    assert ModelConfig.named("qwen2-7b").max_position_embeddings == 131_072
    assert ModelConfig.named("qwen2-7b-instruct").max_position_embeddings == 32_768
    assert ModelConfig.named("qwen2-57b-a14b").vocab_size == 151_936  # its dense parent has 152,064
    million = ModelConfig.named("qwen2.5-7b-1m")
    assert million.dual_chunk == DualChunk(262_144, 8_192, 262_144)
    assert million.dual_chunk.chunk_len == 253_952
    assert million.rope_theta == 1e7


@pytest.mark.parametrize("name", published.NAMES)
def test_json_round_trip_and_what_transformers_reads(name):
    config = ModelConfig.named(name)
    values = config.to_json()
    assert ModelConfig.from_json(json.loads(json.dumps(values))) == config
    kind = transformers.Qwen2MoeConfig if config.num_experts else transformers.Qwen2Config
    theirs = kind(**values)
    assert theirs.hidden_size == config.hidden_size
    assert theirs.rope_parameters["rope_theta"] == config.rope_theta
    assert theirs.rms_norm_eps == config.rms_norm_eps
    if config.num_experts:
        assert (theirs.num_experts, theirs.num_experts_per_tok) == (
            config.num_experts,
            config.num_experts_per_tok,
        )
        assert theirs.mlp_only_layers == []


def test_yarn_is_read_and_written_in_the_old_and_the_new_spelling():
    plain = ModelConfig.named("qwen2.5-7b-instruct").to_json()
    old = ModelConfig.from_json(plain | {"rope_scaling": {"type": "yarn", **YARN}})
    middle = ModelConfig.from_json(plain | {"rope_scaling": {"rope_type": "yarn", **YARN}})
    new = dict(plain)
    theta = new.pop("rope_theta")
    new = ModelConfig.from_json(
        new | {"rope_parameters": {"rope_type": "yarn", "rope_theta": theta, **YARN}}
    )
    assert old == middle == new
    assert old.yarn == Yarn(4.0, 32_768)
    assert old.yarn.temperature == pytest.approx(1.138629, abs=1e-6)
    assert old.to_json()["rope_scaling"] == {"type": "yarn", **YARN}
    assert middle.to_json()["rope_scaling"] == {"rope_type": "yarn", **YARN}
    assert new.to_json()["rope_parameters"] == {"rope_type": "yarn", "rope_theta": theta, **YARN}
    assert not {"rope_theta", "rope_scaling"} & new.to_json().keys()
    for config in (old, middle, new):
        assert ModelConfig.from_json(config.to_json()) == config
        theirs = transformers.Qwen2Config(**config.to_json()).rope_parameters
        assert theirs["rope_type"] == "yarn"
        assert theirs["factor"] == 4.0


CARD = {"type": "yarn", **YARN}


@pytest.mark.parametrize(
    "card", [CARD, {"rope_type": "yarn", **YARN}, {**CARD, "rope_type": "yarn", "type": "linear"}]
)
def test_the_card_s_yarn_beside_what_transformers_5_wrote(card):
    """The theta stays the file's own; transformers 5 resets it to 10,000."""
    values = ModelConfig.named("qwen2.5-7b-instruct").to_json()
    del values["rope_theta"]
    new = values | {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
    config = ModelConfig.from_json(new | {"rope_scaling": card})
    assert (config.rope_theta, config.yarn) == (1e6, Yarn(4.0, 32_768))
    saved = config.to_json()
    assert ModelConfig.from_json(saved) == config
    theirs = transformers.Qwen2Config(**saved).rope_parameters
    assert theirs == {"rope_type": "yarn", "rope_theta": 1e6, **YARN}
    plain = ModelConfig.from_json(
        new | {"rope_parameters": CARD | {"rope_theta": 5e5}, "rope_scaling": None}
    )
    assert (plain.rope_theta, plain.yarn) == (5e5, Yarn(4.0, 32_768))


def test_what_a_file_leaves_out_is_as_in_transformers():
    values = ModelConfig.named("qwen2.5-7b-instruct").to_json()
    for name in ("rope_theta", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        del values[name]
    ours, theirs = ModelConfig.from_json(values), transformers.Qwen2Config(**values)
    assert ours.rope_theta == theirs.rope_parameters["rope_theta"]
    for name in ("max_position_embeddings", "rms_norm_eps", "tie_word_embeddings"):
        assert getattr(ours, name) == getattr(theirs, name)
    heads = ModelConfig.from_json(values | {"num_key_value_heads": None}).num_key_value_heads
    assert (
        heads
        == transformers.Qwen2Config(**values | {"num_key_value_heads": None}).num_key_value_heads
        == 28
    )


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ({"factor": None}, "YARN has no factor"),
        ({"factor": "4"}, "YARN's factor is '4'"),
        ({"factor": True}, "YARN's factor is True"),
        ({"factor": float("nan")}, "YARN's factor is nan"),
        ({"factor": 0.5}, "cannot stretch"),
        ({"factor": 0}, "by a factor of 0"),
        ({"beta_fast": -1}, "beta_fast is -1"),
        ({"original_max_position_embeddings": 0}, "stretch 0 tokens"),
        ({"mscale": "1"}, "YARN's mscale"),
        ({"partial_rotary_factor": 0.5}, "partial_rotary_factor is 0.5"),
        ({"full_attention": {}}, "not one table for all layers"),
        *[
            ({"type": kind}, f"type '{kind}'")
            for kind in ("linear", "dynamic", "llama3", "longrope", "mrope")
        ],
    ],
)
def test_scaling_that_is_not_supported_is_refused_by_name(change, told):
    values = ModelConfig.named("qwen2.5-7b-instruct").to_json()
    for key in ("rope_scaling", "rope_parameters"):
        with pytest.raises(OpenQwenError, match=rf"{told}(.|\n)*where: FILE"):
            ModelConfig.from_json(values | {key: CARD | change}, where="FILE")


@pytest.mark.parametrize(
    "field", ["max_position_embeddings", "rms_norm_eps", "tie_word_embeddings", "hidden_size"]
)
@pytest.mark.parametrize("value", [None, "4"])
def test_a_value_of_another_type_is_named(field, value):
    with pytest.raises(OpenQwenError, match=field):
        ModelConfig.from_json(ModelConfig.named("qwen2.5-7b").to_json() | {field: value})


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *[(name, size) for name in _SIZES for size in (0, -1)],
        *[("rope_theta", theta) for theta in (0, -1, 1.0, float("nan"))],
        *[("layer_types", kinds) for kinds in (1, "x", [1, 2])],
        *[(name, [1]) for name in ("quantization_config", "dual_chunk_attention_config")],
        *[("dual_chunk_attention_config", {"chunk_size": size}) for size in ("x", 0.5, [1])],
    ],
)
def test_values_that_make_no_network_are_named_with_the_file(field, value):
    values = ModelConfig.named("qwen2.5-7b").to_json() | {field: value}
    with pytest.raises(OpenQwenError, match=rf"(?s)(?=.*{field}).*where: FILE"):
        ModelConfig.from_json(values, where="FILE")


@pytest.mark.parametrize("names", [["dtype"], ["torch_dtype"], ["dtype", "torch_dtype"]])
def test_the_dtype_keeps_its_spelling(names):
    values = ModelConfig.named("qwen2.5-7b").to_json()
    del values["torch_dtype"]
    saved = ModelConfig.from_json(values | dict.fromkeys(names, "bfloat16")).to_json(
        dtype="float16"
    )
    assert {k: v for k, v in saved.items() if k.endswith("dtype")} == dict.fromkeys(
        names, "float16"
    )


def test_yarn_without_its_length_takes_the_trained_context():
    values = ModelConfig.named("qwen2-7b-instruct").to_json() | {
        "rope_scaling": {"type": "yarn", "factor": 2.0}
    }
    assert ModelConfig.from_json(values).yarn == Yarn(2.0, 32_768)


def test_what_is_not_used_is_given_back():
    more = {
        "sliding_window": 131_072,
        "max_window_layers": 28,
        "torch_dtype": "bfloat16",
        "use_mrope": False,
    }
    config = ModelConfig.from_json(ModelConfig.named("qwen2.5-7b").to_json() | more)
    assert more.items() <= config.to_json(dtype="bfloat16").items()
    chunks = {
        "chunk_size": 64,
        "local_size": 8,
        "original_max_position_embeddings": 0,
        "sparse_attention_enabled": True,
    }
    config = ModelConfig.from_json(config.to_json() | {"dual_chunk_attention_config": chunks})
    assert config.to_json()["dual_chunk_attention_config"] == chunks


def test_dual_chunk_defaults_and_length_scaling():
    chunks = DualChunk.from_json({"chunk_size": 32_768})
    assert (chunks.local_size, chunks.original_max_position_embeddings) == (1_024, 0)
    assert chunks.query_scale(1_000_000) == 1.0
    chunks = DualChunk(32_768, 1_024, 32_768)
    assert chunks.query_scale(32_768) == chunks.query_scale(5) == 1.0
    assert chunks.query_scale(4 * 32_768) == pytest.approx(1.296477, abs=1e-6)


def test_sparse_layers():
    config = ModelConfig.from_json(
        ModelConfig.named("qwen1.5-moe-a2.7b").to_json()
        | {"mlp_only_layers": [3], "decoder_sparse_step": 2}
    )
    assert [n for n in range(6) if config.is_sparse(n)] == [1, 5]


def test_errors_name_the_field():
    plain = ModelConfig.named("qwen2-7b").to_json()
    with pytest.raises(OpenQwenError, match=r"qwen2\.5-7b"):
        ModelConfig.named("qwen2.5-7bb")
    with pytest.raises(OpenQwenError, match="hidden_size"):
        ModelConfig.from_json({"vocab_size": 5})
    with pytest.raises(OpenQwenError, match="num_experts"):
        ModelConfig.from_json(plain | {"model_type": "qwen2_moe"})
    with pytest.raises(OpenQwenError, match="llama"):
        ModelConfig.from_json(plain | {"model_type": "llama"})
    with pytest.raises(OpenQwenError, match="sliding"):
        ModelConfig.from_json(plain | {"use_sliding_window": True})
    with pytest.raises(OpenQwenError, match="sliding_attention"):
        ModelConfig.from_json(plain | {"layer_types": ["full_attention", "sliding_attention"]})
    with pytest.raises(OpenQwenError, match="dynamic"):
        ModelConfig.from_json(plain | {"rope_scaling": {"type": "dynamic", "factor": 2.0}})
    with pytest.raises(OpenQwenError, match="local"):
        ModelConfig.from_json(
            plain | {"dual_chunk_attention_config": {"chunk_size": 8, "local_size": 8}}
        )
