"""Requests that choose adapters, against PEFT and against a network with the adapter loaded."""

import copy

import pytest
import torch
from peft import LoraConfig as PeftConfig
from peft import get_peft_model
from tiny import model, plain_greedy, prompts, tokenizer
from transformers import AutoModelForCausalLM

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.model import save_checkpoint
from openqwen.model.lora import (
    LoraConfig,
    add_adapters,
    load_adapter,
    merge_adapters,
    save_adapter,
)
from openqwen.model.quantize import _matrices, quantize
from openqwen.support.errors import OpenQwenError

WORDS = tokenizer()


def adapter(network, folder, seed, **options):
    """Save an adapter whose update is not small."""
    config = LoraConfig(rank=4, alpha=8.0, **options)
    adapted = copy.deepcopy(network)
    add_adapters(adapted, config, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "lora_B" in name:
                parameter.normal_(0, 0.3, generator=torch.Generator().manual_seed(seed + len(name)))
    save_adapter(adapted, config, folder, "base")
    return folder


@pytest.fixture(scope="module")
def network():
    return model(seed=3)


def test_each_request_has_its_own_adapter(network, tmp_path):
    asked, sampling = prompts(6, seed=1), Sampling(max_tokens=12)
    engine = Engine(network, WORDS)
    truths = [network]
    for name, targets in (
        ("one", ["q_proj", "v_proj"]),
        ("two", ["k_proj", "o_proj", "gate_proj", "down_proj"]),
    ):
        engine.adapters.add(name, adapter(network, tmp_path / name, len(targets), targets=targets))
        truths.append(copy.deepcopy(network))
        load_adapter(truths[-1], tmp_path / name)
    names = [None, "one", "two"] * 2
    for _ in range(2):  # with a warm cache too: no request may find another adapter's pages
        requests = [
            engine.submit(prompt, sampling, adapter=name) for prompt in asked for name in names[:3]
        ]
        while engine.busy:
            engine.step()
        for number, request in enumerate(requests):
            truth = plain_greedy(truths[number % 3], WORDS, request.prompt_ids, 12)
            assert request.token_ids == truth[0]
            assert request.logprobs == pytest.approx(truth[1], abs=1e-4)
    plain = [requests[n].token_ids for n in range(0, 18, 3)]
    assert plain != [requests[n].token_ids for n in range(1, 18, 3)]
    assert not network.model.layers[0].self_attn.q_proj._forward_hooks


@pytest.mark.parametrize(
    "options",
    [
        {"target_modules": ["q_proj", "up_proj"]},
        {"target_modules": "all-linear", "use_rslora": True, "rank_pattern": {"up_proj": 2}},
        {"target_modules": r".*\.1\..*_proj", "alpha_pattern": {"k_proj": 3}},
    ],
    ids=["names", "all-linear", "expression"],
)
def test_an_adapter_of_peft_speaks_as_in_peft(network, tmp_path, options):
    save_checkpoint(network, WORDS, tmp_path / "base")
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path / "base", dtype=torch.float32)
    torch.manual_seed(0)
    config = PeftConfig(r=4, lora_alpha=16, init_lora_weights=False, **options)
    theirs = get_peft_model(theirs, config)
    theirs.save_pretrained(tmp_path / "adapter")
    engine = Engine(network, WORDS)
    engine.adapters.add("peft", tmp_path / "adapter")
    request = engine.submit(
        list(range(30)), Sampling(max_tokens=10, ignore_eos=True), adapter="peft"
    )
    while engine.busy:
        engine.step()
    ids = torch.tensor([request.prompt_ids + request.token_ids])
    with torch.no_grad():
        truth = (
            torch.log_softmax(theirs(ids).logits[0, :-1].float(), -1)
            .gather(1, ids[0, 1:, None])
            .squeeze(1)
        )
    assert request.logprobs == pytest.approx(truth[29:].tolist(), abs=1e-4)


def test_adapters_come_and_go_while_requests_run(network, tmp_path):
    engine = Engine(network, WORDS)
    engine.adapters.add("x", adapter(network, tmp_path / "a", 1))
    first = engine.submit([1, 2, 3] * 10, Sampling(max_tokens=8, ignore_eos=True), adapter="x")
    engine.step()
    engine.adapters.add("x", adapter(network, tmp_path / "b", 2))
    second = engine.submit([1, 2, 3] * 10, Sampling(max_tokens=8, ignore_eos=True), adapter="x")
    engine.adapters.remove("x")
    assert engine.adapters.names == []
    while engine.busy:
        engine.step()
    assert second.cached_tokens == 0
    for request, folder in ((first, "a"), (second, "b")):
        truth = copy.deepcopy(network)
        load_adapter(truth, tmp_path / folder)
        ids, logprobs, _ = plain_greedy(truth, WORDS, request.prompt_ids, 1)
        assert request.logprobs[:1] == pytest.approx(logprobs or request.logprobs[:1], abs=1e-4)
        assert not ids or request.token_ids[0] == ids[0]


