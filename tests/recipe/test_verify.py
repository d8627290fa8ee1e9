"""The proofs hold on a real pair of model and data, and each fails where its statement is false."""

import json

import pytest
import torch

from openqwen.cli import main
from openqwen.engine import Engine
from openqwen.model import ModelConfig, Qwen2, initialize, save_checkpoint
from openqwen.recipe import verify
from openqwen.tokenizer import TokenizerConfig, train_tokenizer
from openqwen.train import state
from openqwen.train.losses import Loss, next_token

CHATS = [
    [("Say one.", "one"), ("Again.", "one one")],
    [("What is two and two?", "It is four.")],
    [("Hi", "Hello!")],
]


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    folder = tmp_path_factory.mktemp("verify")
    texts = [text for chat in CHATS for turn in chat for text in turn] * 3
    tokenizer = train_tokenizer(texts, TokenizerConfig(vocabulary=300))
    model = Qwen2(
        ModelConfig(384, 32, 48, 2, 4, 2, max_position_embeddings=256, tie_word_embeddings=True)
    )
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, tokenizer, folder / "model")
    with open(folder / "d.jsonl", "w") as file:
        for chat in CHATS:
            roles = [
                m
                for q, a in chat
                for m in ({"role": "user", "content": q}, {"role": "assistant", "content": a})
            ]
            file.write(json.dumps({"messages": roles}) + "\n")
    return folder


def run(place):
    return main(
        [
            "verify",
            "--model",
            str(place / "model"),
            "--data",
            str(place / "d.jsonl"),
            "--ranks",
            "0",
        ]
    )


def test_every_proof_holds(place, capsys):
    assert run(place) == 0
    printed = capsys.readouterr().out
    assert printed.count("✓") == 6
    assert "✗" not in printed


def test_a_loss_that_divides_by_its_own_count_is_found_out(place, capsys, monkeypatch):
    def mean(model, rows):
        loss = next_token(model, rows)
        return Loss(loss.sum / loss.count, 1)

    monkeypatch.setattr(verify, "next_token", mean)
    assert run(place) == 1
    lines = [line for line in capsys.readouterr().out.split("\n") if "✗" in line]
    assert len(lines) == 3
    assert "any cut" in "".join(lines)


def test_an_engine_of_other_weights_is_found_out(place, capsys, monkeypatch):
    class Other(Engine):
        def __init__(self, model, tokenizer):
            other = Qwen2(model.config)
            initialize(other, torch.Generator().manual_seed(2))
            super().__init__(other.eval(), tokenizer)

    monkeypatch.setattr(verify, "Engine", Other)
    assert run(place) == 1
    assert "✗  the engine's log-probabilities" in capsys.readouterr().out


def test_a_state_that_forgets_the_optimizer_is_found_out(place, capsys, monkeypatch):
    whole = state._tensors

    def weights_alone(model, optimizers):
        return {n: t for n, t in whole(model, optimizers).items() if n.startswith("weights.")}

    monkeypatch.setattr(state, "_tensors", weights_alone)
    assert run(place) == 1
    assert "✗  a resumed run" in capsys.readouterr().out


def test_one_demonstration_is_too_few(place, tmp_path, capsys):
    one = tmp_path / "one.jsonl"
    one.write_text((place / "d.jsonl").read_text().split("\n")[0] + "\n")
    assert main(["verify", "--model", str(place / "model"), "--data", str(one)]) == 1
    assert "at least two" in capsys.readouterr().err
