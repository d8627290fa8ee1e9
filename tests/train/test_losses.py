"""Losses and log-probabilities against closed forms and independent float64 transcriptions."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.testing import assert_close

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.support.batching import cut_to_budget
from openqwen.train import log_probs as module
from openqwen.train.dpo import DpoLossConfig, Pairs, reference_log_probs
from openqwen.train.log_probs import cross_entropy, log_probs
from openqwen.train.losses import bradley_terry, document_log_probs, next_token
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.preferences import group_by_prompt


def tiny(seed=0):
    model = Qwen2(
        ModelConfig(96, 32, 48, 2, 4, 2, max_position_embeddings=64, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(seed))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(seed + 1)) * 0.2)
    return model


def samples(count, seed, learned=0.5):
    rng = np.random.default_rng(seed)
    found = []
    for _ in range(count):
        n = int(rng.integers(3, 20))
        mask = (rng.random(n) < learned).astype(int)
        mask[-1] = 1
        found.append((rng.integers(0, 96, n).tolist(), mask.tolist()))
    return found


def preferences(count):
    """Pairs of answers, two pairs to a prompt."""
    rng = np.random.default_rng(7)

    def ids(low, high):
        return rng.integers(0, 96, int(rng.integers(low, high))).tolist()

    prompts = [ids(1, 12) for _ in range(count // 2)]
    return [
        tuple((prompt + a, [0] * len(prompt) + [1] * len(a)) for a in (ids(1, 8), ids(1, 8)))
        for prompt in prompts
        for _ in range(2)
    ]


@pytest.mark.parametrize("keep", [True, False])
def test_log_probs_and_gradients_equal_plain_cross_entropy(monkeypatch, keep):
    monkeypatch.setattr(module, "CHUNK", 7)
    monkeypatch.setattr(module, "KEEP_BYTES", 2**30 if keep else 0)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    head = torch.randn(30, 8, generator=generator, requires_grad=True)
    targets = torch.randint(0, 30, (20,), generator=generator)
    weights = torch.randn(20, generator=generator)
    mine = log_probs(hidden, head, targets)
    grads = torch.autograd.grad((mine * weights).sum(), (hidden, head))
    hidden64, head64 = (
        hidden.detach().double().requires_grad_(),
        head.detach().double().requires_grad_(),
    )
    theirs = -torch.nn.functional.cross_entropy(hidden64 @ head64.T, targets, reduction="none")
    expected = torch.autograd.grad((theirs * weights.double()).sum(), (hidden64, head64))
    assert_close(mine.double(), theirs, rtol=1e-5, atol=1e-5)
    for got, want in zip(grads, expected):
        assert_close(got.double(), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("block", [1, 30 * 4 * 7, 2**30])
@pytest.mark.parametrize("frozen", [False, True])
def test_cross_entropy_with_its_gradient_made_ahead_equals_plain_cross_entropy(
    monkeypatch, block, frozen
):
    monkeypatch.setattr(module, "BLOCK_BYTES", block)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(20, 8, generator=generator, requires_grad=True)
    head = torch.randn(30, 8, generator=generator, requires_grad=not frozen)
    targets = torch.randint(0, 30, (20,), generator=generator)
    mine = cross_entropy(hidden * 1.0, head, targets)
    (mine * 3.0).backward()
    hidden64, head64 = (
        hidden.detach().double().requires_grad_(),
        head.detach().double().requires_grad_(),
    )
    theirs = torch.nn.functional.cross_entropy(hidden64 @ head64.T, targets, reduction="sum")
    (theirs * 3.0).backward()
    assert_close(mine.double(), theirs, rtol=1e-6, atol=1e-6)
    assert_close(hidden.grad.double(), hidden64.grad, rtol=1e-4, atol=1e-5)
    if frozen:
        assert head.grad is None
    else:
        assert_close(head.grad.double(), head64.grad, rtol=1e-4, atol=1e-5)
    with torch.no_grad():
        assert_close(cross_entropy(hidden, head, targets), mine)


@pytest.mark.skipif(
    not all(map(importlib.util.find_spec, ("liger_kernel", "triton"))),
    reason="Liger-Kernel or Triton is not installed",
)
def test_ligers_cross_entropy_is_ours():
    """On the CPU, by Triton's interpreter; a GPU is what it is used on."""
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    script = Path(__file__).with_name("liger.py")
    done = subprocess.run([sys.executable, script], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    apart = [
        list(map(float, line.split()[1:]))
        for line in done.stdout.splitlines()
        if line.startswith("apart")
    ]
    exact, rounded = apart
    assert max(exact) < 1e-5
    assert max(rounded) < 3e-2
    assert "by Liger-Kernel" in done.stdout


def test_nothing_to_learn_is_a_sum_of_nothing():
    hidden, head = torch.randn(0, 8, requires_grad=True), torch.randn(30, 8, requires_grad=True)
    loss = cross_entropy(hidden, head, torch.empty(0, dtype=torch.long))
    loss.backward()
    assert loss.item() == 0
    assert head.grad.abs().max() == 0


@pytest.mark.parametrize("budget", [1, 25, 60, 10_000])
def test_the_gradient_does_not_depend_on_how_the_batch_is_cut(budget):
    model = tiny()
    data = samples(17, seed=3)

    def gradient(cut_budget):
        model.zero_grad()
        total, count = 0.0, 0
        for cut in cut_to_budget([len(ids) for ids, _ in data], cut_budget):
            loss = next_token(model, PackedBatch.of(data[cut]))
            loss.sum.backward()
            total, count = total + loss.sum.item(), count + loss.count
        return total / count, {n: p.grad / count for n, p in model.named_parameters()}

    whole, grads = gradient(10**6)
    cut, cut_grads = gradient(budget)
    assert cut == pytest.approx(whole, rel=1e-5)
    for name, g in grads.items():
        assert_close(cut_grads[name], g, rtol=1e-3, atol=1e-5 * g.abs().max().item() + 1e-7)


def test_cut_to_budget_keeps_order_and_bounds():
    sizes = [5, 3, 9, 1, 1, 20, 2]
    cuts = list(cut_to_budget(sizes, 9))
    assert [i for c in cuts for i in range(c.start, c.stop)] == list(range(len(sizes)))
    assert all(sum(sizes[c]) <= 9 or c.stop - c.start == 1 for c in cuts)


def test_dpo_loss_and_gradient_equal_the_published_formula_in_float64():
    """The sigmoid form of Rafailov et al. (2023, equation 7), as TRL computes it, transcribed in
    float64.
    """
    policy, reference, beta = tiny(0), tiny(9), 0.3
    pairs = preferences(6)
    groups = group_by_prompt(pairs)
    assert [len(group.pairs) for group in groups] == [2, 2, 2]
    laid = Pairs.of(groups, reference_log_probs(reference, groups, 50, "reference"))
    loss = laid.loss(policy, DpoLossConfig(beta=beta))
    loss.sum.backward()

    def sequence_log_prob(model, sample):
        ids, mask = torch.tensor(sample[0]), torch.tensor(sample[1], dtype=torch.float64)
        from openqwen.model import Packed

        one = Packed.from_lengths([len(ids)])
        logits = model.logits(model(ids, one.positions, one))
        per_token = torch.log_softmax(logits[:-1], -1).gather(1, ids[1:, None]).squeeze(1)
        return (per_token * mask[1:]).sum()

    doubled, fixed = tiny(0).double(), tiny(9).double()
    expected = torch.zeros((), dtype=torch.float64)
    for plus, minus in pairs:
        policy_ratio = sequence_log_prob(doubled, plus) - sequence_log_prob(doubled, minus)
        with torch.no_grad():
            reference_ratio = sequence_log_prob(fixed, plus) - sequence_log_prob(fixed, minus)
        expected = expected + torch.log1p(torch.exp(-beta * (policy_ratio - reference_ratio)))
    expected.backward()
    assert loss.count == 6
    assert loss.sum.item() == pytest.approx(expected.item(), rel=1e-5)
    grads = dict(doubled.named_parameters())
    for name, p in policy.named_parameters():
        want = grads[name].grad
        assert (p.grad.double() - want).abs().max() <= 1e-4 * want.abs().max(), name


def test_bradley_terry_closed_form():
    loss = bradley_terry(torch.tensor([1.0, 0.0]), torch.tensor([0.0, 2.0]))
    assert loss.sum.item() == pytest.approx(np.log1p(np.exp(-1.0)) + np.log1p(np.exp(2.0)))
    assert loss.extras == {"accuracy": 1.0, "margin": -1.0}


def test_the_anchor_adds_the_mean_token_nll_of_the_chosen_answers():
    policy, reference = tiny(0), tiny(9)
    pairs = preferences(4)
    groups = group_by_prompt(pairs)
    laid = Pairs.of(groups, reference_log_probs(reference, groups, 10_000, "reference"))
    config = DpoLossConfig(beta=0.1)
    with torch.no_grad():
        plain, anchored = (
            laid.loss(policy, config).sum,
            laid.loss(policy, config, chosen_nll=0.7).sum,
        )
        chosen = document_log_probs(policy, PackedBatch.of([chosen for chosen, _ in pairs]))
    lengths = torch.tensor([float(sum(mask)) for (_, mask), _ in pairs])
    assert_close(anchored - plain, -0.7 * (chosen / lengths).sum(), rtol=1e-4, atol=1e-5)
