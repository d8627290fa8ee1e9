"""An answer does not depend on the cache, other requests, the budget, preemption or drafts."""

from dataclasses import replace

import pytest
import torch
from tiny import model, plain_greedy, prompts, scores, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.model import DualChunk, LongContext, Packed, Yarn
from openqwen.model.quantize import quantize
from openqwen.support.errors import OpenQwenError

WORDS = tokenizer()
PAGE = 16


@pytest.fixture(scope="module", params=["plain", "yarn", "chunks"])
def network(request):
    options = {
        "plain": {},
        "yarn": {"yarn": Yarn(4.0, 16)},
        # Chunks of 11 tokens: prompts cross their borders, which are not those of pages.
        "chunks": {"dual_chunk": DualChunk(16, 5)},
    }
    return model(**options[request.param])


def answers(network, asked, sampling, seeds=None, **config):
    engine = Engine(network, WORDS, EngineConfig(**config))
    outputs = engine.generate(asked, sampling, seeds)
    engine.check_integrity()
    return outputs, engine.stats()


def same(ours, theirs):
    for one, other in zip(ours, theirs, strict=True):
        assert one.token_ids == other.token_ids
        assert one.text == other.text
        assert one.finish_reason == other.finish_reason
        assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)


@pytest.mark.parametrize(
    "config",
    [
        {},
        {"prefix_cache": False},
        {"token_budget": 7, "page_size": 4},
        {"cache_bytes": 2**16, "page_size": 8},
        {"speculate": 6, "draft_below": 99},
    ],
    ids=lambda c: " ".join(c) or "default",
)
def test_greedy_equals_a_loop_without_a_cache(network, config):
    asked = [*prompts(9), [1, 2, 3, 4] * 9]
    outputs, _ = answers(network, asked, Sampling(max_tokens=25), **config)
    for prompt, output in zip(asked, outputs):
        ids, logprobs, reason = plain_greedy(network, WORDS, prompt, 25)
        assert output.token_ids == ids
        assert output.finish_reason == reason
        assert output.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert output.text == WORDS.decode(ids)


def test_a_sample_depends_on_its_seed_and_not_on_its_neighbours(network):
    asked, sampling, seeds = (
        prompts(12, seed=1),
        Sampling(max_tokens=15, temperature=1.0),
        list(range(12)),
    )
    together, _ = answers(network, asked, sampling, seeds)
    for n in (0, 5, 11):
        same(answers(network, [asked[n]], sampling, [n])[0], [together[n]])
    other, _ = answers(network, asked, sampling, range(12, 24))
    assert [o.token_ids for o in other] != [o.token_ids for o in together]


def test_prompts_without_seeds_are_drawn_apart_and_again_the_same(network):
    prompt, sampling = prompts(1, seed=1)[0], Sampling(max_tokens=15, temperature=1.0)
    four, _ = answers(network, [prompt] * 4, sampling)
    assert len({tuple(output.token_ids) for output in four}) == 4
    same(answers(network, [prompt] * 4, sampling)[0], four)
    same(answers(network, [prompt], sampling)[0], four[:1])
    engine = Engine(network, WORDS)
    one = engine.submit(prompt, replace(sampling, seed=9))  # a seed of its own: alone as in company
    engine.generate([prompt] * 4, sampling)
    same(answers(network, [prompt], sampling, [9])[0], [one])


