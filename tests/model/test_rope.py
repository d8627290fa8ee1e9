"""Rotary positions and YARN against transformers, and against the table computed from the released
code.
"""

import json
import math
import random

import pytest
import torch
import transformers
from torch.testing import assert_close
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from openqwen.model import ModelConfig, Packed, Qwen2, Yarn, initialize, load_model
from openqwen.model.rope import _ramp_ends, cos_sin, inverse_frequencies, rotate

HEADS = [  # d, base, original length, and where the ramp starts and ends (qwen2-recipe facts, 4.4)
    (64, 1e6, 32_768, 11, 20),
    (128, 1e6, 32_768, 23, 40),
    (128, 1e6, 131_072, 30, 47),
    (128, 1e7, 262_144, 28, 43),
]


def their_frequencies(head_dim, theta, yarn, max_positions):
    rope = {"rope_type": "yarn", "rope_theta": theta, **yarn.to_json()}
    config = transformers.Qwen2Config(
        hidden_size=2 * head_dim,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=max_positions,
        rope_parameters=rope,
    )
    return ROPE_INIT_FUNCTIONS["yarn"](config, torch.device("cpu"))


@pytest.mark.parametrize("theta", [10_000.0, 1e6, 5e6, 1e7])
def test_frequencies_of_any_base(theta):
    found = inverse_frequencies(64, theta)
    assert found.dtype == torch.float32
    assert found.tolist() == pytest.approx([theta ** (-2 * k / 64) for k in range(32)], rel=1e-6)


@pytest.mark.parametrize(("head_dim", "theta", "original", "low", "high"), HEADS)
@pytest.mark.parametrize("factor", [2.0, 4.0, 10.0])
def test_yarn_equals_transformers_and_the_table(head_dim, theta, original, low, high, factor):
    yarn = Yarn(factor, original)
    assert _ramp_ends(head_dim, theta, yarn) == (low, high)
    # a base configuration states more positions than were trained: the original length must still
    # decide
    expected, attention_factor = their_frequencies(head_dim, theta, yarn, max_positions=131_072)
    assert_close(inverse_frequencies(head_dim, theta, yarn), expected, rtol=1e-6, atol=0)
    assert yarn.temperature == pytest.approx(attention_factor, abs=1e-12)
    cos, sin = cos_sin(torch.arange(50), expected, yarn.temperature)
    assert_close(cos.square() + sin.square(), torch.full_like(cos, attention_factor**2))


def test_yarn_with_its_own_ramp_and_attention_factor_equals_transformers():
    yarn = Yarn(8.0, 4_096, beta_fast=20.0, beta_slow=2.0, attention_factor=1.3)
    expected, attention_factor = their_frequencies(64, 10_000.0, yarn, max_positions=8_192)
    assert_close(inverse_frequencies(64, 10_000.0, yarn), expected, rtol=1e-6, atol=0)
    assert yarn.temperature == attention_factor == 1.3


def test_random_parameters_of_yarn_equal_transformers():
    draw = random.Random(0)
    for _ in range(200):
        rope = {
            "rope_type": "yarn",
            "factor": draw.choice([1, 1.5, 4.0, 40]),
            "rope_theta": 10 ** draw.uniform(3, 7),
        }
        rope["original_max_position_embeddings"] = draw.choice([64, 4_096, 32_768])
        for name, values in (
            ("beta_fast", [None, 0, 32, 20.5]),
            ("beta_slow", [None, 0, 1, 2.5]),
            ("mscale", [None, 0, 0.7, 1]),
            ("mscale_all_dim", [None, 0, 0.5, 1.0]),
            ("attention_factor", [None, None, 0.0, 1.3]),
            ("truncate", [True, False, None]),
        ):
            if draw.random() < 0.6:
                rope[name] = draw.choice(values)
        head_dim = draw.choice([8, 64, 128])
        sizes = {"hidden_size": 2 * head_dim, "num_attention_heads": 2, "num_key_value_heads": 1}
        theirs = transformers.Qwen2Config(
            **sizes, max_position_embeddings=32_768, rope_parameters=dict(rope)
        )
        expected, attention_factor = ROPE_INIT_FUNCTIONS["yarn"](theirs, torch.device("cpu"))
        yarn = Yarn.from_json(rope, 32_768)
        assert_close(
            inverse_frequencies(head_dim, rope["rope_theta"], yarn),
            expected,
            rtol=2e-6,
            atol=0,
            msg=f"{rope}",
        )
        assert yarn.temperature == pytest.approx(attention_factor, abs=1e-12), rope
        assert Yarn.from_json({"type": "yarn", **yarn.to_json()}, 32_768) == yarn


