"""The published vocabulary against transformers: mixed text of many scripts, fuzzed strings,
chats.
"""

import importlib.util
import sys
from pathlib import Path

import pytest

BENCHMARKS = Path(__file__).parent.parent.parent / "benchmarks"


@pytest.fixture(scope="module")
def ids_benchmark():
    """benchmarks/tokenizer_ids.py, of which this is the small form."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        spec = importlib.util.spec_from_file_location(
            "tokenizer_ids", BENCHMARKS / "tokenizer_ids.py"
        )
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        yield module
    finally:
        sys.path.remove(str(BENCHMARKS))


def compare(module, tokenizer, strings, size):
    texts = [
        *(("fuzzed strings", text) for text in module.fuzzed(strings, seed=7)),
        *module.mixed(size),
    ]
    return module.differences(tokenizer, module.reference(tokenizer), iter(texts))


def test_ids_equal_transformers(real, ids_benchmark):
    assert compare(ids_benchmark, real, strings=2000, size=1_000_000) == 0


@pytest.mark.slow
def test_ids_equal_transformers_on_fifty_megabytes(real, ids_benchmark):
    assert compare(ids_benchmark, real, strings=100_000, size=50_000_000) == 0
