"""Sequences cut by a token budget."""

import numpy as np
import pytest

from openqwen.support.batching import cut_to_budget


@pytest.mark.parametrize("budget", [1, 7, 20, 100, 10_000])
def test_runs_are_in_order_complete_within_the_budget_and_as_long_as_they_can_be(budget):
    sizes = np.random.default_rng(budget).integers(1, 30, 50).tolist()
    cuts = list(cut_to_budget(sizes, budget))
    assert [size for cut in cuts for size in sizes[cut]] == sizes
    for cut in cuts:
        assert sum(sizes[cut]) <= budget or cut.stop - cut.start == 1
        if cut.stop < len(sizes):
            assert sum(sizes[cut]) + sizes[cut.stop] > budget


def test_nothing_gives_no_run_and_empty_sequences_are_kept():
    assert list(cut_to_budget([], 10)) == []
    assert list(cut_to_budget([0, 12, 0, 3], 10)) == [slice(0, 1), slice(1, 2), slice(2, 4)]
