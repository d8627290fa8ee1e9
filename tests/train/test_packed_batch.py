"""A beginning that conversations share is computed once, and nothing else changes."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.testing import assert_close

from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.train.losses import document_log_probs, next_token
from openqwen.train.packed_batch import PackedBatch, common_beginning
from openqwen.train.packing import pack


def tiny(**fields):
    model = Qwen2(ModelConfig(96, 32, 48, 2, 4, 2, max_position_embeddings=64, **fields))
    initialize(model, torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in model.parameters():
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)) * 0.2)
    return model


def conversations(seed, count=4, shared=11):
    rng = np.random.default_rng(seed)
    start = rng.integers(0, 96, shared).tolist()
    found = []
    for _ in range(count):
        asked, said = (
            rng.integers(0, 96, int(rng.integers(1, 9))).tolist(),
            rng.integers(0, 96, 5).tolist(),
        )
        found.append((start + asked + said, [0] * (shared + len(asked)) + [1] * len(said)))
    return found


def gradient(model, rows):
    model.zero_grad()
    loss = next_token(model, rows)
    loss.sum.backward()
    return loss.sum.item(), {n: p.grad.clone() for n, p in model.named_parameters()}


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 10**6), count=st.integers(2, 6), shared=st.integers(8, 30))
def test_loss_and_gradient_are_those_of_documents_apart(seed, count, shared):
    model, data = tiny(), conversations(seed, count, shared)
    apart, together = PackedBatch.of(data), PackedBatch.of(data, share=True)
    assert together.spared >= (count - 1) * shared
    assert len(together.tokens) + together.spared == len(apart.tokens)
    assert together.counts == apart.counts
    loss, grads = gradient(model, apart)
    found, found_grads = gradient(model, together)
    assert found == pytest.approx(loss, rel=1e-5)
    for name, g in grads.items():
        assert_close(found_grads[name], g, rtol=1e-3, atol=1e-5 * g.abs().max().item() + 1e-7)
    with torch.no_grad():
        assert_close(
            document_log_probs(model, together),
            document_log_probs(model, apart),
            rtol=1e-5,
            atol=1e-4,
        )


@settings(max_examples=25, deadline=None)
@given(
    seed=st.integers(0, 10**6), budget=st.integers(1, 200), share=st.booleans(), order=st.randoms()
)
def test_any_cut_into_packs_gives_one_loss_and_one_gradient(seed, budget, share, order):
    model, data = tiny(tie_word_embeddings=bool(seed % 2)), conversations(seed, count=5)
    loss, grads = gradient(model, PackedBatch.of(data))
    order.shuffle(data)
    model.zero_grad()
    total, count = 0.0, 0
    for numbers in pack([len(ids) for ids, _ in data], budget):
        part = next_token(model, PackedBatch.of([data[i] for i in numbers], share=share))
        part.sum.backward()
        total, count = total + part.sum.item(), count + part.count
    assert count == sum(sum(mask) for _, mask in data)
    assert total == pytest.approx(loss, rel=1e-5)
    for name, p in model.named_parameters():
        assert_close(
            p.grad, grads[name], rtol=1e-3, atol=1e-5 * grads[name].abs().max().item() + 1e-7
        )


@given(sizes=st.lists(st.integers(1, 40), max_size=30), budget=st.integers(1, 60))
def test_packs_hold_everything_once_and_depend_on_the_sizes_alone(sizes, budget):
    """So a resumed run packs as the uninterrupted one: there is no state to lose."""
    rows = pack(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    assert all(len(row) == 1 or sum(sizes[i] for i in row) <= budget for row in rows)
    assert rows == pack(list(sizes), budget)


def test_what_is_shared():
    same, mask = list(range(12)), [0] * 12
    assert common_beginning([(same, mask)]) == 0
    assert (
        common_beginning([([*same[:6], 50, 51], mask), ([*same[:6], 60, 61], mask)]) == 0
    )  # too short to pay
    assert (
        common_beginning([([*same, 50, 51], [*mask, 0, 1]), ([*same, 60, 61], [*mask, 0, 1])]) == 12
    )
    # The token before the first target must be each conversation's own: it predicts different
    # things.
    assert (
        common_beginning([([*same, 50, 51], [*mask, 1, 1]), ([*same, 60, 61], [*mask, 1, 1])]) == 11
    )
    assert common_beginning([(same, mask), (same, mask)]) == 10
    early = [0] * 9 + [1] * 5
    assert common_beginning([([*same, 50, 51], early), ([*same, 60, 61], [*mask, 0, 1])]) == 8
