"""Best-fit packing: nothing lost, nothing over the budget, little left over."""

import gzip
import json
import os
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from openqwen.train.packing import pack, waste

SHARED = Path(os.environ.get("OPENQWEN_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))


@given(st.lists(st.integers(1, 120), max_size=80), st.integers(1, 100))
def test_every_item_stands_in_one_row_and_no_row_is_too_full(sizes, budget):
    rows = pack(sizes, budget)
    assert sorted(i for row in rows for i in row) == list(range(len(sizes)))
    for row in rows:
        assert len(row) == 1 or sum(sizes[i] for i in row) <= budget


@given(st.lists(st.integers(1, 50), min_size=1, max_size=60))
def test_at_most_one_row_is_less_than_half_full(sizes):
    rows = pack(sizes, 50)
    assert sum(2 * sum(sizes[i] for i in row) < 50 for row in rows) <= 1


def test_the_row_that_fits_best_is_taken():
    assert pack([6, 5, 4, 5], 10) == [[0, 2], [1, 3]]
    assert pack([], 10) == []
    assert waste([], 10) == 0.0


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"no shared data at {SHARED}")
def test_conversations_waste_under_one_percent():
    lines = (
        gzip.decompress((SHARED / "eval" / "gsm8k_train.jsonl.gz").read_bytes())
        .decode()
        .split("\n")
    )
    # A token is about three bytes here; the shape of the distribution is what matters.
    sizes = [len(" ".join(map(str, json.loads(line).values()))) // 3 for line in lines if line]
    assert len(sizes) > 7_000
    for budget in (2_048, 8_192, 32_768):
        assert waste(sizes, budget) < 0.01
