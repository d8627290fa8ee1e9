"""What a cache holds: formats, page operations, a key bias that would ruin eight bits, turning keys
anew.
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from torch.testing import assert_close

from openqwen.model import (
    Cache,
    DualChunk,
    LongContext,
    ModelConfig,
    Paged,
    Qwen2,
    Yarn,
    initialize,
    load_model,
)
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.model.quantize import quantize
from openqwen.model.rope import key_rotation, rotate
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import load_tokenizer

REAL = Path(
    os.environ.get(
        "OPENQWEN_REAL_CHECKPOINT",
        Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )
)

CONFIG = ModelConfig(64, 64, 96, 2, 4, 2, rope_theta=1_000.0, initializer_range=0.2)


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("page_size", [4, 16])
def test_what_is_written_is_read(page_size):
    k, v = random(9, 2, 16), random(9, 2, 16, seed=1)
    slots = torch.randperm(3 * page_size, generator=torch.Generator().manual_seed(2))[:9]
    for format, limit in (("float", 0.0), ("int8", 1 / 250)):
        cache = Cache(CONFIG, 3, page_size, format)
        cache.write(1, (slots // page_size, slots % page_size), k, v)
        for found, written in zip(cache.read(1, torch.arange(3)[None]), (k, v), strict=True):
            assert found.shape == (1, 3 * page_size, 2, 16)
            error = (found[0, slots] - written).abs().amax(-1)
            assert (error <= limit * written.abs().amax(-1)).all()
        assert not cache.read(0, torch.arange(3)[None])[0].any()


@pytest.mark.parametrize(
    ("format", "dtype"),
    [("float", torch.float32), ("float", torch.bfloat16), ("int8", torch.float32)],
)
def test_bytes_of_a_page_are_those_of_the_memory(format, dtype):
    cache = Cache(CONFIG, 5, 16, format, dtype)
    tensors = [cache.keys, cache.values, cache.key_scales, cache.value_scales]
    assert sum(x.nbytes for x in tensors if x is not None) == 5 * Cache.bytes_per_page(
        CONFIG, 16, format, dtype
    )


@pytest.mark.parametrize("format", ["float", "int8"])
def test_pages_are_copied_over_all_layers(format):
    cache = Cache(CONFIG, 4, 4, format)
    for layer in range(2):
        k, v = random(8, 2, 16, seed=layer), random(8, 2, 16, seed=9)
        cache.write(layer, (torch.arange(8) // 4, torch.arange(8) % 4), k, v)
    before = [cache.read(layer, torch.tensor([[0, 1]])) for layer in range(2)]
    cache.copy([0, 1], [3, 2])
    for layer in range(2):
        for found, wanted in zip(
            cache.read(layer, torch.tensor([[3, 2]])), before[layer], strict=True
        ):
            assert torch.equal(found, wanted)


def test_an_unknown_format_is_named():
    with pytest.raises(OpenQwenError, match="no format 'int3'"):
        Cache(CONFIG, 1, 16, "int3")


def biased_model(size):
    model = Qwen2(CONFIG)
    initialize(model, torch.Generator().manual_seed(3))
    with torch.no_grad():
        for n, layer in enumerate(model.model.layers):
            bias = layer.self_attn.k_proj.bias.copy_(size * random(32, seed=n))
            bias.view(2, 2, 8)[:, :, :6] = 0  # as in Qwen2, it is huge where the rotation is slow
    return model


@torch.inference_mode()
def hidden(model, cache, tokens, calls):
    table, done, outs = torch.arange(cache.pages)[None], 0, []
    for new in calls:
        paged = Paged(cache, table, [done + new], [new])
        outs.append(model(tokens[done : done + new], torch.arange(done, done + new), paged))
        done += new
    return torch.cat(outs)


@pytest.mark.parametrize(
    "page_size", [8, 16]
)  # the plain path, and the compiled one where there is a compiler
def test_a_huge_key_bias_ruins_rounded_keys_unless_it_is_taken_off(page_size):
    model, tokens = (
        biased_model(200.0),
        torch.randint(0, 64, (90,), generator=torch.Generator().manual_seed(4)),
    )
    calls, pages = [60, 1, 1, 28], 96 // page_size
    exact = hidden(model, Cache.of(model, pages, page_size), tokens, calls)
    ours = hidden(model, Cache.of(model, pages, page_size, "int8"), tokens, calls)
    naive = hidden(model, Cache(CONFIG, pages, page_size, "int8"), tokens, calls)
    error, ruin = ((x - exact).norm() / exact.norm() for x in (ours, naive))
    assert error < 0.02
    assert ruin > 10 * error


def test_the_bias_of_an_adapted_or_quantised_model_is_found():
    model = biased_model(3.0)
    plain = Cache.of(model, 1, 16, "int8").key_bias_NKd
    assert plain.shape == (2, 2, 16)
    assert torch.equal(Cache.of(quantize(model, "int8"), 1, 16, "int8").key_bias_NKd, plain)
    add_adapters(model, LoraConfig(rank=2), torch.Generator().manual_seed(0))
    assert torch.equal(Cache.of(model, 1, 16, "int8").key_bias_NKd, plain)


WAYS = [
    None,
    LongContext(Yarn(2.0, 16)),
    LongContext(Yarn(4.0, 16)),
    LongContext(dual_chunk=DualChunk(28, 4)),
]


@pytest.mark.parametrize("format", ["float", "int8"])
@pytest.mark.parametrize("after", WAYS)
@pytest.mark.parametrize("before", WAYS)
def test_keys_turned_anew_are_those_of_the_other_profile(before, after, format):
    k, v = random(50, 2, 16), random(50, 2, 16, seed=1)
    pages = [6, 1, 4, 2]
    table = torch.tensor(pages)
    places = table[torch.arange(50) // 16], torch.arange(50) % 16
    caches = [Cache(CONFIG, 7, 16, format) for _ in range(2)]
    for cache, way in zip(caches, (before, after), strict=True):
        for layer in range(2):
            cache.write(layer, places, rotate(k, *key_rotation(torch.arange(50), CONFIG, way)), v)
    caches[0].rotate_keys(pages, range(20), before, after)
    caches[0].rotate_keys(pages, range(20, 50), before, after)
    for layer in range(2):
        (mine, values), (wanted, same) = (cache.read(layer, table[None]) for cache in caches)
        assert torch.equal(values, same)
        assert_close(mine, wanted, rtol=1e-5, atol=1e-5 if format == "float" else 0.06)


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"the real checkpoint is not here: {REAL}")
def test_the_real_checkpoint_loses_less_than_half_a_percent():
    """benchmarks/cache_perplexity.py does it on more text."""
    text = (Path(__file__).parent.parent.parent / "LICENSE").read_text(encoding="utf-8")
    model, tokens = load_model(REAL), torch.tensor(load_tokenizer(REAL).encode(text)[:800])
    losses = []
    for cache in (
        Cache.of(model, 50, 16),
        Cache.of(model, 50, 16, "int8"),
        Cache(model.config, 50, 16, "int8"),
    ):
        with torch.inference_mode():
            logits = model.logits(hidden(model, cache, tokens, [256, 256, 256, 32]))
        losses.append(F.cross_entropy(logits[:-1], tokens[1:]).item())
    exact, ours, naive = losses
    assert abs(ours - exact) < 0.005
    assert naive > exact + 0.005
