"""The preference losses and GRPO against their equations, in float64.

benchmarks/losses_trl.py compares the same functions with TRL's.
"""

import math

import pytest
import torch
from torch.testing import assert_close

from openqwen.train import losses
from openqwen.train.losses import group_advantages

POLICY = [[-1.0, -2.5], [-4.0, -0.5], [-3.0, -3.0]]
REFERENCE = [[-1.5, -2.0], [-3.0, -1.5], [-2.0, -4.0]]
LENGTHS = [[2, 5], [4, 1], [3, 3]]


def sigmoid(x):
    return 1 / (1 + math.exp(-x))


def tensors():
    policy = torch.tensor(POLICY, dtype=torch.float64, requires_grad=True)
    return policy, torch.tensor(REFERENCE, dtype=torch.float64), torch.tensor(LENGTHS)


def margins(by_length):
    ratios = [
        [(p - r) / (n if by_length else 1) for p, r, n in zip(*rows)]
        for rows in zip(POLICY, REFERENCE, LENGTHS)
    ]
    return [plus - minus for plus, minus in ratios]


@pytest.mark.parametrize("by_length", [False, True])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_cdpo_is_its_closed_form(by_length, smoothing):
    policy, reference, lengths = tensors()
    beta, divisor = 0.4, lengths if by_length else None
    loss = losses.dpo(policy, reference, beta, smoothing, divisor)
    expected, slopes = 0.0, []
    for margin in margins(by_length):
        s = sigmoid(beta * margin)
        expected -= (1 - smoothing) * math.log(s) + smoothing * math.log(1 - s)
        slopes.append(beta * (s - (1 - smoothing)))  # d loss / d margin
    assert loss.count == 3
    assert loss.sum.item() == pytest.approx(expected, abs=1e-12)
    loss.sum.backward()
    signs = torch.tensor([1.0, -1.0], dtype=torch.float64)
    wanted = torch.tensor(slopes, dtype=torch.float64)[:, None] * signs
    assert_close(policy.grad, wanted / (lengths if by_length else 1), rtol=0, atol=1e-12)


@pytest.mark.parametrize("by_length", [False, True])
def test_ipo_is_its_closed_form(by_length):
    policy, reference, lengths = tensors()
    loss = losses.ipo(policy, reference, 0.4, lengths if by_length else None)
    expected = sum((margin - 1 / 0.8) ** 2 for margin in margins(by_length))
    assert loss.sum.item() == pytest.approx(expected, abs=1e-12)
    right = sum(margin > 0 for margin in margins(by_length))
    assert loss.extras["accuracy"] == right
    assert loss.extras["margin"] == pytest.approx(0.4 * sum(margins(by_length)))


@pytest.mark.parametrize("divergence", [0.7, -0.3])
def test_kto_is_its_closed_form(divergence):
    policy = torch.tensor([-1.0, -2.0, -3.0], dtype=torch.float64, requires_grad=True)
    reference = torch.tensor([-1.5, -1.0, -3.5], dtype=torch.float64)
    good = torch.tensor([True, False, False])
    loss = losses.kto(policy, reference, good, divergence, 0.5, 1.5, 0.5)
    z = max(divergence, 0.0)
    first, second, third = (sigmoid(x) for x in (0.5 * (0.5 - z), 0.5 * (z + 1.0), 0.5 * (z - 0.5)))
    expected = 1.5 * (1 - first) + 0.5 * (1 - second) + 0.5 * (1 - third)
    assert (loss.sum.item(), loss.count) == (pytest.approx(expected, abs=1e-12), 3)
    assert loss.extras["accuracy"] == 2
    loss.sum.backward()
    slopes = [-1.5 * first * (1 - first), 0.5 * second * (1 - second), 0.5 * third * (1 - third)]
    wanted = 0.5 * torch.tensor(slopes, dtype=torch.float64)
    assert_close(policy.grad, wanted, rtol=0, atol=1e-12)


