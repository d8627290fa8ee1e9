"""DBSCAN and FP-Growth against scikit-learn and mlxtend, and against their definitions."""

import importlib.util
import json
from itertools import combinations
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from openqwen.instruct.collaborate.mining import association_rules, dbscan, frequent_sets

PEERS = json.loads((Path(__file__).parent / "mining_peers.json").read_text())
ITEMS = st.lists(st.lists(st.sampled_from("abcde"), max_size=6), max_size=12)


@pytest.fixture(scope="module")
def drawn():
    """The script that asked the peers; it draws the inputs."""
    path = Path(__file__).parents[2] / "benchmarks" / "instructions" / "peers.py"
    spec = importlib.util.spec_from_file_location("peers", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize("case", PEERS["clusters"], ids=lambda case: f"seed {case['seed']}")
def test_dbscan_finds_what_scikit_learn_finds(drawn, case):
    vectors = drawn.vectors(case["seed"], case["count"], case["width"])
    labels = dbscan(vectors, case["distance"], case["neighbours"])
    assert labels.tolist() == case["labels"]
    assert len(set(case["labels"])) > 2, "a case of one cluster would tell nothing"


@pytest.mark.parametrize("case", PEERS["sets"], ids=lambda case: f"seed {case['seed']}")
def test_fp_growth_finds_what_mlxtend_finds(drawn, case):
    some = drawn.transactions(case["seed"], case["count"])
    found = frequent_sets(some, case["support"], case["longest"])
    assert {"".join(sorted(s)): n for s, n in found.items()} == case["sets"]
    rules = association_rules(found, 0.8)
    told = sorted(["".join(r.given), r.then, round(r.confidence, 9)] for r in rules)
    assert told == case["rules"]
    assert told


@settings(deadline=None)  # the machine may be busy
@given(ITEMS, st.integers(1, 4), st.integers(1, 4))
def test_itemsets_are_counted_as_defined(some, support, longest):
    expected = {}
    for size in range(1, longest + 1):
        for items in combinations("abcde", size):
            count = sum(set(items) <= set(one) for one in some)
            if count >= support:
                expected[frozenset(items)] = count
    assert frequent_sets(some, support, longest) == expected


def test_no_vectors_and_no_transactions():
    assert dbscan(np.zeros((0, 4)), 0.05, 1).tolist() == []
    assert frequent_sets([], 1, 2) == {}
    assert association_rules({}, 0.99) == []


def test_more_vectors_than_one_block_of_distances():
    vectors = np.repeat(np.eye(3), 900, axis=0)
    assert dbscan(vectors, 0.05, 1).tolist() == [0] * 900 + [1] * 900 + [2] * 900
