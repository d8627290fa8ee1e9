"""Sequences that outgrow their RoPE scaling: their cached keys are rotated to the next one."""

from functools import cache

import pytest
import torch
from tiny import model, plain_greedy, prompts, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.model import Cache, DualChunk, Paged
from openqwen.model.quantize import quantize

WORDS = tokenizer()
WINDOW = 48
ENDLESS = Sampling(max_tokens=None, ignore_eos=True)


@cache
def make(kind):
    """Packed weights, so that a row's bits do not depend on what shares its call."""
    chunked = {"dual_chunk": DualChunk(WINDOW, 16, WINDOW), "max_position_embeddings": 192}
    options = chunked if kind == "configured" else {"max_position_embeddings": WINDOW}
    network = quantize(model(width=64, **options), "int8")
    network.context = 240 if kind == "chunks" else 192
    return network


@pytest.fixture(params=["yarn", "configured"])
def network(request):
    return make(request.param)


def start(network, **config):
    return Engine(network, WORDS, EngineConfig(max_context=network.context, **config))


def run(engine, *requests):
    while engine.busy:
        engine.step()
        engine.check_integrity()
    return requests[0]


def text(length, seed=0):
    return torch.randint(0, 256, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def rotating_a_whole_cache(network, ids, page_size=16):
    """Log-probabilities of all tokens but the first; the whole cache is rotated between scalings."""
    stages, pages = start(network)._admission.scalings, -(-len(ids) // page_size)
    cache, logits, read = Cache.of(network, pages, page_size), [], 0
    for number, stage in enumerate(stages):
        if number:
            cache.rotate_keys(range(pages), range(read), stages[number - 1].way, stage.way)
        new = ids[read : stage.until]
        paged = Paged(cache, torch.arange(pages)[None], [read + len(new)], [len(new)], stage.way)
        with torch.inference_mode():
            hidden = network(torch.tensor(new), torch.arange(read, read + len(new)), paged)
        logits.append(network.logits(hidden))
        read += len(new)
        if read == len(ids):
            break
    table = torch.log_softmax(torch.cat(logits), -1)[:-1]
    return table.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()


@pytest.mark.parametrize(("page_size", "budget"), [(16, None), (16, 7), (11, 7)])
@pytest.mark.parametrize("kind", ["yarn", "configured", "chunks"])
def test_an_answer_without_limit_is_as_with_a_whole_cache_that_is_rotated(kind, page_size, budget):
    network = make(kind)
    for grow in (False, True):
        engine = start(network, page_size=page_size, token_budget=budget, grow=grow)
        request = run(engine, engine.submit(text(20), ENDLESS))
        assert request.total == network.context
        assert request.finish_reason == "length"
        ids = request.prompt_ids + request.token_ids
        # Plain PyTorch reads pages of 11 tokens and chunks of 47, and rounds by the size of a call.
        close = 1e-4 if page_size == 16 and kind != "chunks" else 0.03
        assert request.logprobs == pytest.approx(
            rotating_a_whole_cache(network, ids)[19:], abs=close
        )


def test_a_prompt_beyond_the_window_is_read_in_its_own_way_unless_it_grows(network):
    for length in (WINDOW, WINDOW + 1, 2 * WINDOW + 5):
        direct, grown = (start(network, grow=grow) for grow in (False, True))
        one, two = (
            run(e, e.submit(text(length), Sampling(max_tokens=3, ignore_eos=True)))
            for e in (direct, grown)
        )
        assert one.long_context == two.long_context
        ids = one.prompt_ids + one.token_ids
        assert one.logprobs == pytest.approx(direct.score(ids)[length - 1 :], abs=1e-4)
        ids = two.prompt_ids + two.token_ids
        assert two.logprobs == pytest.approx(
            rotating_a_whole_cache(network, ids)[length - 1 :], abs=1e-4
        )
        assert one.logprobs != two.logprobs
        endless = direct.submit(text(length), ENDLESS)
        assert endless.scalings[0].way == (
            one.long_context if length > WINDOW else grown._admission.scalings[0].way
        )
        direct.cancel(endless)


@pytest.mark.parametrize("form", ["float", "int8"])
def test_short_requests_keep_every_bit(network, form):
    asked = prompts(5, seed=7, longest=WINDOW - 20)
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    plain = Engine(network, WORDS, EngineConfig(cache=form)).generate(asked, sampling)
    engine = start(network, grow=True, cache=form)
    long = [engine.submit(text(n), ENDLESS) for n in (WINDOW - 2, 2 * WINDOW + 1)]
    for _ in range(2):  # with a warm cache and grown neighbours too
        beside = engine.generate(asked, sampling)
        assert [(o.token_ids, o.logprobs) for o in beside] == [
            (o.token_ids, o.logprobs) for o in plain
        ]
    run(engine, *long)


@pytest.mark.parametrize("form", ["float", "int8"])
@pytest.mark.parametrize("grow", [False, True])
def test_a_conversation_is_the_same_bits_cold_and_warm(network, grow, form):
    engine = start(network, grow=grow, cache=form)
    ids, sampling, found = text(10), Sampling(max_tokens=9, ignore_eos=True), []
    while len(ids) + 19 < 192:
        (warm,) = engine.generate([ids], sampling)
        (cold,) = start(network, grow=grow, cache=form, prefix_cache=False).generate(
            [ids], sampling
        )
        assert (warm.token_ids, warm.logprobs) == (cold.token_ids, cold.logprobs)
        found.append((warm.cached_tokens, max(0, len(ids) - 11) // 16 * 16))
        ids = ids + warm.token_ids + text(10, len(ids))
    engine.check_integrity()
    read_once = [cached == known for cached, known in found]
    assert all(read_once) if grow else read_once.count(False) == 2  # at 48 and at 96 tokens


@pytest.mark.parametrize("grow", [False, True])
def test_neighbours_preemption_guesses_and_samples_change_no_bit_of_what_grows(network, grow):
    asked = [text(n, n) for n in (20, WINDOW - 1, WINDOW + 20)] + [[1, 2, 3, 4] * 10]
    sampling = Sampling(max_tokens=None, ignore_eos=True, temperature=0.7)

    def answers(engine, numbers):
        requests = [engine.submit(asked[n], sampling, seed=n) for n in numbers]
        run(engine, *requests)
        return [(r.token_ids, r.logprobs) for r in requests]

    alone = [answers(start(network, grow=grow), [n])[0] for n in range(4)]
    page = Cache.bytes_per_page(network.config, 16, "float", torch.float32)
    tight = {"cache_bytes": page * (-(-network.context // 16) + 6)}
    for config in ({}, tight, {"speculate": 5, "draft_below": 99, "token_budget": 30}):
        engine = start(network, grow=grow, **config)
        assert answers(engine, range(4)) == alone
        engine.check_integrity()
        assert (engine.stats().preemptions > 0) == (config is tight)
    for config in ({"prefix_cache": False}, tight):
        engine = start(network, grow=grow, **config)
        requests = engine.submit_many(
            asked[1], Sampling(max_tokens=20, ignore_eos=True, temperature=1.0), 5
        )
        run(engine, *requests)
        single = [engine.submit(asked[1], r.sampling, r.seed) for r in requests]
        run(engine, *single)
        assert [r.logprobs for r in requests] == [r.logprobs for r in single]


def test_requests_share_rotated_pages(network):
    engine = start(network, grow=True)
    requests = engine.submit_many(
        text(WINDOW - 2), Sampling(max_tokens=30, ignore_eos=True, temperature=1.0), 4
    )
    most = 0
    while engine.busy:
        engine.step()
        most = max(most, engine.stats().pages_used)
    assert all(r.scaling == 1 for r in requests)
    assert most <= 2 + 4 * 3


def test_a_model_without_long_context_ends_at_its_window():
    network = model(max_position_embeddings=WINDOW)
    (output,) = Engine(network, WORDS, EngineConfig(grow=True)).generate([text(10)], ENDLESS)
    assert (
        output.token_ids == plain_greedy(network, WORDS, output.prompt_ids, WINDOW - 10)[0]
        or output.finish_reason
    )
    assert len(output.token_ids) == WINDOW - 10
