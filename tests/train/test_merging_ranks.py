"""Merged steps give the same weights, to the bit, on any number of ranks and however they shard."""

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from test_parallel import start

SCRIPT = Path(__file__).with_name("merging_ranks.py")
KINDS = ("dense", "experts")
TWO = ["inverse:dense", "none:dense:tensor=2", "ties:dense:tensor=2", "ties:experts:expert=2"]
MORE = ["few:dense", "few:dense:tensor=2", "inverse:dense:tensor=2", "inverse:experts:expert=2"]
MORE += ["ties:dense:context=2", "none:experts:tensor=2", "ties:experts"]
FOUR = ["inverse:dense:tensor=2", "ties:dense:tensor=2", "few:dense:tensor=2:context=2"]
FOUR += ["ties:dense", "none:experts:tensor=2:expert=2", "ties:experts:tensor=2:expert=2"]
FOUR += ["few:experts:expert=4", "inverse:experts:expert=2:context=2"]


def run(folder, ranks, cases, half=False):
    folder.mkdir(exist_ok=True)
    start(ranks, SCRIPT, folder, "half" if half else "whole", *cases)
    return {case: load_file(folder / f"{case}.safetensors") for case in cases}


@pytest.fixture(scope="module")
def one(tmp_path_factory):
    cases = [
        f"{setting}:{kind}" for setting in ("inverse", "none", "ties", "few") for kind in KINDS
    ]
    return run(tmp_path_factory.mktemp("one"), 1, cases)


def same_weights(found, one):
    for case, weights in found.items():
        expected = one[":".join(case.split(":")[:2])]
        assert weights.keys() == expected.keys()
        for name, weight in weights.items():
            assert torch.equal(weight, expected[name]), (case, name)


def test_two_ranks_give_one_ranks_bits(one, tmp_path):
    same_weights(run(tmp_path, 2, TWO), one)


def test_a_resumed_run_on_two_ranks_gives_them_too(one, tmp_path):
    same_weights(run(tmp_path, 2, ["ties:dense:tensor=2", "none:dense"], half=True), one)


@pytest.mark.slow
def test_two_ranks_in_other_layouts(one, tmp_path):
    same_weights(run(tmp_path, 2, MORE), one)


@pytest.mark.slow
def test_four_ranks_give_one_ranks_bits(one, tmp_path):
    same_weights(run(tmp_path, 4, FOUR), one)


@pytest.mark.slow
def test_without_the_compiled_step_too(one, tmp_path, monkeypatch):
    monkeypatch.setenv("OPENQWEN_NATIVE", "0")
    same_weights(run(tmp_path / "one", 1, ["few:experts", "none:dense"]), one)
    same_weights(run(tmp_path / "two", 2, TWO), one)
