"""What is drawn, against transformers' logits processors and the distribution itself."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    LogitsProcessorList,
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from openqwen.engine import Sampling, sampler, seeds
from openqwen.engine.sampler import SamplingRow, penalize, sample, top_of
from openqwen.engine.seeds import draws, seed_of


def random_scores(rows, width, spread=3.0, seed=0):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * spread


def processed(scores_RV, sampling):
    """The distribution that transformers would draw from."""
    warpers = LogitsProcessorList([TemperatureLogitsWarper(sampling.temperature)])
    if sampling.top_k:
        warpers.append(TopKLogitsWarper(sampling.top_k))
    if sampling.top_p < 1:
        warpers.append(TopPLogitsWarper(sampling.top_p))
    if sampling.min_p > 0:
        warpers.append(MinPLogitsWarper(sampling.min_p))
    return torch.softmax(warpers(None, scores_RV), -1)


@settings(max_examples=60, deadline=None)
@given(
    st.sampled_from([33, 320, 5120]),
    st.sampled_from([0.3, 1.0, 2.5]),
    st.sampled_from([0, 1, 5, 70, 2000]),
    st.sampled_from([1.0, 0.9, 0.5, 0.05]),
    st.sampled_from([0.0, 0.1, 1.0]),
    st.sampled_from([0.5, 4.0]),
)
def test_every_cut_gives_the_distribution_of_transformers(
    width, temperature, top_k, top_p, min_p, spread
):
    """64 draws of one row: each token's probability, and the set of possible tokens."""
    scores_RV = random_scores(2, width, spread)
    sampling = Sampling(temperature=temperature, top_k=min(top_k, width), top_p=top_p, min_p=min_p)
    truth_RV = processed(scores_RV.clone(), sampling)
    for row, truth_V in enumerate(truth_RV):
        rows = [SamplingRow(sampling, seed, 0) for seed in range(64)]
        found = sample(scores_RV[row].expand(64, -1).clone(), rows, width)
        for token, logprob, drawn in zip(found.tokens, found.logprobs, found.drawn_logprobs):
            assert truth_V[token] > 0
            assert drawn == pytest.approx(float(truth_V[token].log()), abs=1e-4)
            assert logprob == pytest.approx(
                float(torch.log_softmax(scores_RV[row], -1)[token]), abs=1e-4
            )


@pytest.mark.parametrize("options", [{}, {"top_p": 0.9}, {"top_k": 30, "min_p": 0.02}], ids=str)
def test_draws_follow_the_distribution(options):
    """Chi-square over 20,000 seeds is within five standard deviations of its mean."""
    scores_RV, sampling = random_scores(1, 256, 2.0), Sampling(temperature=0.8, **options)
    truth_V = processed(scores_RV.clone(), sampling)[0].double().numpy()
    count = 20_000
    found = sample(
        scores_RV.expand(count, -1).clone(),
        [SamplingRow(sampling, seed, 3) for seed in range(count)],
        256,
    )
    seen_V = np.bincount(found.tokens, minlength=256)
    often = truth_V * count >= 5
    expected = np.append(truth_V[often] * count, truth_V[~often].sum() * count)
    observed = np.append(seen_V[often], seen_V[~often].sum())
    fit = expected > 0
    chi_square = float(((observed - expected)[fit] ** 2 / expected[fit]).sum())
    freedom = int(fit.sum()) - 1
    assert abs(chi_square - freedom) < 5 * np.sqrt(2 * freedom)


def test_draws_are_those_of_split_mix():
    """The published outputs for the seed 1234567; the first one is the key of the second stream."""
    keys = seeds._split_mix(np.uint64(1234567) + seeds._GAMMA * np.arange(3, dtype=np.uint64))
    assert keys.tolist() == [6457827717110365317, 3203168211198807973, 9817491932198370423]
    words = seeds._split_mix(keys[:1] + seeds._GAMMA * np.arange(3, dtype=np.uint64))
    assert draws([1234567] * 3, range(3)).tolist() == [(int(word) >> 11) / 2**53 for word in words]


def test_no_single_cell_is_special():
    """Seed 0 at place 0 was exactly 0, so that every first token was token 0."""
    edges = [0, 1, -1, 2**31, 2**32, 2**62, 2**63, 2**64 - 1, 7]
    for name, cells in {
        "seed 0": draws([0] * 4096, range(4096)),
        "place 0": draws(range(4096), [0] * 4096),
        "edges": draws(edges, [0] * len(edges)),
        "prompts of seed 0": draws([seed_of(0, n) for n in range(4096)], [0] * 4096),
    }.items():
        assert cells.min() > 1e-6, name
        assert cells.max() < 1 - 1e-6, name
        assert len(np.unique(cells)) == len(cells) - (name == "edges"), name  # -1 is 2^64 - 1
    sampling, scores_RV = Sampling(temperature=1.0), torch.zeros(64, 128)
    first = [
        sample(scores_RV[:1].clone(), [SamplingRow(sampling, 0, place)], 128).tokens[0]
        for place in range(3)
    ]
    assert 0 not in first


