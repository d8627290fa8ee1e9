"""The trainer: exact resume, schedules, bad numbers, and the plan of the pre-training data."""

import errno
import json
import math
import sys
from contextlib import nullcontext

import pytest
import torch
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from training import Stop, network, trainer

from openqwen.model import ModelConfig, Qwen2
from openqwen.model.lora import LoraConfig, add_adapters
from openqwen.support.errors import OpenQwenError
from openqwen.support.generators import Generators
from openqwen.train import state
from openqwen.train.compute import computing
from openqwen.train.losses import Loss, next_token
from openqwen.train.optimizer import BadStepConfig, OptimizerConfig, build_optimizers
from openqwen.train.order import Epochs
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.validation import ValidationConfig


@pytest.mark.parametrize("method", ["adamw", "muon"])
@pytest.mark.parametrize("room", [0.25, 0.0], ids=["written aside", "written at once"])
@pytest.mark.parametrize("stops", [[1], [4, 5], [3, 7, 11]])
def test_a_resumed_run_gives_the_bits_of_an_uninterrupted_one(
    tmp_path, stops, room, method, monkeypatch
):
    monkeypatch.setattr(state, "_COPY_SHARE", room)
    whole = trainer(tmp_path / "whole", method=method)
    whole.run()
    for stop in stops:
        with pytest.raises(Stop):
            trainer(tmp_path / "cut", stop_at=stop, method=method).run()
    resumed = trainer(tmp_path / "cut", method=method)
    resumed.run()
    for (name, a), (_, b) in zip(whole.model.named_parameters(), resumed.model.named_parameters()):
        assert torch.equal(a, b), name
    logs = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "cut")]
    losses = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert losses[0] == losses[1]
    assert len(losses[0]) == 12


def test_states_without_a_save_start_again(tmp_path):
    with pytest.raises(Stop):
        trainer(tmp_path, stop_at=5, save_seconds=1e9).run()
    resumed = trainer(tmp_path, save_seconds=1e9)
    resumed.run()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 12


def test_only_two_states_are_kept_and_a_damaged_one_is_named(tmp_path):
    with pytest.raises(Stop):
        trainer(tmp_path, stop_at=8).run()
    states = sorted(p.name for p in tmp_path.glob("state-*"))
    assert states == ["state-00000007", "state-00000008"]
    (weights,) = (tmp_path / "state-00000008").glob("*.safetensors")
    weights.write_bytes(weights.read_bytes()[:100])
    with pytest.raises(OpenQwenError, match="state-00000008"):
        trainer(tmp_path).run()


def poisoned(one, steps, factor=float("nan")):
    """The trainer with a loss that is multiplied in some steps."""
    inner, at = one.batch, []

    def batch(step):
        at[:] = [step]
        return inner(step)

    def loss(rows):
        found = next_token(one.model, rows)
        return Loss(found.sum * factor, found.count) if at[0] in steps else found

    one.batch, one.loss = batch, loss
    one.name = lambda step: f"records {step} and {step + 1}"
    return one


def test_a_loss_that_is_not_finite_stops_with_the_step_and_its_records(tmp_path):
    with pytest.raises(
        OpenQwenError, match=r"step 4 of test \(records 4 and 5\)(.|\n)*lower the learning rate"
    ):
        poisoned(trainer(tmp_path), {4}).run()


def test_a_bad_step_is_left_out_and_logged(tmp_path, capsys):
    one = poisoned(trainer(tmp_path), {3, 7})
    one.optimizer_config.bad = BadStepConfig(action="skip")
    summary = one.run()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e.get("skipped")] == [3, 7]
    assert entries[3]["loss"] is None
    assert math.isfinite(summary["loss"])
    assert all(p.isfinite().all() for p in one.model.parameters())
    assert "Left out step 3 of test (records 3 and 4)" in capsys.readouterr().out