@pytest.mark.parametrize(("kind", "cache"), [("int8", "float"), ("int4", "int8")])
def test_where_rows_are_apart_neighbours_guesses_and_the_cache_change_no_bit(kind, cache):
    """Packed weights and the compiled attention give a row the same bits in every call."""
    network = quantize(model(width=64), kind)
    asked, seeds = [*prompts(10, seed=5), [5, 6, 7, 8] * 6], list(range(11))
    for sampling in (Sampling(max_tokens=30), Sampling(max_tokens=30, temperature=1.0, top_p=0.9)):
        alone = [
            answers(network, [p], sampling, [s], cache=cache)[0][0] for p, s in zip(asked, seeds)
        ]
        for config in (
            {},
            {"token_budget": 9},
            {"speculate": 5, "draft_below": 99},
            {"cache_bytes": 2**18},
        ):
            together, _ = answers(network, asked, sampling, seeds, cache=cache, **config)
            for one, other in zip(alone, together):
                assert (one.token_ids, one.logprobs) == (other.token_ids, other.logprobs)
                assert one.drawn_logprobs == other.drawn_logprobs


def test_preempted_equals_undisturbed_and_nothing_streamed_is_retracted(network):
    asked, seeds = prompts(10, seed=2), list(range(10))
    sampling = Sampling(max_tokens=40, temperature=1.0)
    undisturbed, _ = answers(network, asked, sampling, seeds)
    engine = Engine(network, WORDS, EngineConfig(cache_bytes=10 * 4096, token_budget=64))
    requests = [engine.submit(prompt, sampling, seed) for prompt, seed in zip(asked, seeds)]
    told = {request.id: ([], "") for request in requests}
    while engine.busy:
        for event in engine.step():
            ids, text = told[event.request.id]
            told[event.request.id] = ids + event.token_ids, text + event.text
            assert event.request.token_ids == told[event.request.id][0]
        engine.check_integrity()
    assert engine.stats().preemptions > 0
    for request, output in zip(requests, undisturbed):
        assert (
            told[request.id] == (output.token_ids, output.text) == (request.token_ids, request.text)
        )
        assert request.logprobs == pytest.approx(output.logprobs, abs=1e-4)


@pytest.mark.parametrize("past", range(-1, 12))
def test_cold_equals_warm(network, past):
    """Around page borders, where other engines have failed."""
    start = prompts(1, seed=3, longest=2)[0] * (2 * PAGE + past)
    asked = [start, [*start, 7], start + [7] * 17, start[: PAGE + 1]]
    sampling = Sampling(max_tokens=12)
    engine = Engine(network, WORDS)
    cold = [answers(network, [prompt], sampling, prefix_cache=False)[0][0] for prompt in asked]
    same([engine.generate([prompt], sampling)[0] for prompt in asked], cold)
    same(engine.generate(asked, sampling), cold)
    assert engine.stats().cache_hits > 0
    engine.check_integrity()


def test_answers_continue_from_their_own_pages(network):
    engine = Engine(network, WORDS)
    (first,) = engine.generate(prompts(1, seed=9), Sampling(max_tokens=40, ignore_eos=True))
    longer = first.prompt_ids + first.token_ids + [5]
    (second,) = engine.generate([longer], Sampling(max_tokens=5))
    assert engine.stats().cache_hits == (len(longer) - 2) // PAGE * PAGE
    same([second], answers(network, [longer], Sampling(max_tokens=5))[0])


def test_samples_share_the_pages_of_their_prompt(network):
    prompt, sampling = list(range(1, 3 * PAGE + 3)), Sampling(max_tokens=6, temperature=1.0, seed=5)
    for prefix_cache in (True, False):
        engine = Engine(network, WORDS, EngineConfig(prefix_cache=prefix_cache))
        samples = engine.submit_many(prompt, sampling, 4)
        read = []
        while engine.busy:
            engine.step()
            read.append(engine.stats())
        assert engine.stats().cache_hits == 3 * 3 * PAGE
        assert max(stats.pages_used for stats in read) <= 3 + 4
        alone = [engine.generate([prompt], sampling, [request.seed])[0] for request in samples]
        assert [r.token_ids for r in samples] == [o.token_ids for o in alone]
        assert len({tuple(r.token_ids) for r in samples}) == 4
        assert samples[0].seed == 5