def test_an_adapter_that_does_not_fit_is_named(network, tmp_path):
    engine = Engine(network, WORDS)
    engine.adapters.add("right", adapter(network, tmp_path / "a", 1))
    with pytest.raises(OpenQwenError, match="Did you mean 'right'"):
        engine.submit([1], adapter="rigth")
    wide = copy.deepcopy(network)
    wide.model.layers[1].self_attn.q_proj = torch.nn.Linear(32, 64)
    with pytest.raises(
        OpenQwenError, match=r"holds \[64, 4\] for 'model\.layers\.1.*needs \[32, 4\]"
    ):
        engine.adapters.add("wide", adapter(wide, tmp_path / "wide", 1, targets=["q_proj"]))
    other = copy.deepcopy(network)
    other.model.extra = torch.nn.Linear(32, 32)
    with pytest.raises(OpenQwenError, match=r"no linear layer 'model\.extra'"):
        engine.adapters.add("extra", adapter(other, tmp_path / "extra", 1, targets=["extra"]))
    with pytest.raises(OpenQwenError, match="DoRA"):
        engine.adapters.add("dora", adapter(network, tmp_path / "dora", 1, dora=True))


@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_packed_weights_speak_as_peft_on_what_they_stand_for(kind, tmp_path):
    packed, theirs = unpacked(
        model(seed=3, width=64, tie_word_embeddings=False), kind, tmp_path / "base"
    )
    torch.manual_seed(0)
    targets = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
    shape = PeftConfig(r=4, lora_alpha=4, init_lora_weights=False, target_modules=targets)
    theirs = get_peft_model(theirs, shape)
    theirs.save_pretrained(tmp_path / "adapter")
    engine = Engine(packed, WORDS, EngineConfig(token_budget=400))
    engine.adapters.add("peft", tmp_path / "adapter")
    prompt, sampling = [(7 * n) % 250 for n in range(110)], Sampling(max_tokens=10, ignore_eos=True)
    request = engine.submit(prompt, sampling, adapter="peft")
    plain = engine.submit(prompt, sampling)
    others = [
        engine.submit([5, *prompt], sampling, adapter=name) for name in (None, "peft", "peft")
    ]
    while engine.busy:
        engine.step()
    ids = torch.tensor([request.prompt_ids + request.token_ids])
    with torch.no_grad(), theirs.disable_adapter():
        without = (
            torch.log_softmax(theirs(ids).logits[0, :-1], -1)
            .gather(1, ids[0, 1:, None])
            .squeeze(1)[109:]
        )
    with torch.no_grad():
        truth = (
            torch.log_softmax(theirs(ids).logits[0, :-1], -1)
            .gather(1, ids[0, 1:, None])
            .squeeze(1)[109:]
        )
    # Activations are rounded to bytes, which changes the result a little.
    off = (torch.tensor(request.logprobs) - truth).abs().max()
    assert off < 0.05 * (without - truth).abs().max()
    assert plain.logprobs != request.logprobs
    names = ["peft", None, None, "peft", "peft"]
    for one, name in zip([request, plain, *others], names):  # alone: the same bits
        alone = Engine(packed, WORDS, EngineConfig(token_budget=13))
        alone.adapters.add("peft", tmp_path / "adapter")
        again = alone.submit(one.prompt_ids, sampling, adapter=name)
        while alone.busy:
            alone.step()
        assert (again.token_ids, again.logprobs) == (one.token_ids, one.logprobs)


def unpacked(network, kind, folder):
    """A packed network, and transformers' own with the values that its matrices stand for."""
    packed = quantize(network, kind)
    with torch.no_grad():
        for matrix, parts in _matrices(packed, network):
            weights = [part if isinstance(part, torch.Tensor) else part.weight for part in parts]
            for weight, values in zip(weights, matrix.weight.split([len(w) for w in weights])):
                weight.copy_(values)
    save_checkpoint(network, WORDS, folder)
    return packed, AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def test_the_head_takes_no_adapter_of_a_request(tmp_path):
    network = model(seed=3, tie_word_embeddings=False)
    engine = Engine(network, WORDS)
    with pytest.raises(OpenQwenError, match="no linear layer 'lm_head'"):
        engine.adapters.add(
            "head", adapter(network, tmp_path / "head", 1, targets=["q_proj", "lm_head"])
        )


def test_a_network_with_an_adapted_head_speaks_as_with_it_merged(tmp_path):
    network = model(seed=3, tie_word_embeddings=False)
    load_adapter(network, adapter(network, tmp_path / "head", 1, targets=["q_proj", "lm_head"]))
    merged = copy.deepcopy(network)
    merge_adapters(merged)
    asked, sampling = prompts(3, seed=1), Sampling(max_tokens=12)
    for output, prompt in zip(Engine(network, WORDS).generate(asked, sampling), asked):
        truth = plain_greedy(merged, WORDS, prompt, 12)
        assert output.token_ids == truth[0]
        assert output.logprobs == pytest.approx(truth[1], abs=1e-4)