def test_skipping_gives_up_when_every_step_is_bad(tmp_path):
    one = poisoned(trainer(tmp_path), set(range(2, 12)))
    one.optimizer_config.bad = BadStepConfig(action="skip", patience=4)
    with pytest.raises(OpenQwenError, match="step 5 of test"):
        one.run()


def test_a_spike_is_a_gradient_far_above_the_usual(tmp_path, monkeypatch):
    monkeypatch.setattr("openqwen.train.trainer._USUAL", 5)
    one = poisoned(trainer(tmp_path), {8}, factor=1e4)
    one.optimizer_config.bad = BadStepConfig(action="skip", spike=10.0)
    one.run()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e.get("skipped")] == [8]


def test_a_spike_is_seen_right_behind_a_bad_step(tmp_path, monkeypatch):
    """The usual is that of the last usable steps: neither left-out nor empty ones."""
    monkeypatch.setattr("openqwen.train.trainer._USUAL", 5)
    one = poisoned(trainer(tmp_path), {7, 10}, factor=1e4)
    inner = one.batch
    one.batch = lambda step: inner(step)[: 0 if step == 8 else None]
    one.optimizer_config.bad = BadStepConfig(action="skip", spike=10.0)
    one.run()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e.get("skipped")] == [7, 10]


def test_steps_that_find_nothing_are_counted_and_enter_no_mean(tmp_path):
    one = trainer(tmp_path, steps=40)
    inner = one.batch
    one.batch = lambda step: inner(step)[: 0 if step in (3, 39) else None]
    summary = one.run()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [e["step"] for e in entries if e["loss"] is None] == [3, 39]
    assert summary["loss"] == entries[38]["loss"]
    assert summary["empty_steps"] == 2
    nothing = trainer(tmp_path / "nothing", steps=3)
    nothing.batch = lambda step: []
    summary = nothing.run()
    assert summary["empty_steps"] == 3
    assert math.isnan(summary["loss"])


def test_the_held_out_loss_is_told_though_the_last_step_found_nothing(tmp_path):
    one = trainer(tmp_path)
    inner = one.batch
    one.batch = lambda step: inner(step)[: 0 if step == 11 else None]
    one.held_out = lambda: [PackedBatch.of([(list(range(9)), [1] * 9)])]
    assert one.run()["validation_loss"] > 0


@pytest.mark.parametrize(("clip", "share"), [(1e-3, 1.0), (1e3, 0.0)])
def test_clipped_steps_are_marked_and_told(tmp_path, capsys, clip, share):
    summary = trainer(tmp_path, clip=clip).run()
    entries = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert summary["clipped_share"] == sum("clipped" in e for e in entries) / 12 == share
    assert ("12 of 12 steps were clipped" in capsys.readouterr().out) == (share == 1.0)


def test_a_full_disk_costs_a_state_and_not_the_training(tmp_path, monkeypatch, capsys):
    real = dcp.HuggingFaceStorageWriter.write_data
    calls = []

    def write_data(self, plan, planner):
        calls.append(plan)
        if len(calls) < 4:
            raise OSError(errno.ENOSPC, "No space left on device")
        return real(self, plan, planner)

    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", write_data)
    trainer(tmp_path).run()
    assert "was not saved" in capsys.readouterr().out
    assert sorted(p.name for p in tmp_path.glob("state-*")) == ["state-00000010", "state-00000011"]


def test_an_error_of_the_writing_thread_reaches_the_user(tmp_path, monkeypatch):
    monkeypatch.setattr(dcp.HuggingFaceStorageWriter, "write_data", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        trainer(tmp_path).run()


def test_a_state_of_several_files_resumes_to_the_bit(tmp_path, monkeypatch):
    monkeypatch.setattr(state, "_FILE_BYTES", 30_000)
    whole = trainer(tmp_path / "whole")
    whole.run()
    with pytest.raises(Stop):
        trainer(tmp_path / "cut", stop_at=6).run()
    assert len(list((tmp_path / "cut" / "state-00000006").glob("*.safetensors"))) > 2
    resumed = trainer(tmp_path / "cut")
    resumed.run()
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters())
    )