def test_a_cancelled_request_ends_at_once_wherever_it_is(network):
    asked = prompts(6, seed=4, longest=60)
    for steps in range(5):  # queued, being read, decoding
        engine = Engine(network, WORDS, EngineConfig(token_budget=20, max_running=3))
        requests = [engine.submit(prompt, Sampling(max_tokens=20)) for prompt in asked]
        for _ in range(steps):
            engine.step()
        for request in requests[::2]:
            engine.cancel(request)
            engine.cancel(request)
        told = []
        while engine.busy:
            told += [(e.request.id, e.finish_reason) for e in engine.step() if e.finish_reason]
        assert len(told) == 6
        assert {i for i, reason in told if reason == "cancelled"} == {r.id for r in requests[::2]}
        engine.check_integrity()
        expected, _ = answers(network, asked[1::2], Sampling(max_tokens=20))
        assert [r.token_ids for r in requests[1::2]] == [o.token_ids for o in expected]


def test_log_probabilities_are_the_models(network):
    asked = prompts(5, seed=6)
    outputs, _ = answers(
        network, asked, Sampling(max_tokens=20, temperature=1.0, top_logprobs=3), range(5)
    )
    engine = Engine(network, WORDS)
    for output in outputs:
        ids = output.prompt_ids + output.token_ids
        table = torch.log_softmax(scores(network, ids), -1)[:-1]
        truth = table.gather(1, torch.tensor(ids[1:])[:, None]).squeeze(1).tolist()
        assert output.logprobs == pytest.approx(truth[len(output.prompt_ids) - 1 :], abs=1e-4)
        assert engine.score(ids) == pytest.approx(truth, abs=1e-4)
        for row, top in zip(table[len(output.prompt_ids) - 1 :], output.top, strict=True):
            values, found = row[: WORDS.vocab_size].topk(3)
            assert [i for i, _ in top] == found.tolist()
            assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)


def test_changed_weights_leave_nothing_in_the_cache():
    network = model(seed=1)
    engine = Engine(network, WORDS)
    prompt, sampling = list(range(60)), Sampling(max_tokens=20)
    running = engine.submit(prompt, Sampling(max_tokens=30, ignore_eos=True))
    while len(running.token_ids) < 7:
        engine.step()
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.2)
    engine.refresh(4)
    while engine.busy:
        assert all(event.version == 4 for event in engine.step())
    assert running.versions == [0] * 7 + [4] * 23
    ids = running.prompt_ids + running.token_ids
    assert running.logprobs[7:] == pytest.approx(
        Engine(network, WORDS).score(ids)[len(prompt) + 6 :], abs=1e-4
    )
    with torch.no_grad():
        network.model.norm.weight.mul_(-1.0)  # nobody says so: the engine sees it when it is idle
    assert (
        engine.generate([prompt], sampling)[0].token_ids
        == plain_greedy(network, WORDS, prompt, 20)[0]
    )
    assert engine.version == 5


def test_a_paused_engine_holds_everything_where_it_is():
    engine = Engine(model(), WORDS)
    request = engine.submit([1, 2, 3], Sampling(max_tokens=4, ignore_eos=True))
    engine.step()
    engine.pause()
    assert not engine.busy
    assert engine.step() == []
    assert len(request.token_ids) == 1
    with pytest.raises(OpenQwenError, match="paused"):
        engine.generate([[1]])
    engine.resume()
    while engine.busy:
        engine.step()
    assert len(request.token_ids) == 4


def test_priority_goes_first():
    engine = Engine(model(), WORDS, EngineConfig(max_running=1))
    low, high = engine.submit([1, 2]), engine.submit([1, 2], priority=1)
    ended = []
    while engine.busy:
        ended += [event.request for event in engine.step() if event.finish_reason]
    assert ended == [high, low]


