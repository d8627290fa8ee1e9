"""AdamW with moments in 8 bits: a quarter of the memory, AdamW's course, and states that give back
every bit.
"""

import shutil
import sys

import pytest
import torch
from test_parallel import log, run
from training import Stop, network, same_bits, trainer

from openqwen.support.errors import OpenQwenError
from openqwen.support.files import read_jsonl
from openqwen.train import eight_bit
from openqwen.train.optimizer import OptimizerConfig, build_optimizers

EIGHT = OptimizerConfig(method="adamw8bit")


def test_without_the_library_an_error_names_it(monkeypatch):
    monkeypatch.setitem(sys.modules, "torchao.optim", None)
    with pytest.raises(OpenQwenError, match=r"torchao(.|\n)*pip install torchao"):
        build_optimizers(network(128), EIGHT)


@pytest.fixture
def library():
    pytest.importorskip("torchao", reason="8-bit AdamW is torchao's; it is not installed")
    with torch.compiler.set_stance(
        "force_eager"
    ):  # small tensors are moved sooner than code is compiled for them
        yield


def moments(model, config, tmp_path):
    """Bytes of the moments after a step."""
    one = trainer(tmp_path, model, steps=1, method=config.method)
    optimizers = build_optimizers(model, config)
    rows = one.batch(0)
    one.loss(rows[0]).sum.backward()
    total = 0
    for optimizer in optimizers:
        optimizer.step()
        for state in optimizer.state.values():
            moments = [state[key] for key in ("exp_avg", "exp_avg_sq")]
            total += sum(t.nbytes for m in moments for t in (eight_bit.parts(m).values() or [m]))
    return total


def test_moments_take_a_quarter(library, tmp_path):
    model = network(128)
    small, large = (
        moments(network(128), c, tmp_path / c.method) for c in (EIGHT, OptimizerConfig())
    )
    assert large == 8 * model.config.parameters()
    assert small / large == pytest.approx(0.26, abs=0.01)
    matrices = sum(p.numel() for p in model.parameters() if eight_bit.in_blocks(p))
    assert small == eight_bit.BYTES * matrices + 8 * (model.config.parameters() - matrices)


def test_the_loss_is_adamws_and_a_resumed_run_gives_an_uninterrupted_ones_bits(library, tmp_path):
    def one(name, stop_at=None, method="adamw8bit"):
        return trainer(
            tmp_path / name, network(128, tied=False), stop_at, steps=20, rate=2e-3, method=method
        )

    whole, plain = one("whole"), one("plain", method="adamw")
    whole.run()
    plain.run()
    for stop in (1, 12):
        with pytest.raises(Stop):
            one("cut", stop).run()
    resumed = one("cut")
    resumed.run()
    assert same_bits(whole.model, resumed.model)
    losses = [
        [entry["loss"] for entry in read_jsonl(tmp_path / n / "metrics.jsonl")]
        for n in ("whole", "plain")
    ]
    assert max(abs(a - b) / b for a, b in zip(*losses)) < 0.02
    assert not same_bits(whole.model, plain.model)


def close(ours, theirs):
    """One course, but for numbers that rounding put on the other side of the middle between two
    codes.
    """
    for mine, right in zip(log(ours), log(theirs), strict=True):
        assert mine["loss"] == pytest.approx(right["loss"], rel=1e-5 if mine["step"] < 2 else 1e-3)
        assert mine["gradient_norm"] == pytest.approx(
            right["gradient_norm"], rel=1e-4 if mine["step"] < 2 else 1e-2
        )


def test_two_processes_train_what_one_trains_and_take_over_each_others_state(library, tmp_path):
    one, two = (run(tmp_path / str(ranks), ranks, "eight") / "eight" for ranks in (1, 2))
    close(two, one)
    begun = run(tmp_path / "begun", 2, "eight", stop_at=2)
    shutil.copytree(begun, tmp_path / "alone")
    run(begun, 2, "eight")
    assert [e["loss"] for e in log(begun / "eight")] == [e["loss"] for e in log(two)]
    run(tmp_path / "alone", 1, "eight")
    close(tmp_path / "alone" / "eight", two)
