"""Pages add up, and answers are right, after any mix of submit, cancel, step and refresh."""

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule
from tiny import model, plain_greedy, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.engine.pages import PagePool, prefix_hash

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
        scored=st.booleans(),
        priority=st.integers(0, 1),
    )
    def submit(self, start, length, n, tokens, scored, priority):
        prompt = [(start + i * i) % 250 for i in range(length)]  # many have a common prefix
        scored = 0 if scored else None
        sampling = Sampling(max_tokens=tokens, ignore_eos=True, prompt_logprobs=scored)
        self.requests += self.engine.submit_many(prompt, sampling, n, priority=priority)

    @precondition(lambda self: self.engine)
    @rule(count=st.integers(1, 6))
    def step(self, count):
        for _ in range(count):
            for event in self.engine.step():
                self.told.setdefault(event.request, []).extend(event.token_ids)
            self.engine.check_integrity()

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
            self.engine.check_integrity()
            running = self.engine._scheduler.running
            assert not any(r.pages for r in self.requests if r not in running)
            stats = self.engine.stats()
            pages = stats.pages_free + stats.pages_cached + stats.pages_used
            assert pages == self.engine._scheduler.pool.count

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
            assert self.engine.stats().pages_used == 0


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
    digests = [prefix_hash(b"", [1, 2])]
    digests.append(prefix_hash(digests[0], [3, 4]))
    pages = pool.allocate(2)
    for page, digest in zip(pages, digests):
        pool.register_prefix(page, digest)
    pool.release(pages)
    assert (pool.available, pool.cached) == (4, 2)
    assert pool.match(digests) == pages
    pool.share(pages[:1])
    pool.release(pages[:1])
    taken = pool.allocate(3)  # two blank ones, then the end of the chain
    assert pool.match(digests) == pages[:1]
    assert pages[1] in taken
    pool.release(taken)
    pool.check_integrity([])
    assert prefix_hash(digests[0], [3, 4]) == digests[1] != prefix_hash(digests[1], [3, 4])
    pool.clear_prefixes()
    assert pool.match(digests) == []
    pool.check_integrity([])


FAULTS = {
    "a page leaks": lambda pool, pages: pages.pop(),
    "a page is shared without a reference": lambda pool, pages: pages.append(pages[0]),
    "a page is free twice": lambda pool, pages: pool._free.append(pool._free[-1]),
    "a page is lost": lambda pool, pages: pool._free.clear(),
    "a referenced page is free": lambda pool, pages: pool._free.append(pages[0]),
    "a cached page has no hash": lambda pool, pages: pool._cached.update({pool._free.pop(): None}),
    "a free page has a hash": lambda pool, pages: pool.register_prefix(pool._free[-1], b"other"),
    "two pages have one hash": lambda pool, pages: pool._hash_of.update({pages[0]: HASH}),
}
HASH = prefix_hash(b"", [1, 2])


@pytest.mark.parametrize("fault", FAULTS.values(), ids=FAULTS)
def test_integrity_is_checked(fault):
    pool = PagePool(4, 2)
    cached, *pages = pool.allocate(3)
    pool.register_prefix(cached, HASH)
    pool.release([cached])
    pool.check_integrity([pages])
    fault(pool, pages)
    with pytest.raises(AssertionError):
        pool.check_integrity([pages])


def test_a_request_that_is_computed_beyond_its_pages_is_found():
    engine = Engine(NETWORK, WORDS)
    request = engine.submit([1, 2, 3], Sampling(max_tokens=9, ignore_eos=True))
    for _ in range(2):
        engine.step()
    engine.check_integrity()
    for name, value in (("computed", request.total), ("registered", 1), ("max_length", 4)):
        before = getattr(request, name)
        setattr(request, name, value)
        with pytest.raises(AssertionError):
            engine.check_integrity()
        setattr(request, name, before)
    engine.check_integrity()


def test_an_idle_engine_takes_no_memory_for_its_cache():
    with open("/proc/self/statm") as file:
        before = int(file.read().split()[1])
    Engine(model(max_position_embeddings=2**17), WORDS, EngineConfig(cache_bytes=2**30))
    with open("/proc/self/statm") as file:
        assert (int(file.read().split()[1]) - before) * 4096 < 2**28
