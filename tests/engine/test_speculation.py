"""Answers with draft tokens are those without, token by token, for every drafter and sampling."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import model, plain_greedy, prompts, scores, tokenizer

from openqwen.engine import Engine, EngineConfig, Sampling
from openqwen.engine.drafter import DraftLength, PromptLookup
from openqwen.model import Packed

WORDS = tokenizer()
NETWORK = model(seed=5)
CLOSE = model(seed=5)  # a draft model that often agrees
with torch.no_grad():
    for parameter in CLOSE.parameters():
        parameter.add_(
            torch.randn(parameter.shape, generator=torch.Generator().manual_seed(1)) * 0.001
        )
KINDS = [
    Sampling(max_tokens=50),
    Sampling(max_tokens=50, temperature=1.0),
    Sampling(
        max_tokens=50, temperature=0.8, top_p=0.9, repetition_penalty=1.1, presence_penalty=0.3
    ),
]


def engine(speculate, draft=None, **options):
    return Engine(NETWORK, WORDS, EngineConfig(speculate=speculate, **options), draft)


@pytest.mark.parametrize("draft", [None, CLOSE, model(seed=6)], ids=["lookup", "close", "far"])
@pytest.mark.parametrize("sampling", KINDS, ids=["greedy", "sampled", "penalised"])
def test_speculative_equals_plain(sampling, draft):
    asked = [*prompts(3, seed=2), [5, 6, 7, 8] * 6]
    guessing = engine(6, draft)
    for seed in range(3):
        plain = engine(0).generate(asked, sampling, [seed] * 4)
        fast = guessing.generate(asked, sampling, [seed] * 4)
        assert [o.token_ids for o in fast] == [o.token_ids for o in plain]
        assert [o.finish_reason for o in fast] == [o.finish_reason for o in plain]
        for one, other in zip(fast, plain):
            assert one.logprobs == pytest.approx(other.logprobs, abs=1e-4)
    guessing.check_integrity()
    stats = guessing.stats()
    assert stats.drafted > 0 or (draft is None and sampling.temperature > 0)
    if draft is CLOSE:
        assert stats.accepted > 0.4 * stats.drafted > 40


def test_accepted_drafts_save_calls():
    asked = [[5, 6, 7, 8] * 6]

    def steps(machine):
        request, count = machine.submit(asked[0], Sampling(max_tokens=60, ignore_eos=True)), 0
        while machine.busy:
            count += bool(machine.step())
        assert request.token_ids == plain[: len(request.token_ids)]
        return count

    plain = engine(0).generate(asked, Sampling(max_tokens=60, ignore_eos=True))[0].token_ids
    assert steps(engine(0)) == 60
    assert steps(engine(8, CLOSE)) < 30


def test_under_load_nothing_is_drafted():
    busy = engine(6, CLOSE, draft_below=2)
    busy.generate(prompts(4, seed=3), Sampling(max_tokens=20, ignore_eos=True))
    assert busy.stats().drafted == 0


@torch.no_grad()
def test_drafted_tokens_follow_the_models_distribution():
    """Chi-square over 4,000 seeds: the second token, which is drafted, has its exact distribution."""
    prompt, count, width = [9, 3, 4, 5], 4000, WORDS.vocab_size
    machine = engine(1, CLOSE, draft_below=999, token_budget=512)
    sampling = Sampling(max_tokens=3, temperature=1.0, ignore_eos=True)
    outputs = [
        o
        for n in range(0, count, 100)
        for o in machine.generate([prompt] * 100, sampling, range(n, n + 100))
    ]
    assert machine.stats().drafted == count
    first = torch.softmax(scores(NETWORK, prompt)[-1, :width], -1)
    packed = Packed.from_lengths([5] * width)
    ids = torch.tensor([i for n in range(width) for i in (*prompt, n)])
    second = torch.softmax(NETWORK.logits(NETWORK(ids, packed.positions, packed))[4::5, :width], -1)
    expected = (first @ second).double().numpy() * count
    seen = np.bincount([o.token_ids[1] for o in outputs], minlength=width)
    often = expected >= 5
    observed = np.append(seen[often], seen[~often].sum())
    expected = np.append(expected[often], expected[~often].sum())
    chi_square, freedom = float(((observed - expected) ** 2 / expected).sum()), len(expected) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


@given(st.lists(st.integers(0, 3), min_size=1, max_size=60), st.integers(1, 8), st.integers(1, 20))
@settings(deadline=None)
def test_lookup_finds_what_followed_the_latest_same_three_tokens(ids, most, step):
    lookup = PromptLookup()
    for end in [*range(1, len(ids), step), len(ids)]:
        known = ids[:end]
        guess = lookup.draft(known, most)
        starts = (
            [n for n in range(len(known) - 3) if known[n : n + 3] == known[-3:]]
            if len(known) >= 3
            else []
        )
        assert guess == (known[starts[-1] + 3 :][:most] if starts else [])


def test_the_draft_length_adapts():
    length = DraftLength(16)
    lengths = []
    for right in (4, 8, 16, 0, 0, 0, 0, 0):
        lengths.append(length.next(99))
        length.update(lengths[-1], min(right, lengths[-1]))
    assert lengths == [4, 8, 16, 16, 8, 4, 2, 1]
    waits = [length.next(99) for _ in range(40)]
    assert waits[0] == 0
    assert waits[-1] == 1


def test_a_stop_within_a_draft_ends_the_answer_there():
    plain = plain_greedy(NETWORK, WORDS, [5, 6, 7, 8] * 6, 40)[0]
    stop = plain[20]
    sampling = Sampling(max_tokens=40, stop_ids=(stop,))
    (output,) = engine(8, CLOSE).generate([[5, 6, 7, 8] * 6], sampling)
    assert output.token_ids == plain[: plain.index(stop)]
    assert output.text == WORDS.decode(output.token_ids)