def test_a_step_without_a_target_and_a_rate_that_explodes_are_named(tmp_path):
    one = trainer(tmp_path / "nothing")
    one.batch = lambda step: [PackedBatch.of([(list(range(9)), [int(step < 3)] * 9)])]
    with pytest.raises(OpenQwenError, match="Step 3 of test has no target"):
        one.run()
    with pytest.raises(OpenQwenError, match=r"step \d+ of test(.|\n)*lower the learning rate"):
        trainer(tmp_path / "rate", rate=1e30).run()


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory"),
        torch.OutOfMemoryError(),
        MemoryError(),
    ],
    ids=lambda e: type(e).__name__,
)
def test_memory_that_runs_out_names_the_step_and_the_levers(tmp_path, error):
    one = poisoned(trainer(tmp_path), set())
    batch, loss, steps = one.batch, one.loss, []
    one.batch = lambda step: steps.append(step) or batch(step)

    def fails_in_step_3(rows):
        if steps[-1] == 3:
            raise error
        return loss(rows)

    one.loss = fails_in_step_3
    with pytest.raises(
        OpenQwenError, match=r"records 3 and 4(.|\n)*16 tokens(.|\n)*micro_tokens(.|\n)*recompute"
    ):
        one.run()
    trainer(tmp_path).run()  # goes on from the last state
    other = trainer(tmp_path / "other")
    other.loss = lambda rows: 1 / 0
    with pytest.raises(ZeroDivisionError):
        other.run()


def test_a_resumed_run_keeps_the_best_weights_of_an_uninterrupted_one(tmp_path):
    def turning(folder, stop_at=None):
        """Learns, then unlearns."""
        one = trainer(folder, stop_at=stop_at)
        inner, at = one.batch, [0]

        def batch(step):
            at[0] = step
            return inner(step)

        def loss(rows):
            found = next_token(one.model, rows)
            return Loss(
                found.sum * (-1.0 if one.model.training and at[0] > 6 else 1.0), found.count
            )

        one.batch, one.loss = batch, loss
        return one

    def measured(folder, stop_at=None):
        one = turning(folder, stop_at)
        one.validation = ValidationConfig(every=2, outcome="best")
        one.held_out = lambda: [PackedBatch.of([(list(range(9)), [1] * 9)])]
        return one

    whole = measured(tmp_path / "whole")
    summary = whole.run()
    for stop in (3, 7):
        with pytest.raises(Stop):
            measured(tmp_path / "cut", stop_at=stop).run()
    resumed = measured(tmp_path / "cut")
    assert resumed.run()["best_validation_loss"] == summary["best_validation_loss"]
    assert all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), resumed.model.parameters())
    )
    # The best weights from before the oldest state stay; those before them are gone.
    states = sorted((tmp_path / "cut").glob("state-*"))
    oldest = int(states[0].name.removeprefix("state-"))
    kept = [int(path.name.removeprefix("best-")) for path in (tmp_path / "cut").glob("best-*")]
    assert len([step for step in kept if step < oldest]) <= 1, (kept, oldest)
    assert kept
    plain = turning(tmp_path / "plain")
    plain.run()
    assert not all(
        torch.equal(a, b) for a, b in zip(whole.model.parameters(), plain.model.parameters())
    )
    logs = [(tmp_path / f / "metrics.jsonl").read_text().splitlines() for f in ("whole", "plain")]
    trained = [[json.loads(line)["loss"] for line in log] for log in logs]
    assert trained[0] == trained[1]  # measuring moves nothing


def test_bfloat16_computes_rounded_and_keeps_float32_weights(tmp_path):
    runs = {}
    for precision in ("auto", "float32", "bfloat16"):
        one = trainer(tmp_path / precision)
        one.optimizer_config.precision = precision
        one.run()
        assert {p.dtype for p in one.model.parameters()} == {torch.float32}
        log = (tmp_path / precision / "metrics.jsonl").read_text().splitlines()
        runs[precision] = [json.loads(line)["loss"] for line in log]
    assert runs["auto"] == runs["float32"] != runs["bfloat16"]
    assert runs["bfloat16"] == pytest.approx(runs["float32"], rel=2e-2)


