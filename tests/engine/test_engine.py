"""The engine against a plain loop over the whole sequence, and what a request may depend on."""

from dataclasses import replace

import numpy as np
import pytest
import torch

from openqwen.engine import Engine, Sampling
from openqwen.engine import engine as module
from openqwen.engine.sampler import choose
from openqwen.model import DualChunk, ModelConfig, Packed, Qwen2, Yarn, initialize
from openqwen.support.errors import OpenQwenError


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    vocab_size, eos_id, endoftext_id = 60, 58, 59

    def encode(self, text, allow_control=False):
        return [int(t) for t in text.split()]

    def decode(self, ids, skip_control=True):
        return " ".join(map(str, ids))

    def encode_chat(self, messages, add_generation_prompt=False):
        ids = [t for m in messages for t in self.encode(m["content"])]
        return ids, [0] * len(ids)


@pytest.fixture(scope="module", params=["plain", "yarn", "chunks"])
def model(request):
    config = ModelConfig(64, 32, 48, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
    if request.param == "yarn":
        config = replace(config, yarn=Yarn(4.0, 16))
    if request.param == "chunks":  # of 11 tokens: prompts and answers cross borders, which are no page borders
        config = replace(config, dual_chunk=DualChunk(16, 5))
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())) * 0.15)
    return model.eval()


def prompts(count, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(0, 58, int(rng.integers(1, 30))).tolist() for _ in range(count)]


@torch.no_grad()
def plain_greedy(model, prompt, limit):
    ids, logprobs = list(prompt), []
    while len(ids) < len(prompt) + limit:
        packed = Packed.from_lengths([len(ids)])
        logits = model.logits(model(torch.tensor(ids), packed.positions, packed))[-1, :60]
        token = int(logits.argmax())
        if token in (58, 59):
            return ids[len(prompt) :], logprobs, "stop"
        logprobs.append(float(torch.log_softmax(logits, -1)[token]))
        ids.append(token)
    return ids[len(prompt) :], logprobs, "length"


def test_greedy_equals_a_loop_without_a_cache(model):
    asked = prompts(9)
    outputs = Engine(model, Numbers()).generate(asked, Sampling(max_tokens=20))
    for prompt, output in zip(asked, outputs):
        ids, logprobs, reason = plain_greedy(model, prompt, 20)
        assert output.token_ids == ids
        assert output.finish_reason == reason
        assert output.logprobs == pytest.approx(logprobs, abs=1e-4)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(model):
    asked = prompts(12, seed=1)
    sampling = Sampling(max_tokens=15, temperature=1.0)
    engine = Engine(model, Numbers())
    together = engine.generate(asked, sampling, seeds=list(range(12)))
    for n in (0, 5, 11):
        (alone,) = engine.generate([asked[n]], sampling, seeds=[n])
        assert alone.token_ids == together[n].token_ids
    assert engine.generate([asked[0]] * 8, sampling, seeds=range(8)) != engine.generate(
        [asked[0]] * 8, sampling, seeds=range(8, 16)
    )


def test_a_small_cache_changes_no_answer_and_all_pages_come_back(model, monkeypatch):
    asked = prompts(10, seed=2)
    engine = Engine(model, Numbers())
    expected = engine.generate(asked, Sampling(max_tokens=12))
    monkeypatch.setattr(module, "_CACHE_BYTES", 1)
    monkeypatch.setattr(module, "_PREFILL", 20)
    kept = []
    original = Engine._pages
    monkeypatch.setattr(Engine, "_pages", lambda self, r: kept.append(original(self, r)) or kept[-1])
    assert [o.token_ids for o in engine.generate(asked, Sampling(max_tokens=12))] == [o.token_ids for o in expected]
    assert sorted(kept[0].free) == list(range(kept[0].cache.pages))


def test_answers_end_at_the_context_limit_and_at_stop_ids(model):
    engine = Engine(model, Numbers())
    (output,) = engine.generate([[1] * 60], Sampling(max_tokens=50))
    assert len(output.token_ids) <= 4
    longest = max(engine.generate(prompts(20), Sampling(max_tokens=8)), key=lambda o: len(o.token_ids))
    free, prompt = longest, longest.prompt_ids
    assert len(free.token_ids) == 8
    (cut,) = engine.generate([prompt], Sampling(max_tokens=8, stop_ids=(free.token_ids[2],)))
    assert cut.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2])]
    assert cut.finish_reason == "stop"
    assert list(engine.stream(prompt, Sampling(max_tokens=8))) == free.token_ids
    with pytest.raises(OpenQwenError, match="64 tokens"):
        engine.generate([[1] * 64], Sampling())


def test_sampling_follows_the_distribution_and_its_cuts():
    logits = torch.log(torch.tensor([0.5, 0.25, 0.15, 0.1]))
    draws = (np.arange(4000) + 0.5) / 4000
    rows = logits.expand(4000, 4)

    def shares(**options):
        tokens, logprobs = choose(rows, [Sampling(temperature=1.0, **options)] * 4000, draws)
        assert logprobs.tolist() == pytest.approx(logits[tokens].tolist(), abs=1e-5)
        return np.bincount(tokens.numpy(), minlength=4) / 4000

    assert shares() == pytest.approx([0.5, 0.25, 0.15, 0.1], abs=1e-3)
    assert shares(top_k=2) == pytest.approx([2 / 3, 1 / 3, 0, 0], abs=1e-3)
    assert shares(top_p=0.8) == pytest.approx([0.5 / 0.9, 0.25 / 0.9, 0.15 / 0.9, 0], abs=1e-3)


def test_rows_beyond_the_vocabulary_are_never_sampled(model):
    outputs = Engine(model, Numbers()).generate(prompts(40, seed=4), Sampling(max_tokens=10, temperature=3.0))
    assert all(t < 58 for o in outputs for t in o.token_ids)
