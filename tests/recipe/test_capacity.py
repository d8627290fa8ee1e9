"""The planner's memory against what training really allocates; its output for published models."""

import re

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from openqwen.cli import main
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.recipe import plan_devices
from openqwen.recipe.capacity import DEVICES, Setting, memory, smallest_change
from openqwen.recipe.graph import recipe_class
from openqwen.train.eight_bit import BYTES, parts
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig, build_optimizers
from openqwen.train.packed_batch import PackedBatch
from openqwen.train.parallel import ParallelConfig
from openqwen.train.recompute import recompute

EXPERTS = {
    "num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 64,
    "shared_expert_intermediate_size": 160,
}
ALONE = ParallelConfig()


def allocated(config, again, lengths):
    """Bytes that a step holds at the most: weights and moments, and what the step itself adds."""
    model = Qwen2(config)
    initialize(model, torch.Generator().manual_seed(0))
    recompute(model, again)
    (optimizer,) = build_optimizers(model, OptimizerConfig())
    rng = np.random.default_rng(0)
    rows = PackedBatch.of(
        [(rng.integers(0, config.vocab_size, n + 1), np.ones(n + 1, dtype=bool)) for n in lengths]
    )

    def step():
        next_token(model, rows).sum.backward()
        optimizer.step()
        optimizer.zero_grad()

    step()  # the moments are there
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as watched:
        step()
    events = [e for e in watched.profiler.kineto_results.events() if e.name() == "[memory]"]
    changes = [e.nbytes() for e in sorted(events, key=lambda e: e.start_ns())]
    return 3 * 4 * config.parameters() + int(np.cumsum(changes).max())


@pytest.mark.parametrize("again", ["nothing", "cheap", "layers"])
@pytest.mark.parametrize("more", [{}, EXPERTS], ids=["dense", "experts"])
@pytest.mark.parametrize("size", [(64, 176, 4, 512), (128, 384, 6, 4_096)])
def test_memory_is_what_training_takes(again, more, size):
    lengths = [200, 300, 150, 400, 50, 360, 340, 248]
    width, inside, layers, vocabulary = size
    config = ModelConfig(vocabulary, width, inside, layers, 4, 2, tie_word_embeddings=True, **more)
    found = memory(config, Setting(1, ALONE, again, sum(lengths), 400))
    assert found.total == pytest.approx(allocated(config, again, lengths), rel=0.15)


def test_moments_in_eight_bits_are_counted():
    pytest.importorskip("torchao", reason="8-bit AdamW is torchao's; it is not installed")
    config = ModelConfig(4_096, 256, 768, 4, 4, 2, tie_word_embeddings=True)
    with torch.compiler.set_stance(
        "force_eager"
    ):  # it holds much more while it moves a matrix, not between steps
        found = memory(config, Setting(1, ALONE, "nothing", 512, 512, moments=BYTES))
        model = Qwen2(config)
        optimizers = build_optimizers(model, OptimizerConfig(method="adamw8bit"))
        rows = PackedBatch.of([(np.arange(20), np.ones(20, dtype=bool))])
        next_token(model, rows).sum.backward()
        for optimizer in optimizers:
            optimizer.step()
    states = [v for m in optimizers for s in m.state.values() for v in s.values()]
    kept = sum(t.nbytes for v in states for t in (parts(v).values() or [v]))
    assert found.optimizer == pytest.approx(kept, rel=0.02)


def test_data_stages_are_counted_whole():
    recipe = recipe_class()(
        pretrain={"stages": {
            "short": {"tokens": 3_000, "context": 128},
            "long": {"tokens": 1_000, "context": 16_384, "lengths": {16_384: 0.4, 1_024: 0.6}},
        }}
    )  # fmt: skip
    stage = next(plan_devices.trainings(recipe))
    assert (stage.tokens, stage.effort.longest, stage.effort.micro_tokens) == (
        4_000,
        16_384,
        16_384,
    )
    assert stage.context == pytest.approx((3_000 * 64 + 400 * 8_192 + 600 * 512) / 4_000)


def test_the_smallest_change_that_fits():
    small, device = ModelConfig.named("qwen2.5-7b"), DEVICES["H100"]
    plain = Setting(8, ALONE, "nothing", 32_768, 8_192)
    assert not device.holds(memory(small, plain))
    changed = smallest_change(small, plain, device)
    assert device.holds(memory(small, changed))
    assert (changed.devices, changed.micro_tokens, changed.longest) == (8, 8_192, 8_192)
    assert smallest_change(small, changed, device) == changed
    large = smallest_change(ModelConfig.named("qwen2.5-72b"), plain, device)
    assert large.devices > 8
    assert large.recompute != "nothing" or large.micro_tokens == 32_768
    too_long = Setting(8, ALONE, "nothing", 2**27, 2**27)
    assert smallest_change(small, too_long, device) is None


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["--gpus", "8xH100", "--model", "qwen2.5-7b"],
            ["7.616B weights on 8 x H100", "as written", "tokens/s"],
        ),
        (["--gpus", "2x4090", "--model", "qwen2.5-72b"], ["does not fit on 4,096"]),
        (["--gpus", "4090", "--model", "qwen2.5-7b"], ["would fit", "recompute", "16 x,"]),
        (["--gpus", "cpu"], ["on 1 x cpu", "pretrain", "online-dpo"]),
    ],
)
def test_the_plan_of_a_recipe(arguments, words, capsys):
    assert main(["plan", "tiny", *arguments]) == 0
    printed = capsys.readouterr().out
    assert [word for word in words if word not in printed] == []


def test_a_recipe_that_makes_no_data_is_told_a_rate_alone(tmp_path, capsys):
    """Its defaults say nothing of the data that the user brings."""
    rows = {}
    for name, text in [("own", "sft: {epochs: 2}"), ("made", "instruct: {demonstrations: 20000}")]:
        (tmp_path / f"{name}.yaml").write_text(text)
        assert main(["plan", str(tmp_path / f"{name}.yaml"), "--model", "qwen2.5-0.5b"]) == 0
        told = capsys.readouterr().out.splitlines()
        rows[name] = [line for line in told if line.startswith(" sft")][-1]
    assert re.search(r"[\d,]+ tokens/s *$", rows["own"])
    # (20,000 made and 2,000 repurposed demonstrations) x 2 epochs x 45 tokens
    assert re.search(r"tokens/s; [\d.]+M tokens: \d+s", rows["made"])


def test_an_unknown_device_is_named(capsys):
    assert main(["plan", "tiny", "--gpus", "8xH10"]) == 1
    assert "H100" in capsys.readouterr().err
    for text in ("0xcpu", "0xH100", ""):
        assert main(["plan", "tiny", "--gpus", text]) == 1
        assert f"There is no device '{text}'" in capsys.readouterr().err