def test_answers_end_at_the_context_limit_and_at_stop_ids(network):
    engine = Engine(network, WORDS)
    (output,) = engine.generate([[1] * 120], Sampling(max_tokens=50))
    assert len(output.token_ids) <= 8
    (free,) = engine.generate([[3, 4]], Sampling(max_tokens=8, ignore_eos=True))
    assert len(free.token_ids) == 8
    (cut,) = engine.generate(
        [[3, 4]], Sampling(max_tokens=8, ignore_eos=True, stop_ids=(free.token_ids[2],))
    )
    assert cut.token_ids == free.token_ids[: free.token_ids.index(free.token_ids[2])]
    assert cut.finish_reason == "stop"
    assert list(engine.stream([3, 4], Sampling(max_tokens=8, ignore_eos=True))) == free.token_ids


def test_a_bad_request_is_named():
    engine = Engine(model(), WORDS)
    for prompt, words in (
        ([1] * 128, "128 tokens"),
        ([], "0 tokens"),
        ([320], "id 320"),
        ([-1, 2], "id -1"),
    ):
        with pytest.raises(OpenQwenError, match=words):
            engine.submit(prompt)
    with pytest.raises(OpenQwenError, match="no adapter called 'x'"):
        engine.submit([1], adapter="x")
    for options in ({"top_p": -0.1}, {"temperature": -1.0}, {"max_tokens": 0}, {"stop": ("",)}):
        with pytest.raises(OpenQwenError, match=next(iter(options))):
            Sampling(**options)


def test_rows_beyond_the_vocabulary_are_never_sampled():
    outputs, _ = answers(
        model(), prompts(40, seed=4), Sampling(max_tokens=10, temperature=3.0), range(40)
    )
    assert all(t < WORDS.vocab_size for o in outputs for t in o.token_ids)


def test_embeddings_are_the_last_hidden_states(network):
    asked = prompts(5, seed=8)
    found = Engine(network, WORDS).embed(asked)
    assert found.shape == (5, 32)
    assert found.norm(dim=1).tolist() == pytest.approx([1.0] * 5, abs=1e-5)
    logits = network.logits(found[2])
    truth = scores(network, asked[2])[-1]
    assert torch.corrcoef(torch.stack([logits, truth]))[0, 1] > 1 - 1e-5


def test_embeddings_are_read_under_the_scaling_that_their_length_needs():
    network = model()
    window = network.config.max_position_embeddings
    short, long = prompts(2, seed=9)[0], (prompts(2, seed=9)[1] * window)[: 2 * window]
    engine = Engine(network, WORDS, EngineConfig(max_context=4 * window))
    way = next(s.way for s in engine._admission.scalings if s.until >= len(long))
    packed = Packed.from_lengths([len(long)], [way])
    truth = network(torch.tensor(long), packed.positions, packed)[-1]
    found = engine.embed([short, long])
    torch.testing.assert_close(found[1], torch.nn.functional.normalize(truth, dim=0))
    torch.testing.assert_close(found[:1], Engine(network, WORDS).embed([short]))


def test_a_request_at_yarn_factor_one_or_below_one_chunk_is_the_plain_one_to_the_bit():
    network, asked = model(), prompts(4, seed=7)
    plain, _ = answers(network, asked, Sampling(max_tokens=20))
    for context in (LongContext(Yarn(1.0, 16)), LongContext(dual_chunk=DualChunk(120, 20))):
        other, _ = answers(network, asked, replace(Sampling(max_tokens=20), long_context=context))
        assert [(o.token_ids, o.logprobs) for o in other] == [
            (o.token_ids, o.logprobs) for o in plain
        ]


