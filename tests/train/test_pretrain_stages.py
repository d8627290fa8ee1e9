"""Data stages: each with its own rows, RoPE base and learning rate, one optimizer throughout,
resumed to the bit.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from pydantic import ValidationError

from openqwen.model import ModelConfig, Qwen2, initialize, load_model, save_checkpoint
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.train import data_stages
from openqwen.train.data_stages import StagedTrainer
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig, build_optimizers, learning_rate
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.pretrain import ExtendConfig, PretrainConfig, plan_stages, pretrain
from openqwen.train.trainer import Place

NETWORK = {"hidden_size": 32, "intermediate_size": 48, "layers": 2, "heads": 2, "kv_heads": 1}
EXPERTS = {"experts": 4, "experts_per_token": 2, "expert_width": 16, "shared_width": 32}
STAGES = {
    "short": {"tokens": 1_200, "context": 16},
    "long": {"tokens": 900, "context": 64, "rope_theta": 1e6, "learning_rate": 2e-3, "schedule": "linear",
             "final_share": 0.0, "warmup_share": 0.0, "mixture": {"a": 1.0}},
    "joined": {"tokens": 600, "context": 32, "isolated": False, "rope_theta": 1e7, "batch_tokens": 100},
}  # fmt: skip


class Tokenizer:
    """Stands for the tokenizer of a checkpoint."""

    eos_id, endoftext_id = 1, 0

    def save(self, folder):
        pass


class Source:
    """Documents that a network can learn."""

    def __init__(self, step):
        self.step, self.lengths = step, np.array([20, 70, 9, 90, 33] * 8)

    def document(self, number):
        return (np.arange(self.lengths[number], dtype=np.uint32) * self.step + number) % 90


SOURCES = {"a": Source(1), "b": Source(3)}


def config(network=NETWORK, **changes):
    values = {
        "network": network,
        "data": {"tokens": 1, "batch_tokens": 200, "micro_tokens": 150},
        "stages": STAGES,
        "train": OptimizerConfig(learning_rate=5e-3, warmup_share=0.1),
        "save": {"seconds": 0.0},
    }
    return PretrainConfig.model_validate(values | changes)


def train(folder, settings=None, start=None, held=()):
    output = folder / ("output" if os.environ.get("RANK", "0") == "0" else "follower")
    output.mkdir(parents=True, exist_ok=True)
    place = Place(output, folder / "scratch", 3, "test")
    return pretrain(settings or config(), SOURCES, Tokenizer(), 90, start, place, held)


def checkpoint(folder, positions):
    model = Qwen2(
        ModelConfig(128, 32, 48, 2, 2, 1, max_position_embeddings=positions, rope_theta=5e5)
    )
    initialize(model, torch.Generator().manual_seed(0))
    save_checkpoint(model, Tokenizer(), folder)
    return folder


ONE = {"network": {}, "stages": {}}
DATA = {"tokens": 200, "batch_tokens": 200, "micro_tokens": 150}


@pytest.mark.parametrize(
    ("asked", "positions", "row", "theta"),
    [
        ({}, 8_192, 4_096, 5e5),
        ({"rope_theta": 1e4}, 8_192, 4_096, 1e4),
        ({"data": DATA | {"context": 64}}, 64, 64, 5e5),
        (
            {
                "stages": {
                    "a": {"tokens": 200, "context": 32, "rope_theta": 1e6},
                    "b": {"tokens": 200},
                }
            },
            8_192,
            4_096,
            5e5,
        ),
    ],
)
def test_going_on_keeps_the_checkpoint_s_base_and_context_unless_asked(
    tmp_path, asked, positions, row, theta, capsys
):
    start = checkpoint(tmp_path / "start", 8_192)
    settings = config(**ONE | {"data": DATA} | asked)
    train(tmp_path, settings, start)
    saved = load_model(tmp_path / "output").config
    assert (saved.max_position_embeddings, saved.rope_theta) == (positions, theta)
    told = capsys.readouterr().out
    assert ("RoPE base: 500,000 in the checkpoint" in told) == (theta != 5e5)
    assert ("context: 8,192 in the checkpoint, 64" in told) == (positions != 8_192)
    assert settings.resolved(saved)[-1].data.context == row


def test_rows_are_no_longer_than_the_checkpoint_s_context():
    settings = config(**ONE | {"data": DATA})
    short = ModelConfig(128, 32, 48, 2, 2, 1, max_position_embeddings=48)
    (stage,) = settings.resolved(short)
    assert (stage.data.context, stage.positions) == (48, 48)
    (stage,) = settings.resolved()
    assert (stage.data.context, stage.positions, stage.rope_theta) == (4_096, 4_096, 1e4)
    (stage,) = ExtendConfig(data={"tokens": 1, "context": 32_768}).resolved(short)
    assert (stage.data.context, stage.positions, stage.rope_theta) == (32_768, 32_768, 1e6)


def log_of(folder):
    return [
        json.loads(line) for line in (folder / "output" / "metrics.jsonl").read_text().splitlines()
    ]


def test_stages_are_one_training_written_out(tmp_path):
    """Against a loop in plain PyTorch: one AdamW, rows, base and rate by the stage."""
    train(tmp_path)
    generators = Generators(3)
    model = Qwen2(ModelConfig(128, 32, 48, 2, 2, 1, tie_word_embeddings=True))
    initialize(model, generators.torch("weights"))
    settings = config()
    (adamw,) = build_optimizers(model, settings.train)
    for planned in plan_stages(settings, SOURCES, generators, None):
        model.config = model.model.config = model.config.with_rope(
            planned.stage.rope_theta, planned.stage.data.context
        )
        for step in range(planned.dataset.steps):
            losses = [
                next_token(model, PackedBatch.of(samples))
                for samples in planned.dataset.batch(step)
            ]
            (sum(x.sum for x in losses) / sum(x.count for x in losses)).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            for group in adamw.param_groups:
                group["lr"] = learning_rate(planned.stage.train, step, planned.dataset.steps)
            adamw.step()
            adamw.zero_grad()
    trained = load_model(tmp_path / "output")
    for (name, a), (_, b) in zip(trained.named_parameters(), model.named_parameters(), strict=True):
        assert torch.allclose(a, b, atol=2e-5), name
    assert trained.config.rope_theta == 1e7
    assert trained.config.max_position_embeddings == 32


def test_the_log_and_the_record_show_the_stages_and_their_rates(tmp_path, capsys):
    metrics = train(tmp_path)
    log = log_of(tmp_path)
    record = json.loads((tmp_path / "output" / "data_stages.json").read_text())
    assert [stage["name"] for stage in record] == ["short", "long", "joined"]
    assert [stage["rope_theta"] for stage in record] == [1e4, 1e6, 1e7]
    assert [stage["context"] for stage in record] == [16, 64, 32]
    for number, stage in enumerate(record):
        own = log[stage["first_step"] : stage["first_step"] + stage["steps"]]
        assert {entry["data_stage"] for entry in own} == {number + 1}
        train_config = config().resolved()[number].train
        expected = [learning_rate(train_config, n, len(own)) for n in range(len(own))]
        assert [entry["learning_rate"] for entry in own] == expected
        assert stage["tokens"] == sum(entry["tokens"] for entry in own)
    printed = capsys.readouterr().out
    assert "data stage long: 900 tokens, rows of 64, RoPE base 1,000,000" in printed
    assert printed.count("  data stage ") == 3  # each is entered once
    assert "data_stage" not in metrics
    assert log[-1]["loss"] < log[0]["loss"]


class Stop(Exception):
    """Stands for a kill."""


def test_killed_anywhere_and_resumed_across_the_edges_gives_the_same_bits(tmp_path, monkeypatch):
    train(tmp_path / "whole")
    edges = [planned.first for planned in plan_stages(config(), SOURCES, Generators(3), None)][1:]
    whole = load_model(tmp_path / "whole" / "output")
    real = StagedTrainer._step
    for stop in (edges[0] - 1, edges[0], edges[0] + 1, edges[1], edges[1] + 2):

        def step(self, number, *rest, stop=stop):
            if number == stop:
                raise Stop
            return real(self, number, *rest)

        monkeypatch.setattr(StagedTrainer, "_step", step)
        with pytest.raises(Stop):
            train(tmp_path / f"cut-{stop}")
        monkeypatch.setattr(StagedTrainer, "_step", real)
        assert (tmp_path / f"cut-{stop}" / "scratch" / f"state-{stop:08d}").is_dir()
        train(tmp_path / f"cut-{stop}")
        resumed = load_model(tmp_path / f"cut-{stop}" / "output")
        for (name, a), (_, b) in zip(
            whole.named_parameters(), resumed.named_parameters(), strict=True
        ):
            assert torch.equal(a, b), (stop, name)
        assert [e["loss"] for e in log_of(tmp_path / f"cut-{stop}")] == [
            e["loss"] for e in log_of(tmp_path / "whole")
        ]


def test_two_processes_train_what_one_trains_through_all_stages(tmp_path):
    train(tmp_path / "one")
    launch = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node",
        "2",
        "--master-addr",
        "127.0.0.1",
    ]
    launch += ["--rdzv-backend", "c10d", "--rdzv-endpoint", "127.0.0.1:0"]
    done = subprocess.run(
        [*launch, __file__, str(tmp_path / "two")], capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = (log_of(tmp_path / name) for name in ("one", "two"))
    assert [e["data_stage"] for e in one] == [e["data_stage"] for e in two]
    assert [e["loss"] for e in one] == pytest.approx([e["loss"] for e in two], rel=1e-4)
    a, b = (load_model(tmp_path / name / "output") for name in ("one", "two"))
    assert a.config == b.config
    for (name, p), (_, q) in zip(a.named_parameters(), b.named_parameters(), strict=True):
        assert torch.allclose(p, q, rtol=1e-3, atol=1e-3), name


def test_one_stage_named_or_not_is_the_same_training(tmp_path):
    plain = config(
        stages={}, data={"tokens": 1_200, "context": 16, "batch_tokens": 200, "micro_tokens": 150}
    )
    named = config(stages={"only": {"tokens": 1_200, "context": 16}})
    for name, settings in (("plain", plain), ("named", named)):
        train(tmp_path / name, settings)
    a, b = (load_model(tmp_path / name / "output") for name in ("plain", "named"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters(), strict=True))
    assert not (tmp_path / "plain" / "output" / "data_stages.json").exists()
    assert "data_stage" not in log_of(tmp_path / "named")[0]


@pytest.mark.parametrize("experts", [{}, EXPERTS], ids=["dense", "experts"])
def test_held_out_text_is_measured_and_the_best_weights_are_kept(tmp_path, experts):
    """The rate rises until it is far too high, so that the best weights are not the last."""
    settings = config(
        network=NETWORK | experts,
        stages={},
        data={"tokens": 2_000, "context": 16, "batch_tokens": 200, "micro_tokens": 40},
        train=OptimizerConfig(learning_rate=4.0, warmup_share=0.95),
        validation={"tokens": 100, "every": 2, "outcome": "best"},
    )
    held = [
        (SOURCES["a"].document(n)[:9].astype(np.int64), np.ones(9, dtype=bool)) for n in range(6)
    ]
    summary = train(tmp_path, settings, held=held)
    measured = {e["step"]: e["validation_loss"] for e in log_of(tmp_path) if "validation_loss" in e}
    assert list(measured) == [1, 3, 5, 7, 9]
    assert min(measured.values()) == summary["best_validation_loss"] < measured[9]
    with torch.no_grad():
        kept = next_token(load_model(tmp_path / "output"), PackedBatch.of(held))
    assert float(kept.sum) / kept.count == pytest.approx(summary["best_validation_loss"], rel=1e-5)


def test_validation_that_cannot_be_is_refused():
    with pytest.raises(ValidationError, match="no text is held out"):
        config(validation={"every": 2})
    with pytest.raises(ValidationError, match="an early data stage"):
        config(validation={"tokens": 100, "outcome": "best"})


def test_a_mixture_of_experts_goes_through_stages(tmp_path):
    train(tmp_path, config(network=NETWORK | EXPERTS))
    assert json.loads((tmp_path / "output" / "experts.json").read_text())["layers"] == [0, 1]
    assert load_model(tmp_path / "output").config.rope_theta == 1e7


def test_training_goes_on_from_a_checkpoint(tmp_path):
    model = Qwen2(ModelConfig(96, 32, 48, 2, 2, 1, tie_word_embeddings=True, rms_norm_eps=1e-5))
    initialize(model, torch.Generator().manual_seed(1))
    save_checkpoint(model, Tokenizer(), tmp_path / "start")
    small = {"short": {"tokens": 200, "context": 16, "learning_rate": 1e-9, "rope_theta": 5e5}}
    train(tmp_path, config(network={}, stages=small), tmp_path / "start")
    trained = load_model(tmp_path / "output")
    assert all(
        torch.allclose(p, q, atol=1e-6)
        for p, q in zip(model.parameters(), trained.parameters(), strict=True)
    )
    assert (trained.config.rms_norm_eps, trained.config.rope_theta) == (1e-5, 5e5)


def test_a_token_beyond_the_vocabulary_is_named_before_training(tmp_path):
    class Bad(Source):
        def document(self, number):
            return super().document(number) + (200 if number == 7 else 0)

    place = Place(tmp_path / "output", tmp_path / "scratch", 3, "test")
    with pytest.raises(
        OpenQwenError, match=r"Document 7 of the source 'b' holds the token id 215, .* ends at 89"
    ):
        pretrain(config(), {"a": Source(1), "b": Bad(1)}, Tokenizer(), 90, None, place)
    assert not (tmp_path / "scratch").exists()


def test_a_mixture_naming_a_missing_source_names_the_stage(tmp_path):
    bad = {**STAGES, "long": STAGES["long"] | {"mixture": {"c": 0.5}}}
    with pytest.raises(OpenQwenError, match=r"names 'c'(.|\n)*stages.long, data.mixture"):
        train(tmp_path, config(stages=bad))


@pytest.mark.parametrize(
    ("stage", "told"),
    [
        (
            {"lengths": {16: 0.4, 8: 0.5}},
            "data stage 'bad': the shares of the lengths must sum to 1",
        ),
        ({"lengths": {8: 1.0}}, "the longest length must be the context"),
        ({"lengths": {16: 1.5, 8: -0.5}}, "a share of the lengths is negative"),
        ({"mixture": {"a": -1}}, "a share of the mixture is negative"),
        ({"fill_in_middle": {"a": 2}}, "not between 0 and 1"),
    ],
)
def test_faulty_stages_are_refused_when_they_are_read(stage, told):
    with pytest.raises(ValidationError, match=told):
        config(stages={"bad": {"tokens": 100, "context": 16} | stage})


def test_a_network_beside_a_checkpoint_is_refused():
    with pytest.raises(ValidationError, match="its network is used"):
        PretrainConfig(model="somewhere", network={"layers": 2})


def test_the_order_of_the_stages_is_part_of_what_an_artifact_depends_on():
    turned = dict(reversed(STAGES.items()))
    assert config().model_dump(mode="json") != config(stages=turned).model_dump(mode="json")
    assert json.dumps(config().model_dump(mode="json"), sort_keys=True) != json.dumps(
        config(stages=turned).model_dump(mode="json"), sort_keys=True
    )
    assert [stage.name for stage in ExtendConfig(stages=turned).resolved()] == [
        "joined",
        "long",
        "short",
    ]
    assert data_stages.DataStage.model_fields["tokens"].is_required()


if __name__ == "__main__":
    torch.set_num_threads(1)
    train(Path(sys.argv[1]))
    torch.distributed.destroy_process_group()
