"""Quantised weights of the real checkpoint: what they cost, on code of ours
(benchmarks/perplexity.py has more).
"""

import os
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from openqwen import load_model, load_tokenizer
from openqwen.model import Packed
from openqwen.model.quantize import bits_per_weight, quantize

PATH = Path(
    os.environ.get(
        "OPENQWEN_REAL_CHECKPOINT",
        Path.home() / ".cache/real-checkpoint/qwen2.5-coder-0.5b-instruct-q4_k_m.gguf",
    )
)
TEXT = Path(__file__).parent / "test_quantize.py"


def loss(model, ids):
    with torch.inference_mode():
        hidden = model(ids, torch.arange(len(ids)), Packed.from_lengths([len(ids)]))
        return F.cross_entropy(model.logits(hidden[:-1]), ids[1:]).item()


@pytest.mark.slow
@pytest.mark.skipif(not PATH.is_file(), reason=f"the real checkpoint is not here: {PATH}")
def test_perplexity():
    source = load_model(PATH)
    ids = torch.tensor(load_tokenizer(PATH).encode(TEXT.read_text(encoding="utf-8"))[:700])
    exact = loss(source, ids)
    for kind, bits, more in (("int8", 8.3, 0.01), ("int4", 5.2, 0.08)):
        made = quantize(source, kind)
        assert bits_per_weight(made) < bits
        assert loss(made, ids) - exact < more