def test_temperature_as_published():
    assert Yarn(4.0, 32_768).temperature == pytest.approx(1.138629, abs=1e-6)
    assert Yarn(2.0, 32_768).temperature ** 2 == pytest.approx(1.143434, abs=1e-6)


def test_a_ramp_of_no_width_is_a_step():
    low, high = _ramp_ends(8, 10_000.0, Yarn(2.0, 8, beta_fast=1.0, beta_slow=1.0))
    assert 0 < high - low <= 1
    assert (
        inverse_frequencies(8, 10_000.0, Yarn(2.0, 8, beta_fast=1.0, beta_slow=1.0))
        .isfinite()
        .all()
    )


def test_rotation_turns_pairs_of_halves():
    x = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    frequencies = inverse_frequencies(8, 100.0)
    angles = torch.arange(5)[:, None, None] * frequencies.double()
    turned = torch.complex(*x.chunk(2, -1)) * torch.exp(1j * angles)
    found = rotate(x, *cos_sin(torch.arange(5), frequencies))
    assert_close(found, torch.cat((turned.real, turned.imag), -1), rtol=1e-6, atol=1e-6)


MSCALED = Yarn(4.0, 16, mscale=0.7, mscale_all_dim=1.0, truncate=False)


def small(**fields):
    config = ModelConfig(
        vocab_size=128,
        hidden_size=64,
        intermediate_size=136,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        rope_theta=10_000.0,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        initializer_range=0.2,
        **fields,
    )
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(3))
    return model


@pytest.mark.parametrize(
    "yarn", [Yarn(4.0, 16), Yarn(2.5, 64, attention_factor=1.2), Yarn(16.0, 8, 4.0, 0.5), MSCALED]
)
def test_network_under_yarn_equals_transformers(yarn):
    model = small(yarn=yarn)
    config = transformers.Qwen2Config(**model.config.to_json())
    config._attn_implementation = "eager"
    theirs = transformers.Qwen2ForCausalLM(config)
    theirs.load_state_dict(model.state_dict(), strict=False)
    theirs.tie_weights()
    tokens = torch.randint(0, 128, (70,), generator=torch.Generator().manual_seed(1))
    packed = Packed.from_lengths([70])
    logits = model.logits(model(tokens, packed.positions, packed))
    expected = theirs.eval()(tokens[None]).logits[0]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5

    torch.nn.functional.cross_entropy(logits[:-1], tokens[1:]).backward()
    torch.nn.functional.cross_entropy(expected[:-1], tokens[1:]).backward()
    grads = dict(theirs.named_parameters())
    for name, p in model.named_parameters():
        assert (p.grad - grads[name].grad).abs().max() / grads[name].grad.abs().max() < 1e-4, name


def test_the_card_s_scaling_in_a_config_of_transformers_5(tmp_path):
    """Qwen's card: `rope_scaling` beside `rope_parameters`, whose theta stays."""
    torch.manual_seed(0)
    sizes = small().config.to_json() | {
        "rope_parameters": {"rope_type": "default", "rope_theta": 5e5}
    }
    theirs = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**sizes))
    theirs.save_pretrained(tmp_path)
    values = json.loads((tmp_path / "config.json").read_text())
    card = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 256}
    (tmp_path / "config.json").write_text(json.dumps(values | {"rope_scaling": card}))
    ours = load_model(tmp_path)
    right = values | {"rope_parameters": {"rope_type": "yarn", "rope_theta": 5e5, **card}}
    reference = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**right))
    reference.load_state_dict(theirs.state_dict())
    tokens, packed = torch.randint(0, 128, (300,)), Packed.from_lengths([300])
    logits = ours.logits(ours(tokens, packed.positions, packed))
    expected = reference.eval()(tokens[None]).logits[0]
    assert (logits - expected).abs().max() / expected.abs().max() < 1e-5
    assert (
        logits - theirs.eval()(tokens[None]).logits[0]
    ).abs().max() / expected.abs().max() > 1e-2


def test_yarn_at_factor_one_changes_no_bit():
    plain, yarn = small(), small(yarn=Yarn(1.0, 16))
    tokens = torch.randint(0, 128, (70,), generator=torch.Generator().manual_seed(1))
    packed = Packed.from_lengths([40, 30])
    outs = [m(tokens, packed.positions, packed) for m in (plain, yarn)]
    assert torch.equal(*outs)
    for out in outs:
        out[:, :7].sum().backward()
    for a, b in zip(plain.parameters(), yarn.parameters()):
        assert torch.equal(a.grad, b.grad)
    assert math.isclose(small(yarn=Yarn(1.0, 16)).config.yarn.temperature, 1.0)