@pytest.mark.parametrize("axis", ["seeds", "places", "prompts", "samples"])
def test_draws_are_independent_along_every_axis(axis):
    """256 × 256 draws are uniform in every row, column and pair of rows or columns."""
    size = 256
    first = np.repeat(np.arange(size), size).tolist()
    second = np.tile(np.arange(size), size).tolist()
    seeds = {
        "seeds": first,
        "places": [0] * len(first),
        "prompts": [seed_of(0, n) for n in first],
        "samples": [seed_of(n, m) for n, m in zip(first, second)],
    }[axis]
    places = {"places": range(size * size), "samples": [0] * len(first)}.get(axis, second)
    table = draws(seeds, places).reshape(size, size)
    for lines in (table, table.T):
        counts = np.stack([np.histogram(line, 16, (0, 1))[0] for line in lines])
        chi_square = ((counts - size / 16) ** 2 / (size / 16)).sum(-1)  # 15 degrees of freedom
        assert chi_square.max() < 55  # once in 400,000
        assert abs(chi_square.mean() - 15) < 5 * np.sqrt(30 / size)
        for apart in (1, 2, 3, 16, 64, 128):
            pairs, _, _ = np.histogram2d(
                lines[:-apart].ravel(), lines[apart:].ravel(), 8, ((0, 1), (0, 1))
            )
            expected = (size - apart) * size / 64
            assert ((pairs - expected) ** 2 / expected).sum() < 63 + 6 * np.sqrt(126)
    for first, second in ((table[0], table.mean(0)), (table[:, 0], table.mean(1))):
        assert abs(np.corrcoef(first, second)[0, 1]) < 0.35


def test_seeds_of_many_answers():
    assert draws([-1, 2**70 + 3], [0, 0]).tolist() == draws([2**64 - 1, 3], [0, 0]).tolist()
    assert seed_of(7, 0) == 7
    assert len({seed_of(seed, index) for seed in range(100) for index in range(100)}) == 10_000


def test_rows_do_not_touch_each_other():
    kinds = [
        Sampling(temperature=1.0),
        Sampling(),
        Sampling(temperature=0.7, top_p=0.8),
        Sampling(temperature=1.0, repetition_penalty=1.5),
        Sampling(logit_bias=((3, 50.0),)),
    ]
    scores_RV = random_scores(5, 320)
    rows = [SamplingRow(kind, 11, 2, prompt=[1, 2, 3], answer=[4, 4]) for kind in kinds]
    together = sample(scores_RV.clone(), rows, 300)
    for n, row in enumerate(rows):
        alone = sample(scores_RV[n : n + 1].clone(), [row], 300)
        assert alone.tokens == together.tokens[n : n + 1]
        for name in ("logprobs", "drawn_logprobs"):
            assert getattr(alone, name) == pytest.approx(
                getattr(together, name)[n : n + 1], abs=1e-5
            )
    assert together.tokens[4] == 3
    assert together.drawn_logprobs[1] == 0


@given(
    st.lists(st.integers(0, 49), max_size=30),
    st.lists(st.integers(0, 49), max_size=30),
    st.floats(0.5, 2.0),
)
def test_penalties_are_those_of_transformers_and_of_the_api(prompt, answer, penalty):
    scores_V = random_scores(1, 50)[0]
    repeated = scores_V.clone()
    penalize(repeated, Sampling(repetition_penalty=penalty), prompt, answer)
    ids = torch.tensor([prompt + answer], dtype=torch.long)
    assert torch.allclose(
        repeated, RepetitionPenaltyLogitsProcessor(penalty)(ids, scores_V[None].clone())[0]
    )
    counted = scores_V.clone()
    bias = ((5, 1.5), (5, 0.5), (7, -2.0))
    penalize(
        counted,
        Sampling(presence_penalty=0.7, frequency_penalty=0.2, logit_bias=bias),
        prompt,
        answer,
    )
    for token in range(50):
        off = (
            0.2 * answer.count(token) + 0.7 * (token in answer) - {5: 2.0, 7: -2.0}.get(token, 0.0)
        )
        assert float(counted[token]) == pytest.approx(float(scores_V[token]) - off, abs=1e-5)


@given(st.integers(1, 100), st.sampled_from([128, 1280, 12800]), st.integers(0, 9))
@settings(deadline=None)
def test_the_largest_are_found_without_a_sort(count, width, seed):
    scores_RV = random_scores(3, width, seed=seed)
    scores_RV[1, : width // 2] = -torch.inf
    values, ids = top_of(scores_RV, count)
    expected = scores_RV.topk(count, dim=-1)
    assert values.tolist() == expected.values.tolist()
    assert scores_RV.gather(1, ids).tolist() == values.tolist()


@given(
    st.sampled_from([33, 320, 5120]),
    st.sampled_from([0.2, 1.0, 3.0]),
    st.integers(0, 9),
    st.booleans(),
)
@settings(deadline=None)
def test_block_sums_in_plain_pytorch_and_in_cpp(width, temperature, seed, masked):
    scores_RV = random_scores(3, width, 8.0, seed)
    if masked:
        scores_RV[:, width // 3 :] = -torch.inf
    temperature_R = torch.full((3,), temperature)
    truth_R = torch.logsumexp(scores_RV.double() / temperature, -1)
    for kernel in (sampler._kernel, lambda: None):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(sampler, "_kernel", kernel)
            peak_R, sums_RB = sampler.block_sums(scores_RV, temperature_R)
            assert torch.equal(peak_R, scores_RV.amax(-1))
            assert (peak_R / temperature + sums_RB.sum(-1).log()).tolist() == pytest.approx(
                truth_R.tolist(), rel=1e-5
            )
            assert sampler.normalizers(scores_RV, temperature_R).tolist() == pytest.approx(
                truth_R.tolist(), rel=1e-6
            )


@pytest.mark.parametrize("temperature", [1e-50, 1e-38, 1e-6])
def test_a_tiny_temperature_takes_the_likeliest_token(temperature):
    scores_RV = random_scores(3, 320)
    sampling = Sampling(temperature=temperature, top_p=0.9)
    rows = [SamplingRow(sampling, seed, 0) for seed in range(3)]
    assert sample(scores_RV.clone(), rows, 320).tokens == scores_RV.argmax(1).tolist()
