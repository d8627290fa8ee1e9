"""Pairs gathered by prompt, and cut at their first difference."""

import torch
from test_losses import tiny
from torch.testing import assert_close

from openqwen.train.dpo import DpoLossConfig, Pairs
from openqwen.train.losses import token_log_probs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.preferences import PreferenceGroup, group_by_prompt, pair_indices


def sample(prompt, answer):
    return prompt + answer, [0] * len(prompt) + [1] * len(answer)


def test_pairs_of_one_prompt_are_one_group_and_an_answer_stands_once():
    one, other = [1, 2, 3], [1, 2]
    pairs = [(sample(one, [4, 5]), sample(one, [6])), (sample(other, [4]), sample(other, [7]))]
    pairs += [
        (sample(one, [4, 5]), sample(one, [8, 8, 8])),
        (sample(one, [4, 5]), sample(one, [6])),
    ]
    groups = group_by_prompt(pairs)
    assert [group.prompt for group in groups] == [one, other]
    assert [group.answers for group in groups] == [[[4, 5], [6], [8, 8, 8]], [[4], [7]]]
    assert [group.pairs for group in groups] == [[(0, 1), (0, 2)], [(0, 1)]]
    assert pair_indices(groups).tolist() == [[0, 1], [0, 2], [3, 4]]
    assert (groups[0].size, groups[0].longest) == (9, 6)


def test_answers_are_cut_behind_their_first_difference():
    group = PreferenceGroup([1])
    group.add([5, 6, 7, 0], [5, 9, 7, 0])
    group.add([5, 6, 7, 0], [5, 9, 0])  # the same first error: the same pair
    group.add([5, 6, 7, 0], [5, 6, 7])  # one begins the other
    cut = group.to_first_difference()
    assert cut.answers == [[5, 6], [5, 9], [5, 6, 7, 0], [5, 6, 7]]
    assert cut.pairs == [(0, 1), (2, 3)]


def test_at_the_first_difference_the_gradient_is_that_of_the_two_tokens_alone():
    """What both answers share cancels: d margin = d log p(6 | 1 5) − d log p(9 | 1 5)."""
    model = tiny()
    group = PreferenceGroup([1])
    group.add([5, 6, 7, 0], [5, 9, 2])
    laid = Pairs.of([group.to_first_difference()], torch.zeros(2))
    laid.loss(model, DpoLossConfig(beta=1.0)).sum.backward()
    found = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    log_probs = token_log_probs(
        model, PackedBatch.of([([1, 5, 6], [0, 0, 1]), ([1, 5, 9], [0, 0, 1])])
    )
    margin = log_probs[0] - log_probs[1]
    torch.nn.functional.softplus(-margin).backward()
    for got, p in zip(found, model.parameters()):
        assert_close(got, p.grad, rtol=1e-4, atol=1e-5 * float(p.grad.abs().max()))
