"""The planner's arithmetic, held to what training really allocates; and what it says of the published models."""

import numpy as np
import pytest
import torch
from torch.profiler import ProfilerActivity, profile

from openqwen.cli import main
from openqwen.model import ModelConfig, Qwen2, initialize
from openqwen.recipe.capacity import DEVICES, GIB, Setting, best, choices, memory
from openqwen.train.losses import next_token
from openqwen.train.optimizer import OptimizerConfig, optimizers
from openqwen.train.parallel import ParallelConfig
from openqwen.train.recompute import recompute
from openqwen.train.rows import Rows

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
    (mover,) = optimizers(model, OptimizerConfig())
    rng = np.random.default_rng(0)
    rows = Rows.of([(rng.integers(0, config.vocab_size, n + 1), np.ones(n + 1, dtype=bool)) for n in lengths])

    def step():
        next_token(model, rows).sum.backward()
        mover.step()
        mover.zero_grad()

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


def test_what_fits_grows_with_devices_and_shrinks_with_the_network():
    small, large = ModelConfig.named("qwen2.5-7b"), ModelConfig.named("qwen2.5-72b")
    plain = Setting(8, ALONE, "nothing", 8_192, 8_192)
    found = best(small, plain, DEVICES["H100"], 2_048)
    assert found is not None
    assert memory(small, found).total < 80 * GIB
    assert memory(small, plain).total > 80 * GIB
    assert best(large, plain, DEVICES["H100"], 2_048) is None
    assert best(large, Setting(64, ALONE, "nothing", 8_192, 8_192), DEVICES["H100"], 2_048) is not None
    assert {s.parallel.tensor for s in choices(small, plain)} == {1, 2, 4}  # it has four key/value heads


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--gpus", "8xH100", "--model", "qwen2.5-7b"], ["7.62 billion weights on 8 x H100", "fastest", "hours"]),
        (["--gpus", "2x4090", "--model", "qwen2.5-72b"], ["does not fit on 2 x 4090"]),
        (["--gpus", "cpu"], ["on 1 x cpu", "pretrain", "online-dpo"]),
    ],
)
def test_the_plan_of_a_recipe(arguments, words, capsys):
    assert main(["plan", "tiny", *arguments]) == 0
    told = capsys.readouterr().out
    assert [word for word in words if word not in told] == []


def test_an_unknown_device_is_named(capsys):
    assert main(["plan", "tiny", "--gpus", "8xH10"]) == 1
    assert "H100" in capsys.readouterr().err
