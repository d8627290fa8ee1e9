"""One prompt with several answers against the same answers each behind a prompt of its own."""

import numpy as np
import pytest
import torch
from test_losses import tiny
from torch.testing import assert_close

from openqwen.train.branches import pack_answers
from openqwen.train.losses import document_log_probs
from openqwen.train.packed_batch import PackedBatch


def groups(seed, count=7):
    rng = np.random.default_rng(seed)

    def ids(low, high):
        return rng.integers(0, 96, int(rng.integers(low, high))).tolist()

    return [(ids(1, 12), [ids(1, 9) for _ in range(int(rng.integers(1, 5)))]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(3))
def test_log_probs_and_gradients_are_those_of_separate_rows(seed):
    model, given = tiny(seed), groups(seed)
    alone = PackedBatch.of(
        [(p + a, [0] * len(p) + [1] * len(a)) for p, answers in given for a in answers]
    )
    shared = pack_answers(given)
    assert len(shared.tokens) < len(alone.tokens)
    assert shared.counts == alone.counts
    weights = torch.linspace(-1, 1, len(alone.counts))
    found = []
    for rows in (alone, shared):
        log_probs = document_log_probs(model, rows)
        (log_probs * weights).sum().backward()
        found.append((log_probs.detach(), [p.grad.clone() for p in model.parameters()]))
        model.zero_grad()
    assert_close(found[0][0], found[1][0], rtol=1e-5, atol=1e-5)
    for one, other in zip(found[0][1], found[1][1]):
        assert_close(one, other, rtol=1e-4, atol=1e-5 * float(one.abs().max()))


def test_an_answer_does_not_see_another():
    model = tiny()
    prompt, one, other = [1, 2, 3], [4, 5, 6], [7, 8]
    alone = document_log_probs(model, pack_answers([(prompt, [one])]))
    beside = document_log_probs(model, pack_answers([([9], [[1]]), (prompt, [other, one, other])]))
    assert_close(alone[0], beside[2], rtol=1e-6, atol=1e-6)
    assert_close(beside[1], beside[3], rtol=0, atol=1e-6)
