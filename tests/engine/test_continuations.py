"""Log-probabilities of continuations, against one plain pass over each whole sequence."""

import pytest
import torch
from tiny import model, prompts, scores, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.engine.openai_api import answer_call
from openqwen.support.errors import OpenQwenError

NETWORK = model(seed=3)


def pairs() -> list[tuple[list[int], list[int]]]:
    """Questions with a common beginning of 37 tokens, and four choices each, one to five tokens."""
    (shots,) = prompts(1, seed=9, longest=41)
    shots = (shots * 37)[:37]
    found = []
    for number, question in enumerate(prompts(6, seed=1, longest=30)):
        for choice in range(4):
            continuation = [
                (7 * choice + number + i) % 250 for i in range(1 + (choice + number) % 5)
            ]
            found.append(([*shots, *question], continuation))
    found.append(([5], [6]))
    return found


def truth(context: list[int], continuation: list[int]) -> tuple[list[float], bool]:
    table = torch.log_softmax(scores(NETWORK, [*context, *continuation]).double(), -1)
    rows = table[len(context) - 1 : -1]
    likeliest = rows[:, : tokenizer().vocab_size].argmax(-1).tolist()
    return [float(row[i]) for row, i in zip(rows, continuation)], likeliest == continuation


@pytest.mark.parametrize("pages", [None, 8])
def test_each_token_has_its_log_probability_after_its_context(pages):
    config = EngineConfig()
    if pages:  # a pool that holds about one sequence: requests wait, and cached pages are evicted
        small = Engine(NETWORK, tokenizer())._admission
        size = 2 * 2 * 16 * 2 * 8 * 4
        config = EngineConfig(cache_bytes=pages * size)
        assert small.pages > pages
    engine = Engine(NETWORK, tokenizer(), config)
    found = engine.score_continuations(pairs())
    for (context, continuation), scored in zip(pairs(), found, strict=True):
        logprobs, greedy = truth(context, continuation)
        assert scored.logprobs == pytest.approx(logprobs, abs=1e-4)
        assert scored.greedy == greedy
    engine.check_integrity()
    assert not engine.busy


def test_the_likeliest_continuation_is_greedy():
    engine = Engine(NETWORK, tokenizer())
    context = list(range(40))
    (answer,) = engine.generate([context], Sampling(max_tokens=4))
    other = [*answer.token_ids[:-1], (answer.token_ids[-1] + 1) % 250]
    found = engine.score_continuations([(context, answer.token_ids), (context, other)])
    assert [scored.greedy for scored in found] == [True, False]
    assert found[0].logprobs == pytest.approx(answer.logprobs, abs=1e-4)


def test_a_common_context_is_computed_once(monkeypatch):
    engine, computed = Engine(NETWORK, tokenizer()), []
    run = engine._runner.run
    monkeypatch.setattr(
        engine._runner,
        "run",
        lambda items: (computed.extend(i.count for i in items), run(items))[1],
    )
    context = list(range(96))
    engine.score_continuations([(context, [choice]) for choice in range(8)])
    # 96 tokens once, then for each choice what is behind the last full page that it may share.
    assert sum(computed) <= 97 + 7 * 17
    assert len(computed) < 8 * 2


def test_a_part_of_a_prompt_is_reported_and_a_server_is_not_asked_for_it():
    engine = Engine(NETWORK, tokenizer())
    ids = list(range(50))
    whole = engine.score(ids)
    sampling = Sampling(max_tokens=1, prompt_logprobs=0, prompt_logprobs_from=40)
    assert engine.generate([ids], sampling)[0].prompt_logprobs == pytest.approx(
        whole[39:], abs=1e-4
    )
    for refused in (
        lambda: answer_call(ids, sampling, 0, "a model"),
        lambda: Sampling(prompt_logprobs_from=-1),
    ):
        with pytest.raises(OpenQwenError, match="prompt_logprobs_from"):
            refused()
