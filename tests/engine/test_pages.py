"""Pages add up, and answers are right, after any mix of submit, cancel, step, refresh and pause."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny import add_up, model, plain_greedy, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.engine.pages import PagePool, chain

WORDS = tokenizer()
NETWORK, GROWING = model(seed=8), model(seed=8, max_position_embeddings=32)


class AnyMix(RuleBasedStateMachine):
    def __init__(self):
        super().__init__()
        self.engine = None
        self.requests, self.told = [], {}

    @precondition(lambda self: self.engine is None)
    @rule(
        pages=st.integers(4, 20),
        budget=st.integers(1, 40),
        running=st.integers(1, 6),
        prefix_cache=st.booleans(),
        speculate=st.sampled_from([0, 5]),
        grow=st.booleans(),
    )
    def start(self, pages, budget, running, prefix_cache, speculate, grow):
        self.grow = grow
        config = EngineConfig(
            cache_bytes=pages * 4096,
            token_budget=budget,
            max_running=running,
            prefix_cache=prefix_cache,
            speculate=speculate,
            grow=grow,
            max_context=128,
        )
        self.engine = Engine(GROWING if grow else NETWORK, WORDS, config)

    @precondition(lambda self: self.engine)
    @rule(
        start=st.integers(0, 2),
        length=st.integers(1, 45),
        n=st.integers(1, 3),
        tokens=st.integers(1, 30),
    )
    def submit(self, start, length, n, tokens):
        prompt = [(start + i * i) % 250 for i in range(length)]  # many begin alike
        sampling = Sampling(max_tokens=tokens, ignore_eos=True)
        self.requests += self.engine.submit_many(prompt, sampling, n)

    @precondition(lambda self: self.engine)
    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            for event in self.engine.step():
                self.told.setdefault(event.request, []).extend(event.token_ids)

    @precondition(lambda self: self.requests)
    @rule(number=st.integers(0, 99))
    def cancel(self, number):
        self.engine.cancel(self.requests[number % len(self.requests)])

    @precondition(lambda self: self.engine)
    @rule()
    def refresh(self):
        self.engine.refresh()

    @invariant()
    def pages_add_up(self):
        if self.engine:
            schedule = self.engine._schedule
            add_up(schedule.pool, [r.pages for r in schedule.running])
            assert not any(r.pages for r in self.requests if r not in schedule.running)
            assert len(schedule.running) <= self.engine.config.max_running
            for request in schedule.running:
                size = schedule.pool.page_size
                assert request.sealed * size <= request.computed < request.total
                assert request.computed <= len(request.pages) * size
            stats = self.engine.stats()
            assert stats.pages_free + stats.pages_cached + stats.pages_used == schedule.pool.count

    def teardown(self):
        if self.engine:
            for _ in range(2000):
                if not self.engine.busy:
                    break
                self.step(1)
            assert not self.engine.busy, "it never ends"
            for request in self.requests:
                assert request.finish_reason in ("length", "cancelled")
                assert self.told.get(request, []) == request.token_ids
                truth = ANSWERS.setdefault((self.grow, *request.prompt_ids), [])
                if len(truth) < len(request.token_ids):
                    truth[:] = greedy(request.prompt_ids, len(request.token_ids), self.grow)
                assert request.token_ids == truth[: len(request.token_ids)]
            add_up(self.engine._schedule.pool, [])


ANSWERS: dict[tuple[int, ...], list[int]] = {}


def greedy(prompt, count, grow):
    if grow:
        alone = Engine(GROWING, WORDS, EngineConfig(grow=True, max_context=128))
        return alone.generate([prompt], Sampling(max_tokens=count, ignore_eos=True))[0].token_ids

    class Endless:
        vocab_size, eos_id, endoftext_id = WORDS.vocab_size, -1, -1

    return plain_greedy(NETWORK, Endless, prompt, count)[0]


AnyMix.TestCase.settings = settings(
    max_examples=25, stateful_step_count=20, deadline=None, suppress_health_check=list(HealthCheck)
)
TestAnyMix = AnyMix.TestCase


def test_the_free_list_is_the_cache_and_evicts_the_oldest_ends_first():
    pool = PagePool(4, 2)
    digests = [chain(b"", [1, 2])]
    digests.append(chain(digests[0], [3, 4]))
    pages = pool.take(2)
    for page, digest in zip(pages, digests):
        pool.seal(page, digest)
    pool.release(pages)
    assert (pool.available, pool.cached) == (4, 2)
    assert pool.match(digests) == pages
    pool.share(pages[:1])
    pool.release(pages[:1])
    taken = pool.take(3)  # two blank ones, then the end of the chain
    assert pool.match(digests) == pages[:1]
    assert pages[1] in taken
    pool.release(taken)
    add_up(pool, [])
    assert chain(digests[0], [3, 4]) == digests[1] != chain(digests[1], [3, 4])
    pool.forget()
    assert pool.match(digests) == []
    add_up(pool, [])


def test_a_leak_is_found_out():
    pool = PagePool(3, 2)
    pages = pool.take(2)
    with pytest.raises(AssertionError):
        add_up(pool, [pages[:1]])


def test_an_idle_engine_takes_no_memory_for_its_cache():
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    Engine(model(max_position_embeddings=2**17), WORDS, EngineConfig(cache_bytes=2**30))
    with open("/proc/self/statm") as file:
        assert (int(file.read().split()[1]) - before) * 4096 < 2**28