def test_each_request_is_stretched_as_far_as_it_needs_and_no_further():
    network, window = model(max_position_embeddings=64), 64
    asked = [
        *prompts(3, seed=7, longest=30),
        [(7 * n) % 250 for n in range(150)],
        [(7 * n) % 250 for n in range(90)],
    ]
    sampling = Sampling(max_tokens=20, ignore_eos=True)
    plain, _ = answers(network, asked[:3], sampling)
    same_bits, _ = answers(network, asked[:3], sampling, max_context=256)
    assert [(o.token_ids, o.logprobs) for o in same_bits] == [
        (o.token_ids, o.logprobs) for o in plain
    ]
    engine = Engine(network, WORDS, EngineConfig(max_context=256))
    requests = [engine.submit(prompt, sampling) for prompt in asked]
    while engine.busy:
        engine.step()
    assert [r.long_context.yarn and r.long_context.yarn.factor for r in requests] == [
        None,
        None,
        None,
        4.0,
        2.0,
    ]
    assert [r.token_ids for r in requests[:3]] == [o.token_ids for o in plain]
    assert requests[4].cached_tokens == 0  # the same tokens, turned otherwise
    for request in requests[3:]:
        stretched = model(
            max_position_embeddings=64, yarn=Yarn(request.long_context.yarn.factor, window)
        )
        ids = request.prompt_ids + request.token_ids
        truth = (
            torch.log_softmax(scores(stretched, ids), -1)[:-1]
            .gather(1, torch.tensor(ids[1:])[:, None])
            .squeeze(1)
        )
        assert request.logprobs == pytest.approx(
            truth[len(request.prompt_ids) - 1 :].tolist(), abs=1e-4
        )


@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_scores_that_are_no_numbers_end_that_answer_alone(temperature):
    network, asked = model(), prompts(2, seed=5)
    good = Sampling(max_tokens=8, ignore_eos=True)
    alone = Engine(network, WORDS).generate(asked[:1], good)[0]
    engine = Engine(network, WORDS)
    fine = engine.submit(asked[0], good)
    bad = engine.submit(
        asked[1] * 2, replace(good, temperature=temperature, repetition_penalty=5e-324)
    )
    while engine.busy:
        engine.step()
    assert (bad.finish_reason, bad.token_ids) == ("error", [])
    assert fine.token_ids == alone.token_ids
    engine.check_integrity()
    with torch.no_grad():
        network.model.norm.weight.fill_(torch.nan)
    broken = Engine(network, WORDS).generate(
        asked, replace(good, temperature=temperature, top_p=0.9)
    )
    assert [output.finish_reason for output in broken] == ["error", "error"]


@pytest.mark.parametrize(
    "config", [{}, {"token_budget": 7}, {"cache_bytes": 2**16, "page_size": 8}, {"speculate": 4}]
)
def test_log_probabilities_of_the_prompt_are_the_models(network, config):
    asked = [*prompts(5, seed=6, longest=90), [4], [1, 2, 3] * 9]
    engine = Engine(network, WORDS, EngineConfig(**config))
    # Leaves the prompts in the prefix cache, from which no log-probabilities can be read.
    plain = engine.generate(asked, Sampling(max_tokens=8))
    for count in (0, 2):
        outputs = engine.generate(asked, Sampling(max_tokens=8, prompt_logprobs=count))
        same(outputs, plain)
        for output in outputs:
            table = torch.log_softmax(scores(network, output.prompt_ids), -1)[:-1]
            truth = (
                table.gather(1, torch.tensor(output.prompt_ids[1:])[:, None].long())
                .squeeze(1)
                .tolist()
            )
            assert output.prompt_logprobs == pytest.approx(truth, abs=1e-4)
            for row, top in zip(table, output.prompt_top, strict=True):
                values, found = row[: WORDS.vocab_size].topk(count)
                assert [i for i, _ in top] == found.tolist()
                assert [value for _, value in top] == pytest.approx(values.tolist(), abs=1e-4)
    engine.check_integrity()
    samples = engine.submit_many(
        asked[0], Sampling(max_tokens=8, temperature=1.0, prompt_logprobs=1), 3
    )
    while engine.busy:
        engine.step()
    assert all(
        r.prompt_logprobs == pytest.approx(samples[0].prompt_logprobs, abs=1e-4) for r in samples
    )
    assert all(len(r.prompt_logprobs) == len(asked[0]) - 1 for r in samples)