def test_float32_that_was_asked_for_is_no_tf32(tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(
        "openqwen.train.trainer.tf32", lambda allowed: told.append(allowed) or nullcontext()
    )
    for precision in ("float32", "bfloat16", "auto"):
        trainer(tmp_path / precision, steps=1, precision=precision).run()
    assert told == [False, True, False]  # auto on a CPU is float32


def test_a_bfloat16_gradient_is_near_the_float32_one(tmp_path):
    one = trainer(tmp_path)
    (rows, _) = one.batch(0)
    gradients = []
    for precision in ("float32", "bfloat16"):
        one.model.zero_grad()
        with computing(precision, torch.device("cpu")):
            loss = next_token(one.model, rows)
        assert loss.sum.dtype == torch.float32
        loss.sum.backward()
        gradients.append(torch.cat([p.grad.flatten() for p in one.model.parameters()]))
    assert gradients[1].dtype == torch.float32
    assert torch.nn.functional.cosine_similarity(*gradients, dim=0) > 0.999


def test_curves_go_to_tensorboard_too_once_a_step(tmp_path):
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    for stop in (7, None):
        one = trainer(tmp_path, stop_at=stop)
        one.optimizer_config.track = ["tensorboard"]
        if stop:
            with pytest.raises(Stop):
                one.run()
        else:
            one.run()
    read = events.EventAccumulator(str(tmp_path / "output" / "tensorboard"))
    read.Reload()
    log = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    curve = read.Scalars("test/loss")
    assert [point.step for point in curve] == list(range(12))
    assert [point.value for point in curve] == pytest.approx([entry["loss"] for entry in log])


def test_a_tracker_that_is_not_installed_is_named(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    one = trainer(tmp_path)
    one.optimizer_config.track = ["wandb"]
    with pytest.raises(OpenQwenError, match=r"wandb(.|\n)*pip install wandb"):
        one.run()


def test_operations_are_those_of_the_closed_form(tmp_path):
    config = ModelConfig(64, 32, 48, 2, 2, 1, tie_word_embeddings=True)
    rows = PackedBatch.of([([1, 2, 3, 4], [0, 0, 1, 1]), ([1, 2, 3], [0, 1, 1])])
    layer = 2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 48
    keys = (1 + 2 + 3) + (1 + 2)
    expected = 6 * (5 * 2 * layer + 4 * 64 * 32) + 12 * 2 * 32 * keys
    assert rows.flops(config) == expected
    one = trainer(tmp_path)
    one.log_mfu = True
    summary = one.run()
    assert summary["mfu"] > 0
    assert next(iter(summary)) == "loss"


def test_a_log_of_an_earlier_version_goes_on_with_mfu(tmp_path):
    with pytest.raises(Stop):
        trainer(tmp_path, stop_at=6).run()
    log = tmp_path / "metrics.jsonl"
    entries = [json.loads(line) | {"peak_share": 0.5} for line in log.read_text().splitlines()]
    log.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    one = trainer(tmp_path)
    one.log_mfu = True
    one.run()
    entries = [json.loads(line) for line in log.read_text().splitlines()]
    assert [entry["mfu"] for entry in entries[:6]] == [0.5] * 6
    assert all("mfu" in entry and "peak_share" not in entry for entry in entries)


def test_gradient_is_clipped_to_the_norm(tmp_path):
    one = trainer(tmp_path, steps=1)
    one.optimizer_config = OptimizerConfig(learning_rate=1e-2, clip=0.01)
    for p in one.model.parameters():
        p.grad = torch.ones_like(p)
    norm, scale = one._norm_and_scale(4)
    total = sum(p.numel() for p in one.model.parameters())
    assert norm == pytest.approx(math.sqrt(total) / 4)
    assert scale * math.sqrt(total) == pytest.approx(0.01, rel=1e-3)


def test_a_step_moves_by_the_scaled_gradient(tmp_path):
    """AdamW scales the gradient itself; against the plain way, which writes it back scaled."""
    one, two = trainer(tmp_path), trainer(tmp_path)
    plain = torch.optim.AdamW(two.model.parameters(), lr=1e-2, weight_decay=0.1, foreach=False)
    (fused,) = build_optimizers(one.model, OptimizerConfig(learning_rate=1e-2, beta2=0.999))
    for p, q in zip(one.model.parameters(), two.model.parameters()):
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
        q.grad = p.grad * 0.125
    one._update(fused, 0.125)
    for group in plain.param_groups:
        group["params"] = [p for p in group["params"] if p.dim() > 1]
    plain.step()
    for p, q in zip(one.model.parameters(), two.model.parameters()):
        if p.dim() > 1:
            torch.testing.assert_close(p, q, rtol=1e-6, atol=1e-8)


def test_only_matrices_decay():
    model = Qwen2(ModelConfig(64, 32, 48, 2, 2, 1, tie_word_embeddings=True))
    (adamw,) = build_optimizers(model, OptimizerConfig())
    decayed, spared = adamw.param_groups
    assert all(p.dim() == 2 for p in decayed["params"])
    assert all(p.dim() == 1 for p in spared["params"])
    assert spared["weight_decay"] == 0
    assert len(decayed["params"]) + len(spared["params"]) == len(list(model.parameters()))


@pytest.mark.parametrize("method", ["adamw", "muon"])
def test_vectors_move_by_a_rate_of_their_own(tmp_path, method):
    start = dict(network().named_parameters())
    moved = []
    for name, more in (("plain", {}), ("fast", {"vector_rate": 10})):
        one = trainer(tmp_path / name, steps=1, weight_decay=0, method=method, **more)
        one.run()
        moved.append({n: p.detach() - start[n].detach() for n, p in one.model.named_parameters()})
    for name, plain in moved[0].items():
        factor = 10 if plain.dim() == 1 else 1
        torch.testing.assert_close(moved[1][name], factor * plain, rtol=1e-3, atol=1e-6)
    assert "vector_rate" not in OptimizerConfig().model_dump(), "keys of earlier versions stay"


def test_epochs_show_every_record_once_an_epoch():
    order = Epochs(10, 2.5, 4, Generators(1))
    seen = [i for s in range(order.steps) for i in order.batch(s)]
    assert len(seen) == 25
    assert sorted(seen[:10]) == sorted(seen[10:20]) == list(range(10))


def test_frozen_weights_are_neither_moved_nor_saved(tmp_path):
    def adapted():
        one = trainer(tmp_path)
        add_adapters(one.model, LoraConfig(rank=2), Generators(5).torch("lora"))
        return one

    one = adapted()
    before = {n: p.clone() for n, p in one.model.named_parameters() if not p.requires_grad}
    stopped = adapted()
    stopped.batch = trainer(tmp_path, stop_at=6).batch
    with pytest.raises(Stop):
        stopped.run()
    (saved,) = (tmp_path / "state-00000006").glob("*.safetensors")
    assert {n.rpartition(".")[2] for n in load_file(saved)} == {"lora_A", "lora_B"}
    one.run()
    assert all(torch.equal(before[n], p) for n, p in one.model.named_parameters() if n in before)


@pytest.mark.slow
def test_compiled_layers_train_alike(tmp_path):
    runs = []
    for compiled in (False, True):
        one = trainer(tmp_path / str(compiled), steps=3)
        one.optimizer_config.compile = compiled
        one.run()
        log = (tmp_path / str(compiled) / "metrics.jsonl").read_text().splitlines()
        runs.append([json.loads(line)["loss"] for line in log])
        assert not any("_orig_mod" in name for name in one.model.state_dict())
    assert runs[1] == pytest.approx(runs[0], rel=1e-4)
