"""DPO: the reference and the policy in the same numbers, and which pairs are left out."""

import json
import math

import pytest
import torch

from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.dpo import DpoConfig, dpo
from openqwen.train.trainer import Place


@pytest.fixture(scope="module")
def start(tmp_path_factory):
    folder = tmp_path_factory.mktemp("dpo")
    tokenizer = train_tokenizer(["Say one two three. " * 9], TokenizerConfig(vocabulary=270))
    sizes = {"max_position_embeddings": 256, "tie_word_embeddings": True}
    model = Qwen2(ModelConfig(384, 64, 96, 2, 4, 2, **sizes))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder)
    return folder, tokenizer


def turn(role, text):
    return [{"role": role, "content": text}]


def run(start, folder, origins, **fields):
    records = [
        {
            "prompt": turn("user", f"Say {n}."),
            "chosen": turn("assistant", "one " * (n + 1)),
            "rejected": turn("assistant", "two three " * (n + 1)),
            "origin": origin,
        }
        for n, origin in enumerate(origins)
    ]
    data = folder / "pairs.jsonl"
    data.write_text("".join(json.dumps(record) + "\n" for record in records))
    place = Place(folder / "out", folder / "scratch", 1, "dpo")
    metrics = dpo(DpoConfig(**fields), start[0], data, start[1], place)
    log = (folder / "out" / "metrics.jsonl").read_text().splitlines()
    return metrics, [json.loads(line) for line in log]


@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_policy_and_reference_are_alike_to_the_bit_before_the_first_step(
    start, tmp_path, precision
):
    # One pair: the reference then reads the rows of the first batch. Rows of another shape may
    # round differently in the last bit, by the kernels that a machine has.
    train = {"precision": precision, "learning_rate": 1e-3}
    _, log = run(start, tmp_path, [{}], epochs=2, batch=1, train=train)
    assert log[0]["margin"] == 0.0
    assert log[0]["loss"] == pytest.approx(math.log(2), rel=1e-6)
    assert log[1]["margin"] != 0.0


def test_rows_in_another_order_leave_no_margin_but_rounding(start, tmp_path):
    _, log = run(start, tmp_path, [{}] * 6, epochs=2, batch=6, train={"precision": "float32"})
    assert log[0]["margin"] == pytest.approx(0.0, abs=1e-6)


ORIGINS = [
    {"temperature": 0.5, "chosen_temperature": 1.5},
    {"temperature": 1.5, "chosen_temperature": 0.5},
    {"temperature": 1.0, "chosen_temperature": 1.0},
    {"temperature": None},
    {},
    "somewhere",
]


def test_pairs_with_a_hotter_answer_on_either_side_are_left_out_and_counted(start, tmp_path):
    metrics, _ = run(start, tmp_path, ORIGINS, hottest=1.0)
    assert (metrics["pairs"], metrics["too_hot"]) == (4, 2)
    with pytest.raises(OpenQwenError, match=r"All 2 pairs(.|\n)*raise hottest"):
        run(start, tmp_path, ORIGINS[:2], hottest=0.9)