def by_hand(policy, old, reference, sampler, advantages, lengths, beta, clip, aggregate, longest):
    """Equation 3 of DeepSeekMath, token by token, with what DAPO and Dr. GRPO change in it."""
    total, place = 0.0, 0
    for advantage, length in zip(advantages, lengths):
        terms = []
        for n in range(place, place + length):
            ratio = math.exp(policy[n] - old[n])
            clipped = min(max(ratio, 1 - clip[0]), 1 + clip[1])
            weight = min(math.exp(old[n] - sampler[n]), 2.0) if sampler[n] is not None else 1.0
            x = reference[n] - policy[n]
            objective = weight * min(ratio * advantage, clipped * advantage)
            terms.append(objective - beta * (math.exp(x) - x - 1))
        place += length
        share = {"answer": 1 / length, "token": 1.0, "constant": 1 / longest}[aggregate]
        total -= share * sum(terms)
    return total


@pytest.mark.parametrize("aggregate", ["answer", "token", "constant"])
@pytest.mark.parametrize("clip", [(0.2, 0.2), (0.1, 0.4)])
def test_grpo_is_its_equation(aggregate, clip):
    draw = torch.Generator().manual_seed(3)
    lengths, advantages = [3, 1, 4], [0.8, -1.3, 0.5]

    def drawn():
        return -torch.rand(8, generator=draw, dtype=torch.float64)

    policy, old, reference, sampler = drawn().requires_grad_(), drawn(), drawn(), drawn()
    sampler[2] = math.nan  # it did not tell
    given = torch.tensor(advantages, dtype=torch.float64)
    settings = {"beta": 0.2, "clip": clip, "aggregate": aggregate, "longest": 9}
    loss = losses.grpo(policy, given, lengths, old, reference, sampler, **settings)
    told = [None if math.isnan(x) else x for x in sampler.tolist()]
    numbers = [x.tolist() for x in (policy, old, reference)]
    wanted = by_hand(*numbers, told, advantages, lengths, 0.2, clip, aggregate, 9)
    assert loss.sum.item() == pytest.approx(wanted, abs=1e-12)
    assert loss.count == (8 if aggregate == "token" else 3)
    loss.sum.backward()
    step = 1e-6
    for n in range(8):  # the derivative by central differences
        moved = []
        for side in (step, -step):
            other = numbers[0].copy()
            other[n] += side
            rest = (*numbers[1:], told, advantages, lengths, 0.2, clip, aggregate, 9)
            moved.append(by_hand(other, *rest))
        assert policy.grad[n].item() == pytest.approx((moved[0] - moved[1]) / (2 * step), abs=1e-7)


def test_the_first_step_has_the_gradient_of_the_log_probability():
    """Without old numbers the ratio is 1, and its gradient is kept."""
    policy = torch.tensor([-1.0, -2.0, -0.5], dtype=torch.float64, requires_grad=True)
    loss = losses.grpo(policy, torch.tensor([2.0, -1.0], dtype=torch.float64), [2, 1])
    assert loss.sum.item() == pytest.approx(-(2.0 - 1.0))
    assert loss.extras["entropy"] == pytest.approx((1.0 + 2.0) / 2 + 0.5)
    loss.sum.backward()
    assert_close(policy.grad, torch.tensor([-1.0, -1.0, 1.0], dtype=torch.float64))


def test_advantages_are_over_the_deviation_of_the_group():
    rewards = [1.0, 0.0, 0.0, 1.0, 0.5]
    deviation = math.sqrt(sum((r - 0.5) ** 2 for r in rewards) / 5)
    expected = [(r - 0.5) / (deviation + 1e-4) for r in rewards]
    assert group_advantages(rewards) == pytest.approx(expected)
    assert group_advantages(rewards, scale=False) == pytest.approx([r - 0.5 for r in rewards])
    assert group_advantages([0.3, 0.3, 0.3 + 1e-8]) == [0.0, 0.0, 0.0]
    assert any(group_advantages([1e-3, 2e-3]))
