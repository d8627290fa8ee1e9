"""The preview shows exactly what is learned."""

import json

import pytest

from openqwen.cli import main
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train.conversations import encode_demonstration
from openqwen.train.preview import colored

CHAT = [
    {"role": "user", "content": "Wie heißt „apple“ auf Chinesisch? 苹果🍎"},
    {"role": "assistant", "content": "苹果 🍎\nJa."},
]


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(["Wie heißt apple? " * 20], TokenizerConfig(vocabulary=280))


def test_what_is_green_is_what_is_learned(tokenizer):
    text = colored(tokenizer, encode_demonstration(tokenizer, {"messages": CHAT}, "here"))
    green = "".join(text.plain[s.start : s.end] for s in text.spans if "green" in str(s.style))
    assert green == "苹果 🍎⏎\nJa.<|im_end|>"
    assert text.plain.startswith("<|im_start|>system\n")
    assert "苹果🍎<|im_end|>\n<|im_start|>assistant\n苹" in text.plain


def test_the_summary_counts_the_whole_file(tokenizer, tmp_path, capsys):
    tokenizer.save(tmp_path / "model")
    with open(tmp_path / "d.jsonl", "w") as file:
        for n in range(5):
            chat = [
                *CHAT,
                {"role": "user", "content": "x " * 40 * n},
                {"role": "assistant", "content": "ok"},
            ]
            file.write(json.dumps({"messages": chat}) + "\n")
    command = [
        "preview",
        "--model",
        str(tmp_path / "model"),
        "--demonstrations",
        str(tmp_path / "d.jsonl"),
    ]
    assert main([*command, "--show", "1", "--max-length", "400"]) == 0
    printed = capsys.readouterr().out
    assert printed.count("tokens, ") >= 1
    assert "record 2" not in printed
    assert "5 demonstrations" in printed
    assert "over 400 tokens" in printed
