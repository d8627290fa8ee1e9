"""Fill-in-the-middle as this code writes it is what Qwen2.5-Coder has learned: it knows the
middle.
"""

import os
from pathlib import Path

import numpy as np
import pytest
import torch

from openqwen.model import load_model
from openqwen.tokenizer import load_tokenizer
from openqwen.train.fill_in_middle import fill_in_middle
from openqwen.train.losses import token_log_probs
from openqwen.train.packed_batch import PackedBatch

FILE = "qwen2.5-coder-0.5b-instruct-q4_k_m.gguf"
REAL = Path(
    os.environ.get("OPENQWEN_REAL_CHECKPOINT", Path.home() / ".cache" / "real-checkpoint" / FILE)
)
BEFORE = "def area(width, height):\n"
MIDDLE = "    zebra = width * height"  # nobody would guess that name without the suffix
AFTER = "\n    return zebra\n"


@pytest.mark.slow
@pytest.mark.skipif(not REAL.is_file(), reason=f"no real checkpoint at {REAL}")
def test_qwen25_coder_knows_the_middle_from_both_sides():
    tokenizer = load_tokenizer(REAL)
    text = BEFORE + MIDDLE + AFTER
    ids = np.array([*tokenizer.encode(text), tokenizer.endoftext_id])
    cuts = [(len(part) + 0.5) / (len(text) + 1) for part in (BEFORE, BEFORE + MIDDLE)]
    moved = fill_in_middle(tokenizer, ids, cuts)
    spelled = f"<|fim_prefix|>{BEFORE}<|fim_suffix|>{AFTER}<|fim_middle|>{MIDDLE}<|endoftext|>"
    assert moved.tolist() == tokenizer.encode(spelled, allow_control=True)

    middle = len(tokenizer.encode(MIDDLE))
    model = load_model(REAL)
    head, tail = moved[: -middle - 1], moved[-middle - 1 :]
    markers = [tokenizer.control_ids[f"<|fim_{name}|>"] for name in ("prefix", "suffix", "middle")]
    suffix_lost = np.concatenate([head[: head.tolist().index(markers[1]) + 1], head[-1:]])
    samples = [
        (np.concatenate([start, tail]).astype(np.int64), [0] * len(start) + [1] * middle + [0])
        for start in (head, suffix_lost)
    ]
    with torch.no_grad():
        scores = token_log_probs(model, PackedBatch.of(samples)).split(middle)
    assert float(scores[0].mean()) > -0.3
    assert float(scores[0].sum()) > float(scores[1].sum()) + 5
